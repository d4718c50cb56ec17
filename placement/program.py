"""Integer programs through PuLP: by HiGHS, or by CBC where HiGHS is not installed, with an incumbent and a deadline."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from math import inf
from typing import Any

import pulp

try:
    import highspy
except ImportError:
    highspy = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Outcome:
    """What a solver found out about a minimum, to within its tolerances (about 1e-6 of coefficients around 1)."""

    found: bool
    """The program's variables have the values of a solution. It may be the incumbent."""
    bound: float
    """No solution costs less; −inf where nothing is known."""


def minimise(program: pulp.LpProblem, seconds: float, gap: float = 0.0) -> Outcome:
    """Solve for at most `seconds`, or to a relative gap.

    Starts from the variables' initial values (`setInitialValue`) where all have one. Scale the program so that what
    matters in it is around 1. PuLP's status says Optimal after a time limit, so what this returns goes by `sol_status`
    and by the solver's own bound; CBC tells PuLP none unless it has finished.
    """
    if highspy is not None:
        solver = _HiGHS(msg=False, timeLimit=max(seconds, 0.0), gapRel=gap)
    else:
        solver = pulp.PULP_CBC_CMD(msg=False, timeLimit=max(seconds, 0.0), gapRel=gap, warmStart=True)
    program.solve(solver)
    found = program.sol_status in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible)
    if isinstance(solver, _HiGHS):
        return Outcome(found, program.solverModel.getInfo().mip_dual_bound + program.objective.constant)
    if program.sol_status != pulp.LpSolutionOptimal:
        return Outcome(found, -inf)
    cost = pulp.value(program.objective)
    return Outcome(found, cost - gap * abs(cost))


class _HiGHS(pulp.HiGHS):
    """PuLP's HiGHS starts from nothing; this one starts from the variables' values."""

    def createAndConfigureSolver(self, lp: Any) -> None:
        _take_greeting()
        super().createAndConfigureSolver(lp)

    def callSolver(self, lp: Any) -> None:
        values = [variable.varValue for variable in lp.variables()]
        if None not in values:
            solution = highspy.HighsSolution()
            solution.col_value = values
            lp.solverModel.setSolution(solution)
        with _interruptible(lp.solverModel):
            super().callSolver(lp)


@contextmanager
def _interruptible(model: Any) -> Iterator[None]:
    """Let Ctrl-C end a run of HiGHS in the main thread, where Python hears of it in callbacks only."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[bool] = []

    def stop(event: Any) -> None:
        if pressed:
            event.interrupt()

    model.cbMipInterrupt += stop
    model.cbSimplexInterrupt += stop
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        raise KeyboardInterrupt


@cache
def _take_greeting() -> None:
    """Make a first solver: it prints the version to standard output, and no option of it keeps that from there."""
    sys.stdout.flush()
    kept = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(nowhere)
        os.close(kept)
