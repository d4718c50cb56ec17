"""Pairs grouped by expert on the device: a stable counting sort in three launches, without atomics or a host wait.

    1. every block of BLOCK pairs counts its pairs of each expert,
    2. each expert's counts are summed over the blocks before (an exclusive scan),
    3. position of pair n = pairs of lower experts + pairs of its expert in earlier blocks + those earlier in its block.

Shapes: T tokens, E experts, K pairs a token, N = T·K pairs, B blocks of pairs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_EXPERTS = 4096
BLOCK = 256
"""Pairs a program. The rank compares all pairs of a block, so a program's work is BLOCK², whatever E is."""


def group_by_expert(
    expert_ids_N: Tensor, weights_N: Tensor, num_experts: int, pairs_per_token: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Twin of the function of this name in routing.py, same bits; N ≥ 1 and E ≤ MAX_EXPERTS."""
    expert_ids_N, weights_N = expert_ids_N.contiguous(), weights_N.contiguous()
    num_pairs, device = expert_ids_N.numel(), expert_ids_N.device
    blocks = triton.cdiv(num_pairs, BLOCK)
    # Not below 32: a warp's histogram has a bin for each of its threads.
    bins = max(32, triton.next_power_of_2(num_experts))
    block_counts_BE = torch.empty(blocks, num_experts, dtype=torch.int32, device=device)
    totals_E = torch.empty(num_experts, dtype=torch.int32, device=device)
    token_ids_N = torch.empty(num_pairs, dtype=torch.int32, device=device)
    positions_N = torch.empty_like(token_ids_N)
    grouped_weights_N = torch.empty_like(weights_N)
    expert_offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    token_offsets = torch.empty(num_pairs // pairs_per_token + 1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(expert_ids_N):
        _count_kernel[(blocks,)](expert_ids_N, block_counts_BE, num_pairs, num_experts, BINS=bins, BLOCK=BLOCK)
        columns = 8  # one 32-byte sector of a row
        _scan_kernel[(triton.cdiv(num_experts, columns),)](
            block_counts_BE, totals_E, blocks, num_experts, ROWS=512, COLUMNS=columns, num_warps=8
        )
        _rank_kernel[(blocks,)](
            expert_ids_N,
            weights_N,
            block_counts_BE,
            totals_E,
            token_ids_N,
            grouped_weights_N,
            positions_N,
            expert_offsets,
            token_offsets,
            num_pairs,
            num_experts,
            K=pairs_per_token,
            BINS=bins,
            BLOCK=BLOCK,
            CHUNK=32,
            num_warps=8,
        )
    return token_ids_N, grouped_weights_N, positions_N, expert_offsets, token_offsets


@triton.jit
def _load_experts(expert_ids_N, pairs, num_pairs, num_experts):
    """int32 ids; an id outside [0, E) becomes the nearest one inside, so that no address can leave its array."""
    ids = tl.load(expert_ids_N + pairs, mask=pairs < num_pairs, other=0)
    return tl.minimum(tl.maximum(ids, 0), num_experts - 1).to(tl.int32)


@triton.jit
def _count_kernel(expert_ids_N, block_counts_BE, num_pairs, num_experts, BINS: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    pairs = block * BLOCK + tl.arange(0, BLOCK)
    experts = _load_experts(expert_ids_N, pairs, num_pairs, num_experts)
    counts = tl.histogram(experts, BINS, mask=pairs < num_pairs)
    bins = tl.arange(0, BINS)
    tl.store(block_counts_BE + block.to(tl.int64) * num_experts + bins, counts, mask=bins < num_experts)


@triton.jit
def _scan_kernel(block_counts_BE, totals_E, blocks, num_experts, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Counts → sums over the blocks before, in place, and the sums over all blocks."""
    experts = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, blocks, ROWS):
        rows = first + tl.arange(0, ROWS)
        pointers = block_counts_BE + rows[:, None].to(tl.int64) * num_experts + experts[None, :]
        mask = (rows[:, None] < blocks) & (experts[None, :] < num_experts)
        counts = tl.load(pointers, mask=mask, other=0)
        tl.store(pointers, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(totals_E + experts, total, mask=experts < num_experts)


@triton.jit
def _rank_kernel(
    expert_ids_N,
    weights_N,
    block_counts_BE,
    totals_E,
    token_ids_N,
    grouped_weights_N,
    positions_N,
    expert_offsets,
    token_offsets,
    num_pairs,
    num_experts,
    K: tl.constexpr,
    BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0)
    bins = tl.arange(0, BINS)
    totals = tl.load(totals_E + bins, mask=bins < num_experts, other=0)
    ends = tl.cumsum(totals, 0)
    before = tl.load(block_counts_BE + block.to(tl.int64) * num_experts + bins, mask=bins < num_experts, other=0)
    if block == 0:
        tl.store(expert_offsets + bins, ends - totals, mask=bins < num_experts)
        tl.store(expert_offsets + num_experts, num_pairs)
        tl.store(token_offsets + num_pairs // K, num_pairs)

    first = block * BLOCK
    pairs = first + tl.arange(0, BLOCK)
    mask = pairs < num_pairs
    experts = _load_experts(expert_ids_N, pairs, num_pairs, num_experts)
    earlier = tl.zeros((BLOCK, CHUNK), tl.int32)
    for start in range(0, BLOCK, CHUNK):
        others = first + start + tl.arange(0, CHUNK)
        other_experts = _load_experts(expert_ids_N, others, num_pairs, num_experts)
        same = (other_experts[None, :] == experts[:, None]) & (others[None, :] < pairs[:, None])
        earlier += same.to(tl.int32)
    positions = tl.gather(ends - totals + before, experts, 0) + tl.sum(earlier, 1)

    tl.store(positions_N + pairs, positions, mask=mask)
    tl.store(token_ids_N + positions, pairs // K, mask=mask)
    tl.store(grouped_weights_N + positions, tl.load(weights_N + pairs, mask=mask, other=0.0), mask=mask)
    tl.store(token_offsets + pairs // K, pairs, mask=mask & (pairs % K == 0))
