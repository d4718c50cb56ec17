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

from moetrain.kernels import Routing, choose_backend
from moetrain.kernels.expert_mlp import stages
from moetrain.parallel.wire import Wire, homeward, pack, unpack


@dataclass(frozen=True)
class WayBack:
    """What combine needs to know of a dispatch."""

    rows: Routing
    """The S rows that this rank sent: "pairs" of its tokens and where they went."""
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

    bytes_sent: int
    """What this rank has sent to others so far, forward and backward, without the splits themselves."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched: ...

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor: ...


class LocalDispatcher:
    """All experts are on this rank: nothing moves."""

    bytes_sent = 0

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        return Dispatched(x_TD, routing, None)

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        return y_RD


class Exchange:
    """Rows between the ranks of a group, expert e on rank e // (E / ep), and the bytes that they take."""

    def __init__(self, group: dist.ProcessGroup, wire: Wire = "compute"):
        """`wire`: the format of rows, and of the gradients of sums, on their way to the experts."""
        self.group = group
        self.ep = group.size()
        self.outward = wire
        self.homeward = homeward(wire)
        self.bytes_sent = 0
        self.rows_sent = 0
        """Of hidden states, to other ranks, in forward passes …"""
        self.row_exchanges = 0
        """… by so many all-to-alls …"""
        self.exchanges = 0
        """… of so many in all, sizes, expert ids and weights and backward passes included."""

    def experts_per_rank(self, routing: Routing) -> int:
        """E / ep. Raises ValueError where it is not a whole number."""
        if routing.num_experts % self.ep:
            raise ValueError(f"{routing.num_experts} experts cannot be shared evenly by {self.ep} ranks")
        return routing.num_experts // self.ep

    def exchange(
        self, x: Tensor, send: list[int], receive: list[int], wire: Wire = "compute", back: Wire = "compute"
    ) -> Tensor:
        """Rows to and from each rank, in the format `wire`; differentiable, gradients in the format `back`."""
        return _AllToAll.apply(x, send, receive, self, wire, back)

    def exchange_rows(self, x_SD: Tensor, send: list[int], receive: list[int], wire: Wire, back: Wire) -> Tensor:
        """:meth:`exchange` of hidden states, counted."""
        self.row_exchanges += 1
        self.rows_sent += sum(send) - send[self.group.rank()]
        return self.exchange(x_SD, send, receive, wire, back)

    def exchange_sizes(self, sizes: Tensor) -> Tensor:
        """Row p of `sizes`, int [ep, n], goes to rank p; what arrived."""
        self.exchanges += 1
        received = torch.empty_like(sizes)
        dist.all_to_all_single(received, sizes, group=self.group)
        return received

    def all_to_all(self, x: Tensor, send: list[int], receive: list[int], wire: Wire) -> Tensor:
        """Rows to and from each rank, counted; without autograd."""
        self.exchanges += 1
        # A strided tensor would be read as if it were contiguous: wrong numbers, no error. `pack` makes it so.
        packed = pack(x, wire)
        received = packed.new_empty(sum(receive), *packed.shape[1:])
        dist.all_to_all_single(received, packed, receive, send, group=self.group)
        self.bytes_sent += (sum(send) - send[self.group.rank()]) * packed.shape[1:].numel() * packed.element_size()
        return unpack(received, wire, x.shape[-1], x.dtype)


class AllToAllDispatcher(Exchange):
    """One row for each token and rank. A dispatch waits for the device once, for the splits."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """Send each token's row once to every rank that holds one of its experts.

        The routing of the result is over this rank's E / ep experts, its tokens are the R received rows; rows of
        x and the weights carry gradients back to their source.
        """
        experts = self.experts_per_rank(routing)
        pair_offsets = routing.expert_offsets[::experts].contiguous()
        pairs_N = torch.arange(routing.num_pairs, dtype=torch.int32, device=pair_offsets.device)
        # Of padding: ep, so that it reaches none of the ranks.
        destination_N = torch.searchsorted(pair_offsets[1:], pairs_N, right=True)
        cell_N = destination_N * routing.num_tokens + routing.token_ids_N
        # Rank by rank along one dimension: a scan down the columns of 32,768 × 2 takes an H100 1.9 ms.
        reached_X = cell_N.new_zeros((self.ep + 1) * routing.num_tokens, dtype=torch.bool).index_fill_(0, cell_N, True)
        reached_TP = reached_X.view(self.ep + 1, routing.num_tokens)[: self.ep].t()
        most_rows = min(routing.num_tokens * self.ep, routing.num_pairs)
        rows = Routing.from_mask(reached_TP, reached_TP.float(), most_rows)

        sizes = torch.stack([rows.counts_E, pair_offsets.diff()], 1)
        sizes_received = self.exchange_sizes(sizes)
        # All that does not need the sizes, before the host waits for them: the device goes on meanwhile.
        row_N = reached_X.cumsum(0, dtype=torch.int32)[cell_N] - 1
        row_of_pair_N = row_N - rows.expert_offsets[destination_N]
        indices_N2 = torch.stack([row_of_pair_N, (routing.expert_ids_N % experts).to(torch.int32)], 1)
        rows_sent, pairs_sent, rows_received, pairs_received = _on_host(sizes, sizes_received)

        # Pairs are sorted by expert, so pairs of one destination are neighbours, and so are its rows.
        rows, pairs = rows.trimmed_to(sum(rows_sent)), slice(sum(pairs_sent))
        rows_SD = _GatherRows.apply(x_TD, rows)
        x_RD = self.exchange_rows(rows_SD, rows_sent, rows_received, self.outward, self.homeward)
        indices = self.exchange(indices_N2[pairs], pairs_sent, pairs_received)
        weights = self.exchange(routing.weights_N[pairs], pairs_sent, pairs_received)

        # Row numbers arrive relative to their source's block.
        rows_from, pairs_from = sizes_received.unbind(1)
        first_row_from = (rows_from.cumsum(0) - rows_from).repeat_interleave(
            pairs_from, output_size=sum(pairs_received)
        )
        local = Routing.from_pairs(indices[:, 0] + first_row_from, indices[:, 1], weights, x_RD.shape[0], experts)
        return Dispatched(x_RD, local, WayBack(rows, rows_sent, rows_received))

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        """Return each row's weighted sum to its source and add the rows of each token: [R, D] → [T, D]."""
        way = dispatched.way_back
        assert way is not None, "these rows were not dispatched by this dispatcher"
        y_SD = self.exchange_rows(y_RD, way.rows_received, way.rows_sent, self.homeward, self.outward)
        return _SumRows.apply(y_SD, way.rows)


class PairDispatcher(Exchange):
    """One row for each pair, weighted and added up at the source: the plain way, to compare with."""

    def dispatch(self, x_TD: Tensor, routing: Routing) -> Dispatched:
        """The routing of the result has one "token" for each received row, of one expert and weight 1."""
        routing = routing.trimmed()
        experts = self.experts_per_rank(routing)
        pairs_to = routing.expert_offsets[::experts].diff()
        sent, received = _on_host(pairs_to[:, None], self.exchange_sizes(pairs_to[:, None]))
        x_RD = self.exchange_rows(x_TD[routing.token_ids_N], sent, received, self.outward, self.homeward)
        expert_ids_R = self.exchange(routing.expert_ids_N % experts, sent, received)
        local = Routing.from_topk(expert_ids_R[:, None], x_RD.new_ones(x_RD.shape[0], 1), experts)
        return Dispatched(x_RD, local, WayBack(routing, sent, received))

    def combine(self, y_RD: Tensor, dispatched: Dispatched) -> Tensor:
        way = dispatched.way_back
        assert way is not None, "these rows were not dispatched by this dispatcher"
        y_ND = self.exchange_rows(y_RD, way.rows_received, way.rows_sent, self.homeward, self.outward)
        accumulator = torch.promote_types(y_ND.dtype, torch.float32)
        weighted_ND = y_ND.to(accumulator) * way.rows.weights_N.to(accumulator)[:, None]
        y_TD = weighted_ND.new_zeros(way.rows.num_tokens, y_ND.shape[1])
        return y_TD.index_add(0, way.rows.token_ids_N, weighted_ND).to(y_ND.dtype)


def _on_host(sent: Tensor, received: Tensor) -> list[list[int]]:
    """The columns of both; waits for the device."""
    return torch.cat([sent, received], 1).t().tolist()


def _sum_rows(y_SD: Tensor, rows: Routing) -> Tensor:
    """The rows of each token added up, by the kernels where they take them: [S, D] → [T, D]."""
    width = y_SD.shape[1]
    with torch.cuda.device_of(y_SD):
        return stages(choose_backend("auto", y_SD.device, y_SD.dtype, width, width)).sum_pairs(y_SD, None, rows)


class _GatherRows(torch.autograd.Function):
    """x[token] of each row; the transpose of :class:`_SumRows`."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, rows: Routing) -> Tensor:
        ctx.rows = rows
        return x_TD.index_select(0, rows.token_ids_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_rows(grads[0].contiguous(), ctx.rows), None


class _SumRows(torch.autograd.Function):
    """The sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, rows: Routing) -> Tensor:
        ctx.rows = rows
        return _sum_rows(y_SD, rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].index_select(0, ctx.rows.token_ids_N), None


class _AllToAll(torch.autograd.Function):
    """All-to-all of rows with uneven splits; the backward is the same with the splits exchanged."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: list[int], receive: list[int], via: Exchange, wire: Wire, back: Wire
    ) -> Tensor:
        ctx.send, ctx.receive, ctx.via, ctx.back = send, receive, via, back
        return via.all_to_all(x, send, receive, wire)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        return ctx.via.all_to_all(grads[0], ctx.receive, ctx.send, ctx.back), None, None, None, None, None
