"""What a checkpoint holds of a model and its optimiser: logical tensors by name, whatever the topology."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.model import Decoder
from moetrain.parallel import Mesh


def logical_tensors(model: Decoder, mesh: Mesh, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Parameters and buffers as ``model.<name>``, the optimiser's state as ``optim.<key>.<parameter>``.

    The tensors share memory with the model. What is split, and what the optimiser keeps for it, are parts of DTensors
    of the logical shape.
    """

    def logical(name: str, tensor: Tensor) -> Tensor:
        return model.sharding(name, mesh).logical(tensor)

    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors[f"model.{name}"] = logical(name, tensor)
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, tensor in optimizer.state[parameter].items():
                tensors[f"optim.{key}.{name}"] = logical(name, tensor) if tensor.dim() else tensor
    return tensors
