"""Token rounding on the device in three launches, without a sort, atomics or a host wait.

    1. every tile of tokens and experts is turned to expert-major: an int32 key of each weight, the kind of each pair,
       and the tile's chosen pairs of each expert,
    2. these counts are summed over the tokens (the scan of routing_triton.py),
    3. a program an expert finds the key down to which pairs flip, by bisection, and flips them.

Shapes: T tokens, E experts, B blocks of tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels import routing_triton, topk_triton

OTHER = tl.constexpr(1)
"""The kind of a pair that may be added; 0 are those that may not."""
CHOSEN = tl.constexpr(2)

STRUCK_OUT = topk_triton.STRUCK_OUT
NAN_KEY = topk_triton.NAN_KEY
KEY_OF_INFINITY = tl.constexpr(0x7F800000)

TOKENS, EXPERTS = 128, 32
"""A tile: reads and writes of whole 128-byte lines, 32 elements a thread."""


def round_tokens(
    chosen_TE: Tensor, weights_TE: Tensor, tile: int, rounding: str, allowed_TE: Tensor | None = None
) -> Tensor:
    """Twin of :func:`~moetrain.kernels.rounding.round_tokens`, same bits; float32 weights, T ≥ 1, E ≥ 1."""
    num_tokens, num_experts = chosen_TE.shape
    device = chosen_TE.device
    blocks = triton.cdiv(num_tokens, TOKENS)
    limited = allowed_TE is not None
    chosen_TE = chosen_TE.view(torch.uint8)
    allowed_TE = chosen_TE if allowed_TE is None else allowed_TE.view(torch.uint8)
    keys_ET = torch.empty(num_experts, num_tokens, dtype=torch.int32, device=device)
    kinds_ET = torch.empty(num_experts, num_tokens, dtype=torch.uint8, device=device)
    block_counts_BE = torch.empty(blocks, num_experts, dtype=torch.int32, device=device)
    with torch.cuda.device_of(chosen_TE):
        _turn_kernel[(blocks, triton.cdiv(num_experts, EXPERTS))](
            chosen_TE,
            allowed_TE,
            weights_TE,
            keys_ET,
            kinds_ET,
            block_counts_BE,
            num_tokens,
            num_experts,
            *chosen_TE.stride(),
            *allowed_TE.stride(),
            *weights_TE.stride(),
            LIMITED=limited,
            TOKENS=TOKENS,
            EXPERTS=EXPERTS,
        )
        counts_E = routing_triton.scan_blocks(block_counts_BE)
        _flip_kernel[(num_experts,)](
            keys_ET,
            kinds_ET,
            counts_E,
            num_tokens,
            tile,
            ROUNDING=rounding,
            BLOCK=4096,
            num_warps=16,
        )
    return kinds_ET.view(torch.bool).t()


@triton.jit
def _turn_kernel(
    chosen_TE,
    allowed_TE,
    weights_TE,
    keys_ET,
    kinds_ET,
    block_counts_BE,
    num_tokens,
    num_experts,
    chosen_stride_t,
    chosen_stride_e,
    allowed_stride_t,
    allowed_stride_e,
    weights_stride_t,
    weights_stride_e,
    LIMITED: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    block = tl.program_id(0)
    tokens = block * TOKENS + tl.arange(0, TOKENS)
    experts = tl.program_id(1) * EXPERTS + tl.arange(0, EXPERTS)
    mask = (tokens < num_tokens)[:, None] & (experts < num_experts)[None, :]
    t, e = tokens.to(tl.int64)[:, None], experts.to(tl.int64)[None, :]
    chosen = tl.load(chosen_TE + t * chosen_stride_t + e * chosen_stride_e, mask=mask, other=0) != 0
    if LIMITED:
        allowed = tl.load(allowed_TE + t * allowed_stride_t + e * allowed_stride_e, mask=mask, other=0) != 0
        kinds = tl.where(chosen, CHOSEN, tl.where(allowed, OTHER, 0))
    else:
        kinds = tl.where(chosen, CHOSEN, OTHER)
    weights = tl.load(weights_TE + t * weights_stride_t + e * weights_stride_e, mask=mask, other=0.0)
    cells_ET = e * num_tokens + t
    tl.store(keys_ET + cells_ET, topk_triton._keys(weights), mask=mask)
    tl.store(kinds_ET + cells_ET, kinds.to(tl.uint8), mask=mask)
    counts = tl.sum(chosen.to(tl.int32), 0)
    tl.store(block_counts_BE + block.to(tl.int64) * num_experts + experts, counts, mask=experts < num_experts)


@triton.jit
def _nearest(count, tile):
    return (count + (tile - 1) // 2) // tile * tile


@triton.jit
def _flip_kernel(keys_ET, kinds_ET, counts_E, num_tokens, tile, ROUNDING: tl.constexpr, BLOCK: tl.constexpr):
    """Kinds → whether the pair is there after rounding, in place; the keys are overwritten."""
    expert = tl.program_id(0)
    count = tl.load(counts_E + expert)
    if ROUNDING == "balanced":
        sums = tl.zeros((256,), tl.int32)
        for first in range(0, expert, 256):
            earlier = first + tl.arange(0, 256)
            sums += tl.load(counts_E + earlier, mask=earlier < expert, other=0)
        before = tl.sum(sums, 0)
        change = _nearest(before + count, tile) - _nearest(before, tile) - count
    elif ROUNDING == "nearest":
        change = _nearest(count, tile) - count
    elif ROUNDING == "up":
        change = (count + tile - 1) // tile * tile - count
    else:
        change = count // tile * tile - count
    drops = change < 0

    # Keys become such that the largest flip first.
    keys_T = keys_ET + expert.to(tl.int64) * num_tokens
    kinds_T = kinds_ET + expert.to(tl.int64) * num_tokens
    kind = tl.where(drops, CHOSEN, OTHER)
    ordered = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, num_tokens, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        keys = tl.load(keys_T + tokens, mask=tokens < num_tokens, other=0)
        may_flip = tl.load(kinds_T + tokens, mask=tokens < num_tokens, other=0) == kind
        keys = tl.where(keys == NAN_KEY, -KEY_OF_INFINITY, keys)
        keys = tl.where(may_flip, tl.where(drops, -keys, keys), STRUCK_OUT)
        tl.store(keys_T + tokens, keys, mask=tokens < num_tokens)
        ordered += (keys != STRUCK_OUT).to(tl.int32)
    # Other threads may read what one wrote.
    tl.debug_barrier()
    at_least_low = tl.sum(ordered, 0)
    # Without room for all, the last tile stays open.
    wanted = tl.minimum(tl.abs(change), at_least_low)

    # at_least_low ≥ wanted > at_least_high always. Where a key has exactly the wanted number at or above it the search
    # ends, mostly after half of the bits; else `low` ends as the border's key, which several pairs have.
    high = KEY_OF_INFINITY + 1
    at_least_high = 0
    low = tl.where(wanted > 0, -KEY_OF_INFINITY, high)
    while (low + 1 < high) & (at_least_low > wanted):
        # The mean without overflow.
        middle = (low & high) + ((low ^ high) >> 1)
        counts = tl.zeros((BLOCK,), tl.int32)
        for first in range(0, num_tokens, BLOCK):
            tokens = first + tl.arange(0, BLOCK)
            keys = tl.load(keys_T + tokens, mask=tokens < num_tokens, other=STRUCK_OUT)
            counts += (keys >= middle).to(tl.int32)
        at_least_middle = tl.sum(counts, 0)
        enough = at_least_middle >= wanted
        low = tl.where(enough, middle, low)
        at_least_low = tl.where(enough, at_least_middle, at_least_low)
        high = tl.where(enough, high, middle)
        at_least_high = tl.where(enough, at_least_high, at_least_middle)

    # Of equal keys the last tokens are dropped, the first are added.
    equal_before = 0
    for first in range(0, num_tokens, BLOCK):
        tokens = first + tl.arange(0, BLOCK)
        keys = tl.load(keys_T + tokens, mask=tokens < num_tokens, other=STRUCK_OUT)
        chosen = tl.load(kinds_T + tokens, mask=tokens < num_tokens, other=0) == CHOSEN
        equal = (keys == low).to(tl.int32)
        ranks = equal_before + tl.cumsum(equal, 0)
        among = tl.where(drops, ranks > at_least_low - wanted, ranks <= wanted - at_least_high)
        flip = (keys > low) | ((equal > 0) & among)
        tl.store(kinds_T + tokens, (chosen ^ flip).to(tl.uint8), mask=tokens < num_tokens)
        equal_before += tl.sum(equal, 0)
