"""The plain engine: every data-parallel rank keeps weights, gradients and optimiser state of all that it computes."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moetrain.parallel.engines.base import OptimizerBuilder, create_state
from moetrain.parallel.gradients import clip_gradients, gradient_norm, reduce_gradients
from moetrain.parallel.sharding import Sharding


class ReplicatedEngine:
    """Sums gradients over replicas after the last micro-batch, then AdamW.

    Parameters
    ----------
    model : what computes
    parameters : its weights by name, as the optimiser sees them
    shardings : how each lies on the ranks
    clip_norm : largest norm of the whole gradient; 0: no clipping
    """

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, nn.Parameter],
        shardings: Mapping[str, Sharding],
        build_optimizer: OptimizerBuilder,
        clip_norm: float,
    ) -> None:
        self.forward = model
        self.parameters = parameters
        self.shardings = shardings
        self.clip_norm = clip_norm
        self.optimizer: torch.optim.Optimizer = build_optimizer(parameters)
        create_state(self.optimizer)
        self._sharding_of = {parameter: shardings[name] for name, parameter in parameters.items()}
        self._device = next(iter(parameters.values())).device
        self._experts_move = any(sharding.slots is not None for sharding in shardings.values())
        self._tensors: dict[str, Tensor] = {}
        """They share memory with the weights and the optimiser's state, and making DTensors takes milliseconds."""

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        reduce_gradients(self._sharding_of)
        norm = float(gradient_norm(self._sharding_of, self._device))
        if math.isfinite(norm):
            if self.clip_norm > 0:
                clip_gradients(self._sharding_of, norm, self.clip_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def tensors(self) -> dict[str, Tensor]:
        if not self._tensors or self._experts_move:
            for name, parameter in self.parameters.items():
                self._tensors[f"model.{name}"] = self._logical(name, parameter)
                for key, state in self.optimizer.state[parameter].items():
                    self._tensors[f"optim.{key}.{name}"] = self._logical(name, state) if state.dim() else state
        return dict(self._tensors)

    def held(self, name: str) -> list[Tensor]:
        """What this rank holds of a parameter, to be changed in place: its weights, and what the optimiser keeps for
        each of them. Between two steps."""
        parameter = self.parameters[name]
        return [parameter.data, *(state for state in self.optimizer.state[parameter].values() if state.dim())]

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """They share memory with the weights and the optimiser's state: there is nothing left to do."""

    def _logical(self, name: str, local: Tensor) -> Tensor:
        return self.shardings[name].logical(local)
