"""All solvers: against everything that is possible, against each other, and what they do with what cannot be."""

from collections.abc import Iterator
from itertools import product

import numpy as np
import pulp
import pytest

from moetrain.errors import PlacementError
from moetrain.placement import moetuner
from moetrain.placement.bounds import most_together, raise_bound
from moetrain.placement.descent import by_assignment, by_swaps
from moetrain.placement.integer_programs import Program, solve_program
from moetrain.placement.objectives import HopTerm, LoadTerm, TrafficTerm, WeightedSum, objective
from moetrain.placement.placement import Assignment, Placement
from moetrain.placement.problem import Incumbent, Problem
from moetrain.placement.search import all_assignments, anneal, named_in_order, recombine
from moetrain.placement.solve import SOLVERS, solve
from moetrain.placement.statistics import load_LE, transitions_LEE
from moetrain.placement.topology import Topology
from moetrain.placement.trace import Trace


def draw_trace(seed: int, layers: int = 3, experts: int = 6, top_k: int = 2, gpus: int = 3, tokens: int = 60) -> Trace:
    """Tokens that like experts of lower numbers, and those of the same group in the next layer."""
    rng = np.random.default_rng(seed)
    score_SLE = rng.gumbel(size=(tokens, layers, experts)) - 0.2 * np.arange(experts)
    group_SE = rng.integers(2, size=(tokens, 1)) == np.arange(experts) % 2
    order_SLE = np.argsort(-score_SLE - 2 * group_SE[:, None], axis=2)
    return Trace(order_SLE[:, :, :top_k], experts, rng.integers(gpus, size=tokens))


def chain(seed: int, layers: int, experts: int) -> np.ndarray:
    """Transitions [L − 1, E, E] of a random Markov chain."""
    rng = np.random.default_rng(seed)
    transitions = rng.gamma(0.2, size=(layers - 1, experts, experts))
    return transitions / transitions.sum((1, 2), keepdims=True)


def everything(problem: Problem) -> Iterator[Assignment]:
    layers = list(product(range(problem.num_gpus), repeat=problem.num_experts))
    held = [np.bincount(gpu_E, minlength=problem.num_gpus) for gpu_E in layers]
    allowed = [
        gpu_E
        for gpu_E, held_G in zip(layers, held, strict=True)
        if held_G.min() >= problem.least and held_G.max() <= problem.most
    ]
    return (np.array(gpu_LE) for gpu_LE in product(allowed, repeat=problem.num_layers))


@pytest.mark.parametrize("name", ["load", "hops", "traffic", "load+0.3*traffic+0.5*hops"])
@pytest.mark.parametrize(("experts", "gpus", "least", "most"), [(4, 2, 2, 2), (4, 3, 1, 2), (4, 4, 1, 1), (5, 2, 0, 4)])
def test_small_instances_are_solved_exactly(name, experts, gpus, least, most):
    trace = draw_trace(experts + gpus, layers=2, experts=experts, gpus=gpus)
    problem = Problem(objective(name, trace, Topology.uniform(gpus)), 2, experts, gpus, least, most)
    solution = solve(problem)
    assert solution.cost == pytest.approx(min(problem.objective.cost(gpu_LE) for gpu_LE in everything(problem)))
    assert solution.gap == 0
    assert problem.misfit(solution.placement.gpu_LE) is None


def test_all_assignments():
    problem = Problem(LoadTerm(np.ones((1, 5))), 1, 5, 3, 1, 2)
    named = {tuple(gpu_LE[0]) for gpu_LE in everything(problem)}
    found = all_assignments(problem, False, 10**6)
    assert {tuple(gpu_E) for gpu_E in found} == named
    assert len(found) == len(named) == 90
    assert all_assignments(problem, False, 89) is None
    groups = {frozenset(frozenset(np.flatnonzero(np.equal(gpu_E, gpu))) for gpu in range(3)) for gpu_E in named}
    unnamed = all_assignments(problem, True, 10**6)
    assert len(unnamed) == len(groups) == 15


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["load", "load+hops", "hops", "traffic", "moetuner"])
def test_every_solver_keeps_what_it_is_given(solver, name):
    """A feasible answer with its cost and a bound, no worse than contiguous and than the start."""
    trace = draw_trace(0, layers=3, experts=8, gpus=4)
    problem = Problem.equal(objective(name, trace, Topology.uniform(4)), 3, 8, 4)
    rng = np.random.default_rng(0)
    start = Placement(rng.permuted(np.tile(np.arange(8) // 2, (3, 1)), axis=1), 4)
    seen = []
    needs = {"lpt": ("load", "load+hops"), "eplb": ("load", "load+hops"), "moetuner": ("moetuner",)}
    tables = solver in ("assignment", "swaps", "search", "ilp")
    if name not in needs.get(solver, (name,)) or (tables and name == "moetuner"):
        with pytest.raises(PlacementError, match="solver"):
            solve(problem, solver)
        return
    solution = solve(problem, solver, time_limit=0.5, start=start, progress=lambda *facts: seen.append(facts))
    assert problem.misfit(solution.placement.gpu_LE) is None
    assert solution.cost == pytest.approx(problem.objective.cost(solution.placement.gpu_LE))
    contiguous = Placement.contiguous(3, 8, 4)
    assert solution.cost <= min(problem.objective.cost(contiguous.gpu_LE), problem.objective.cost(start.gpu_LE))
    assert solution.bound <= solution.cost
    costs, bounds = [facts[0] for facts in seen], [facts[1] for facts in seen]
    assert costs == sorted(costs, reverse=True)
    assert bounds == sorted(bounds)


def test_hops_beat_restarts_of_a_descent():
    """Sixteen experts in strongly linked groups of four under random names: the groups are found, in any case."""
    rng = np.random.default_rng(0)
    group_LE = rng.permuted(np.tile(np.arange(16) // 4, (6, 1)), axis=1)
    together_LEE = group_LE[:-1, :, None] == group_LE[1:, None, :]
    transitions = rng.gamma(0.5, size=(5, 16, 16)) * np.where(together_LEE, 1.0, 0.05)
    transitions /= transitions.sum((1, 2), keepdims=True)
    problem = Problem.equal(HopTerm(transitions, 1.0 - np.eye(4)), 6, 16, 4)
    planted = problem.objective.cost(group_LE)
    assert solve(problem, "search", time_limit=1).cost <= planted + 1e-12
    assert solve(problem, "assignment").cost > planted * 1.2


def test_recombination_takes_the_best_layers_and_names():
    """One placement has the first half of the optimum, another the second under other names."""
    transitions = np.stack([np.eye(6), np.eye(6), np.eye(6)]) / 6
    problem = Problem.equal(HopTerm(transitions, 1.0 - np.eye(3)), 4, 6, 3)
    good = np.array([0, 0, 1, 1, 2, 2])
    bad = np.array([0, 1, 2, 0, 1, 2])
    other = np.array([2, 2, 0, 0, 1, 1])
    found = recombine(problem, [np.stack([good, good, bad, bad]), np.stack([bad, bad, other, other])])
    assert problem.objective.cost(found) == 0


@pytest.mark.parametrize("name", ["hops", "load+traffic"])
def test_annealing_and_descent_keep_the_bounds(name):
    trace = draw_trace(1, experts=7, gpus=3)
    problem = Problem(objective(name, trace, Topology.uniform(3)), 3, 7, 3, 1, 3)
    rng = np.random.default_rng(0)
    start = Placement.contiguous(3, 7, 3).gpu_LE
    for heat in (0.1, 2.0):
        assert problem.misfit(anneal(problem, start, heat, 20, rng, np.inf)) is None
    descended = by_swaps(problem, start, np.inf)
    assert problem.misfit(descended) is None
    if name == "hops":
        assert not np.array_equal(Placement(descended, 3).experts_LG, Placement(start, 3).experts_LG)


def test_same_seed_same_answer():
    problem = Problem.equal(HopTerm(chain(0, 4, 12), 1.0 - np.eye(4)), 4, 12, 4)
    first, second = (
        anneal(problem, Placement.contiguous(4, 12, 4).gpu_LE, 1.0, 30, np.random.default_rng(3), np.inf)
        for _ in range(2)
    )
    assert np.array_equal(first, second)


@pytest.mark.parametrize(
    ("least", "most", "message"),
    [(3, 4, "lower least to 2 or fewer"), (1, 1, "raise most to 2 or more"), (2, 1, "least may not exceed most")],
)
def test_bounds_that_nothing_fits(least, most, message):
    problem = Problem(LoadTerm(np.ones((1, 8))), 1, 8, 4 if least < 3 else 3, least, most)
    with pytest.raises(PlacementError, match=message):
        solve(problem)


def test_what_cannot_be():
    term = LoadTerm(np.ones((2, 8)))
    with pytest.raises(PlacementError, match=r"8 experts cannot be shared equally by 3 GPUs.*least = 2 and most = 3"):
        Problem.equal(term, 2, 8, 3)
    problem = Problem.equal(term, 2, 8, 4)
    with pytest.raises(PlacementError, match="solver 'best' is none of auto"):
        solve(problem, "best")
    with pytest.raises(PlacementError, match="to start from has 0 to 8"):
        solve(problem, start=Placement(np.zeros((2, 8), np.int64), 4))
    with pytest.raises(PlacementError, match="1 × 8 layers"):
        solve(problem, start=Placement.contiguous(1, 8, 4))


def test_no_time_at_all():
    problem = Problem.equal(HopTerm(chain(0, 6, 32), 1.0 - np.eye(8)), 6, 32, 8)
    solution = solve(problem, time_limit=0)
    assert solution.solver == "contiguous"
    assert 0 < solution.gap < 1


def exflow(expert_SL: np.ndarray, num_experts: int, num_gpus: int) -> float:
    """ExFlow's program as in the paper's section IV and its authors' code, a variable for each token and boundary."""
    layers, gpus = range(expert_SL.shape[1]), range(num_gpus)
    program = pulp.LpProblem("ExFlow", pulp.LpMinimize)
    x = {
        (layer, expert, gpu): program.add_variable(f"x_{layer}_{expert}_{gpu}", cat=pulp.LpBinary)
        for layer, expert, gpu in product(layers, range(num_experts), gpus)
    }
    for layer in layers:
        for expert in range(num_experts):
            program += pulp.lpSum(x[layer, expert, gpu] for gpu in gpus) == 1
        for gpu in gpus:
            program += pulp.lpSum(x[layer, expert, gpu] for expert in range(num_experts)) == num_experts // num_gpus
    costs = []
    for token, expert_L in enumerate(expert_SL):
        for layer in layers[1:]:
            cost = program.add_variable(f"cost_{token}_{layer}", cat=pulp.LpBinary)
            for gpu in gpus:
                here, there = x[layer - 1, expert_L[layer - 1], gpu], x[layer, expert_L[layer], gpu]
                program += cost >= here - there
                program += cost >= there - here
            costs.append(cost)
    program.setObjective(pulp.lpSum(costs))
    program.solve(pulp.HiGHS(msg=False))
    assert program.sol_status == pulp.LpSolutionOptimal
    return pulp.value(program.objective) / len(expert_SL)


@pytest.mark.parametrize("solver", ["ilp", "auto"])
@pytest.mark.parametrize(("seed", "experts", "gpus"), [(0, 6, 2), (1, 6, 3), (2, 4, 4)])
def test_exflow_transcribed(solver, seed, experts, gpus):
    trace = draw_trace(seed, layers=3, experts=experts, top_k=1, tokens=16)
    problem = Problem.equal(objective("hops", trace, Topology.uniform(gpus)), 3, experts, gpus)
    solution = solve(problem, solver)
    assert solution.cost == pytest.approx(exflow(trace.expert_ids_SLK[:, :, 0], experts, gpus))
    assert solution.gap < 1e-5


@pytest.mark.parametrize("name", ["load", "hops", "traffic", "load+0.3*traffic+0.5*hops"])
@pytest.mark.parametrize(("experts", "gpus", "least", "most"), [(4, 2, 2, 2), (4, 3, 1, 2), (4, 3, 0, 3)])
def test_integer_programs_against_everything(name, experts, gpus, least, most):
    """On two nodes, where names matter, and from a poor start: a bound that were too high would end above the best."""
    trace = draw_trace(experts, layers=2, experts=experts, gpus=gpus, tokens=30)
    distance_GG = np.where(np.arange(gpus)[:, None] // 2 == np.arange(gpus) // 2, 1.0, 4.0) * (1 - np.eye(gpus))
    terms = [part.split("*") for part in name.split("+")]
    problem = Problem(named_sum(terms, trace, distance_GG), 2, experts, gpus, least, most)
    best = min(problem.objective.cost(gpu_LE) for gpu_LE in everything(problem))
    start_LE = Placement.contiguous(2, experts, gpus).gpu_LE
    incumbent = Incumbent(problem, start_LE, 60, None)
    incumbent.offer(start_LE, "contiguous")
    solve_program(incumbent, np.random.default_rng(0))
    assert incumbent.cost == pytest.approx(best)
    assert best * (1 - 1e-5) <= incumbent.bound <= best * (1 + 1e-9)


@pytest.mark.parametrize("name", ["load", "hops", "traffic", "load+0.3*traffic+0.5*hops"])
def test_integer_programs_start_from_a_placement(name):
    """Under names that the program allows, at the placement's cost."""
    trace = Trace(draw_trace(0).expert_ids_SLK, 6)
    problem = Problem.equal(objective(name, trace, Topology.uniform(3)), 3, 6, 3)
    start_LE = np.random.default_rng(0).permuted(np.tile(np.arange(6) // 2, (3, 1)), axis=1)
    assert not np.array_equal(named_in_order(start_LE[0]), start_LE[0])
    program = Program(problem, start_LE, 10.0).program
    assert program.valid(1e-9)
    assert pulp.value(program.objective) == pytest.approx(10 * problem.objective.cost(start_LE))


def named_sum(terms: list[list[str]], trace: Trace, distance_GG: np.ndarray) -> WeightedSum:
    every = {
        "load": LoadTerm(load_LE(trace)),
        "hops": HopTerm(transitions_LEE(trace), distance_GG),
        "traffic": TrafficTerm.from_trace(trace, distance_GG),
    }
    return WeightedSum([(float(term[0]) if len(term) > 1 else 1.0, every[term[-1]]) for term in terms])


@pytest.mark.parametrize("seed", range(4))
def test_most_together_hold(seed):
    """Below the optimum of instances small enough to try everything, well above what counting partners gives."""
    transitions = chain(seed, 3, 8)
    for gpus in (2, 4):
        problem = Problem.equal(HopTerm(transitions, 1.0 - np.eye(gpus)), 3, 8, gpus)
        best = solve(problem)
        assert best.gap == 0
        incumbent = Incumbent(problem, best.placement.gpu_LE, 60, None)
        incumbent.offer(best.placement.gpu_LE, "best")
        raise_bound(incumbent, np.random.default_rng(0))
        assert incumbent.bound <= best.cost + 1e-9
        counted = problem.objective.lower_bound(gpus, problem.least, problem.most)
        assert incumbent.bound > counted + 0.3 * (best.cost - counted)


@pytest.mark.parametrize("weight", [0.1, 1.0, 30.0])
def test_multipliers_bound_at_any_time(weight):
    """After a single step too: of four pairs, two on each of two GPUs, two can be kept."""
    weight_NN = np.kron(np.eye(4), [[0, weight], [weight, 0]]) + 0.5 * weight * (1 - np.eye(8))
    within = np.arange(8) // 4
    best = weight_NN[within[:, None] == within].sum()
    for deadline in (-np.inf, np.inf):
        bounds = list(most_together(weight_NN, [8], 2, deadline))
        assert min(bounds) >= best * (1 - 1e-9)
    assert min(bounds) == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("sources", [True, False])
@pytest.mark.parametrize(("top_k", "gpus"), [(2, 2), (3, 4), (4, 4)])
def test_semidefinite_bounds_on_traffic_hold(top_k, gpus, sources):
    trace = draw_trace(top_k, layers=2, experts=8, top_k=top_k, gpus=gpus)
    trace = trace if sources else Trace(trace.expert_ids_SLK, 8)
    problem = Problem.equal(objective("traffic", trace, Topology.uniform(gpus)), 2, 8, gpus)
    best = solve(problem)
    assert best.gap == 0
    incumbent = Incumbent(problem, best.placement.gpu_LE, 60, None)
    incumbent.offer(best.placement.gpu_LE, "best")
    raise_bound(incumbent, np.random.default_rng(0))
    counted = problem.objective.lower_bound(gpus, problem.least, problem.most)
    assert counted <= incumbent.bound <= best.cost + 1e-9
    assert incumbent.bound > 0.8 * best.cost


@pytest.mark.parametrize("stage", ["cluster", "assign_clusters"])
def test_an_interrupt_of_moetuner_keeps_what_balances(stage, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    problem = Problem.equal(objective("moetuner", draw_trace(0), Topology.uniform(3)), 3, 6, 3)
    tuned, contiguous = solve(problem, "moetuner"), solve(problem, "contiguous")
    monkeypatch.setattr(moetuner, stage, interrupted)
    assert tuned.cost <= solve(problem).cost < 0.7 * contiguous.cost


def test_descents_and_annealing_keep_their_deadline():
    problem = Problem.equal(HopTerm(chain(0, 4, 8), 1.0 - np.eye(4)), 4, 8, 4)
    start_LE = Placement.contiguous(4, 8, 4).gpu_LE
    assert (by_assignment(problem, start_LE, -np.inf) == start_LE).all()
    assert (by_swaps(problem, start_LE, -np.inf) == start_LE).all()
    assert (anneal(problem, start_LE, 1.0, 9, np.random.default_rng(0), -np.inf) == start_LE).all()
    assert (by_assignment(problem, start_LE, np.inf) != start_LE).any()


def test_bound_of_hops_between_islands():
    """Four GPUs on two nodes: hops within a node cost 1, between nodes 3."""
    transitions = chain(5, 3, 8)
    node_G = np.arange(4) // 2
    distance_GG = np.where(np.eye(4, dtype=bool), 0.0, np.where(node_G[:, None] == node_G, 1.0, 3.0))
    problem = Problem.equal(HopTerm(transitions, distance_GG), 3, 8, 4)
    best = solve(problem)
    assert best.gap == 0
    incumbent = Incumbent(problem, best.placement.gpu_LE, 60, None)
    incumbent.offer(best.placement.gpu_LE, "best")
    raise_bound(incumbent, np.random.default_rng(0))
    assert problem.objective.lower_bound(4, 2, 2) < incumbent.bound <= best.cost

    # One expert a GPU, all transitions alike: one partner is here, one on the node, and two are on the other.
    alike = Problem.equal(HopTerm(np.full((1, 4, 4), 1 / 16), distance_GG), 2, 4, 4)
    incumbent = Incumbent(alike, Placement.contiguous(2, 4, 4).gpu_LE, 60, None)
    raise_bound(incumbent, np.random.default_rng(0))
    assert incumbent.bound == pytest.approx((1 * 1 + 2 * 3) / 4)
    uneven = Problem(problem.objective, 3, 8, 4, 1, 3)
    assert solve(uneven, "search", time_limit=1).bound < best.cost
