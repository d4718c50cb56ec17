"""Balanced packing: a layer's experts onto GPUs so that the most loaded one has little, and how little is possible.

The problem is makespan scheduling with cardinality constraints (P | ≤ k | C_max), strongly NP-hard. What routers make
of it is benign: longest processing time first and exchanges mostly come within 1e-4 of a bound that takes no search,
and an integer program closes what is left of small layers.

Shapes: L MoE layers, E experts, G GPUs, C slots of a GPU, P pairs of slots, Q candidates.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pulp
from numpy.typing import NDArray

from moetrain.errors import PlacementError
from moetrain.placement.placement import Assignment
from moetrain.placement.program import minimise
from moetrain.placement.statistics import load_LG

TOLERANCE = 1e-4
"""A layer whose largest load is within this of its bound is left as it is: loads are samples, known no better."""

_KICKS = 600
"""So many disturbances in a row that win no more than TOLERANCE end the search for exchanges."""
PROGRAM_VARIABLES = 1024
"""Integer programs with more binary variables than this prove nothing in minutes that the bound does not say."""


def pack_lpt(load_LE: NDArray[np.floating], num_gpus: int, least: int, most: int) -> Assignment:
    """Longest processing time first: experts in descending order, each to the least loaded GPU that has a place left.

    Every GPU gets `least` to `most` experts. Ties go to the lower number, of experts and of GPUs. Raises
    PlacementError where E experts cannot be shared so.
    """
    check_shares(load_LE.shape[1], num_gpus, least, most)
    num_layers, num_experts = load_LE.shape
    layers_L = np.arange(num_layers)
    gpu_LE = np.empty(load_LE.shape, np.int64)
    load_LG = np.zeros((num_layers, num_gpus))
    experts_LG = np.zeros((num_layers, num_gpus), np.int64)
    descending_LE = np.argsort(-load_LE, axis=1, kind="stable")
    for place in range(num_experts):
        expert_L = descending_LE[:, place]
        # The last experts go where any are still owed.
        owed_LG = np.maximum(least - experts_LG, 0)
        all_owed_L = owed_LG.sum(axis=1) >= num_experts - place
        open_LG = np.where(all_owed_L[:, None], owed_LG > 0, experts_LG < most)
        gpu_L = np.where(open_LG, load_LG, np.inf).argmin(axis=1)
        gpu_LE[layers_L, expert_L] = gpu_L
        load_LG[layers_L, gpu_L] += load_LE[layers_L, expert_L]
        experts_LG[layers_L, gpu_L] += 1
    return gpu_LE


def pack(
    load_LE: NDArray[np.floating],
    num_gpus: int,
    least: int,
    most: int,
    deadline: float | None = None,
    seed: int = 0,
    programs: bool = True,
) -> tuple[Assignment, NDArray[np.float64]]:
    """The best packing found of each layer, and a bound [L] that no packing of the layer is below.

    Longest processing time first; then exchanges of one or two experts between the most loaded GPU and another, with
    random disturbances; then, if there is a `deadline` (of `time.monotonic()`) and unless there are to be no
    `programs`, an integer program for each layer that is still more than TOLERANCE above its bound and small enough.
    Else it ends when exchanges lead nowhere. A program's bound is proven to within its solver's tolerance, 1e-6, which
    is taken off.

    Loads are ≥ 0, in any unit. Raises PlacementError where E experts cannot be shared by `least` to `most`.
    """
    gpu_LE = pack_lpt(load_LE, num_gpus, least, most)
    bound_L = load_bound_L(load_LE, num_gpus, least, most)
    cost_L = load_LG(load_LE, gpu_LE, num_gpus).max(axis=1)
    rng = np.random.default_rng(seed)

    def open_layers() -> list[int]:
        return np.flatnonzero(cost_L > bound_L * (1 + TOLERANCE)).tolist()

    def share(layers_left: int) -> float:
        return np.inf if deadline is None else max(deadline - time.monotonic(), 0.0) / layers_left

    layers = open_layers()
    for done, layer in enumerate(layers):
        target = bound_L[layer] * (1 + TOLERANCE)
        until = time.monotonic() + share(len(layers) - done)
        gpu_LE[layer] = _exchange(load_LE[layer], gpu_LE[layer], num_gpus, least, most, target, until, rng)
    cost_L = load_LG(load_LE, gpu_LE, num_gpus).max(axis=1)

    small = load_LE.shape[1] * num_gpus <= PROGRAM_VARIABLES
    layers = open_layers() if programs and small and deadline is not None else []
    for done, layer in enumerate(layers):
        seconds = share(len(layers) - done)
        if seconds > 0:
            gpu_LE[layer], bound_L[layer] = _pack_program(
                load_LE[layer], gpu_LE[layer], num_gpus, least, most, bound_L[layer], seconds
            )
    cost_L = load_LG(load_LE, gpu_LE, num_gpus).max(axis=1)
    return gpu_LE, np.minimum(bound_L, cost_L)


def load_bound_L(load_LE: NDArray[np.floating], num_gpus: int, least: int, most: int) -> NDArray[np.float64]:
    """[L]: no assignment of `least` to `most` experts to each GPU has a smaller largest GPU load in the layer.

    Let s_1 ≥ … ≥ s_E be the loads, and light(n) the sum of the n smallest, which is no more than any n experts have
    together. A GPU has at least `least` experts, and at least E − (G − 1)·most, as the others take no more. The bound
    is the largest of these:

    - Mean: the largest is at least Σs / G.
    - Pigeonhole, for each j < ⌈E / G⌉: of the j·G + 1 largest experts some GPU has j + 1, which are together at least
      the j + 1 last of those, and least − j − 1 others.
    - Separation, for each k ≤ G: either two of the k largest experts share a GPU, which then has at least
      s_(k−1) + s_k + light(least − 2); or k GPUs have one each, and n = k·(least − 1) more experts. Then the most
      loaded of the k has at least their average, (s_1 + … + s_k + light(n)) / k; and the largest of the n, which is no
      lighter than the n-th lightest of all, is with an expert ≥ s_k and least − 2 others. The smaller of the two cases
      holds. k = 1 says: the largest expert and its lightest possible companions.
    - Multiples: where every load is a multiple of one unit (counts of tokens, or fractions of their number), so is
      every GPU's, and the bound is rounded up to one.
    """
    num_layers, num_experts = load_LE.shape
    least = max(least, num_experts - (num_gpus - 1) * most)
    s_LE = -np.sort(-np.asarray(load_LE, np.float64), axis=1)
    heavy_LE = np.concatenate([np.zeros((num_layers, 1)), s_LE.cumsum(axis=1)], axis=1)
    light_LE = np.concatenate([np.zeros((num_layers, 1)), s_LE[:, ::-1].cumsum(axis=1)], axis=1)

    bounds = [heavy_LE[:, -1] / num_gpus]
    for j in range(1, -(-num_experts // num_gpus)):
        last = j * num_gpus + 1
        bounds.append(heavy_LE[:, last] - heavy_LE[:, last - j - 1] + light_LE[:, max(least - j - 1, 0)])
    if least > 0:
        for k in range(1, num_gpus + 1):
            more = k * (least - 1)
            apart_L = (heavy_LE[:, k] + light_LE[:, more]) / k
            if least > 1:
                apart_L = np.maximum(apart_L, s_LE[:, k - 1] + s_LE[:, num_experts - more] + light_LE[:, least - 2])
            together_L = s_LE[:, k - 2] + s_LE[:, k - 1] + light_LE[:, max(least - 2, 0)] if k > 1 else np.inf
            bounds.append(np.minimum(apart_L, together_L))
    else:
        bounds.append(s_LE[:, 0])
    bound_L = np.maximum.reduce(bounds)
    return np.array([_round_up(bound, load_E) for bound, load_E in zip(bound_L, s_LE, strict=True)])


def check_shares(num_experts: int, num_gpus: int, least: int, most: int) -> None:
    """Raise PlacementError where the experts of a layer cannot be shared by `least` to `most` a GPU."""
    if not 0 <= least <= most or not num_gpus * least <= num_experts <= num_gpus * most:
        raise PlacementError(
            f"{num_experts} experts cannot be shared by {num_gpus} GPUs with {least} to {most} each; "
            f"that holds {num_gpus * least} to {num_gpus * most}"
        )


def _round_up(bound: float, load_E: NDArray[np.float64]) -> float:
    """The smallest sum of loads that may be ≥ bound, if all loads are multiples of one unit; else the bound."""
    negligible = 1e-7 * load_E[0]
    unit = 0.0
    for load in load_E:
        # Euclid's algorithm with the remainder of least size, as 3 × 0.1 must leave 0 of 0.3, not nearly 0.1.
        while load > negligible:
            unit, load = load, abs(unit - round(unit / load) * load)
        if 0 < unit <= negligible:
            return bound
    if unit == 0:
        return bound
    unit = load_E.sum() / np.rint(load_E / unit).sum()
    # By so much, in units, can a sum of loads differ from a multiple.
    error = float(np.abs(load_E / unit - np.rint(load_E / unit)).sum())
    # The bound is itself a rounded sum: a multiple may have come out a little above what it is.
    error += 1e-12 * bound / unit
    if error > 0.01:
        return bound
    return max(bound, (np.ceil(bound / unit - error) - error) * unit)


def _exchange(
    load_E: NDArray[np.floating],
    gpu_E: NDArray[np.int64],
    num_gpus: int,
    least: int,
    most: int,
    target: float,
    until: float,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Exchange experts until the largest load is ≤ target, nothing better has come of many kicks, or it is late."""
    return kicked(
        gpu_E,
        lambda gpu_E: _exchange_once(load_E, gpu_E, num_gpus, least, most),
        lambda gpu_E: float(np.bincount(gpu_E, load_E, num_gpus).max()),
        enough=target,
        negligible=TOLERANCE * target,
        kicks=_KICKS,
        until=until,
        rng=rng,
    )


def kicked(
    gpu_E: NDArray[np.int64],
    improve: Callable[[NDArray[np.int64]], bool],
    cost: Callable[[NDArray[np.int64]], float],
    *,
    enough: float,
    negligible: float,
    kicks: int,
    until: float,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Iterated local search over one layer: improve until nothing does, then exchange a few of the best at random.

    `improve` makes a step in place, and says whether there was one. It ends at a cost ≤ `enough`, after so many `kicks`
    in a row that won no more than `negligible`, or at the time `until` (of `time.monotonic()`).
    """
    best_E, best = gpu_E, cost(gpu_E)
    gpu_E = gpu_E.copy()
    in_vain = 0
    while time.monotonic() < until:
        if improve(gpu_E):
            continue
        found = cost(gpu_E)
        in_vain = 0 if found < best - negligible else in_vain + 1
        if found <= best:
            best_E, best = gpu_E, found
        if best <= enough or in_vain == kicks:
            break
        gpu_E = best_E.copy()
        for _ in range(rng.integers(1, 4)):
            one, other = rng.choice(len(gpu_E), 2, replace=False)
            gpu_E[[one, other]] = gpu_E[[other, one]]
    return best_E


def _exchange_once(load_E: NDArray[np.floating], gpu_E: Assignment, num_gpus: int, least: int, most: int) -> bool:
    """Make the best exchange between the most loaded GPU and another, in place; False if none lowers both."""
    experts_G = np.bincount(gpu_E, minlength=num_gpus)
    load_G = np.bincount(gpu_E, load_E, num_gpus)
    top = int(load_G.argmax())
    enough = load_G[top] * (1 - 1e-9)
    spare = experts_G[top] - least

    # Each GPU's experts, and empty slots (−1, load 0) where it may have more: an exchange with one is a move.
    slots = min(most, experts_G.max() + 2)
    by_gpu_E = np.argsort(gpu_E, kind="stable")
    slot_E = np.arange(len(gpu_E)) - (experts_G.cumsum() - experts_G)[gpu_E[by_gpu_E]]
    expert_GC = np.full((num_gpus, slots), -1)
    expert_GC[gpu_E[by_gpu_E], slot_E] = by_gpu_E
    load_GC = np.append(load_E, 0.0)[expert_GC]

    taken_GC = np.where((expert_GC >= 0) | (spare > 0), load_GC, np.inf)
    less_CGC = load_GC[top][:, None, None] - taken_GC
    peak_CGC = np.maximum(load_G[top] - less_CGC, load_G[:, None] + less_CGC)
    if peak_CGC.min() < enough:
        slot, gpu, other_slot = map(int, np.unravel_index(peak_CGC.argmin(), peak_CGC.shape))
        _swap(gpu_E, top, expert_GC[top, [slot]], gpu, expert_GC[gpu, [other_slot]])
        return True

    # The best pair for a pair is the next above or below what would make the two GPUs equal: one search finds it on all
    # GPUs if their pairs stand in rows far from each other.
    first_P, second_P = np.triu_indices(slots, 1)
    load_GP = load_GC[:, first_P] + load_GC[:, second_P]
    empty_GP = (expert_GC[:, first_P] < 0).astype(int) + (expert_GC[:, second_P] < 0)
    given_Q = np.flatnonzero(empty_GP[top] == 0)
    if not len(given_Q):
        return False
    taken_GP = np.where(empty_GP <= spare, load_GP, 2 * load_G[top])
    ascending_GP = taken_GP.argsort(axis=1)
    taken_GP = np.take_along_axis(taken_GP, ascending_GP, axis=1)
    wanted_GQ = load_GP[top, given_Q] - (load_G[top] - load_G)[:, None] / 2
    row_G = 4 * load_G[top] * np.arange(num_gpus)[:, None]
    above_GQ = (taken_GP + row_G).ravel().searchsorted(wanted_GQ + row_G) - len(first_P) * np.arange(num_gpus)[:, None]
    place_GQ = np.concatenate([above_GQ - 1, above_GQ], axis=1).clip(0, len(first_P) - 1)
    given_Q = np.concatenate([given_Q, given_Q])
    less_GQ = load_GP[top, given_Q] - np.take_along_axis(taken_GP, place_GQ, axis=1)
    peak_GQ = np.maximum(load_G[top] - less_GQ, load_G[:, None] + less_GQ)
    if peak_GQ.min() >= enough:
        return False
    gpu, choice = map(int, np.unravel_index(peak_GQ.argmin(), peak_GQ.shape))
    given, taken = given_Q[choice], ascending_GP[gpu, place_GQ[gpu, choice]]
    its, others = expert_GC[top, [first_P[given], second_P[given]]], expert_GC[gpu, [first_P[taken], second_P[taken]]]
    _swap(gpu_E, top, its, gpu, others)
    return True


def _swap(gpu_E: Assignment, one: int, its: NDArray[np.int64], other: int, others: NDArray[np.int64]) -> None:
    gpu_E[its[its >= 0]] = other
    gpu_E[others[others >= 0]] = one


class PackingProgram:
    """A layer's assignments as an integer program without an objective: x_eg = 1 where expert e is on GPU g.

    GPUs are alike, so they are numbered in the order in which they get their first of the experts, heaviest first:
    expert e is on one of the GPUs 0 to e, and on GPU g only if one of the experts before e is on g − 1.
    """

    def __init__(
        self, load_E: NDArray[np.floating], incumbent_E: NDArray[np.int64], num_gpus: int, least: int, most: int
    ):
        """`incumbent_E`: the assignment of which the variables get their initial values."""
        self.mean = float(load_E.sum()) / num_gpus
        self.heaviest_first_E = np.argsort(-load_E, kind="stable")
        load_E = load_E[self.heaviest_first_E] / self.mean
        incumbent = incumbent_E[self.heaviest_first_E].tolist()
        number = {gpu: number for number, gpu in enumerate(dict.fromkeys(incumbent))}

        self.program = pulp.LpProblem("packing", pulp.LpMinimize)
        self.x: list[list[pulp.LpVariable]] = []
        for expert, gpu in enumerate(incumbent):
            x_G = [
                self.program.add_variable(f"x_{expert}_{g}", cat=pulp.LpBinary)
                for g in range(min(expert + 1, num_gpus))
            ]
            for g, x in enumerate(x_G):
                x.setInitialValue(int(g == number[gpu]))
            self.program += pulp.lpSum(x_G) == 1
            for g in range(1, len(x_G)):
                self.program += x_G[g] <= pulp.lpSum(before_G[g - 1] for before_G in self.x[g - 1 :])
            self.x.append(x_G)
        experts_G = [[x_G[g] for x_G in self.x[g:]] for g in range(num_gpus)]
        for experts in experts_G:
            self.program += pulp.lpSum(experts) >= least
            self.program += pulp.lpSum(experts) <= most
        self.load_G = [pulp.lpDot(load_E[g:].tolist(), experts) for g, experts in enumerate(experts_G)]
        """The load of each GPU, of which the mean is 1."""

    def assignment(self) -> NDArray[np.int64]:
        """[E]: the GPU of each expert, by the variables' values."""
        gpu_E = np.empty(len(self.x), np.int64)
        gpu_E[self.heaviest_first_E] = [int(np.argmax([x.value() for x in x_G])) for x_G in self.x]
        return gpu_E


def _pack_program(
    load_E: NDArray[np.floating],
    gpu_E: NDArray[np.int64],
    num_gpus: int,
    least: int,
    most: int,
    bound: float,
    seconds: float,
) -> tuple[NDArray[np.int64], float]:
    """The better of gpu_E and what min T subject to Σ_e load_e·x_eg ≤ T finds in so many seconds, and a bound."""
    packing = PackingProgram(load_E, gpu_E, num_gpus, least, most)
    cost = np.bincount(gpu_E, load_E).max()
    largest = packing.program.add_variable("largest", lowBound=bound / packing.mean)
    largest.setInitialValue(cost / packing.mean)
    packing.program += largest
    for load in packing.load_G:
        packing.program += load <= largest
    outcome = minimise(packing.program, seconds, TOLERANCE)
    bound = max(bound, (outcome.bound - 1e-6) * packing.mean)
    if outcome.found:
        found_E = packing.assignment()
        if np.bincount(found_E, load_E).max() < cost:
            return found_E, bound
    return gpu_E, bound
