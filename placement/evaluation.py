"""How placements compare on tokens of a trace, whatever each of them was solved for.

Shapes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from moetrain.placement.placement import Placement
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
    """Of a training step's micro-batch, simulated."""


def score(
    placement: Placement, trace: Trace, topology: Topology, calibration: Calibration | None = None, seed: int = 0
) -> Score:
    """Score a placement on a trace. Raises PlacementError where they and the topology do not fit each other."""
    simulation = simulate(trace, placement, topology, calibration, seed)
    gpus = topology.num_gpus
    imbalance_by_L = imbalance_L(load_LG(load_LE(trace), placement))
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
    )


def gpu_transitions_GG(placement: Placement, trace: Trace) -> NDArray[np.float64]:
    """[G, G]: from which GPU to which a token goes at the L − 1 layer boundaries; sums to L − 1."""
    gpus = placement.num_gpus
    steps = zip(placement.gpu_LE[:-1], placement.gpu_LE[1:], transitions_LEE(trace), strict=True)
    total = np.zeros(gpus * gpus)
    for here_E, next_E, transitions_EE in steps:
        cell_EE = here_E[:, None] * gpus + next_E
        total += np.bincount(cell_EE.ravel(), transitions_EE.ravel(), minlength=gpus * gpus)
    return total.reshape(gpus, gpus)
