"""The experts' gated feed-forward networks over a routing.

For every token t, with pairs (t, e) of weight s:

    y_t = Σ_e s_te · W_down,e · (act(W_gate,e x_t) ⊙ W_up,e x_t)

Shapes: T tokens, D width, E experts, I expert width, N pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels.routing import Routing

Activation = Literal["swiglu", "geglu", "reglu"]
Backend = Literal["torch", "reference"]

GATES: dict[str, Callable[[Tensor], Tensor]] = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


def gated_activation(h_N2I: Tensor, activation: Activation) -> Tensor:
    """act(gate) ⊙ up of a projection [N, 2I] whose first half is the gate (GLU variants, arXiv 2002.05202)."""
    gate_NI, up_NI = h_N2I.chunk(2, dim=-1)
    return GATES[activation](gate_NI) * up_NI


def choose_backend(requested: str, device: torch.device, dtype: torch.dtype, dim: int, inner: int) -> Backend:
    """The backend that `auto` stands for here, with experts of [inner, dim]; any other name is checked and returned.

    torch's grouped product where it has a kernel (bfloat16 on CUDA, rows of a multiple of 16 bytes), a loop over the
    experts elsewhere. Raises ValueError for a name that does not exist or a backend that cannot do this.
    """
    if requested != "auto" and requested not in get_args(Backend):
        raise ValueError(f"backend {requested!r}: there are auto, {', '.join(get_args(Backend))}")
    aligned = dim * dtype.itemsize % 16 == inner * dtype.itemsize % 16 == 0
    if requested == "torch":
        if dtype == torch.float64:
            raise ValueError("backend 'torch' has no float64: use 'reference'")
        if device.type == "cuda" and not aligned:
            raise ValueError(f"backend 'torch' takes rows of 16-byte multiples, not {dtype} × {dim} and {inner}")
    if requested == "auto":
        return "torch" if device.type == "cuda" and dtype == torch.bfloat16 and aligned else "reference"
    return requested  # type: ignore[return-value]


def expert_mlp(
    x_TD: Tensor,
    w_gate_up_E2ID: Tensor,
    w_down_EDI: Tensor,
    routing: Routing,
    *,
    activation: Activation = "swiglu",
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of the chosen experts' outputs for every token, [T, D] in the dtype of x.

    `x_TD` [T, D], `w_gate_up_E2ID` [E, 2I, D] (gate first, up second) and `w_down_EDI` [E, D, I] share a floating
    dtype. Differentiable in x, both weights and `routing.weights_N`. A token without a pair gets zeros. Raises
    ValueError where shapes or dtypes disagree.
    """
    _check(x_TD, w_gate_up_E2ID, w_down_EDI, routing, activation)
    chosen = choose_backend(backend, x_TD.device, x_TD.dtype, x_TD.shape[1], w_down_EDI.shape[2])
    # A rank may receive no rows at all, which the loop takes and a kernel may not.
    product = _grouped_product if chosen == "torch" and routing.num_pairs else _looped_product
    x_ND = _GatherRows.apply(x_TD, routing)
    h_N2I = product(x_ND, w_gate_up_E2ID, routing)
    # The weight is applied to the narrower of the two sides of the down projection, which is linear in it.
    a_NI = gated_activation(h_N2I, activation) * routing.weights_N.to(x_TD.dtype)[:, None]
    return _SumPairs.apply(product(a_NI, w_down_EDI, routing), routing)


def _looped_product(x_ND: Tensor, w_EOD: Tensor, routing: Routing) -> Tensor:
    """x_n · W_e(n)ᵀ, one product an expert. Waits for the device once, for the experts' offsets."""
    sizes = routing.counts_E.tolist()
    return torch.cat([rows @ w_OD.t() for rows, w_OD in zip(x_ND.split(sizes), w_EOD.unbind(), strict=True)])


def _grouped_product(x_ND: Tensor, w_EOD: Tensor, routing: Routing) -> Tensor:
    """x_n · W_e(n)ᵀ as one call of torch's grouped product."""
    return _ContiguousGradient.apply(torch._grouped_mm(x_ND, w_EOD.transpose(1, 2), offs=routing.expert_offsets[1:]))


def _sum_pairs(y_ND: Tensor, routing: Routing) -> Tensor:
    """Σ over the pairs of each token, accumulated in float32 or better: [N, D] → [T, D]."""
    accumulator = torch.promote_types(y_ND.dtype, torch.float32)
    if routing.pairs_per_token is not None:
        y_TKD = y_ND[routing.pair_ids_N].unflatten(0, (routing.num_tokens, routing.pairs_per_token))
        return y_TKD.sum(1, dtype=accumulator).to(y_ND.dtype)
    y_TD = torch.zeros(routing.num_tokens, y_ND.shape[1], dtype=accumulator, device=y_ND.device)
    return y_TD.index_add_(0, routing.token_ids_N, y_ND.to(accumulator)).to(y_ND.dtype)


class _GatherRows(torch.autograd.Function):
    """x[token of each pair]; its transpose is the sum over pairs, which needs no atomics where K is constant."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return x_TD[routing.token_ids_N]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _sum_pairs(grads[0], ctx.routing), None


class _SumPairs(torch.autograd.Function):
    """Sum over each token's pairs; its transpose is the gather."""

    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return _sum_pairs(y_ND, routing)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0][ctx.routing.token_ids_N], None


class _ContiguousGradient(torch.autograd.Function):
    """Identity whose gradient is contiguous: torch._grouped_mm's backward refuses expanded strides."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0].contiguous()


def _check(x_TD: Tensor, w_gate_up_E2ID: Tensor, w_down_EDI: Tensor, routing: Routing, activation: str) -> None:
    if activation not in GATES:
        raise ValueError(f"activation {activation!r}: there are {', '.join(GATES)}")
    if not x_TD.dtype == w_gate_up_E2ID.dtype == w_down_EDI.dtype:
        raise ValueError(
            f"x, w_gate_up and w_down must share a dtype: {x_TD.dtype}, {w_gate_up_E2ID.dtype}, {w_down_EDI.dtype}"
        )
    experts, width, inner = routing.num_experts, x_TD.shape[-1], w_down_EDI.shape[-1]
    expected = [routing.num_tokens, width], [experts, 2 * inner, width], [experts, width, inner]
    for name, tensor, shape in zip(
        ("x", "w_gate_up", "w_down"), (x_TD, w_gate_up_E2ID, w_down_EDI), expected, strict=True
    ):
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, the routing and the other tensors ask for {shape}"
            )
