"""How a parameter lies on the ranks: its gradient's reduction, its norm and its place in a checkpoint follow from it.

Dense parameters lie on the mesh ("tp", "dp"), experts on the mesh ("ep", "edp"): split or alike along the first
dimension; along the second alike, or split by FSDP.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard


@dataclass(frozen=True)
class Sharding:
    """A parameter is split evenly along `dim` over the first dimension of `mesh`, or (None) the same on all ranks.

    Each part is split once more along `fsdp_dim` over the second dimension, or (None) the same there. This split has
    the sizes of :func:`torch.chunk`: the last parts may be smaller or empty.
    """

    mesh: DeviceMesh
    dim: int | None
    fsdp_dim: int | None = None

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
        """This rank's part of a whole tensor, as a view."""
        if self.dim is not None:
            whole = whole.chunk(self.shards, self.dim)[self.index]
        if self.fsdp_dim is None:
            return whole
        size = whole.shape[self.fsdp_dim]
        length = -(-size // self.mesh.size(1))
        start = min(self.mesh.get_local_rank(1) * length, size)
        return whole.narrow(self.fsdp_dim, start, min(length, size - start))

    def logical_shape(self, unsharded: Sequence[int]) -> torch.Size:
        """Shape of the logical tensor, from that of this rank's part before FSDP splits it."""
        return torch.Size(size * self.shards if dim == self.dim else size for dim, size in enumerate(unsharded))

    def logical(self, local: Tensor, shape: torch.Size | None = None) -> Tensor:
        """The logical tensor of which `local` is this rank's part; shares its memory.

        `shape`: of the logical tensor; without it all parts are taken to be as large as this one.
        """
        if self.dim is None and self.fsdp_dim is None:
            return local.detach()
        placements: list[Placement] = [Replicate() if d is None else Shard(d) for d in (self.dim, self.fsdp_dim)]
        stride = None if shape is None else torch.empty(shape, device="meta").stride()
        return DTensor.from_local(local.detach(), self.mesh, placements, run_check=False, shape=shape, stride=stride)

    def _group(self, first: bool, second: bool) -> dist.ProcessGroup | None:
        """The ranks along these dimensions of the mesh; None if that is this rank alone."""
        first, second = first and self.mesh.size(0) > 1, second and self.mesh.size(1) > 1
        if first and second:
            return cast(Any, dist.group.WORLD)
        return self.mesh.get_group(0 if first else 1) if first or second else None
