"""The ranks of a run and the process groups they form.

world = dp × tp. Experts spread over ``ep`` consecutive ranks; the ``edp = world / ep`` ranks that hold the same
experts reduce expert gradients among themselves. With ep = 2 and four ranks::

    rank           0  1  2  3
    ep groups     [0  1][2  3]     tokens travel here
    edp groups    [0, 2] [1, 3]    expert gradients are summed here

Dense parameters lie the same way on ``tp`` consecutive ranks, which work on one share of the batch, and the
``dp = world / tp`` that hold the same parts. An ep group may span several tp groups. With tp = 2::

    tp groups     [0  1][2  3]     one share of the batch each; tokens are gathered and scattered here
    dp groups     [0, 2] [1, 3]    gradients of split parameters are summed here
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Mesh:
    """This rank's place among the others.

    Groups whose name says ``host`` run over gloo on CPU tensors: `host_group` carries control messages (signals,
    agreement on errors), `checkpoint_group` belongs to the thread that writes checkpoints, because collectives of two
    threads must not share a group.
    """

    rank: int
    world_size: int
    local_rank: int
    dp: int
    tp: int
    ep: int
    device: torch.device
    dense: DeviceMesh
    """Two dimensions, "tp" and "dp"."""
    experts: DeviceMesh
    """Two dimensions, "ep" and "edp"."""
    host_group: dist.ProcessGroup
    checkpoint_group: dist.ProcessGroup
    timeout: timedelta
    """Of collectives."""

    @property
    def dp_rank(self) -> int:
        return self.rank // self.tp

    @property
    def tp_rank(self) -> int:
        return self.rank % self.tp

    @property
    def tp_group(self) -> dist.ProcessGroup:
        return self.dense.get_group("tp")

    @property
    def ep_group(self) -> dist.ProcessGroup:
        return self.experts.get_group("ep")

    def new_host_group(self) -> dist.ProcessGroup:
        """One more of those over gloo, for a thread of its own. Collective."""
        return _host_group(self.timeout)


def environment_world_size() -> int:
    """World size that the launcher announced in WORLD_SIZE; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def available_device() -> str:
    """What the device "auto" is in a process of its own."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def create_mesh(
    *, tp: int = 1, ep: int = 1, device: str = "auto", timeout_minutes: float = 10.0, store: dist.Store | None = None
) -> Mesh:
    """Join the process group that the launcher describes in the environment (a group of one without a launcher).

    `store`: common to the ranks, if they have met already (:func:`moetrain.parallel.environment.meet`).
    `device`: "auto" takes GPU `LOCAL_RANK` where CUDA is available and the CPU elsewhere. A thread of a
    :class:`moetrain.parallel.mock.MockWorld` belongs to its group already, and takes its device. Raises ValueError if
    tp or ep does not divide the world size, or if a GPU is asked for and there is none for this rank.
    """
    mocked = dist.is_initialized() and dist.get_backend() == "mock"
    if mocked:
        rank, local_rank, world_size = dist.get_rank(), 0, dist.get_world_size()
    else:
        rank, local_rank, world_size = _environment()
    if world_size % tp or world_size % ep:
        raise ValueError(f"tp = {tp} and ep = {ep} must divide the world size of {world_size}")

    if device == "auto" and mocked:
        device = torch.get_default_device().type
    elif device == "auto":
        device = available_device()
    if device == "cuda":
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible here")
        target = torch.device("cuda", local_rank)
        torch.cuda.set_device(target)
    else:
        target = torch.device("cpu")

    timeout = timedelta(minutes=timeout_minutes)
    if store is None and not {"MASTER_ADDR", "RANK", "WORLD_SIZE"} <= os.environ.keys():
        store = dist.HashStore()
    if not mocked:
        dist.init_process_group(
            "nccl" if target.type == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=world_size,
            timeout=timeout,
            device_id=target if target.type == "cuda" else None,
        )
    return Mesh(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        dp=world_size // tp,
        tp=tp,
        ep=ep,
        device=target,
        dense=_device_mesh(target, world_size, tp, ("tp", "dp")),
        experts=_device_mesh(target, world_size, ep, ("ep", "edp")),
        host_group=_host_group(timeout),
        checkpoint_group=_host_group(timeout),
        timeout=timeout,
    )


def arranged(mesh: Mesh, *, tp: int = 1, ep: int = 1) -> Mesh:
    """The same ranks in other groups; collective. tp and ep must divide their number."""
    return replace(
        mesh,
        dp=mesh.world_size // tp,
        tp=tp,
        ep=ep,
        dense=_device_mesh(mesh.device, mesh.world_size, tp, ("tp", "dp")),
        experts=_device_mesh(mesh.device, mesh.world_size, ep, ("ep", "edp")),
    )


def _environment() -> tuple[int, int, int]:
    """Rank, local rank and world size by the launcher's variables; ValueError if the other ranks cannot be found."""
    world_size = environment_world_size()
    if "RANK" in os.environ and world_size > 1 and "MASTER_ADDR" not in os.environ:
        raise ValueError(f"WORLD_SIZE is {world_size}, but MASTER_ADDR and MASTER_PORT do not say where the others are")
    return int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0")), world_size


def _device_mesh(device: torch.device, world_size: int, consecutive: int, names: tuple[str, str]) -> DeviceMesh:
    """`consecutive` neighbouring ranks along the first dimension."""
    return DeviceMesh(device.type, torch.arange(world_size).view(-1, consecutive).t(), mesh_dim_names=names)


def _host_group(timeout: timedelta) -> dist.ProcessGroup:
    group = dist.new_group(backend="mock" if dist.get_backend() == "mock" else "gloo", timeout=timeout)
    assert isinstance(group, dist.ProcessGroup)
    return group


def destroy_mesh() -> None:
    """Leave all process groups."""
    if dist.is_initialized():
        dist.destroy_process_group()
