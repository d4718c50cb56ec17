"""``moetrain bench hf``: time and memory of taking a model from transformers' format and giving it back.

A checkpoint of a config's shape with random weights is written, exported, and the export imported. What a stage has
read goes when it ends. Linux tells the largest resident memory of a process since it was last asked to forget it.
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.benchmarks.report import Report, say, table
from moetrain.checkpoint import write_checkpoint
from moetrain.checkpoint_shards import LazyTensor, TensorEntry
from moetrain.config import Config, from_dict, load_config
from moetrain.errors import ConfigError
from moetrain.flops import parameters
from moetrain.huggingface.exporting import export_model
from moetrain.huggingface.families import family_for
from moetrain.huggingface.importing import import_model
from moetrain.huggingface.reader import shapes_of
from moetrain.ranks import joined_mesh

MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    config: str
    dir: str
    """A new folder for the files: twice the size of the weights."""
    overrides: Sequence[str] = ()
    dtype: str = "bfloat16"
    """Of the weights."""
    json: str | None = None


def huggingface_command(options: Options) -> int:
    """Run the benchmark; returns 0. Raises ConfigError, and HuggingFaceError if no family has such a model."""
    config = load_config(options.config, [*options.overrides, f"train.param_dtype={options.dtype}"])
    family, _ = family_for(config)
    folder = Path(options.dir)
    if folder.exists():
        raise ConfigError(f"--dir {folder}: exists already; choose another name")
    largest = max(entry.bytes for entry in _entries(config).values())
    total = sum(entry.bytes for entry in _entries(config).values())
    report = Report("hf", torch.device("cpu"), options.json)
    report.contents |= {
        "config": asdict(config),
        "family": family.model_type,
        "bytes": total,
        "largest_tensor": largest,
    }
    say(
        f"{family.architecture}, {parameters(config).total:,} parameters, {total / MIB:,.0f} MiB in {options.dtype}; "
        f"largest tensor {largest / MIB:,.0f} MiB"
    )
    folder.mkdir(parents=True)
    stages: dict[str, Callable[[Config, Path], None]] = {"write": _write, "export": _export, "import": _import}
    try:
        rows = []
        for name, stage in stages.items():
            row = _measured(stage, config, folder)
            report.add({"stage": name, **row})
            rows.append([name, row["seconds"], row["before_mib"], row["peak_mib"]])
    finally:
        shutil.rmtree(folder)
    table(["stage", "seconds", "MiB before", "peak MiB"], rows)
    return 0


def _measured(stage: Callable[[Config, Path], None], config: Config, folder: Path) -> dict[str, Any]:
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before, start = _memory("VmRSS"), time.perf_counter()
    stage(config, folder)
    return {"seconds": time.perf_counter() - start, "before_mib": before, "peak_mib": _memory("VmHWM")}


def _memory(key: str) -> float:
    """MiB of this process, by proc(5): resident now (VmRSS), or the most since it was asked to forget (VmHWM)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[key].split()[0]) / 1024


def _write(config: Config, folder: Path) -> None:
    def normal(entry: TensorEntry) -> Tensor:
        return torch.empty(entry.shape, dtype=entry.dtype).normal_(0.0, 0.02)

    tensors = {
        f"model.{name}": LazyTensor(entry.shape, entry.dtype, partial(normal, entry))
        for name, entry in _entries(config).items()
    }
    progress = {"config": asdict(config), "data": None}
    write_checkpoint(folder / "made", tensors, {"step": 0, "world_size": 1, "ep": 1, "progress": progress})


def _export(config: Config, folder: Path) -> None:
    with joined_mesh(from_dict({"run": {"device": "cpu"}})) as mesh:
        export_model(folder / "made", folder / "exported", mesh)
    shutil.rmtree(folder / "made")


def _import(config: Config, folder: Path) -> None:
    import_model(str(folder / "exported"), folder / "imported")


def _entries(config: Config) -> dict[str, TensorEntry]:
    dtype = getattr(torch, config.train.param_dtype)
    return {
        name: TensorEntry(shape, torch.float32 if name.endswith("router.bias") else dtype)
        for name, shape in shapes_of(config).items()
    }
