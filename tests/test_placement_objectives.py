"""Every table of every objective against the cost recomputed, token by token."""

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.errors import PlacementError
from moetrain.placement.objectives import HopTerm, LoadTerm, Term, TrafficTerm, WeightedSum, objective, transport
from moetrain.placement.placement import Assignment
from moetrain.placement.topology import Topology
from moetrain.placement.trace import Trace

NAMES = ["load", "hops", "traffic", "load+0.5*traffic+2*hops"]


def two_nodes(num_gpus: int) -> np.ndarray:
    """Distances of GPUs of which every second is on the other node."""
    node_G = np.arange(num_gpus) % 2
    return np.where(np.eye(num_gpus, dtype=bool), 0.0, np.where(node_G[:, None] == node_G, 1.0, 9.0))


def draw_trace(rng: np.random.Generator, num_experts: int, top_k: int, num_gpus: int, sources: bool) -> Trace:
    """Thirty tokens through three layers, some with fewer experts than top_k."""
    ids_SLK = rng.permuted(np.tile(np.arange(num_experts), (30, 3, 1)), axis=2)[:, :, :top_k]
    ids_SLK[:, :, 1:][rng.random((30, 3, top_k - 1)) < 0.2] = -1
    source_S = np.append(np.arange(num_gpus), rng.integers(num_gpus, size=30 - num_gpus)) if sources else None
    return Trace(ids_SLK, num_experts, source_S)


def make_term(name: str, trace: Trace, distance_GG: np.ndarray) -> Term:
    if name in ("load", "hops", "traffic"):
        load_LE = np.array(
            [
                np.bincount(ids[ids >= 0], minlength=trace.num_experts) / trace.num_tokens
                for ids in trace.expert_ids_SLK.transpose(1, 0, 2)
            ]
        )
        if name == "load":
            return LoadTerm(load_LE)
        if name == "traffic":
            return TrafficTerm.from_trace(trace, distance_GG)
        transitions = np.zeros((trace.num_layers - 1, trace.num_experts, trace.num_experts))
        for token in trace.expert_ids_SLK:
            for layer in range(trace.num_layers - 1):
                here, there = ([e for e in token[at] if e >= 0] for at in (layer, layer + 1))
                for e, f in product(here, there):
                    transitions[layer, e, f] += 1 / len(here) / len(there) / trace.num_tokens
        return HopTerm(transitions, distance_GG)
    parts = [part.split("*") for part in name.split("+")]
    return WeightedSum(
        [(float(part[0]) if len(part) > 1 else 1.0, make_term(part[-1], trace, distance_GG)) for part in parts]
    )


def by_hand(name: str, trace: Trace, distance_GG: np.ndarray, gpu_LE: Assignment) -> float:
    """The cost, token by token as its definition says."""
    gpus, total = range(len(distance_GG)), 0.0
    if "+" in name:
        parts = [part.split("*") for part in name.split("+")]
        return sum((float(p[0]) if len(p) > 1 else 1) * by_hand(p[-1], trace, distance_GG, gpu_LE) for p in parts)
    for layer in range(trace.num_layers):
        pairs = dict.fromkeys(gpus, 0)
        for number, token in enumerate(trace.expert_ids_SLK):
            reached = [gpu_LE[layer, e] for e in token[layer] if e >= 0]
            for gpu in reached:
                pairs[gpu] += 1
            if name == "hops" and layer:
                before = [gpu_LE[layer - 1, e] for e in token[layer - 1] if e >= 0]
                total += np.mean([distance_GG[a, b] for a, b in product(before, reached)])
            if name == "traffic":
                sources = gpus if trace.source_S is None else [trace.source_S[number]]
                total += np.mean([sum(distance_GG[source, gpu] for gpu in set(reached)) for source in sources])
        if name == "load":
            total += max(pairs.values())
    return total / trace.num_tokens


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_experts=st.integers(4, 7),
    num_gpus=st.integers(1, 4),
    top_k=st.integers(1, 3),
    sources=st.booleans(),
)
def test_tables_are_exact(name, seed, num_experts, num_gpus, top_k, sources):
    rng = np.random.default_rng(seed)
    uneven = rng.uniform(0.5, 2, (num_gpus, num_gpus)) if rng.random() < 0.7 else 1 / np.maximum(two_nodes(num_gpus), 1)
    distance_GG = two_nodes(num_gpus) * uneven
    trace = draw_trace(rng, num_experts, top_k, num_gpus, sources)
    gpu_LE = rng.integers(num_gpus, size=(3, num_experts))
    term = make_term(name, trace, distance_GG)
    cost = term.cost(gpu_LE)
    assert cost == pytest.approx(by_hand(name, trace, distance_GG, gpu_LE))

    layer = int(rng.integers(3))
    moves_EG, swaps_EE = term.moves(layer, gpu_LE, num_gpus), term.swaps(layer, gpu_LE, num_gpus)
    for expert, gpu in product(range(num_experts), range(num_gpus)):
        moved_LE = gpu_LE.copy()
        moved_LE[layer, expert] = gpu
        assert moves_EG[expert, gpu] == pytest.approx(term.cost(moved_LE) - cost, abs=1e-12)
    for first, second in product(range(num_experts), repeat=2):
        swapped_LE = gpu_LE.copy()
        swapped_LE[layer, [first, second]] = gpu_LE[layer, [second, first]]
        assert swaps_EE[first, second] == pytest.approx(term.cost(swapped_LE) - cost, abs=1e-12)

    other_LE = rng.integers(num_gpus, size=(3, num_experts))
    assert term.within(layer, np.stack([other_LE[layer], gpu_LE[layer]]), num_gpus)[1] == pytest.approx(
        term.within(layer, gpu_LE[layer, None], num_gpus)[0]
    )
    chain = sum(term.within(at, gpu_LE[at, None], num_gpus)[0] for at in range(3))
    for at in range(2):
        arrivals_XEG = term.arrivals(at, np.stack([other_LE[at], gpu_LE[at]]))
        if arrivals_XEG is not None:
            chain += arrivals_XEG[1, np.arange(num_experts), gpu_LE[at + 1]].sum()
    assert chain == pytest.approx(cost)

    if term.symmetric:
        assert term.cost(rng.permutation(num_gpus)[gpu_LE]) == pytest.approx(cost)

    linear_EG = term.linear(layer, gpu_LE, num_gpus)
    assert (linear_EG is None) == (name != "hops")
    if linear_EG is not None:
        changed_LE = gpu_LE.copy()
        changed_LE[layer] = other_LE[layer]
        experts = np.arange(num_experts)
        change = linear_EG[experts, changed_LE[layer]].sum() - linear_EG[experts, gpu_LE[layer]].sum()
        assert change == pytest.approx(term.cost(changed_LE) - cost)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_gpus=st.integers(1, 3), top_k=st.integers(1, 3), sources=st.booleans())
def test_bounds_hold_for_every_assignment(name, seed, num_gpus, top_k, sources):
    """All assignments of two layers of four experts, by every bounds that allow them."""
    rng = np.random.default_rng(seed)
    trace = draw_trace(rng, 4, top_k, num_gpus, sources)
    trace = Trace(trace.expert_ids_SLK[:, :2], 4, trace.source_S)
    term = make_term(name, trace, two_nodes(num_gpus))
    layers = [np.array(gpu_E) for gpu_E in product(range(num_gpus), repeat=4)]
    held = [np.bincount(gpu_E, minlength=num_gpus) for gpu_E in layers]
    for least, most in combinations(range(5), 2):
        feasible = [
            gpu_E for gpu_E, held_G in zip(layers, held, strict=True) if held_G.min() >= least and held_G.max() <= most
        ]
        pairs = [np.stack(pair) for pair in product(feasible, repeat=2)]
        chosen = rng.permutation(len(pairs))[:200]
        if pairs:
            bound = term.lower_bound(num_gpus, least, most)
            assert bound <= min(term.cost(pairs[at]) for at in chosen) + 1e-12


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), num_gpus=st.integers(1, 3), num_experts=st.integers(1, 5))
def test_transport_against_all_assignments(seed, num_gpus, num_experts):
    rng = np.random.default_rng(seed)
    cost_EG = rng.normal(size=(num_experts, num_gpus))
    for least, most in combinations(range(num_experts + 1), 2):
        if least * num_gpus <= num_experts <= most * num_gpus:
            costs = []
            for gpu_E in product(range(num_gpus), repeat=num_experts):
                held_G = np.bincount(gpu_E, minlength=num_gpus)
                if held_G.min() >= least and held_G.max() <= most:
                    costs.append(cost_EG[np.arange(num_experts), list(gpu_E)].sum())
            found_E = transport(cost_EG, least, most)
            held_G = np.bincount(found_E, minlength=num_gpus)
            assert held_G.min() >= least
            assert held_G.max() <= most
            assert cost_EG[np.arange(num_experts), found_E].sum() == pytest.approx(min(costs))


def test_names_of_objectives():
    trace = draw_trace(np.random.default_rng(0), 4, 2, 2, True)
    gpu_LE = np.tile(np.arange(4) // 2, (3, 1))
    topology = Topology.uniform(2)
    costs = {name: objective(name, trace, topology).cost(gpu_LE) for name in ("load", "hops", "traffic")}
    for name, cost in costs.items():
        assert cost == pytest.approx(by_hand(name, trace, topology.distance_GG, gpu_LE))
    total = objective("load + 0.5*traffic", trace, topology).cost(gpu_LE)
    assert total == pytest.approx(costs["load"] + 0.5 * costs["traffic"])
    with pytest.raises(PlacementError, match="'speed' is none of load, traffic, hops"):
        objective("load+speed", trace, topology)
    with pytest.raises(PlacementError, match="none of"):
        objective("-1*load", trace, topology)
    with pytest.raises(PlacementError, match=r"'1\.2\.3\*load' is none of"):
        objective("1.2.3*load", trace, topology)
