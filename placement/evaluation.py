"""How placements compare on tokens of a trace, whatever each of them was solved for: one row of a table each.

Shapes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrain.placement.descent import random_assignment
from moetrain.placement.load import pack_lpt
from moetrain.placement.objectives import Objective
from moetrain.placement.placement import Assignment, Placement
from moetrain.placement.problem import Problem
from moetrain.placement.simulator import Calibration, simulate
from moetrain.placement.statistics import imbalance_L, load_LE, load_LG, transitions_LEE
from moetrain.placement.topology import Topology
from moetrain.placement.trace import Trace


@dataclass(frozen=True)
class Score:
    """What one placement costs on a trace. Means are over layers; the smaller the better, all of them."""

    load: float
    """Pairs on the fullest GPU / on the mean GPU: 1 is even. What training waits for."""
    worst_load: float
    """Of the layer where that is largest."""
    hops: float
    """Layer boundaries at which a token changes GPU, in context-coherent inference; training has none."""
    node_hops: float
    """And node."""
    rows_inside: float
    """Rows that a token sends in a layer to other GPUs of its node."""
    rows_across: float
    """And to other nodes."""
    step_seconds: float
    """Of a training step's micro-batch, simulated: the sum of the four that follow."""
    dense_seconds: float
    dispatch_seconds: float
    compute_seconds: float
    combine_seconds: float


def score(
    placement: Placement, trace: Trace, topology: Topology, calibration: Calibration | None = None, seed: int = 0
) -> Score:
    """Score a placement on a trace. Raises PlacementError where they and the topology do not fit each other."""
    simulation = simulate(trace, placement, topology, calibration, seed)
    gpus = topology.num_gpus
    imbalance_by_L = imbalance_L(load_LG(load_LE(trace), placement.gpu_LE, placement.num_gpus))
    hops_GG, rows_GG = gpu_transitions_GG(placement, trace), simulation.rows_GG
    away_GG = ~np.eye(gpus, dtype=bool)
    across_GG = topology.node_G[:, None] != topology.node_G
    return Score(
        load=float(imbalance_by_L.mean()),
        worst_load=float(imbalance_by_L.max()),
        hops=float(hops_GG[away_GG].sum()),
        node_hops=float(hops_GG[across_GG].sum()),
        rows_inside=float(rows_GG[away_GG & ~across_GG].sum()) / gpus,
        rows_across=float(rows_GG[across_GG].sum()) / gpus,
        step_seconds=simulation.step_seconds,
        dense_seconds=simulation.dense_seconds * trace.num_layers,
        dispatch_seconds=float(simulation.dispatch_LG.max(axis=1).sum()),
        compute_seconds=float(simulation.compute_LG.max(axis=1).sum()),
        combine_seconds=float(simulation.combine_LG.max(axis=1).sum()),
    )


@dataclass(frozen=True)
class Candidate:
    """A placement to compare, and the seconds that it took to find."""

    name: str
    placement: Placement
    seconds: float


def baselines(problem: Problem, trace: Trace, seed: int = 0) -> list[Candidate]:
    """What needs no search: as a model has its experts, at random, and the heaviest first to the least loaded GPU."""
    load = load_LE(trace)  # not timed: solvers get their tables made, too
    makers: dict[str, Callable[[], Assignment]] = {
        "contiguous": lambda: Placement.contiguous(problem.num_layers, problem.num_experts, problem.num_gpus).gpu_LE,
        "random": lambda: random_assignment(problem, np.random.default_rng(seed)),
        "greedy": lambda: pack_lpt(load, problem.num_gpus, problem.least, problem.most),
    }
    candidates = []
    for name, make in makers.items():
        started = time.monotonic()
        placement = Placement(make(), problem.num_gpus)
        candidates.append(Candidate(name, placement, time.monotonic() - started))
    return candidates


@dataclass(frozen=True)
class Compared:
    """What a candidate costs by one objective, and by what there is besides."""

    name: str
    cost: float
    seconds: float
    score: Score


def compare(
    candidates: Iterable[Candidate],
    term: Objective,
    trace: Trace,
    topology: Topology,
    calibration: Calibration | None = None,
    seed: int = 0,
) -> list[Compared]:
    """Score all candidates on a trace, of which `term` is an objective."""
    return [
        Compared(
            candidate.name,
            term.cost(candidate.placement.gpu_LE),
            candidate.seconds,
            score(candidate.placement, trace, topology, calibration, seed),
        )
        for candidate in candidates
    ]


def table_of(compared: Iterable[Compared], several_nodes: bool) -> tuple[list[str], list[list[str]]]:
    """Head and rows of a table of them."""
    columns: dict[str, Callable[[Compared], str]] = {
        "placement": lambda row: row.name,
        "cost": lambda row: f"{row.cost:.4f}",
        "load": lambda row: f"{row.score.load:.3f}",
        "worst load": lambda row: f"{row.score.worst_load:.3f}",
        "hops": lambda row: f"{row.score.hops:.3f}",
    }
    if several_nodes:
        columns |= {
            "node hops": lambda row: f"{row.score.node_hops:.2f}",
            "rows near": lambda row: f"{row.score.rows_inside:.2f}",
            "rows far": lambda row: f"{row.score.rows_across:.2f}",
        }
    else:
        columns["rows"] = lambda row: f"{row.score.rows_inside:.2f}"
    columns |= {
        "step, ms": lambda row: f"{1e3 * row.score.step_seconds:,.1f}",
        "took, s": lambda row: f"{row.seconds:.1f}",
    }
    return list(columns), [[cell(row) for cell in columns.values()] for row in compared]


def gpu_transitions_GG(placement: Placement, trace: Trace) -> NDArray[np.float64]:
    """[G, G]: from which GPU to which a token goes at the L − 1 layer boundaries; sums to L − 1."""
    gpus = placement.num_gpus
    steps = zip(placement.gpu_LE[:-1], placement.gpu_LE[1:], transitions_LEE(trace), strict=True)
    total = np.zeros(gpus * gpus)
    for here_E, next_E, transitions_EE in steps:
        cell_EE = here_E[:, None] * gpus + next_E
        total += np.bincount(cell_EE.ravel(), transitions_EE.ravel(), minlength=gpus * gpus)
    return total.reshape(gpus, gpus)
