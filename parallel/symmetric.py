"""Memory of a GPU that the other ranks of a group read by themselves, and where their kernels meet.

Needs GPUs of one host that reach one another (torch.distributed._symmetric_memory; no multicast). A group has one
:class:`Workspace` on each rank:

- two input slots that are used in turn, for tensors that the others read,
- a shard of results that the others pull,
- the words by which kernels meet, and one in which a kernel says for whom it has waited in vain.

Buffers grow when something larger comes, on all ranks at the same call, and are never given back: CUDA graphs may know
them. What a kernel finds in its peers' buffers is ordered by its meetings alone, so all ranks must make the same calls
for a group, in the same order, from one stream.
"""

from __future__ import annotations

import math
import socket
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symm_mem
from torch import Tensor
from torch._C._distributed_c10d import _SymmetricMemory

from moetrain.kernels.allreduce_rmsnorm_triton import MAX_WORLD, Meeting, describe_error

_ALIGNMENT = 16
_INT32_MAX = 2**31 - 1


class SymmetricBuffer:
    """The same number of bytes on each rank of a group. Creating one is collective."""

    def __init__(self, size: int, group: dist.ProcessGroup, device: torch.device) -> None:
        self.size = size
        self.own = _SymmetricMemory.empty_strided_p2p((size,), (1,), torch.uint8, device)
        # A peer may write as soon as it has met us here.
        self.own.zero_()
        torch.cuda.synchronize(device)
        self._handle = symm_mem.rendezvous(self.own, group)
        self._ranks = following_ranks(group)
        self._views: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def views(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The whole buffer of each rank as one dimension, this rank's first, then the following ones'."""
        if dtype not in self._views:
            length = self.size // dtype.itemsize
            self._views[dtype] = tuple(self._handle.get_buffer(rank, (length,), dtype) for rank in self._ranks)
        return self._views[dtype]

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor begins where this rank's buffer does."""
        return tensor.data_ptr() == self.own.data_ptr()


class Workspace:
    """What the kernels of a group share on this rank."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        self.group_ranks = dist.get_process_group_ranks(group)
        self.rank, self.world = group.rank(), group.size()
        self.device = device
        self.max_blocks = torch.cuda.get_device_properties(device).multi_processor_count
        self._group = weakref.ref(group)
        self._slots: Sequence[SymmetricBuffer | None] = (None, None)
        self._turn = 0
        self._shard: SymmetricBuffer | None = None
        self._retired: list[SymmetricBuffer] = []
        state = torch.zeros(
            1 + self.max_blocks, dtype=torch.int32, device=device
        )  # before a buffer, which waits for it
        self._flags = SymmetricBuffer(self.max_blocks * self.world * 4, group, device)
        self.meeting = Meeting(
            flags=self._flags.views(torch.int32),
            state=state,
            error=torch.zeros(1, dtype=torch.int32, pin_memory=True),
            timeout_ms=_timeout_ms(group, device),
        )

    def take_slot(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Memory of the slot whose turn it is, [*shape]. It is taken again at the second call after this."""
        size = math.prod(shape) * dtype.itemsize
        # All at once, for a CUDA graph may begin with any.
        self._slots = slots = [self._grown(slot, size) for slot in self._slots]
        slot = slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        return slot.views(dtype)[0][: math.prod(shape)].view(*shape)

    def shared(self, x_TD: Tensor, first: int, rows: int) -> tuple[Tensor, ...]:
        """All ranks' x: this rank's, then the following ones' buffers.

        An x that is not in a slot is copied into one, but for the `rows` from `first` on, which nobody else reads.
        """
        held = x_TD
        if self._slot_of(x_TD) is None:
            held = self.take_slot(x_TD.shape, x_TD.dtype)
            for others in (slice(0, first), slice(first + rows, None)):
                held[others].copy_(x_TD[others])
        slot = self._slot_of(held)
        assert slot is not None
        return x_TD, *slot.views(x_TD.dtype)[1:]

    def shards(self, elements: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """All ranks' shards of at least so many elements, this rank's first, then the following ones'."""
        self._shard = self._grown(self._shard, elements * dtype.itemsize)
        return self._shard.views(dtype)

    def check(self) -> None:
        """Raise DistError if a kernel that has run waited in vain for another rank. Does not wait for the device."""
        word = int(self.meeting.error[0])
        if not word:
            return
        kernel, meeting, peer, block = describe_error(word)
        raise dist.DistError(
            f"rank {self.group_ranks[self.rank]}: {kernel} waited {self.meeting.timeout_ms / 1e3:g} s at its {meeting} "
            f"for rank {self.group_ranks[peer]} (block {block}), in vain: that rank has stopped, or does not make the "
            "same calls. What came after it is wrong."
        )

    def _slot_of(self, tensor: Tensor) -> SymmetricBuffer | None:
        return next((slot for slot in self._slots if slot is not None and slot.holds(tensor)), None)

    def _grown(self, buffer: SymmetricBuffer | None, size: int) -> SymmetricBuffer:
        if buffer is not None and buffer.size >= size:
            return buffer
        if torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a CUDA graph cannot be captured before the same call has been made outside: it makes memory"
            )
        if buffer is not None:
            self._retired.append(buffer)
        group = self._group()
        assert group is not None
        return SymmetricBuffer(max(_ALIGNMENT, 1 << (size - 1).bit_length()), group, self.device)


def following_ranks(group: dist.ProcessGroup) -> list[int]:
    """The ranks of a group, from this one on, and round to the one before it."""
    return [(group.rank() + i) % group.size() for i in range(group.size())]


_workspaces: weakref.WeakKeyDictionary[dist.ProcessGroup, Workspace | str] = weakref.WeakKeyDictionary()
"""Of the groups that have been asked about; or why a group has none."""


def workspace(group: dist.ProcessGroup, device: torch.device) -> Workspace | str:
    """The group's workspace on this rank, or why there is none. The first call for a group is collective."""
    if device.type != "cuda":
        return f"runs on CUDA GPUs, not on {device.type}"
    if group not in _workspaces:
        obstacle = _obstacle(group, device)
        _workspaces[group] = Workspace(group, device) if obstacle is None else obstacle
    return _workspaces[group]


def check_symmetric() -> None:
    """Raise DistError if a kernel of any group has waited in vain for another rank: it names both, and the kernel.

    Reads host memory alone, so that it costs nothing to call it after every step; what still runs is not seen.
    """
    for known in list(_workspaces.values()):
        if isinstance(known, Workspace):
            known.check()


def _obstacle(group: dist.ProcessGroup, device: torch.device) -> str | None:
    """Why these ranks cannot read one another's memory; all of them find the same."""
    if dist.get_backend(group) != "nccl":
        return f"needs a group over NCCL, not {dist.get_backend(group)}"
    if not 2 <= group.size() <= MAX_WORLD:
        return f"takes groups of 2 to {MAX_WORLD} ranks, not {group.size()}"
    uuids = {str(torch.cuda.get_device_properties(i).uuid): i for i in range(torch.cuda.device_count())}
    mine = str(torch.cuda.get_device_properties(device).uuid)
    places = _from_all((socket.gethostname(), mine), group)
    if len({host for host, _ in places}) > 1:
        return "needs ranks of one host"
    if len(set(places)) < len(places):
        return "needs a GPU for each rank"
    others = [uuids.get(uuid) for _, uuid in places if uuid != mine]
    reached = all(i is not None and torch.cuda.can_device_access_peer(uuids[mine], i) for i in others)
    if not all(_from_all(reached, group)):
        return "needs GPUs that see and reach one another"
    return None


def _from_all(value: Any, group: dist.ProcessGroup) -> list[Any]:
    values = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    return values


def _timeout_ms(group: dist.ProcessGroup, device: torch.device) -> int:
    """As long as the group's collectives wait."""
    timeout = group._get_backend(device).options._timeout
    return min(_INT32_MAX, max(1, round(timeout.total_seconds() * 1e3)))
