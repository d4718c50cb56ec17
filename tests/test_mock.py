"""The mock world: collectives by their definitions, and errors that name ranks. test_topologies.py trains in it."""

from __future__ import annotations

import functools
import operator
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_dispatch import compare_with_one_rank
from torch.distributed.device_mesh import DeviceMesh

from moetrain.parallel import create_mesh, on_all_ranks
from moetrain.parallel.mock import CollectiveError, MockWorld, RankError


def test_results_come_in_order_and_nothing_is_left() -> None:
    assert MockWorld(3).run(lambda x: (dist.get_rank(), dist.get_world_size(), x), "x") == [
        (0, 3, "x"),
        (1, 3, "x"),
        (2, 3, "x"),
    ]
    assert MockWorld(1).run(dist.get_backend) == ["mock"]
    assert not dist.is_initialized()


def every_collective() -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    mine = torch.arange(size * 2, dtype=torch.float64).view(size, 2) + 100 * rank
    of_all = torch.arange(size * 2, dtype=torch.float64).view(size, 2) + 100 * torch.arange(size).view(size, 1, 1)

    for op, expected in (
        (dist.ReduceOp.SUM, of_all.sum(0)),
        (dist.ReduceOp.AVG, of_all.mean(0)),
        (dist.ReduceOp.MAX, of_all.amax(0)),
        (dist.ReduceOp.MIN, of_all.amin(0)),
        (dist.ReduceOp.PRODUCT, of_all.prod(0)),
    ):
        x = mine.clone()
        dist.all_reduce(x, op)
        assert torch.equal(x, expected)
        x = mine.clone()
        dist.reduce(x, 1, op)
        assert torch.equal(x, expected if rank == 1 else mine)

    x = mine.clone()
    dist.broadcast(x, 2)
    assert torch.equal(x, of_all[2])
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(gathered, mine)
    assert torch.equal(torch.stack(gathered), of_all)
    x = torch.empty(size * size, 2, dtype=torch.float64)
    dist.all_gather_into_tensor(x, mine)
    assert torch.equal(x.view(size, size, 2), of_all)
    x = torch.empty(2, dtype=torch.float64)
    dist.reduce_scatter(x, list(mine.clone()))
    assert torch.equal(x, of_all.sum(0)[rank])
    x = torch.empty(1, 2, dtype=torch.float64)
    dist.reduce_scatter_tensor(x, mine)
    assert torch.equal(x[0], of_all.sum(0)[rank])
    gathered = [torch.empty_like(mine) for _ in range(size)]
    dist.gather(mine, gathered if rank == 0 else None, dst=0)
    assert rank > 0 or torch.equal(torch.stack(gathered), of_all)
    x = torch.empty(2, dtype=torch.float64)
    dist.scatter(x, list(mine.clone()) if rank == 1 else None, src=1)
    assert torch.equal(x, of_all[1, rank])
    pieces = [torch.empty(2, dtype=torch.float64) for _ in range(size)]
    dist.all_to_all(pieces, list(mine.clone()))
    assert torch.equal(torch.stack(pieces), of_all[:, rank])
    x = torch.empty_like(mine)
    dist.all_to_all_single(x, mine)
    assert torch.equal(x, of_all[:, rank])
    # Uneven: rank r sends s rows to rank s, also none.
    rows = torch.full((sum(range(size)), 1), float(rank))
    x = torch.empty(rank * size, 1)
    dist.all_to_all_single(x, rows, [rank] * size, list(range(size)))
    assert torch.equal(x[:, 0], torch.arange(size).repeat_interleave(rank).float())

    x = torch.tensor([rank + 1])
    dist.all_reduce(x, dist.ReduceOp.BOR)
    assert x.item() == functools.reduce(operator.or_, range(1, size + 1))

    objects: list[Any] = [None] * size
    dist.all_gather_object(objects, {"rank": rank})
    assert objects == [{"rank": other} for other in range(size)]
    dist.barrier()


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("size", [3, 4])
def test_every_collective(size: int) -> None:
    MockWorld(size).run(every_collective)


def groups_and_meshes() -> None:
    rank = dist.get_rank()
    even = dist.new_group([0, 2, 4])
    x = torch.tensor([rank])
    if rank % 2 == 0:
        dist.all_reduce(x, group=even)
        assert x.item() == 6
    mesh = DeviceMesh("cpu", torch.arange(6).view(2, 3), mesh_dim_names=("outer", "inner"))
    x = torch.tensor([rank])
    dist.all_reduce(x, group=mesh.get_group("inner"))
    assert x.item() == (3 if rank < 3 else 12)
    x = torch.tensor([rank])
    dist.broadcast(x, src=rank % 3 + 3, group=mesh.get_group("outer"))
    assert x.item() == rank % 3 + 3


def test_groups_and_meshes() -> None:
    MockWorld(6).run(groups_and_meshes)


def test_autograd_through_dispatch_and_combine() -> None:
    MockWorld(4).run(compare_with_one_rank)


def test_an_error_of_one_rank_is_raised_with_its_rank_and_ends_the_others() -> None:
    ended = []

    def fail() -> None:
        try:
            if dist.get_rank() == 2:
                raise ValueError("no such expert\nin detail")
            dist.barrier()
        finally:
            ended.append(dist.get_rank())

    with pytest.raises(RankError, match=r"^rank 2 of 4: ValueError: no such expert$") as caught:
        MockWorld(4).run(fail)
    assert caught.value.rank == 2
    assert isinstance(caught.value.__cause__, ValueError)
    assert sorted(ended) == [0, 1, 2, 3]
    assert MockWorld(2).run(dist.get_rank) == [0, 1]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (dist.barrier, "ranks are in different collectives: rank 0 in all_reduce by SUM, rank 1 in barrier, rank 2 in"),
        (lambda: dist.all_reduce(torch.ones(2), dist.ReduceOp.MAX), "rank 1 in all_reduce by MAX"),
        (lambda: dist.all_reduce(torch.ones(3)), r"tensors differ: \[2\] torch.float32, \[3\] torch.float32"),
    ],
)
def test_ranks_that_do_not_do_the_same_are_told(other: Callable[[], Any], message: str) -> None:
    def disagree() -> None:
        if dist.get_rank() == 1:
            other()
        else:
            dist.all_reduce(torch.ones(2))

    with pytest.raises(CollectiveError, match=message):
        MockWorld(3).run(disagree)


def test_roots_and_sizes_that_do_not_fit() -> None:
    with pytest.raises(CollectiveError, match="rank 0 in broadcast from 0, rank 1 in broadcast from 1"):
        MockWorld(2).run(lambda: dist.broadcast(torch.ones(1), dist.get_rank()))
    with pytest.raises(RankError, match="4 rows or elements do not divide among 3 ranks"):
        MockWorld(3).run(lambda: dist.all_to_all_single(torch.empty(4), torch.ones(4)))
    with pytest.raises(CollectiveError, match="another expects"):
        MockWorld(2).run(lambda: dist.all_gather([torch.empty(2), torch.empty(2)], torch.ones(2 + dist.get_rank())))


def test_a_rank_that_does_not_come_is_named() -> None:
    with pytest.raises(
        CollectiveError, match=r"rank 0 waited 1 s in all_reduce.*\[0, 1\], in vain: rank 1 has returned"
    ):
        MockWorld(2, timeout=1).run(lambda: None if dist.get_rank() else dist.all_reduce(torch.ones(2)))


def test_a_rank_that_comes_too_late_fails_too() -> None:
    """The one that has given up, and gone on, must not take part any more."""
    given_up = threading.Event()

    def meet() -> str:
        if dist.get_rank() == 1:
            given_up.wait()
        try:
            dist.all_reduce(torch.ones(2))
        except CollectiveError as error:
            given_up.set()
            return str(error)
        return "met"

    first, second = MockWorld(2, timeout=0.3).run(meet)
    assert first == second
    assert "rank 0 waited 0.3 s" in first


def test_a_rank_left_behind_does_not_touch_the_next_run() -> None:
    go, left = threading.Event(), []

    def stay() -> None:
        if dist.get_rank() == 0:
            raise ValueError("first")
        go.wait()
        left.append(dist.get_world_size())
        dist.destroy_process_group()
        raise ValueError("left behind")

    world = MockWorld(2, timeout=0.2)
    with pytest.raises(RankError, match="rank 0 of 2: ValueError: first"):
        world.run(stay)

    def work() -> int:
        go.set()
        while not left:
            time.sleep(0.01)
        dist.barrier()
        return dist.get_rank()

    assert world.run(work) == [0, 1]
    assert left == [2]


def test_threads_of_a_rank_belong_to_it() -> None:
    def work() -> float:
        x = torch.full((1,), float(dist.get_rank()))
        group = dist.new_group()
        thread = threading.Thread(target=lambda: dist.all_reduce(x, group=group))
        thread.start()
        dist.barrier()
        thread.join()
        return float(x)

    assert MockWorld(3).run(work) == [3.0, 3.0, 3.0]


def test_a_world_is_not_run_in_a_world() -> None:
    with pytest.raises(RankError, match="cannot run another one"):
        MockWorld(2).run(lambda: MockWorld(2).run(dist.get_rank))


def test_decisions_of_all_ranks() -> None:
    def decide() -> list[int]:
        mesh = create_mesh(device="cpu")
        return on_all_ranks(lambda: mesh.rank + 5, mesh.host_group)

    assert MockWorld(2).run(decide) == [[5, 6], [5, 6]]
