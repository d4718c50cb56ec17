"""DeepSpeed's ZeRO (arXiv 1910.02054), stage 1 or 2: every rank keeps all weights, and a part of the optimiser's state.

ZeRO flattens the parameters of a group into one vector and gives each rank an equal piece of it, with Adam's moments
and the float32 weights of that piece, wherever the parameters' borders are. Checkpoints are ours: pieces become shards
of logical tensors when they are saved, and pieces again when they are restored.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.utils import (
    groups,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moetrain.errors import UserError
from moetrain.parallel.engines.base import OptimizerBuilder, create_state
from moetrain.parallel.sharding import Sharding

MOMENTS = ("exp_avg", "exp_avg_sq")

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)


class DeepSpeedEngine:
    """Trains `model` as the DeepSpeed config says, which must ask for sums of gradients and ZeRO stage 1 or 2.

    Parameters
    ----------
    model : float32 weights; DeepSpeed rounds them where its config enables bf16, and keeps the float32 ones apart
    moe_layers : the modules of the model that have experts; their class becomes a subclass that DeepSpeed knows
    shardings : how each parameter lies on the ranks; experts are those on a mesh ("ep", "edp")
    accumulation : micro-batches of a step
    """

    def __init__(
        self,
        model: nn.Module,
        moe_layers: Iterable[nn.Module],
        shardings: Mapping[str, Sharding],
        build_optimizer: OptimizerBuilder,
        config: dict[str, Any],
        accumulation: int,
    ) -> None:
        self.parameters = dict(model.named_parameters())
        self.shardings = shardings
        self.accumulation = accumulation
        self._micro_batches = 0
        weights = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        optimizer = build_optimizer(self.parameters)
        for layer in moe_layers:
            _present_as_moe(layer, shardings, self.parameters)
        _separate_experts(optimizer)
        self._engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        if self._engine.gradient_average:
            raise UserError(f"deepspeed {deepspeed.__version__} does not sum gradients: install 0.19.8 or later")
        self.optimizer: torch.optim.Optimizer = self._engine.optimizer.optimizer
        create_state(self.optimizer)
        self._engine.optimizer._lazy_init_hp_params_optimizer_state()
        for name, weight in weights.items():  # not what is left of them after rounding
            self._set_weight(name, weight)

    def forward(self, *inputs: Any, **keywords: Any) -> Any:
        return self._engine(*inputs, **keywords)

    def backward(self, loss: Tensor) -> None:
        self._micro_batches += 1
        self._engine.set_gradient_accumulation_boundary(self._micro_batches == self.accumulation)
        self._engine.backward(loss, scale_wrt_gas=False)

    def step(self, lr: float) -> float:
        """DeepSpeed skips an update by itself where the norm is NaN or Inf, and says Inf."""
        self._micro_batches = 0
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self._engine.step()
        return float(self._engine.get_global_grad_norm())

    def tensors(self) -> dict[str, Tensor]:
        """Copies, cut into shards over the ranks that hold the same; one parameter at a time is whole on each rank."""
        state = next(iter(self.optimizer.state.values()))
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"model.{name}"] = self._shard(name, safe_get_full_fp32_param(parameter))
            for key in MOMENTS:
                tensors[f"optim.{key}.{name}"] = self._shard(name, safe_get_full_optimizer_state(parameter, key))
            tensors[f"optim.step.{name}"] = state["step"].clone()  # every update is of all parameters
        return tensors

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            self._set_weight(name, self._gather(name, tensors[f"model.{name}"]))
            for key in MOMENTS:
                moment = self._gather(name, tensors[f"optim.{key}.{name}"])
                safe_set_full_optimizer_state(parameter, moment, key)
        step = tensors[f"optim.step.{next(iter(self.parameters))}"]  # every update is of all parameters
        for state in self.optimizer.state.values():
            state["step"].copy_(step)

    @torch.no_grad()
    def _set_weight(self, name: str, weight: Tensor) -> None:
        safe_set_full_fp32_param(self.parameters[name], weight)
        self.parameters[name].copy_(weight)

    def _shard(self, name: str, held: Tensor) -> Tensor:
        """The logical tensor of which every rank of a replica group holds the part `held`."""
        sharding = replace(self.shardings[name], fsdp_dim=0)
        own = replace(sharding, dim=None).part(held).clone()
        return sharding.logical(own, sharding.logical_shape(held.shape))

    def _gather(self, name: str, logical: Tensor) -> Tensor:
        """The inverse of :meth:`_shard`."""
        sharding = replace(self.shardings[name], dim=None, fsdp_dim=0)
        held = torch.zeros(self.parameters[name].shape, dtype=logical.dtype, device=logical.device)
        sharding.part(held).copy_(cast(DTensor, logical).to_local())
        if sharding.shard_group is not None:
            dist.all_reduce(held, group=sharding.shard_group)
        return held


def _present_as_moe(
    layer: nn.Module, shardings: Mapping[str, Sharding], parameters: Mapping[str, nn.Parameter]
) -> None:
    """Make the layer an instance of DeepSpeed's MoE, by which it finds experts, and mark its experts' parameters."""
    own = set(layer.parameters())
    experts = [name for name, p in parameters.items() if p in own and _is_expert(shardings[name])]
    local, ep = parameters[experts[0]].shape[0], shardings[experts[0]].mesh.size(0)
    attributes = {
        "num_experts": local * ep,
        "num_local_experts": local,
        "ep_size": ep,
        "expert_group_name": f"ep_size_{ep}",
    }
    layer.__class__ = type(f"DeepSpeed{type(layer).__name__}", (type(layer), _MoE), attributes)
    for name in experts:
        vars(parameters[name]).update(allreduce=False, group_name=f"ep_size_{ep}")


def _is_expert(sharding: Sharding) -> bool:
    names = sharding.mesh.mesh_dim_names
    return names is not None and names[0] == "ep"


class _MoE(MoE):
    """What DeepSpeed asks of an MoE layer that computes by itself."""

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Experts on `ep_size` consecutive ranks, as ours."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)


def _separate_experts(optimizer: torch.optim.Optimizer) -> None:
    """ZeRO reduces the parameters of a group over the same ranks."""
    for group in list(optimizer.param_groups):
        experts = [p for p in group["params"] if hasattr(p, "group_name")]
        if experts:
            group["params"] = [p for p in group["params"] if not hasattr(p, "group_name")]
            optimizer.add_param_group({**group, "params": experts, "moe": True, "name": experts[0].group_name})
