"""The experts' stages on Hopper: gated activations in bfloat16 or float16, weights and rows moved by TMA and
asynchronous copies, warp-specialised GEMMs (:mod:`moetrain.kernels.hopper_gemm`).

Sums over pairs and over experts are bound by memory and taken from the portable backend.

Names: T tokens, D width, E experts, I expert width, H = 2I, N pairs.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moetrain.kernels import autotune, hopper_gemm
from moetrain.kernels.activation import FUNCTION, Activation
from moetrain.kernels.grouped_triton import sizes, sum_by_expert, sum_pairs
from moetrain.kernels.routing import Routing
from moetrain.kernels.tile_schedule import TileSchedule, tile_schedule

__all__ = [
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

RowTiles = TypeVar("RowTiles", "GatherConfig", "ContiguousConfig")


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
    LOADER_REGISTERS: int = 48
    BLOCK_M: int = ROWS_PER_TILE
    num_warps: int = 8


@dataclass(frozen=True)
class ContiguousConfig:
    """Tiles of a GEMM over contiguous rows, written STORE_N columns at a time."""

    BLOCK_N: int = 256
    BLOCK_K: int = 64
    STAGES: int = 4
    STORE_N: int = 128
    GROUP: int = 4
    LOADER_REGISTERS: int = 24
    BLOCK_M: int = ROWS_PER_TILE
    num_warps: int = 8


@dataclass(frozen=True)
class WeightGradientConfig:
    """Tiles of a product over an expert's rows, BLOCK_K of them a step: BLOCK columns of the gathered side by OTHER of
    the contiguous one."""

    BLOCK: int = 128
    OTHER: int = 256
    BLOCK_K: int = 64
    STAGES: int = 4
    LOADER_WARPS: int = 4
    LOADER_REGISTERS: int = 56
    num_warps: int = 8


def _groupings(config: RowTiles) -> list[RowTiles]:
    """The configuration, and others for autotuning: which order of the tiles fits the L2 cache depends on the sizes of
    weights and rows, and on how many rows an expert has."""
    return [replace(config, GROUP=group) for group in dict.fromkeys((config.GROUP, 1, 4, 16))]


WIDE_GATHER = GatherConfig(BLOCK_N=256, BLOCK_K=64, STAGES=4, CHUNK=64)
NARROW_GATHER = GatherConfig(BLOCK_N=128, BLOCK_K=64, STAGES=6, CHUNK=32)


@functools.cache
def up_configs(columns: int) -> tuple[GatherConfig, ...]:
    """For the up projection with so many columns, the likely one first."""
    ordered = (NARROW_GATHER, WIDE_GATHER) if columns <= 128 else (WIDE_GATHER, NARROW_GATHER)
    first, second = (replace(config, GROUP=_group(columns, config.BLOCK_N)) for config in ordered)
    return (*_groupings(first), second)


@functools.cache
def hidden_gradient_configs(columns: int) -> tuple[GatherConfig, ...]:
    """For the hidden gradient with so many columns, the likely one first.

    They are few: those of a row tile at once, which read the gathered rows once, were 5% faster.
    """
    ordered = (NARROW_GATHER, WIDE_GATHER) if prefers_narrow(columns, rate=0.85) else (WIDE_GATHER, NARROW_GATHER)
    return (*_groupings(replace(ordered[0], GROUP=1)), replace(ordered[1], GROUP=1))


@functools.cache
def contiguous_configs(columns: int) -> tuple[ContiguousConfig, ...]:
    config = ContiguousConfig()
    return tuple(_groupings(replace(config, GROUP=_group(columns, config.BLOCK_N))))


def _group(columns: int, block: int) -> int:
    """Groups of one row tile spread half tiles evenly over the programs: in groups of four nothing was gained."""
    return 1 if hopper_gemm.last_columns(columns, block) < block else 4


def weight_gradient_config(gather_left: bool, columns: int) -> WeightGradientConfig:
    """For so many columns of the contiguous side."""
    config = WeightGradientConfig(LOADER_REGISTERS=56 if gather_left else 48)
    return replace(config, OTHER=128, STAGES=6) if columns <= 128 else config


def prefers_narrow(columns: int, rate: float) -> bool:
    """Whether tiles of 128 columns compute so much less beyond the last column than tiles of 256 that it makes up for
    their lower `rate` (measured), as they move 1.3 times as much through shared memory for each product."""
    return -(-columns // 128) * 128 < rate * (-(-columns // 256) * 256)


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
    tiles = tile_schedule(routing, ROWS_PER_TILE)
    h_NH = x_TD.new_empty(routing.num_pairs, hidden) if keep_hidden else None
    a_NI = x_TD.new_empty(routing.num_pairs, inner)

    def launch(config: GatherConfig) -> None:
        chunk = (config.BLOCK_M, config.CHUNK)
        box = hopper_gemm.last_columns(hidden, config.BLOCK_N)
        weight = _descriptor(w_up_EHD.view(experts, 2, inner, width), (1, 2, box // 2, config.BLOCK_K))
        hopper_gemm.up_projection_kernel[_programs(x_TD.device)](
            x_TD,
            weight,
            None if h_NH is None else _ragged_descriptor(h_NH.view(-1, 2, inner), (config.BLOCK_M, 1, config.CHUNK)),
            _ragged_descriptor(a_NI, chunk),
            routing.token_ids_N,
            *_work(tiles, routing),
            D=width,
            INNER=inner,
            **vars(config),
            FUNCTION=FUNCTION[activation],
            KEEP_HIDDEN=keep_hidden,
            A_LAYOUT=_layout((config.BLOCK_M, config.BLOCK_K), x_TD.dtype),
            B_LAYOUT=_layout((config.BLOCK_N, config.BLOCK_K), x_TD.dtype),
            BUFFER=_layout(chunk, x_TD.dtype),
        )

    key = (*sizes(x_TD, routing), hidden, keep_hidden)
    launch(autotune.choose("hopper up", key, up_configs(hidden), launch))
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
    tiles = tile_schedule(routing, ROWS_PER_TILE)
    dh_NH, weighted_a_NI = torch.empty_like(h_NH), h_NH.new_empty(routing.num_pairs, inner)

    def launch(config: GatherConfig) -> Tensor:
        dweights_CN = h_NH.new_empty(-(-inner // config.BLOCK_N), routing.num_pairs, dtype=torch.float32)
        part, chunk = (config.BLOCK_M, 1, config.CHUNK), (config.BLOCK_M, config.CHUNK)
        hopper_gemm.hidden_gradient_kernel[_programs(dy_TD.device)](
            dy_TD,
            _descriptor(w_down_EDI, (1, config.BLOCK_K, config.BLOCK_N)),
            _descriptor(h_NH.view(-1, 2, inner), part),
            weights_N,
            _ragged_descriptor(dh_NH.view(-1, 2, inner), part),
            _ragged_descriptor(weighted_a_NI, chunk),
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
            BUFFER=_layout(chunk, dy_TD.dtype),
        )
        return dweights_CN

    key = (*sizes(dy_TD, routing), inner)
    dweights_CN = launch(autotune.choose("hopper hidden", key, hidden_gradient_configs(inner), launch))
    return dh_NH, weighted_a_NI, dweights_CN[0] if len(dweights_CN) == 1 else dweights_CN.sum(0)


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
        box = hopper_gemm.last_columns(columns, config.BLOCK_N)
        weight_block = (box, config.BLOCK_K) if transposed else (config.BLOCK_K, box)
        store_block = (config.BLOCK_M, config.STORE_N)
        hopper_gemm.contiguous_kernel[_programs(rows_NK.device)](
            _descriptor(rows_NK, (config.BLOCK_M, config.BLOCK_K)),
            _descriptor(weight, (1, *weight_block)),
            _ragged_descriptor(out, store_block),
            *_work(tiles, routing),
            K=k,
            COLUMNS=columns,
            **vars(config),
            TRANSPOSED=transposed,
            A_LAYOUT=_layout((config.BLOCK_M, config.BLOCK_K), rows_NK.dtype),
            B_LAYOUT=_layout(weight_block, rows_NK.dtype),
            BUFFER=_layout(store_block, rows_NK.dtype),
        )

    key = (*sizes(rows_NK, routing), columns, transposed)
    launch(autotune.choose("hopper contiguous", key, contiguous_configs(columns), launch))
    return out


def _weight_gradient(gathered_TX: Tensor, contiguous_NX: Tensor, routing: Routing, *, gather_left: bool) -> Tensor:
    gathered, contiguous = gathered_TX.shape[1], contiguous_NX.shape[1]
    p, q = (gathered, contiguous) if gather_left else (contiguous, gathered)
    out = gathered_TX.new_empty(routing.num_experts, p, q)
    config = weight_gradient_config(gather_left, contiguous)
    rows_block, out_block = (config.BLOCK_K, config.OTHER // 2), (config.BLOCK, config.OTHER // 2)
    layout = _layout(rows_block, gathered_TX.dtype)
    hopper_gemm.weight_gradient_kernel[_programs(out.device)](
        gathered_TX,
        _ragged_descriptor(contiguous_NX, rows_block),
        _descriptor(out, (1, *out_block)),
        routing.token_ids_N,
        routing.expert_offsets,
        routing.num_experts,
        GATHERED=gathered,
        CONTIGUOUS=contiguous,
        **vars(config),
        GATHER_LEFT=gather_left,
        A_LAYOUT=layout,
        B_LAYOUT=layout,
        BUFFER=_layout(out_block, out.dtype),
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
    if tensor.shape[0] > rows:
        raise ValueError(f"{tensor.shape[0]} pairs, more than the {rows} of the hopper backend: use backend 'triton'")
    return TensorDescriptor(
        tensor,
        [unbounded, unbounded, rows, *tensor.shape[1:]],
        [2**34 - stride, stride, stride, *inner_strides],
        [1, 1, *block],
        _layout((1, 1, *block), tensor.dtype),
    )
