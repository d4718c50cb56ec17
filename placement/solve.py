"""All solvers behind one call.

Shapes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import numpy as np

from moetrain.errors import PlacementError
from moetrain.placement.descent import by_assignment, by_swaps, random_assignment
from moetrain.placement.placement import Placement
from moetrain.placement.problem import Incumbent, Problem, Progress, Solution

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
    search, and the best until then is the answer. Raises PlacementError where
    the solver is unknown, or nothing is feasible.
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


def _assignment(incumbent: Incumbent, rng: np.random.Generator) -> None:
    incumbent.offer(by_assignment(incumbent.problem, incumbent.gpu_LE), "assignment")


def _swaps(incumbent: Incumbent, rng: np.random.Generator) -> None:
    incumbent.offer(by_swaps(incumbent.problem, incumbent.gpu_LE, incumbent.deadline), "swaps")


def _auto(incumbent: Incumbent, rng: np.random.Generator) -> None:
    for solver in (_assignment, _swaps):
        if not incumbent.done:
            solver(incumbent, rng)


_SOLVERS: dict[str, Solver] = {
    "auto": _auto,
    "contiguous": _contiguous,
    "random": _random,
    "assignment": _assignment,
    "swaps": _swaps,
}
SOLVERS = tuple(_SOLVERS)
