"""Pairs grouped by expert on the device: a stable counting sort in three launches, without atomics or a host wait.

    1. every block of pairs counts its pairs of each expert,
    2. each expert's counts are summed over the blocks before (an exclusive scan),
    3. position of pair n = pairs of lower experts + pairs of its expert in earlier blocks + those earlier in its block.

Top-k gives a list of T·K pairs, in blocks of BLOCK; a mask of chosen cells has blocks of TOKENS tokens.

Shapes: T tokens, E experts, K pairs a token, N pairs (or room for them), B blocks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_EXPERTS = 4096
BLOCK = 256
"""Pairs a program. The rank compares all pairs of a block, so a program's work is BLOCK², whatever E is."""
TOKENS, EXPERTS = 64, 32
"""Cells of a mask that a program of eight warps holds at a time, while it walks the experts of its tokens."""


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
    token_ids_N = torch.empty(num_pairs, dtype=torch.int32, device=device)
    positions_N = torch.empty_like(token_ids_N)
    grouped_weights_N = torch.empty_like(weights_N)
    expert_offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    token_offsets = torch.empty(num_pairs // pairs_per_token + 1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(expert_ids_N):
        _count_kernel[(blocks,)](expert_ids_N, block_counts_BE, num_pairs, num_experts, BINS=bins, BLOCK=BLOCK)
        totals_E = scan_blocks(block_counts_BE)
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


def scan_blocks(block_counts_BX: Tensor) -> Tensor:
    """Contiguous int32 counts → in place, each column's sums over the blocks before; returns its sum over all [X]."""
    blocks, num_columns = block_counts_BX.shape
    totals_X = torch.empty(num_columns, dtype=torch.int32, device=block_counts_BX.device)
    columns = 8  # one 32-byte sector of a row
    _scan_kernel[(triton.cdiv(num_columns, columns),)](
        block_counts_BX, totals_X, blocks, num_columns, ROWS=512, COLUMNS=columns, num_warps=8
    )
    return totals_X


def group_chosen(
    chosen_TE: Tensor, weights_TE: Tensor, max_pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Twin of the function of this name in routing.py, same bits; T ≥ 1, E ≥ 1. Of too many pairs the last are lost."""
    num_tokens, num_experts = chosen_TE.shape
    device = chosen_TE.device
    blocks = triton.cdiv(num_tokens, TOKENS)
    chosen_TE = chosen_TE.view(torch.uint8)
    # The last column counts the pairs of all experts.
    block_counts_BX = torch.empty(blocks, num_experts + 1, dtype=torch.int32, device=device)
    # Of each token, the pairs of its block's tokens before.
    earlier_T = torch.empty(num_tokens, dtype=torch.int32, device=device)
    token_ids_N = torch.empty(max_pairs, dtype=torch.int32, device=device)
    pair_ids_N = torch.empty_like(token_ids_N)
    grouped_weights_N = torch.empty(max_pairs, dtype=weights_TE.dtype, device=device)
    expert_offsets = torch.empty(num_experts + 1, dtype=torch.int32, device=device)
    token_offsets = torch.empty(num_tokens + 1, dtype=torch.int32, device=device)
    with torch.cuda.device_of(chosen_TE):
        _count_chosen_kernel[(blocks,)](
            chosen_TE,
            block_counts_BX,
            earlier_T,
            num_tokens,
            num_experts,
            *chosen_TE.stride(),
            TOKENS=TOKENS,
            EXPERTS=EXPERTS,
            num_warps=8,
        )
        totals_X = scan_blocks(block_counts_BX)
        _group_chosen_kernel[(blocks,)](
            chosen_TE,
            weights_TE,
            block_counts_BX,
            totals_X,
            earlier_T,
            token_ids_N,
            grouped_weights_N,
            pair_ids_N,
            expert_offsets,
            token_offsets,
            num_tokens,
            num_experts,
            max_pairs,
            *chosen_TE.stride(),
            *weights_TE.stride(),
            TOKENS=TOKENS,
            EXPERTS=EXPERTS,
            ROOM=1024,
            num_warps=8,
            # Two programs on a multiprocessor hide each other's loads; with more registers there would be one.
            maxnreg=128,
        )
    return token_ids_N, grouped_weights_N, pair_ids_N, expert_offsets, token_offsets


def cells_of_pairs(values_N: Tensor, chosen_TE: Tensor, pair_ids_N: Tensor, token_offsets: Tensor) -> Tensor:
    """Twin of the function of this name in routing.py, same bits; T ≥ 1, E ≥ 1, contiguous values and indices."""
    num_tokens, num_experts = chosen_TE.shape
    chosen_TE = chosen_TE.view(torch.uint8)
    values_TE = torch.empty(num_tokens, num_experts, dtype=values_N.dtype, device=values_N.device)
    with torch.cuda.device_of(values_N):
        _cells_of_pairs_kernel[(triton.cdiv(num_tokens, TOKENS),)](
            values_N,
            chosen_TE,
            pair_ids_N,
            token_offsets,
            values_TE,
            num_tokens,
            num_experts,
            *chosen_TE.stride(),
            TOKENS=TOKENS,
            EXPERTS=EXPERTS,
            num_warps=8,
        )
    return values_TE


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
def _scan_kernel(block_counts_BX, totals_X, blocks, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.int32)
    for first in range(0, blocks, ROWS):
        rows = first + tl.arange(0, ROWS)
        pointers = block_counts_BX + rows[:, None].to(tl.int64) * num_columns + columns[None, :]
        mask = (rows[:, None] < blocks) & (columns[None, :] < num_columns)
        counts = tl.load(pointers, mask=mask, other=0)
        tl.store(pointers, total[None, :] + tl.cumsum(counts, 0) - counts, mask=mask)
        total += tl.sum(counts, 0)
    tl.store(totals_X + columns, total, mask=columns < num_columns)


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


@triton.jit
def _load_chosen(chosen_TE, tokens, experts, num_tokens, num_experts, stride_t, stride_e):
    """1 or 0, int32, 0 beyond the mask."""
    cells = tokens.to(tl.int64)[:, None] * stride_t + experts.to(tl.int64)[None, :] * stride_e
    mask = (tokens < num_tokens)[:, None] & (experts < num_experts)[None, :]
    return (tl.load(chosen_TE + cells, mask=mask, other=0) != 0).to(tl.int32)


@triton.jit
def _count_chosen_kernel(
    chosen_TE,
    block_counts_BX,
    earlier_T,
    num_tokens,
    num_experts,
    stride_t,
    stride_e,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    counts_X = block_counts_BX + block.to(tl.int64) * (num_experts + 1)
    counts = tl.zeros((TOKENS,), tl.int32)
    for first in range(0, num_experts, EXPERTS):
        experts = first + tl.arange(0, EXPERTS)
        chosen = _load_chosen(chosen_TE, tokens, experts, num_tokens, num_experts, stride_t, stride_e)
        tl.store(counts_X + experts, tl.sum(chosen, 0), mask=experts < num_experts)
        counts += tl.sum(chosen, 1)
    tl.store(counts_X + num_experts, tl.sum(counts, 0))
    tl.store(earlier_T + tokens, tl.cumsum(counts, 0) - counts, mask=tokens < num_tokens)


@triton.jit
def _group_chosen_kernel(
    chosen_TE,
    weights_TE,
    block_counts_BX,
    totals_X,
    earlier_T,
    token_ids_N,
    grouped_weights_N,
    pair_ids_N,
    expert_offsets,
    token_offsets,
    num_tokens,
    num_experts,
    max_pairs,
    chosen_stride_t,
    chosen_stride_e,
    weights_stride_t,
    weights_stride_e,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROOM: tl.constexpr,
):
    block = tl.program_id(0)
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    counts_X = block_counts_BX + block.to(tl.int64) * (num_experts + 1)
    num_pairs = tl.load(totals_X + num_experts)
    # Where the walk by token stands, token by token.
    places = tl.load(earlier_T + tokens, mask=tokens < num_tokens, other=0) + tl.load(counts_X + num_experts)
    tl.store(token_offsets + tokens, places, mask=tokens < num_tokens)
    if block == 0:
        tl.store(token_offsets + num_tokens, num_pairs)
        tl.store(expert_offsets + num_experts, num_pairs)

    first_pair = 0
    for first in range(0, num_experts, EXPERTS):
        experts = first + tl.arange(0, EXPERTS)
        in_experts = experts < num_experts
        totals = tl.load(totals_X + experts, mask=in_experts, other=0)
        offsets = first_pair + tl.cumsum(totals, 0) - totals
        first_pair += tl.sum(totals, 0)
        if block == 0:
            tl.store(expert_offsets + experts, offsets, mask=in_experts)
        offsets += tl.load(counts_X + experts, mask=in_experts, other=0)

        chosen = _load_chosen(chosen_TE, tokens, experts, num_tokens, num_experts, chosen_stride_t, chosen_stride_e)
        positions = offsets[None, :] + tl.cumsum(chosen, 0) - chosen
        walked = places[:, None] + tl.cumsum(chosen, 1) - chosen
        places += tl.sum(chosen, 1)
        cells = tokens.to(tl.int64)[:, None] * weights_stride_t + experts.to(tl.int64)[None, :] * weights_stride_e
        weights = tl.load(weights_TE + cells, mask=chosen != 0, other=0.0)
        # No store leaves its array, even where too many pairs are chosen.
        fits = (chosen != 0) & (positions < max_pairs)
        tl.store(token_ids_N + positions, tl.broadcast_to(tokens[:, None], TOKENS, EXPERTS), mask=fits)
        tl.store(grouped_weights_N + positions, weights, mask=fits)
        tl.store(pair_ids_N + walked, positions, mask=(chosen != 0) & (walked < max_pairs))

    # Every block fills its share of the padding.
    share = tl.cdiv(max_pairs, tl.num_programs(0))
    for first in range(block * share, tl.minimum((block + 1) * share, max_pairs), ROOM):
        pairs = first + tl.arange(0, ROOM)
        padding = (pairs >= num_pairs) & (pairs < max_pairs)
        zeros = tl.zeros((ROOM,), tl.int32)
        tl.store(token_ids_N + pairs, zeros, mask=padding)
        tl.store(grouped_weights_N + pairs, zeros.to(grouped_weights_N.dtype.element_ty), mask=padding)
        tl.store(pair_ids_N + pairs, zeros, mask=padding)


@triton.jit
def _cells_of_pairs_kernel(
    values_N,
    chosen_TE,
    pair_ids_N,
    token_offsets,
    values_TE,
    num_tokens,
    num_experts,
    stride_t,
    stride_e,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    tokens = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    places = tl.load(token_offsets + tokens, mask=tokens < num_tokens, other=0)
    for first in range(0, num_experts, EXPERTS):
        experts = first + tl.arange(0, EXPERTS)
        chosen = _load_chosen(chosen_TE, tokens, experts, num_tokens, num_experts, stride_t, stride_e)
        walked = places[:, None] + tl.cumsum(chosen, 1) - chosen
        places += tl.sum(chosen, 1)
        positions = tl.load(pair_ids_N + walked, mask=chosen != 0, other=0)
        values = tl.load(values_N + positions, mask=chosen != 0, other=0.0)
        cells = tokens.to(tl.int64)[:, None] * num_experts + experts[None, :]
        mask = (tokens < num_tokens)[:, None] & (experts < num_experts)[None, :]
        tl.store(values_TE + cells, values, mask=mask)
