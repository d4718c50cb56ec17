"""What a run will take: parameters, memory of a rank and arithmetic of a step, from the config alone.

Widths: D model, E experts, K experts a token, I expert, F dense feed-forward, S shared expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import comb

import numpy as np
from rich.console import Console
from rich.table import Table

from moetrain.config import Config, check_world
from moetrain.errors import UserError
from moetrain.expert_placement import configured_placement
from moetrain.flops import ParameterCount, TrainingFlops, flops_per_token, parameters
from moetrain.parallel.wire import homeward, row_bytes

_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2}


@dataclass(frozen=True)
class Plan:
    """A run on `world_size` ranks. Bytes are of one rank; all ranks are alike."""

    world_size: int
    parameters: ParameterCount
    rank_parameters: int
    """1 / tp of the dense parameters that are split, all the others, and 1 / ep of the experts."""
    weight_bytes: int
    gradient_bytes: int
    moment_bytes: int
    """Adam's two moments."""
    copy_bytes: int
    """What else there is of weights: see :func:`_state_bytes`."""
    activation_bytes: int
    """An estimate: see :func:`activation_bytes`."""
    flops_per_token: TrainingFlops
    tokens_per_step: int
    accumulation_steps: int
    dispatch_bytes: float
    """That all ranks together send to one another in a step: see :func:`dispatch_bytes`."""
    head_ranks: tuple[tuple[range, range], ...]
    """(attention heads, ranks that hold them), and with them a part of every dense layer and of the vocabulary."""
    expert_ranks: tuple[tuple[Sequence[int], range], ...]
    """(experts, ranks that hold them), in logical experts of every MoE layer, with `placement.file` of the first one;
    empty for a dense model."""

    @property
    def flops_per_step(self) -> int:
        """Of all ranks together."""
        return self.flops_per_token.total * self.tokens_per_step

    @property
    def rank_bytes(self) -> int:
        return self.weight_bytes + self.gradient_bytes + self.moment_bytes + self.copy_bytes + self.activation_bytes


def make_plan(config: Config, world_size: int) -> Plan:
    """Plan a run; raises ConfigError if the config does not fit `world_size`, and PlacementError if the placement does
    not fit the config. Uses no GPU and makes no tensor."""
    check_world(config, world_size)
    count = parameters(config)
    tp = config.parallel.tp
    dp = world_size // tp
    weight_bytes, gradient_bytes, moment_bytes, copy_bytes = _state_bytes(config, count, world_size)
    return Plan(
        world_size=world_size,
        parameters=count,
        rank_parameters=sum(_held(config, count)),
        weight_bytes=weight_bytes,
        gradient_bytes=gradient_bytes,
        moment_bytes=moment_bytes,
        copy_bytes=copy_bytes,
        activation_bytes=activation_bytes(config, dp),
        flops_per_token=flops_per_token(config),
        tokens_per_step=config.train.tokens_per_step,
        accumulation_steps=config.accumulation_steps(dp),
        dispatch_bytes=dispatch_bytes(config),
        head_ranks=_owners(config.model.n_heads, tp, world_size),
        expert_ranks=_expert_ranks(config, world_size),
    )


def check_memory(config: Config, world_size: int, available: int) -> None:
    """Raise UserError if the weights, gradients and moments of a rank alone are more than `available` bytes."""
    needed = sum(_state_bytes(config, parameters(config), world_size)[:3])
    if needed > available:
        raise UserError(
            f"a rank's weights, gradients and Adam moments take {_bytes(needed)}, and its device has "
            f"{_bytes(available)}: use more ranks with parallel.ep, parallel.tp or parallel.fsdp, or a smaller model; "
            f"`moetrain plan` tells what a rank needs"
        )


def _expert_ranks(config: Config, world_size: int) -> tuple[tuple[Sequence[int], range], ...]:
    experts, ep = config.model.num_experts, config.parallel.ep
    placement = configured_placement(config)
    if placement is None:
        return _owners(experts, ep, world_size) if experts else ()
    held_by = [np.flatnonzero(placement.gpu_LE[0] == place).tolist() for place in range(ep)]
    return tuple((held, range(place, world_size, ep)) for place, held in enumerate(held_by))


def _owners(number: int, parts: int, world_size: int) -> tuple[tuple[range, range], ...]:
    """(what, ranks that hold it) of a `number` of things split over so many consecutive ranks, and again and again."""
    owned = number // parts
    return tuple((range(place * owned, (place + 1) * owned), range(place, world_size, parts)) for place in range(parts))


def _held(config: Config, count: ParameterCount) -> tuple[int, int]:
    """Dense parameters with which a rank computes, and those of its experts."""
    return count.dense - count.split + count.split // config.parallel.tp, count.experts // config.parallel.ep


def _state_bytes(config: Config, count: ParameterCount, world_size: int) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients and moments that a rank keeps, and of copies of weights, by engine.

    Shards of dense parameters are 1 / dp, of a rank's experts 1 / edp.

    - torch: all that the rank computes with; the copies are the weights in the arithmetic's dtype, where that is
      narrower, from forward to backward;
    - FSDP: shards; the copies are gathered: embedding, norm and head, and in the arithmetic's dtype all layers, or
      with `reshard_after_forward` two (one computes, the next arrives), routers counted like the rest of their layers;
    - DeepSpeed: all weights in the arithmetic's dtype, and shards of Adam's moments; gradients are shards in stage 2;
      the copies are shards of float32 weights.
    """
    model, parallel = config.model, config.parallel
    dense, experts = _held(config, count)
    held = dense + experts
    shard = -(-dense * parallel.tp // world_size) + -(-count.experts // world_size)
    size = _BYTES[config.train.param_dtype]
    narrow = min(size, _BYTES[compute_dtype(config)])
    if parallel.engine == "deepspeed":
        return held * narrow, (held if parallel.zero_stage == 1 else shard) * size, 2 * shard * size, shard * size
    if parallel.fsdp:
        root = (count.embedding + count.head) // parallel.tp + model.dim
        layers = min(2, model.n_layers) if parallel.reshard_after_forward else model.n_layers
        gathered = root * size + layers * (held - root) // model.n_layers * narrow
        return shard * size, shard * size, 2 * shard * size, gathered
    return held * size, held * size, 2 * held * size, held * narrow if narrow < size else 0


def compute_dtype(config: Config) -> str:
    """``train.dtype``; where that is auto, what it will be: bfloat16 unless ``run.device`` is cpu."""
    if config.train.dtype != "auto":
        return config.train.dtype
    if config.run.device != "cpu":
        return "bfloat16"
    return "float64" if config.train.param_dtype == "float64" else "float32"


def activation_bytes(config: Config, dp: int = 1) -> int:
    """Estimated peak of what autograd keeps on a rank for one micro-batch of one of `dp` shares, in bytes, with
    balanced experts.

    A token keeps, in the arithmetic's dtype unless said otherwise, and in all on the tp ranks of its share:

    - attention: the layer's input and its normalised copy, queries, keys, values and the output of every head; with
      QK-norm also the queries and keys before it;
    - feed-forward: its input and its normalised copy; 4F (gate, up, activated gate, product) of a dense network;
    - in its place in an MoE layer: 2I (gate and up) and 12 bytes (weight and positions) for each of its K experts; 3E
      of the router in float32; 4S of a shared expert and D if it is gated;
    - head: its input and its normalised copy; the logits, and in float32 their copy and log-probabilities, of at most
      8192 tokens at a time.

    Each of the tp ranks keeps 1 / tp of this, but all of the normalised copies that are gathered, those for attention,
    dense networks and head, and no log-probabilities.

    Activation checkpointing replaces a layer by its input (full), or attention by its input and the experts by
    theirs (selective), which is the normalised copy, or with ep > 1 the rows that arrived, at most min(K, ep) a token.
    The peak is at the loss, with the head's tensors, or later at the recomputation of the largest part.

    Not counted: the row in float32 that router.jitter keeps, gradients of activations, buffers of collectives,
    workspaces, fragmentation.
    """
    model, checkpointing = config.model, config.train.activation_checkpointing
    tp, ep = config.parallel.tp, config.parallel.ep
    size = _BYTES[compute_dtype(config)]
    D, K, heads = model.dim, config.router.top_k, (model.n_heads + model.kv_heads) * model.head_width
    gathered_tokens = config.micro_batch(dp) * config.data.seq_len
    tokens = gathered_tokens // tp

    row, gathered = D * size * tokens, D * size * gathered_tokens
    attention = row + gathered + (2 if model.qk_norm == "none" else 3) * heads * size * tokens
    experts = K * (2 * model.expert_dim * size + 12) * tokens
    arriving = min(K, ep) * row if ep > 1 else 0
    shared = (4 * model.shared_dim + (D if model.shared_gate else 0)) * size * tokens
    router = 4 * 3 * model.num_experts * tokens
    kept, recomputed = 0, 0
    for layer in range(model.n_layers):
        if model.is_moe_layer(layer):
            replaceable, others = experts, 2 * row + router + shared
        else:
            replaceable, others = 0, row + gathered + 4 * model.ffn_dim * size * tokens
        mode = checkpointing.mode if layer % checkpointing.every == 0 else "none"
        if mode == "full":
            kept += row
            recomputed = max(recomputed, attention + replaceable + others)
        elif mode == "selective":
            kept += row + others + (arriving if replaceable else 0)
            recomputed = max(recomputed, attention, replaceable)
        else:
            kept += attention + replaceable + others
    in_float32 = 8 if tp == 1 else 4
    logits = model.vocab_size // tp * (in_float32 + (size if size < 4 else 0)) * min(gathered_tokens, 8192)
    return kept + max(recomputed, row + gathered + logits)


def dispatch_bytes(config: Config) -> float:
    """Expected bytes that all ranks' MoE layers send to other ranks in a step, where every token's K experts are any K.

    A row goes to each rank that holds one of them, with two int32 and the weight of each pair, and a sum comes back;
    the gradients of sums, rows and weights take the same ways. A layer that is recomputed dispatches once more, and
    combines once more if a shared expert follows.
    """
    model, ep, wire = config.model, config.parallel.ep, config.parallel.wire
    if ep == 1:
        return 0.0
    experts, top_k, size = model.num_experts, config.router.top_k, _BYTES[compute_dtype(config)]
    missed = comb(experts - experts // ep, top_k) / comb(experts, top_k)
    rows, pairs = (ep - 1) * (1 - missed), top_k * (ep - 1) / ep
    out = rows * row_bytes(wire, model.dim, size)
    home = rows * row_bytes(homeward(wire), model.dim, size)
    weight = max(4, size)
    checkpointing = config.train.activation_checkpointing
    token = 0.0
    for layer in filter(model.is_moe_layer, range(model.n_layers)):
        token += 2 * (out + home) + pairs * (8 + 2 * weight)
        if checkpointing.mode == "full" and layer % checkpointing.every == 0:
            token += out + pairs * (8 + weight) + (home if model.shared_dim else 0)
    return token * config.train.tokens_per_step


def plan_command(config: Config, world_size: int) -> int:
    """Print the plan; returns exit code 0. Raises ConfigError if the config does not fit `world_size`."""
    plan = make_plan(config, world_size)
    count, train, parallel = plan.parameters, config.train, config.parallel
    moe_layers = sum(config.model.is_moe_layer(layer) for layer in range(config.model.n_layers))
    checkpointing = train.activation_checkpointing

    zero = parallel.engine == "deepspeed"
    engine = f", DeepSpeed ZeRO-{parallel.zero_stage}" if zero else ", FSDP" if parallel.fsdp else ""
    table = Table(
        title=f"{config.run.dir}: {_plural(world_size, 'rank')}, tp = {parallel.tp}, ep = {parallel.ep}{engine}",
        title_justify="left",
        show_header=False,
    )
    table.add_column()
    table.add_column(justify="right")
    table.add_column(style="dim")

    table.add_row("Parameters", _count(count.total), f"{count.total:,}")
    table.add_row("  of a token (active)", _count(count.active), f"{100 * count.active / count.total:.1f}% of all")
    if moe_layers:
        table.add_row(
            "  of the experts",
            _count(count.experts),
            f"{_plural(moe_layers, 'layer')} of {config.model.num_experts}, {config.router.top_k} a token",
        )
    parts = [f"1/{parallel.tp} of tp's part"] if parallel.tp > 1 else []
    parts += [f"1/{parallel.ep} of the experts"] if parallel.ep > 1 else []
    table.add_row("  of a rank", _count(plan.rank_parameters), ", ".join(parts) or "everything")
    table.add_section()

    sequences = _plural(config.micro_batch(world_size // parallel.tp), "sequence")
    activations = f"{sequences} of {config.data.seq_len:,}, {compute_dtype(config)}"
    if checkpointing.mode != "none":
        activations += f", {checkpointing.mode} checkpointing"
    table.add_row("Memory of a rank", _bytes(plan.rank_bytes), "without workspaces and fragmentation")
    table.add_row("  weights", _bytes(plan.weight_bytes), compute_dtype(config) if zero else train.param_dtype)
    table.add_row("  gradients", _bytes(plan.gradient_bytes), train.param_dtype)
    table.add_row("  Adam's moments", _bytes(plan.moment_bytes), train.param_dtype)
    if plan.copy_bytes:
        name = "shards of float32 weights" if zero else "gathered weights" if parallel.fsdp else "copies of the weights"
        table.add_row(f"  {name}", _bytes(plan.copy_bytes), train.param_dtype if zero else compute_dtype(config))
    table.add_row("  activations, about", _bytes(plan.activation_bytes), activations)
    table.add_section()

    flops = plan.flops_per_token
    table.add_row("FLOPs of a token", _count(flops.total), f"{100 * flops.attention / flops.total:.1f}% in attention")
    table.add_row("FLOPs of a step", _count(plan.flops_per_step), f"{_count(plan.flops_per_step / world_size)} a rank")
    table.add_row("Tokens of a step", f"{plan.tokens_per_step:,}", f"{plan.tokens_per_step * train.steps:,} in all")
    table.add_row("Accumulation", f"{plan.accumulation_steps:,}", "micro-batches of a rank in a step")
    if plan.dispatch_bytes:
        table.add_row("Dispatch", _bytes(plan.dispatch_bytes / world_size), "sent by a rank in a step")
    if parallel.tp > 1:
        _add_owners(table, "head", plan.head_ranks)
    if plan.expert_ranks:
        _add_owners(table, "expert", plan.expert_ranks)
        if config.placement.file is not None:
            table.add_row("  in the first MoE layer", "", f"in the others as {config.placement.file} says")
    Console().print(table)
    return 0


def _add_owners(table: Table, noun: str, owners: Sequence[tuple[Sequence[int], range]]) -> None:
    """Which rank holds which."""
    table.add_section()
    shown = owners if len(owners) <= 8 else owners[:7]
    for things, ranks in shown:
        plural = "" if len(things) == 1 else "s"
        table.add_row(f"{noun.capitalize()}{plural} {_numbers(things)}", "", f"on {_ranks(ranks)}")
    if len(shown) < len(owners):
        table.add_row("  …", "", f"and so on: {_plural(len(owners[0][0]), noun)} a rank")


def _count(value: float) -> str:
    """Four significant digits and a decimal unit: 6.919 G."""
    return _scaled(value, 1000, ("", " k", " M", " G", " T", " P", " E", " Z"))


def _bytes(value: float) -> str:
    """Four significant digits and a binary unit: 7.776 GiB."""
    return _scaled(value, 1024, (" B", " KiB", " MiB", " GiB", " TiB", " PiB"))


def _scaled(value: float, base: int, units: tuple[str, ...]) -> str:
    power = 0
    while value >= 1000 and power < len(units) - 1:
        value /= base
        power += 1
    return f"{value:.4g}{units[power]}"


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _numbers(numbers: Sequence[int]) -> str:
    """Ascending numbers, runs of them as from–to: 0–3, 7."""
    parts = []
    for _, run in groupby(enumerate(numbers), key=lambda placed: placed[1] - placed[0]):
        (_, first), *more = run
        parts.append(f"{first}–{more[-1][1]}" if more else str(first))
    return ", ".join(parts)


def _ranks(ranks: range) -> str:
    names = [str(rank) for rank in ranks]
    if len(names) > 6:
        names[3:-1] = ["…"]
    return f"{'rank' if len(names) == 1 else 'ranks'} {', '.join(names)}"
