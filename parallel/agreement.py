"""Small decisions that all ranks must take together, over CPU tensors, so that no device is waited for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from moetrain.parallel.mesh import Mesh

Result = TypeVar("Result")


def any_rank(condition: bool, mesh: Mesh) -> bool:
    """Whether the condition holds on any rank."""
    if mesh.world_size == 1:
        return condition
    flag = torch.tensor(int(condition))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mesh.host_group)
    return bool(flag)


def raise_together(error: Exception | None, mesh: Mesh) -> None:
    """Raise on every rank what any rank brings (the lowest such rank's), so that none waits for one that gave up."""
    if mesh.world_size > 1:
        errors: list[Exception | None] = [None] * mesh.world_size
        dist.all_gather_object(errors, error, group=mesh.host_group)
        error = next((e for e in errors if e is not None), None)
    if error is not None:
        raise error


def first_on_each_node(function: Callable[[bool], Result], mesh: Mesh) -> Result:
    """Call `function(first)` on local rank 0 of every node, then on the others; an error of one is raised by all.

    For work that leaves something behind for the others, as a cache on disk.
    """
    result: Result | None = None
    for turn in (True, False):
        error: Exception | None = None
        if turn == (mesh.local_rank == 0):
            try:
                result = function(turn)
            except Exception as caught:
                error = caught
        raise_together(error, mesh)
    return result  # type: ignore[return-value]
