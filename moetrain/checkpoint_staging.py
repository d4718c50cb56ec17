"""Tensors on their way from a device to a file, through a bounded number of blocks of host memory.

The lazy copies of DataStates-LLM (arXiv 2406.10707, section 5.2): weights and moments do not change before the next
update, so a thread copies them while the next forward and backward pass run, on a stream of its own where they are on
a GPU. Blocks that are filled wait to be written and are filled again. When all are full the copying waits for the
writing, and if it comes to that the next update for the copying: memory is bounded, and no save is left out.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from queue import SimpleQueue

import psutil
import torch
from torch import Tensor

from moetrain.checkpoint_shards import BLOCK_BYTES, as_bytes


class HostMemory:
    """Blocks of BLOCK_BYTES, at most `limit`; pinned for a GPU. What has been allocated is kept."""

    def __init__(self, limit: int, pinned: bool) -> None:
        self.limit = limit
        self._pinned = pinned
        self._made = 0
        self._free: list[Tensor] = []
        self._given_back = threading.Condition()

    def take(self) -> Tensor:
        """uint8 [BLOCK_BYTES]; waits until there is one."""
        with self._given_back:
            self._given_back.wait_for(lambda: self._free or self._made < self.limit)
            if self._free:
                return self._free.pop()
            self._made += 1
        try:
            return torch.empty(BLOCK_BYTES, dtype=torch.uint8, pin_memory=self._pinned)
        except RuntimeError:  # or others would wait for it
            with self._given_back:
                self._made -= 1
            raise

    def give_back(self, block: Tensor) -> None:
        with self._given_back:
            self._free.append(block)
            self._given_back.notify()


@dataclass(frozen=True)
class _Filled:
    """A block, or the last of a copy and less than one."""

    block: Tensor
    used: int
    copied: torch.cuda.Event | None


class Copy:
    """The copy of some tensors: blocks come out of it, in order, as they are filled."""

    def __init__(self, memory: HostMemory, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        """Kept for as long as they are read."""
        self.done: Future[torch.cuda.Event | None] = Future()
        """When all copies are done or on the stream; the event comes after them there."""
        self._memory = memory
        self._filled: SimpleQueue[_Filled | Exception | None] = SimpleQueue()
        self._ended = False

    def wait(self) -> None:
        """Return when what the caller does next, on its current stream, may change the tensors."""
        event = self.done.result()
        if event is not None:
            torch.cuda.current_stream().wait_event(event)
        self.tensors = ()

    def blocks(self) -> Generator[memoryview, None, None]:
        """The tensors' bytes, one after the other; raises what kept them from being copied."""
        while (filled := self._next()) is not None:
            try:
                yield filled.block[: filled.used].numpy().data
            finally:
                self._memory.give_back(filled.block)

    def drop(self) -> None:
        """Do without what has not come out of :meth:`blocks`."""
        while not self._ended:
            with suppress(Exception):
                if (filled := self._next()) is not None:
                    self._memory.give_back(filled.block)

    def _next(self) -> _Filled | None:
        """The next block, once its contents are there."""
        filled = self._filled.get()
        if isinstance(filled, Exception):
            raise filled
        if filled is None:
            self._ended = True
        elif filled.copied is not None:
            filled.copied.synchronize()
        return filled

    def run(self, stream: torch.cuda.Stream | None, ready: torch.cuda.Event | None) -> None:
        """Fill blocks; what the stream does begins after `ready`."""
        event = None
        try:
            with nullcontext() if stream is None else torch.cuda.stream(stream):
                if stream is not None and ready is not None:
                    stream.wait_event(ready)
                for filled in self._fill(stream):
                    event = filled.copied
                    self._filled.put(filled)
        except Exception as error:  # whoever writes the blocks says so
            self._filled.put(error)
        finally:
            self._filled.put(None)
            self.done.set_result(event)

    def _fill(self, stream: torch.cuda.Stream | None) -> Iterator[_Filled]:
        for pieces in _by_block(self.tensors):
            sizes = [len(piece) for piece in pieces]
            block, used = self._memory.take(), sum(sizes)
            # One call, which leaves the interpreter to the trainer.
            torch._foreach_copy_(block[:used].split(sizes), pieces, non_blocking=True)
            yield _Filled(block, used, None if stream is None else _record(stream))


def _by_block(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The bytes of the tensors, cut into what fills one block after the other."""
    pieces: list[Tensor] = []
    room = BLOCK_BYTES
    for tensor in tensors:
        content = as_bytes(tensor)
        while size := len(content):
            piece = content if size <= room else content[:room]
            pieces.append(piece)
            room -= len(piece)
            content = content[len(piece) :]
            if room == 0:
                yield pieces
                pieces, room = [], BLOCK_BYTES
    if pieces:
        yield pieces


class Stager:
    """Copies tensors of one device, in a thread.

    `limit_bytes`: of host memory; None: :func:`default_limit` of what is copied first.
    """

    def __init__(self, device: torch.device, limit_bytes: int | None) -> None:
        self._device = device
        self._limit_bytes = limit_bytes
        self._memory: HostMemory | None = None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._thread = threads(1, "checkpoint-copy", device)

    def copy(self, groups: Sequence[Sequence[Tensor]]) -> list[Copy]:
        """Begin to copy the tensors as the current stream leaves them, one group after the other.

        They must not change until Copy.wait().
        """
        if self._memory is None:
            size = sum(tensor.numel() * tensor.element_size() for tensors in groups for tensor in tensors)
            limit = default_limit(size) if self._limit_bytes is None else self._limit_bytes
            # Two, so that one is filled while the other is written.
            self._memory = HostMemory(max(2, limit // BLOCK_BYTES), pinned=self._stream is not None)
        copies = [Copy(self._memory, tensors) for tensors in groups]
        ready = None if self._stream is None else _record(torch.cuda.current_stream(self._device))
        for copy in copies:
            self._thread.submit(copy.run, self._stream, ready)
        return copies

    def close(self) -> None:
        """Wait for what has begun, which needs its blocks to be taken."""
        self._thread.shutdown()


def threads(count: int, name: str, device: torch.device) -> ThreadPoolExecutor:
    """Threads for which this device is the current one; by itself it would be the first GPU, on every rank."""
    return ThreadPoolExecutor(count, name, partial(torch.cuda.set_device, device) if device.type == "cuda" else None)


def default_limit(size: int) -> int:
    """Bytes for two copies of `size` bytes, but of all ranks of this machine no more than half of what it has free."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    blocks = -(-size // BLOCK_BYTES)
    return min(2 * blocks * BLOCK_BYTES, psutil.virtual_memory().available // 2 // ranks)


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(blocking=True)  # whoever waits for it sleeps
    event.record(stream)
    return event
