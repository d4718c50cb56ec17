"""Packing by load: against exhaustive search, its bound, and EPLB's published example."""

import time
from itertools import product

import numpy as np
import pulp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.errors import PlacementError
from moetrain.placement import program
from moetrain.placement.load import TOLERANCE, PackingProgram, load_bound_L, pack, pack_lpt
from moetrain.placement.replicas import ReplicatedPlacement, eplb, replicate_and_pack
from moetrain.placement.statistics import load_LG


def feasible(num_experts: int, num_gpus: int, least: int, most: int) -> np.ndarray:
    """Every assignment of so many experts to each GPU, one a row."""
    all_NE = np.array(list(product(range(num_gpus), repeat=num_experts)))
    experts_NG = (all_NE[:, :, None] == np.arange(num_gpus)).sum(1)
    return all_NE[((least <= experts_NG) & (experts_NG <= most)).all(1)]


def smallest_largest(load_E: np.ndarray, num_gpus: int, least: int, most: int) -> float:
    assigned_NE = feasible(len(load_E), num_gpus, least, most)
    return np.stack([(load_E * (assigned_NE == gpu)).sum(1) for gpu in range(num_gpus)]).max(0).min()


@st.composite
def layers(draw: st.DrawFn) -> tuple[np.ndarray, int, int, int]:
    """One layer of up to 8 experts, by counts, fractions of tokens, or any numbers, and what each GPU may have."""
    num_gpus = draw(st.integers(1, 4))
    num_experts = draw(st.integers(num_gpus, 8 if num_gpus < 4 else 7))
    least = draw(st.integers(0, num_experts // num_gpus))
    most = draw(st.integers(-(-num_experts // num_gpus), num_experts))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    loads = {
        "counts": rng.integers(0, 12, num_experts).astype(float),
        "fractions": rng.multinomial(97, rng.dirichlet(np.ones(num_experts))) / 97,
        "any": rng.lognormal(0, draw(st.floats(0.1, 3)), num_experts),
    }
    return loads[draw(st.sampled_from(sorted(loads)))], num_gpus, least, most


def assert_shares(gpu_LE: np.ndarray, num_gpus: int, least: int, most: int) -> None:
    for gpu_E in gpu_LE:
        experts_G = np.bincount(gpu_E, minlength=num_gpus)
        assert len(experts_G) == num_gpus
        assert least <= experts_G.min()
        assert experts_G.max() <= most


@settings(max_examples=150, deadline=None)
@given(layers())
def test_small_layers_are_packed_as_well_as_exhaustive_search_and_no_bound_is_above_it(
    layer: tuple[np.ndarray, int, int, int],
) -> None:
    load_E, num_gpus, least, most = layer
    optimum = smallest_largest(load_E, num_gpus, least, most)
    rounding = 1e-12 * load_E.sum()
    assert load_bound_L(load_E[None], num_gpus, least, most)[0] <= optimum + rounding
    lpt_LE = pack_lpt(load_E[None], num_gpus, least, most)
    assert_shares(lpt_LE, num_gpus, least, most)
    gpu_LE, bound_L = pack(load_E[None], num_gpus, least, most, deadline=time.monotonic() + 10)
    assert_shares(gpu_LE, num_gpus, least, most)
    cost = load_LG(load_E[None], gpu_LE, num_gpus).max()
    assert optimum - rounding <= cost <= optimum * (1 + TOLERANCE) + rounding
    assert cost * (1 - 2 * TOLERANCE) - rounding <= bound_L[0] <= optimum + rounding


@pytest.mark.parametrize(
    ("load_E", "num_gpus", "least", "most", "bound"),
    [
        ([10, 1, 1, 1, 1, 1], 2, 3, 3, 12),  # separation, k = 1: the largest and its two lightest companions
        ([5, 5, 5, 1, 1, 1], 2, 3, 3, 11),  # pigeonhole: two of the three large ones meet, with a small one
        ([10, 10, 2, 2, 1, 1], 2, 3, 3, 13),  # separation, k = 2: apart they average 13, together they are 21
        ([90, 89, 40, 31, 30, 10], 3, 2, 2, 119),  # separation, k = 2: the 30, if not more, is with a 90 or an 89
        ([7, 6, 5, 4, 3, 2], 3, 1, 2, 9),  # mean
        ([3, 3, 1, 1, 1], 2, 2, 3, 5),  # multiples of 1: the mean is 4.5
        ([0.3, 0.3, 0.1, 0.1, 0.1], 2, 2, 3, 0.5),  # multiples of 0.1
        ([9, 1, 1, 1], 2, 0, 3, 9),  # a GPU of its own: the others have room for the rest
        ([9, 1, 1, 1], 2, 0, 2, 10),  # no room: every GPU has two
        ([0, 0, 0, 0], 2, 2, 2, 0),
    ],
)
def test_each_bound_is_reached(load_E: list[float], num_gpus: int, least: int, most: int, bound: float) -> None:
    assert load_bound_L(np.array([load_E]), num_gpus, least, most)[0] == pytest.approx(bound, rel=1e-9)
    assert smallest_largest(np.array(load_E), num_gpus, least, most) == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize(("num_experts", "num_gpus"), [(64, 8), (128, 8), (256, 8), (256, 32), (256, 64)])
def test_skewed_layers_of_real_size_are_within_half_a_percent_of_their_bound(num_experts: int, num_gpus: int) -> None:
    rng = np.random.default_rng(num_experts + num_gpus)
    rank_E = np.arange(1.0, num_experts + 1)
    zipf_LE = np.stack([rng.permutation(rank_E**-exponent) for exponent in np.linspace(0.2, 1.6, 8)])
    lognormal_LE = np.exp(np.linspace(0.2, 2.5, 8)[:, None] * rng.normal(size=(8, num_experts)))
    load_LE = np.concatenate([zipf_LE, lognormal_LE])
    load_LE /= load_LE.sum(1, keepdims=True)
    share = num_experts // num_gpus
    assert (load_LE.max(1) * num_gpus > 1).any(), "some layer should have an expert above the mean of a GPU"

    started = time.process_time()
    gpu_LE, bound_L = pack(load_LE, num_gpus, share, share)
    assert time.process_time() - started < 5
    assert_shares(gpu_LE, num_gpus, share, share)
    np.testing.assert_array_less(load_LG(load_LE, gpu_LE, num_gpus).max(1), bound_L * 1.005)


@pytest.mark.parametrize(("least", "most"), [(5, 7), (6, 8), (0, 24)])
def test_gpus_keep_what_they_must_and_may_have(least: int, most: int) -> None:
    """Exchanges move experts where GPUs may have more or fewer; the best that any did is within reach of the mean."""
    load_LE = np.random.default_rng(0).lognormal(0, 0.7, (30, 24))
    gpu_LE, bound_L = pack(load_LE, 4, least, most)
    assert_shares(gpu_LE, 4, least, most)
    cost_L = load_LG(load_LE, gpu_LE, 4).max(1)
    assert (cost_L <= load_LG(load_LE, pack_lpt(load_LE, 4, least, most), 4).max(1)).all()
    np.testing.assert_array_less(cost_L, bound_L * 1.005)


def least_of_the_largest(packing: PackingProgram, seconds: float) -> program.Outcome:
    """Give the program its objective, with the incumbent's value, and solve it."""
    largest = packing.program.add_variable("largest")
    largest.setInitialValue(max(load.value() for load in packing.load_G))
    packing.program += largest
    for load in packing.load_G:
        packing.program += load <= largest
    return program.minimise(packing.program, seconds)


def test_the_program_alone_finds_and_proves_what_exhaustive_search_finds() -> None:
    rng = np.random.default_rng(1)
    for num_experts, num_gpus, least, most in [(6, 3, 2, 2), (7, 3, 1, 3), (8, 2, 4, 4), (7, 4, 0, 7), (6, 2, 0, 5)]:
        load_E = rng.lognormal(0, 0.5, num_experts)
        incumbent_E = rng.permutation(np.arange(num_experts) % num_gpus)
        packing = PackingProgram(load_E, incumbent_E, num_gpus, least, most)
        np.testing.assert_array_equal(  # the initial values are the incumbent, its GPUs numbered anew
            np.equal.outer(*[packing.assignment()] * 2), np.equal.outer(incumbent_E, incumbent_E)
        )
        optimum = smallest_largest(load_E, num_gpus, least, most)
        outcome = least_of_the_largest(packing, 20)
        assert outcome.bound * packing.mean == pytest.approx(optimum, rel=1e-5)
        assert load_LG(load_E[None], packing.assignment()[None], num_gpus).max() == pytest.approx(optimum)
        assert_shares(packing.assignment()[None], num_gpus, least, most)


def test_a_deadline_that_has_passed_leaves_longest_processing_time() -> None:
    load_LE = np.random.default_rng(0).lognormal(0, 0.5, (3, 32))
    gpu_LE, bound_L = pack(load_LE, 8, 4, 4, deadline=time.monotonic())
    np.testing.assert_array_equal(gpu_LE, pack_lpt(load_LE, 8, 4, 4))
    np.testing.assert_array_equal(bound_L, load_bound_L(load_LE, 8, 4, 4))


def test_shares_that_do_not_add_up_are_refused() -> None:
    for least, most in ((3, 3), (0, 1), (2, 1), (-1, 4)):
        with pytest.raises(PlacementError, match=r"8 experts cannot be shared by 4 GPUs"):
            pack_lpt(np.ones((1, 8)), 4, least, most)


def test_without_highs_cbc_proves_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    load_LE = np.array([[31.0, 29, 23, 19, 17, 13, 11, 7, 5, 3]]) ** 1.5
    optimum = smallest_largest(load_LE[0], 2, 5, 5)
    assert load_bound_L(load_LE, 2, 5, 5)[0] < optimum * (1 - TOLERANCE), "the program should be needed"
    bounds = []
    for installed in (program.highspy, None):
        monkeypatch.setattr(program, "highspy", installed)
        bounds.append(pack(load_LE, 2, 5, 5, deadline=time.monotonic() + 20)[1][0])
    np.testing.assert_allclose(bounds, optimum, rtol=2 * TOLERANCE)


def test_a_solver_that_ran_out_of_time_has_not_proven_its_incumbent() -> None:
    load_E = np.random.default_rng(0).uniform(0.1, 1, 50)
    packing = PackingProgram(load_E, np.arange(50) % 10, 10, 5, 5)
    outcome = least_of_the_largest(packing, 0.3)
    assert pulp.LpStatus[packing.program.status] == "Optimal", "PuLP says so all the same"
    assert outcome.found
    assert outcome.bound < packing.program.objective.value() - 1e-6


README_LOADS = np.array(
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_eplb_gives_the_example_of_its_readme() -> None:
    placement = replicate_and_pack(README_LOADS, num_slots=16, num_gpus=8, num_nodes=2, num_groups=4)
    assert placement.expert_LS.tolist() == [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    assert placement.replicas_LE[0].tolist() == [1, 2, 1, 1, 2, 2, 1, 1, 1, 1, 2, 1]
    # GPU 0 of layer 0 has half of expert 5 and expert 6.
    assert placement.load_LG(README_LOADS)[0, 0] == 165 / 2 + 39
    assert placement.load_LG(README_LOADS).sum(1).tolist() == README_LOADS.sum(1).tolist()


def test_eplb_without_replicas_is_a_placement_that_keeps_groups_on_nodes() -> None:
    gpu_LE = eplb(README_LOADS, num_gpus=4, num_nodes=2, num_groups=4)
    assert_shares(gpu_LE, 4, 3, 3)
    node_of_groups = (gpu_LE // 2).reshape(2, 4, 3)
    np.testing.assert_array_equal(node_of_groups, np.broadcast_to(node_of_groups[:, :, :1], (2, 4, 3)))
    # Where nodes do not divide groups, both count for nothing, and what is left is longest processing time first.
    np.testing.assert_array_equal(eplb(README_LOADS, 4, num_nodes=2), pack_lpt(README_LOADS, 4, 3, 3))


def test_replicas_of_the_hottest_lower_the_largest_load() -> None:
    load_LE = np.array([[8.0, 1, 1, 1, 1, 1]])
    plain = ReplicatedPlacement(np.arange(6)[None], 6, 2).load_LG(load_LE).max()
    replicated = replicate_and_pack(load_LE, num_slots=8, num_gpus=2)
    assert replicated.replicas_LE.tolist() == [[3, 1, 1, 1, 1, 1]]
    assert replicated.load_LG(load_LE).max() < plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((14, 8, 2, 4), "14 slots"),
        ((8, 8, 2, 4), "8 slots are fewer than the 12 experts"),
        ((16, 8, 3, 3), "8 GPUs cannot be shared evenly by nodes: 3"),
        ((16, 8, 1, 5), "12 experts cannot be split into groups"),
    ],
)
def test_eplb_refuses_numbers_that_do_not_divide(arguments: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(PlacementError, match=message):
        replicate_and_pack(README_LOADS, *arguments)
