"""Measuring time and memory so that implementations can be compared: same process, same minute, cold caches."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]

SCRATCH_BYTES = 512 << 20
"""Written before every timed call: several times the L2 cache, so that nothing is read from there."""
MAX_FILLS = 30


class Deadline:
    """A point in time after which no new work is begun; None: never."""

    def __init__(self, seconds: float | None) -> None:
        self._end = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() >= self._end


@dataclass(frozen=True)
class Timing:
    """Times of one implementation over all rounds, in milliseconds."""

    median: float
    """Of all calls."""
    low: float
    """The smallest median of a round …"""
    high: float
    """… and the largest."""
    host: float
    """What the host needs to issue one call; more than `median` where the host holds the device up."""
    calls: int


def time_interleaved(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    rounds: int = 5,
    round_seconds: float = 0.1,
    calls_a_round: int | None = None,
    deadline: Deadline | None = None,
) -> dict[str, Timing]:
    """Time every call in every round, each round beginning with another one: clocks and heat are shared.

    On a GPU a call is timed by events around it. Before it, writing the scratch memory clears the L2 cache and keeps
    the device busy until the host has issued the call, so that only calls that wait for the device show the host's
    time. Each call is made for about `round_seconds` a round, at least three times, or `calls_a_round` times, so that
    ranks make equally many. A deadline that has passed ends after the current round.
    """
    scratch = torch.empty(SCRATCH_BYTES if device.type == "cuda" else 0, dtype=torch.int8, device=device)
    clocks = {name: _Clock(call, device, round_seconds, calls_a_round, scratch) for name, call in calls.items()}
    samples: dict[str, list[list[float]]] = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            samples[name].append(clocks[name].burst())
        if deadline is not None and deadline.passed:
            break
    timings = {}
    for name, bursts in samples.items():
        medians = [statistics.median(burst) for burst in bursts]
        flat = [value for burst in bursts for value in burst]
        timings[name] = Timing(statistics.median(flat), min(medians), max(medians), clocks[name].host, len(flat))
    return timings


class _Clock:
    """One call, warmed up, with how often it is made in a burst."""

    def __init__(self, call: Call, device: torch.device, seconds: float, count: int | None, scratch: Tensor) -> None:
        self._call = call
        self._device = device
        self._scratch = scratch
        self._fills = 1
        call()
        synchronize(device)
        start = time.perf_counter()
        call()
        issued = time.perf_counter()
        synchronize(device)
        self.host = (issued - start) * 1e3
        self._count = count or max(3, min(50, round(seconds / max(time.perf_counter() - start, 1e-6))))
        if device.type == "cuda":
            fill = statistics.median(self._events(scratch.zero_, 5))
            self._fills = min(MAX_FILLS, 2 + int(self.host / fill))

    def burst(self) -> list[float]:
        """Milliseconds of each of a number of calls."""
        if self._device.type == "cuda":
            return self._events(self._call, self._count)
        times = []
        for _ in range(self._count):
            start = time.perf_counter()
            self._call()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def _events(self, call: Call, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            for _ in range(self._fills):
                self._scratch.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self._device)
        return [start.elapsed_time(end) for start, end in events]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class Floors:
    """What the device can do, measured; a kernel needs at least the larger of its two times."""

    copy_bandwidth: float
    """Bytes/s read and written of a copy within the device."""
    matmul_rate: float
    """FLOP/s of one large bfloat16 product of random matrices."""

    def milliseconds(self, flops: float, moved_bytes: float) -> float:
        return max(flops / self.matmul_rate, moved_bytes / self.copy_bandwidth) * 1e3


def measure_floors(device: torch.device) -> Floors:
    """A copy of 2 GiB and an 8192³ product on a GPU; small ones on a CPU."""
    cuda = device.type == "cuda"
    size, side = (2 << 30, 8192) if cuda else (1 << 24, 256)
    source, target = (torch.ones(size, dtype=torch.int8, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device).to(torch.bfloat16) for _ in range(2))
    c = torch.empty_like(a)
    timings = time_interleaved(
        {"copy": lambda: target.copy_(source), "matmul": lambda: torch.mm(a, b, out=c)}, device, rounds=3
    )
    return Floors(2 * size / timings["copy"].median * 1e3, 2 * side**3 / timings["matmul"].median * 1e3)


def saved_bytes(forward: Callable[[], Tensor], known: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass: distinct storages of saved tensors, without those of `known`."""
    ignored = {tensor.untyped_storage().data_ptr() for tensor in known}
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in ignored:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would be a cycle where it is an output

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(storages.values())


def held_bytes(forward: Callable[[], Tensor], device: torch.device) -> int | None:
    """Bytes of device memory that live between forward and backward, beyond the output; None on a CPU.

    Sees what :func:`saved_bytes` does not: tensors that are kept in other ways than autograd's.
    """
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    output = forward()
    held = torch.cuda.memory_allocated(device) - before - output.untyped_storage().nbytes()
    del output
    return held
