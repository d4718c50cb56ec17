"""How a parameter lies on the ranks: its gradient's reduction, its norm and its place in a checkpoint follow from it.

Dense parameters lie on the mesh ("tp", "dp"), experts on the mesh ("ep", "edp"): split or alike along the first
dimension; along the second alike, or split by FSDP.

Shapes: E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


class ExpertSlots:
    """Where the experts of one layer lie: those of the first ep rank in the first E / ep slots, and so on.

    Whoever needs it keeps this object, in which a migration changes the numbers.
    """

    def __init__(self, slots: Sequence[int], device: torch.device | str = "cpu"):
        """`slots`: of each logical expert, a permutation."""
        self.slot_E = torch.empty(len(slots), dtype=torch.int64, device=device)
        """On the device: the slot of each logical expert."""
        self.experts: list[int] = []
        """On the host: the logical expert in each slot."""
        self.assign(slots)

    @property
    def slots(self) -> list[int]:
        """On the host: the slot of each logical expert."""
        return _inverse(self.experts)

    def assign(self, slots: Sequence[int]) -> None:
        """From now on the experts lie so."""
        self.slot_E.copy_(torch.tensor(slots, dtype=torch.int64))
        self.experts = _inverse(slots)


def _inverse(permutation: Sequence[int]) -> list[int]:
    return sorted(range(len(permutation)), key=permutation.__getitem__)


class ScatteredTensor(torch.Tensor):
    """A logical tensor of which this rank holds some rows in any order, where a DTensor would be one range of them.

    Made for checkpoints and good for nothing else: torch.distributed.checkpoint asks it for its chunks, which are runs
    of consecutive rows.
    """

    local: Tensor
    rows: Sequence[int]
    columns_from: int
    copies: tuple[int, int]
    chunks: dict[torch.Size, Tensor]
    """By their place in the logical tensor; views of `local`."""

    @staticmethod
    def __new__(
        cls, local: Tensor, shape: torch.Size, rows: Sequence[int], columns_from: int, copies: tuple[int, int]
    ) -> ScatteredTensor:
        """
        Parameters
        ----------
        local : this rank's part [rows, columns, …]; a checkpoint is read into its memory
        shape : of the logical tensor
        rows : which of the logical rows each of `local` is
        columns_from : where in dimension 1 of the logical tensor it begins
        copies : (n, m) if m ranks hold the same part, of which this is the n-th
        """
        tensor = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        tensor.local, tensor.rows, tensor.columns_from, tensor.copies = local, rows, columns_from, copies
        tensor.chunks = {}
        for _, run in groupby(enumerate(rows), key=lambda held: held[1] - held[0]):
            (place, row), *more = run
            offset = torch.Size([row, columns_from, *[0] * (len(shape) - 2)])
            tensor.chunks[offset] = local[place : place + 1 + len(more)]
        return tensor

    def to_local(self) -> Tensor:
        return self.local

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func}: a tensor that is scattered over the ranks has no operations; take to_local()")

    # What torch.distributed.checkpoint asks of tensors that are not whole.

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offset, chunk.shape) for offset, chunk in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None
        return self.chunks[index.offset]


@dataclass(frozen=True)
class Sharding:
    """A parameter is split evenly along `dim` over the first dimension of `mesh`, or (None) the same on all ranks.

    Each part is split once more along `fsdp_dim` over the second dimension, or (None) the same there. This split has
    the sizes of :func:`torch.chunk`: the last parts may be smaller or empty. With `slots` (and dim 0) it is not the
    logical rows that are split, experts, but these in the order of their slots.
    """

    mesh: DeviceMesh
    dim: int | None
    fsdp_dim: int | None = None
    slots: ExpertSlots | None = field(default=None, compare=False)

    @property
    def shards(self) -> int:
        """Into how many parts the parameter is split along `dim`."""
        return 1 if self.dim is None else self.mesh.size(0)

    @property
    def index(self) -> int:
        """Which of them this rank holds, or a part of."""
        return 0 if self.dim is None else self.mesh.get_local_rank(0)

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the parts of one copy; None where each holds all of it."""
        return self._group(self.dim is not None, self.fsdp_dim is not None)

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the same part, whose gradients are added; None where no other does."""
        return self._group(self.dim is None, self.fsdp_dim is None)

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as a view (a copy where there are slots)."""
        if self.dim is not None and self.slots is not None:
            whole = whole[self.slots.experts]
        if self.dim is not None:
            whole = whole.chunk(self.shards, self.dim)[self.index]
        if self.fsdp_dim is None:
            return whole
        kept = self._fsdp_part(whole.shape[self.fsdp_dim], self.mesh.get_local_rank(1))
        return whole.narrow(self.fsdp_dim, kept.start, len(kept))

    def slots_of(self, index: int, fsdp_index: int) -> range:
        """Of which slots the rank at this place in the mesh holds the rows."""
        assert self.slots is not None
        share = len(self.slots.experts) // self.shards
        held = self._fsdp_part(share, fsdp_index) if self.fsdp_dim == 0 else range(share)
        return range(index * share + held.start, index * share + held.stop)

    def _fsdp_part(self, size: int, index: int) -> range:
        """What :func:`torch.chunk` gives the rank of this index along the mesh's second dimension."""
        length = -(-size // self.mesh.size(1))
        return range(min(index * length, size), min((index + 1) * length, size))

    def logical_shape(self, unsharded: Sequence[int]) -> torch.Size:
        """Shape of the logical tensor, from that of this rank's part before FSDP splits it."""
        return torch.Size(size * self.shards if dim == self.dim else size for dim, size in enumerate(unsharded))

    def logical(self, local: Tensor, shape: torch.Size | None = None) -> Tensor:
        """The logical tensor of which `local` is this rank's part; shares its memory.

        `shape`: of the logical tensor; without it all parts are taken to be as large as this one.
        """
        if self.dim is None and self.fsdp_dim is None:
            return local.detach()
        if self.dim is not None and self.slots is not None:
            return self._scattered(local.detach(), self.logical_shape(local.shape) if shape is None else shape)
        placements: list[Placement] = [Replicate() if d is None else Shard(d) for d in (self.dim, self.fsdp_dim)]
        stride = None if shape is None else torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local.detach(), self.mesh, placements, run_check=False, shape=shape, stride=stride)

    def _scattered(self, local: Tensor, shape: torch.Size) -> ScatteredTensor:
        assert self.slots is not None
        copy, copies = self.mesh.get_local_rank(1), self.mesh.size(1)
        held = self.slots_of(self.index, copy)
        columns = self._fsdp_part(shape[1], copy) if self.fsdp_dim == 1 else range(shape[1])
        rows = self.slots.experts[held.start : held.stop]
        return ScatteredTensor(local, shape, rows, columns.start, (copy, copies) if self.fsdp_dim is None else (0, 1))

    def _group(self, first: bool, second: bool) -> dist.ProcessGroup | None:
        """The ranks along these dimensions of the mesh; None if that is this rank alone."""
        first, second = first and self.mesh.size(0) > 1, second and self.mesh.size(1) > 1
        if first and second:
            return cast(Any, dist.group.WORLD)
        return self.mesh.get_group(0 if first else 1) if first or second else None
