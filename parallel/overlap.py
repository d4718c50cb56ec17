"""One half of a micro-batch communicates while the other computes (TokenWeave, arXiv 2505.11329, here for training).

A layer is written once, as a generator whose phases communicate and compute in turn (:data:`Phases`). :func:`complete`
runs it as it stands. :func:`weave` advances two, for the halves of a micro-batch: phases that communicate run on a
stream of their own, beside what computes.

The backward pass needs no schedule. Autograd runs nodes in the reverse of the order in which they were made, each on
the stream of its forward pass: what ran side by side does so again.
"""

from __future__ import annotations

import functools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

Result = TypeVar("Result")
Phases = Generator[object, None, Result]
"""Phases that communicate (the first, the third, …, the last) and phases that compute. Each ends with a yield of what
the next one takes from it, tensors in tuples and dataclasses; the last returns the result."""


def complete(phases: Phases[Result]) -> Result:
    """Run all phases, one after the other, on the current stream."""
    while True:
        try:
            next(phases)
        except StopIteration as end:
            return end.value


def weave(halves: Sequence[Phases[Result]], given: object, device: torch.device) -> list[Result]:
    """Run the halves, of as many phases each, in turn; their results.

    A half waits for no more than what it needs: its communication for its own computation, and its computation for
    the communication issued so far, of which its own is the last. So one half's computation hides the next
    communication of the other. The host issues a communication after the other half's computation: where it waits for
    the device, as a dispatch does, the device is busy. On a CPU everything runs in the same order, but not at once.

    `given`: what the first phases take.
    """
    streams = torch.get_device_module(device)
    computing, communicating = streams.current_stream(), _communication_stream(device)
    computed = [computing.record_event() for _ in halves]
    _hand_over(given, communicating)
    results: list[Result] = []
    while not results:
        for place, half in enumerate(halves):
            communicating.wait_event(computed[place])
            try:
                with streams.stream(communicating):
                    _hand_over(next(half), computing)
            except StopIteration as end:
                results.append(end.value)
                continue
            computing.wait_stream(communicating)
            _hand_over(next(half), communicating)
            computed[place] = computing.record_event()
    computing.wait_stream(communicating)
    _hand_over(results, computing)
    return results


@functools.cache
def _communication_stream(device: torch.device) -> Any:
    return torch.get_device_module(device).Stream(priority=-1)


def _hand_over(value: object, stream: Any) -> None:
    """Tell the allocator that tensors made on one stream are used on another, so that their memory outlives that."""
    for tensor in _tensors(value):
        if tensor.is_cuda:
            tensor.record_stream(stream)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name))
