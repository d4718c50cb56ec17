"""MoETuner (Go and Mahajan, arXiv 2502.06643): experts into clusters of even load, then clusters onto GPUs, by two
integer programs one after the other.

Of the paper this follows its abstract and two public accounts of its method, which agree on the programs; its own text
was not at hand. With P_el the tokens of expert e in layer l, R_efl those that go from e in layer l to f in layer l + 1,
and B_gh the bandwidth from GPU g to GPU h:

- Stage 1, each layer: x_cel = 1 where expert e is in cluster c, every expert in one cluster, no cluster empty;

      T_cl = Σ_e P_el x_cel,   minimise Σ_l Σ_c |T_cl − T̄_l|,   T̄_l = Σ_e P_el / G.

- Stage 2: C_cdl = Σ_ef R_efl x_cel x_df(l+1) is then fixed; y_cgl = 1 where cluster c is on GPU g, one to one;

      minimise Σ_l max_{c, d, g, h} (C_cdl / B_gh) y_cgl y_dh(l+1).

  What stays on a GPU costs nothing. The paper also asks for equally many experts on each GPU over all layers together;
  here every GPU has `least` to `most` of every layer, and with E / G that is the same.

The `moetuner` objective is these two numbers in this order: see :class:`Cost`.

Shapes: L MoE layers, E experts, G GPUs and clusters, N permutations or exchanges tried, W prices of links.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import pulp
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse import csgraph

from moetrain.placement.load import PROGRAM_VARIABLES, TOLERANCE, PackingProgram, check_shares, kicked, pack_lpt
from moetrain.placement.placement import Assignment
from moetrain.placement.program import minimise
from moetrain.placement.statistics import load_LG

Floats = NDArray[np.float64]

_PROGRAM_SIZE = 50_000
"""Integer programs with more variables and constraints than this finish nothing in minutes."""
_FEW_GPUS = 5
"""All permutations of so many GPUs can be tried in a layer against all in the next."""
_KICKS = 30
"""So many disturbances in a row that lead to nothing better end the search of stage 1."""


@dataclass(frozen=True, order=True)
class Cost:
    """Compares as the paper optimises: balance first, and links only where balance is the same."""

    deviation: float
    """Σ_l Σ_g |load − mean load|, in the unit of the loads."""
    links: float
    """Σ over layer boundaries of the busiest link's tokens × cost a token."""


@dataclass(frozen=True, eq=False)
class Tuned:
    """What the two stages found. The bound on links holds for the clusters of stage 1, as the paper's program does."""

    gpu_LE: Assignment
    cost: Cost
    bound: Cost


def tune(
    load_LE: Floats,
    transitions_LEE: Floats,
    link_cost_GG: Floats,
    least: int,
    most: int,
    deadline: float,
    start: Assignment | None = None,
    seed: int = 0,
    balanced: Callable[[Assignment], object] | None = None,
) -> Tuned:
    """Both stages, by heuristics and then by their programs, until `deadline` (of `time.monotonic()`).

    `transitions_LEE` [L − 1, E, E] are tokens, or fractions of them, between neighbouring layers; `link_cost_GG` is
    1 / bandwidth in any unit, as `Topology.distance_GG` or `seconds_per_byte_GG`, 0 on the diagonal. Stage 1 has half
    of the time; `balanced` is called with what it ends with. The result is never worse than `start`. Raises
    PlacementError where E experts cannot be shared by `least` to `most`.
    """
    num_gpus = len(link_cost_GG)
    check_shares(load_LE.shape[1], num_gpus, least, most)
    now = time.monotonic()
    cluster_LE, deviation_bound = cluster(
        load_LE, num_gpus, least, most, now + max(deadline - now, 0) / 2, start=start, seed=seed
    )
    if balanced is not None:
        balanced(cluster_LE)
    gpu_LE, links_bound = assign_clusters(cluster_LE, transitions_LEE, link_cost_GG, deadline)

    def cost(assignment: Assignment) -> Cost:
        return Cost(deviation(load_LE, assignment, num_gpus), links(transitions_LEE, link_cost_GG, assignment))

    if start is not None and cost(start) < cost(gpu_LE):
        gpu_LE = start
    return Tuned(gpu_LE, cost(gpu_LE), Cost(deviation_bound, links_bound))


def deviation(load_LE: Floats, gpu_LE: Assignment, num_gpus: int) -> float:
    """Stage 1's objective: Σ_l Σ_g |T_gl − T̄_l|."""
    loads_LG = load_LG(load_LE, gpu_LE, num_gpus)
    return float(np.abs(loads_LG - loads_LG.mean(axis=1, keepdims=True)).sum())


def links(transitions_LEE: Floats, link_cost_GG: Floats, gpu_LE: Assignment) -> float:
    """Stage 2's objective: Σ over boundaries of the largest (tokens from g to h) × link_cost_gh."""
    tokens_LGG = _between_groups(transitions_LEE, gpu_LE, len(link_cost_GG))
    return float((tokens_LGG * link_cost_GG).max(axis=(1, 2)).sum())


# Stage 1.


def cluster(
    load_LE: Floats,
    num_gpus: int,
    least: int,
    most: int,
    deadline: float,
    start: Assignment | None = None,
    seed: int = 0,
) -> tuple[Assignment, float]:
    """Stage 1: clusters [L, E] of the least Σ|T_cl − T̄_l| found, and a bound on it. No cluster need be empty.

    Each layer is exchanged into shape from longest processing time first, or from `start` if that is better; then the
    program has an equal share of the time for each layer that is further from its bound than TOLERANCE of its load.
    """
    rng = np.random.default_rng(seed)
    cluster_LE = pack_lpt(load_LE, num_gpus, least, most)
    bound = 0.0
    for layer, load_E in enumerate(load_LE):
        until = time.monotonic() + max(deadline - time.monotonic(), 0) / (len(load_LE) - layer)
        lower = _deviation_bound(load_E, num_gpus, least, most)
        enough = lower + TOLERANCE * load_E.sum()
        candidates = [cluster_LE[layer]] if start is None else [cluster_LE[layer], start[layer]]
        best_E = min(candidates, key=lambda cluster_E: _deviation(load_E, cluster_E, num_gpus))
        best_E = _even_out(load_E, best_E, num_gpus, least, most, enough, until, rng)
        seconds = until - time.monotonic()
        small = len(load_E) * num_gpus <= PROGRAM_VARIABLES
        if small and seconds > 0 and _deviation(load_E, best_E, num_gpus) > enough:
            best_E, lower = _cluster_program(load_E, best_E, num_gpus, least, most, lower, seconds)
        cluster_LE[layer] = best_E
        bound += min(lower, _deviation(load_E, best_E, num_gpus))
    return cluster_LE, bound


def _deviation(load_E: Floats, cluster_E: NDArray[np.int64], num_gpus: int) -> float:
    return deviation(load_E[None], cluster_E[None], num_gpus)


def _deviation_bound(load_E: Floats, num_gpus: int, least: int, most: int) -> float:
    """No clusters deviate less in this layer.

    Σ|T − T̄| = 2 Σ max(T − T̄, 0), and this sum is at least Σ(T − T̄) over any of the clusters. Take those, j of them,
    that have the k heaviest experts, for any k: they have at least these, and with them the j·least − k lightest.
    """
    heavy_k = np.sort(load_E)[::-1].cumsum()
    light_n = np.append(0.0, np.sort(load_E).cumsum())
    mean = heavy_k[-1] / num_gpus
    bound = 0.0
    for k in range(1, min(num_gpus, len(load_E)) + 1):
        clusters = np.arange(-(-k // max(most, 1)), k + 1)
        companions = np.maximum(clusters * least - k, 0)
        bound = max(bound, 2 * (heavy_k[k - 1] + light_n[companions] - clusters * mean).min())
    return float(bound)


def _even_out(
    load_E: Floats,
    cluster_E: NDArray[np.int64],
    num_gpus: int,
    least: int,
    most: int,
    enough: float,
    until: float,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Exchange two experts, or move one, while that lowers the deviation; kick, and go on from the best."""
    return kicked(
        cluster_E,
        lambda cluster_E: _even_out_once(load_E, cluster_E, num_gpus, least, most),
        lambda cluster_E: _deviation(load_E, cluster_E, num_gpus),
        enough=enough,
        negligible=TOLERANCE * float(load_E.sum()),
        kicks=_KICKS,
        until=until,
        rng=rng,
    )


def _even_out_once(load_E: Floats, cluster_E: NDArray[np.int64], num_gpus: int, least: int, most: int) -> bool:
    """Make the best exchange of two experts or move of one, in place; False if none lowers the deviation."""
    load_G = np.bincount(cluster_E, load_E, num_gpus)
    experts_G = np.bincount(cluster_E, minlength=num_gpus)
    over_G = load_G - load_G.mean()
    over_E = over_G[cluster_E]
    less_EE = load_E[:, None] - load_E
    swap_EE = np.abs(over_E[:, None] - less_EE) + np.abs(over_E + less_EE) - np.abs(over_E[:, None]) - np.abs(over_E)
    swap_EE[cluster_E[:, None] == cluster_E] = 0.0
    move_EG = (
        np.abs(over_E[:, None] - load_E[:, None])
        + np.abs(over_G + load_E[:, None])
        - np.abs(over_E[:, None])
        - np.abs(over_G)
    )
    allowed_EG = (experts_G[cluster_E] > least)[:, None] & (experts_G < most)
    allowed_EG[np.arange(len(load_E)), cluster_E] = False
    move_EG = np.where(allowed_EG, move_EG, 0.0)
    if min(swap_EE.min(), move_EG.min()) >= -1e-9 * load_G.mean():
        return False
    if swap_EE.min() <= move_EG.min():
        one, other = np.unravel_index(swap_EE.argmin(), swap_EE.shape)
        cluster_E[[one, other]] = cluster_E[[other, one]]
    else:
        one, gpu = np.unravel_index(move_EG.argmin(), move_EG.shape)
        cluster_E[one] = gpu
    return True


def _cluster_program(
    load_E: Floats,
    cluster_E: NDArray[np.int64],
    num_gpus: int,
    least: int,
    most: int,
    bound: float,
    seconds: float,
) -> tuple[NDArray[np.int64], float]:
    """The better of cluster_E and what the paper's program finds in so many seconds, and a bound.

    Σ|T − T̄| is twice the sum of what is above the mean, which takes one variable a cluster.
    """
    packing = PackingProgram(load_E, cluster_E, num_gpus, least, most)
    above_G = []
    for number, load in enumerate(packing.load_G):
        above = packing.program.add_variable(f"above_{number}", lowBound=0)
        above.setInitialValue(max(load.value() - 1, 0.0))
        packing.program += above >= load - 1
        above_G.append(above)
    packing.program += 2 * pulp.lpSum(above_G)
    packing.program += 2 * pulp.lpSum(above_G) >= bound / packing.mean
    outcome = minimise(packing.program, seconds)
    bound = max(bound, (outcome.bound - 1e-6 * num_gpus) * packing.mean)
    if outcome.found:
        found_E = packing.assignment()
        if _deviation(load_E, found_E, num_gpus) < _deviation(load_E, cluster_E, num_gpus):
            return found_E, bound
    return cluster_E, bound


# Stage 2.


def assign_clusters(
    cluster_LE: Assignment, transitions_LEE: Floats, link_cost_GG: Floats, deadline: float
) -> tuple[Assignment, float]:
    """Stage 2: the clusters on GPUs, one to one in each layer, [L, E], and a bound on :func:`links` for any such.

    Exact for few GPUs. For more, clusters of a layer change places while that pays, from the better of the numbering
    that is there and a front-to-back construction; then the program has what is left of the time.
    """
    num_gpus = len(link_cost_GG)
    tokens_LGG = _between_groups(transitions_LEE, cluster_LE, num_gpus)

    def cost(gpu_LG: NDArray[np.int64]) -> float:
        return float(_links_L(gpu_LG, tokens_LGG, link_cost_GG).sum())

    if num_gpus <= _FEW_GPUS:
        gpu_LG = _exact(tokens_LGG, link_cost_GG)
        bound = cost(gpu_LG)
    else:
        bound = _links_bound(tokens_LGG, link_cost_GG)
        as_numbered_LG = np.tile(np.arange(num_gpus), (len(cluster_LE), 1))
        start_LG = min(as_numbered_LG, _front_to_back(tokens_LGG, link_cost_GG), key=cost)
        gpu_LG = _improve(start_LG, tokens_LGG, link_cost_GG, deadline)
        size = len(cluster_LE) * num_gpus**2 + len(tokens_LGG) * num_gpus**3
        seconds = deadline - time.monotonic()
        if size <= _PROGRAM_SIZE and seconds > 0 and cost(gpu_LG) > bound * (1 + TOLERANCE):
            gpu_LG, bound = _links_program(gpu_LG, tokens_LGG, link_cost_GG, bound, seconds)
    return np.take_along_axis(gpu_LG, cluster_LE, axis=1), float(min(bound, cost(gpu_LG)))


def _between_groups(transitions_LEE: Floats, group_LE: Assignment, num_groups: int) -> Floats:
    """[L − 1, G, G]: the tokens from each group of a layer to each of the next."""
    member_LEG = (group_LE[:, :, None] == np.arange(num_groups)).astype(np.float64)
    return member_LEG[:-1].transpose(0, 2, 1) @ transitions_LEE @ member_LEG[1:]


def _links_L(gpu_LG: NDArray[np.int64], tokens_LGG: Floats, link_cost_GG: Floats) -> Floats:
    """[L − 1]: the busiest link of each boundary, with cluster c of layer l on GPU gpu_LG[l, c]."""
    cost_LGG = link_cost_GG[gpu_LG[:-1, :, None], gpu_LG[1:, None, :]]
    return (tokens_LGG * cost_LGG).max(axis=(1, 2), initial=0.0)


def _links_bound(tokens_LGG: Floats, link_cost_GG: Floats) -> float:
    """Σ over boundaries of the least that the busiest link can cost, each boundary on its own.

    Take any price w of a link. GPUs that cheaper links join are islands, the largest of size S_w (1 for the lowest
    price). Join clusters of the two layers in descending order of the tokens between them: as soon as more than S_w
    clusters of one layer hang together, not all of these pairs are within islands, and one of them takes a link of w or
    more. Where all links cost the same, layers' clusters can be matched one boundary after the other, and the bound is
    reached.
    """
    num_gpus = len(link_cost_GG)
    price_W = np.unique(link_cost_GG[~np.eye(num_gpus, dtype=bool)])
    island_W = np.array([_largest_island(link_cost_GG < price) for price in price_W])
    total = 0.0
    for tokens_GG in tokens_LGG:
        joined = [{("before", g)} for g in range(num_gpus)] + [{("after", h)} for h in range(num_gpus)]
        largest, busiest = 1, 0.0
        for flat in np.argsort(-tokens_GG, axis=None).tolist():
            g, h = divmod(flat, num_gpus)
            if joined[g] is not joined[num_gpus + h]:
                together = joined[g] | joined[num_gpus + h]
                for side, number in together:
                    joined[number + num_gpus * (side == "after")] = together
                before = sum(side == "before" for side, _ in together)
                largest = max(largest, before, len(together) - before)
            dearest = int(island_W.searchsorted(largest)) - 1
            if dearest >= 0:
                busiest = max(busiest, price_W[dearest] * tokens_GG[g, h])
            if dearest == len(price_W) - 1:
                break
        total += busiest
    return total


def _largest_island(joined_GG: NDArray[np.bool_]) -> int:
    _, island_G = csgraph.connected_components(sparse.csr_array(joined_GG), directed=False)
    return int(np.bincount(island_G).max())


def _exact(tokens_LGG: Floats, link_cost_GG: Floats) -> NDArray[np.int64]:
    """The least of all placements, layer by layer over all permutations of the GPUs: for few GPUs."""
    gpu_NG = np.array(list(permutations(range(len(link_cost_GG)))))
    cost_N = np.zeros(len(gpu_NG))
    best_before_LN = []
    for tokens_GG in tokens_LGG:
        step_NN = [
            (tokens_GG[:, None] * link_cost_GG[gpu_G][:, gpu_NG]).max(axis=(0, 2)) + cost
            for gpu_G, cost in zip(gpu_NG, cost_N, strict=True)
        ]
        best_before_LN.append(np.argmin(step_NN, axis=0))
        cost_N = np.min(step_NN, axis=0)
    chosen = [int(cost_N.argmin())]
    for best_before_N in reversed(best_before_LN):
        chosen.append(int(best_before_N[chosen[-1]]))
    return gpu_NG[chosen[::-1]]


def _front_to_back(tokens_LGG: Floats, link_cost_GG: Floats) -> NDArray[np.int64]:
    """The first layer as numbered; each next one so that the busiest link from the one before costs least, and among
    such, so that all clusters' busiest links together do."""
    num_gpus = len(link_cost_GG)
    gpu_LG = [np.arange(num_gpus)]
    for tokens_GG in tokens_LGG:
        # The next layer's cluster d on GPU h: its busiest link from any cluster.
        cost_GG = (tokens_GG[:, :, None] * link_cost_GG[gpu_LG[-1]][:, None, :]).max(axis=0)
        levels = np.unique(cost_GG)
        low, high = 0, len(levels) - 1
        while low < high:
            middle = (low + high) // 2
            graph = sparse.csr_array(cost_GG <= levels[middle])
            if (csgraph.maximum_bipartite_matching(graph) >= 0).all():
                high = middle
            else:
                low = middle + 1
        forbidden = 1 + num_gpus * levels[-1]
        _, gpu_G = linear_sum_assignment(np.where(cost_GG <= levels[low], cost_GG, forbidden))
        gpu_LG.append(gpu_G)
    return np.stack(gpu_LG)


def _improve(gpu_LG: NDArray[np.int64], tokens_LGG: Floats, link_cost_GG: Floats, deadline: float) -> NDArray[np.int64]:
    """Let two clusters of a layer change places, the best two each time, until none of any layer gain by it."""
    gpu_LG = gpu_LG.copy()
    num_layers, num_gpus = gpu_LG.shape
    first_N, second_N = np.triu_indices(num_gpus, 1)
    number_N = np.arange(len(first_N))
    unimproved, layer = 0, 0
    while unimproved < num_layers and time.monotonic() < deadline:
        tried_NG = np.tile(gpu_LG[layer], (len(first_N) + 1, 1))
        tried_NG[number_N, first_N], tried_NG[number_N, second_N] = gpu_LG[layer, second_N], gpu_LG[layer, first_N]
        cost_N = np.zeros(len(tried_NG))
        for number, gpu_G in enumerate(tried_NG):
            if layer > 0:
                cost_N[number] += (tokens_LGG[layer - 1] * link_cost_GG[gpu_LG[layer - 1]][:, gpu_G]).max()
            if layer < num_layers - 1:
                cost_N[number] += (tokens_LGG[layer] * link_cost_GG[gpu_G][:, gpu_LG[layer + 1]]).max()
        if cost_N.min() < cost_N[-1] * (1 - 1e-9):
            gpu_LG[layer] = tried_NG[cost_N.argmin()]
            unimproved = 0
        else:
            unimproved += 1
            layer = (layer + 1) % num_layers
    return gpu_LG


def _links_program(
    gpu_LG: NDArray[np.int64], tokens_LGG: Floats, link_cost_GG: Floats, bound: float, seconds: float
) -> tuple[NDArray[np.int64], float]:
    """The better of gpu_LG and what the paper's program finds in so many seconds, and a bound.

    The products of two y are not variables: where cluster c is on g, the link from g to h costs what the one cluster
    on h gets from c. That takes G³ constraints a boundary, not G⁴, and is tighter. Where two GPUs may change names in
    every layer at no cost, as two of a node may, the first layer's clusters are in order on them.
    """
    num_layers, num_gpus = gpu_LG.shape
    gpu_LG = _in_order(gpu_LG, link_cost_GG)
    scale = _links_L(gpu_LG, tokens_LGG, link_cost_GG).sum() / max(num_layers - 1, 1)
    program = pulp.LpProblem("links", pulp.LpMinimize)
    y = [
        [
            [program.add_variable(f"y_{layer}_{c}_{g}", cat=pulp.LpBinary) for g in range(num_gpus)]
            for c in range(num_gpus)
        ]
        for layer in range(num_layers)
    ]
    for layer in range(num_layers):
        for c in range(num_gpus):
            program += pulp.lpSum(y[layer][c]) == 1
            program += pulp.lpSum(y[layer][d][c] for d in range(num_gpus)) == 1
            for g in range(num_gpus):
                y[layer][c][g].setInitialValue(int(gpu_LG[layer, c] == g))
    for g, h in _twins(link_cost_GG):
        place_g, place_h = (pulp.lpSum(c * y[0][c][gpu] for c in range(num_gpus)) for gpu in (g, h))
        program += place_g + 1 <= place_h
    busiest = []
    cost_L = _links_L(gpu_LG, tokens_LGG, link_cost_GG) / scale
    for layer, tokens_GG in enumerate(tokens_LGG / scale):
        busiest.append(program.add_variable(f"busiest_{layer}", lowBound=0))
        busiest[-1].setInitialValue(cost_L[layer])
        for c in range(num_gpus):
            for g in range(num_gpus):
                for h in range(num_gpus):
                    if g != h:
                        cost_G = link_cost_GG[g, h] * tokens_GG[c]
                        on_h = pulp.lpSum(float(cost_G[d]) * y[layer + 1][d][h] for d in range(num_gpus))
                        program += busiest[-1] >= on_h - float(cost_G.max()) * (1 - y[layer][c][g])
    program += pulp.lpSum(busiest)
    program += pulp.lpSum(busiest) >= bound / scale
    outcome = minimise(program, seconds)
    bound = max(bound, (outcome.bound - 1e-6 * len(busiest)) * scale)
    if outcome.found:
        found_LG = np.array([[int(np.argmax([x.value() for x in y_G])) for y_G in y_GG] for y_GG in y])
        before = _links_L(gpu_LG, tokens_LGG, link_cost_GG).sum()
        if _links_L(found_LG, tokens_LGG, link_cost_GG).sum() < before:
            return found_LG, bound
    return gpu_LG, bound


def _twins(link_cost_GG: Floats) -> list[tuple[int, int]]:
    """GPUs g < h, each next in its class, that may change names: their links to all others and to each other agree."""
    num_gpus = len(link_cost_GG)
    pairs = []
    for h in range(num_gpus):
        for g in reversed(range(h)):
            renamed = np.arange(num_gpus)
            renamed[[g, h]] = h, g
            if np.array_equal(link_cost_GG[renamed][:, renamed], link_cost_GG):
                pairs.append((g, h))
                break
    return pairs


def _in_order(gpu_LG: NDArray[np.int64], link_cost_GG: Floats) -> NDArray[np.int64]:
    """The same placement, at the same cost, with the GPUs of each class of twins named so that the first layer's
    clusters are in order on them."""
    name_G = np.arange(len(link_cost_GG))
    classes: dict[int, list[int]] = {}
    root = name_G.copy()
    for g, h in _twins(link_cost_GG):
        root[h] = root[g]
    for gpu in range(len(name_G)):
        classes.setdefault(int(root[gpu]), []).append(gpu)
    cluster_on_G = np.argsort(gpu_LG[0])
    for gpus in classes.values():
        name_G[sorted(gpus, key=lambda gpu: cluster_on_G[gpu])] = gpus
    return name_G[gpu_LG]
