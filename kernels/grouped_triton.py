"""The experts' stages in portable Triton: any GPU from Ampere on, and Triton's interpreter.

Where the GPU has the tensor memory accelerator and the operands suit it (16-bit, aligned), weights and contiguous rows
go through it; elsewhere all is read by pointer. Tensors must be contiguous and on one device.

Names: T tokens, D width, E experts, I expert width, H = 2I for gated activations and I for plain ones, N pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import triton
from torch import Tensor
from triton.tools.ragged_tma import create_ragged_descriptor
from triton.tools.tensor_descriptor import TensorDescriptor

from moetrain.kernels import autotune, gemm_triton
from moetrain.kernels.activation import FUNCTION, Activation, is_gated
from moetrain.kernels.routing import Routing
from moetrain.kernels.sums_triton import sum_by_expert, sum_pairs
from moetrain.kernels.tile_schedule import tile_schedule

__all__ = [
    "CONFIGS",
    "GemmConfig",
    "choose_configs",
    "down_projection",
    "down_weight_gradient",
    "hidden_gradient",
    "input_gradient",
    "sum_by_expert",
    "sum_pairs",
    "up_projection",
    "up_weight_gradient",
]

Stage = Literal["up", "linear", "hidden", "weight"]
ShapeClass = Literal["tma", "tma_few_rows", "pointer", "pointer_few_rows", "float32"]

FEW_ROWS = 64
"""Up to this many rows an expert on average, tiles of 128 rows would be half empty."""
MAX_TMA_ROWS = 2**30
"""More rows a ragged descriptor cannot name."""


@dataclass(frozen=True)
class GemmConfig:
    """Tile and launch of one kernel. A weight gradient's tile is BLOCK_M × BLOCK_N of the weight."""

    BLOCK_M: int
    BLOCK_N: int
    """Columns of the product: of a gated up-projection half of them are gate and half are up."""
    BLOCK_K: int
    num_warps: int
    num_stages: int
    programs_per_sm: int = 0
    """Programs of a persistent grid; 0 for one program a tile, which balances tiles of uneven work."""
    FLATTEN: bool = False
    """Pipeline across the tiles of a persistent program."""
    GROUP: int = 4
    """Row tiles of an expert that take turns before the next column: :func:`tile_schedule.work_item`."""
    chunk_columns: int = 32
    """Columns that the epilogue of the hidden gradient finishes at once."""


# Shared memory: "tma" is for the 227 KiB of Hopper and datacentre Blackwell, the others for the 99 KiB that every GPU
# from Ampere on has.
CONFIGS: dict[tuple[Stage, ShapeClass], GemmConfig] = {
    ("up", "tma"): GemmConfig(128, 256, 64, num_warps=8, num_stages=4, programs_per_sm=1),
    ("linear", "tma"): GemmConfig(128, 256, 64, num_warps=8, num_stages=4, programs_per_sm=1, FLATTEN=True),
    ("hidden", "tma"): GemmConfig(128, 128, 64, num_warps=4, num_stages=3, programs_per_sm=2),
    ("weight", "tma"): GemmConfig(128, 256, 64, num_warps=8, num_stages=4),
    ("up", "tma_few_rows"): GemmConfig(64, 128, 64, num_warps=4, num_stages=4, programs_per_sm=2),
    ("linear", "tma_few_rows"): GemmConfig(64, 128, 64, num_warps=4, num_stages=4, programs_per_sm=2, FLATTEN=True),
    ("hidden", "tma_few_rows"): GemmConfig(64, 128, 64, num_warps=4, num_stages=4, programs_per_sm=2),
    ("weight", "tma_few_rows"): GemmConfig(128, 128, 32, num_warps=4, num_stages=4),
    ("up", "pointer"): GemmConfig(128, 128, 32, num_warps=8, num_stages=4, programs_per_sm=1),
    ("linear", "pointer"): GemmConfig(128, 128, 32, num_warps=4, num_stages=4, programs_per_sm=1),
    ("hidden", "pointer"): GemmConfig(128, 128, 32, num_warps=8, num_stages=4, programs_per_sm=1),
    ("weight", "pointer"): GemmConfig(128, 128, 32, num_warps=8, num_stages=4),
    ("up", "pointer_few_rows"): GemmConfig(64, 128, 32, num_warps=4, num_stages=4, programs_per_sm=2),
    ("linear", "pointer_few_rows"): GemmConfig(64, 128, 32, num_warps=4, num_stages=4, programs_per_sm=2),
    ("hidden", "pointer_few_rows"): GemmConfig(64, 128, 32, num_warps=4, num_stages=4, programs_per_sm=2),
    ("weight", "pointer_few_rows"): GemmConfig(128, 128, 32, num_warps=8, num_stages=4),
    ("up", "float32"): GemmConfig(64, 64, 16, num_warps=4, num_stages=3, programs_per_sm=2),
    ("linear", "float32"): GemmConfig(64, 64, 16, num_warps=4, num_stages=3, programs_per_sm=2),
    ("hidden", "float32"): GemmConfig(64, 64, 16, num_warps=4, num_stages=3, programs_per_sm=2),
    ("weight", "float32"): GemmConfig(64, 64, 16, num_warps=4, num_stages=4),
}


@functools.cache
def choose_configs(stage: Stage, few_rows: bool, dtype: torch.dtype, tma: bool, columns: int) -> tuple[GemmConfig, ...]:
    """The configuration of a stage whose product has so many columns, and others for autotuning to try.

    Narrow products get narrow tiles.
    """
    if dtype == torch.float32:
        configs = [CONFIGS[stage, "float32"]]
    elif tma:
        configs = [CONFIGS[stage, "tma"], CONFIGS[stage, "tma_few_rows"]]
    else:
        configs = [CONFIGS[stage, "pointer"], CONFIGS[stage, "pointer_few_rows"]]
    if few_rows:
        configs.reverse()
    if stage != "weight":
        configs += [replace(configs[0], GROUP=group) for group in (1, 4, 16)]
    widest = triton.next_power_of_2(columns)
    return tuple(dict.fromkeys(replace(config, BLOCK_N=min(config.BLOCK_N, widest)) for config in configs))


def up_projection(
    x_TD: Tensor,
    w_up_EHD: Tensor,
    b_up_EH: Tensor | None,
    routing: Routing,
    activation: Activation,
    *,
    keep_hidden: bool,
) -> tuple[Tensor | None, Tensor]:
    """h = x[token] · w_upᵀ + b_up and a = activation(h) of every pair: h [N, H], or None if not kept, and a [N, I]."""
    parts = 2 if is_gated(activation) else 1
    experts, hidden, width = w_up_EHD.shape
    inner = hidden // parts
    tma = _use_tma(routing, w_up_EHD)
    h_NH = x_TD.new_empty(routing.num_pairs, hidden) if keep_hidden else None
    a_NI = x_TD.new_empty(routing.num_pairs, inner)

    def launch(config: GemmConfig) -> None:
        block_inner = config.BLOCK_N // parts
        row_block = (config.BLOCK_M, 1, config.BLOCK_N // 2)
        _launch_row_tiles(
            gemm_triton.up_projection_kernel,
            config,
            routing,
            triton.cdiv(inner, block_inner),
            x_TD,
            _weight(w_up_EHD.view(experts, parts, inner, width), (1, parts, block_inner, config.BLOCK_K), tma),
            b_up_EH,
            None if h_NH is None else _rows(h_NH, parts, row_block, tma),
            _rows(a_NI, 1, row_block, tma),
            routing.token_ids_N,
            scalars=(width, inner),
            FUNCTION=FUNCTION[activation],
            PARTS=parts,
            PRECISION=_precision(x_TD),
            EVEN_K=width % config.BLOCK_K == 0,
            EVEN_N=inner % block_inner == 0,
            TMA=tma,
        )

    configs = choose_configs("up", _few_rows(routing), x_TD.dtype, tma, hidden)
    key = (*sizes(x_TD, routing), hidden, activation, keep_hidden, b_up_EH is not None)
    launch(autotune.choose("triton up", key, configs, launch))
    return h_NH, a_NI


def down_projection(a_NI: Tensor, w_down_EDI: Tensor, b_down_ED: Tensor | None, routing: Routing) -> Tensor:
    """y = a · w_downᵀ + b_down of every pair, not yet weighted: [N, D]."""
    return _linear(a_NI, w_down_EDI, b_down_ED, routing, transposed=False)


def input_gradient(dh_NH: Tensor, w_up_EHD: Tensor, routing: Routing) -> Tensor:
    """dx = dh · w_up of every pair, not yet summed: [N, D]."""
    return _linear(dh_NH, w_up_EHD, None, routing, transposed=True)


def hidden_gradient(
    dy_TD: Tensor, w_down_EDI: Tensor, h_NH: Tensor, weights_N: Tensor, routing: Routing, activation: Activation
) -> tuple[Tensor, Tensor, Tensor]:
    """All that the gradient of the output tells of a pair's hidden state, with a = activation(h) computed again.

    With da = dy[token] · w_down: dh = weight · da · activation′(h) [N, H], weight · a [N, I], and the gradient of the
    weight ⟨da, a⟩, float32 [N] (arXiv 2512.14080, appendix on the backward pass: no y is needed for it).
    """
    parts = 2 if is_gated(activation) else 1
    experts, width, inner = w_down_EDI.shape
    tma = _use_tma(routing, w_down_EDI, h_NH)
    dh_NH = torch.empty_like(h_NH)
    weighted_a_NI = h_NH.new_empty(routing.num_pairs, inner)

    def launch(config: GemmConfig) -> Tensor:
        # The error function takes twice the registers of an exponential.
        chunk_columns = config.chunk_columns // (2 if FUNCTION[activation] == "gelu" else 1)
        chunks = max(1, config.BLOCK_N // chunk_columns)
        block = (config.BLOCK_M, 1, config.BLOCK_N // chunks)
        column_blocks = triton.cdiv(inner, config.BLOCK_N)
        dweights_BN = torch.empty(column_blocks, routing.num_pairs, dtype=torch.float32, device=h_NH.device)
        _launch_row_tiles(
            gemm_triton.hidden_gradient_kernel,
            config,
            routing,
            column_blocks,
            dy_TD,
            _weight(w_down_EDI.view(experts, 1, width, inner), (1, 1, config.BLOCK_K, config.BLOCK_N), tma),
            _rows(h_NH, parts, (config.BLOCK_M, parts, config.BLOCK_N // chunks), tma),
            _rows(dh_NH, parts, block, tma),
            _rows(weighted_a_NI, 1, block, tma),
            weights_N,
            dweights_BN,
            routing.token_ids_N,
            scalars=(routing.num_pairs, width, inner),
            FUNCTION=FUNCTION[activation],
            PARTS=parts,
            PRECISION=_precision(dy_TD),
            EVEN_K=width % config.BLOCK_K == 0,
            EVEN_N=inner % config.BLOCK_N == 0,
            TMA=tma,
            CHUNKS=chunks,
        )
        return dweights_BN

    configs = choose_configs("hidden", _few_rows(routing), dy_TD.dtype, tma, inner)
    key = (*sizes(dy_TD, routing), inner, activation)
    dweights_BN = launch(autotune.choose("triton hidden", key, configs, launch))
    return dh_NH, weighted_a_NI, dweights_BN[0] if len(dweights_BN) == 1 else dweights_BN.sum(0)


def up_weight_gradient(dh_NH: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
    """dw_up = dhᵀ · x[token] of every expert: [E, H, D]."""
    return _weight_gradient(x_TD, dh_NH, routing, transposed=True)


def down_weight_gradient(dy_TD: Tensor, weighted_a_NI: Tensor, routing: Routing) -> Tensor:
    """dw_down = dy[token]ᵀ · (weight · a) of every expert: [E, D, I]."""
    return _weight_gradient(dy_TD, weighted_a_NI, routing, transposed=False)


def _linear(rows_NK: Tensor, weight: Tensor, bias: Tensor | None, routing: Routing, *, transposed: bool) -> Tensor:
    """rows · weight[e]ᵀ + bias[e], or where `transposed` rows · weight[e]."""
    experts, *sides = weight.shape
    depth, width = sides if transposed else reversed(sides)
    tma = _use_tma(routing, weight, rows_NK)
    out_ND = rows_NK.new_empty(routing.num_pairs, width)

    def launch(config: GemmConfig) -> None:
        weight_block = (config.BLOCK_K, config.BLOCK_N) if transposed else (config.BLOCK_N, config.BLOCK_K)
        _launch_row_tiles(
            gemm_triton.linear_kernel,
            config,
            routing,
            triton.cdiv(width, config.BLOCK_N),
            # Not ragged: no row of the product depends on those of the next expert.
            TensorDescriptor.from_tensor(rows_NK, [config.BLOCK_M, config.BLOCK_K]) if tma else rows_NK,
            _weight(weight.view(experts, 1, *sides), (1, 1, *weight_block), tma),
            bias,
            _rows(out_ND, 1, (config.BLOCK_M, 1, config.BLOCK_N // 2), tma),
            scalars=(depth, width),
            TRANSPOSED=transposed,
            PRECISION=_precision(rows_NK),
            EVEN_K=depth % config.BLOCK_K == 0,
            EVEN_N=width % config.BLOCK_N == 0,
            TMA=tma,
        )

    configs = choose_configs("linear", _few_rows(routing), rows_NK.dtype, tma, width)
    key = (*sizes(rows_NK, routing), width, transposed, bias is not None)
    launch(autotune.choose("triton linear", key, configs, launch))
    return out_ND


def _weight_gradient(gathered_TM: Tensor, rows_NN: Tensor, routing: Routing, *, transposed: bool) -> Tensor:
    """gathered[tokens of e]ᵀ · rows[rows of e] of every expert, or its transpose."""
    gathered_width, width = gathered_TM.shape[1], rows_NN.shape[1]
    tma = _use_tma(routing, rows_NN)
    out = rows_NN.new_empty(routing.num_experts, *((width, gathered_width) if transposed else (gathered_width, width)))

    def launch(config: GemmConfig) -> None:
        block_gathered = min(config.BLOCK_M, triton.next_power_of_2(gathered_width))
        tiles = routing.num_experts * triton.cdiv(gathered_width, block_gathered) * triton.cdiv(width, config.BLOCK_N)
        gemm_triton.weight_gradient_kernel[_grid(config, tiles, out.device)](
            gathered_TM,
            _rows(rows_NN, 1, (config.BLOCK_K, 1, config.BLOCK_N), tma),
            out,
            routing.token_ids_N,
            routing.expert_offsets,
            routing.num_experts,
            gathered_width,
            width,
            TRANSPOSED=transposed,
            PRECISION=_precision(out),
            EVEN_M=gathered_width % block_gathered == 0,
            EVEN_N=width % config.BLOCK_N == 0,
            TMA=tma,
            FLATTEN=config.FLATTEN,
            BLOCK_M=block_gathered,
            BLOCK_N=config.BLOCK_N,
            BLOCK_K=config.BLOCK_K,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    configs = choose_configs("weight", _few_rows(routing), rows_NN.dtype, tma, width)
    key = (*sizes(gathered_TM, routing), width, transposed)
    launch(autotune.choose("triton weights", key, configs, launch))
    return out


def _launch_row_tiles(
    kernel: Any,
    config: GemmConfig,
    routing: Routing,
    column_blocks: int,
    *operands: Tensor | TensorDescriptor | None,
    scalars: tuple[int, ...],
    **constants: Any,
) -> None:
    """Runs a kernel over all row tiles of the routing times so many blocks of columns."""
    schedule = tile_schedule(routing, config.BLOCK_M)
    kernel[_grid(config, schedule.max_tiles * column_blocks, routing.expert_offsets.device)](
        *operands,
        routing.expert_offsets,
        schedule.tile_experts_M,
        schedule.expert_tiles,
        routing.num_experts,
        *scalars,
        **constants,
        FLATTEN=config.FLATTEN,
        GROUP=config.GROUP,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def _few_rows(routing: Routing) -> bool:
    return routing.num_pairs <= FEW_ROWS * routing.num_experts


def sizes(rows: Tensor, routing: Routing) -> tuple[Hashable, ...]:
    """What a choice of autotuning holds for: dtype, depth, experts and about so many pairs."""
    return rows.dtype, rows.shape[1], routing.num_experts, triton.next_power_of_2(routing.num_pairs)


def _grid(config: GemmConfig, tiles: int, device: torch.device) -> tuple[int]:
    programs = config.programs_per_sm * _multiprocessors(device) if config.programs_per_sm else tiles
    return (min(programs, tiles),)


def _precision(tensor: Tensor) -> str:
    """float32 is multiplied as such, not rounded to TensorFloat-32."""
    return "ieee" if tensor.dtype == torch.float32 else "tf32"


def _use_tma(routing: Routing, *operands: Tensor) -> bool:
    """Whether a kernel reads and writes these, and what it makes of them, through tensor descriptors."""
    return (
        _has_tma(operands[0].device)
        and 0 < routing.num_pairs <= MAX_TMA_ROWS
        and all(operand.itemsize == 2 and operand.data_ptr() % 16 == 0 for operand in operands)
    )


def _rows(rows_NW: Tensor, parts: int, block: tuple[int, int, int], tma: bool) -> Tensor | TensorDescriptor:
    """Rows of `parts` equal parts, as a kernel takes them."""
    return create_ragged_descriptor(rows_NW.view(len(rows_NW), parts, -1), block) if tma else rows_NW


def _weight(weight: Tensor, block: tuple[int, int, int, int], tma: bool) -> Tensor | TensorDescriptor:
    """Weights [E, parts, rows, columns], as a kernel takes them."""
    return TensorDescriptor.from_tensor(weight, list(block)) if tma else weight


@functools.lru_cache
def _has_tma(device: torch.device) -> bool:
    """Hopper and datacentre Blackwell. Later consumer GPUs have TMA, but not the shared memory that is used with it."""
    return device.type == "cuda" and 9 <= torch.cuda.get_device_capability(device)[0] < 12


@functools.lru_cache
def _multiprocessors(device: torch.device) -> int:
    """1 for the CPU, where the interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
