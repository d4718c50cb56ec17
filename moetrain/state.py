"""What a checkpoint holds of a model and its optimiser: logical tensors by name, whatever the topology."""

from __future__ import annotations

import torch
from torch import Tensor

from moetrain.checkpoint import expert_dtensor
from moetrain.model import Decoder
from moetrain.parallel import Mesh


def logical_tensors(model: Decoder, mesh: Mesh, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Tensor]:
    """Parameters and buffers as ``model.<name>``, the optimiser's state as ``optim.<key>.<parameter>``.

    The tensors share memory with the model. Experts, and what the optimiser keeps for them, are parts of DTensors of
    the logical shape [E, …].
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        tensors[f"model.{name}"] = _logical(name, tensor, mesh)
    if optimizer is not None:
        for name, parameter in model.named_parameters():
            for key, tensor in optimizer.state[parameter].items():
                tensors[f"optim.{key}.{name}"] = _logical(name, tensor, mesh) if tensor.dim() else tensor
    return tensors


def _logical(name: str, tensor: Tensor, mesh: Mesh) -> Tensor:
    return expert_dtensor(tensor, mesh) if Decoder.is_expert_parameter(name) else tensor.detach()
