"""What a trace says: loads, which experts go together, and how both drift while the model trains.

Shapes: S sampled tokens, L MoE layers, K chosen experts, E experts, R source ranks, G GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from moetrain.errors import TraceError
from moetrain.placement.placement import Assignment
from moetrain.placement.trace import Trace

Floats = NDArray[np.float64]


def load_LE(trace: Trace) -> Floats:
    """[L, E]: the pairs of each expert, as fractions of the tokens (a layer sums to K where none is missing)."""
    return _counts_LE(trace) / trace.num_tokens


def load_RLE(trace: Trace) -> tuple[NDArray[np.integer], Floats]:
    """The source ranks [R] in order, and for each the loads of its tokens, as fractions of them [R, L, E].

    Raises TraceError where the trace does not say who had its tokens.
    """
    if trace.source_S is None:
        raise TraceError("the trace does not say which rank had which token; record it with placement.trace.every")
    ranks = np.unique(trace.source_S)
    return ranks, np.stack([load_LE(trace.select(trace.source_S == rank)) for rank in ranks])


def transitions_LEE(trace: Trace) -> Floats:
    """[L − 1, E, E]: between a layer and the next, the fraction of tokens that go from expert i to expert j.

    Each (i, j) of a token counts 1 / (K_l · K_{l+1}), K_l being how many experts it has in layer l (ExFlow, arXiv
    2401.08383, counts top-1 so). Tokens without an expert in one of the two layers do not count, so that each boundary
    sums to 1 (to 0 where no token is left).
    """
    boundaries = np.zeros((trace.num_layers - 1, trace.num_experts, trace.num_experts))
    before_SE = _chosen_SE(trace, 0, shares=True)
    for boundary in range(trace.num_layers - 1):
        after_SE = _chosen_SE(trace, boundary + 1, shares=True)
        boundaries[boundary] = (before_SE.T @ after_SE).toarray()
        before_SE = after_SE
    total_L11 = boundaries.sum((1, 2), keepdims=True)
    return np.divide(boundaries, total_L11, out=boundaries, where=total_L11 > 0)


def coactivation_LEE(trace: Trace) -> Floats:
    """[L, E, E]: the fraction of tokens that choose both experts; the diagonal is the load."""
    layers = np.empty((trace.num_layers, trace.num_experts, trace.num_experts))
    for layer in range(trace.num_layers):
        chosen_SE = _chosen_SE(trace, layer, shares=False)
        layers[layer] = (chosen_SE.T @ chosen_SE).toarray()
    return layers / trace.num_tokens


def load_LG(load_LE: NDArray[np.floating], gpu_LE: Assignment, num_gpus: int) -> Floats:
    """[L, G]: the loads of the GPUs, in the unit of `load_LE`."""
    return np.stack([np.bincount(gpu_E, load_E, num_gpus) for gpu_E, load_E in zip(gpu_LE, load_LE, strict=True)])


def imbalance_L(load_LX: Floats) -> Floats:
    """[L]: the largest load over the mean, of experts or of GPUs; 1 is balance, and so is a layer without pairs."""
    return relative_LX(load_LX).max(1)


def relative_LX(load_LX: Floats) -> Floats:
    """[L, X]: loads, of experts or of GPUs, over the mean of their layer; 1 in a layer without pairs."""
    mean_L1 = load_LX.mean(1, keepdims=True)
    return np.divide(load_LX, mean_L1, out=np.ones_like(load_LX), where=mean_L1 > 0)


@dataclass(frozen=True)
class Drift:
    """How far some recorded steps are from the first ones, in total-variation distance, mean over the layers.

    ½ Σ |p − q| over the experts' shares of a layer's load, or over a boundary's transitions: the fraction of pairs
    that would have to move. Finite samples differ even where nothing drifts; `…_noise` is the distance between two
    random samples, as large as these, of the tokens of both taken together.
    """

    first_step: int
    last_step: int
    tokens: int
    load: float
    load_noise: float
    transitions: float | None
    """None where there is one layer."""
    transitions_noise: float | None


def windows(trace: Trace, most: int) -> list[Trace]:
    """The recorded steps in order, in at most so many groups of equally many. Raises TraceError without steps."""
    if trace.step_S is None:
        raise TraceError("the trace does not say which step had which token; record it with placement.trace.every")
    steps, index_S = np.unique(trace.step_S, return_inverse=True)
    groups = min(most, len(steps))
    group_S = index_S * groups // len(steps)
    return [trace.select(group_S == group) for group in range(groups)]


def drift(windows: list[Trace], seed: int = 0) -> Iterator[Drift]:
    """The drift of each later window (see :func:`windows`) from the first."""
    rng = np.random.default_rng(seed)
    first = windows[0]
    first_load = _load_shares(first)
    first_transitions = transitions_LEE(first) if first.num_layers > 1 else None
    for later in windows[1:]:
        assert later.step_S is not None
        mixed = _shuffled(first, later, rng)
        yield Drift(
            first_step=int(later.step_S.min()),
            last_step=int(later.step_S.max()),
            tokens=later.num_tokens,
            load=_distance(first_load, _load_shares(later)),
            load_noise=_distance(*map(_load_shares, mixed)),
            transitions=None if first_transitions is None else _distance(first_transitions, transitions_LEE(later)),
            transitions_noise=None if first_transitions is None else _distance(*map(transitions_LEE, mixed)),
        )


def _counts_LE(trace: Trace) -> NDArray[np.int64]:
    experts = trace.num_experts
    # One bin more, for those that are none.
    counts = [
        np.bincount(trace.expert_ids_SLK[:, layer].ravel().astype(np.intp) + 1, minlength=experts + 1)
        for layer in range(trace.num_layers)
    ]
    return np.stack(counts)[:, 1:]


def _chosen_SE(trace: Trace, layer: int, *, shares: bool) -> sparse.csr_matrix:
    """[S, E]: 1 for each chosen expert of a token, or its share of them."""
    ids_SK = trace.expert_ids_SLK[:, layer]
    chosen_SK = ids_SK >= 0
    count_S = chosen_SK.sum(1)
    rows = np.concatenate([[0], np.cumsum(count_S)])
    values = np.repeat(1.0 / np.maximum(count_S, 1), count_S) if shares else np.ones(rows[-1])
    return sparse.csr_matrix((values, ids_SK[chosen_SK].astype(np.int32), rows), (trace.num_tokens, trace.num_experts))


def _load_shares(trace: Trace) -> Floats:
    load = load_LE(trace)
    total_L1 = load.sum(1, keepdims=True)
    return np.divide(load, total_L1, out=np.zeros_like(load), where=total_L1 > 0)


def _distance(p: Floats, q: Floats) -> float:
    """Total variation of each layer's distribution, mean over the layers."""
    return float(np.abs(p - q).sum() / 2 / len(p))


def _shuffled(first: Trace, later: Trace, rng: np.random.Generator) -> tuple[Trace, Trace]:
    """The tokens of both, dealt anew to two traces as large."""
    ids = np.concatenate([first.expert_ids_SLK, later.expert_ids_SLK])
    order = rng.permutation(len(ids))
    experts, size = first.num_experts, first.num_tokens
    return Trace(ids[order[:size]], experts), Trace(ids[order[size:]], experts)
