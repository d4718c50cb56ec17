"""``moetrain profile overlap``: what a step's GPU does with overlap off and on, as a picture and as figures.

Runs under torchrun, on random tokens, with the defaults of bench step. After warm-up, steps are timed without a
profiler; then each is recorded by itself, its kernels alone, and the one of median length is drawn; then one more with
the host, which takes longer, to learn which kernels are which layer's.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from moetrain.benchmarks.overlap import with_overlap
from moetrain.benchmarks.random_tokens import on_random_tokens
from moetrain.benchmarks.report import Report, say, table
from moetrain.benchmarks.step import benchmark_config
from moetrain.benchmarks.timing import synchronize
from moetrain.config import Config, check_world, overlap_obstacle
from moetrain.errors import ConfigError
from moetrain.model import Block, Decoder
from moetrain.overlap import choose_overlap
from moetrain.parallel import Phases, environment_world_size
from moetrain.ranks import joined_mesh
from moetrain.timeline import Activity, Timeline, read_trace, recorded, timeline, traced, with_layers
from moetrain.timeline_plot import draw_timelines
from moetrain.trainer import Trainer

WARMUP = 3

Step = Callable[[], None]
Recorder = Callable[[Step, bool], list[Activity]]
"""Runs a step and returns what the GPU did, with layers if asked to record the host."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    config: str
    overrides: Sequence[str]
    out: str
    steps: int


def profile_overlap_command(options: Options) -> int:
    """Draw and print; returns 0. Raises ConfigError for a config that does not overlap, or without GPUs."""
    out = Path(options.out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {options.out}: is a picture; its name ends in .png, and the figures get .json")
    config = benchmark_config(options.config, options.overrides)
    if not config.parallel.communicates:
        raise ConfigError("profile overlap: there is nothing to hide with parallel.tp = 1 and parallel.ep = 1")
    if (obstacle := overlap_obstacle(config)) is not None:
        raise ConfigError(f"profile overlap: {obstacle}")
    check_world(with_overlap(config, "on"), environment_world_size())
    with joined_mesh(config) as mesh:
        if mesh.device.type != "cuda":
            raise ConfigError("profile overlap: records what GPUs do, and there is none here")
        with on_random_tokens(config, mesh) as config:
            trainer = Trainer(with_overlap(config, "off"), mesh)
            try:
                profile_overlap(trainer, config, out, options.steps, _record)
            finally:
                trainer.checkpointer.close()
                if trainer.logger is not None:
                    trainer.logger.close()
    return 0


def profile_overlap(trainer: Trainer, config: Config, out: Path, steps: int, record: Recorder) -> None:
    """Record on all ranks; rank 0 draws its own timelines and writes the figures beside the picture."""
    mesh = trainer.mesh
    on = choose_overlap(with_overlap(config, "on"), mesh)
    loader = trainer._loader()
    timelines, rows = {}, []
    try:
        for name, resolved in (("off", with_overlap(config, "off")), ("on", on.applied(config))):
            say(f"overlap {name}")
            trainer.model.config = resolved
            timelines[name], row = _profile(trainer, partial(trainer._step, loader), steps, record)
            rows.append({"name": name, **row})
    finally:
        loader.close()
    if mesh.rank > 0:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    parallel = config.parallel
    title = (
        f"{mesh.world_size} ranks, tp = {parallel.tp}, ep = {parallel.ep}: a step of "
        f"{config.train.tokens_per_step:,} tokens on rank 0"
    )
    draw_timelines(timelines, title, out)
    figures = out.with_suffix(".json")
    report = Report("overlap timeline", mesh.device, str(figures))
    report.contents |= {"data": "random tokens", "parallel": asdict(parallel), "world_size": mesh.world_size}
    for row in rows:
        report.add(row)
    _show(rows)
    say(f"{out}, {figures}")


def _profile(trainer: Trainer, step: Step, steps: int, record: Recorder) -> tuple[Timeline, dict[str, Any]]:
    """The timeline of the step of median length, and its figures."""
    device, group = trainer.mesh.device, trainer.mesh.host_group
    for _ in range(WARMUP):
        step()
    seconds = []
    for _ in range(steps):
        _meet(device, group)
        start = time.perf_counter()
        step()
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    found = []
    for _ in range(steps):
        _meet(device, group)
        found.append(record(step, False))
    _meet(device, group)
    with layers_named(trainer.model):
        labelled = record(step, True)
    by_length = sorted(found, key=lambda activities: timeline(activities).figures()["span_ms"])
    chosen = timeline(with_layers(by_length[len(found) // 2], labelled))
    row = {
        "step_ms": 1e3 * statistics.median(seconds),
        **chosen.figures(),
        "exposed_ms_by_layer": chosen.exposed_by_layer,
        "spans_ms": {
            "compute": _rounded(chosen.compute),
            "communication": _rounded(chosen.communication),
            "exposed": _rounded(chosen.exposed),
        },
        "layers": [[layer, "backward" if back else "forward", start, end] for layer, back, start, end in chosen.layers],
    }
    return chosen, row


def _rounded(spans: Sequence[tuple[float, float]]) -> list[list[float]]:
    """To nanoseconds, which is all that a profiler knows."""
    return [[round(start, 6), round(end, 6)] for start, end in spans]


def _meet(device: torch.device, group: dist.ProcessGroup) -> None:
    """All ranks begin together, on idle devices."""
    synchronize(device)
    dist.barrier(group)


def _record(step: Step, with_host: bool) -> list[Activity]:
    activities = [ProfilerActivity.CUDA, *([ProfilerActivity.CPU] if with_host else [])]
    with profile(activities=activities) as profiler:
        step()
        torch.cuda.synchronize()
    if not with_host:
        return recorded(profiler)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json.gz"
        profiler.export_chrome_trace(str(file))
        return traced(read_trace(file))


@contextmanager
def layers_named(model: Decoder) -> Iterator[None]:
    """Profiles show a range "layer N" of the host wherever it works on a layer."""
    blocks = [cast(Block, block) for block in model.blocks]
    for layer, block in enumerate(blocks):
        block.phases = partial(_named_phases, f"layer {layer}", block.phases)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for block in blocks:
            del block.phases


def _named_phases(name: str, phases_of: Callable[..., Phases[Any]], *arguments: Any) -> Phases[Any]:
    phases = phases_of(*arguments)
    while True:
        with record_function(name):
            try:
                handed_over = next(phases)
            except StopIteration as end:
                return end.value
        yield handed_over


def _show(rows: Sequence[dict[str, Any]]) -> None:
    names = ("step_ms", "span_ms", "compute_ms", "communication_ms", "exposed_ms", "idle_ms")
    say("a step, ms: unprofiled; and of the recorded one, from the first kernel to the last")
    table(
        ("overlap", *(name.removesuffix("_ms") for name in names), "hidden", "kernels"),
        [[row["name"], *(row[name] for name in names), f"{row['hidden']:.0%}", row["kernels"]] for row in rows],
    )
    layers = sorted({layer for row in rows for layer in row["exposed_ms_by_layer"]})
    if layers:
        say("\nexposed communication, ms")
        table(
            ("layer", *(row["name"] for row in rows)),
            [[str(layer), *(row["exposed_ms_by_layer"].get(layer) for row in rows)] for layer in layers],
        )
