"""The experts' stages in plain PyTorch: the twin of the device kernels, and what runs where those do not.

Every stage gathers, multiplies and activates in the open, so its temporaries are as large as the rows it works on; what
is kept for the backward pass is the same as with the kernels.

Shapes: T tokens, D width, E experts, I expert width, H = 2I (gated) or I, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moetrain.kernels.activation import Activation, activate, activation_gradient
from moetrain.kernels.routing import Routing

Product = Callable[[Tensor, Tensor, Routing], Tensor]


class TorchStages:
    """The stages over two grouped products: rows [N, K] by weights [E, K, M], and rows [N, P]ᵀ by rows [N, Q]."""

    def __init__(self, rows_product: Product, outer_product: Product):
        self._rows_product = rows_product
        self._outer_product = outer_product

    def up_projection(
        self,
        x_TD: Tensor,
        w_up_EHD: Tensor,
        b_up_EH: Tensor | None,
        routing: Routing,
        activation: Activation,
        *,
        keep_hidden: bool,
    ) -> tuple[Tensor | None, Tensor]:
        """h = W_up,e x (+ b) of each pair, None unless `keep_hidden`, and a = act(h)."""
        h_NH = self._rows_product(x_TD[routing.token_ids_N], w_up_EHD.transpose(1, 2), routing)
        if b_up_EH is not None:
            h_NH = h_NH + b_up_EH[routing.expert_ids_N]
        return (h_NH if keep_hidden else None), activate(h_NH, activation)

    def down_projection(self, a_NI: Tensor, w_down_EDI: Tensor, b_down_ED: Tensor | None, routing: Routing) -> Tensor:
        """y = W_down,e a (+ b) of each pair."""
        y_ND = self._rows_product(a_NI, w_down_EDI.transpose(1, 2), routing)
        return y_ND if b_down_ED is None else y_ND + b_down_ED[routing.expert_ids_N]

    def sum_pairs(self, y_ND: Tensor, weights_N: Tensor | None, routing: Routing) -> Tensor:
        """Σ over the pairs of each token of (w ·) y, accumulated in float32 or wider: [N, D] → [T, D]."""
        accumulator = torch.promote_types(y_ND.dtype, torch.float32)
        if routing.pairs_per_token is not None:
            shape = (routing.num_tokens, routing.pairs_per_token)
            y_TKD = y_ND[routing.pair_ids_N].unflatten(0, shape).to(accumulator)
            if weights_N is not None:
                y_TKD = y_TKD * weights_N.to(accumulator)[routing.pair_ids_N].view(*shape, 1)
            return y_TKD.sum(1).to(y_ND.dtype)
        rows_ND = y_ND.to(accumulator)
        if weights_N is not None:
            rows_ND = rows_ND * weights_N.to(accumulator)[:, None]
        y_TD = rows_ND.new_zeros(routing.num_tokens, y_ND.shape[1])
        return y_TD.index_add_(0, routing.token_ids_N, rows_ND).to(y_ND.dtype)

    def hidden_gradient(
        self,
        dy_TD: Tensor,
        w_down_EDI: Tensor,
        h_NH: Tensor,
        weights_N: Tensor,
        routing: Routing,
        activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """dh, the weighted a, and the gradient ⟨dA′, a⟩ of the pairs' weights, with dA′ = dy W_down,e."""
        accumulator = torch.promote_types(h_NH.dtype, torch.float32)
        da_NI = self._rows_product(dy_TD[routing.token_ids_N], w_down_EDI, routing).to(accumulator)
        weights_N1 = weights_N.to(accumulator)[:, None]
        a_NI, dh_NH = activation_gradient(h_NH.to(accumulator), da_NI * weights_N1, activation)
        return dh_NH.to(h_NH.dtype), (a_NI * weights_N1).to(h_NH.dtype), (da_NI * a_NI).sum(1)

    def input_gradient(self, dh_NH: Tensor, w_up_EHD: Tensor, routing: Routing) -> Tensor:
        """dx = dh W_up,e of each pair, [N, D]."""
        return self._rows_product(dh_NH, w_up_EHD, routing)

    def up_weight_gradient(self, dh_NH: Tensor, x_TD: Tensor, routing: Routing) -> Tensor:
        """dhᵀ x over each expert's pairs, [E, H, D]."""
        return self._outer_product(dh_NH, x_TD[routing.token_ids_N], routing)

    def down_weight_gradient(self, dy_TD: Tensor, weighted_a_NI: Tensor, routing: Routing) -> Tensor:
        """dyᵀ (w a) over each expert's pairs, [E, D, I]."""
        return self._outer_product(dy_TD[routing.token_ids_N], weighted_a_NI, routing)

    def sum_by_expert(self, rows_NX: Tensor, routing: Routing) -> Tensor:
        """Sum of each expert's rows in float32 or wider, [E, X]."""
        rows_NX = rows_NX.to(torch.promote_types(rows_NX.dtype, torch.float32))
        sums_EX = rows_NX.new_zeros(routing.num_experts, rows_NX.shape[1])
        return sums_EX.index_add_(0, routing.expert_ids_N, rows_NX)


def _looped_rows(rows_NK: Tensor, weight_EKM: Tensor, routing: Routing) -> Tensor:
    """One product an expert. Waits for the device, for the experts' sizes."""
    sizes = routing.counts_E.tolist()
    return torch.cat([rows @ w for rows, w in zip(rows_NK.split(sizes), weight_EKM.unbind(), strict=True)])


def _looped_outer(left_NP: Tensor, right_NQ: Tensor, routing: Routing) -> Tensor:
    sizes = routing.counts_E.tolist()
    return torch.stack([p.t() @ q for p, q in zip(left_NP.split(sizes), right_NQ.split(sizes), strict=True)])


def _grouped_rows(rows_NK: Tensor, weight_EKM: Tensor, routing: Routing) -> Tensor:
    return torch._grouped_mm(rows_NK, weight_EKM, offs=routing.expert_offsets[1:])


def _grouped_outer(left_NP: Tensor, right_NQ: Tensor, routing: Routing) -> Tensor:
    out_EPQ = torch._grouped_mm(left_NP.t(), right_NQ, offs=routing.expert_offsets[1:])
    # torch does not say what an empty group becomes.
    return out_EPQ.masked_fill_((routing.counts_E == 0)[:, None, None], 0)


REFERENCE = TorchStages(_looped_rows, _looped_outer)
"""A loop over the experts: any device and dtype, float64 included."""

GROUPED = TorchStages(_grouped_rows, _grouped_outer)
"""torch's grouped matrix product."""
