"""MoETuner's two stages against exhaustive search and against the paper's programs, transcribed as they stand."""

import time
from itertools import combinations, permutations, product

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.errors import PlacementError
from moetrain.placement import moetuner
from moetrain.placement.moetuner import Cost, assign_clusters, cluster, deviation, links, tune
from moetrain.placement.program import Outcome, minimise


def soon(seconds: float = 20) -> float:
    return time.monotonic() + seconds


def draw_transitions(rng: np.random.Generator, num_layers: int, num_experts: int) -> np.ndarray:
    """Fractions of tokens [L − 1, E, E], few of them large."""
    joint = rng.dirichlet(np.full(num_experts**2, 0.2), size=num_layers - 1)
    return joint.reshape(-1, num_experts, num_experts)


def nodes_of(num_gpus: int, size: int, across: float) -> np.ndarray:
    """Link costs: 1 within a node, `across` between nodes."""
    node_G = np.arange(num_gpus) // size
    cost_GG = np.where(node_G[:, None] == node_G, 1.0, across)
    np.fill_diagonal(cost_GG, 0)
    return cost_GG


def unlike_links(rng: np.random.Generator, num_gpus: int) -> np.ndarray:
    cost_GG = rng.uniform(1, 9, (num_gpus, num_gpus))
    np.fill_diagonal(cost_GG, 0)
    return cost_GG


def all_clusters(num_experts: int, num_gpus: int, least: int, most: int) -> list[tuple[int, ...]]:
    return [
        cluster_E
        for cluster_E in product(range(num_gpus), repeat=num_experts)
        if all(least <= cluster_E.count(gpu) <= most for gpu in range(num_gpus))
    ]


def least_deviation(load_LE: np.ndarray, num_gpus: int, least: int, most: int) -> float:
    candidates = all_clusters(load_LE.shape[1], num_gpus, least, most)
    return sum(
        min(
            sum(abs(load_E[np.equal(cluster_E, gpu)].sum() - load_E.sum() / num_gpus) for gpu in range(num_gpus))
            for cluster_E in candidates
        )
        for load_E in load_LE
    )


def busiest_links(transitions_LEE: np.ndarray, link_cost_GG: np.ndarray, gpu_LE: np.ndarray) -> float:
    """Stage 2's objective, expert by expert."""
    total = 0.0
    for layer, transitions_EE in enumerate(transitions_LEE):
        cost_GG = np.zeros_like(link_cost_GG)
        for (e, f), tokens in np.ndenumerate(transitions_EE):
            g, h = gpu_LE[layer, e], gpu_LE[layer + 1, f]
            cost_GG[g, h] += tokens * link_cost_GG[g, h]
        total += cost_GG.max()
    return total


def least_links(cluster_LE: np.ndarray, transitions_LEE: np.ndarray, link_cost_GG: np.ndarray) -> float:
    named = list(permutations(range(len(link_cost_GG))))
    return min(
        busiest_links(transitions_LEE, link_cost_GG, np.take_along_axis(np.array(gpu_LG), cluster_LE, axis=1))
        for gpu_LG in product(named, repeat=len(cluster_LE))
    )


# The programs of the paper.


def papers_first_program(load_LE: np.ndarray, num_gpus: int, least: int, most: int) -> float:
    """minimise Σ_l Σ_c |T_cl − T̄_l|."""
    layers, experts, clusters = range(load_LE.shape[0]), range(load_LE.shape[1]), range(num_gpus)
    problem = pulp.LpProblem("clusters")
    x = {
        (c, e, layer): problem.add_variable(f"x_{c}_{e}_{layer}", cat="Binary")
        for c, e, layer in product(clusters, experts, layers)
    }
    away = {(c, layer): problem.add_variable(f"away_{c}_{layer}", 0) for c, layer in product(clusters, layers)}
    problem += pulp.lpSum(away.values())
    for layer in layers:
        mean = float(load_LE[layer].sum()) / num_gpus
        for e in experts:
            problem += pulp.lpSum(x[c, e, layer] for c in clusters) == 1
        for c in clusters:
            load = pulp.lpSum(float(load_LE[layer, e]) * x[c, e, layer] for e in experts)
            problem += away[c, layer] >= load - mean
            problem += away[c, layer] >= mean - load
            problem += pulp.lpSum(x[c, e, layer] for e in experts) >= least
            problem += pulp.lpSum(x[c, e, layer] for e in experts) <= most
    outcome = minimise(problem, 60)
    assert outcome.bound == pytest.approx(pulp.value(problem.objective), abs=1e-6), "not solved to optimality"
    return pulp.value(problem.objective)


def papers_second_program(cluster_LE: np.ndarray, transitions_LEE: np.ndarray, link_cost_GG: np.ndarray) -> float:
    """minimise Σ_l max_{c, d, g, h} C_cdl / B_gh · y_cgl · y_dh(l+1), with a variable for each product."""
    gpus, layers = range(len(link_cost_GG)), range(len(cluster_LE))
    problem = pulp.LpProblem("gpus")
    y = {
        (c, g, layer): problem.add_variable(f"y_{c}_{g}_{layer}", cat="Binary")
        for c, g, layer in product(gpus, gpus, layers)
    }
    largest = [problem.add_variable(f"largest_{layer}", 0) for layer in layers[:-1]]
    problem += pulp.lpSum(largest)
    for layer in layers:
        for one in gpus:
            problem += pulp.lpSum(y[one, g, layer] for g in gpus) == 1
            problem += pulp.lpSum(y[c, one, layer] for c in gpus) == 1
    for layer in layers[:-1]:
        for c, d, g, h in product(gpus, repeat=4):
            tokens = transitions_LEE[layer][np.ix_(cluster_LE[layer] == c, cluster_LE[layer + 1] == d)].sum()
            both = problem.add_variable(f"both_{c}_{d}_{g}_{h}_{layer}", 0)
            problem += both >= y[c, g, layer] + y[d, h, layer + 1] - 1
            problem += largest[layer] >= float(tokens * link_cost_GG[g, h]) * both
    outcome = minimise(problem, 60)
    assert outcome.bound == pytest.approx(pulp.value(problem.objective), abs=1e-6), "not solved to optimality"
    return pulp.value(problem.objective)


@pytest.mark.parametrize(("num_experts", "num_gpus", "least", "most"), [(6, 3, 2, 2), (6, 3, 1, 4), (8, 2, 4, 4)])
def test_both_stages_are_the_papers_programs(num_experts: int, num_gpus: int, least: int, most: int) -> None:
    rng = np.random.default_rng(num_experts + num_gpus + most)
    load_LE = rng.dirichlet(np.full(num_experts, 0.8), size=3)
    transitions_LEE = draw_transitions(rng, 3, num_experts)
    link_cost_GG = unlike_links(rng, num_gpus)
    tuned = tune(load_LE, transitions_LEE, link_cost_GG, least, most, soon())
    assert tuned.cost.deviation == pytest.approx(papers_first_program(load_LE, num_gpus, least, most), abs=1e-5)
    cluster_LE, bound = cluster(load_LE, num_gpus, least, most, soon())
    second = papers_second_program(cluster_LE, transitions_LEE, link_cost_GG)
    assert links(
        transitions_LEE, link_cost_GG, assign_clusters(cluster_LE, transitions_LEE, link_cost_GG, soon())[0]
    ) == (pytest.approx(second, abs=1e-5))
    assert tuned.bound.deviation == pytest.approx(bound)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 3), st.data())
def test_stage_one_is_exhaustive_search_on_small_layers(seed: int, num_gpus: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    num_experts = data.draw(st.integers(num_gpus, 7))
    least = data.draw(st.integers(0, num_experts // num_gpus))
    most = data.draw(st.integers(-(-num_experts // num_gpus), num_experts))
    load_LE = rng.lognormal(0, rng.uniform(0.2, 2), (2, num_experts))
    load_LE /= load_LE.sum(1, keepdims=True)
    optimum_L = [least_deviation(load_LE[layer : layer + 1], num_gpus, least, most) for layer in range(2)]
    for load_E, layers_optimum in zip(load_LE, optimum_L, strict=True):
        assert moetuner._deviation_bound(load_E, num_gpus, least, most) <= layers_optimum + 1e-12
    optimum = sum(optimum_L)
    cluster_LE, bound = cluster(load_LE, num_gpus, least, most, soon())
    assert all(least <= np.bincount(row, minlength=num_gpus).min() for row in cluster_LE)
    assert all(np.bincount(row).max() <= most for row in cluster_LE)
    assert optimum - 1e-9 <= deviation(load_LE, cluster_LE, num_gpus) <= optimum + 2 * moetuner.TOLERANCE + 1e-9
    assert optimum - 2 * moetuner.TOLERANCE - 1e-4 <= bound <= optimum + 1e-9


@pytest.mark.parametrize(("num_layers", "num_gpus"), [(2, 2), (4, 2), (4, 3), (2, 4)])
def test_stage_two_is_exhaustive_search_on_few_gpus(num_layers: int, num_gpus: int) -> None:
    rng = np.random.default_rng(num_layers + 10 * num_gpus)
    cluster_LE = np.stack([rng.permutation(np.arange(2 * num_gpus) % num_gpus) for _ in range(num_layers)])
    transitions_LEE = draw_transitions(rng, num_layers, 2 * num_gpus)
    for link_cost_GG in (unlike_links(rng, num_gpus), nodes_of(num_gpus, 2, 9.0)):
        optimum = least_links(cluster_LE, transitions_LEE, link_cost_GG)
        gpu_LE, bound = assign_clusters(cluster_LE, transitions_LEE, link_cost_GG, soon())
        assert bound == pytest.approx(optimum)
        assert links(transitions_LEE, link_cost_GG, gpu_LE) == pytest.approx(optimum)
        assert busiest_links(transitions_LEE, link_cost_GG, gpu_LE) == pytest.approx(optimum)
        np.testing.assert_array_equal(  # clusters stay together
            gpu_LE[:, :, None] == gpu_LE[:, None], cluster_LE[:, :, None] == cluster_LE[:, None]
        )


@pytest.mark.parametrize("size", [2, 4, None])
def test_with_many_gpus_search_program_and_bounds_bracket_the_optimum(
    size: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four GPUs taken for many, so that what dynamic programming finds can be compared with."""
    rng = np.random.default_rng(0)
    link_cost_GG = unlike_links(rng, 4) if size is None else nodes_of(4, size, 9.0)
    cluster_LE = np.tile(np.arange(8) // 2, (4, 1))
    transitions_LEE = draw_transitions(rng, 4, 8)
    optimum = assign_clusters(cluster_LE, transitions_LEE, link_cost_GG, soon())[1]
    tokens_LGG = moetuner._between_groups(transitions_LEE, cluster_LE, 4)

    lower = moetuner._links_bound(tokens_LGG, link_cost_GG)
    assert 0.2 * optimum < lower <= optimum * (1 + 1e-12)
    built_LG = moetuner._front_to_back(tokens_LGG, link_cost_GG)
    built = moetuner._links_L(built_LG, tokens_LGG, link_cost_GG).sum()
    if size == 4:  # all links alike: matched front to back, each boundary costs what its bound says
        assert built == pytest.approx(optimum)
        assert lower == pytest.approx(optimum)
    worst_LG = np.tile(np.arange(4), (4, 1))
    worst = moetuner._links_L(worst_LG, tokens_LGG, link_cost_GG).sum()
    improved_LG = moetuner._improve(worst_LG, tokens_LGG, link_cost_GG, soon())
    improved = moetuner._links_L(improved_LG, tokens_LGG, link_cost_GG).sum()
    assert optimum * (1 - 1e-12) <= improved < worst
    for layer, (one, other) in product(range(4), combinations(range(4), 2)):
        swapped_LG = improved_LG.copy()
        swapped_LG[layer, [one, other]] = improved_LG[layer, [other, one]]
        assert moetuner._links_L(swapped_LG, tokens_LGG, link_cost_GG).sum() >= improved * (1 - 1e-9)
    found_LG, bound = moetuner._links_program(worst_LG, tokens_LGG, link_cost_GG, lower, 60)
    assert moetuner._links_L(found_LG, tokens_LGG, link_cost_GG).sum() == pytest.approx(optimum)
    assert bound == pytest.approx(optimum, rel=1e-4)
    assert bound <= optimum

    monkeypatch.setattr(moetuner, "_FEW_GPUS", 0)
    gpu_LE, bound = assign_clusters(cluster_LE, transitions_LEE, link_cost_GG, soon())
    assert links(transitions_LEE, link_cost_GG, gpu_LE) == pytest.approx(optimum)
    assert optimum * (1 - 1e-4) <= bound <= optimum * (1 + 1e-12)


def test_stage_ones_program_alone_finds_and_proves_the_optimum() -> None:
    rng = np.random.default_rng(2)
    for num_experts, num_gpus, least, most in [(6, 3, 2, 2), (7, 2, 3, 4), (7, 3, 1, 5)]:
        load_E = rng.lognormal(0, 0.5, num_experts)
        optimum = least_deviation(load_E[None], num_gpus, least, most)
        start_E = np.arange(num_experts) % num_gpus
        found_E, bound = moetuner._cluster_program(load_E, start_E, num_gpus, least, most, 0.0, 20)
        assert deviation(load_E[None], found_E[None], num_gpus) == pytest.approx(optimum)
        assert optimum - 1e-5 * load_E.sum() <= bound <= optimum


def test_programs_start_from_what_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The initial values keep every constraint and cost what the incumbent does, in units of the mean."""
    starts: list[float] = []

    def look(program: pulp.LpProblem, seconds: float) -> Outcome:
        assert program.valid(1e-9)
        starts.append(pulp.value(program.objective))
        return Outcome(False, -np.inf)

    monkeypatch.setattr(moetuner, "minimise", look)
    rng = np.random.default_rng(0)
    load_E, cluster_E = rng.lognormal(0, 1, 12), rng.permutation(np.arange(12) % 4)
    kept_E, bound = moetuner._cluster_program(load_E, cluster_E, 4, 3, 3, 0.1, 1)
    np.testing.assert_array_equal(kept_E, cluster_E)
    assert bound == 0.1
    assert starts[-1] * load_E.sum() / 4 == pytest.approx(deviation(load_E[None], cluster_E[None], 4))

    tokens_LGG, gpu_LG = draw_transitions(rng, 4, 6), rng.permuted(np.tile(np.arange(6), (4, 1)), axis=1)
    for link_cost_GG in (nodes_of(6, 3, 9.0), nodes_of(6, 6, 9.0), unlike_links(rng, 6)):
        cost_L = moetuner._links_L(gpu_LG, tokens_LGG, link_cost_GG)
        kept_LG, _ = moetuner._links_program(gpu_LG, tokens_LGG, link_cost_GG, 0.0, 1)
        np.testing.assert_allclose(moetuner._links_L(kept_LG, tokens_LGG, link_cost_GG), cost_L)
        assert starts[-1] * cost_L.sum() / 3 == pytest.approx(cost_L.sum())


def test_gpus_that_may_change_names_do_not_change_the_cost() -> None:
    rng = np.random.default_rng(0)
    link_cost_GG = nodes_of(6, 3, 9.0)
    assert moetuner._twins(link_cost_GG) == [(0, 1), (1, 2), (3, 4), (4, 5)]
    assert moetuner._twins(unlike_links(rng, 4)) == []
    gpu_LG = rng.permuted(np.tile(np.arange(6), (5, 1)), axis=1)
    tokens_LGG = draw_transitions(rng, 5, 6)
    ordered_LG = moetuner._in_order(gpu_LG, link_cost_GG)
    cost_L = moetuner._links_L(gpu_LG, tokens_LGG, link_cost_GG)
    np.testing.assert_allclose(moetuner._links_L(ordered_LG, tokens_LGG, link_cost_GG), cost_L)
    cluster_on_G = np.argsort(ordered_LG[0])
    assert (np.diff(cluster_on_G.reshape(2, 3)) > 0).all()


def test_the_result_is_never_worse_than_the_start_and_keeps_its_shares_when_time_is_up() -> None:
    rng = np.random.default_rng(0)
    load_LE = rng.dirichlet(np.ones(32), size=4)
    transitions_LEE = draw_transitions(rng, 4, 32)
    link_cost_GG = nodes_of(8, 4, 9.0)
    good = tune(load_LE, transitions_LEE, link_cost_GG, 4, 4, soon(2))
    assert good.bound.deviation <= good.cost.deviation
    assert good.bound.links <= good.cost.links
    late = tune(load_LE, transitions_LEE, link_cost_GG, 4, 4, time.monotonic(), start=good.gpu_LE)
    assert late.cost <= good.cost
    hurried = tune(load_LE, transitions_LEE, link_cost_GG, 4, 4, time.monotonic())
    assert all((np.bincount(gpu_E, minlength=8) == 4).all() for gpu_E in hurried.gpu_LE)
    assert good.cost < hurried.cost
    assert Cost(1, 9) < Cost(2, 1), "balance comes first"
    with pytest.raises(PlacementError, match="32 experts cannot be shared by 8 GPUs"):
        tune(load_LE, transitions_LEE, link_cost_GG, 3, 3, soon())


@pytest.mark.parametrize(("num_layers", "num_gpus"), [(1, 4), (3, 1)])
def test_one_layer_or_one_gpu_has_no_links(num_layers: int, num_gpus: int) -> None:
    load_LE = np.random.default_rng(0).dirichlet(np.ones(8), size=num_layers)
    transitions_LEE = draw_transitions(np.random.default_rng(0), num_layers, 8)
    share = 8 // num_gpus
    tuned = tune(load_LE, transitions_LEE, nodes_of(num_gpus, 8, 1.0), share, share, soon())
    assert (tuned.cost.links, tuned.bound.links) == (0, 0)
