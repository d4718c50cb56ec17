"""A bound on hops by semidefinite programming, far above what counting partners gives.

Two experts, of any layers, share a GPU or not: X_ij = 1 or 0. Of a placement with E / G experts of each layer on each
GPU, X is positive semidefinite, has ones on its diagonal, no negative entry, and Σ_j X_ij = E / G over the experts j
of any layer. Hops are Σ T − ⟨W, X⟩, W the transitions T on both sides of the diagonal, halved. The largest ⟨W, X⟩ over
all such X, be they placements or not, is a semidefinite program (graph partition: Karisch and Rendl, 1998).

It is solved by the alternating direction method of multipliers, and any multipliers that turn up on the way prove a
bound: with a number y_i for each diagonal entry and S_ij ≥ 0 for each entry that must not be negative,

    ⟨W, X⟩ ≤ ⟨W + S, X⟩ ≤ (1 − 1 / G)·(Σ y + N·λ) + Σ (W + S) / G,

where N = L·E is the size of X, and λ the largest eigenvalue of W + S − Diag(y) after every layer's rows and columns
have been centred on 0. For the sums over layers make X − 1/G positive semidefinite, centred, and of trace N·(1 − 1/G).

Shapes: L layers of a window, E experts, N = L·E.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from moetrain.placement.objectives import HopTerm, Objective, Table, WeightedSum, reaches
from moetrain.placement.problem import Incumbent

_WINDOW = 400
"""Experts of so many layers together: an eigendecomposition takes 50 ms."""
_STEPS = 300
_LOOK = 20
"""Steps between two looks at the bound."""


def bound_hops(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """Raise the incumbent's bound, where its objective has hops and all GPUs equally many experts."""
    problem = incumbent.problem
    terms = problem.objective.terms if isinstance(problem.objective, WeightedSum) else [(1.0, problem.objective)]
    if problem.least != problem.most or problem.num_gpus == 1:
        return
    proven = [weight * _lower_bound(incumbent, term) for weight, term in terms]
    for at, (weight, term) in enumerate(terms):
        if isinstance(term, HopTerm):
            for bound in _bounds(term, problem.num_gpus, problem.most, incumbent.deadline):
                proven[at] = max(proven[at], weight * bound)
                incumbent.prove(sum(proven), "semidefinite")


def _lower_bound(incumbent: Incumbent, term: Objective) -> float:
    problem = incumbent.problem
    return term.lower_bound(problem.num_gpus, problem.least, problem.most)


def _bounds(term: HopTerm, num_gpus: int, most: int, deadline: float) -> Iterator[float]:
    """Rising bounds on the term: a sum over windows of layers, each of a part of the boundaries, and over distances.

    A distance is a sum of steps, each between GPUs that are farther apart than some distance. Where those within it
    form equal islands, a step counts the hops between islands, as if each of them were one GPU.
    """
    boundaries = max(_WINDOW // term.transitions_LEE.shape[1], 2) - 1
    windows = [
        term.transitions_LEE[start : start + boundaries] for start in range(0, len(term.transitions_LEE), boundaries)
    ]
    proven: list[float] = []
    open_parts: list[tuple[int, float, Table, int]] = []
    for nearer, farther, reached in reaches(term.distance_GG):
        near_GG = term.distance_GG <= nearer
        islands = (near_GG == near_GG.T).all() and (near_GG @ near_GG == near_GG).all() and np.ptp(near_GG.sum(1)) == 0
        for window in windows:
            counted = HopTerm(window, np.where(near_GG, 0.0, 1.0)).lower_bound(num_gpus, most, most)
            if islands:
                open_parts.append((len(proven), farther - nearer, window, num_gpus // reached))
            proven.append((farther - nearer) * counted)
    for number, (at, step, window, groups) in enumerate(open_parts):
        share = (deadline - time.monotonic()) / (len(open_parts) - number)
        if share > 0:
            for bound in semidefinite_bounds(window, groups, time.monotonic() + share):
                proven[at] = max(proven[at], step * bound)
            yield sum(proven)


def semidefinite_bounds(transitions_LEE: Table, num_gpus: int, deadline: float) -> Iterator[float]:
    """Bounds on the hops of a few layers, from each look at the multipliers, until they hardly rise."""
    layers, experts = len(transitions_LEE) + 1, transitions_LEE.shape[1]
    size, total = layers * experts, transitions_LEE.sum()
    blocks = np.zeros((layers, experts, layers, experts))
    for layer, transitions_EE in enumerate(transitions_LEE):
        blocks[layer, :, layer + 1] = transitions_EE / 2
        blocks[layer + 1, :, layer] = transitions_EE.T / 2
    scale = np.linalg.norm(blocks)
    if scale == 0:
        return
    weight_NN = blocks.reshape(size, size) / scale

    def centred(x_NN: Table) -> Table:
        x = x_NN.reshape(layers, experts, layers, experts)
        x = x - x.mean(1, keepdims=True)
        return (x - x.mean(3, keepdims=True)).reshape(size, size)

    penalty, look, best = 2.0 / size, _LOOK, -np.inf
    feasible_NN = np.full((size, size), 1 / num_gpus)
    multiplier_NN = np.zeros((size, size))
    diagonal = np.diag_indices(size)
    for step in range(1, _STEPS + 1):
        values_N, vectors_NN = np.linalg.eigh(centred(feasible_NN - multiplier_NN + weight_NN / penalty))
        positive = slice(np.searchsorted(values_N, 0), None)
        semidefinite_NN = (vectors_NN[:, positive] * values_N[positive]) @ vectors_NN[:, positive].T + 1 / num_gpus
        # Over-relaxed by 1.6, as is usual: about a third fewer steps.
        relaxed_NN = 1.6 * semidefinite_NN - 0.6 * feasible_NN
        before_NN, feasible_NN = feasible_NN, np.maximum(relaxed_NN + multiplier_NN, 0)
        feasible_NN[diagonal] = 1
        multiplier_NN += relaxed_NN - feasible_NN
        late = time.monotonic() > deadline
        if step % look == 0 or late:
            dual_NN = penalty * multiplier_NN
            largest = np.linalg.eigvalsh(centred(weight_NN - dual_NN))[-1]
            y_N = dual_NN[diagonal]
            kept = (1 - 1 / num_gpus) * (y_N.sum() + size * largest) + (
                weight_NN.sum() - dual_NN.sum() + y_N.sum()
            ) / num_gpus
            bound = float(total - kept * scale)
            yield bound
            if late or bound - best < 1e-4 * total:
                return
            best = max(best, bound)
            # The penalty follows whichever of the two residuals lags behind.
            primal, dual = np.linalg.norm(semidefinite_NN - feasible_NN), np.linalg.norm(feasible_NN - before_NN)
            factor = 1.5 if primal > 5 * dual else 1 / 1.5 if dual > 5 * primal else 1.0
            penalty, multiplier_NN = penalty * factor, multiplier_NN / factor
