"""Token dispatch and combine: rows travel to the ranks that hold their experts, and weighted sums travel back.

A row is sent once for each (token, destination rank), not once for each pair, with its local expert ids and weights;
the destination computes one weighted sum a row, and the source adds at most `ep` rows a token.

Shapes: T tokens, D width, N pairs, S rows sent, R rows received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from moetrain.kernels import Routing


@dataclass(frozen=True)
class WayBack:
    """What combine needs to know of a dispatch."""

    num_tokens: int
    token_ids_S: Tensor
    """int64: the token of each row this rank sent."""
    rows_sent: list[int]
    rows_received: list[int]
    """Rows to and from each rank of the group."""


@dataclass(frozen=True)
class Dispatched:
    """Rows that arrived on this rank, and their routing among its experts."""

    x_RD: Tensor
    routing: Routing
    way_back: WayBack | None
    """None where nothing moved."""


class Dispatcher(Protocol):
    """Moves tokens to their experts and results back."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor: ...


class LocalDispatcher:
    """All experts are on this rank: nothing moves."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        return Dispatched(x_TD, routing, None)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        return y_RD


class AllToAllDispatcher:
    """Expert e lives on rank e // (E / ep) of `group`.

    A dispatch waits for the device twice: for the number of distinct rows, and for the splits; and once more for the
    number of pairs of a padded routing.
    """

    def __init__(self, group: dist.ProcessGroup):
        self.group = group
        self.ep = group.size()

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Send each token's row once to every rank that holds one of its experts.

        The routing of the result is over this rank's E / ep experts, its tokens are the R received rows; rows of
        x and the weights carry gradients back to their source.
        """
        routing = routing.trimmed()
        experts = routing.num_experts // self.ep
        counts_E = routing.counts_E.to(torch.int64)
        # Pairs are sorted by expert, so pairs of one destination are neighbours; a row is a distinct
        # (destination, token), and `unique` numbers the rows in just that order.
        expert_ids_N = torch.arange(routing.num_experts, device=x_TD.device).repeat_interleave(
            counts_E, output_size=routing.num_pairs
        )
        destination_N = expert_ids_N // experts
        rows_S, row_of_pair_N = torch.unique(
            destination_N * routing.num_tokens + routing.token_ids_N, return_inverse=True
        )
        token_ids_S = rows_S % routing.num_tokens
        rows_to = torch.zeros_like(counts_E[: self.ep]).index_add_(
            0, rows_S // routing.num_tokens, torch.ones_like(rows_S)
        )
        pairs_to = counts_E.view(self.ep, experts).sum(1)

        sizes = torch.stack([rows_to, pairs_to], 1)
        sizes_received = torch.empty_like(sizes)
        dist.all_to_all_single(sizes_received, sizes, group=self.group)
        rows_sent, pairs_sent, rows_received, pairs_received = torch.cat([sizes, sizes_received], 1).t().tolist()

        x_RD = _AllToAll.apply(x_TD[token_ids_S], rows_sent, rows_received, self.group)
        first_row_to = rows_to.cumsum(0) - rows_to
        pairs = torch.stack([row_of_pair_N - first_row_to[destination_N], expert_ids_N % experts], 1)
        pairs = _AllToAll.apply(pairs, pairs_sent, pairs_received, self.group)
        weights = _AllToAll.apply(routing.weights_N, pairs_sent, pairs_received, self.group)

        # Row numbers arrive relative to their source's block.
        rows_from = sizes_received[:, 0]
        first_row_from = (rows_from.cumsum(0) - rows_from).repeat_interleave(
            sizes_received[:, 1], output_size=sum(pairs_received)
        )
        local = Routing.from_pairs(pairs[:, 0] + first_row_from, pairs[:, 1], weights, x_RD.shape[0], experts)
        return Dispatched(x_RD, local, WayBack(routing.num_tokens, token_ids_S, rows_sent, rows_received))

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return each row's weighted sum to its source and add the rows of each token: [R, D] → [T, D]."""
        way = dispatched.way_back
        assert way is not None, "these rows were not dispatched by this dispatcher"
        y_SD = _AllToAll.apply(y_RD, way.rows_received, way.rows_sent, self.group)
        accumulator = torch.promote_types(y_SD.dtype, torch.float32)
        y_TD = torch.zeros(way.num_tokens, y_SD.shape[1], dtype=accumulator, device=y_SD.device)
        return y_TD.index_add(0, way.token_ids_S, y_SD.to(accumulator)).to(y_SD.dtype)


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows with uneven splits; the backward is the same with the splits exchanged."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
        ctx.send, ctx.receive, ctx.group = send, receive, group
        return _all_to_all(x, send, receive, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.receive, ctx.send, ctx.group), None, None, None


def _all_to_all(x: Tensor, send: list[int], receive: list[int], group: dist.ProcessGroup) -> Tensor:
    # A strided input would be read as if it were contiguous: wrong numbers, no error.
    x = x.contiguous()
    output = x.new_empty(sum(receive), *x.shape[1:])
    dist.all_to_all_single(output, x, receive, send, group=group)
    return output
