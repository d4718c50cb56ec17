"""Search for good placements under any objective: annealing, and recombination of what it finds.

Annealing finds good parts and bad parts of a placement; as objectives are chains over the layers, dynamic programming
finds the best whole of all layers of all placements found so far, with the GPUs renamed from layer to layer as fits
best. The next annealing starts from there.

Shapes: L layers, E experts, G GPUs, X and Y candidate assignments of a layer.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from moetrain.placement.descent import by_assignment, by_swaps, random_assignment
from moetrain.placement.objectives import Table, transport
from moetrain.placement.placement import Assignment
from moetrain.placement.problem import EXACT, Incumbent, Problem

_HEATS = (2.0, 0.7, 1.0, 0.35, 1.4, 0.25, 0.5, 0.15)
"""First temperatures, in units of what an expert's place costs."""
_COLD = 0.03
_POOL = 12


def search(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """Anneal and recombine, ever more slowly, until the deadline, or until it has gone on for three times as long as it
    took to find the incumbent."""
    problem = incumbent.problem
    pool = [polish(problem, incumbent.gpu_LE, incumbent.deadline)]
    incumbent.offer(pool[0], "search")
    sweeps, found, began = 32.0, incumbent.seconds, incumbent.seconds
    while True:
        for heat in _HEATS:
            if incumbent.done:
                return
            start_LE = incumbent.gpu_LE if heat < 1 else random_assignment(problem, rng)
            pool.append(
                polish(
                    problem, anneal(problem, start_LE, heat, int(sweeps), rng, incumbent.deadline), incumbent.deadline
                )
            )
            improved = incumbent.offer(pool[-1], "search")
            if incumbent.done:
                return
            pool.append(polish(problem, recombine(problem, pool), incumbent.deadline))
            improved |= incumbent.offer(pool[-1], "search")
            pool = _best(problem, pool)
            if improved:
                found = incumbent.seconds
        if incumbent.seconds - began > 4 * (found - began) + 1:
            return
        sweeps *= 1.5


def polish(problem: Problem, gpu_LE: Assignment, deadline: float) -> Assignment:
    """Descend until no layer, no renaming of GPUs from a layer on, and no swap helps."""
    cost = problem.term.cost(gpu_LE)
    while True:
        better_LE = recombine(problem, [by_assignment(problem, gpu_LE, deadline)])
        better_LE = by_swaps(problem, better_LE, deadline)
        better = problem.term.cost(better_LE)
        if better >= cost - EXACT * abs(cost):
            return gpu_LE
        gpu_LE, cost = better_LE, better


def anneal(
    problem: Problem, gpu_LE: Assignment, heat: float, sweeps: int, rng: np.random.Generator, deadline: float
) -> Assignment:
    """Go over the layers again and again, at temperatures that fall from `heat` to almost nothing.

    Where the objective is linear in a layer, that is put into the best places by costs with noise, which is Gumbel's
    and as large as the temperature; elsewhere the swap of each two GPUs that looks best with such noise is made if
    it does not cost too much.
    """
    objective, gpus = problem.term, problem.num_gpus
    gpu_LE = gpu_LE.copy()
    layers = range(problem.num_layers)
    price = float(np.mean([np.ptp(objective.moves(layer, gpu_LE, gpus), axis=1) for layer in layers]))
    for sweep in range(sweeps):
        temperature = price * heat * (_COLD / heat) ** (sweep / max(sweeps - 1, 1))
        for layer in layers if sweep % 2 else reversed(layers):
            if time.monotonic() > deadline:
                return gpu_LE
            linear_EG = objective.linear(layer, gpu_LE, gpus)
            if linear_EG is None:
                _swap_some(problem, layer, gpu_LE, temperature, rng)
            else:
                noise_EG = temperature * rng.gumbel(size=linear_EG.shape)
                gpu_LE[layer] = transport(linear_EG - noise_EG, problem.least, problem.most)
    return gpu_LE


def recombine(problem: Problem, pool: Sequence[Assignment]) -> Assignment:
    """The best placement whose every layer is that of one of the pool, up to the names of the GPUs where the objective
    is symmetric."""
    layers = range(problem.num_layers)
    return best_chain(problem, [_distinct(problem, [gpu_LE[layer] for gpu_LE in pool]) for layer in layers])


def best_chain(problem: Problem, candidates: Sequence[Assignment], rename: bool = True) -> Assignment:
    """The best placement of one of the candidates, [X, E], for each layer, by dynamic programming over the layers.

    Where the objective is symmetric, and unless not to `rename`, each step gives the GPUs the best names, an
    assignment problem of G × G.
    """
    objective, gpus = problem.term, problem.num_gpus
    rename = rename and objective.symmetric
    cost_X = objective.within(0, candidates[0], gpus)
    back: list[NDArray[np.int64]] = []
    for layer in range(problem.num_layers - 1):
        total_XY = cost_X[:, None] + _steps(problem, layer, candidates[layer], candidates[layer + 1], rename)
        back.append(total_XY.argmin(0))
        cost_X = total_XY.min(0) + objective.within(layer + 1, candidates[layer + 1], gpus)
    chosen = [int(cost_X.argmin())]
    for from_Y in reversed(back):
        chosen.append(int(from_Y[chosen[-1]]))
    gpu_LE = np.stack([gpu_XE[at] for gpu_XE, at in zip(candidates, reversed(chosen), strict=True)])
    for layer in range(problem.num_layers - 1 if rename else 0):
        named_XYGG = _renamings(problem, layer, gpu_LE[None, layer], gpu_LE[None, layer + 1])
        if named_XYGG is not None:
            gpu_LE[layer + 1] = linear_sum_assignment(named_XYGG[0, 0])[1][gpu_LE[layer + 1]]
    return gpu_LE


def exhaust(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """Solve to optimality by trying everything, if that is not too much."""
    problem = incumbent.problem
    for rename, limit in ((True, 150), (False, 3000)):
        if problem.term.symmetric or not rename:
            gpu_XE = all_assignments(problem, rename, limit)
            if gpu_XE is not None:
                gpu_LE = best_chain(problem, [gpu_XE] * problem.num_layers, rename)
                incumbent.offer(gpu_LE, "exhaustive")
                incumbent.prove(problem.term.cost(gpu_LE), "exhaustive")
                return


def all_assignments(problem: Problem, unnamed: bool, limit: int) -> Assignment | None:
    """[X, E]: all feasible assignments of a layer, or only those whose GPUs are in order of their first experts; None:
    there are more than `limit`."""
    gpus, least, most = problem.num_gpus, problem.least, problem.most
    gpu_XE, held_XG = np.zeros((1, 0), np.int64), np.zeros((1, gpus), np.int64)
    for expert in range(problem.num_experts):
        allowed_XG = held_XG < most
        # Those that are still to come must fill every GPU that lacks some.
        lacking_XG = held_XG < least
        left = problem.num_experts - expert
        full_X = np.maximum(least - held_XG, 0).sum(1) >= left
        allowed_XG &= lacking_XG | ~full_X[:, None]
        if unnamed:
            allowed_XG[:, 1:] &= held_XG[:, :-1] > 0
        x_Y, gpu_Y = np.nonzero(allowed_XG)
        if len(x_Y) > limit:
            return None
        gpu_XE, held_XG = np.column_stack([gpu_XE[x_Y], gpu_Y]), held_XG[x_Y]
        held_XG[np.arange(len(gpu_Y)), gpu_Y] += 1
    return gpu_XE


def _steps(problem: Problem, layer: int, gpu_XE: Assignment, gpu_YE: Assignment, rename: bool) -> Table:
    """[X, Y]: what the step from the layer to the next costs, or would with the best names for the latter's GPUs."""
    if rename:
        named_XYGG = _renamings(problem, layer, gpu_XE, gpu_YE)
        if named_XYGG is not None:
            return np.array([[named[linear_sum_assignment(named)].sum() for named in row] for row in named_XYGG])
    arrive_XEG = problem.term.arrivals(layer, gpu_XE)
    if arrive_XEG is None:
        return np.zeros((len(gpu_XE), len(gpu_YE)))
    there_YEG = np.eye(problem.num_gpus)[gpu_YE]
    return arrive_XEG.reshape(len(gpu_XE), -1) @ there_YEG.reshape(len(gpu_YE), -1).T


def _renamings(problem: Problem, layer: int, gpu_XE: Assignment, gpu_YE: Assignment) -> Table | None:
    """[X, Y, G, G]: what arrives at each GPU of an assignment of the next layer, if that had the name of another."""
    arrive_XEG = problem.term.arrivals(layer, gpu_XE)
    if arrive_XEG is None:
        return None
    there_YGE = np.eye(problem.num_gpus)[gpu_YE].transpose(0, 2, 1)
    return there_YGE @ arrive_XEG[:, None]


def _distinct(problem: Problem, assignments: list[Assignment]) -> Assignment:
    """[X, E]: the assignments of a layer without repetitions, be it under other names where they do not matter."""
    if problem.term.symmetric:
        assignments = [named_in_order(gpu_E) for gpu_E in assignments]
    return np.unique(assignments, axis=0)


def named_in_order(gpu_E: Assignment) -> Assignment:
    """The same groups of experts on GPUs in order of their first experts."""
    _, first, group_E = np.unique(gpu_E, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[group_E]


def _best(problem: Problem, pool: list[Assignment]) -> list[Assignment]:
    """The best placements of different costs."""
    cost = np.array([problem.term.cost(gpu_LE) for gpu_LE in pool])
    _, first = np.unique(cost.round(12), return_index=True)
    return [pool[at] for at in first[:_POOL]]


def _swap_some(problem: Problem, layer: int, gpu_LE: Assignment, temperature: float, rng: np.random.Generator) -> None:
    """Swap experts between disjoint pairs of GPUs."""
    gpus = problem.num_gpus
    gpu_E = gpu_LE[layer]
    swaps_EE = problem.term.swaps(layer, gpu_LE, gpus)
    noisy_EE = swaps_EE - temperature * np.triu(rng.gumbel(size=swaps_EE.shape), 1)
    noisy_EE[gpu_E[:, None] >= gpu_E] = np.inf
    taken_G = np.zeros(gpus, bool)
    for at in np.argsort(noisy_EE, axis=None)[: 4 * len(gpu_E)]:
        first, second = divmod(int(at), len(gpu_E))
        pair = [gpu_E[first], gpu_E[second]]
        if taken_G[pair].any() or not np.isfinite(noisy_EE[first, second]):
            continue
        taken_G[pair] = True
        if swaps_EE[first, second] < temperature * rng.exponential():
            gpu_LE[layer, [first, second]] = pair[::-1]
