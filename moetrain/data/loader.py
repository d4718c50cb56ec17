"""Batches of packed sequences: shuffled without memory, sharded over data-parallel ranks, prefetched, resumable.

B = sequences in a micro-batch, S = tokens in a sequence.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from queue import SimpleQueue

import numpy as np
import torch
from torch import Tensor

from moetrain.data.dataset import Split
from moetrain.errors import DataError

IGNORED = -100
"""Target of a position that does not count, as in torch.nn.functional.cross_entropy."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank."""

    tokens_BS: Tensor
    """int64, inputs."""
    targets_BS: Tensor
    """int64, the token after each input; IGNORED where it does not count."""
    documents_BS: Tensor | None
    """int32, number of the document within the sequence, from 0; None without document masking."""

    def to(self, device: torch.device) -> Batch:
        """A copy on `device` that does not wait for the transfer of pinned memory; itself if it is there already."""
        documents_BS = None if self.documents_BS is None else self.documents_BS.to(device, non_blocking=True)
        return Batch(
            self.tokens_BS.to(device, non_blocking=True), self.targets_BS.to(device, non_blocking=True), documents_BS
        )


class Permutation:
    """A seeded pseudo-random bijection of 0 … size - 1 in constant memory.

    A Feistel network permutes the next larger even power of two; indices that fall outside are sent through again
    until they land inside (cycle walking), fewer than four times on average.
    """

    _ROUNDS = 6

    def __init__(self, size: int, seed: int, epoch: int) -> None:
        self._size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._mask = (1 << self._half_bits) - 1
        digest = hashlib.sha512(f"{seed} {epoch}".encode()).digest()
        self._keys = [int.from_bytes(digest[8 * i : 8 * i + 8]) for i in range(self._ROUNDS)]

    def __call__(self, index: int) -> int:
        if not 0 <= index < self._size:
            raise IndexError(f"{index} is not in a permutation of {self._size}")
        while True:
            index = self._encrypt(index)
            if index < self._size:
                return index

    def _encrypt(self, index: int) -> int:
        left, right = index >> self._half_bits, index & self._mask
        for key in self._keys:
            left, right = right, left ^ (_mix(right ^ key) & self._mask)
        return left << self._half_bits | right


def _mix(value: int) -> int:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of the value."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    value = (value ^ value >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return value ^ value >> 31


def num_samples(split: Split, seq_len: int) -> int:
    """Sequences of `seq_len` inputs in a split: sample i is tokens i·S … i·S + S, whose last is only a target.

    Raises:
        DataError: the split is shorter than one of them.
    """
    samples = (split.num_tokens - 1) // seq_len
    if samples < 1:
        raise DataError(
            f"{split.folder}: the {split.name} split has {split.num_tokens} tokens, fewer than data.seq_len + 1 = "
            f"{seq_len + 1}: lower data.seq_len or give more data"
        )
    return samples


class Loader:
    """This rank's micro-batches of an endless stream of samples, a new permutation each epoch.

    A step of the optimiser takes the next micro_batch · accumulation · dp_size samples of the stream: which ones, and
    their order, does not depend on how that product is made up. Of a step that starts at sample c, micro-batch m of
    rank r is samples c + (m · dp_size + r) · micro_batch and the following.

    Iteration never ends by itself. A thread prepares micro-batches ahead; its errors are raised by the iteration. Call
    :meth:`close` (or drop the loader) to end it.

    Args:
        split: where tokens come from.
        seq_len: S.
        micro_batch: B.
        accumulation: micro-batches of one rank in a step.
        dp_rank, dp_size: this rank among those that read different data.
        seed: of the permutations.
        end_of_document: id after which a new document starts.
        mask_documents: give `documents_BS`.
        prefetch: micro-batches prepared ahead.
        start_sample: where to resume: `samples` of a :meth:`state_dict`.
        pin: pin the batches' memory; default: where there is CUDA.

    Raises:
        DataError: the split is shorter than one sample.
    """

    def __init__(
        self,
        *,
        split: Split,
        seq_len: int,
        micro_batch: int,
        accumulation: int,
        dp_rank: int,
        dp_size: int,
        seed: int,
        end_of_document: int,
        mask_documents: bool,
        prefetch: int,
        start_sample: int = 0,
        pin: bool | None = None,
    ) -> None:
        self._start = start_sample
        self._accumulation = accumulation
        self._step_samples = micro_batch * accumulation * dp_size
        self._yielded = 0
        self._closed = False
        self._error: BaseException | None = None
        stream = _Stream(
            split, num_samples(split, seq_len), seq_len, micro_batch, seed, end_of_document if mask_documents else None
        )
        pin = torch.cuda.is_available() if pin is None else pin
        # The thread must not hold the loader, or a dropped loader would never be collected.
        self._ready: SimpleQueue[Batch | BaseException | None] = SimpleQueue()
        self._slots = threading.Semaphore(prefetch)
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=_prefetch,
            args=(
                stream,
                start_sample + dp_rank * micro_batch,
                dp_size * micro_batch,
                torch.cuda.current_device() if pin else None,
                self._ready,
                self._slots,
                self._stop,
            ),
            name="moetrain-loader",
            daemon=True,
        )
        self._finalizer = weakref.finalize(self, _end, self._stop, self._slots, self._ready)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._error is not None:
            raise self._error
        if self._closed:
            raise StopIteration
        item = self._ready.get()
        if item is None:
            raise StopIteration
        if isinstance(item, BaseException):
            self._error = item
            raise item
        self._slots.release()
        self._yielded += 1
        return item

    def state_dict(self) -> dict[str, int]:
        """Samples of the stream that the whole steps yielded so far consumed, over all ranks."""
        steps = self._yielded // self._accumulation
        return {"samples": self._start + steps * self._step_samples}

    def close(self) -> None:
        """End the thread; iteration stops."""
        self._closed = True
        self._finalizer()
        self._thread.join()


@dataclass(frozen=True)
class _Stream:
    """Samples of all epochs, one after the other."""

    split: Split
    samples: int
    """In an epoch."""
    seq_len: int
    micro_batch: int
    seed: int
    end_of_document: int | None
    """None: no documents_BS."""

    def batch(self, first: int) -> Batch:
        """Samples first … first + micro_batch - 1 of the stream."""
        positions = (divmod(first + i, self.samples) for i in range(self.micro_batch))
        chosen = [_permutation(self.samples, self.seed, epoch)(index) for epoch, index in positions]
        return _assemble(self.split, self.seq_len, chosen, self.end_of_document)


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, epoch: int) -> Permutation:
    return Permutation(size, seed, epoch)


def _assemble(split: Split, seq_len: int, samples: list[int], end_of_document: int | None) -> Batch:
    block = torch.from_numpy(np.stack([split.read(sample * seq_len, seq_len + 1) for sample in samples]))
    tokens_BS = block[:, :-1].contiguous()
    documents_BS = None
    if end_of_document is not None:
        ends_BS = (tokens_BS == end_of_document).to(torch.int32)
        # An end of document still belongs to the document it ends.
        documents_BS = ends_BS.cumsum(1, dtype=torch.int32) - ends_BS
    return Batch(tokens_BS, block[:, 1:].contiguous(), documents_BS)


def _prefetch(
    stream: _Stream,
    first: int,
    stride: int,
    pin_device: int | None,
    ready: SimpleQueue[Batch | BaseException | None],
    slots: threading.Semaphore,
    stop: threading.Event,
) -> None:
    try:
        if pin_device is not None:
            # Pinning in a new thread would otherwise make a context on GPU 0 in every process.
            torch.cuda.set_device(pin_device)
        while True:
            slots.acquire()
            if stop.is_set():
                return
            batch = stream.batch(first)
            ready.put(_pinned(batch) if pin_device is not None else batch)
            first += stride
    except BaseException as error:
        ready.put(error)


def _end(stop: threading.Event, slots: threading.Semaphore, ready: SimpleQueue[Batch | BaseException | None]) -> None:
    stop.set()
    slots.release()
    ready.put(None)  # for a consumer that waits in another thread


def _pinned(batch: Batch) -> Batch:
    documents_BS = None if batch.documents_BS is None else batch.documents_BS.pin_memory()
    return Batch(batch.tokens_BS.pin_memory(), batch.targets_BS.pin_memory(), documents_BS)


def heldout_samples(split: Split, seq_len: int, max_tokens: int) -> int:
    """Sequences that :func:`heldout_batches` reads over all ranks; their targets are tokens 1 … that · seq_len.

    Raises:
        DataError: the split or `max_tokens` is shorter than one sequence.
    """
    samples = min(num_samples(split, seq_len), max_tokens // seq_len)
    if samples < 1:
        raise DataError(f"eval.tokens = {max_tokens}: must hold one sequence of data.seq_len = {seq_len}")
    return samples


def heldout_batches(
    split: Split,
    seq_len: int,
    micro_batch: int,
    max_tokens: int,
    dp_rank: int,
    dp_size: int,
    *,
    end_of_document: int | None = None,
) -> Iterator[Batch]:
    """The first max_tokens // S sequences of a split, in order, each on exactly one rank.

    Every rank gets the same number of batches of the same shape, for the model's collectives need all ranks; rows
    that fill up repeat the last sequence with all targets IGNORED.

    Args:
        end_of_document: give `documents_BS`, by this id.

    Raises:
        DataError: as :func:`heldout_samples`, at the call.
    """
    samples = heldout_samples(split, seq_len, max_tokens)

    def batches() -> Iterator[Batch]:
        for first in range(dp_rank * micro_batch, _round_up(samples, dp_size * micro_batch), dp_size * micro_batch):
            chosen = range(first, first + micro_batch)
            batch = _assemble(split, seq_len, [min(sample, samples - 1) for sample in chosen], end_of_document)
            batch.targets_BS[max(0, samples - first) :] = IGNORED
            yield batch

    return batches()


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
