"""Sums of rows over the pairs of a token or of an expert, in float32, in a fixed order, without atomics.

Names: T tokens, D and X widths, E experts, N pairs; R and C rows and columns of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels.routing import Routing

MAX_UNROLLED = 8
"""Pairs of a token whose rows are in flight together where their number is not a constant."""


def sum_pairs(y_ND: Tensor, weights_N: Tensor | None, routing: Routing) -> Tensor:
    """Σ over the pairs of each token of weight · row (row, if `weights_N` is None): [N, D] → [T, D] in the dtype of y.

    Added in float32 in the order of the token's walk. A token without pairs gets zeros. `y_ND` is contiguous.
    """
    width = y_ND.shape[1]
    y_TD = y_ND.new_empty(routing.num_tokens, width)
    block = next((size for size in (1024, 512, 256) if width % size == 0), min(triton.next_power_of_2(width), 1024))
    blocks = triton.cdiv(width, block)
    _sum_pairs_kernel[(routing.num_tokens * blocks,)](
        y_ND,
        weights_N,
        routing.pair_ids_N,
        routing.token_offsets,
        y_TD,
        width,
        blocks,
        PAIRS=routing.pairs_per_token,
        UNROLLED=MAX_UNROLLED,
        EVEN=width % block == 0,
        BLOCK_C=block,
        num_warps=max(1, block // 256),
    )
    return y_TD


def sum_by_expert(rows_NX: Tensor, routing: Routing) -> Tensor:
    """Σ over the rows of each expert: [N, X] → float32 [E, X]; zeros for an expert without rows.

    `rows_NX` is contiguous.
    """
    width = rows_NX.shape[1]
    sum_EX = torch.empty(routing.num_experts, width, dtype=torch.float32, device=rows_NX.device)
    block = min(triton.next_power_of_2(width), 128)
    blocks = triton.cdiv(width, block)
    _sum_by_expert_kernel[(routing.num_experts * blocks,)](
        rows_NX, routing.expert_offsets, sum_EX, width, blocks, BLOCK_R=32, BLOCK_C=block, num_warps=4
    )
    return sum_EX


@triton.jit
def _sum_pairs_kernel(
    y,
    weights,
    pair_ids,
    token_offsets,
    out,
    width,
    blocks,
    PAIRS: tl.constexpr,
    UNROLLED: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    token = (tl.program_id(0) // blocks).to(tl.int64)
    column_C = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    exists_C = tl.full((BLOCK_C,), True, tl.int1) if EVEN else column_C < width
    sum_C = tl.zeros((BLOCK_C,), tl.float32)
    if PAIRS is not None:
        for i in tl.static_range(PAIRS):
            pair = tl.load(pair_ids + token * PAIRS + i)
            sum_C += _weighted_row(y, weights, pair, width, column_C, exists_C)
    else:
        first = tl.load(token_offsets + token)
        end = tl.load(token_offsets + token + 1)
        for start in range(first, end, UNROLLED):
            for i in tl.static_range(UNROLLED):
                exists = start + i < end
                pair = tl.load(pair_ids + start + i, mask=exists, other=0)
                sum_C += _weighted_row(y, weights, pair, width, column_C, column_C < tl.where(exists, width, 0))
    tl.store(out + token * width + column_C, sum_C.to(out.dtype.element_ty), mask=exists_C)


@triton.jit
def _weighted_row(y, weights, pair, width, column_C, exists_C):
    pointer_C = y + pair.to(tl.int64) * width + column_C
    row_C = tl.load(pointer_C, mask=exists_C, other=0.0, eviction_policy="evict_first").to(tl.float32)
    return row_C if weights is None else row_C * tl.load(weights + pair).to(tl.float32)


@triton.jit
def _sum_by_expert_kernel(
    rows,
    expert_offsets,
    out,
    width,
    blocks,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    expert = tl.program_id(0) // blocks
    column_C = tl.program_id(0) % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    exists_C = column_C < width
    end = tl.load(expert_offsets + expert + 1)
    sum_RC = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    for row in range(tl.load(expert_offsets + expert), end, BLOCK_R):
        row_R = row + tl.arange(0, BLOCK_R)
        pointer_RC = rows + row_R.to(tl.int64)[:, None] * width + column_C[None, :]
        sum_RC += tl.load(pointer_RC, mask=(row_R < end)[:, None] & exists_C[None, :], other=0.0).to(tl.float32)
    tl.store(out + expert * width + column_C, tl.sum(sum_RC, 0), mask=exists_C)
