"""Which token goes to which expert, with which weight.

Shapes: T tokens, E experts, K experts a token (where that is a constant), N chosen (token, expert) pairs.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_PAIRS = 2**31 - 2**10
"""Positions are int32, a block of them at a time."""


@dataclass(frozen=True)
class Routing:
    """The chosen (token, expert) pairs, grouped by expert, with what is needed to walk them token by token.

    A token may have any number of experts from 0 to E. All tensors live on one device; of what is here, only `trimmed`
    waits for it.
    """

    token_ids_N: Tensor
    """int32, the token of each pair. Pairs are sorted by expert; within an expert they keep the order of the input."""
    weights_N: Tensor
    """float, the weight of each pair in the same order; carries the gradient to the router."""
    expert_offsets: Tensor
    """int32 [E + 1]: the pairs of expert e are expert_offsets[e] … expert_offsets[e + 1] − 1."""
    pair_ids_N: Tensor
    """int32: positions in the order above, walked token by token …"""
    token_offsets: Tensor
    """… int32 [T + 1]: those of token t are pair_ids_N[token_offsets[t]] … pair_ids_N[token_offsets[t + 1] − 1]."""
    num_tokens: int
    num_experts: int
    pairs_per_token: int | None
    """K if every token has exactly K pairs, else None."""
    padded: bool = False
    """True: the N entries are room, of which the first expert_offsets[E] = token_offsets[T] are pairs and the rest
    (token 0, weight 0, position 0) belong to no expert and no token. How many are pairs only the device knows."""

    @property
    def num_pairs(self) -> int:
        """N, the room where this is padded."""
        return self.token_ids_N.numel()

    @property
    def counts_E(self) -> Tensor:
        """int32 [E]: pairs of each expert."""
        return self.expert_offsets.diff()

    @property
    def expert_ids_N(self) -> Tensor:
        """int64 [N]: the expert of each pair (of padding: the last expert)."""
        pairs_N = torch.arange(self.num_pairs, dtype=torch.int32, device=self.expert_offsets.device)
        return torch.searchsorted(self.expert_offsets[1:-1], pairs_N, right=True)

    def trimmed(self) -> Routing:
        """The same without padding. Waits for the device once if this is padded."""
        return self.trimmed_to(int(self.expert_offsets[-1])) if self.padded else self

    def trimmed_to(self, pairs: int) -> Routing:
        """The same without padding, of which the caller knows that it has so many pairs."""
        return replace(
            self,
            token_ids_N=self.token_ids_N[:pairs],
            weights_N=self.weights_N[:pairs],
            pair_ids_N=self.pair_ids_N[:pairs],
            padded=False,
        )

    def renumbered(self, number_E: Tensor) -> Routing:
        """The same pairs with expert e called number_E[e], int [E] and a permutation: whole experts change places.

        Weights carry gradients; tokens walk their pairs in the order that they did.
        """
        counts_S = self.counts_E.new_empty(self.num_experts).index_copy_(0, number_E, self.counts_E)
        offsets = _running_sum(counts_S)
        # By how much the pairs of each expert move on; padding, as one more expert, stays.
        moves_E = F.pad(offsets[:-1].index_select(0, number_E) - self.expert_offsets[:-1], (0, 1))
        moves_S = torch.zeros_like(moves_E).index_copy_(0, number_E, moves_E[:-1])
        pairs_N = torch.arange(self.num_pairs, dtype=torch.int32, device=offsets.device)
        to_N = pairs_N + moves_E[torch.searchsorted(self.expert_offsets[1:], pairs_N, right=True)]
        from_N = pairs_N - moves_S[torch.searchsorted(offsets[1:], pairs_N, right=True)]
        pair_ids_N = to_N.index_select(0, self.pair_ids_N)
        return replace(
            self,
            token_ids_N=self.token_ids_N.index_select(0, from_N),
            weights_N=_Permute.apply(self.weights_N, from_N, to_N),
            expert_offsets=offsets,
            pair_ids_N=pair_ids_N.masked_fill(pairs_N >= offsets[-1], 0) if self.padded else pair_ids_N,
        )

    @staticmethod
    def from_topk(expert_ids_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Routing:
        """Every token has K different experts.

        `expert_ids_TK`: int32 or int64 [T, K] in [0, E); `weights_TK`: float [T, K], differentiable. Raises ValueError
        on other shapes or dtypes and, for CPU tensors, on ids out of range. Checking a GPU's ids would wait for it:
        there an id outside [0, E) counts as the nearest one inside, so that every kernel stays within its arrays.
        """
        _check(expert_ids_TK, weights_TK, num_experts, dimensions=2)
        num_tokens, top_k = expert_ids_TK.shape
        token_ids_N, weights_N, pair_ids_N, expert_offsets, token_offsets = _GroupByExpert.apply(
            weights_TK.flatten(), expert_ids_TK.flatten(), num_experts, top_k
        )
        return Routing(
            token_ids_N=token_ids_N,
            weights_N=weights_N,
            expert_offsets=expert_offsets,
            pair_ids_N=pair_ids_N,
            # Without pairs the walk cannot tell how many tokens there are.
            token_offsets=token_offsets if pair_ids_N.numel() else token_offsets.new_zeros(num_tokens + 1),
            num_tokens=num_tokens,
            num_experts=num_experts,
            pairs_per_token=top_k,
        )

    @staticmethod
    def from_pairs(
        token_ids_N: Tensor, expert_ids_N: Tensor, weights_N: Tensor, num_tokens: int, num_experts: int
    ) -> Routing:
        """Any set of pairs, in any order: int [N], int [N], float [N] (differentiable).

        Raises ValueError on other shapes or dtypes and, for CPU tensors, on ids out of range; on a GPU such an id
        counts as the nearest one inside, as in :meth:`from_topk`.
        """
        _check(expert_ids_N, weights_N, num_experts, dimensions=1)
        _check(token_ids_N, weights_N, num_tokens, dimensions=1)
        order_N, weights_N, _, expert_offsets, _ = _GroupByExpert.apply(weights_N, expert_ids_N, num_experts, 1)
        tokens_N = token_ids_N.index_select(0, order_N).to(torch.int32).clamp(0, max(0, num_tokens - 1))
        walked_N, pair_ids_N = tokens_N.sort(stable=True)
        edges = torch.arange(num_tokens + 1, dtype=torch.int32, device=tokens_N.device)
        return Routing(
            token_ids_N=tokens_N,
            weights_N=weights_N,
            expert_offsets=expert_offsets,
            pair_ids_N=pair_ids_N.to(torch.int32),
            token_offsets=torch.searchsorted(walked_N, edges, out_int32=True),
            num_tokens=num_tokens,
            num_experts=num_experts,
            pairs_per_token=None,
        )

    @staticmethod
    def from_mask(chosen_TE: Tensor, weights_TE: Tensor, max_pairs: int) -> Routing:
        """Any set of pairs whose size only the device knows: a padded routing with room for `max_pairs`.

        `chosen_TE`: bool [T, E]; `weights_TE`: float [T, E], differentiable (zero gradient where not chosen). Pairs of
        an expert are in order of their tokens, pairs of a token in order of their experts. The caller must know a bound
        on the number of chosen pairs; for T·K pairs rounded to tiles of M rows an expert, T·K + E·(M − 1). Raises
        ValueError on other shapes or dtypes and, for CPU tensors, on more pairs than `max_pairs`; on a GPU that is a
        device-side assertion, which ends the process's use of the GPU, since silent loss of pairs would be worse.
        """
        if chosen_TE.dim() != 2 or chosen_TE.shape != weights_TE.shape:
            raise ValueError(
                f"chosen {list(chosen_TE.shape)} and weights {list(weights_TE.shape)} must be equal 2-D shapes"
            )
        if chosen_TE.dtype != torch.bool or not weights_TE.is_floating_point():
            raise ValueError(
                f"chosen must be bool and weights floating point, not {chosen_TE.dtype} and {weights_TE.dtype}"
            )
        if chosen_TE.device != weights_TE.device:
            raise ValueError(f"chosen is on {chosen_TE.device}, weights on {weights_TE.device}")
        if not 0 <= max_pairs <= MAX_PAIRS:
            raise ValueError(f"max_pairs must be in [0, {MAX_PAIRS}], not {max_pairs}")
        token_ids_N, weights_N, pair_ids_N, expert_offsets, token_offsets = _GroupChosen.apply(
            weights_TE, chosen_TE, max_pairs
        )
        if not chosen_TE.is_cuda and int(expert_offsets[-1]) > max_pairs:
            raise ValueError(f"{int(expert_offsets[-1])} pairs are chosen, more than max_pairs {max_pairs}")
        torch._assert_async(expert_offsets[-1] <= max_pairs, "more pairs are chosen than max_pairs")
        return Routing(
            token_ids_N=token_ids_N,
            weights_N=weights_N,
            expert_offsets=expert_offsets,
            pair_ids_N=pair_ids_N,
            token_offsets=token_offsets,
            num_tokens=chosen_TE.shape[0],
            num_experts=chosen_TE.shape[1],
            pairs_per_token=None,
            padded=True,
        )


def group_by_expert(
    expert_ids_N: Tensor, weights_N: Tensor, num_experts: int, pairs_per_token: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Stable sort of pairs by expert, pair n belonging to token n // K.

    Returns, all int32 but the weights, the token and the weight of each pair in the new order; the position of each
    pair there, in the order given; the experts' offsets [E + 1]; the tokens' offsets [N / K + 1]. Ids outside [0, E)
    count as the nearest one inside.
    """
    expert_ids_N = expert_ids_N.clamp(0, num_experts - 1).to(torch.int32)
    sorted_N, order_N = expert_ids_N.sort(stable=True)
    positions_N = torch.empty_like(expert_ids_N)
    positions_N[order_N] = torch.arange(order_N.numel(), dtype=torch.int32, device=order_N.device)
    edges = torch.arange(num_experts + 1, dtype=torch.int32, device=order_N.device)
    return (
        (order_N // max(1, pairs_per_token)).to(torch.int32),
        weights_N[order_N],
        positions_N,
        torch.searchsorted(sorted_N, edges, out_int32=True),
        torch.arange(0, order_N.numel() + 1, max(1, pairs_per_token), dtype=torch.int32, device=order_N.device),
    )


def group_chosen(
    chosen_TE: Tensor, weights_TE: Tensor, max_pairs: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The chosen cells of a mask as pairs grouped by expert, by token within it, in room for N = `max_pairs`.

    Returns, all int32 but the weights, the token and the weight of each pair; the positions of the pairs, walked token
    by token; the experts' offsets [E + 1]; the tokens' offsets [T + 1]. What is left of the room is zero.
    """
    num_tokens, num_experts = chosen_TE.shape
    expert_offsets = _running_sum(chosen_TE.sum(0, dtype=torch.int32))
    token_offsets = _running_sum(chosen_TE.sum(1, dtype=torch.int32))
    numbers = torch.arange(1, max_pairs + 1, dtype=torch.int32, device=chosen_TE.device)
    if not chosen_TE.numel():
        zeros_N = torch.zeros_like(numbers)
        return zeros_N, weights_TE.new_zeros(max_pairs), zeros_N.clone(), expert_offsets, token_offsets
    padding_N = numbers > expert_offsets[-1]
    # The n-th chosen cell is the first one whose running count is n: a search instead of a scatter.
    # (masked_fill throughout, because `where` copies its scalar to the device, and waits for that.)
    count_ET = chosen_TE.t().flatten().cumsum(0, dtype=torch.int32)
    count_TE = chosen_TE.flatten().cumsum(0, dtype=torch.int32)
    cell_N = torch.searchsorted(count_ET, numbers).masked_fill(padding_N, 0)
    walked_cell_N = torch.searchsorted(count_TE, numbers).masked_fill(padding_N, 0)
    token_ids_N, experts_N = cell_N % num_tokens, cell_N // num_tokens
    walked_N = walked_cell_N % num_experts * num_tokens + walked_cell_N // num_experts
    return (
        token_ids_N.to(torch.int32),
        weights_TE.flatten().index_select(0, token_ids_N * num_experts + experts_N).masked_fill(padding_N, 0),
        (count_ET - 1).index_select(0, walked_N).masked_fill(padding_N, 0),
        expert_offsets,
        token_offsets,
    )


def cells_of_pairs(values_N: Tensor, chosen_TE: Tensor, pair_ids_N: Tensor, token_offsets: Tensor) -> Tensor:
    """[T, E]: the value of each chosen cell's pair, zero where not chosen; the transpose of :func:`group_chosen`.

    `pair_ids_N`, `token_offsets`: what that returned for `chosen_TE`. A gather, differentiable in the values.
    """
    if not values_N.numel():
        return values_N.new_zeros(chosen_TE.shape)
    walked_X = chosen_TE.flatten().cumsum(0, dtype=torch.int32) - 1
    positions_X = pair_ids_N.index_select(0, walked_X.clamp_min(0))
    return values_N.index_select(0, positions_X).view(chosen_TE.shape).masked_fill(~chosen_TE, 0)


class _Permute(torch.autograd.Function):
    """x[from]; the transpose is x[to], without a scatter."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, from_N: Tensor, to_N: Tensor) -> Tensor:
        ctx.save_for_backward(to_N)
        return x_N.index_select(0, from_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (to_N,) = ctx.saved_tensors
        return grads[0].index_select(0, to_N), None, None


class _GroupByExpert(torch.autograd.Function):
    """:func:`group_by_expert`, whose transpose is the gather by position, without a scatter."""

    @staticmethod
    def forward(
        ctx: Any, weights_N: Tensor, expert_ids_N: Tensor, num_experts: int, pairs_per_token: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        group = group_by_expert
        if _has_kernels(expert_ids_N):
            from moetrain.kernels import routing_triton

            if num_experts <= routing_triton.MAX_EXPERTS:
                group = routing_triton.group_by_expert
        grouped = group(expert_ids_N, weights_N, num_experts, pairs_per_token)
        tokens_N, weights_N, positions_N, expert_offsets, token_offsets = grouped
        ctx.save_for_backward(positions_N)
        ctx.mark_non_differentiable(tokens_N, positions_N, expert_offsets, token_offsets)
        return grouped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (positions_N,) = ctx.saved_tensors
        return grads[1].index_select(0, positions_N), None, None, None


class _GroupChosen(torch.autograd.Function):
    """:func:`group_chosen`, whose transpose is a gather, :func:`cells_of_pairs`."""

    @staticmethod
    def forward(
        ctx: Any, weights_TE: Tensor, chosen_TE: Tensor, max_pairs: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        group = group_chosen
        if _has_kernels(chosen_TE):
            from moetrain.kernels import routing_triton

            group = routing_triton.group_chosen
        grouped = group(chosen_TE, weights_TE, max_pairs)
        token_ids_N, _, pair_ids_N, expert_offsets, token_offsets = grouped
        ctx.save_for_backward(chosen_TE, pair_ids_N, token_offsets)
        ctx.mark_non_differentiable(token_ids_N, pair_ids_N, expert_offsets, token_offsets)
        ctx.set_materialize_grads(False)
        return grouped

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        if grads[1] is None:
            return None, None, None
        chosen_TE, pair_ids_N, token_offsets = ctx.saved_tensors
        spread = cells_of_pairs
        # Who differentiates twice needs operations that autograd can record.
        if _has_kernels(chosen_TE) and not torch.is_grad_enabled():
            from moetrain.kernels import routing_triton

            spread = routing_triton.cells_of_pairs
        return spread(grads[1].contiguous(), chosen_TE, pair_ids_N, token_offsets), None, None


def _has_kernels(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.numel() > 0 and importlib.util.find_spec("triton") is not None


def _running_sum(counts: Tensor) -> Tensor:
    """int32 [n + 1]: sums of the counts before each."""
    sums = counts.new_zeros(counts.numel() + 1)
    torch.cumsum(counts, 0, out=sums[1:])
    return sums


def _check(ids: Tensor, weights: Tensor, bound: int, dimensions: int) -> None:
    if ids.dim() != dimensions or ids.shape != weights.shape:
        raise ValueError(f"ids {list(ids.shape)} and weights {list(weights.shape)} must be equal {dimensions}-D shapes")
    if ids.dtype not in (torch.int32, torch.int64) or not weights.is_floating_point():
        raise ValueError(f"ids must be int32 or int64 and weights floating point, not {ids.dtype} and {weights.dtype}")
    if ids.device != weights.device:
        raise ValueError(f"ids are on {ids.device}, weights on {weights.device}")
    if ids.numel() > MAX_PAIRS:
        raise ValueError(f"{ids.numel()} pairs, more than {MAX_PAIRS}")
    if ids.device.type == "cpu" and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < bound:
        raise ValueError(f"ids must be in [0, {bound}), found {int(ids.min())} … {int(ids.max())}")
