"""From the config to the engine that trains the model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from omegaconf import OmegaConf

from moetrain.config import Config, check_zero_dtype
from moetrain.errors import UserError
from moetrain.model import Block, Decoder, MoE
from moetrain.optim import build_optimizer
from moetrain.parallel import Mesh, Sharding
from moetrain.parallel.engines import Engine, FsdpEngine, OptimizerBuilder, ReplicatedEngine, Unit


def create_engine(config: Config, mesh: Mesh, model: Decoder) -> Engine:
    """The engine that `parallel.engine` names. Takes over the model, whose weights must be there; collective."""
    shardings = {name: model.sharding(name) for name, _ in model.named_parameters()}
    optimizer = partial(build_optimizer, config=config.optim)
    if config.parallel.engine == "deepspeed":
        return _deepspeed_engine(config, mesh, model, shardings, optimizer)
    if config.parallel.fsdp:
        units = fsdp_units(model, config.parallel.reshard_after_forward)
        return FsdpEngine(model, units, shardings, optimizer, config.optim.clip_norm)
    return ReplicatedEngine(model, dict(model.named_parameters()), shardings, optimizer, config.optim.clip_norm)


def fsdp_units(model: Decoder, reshard_after_forward: bool) -> list[Unit]:
    """Each layer's experts, router and rest; then embedding, last norm and head.

    Weights travel in the arithmetic's dtype where that is narrower than their own, as the layers would round them
    after the journey. But routers compute in float32, and the gradients of embedding and head are sums over all
    tokens with the same id and over the loss's chunks, which the gathered weights' dtype would round again and again.
    """
    own, compute = model.embedding.dtype, model.compute_dtype
    gather_dtype = compute if compute.itemsize < own.itemsize else None
    units = []
    for module in model.blocks:
        block = cast(Block, module)
        if block.is_moe:
            moe = cast(MoE, block.ffn)
            units.append(Unit(moe.experts, gather_dtype, reshard_after_forward))
            # FSDP2 sees by its output tensors when a module's backward pass begins, and a router returns none.
            units.append(Unit(moe.router, None, reshard_after_forward=False))
        units.append(Unit(block, gather_dtype, reshard_after_forward))
    # The loss takes the head after the model's forward pass.
    units.append(Unit(model, None, reshard_after_forward=False))
    return units


def _deepspeed_engine(
    config: Config, mesh: Mesh, model: Decoder, shardings: Mapping[str, Sharding], optimizer: OptimizerBuilder
) -> Engine:
    if mesh.device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when it is imported
    try:
        from moetrain.parallel.engines.deepspeed import DeepSpeedEngine
    except ModuleNotFoundError as error:
        raise UserError(f"parallel.engine = deepspeed: {error}; pip install deepspeed") from None

    return DeepSpeedEngine(
        model,
        [cast(Block, model.blocks[layer]).ffn for layer in model.moe_layers],
        shardings,
        optimizer,
        deepspeed_config(config, mesh.dp, model.compute_dtype),
        config.accumulation_steps(mesh.dp),
    )


def deepspeed_config(config: Config, dp: int, compute_dtype: torch.dtype) -> dict[str, Any]:
    """DeepSpeed's JSON config: what follows from ours, and what `parallel.deepspeed` adds."""
    check_zero_dtype(config, str(compute_dtype).removeprefix("torch."))
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.micro_batch(dp),
        "gradient_accumulation_steps": config.accumulation_steps(dp),
        "gradient_clipping": config.optim.clip_norm,
        "gradient_allreduce_op": "sum",
        "zero_optimization": {"stage": config.parallel.zero_stage},
        # Sums over ranks and micro-batches in float32, whatever the weights are rounded to.
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": compute_dtype == torch.bfloat16},
    }
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.merge(derived, config.parallel.deepspeed)))
