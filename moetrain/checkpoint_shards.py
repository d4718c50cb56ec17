"""The files of a checkpoint: safetensors, each with what one rank wrote of the logical tensors.

A tensor that is whole has its name. A part of one has its place behind the name, ``w[4:8,0:32]``, and the file's
metadata says under "parts" what it is a part of. Any reader of safetensors opens such a file, and nothing in it is run.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.tensor import DTensor

from moetrain.files import write_all
from moetrain.parallel.sharding import ScatteredTensor

T = TypeVar("T")

SUFFIX = ".safetensors"
FILE_BYTES = 2**30
"""Of tensors in a file, unless one part is larger: several are hashed at once, when they are written and when read."""
BLOCK_BYTES = 16 * 2**20
"""What is written and hashed at a time."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class FileEntry:
    """What a file of a checkpoint must be."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class TensorEntry:
    """What a checkpoint knows of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class LazyTensor(TensorEntry):
    """A tensor that is made when it is written, and forgotten then: so a model need not fit into memory."""

    make: Callable[[], Tensor]
    """Returns it, of this shape and dtype, on the CPU."""


@dataclass(frozen=True)
class Part:
    """What a file holds of a tensor: a box of it."""

    name: str
    whole: TensorEntry
    offset: tuple[int, ...]
    shape: tuple[int, ...]

    @classmethod
    def of_whole(cls, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Part:
        return cls(name, TensorEntry(shape, dtype), (0,) * len(shape), shape)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.whole.dtype.itemsize

    @property
    def key(self) -> str:
        """Its name in the file."""
        if self.shape == self.whole.shape:
            return self.name
        place = ",".join(f"{start}:{start + length}" for start, length in zip(self.offset, self.shape, strict=True))
        return f"{self.name}[{place}]"


def parts_of(tensors: Mapping[str, Tensor]) -> list[tuple[Part, Tensor]]:
    """What this rank holds of logical tensors: each part with its data, not copied.

    A DTensor is cut as its placements say, a ScatteredTensor into runs of rows; a plain tensor is whole.
    """
    found = []
    offsets: dict[Any, torch.Size] = {}  # the same in all layers, and slow to find
    for name, tensor in tensors.items():
        if isinstance(tensor, ScatteredTensor):
            pieces = tensor.chunks
        elif isinstance(tensor, DTensor):
            kind = tensor.shape, id(tensor.device_mesh), tensor.placements
            if kind not in offsets:
                offsets[kind] = tensor.__create_chunk_list__()[0].offsets
            pieces = {offsets[kind]: tensor.to_local()}
        else:
            pieces = {torch.Size([0] * tensor.dim()): tensor}
        whole = TensorEntry(tuple(tensor.shape), tensor.dtype)
        for offset, data in pieces.items():
            found.append((Part(name, whole, tuple(offset), tuple(data.shape)), data.detach()))
    return found


def files_of(parts: Iterable[tuple[Part, T]], rank: int) -> dict[str, list[tuple[Part, T]]]:
    """What this rank writes, each part with its data, by the file that it is written to; at least one file."""
    files: list[list[tuple[Part, T]]] = [[]]
    size = 0
    # Wide elements first, so that each tensor is aligned.
    for part, data in sorted(parts, key=lambda pair: (-pair[0].whole.dtype.itemsize, pair[0].key)):
        if files[-1] and size + part.bytes > FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append((part, data))
        size += part.bytes
    return {f"rank-{rank:05d}-{number:02d}{SUFFIX}": held for number, held in enumerate(files)}


def write_shard(file: Path, parts: Sequence[Part], blocks: Iterable[memoryview]) -> FileEntry:
    """Write a new file, durable; `blocks` are the bytes of the parts one after the other, cut anywhere."""
    digest, size = hashlib.sha256(), 0
    with ThreadPoolExecutor(1) as hasher, file.open("xb", buffering=0) as opened:
        for block in chain([memoryview(_header(parts))], blocks):
            hashing = hasher.submit(digest.update, block)
            try:
                write_all(opened, block)
            finally:
                hashing.result()  # then its memory may be used again
            size += len(block)
            del block  # and with it a tensor, before the next one is made
        os.fsync(opened.fileno())
    return FileEntry(size, digest.hexdigest())


def host_blocks(tensors: Iterable[Tensor]) -> Iterator[memoryview]:
    """The bytes of tensors in host memory for :func:`write_shard`; holds one of them at a time."""
    for tensor in tensors:
        content = as_bytes(tensor).numpy().data
        del tensor
        for start in range(0, len(content), BLOCK_BYTES):
            yield content[start : start + BLOCK_BYTES]
        del content


def as_bytes(tensor: Tensor) -> Tensor:
    """uint8 [bytes]: a tensor's elements in order; a view if it is contiguous."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _header(parts: Sequence[Part]) -> bytes:
    """What stands before the data in a safetensors file: its length, and JSON padded to 8 bytes."""
    content: dict[str, Any] = {"__metadata__": {"format": "pt", "parts": json.dumps(_account(parts))}}
    end = 0
    for part in parts:
        start, end = end, end + part.bytes
        dtype = _NAMES.get(part.whole.dtype)
        if dtype is None:
            raise ValueError(f"{part.name}: {part.whole.dtype} cannot be saved")
        content[part.key] = {"dtype": dtype, "shape": part.shape, "data_offsets": [start, end]}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _account(parts: Iterable[Part]) -> dict[str, Any]:
    """key → name, shape of the whole, offset; of what is not whole."""
    return {part.key: [part.name, part.whole.shape, part.offset] for part in parts if part.key != part.name}


def read_parts(file: Path) -> list[Part]:
    """What a file holds, by its header; raises SafetensorError, OSError, ValueError, KeyError or TypeError."""
    found = []
    with safe_open(file, framework="pt") as opened:
        account = json.loads((opened.metadata() or {}).get("parts", "{}"))
        for key in opened.keys():  # noqa: SIM118
            entry = opened.get_slice(key)
            shape = tuple(entry.get_shape())
            name, whole, offset = account.get(key, (key, shape, (0,) * len(shape)))
            found.append(Part(name, TensorEntry(tuple(whole), _DTYPES[entry.get_dtype()]), tuple(offset), shape))
    return found


class ShardReader(dcp.StorageReader):
    """Brings what files hold into the tensors of whatever topology; torch.distributed.checkpoint says what goes where.

    `shards`: each file and what it holds.
    """

    def __init__(self, shards: Mapping[Path, Iterable[Part]]) -> None:
        self._where: dict[tuple[str, tuple[int, ...]], tuple[Path, str]] = {}
        held: dict[str, list[Part]] = {}
        for file, parts in shards.items():
            for part in parts:
                self._where[part.name, part.offset] = file, part.key
                held.setdefault(part.name, []).append(part)
        self._metadata = Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(parts[0].whole.dtype),
                    torch.Size(parts[0].whole.shape),
                    [ChunkStorageMetadata(torch.Size(part.offset), torch.Size(part.shape)) for part in parts],
                )
                for name, parts in held.items()
            }
        )

    def read_metadata(self) -> Metadata:
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> torch.futures.Future[None]:
        items: dict[Path, list[tuple[str, ReadItem]]] = {}
        for item in plan.items:
            index = item.storage_index
            assert index.offset is not None, "there are only tensors"
            file, key = self._where[index.fqn, tuple(index.offset)]
            items.setdefault(file, []).append((key, item))
        for file, wanted in items.items():
            with safe_open(file, framework="pt") as opened:
                for key, item in wanted:
                    box = tuple(
                        slice(start, start + length)
                        for start, length in zip(item.storage_offsets, item.lengths, strict=True)
                    )
                    data = opened.get_slice(key)[box] if box else opened.get_tensor(key)
                    planner.resolve_tensor(item).detach().copy_(data)
        done: torch.futures.Future[None] = torch.futures.Future()
        done.set_result(None)
        return done

    # What else a reader must have.

    def reset(self, checkpoint_id: Any = None) -> None:
        """The files are known."""

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool) -> None:
        """There is nothing to set up."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: Any) -> bool:
        return True
