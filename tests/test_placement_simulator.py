"""Predicted step times against what can be computed by hand, and what must not change or must only grow."""

from collections import Counter
from dataclasses import replace
from itertools import pairwise

import networkx as nx
import numpy as np
import pytest

from moetrain.errors import PlacementError, TraceError
from moetrain.placement.evaluation import score
from moetrain.placement.objectives import objective
from moetrain.placement.placement import Placement
from moetrain.placement.report import Maps
from moetrain.placement.simulator import Calibration, load_calibration, simulate, sources
from moetrain.placement.topology import Link, Topology
from moetrain.placement.trace import Trace

# Round numbers: a row takes 1000 bytes and a pair 10; a row of an expert takes 1 µs forward and 2 µs backward.
CALIBRATION = Calibration(
    tokens_per_gpu=600,
    dim=500,
    expert_dim=1,
    row_itemsize=2,
    pair_bytes=10,
    forward_flops=6 * 500 * 1e6,
    backward_flops=6 * 500 * 1e6,
    padding_rows=8,
    expert_seconds=1e-5,
    dense_seconds=1e-3,
    link_efficiency=0.5,
    exchange_seconds=1e-5,
)
PORT = Link(1e9, 4e-6)


def one_node(gpus):
    return Topology.of_nodes(1, gpus, PORT, None)


def two_nodes(gpus_per_node, bandwidth):
    """Nodes whose switches share one link between them."""
    graph = nx.Graph()
    for gpu in range(2 * gpus_per_node):
        graph.add_node(gpu, node=gpu // gpus_per_node)
        graph.add_edge(gpu, f"switch {gpu // gpus_per_node}", bandwidth=1e9, latency=2e-6)
    graph.add_edge("switch 0", "switch 1", bandwidth=bandwidth, latency=1e-6)
    return Topology(graph)


def random_trace(tokens=480, layers=3, experts=16, top_k=3, gpus=8, seed=0):
    rng = np.random.default_rng(seed)
    scores = rng.gumbel(size=(tokens, layers, experts)) + rng.normal(size=(layers, experts))
    ids = np.argsort(-scores, axis=-1)[..., :top_k]
    return Trace(ids, experts, source_S=rng.permutation(tokens) % gpus)


def random_placement(layers=3, experts=16, gpus=8, seed=1):
    rng = np.random.default_rng(seed)
    return Placement(rng.permuted(np.tile(np.arange(experts) % gpus, (layers, 1)), axis=1), gpus)


def test_everything_even():
    """Every token has one expert on each of 4 GPUs."""
    ids = np.tile(np.arange(4), (20, 2, 1))
    trace = Trace(ids, 4, source_S=np.arange(20) % 4)
    simulation = simulate(trace, Placement.contiguous(2, 4, 4), one_node(4), CALIBRATION)
    rows = 3 * 600  # out of each port, and into it
    plain, with_pairs = rows * 1000 / 0.5e9 + 4e-6, rows * 1010 / 0.5e9 + 4e-6
    np.testing.assert_allclose(simulation.dispatch_LG, plain + with_pairs + 5e-5)
    np.testing.assert_allclose(simulation.combine_LG, 2 * plain + 3e-5)
    np.testing.assert_allclose(simulation.compute_LG, (4 * 600 + 8) * 3e-6 + 1e-5)
    layer = 1e-3 + 3 * plain + with_pairs + 8e-5 + 2408 * 3e-6 + 1e-5
    np.testing.assert_allclose(simulation.layer_seconds_L, layer)
    assert simulation.step_seconds == pytest.approx(2 * layer)
    np.testing.assert_allclose(simulation.rows_GG, np.ones((4, 4)))


def test_all_experts_on_one_gpu():
    """It computes what all would, in turn, and its port takes the rows of all others; they wait."""
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((40, 1, 6)), axis=-1)[..., :2]
    trace = Trace(ids, 6, source_S=np.arange(40) % 4)
    simulation = simulate(trace, Placement(np.zeros((1, 6), np.int64), 4), one_node(4), CALIBRATION)
    np.testing.assert_allclose(simulation.compute_LG, [[(4 * 600 * 2 + 6 * 8) * 3e-6 + 1e-5, 1e-5, 1e-5, 1e-5]])
    plain, with_pairs = 1800 * 1000 / 0.5e9 + 4e-6, 1800 * 1020 / 0.5e9 + 4e-6
    # The others' rows are through when those of all are, for GPU 0's port is what they share.
    np.testing.assert_allclose(simulation.dispatch_LG, plain + with_pairs + 5e-5)
    assert simulation.step_seconds == pytest.approx(
        1e-3 + 3 * plain + with_pairs + 8e-5 + simulation.compute_LG.max(), rel=1e-12
    )


def test_one_gpu_sends_nothing():
    trace = random_trace(gpus=1)
    simulation = simulate(trace, Placement.contiguous(3, 16, 1), Topology.uniform(1), CALIBRATION)
    assert not simulation.dispatch_LG.any()
    assert not simulation.combine_LG.any()
    np.testing.assert_allclose(simulation.compute_LG, (600 * 3 + 16 * 8) * 3e-6 + 1e-5)


def test_a_row_goes_once_to_each_gpu():
    """Two experts of a token on one GPU: one row, two pairs."""
    trace = Trace(np.tile([2, 3], (10, 1, 1)), 4, source_S=np.arange(10) % 2)
    together, apart = Placement(np.array([[0, 0, 1, 1]]), 2), Placement(np.array([[0, 0, 1, 0]]), 2)
    both = simulate(trace, together, one_node(2), CALIBRATION)
    np.testing.assert_allclose(both.rows_GG, [[0, 1], [0, 1]])
    np.testing.assert_allclose(both.combine_LG, 2 * (600 * 1000 / 0.5e9 + 4e-6) + 3e-5)
    np.testing.assert_allclose(both.compute_LG, [[1e-5, (2 * 1200 + 16) * 3e-6 + 1e-5]])
    np.testing.assert_allclose(simulate(trace, apart, one_node(2), CALIBRATION).rows_GG, [[1, 1], [1, 1]])


def test_nodes_share_their_link():
    """Each token of 4 GPUs goes to the other node: through a port alone, and with another GPU's through the link."""
    source_S = np.arange(40) % 4
    trace = Trace(((source_S + 2) % 4)[:, None, None], 4, source_S=source_S)
    placement = Placement.contiguous(1, 4, 4)
    narrow = simulate(trace, placement, two_nodes(2, 0.5e9), CALIBRATION)
    np.testing.assert_allclose(narrow.combine_LG, 2 * (2 * 600 * 1000 / 0.25e9 + 5e-6) + 3e-5)
    wide = simulate(trace, placement, two_nodes(2, 4e9), CALIBRATION)
    np.testing.assert_allclose(wide.combine_LG, 2 * (600 * 1000 / 0.5e9 + 5e-6) + 3e-5)


def test_random_traffic_token_by_token():
    """The same from the definition, in plain loops: rows of tokens, links of paths, the slowest link of each GPU."""
    trace, placement, topology = random_trace(tokens=48, layers=2), random_placement(layers=2), two_nodes(4, 3e8)
    simulation = simulate(trace, placement, topology, CALIBRATION)
    for layer in range(2):
        rows = Counter()
        for source, ids_LK in zip(trace.source_S, trace.expert_ids_SLK, strict=True):
            for gpu in {int(placement.gpu_LE[layer, expert]) for expert in ids_LK[layer]} - {source}:
                rows[int(source), gpu] += 600 / 6  # 6 tokens of each GPU stand for 600
        carried = Counter()
        for (source, gpu), number in rows.items():
            for link in pairwise(topology.path(source, gpu)):
                carried[link] += number * 1000
        for gpu in range(8):
            times = [
                max(
                    carried[link] / (0.5 * topology.graph.edges[link]["bandwidth"])
                    for link in pairwise(topology.path(*ends))
                )
                + topology.latency_GG[ends]
                for ends in rows
                if gpu in ends
            ]
            assert simulation.combine_LG[layer, gpu] == pytest.approx(2 * max(times) + 3e-5, rel=1e-12)


def test_missing_experts_cost_nothing():
    ids = np.array([[[0, 1]], [[2, -1]]] * 6)
    trace = Trace(ids, 4, source_S=np.arange(12) // 2 % 2)
    simulation = simulate(trace, Placement.contiguous(1, 4, 2), one_node(2), CALIBRATION)
    np.testing.assert_allclose(simulation.compute_LG, [[(1200 + 16) * 3e-6 + 1e-5, (600 + 8) * 3e-6 + 1e-5]])
    np.testing.assert_allclose(simulation.rows_GG, [[0.5, 0.5], [0.5, 0.5]])


def test_sources_count_alike_however_many_tokens_were_recorded():
    source_S = np.array([0] * 30 + [1] * 10)
    trace = Trace((1 - source_S)[:, None, None], 2, source_S=source_S)
    simulation = simulate(trace, Placement.contiguous(1, 2, 2), one_node(2), CALIBRATION)
    np.testing.assert_allclose(simulation.compute_LG, (600 + 8) * 3e-6 + 1e-5)


@pytest.mark.parametrize("topology", [two_nodes(4, 2e8), one_node(8)], ids=["two nodes", "one node"])
def test_numbers_of_gpus_inside_a_node_do_not_matter(topology):
    trace, placement = random_trace(), random_placement()
    new_G = np.array([2, 0, 3, 1, 7, 6, 4, 5])
    renamed = Placement(new_G[placement.gpu_LE], 8)
    before = simulate(trace, placement, topology, CALIBRATION)
    after = simulate(replace(trace, source_S=new_G[trace.source_S]), renamed, topology, CALIBRATION)
    for part in ("dispatch_LG", "compute_LG", "combine_LG"):
        np.testing.assert_allclose(getattr(after, part)[:, new_G], getattr(before, part), rtol=1e-12)
    assert after.step_seconds == pytest.approx(before.step_seconds, rel=1e-12)
    # Across nodes they do: what was far is near.
    mixed = Placement(np.array([0, 4, 1, 5, 2, 6, 3, 7])[placement.gpu_LE], 8)
    moved = simulate(trace, mixed, topology, CALIBRATION).dispatch_LG.max(1)
    assert not np.allclose(moved, before.dispatch_LG.max(1))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens_per_gpu", 700),
        ("dim", 600),
        ("expert_dim", 2),
        ("row_itemsize", 4),
        ("pair_bytes", 100),
        ("forward_flops", 1e9),
        ("backward_flops", 1e9),
        ("padding_rows", 64),
        ("expert_seconds", 1e-3),
        ("dense_seconds", 2e-3),
        ("link_efficiency", 0.4),
        ("exchange_seconds", 1e-4),
    ],
)
def test_every_constant_that_is_worse_takes_longer(field, value):
    trace, placement, topology = random_trace(), random_placement(), two_nodes(4, 2e8)
    before = simulate(trace, placement, topology, CALIBRATION)
    after = simulate(trace, placement, topology, replace(CALIBRATION, **{field: value}))
    assert (after.layer_seconds_L > before.layer_seconds_L).all()


def test_slower_links_and_heavier_experts_take_longer():
    trace, placement = random_trace(), random_placement()
    times = [simulate(trace, placement, two_nodes(4, width), CALIBRATION).step_seconds for width in (4e8, 2e8, 1e8)]
    assert times == sorted(times)
    assert times[0] < times[-1]
    ids = trace.expert_ids_SLK.copy()
    busiest = np.argmax(simulate(trace, placement, one_node(8), CALIBRATION).compute_LG[0])
    there = np.flatnonzero(placement.gpu_LE[0] == busiest)
    ids[:, 0, :2] = there  # all tokens go to it
    ids[:, 0, 2] = np.flatnonzero(placement.gpu_LE[0] != busiest)[0]
    heavier = replace(trace, expert_ids_SLK=ids)
    before, after = (simulate(t, placement, one_node(8), CALIBRATION) for t in (trace, heavier))
    assert after.compute_LG[0, busiest] > before.compute_LG[0, busiest]
    assert after.layer_seconds_L[0] > before.layer_seconds_L[0]
    np.testing.assert_allclose(after.layer_seconds_L[1:], before.layer_seconds_L[1:])


def test_sources():
    trace = random_trace(tokens=80, gpus=8)
    np.testing.assert_array_equal(sources(trace, 8), trace.source_S)
    for other in (sources(trace, 4), sources(replace(trace, source_S=None), 8)):
        assert len(set(np.bincount(other).tolist())) == 1
    np.testing.assert_array_equal(sources(trace, 4, seed=3), sources(trace, 4, seed=3))
    assert not np.array_equal(sources(trace, 4, seed=3), sources(trace, 4, seed=4))


def test_what_does_not_fit():
    trace = random_trace()
    with pytest.raises(PlacementError, match=r"3 layers × 8 experts does not fit a trace of 3 × 16"):
        simulate(trace, Placement.contiguous(3, 8, 8), one_node(8), CALIBRATION)
    with pytest.raises(PlacementError, match="on 4 GPUs does not fit a topology of 8"):
        simulate(trace, Placement.contiguous(3, 16, 4), one_node(8), CALIBRATION)
    with pytest.raises(TraceError, match="5 tokens for 8 GPUs"):
        simulate(trace.select(slice(5)), Placement.contiguous(3, 16, 8), one_node(8), CALIBRATION)


def test_defaults_give_back_what_was_measured():
    """docs/performance.md, 'Kernel by kernel', 32768,2048,1024,64,8; docs/gpu-validation.md, two H100s with ep = 2."""
    calibration = Calibration()
    pairs = 32768 * 8 + 64 * calibration.padding_rows
    flops = 6 * 2048 * 1024 * pairs
    assert flops / calibration.forward_flops == pytest.approx(3.47e-3 + 1.66e-3 + 0.292e-3, rel=0.005)
    backward = 2.16e-3 + 3.26e-3 + 0.292e-3 + 3.27e-3 + 1.64e-3
    assert 2 * flops / calibration.backward_flops == pytest.approx(backward, rel=0.005)
    assert pairs * calibration.pair_seconds == pytest.approx(16.04e-3, rel=0.005)
    seconds = 6_457_536_112 / 2 / 4 / 2 / (450e9 * calibration.link_efficiency) + 8 * calibration.exchange_seconds
    assert seconds == pytest.approx(2.05e-3, rel=0.005)


def test_calibration_from_a_file(tmp_path):
    file = tmp_path / "h100.yaml"
    file.write_text("dim: 4096\nlink_efficiency: 0.6\nforward_flops: 5.0e+14\n")
    assert load_calibration(file) == Calibration(dim=4096, link_efficiency=0.6, forward_flops=5e14)
    file.write_text('{"dim": 1024, "forward_flops": 5e14}')
    assert load_calibration(file) == Calibration(dim=1024, forward_flops=5e14)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("width: 3", "no such key: width; there are tokens_per_gpu, dim"),
        ("dim: wide", "dim = 'wide': expected a number, 0 or more"),
        ("dim: true", "dim = True: expected a number"),
        ("dim: -1", "dim = -1: expected a number, 0 or more"),
        ("forward_flops: .inf", "forward_flops = inf"),
        ("link_efficiency: 0", "link_efficiency = 0: expected a number above 0"),
        ("- 3", "expected `key: number` lines"),
        ("dim: [", "expected the node content, but found '<stream end>'"),
        ("dim: 3\ndim: 4", "the key 'dim' is there twice"),
        (None, "No such file or directory"),
    ],
)
def test_calibrations_that_mean_nothing(text, message, tmp_path):
    file = tmp_path / "c.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(PlacementError) as error:
        load_calibration(file)
    assert str(error.value).startswith(f"{file}:")
    assert "\n" not in str(error.value)
    assert message in str(error.value)


def test_scores_are_the_objectives_of_the_same_name():
    trace, placement, topology = random_trace(), random_placement(), two_nodes(4, 2e8)
    found = score(placement, trace, topology, CALIBRATION)
    assert found.hops == pytest.approx(objective("hops", trace, Topology.uniform(8)).cost(placement.gpu_LE))
    sent = objective("traffic", trace, Topology.uniform(8)).cost(placement.gpu_LE)
    assert found.rows_inside + found.rows_across == pytest.approx(sent / 3)
    # `load` is a sum of maxima, and a GPU has 3 pairs of 8 GPUs' on average.
    assert found.load == pytest.approx(objective("load", trace, topology).cost(placement.gpu_LE) / 3 / (3 / 8))
    assert found.worst_load > found.load
    assert found.step_seconds == simulate(trace, placement, topology, CALIBRATION).step_seconds
    parts = found.dense_seconds + found.dispatch_seconds + found.compute_seconds + found.combine_seconds
    assert found.step_seconds == pytest.approx(parts)
    flat = score(placement, trace, one_node(8), CALIBRATION)
    assert (flat.node_hops, flat.rows_across) == (0, 0)
    assert flat.hops == pytest.approx(found.hops)
    node = Placement(placement.gpu_LE // 4, 2)
    assert found.node_hops == pytest.approx(objective("hops", trace, Topology.uniform(2)).cost(node.gpu_LE))
    assert 0 < found.node_hops < found.hops


def test_maps_show_what_scores_count():
    trace, placement, topology = random_trace(), random_placement(), two_nodes(4, 2e8)
    found, maps = score(placement, trace, topology), Maps.of(placement, trace, topology)
    away_GG = ~np.eye(8, dtype=bool)
    assert maps.load_LG.max() == pytest.approx(found.worst_load)
    np.testing.assert_allclose(maps.load_LG.mean(axis=1), 1)
    assert maps.rows_GG[away_GG].sum() / 8 == pytest.approx(found.rows_inside + found.rows_across)
    assert maps.transitions_GG.sum() == pytest.approx(1)
    assert maps.transitions_GG[away_GG].sum() * 2 == pytest.approx(found.hops)
    nobody = Trace(np.concatenate([trace.expert_ids_SLK, np.full((480, 1, 3), -1)], axis=1), 16)
    none = Maps.of(Placement(placement.gpu_LE[[0, 1, 2, 2]], 8), nobody, topology)
    np.testing.assert_array_equal(none.load_LG[3], 1)
