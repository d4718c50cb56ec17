"""Which token goes to which expert, with which weight.

Shapes: T tokens, E experts, K experts a token (where that is a constant), N chosen (token, expert) pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """The chosen (token, expert) pairs, grouped by expert, with what is needed to walk them token by token.

    A token may have any number of experts from 0 to E. All tensors live on one device; nothing here waits for it.
    """

    token_ids_N: Tensor
    """int64, the token of each pair. Pairs are sorted by expert; within an expert they keep the order of the input."""
    weights_N: Tensor
    """float, the weight of each pair in the same order; carries the gradient to the router."""
    expert_offsets: Tensor
    """int32 [E + 1]: the pairs of expert e are expert_offsets[e] … expert_offsets[e + 1]."""
    pair_ids_N: Tensor
    """int64: positions in the order above, walked token by token …"""
    token_offsets: Tensor
    """… int32 [T + 1]: those of token t are pair_ids_N[token_offsets[t]] … pair_ids_N[token_offsets[t + 1] − 1]."""
    num_tokens: int
    num_experts: int
    pairs_per_token: int | None
    """K if every token has exactly K pairs, else None."""

    @property
    def num_pairs(self) -> int:
        return self.token_ids_N.numel()

    @property
    def counts_E(self) -> Tensor:
        """int32 [E]: pairs of each expert."""
        return self.expert_offsets.diff()

    @staticmethod
    def from_topk(expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Routing:
        """Every token has K different experts.

        `expert_ids_TK`: int [T, K] in [0, E); `weights_TK`: float [T, K]. Raises ValueError on other shapes or dtypes
        and, for CPU tensors (checking a GPU's would wait for it), on ids out of range.
        """
        _check(expert_ids_TK, weights_TK, num_experts, dimensions=2)
        num_tokens, top_k = expert_ids_TK.shape
        experts_N = expert_ids_TK.flatten()
        order_N = experts_N.argsort(stable=True)
        return Routing(
            token_ids_N=order_N // top_k,
            weights_N=weights_TK.flatten()[order_N],
            expert_offsets=_offsets(experts_N, num_experts),
            pair_ids_N=_inverse(order_N),
            token_offsets=torch.arange(num_tokens + 1, dtype=torch.int32, device=experts_N.device) * top_k,
            num_tokens=num_tokens,
            num_experts=num_experts,
            pairs_per_token=top_k,
        )

    @staticmethod
    def from_pairs(
        token_ids_N: Tensor, expert_ids_N: Tensor, weights_N: Tensor, num_tokens: int, num_experts: int
    ) -> Routing:
        """Any set of pairs, in any order: int [N], int [N], float [N].

        Raises ValueError on other shapes or dtypes and, for CPU tensors, on ids out of range.
        """
        _check(expert_ids_N, weights_N, num_experts, dimensions=1)
        _check(token_ids_N, weights_N, num_tokens, dimensions=1)
        order_N = expert_ids_N.argsort(stable=True)
        tokens_N = token_ids_N[order_N].to(torch.int64)
        return Routing(
            token_ids_N=tokens_N,
            weights_N=weights_N[order_N],
            expert_offsets=_offsets(expert_ids_N, num_experts),
            pair_ids_N=tokens_N.argsort(stable=True),
            token_offsets=_offsets(tokens_N, num_tokens),
            num_tokens=num_tokens,
            num_experts=num_experts,
            pairs_per_token=None,
        )


def _offsets(ids_N: Tensor, bins: int) -> Tensor:
    """int32 [bins + 1]: running count of the ids below each value."""
    # A sum of ones at each id counts like bincount, without bincount's wait for the largest id on a GPU.
    counts = torch.zeros(bins + 1, dtype=torch.int32, device=ids_N.device)
    counts.index_add_(0, ids_N.to(torch.int64) + 1, torch.ones_like(ids_N, dtype=torch.int32))
    return counts.cumsum(0, dtype=torch.int32)


def _inverse(order_N: Tensor) -> Tensor:
    inverse_N = torch.empty_like(order_N)
    inverse_N[order_N] = torch.arange(order_N.numel(), device=order_N.device)
    return inverse_N


def _check(ids: Tensor, weights: Tensor, bound: int, dimensions: int) -> None:
    if ids.dim() != dimensions or ids.shape != weights.shape:
        raise ValueError(f"ids {list(ids.shape)} and weights {list(weights.shape)} must be equal {dimensions}-D shapes")
    if ids.dtype not in (torch.int32, torch.int64) or not weights.is_floating_point():
        raise ValueError(f"ids must be int32 or int64 and weights floating point, not {ids.dtype} and {weights.dtype}")
    if ids.device != weights.device:
        raise ValueError(f"ids are on {ids.device}, weights on {weights.device}")
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < bound:
        raise ValueError(f"ids must be in [0, {bound}), found {int(ids.min())} … {int(ids.max())}")
