"""How a parameter lies on the ranks: its gradient's reduction, its norm and its place in a checkpoint follow from it.

Dense parameters lie on the mesh ("tp", "dp"), experts on the mesh ("ep", "edp"): split or alike along the first
dimension, alike along the second.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


@dataclass(frozen=True)
class Sharding:
    """A parameter is split evenly along `dim` over the first dimension of `mesh`, or (None) the same on all ranks."""

    mesh: DeviceMesh
    dim: int | None

    @property
    def shards(self) -> int:
        """Into how many parts the parameter is split."""
        return 1 if self.dim is None else self.mesh.size(0)

    @property
    def index(self) -> int:
        """Which of them this rank holds."""
        return 0 if self.dim is None else self.mesh.get_local_rank(0)

    @property
    def shard_group(self) -> dist.ProcessGroup | None:
        """The ranks that hold the parts of one copy; None where each holds all of it."""
        return None if self.shards == 1 else self.mesh.get_group(0)

    @property
    def replica_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same part, whose gradients are added."""
        return cast(Any, dist.group.WORLD) if self.dim is None else self.mesh.get_group(1)

    @property
    def replicas(self) -> int:
        return self.mesh.size() if self.dim is None else self.mesh.size(1)

    def part(self, whole: Tensor) -> Tensor:
        """This rank's part of a whole tensor, as a view."""
        return whole if self.dim is None else whole.chunk(self.shards, self.dim)[self.index]

    def logical(self, local: Tensor) -> Tensor:
        """The logical tensor of which `local` is this rank's part; shares its memory."""
        if self.dim is None:
            return local.detach()
        return DTensor.from_local(local.detach(), self.mesh, [Shard(self.dim), Replicate()], run_check=False)
