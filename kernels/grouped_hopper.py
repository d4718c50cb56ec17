"""The experts' stages on Hopper: gated activations in bfloat16 or float16, weights and rows moved by TMA and
asynchronous copies, warp-specialised GEMMs (:mod:`moetrain.kernels.hopper_gemm`).

Sums over pairs and over experts are bound by memory and taken from the portable backend.

Names: T tokens, D width, E experts, I expert width, H = 2I, N pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moetrain.kernels import autotune, hopper_gemm
from moetrain.kernels.activation import FUNCTION, Activation
from moetrain.kernels.grouped_triton import sum_by_expert, sum_pairs
from moetrain.kernels.routing import Routing
from moetrain.kernels.tile_schedule import TileSchedule, tile_schedule

__all__ = [
    "ROWS_PER_TILE",
    "down_projection",
    "down_weight_gradient",
    "hidden_gradient",
    "input_gradient",
    "sum_by_expert",
    "sum_pairs",
    "up_projection",
    "up_weight_gradient",
]

ROWS_PER_TILE = 128


@dataclass(frozen=True)
class GatherConfig:
    """Tiles of a GEMM over gathered rows, whose epilogue works on CHUNK columns.

    GROUP row tiles of an expert take turns before the next column (:func:`tile_schedule.work_item`). What a chunk
    reads or writes, three blocks of BLOCK_M · CHUNK, passes through a slot of the ring: two in the place of a weight
    tile, BLOCK_N · BLOCK_K, one in that of the rows, BLOCK_M · BLOCK_K.
    """

    BLOCK_N: int
    BLOCK_K: int
    STAGES: int
    CHUNK: int
    GROUP: int = 4
    LOADER_WARPS: int = 4
    LOADER_REGISTERS: int = 64
    BLOCK_M: int = ROWS_PER_TILE
    num_warps: int = 8


@dataclass(frozen=True)
class ContiguousConfig:
    """Tiles of a GEMM over contiguous rows. Two CONSUMERS of 4 warps alternate, or one of 8 computes all tiles."""

    BLOCK_N: int
    BLOCK_K: int
    STAGES: int
    CONSUMERS: int
    STORE_N: int
    BUFFERS: int
    num_warps: int
    CONSUMER_REGISTERS: int = 232
    LOADER_REGISTERS: int = 24
    BLOCK_M: int = ROWS_PER_TILE
    GROUP: int = 4


@dataclass(frozen=True)
class WeightGradientConfig:
    """Tiles of a product over an expert's rows, BLOCK_K of them a step; the narrower side is the gathered one."""

    BLOCK_P: int
    BLOCK_Q: int
    BLOCK_K: int
    STAGES: int
    LOADER_WARPS: int = 4
    LOADER_REGISTERS: int = 56
    num_warps: int = 8


def gather_config(columns: int) -> GatherConfig:
    """For a GEMM with so many output columns."""
    if columns > 128:
        return GatherConfig(BLOCK_N=256, BLOCK_K=64, STAGES=4, CHUNK=64)
    return GatherConfig(BLOCK_N=128, BLOCK_K=64, STAGES=6, CHUNK=32)


def contiguous_configs(k: int) -> tuple[ContiguousConfig, ...]:
    """For a reduction over k, the likely one first: a short one cannot hide the writing of its tile, a second
    consumer can."""
    alternating = ContiguousConfig(BLOCK_N=128, BLOCK_K=64, STAGES=5, CONSUMERS=2, STORE_N=64, BUFFERS=2, num_warps=4)
    cooperative = ContiguousConfig(BLOCK_N=256, BLOCK_K=64, STAGES=4, CONSUMERS=1, STORE_N=128, BUFFERS=1, num_warps=8)
    return (alternating, cooperative) if k <= 640 else (cooperative, alternating)


def weight_gradient_config(gather_left: bool) -> WeightGradientConfig:
    """256 columns of the contiguous side by 128 of the gathered one."""
    if gather_left:
        return WeightGradientConfig(BLOCK_P=128, BLOCK_Q=256, BLOCK_K=64, STAGES=4)
    return WeightGradientConfig(BLOCK_P=256, BLOCK_Q=128, BLOCK_K=64, STAGES=4, LOADER_REGISTERS=40)


def up_projection(
    x_TD: Tensor,
    w_up_EHD: Tensor,
    b_up_EH: Tensor | None,
    routing: Routing,
    activation: Activation,
    *,
    keep_hidden: bool,
) -> tuple[Tensor | None, Tensor]:
    """h = W_gate_up,e x of each pair (None unless `keep_hidden`) and a = f(gate) ⊙ up. Takes no bias."""
    assert b_up_EH is None, "the Hopper kernels take no bias"
    experts, hidden, width = w_up_EHD.shape
    inner = hidden // 2
    config = gather_config(hidden)
    tiles = tile_schedule(routing, config.BLOCK_M)
    h_NH = x_TD.new_empty(routing.num_pairs, hidden) if keep_hidden else None
    a_NI = x_TD.new_empty(routing.num_pairs, inner)
    weight = _descriptor(w_up_EHD.view(experts, 2, inner, width), (1, 2, config.BLOCK_N // 2, config.BLOCK_K))
    hopper_gemm.up_projection_kernel[_programs(x_TD.device)](
        x_TD,
        weight,
        None if h_NH is None else _ragged_descriptor(h_NH.view(-1, 2, inner), (config.BLOCK_M, 1, config.CHUNK)),
        _ragged_descriptor(a_NI, (config.BLOCK_M, config.CHUNK)),
        routing.token_ids_N,
        *_work(tiles, routing),
        D=width,
        INNER=inner,
        **vars(config),
        FUNCTION=FUNCTION[activation],
        KEEP_HIDDEN=keep_hidden,
        A_LAYOUT=_layout((config.BLOCK_M, config.BLOCK_K), x_TD.dtype),
        B_LAYOUT=_layout((config.BLOCK_N, config.BLOCK_K), x_TD.dtype),
        BUFFER=_layout((config.BLOCK_M, config.CHUNK), x_TD.dtype),
    )
    return h_NH, a_NI


def hidden_gradient(
    dy_TD: Tensor,
    w_down_EDI: Tensor,
    h_NH: Tensor,
    weights_N: Tensor,
    routing: Routing,
    activation: Activation,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh [N, 2I], the weighted a [N, I] and the gradient [N] of the pairs' weights, float32."""
    _, width, inner = w_down_EDI.shape
    config = gather_config(inner)
    tiles = tile_schedule(routing, config.BLOCK_M)
    dh_NH, weighted_a_NI = torch.empty_like(h_NH), h_NH.new_empty(routing.num_pairs, inner)
    column_tiles = -(-inner // config.BLOCK_N)
    dweights_CN = h_NH.new_empty(column_tiles, routing.num_pairs, dtype=torch.float32)
    hopper_gemm.hidden_gradient_kernel[_programs(dy_TD.device)](
        dy_TD,
        _descriptor(w_down_EDI, (1, config.BLOCK_K, config.BLOCK_N)),
        _descriptor(h_NH.view(-1, 2, inner), (config.BLOCK_M, 1, config.CHUNK)),
        weights_N,
        _ragged_descriptor(dh_NH.view(-1, 2, inner), (config.BLOCK_M, 1, config.CHUNK)),
        _ragged_descriptor(weighted_a_NI, (config.BLOCK_M, config.CHUNK)),
        dweights_CN,
        routing.num_pairs,
        routing.token_ids_N,
        *_work(tiles, routing),
        D=width,
        INNER=inner,
        **vars(config),
        FUNCTION=FUNCTION[activation],
        A_LAYOUT=_layout((config.BLOCK_M, config.BLOCK_K), dy_TD.dtype),
        B_LAYOUT=_layout((config.BLOCK_K, config.BLOCK_N), dy_TD.dtype),
        BUFFER=_layout((config.BLOCK_M, config.CHUNK), dy_TD.dtype),
    )
    return dh_NH, weighted_a_NI, dweights_CN[0] if column_tiles == 1 else dweights_CN.sum(0)


def down_projection(a_NI: Tensor, w_down_EDI: Tensor, b_down_ED: Tensor | None, routing: Routing) -> Tensor:
    """y = W_down,e a of each pair, [N, D]. Takes no bias."""
    assert b_down_ED is None, "the Hopper kernels take no bias"
    return _contiguous(a_NI, w_down_EDI, routing, transposed=True)


def input_gradient(dh_NH: Tensor, w_up_EHD: Tensor, routing: Routing) -> Tensor:
    """dx = dh W_gate_up,e of each pair, [N, D]."""
    return _contiguous(dh_NH, w_up_EHD, routing, transposed=False)


def up_weight_gradient(dh_NH: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
    """dhᵀ x over each expert's pairs, [E, H, D]."""
    return _weight_gradient(x_TD, dh_NH, routing, gather_left=False)


def down_weight_gradient(dy_TD: Tensor, weighted_a_NI: Tensor, routing: Routing) -> Tensor:
    """dyᵀ (w a) over each expert's pairs, [E, D, I]."""
    return _weight_gradient(dy_TD, weighted_a_NI, routing, gather_left=True)


def _contiguous(rows_NK: Tensor, weight: Tensor, routing: Routing, *, transposed: bool) -> Tensor:
    """rows · weight, or rows · weightᵀ if `transposed`, of each row's expert."""
    k, columns = rows_NK.shape[1], weight.shape[1 if transposed else 2]
    tiles = tile_schedule(routing, ROWS_PER_TILE)
    out = rows_NK.new_empty(routing.num_pairs, columns)

    def launch(config: ContiguousConfig) -> None:
        weight_block = (config.BLOCK_N, config.BLOCK_K) if transposed else (config.BLOCK_K, config.BLOCK_N)
        hopper_gemm.contiguous_kernel[_programs(rows_NK.device)](
            _descriptor(rows_NK, (config.BLOCK_M, config.BLOCK_K)),
            _descriptor(weight, (1, *weight_block)),
            _ragged_descriptor(out, (config.BLOCK_M, config.STORE_N)),
            *_work(tiles, routing),
            K=k,
            COLUMNS=columns,
            **vars(config),
            TRANSPOSED=transposed,
            A_LAYOUT=_layout((config.BLOCK_M, config.BLOCK_K), rows_NK.dtype),
            B_LAYOUT=_layout(weight_block, rows_NK.dtype),
            BUFFER_LAYOUT=_layout((config.BLOCK_M, config.STORE_N), rows_NK.dtype),
        )

    key = (rows_NK.dtype, transposed, k, columns, routing.num_experts, triton.next_power_of_2(routing.num_pairs))
    launch(autotune.choose("hopper contiguous", key, contiguous_configs(k), launch))
    return out


def _weight_gradient(gathered_TX: Tensor, contiguous_NX: Tensor, routing: Routing, *, gather_left: bool) -> Tensor:
    config = weight_gradient_config(gather_left)
    left, right = (gathered_TX, contiguous_NX) if gather_left else (contiguous_NX, gathered_TX)
    p, q = left.shape[1], right.shape[1]
    out = left.new_empty(routing.num_experts, p, q)
    other = config.BLOCK_Q if gather_left else config.BLOCK_P
    hopper_gemm.weight_gradient_kernel[_programs(left.device)](
        gathered_TX,
        _ragged_descriptor(contiguous_NX, (config.BLOCK_K, other)),
        _descriptor(out, (1, config.BLOCK_P, config.BLOCK_Q // 2)),
        routing.token_ids_N,
        routing.expert_offsets,
        routing.num_experts,
        P=p,
        Q=q,
        **vars(config),
        GATHER_LEFT=gather_left,
        A_LAYOUT=_layout((config.BLOCK_K, config.BLOCK_P), left.dtype),
        B_LAYOUT=_layout((config.BLOCK_K, config.BLOCK_Q), left.dtype),
        BUFFER_LAYOUT=_layout((config.BLOCK_P, config.BLOCK_Q // 2), left.dtype),
    )
    return out


def _work(tiles: TileSchedule, routing: Routing) -> tuple[Tensor | int, ...]:
    return routing.expert_offsets, tiles.tile_experts_M, tiles.expert_tiles, routing.num_experts


@functools.cache
def _programs(device: torch.device) -> tuple[int]:
    """A persistent grid: one program a multiprocessor."""
    return (torch.cuda.get_device_properties(device).multi_processor_count,)


@functools.cache
def _layout(block: tuple[int, ...], dtype: torch.dtype) -> gl.NVMMASharedLayout:
    """The swizzled shared-memory layout that TMA and the tensor cores take."""
    return gl.NVMMASharedLayout.get_default_for(list(block), gl.bfloat16 if dtype == torch.bfloat16 else gl.float16)


def _descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    return TensorDescriptor(
        tensor, list(tensor.shape), list(tensor.stride()), list(block), _layout(block, tensor.dtype)
    )


def _ragged_descriptor(tensor: Tensor, block: tuple[int, ...]) -> TensorDescriptor:
    """Rows [N, …] with a bound that the kernel chooses for each access: see :func:`hopper_gemm.ragged`."""
    stride, *inner_strides = tensor.stride()
    unbounded, rows = 0x7FFF0000, 0x40000000
    return TensorDescriptor(
        tensor,
        [unbounded, unbounded, rows, *tensor.shape[1:]],
        [2**34 - stride, stride, stride, *inner_strides],
        [1, 1, *block],
        _layout((1, 1, *block), tensor.dtype),
    )
