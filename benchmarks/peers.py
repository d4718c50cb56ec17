"""MoE layers to compare: ours, those of other projects, the float32 reference that all are checked against, the bound.

Every layer is a router (linear, top-k, softmax over the chosen logits) and SwiGLU experts:

    y_t = Σ_{e ∈ top-k(l_t)} softmax(l_t)_e · W_down,e (silu(W_gate,e x_t) ⊙ W_up,e x_t),   l_t = W_router x_t

Shapes: T tokens, D width, I expert width, E experts, K experts a token, N = T·K pairs, M = N / E rows an expert.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels import Routing, expert_mlp
from moetrain.kernels.float32_linear import float32_linear
from moetrain.kernels.topk import topk_softmax

Forward = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@dataclass(frozen=True)
class Shape:
    """Sizes of one MoE layer."""

    tokens: int
    dim: int
    inner: int
    experts: int
    top_k: int

    @property
    def pairs(self) -> int:
        return self.tokens * self.top_k

    @property
    def forward_flops(self) -> int:
        """Of the experts' two products; the backward pass has twice as many."""
        return 6 * self.pairs * self.dim * self.inner

    def __str__(self) -> str:
        return f"{self.tokens},{self.dim},{self.inner},{self.experts},{self.top_k}"


@dataclass(frozen=True)
class LayerInputs:
    """What a layer computes on. Random, scaled so that logits and outputs are of order one."""

    x_TD: Tensor
    w_router_ED: Tensor
    w_gate_up_E2ID: Tensor
    w_down_EDI: Tensor
    dy_TD: Tensor
    top_k: int

    @staticmethod
    def random(shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> LayerInputs:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            # Expert by expert, so that the float32 numbers never need more memory than the layer.
            rows = [torch.randn(size[1:], generator=generator, device=device) for _ in range(size[0])]
            return torch.stack([(row * scale).to(dtype) for row in rows])

        return LayerInputs(
            x_TD=normal(1, shape.tokens, shape.dim)[0],
            w_router_ED=normal(1, shape.experts, shape.dim, scale=shape.dim**-0.5)[0],
            w_gate_up_E2ID=normal(shape.experts, 2 * shape.inner, shape.dim, scale=shape.dim**-0.5),
            w_down_EDI=normal(shape.experts, shape.dim, shape.inner, scale=shape.inner**-0.5),
            dy_TD=normal(1, shape.tokens, shape.dim)[0],
            top_k=shape.top_k,
        )


@dataclass(frozen=True)
class Layer:
    """An implementation: (x, w_router, w_gate_up, w_down, top_k) → y, and the layout in which it wants w_gate_up."""

    name: str
    forward: Forward
    pack: Callable[[Tensor], Tensor] = lambda w_gate_up_E2ID: w_gate_up_E2ID
    """From [E, 2I, D], gate first and up second, to its own layout …"""
    unpack: Callable[[Tensor], Tensor] = lambda w_gate_up: w_gate_up
    """… and back."""


class BoundLayer:
    """A layer on its inputs: calls to time."""

    def __init__(self, layer: Layer, inputs: LayerInputs) -> None:
        self.layer = layer
        self._top_k = inputs.top_k
        self._dy_TD = inputs.dy_TD
        self.leaves = (
            inputs.x_TD.detach().requires_grad_(),
            inputs.w_router_ED.detach().requires_grad_(),
            layer.pack(inputs.w_gate_up_E2ID).detach().requires_grad_(),
            inputs.w_down_EDI.detach().requires_grad_(),
        )

    def forward(self) -> Tensor:
        return self.layer.forward(*self.leaves, self._top_k)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return self.gradients(self._dy_TD)[1]

    def gradients(self, dy_TD: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """y and the gradients of x, w_router, w_gate_up (in the layer's layout) and w_down."""
        y_TD = self.forward()
        return y_TD.detach(), torch.autograd.grad(y_TD, self.leaves, dy_TD)


def ours(backend: str) -> Layer:
    def forward(x_TD: Tensor, w_router_ED: Tensor, w_gate_up_E2ID: Tensor, w_down_EDI: Tensor, top_k: int) -> Tensor:
        weights_TK, expert_ids_TK = topk_softmax(float32_linear(x_TD, w_router_ED), top_k, softmax="after")
        routing = Routing.from_topk(expert_ids_TK, weights_TK, w_router_ED.shape[0])
        return expert_mlp(x_TD, w_gate_up_E2ID, w_down_EDI, routing, activation="swiglu", backend=backend)

    return Layer(f"moetrain {backend}", forward)


def grouped_mm() -> Layer:
    """torch._grouped_mm between gathers, as torchtitan and transformers use it, under autograd."""

    def forward(x_TD: Tensor, w_router_ED: Tensor, w_gate_up_E2ID: Tensor, w_down_EDI: Tensor, top_k: int) -> Tensor:
        weights_TK, expert_ids_TK = _route(x_TD, w_router_ED, top_k)
        experts_N, order_N = expert_ids_TK.flatten().sort()
        edges = torch.arange(w_router_ED.shape[0], device=x_TD.device)
        ends_E = torch.searchsorted(experts_N, edges, right=True, out_int32=True)
        x_ND = x_TD.index_select(0, order_N // top_k)
        h_N2I = torch._grouped_mm(x_ND, w_gate_up_E2ID.transpose(1, 2), offs=ends_E)
        gate_NI, up_NI = h_N2I.chunk(2, dim=-1)
        y_ND = torch._grouped_mm(F.silu(gate_NI) * up_NI, w_down_EDI.transpose(1, 2), offs=ends_E)
        y_ND = y_ND * weights_TK.flatten()[order_N].to(x_TD.dtype)[:, None]
        inverse_N = torch.empty_like(order_N)
        inverse_N[order_N] = torch.arange(order_N.numel(), device=x_TD.device)
        return y_ND.index_select(0, inverse_N).unflatten(0, (-1, top_k)).sum(1)

    return Layer("grouped_mm", forward)


def liger() -> Layer:
    """Liger's fused Triton kernels. Tuning them takes minutes a shape; LIGER_FUSED_MOE_AUTOTUNE=0 is their switch."""
    from liger_kernel.ops.fused_moe import LigerFusedMoEFunction

    def forward(x_TD: Tensor, w_router_ED: Tensor, w_gate_up_E2ID: Tensor, w_down_EDI: Tensor, top_k: int) -> Tensor:
        weights_TK, expert_ids_TK = _route(x_TD, w_router_ED, top_k)
        y_TD: Tensor = LigerFusedMoEFunction.apply(
            x_TD, w_gate_up_E2ID, w_down_EDI, expert_ids_TK.to(torch.int32), weights_TK.to(x_TD.dtype)
        )
        return y_TD

    tuned = os.environ.get("LIGER_FUSED_MOE_AUTOTUNE") != "0"
    return Layer("liger" if tuned else "liger untuned", forward)


def sonicmoe() -> Layer:
    """SonicMoE's own layer (arXiv 2512.14080), top-k and metadata included; it interleaves gate and up."""
    from sonicmoe.functional import moe_TC_softmax_topk_layer

    def forward(x_TD: Tensor, w_router_ED: Tensor, w_gate_up_E2ID: Tensor, w_down_EDI: Tensor, top_k: int) -> Tensor:
        stream = torch.cuda.current_stream(x_TD.device).cuda_stream
        y_TD: Tensor = moe_TC_softmax_topk_layer(
            x_TD, w_router_ED, w_gate_up_E2ID.permute(1, 2, 0), None, w_down_EDI.permute(1, 2, 0), None, top_k, stream
        )[0]
        return y_TD

    return Layer("sonicmoe", forward, interleave, separate)


def interleave(w_gate_up_E2ID: Tensor) -> Tensor:
    """Rows gate 0, up 0, gate 1, up 1 … from all of gate and then all of up."""
    return torch.stack(w_gate_up_E2ID.chunk(2, dim=1), dim=2).flatten(1, 2)


def separate(w_interleaved_E2ID: Tensor) -> Tensor:
    """The inverse of :func:`interleave`."""
    return w_interleaved_E2ID.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2)


PEERS: dict[str, Callable[[], Layer]] = {"grouped_mm": grouped_mm, "liger": liger, "sonicmoe": sonicmoe}
"""Calling one raises what its import raises: ImportError where the package is missing."""


def _route(x_TD: Tensor, w_router_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    logits_TK, expert_ids_TK = F.linear(x_TD, w_router_ED).topk(top_k, dim=-1)
    return logits_TK.softmax(-1, dtype=torch.float32), expert_ids_TK


# ---------------------------------------------------------------------------------------------------------------------
# Reference


@dataclass(frozen=True)
class Reference:
    """Right answers in float32."""

    y_TD: Tensor
    dx_TD: Tensor
    dw_router_ED: Tensor
    dw_gate_up_E2ID: Tensor
    dw_down_EDI: Tensor
    dy_TD: Tensor
    """The output gradient that they belong to: that of the inputs, but 0 for the tokens that are not clear."""
    clear_T: Tensor
    """bool: tokens whose K-th and K+1-th logits are so far apart that rounding them to bfloat16 changes no choice."""


def layer_reference(inputs: LayerInputs) -> Reference:
    """Forward and backward of the layer in float32, expert by expert, written out: no kernel and no autograd."""
    x_TD, w_router_ED = inputs.x_TD.float(), inputs.w_router_ED.float()
    logits_TE = x_TD @ w_router_ED.t()
    experts = logits_TE.shape[1]
    best_TX, ids_TX = logits_TE.topk(min(inputs.top_k + 1, experts), dim=-1)
    clear_T = torch.ones_like(best_TX[:, 0], dtype=torch.bool)
    if inputs.top_k < experts:
        clear_T = best_TX[:, -2] - best_TX[:, -1] > 2**-6 * best_TX[:, -2:].abs().amax(-1)
    weights_TE = torch.zeros_like(logits_TE)
    weights_TE.scatter_(1, ids_TX[:, : inputs.top_k], best_TX[:, : inputs.top_k].softmax(-1))
    dy_TD = inputs.dy_TD * clear_T[:, None].to(inputs.dy_TD.dtype)

    y_TD, dx_TD, dw_gate_up_E2ID, dw_down_EDI, dweights_TE = experts_reference(
        x_TD, inputs.w_gate_up_E2ID, inputs.w_down_EDI, weights_TE > 0, weights_TE, dy_TD
    )
    dlogits_TE = weights_TE * (dweights_TE - (weights_TE * dweights_TE).sum(-1, keepdim=True))
    dx_TD += dlogits_TE @ w_router_ED
    return Reference(y_TD, dx_TD, dlogits_TE.t() @ x_TD, dw_gate_up_E2ID, dw_down_EDI, dy_TD, clear_T)


def experts_reference(
    x_TD: Tensor, w_gate_up_E2ID: Tensor, w_down_EDI: Tensor, chosen_TE: Tensor, weights_TE: Tensor, dy_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, D] and the gradients of x, w_gate_up, w_down and the weights [T, E], all float32.

    `chosen_TE` bool: the pairs; `weights_TE` float32.
    """
    x_TD, dy_TD = x_TD.float(), dy_TD.float()
    y_TD, dx_TD = torch.zeros_like(x_TD), torch.zeros_like(x_TD)
    dw_gate_up_E2ID = torch.zeros_like(w_gate_up_E2ID, dtype=torch.float32)
    dw_down_EDI = torch.zeros_like(w_down_EDI, dtype=torch.float32)
    dweights_TE = torch.zeros_like(weights_TE)
    for e in range(chosen_TE.shape[1]):
        tokens_M = chosen_TE[:, e].nonzero()[:, 0]
        w_2ID, w_DI = w_gate_up_E2ID[e].float(), w_down_EDI[e].float()
        x_MD, dy_MD, weights_M1 = x_TD[tokens_M], dy_TD[tokens_M], weights_TE[tokens_M, e, None]
        gate_MI, up_MI = (x_MD @ w_2ID.t()).chunk(2, dim=-1)
        sigmoid_MI = gate_MI.sigmoid()
        a_MI = gate_MI * sigmoid_MI * up_MI
        y_MD = a_MI @ w_DI.t()
        y_TD.index_add_(0, tokens_M, weights_M1 * y_MD)

        dweights_TE[tokens_M, e] = (dy_MD * y_MD).sum(-1)
        da_MI = (weights_M1 * dy_MD) @ w_DI
        dw_down_EDI[e] = (weights_M1 * dy_MD).t() @ a_MI
        dgate_MI = da_MI * up_MI * sigmoid_MI * (1 + gate_MI * (1 - sigmoid_MI))
        dh_M2I = torch.cat([dgate_MI, da_MI * gate_MI * sigmoid_MI], dim=-1)
        dw_gate_up_E2ID[e] = dh_M2I.t() @ x_MD
        dx_TD.index_add_(0, tokens_M, dh_M2I @ w_2ID)
    return y_TD, dx_TD, dw_gate_up_E2ID, dw_down_EDI, dweights_TE


def relative_error(actual: Tensor, reference: Tensor) -> float:
    """‖actual − reference‖ / ‖reference‖, in float32; NaN counts as infinite."""
    norm = torch.linalg.vector_norm(reference)
    error = float(torch.linalg.vector_norm(actual.float() - reference) / norm) if norm else float(actual.norm())
    return error if error == error else float("inf")


# ---------------------------------------------------------------------------------------------------------------------
# Bound


class Bound:
    """The layer's six products as cuBLAS batched products over equally loaded experts, and nothing else."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype = torch.bfloat16) -> None:
        experts, dim, inner = shape.experts, shape.dim, shape.inner
        rows = -(-shape.pairs // experts)

        def normal(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=device).normal_(std=size[-1] ** -0.5)

        self._x_EMD, self._dy_EMD = normal(experts, rows, dim), normal(experts, rows, dim)
        self._h_EM2I, self._a_EMI = normal(experts, rows, 2 * inner), normal(experts, rows, inner)
        self._w_gate_up_E2ID, self._w_down_EDI = normal(experts, 2 * inner, dim), normal(experts, dim, inner)
        self._dw_gate_up_E2ID = torch.empty_like(self._w_gate_up_E2ID)
        self._dw_down_EDI = torch.empty_like(self._w_down_EDI)
        self._out_EMD, self._out_EM2I, self._out_EMI = map(torch.empty_like, (self._x_EMD, self._h_EM2I, self._a_EMI))

    def forward(self) -> None:
        torch.bmm(self._x_EMD, self._w_gate_up_E2ID.transpose(1, 2), out=self._out_EM2I)
        torch.bmm(self._a_EMI, self._w_down_EDI.transpose(1, 2), out=self._out_EMD)

    def forward_backward(self) -> None:
        self.forward()
        torch.bmm(self._dy_EMD, self._w_down_EDI, out=self._out_EMI)
        torch.bmm(self._dy_EMD.transpose(1, 2), self._a_EMI, out=self._dw_down_EDI)
        torch.bmm(self._h_EM2I, self._w_gate_up_E2ID, out=self._out_EMD)
        torch.bmm(self._h_EM2I.transpose(1, 2), self._x_EMD, out=self._dw_gate_up_E2ID)
