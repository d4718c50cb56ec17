"""Plain descents over any objective: layer by layer by assignment, and by the best swap or move of experts.

Shapes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

import time

import numpy as np

from moetrain.placement.objectives import transport
from moetrain.placement.placement import Assignment
from moetrain.placement.problem import EXACT, Problem


def random_assignment(problem: Problem, rng: np.random.Generator) -> Assignment:
    """Contiguous shares, as equal as may be, of a random order of each layer's experts."""
    gpu_E = np.arange(problem.num_experts) * problem.num_gpus // problem.num_experts
    return rng.permuted(np.tile(gpu_E, (problem.num_layers, 1)), axis=1)


def by_assignment(problem: Problem, gpu_LE: Assignment, deadline: float) -> Assignment:
    """Solve each layer with its neighbours fixed, to optimality (Hungarian), until no layer improves: for objectives
    that are linear in a layer. Others are returned as they are.

    `deadline` is on the clock of `time.monotonic`.
    """
    gpu_LE = gpu_LE.copy()
    waiting = list(range(problem.num_layers))
    while waiting and time.monotonic() < deadline:
        layer = waiting.pop(0)
        linear_EG = problem.term.linear(layer, gpu_LE, problem.num_gpus)
        if linear_EG is None:
            return gpu_LE
        gpu_E = transport(linear_EG, problem.least, problem.most)
        before, after = (np.take_along_axis(linear_EG, g_E[:, None], 1).sum() for g_E in (gpu_LE[layer], gpu_E))
        if after < before - EXACT * np.abs(linear_EG).max():
            gpu_LE[layer] = gpu_E
            near = (layer - 1, layer + 1)
            waiting += [other for other in near if 0 <= other < problem.num_layers and other not in waiting]
    return gpu_LE


def by_swaps(problem: Problem, gpu_LE: Assignment, deadline: float) -> Assignment:
    """Make the best swap, or move where the bounds allow it, of each layer in turn, until none helps.

    `deadline` is on the clock of `time.monotonic`.
    """
    objective, gpus = problem.term, problem.num_gpus
    gpu_LE = gpu_LE.copy()
    small = EXACT * max(abs(objective.cost(gpu_LE)), 1e-300)
    waiting = list(range(problem.num_layers))
    while waiting and time.monotonic() < deadline:
        layer = waiting.pop(0)
        gpu_E = gpu_LE[layer]
        swaps_EE = objective.swaps(layer, gpu_LE, gpus)
        first, second = np.unravel_index(np.argmin(swaps_EE), swaps_EE.shape)
        gain, changed = swaps_EE[first, second], [(first, gpu_E[second]), (second, gpu_E[first])]
        if problem.least < problem.most:
            held_G = np.bincount(gpu_E, minlength=gpus)
            allowed_EG = (held_G > problem.least)[gpu_E][:, None] & (held_G < problem.most)
            moves_EG = np.where(allowed_EG, objective.moves(layer, gpu_LE, gpus), np.inf)
            expert, gpu = np.unravel_index(np.argmin(moves_EG), moves_EG.shape)
            if moves_EG[expert, gpu] < gain:
                gain, changed = moves_EG[expert, gpu], [(expert, gpu)]
        if gain < -small:
            for expert, gpu in changed:
                gpu_LE[layer, expert] = gpu
            near = (layer, layer - 1, layer + 1)
            waiting += [other for other in near if 0 <= other < problem.num_layers and other not in waiting]
    return gpu_LE
