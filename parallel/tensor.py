"""Tensor and sequence parallelism: what the tp ranks of one share of the batch tell one another.

Heads, hidden units and words of the vocabulary are split over the ranks (Megatron-LM, arXiv 1909.08053). Between those
layers the tokens are (sequence parallelism, arXiv 2205.05198): a rank keeps T / tp consecutive ones of the T, so that
gathering needs no transposition. They are whole sequences or equal pieces of them.

The loss is the sum of all ranks' losses. So the gradient of what every rank has got is the sum of what each sends back,
and a value that all compute alike, as that of the cross-entropy, is shared among them. `group` None is one rank, which
has everything.

Shapes: B sequences, S positions, T = B·S tokens, D width, V words of the vocabulary on this rank.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

# torch 2.13 has new names for these two.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_Linear = Callable[[Tensor, dist.ProcessGroup], Tensor]


def gather_rows(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The rows [tp · n, …] of all ranks in order, from n rows of each; the backward is a reduce-scatter."""
    return x if group is None else _Collective.apply(x, group, _gathered, _summed_to_shards)


def gather_sequences(x_BSD: Tensor, length: int, group: dist.ProcessGroup | None) -> Tensor:
    """The share's sequences [B, length, D] from every rank's sequences or pieces of them."""
    return x_BSD if group is None else gather_rows(x_BSD.flatten(0, 1), group).unflatten(0, (-1, length))


def sum_to_pieces(partial_BSD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of all ranks' partial results [B, S, D] for this rank's tokens: whole sequences, or equal pieces.

    Reduce-scatter, with an all-gather as backward. T must be a multiple of tp.
    """
    if group is None:
        return partial_BSD
    shard_TD = _Collective.apply(partial_BSD.flatten(0, 1), group, _summed_to_shards, _gathered)
    return shard_TD.unflatten(0, (-1, math.gcd(partial_BSD.shape[1], shard_TD.shape[0])))


@torch.compiler.disable  # torch 2.11 would compile a gradient of zeros.
def sum_over_ranks(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' x on each of them; so is its gradient."""
    return _Collective.apply(x, group, _summed, _summed)


def embed(tokens_BS: Tensor, weight_VD: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Rows of this rank's part of the embedding, [B, S, D]; zeros for the words of other ranks."""
    if group is None:
        return F.embedding(tokens_BS, weight_VD)
    rows_BS, here_BS = _rows_of(tokens_BS, weight_VD.shape[0], group)
    return F.embedding(rows_BS, weight_VD).masked_fill(~here_BS[..., None], 0)


def split_cross_entropy(logits_TV: Tensor, targets_T: Tensor, group: dist.ProcessGroup, *, ignored: int) -> Tensor:
    """This rank's share of the sum of −log softmax(logits)[target] over the targets that are not `ignored`.

    `logits_TV`: scores of this rank's words for all T tokens. −log p = log Σ exp − logit: the first term is the same on
    all ranks, and each has 1 / tp of it; the second is the part of the rank that has the word. One all-gather of T
    numbers, and none in the backward pass, where softmax − onehot of its words is a rank's own. torch.compile takes all
    of it into one graph, so the logits are kept as the product wrote them, and one kernel makes their gradient.
    """
    rows_T, here_T = _rows_of(targets_T, logits_TV.shape[1], group)
    share_T = _SharedLogSumExp.apply(logits_TV.logsumexp(-1), group)
    minus_chosen = F.nll_loss(logits_TV, rows_T.where(here_T, ignored), ignore_index=ignored, reduction="sum")
    return share_T.where(targets_T != ignored, 0).sum() + minus_chosen


def _rows_of(words: Tensor, rows: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Each word's row of this rank's part (any row for another rank's word), and whether it is here."""
    rows_of_words = words - group.rank() * rows
    here = (rows_of_words >= 0) & (rows_of_words < rows)
    return rows_of_words.where(here, 0), here


class _Collective(torch.autograd.Function):
    """A linear collective, whose backward is its transpose."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup, collective: _Linear, transpose: _Linear) -> Tensor:
        ctx.group, ctx.transpose = group, transpose
        return collective(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.transpose(grads[0], ctx.group), None, None, None


class _SharedLogSumExp(torch.autograd.Function):
    """log Σ exp over the ranks' values of each token, 1 / tp of it on each of them.

    Every rank's share has the same gradient, the loss being their sum: the whole has it too.
    """

    @staticmethod
    def forward(ctx: Any, part_T: Tensor, group: dist.ProcessGroup) -> Tensor:
        whole_T = _gathered(part_T, group).view(group.size(), -1).logsumexp(0)
        ctx.save_for_backward((part_T - whole_T).exp())
        return whole_T / group.size()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight_T,) = ctx.saved_tensors
        return grads[0] * weight_T, None


def _gathered(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(group.size() * x.shape[0], *x.shape[1:])
    _all_gather(out, x.contiguous(), group=group)
    return out


def _summed_to_shards(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.new_empty(x.shape[0] // group.size(), *x.shape[1:])
    _reduce_scatter(out, x.contiguous(), group=group)
    return out


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    out = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(out, group=group)
    return out
