"""Results of benchmarks: a JSON file with everything needed to repeat the run, and tables on the terminal."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from moetrain.files import write_text

PACKAGES = ("moetrain", "torch", "triton", "transformers", "liger-kernel", "sonicmoe", "torchao", "nvidia-cutlass-dsl")


class Report:
    """The rows of one run. Its JSON file is written anew, whole, after every row: a killed run keeps what it had."""

    def __init__(self, benchmark: str, device: torch.device, file: str | None) -> None:
        self._file = None if file is None else Path(file)
        self.contents: dict[str, Any] = {
            "benchmark": benchmark,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["moetrain", *sys.argv[1:]]),
            "commit": _output("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"),
            "machine": _machine(device),
            "rows": [],
        }
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)

    def add(self, row: dict[str, Any]) -> None:
        self.contents["rows"].append(row)
        self.write()

    def write(self) -> None:
        if self._file is not None:
            write_text(self._file, json.dumps(self.contents, indent=1) + "\n")


def say(text: str = "") -> None:
    """A line that is seen at once, also through a pipe."""
    print(text, flush=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """The first column to the left, the others to the right; floats with three digits, None as –."""
    text = [[_cell(value) for value in row] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*text, strict=True)]
    for row in text:
        first, *rest = [f"{value:>{width}}" for value, width in zip(row, widths, strict=True)]
        say("  " + "  ".join([f"{row[0]:<{len(first)}}", *rest]).rstrip())


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def _machine(device: torch.device) -> dict[str, Any]:
    machine: dict[str, Any] = {"host_cpu": platform.machine(), "python": platform.python_version(), "gpu": None}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "gpu": properties.name,
            "gpu_memory_mib": properties.total_memory >> 20,
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    machine["versions"] = {name: version for name in PACKAGES if (version := _version(name)) is not None}
    return machine


def _version(package: str) -> str | None:
    if package == "torch":
        return str(torch.__version__)  # with the CUDA build
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else None
