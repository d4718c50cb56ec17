"""Small decisions that all ranks must take together, over CPU tensors, so that no device is waited for.

No rank acts on an error of its own while others wait for it in a collective: all hear of it, and all raise. Only text
travels, because an exception may not survive pickling.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from moetrain import errors
from moetrain.errors import UserError
from moetrain.parallel.mesh import Mesh

T = TypeVar("T")


def any_rank(condition: bool, mesh: Mesh) -> bool:
    """Whether the condition holds on any rank."""
    if mesh.world_size == 1:
        return condition
    flag = torch.tensor(int(condition))
    dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=mesh.host_group)
    return bool(flag)


def raise_together(error: Exception | None, mesh: Mesh) -> None:
    """Raise on every rank if any brings an error: its own where it has one, else the lowest such rank's.

    Another rank's error is a :class:`UserError` of the same kind with the same message, or a RuntimeError that names
    the rank and the type.
    """
    _raise_together(error, mesh.host_group)


def first_on_each_node(function: Callable[[bool], T], mesh: Mesh) -> T:
    """Call `function(first)` on local rank 0 of every node, then on the others; an error of one is raised by all.

    For work that leaves something behind for the others, as a cache on disk.
    """
    result: T | None = None
    for turn in (True, False):
        error: Exception | None = None
        if turn == (mesh.local_rank == 0):
            try:
                result = function(turn)
            except Exception as caught:
                error = caught
        raise_together(error, mesh)
    return result  # type: ignore[return-value]


def on_all_ranks(work: Callable[[], T], group: dist.ProcessGroup) -> list[T]:
    """The results of `work` on every rank of the group, which must pickle; an error of one is raised by all."""
    result: T | None = None
    error: Exception | None = None
    try:
        result = work()
    except Exception as caught:
        error = caught
    _raise_together(error, group)
    results: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(results, result, group=group)
    return results


def on_rank_0(work: Callable[[], T], group: dist.ProcessGroup) -> T:
    """The result of `work`, done by rank 0 of the group alone, on every rank; so is an error."""
    return on_all_ranks(lambda: work() if dist.get_rank(group) == 0 else None, group)[0]  # type: ignore[return-value]


def _raise_together(error: Exception | None, group: dist.ProcessGroup) -> None:
    heard: list[tuple[str | None, str] | None] = [None] * dist.get_world_size(group)
    dist.all_gather_object(heard, None if error is None else _describe(error, dist.get_rank(group)), group=group)
    if error is None:
        kind, message = next((description for description in heard if description is not None), (None, None))
        if message is None:
            return
        error = RuntimeError(message) if kind is None else getattr(errors, kind)(message)
    if isinstance(error, UserError):
        error.agreed = True
    raise error


def _describe(error: Exception, rank: int) -> tuple[str | None, str]:
    """The kind of user's error, None if it is none, and the message for the other ranks."""
    if isinstance(error, UserError):
        return next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__), str(error)
    first_line = (str(error).splitlines() or [""])[0]
    return None, f"rank {rank}: {type(error).__name__}: {first_line}"
