"""The fused collectives with residual add and RMSNorm: numbers, gradients, many calls, and ranks that do not come."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from moetrain.kernels import allreduce_rmsnorm as twin
from moetrain.kernels import allreduce_rmsnorm_triton as kernels
from moetrain.kernels.allreduce_rmsnorm import owned_rows
from moetrain.parallel import (
    add_rmsnorm_all_gather,
    allreduce_rmsnorm,
    check_symmetric,
    create_mesh,
    fused_allreduce_rmsnorm,
    reduce_scatter_add_rmsnorm,
    symmetric,
    symmetric_empty,
)
from moetrain.parallel.mock import MockWorld
from moetrain.parallel.symmetric import Workspace, workspace

# The interpreter computes with NumPy, which warns of what GPUs do silently.
pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in.*:RuntimeWarning")

EPS = 1e-5
FORMS = ["all", "scatter", "gather"]
INTERPRETED = kernels.triton.knobs.runtime.interpret


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def error(actual: Tensor, expected: Tensor) -> float:
    """‖actual − expected‖ / ‖expected‖, and ‖actual‖ where nothing or zeros are expected."""
    size = float(expected.double().norm())
    return float((actual.double() - expected.double()).norm()) / (size or 1.0)


class Problem:
    """Everything that W ranks bring to one call, and by the definition what each gets, in float64."""

    def __init__(self, form: str, world: int, rows: int, width: int, dtype: torch.dtype) -> None:
        self.form, self.world, self.rows, self.width, self.dtype = form, world, rows, width, dtype
        self.owned = [
            slice(first, first + count) for first, count in (owned_rows(rows, world, r) for r in range(world))
        ]
        self.weight = random(width, seed=1, dtype=dtype)
        self.xs = [random(rows, width, seed=10 + r, dtype=dtype) for r in range(world)]
        self.residual = random(rows, width, seed=2, dtype=dtype)
        self.dys = [random(rows, width, seed=20 + r, dtype=dtype) for r in range(world)]
        self.dresidual = random(rows, width, seed=3, dtype=dtype)
        if form == "gather":  # of one rank only, and so a sum already
            self.xs = [self.xs[0]] * world
        if form == "scatter":
            self.dys = [self.dys[0]] * world

    def of_rank(self, rank: int) -> list[Tensor]:
        """x, residual, dy, dresidual."""
        own = self.owned[rank]
        x = self.xs[rank][own] if self.form == "gather" else self.xs[rank]
        dy = self.dys[rank][own] if self.form == "scatter" else self.dys[rank]
        return [x.clone(), self.residual[own].clone(), dy.clone(), self.dresidual[own].clone()]

    def expected(self, rank: int) -> list[Tensor]:
        """y, residual, dx, dresidual, dweight. The weight's gradient is of the rank's rows alone."""
        own = self.owned[rank]
        xs = [x.double().clone().requires_grad_() for x in (self.xs[:1] if self.form == "gather" else self.xs)]
        residual = self.residual.double().clone().requires_grad_()
        weight_TD = self.weight.double().expand(self.rows, -1).clone().requires_grad_()  # one a row, to tell them apart
        h = sum(xs, start=residual)
        y = h * (h.square().mean(-1, keepdim=True) + EPS).rsqrt() * weight_TD
        dys = self.dys[:1] if self.form == "scatter" else self.dys
        torch.autograd.backward([y, h], [sum(dy.double() for dy in dys), self.dresidual.double()])
        dx, dresidual, dweight_TD = xs[0].grad, residual.grad, weight_TD.grad
        assert dx is not None
        assert dresidual is not None
        assert dweight_TD is not None
        return [
            y.detach()[own] if self.form == "scatter" else y.detach(),
            h.detach()[own],
            dx[own] if self.form == "gather" else dx,
            dresidual[own],
            dweight_TD[own].sum(0),
        ]

    def run(self, rank: int, group: Any, device: str = "cpu", **options: Any) -> list[Tensor]:
        """What the function gives this rank, in the order of `expected`."""
        x, residual, dy, dresidual = (t.to(device) for t in self.of_rank(rank))
        leaves = [x.requires_grad_(), residual.requires_grad_(), self.weight.to(device).clone().requires_grad_()]
        if self.form == "gather":
            y, h = add_rmsnorm_all_gather(*leaves, EPS, group, total_rows=self.rows, **options)
        else:
            function = fused_allreduce_rmsnorm if self.form == "all" else reduce_scatter_add_rmsnorm
            y, h = function(*leaves, EPS, group, **options)
        torch.autograd.backward([y, h], [dy, dresidual])
        return [y.detach(), h.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    def compare(self, rank: int, results: Sequence[Tensor], tolerance: float) -> None:
        names = ("y", "residual", "dx", "dresidual", "dweight")
        for name, actual, expected in zip(names, results, self.expected(rank), strict=True):
            assert actual.shape == expected.shape, name
            assert actual.dtype == self.dtype, name
            there = error(actual.cpu(), expected)
            assert there <= tolerance, (
                f"{name} of {self.form} on {self.world} ranks, {self.rows} × {self.width}: {there}"
            )


# The composition of collectives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("world", "rows"), [(1, 3), (2, 6), (3, 7), (4, 5), (4, 2)])
def test_against_the_definition_on_mock_ranks(form: str, world: int, rows: int) -> None:
    problem = Problem(form, world, rows, 12, torch.float64)

    def work() -> list[Tensor]:
        mesh = create_mesh(tp=world, device="cpu")
        return problem.run(mesh.rank, mesh.tp_group)

    for rank, results in enumerate(MockWorld(world).run(work)):
        problem.compare(rank, results, 1e-12)


def test_one_rank_needs_no_group() -> None:
    for form in FORMS:
        problem = Problem(form, 1, 5, 8, torch.float64)
        problem.compare(0, problem.run(0, None), 1e-12)


def test_real_ranks() -> None:
    run_ranks(3, compare_real_ranks)


def compare_real_ranks() -> None:
    mesh = create_mesh(tp=3, device="cpu")
    for form in FORMS:
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
            problem = Problem(form, 3, 8, 64, dtype)
            problem.compare(mesh.rank, problem.run(mesh.rank, mesh.tp_group), tolerance)


def test_the_residual_keeps_its_own_dtype() -> None:
    """A float32 residual under bfloat16 activations is not rounded."""
    x, residual, weight = random(6, 16).bfloat16(), random(6, 16, seed=1).float(), random(16, seed=2).float()
    y, h = fused_allreduce_rmsnorm(x, residual, weight, EPS, None)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, x.float() + residual)


def test_mistakes_are_told() -> None:
    x, residual, weight = torch.zeros(6, 4), torch.zeros(6, 4), torch.ones(4)

    def call(*arguments: Tensor, **options: Any) -> Callable[[], object]:
        return lambda: fused_allreduce_rmsnorm(*arguments, EPS, None, **options)  # type: ignore[arg-type]

    for function, message in (
        (call(x, residual[1:], weight), r"residual has shape \[5, 4\]; rank 0 of 1 takes \[6, 4\] of 6 rows in all"),
        (call(x, residual, weight[1:]), r"weight has shape \[3\]"),
        (call(x[None], residual, weight), "of two dimensions"),
        (call(x.int(), residual, weight), "floating point"),
        (call(x, residual, weight, backend="fast"), "there are auto, fused, collectives"),
        (call(x, residual, weight, backend="fused"), "'fused' needs several ranks"),
    ):
        with pytest.raises(ValueError, match=message):
            function()


# The kernels in a world of one process --------------------------------------------------------------------------------


def following(items: Sequence[Tensor], rank: int) -> tuple[Tensor, ...]:
    return (*items[rank:], *items[:rank])


@pytest.mark.skipif(not INTERPRETED, reason="ranks that nobody waits for")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("world", "rows", "width", "blocks"), [(2, 7, 256, 3), (2, 1, 300, 1), (3, 8, 257, 2), (5, 6, 256, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_kernels_against_their_twins(
    form: str, world: int, rows: int, width: int, blocks: int, dtype: torch.dtype
) -> None:
    """Rank after rank, twice: the first time for what others pull."""
    problem = Problem(form, world, rows, width, dtype)
    sums, gathers = form != "gather", form != "scatter"
    share = -(-rows // world)
    shards = [torch.full((share, width), float("nan"), dtype=dtype) for _ in range(world)]
    of_rank = [problem.of_rank(rank) for rank in range(world)]
    x = [there[0] for there in of_rank]
    dy = [there[2] for there in of_rank]
    for _ in range(2):
        forward = [
            kernels.forward(
                following(x, r) if sums else (x[r],),
                following(shards, r) if gathers else (),
                of_rank[r][1],
                problem.weight,
                EPS,
                rows,
                r,
                blocks,
                None,
            )
            for r in range(world)
        ]
    for _ in range(2):
        backward = [
            kernels.backward(
                following(dy, r) if gathers else (dy[r],),
                following(shards, r) if sums else (),
                of_rank[r][3],
                *forward[r][1:],
                problem.weight,
                rows,
                r,
                blocks,
                None,
            )
            for r in range(world)
        ]
    tolerance = 1e-6 if dtype == torch.float32 else 2e-3
    for rank, own in enumerate(problem.owned):
        y, h, rstd = twin.add_rmsnorm(
            [there[own] for there in x] if sums else [x[rank]], of_rank[rank][1], problem.weight, EPS
        )
        dh, dweight = twin.add_rmsnorm_backward(
            [there[own] for there in dy] if gathers else [dy[rank]],
            of_rank[rank][3],
            *forward[rank][1:],
            problem.weight,
        )
        assert error(forward[rank][1], h) <= tolerance
        assert error(forward[rank][2], rstd) <= tolerance
        assert error(backward[rank][1], dh) <= tolerance
        assert error(backward[rank][2], dweight) <= tolerance
        for results, expected in ((forward, y), (backward, dh)):
            whole = gathers if results is forward else sums
            for there in [result[0][own] for result in results] if whole else [results[rank][0]]:
                assert error(there, expected) <= tolerance


def test_rows_are_owned_once() -> None:
    for world in range(1, 9):
        for total in range(20):
            owned = [owned_rows(total, world, rank) for rank in range(world)]
            assert [row for first, count in owned for row in range(first, first + count)] == list(range(total))


def test_an_error_word_says_who_waited_for_whom() -> None:
    word = 1 << 30 | 1 << 29 | 1 << 28 | 1 << 26 | 5 << 16 | 131
    assert kernels.describe_error(word) == ("add_rmsnorm_all_gather backward", "end", 5, 131)
    word = 1 << 30 | 1 << 28 | 1 << 27 | 3 << 16
    assert kernels.describe_error(word) == ("fused_allreduce_rmsnorm forward", "start", 3, 0)


@pytest.mark.parametrize("width", [256, 1000, 4096, 5120, 8192, 16384])
@pytest.mark.parametrize("world", [2, 8])
@pytest.mark.parametrize("blocks", [1, 16, 132])
def test_tiles_fit_shared_memory(width: int, world: int, blocks: int) -> None:
    for itemsize in (2, 4):
        for streams, most in ((world + 1, 16384), (world + 2, 8192)):
            tile = kernels.choose_tile(width, itemsize, streams, blocks, most)
            row_bytes = kernels.triton.next_power_of_2(width) * itemsize
            assert tile.rows * row_bytes * streams * (tile.stages - 1) <= 200 << 10
            assert tile.rows * row_bytes * (tile.pull_stages - 1) <= 200 << 10
            assert tile.warps >= world - 1


# The host's part of the fused path, on a CPU --------------------------------------------------------------------------


class SharedMemory:
    """Stands in for SymmetricBuffer: ranks are threads, which reach all memory."""

    made: dict[tuple[int, int], Tensor]
    numbers: dict[int, int]

    def __init__(self, size: int, group: Any, device: torch.device) -> None:
        self.size, self.group = size, group
        self.number = self.numbers.get(group.rank(), 0)
        self.numbers[group.rank()] = self.number + 1
        self.own = self.made[self.number, group.rank()] = torch.full((size,), 0xFF, dtype=torch.uint8)
        dist.barrier(group)

    def views(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        length = self.size // dtype.itemsize * dtype.itemsize
        ranks = symmetric.following_ranks(self.group)
        return tuple(self.made[self.number, rank][:length].view(dtype) for rank in ranks)

    def holds(self, tensor: Tensor) -> bool:
        return tensor.data_ptr() == self.own.data_ptr()


@pytest.mark.skipif(not INTERPRETED, reason="kernels of threads that a barrier keeps in step")
@pytest.mark.parametrize("form", FORMS)
def test_buffers_and_gradients_of_the_fused_path(monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    """Growing sizes, x in ordinary and in symmetric memory, by the interpreted kernels."""
    SharedMemory.made, SharedMemory.numbers = {}, {}
    monkeypatch.setattr(symmetric, "SymmetricBuffer", SharedMemory)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    one_at_a_time = threading.Lock()
    spaces: dict[int, Workspace] = {}

    def of_this_rank(group: Any, device: torch.device) -> Workspace:
        if group.rank() not in spaces:
            space = object.__new__(Workspace)
            space.rank, space.world, space.max_blocks, space.device = group.rank(), group.size(), 4, device
            space.meeting = kernels.Meeting((), torch.zeros(5), torch.zeros(1, dtype=torch.int32), 0)
            space._slots, space._turn, space._shard, space._retired = [None, None], 0, None, []
            space._group, space.group_ranks = lambda: group, [4, 5, 6]
            spaces[group.rank()] = space
        return spaces[group.rank()]

    def in_step(kernel: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
        def run(*arguments: Any) -> tuple[Tensor, ...]:
            for _ in range(2):
                dist.barrier()
                with one_at_a_time:
                    results = kernel(*arguments[:-1], None)
            dist.barrier()
            return results

        return run

    monkeypatch.setattr(allreduce_rmsnorm, "workspace", of_this_rank)
    monkeypatch.setattr(kernels, "forward", in_step(kernels.forward))
    monkeypatch.setattr(kernels, "backward", in_step(kernels.backward))
    problems = [Problem(form, 3, rows, width, torch.float32) for rows, width in ((4, 256), (7, 300), (5, 256))]

    def work() -> list[list[Tensor]]:
        mesh = create_mesh(tp=3, device="cpu")
        results = [problem.run(mesh.rank, mesh.tp_group, blocks=2, backend="fused") for problem in problems]
        if form != "gather":
            space = of_this_rank(mesh.tp_group, mesh.device)
            x, residual, _, _ = problems[0].of_rank(mesh.rank)
            x_TD = space.take_slot(x.shape, x.dtype)
            x_TD.copy_(x)
            turn = space._turn
            function = fused_allreduce_rmsnorm if form == "all" else reduce_scatter_add_rmsnorm
            results.append([*function(x_TD, residual, problems[0].weight, EPS, mesh.tp_group)])
            assert space._turn == turn  # nothing was copied
            assert space.take_slot(x.shape, x.dtype).data_ptr() != x_TD.data_ptr()
        return results

    for rank, results in enumerate(MockWorld(3).run(work)):
        for problem, result in zip(problems, results, strict=False):
            problem.compare(rank, result, 1e-6)
        for result in results[len(problems) :]:
            for actual, expected in zip(result, problems[0].expected(rank), strict=False):
                assert error(actual, expected) <= 1e-6
    spaces[1].meeting.error[0] = 1 << 30 | 1 << 28 | 2 << 16 | 7
    with pytest.raises(dist.DistError, match=r"rank 5: reduce_scatter_add_rmsnorm forward .* for rank 6 \(block 7\)"):
        spaces[1].check()


# One GPU, whose streams are the ranks ---------------------------------------------------------------------------------


def late(generator: torch.Generator) -> None:
    """Up to some 50 µs, by this rank's own dice."""
    torch.cuda._sleep(int(torch.randint(100_000, (1,), generator=generator)))


class Streams:
    """Ranks that meet in the memory of one GPU."""

    def __init__(self, problem: Problem, timeout_ms: int) -> None:
        self.problem, self.world = problem, problem.world
        self.streams = [torch.cuda.Stream() for _ in range(self.world)]
        flags = [torch.zeros(16, self.world, dtype=torch.int32, device="cuda") for _ in range(self.world)]
        self.meetings = [
            kernels.Meeting(
                following(flags, rank),
                torch.zeros(17, dtype=torch.int32, device="cuda"),
                torch.zeros(1, dtype=torch.int32, pin_memory=True),
                timeout_ms,
            )
            for rank in range(self.world)
        ]
        self.tensors = [[t.cuda() for t in problem.of_rank(rank)] for rank in range(self.world)]
        self.weight = problem.weight.cuda()
        share = -(-problem.rows // self.world)
        self.shards = [torch.zeros(share, problem.width, dtype=problem.dtype, device="cuda") for _ in self.streams]
        torch.cuda.synchronize()

    def forward(self, rank: int, blocks: int, meeting: kernels.Meeting | None) -> tuple[Tensor, ...]:
        xs = following([tensors[0] for tensors in self.tensors], rank)
        shards, residual, rows = following(self.shards, rank), self.tensors[rank][1], self.problem.rows
        with torch.cuda.stream(self.streams[rank]):
            return kernels.forward(xs, shards, residual, self.weight, EPS, rows, rank, blocks, meeting)

    def backward(
        self, rank: int, saved: Sequence[Tensor], blocks: int, meeting: kernels.Meeting | None
    ) -> tuple[Tensor, ...]:
        dys = following([tensors[2] for tensors in self.tensors], rank)
        shards, dresidual, rows = following(self.shards, rank), self.tensors[rank][3], self.problem.rows
        with torch.cuda.stream(self.streams[rank]):
            return kernels.backward(dys, shards, dresidual, *saved, self.weight, rows, rank, blocks, meeting)


@pytest.mark.gpu
@pytest.mark.parametrize(("world", "rows", "width"), [(2, 130, 4096), (3, 63, 256), (4, 129, 1000)])
def test_streams_of_one_gpu_as_ranks(world: int, rows: int, width: int) -> None:
    """Right, and the same bits at every call of as many blocks, with delays of each rank's own."""
    problem = Problem("all", world, rows, width, torch.bfloat16)
    ranks = Streams(problem, timeout_ms=20_000)
    dice = [torch.Generator().manual_seed(rank) for rank in range(world)]
    first: dict[int, list[list[Tensor]]] = {}
    # Making memory or loading a kernel may wait for kernels that run: rehearsed without meetings.
    for call in range(-4, 60):
        meetings = ranks.meetings if call >= 0 else [None] * world
        for rank, stream in enumerate(ranks.streams):
            with torch.cuda.stream(stream):
                late(dice[rank])
        forward = [ranks.forward(rank, (4, 16)[call % 2], meetings[rank]) for rank in range(world)]
        backward = [ranks.backward(rank, forward[rank][1:], (16, 5)[call % 2], meetings[rank]) for rank in range(world)]
        torch.cuda.synchronize()
        results = [[y, h, *gradients] for (y, h, _), gradients in zip(forward, backward, strict=True)]
        assert [int(meeting.error[0]) for meeting in ranks.meetings] == [0] * world
        if call < 2:
            first[call % 2] = results
        for rank in range(world if call >= 0 else 0):
            if call < 2:
                problem.compare(rank, results[rank], 5e-3)
            same = [torch.equal(one, other) for one, other in zip(results[rank], first[call % 2][rank], strict=True)]
            assert all(same), (call, rank, same)


@pytest.mark.gpu
def test_a_wait_in_vain_ends_with_a_word() -> None:
    ranks = Streams(Problem("all", 3, 64, 512, torch.bfloat16), timeout_ms=500)
    for rank in range(3):
        ranks.forward(rank, 8, None)
    torch.cuda.synchronize()
    for together in (True, False):
        start = time.monotonic()
        for rank in (0, 1, 2) if together else (1, 0):
            for _ in range(3):
                ranks.forward(rank, 8, ranks.meetings[rank])
        torch.cuda.synchronize()
    assert 0.5 <= time.monotonic() - start < 2
    for rank, position in ((0, 2), (1, 2)):
        kernel, meeting, peer, block = kernels.describe_error(int(ranks.meetings[rank].error[0]))
        assert (kernel, meeting, peer) == ("fused_allreduce_rmsnorm forward", "start", position)
        assert block < 8
    assert int(ranks.meetings[2].error[0]) == 0


# Two GPUs -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu2
def test_on_two_gpus() -> None:
    run_ranks(2, compare_on_gpus)


def compare_on_gpus() -> None:
    mesh = create_mesh(tp=2)
    cases = [(form, 1023, 4096, torch.bfloat16, None) for form in FORMS]
    cases += [
        ("all", rows, width, torch.bfloat16, 16) for rows, width in ((1, 256), (7, 1000), (129, 5120), (64, 16384))
    ]
    cases += [
        ("all", 130, 512, torch.float16, 5),
        ("all", 65, 512, torch.float32, 1),
        ("all", 3, 257, torch.bfloat16, 2),
    ]
    for form, rows, width, dtype, blocks in cases:
        problem = Problem(form, 2, rows, width, dtype)
        results = problem.run(mesh.rank, mesh.tp_group, "cuda", blocks=blocks, backend="fused")
        problem.compare(mesh.rank, results, 1e-6 if dtype == torch.float32 else 5e-3)
        composed = problem.run(mesh.rank, mesh.tp_group, "cuda", backend="collectives")
        problem.compare(mesh.rank, composed, 1e-6 if dtype == torch.float32 else 8e-3)  # NCCL's sums are rounded
    check_symmetric()


@pytest.mark.gpu2
def test_repeated_calls() -> None:
    run_ranks(2, repeat_calls)


def repeat_calls(calls: int = 1000) -> None:
    """Bit-equal residuals and the same y on both ranks, with other inputs each time, x in symmetric memory or not."""
    mesh = create_mesh(tp=2)
    group, rank, width = mesh.tp_group, mesh.rank, 1024
    both, mine = (torch.Generator("cuda").manual_seed(0), torch.Generator().manual_seed(rank))
    weight = torch.rand(width, device="cuda", generator=both).bfloat16()
    wrong = torch.zeros(2, dtype=torch.int64, device="cuda")
    for call in range(calls):
        rows = (129, 64, 1, 200)[call % 4]
        first, count = owned_rows(rows, 2, rank)
        own = slice(first, first + count)
        draw = torch.randn(3, rows, width, device="cuda", generator=both).bfloat16()
        x, residual = draw[rank], draw[2][own]
        if call % 3:
            x = symmetric_empty((rows, width), x.dtype, group).copy_(x)
        late(mine)
        y, h = fused_allreduce_rmsnorm(x, residual, weight, EPS, group, blocks=(8, 16, None)[call % 3])
        expected = (draw[rank][own].float() + draw[1 - rank][own].float() + residual.float()).bfloat16()
        wrong[0] += (h != expected).sum()
        sums = y.view(torch.int16).long().sum(0)
        mean = sums.clone()
        dist.all_reduce(mean, group=group)
        wrong[1] += (mean != 2 * sums).sum()
    assert wrong.tolist() == [0, 0]
    check_symmetric()


@pytest.mark.gpu2
def test_cuda_graphs() -> None:
    run_ranks(2, replay_graphs)


def replay_graphs() -> None:
    """Two layers, forward and backward, replayed with other inputs and with ordinary calls in between."""
    mesh = create_mesh(tp=2)
    group, rank = mesh.tp_group, mesh.rank
    problems = [Problem("all", 2, rows, 512, torch.bfloat16) for rows in (33, 64)]
    mine = torch.Generator().manual_seed(rank)
    inputs = [[t.cuda() for t in problem.of_rank(rank)] for problem in problems]
    weight = problems[0].weight.cuda()

    def layers() -> list[Tensor]:
        results = []
        for x, residual, dy, dresidual in inputs:
            leaves = [t.detach().requires_grad_() for t in (x, residual, weight)]
            y, h = fused_allreduce_rmsnorm(*leaves, EPS, group, blocks=16)
            results += [y.detach(), h.detach(), *torch.autograd.grad([y, h], leaves, [dy, dresidual])]
        return results

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        layers()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            captured = layers()
        for replay in range(50):
            scale = 1 + replay % 3
            for tensors in inputs:
                tensors[0].mul_(scale)
            late(mine)
            graph.replay()
            kept = [t.clone() for t in captured]
            assert all(torch.equal(one, other) for one, other in zip(layers(), kept, strict=True)), replay
            for tensors in inputs:
                tensors[0].div_(scale)
    check_symmetric()


@pytest.mark.gpu2
@pytest.mark.parametrize("case", ["does not come", "leaves in the middle"])
def test_a_rank_that_stops_is_named(case: str) -> None:
    run_ranks(2, stop_one_rank, case)


def stop_one_rank(case: str, seconds: float = 1.0) -> None:
    mesh = create_mesh(tp=2)
    group = mesh.tp_group
    space = workspace(group, mesh.device)
    assert isinstance(space, Workspace)
    space.meeting = replace(space.meeting, timeout_ms=round(1e3 * seconds))
    x, residual, weight = (torch.ones(shape, device="cuda") for shape in ((64, 256), (32, 256), (256,)))
    fused_allreduce_rmsnorm(x, residual, weight, EPS, group, blocks=8)
    reduce_scatter_add_rmsnorm(x, residual, weight, EPS, group)
    torch.cuda.synchronize()
    check_symmetric()
    mesh.host_group.barrier().wait()
    start = time.monotonic()
    if case == "leaves in the middle":  # the blocks from 4 on never come
        fused_allreduce_rmsnorm(x, residual, weight, EPS, group, blocks=4 if mesh.rank else 8)
    elif mesh.rank == 0:
        for _ in range(5):  # one wait in vain is enough for all that is queued
            reduce_scatter_add_rmsnorm(x, residual, weight, EPS, group)
    torch.cuda.synchronize()
    if mesh.rank == 0:
        assert seconds <= time.monotonic() - start < 3 * seconds
        kernel = "fused_allreduce_rmsnorm" if case == "leaves in the middle" else "reduce_scatter_add_rmsnorm"
        message = rf"rank 0: {kernel} forward waited 1 s at its start for rank 1 \(block \d+\), in vain"
        for next_step in (check_symmetric, lambda: fused_allreduce_rmsnorm(x, residual, weight, EPS, group)):
            with pytest.raises(dist.DistError, match=message):
                next_step()
    mesh.host_group.barrier().wait()
