"""Safetensors written tensor by tensor; the library's own writer wants all tensors of a file in memory.

A file is the length of a header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each tensor) and
the tensors one after the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


@dataclass(frozen=True)
class Slot:
    """A tensor's place in a file."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_safetensors(path: Path, slots: Mapping[str, Slot], tensors: Iterator[Tensor]) -> None:
    """Write a new file, durable: `tensors` are asked for one at a time, in the order of their names in `slots`."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, slot in slots.items():
        header[name] = {
            "dtype": DTYPES[slot.dtype],
            "shape": list(slot.shape),
            "data_offsets": [end, end + slot.bytes],
        }
        end += slot.bytes
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little"))
        file.write(encoded)
        for slot, tensor in zip(slots.values(), tensors, strict=True):
            assert (tuple(tensor.shape), tensor.dtype) == (slot.shape, slot.dtype)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())


def assign(sizes: Sequence[int], ranks: int) -> list[int]:
    """Which rank writes which of the files of these sizes: the one with the fewest bytes so far."""
    held = [0] * ranks
    writers = []
    for size in sizes:
        writers.append(held.index(min(held)))
        held[writers[-1]] += size
    return writers
