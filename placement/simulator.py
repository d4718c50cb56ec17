"""Predicted time of a training step's MoE layers, for a placement, a trace and a topology that may exist on paper only.

A layer of a step is four barriers' worth of work, and every rank waits for the slowest at each of them:

    dense ─ dispatch ─│─ experts ─│─ combine ─│ …                                    (and the same way back)

so a layer takes dense + maxᵍ dispatch + maxᵍ experts + maxᵍ combine seconds.

Shapes: S tokens, L layers, K experts a token, E experts, G GPUs (of the source before that of the destination).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.errors import PlacementError, TraceError
from moetrain.placement.placement import Placement
from moetrain.placement.statistics import load_LE
from moetrain.placement.topology import Topology
from moetrain.placement.trace import Trace
from moetrain.yaml_files import read_yaml

_DISPATCH_COLLECTIVES = 5
"""Sizes, rows, indices and weights on the way out; rows in combine's backward pass."""
_COMBINE_COLLECTIVES = 3
"""Rows on the way home; rows and weights in dispatch's backward pass."""


@dataclass(frozen=True)
class Calibration:
    """A layer's sizes, and what machines achieve. Defaults are OLMoE-1B-7B's sizes with 4 × 4096 tokens a GPU, and what
    was measured on H200s and H100s: docs/performance.md, docs/gpu-validation.md."""

    tokens_per_gpu: int = 16384
    """Of a micro-batch."""
    dim: int = 2048
    expert_dim: int = 1024
    row_itemsize: int = 2
    """Bytes of each of a row's `dim` numbers on its way: bfloat16."""
    pair_bytes: int = 12
    """Of a (token, expert) pair's two int32 and float32 weight, sent with the rows."""
    forward_flops: float = 6.18e14
    """FLOP/s of the experts' forward pass, padding counted as work. One H200, shape 32768,2048,1024,64,8: two products
    and the weighted sum, 5.42 ms."""
    backward_flops: float = 6.31e14
    """There: the products and the sum of the backward pass, 10.62 ms."""
    padding_rows: float = 64
    """Computed for each expert that has tokens, beyond its own: half of the products' tile of 128 rows."""
    expert_seconds: float = 3.6e-5
    """Of a layer's experts beyond their rows. There: routing metadata, once more for the rows that arrived, 36 µs."""
    dense_seconds: float = 7.4e-3
    """All else of a layer, forward and backward. One H200, of a step of 308 ms: attention, dense products, norms, loss,
    routing and element-wise kernels, 119 ms; a sixteenth of it."""
    link_efficiency: float = 0.47
    """Achieved share of the links' bandwidth. Two H100s, `ep=2`: 404 MB a rank, layer and micro-batch in 2.05 ms less
    eight `exchange_seconds`, of NVLink's 450 GB/s. Nothing across nodes has been measured."""
    exchange_seconds: float = 1.8e-5
    """Of a collective beyond its bytes and the links' latency. Two H200s: all-to-alls of 4 to 67 MB, a line's start."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < np.inf:
                raise PlacementError(f"{field.name} = {value!r}: expected a number, 0 or more")
        for name in ("tokens_per_gpu", "dim", "expert_dim", "forward_flops", "backward_flops", "link_efficiency"):
            if getattr(self, name) == 0:
                raise PlacementError(f"{name} = 0: expected a number above 0")

    @property
    def row_bytes(self) -> float:
        return self.dim * self.row_itemsize

    @property
    def pair_seconds(self) -> float:
        """Of one row of one expert, forward and backward: 6·D·I FLOPs and 12·D·I."""
        return 6 * self.dim * self.expert_dim * (1 / self.forward_flops + 2 / self.backward_flops)


def load_calibration(path: Path) -> Calibration:
    """Read a YAML or JSON file of some of Calibration's fields, the others as they are by default.

    Raises PlacementError, which names the file and the key.
    """
    record = read_yaml(path, PlacementError)
    try:
        if not isinstance(record, dict):
            raise PlacementError("expected `key: number` lines")
        names = [field.name for field in fields(Calibration)]
        for key in record:
            if key not in names:
                raise PlacementError(f"no such key: {key}; there are {', '.join(names)}")
        return Calibration(**{key: _number(value) for key, value in record.items()})
    except PlacementError as error:
        raise PlacementError(f"{path}: {error}") from None


def _number(value: Any) -> Any:
    """What YAML 1.1 takes for text, 5e14, as the number that it is in JSON and in YAML 1.2."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


@dataclass(frozen=True, eq=False)
class Simulation:
    """Seconds of a micro-batch, forward and backward."""

    dense_seconds: float
    """Of each layer, on every GPU."""
    dispatch_LG: NDArray[np.float64]
    """Until a GPU has sent and received its rows, and in the backward pass the gradients of its sums."""
    compute_LG: NDArray[np.float64]
    combine_LG: NDArray[np.float64]
    """Until it has sent and received its sums, and the gradients of its rows."""
    rows_GG: NDArray[np.float64]
    """Rows that a token of each GPU sends in a layer's dispatch to each GPU, itself included; mean over the layers."""

    @property
    def layer_seconds_L(self) -> NDArray[np.float64]:
        parts = (self.dispatch_LG, self.compute_LG, self.combine_LG)
        return self.dense_seconds + sum(part.max(axis=1) for part in parts)

    @property
    def step_seconds(self) -> float:
        return float(self.layer_seconds_L.sum())


def simulate(
    trace: Trace, placement: Placement, topology: Topology, calibration: Calibration | None = None, seed: int = 0
) -> Simulation:
    """Time the layers of `trace` with experts as `placement` has them, every GPU being the source of as many tokens.

    The trace's tokens stand for each GPU's `tokens_per_gpu`: those that it was the source of (see :func:`sources`). Few
    of them for each GPU differ more among themselves than a whole micro-batch does, so tails come out too long.

    An exchange ends for a GPU when the slowest link that its rows pass, out or in, has carried all that it must carry,
    of all GPUs, and a latency later. Both directions of a link carry at once.

    Raises PlacementError where trace, placement and topology do not fit each other, and TraceError where there are
    fewer tokens than GPUs.
    """
    calibration = calibration or Calibration()
    G = topology.num_gpus
    if (placement.num_layers, placement.num_experts) != (trace.num_layers, trace.num_experts):
        raise PlacementError(
            f"a placement of {placement.num_layers} layers × {placement.num_experts} experts does not fit a trace of "
            f"{trace.num_layers} × {trace.num_experts}"
        )
    if placement.num_gpus != G:
        raise PlacementError(f"a placement on {placement.num_gpus} GPUs does not fit a topology of {G}")
    source_S = sources(trace, G, seed)
    # Each source's tokens, however many were recorded, stand for one micro-batch.
    weight_G: NDArray[np.float64] = calibration.tokens_per_gpu / np.bincount(source_S, minlength=G)
    used_LE = load_LE(trace) > 0
    dispatch_LG, compute_LG, combine_LG = np.empty((3, trace.num_layers, G))
    all_rows_GG = np.zeros((G, G))
    for layer in range(trace.num_layers):
        rows_GG, pairs_GG = _dispatch(trace, placement, layer, source_S, weight_G)
        all_rows_GG += rows_GG
        bytes_GG = rows_GG * calibration.row_bytes
        plain_G = _exchange_seconds(bytes_GG, topology, calibration)
        with_pairs_G = _exchange_seconds(bytes_GG + pairs_GG * calibration.pair_bytes, topology, calibration)
        experts_G = np.bincount(placement.gpu_LE[layer][used_LE[layer]], minlength=G)
        computed_G = pairs_GG.sum(axis=0) + experts_G * calibration.padding_rows
        fixed = calibration.exchange_seconds if G > 1 else 0.0
        dispatch_LG[layer] = with_pairs_G + plain_G + _DISPATCH_COLLECTIVES * fixed
        compute_LG[layer] = computed_G * calibration.pair_seconds + calibration.expert_seconds
        # Links are as fast one way as the other, so rows take as long to come home.
        combine_LG[layer] = 2 * plain_G + _COMBINE_COLLECTIVES * fixed
    tokens = trace.num_layers * calibration.tokens_per_gpu
    return Simulation(calibration.dense_seconds, dispatch_LG, compute_LG, combine_LG, all_rows_GG / tokens)


def sources(trace: Trace, num_gpus: int, seed: int = 0) -> NDArray[np.int64]:
    """[S]: the GPU that has each token: as recorded, if on `num_gpus` ranks; else dealt at random and evenly.

    Raises TraceError where there are fewer tokens than GPUs.
    """
    if trace.num_tokens < num_gpus:
        raise TraceError(
            f"{trace.num_tokens} tokens for {num_gpus} GPUs: each must be the source of some; record more tokens"
        )
    recorded_S = trace.source_among(num_gpus)
    if recorded_S is not None:
        return recorded_S.astype(np.int64)
    return np.random.default_rng(seed).permutation(trace.num_tokens) % num_gpus


def _dispatch(
    trace: Trace, placement: Placement, layer: int, source_S: NDArray[np.int64], weight_G: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows and pairs of one layer's dispatch from each GPU to each, itself included, both [G, G].

    A row goes to a GPU once for each token that has experts there, a pair once for each expert. Tokens count as much as
    the weight of their source.
    """
    G = placement.num_gpus
    ids_SK = trace.expert_ids_SLK[:, layer]
    gpu_SK = np.sort(np.where(ids_SK < 0, G, placement.gpu_LE[layer][ids_SK]), axis=1)
    chosen_SK = gpu_SK < G
    first_SK = chosen_SK.copy()
    first_SK[:, 1:] &= gpu_SK[:, 1:] != gpu_SK[:, :-1]
    cell_SK = source_S[:, None] * G + gpu_SK
    rows_GG, pairs_GG = (np.bincount(cell_SK[kept], minlength=G * G).reshape(G, G) for kept in (first_SK, chosen_SK))
    return rows_GG * weight_G[:, None], pairs_GG * weight_G[:, None]


def _exchange_seconds(
    bytes_GG: NDArray[np.float64], topology: Topology, calibration: Calibration
) -> NDArray[np.float64]:
    """[G]: when each GPU has sent and received all its bytes; what stays on a GPU takes no time."""
    # No link, where a path is shorter than the longest, carries nothing.
    carried_X = topology.link_bytes_X(bytes_GG) / (topology.link_bandwidth_X * calibration.link_efficiency)
    seconds_X = np.append(carried_X, 0.0)
    slowest_GG = np.zeros_like(bytes_GG)
    for link_GG in topology.path_links_HGG:
        np.maximum(slowest_GG, seconds_X[link_GG], out=slowest_GG)
    seconds_GG = np.where(bytes_GG > 0, slowest_GG + topology.latency_GG, 0)
    return np.maximum(seconds_GG.max(axis=0), seconds_GG.max(axis=1))
