"""ExFlow's integer program (arXiv 2401.08383, section IV), and those of load and traffic, in one.

ExFlow has a binary variable for each expert and GPU, x, and one for each token and layer boundary, which is 1 if the
token's two experts are on different GPUs: at least x_eg − x_fg for every GPU g. Tokens that take the same two experts
have the same value, so here a variable stands for all of them, and need not be declared binary; with other distances
than 1 it is at least Σ_h distance_gh·x_fh less what that is at most where e is not on g. Load adds each layer's peak,
at least every GPU's load, and traffic one variable for each distinct row and GPU that it may reach.

What is not in the papers narrows the search and loses no optimum: an expert has at most `most` partners on its GPU,
and where the names of GPUs do not matter, they are in order of the first experts of the first layer.

Shapes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import numpy as np
import pulp

from moetrain.placement.objectives import HopTerm, LoadTerm, TrafficTerm, parts
from moetrain.placement.placement import Assignment
from moetrain.placement.problem import Incumbent, Problem
from moetrain.placement.program import minimise
from moetrain.placement.search import named_in_order, polish

_TOLERANCE = 1e-6
"""Of HiGHS and CBC, taken off their bounds."""
_LARGEST = 150_000
"""Coefficients; what HiGHS proves in minutes of programs with more is nothing."""
_WRITTEN = 20_000
"""Coefficients that PuLP writes in a second, on a slow machine."""


def solve_program(incumbent: Incumbent, rng: np.random.Generator) -> None:
    """Descend, then solve the integer program from there until the deadline; a program too large, for the time that is
    left or for any, is left alone."""
    problem = incumbent.problem
    incumbent.offer(polish(problem, incumbent.gpu_LE, incumbent.deadline), "descent")
    if incumbent.done or size(problem) > min(_LARGEST, _WRITTEN * incumbent.seconds_left):
        return
    scale = 1 / incumbent.cost
    written = Program(problem, incumbent.gpu_LE, scale)
    outcome = minimise(written.program, incumbent.seconds_left)
    if outcome.found:
        value_LEG = np.array([[[place.varValue for place in of_E] for of_E in of_L] for of_L in written.place_LEG])
        incumbent.offer(value_LEG.argmax(2), "ilp")
    incumbent.prove((outcome.bound - _TOLERANCE) / scale, "ilp")


def size(problem: Problem) -> int:
    """About how many coefficients the program has."""
    gpus, total = problem.num_gpus, 3 * problem.num_layers * problem.num_experts * problem.num_gpus
    for _, term in parts(problem.objective):
        if isinstance(term, HopTerm):
            total += int(np.count_nonzero(term.transitions_LEE)) * gpus * (gpus + 1)
        if isinstance(term, TrafficTerm):
            total += sum(len(rows.row_N) for rows in term.rows) * gpus * 2
    return total


class Program:
    """The program with its variables at a placement to start from; costs are times `scale`."""

    def __init__(self, problem: Problem, start_LE: Assignment, scale: float):
        if problem.term.symmetric:
            names_G = np.full(problem.num_gpus, -1)
            names_G[start_LE[0]] = named_in_order(start_LE[0])
            names_G[names_G < 0] = np.setdiff1d(np.arange(problem.num_gpus), names_G)
            start_LE = names_G[start_LE]
        self.problem = problem
        self.start_LE = start_LE
        self.program = pulp.LpProblem("placement", pulp.LpMinimize)
        self.gpus = range(problem.num_gpus)
        self.place_LEG = [
            [
                [self.variable(f"x_{layer}_{expert}_{gpu}", float(gpu == at), 1) for gpu in self.gpus]
                for expert, at in enumerate(gpu_E)
            ]
            for layer, gpu_E in enumerate(start_LE)
        ]
        for place_EG in self.place_LEG:
            for place_G in place_EG:
                self.program += pulp.lpSum(place_G) == 1
            for gpu in self.gpus:
                held = pulp.lpSum(place_G[gpu] for place_G in place_EG)
                self.program += held >= problem.least
                self.program += held <= problem.most
        if problem.term.symmetric:
            first_EG = self.place_LEG[0]
            for expert, place_G in enumerate(first_EG):
                for gpu in self.gpus[1:]:
                    self.program += place_G[gpu] <= pulp.lpSum(before_G[gpu - 1] for before_G in first_EG[:expert])
        costs: list[pulp.LpAffineExpression] = []
        for weight, term in parts(problem.objective):
            if isinstance(term, LoadTerm):
                costs += [scale * weight * cost for cost in self.load(term)]
            elif isinstance(term, HopTerm):
                costs += [scale * weight * cost for cost in self.hops(term)]
            elif isinstance(term, TrafficTerm):
                costs += [scale * weight * cost for cost in self.traffic(term)]
        self.program.setObjective(pulp.lpSum(costs))

    def variable(self, name: str, value: float, most: int | None = None) -> pulp.LpVariable:
        """Continuous from 0 up, or binary if `most` is 1, with its value in the placement to start from."""
        category = pulp.LpContinuous if most is None else pulp.LpInteger
        variable = self.program.add_variable(f"{name}_{self.program.numVariables()}", 0, most, category)
        variable.setInitialValue(value)
        return variable

    def load(self, term: LoadTerm) -> list[pulp.LpAffineExpression]:
        costs = []
        for layer, (load_E, place_EG) in enumerate(zip(term.load_LE, self.place_LEG, strict=True)):
            start = float(term.within(layer, self.start_LE[layer, None], self.problem.num_gpus)[0])
            peak = self.variable(f"peak_{layer}", start)
            for gpu in self.gpus:
                on_gpu = [float(load) * place_G[gpu] for load, place_G in zip(load_E, place_EG, strict=True)]
                self.program += pulp.lpSum(on_gpu) <= peak
            costs.append(1 * peak)
        return costs

    def hops(self, term: HopTerm) -> list[pulp.LpAffineExpression]:
        costs, distance_GG = [], term.distance_GG
        apart = distance_GG[~np.eye(len(distance_GG), dtype=bool)]
        shortest = float(apart.min()) if apart.size else 0.0
        for layer, transitions_EE in enumerate(term.transitions_LEE):
            partners: dict[tuple[str, int], list[pulp.LpAffineExpression]] = {}
            for one, other in np.argwhere(transitions_EE):
                start = float(distance_GG[self.start_LE[layer, one], self.start_LE[layer + 1, other]])
                way = self.variable(f"way_{layer}_{one}_{other}", start)
                here_G, there_G = self.place_LEG[layer][one], self.place_LEG[layer + 1][other]
                for gpu in self.gpus:
                    arrived = pulp.lpSum(float(distance_GG[gpu, to]) * there_G[to] for to in self.gpus)
                    self.program += way >= arrived - float(distance_GG[gpu].max()) * (1 - here_G[gpu])
                costs.append(float(transitions_EE[one, other]) * way)
                if shortest > 0:
                    for side in (("of", int(one)), ("at", int(other))):
                        partners.setdefault(side, []).append(1 - (1 / shortest) * way)
            for near in partners.values():
                if len(near) > self.problem.most:
                    self.program += pulp.lpSum(near) <= self.problem.most
        return costs

    def traffic(self, term: TrafficTerm) -> list[pulp.LpAffineExpression]:
        costs = []
        for layer, (rows, place_EG) in enumerate(zip(term.rows, self.place_LEG, strict=True)):
            held_UG = rows.held_UG(self.start_LE[layer], self.problem.num_gpus)
            for row, (source, weight) in enumerate(zip(rows.source_U, rows.weight_U, strict=True)):
                experts = rows.expert_N[rows.first_U[row] : rows.first_U[row + 1]]
                for gpu in np.flatnonzero(term.distance_SG[source]):
                    reached = self.variable(f"row_{layer}_{row}_{gpu}", float(held_UG[row, gpu] > 0))
                    for expert in experts:
                        self.program += reached >= place_EG[expert][gpu]
                    costs.append(float(weight * term.distance_SG[source, gpu]) * reached)
        return costs
