"""``moetrain tune overlap``: measures what the cost model of moetrain/overlap_cost.py needs to know of a machine.

Runs under torchrun, on the ranks that will train; takes a minute or two, most of it torch.compile. The constants are
rank 0's and do not depend on a model: matrix products, attention, experts and copies of one size, collectives for every
number of ranks that divides the world, alone and beside a product, and how long the host issues a layer of each kind.

Shapes: T tokens or rows, D width, B sequences, H heads, S positions.
"""

from __future__ import annotations

import functools
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from moetrain.benchmarks.report import say, table
from moetrain.benchmarks.timing import synchronize, time_interleaved
from moetrain.config import Config, from_dict
from moetrain.errors import ConfigError
from moetrain.kernels import Routing, expert_mlp
from moetrain.model import Decoder
from moetrain.overlap import machine_name, write_machine
from moetrain.overlap_cost import Collective, HostTime, Machine, collective_name, layer_name
from moetrain.parallel import (
    Mesh,
    add_rmsnorm_all_gather,
    arranged,
    environment_world_size,
    fused_allreduce_rmsnorm,
    reduce_scatter_add_rmsnorm,
)
from moetrain.ranks import joined_mesh

EPS = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Of what is timed."""

    side: int = 8192
    """Of a square matrix product, and of what is copied."""
    sequences: tuple[int, int, int, int] = (2, 16, 4096, 128)
    """B, H, S and the width of a head."""
    experts: tuple[int, int, int, int, int] = (16384, 2048, 512, 64, 8)
    """T, D, inner width, number and top-k."""
    width: int = 2048
    small_rows: int = 64
    """Of a collective that is all latency …"""
    large_rows: int = 16384
    """… and of one that is all bandwidth."""
    calls: int = 10
    layer: tuple[int, int] = (256, 128)
    """D and S of a layer whose work is the host's …"""
    layers: tuple[int, int] = (1, 5)
    """… which is the difference between two depths."""
    steps: int = 5
    """At a time, …"""
    rounds: int = 4
    """… and how often, after as many that are not timed."""


Call = Callable[[], object]


def tune_overlap_command() -> int:
    """Measure and store; returns 0. Raises ConfigError where there are no GPUs or no ranks that communicate."""
    if environment_world_size() < 2:
        raise ConfigError(
            "tune overlap: measures the ranks that will train; start it with torchrun --nproc-per-node N -m moetrain "
            "tune overlap"
        )
    with joined_mesh(from_dict({})) as mesh, redirect_stdout(sys.stdout if mesh.rank == 0 else io.StringIO()):
        if mesh.device.type != "cuda":
            raise ConfigError("tune overlap: there is no GPU here; on a CPU nothing is hidden, and auto is off")
        machine = measure(mesh, Sizes(), compiled=(False, True))
        name = machine_name(mesh)
        show(name, machine)
        if mesh.rank == 0:
            say(f"written to {write_machine(name, machine)}")
    return 0


def measure(mesh: Mesh, sizes: Sizes, compiled: tuple[bool, ...]) -> Machine:
    """The constants of this machine; collective."""
    device = mesh.device
    say("products, attention, experts, copies")
    seconds = _seconds(_computations(sizes, device), device, sizes.calls)
    product_rate = 2 * sizes.side**3 / seconds["product"]
    B, H, S, width = sizes.sequences
    T, D, inner, _, top_k = sizes.experts
    attention = 2 * B * H * S * S * width
    machine = Machine(
        multiprocessors=torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1,
        kernel_seconds=seconds["small product"],
        product_rate=product_rate,
        experts_rate=18 * T * top_k * D * inner / seconds["experts"],
        attention_rate=attention / seconds["attention"],
        attention_backward_rate=2.5 * attention / seconds["attention backward"],
        bandwidth=2 * torch.bfloat16.itemsize * sizes.side**2 / seconds["copy"],
        collectives={},
        hosts={},
    )
    arrange = functools.cache(partial(arranged, mesh))  # groups are made slowly
    collectives: dict[str, Collective] = {}
    for ranks in range(2, mesh.world_size + 1):
        if mesh.world_size % ranks == 0:
            say(f"collectives of {ranks} ranks")
            collectives |= _measure_collectives(arrange(tp=ranks, ep=1).tp_group, sizes, device, product_rate)
    hosts = dict(_measure_hosts(arrange, mesh.world_size, sizes, compiled))
    return replace(machine, collectives=collectives, hosts=hosts)


def show(name: str, machine: Machine) -> None:
    """The constants, as tables."""
    say(f"\n{name}")
    rates = {
        "matrix product, TFLOP/s": machine.product_rate / 1e12,
        "experts, TFLOP/s": machine.experts_rate / 1e12,
        "attention forward, TFLOP/s": machine.attention_rate / 1e12,
        "attention backward, TFLOP/s": machine.attention_backward_rate / 1e12,
        "copy, TB/s": machine.bandwidth / 1e12,
        "smallest product, µs": machine.kernel_seconds * 1e6,
    }
    table(("", "measured"), list(rates.items()))
    say()
    table(
        ("collective", "latency µs", "GB/s", "saved beside a product"),
        [(name, c.latency * 1e6, c.bandwidth / 1e9, f"{c.gain:.0%}") for name, c in machine.collectives.items()],
    )
    say()
    table(
        ("host, a layer", "whole ms", "halves ms"),
        [(name, host.whole * 1e3, host.halves * 1e3) for name, host in machine.hosts.items()],
    )


def _seconds(calls: Mapping[str, Call], device: torch.device, count: int) -> dict[str, float]:
    timings = time_interleaved(calls, device, rounds=2, calls_a_round=count)
    return {name: timing.median / 1e3 for name, timing in timings.items()}


def _computations(sizes: Sizes, device: torch.device) -> dict[str, Call]:
    random = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, grad: bool = False) -> Tensor:
        return torch.randn(*shape, generator=random, device=device).to(torch.bfloat16).requires_grad_(grad)

    a, b = normal(sizes.side, sizes.side), normal(sizes.side, sizes.side)
    c = torch.empty_like(a)
    small = a[:128, :64].contiguous(), b[:64, :256].contiguous()

    B, H, S, width = sizes.sequences
    q, k, v = (normal(B, H, S, width, grad=True) for _ in range(3))
    attend = partial(F.scaled_dot_product_attention, q, k, v, is_causal=True)
    y = attend()
    dy = torch.ones_like(y)

    T, D, inner, experts, top_k = sizes.experts
    x_TD = normal(T, D, grad=True)
    weights = normal(experts, 2 * inner, D, grad=True), normal(experts, D, inner, grad=True)
    ids_TK = torch.rand(T, experts, generator=random, device=device).topk(top_k).indices
    routing = Routing.from_topk(ids_TK, torch.full((T, top_k), 1 / top_k, device=device), experts)

    def compute_experts() -> None:
        torch.autograd.grad(expert_mlp(x_TD, *weights, routing).sum(), (x_TD, *weights))

    return {
        "product": lambda: torch.mm(a, b, out=c),
        "small product": lambda: torch.mm(*small),
        "copy": lambda: c.copy_(a),
        "attention": attend,
        "attention backward": lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True),
        "experts": compute_experts,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Collectives


def _measure_collectives(
    group: dist.ProcessGroup, sizes: Sizes, device: torch.device, product_rate: float
) -> dict[str, Collective]:
    """As layers make them, with the norms beside them; small ones, large ones, and large ones beside a product."""
    ranks = group.size()
    communicating = torch.get_device_module(device).Stream(priority=-1)
    found = {}
    size = torch.bfloat16.itemsize * sizes.width
    for kind in ("all_gather", "reduce_scatter", "all_reduce", "all_to_all"):
        small, large = (_collective(kind, rows, sizes.width, group, device) for rows in _rows(sizes, ranks))
        alone = _seconds({"small": small, "large": large}, device, sizes.calls)
        latency = alone["small"]
        bandwidth = size * _rows(sizes, ranks)[1] / max(alone["large"] - latency, 1e-9)
        # As long as the collective: the two then have most to win, and to take from each other.
        rows = max(128, round(alone["large"] * product_rate / (2 * sizes.width**2) / 128) * 128)
        product = _product(rows, sizes.width, device)
        calls: dict[str, Call] = {
            "product": product,
            "collective": large,
            "both": partial(_side_by_side, product, large, communicating, device),
        }
        beside = _seconds(calls, device, sizes.calls)
        saved = beside["product"] + beside["collective"] - beside["both"]
        gain = min(1.0, max(0.0, saved / min(beside["product"], beside["collective"])))
        found[collective_name(kind, ranks)] = Collective(latency, bandwidth, gain)
    return found


def _rows(sizes: Sizes, ranks: int) -> tuple[int, int]:
    """Of the small and of the large tensor; they divide among the ranks."""
    small, large = (-(-rows // ranks) * ranks for rows in (sizes.small_rows, sizes.large_rows))
    return small, large


def _collective(kind: str, rows: int, width: int, group: dist.ProcessGroup, device: torch.device) -> Call:
    x_TD = torch.ones(rows, width, dtype=torch.bfloat16, device=device)
    own_RD = x_TD[: rows // group.size()]
    weight_D = torch.ones(width, dtype=torch.bfloat16, device=device)
    received_TD = torch.empty_like(x_TD)
    return {
        "all_gather": partial(add_rmsnorm_all_gather, own_RD, own_RD, weight_D, EPS, group),
        "reduce_scatter": partial(reduce_scatter_add_rmsnorm, x_TD, own_RD, weight_D, EPS, group),
        "all_reduce": partial(fused_allreduce_rmsnorm, x_TD, own_RD, weight_D, EPS, group),
        "all_to_all": partial(dist.all_to_all_single, received_TD, x_TD, group=group),
    }[kind]


def _product(rows: int, width: int, device: torch.device) -> Call:
    a, b = (torch.ones(n, width, dtype=torch.bfloat16, device=device) for n in (rows, width))
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _side_by_side(product: Call, collective: Call, communicating: Any, device: torch.device) -> None:
    """As parallel/overlap.py runs them."""
    streams = torch.get_device_module(device)
    computing = streams.current_stream()
    communicating.wait_stream(computing)
    with streams.stream(communicating):
        collective()
    product()
    computing.wait_stream(communicating)


# ---------------------------------------------------------------------------------------------------------------------
# The host


def _measure_hosts(
    arrange: Callable[..., Mesh], world: int, sizes: Sizes, compiled: tuple[bool, ...]
) -> Iterator[tuple[str, HostTime]]:
    """Of every kind of layer: that of as few tokens that the device waits for the host."""
    kinds = ((True, False, True), (False, True, True), (True, True, True), (True, False, False), (False, True, False))
    for compile_layers in compiled:
        for tp, ep, moe in kinds:
            name = layer_name(tp, ep, moe, compile_layers)
            say(f"host: {name}")
            mesh = arrange(tp=world if tp else 1, ep=world if ep else 1)
            whole, halves = (_layer_seconds(mesh, moe, overlap, sizes, compile_layers) for overlap in ("off", "on"))
            yield name, HostTime(whole, max(whole, halves))  # less is noise


def _layer_seconds(mesh: Mesh, moe: bool, overlap: str, sizes: Sizes, compile_layers: bool) -> float:
    shallow, deep = (
        _step_seconds(_few_tokens(mesh, moe, layers, overlap, sizes), mesh, sizes, compile_layers)
        for layers in sizes.layers
    )
    return max(0.0, deep - shallow) / (sizes.layers[1] - sizes.layers[0])


def _few_tokens(mesh: Mesh, moe: bool, layers: int, overlap: str, sizes: Sizes) -> Config:
    """`layers` layers of the kind, and an MoE layer. A half has as many tokens as a whole micro-batch otherwise, and
    all topologies have as many sequences, so that torch.compile makes one set of kernels for all."""
    D, S = sizes.layer
    sequences = mesh.world_size * (4 if overlap == "on" else 2)
    return from_dict(
        {
            "model": {
                "dim": D,
                "n_layers": layers + 1,
                "first_dense_layers": 0 if moe else layers,
                "n_heads": 4 * mesh.tp,
                "head_dim": D // 4,
                "ffn_dim": 2 * D * mesh.tp,
                "vocab_size": 256 * mesh.tp,
                "num_experts": 8 * mesh.world_size,
                "expert_dim": D // 2,
                "qk_norm": "head",
            },
            "data": {"seq_len": S},
            "eval": {"tokens": S},
            "train": {"micro_batch": sequences, "tokens_per_step": S * sequences * mesh.dp},
            "parallel": {"tp": mesh.tp, "ep": mesh.ep, "overlap": overlap},
        }
    )


def _step_seconds(config: Config, mesh: Mesh, sizes: Sizes, compile_layers: bool) -> float:
    """Of forward and backward pass."""
    with torch.device(mesh.device):
        model = Decoder(config, mesh)
        tokens_BS = torch.zeros(config.micro_batch(mesh.dp), config.data.seq_len, dtype=torch.int64)
    model.initialize(0)
    if compile_layers:
        model.compile_dense_parts()

    def step() -> None:
        hidden_BSD, stats = model.train()(tokens_BS)
        (hidden_BSD.float().square().mean() + sum(layer.balance_loss for layer in stats)).backward()

    for _ in range(sizes.rounds):
        step()
    found = []
    for _ in range(sizes.rounds):
        synchronize(mesh.device)
        dist.barrier(mesh.host_group)
        start = time.perf_counter()
        for _ in range(sizes.steps):
            step()
        synchronize(mesh.device)
        found.append((time.perf_counter() - start) / sizes.steps)
    return min(found)  # a host is only ever held up
