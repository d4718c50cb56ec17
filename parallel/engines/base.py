"""What a training loop needs of whoever owns gradients, optimiser and their sharding."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

OptimizerBuilder = Callable[[Mapping[str, nn.Parameter]], torch.optim.AdamW]
"""Makes AdamW for parameters by name, without state."""


class Engine(Protocol):
    """One model's way from the losses of a step's micro-batches to new weights.

    Gradients are summed over the ranks, never averaged: every rank's loss is its share of the global mean.
    """

    optimizer: torch.optim.Optimizer

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        """The model's forward pass in training."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a micro-batch; called as often as the step has micro-batches."""

    def step(self, lr: float) -> float:
        """Clip the step's gradients, update the weights with this learning rate, forget the gradients.

        Returns the 2-norm of the whole model's gradient before clipping, alike on all ranks; where it is NaN or Inf,
        nothing is updated. Waits for the device once, for this number.
        """

    def tensors(self) -> dict[str, Tensor]:
        """Weights as ``model.<name>``, optimiser state as ``optim.<key>.<name>``: logical tensors. Collective."""

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what a checkpoint has filled the tensors of :meth:`tensors` with. Collective."""


def create_state(optimizer: torch.optim.Optimizer) -> None:
    """Give AdamW the state that it would create at its first step, so that a checkpoint can fill it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                "exp_avg": torch.zeros_like(parameter, requires_grad=False),
                "exp_avg_sq": torch.zeros_like(parameter, requires_grad=False),
            }
