"""``moetrain bench allreduce-rmsnorm``: the fused kernels by number of blocks, beside what they replace and the links.

Runs under torchrun, on GPUs of one host. Everything is timed as replays of CUDA graphs, on inputs that take turns so
that none is found in the L2 cache; the ranks begin each replay together.

- floor: every rank pulls its rows from the others and pushes as many to each, by copies, without waiting for anyone
- pull floor: the first half of that, all that the links must do where y stays sharded

Shapes: T rows, D width, R rows of a rank.
"""

from __future__ import annotations

import io
import statistics
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.benchmarks.peers import relative_error
from moetrain.benchmarks.report import Report, say, table
from moetrain.benchmarks.timing import Deadline
from moetrain.errors import ConfigError
from moetrain.kernels import allreduce_rmsnorm_triton as kernels
from moetrain.kernels.allreduce_rmsnorm import owned_rows
from moetrain.parallel import (
    Mesh,
    any_rank,
    check_symmetric,
    create_mesh,
    destroy_mesh,
    environment_world_size,
    fused_allreduce_rmsnorm,
    reduce_scatter_add_rmsnorm,
)
from moetrain.parallel.symmetric import SymmetricBuffer, Workspace, workspace
from moetrain.parallel.tensor import gathered, summed_to_shards

SHAPES = ("8192,4096", "16384,4096", "1024,4096", "8192,8192", "16384,8192", "1024,8192")
BLOCKS = (2, 4, 8, 16, 24, 32, 64, 132)
EPS = 1e-5
DTYPE = torch.bfloat16
TOLERANCE = 5e-3

TWO_SHOT = "two-shot all-reduce + add + norm"
"""By torch, which may refuse."""
SHARDED = (
    "pull floor",
    "fused, sharded",
    "NCCL reduce-scatter + add + norm",
    "NCCL reduce-scatter + add-norm kernel",
)
"""What leaves y with its owner; the others are compared with an all-reduce."""
COLD_BYTES = 128 << 20
"""Of inputs that take turns: more than twice the L2 cache."""
MIN_CALLS = 4
"""In a graph, so that how far apart ranks begin is divided by them."""
TIMEOUT_SECONDS = 20
"""That a kernel waits for another rank's."""

Call = Callable[[int], object]
"""Given the number of the inputs to use."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    shapes: Sequence[str] | None = None
    blocks: Sequence[int] | None = None
    rounds: int = 11
    budget_seconds: float | None = None
    json: str | None = None


def allreduce_rmsnorm_command(options: Options) -> int:
    """Run the benchmark; returns 0. Raises ConfigError where there are no ranks that read one another's memory."""
    shapes = [_shape(text) for text in options.shapes or SHAPES]
    if environment_world_size() < 2:
        raise ConfigError(
            "bench allreduce-rmsnorm: needs several ranks; start it with torchrun --nproc-per-node 2 -m …"
        )
    mesh = create_mesh(tp=environment_world_size(), timeout_minutes=1.0)
    space = workspace(mesh.tp_group, mesh.device)
    if not isinstance(space, Workspace):
        raise ConfigError(f"bench allreduce-rmsnorm: {space}")
    space.meeting = replace(space.meeting, timeout_ms=1000 * TIMEOUT_SECONDS)
    with redirect_stdout(sys.stdout if mesh.rank == 0 else io.StringIO()):
        _bench(mesh, space, shapes, options)
    destroy_mesh()
    return 0


def _shape(text: str) -> tuple[int, int]:
    try:
        rows, width = map(int, text.split(","))
    except ValueError:
        raise ConfigError(f"--shapes {text}: takes rows,width") from None
    if rows < 1 or not 1 <= width <= kernels.MAX_WIDTH:
        raise ConfigError(f"--shapes {text}: takes at least a row, and widths up to {kernels.MAX_WIDTH}")
    return rows, width


def _bench(mesh: Mesh, space: Workspace, shapes: Sequence[tuple[int, int]], options: Options) -> None:
    deadline = Deadline(options.budget_seconds)
    report = Report("allreduce-rmsnorm", mesh.device, options.json if mesh.rank == 0 else None)
    report.contents |= {"world_size": mesh.world_size, "dtype": str(DTYPE), "rounds": options.rounds}
    blocks = [number for number in options.blocks or BLOCKS if number <= space.max_blocks]
    largest = max(rows * width * _sets(rows, width) for rows, width in shapes) * DTYPE.itemsize
    memory = SymmetricBuffer(largest, mesh.tp_group, mesh.device)
    for rows, width in shapes:
        say(f"{rows} × {width} on {mesh.world_size} ranks, µs")
        inputs = _Inputs(rows, width, space, memory, mesh)
        _check(inputs)
        found: list[dict[str, Any]] = []
        for name, number, call in _candidates(inputs, blocks):
            if any_rank(deadline.passed, mesh):
                say("  --budget-seconds is spent")
                break
            inputs.refill()
            row = {"rows": rows, "width": width, "name": name, "blocks": number}
            try:
                row["us"] = _microseconds(call, inputs.sets, options.rounds, mesh)
            except RuntimeError as error:
                if name != TWO_SHOT:
                    raise
                say(f"  {name}: {error}")
                continue
            found.append(row)
            report.add(row)
            say(f"  {_label(row)}: {row['us']:.1f}")
        check_symmetric()
        _show(found)


def _sets(rows: int, width: int) -> int:
    return max(2, -(-COLD_BYTES // (rows * width * DTYPE.itemsize)))


class _Inputs:
    """Several sets of inputs of one shape, x in symmetric memory."""

    def __init__(self, rows: int, width: int, space: Workspace, memory: SymmetricBuffer, mesh: Mesh) -> None:
        self.rows, self.width, self.space, self.mesh, self.group = rows, width, space, mesh, mesh.tp_group
        self.sets = _sets(rows, width)
        self._random = torch.Generator(mesh.device).manual_seed(mesh.rank)
        size = rows * width
        self.xs = [
            tuple(whole[number * size :][:size].view(rows, width) for whole in memory.views(DTYPE))
            for number in range(self.sets)
        ]
        # two_shot_all_reduce_ finds the group's memory by the tensor that was allocated, not by an address in it.
        own = memory.own[: memory.size // DTYPE.itemsize * DTYPE.itemsize].view(DTYPE)
        self.allocated = [own[number * size :][:size].view(rows, width) for number in range(self.sets)]
        first, count = owned_rows(rows, space.world, space.rank)
        self.own = slice(first, first + count)
        share, _ = owned_rows(rows, space.world, 1)
        self.shards = space.shards(share * width, DTYPE)
        self.weight_D = self._normal(width)
        self.residuals = [self._normal(rows, width) for _ in range(self.sets)]
        self.own_residuals = [residual_TD[self.own] for residual_TD in self.residuals]
        self.h_RD = self._normal(count, width)
        self.rstd_R = torch.rand(count, generator=self._random, device=mesh.device)
        self.copy_RD = torch.empty_like(self.h_RD)
        self.refill()

    def refill(self) -> None:
        """Collectives that work in place double their numbers."""
        for x_TD, *_ in self.xs:
            x_TD.normal_(generator=self._random)

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self._random, device=self.mesh.device).to(DTYPE)


def _candidates(inputs: _Inputs, blocks: Sequence[int]) -> list[tuple[str, int | None, Call]]:
    """Name, blocks and call of everything that is timed."""
    space, group, width = inputs.space, inputs.group, inputs.width
    weight_D = inputs.weight_D

    def norm(x_TD: Tensor, residual_TD: Tensor) -> Tensor:
        return F.rms_norm(x_TD + residual_TD, (width,), weight_D, EPS)

    def pull(i: int) -> None:
        for x_TD in inputs.xs[i][1:]:
            inputs.copy_RD.copy_(x_TD[inputs.own])

    def pull_and_push(i: int) -> None:
        pull(i)
        for x_TD in inputs.xs[i][1:]:
            x_TD[inputs.own].copy_(inputs.copy_RD)

    def all_reduced(i: int) -> None:
        dist.all_reduce(inputs.xs[i][0], group=group)
        norm(inputs.xs[i][0], inputs.residuals[i])

    def two_shot(i: int) -> None:
        torch.ops.symm_mem.two_shot_all_reduce_(inputs.allocated[i], "sum", group.group_name)
        norm(inputs.allocated[i], inputs.residuals[i])

    def scattered(i: int) -> Tensor:
        return norm(summed_to_shards(inputs.xs[i][0], group), inputs.own_residuals[i])

    def scattered_and_gathered(i: int) -> None:
        gathered(scattered(i), group)

    def fused(i: int, number: int, sharded: bool = False) -> None:
        shards = () if sharded else inputs.shards
        residual_RD, meeting = inputs.own_residuals[i], space.meeting
        kernels.forward(inputs.xs[i], shards, residual_RD, weight_D, EPS, inputs.rows, space.rank, number, meeting)

    def backward(i: int, number: int) -> None:
        kernels.backward(
            inputs.xs[i],
            inputs.shards,
            inputs.own_residuals[i],
            inputs.h_RD,
            inputs.rstd_R,
            weight_D,
            inputs.rows,
            space.rank,
            number,
            space.meeting,
        )

    def copied(i: int, number: int) -> None:
        fused_allreduce_rmsnorm(inputs.residuals[i], inputs.own_residuals[i], weight_D, EPS, group, blocks=number)

    def composed(i: int) -> None:
        reduce_scatter_add_rmsnorm(
            inputs.xs[i][0], inputs.own_residuals[i], weight_D, EPS, group, backend="collectives"
        )

    calls: list[tuple[str, int | None, Call]] = [
        ("floor", None, pull_and_push),
        ("NCCL all-reduce + add + norm", None, all_reduced),
    ]
    calls += [("fused", n, partial(fused, number=n)) for n in reversed(blocks)]
    calls += [("backward", n, partial(backward, number=n)) for n in reversed(blocks)]
    calls += [("pull floor", None, pull)]
    if inputs.rows % space.world == 0:
        calls += [
            ("NCCL reduce-scatter + add + norm", None, scattered),
            ("NCCL reduce-scatter + add + norm + all-gather", None, scattered_and_gathered),
        ]
    calls += [("fused, sharded", n, partial(fused, number=n, sharded=True)) for n in reversed(blocks)]
    calls += [
        ("fused, x copied first", blocks[-1], partial(copied, number=blocks[-1])),
        ("NCCL reduce-scatter + add-norm kernel", None, composed),
        (TWO_SHOT, None, two_shot),
    ]
    return calls


def _microseconds(call: Call, sets: int, rounds: int, mesh: Mesh) -> float:
    """Of one call: the median of replays, on the slower rank."""
    calls = max(sets, MIN_CALLS)
    together = torch.zeros(1, device=mesh.device)
    call(0)
    graph = _captured(call, sets, calls)
    events = []
    for _ in range(rounds + 1):
        dist.all_reduce(together, group=mesh.tp_group)
        events.append([torch.cuda.Event(enable_timing=True) for _ in range(2)])
        events[-1][0].record()
        graph.replay()
        events[-1][1].record()
    torch.cuda.synchronize(mesh.device)
    times = [start.elapsed_time(end) * 1e3 / calls for start, end in events[1:]]
    slowest = torch.tensor(statistics.median(times))
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=mesh.host_group)
    return float(slowest)


def _captured(call: Call, sets: int, calls: int) -> torch.cuda.CUDAGraph:
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for number in range(calls):
            call(number % sets)
    return graph


def _check(inputs: _Inputs) -> None:
    """A wrong kernel is not worth timing."""
    x_TD = inputs.xs[0][0].clone()
    total_TD = x_TD.float()
    dist.all_reduce(total_TD, group=inputs.group)
    h_RD = total_TD[inputs.own] + inputs.own_residuals[0].float()
    expected_RD = F.rms_norm(h_RD, (inputs.width,), inputs.weight_D.float(), EPS)
    y_TD, residual_RD = fused_allreduce_rmsnorm(
        x_TD, inputs.own_residuals[0], inputs.weight_D, EPS, inputs.group, backend="fused"
    )
    torch.cuda.synchronize(inputs.mesh.device)
    check_symmetric()
    errors = relative_error(y_TD[inputs.own], expected_RD), relative_error(residual_RD, h_RD)
    say(f"  relative errors of y and residual: {errors[0]:.1e}, {errors[1]:.1e}")
    if not max(errors) <= TOLERANCE:
        raise RuntimeError(f"fused_allreduce_rmsnorm is wrong: relative errors {errors[0]:.1e} and {errors[1]:.1e}")


def _label(row: dict[str, Any]) -> str:
    return row["name"] if row["blocks"] is None else f"{row['name']}, {row['blocks']} blocks"


def _show(rows: Sequence[dict[str, Any]]) -> None:
    """Times beside what the same result costs by NCCL, and beside what the links need."""
    times = {row["name"]: row["us"] for row in rows if row["blocks"] is None}
    lines = []
    for row in rows:
        sharded = row["name"] in SHARDED
        nccl = times.get("NCCL reduce-scatter + add + norm" if sharded else "NCCL all-reduce + add + norm")
        floor = times.get("pull floor" if sharded else "floor")
        ratios = [None if base is None else row["us"] / base for base in (nccl, floor)]
        lines.append([_label(row), row["us"], *ratios])
    table(["", "µs", "/NCCL", "/floor"], lines)
