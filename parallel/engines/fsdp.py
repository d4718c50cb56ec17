"""Fully sharded data parallelism: weights, gradients and optimiser state lie in shards on the data-parallel ranks.

torch's FSDP2 (``fully_shard``; ZeRO stage 3, arXiv 1910.02054, for each parameter by itself) gathers the weights of a
unit before it computes and scatters its summed gradients afterwards. The optimiser sees plain tensors, this rank's
shards.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from moetrain.parallel.engines.base import OptimizerBuilder
from moetrain.parallel.engines.replicated import ReplicatedEngine
from moetrain.parallel.sharding import Sharding

# Said of every unit whose result is a view: writing into it would lose a hook. Nothing here writes into results.
warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")


@dataclass(frozen=True)
class Unit:
    """A module whose parameters, but for those of units before it, are gathered together. They lie on one mesh."""

    module: nn.Module
    gather_dtype: torch.dtype | None
    """What the weights are rounded to before they travel; None: nothing else than what they are."""
    reshard_after_forward: bool
    """Free the gathered weights after the forward pass, and gather them again in the backward pass."""


class FsdpEngine(ReplicatedEngine):
    """Shards the parameters of `model` over the second dimension of their mesh: dense ones over dp, experts over edp.

    The gradients of every micro-batch are reduced after it, so that no rank ever keeps those of the whole model.
    `units`: inner modules before those that contain them, the model itself last. Other arguments: see
    :class:`ReplicatedEngine`.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        shardings: Mapping[str, Sharding],
        build_optimizer: OptimizerBuilder,
        clip_norm: float,
    ) -> None:
        parameters = dict(model.named_parameters())
        shardings = {
            name: replace(sharding, fsdp_dim=_fsdp_dim(parameters[name], sharding))
            for name, sharding in shardings.items()
        }
        self._shapes = {name: shardings[name].logical_shape(p.shape) for name, p in parameters.items()}
        unsharded = {parameter: shardings[name] for name, parameter in parameters.items()}
        del parameters  # a unit's are freed as soon as it is sharded
        for unit in units:
            _shard(unit, unsharded)
        # The modules hold them only between the steps.
        self._sharded = dict(model.named_parameters())
        shards = {name: nn.Parameter(_local(sharded)) for name, sharded in self._sharded.items()}
        super().__init__(model, shards, shardings, build_optimizer, clip_norm)

    def step(self, lr: float) -> float:
        for name, sharded in self._sharded.items():
            self.parameters[name].grad = None if sharded.grad is None else _local(sharded.grad)
            sharded.grad = None
        return super().step(lr)

    def _logical(self, name: str, local: Tensor) -> Tensor:
        return self.shardings[name].logical(local, self._shapes[name])


def _fsdp_dim(parameter: Tensor, sharding: Sharding) -> int:
    """0, whose last parts may be smaller; for experts [E, …, …] that do not divide evenly 1, if that does.

    FSDP2 splits other dimensions than the first only into equal parts.
    """
    parts = sharding.mesh.size(1)
    uneven = parameter.shape[0] % parts != 0
    return 1 if uneven and parameter.dim() == 3 and parameter.shape[1] % parts == 0 else 0


def _shard(unit: Unit, unsharded: dict[nn.Parameter, Sharding]) -> None:
    """Shard what of the unit is `unsharded`, and remove it from there."""
    own = {parameter: unsharded.pop(parameter) for parameter in unit.module.parameters() if parameter in unsharded}
    placements = {parameter: Shard(cast(int, sharding.fsdp_dim)) for parameter, sharding in own.items()}
    parameter, sharding = next(iter(own.items()))
    assert sharding.mesh.mesh_dim_names is not None
    module = fully_shard(
        unit.module,
        mesh=sharding.mesh[sharding.mesh.mesh_dim_names[1]],
        reshard_after_forward=unit.reshard_after_forward,
        shard_placement_fn=placements.get,
        mp_policy=MixedPrecisionPolicy(
            param_dtype=unit.gather_dtype,
            reduce_dtype=parameter.dtype,
            # Tables and masks keep their dtype; the layers cast activations where they want it.
            cast_forward_inputs=False,
        ),
    )
    # A sum: by itself FSDP2 divides by the number of ranks.
    module.set_gradient_divide_factor(1.0)
    module.set_force_sum_reduction_for_comms(True)


@torch.no_grad()
def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, in the same memory."""
    assert isinstance(tensor, DTensor)
    return tensor.to_local()
