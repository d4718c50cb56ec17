"""All solvers behind one call.

Shapes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from moetrain.errors import PlacementError
from moetrain.placement.bounds import raise_bound
from moetrain.placement.descent import by_assignment, by_swaps, random_assignment
from moetrain.placement.integer_programs import solve_program
from moetrain.placement.load import pack, pack_lpt
from moetrain.placement.moetuner import tune
from moetrain.placement.objectives import LoadTerm, Objective, TwoStages, parts
from moetrain.placement.placement import Placement
from moetrain.placement.problem import Incumbent, Problem, Progress, Solution
from moetrain.placement.replicas import eplb
from moetrain.placement.search import exhaust, search

Solver = Callable[[Incumbent, np.random.Generator], None]
"""Offers assignments and bounds to the incumbent until it is done."""


def solve(
    problem: Problem,
    solver: str = "auto",
    *,
    time_limit: float = 60.0,
    start: Placement | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Solution:
    """The best placement that the solver finds within about `time_limit` seconds, and a proven bound.

    Never worse than `start`, which must be feasible, and than the contiguous placement. A KeyboardInterrupt ends the
    search, and the best until then is the answer. Raises PlacementError where the solver is unknown or not for this
    objective, or nothing is feasible.
    """
    if solver not in _SOLVERS:
        raise PlacementError(f"solver {solver!r} is none of {', '.join(SOLVERS)}")
    problem.check()
    contiguous = Placement.contiguous(problem.num_layers, problem.num_experts, problem.num_gpus)
    incumbent = Incumbent(problem, contiguous.gpu_LE, time_limit, progress)
    incumbent.offer(contiguous.gpu_LE, "contiguous")
    if start is not None:
        misfit = problem.misfit(start.gpu_LE)
        if misfit is not None:
            raise PlacementError(f"the placement to start from {misfit}")
        incumbent.offer(start.gpu_LE, "start")
    incumbent.prove(problem.objective.lower_bound(problem.num_gpus, problem.least, problem.most), "bound")
    if not incumbent.done:
        with suppress(KeyboardInterrupt):
            _SOLVERS[solver](incumbent, np.random.default_rng(seed))
    return incumbent.solution()


def _contiguous(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """Is the incumbent already."""


def _random(incumbent: Incumbent, rng: np.random.Generator) -> None:
    incumbent.offer(random_assignment(incumbent.problem, rng), "random")


def _lpt(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """Longest processing time first, exchanges, and integer programs for what they leave open."""
    problem, load = incumbent.problem, _load(incumbent.problem.objective)
    if load is None:
        raise PlacementError("solver lpt balances load, and the objective has none in it: choose another, as auto")
    seed = int(rng.integers(2**31))
    # Where load is not all that counts, what it costs to pack it better is better spent on the whole.
    alone = load is problem.objective
    gpu_LE, bound_L = pack(
        load.load_LE, problem.num_gpus, problem.least, problem.most, incumbent.deadline, seed, programs=alone
    )
    incumbent.offer(gpu_LE, "lpt")
    if alone:
        incumbent.prove(float(bound_L.sum()), "lpt")


def _eplb(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """DeepSeek's, without replicas."""
    problem, load = incumbent.problem, _load(incumbent.problem.objective)
    if load is None:
        raise PlacementError("solver eplb balances load, and the objective has none in it: choose another, as auto")
    gpu_LE = eplb(load.load_LE, problem.num_gpus)
    misfit = problem.misfit(gpu_LE)
    if misfit is not None:
        raise PlacementError(f"solver eplb gives equal shares: its placement {misfit}")
    incumbent.offer(gpu_LE, "eplb")


def _moetuner(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """MoETuner's two stages; what they prove of the links holds for their own clusters alone, so it is not counted."""
    problem, stages = incumbent.problem, incumbent.problem.objective
    if not isinstance(stages, TwoStages):
        raise PlacementError("solver moetuner is for the objective of that name: choose that, or another solver")
    # Until the first stage has ended this is what an interrupt leaves.
    incumbent.offer(pack_lpt(stages.load_LE, problem.num_gpus, problem.least, problem.most), "lpt")
    tuned = tune(
        stages.load_LE,
        stages.transitions_LEE,
        stages.link_cost_GG,
        problem.least,
        problem.most,
        incumbent.deadline,
        start=incumbent.gpu_LE,
        seed=int(rng.integers(2**31)),
        balanced=lambda cluster_LE: incumbent.offer(cluster_LE, "moetuner"),
    )
    incumbent.offer(tuned.gpu_LE, "moetuner")
    incumbent.prove(tuned.bound.deviation, "moetuner")


def _assignment(incumbent: Incumbent, rng: np.random.Generator) -> None:
    incumbent.offer(by_assignment(incumbent.problem, incumbent.gpu_LE, incumbent.deadline), "assignment")


def _swaps(incumbent: Incumbent, rng: np.random.Generator) -> None:
    incumbent.offer(by_swaps(incumbent.problem, incumbent.gpu_LE, incumbent.deadline), "swaps")


def _auto(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """The ladder: everything, if that is little; packing, where load counts; descents and the search, where it does
    not count alone; then bounds and, if it is small, the integer program."""
    objective = incumbent.problem.objective
    if isinstance(objective, TwoStages):
        _moetuner(incumbent, rng)
        return
    exhaust(incumbent, rng)
    load = _load(objective)
    if load is objective:
        rungs: list[tuple[Solver, float]] = [(_lpt, 1.0)]
    else:
        # Packing ends where no swap helps the rest any more, so what swaps come to without it competes with it.
        rungs = [] if load is None else [(_swaps, 0.2), (_lpt, 0.2)]
        rungs += [(_assignment, 1.0), (search, 0.7), (raise_bound, 0.7), (solve_program, 1.0)]
    for rung, part in rungs:
        if not incumbent.done:
            with incumbent.part(part):
                rung(incumbent, rng)


def _load(objective: Objective) -> LoadTerm | None:
    """The load in an objective."""
    return next((term for _, term in parts(objective) if isinstance(term, LoadTerm)), None)


_SOLVERS: dict[str, Solver] = {
    "auto": _auto,
    "contiguous": _contiguous,
    "random": _random,
    "lpt": _lpt,
    "eplb": _eplb,
    "moetuner": _moetuner,
    "assignment": _assignment,
    "swaps": _swaps,
    "search": search,
    "ilp": solve_program,
}
SOLVERS = tuple(_SOLVERS)
