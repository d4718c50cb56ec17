"""The k largest scores of every row and their weights, forward and backward in one launch each.

A row's scores become int32 keys of the same order and stay in registers: k times, the largest key is found, then the
lowest expert that has it, whose key is struck out. All comparisons are of whole keys, so the choice is exact.

Shapes: T tokens, E experts, K chosen experts a token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_EXPERTS = 4096
MAX_K = 32

STRUCK_OUT = tl.constexpr(-(2**31))
"""Below the key of every score: that of −inf is −2139095040."""
NAN_KEY = tl.constexpr(2**31 - 1)


def topk_softmax_forward(logits_TE: Tensor, k: int, before: bool, bias_E: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights float32 [T, k] and experts int32 [T, k] of contiguous float32 logits, T ≥ 1."""
    num_tokens, num_experts = logits_TE.shape
    weights_TK = torch.empty(num_tokens, k, dtype=torch.float32, device=logits_TE.device)
    expert_ids_TK = torch.empty(num_tokens, k, dtype=torch.int32, device=logits_TE.device)
    columns, rows = _tile(num_experts)
    with torch.cuda.device_of(logits_TE):
        _forward_kernel[(triton.cdiv(num_tokens, rows),)](
            logits_TE,
            logits_TE if bias_E is None else bias_E,
            weights_TK,
            expert_ids_TK,
            num_tokens,
            E=num_experts,
            K=k,
            BEFORE=before,
            BIASED=bias_E is not None,
            ROWS=rows,
            COLUMNS=columns,
            CHOICES=triton.next_power_of_2(k),
        )
    return weights_TK, expert_ids_TK


def topk_softmax_backward(
    dweights_TK: Tensor, expert_ids_TK: Tensor, saved: Tensor, num_experts: int, before: bool
) -> Tensor:
    """dlogits float32 [T, E] of contiguous inputs; every row is written once, as a whole.

    `saved`: the logits [T, E] if the softmax came before the choice, else the weights [T, K].
    """
    num_tokens, k = dweights_TK.shape
    dlogits_TE = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=dweights_TK.device)
    columns, rows = _tile(num_experts)
    with torch.cuda.device_of(dweights_TK):
        _backward_kernel[(triton.cdiv(num_tokens, rows),)](
            dweights_TK,
            expert_ids_TK,
            saved,
            dlogits_TE,
            num_tokens,
            E=num_experts,
            K=k,
            BEFORE=before,
            ROWS=rows,
            COLUMNS=columns,
        )
    return dlogits_TE


def _tile(num_experts: int) -> tuple[int, int]:
    """Columns and rows of a program of four warps: 16 scores a thread (up to E = 2048), which do not spill."""
    columns = triton.next_power_of_2(num_experts)
    return columns, max(1, 2048 // max(32, columns))


@triton.jit
def _keys(scores):
    """int32 in the order of float32 scores: −0 equals +0, and NaN, whatever its bits, is above all."""
    bits = scores.to(tl.int32, bitcast=True)
    magnitudes = bits & 0x7FFFFFFF
    keys = tl.where(bits < 0, -magnitudes, magnitudes)
    return tl.where(magnitudes > 0x7F800000, NAN_KEY, keys)


@triton.jit
def _softmax(logits):
    exponentials = tl.exp(logits - tl.max(logits, 1)[:, None])
    return exponentials / tl.sum(exponentials, 1)[:, None]


@triton.jit
def _forward_kernel(
    logits_TE,
    bias_E,
    weights_TK,
    expert_ids_TK,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    BEFORE: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, COLUMNS)
    in_rows = (rows < num_tokens)[:, None]
    row_logits = logits_TE + rows.to(tl.int64)[:, None] * E
    logits = tl.load(row_logits + experts[None, :], mask=in_rows & (experts < E)[None, :], other=float("-inf"))
    if BEFORE:
        largest = tl.max(logits, 1)[:, None]
        total = tl.sum(tl.exp(logits - largest), 1)[:, None]
    scores = logits
    if BIASED:
        if BEFORE:
            scores = tl.exp(logits - largest) / total
        scores += tl.load(bias_E + experts, mask=experts < E, other=0.0)[None, :]
    keys = tl.where((experts < E)[None, :], _keys(scores), STRUCK_OUT)

    choices = tl.arange(0, CHOICES)
    expert_ids = tl.zeros((ROWS, CHOICES), tl.int32)
    for k in range(K):
        best = tl.max(keys, 1)[:, None]
        # The lowest of equals, and the only one to be struck out.
        expert = tl.min(tl.where(keys == best, experts[None, :], COLUMNS), 1)[:, None]
        keys = tl.where(experts[None, :] == expert, STRUCK_OUT, keys)
        expert_ids = tl.where(choices[None, :] == k, expert, expert_ids)

    is_choice = in_rows & (choices < K)[None, :]
    chosen_logits = tl.load(row_logits + expert_ids, mask=is_choice, other=float("-inf"))
    weights = tl.exp(chosen_logits - largest) / total if BEFORE else _softmax(chosen_logits)
    places = rows.to(tl.int64)[:, None] * K + choices[None, :]
    tl.store(weights_TK + places, weights, mask=is_choice)
    tl.store(expert_ids_TK + places, expert_ids, mask=is_choice)


@triton.jit
def _backward_kernel(
    dweights_TK,
    expert_ids_TK,
    saved,
    dlogits_TE,
    num_tokens,
    E: tl.constexpr,
    K: tl.constexpr,
    BEFORE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """dlogits = p ⊙ (dp − ⟨p, dp⟩), where dp is dweights at the winners and zero elsewhere.

    p is the softmax of the row ("before"), or the weights at the winners and zero elsewhere ("after").
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, COLUMNS)
    in_rows = rows < num_tokens
    cells = rows.to(tl.int64)[:, None] * E + experts[None, :]
    mask = in_rows[:, None] & (experts < E)[None, :]
    probabilities = tl.zeros((ROWS, COLUMNS), tl.float32)
    if BEFORE:
        probabilities = _softmax(tl.load(saved + cells, mask=mask, other=float("-inf")))
    dprobabilities = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(K):
        place = rows.to(tl.int64) * K + k
        winner = experts[None, :] == tl.load(expert_ids_TK + place, mask=in_rows, other=0)[:, None]
        dweight = tl.load(dweights_TK + place, mask=in_rows, other=0.0)[:, None]
        dprobabilities = tl.where(winner, dweight, dprobabilities)
        if not BEFORE:
            weight = tl.load(saved + place, mask=in_rows, other=0.0)[:, None]
            probabilities = tl.where(winner, weight, probabilities)
    inner = tl.sum(probabilities * dprobabilities, 1)[:, None]
    tl.store(dlogits_TE + cells, probabilities * (dprobabilities - inner), mask=mask)
