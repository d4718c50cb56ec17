"""A tensor that is made when a checkpoint is written, and forgotten then: so a model need not fit into memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from moetrain.checkpoint import TensorEntry


class LazyTensor(torch.Tensor):
    """What torch.distributed.checkpoint asks of a tensor, and nothing else: it has no operations."""

    make: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, entry: TensorEntry, make: Callable[[], Tensor]) -> LazyTensor:
        """`make` returns a tensor on the CPU with the shape and dtype of `entry`."""
        tensor = torch.Tensor._make_wrapper_subclass(cls, torch.Size(entry.shape), dtype=entry.dtype)
        tensor.make = make
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func}: a tensor that is not there yet has no operations")

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size([0] * self.dim()), self.shape)]

    def __create_write_items__(self, name: str, _: Any) -> list[WriteItem]:
        (chunk,) = self.__create_chunk_list__()
        properties = TensorProperties(dtype=self.dtype)
        data = TensorWriteData(chunk, properties, self.shape)
        return [WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        return self.make()
