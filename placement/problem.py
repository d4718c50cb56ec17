"""A placement problem, the best answer so far with what is proven about it, and the final answer.

Shapes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import cast

import numpy as np

from moetrain.errors import PlacementError
from moetrain.placement.objectives import Objective, Term, TwoStages
from moetrain.placement.placement import Assignment, Placement

Progress = Callable[[float, float, float, str], None]
"""Called with the incumbent's cost, the bound, the seconds since the start and the solver, at each improvement."""

EXACT = 1e-9
"""Costs that differ by this fraction are equal: what is left is rounding."""


@dataclass(frozen=True)
class Problem:
    """Minimise the objective with `least` to `most` experts of each layer on each GPU."""

    objective: Objective
    num_layers: int
    num_experts: int
    num_gpus: int
    least: int
    most: int

    @staticmethod
    def equal(objective: Objective, num_layers: int, num_experts: int, num_gpus: int) -> Problem:
        """With E / G experts of each layer on each GPU. Raises PlacementError where that is no whole number."""
        if num_gpus < 1 or num_experts % num_gpus:
            raise PlacementError(
                f"{num_experts} experts cannot be shared equally by {num_gpus} GPUs: choose a number of GPUs that "
                f"divides {num_experts}, or bounds, as least = {num_experts // max(num_gpus, 1)} and "
                f"most = {-(-num_experts // max(num_gpus, 1))}"
            )
        share = num_experts // num_gpus
        return Problem(objective, num_layers, num_experts, num_gpus, share, share)

    @property
    def term(self) -> Term:
        """The objective, with its tables. Raises PlacementError where it has none."""
        if isinstance(self.objective, TwoStages):
            raise PlacementError("objective moetuner is solved by its own two stages: solver moetuner, or auto")
        return cast(Term, self.objective)

    def check(self) -> None:
        """Raises PlacementError where no assignment is feasible."""
        experts, gpus = self.num_experts, self.num_gpus
        if min(experts, gpus, self.num_layers) < 1:
            raise PlacementError(f"{self.num_layers} layers of {experts} experts on {gpus} GPUs: each must be positive")
        if not 0 <= self.least <= self.most:
            raise PlacementError(
                f"bounds of {self.least} to {self.most} experts on a GPU: least may not exceed most, nor be negative"
            )
        if self.least * gpus > experts:
            raise PlacementError(
                f"at least {self.least} experts on each of {gpus} GPUs takes {self.least * gpus}, but a layer has "
                f"{experts}: lower least to {experts // gpus} or fewer"
            )
        if self.most * gpus < experts:
            raise PlacementError(
                f"at most {self.most} experts on each of {gpus} GPUs holds {self.most * gpus}, but a layer has "
                f"{experts}: raise most to {-(-experts // gpus)} or more"
            )

    def misfit(self, gpu_LE: Assignment) -> str | None:
        """What keeps an assignment from being feasible, in words; None: nothing."""
        if gpu_LE.shape != (self.num_layers, self.num_experts):
            layers, experts = gpu_LE.shape
            return f"has {layers} × {experts} layers × experts, not {self.num_layers} × {self.num_experts}"
        held_LG = Placement(gpu_LE, self.num_gpus).experts_LG
        if held_LG.min() < self.least or held_LG.max() > self.most:
            return (
                f"has {held_LG.min()} to {held_LG.max()} experts of a layer on a GPU, not {self.least} to {self.most}"
            )
        return None


@dataclass(frozen=True)
class Solution:
    placement: Placement
    cost: float
    bound: float
    """Proven: no feasible assignment costs less."""
    solver: str
    """What found it."""
    seconds: float

    @property
    def gap(self) -> float:
        """(cost − bound) / cost; 0: proven optimal."""
        return 0.0 if self.cost <= self.bound else (self.cost - self.bound) / self.cost


class Incumbent:
    """The best assignment so far, the largest bound so far, and how long there is to better them."""

    def __init__(self, problem: Problem, gpu_LE: Assignment, time_limit: float, progress: Progress | None):
        self.problem = problem
        self.started = time.monotonic()
        self.deadline = self.started + time_limit
        self.gpu_LE = gpu_LE
        self.cost = inf
        self.bound = -inf
        self.solver = ""
        self._progress = progress

    def offer(self, gpu_LE: Assignment, solver: str) -> bool:
        """Take an assignment if it is better. Returns whether it was."""
        cost = self.problem.objective.cost(gpu_LE)
        better = cost < self.cost - EXACT * abs(self.cost) if self.solver else True
        if better:
            self.gpu_LE, self.cost, self.solver = gpu_LE.copy(), cost, solver
            self._report(solver)
        return better

    def prove(self, bound: float, solver: str) -> None:
        """Take a bound if it is larger."""
        if bound > self.bound:
            self.bound = bound
            self._report(solver)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    @property
    def seconds_left(self) -> float:
        return max(self.deadline - time.monotonic(), 0.0)

    @property
    def optimal(self) -> bool:
        return self.cost - self.bound <= EXACT * abs(self.cost)

    @property
    def done(self) -> bool:
        return self.optimal or time.monotonic() >= self.deadline

    @contextmanager
    def part(self, fraction: float) -> Iterator[None]:
        """For a while the deadline is after this fraction of the time that is left."""
        deadline = self.deadline
        self.deadline = time.monotonic() + fraction * self.seconds_left
        try:
            yield
        finally:
            self.deadline = deadline

    def solution(self) -> Solution:
        placement = Placement(self.gpu_LE, self.problem.num_gpus)
        return Solution(placement, self.cost, min(self.bound, self.cost), self.solver, self.seconds)

    def _report(self, solver: str) -> None:
        if self._progress is not None and np.isfinite(self.cost):
            self._progress(self.cost, min(self.bound, self.cost), self.seconds, solver)
