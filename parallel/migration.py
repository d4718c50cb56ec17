"""Experts change places in a running job: weights and optimiser state travel to their new ranks.

Layer after layer, and in it tensor after tensor, each rank sends the rows that leave it, receives those that come, and
puts them where others left. Nothing else moves: experts that stay on their rank keep their slots.

Shapes: L MoE layers, E experts, P ranks of the world.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from moetrain.parallel.sharding import ExpertSlots, Sharding


@dataclass(frozen=True)
class ExpertTensor:
    """What this rank holds of one tensor of a layer's experts: a weight, or what an optimiser keeps for it."""

    rows: Tensor
    """[slots, …], contiguous; an expert's share of it is a row."""
    sharding: Sharding
    """With slots, the same for all tensors of the layer."""

    @property
    def row_bytes(self) -> int:
        return self.rows.shape[1:].numel() * self.rows.element_size()


def slots_after(slots_E: Sequence[int], gpu_E: Sequence[int], num_gpus: int) -> list[int]:
    """The slots of a layer's experts once they are on these GPUs, those that stay being where they were.

    Those that come take the slots of those that leave, in order. Every GPU has E / num_gpus experts before and after.
    """
    share = len(slots_E) // num_gpus
    free = [sorted(s for s, gpu in zip(slots_E, gpu_E, strict=True) if s // share == g != gpu) for g in range(num_gpus)]
    return [s if s // share == gpu else free[gpu].pop(0) for s, gpu in zip(slots_E, gpu_E, strict=True)]


@torch.no_grad()
def migrate(layers: Sequence[Sequence[ExpertTensor]], slots_LE: Sequence[Sequence[int]]) -> int:
    """Put the experts of each layer into other slots; returns the bytes that this rank has sent to others.

    Between two steps, when no gradients are kept. Collective over the world: all ranks give the same slots, and the
    same tensors in the same order. The extra memory is at any time the rows of one tensor of one layer that leave
    this rank and those that come to it: at most twice what it holds of that tensor. Should it raise, some experts have
    moved and others have not: what the ranks hold is good for nothing, and the run must go on from a checkpoint.
    """
    sent = 0
    for tensors, slots_E in zip(layers, slots_LE, strict=True):
        slots = _slots(tensors)
        before = slots.slots
        for tensor in tensors:
            sent += _exchange(tensor, before, slots_E)
        slots.assign(slots_E)
    return sent


def migration_bytes(layers: Sequence[Sequence[ExpertTensor]], slots_LE: Sequence[Sequence[int]]) -> NDArray[np.int64]:
    """[L, P, P]: the bytes that each rank will send to each in :func:`migrate`, without sending any.

    An expert that changes its rank takes its weights and both of Adam's moments along, 9 · D · I numbers: from each of
    the edp ranks that hold a copy, or in all as much as one of them where FSDP splits the copies.
    """
    bytes_LPP = []
    for tensors, slots_E in zip(layers, slots_LE, strict=True):
        world = tensors[0].sharding.mesh.size()
        bytes_PP = np.zeros((world, world), np.int64)
        for tensor in tensors:
            for held in _exchanges(tensor.sharding):
                for move in _moves(held, _slots(tensors).slots, slots_E):
                    bytes_PP[move.source, move.target] += tensor.row_bytes
        np.fill_diagonal(bytes_PP, 0)
        bytes_LPP.append(bytes_PP)
    return np.stack(bytes_LPP)


def migration_seconds(bytes_LPP: NDArray[np.int64], seconds_per_byte_PP: NDArray[np.float64]) -> float:
    """How long a migration will take: in each layer as long as the busiest rank sends, or receives if that is longer.

    `seconds_per_byte_PP`: of the link from each rank to each. Latencies are left out.
    """
    seconds_LPP = bytes_LPP * seconds_per_byte_PP
    return float(np.maximum(seconds_LPP.sum(2).max(1), seconds_LPP.sum(1).max(1)).sum())


@dataclass(frozen=True, order=True)
class _Move:
    """Of one row from a rank of the world to another, or to another place on the same."""

    source: int
    row: int
    """On the source."""
    target: int
    target_row: int


def _exchange(tensor: ExpertTensor, before: Sequence[int], after: Sequence[int]) -> int:
    """Move the rows of one tensor; returns the bytes that left this rank."""
    exchanges, me = _exchanges(tensor.sharding), dist.get_rank()
    held = next(held for held in exchanges if me in held)
    moves = sorted(_moves(held, before, after))
    if not moves:
        return 0
    leave = sorted((move for move in moves if move.source == me), key=lambda move: move.target)
    come = [move for move in moves if move.target == me]
    send = [sum(move.target == rank for move in leave) for rank in held]
    receive = [sum(move.source == rank for move in come) for rank in held]
    device = tensor.rows.device
    outgoing = tensor.rows.index_select(0, torch.tensor([move.row for move in leave], device=device, dtype=torch.int64))
    incoming = outgoing.new_empty(len(come), *outgoing.shape[1:])
    group = None if len(exchanges) == 1 else tensor.sharding.mesh.get_group(0)
    dist.all_to_all_single(incoming, outgoing, receive, send, group=group)
    rows = torch.tensor([move.target_row for move in come], device=device, dtype=torch.int64)
    tensor.rows.index_copy_(0, rows, incoming)
    return sum(move.target != me for move in leave) * tensor.row_bytes


def _exchanges(sharding: Sharding) -> list[dict[int, range]]:
    """The groups of ranks among which rows move, in each the slots that a rank holds rows of.

    They are the ep groups, but all ranks together where FSDP splits the rows of an ep rank over its copies.
    """
    columns = sharding.mesh.mesh.t().tolist()  # [edp, ep]
    held = [{rank: sharding.slots_of(place, copy) for place, rank in enumerate(c)} for copy, c in enumerate(columns)]
    if sharding.fsdp_dim == 0:
        held = [{rank: slots for group in held for rank, slots in group.items()}]
    return [dict(sorted(group.items())) for group in held]


def _moves(held: dict[int, range], before: Sequence[int], after: Sequence[int]) -> list[_Move]:
    """Of the rows of the experts that change their slots, among these ranks."""
    place = {slot: (rank, row) for rank, slots in held.items() for row, slot in enumerate(slots)}
    return [_Move(*place[old], *place[new]) for old, new in zip(before, after, strict=True) if old != new]


def _slots(tensors: Sequence[ExpertTensor]) -> ExpertSlots:
    slots = tensors[0].sharding.slots
    assert slots is not None, "experts without slots do not move"
    return slots
