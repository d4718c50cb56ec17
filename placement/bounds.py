"""Bounds on hops and traffic by semidefinite programming, far above what counting gives.

Two experts, of any layers, share a GPU or not: X_ij = 1 or 0. Of a placement with E / G experts of each layer on each
GPU, X is positive semidefinite, has ones on its diagonal, no negative entry, and Σ_j X_ij = E / G over the experts j
of any layer. The largest ⟨W, X⟩ over all such X, be they placements or not, for given weights W of pairs, is a
semidefinite program (graph partition: Karisch and Rendl, 1998), and no placement has more weight on its GPUs.

- Hops are Σ T − ⟨W, X⟩, W the transitions T on both sides of the diagonal, halved.
- A row with k experts, Q ordered pairs of which share a GPU, reaches r GPUs, and Q is least if they share k evenly. So
  for any β ≥ 0 r ≥ α_k − β·Q, α_k the least r + β·Q(k, r) over all possible r. Summed over rows, Q is ⟨C, X⟩ for the
  layer's co-activations C; the best β is one at which two r are equal for some k.

It is solved by the alternating direction method of multipliers, and any multipliers that turn up on the way prove a
bound: with a number y_i for each diagonal entry and S_ij ≥ 0 for each entry that must not be negative,

    ⟨W, X⟩ ≤ ⟨W + S, X⟩ ≤ (1 − 1 / G)·(Σ y + N·λ) + Σ (W + S) / G,

where N = L·E is the size of X, and λ the largest eigenvalue of W + S − Diag(y) after every layer's rows and columns
have been centred on 0. For the sums over layers make X − 1/G positive semidefinite, centred, and of trace N·(1 − 1/G).

Shapes: L layers (of a window), E experts, G GPUs, U distinct rows, N = L·E.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
from scipy import sparse

from moetrain.placement.objectives import (
    HopTerm,
    Table,
    TrafficTerm,
    parts,
    reaches,
    uniform,
)
from moetrain.placement.problem import Incumbent

_WINDOW = 400
"""Experts of so many layers together: an eigendecomposition takes 50 ms."""
_STEPS = 300
_LOOK = 20
"""Steps between two looks at the bound."""


def raise_bound(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """Raise the incumbent's bound, where all GPUs have equally many experts."""
    problem = incumbent.problem
    terms = parts(problem.objective)
    if problem.least != problem.most or problem.num_gpus == 1:
        return
    shares = problem.num_gpus, problem.least, problem.most
    proven = [weight * term.lower_bound(*shares) for weight, term in terms]
    for at, (weight, term) in enumerate(terms):
        deadline = time.monotonic() + incumbent.seconds_left / (len(terms) - at)
        bounds: Iterator[float] = iter(())
        if isinstance(term, HopTerm):
            bounds = _hops(term, problem.num_gpus, problem.most, deadline)
        elif isinstance(term, TrafficTerm):
            bounds = _traffic(term, problem.num_gpus, problem.most, deadline)
        for bound in bounds:
            proven[at] = max(proven[at], weight * bound)
            incumbent.prove(sum(proven), "semidefinite")


def _hops(term: HopTerm, num_gpus: int, most: int, deadline: float) -> Iterator[float]:
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
            for kept in most_together(
                _weights(window), [window.shape[1]] * (len(window) + 1), groups, time.monotonic() + share
            ):
                proven[at] = max(proven[at], step * (float(window.sum()) - kept))
            yield sum(proven)


def _weights(transitions_LEE: Table) -> Table:
    """[N, N]: what a pair of experts of neighbouring layers keeps on its GPU, half of it each way."""
    layers, experts = len(transitions_LEE) + 1, transitions_LEE.shape[1]
    weight_LELE = np.zeros((layers, experts, layers, experts))
    for layer, transitions_EE in enumerate(transitions_LEE):
        weight_LELE[layer, :, layer + 1] = transitions_EE / 2
        weight_LELE[layer + 1, :, layer] = transitions_EE.T / 2
    return weight_LELE.reshape(layers * experts, layers * experts)


def _traffic(term: TrafficTerm, num_gpus: int, most: int, deadline: float) -> Iterator[float]:
    """Rising bounds on the term, layer by layer, where all GPUs are equally far from one another.

    A row costs one distance for each GPU that it reaches, but its source's own. A known source is one more expert of
    the row, which is where it is, one on each GPU; the row reaches that GPU in any case. An unknown one is any GPU.
    """
    known = len(term.distance_SG) == num_gpus > 1
    if not (uniform(term.distance_SG) if known else term.symmetric):
        return
    distance = float(term.distance_SG.max())
    proven = [TrafficTerm((rows,), term.distance_SG).lower_bound(num_gpus, most, most) for rows in term.rows]
    for layer, rows in enumerate(term.rows):
        share = (deadline - time.monotonic()) / (len(term.rows) - layer)
        if share <= 0:
            return
        members_UN, sizes = rows.members_UE, [rows.members_UE.shape[1]]
        if known:
            members_UN = sparse.hstack([members_UN, sparse.eye_array(num_gpus).tocsr()[rows.source_U]]).tocsr()
            sizes.append(num_gpus)
        together_NN = (members_UN.T @ (rows.weight_U[:, None] * members_UN)).toarray()
        np.fill_diagonal(together_NN, 0)
        weight_K = np.bincount(np.diff(members_UN.indptr), rows.weight_U).astype(np.float64)
        for kept in most_together(together_NN, sizes, num_gpus, time.monotonic() + share):
            reached = _least_reached(weight_K, kept, num_gpus, most + known) - known * float(weight_K.sum())
            proven[layer] = max(proven[layer], distance * reached)
        yield sum(proven)


def _least_reached(weight_K: Table, kept: float, num_gpus: int, most: int) -> float:
    """GPUs that rows reach, weight_K[k] of which have k experts, if ordered pairs of the weight `kept` share a GPU."""
    reached, pairs = [], []
    for size in range(len(weight_K)):
        gpus = np.arange(-(-size // most), min(size, num_gpus) + 1)
        each, more = np.divmod(size, np.maximum(gpus, 1))
        reached.append(gpus)
        pairs.append((gpus - more) * each * (each - 1) + more * (each + 1) * each)
    falls = {float(before - after) for of_size in pairs for before, after in pairwise(of_size) if before > after}
    bounds = [float(sum(weight * gpus.min() for weight, gpus in zip(weight_K, reached, strict=True)))]
    for slope in (1 / fall for fall in falls):
        least_K = [(gpus + slope * of_size).min() for gpus, of_size in zip(reached, pairs, strict=True)]
        bounds.append(float(weight_K @ least_K) - slope * kept)
    return max(bounds)


def most_together(weight_NN: Table, sizes: Sequence[int], num_gpus: int, deadline: float) -> Iterator[float]:
    """Bounds on the weight of pairs that share a GPU, from each look at the multipliers until they hardly change.

    `weight_NN`: symmetric, ≥ 0. `sizes`: of the layers, each of which has equally much on every GPU.
    """
    size, total, scale = len(weight_NN), weight_NN.sum(), float(np.linalg.norm(weight_NN))
    if scale == 0:
        yield 0.0
        return
    weight_NN = weight_NN / scale
    starts = np.cumsum([0, *sizes[:-1]])

    def centred(x_NN: Table) -> Table:
        for _ in range(2):
            mean = np.add.reduceat(x_NN, starts, axis=0) / np.array(sizes)[:, None]
            x_NN = (x_NN - np.repeat(mean, sizes, axis=0)).T
        return x_NN

    penalty, best = 2.0 / size, np.inf
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
        if step % _LOOK == 0 or late:
            dual_NN = penalty * multiplier_NN
            largest = np.linalg.eigvalsh(centred(weight_NN - dual_NN))[-1]
            y_N = dual_NN[diagonal]
            kept = (1 - 1 / num_gpus) * (y_N.sum() + size * largest) + (
                weight_NN.sum() - dual_NN.sum() + y_N.sum()
            ) / num_gpus
            yield float(kept * scale)
            if late or best - kept * scale < 1e-4 * total:
                return
            best = min(best, kept * scale)
            # The penalty follows whichever of the two residuals lags behind.
            primal, dual = np.linalg.norm(semidefinite_NN - feasible_NN), np.linalg.norm(feasible_NN - before_NN)
            factor = 1.5 if primal > 5 * dual else 1 / 1.5 if dual > 5 * primal else 1.0
            penalty, multiplier_NN = penalty * factor, multiplier_NN / factor
