"""From the config to the engine that trains the model."""

from __future__ import annotations

from functools import partial
from typing import cast

from moetrain.config import Config
from moetrain.model import Block, Decoder, MoE
from moetrain.optim import build_optimizer
from moetrain.parallel import Mesh
from moetrain.parallel.engines import Engine, FsdpEngine, ReplicatedEngine, Unit


def create_engine(config: Config, mesh: Mesh, model: Decoder) -> Engine:
    """The engine that `parallel.engine` names. Takes over the model, whose weights must be there; collective."""
    shardings = {name: Decoder.sharding(name, mesh) for name, _ in model.named_parameters()}
    optimizer = partial(build_optimizer, config=config.optim)
    if config.parallel.fsdp:
        units = fsdp_units(model, config.parallel.reshard_after_forward)
        return FsdpEngine(model, units, shardings, optimizer, config.optim.clip_norm)
    return ReplicatedEngine(dict(model.named_parameters()), shardings, optimizer, config.optim.clip_norm)


def fsdp_units(model: Decoder, reshard_after_forward: bool) -> list[Unit]:
    """Each layer's experts, router and rest; then embedding, last norm and head.

    Weights travel in the arithmetic's dtype where that is narrower than their own, as the layers would round them
    after the journey; but routers compute in float32.
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
    units.append(Unit(model, gather_dtype, reshard_after_forward=False))
    return units
