"""What `parallel.overlap` comes to on this machine: whether micro-batches are split, and where.

`moetrain tune overlap` measures a machine once and leaves its constants in a file beside the autotuner's, for each kind
of GPU and CPU, number of ranks and nodes, and versions of torch, triton and moetrain.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from moetrain import __version__
from moetrain.config import Config, halves_obstacle, overlap_obstacle
from moetrain.files import write_text
from moetrain.kernels.autotune import cache_folder
from moetrain.overlap_cost import Machine, best_split
from moetrain.parallel import Mesh, on_rank_0

FILE_NAME = "overlap.json"
FORMAT = "moetrain overlap 1"

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overlap:
    """A decision, alike on all ranks."""

    state: Literal["off", "on"]
    split: int | None = None
    """Sequences of each tp rank in the first half; None: half of them."""
    reason: str | None = None
    """For the log; None where there was nothing to decide."""

    def applied(self, config: Config) -> Config:
        """The config with this in place of `auto`."""
        return replace(config, parallel=replace(config.parallel, overlap=self.state, overlap_split=self.split))


def choose_overlap(config: Config, mesh: Mesh) -> Overlap:
    """Decide, on rank 0 for all; collective."""
    return on_rank_0(lambda: _choose(config, mesh), mesh.host_group)


def _choose(config: Config, mesh: Mesh) -> Overlap:
    parallel = config.parallel
    if parallel.overlap == "off" or not parallel.communicates:
        return Overlap("off")
    forced = parallel.overlap == "on"
    if mesh.device.type != "cuda":  # nothing runs beside anything
        return Overlap("on", parallel.overlap_split) if forced else Overlap("off")
    obstacle = None if forced else _obstacle(config, mesh.dp)
    if obstacle is not None:
        return Overlap("off", reason=f"overlap: off, {obstacle}")
    machine = read_machine(machine_name(mesh))
    if machine is None:
        if forced:
            return Overlap("on", parallel.overlap_split)
        return Overlap(
            "off", reason=f"overlap: off, this machine has not been measured; do so once: {tune_command(mesh)}"
        )
    return decide(config, mesh.dp, machine)


def decide(config: Config, dp: int, machine: Machine) -> Overlap:
    """What the cost model says; `on` is obeyed, and only split where it says. There must be two halves."""
    forced = config.parallel.overlap == "on"
    try:
        split, predicted = best_split(config, dp, machine)
    except KeyError as missing:
        if forced:
            return Overlap("on", config.parallel.overlap_split)
        return Overlap("off", reason=f"overlap: off, this machine was measured without {missing}")
    sequences = config.micro_batch(dp) // config.parallel.tp
    times = f"{1e3 * predicted.halves:.3g} ms for the layers of a micro-batch, {1e3 * predicted.whole:.3g} ms whole"
    if predicted.host_bound:
        times += "; the host is the limit"
    if not (predicted.pays or forced):
        return Overlap("off", reason=f"overlap: off, by the cost model ({times})")
    return Overlap("on", split, f"overlap: on, {split} and {sequences - split} sequences of each tp rank ({times})")


def _obstacle(config: Config, dp: int) -> str | None:
    """Why auto does not even ask: it changes no result, and gives way to all else."""
    router = config.router
    for key, counts in {
        "router.capacity_factor": router.capacity_factor is not None,
        "router.rounding": router.rounding != "none",
        "router.jitter": router.jitter > 0,
    }.items():
        if counts and config.model.num_experts:
            return f"{key} would count the tokens of a half, and give other results (parallel.overlap=on does it)"
    return overlap_obstacle(config) or halves_obstacle(config, dp)


def tune_command(mesh: Mesh) -> str:
    """How to measure the machine for runs like this one."""
    if _nodes(mesh.world_size) > 1:
        return "`moetrain tune overlap`, started under torchrun on all nodes as this run is"
    return f"torchrun --nproc-per-node {mesh.world_size} -m moetrain tune overlap"


# ---------------------------------------------------------------------------------------------------------------------
# The file


def machine_name(mesh: Mesh) -> str:
    """What a measurement holds for."""
    return ", ".join(
        [
            torch.cuda.get_device_name(mesh.device),
            _cpu_name(),
            f"{mesh.world_size} ranks on {_nodes(mesh.world_size)} nodes",
            f"torch {torch.__version__}",
            f"triton {_version('triton')}",
            f"moetrain {__version__}",
        ]
    )


def machine_file() -> Path:
    return cache_folder() / FILE_NAME


def read_machine(name: str) -> Machine | None:
    """The constants of a machine; None, with a warning where the file is damaged, if they are not there."""
    try:
        return Machine.from_json(_entries(machine_file())[name])
    except KeyError:
        return None
    except (TypeError, AttributeError) as error:
        _logger.warning(f"{machine_file()}: ignored, measure again: {error}")
        return None


def write_machine(name: str, machine: Machine) -> Path:
    """Add the constants to the file, or replace them; returns its path."""
    file = machine_file()
    file.parent.mkdir(parents=True, exist_ok=True)
    contents = {"format": FORMAT, "machines": {**_entries(file), name: asdict(machine)}}
    write_text(file, json.dumps(contents, indent=1, sort_keys=True) + "\n")
    return file


def _entries(file: Path) -> dict[str, Any]:
    try:
        contents = json.loads(file.read_text(encoding="utf-8"))
        if contents["format"] != FORMAT:
            raise ValueError(f"not in the format {FORMAT!r}")
        entries: dict[str, Any] = dict(contents["machines"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, KeyError) as error:
        _logger.warning(f"{file}: ignored, measure again: {error}")
        return {}
    return entries


def _nodes(world_size: int) -> int:
    return world_size // int(os.environ.get("LOCAL_WORLD_SIZE", world_size)) or 1


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
