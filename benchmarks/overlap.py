"""``moetrain bench overlap``: training steps with overlap off and on, and without communication in the layers, by size.

All in one process, on one model, in turns. The floor runs the layers as they are when off, but with copies of this
rank's own rows in place of what other ranks would send: its numbers are wrong on purpose, and no overlap can be faster.
What tells rows where to go stays real, as do the reduction of gradients and their norm, which overlap does not hide.

Of the time that communication adds to forward and backward pass, off − floor, overlap hides (off − on) / (off − floor).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.benchmarks.random_tokens import on_random_tokens
from moetrain.benchmarks.report import Report, say, table
from moetrain.benchmarks.step import benchmark_config
from moetrain.benchmarks.timing import Deadline
from moetrain.config import Config, check_world, overlap_obstacle
from moetrain.data import Batch
from moetrain.errors import ConfigError
from moetrain.overlap import choose_overlap
from moetrain.parallel import allreduce_rmsnorm, any_rank, dispatch, environment_world_size, tensor
from moetrain.parallel.wire import Wire
from moetrain.ranks import joined_mesh
from moetrain.trainer import Trainer

WAYS = ("off", "on", "floor")
MEASURABLE = 0.02
"""Of forward and backward pass: where communication adds less, nobody can tell how much of it is hidden."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    config: str
    overrides: Sequence[str]
    overlap: Sequence[str]
    tokens: Sequence[int]
    steps: int
    rounds: int
    budget_seconds: float | None = None
    json: str | None = None


def overlap_command(options: Options) -> int:
    """Run the benchmark; returns 0. Raises ConfigError for a config without communication, or a size it cannot have."""
    config = benchmark_config(options.config, options.overrides)
    if not config.parallel.communicates:
        raise ConfigError("bench overlap: there is nothing to hide with parallel.tp = 1 and parallel.ep = 1")
    if (obstacle := overlap_obstacle(config)) is not None:
        raise ConfigError(f"bench overlap: {obstacle}")
    largest = max((sized(config, tokens) for tokens in options.tokens), key=lambda each: each.train.tokens_per_step)
    with joined_mesh(config) as mesh, on_random_tokens(largest, mesh) as config:
        trainer = Trainer(with_overlap(config, "off"), mesh)
        try:
            _bench(trainer, [sized(config, tokens) for tokens in options.tokens], options)
        finally:
            trainer.checkpointer.close()
            if trainer.logger is not None:
                trainer.logger.close()
    return 0


def sized(config: Config, tokens: int) -> Config:
    """The config with one micro-batch of so many tokens a step, of sequences as long as halves allow."""
    dp = environment_world_size() // config.parallel.tp or 1
    length = min(config.data.seq_len, tokens // (2 * config.parallel.tp))
    if length == 0 or tokens % (length * config.parallel.tp):
        raise ConfigError(
            f"--tokens {tokens}: makes no two halves of whole sequences of up to data.seq_len = {config.data.seq_len} "
            f"for each of parallel.tp = {config.parallel.tp} ranks; powers of two do"
        )
    size = replace(
        config,
        data=replace(config.data, seq_len=length),
        train=replace(config.train, micro_batch=tokens // length, tokens_per_step=tokens * dp),
    )
    check_world(with_overlap(size, "on"), environment_world_size())
    return size


def with_overlap(config: Config, overlap: Literal["off", "auto", "on"]) -> Config:
    return replace(config, parallel=replace(config.parallel, overlap=overlap))


def _bench(trainer: Trainer, sizes: Sequence[Config], options: Options) -> None:
    mesh = trainer.mesh
    deadline = Deadline(options.budget_seconds)
    report = Report("overlap", mesh.device, options.json if mesh.rank == 0 else None)
    parallel = sizes[0].parallel
    report.contents |= {
        "data": "random tokens",
        "parallel": asdict(parallel),
        "world_size": mesh.world_size,
        "floor": "off, with copies in place of the layers' communication: its numbers are wrong on purpose",
    }
    rows = []
    for size in sizes:
        if any_rank(deadline.passed, mesh):
            say("--budget-seconds is spent")
            break
        rows.append(_measure(trainer, size, options, deadline))
        report.add(rows[-1])
    _show(rows, options.overlap)


def _measure(trainer: Trainer, size: Config, options: Options, deadline: Deadline) -> dict[str, Any]:
    mesh = trainer.mesh
    auto, on = (choose_overlap(with_overlap(size, overlap), mesh) for overlap in ("auto", "on"))
    sequences = size.micro_batch(mesh.dp)
    per_rank = sequences // size.parallel.tp
    first = on.split or (per_rank + 1) // 2
    row: dict[str, Any] = {
        "tokens": sequences * size.data.seq_len,
        "sequences": [sequences, size.data.seq_len],
        "split": [first, per_rank - first],
        "auto": auto.state,
        "reason": auto.reason,
    }
    say(f"{row['tokens']:,} tokens a micro-batch, {sequences} × {size.data.seq_len}; auto: {auto.reason or auto.state}")
    decoders = {"off": with_overlap(size, "off"), "on": on.applied(size), "floor": with_overlap(size, "off")}
    trainer.config, trainer.accumulation = size, size.accumulation_steps(mesh.dp)
    samples: dict[str, list[Sample]] = {way: [] for way in options.overlap}
    loader = trainer._loader()
    try:
        for _ in range(options.rounds):
            for way in options.overlap:
                removed: AbstractContextManager[None] = communication_removed() if way == "floor" else nullcontext()
                trainer.model.config = decoders[way]
                with removed:
                    samples[way] += _timed_steps(trainer, loader, options.steps)
            if any_rank(deadline.passed, mesh):
                break
    finally:
        loader.close()
    for way, found in samples.items():
        row[way] = {
            f"{name}_ms": 1e3 * statistics.median(getattr(sample, name) for sample in found) for name in Sample._fields
        }
        passes = [1e3 * sample.passes for sample in found]
        row[way] |= {"passes_ms_range": [min(passes), max(passes)], "steps": len(found)}
    return row | _hidden({way: row[way]["passes_ms"] for way in samples})


def _hidden(passes_ms: Mapping[str, float]) -> dict[str, float]:
    """What communication adds to the passes, and which part of that overlap hides, where there are the times."""
    found = {}
    off, on, floor = (passes_ms.get(way) for way in WAYS)
    if off is not None and floor is not None:
        found["exposed"] = (off - floor) / off
        if on is not None and found["exposed"] > MEASURABLE:
            found["hidden"] = (off - on) / (off - floor)
    return found


class Sample(NamedTuple):
    """Seconds of one step."""

    passes: float
    """Forward and backward pass, of the device."""
    step: float
    """All of it, to the next one."""
    host: float
    """Until the host had issued the passes; with ep it waits for the device in every layer."""


def _timed_steps(trainer: Trainer, batches: Iterator[Batch], steps: int) -> list[Sample]:
    """`steps` steps, after two that are not timed."""
    clock = _Clock(trainer.mesh.device)
    begun, passed, host = [], [], []

    def accumulate(batches: Iterator[Batch]) -> Any:
        begun.append(clock.now())
        start = time.perf_counter()
        result = Trainer._accumulate_gradients(trainer, batches)
        host.append(time.perf_counter() - start)
        passed.append(clock.now())
        return result

    with mock.patch.object(trainer, "_accumulate_gradients", accumulate):
        for _ in range(2 + steps):
            trainer._step(batches)
    begun.append(clock.now())
    begins, ends = clock.seconds(begun), clock.seconds(passed)
    return [Sample(ends[i] - begins[i], begins[i + 1] - begins[i], host[i]) for i in range(2, 2 + steps)]


class _Clock:
    """The time of the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._first = self.now()

    def now(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, marks: Sequence[Any]) -> list[float]:
        """Since the clock was made; waits for the device."""
        if self._device.type != "cuda":
            return [mark - self._first for mark in marks]
        torch.cuda.synchronize(self._device)
        return [self._first.elapsed_time(mark) / 1e3 for mark in marks]


def _show(rows: Sequence[dict[str, Any]], ways: Sequence[str]) -> None:
    say("\nforward and backward pass, ms; of the host: until they were issued")
    lines = []
    for row in rows:
        times = [row[way]["passes_ms"] for way in ways]
        hosts = [row[way]["host_ms"] for way in ways if way != "floor"]
        relative = row["on"]["passes_ms"] / row["off"]["passes_ms"] if {"off", "on"} <= set(ways) else None
        shares = [f"{row[name]:.0%}" if name in row else None for name in ("exposed", "hidden")]
        lines.append([f"{row['tokens']:,}", *times, relative, *shares, *hosts, row["auto"]])
    hosts_of = [f"host {way}" for way in ways if way != "floor"]
    table(["tokens", *ways, "on / off", "exposed", "hidden", *hosts_of, "auto"], lines)


# ---------------------------------------------------------------------------------------------------------------------
# The floor


@contextmanager
def communication_removed() -> Iterator[None]:
    """Layers take rows of their own in place of what other ranks would send: numbers are wrong, shapes are right.

    Integers and weights of pairs travel, for the sizes of what follows depend on them. For the whole process.
    """
    with ExitStack() as replaced:
        for module in (tensor, allreduce_rmsnorm):
            replaced.enter_context(mock.patch.object(module, "gathered", _repeated))
            replaced.enter_context(mock.patch.object(module, "summed_to_shards", _first_shard))
        local = mock.patch.object(
            allreduce_rmsnorm, "_choose", lambda backend, x, group, blocks: allreduce_rmsnorm._Composed(group)
        )
        replaced.enter_context(local)
        replaced.enter_context(mock.patch.object(dispatch.Exchange, "all_to_all", _as_many_rows))
        yield


_gathered, _all_to_all = tensor.gathered, dispatch.Exchange.all_to_all


def _repeated(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    if not x.is_floating_point():
        return _gathered(x, group)
    return x.repeat(group.size(), *[1] * (x.dim() - 1))


def _first_shard(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    return x[: x.shape[0] // group.size()].clone(memory_format=torch.contiguous_format)


def _as_many_rows(self: dispatch.Exchange, x: Tensor, send: list[int], receive: list[int], wire: Wire) -> Tensor:
    if not x.is_floating_point() or x.dim() == 1:
        return _all_to_all(self, x, send, receive, wire)
    rows = sum(receive)
    if not len(x):
        return x.new_zeros(rows, *x.shape[1:])
    return x.repeat(-(-rows // len(x)) or 1, 1)[:rows]
