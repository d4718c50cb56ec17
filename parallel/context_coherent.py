"""Context-coherent expert parallelism for inference (ExFlow, arXiv 2401.08383): tokens do not go home.

Every rank has the keys and values of all sequences, so that a token's attention can be computed wherever the token is.
It moves to the rank of its expert and stays there until its next expert is somewhere else: one all-to-all a layer, and
no row at all for a token whose next expert is on the rank where it is. Once for each new token, ranks tell one another
the keys and values that they have computed.

A token with several experts stays with those that have the largest weight together. Experts of other ranks get a row
each, and their sums take a second all-to-all, to where the token is then: ExFlow has one expert a token.

Shapes: T tokens here, R received rows, S sent ones, D width, K experts a token, P ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moetrain.kernels import Routing
from moetrain.parallel.dispatch import Exchange


@dataclass(frozen=True)
class Arrived:
    """Rows on the rank of their experts."""

    x_RD: Tensor
    routing: Routing
    """Among this rank's experts."""
    label_R: Tensor
    """What the tokens are known by, int64."""
    home_R: Tensor
    """The rank where the token is from now on, int64: this one, or another to which the experts' sum must go."""


class ContextCoherentExchange(Exchange):
    """Moves tokens between the ranks of a group, expert e being on rank e // (E / P). Without autograd."""

    context_bytes = 0
    """Of `bytes_sent`, those of :meth:`share`."""

    def move(self, x_TD: Tensor, label_T: Tensor, experts_TK: Tensor, weights_TK: Tensor, num_experts: int) -> Arrived:
        """Send each token to the ranks of its experts.

        `label_T`: int64, different for all tokens of all ranks. `experts_TK`: int64; `weights_TK`: floating point.
        """
        share = num_experts // self.ep
        rank_TK = experts_TK // share
        weight_TP = weights_TK.new_zeros(len(x_TD), self.ep).scatter_add(1, rank_TK, weights_TK)
        reached_TP = torch.zeros_like(weight_TP, dtype=torch.bool).scatter(1, rank_TK, True)
        home_T = weight_TP.masked_fill(~reached_TP, -torch.inf).argmax(1)
        to_S, token_S = reached_TP.t().nonzero(as_tuple=True)
        # −1: an expert of another rank.
        local_SK = (experts_TK[token_S] - to_S[:, None] * share).masked_fill(rank_TK[token_S] != to_S[:, None], -1)
        integers_SN = torch.cat([label_T[token_S, None], home_T[token_S, None], local_SK], 1)
        sent, received = self._sizes(to_S)
        arrived = _unpacked(
            self._exchange_packed([x_TD[token_S], integers_SN, weights_TK[token_S]], sent, received),
            [x_TD, integers_SN, weights_TK],
        )
        x_RD, integers_RN, weights_RK = arrived
        label_R, home_R, local_RK = integers_RN[:, 0], integers_RN[:, 1], integers_RN[:, 2:]
        row_N, place_N = (local_RK >= 0).nonzero(as_tuple=True)
        routing = Routing.from_pairs(row_N, local_RK[row_N, place_N], weights_RK[row_N, place_N], len(x_RD), share)
        return Arrived(x_RD, routing, label_R, home_R)

    def settle(self, x_RD: Tensor, y_RD: Tensor, arrived: Arrived, top_k: int) -> tuple[Tensor, Tensor]:
        """Tokens that are here from now on, [T', D] with what all their experts have added, and their labels [T'].

        `x_RD`: what the sums `y_RD` of each row's experts are added to.
        """
        here_R = arrived.home_R == self.group.rank()
        x_TD, label_T = (x_RD + y_RD)[here_R], arrived.label_R[here_R]
        if top_k == 1:  # a row's only expert is where the token lives
            return x_TD, label_T
        away_R = (~here_R).nonzero().squeeze(1)
        away_R = away_R[arrived.home_R[away_R].argsort(stable=True)]
        sent, received = self._sizes(arrived.home_R[away_R])
        parts = [y_RD[away_R], arrived.label_R[away_R, None]]
        y_SD, label_S1 = _unpacked(self._exchange_packed(parts, sent, received), parts)
        sorted_T, order_T = label_T.sort()
        token_S = order_T[torch.searchsorted(sorted_T, label_S1[:, 0])]
        return x_TD.index_add(0, token_S, y_SD), label_T

    def share(self, *columns: Tensor) -> list[Tensor]:
        """The rows of all ranks, in the order of ranks, for rows [n, m, …] of each: an all-gather of uneven parts."""
        before, rows = self.bytes_sent, len(columns[0])
        received = self.exchange_sizes(torch.full((self.ep, 1), rows, device=columns[0].device))[:, 0].tolist()
        packed = _packed(columns).repeat(self.ep, 1)
        gathered = self.all_to_all(packed, [rows] * self.ep, received, "compute")
        self.context_bytes += self.bytes_sent - before
        return _unpacked(gathered, columns)

    def _sizes(self, to_S: Tensor) -> tuple[list[int], list[int]]:
        """Rows to and from each rank, of rows in the order of their destinations."""
        sizes_P1 = torch.bincount(to_S, minlength=self.ep)[:, None]
        return sizes_P1[:, 0].tolist(), self.exchange_sizes(sizes_P1)[:, 0].tolist()

    def _exchange_packed(self, columns: list[Tensor], sent: list[int], received: list[int]) -> Tensor:
        return self.exchange_rows(_packed(columns), sent, received, "compute", "compute")


def _packed(columns: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """One row of bytes for each row of all."""
    return torch.cat([column.flatten(1).contiguous().view(torch.uint8) for column in columns], 1)


def _unpacked(packed: Tensor, like: list[Tensor] | tuple[Tensor, ...]) -> list[Tensor]:
    """The columns again, of the shapes and dtypes that these have, whatever their number of rows."""
    columns = []
    widths = [tensor.shape[1:].numel() * tensor.element_size() for tensor in like]
    for part, tensor in zip(packed.split(widths, 1), like, strict=True):
        # A copy even of one row, which is contiguous but begins anywhere.
        own = part.clone(memory_format=torch.contiguous_format)
        columns.append(own.view(tensor.dtype).view(len(part), *tensor.shape[1:]))
    return columns
