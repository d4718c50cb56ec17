"""`moetrain trace info`.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from moetrain.errors import ConfigError
from moetrain.files import write_text
from moetrain.placement.load import pack
from moetrain.placement.placement import Assignment, Placement
from moetrain.placement.statistics import (
    Drift,
    coactivation_LEE,
    drift,
    imbalance_L,
    load_LE,
    load_LG,
    load_RLE,
    transitions_LEE,
    windows,
)
from moetrain.placement.trace import Trace, load_trace

_WINDOWS = 9
"""Groups of recorded steps, at most: the first, and those whose drift from it is shown."""
_TINY = np.finfo(np.float64).tiny
"""In place of the sum of a layer's loads where it has no pairs."""


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain trace info`."""
    parser.add_argument(
        "path", metavar="PATH", type=Path, help="a trace file, a folder of them, or a run that recorded"
    )
    parser.add_argument("--experts", type=int, metavar="E", help="of a layer (default: as the trace says)")
    parser.add_argument("--gpus", type=int, metavar="G", help="also show how uneven the loads of so many GPUs are")
    parser.add_argument("--json", type=Path, metavar="F", help="also write everything to this file")


@dataclass(frozen=True)
class Layer:
    """One MoE layer of a trace."""

    layer: int
    experts_per_token: float
    expert_imbalance: float
    """Largest load of an expert over the mean."""
    gpu_imbalance: float | None
    """The same of GPUs with neighbouring experts, E / G of them; None: GPUs were not asked for."""
    unused: int
    """Experts without a token."""
    partner: float | None
    """How many of an expert's tokens go to its most frequent partner too, mean over its tokens; None: no layer has two
    experts a token."""
    next_guessed: float | None
    """How often the best guess of the next layer's expert is right that knows this layer's; None: the last layer."""
    next_guessed_blindly: float | None
    """The same of the best guess that does not know it."""


@dataclass(frozen=True)
class Window:
    """Some recorded steps after the first ones: how far they are from those."""

    drift: Drift
    contiguous: float | None
    """Largest load of a GPU over the mean, mean over the layers, with neighbouring experts; None: no GPUs."""
    placed_at_first: float | None
    """The same with the experts packed by their loads in the first steps …"""
    placed_here: float | None
    """… and in these steps themselves."""


@dataclass(frozen=True)
class Info:
    """What `moetrain trace info` tells. `steps` and `sources` are empty where they are not recorded."""

    tokens: int
    top_k: int
    experts: int
    inferred_experts: bool
    steps: list[int]
    sources: list[int]
    source_distance: float | None
    """How far the loads of a source rank's tokens are from those of all, in total-variation distance, mean over ranks
    and layers; None: there are not several."""
    gpus: int | None
    layers: list[Layer]
    windows: list[Window]


def describe(trace: Trace, gpus: int | None = None) -> Info:
    """Summarise a trace. Raises ConfigError where `gpus` does not divide the number of experts."""
    experts = trace.num_experts
    if gpus is not None and (gpus < 1 or experts % gpus):
        raise ConfigError(f"--gpus = {gpus}: must divide the trace's {experts} experts")
    steps = [] if trace.step_S is None else np.unique(trace.step_S).tolist()
    sources = [] if trace.source_S is None else np.unique(trace.source_S).tolist()
    return Info(
        tokens=trace.num_tokens,
        top_k=trace.top_k,
        experts=experts,
        inferred_experts=trace.inferred_experts,
        steps=steps,
        sources=sources,
        source_distance=_source_distance(trace) if len(sources) > 1 else None,
        gpus=gpus,
        layers=_layers(trace, gpus),
        windows=_windows(trace, gpus) if len(steps) > 1 else [],
    )


def _layers(trace: Trace, gpus: int | None) -> list[Layer]:
    load, transitions = load_LE(trace), transitions_LEE(trace)
    expert_imbalance = imbalance_L(load)
    together_LEE = coactivation_LEE(trace) * (1 - np.eye(trace.num_experts))
    partner_L = together_LEE.max(2).sum(1) / np.maximum(load.sum(1), _TINY)
    gpu_imbalance = None if gpus is None else imbalance_L(load_LG(load, _contiguous(trace, gpus), gpus))
    last = trace.num_layers - 1
    return [
        Layer(
            layer=index if trace.layers is None else trace.layers[index],
            experts_per_token=float(load[index].sum()),
            expert_imbalance=float(expert_imbalance[index]),
            gpu_imbalance=None if gpu_imbalance is None else float(gpu_imbalance[index]),
            unused=int((load[index] == 0).sum()),
            partner=float(partner_L[index]) if trace.top_k > 1 else None,
            next_guessed=float(transitions[index].max(1).sum()) if index < last else None,
            next_guessed_blindly=float(transitions[index].sum(0).max()) if index < last else None,
        )
        for index in range(trace.num_layers)
    ]


def _source_distance(trace: Trace) -> float:
    loads_LE = load_LE(trace)
    share_LE = loads_LE / np.maximum(loads_LE.sum(1, keepdims=True), _TINY)
    _, loads_RLE = load_RLE(trace)
    share_RLE = loads_RLE / np.maximum(loads_RLE.sum(2, keepdims=True), _TINY)
    return float(np.abs(share_RLE - share_LE).sum(2).mean() / 2)


def _windows(trace: Trace, gpus: int | None) -> list[Window]:
    first, *later = windows(trace, _WINDOWS)
    changes = drift([first, *later])
    if gpus is None:
        return [Window(change, None, None, None) for change in changes]
    contiguous, at_first = _contiguous(trace, gpus), _packed(load_LE(first), gpus)
    described = []
    for change, window in zip(changes, later, strict=True):
        load = load_LE(window)
        placements = (contiguous, at_first, _packed(load, gpus))
        means = [float(imbalance_L(load_LG(load, gpu_LE, gpus)).mean()) for gpu_LE in placements]
        described.append(Window(change, *means))
    return described


def _contiguous(trace: Trace, gpus: int) -> Assignment:
    return Placement.contiguous(trace.num_layers, trace.num_experts, gpus).gpu_LE


def _packed(load_LE: NDArray[np.float64], gpus: int) -> Assignment:
    share = load_LE.shape[1] // gpus
    return pack(load_LE, gpus, share, share)[0]


def info_command(args: argparse.Namespace) -> int:
    """Run `moetrain trace info`; returns the exit code. Raises TraceError, and ConfigError for --gpus."""
    info = describe(load_trace(args.path, args.experts), args.gpus)
    if args.json is not None:
        write_text(args.json, json.dumps(asdict(info), indent=1) + "\n")
    inferred = " (the largest id and one; --experts says better)" if info.inferred_experts else ""
    facts = {
        "trace": args.path,
        "tokens": f"{info.tokens:,}",
        "MoE layers": len(info.layers),
        "experts": f"{info.experts} in a layer{inferred}, at most {info.top_k} a token",
        "steps": f"{len(info.steps):,}, {info.steps[0]:,} to {info.steps[-1]:,}" if info.steps else "not recorded",
        "source ranks": f"{len(info.sources):,}" if info.sources else "not recorded",
    }
    if info.source_distance is not None:
        facts["source ranks"] += f", whose loads are {_percent(info.source_distance)} from those of all"
    console = Console() if Console().is_terminal else Console(width=120)
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", markup=False, highlight=False, soft_wrap=True)
    console.print(_layer_table(info))
    if info.windows:
        console.print(_drift_table(info))
    return 0


def _layer_table(info: Info) -> Table:
    columns = ["layer", "experts a token", "unused", "max/mean load of experts"]
    columns += [f"of {info.gpus} GPUs, experts in order"] if info.gpus else []
    columns += ["with the same partner", "next expert guessed from this one", "without"]
    rows = []
    for layer in info.layers:
        row = [str(layer.layer), f"{layer.experts_per_token:.2f}", str(layer.unused), f"{layer.expert_imbalance:.2f}"]
        row += [_number(layer.gpu_imbalance)] if info.gpus else []
        rows.append([*row, _percent(layer.partner), _percent(layer.next_guessed), _percent(layer.next_guessed_blindly)])
    return _table("Layers", columns, rows)


def _drift_table(info: Info) -> Table:
    columns = ["steps", "tokens", "loads moved", "(by chance)", "transitions moved", "(by chance)"]
    columns += [f"max/mean of {info.gpus} GPUs: in order", "packed for first steps", "for these"] if info.gpus else []
    rows = []
    for window in info.windows:
        change = window.drift
        row = [f"{change.first_step:,}–{change.last_step:,}", f"{change.tokens:,}", _percent(change.load)]
        row += [_percent(value) for value in (change.load_noise, change.transitions, change.transitions_noise)]
        if info.gpus:
            row += map(_number, (window.contiguous, window.placed_at_first, window.placed_here))
        rows.append(row)
    return _table("Since the first recorded steps", columns, rows)


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}%"
