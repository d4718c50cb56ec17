"""What a GPU did in a step, from a profile: computation, communication, and communication that nothing hides.

Everything the device does is one or the other. Communication is a kernel of NCCL, one that meets other ranks' kernels,
or a copy between GPUs; computation is all else, other copies too. Exposed is the time of communication in which no
computation runs: the union of all minus the union of computation. A collective includes the wait for the last rank.

Times are milliseconds from the first activity on.
"""

from __future__ import annotations

import gzip
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

Span = tuple[float, float]
"""Start and end."""

COMMUNICATION = re.compile(r"nccl|exchange_add_rmsnorm|PtoP|symm_?mem|multimem", re.IGNORECASE)
LAYER = re.compile(r"layer (\d+)")
"""Name of a range of the host around what belongs to a layer."""


@dataclass(frozen=True)
class Activity:
    """A kernel or a copy."""

    name: str
    stream: int
    start: float
    end: float
    layer: int | None = None
    """The layer for which the host issued it, as far as a profile tells."""
    backward: bool = False

    @property
    def communicates(self) -> bool:
        return COMMUNICATION.search(self.name) is not None


@dataclass(frozen=True)
class Timeline:
    """Disjoint spans in ascending order."""

    compute: list[Span]
    communication: list[Span]
    exposed: list[Span]
    layers: list[tuple[int, bool, float, float]]
    """Layer, whether of the backward pass, start and end of its computation; where a profile tells."""
    exposed_by_layer: dict[int, float]
    """Milliseconds; of a layer's own communication."""
    kernels: int

    def figures(self) -> dict[str, float]:
        """Milliseconds of a step by what the device did, the number of its kernels and copies, and which part of the
        communication was hidden."""
        everything = merged([*self.compute, *self.communication])
        span = everything[-1][1] - everything[0][0] if everything else 0.0
        communication, exposed = total(self.communication), total(self.exposed)
        return {
            "span_ms": span,
            "compute_ms": total(self.compute),
            "communication_ms": communication,
            "exposed_ms": exposed,
            "idle_ms": span - total(everything),
            "hidden": 1 - exposed / communication if communication else 0.0,
            "kernels": self.kernels,
        }


def timeline(activities: Sequence[Activity]) -> Timeline:
    """The spans of a profile's activities."""
    compute = merged((a.start, a.end) for a in activities if not a.communicates)
    communication = merged((a.start, a.end) for a in activities if a.communicates)
    exposed = without(communication, compute)
    by_layer: dict[int, list[Span]] = {}
    for a in activities:
        if a.layer is not None:
            by_layer.setdefault(a.layer, []).extend([(a.start, a.end)] if a.communicates else [])
    exposed_by_layer = {layer: total(without(merged(by_layer[layer]), compute)) for layer in sorted(by_layer)}
    return Timeline(compute, communication, exposed, _layers(activities), exposed_by_layer, len(activities))


def _layers(activities: Sequence[Activity]) -> list[tuple[int, bool, float, float]]:
    """In the order of their beginning; a forward pass after a backward pass is another micro-batch's."""
    spans: dict[tuple[int, int, bool], Span] = {}
    micro_batch, backward = 0, False
    for a in sorted(activities, key=lambda a: a.start):
        if a.layer is None or a.communicates:
            continue
        micro_batch += backward and not a.backward
        backward = a.backward
        start, end = spans.get((micro_batch, a.layer, backward), (a.start, a.end))
        spans[micro_batch, a.layer, backward] = start, max(end, a.end)
    return [(layer, backward, *span) for (_, layer, backward), span in spans.items()]


def merged(spans: Iterable[Span]) -> list[Span]:
    """Their union."""
    result: list[Span] = []
    for start, end in sorted(spans):
        if result and start <= result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def without(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """The parts of `spans` that are in none of `others`; both disjoint and in ascending order."""
    result: list[Span] = []
    place = 0
    for start, end in spans:
        while place < len(others) and others[place][1] <= start:
            place += 1
        ahead = place
        while start < end and ahead < len(others) and others[ahead][0] < end:
            if others[ahead][0] > start:
                result.append((start, others[ahead][0]))
            start = max(start, others[ahead][1])
            ahead += 1
        if start < end:
            result.append((start, end))
    return result


def total(spans: Iterable[Span]) -> float:
    """The sum of the lengths of disjoint spans."""
    return sum(end - start for start, end in spans)


# ---------------------------------------------------------------------------------------------------------------------
# Profiles


def recorded(profiler: torch.profiler.profile) -> list[Activity]:
    """What the GPU did while a profiler ran; nothing where there is none. Times are right, layers are not known."""
    results = None if profiler.profiler is None else profiler.profiler.kineto_results
    activities = []
    for event in results.events() if results is not None else ():
        if event.device_type() == DeviceType.CUDA and not event.is_user_annotation():
            start, duration = event.start_ns() / 1e6, event.duration_ns() / 1e6
            activities.append(Activity(event.name(), event.device_resource_id(), start, start + duration))
    return _from_first(activities)


def read_trace(file: Path) -> dict[str, Any]:
    """A Chrome trace that torch.profiler has exported, compressed or not."""
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as opened:
        trace: dict[str, Any] = json.load(opened)
    return trace


def traced(trace: Mapping[str, Any]) -> list[Activity]:
    """The GPU's activities in a Chrome trace of torch.profiler, with their layers where the host was recorded too.

    In the forward pass a layer is a range of the host with the name "layer N" in which a kernel is launched. In the
    backward pass it is that of the operation whose gradient launches it: autograd gives both one sequence number.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    operations, launches = {}, {}
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") in ("cpu_op", "user_annotation"):
            operations[arguments.get("External id")] = event
        elif event.get("cat") in ("cuda_runtime", "cuda_driver"):
            launches[arguments.get("correlation")] = event
    layer_of = _layers_of_the_host(events)
    activities = []
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            start, duration = event["ts"] / 1e3, event["dur"] / 1e3
            # The operation that launched it, or else the launch itself.
            origin = operations.get(event["args"].get("External id", -1))
            origin = origin or launches.get(event["args"].get("correlation", -1))
            layer, backward = (None, False) if origin is None else layer_of(origin)
            activities.append(Activity(event["name"], int(event["tid"]), start, start + duration, layer, backward))
    return _from_first(activities)


def _layers_of_the_host(
    events: Sequence[Mapping[str, Any]],
) -> Callable[[Mapping[str, Any]], tuple[int | None, bool]]:
    """A function from an event of the host to its layer, and whether it is of the backward pass."""
    forward = _Ranges(
        (event, int(match[1]))
        for event in events
        if event.get("cat") == "user_annotation" and (match := LAYER.fullmatch(event["name"]))
    )
    layer_of_number: dict[int, int] = {}
    gradients = []
    operations = (event for event in events if event.get("cat") == "cpu_op" and "Sequence number" in event["args"])
    for event in sorted(operations, key=itemgetter("ts")):
        number = event["args"]["Sequence number"]
        if event["args"].get("Fwd thread id"):
            if number in layer_of_number:
                gradients.append((event, layer_of_number[number]))
        elif event["tid"] in forward.threads:
            # Several operations see a number before one takes it: the last of them.
            layer = forward.at(event)
            if layer is None:
                layer_of_number.pop(number, None)
            else:
                layer_of_number[number] = layer
    backward = _Ranges(gradients)

    def layer_of(event: Mapping[str, Any]) -> tuple[int | None, bool]:
        layer = backward.at(event)
        return (forward.at(event), False) if layer is None else (layer, True)

    return layer_of


class _Ranges:
    """Layers by thread and time. Of ranges within one another the outermost counts."""

    def __init__(self, labelled: Iterable[tuple[Mapping[str, Any], int]]) -> None:
        self.threads: dict[Any, list[tuple[float, float, int]]] = {}
        for event, layer in sorted(labelled, key=lambda item: item[0]["ts"]):
            ranges = self.threads.setdefault(event["tid"], [])
            if not ranges or event["ts"] >= ranges[-1][1]:
                ranges.append((event["ts"], event["ts"] + event["dur"], layer))

    def at(self, event: Mapping[str, Any]) -> int | None:
        """The layer in whose range an event of the host begins."""
        ranges = self.threads.get(event["tid"], [])
        place = bisect_right(ranges, event["ts"], key=itemgetter(0)) - 1
        return ranges[place][2] if place >= 0 and event["ts"] < ranges[place][1] else None


def with_layers(activities: Sequence[Activity], labelled: Sequence[Activity]) -> list[Activity]:
    """The activities with the layers of another profile of the same step, in which the kernels of each stream came in
    the same order.

    Recording what the host does slows it down, so that times and layers come from two profiles.
    """
    result = []
    by_stream = {
        stream: sorted((a for a in labelled if a.stream == stream), key=lambda a: a.start)
        for stream in {a.stream for a in labelled}
    }
    for stream in sorted({a.stream for a in activities}):
        own = sorted((a for a in activities if a.stream == stream), key=lambda a: a.start)
        theirs = by_stream.get(stream, [])
        names = [a.name for a in own], [a.name for a in theirs]
        if names[0] == names[1]:
            pairs = dict(enumerate(theirs))
        else:
            blocks = SequenceMatcher(None, *names, autojunk=False).get_matching_blocks()
            pairs = {i + n: theirs[j + n] for i, j, length in blocks for n in range(length)}
        for place, activity in enumerate(own):
            other = pairs.get(place)
            result.append(activity if other is None else replace(activity, layer=other.layer, backward=other.backward))
    return sorted(result, key=lambda a: a.start)


def _from_first(activities: Iterable[Activity]) -> list[Activity]:
    ordered = sorted(activities, key=lambda a: a.start)
    first = ordered[0].start if ordered else 0.0
    return [replace(a, start=a.start - first, end=a.end - first) for a in ordered]
