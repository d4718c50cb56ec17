"""The experts' feed-forward networks over a routing.

For every token t, with pairs (t, e) of weight s:

    y_t = Σ_e s_te · (W_down,e · act(W_up,e x_t + b_up,e) + b_down,e)

The memory is SonicMoE's (arXiv 2512.14080, §3): x, the pre-activation h, the pairs' weights and the routing are saved
for the backward pass. Neither gathered rows of x, nor activations, nor the experts' outputs are: the backward pass
computes the activation from h again, and gets the weights' gradient as ⟨dy W_down, act(h)⟩ instead of ⟨dy, y⟩.

Shapes: T tokens, D width, E experts, I expert width, H = 2I for gated activations (gate first, up second) else I,
N pairs.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal, Protocol, cast, get_args

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from moetrain.kernels import grouped_torch, grouped_triton
from moetrain.kernels.activation import Activation, is_gated
from moetrain.kernels.routing import Routing

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Triton's interpreter runs the kernels, on any device; it is chosen when a kernel is defined."""

Backend = Literal["hopper", "triton", "torch", "reference"]


class Stages(Protocol):
    """What a backend provides: :class:`moetrain.kernels.grouped_torch.TorchStages` says what each stage computes."""

    def up_projection(
        self,
        x_TD: Tensor,
        w_up_EHD: Tensor,
        b_up_EH: Tensor | None,
        routing: Routing,
        activation: Activation,
        *,
        keep_hidden: bool,
    ) -> tuple[Tensor | None, Tensor]: ...

    def down_projection(
        self, a_NI: Tensor, w_down_EDI: Tensor, b_down_ED: Tensor | None, routing: Routing
    ) -> Tensor: ...

    def sum_pairs(self, y_ND: Tensor, weights_N: Tensor | None, routing: Routing) -> Tensor: ...

    def hidden_gradient(
        self,
        dy_TD: Tensor,
        w_down_EDI: Tensor,
        h_NH: Tensor,
        weights_N: Tensor,
        routing: Routing,
        activation: Activation,
    ) -> tuple[Tensor, Tensor, Tensor]: ...

    def input_gradient(self, dh_NH: Tensor, w_up_EHD: Tensor, routing: Routing) -> Tensor: ...

    def up_weight_gradient(self, dh_NH: Tensor, x_TD: Tensor, routing: Routing) -> Tensor: ...

    def down_weight_gradient(self, dy_TD: Tensor, weighted_a_NI: Tensor, routing: Routing) -> Tensor: ...

    def sum_by_expert(self, rows_NX: Tensor, routing: Routing) -> Tensor: ...


def expert_mlp(
    x_TD: Tensor,
    w_gate_up_E2ID: Tensor,
    w_down_EDI: Tensor,
    routing: Routing,
    *,
    b_gate_up_E2I: Tensor | None = None,
    b_down_ED: Tensor | None = None,
    activation: Activation = "swiglu",
    backend: str = "auto",
) -> Tensor:
    """Weighted sum of the chosen experts' outputs for every token, [T, D] in the dtype of x.

    Parameters
    ----------
    x_TD : [T, D], floating point
    w_gate_up_E2ID : [E, 2I, D] (gate first, up second), or [E, I, D] for an activation without a gate
    w_down_EDI : [E, D, I]
    routing : pairs over T tokens and E experts
    b_gate_up_E2I, b_down_ED : optional biases [E, 2I] (or [E, I]) and [E, D]
    activation : swiglu, geglu, reglu, or without a gate gelu, relu, relu2, silu
    backend : "auto", or one of "hopper", "triton", "torch", "reference": see :func:`choose_backend`

    Weights and biases have the dtype of x. Differentiable (once) in x, weights, biases and `routing.weights_N`, with
    the same bits every time on a GPU. A token without a pair gets zeros, and so does the gradient of an expert
    without one. Tensors that are not contiguous or not aligned to 16 bytes are copied first.

    Raises ValueError where shapes, dtypes or devices disagree, or the backend cannot compute this here.
    """
    _check(x_TD, w_gate_up_E2ID, w_down_EDI, b_gate_up_E2I, b_down_ED, routing, activation)
    has_bias = b_gate_up_E2I is not None or b_down_ED is not None
    chosen = choose_backend(
        backend,
        x_TD.device,
        x_TD.dtype,
        x_TD.shape[1],
        w_down_EDI.shape[2],
        activation=activation,
        has_bias=has_bias,
    )
    if routing.num_pairs == 0:  # a rank may receive no rows at all, which the kernels do not take
        chosen = "reference"
    if chosen in ("torch", "reference"):
        routing = routing.trimmed()
    differentiable = (x_TD, w_gate_up_E2ID, w_down_EDI, b_gate_up_E2I, b_down_ED, routing.weights_N)
    keep_hidden = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    y_TD, _ = _forward(
        x_TD,
        w_gate_up_E2ID,
        w_down_EDI,
        b_gate_up_E2I,
        b_down_ED,
        routing.weights_N,
        routing.token_ids_N,
        routing.expert_offsets,
        routing.pair_ids_N,
        routing.token_offsets,
        routing.pairs_per_token,
        routing.padded,
        activation,
        chosen,
        keep_hidden,
    )
    return y_TD


@torch.compiler.assume_constant_result
def choose_backend(
    requested: str,
    device: torch.device,
    dtype: torch.dtype,
    dim: int,
    inner: int,
    *,
    activation: str = "swiglu",
    has_bias: bool = False,
) -> Backend:
    """The backend that `auto` stands for here, with experts of [inner, dim]; any other name is checked and returned.

    - hopper: warp-specialised kernels for compute capability 9.0; bfloat16 and float16, gated, no bias
    - triton: portable kernels from Ampere on; bfloat16, float16 and float32
    - torch: torch's grouped product; bfloat16 on CUDA, bfloat16 and float32 elsewhere
    - reference: a loop over the experts; everything

    `auto` takes the first that can; on a CPU always the last. Raises ValueError for a name that does not exist or a
    backend that cannot do this, saying why.
    """
    if requested == "auto":
        candidates: tuple[Backend, ...] = get_args(Backend) if device.type == "cuda" else ("reference",)
        return next(b for b in candidates if _obstacle(b, device, dtype, dim, inner, activation, has_bias) is None)
    if requested not in get_args(Backend):
        raise ValueError(f"backend {requested!r}: there are auto, {', '.join(get_args(Backend))}")
    obstacle = _obstacle(cast(Backend, requested), device, dtype, dim, inner, activation, has_bias)
    if obstacle is not None:
        raise ValueError(f"backend {requested!r} {obstacle}: use 'auto', or one of the others")
    return cast(Backend, requested)


def _obstacle(
    backend: Backend, device: torch.device, dtype: torch.dtype, dim: int, inner: int, activation: str, has_bias: bool
) -> str | None:
    """Why a backend cannot compute this, or None."""
    if backend == "reference":
        return None
    if backend == "torch":
        if dtype == torch.float64:
            return "has no float64"
        if device.type != "cuda":
            return None
        if dtype != torch.bfloat16:
            return f"takes bfloat16 on a GPU, not {dtype}"
        aligned = dim * dtype.itemsize % 16 == inner * dtype.itemsize % 16 == 0
        return None if aligned else f"takes rows of 16-byte multiples, not {dim} and {inner} of {dtype}"
    if device.type != "cuda" and not (INTERPRETED and backend == "triton"):
        return f"runs on CUDA GPUs, not on {device.type}"
    capability = (8, 0) if INTERPRETED else torch.cuda.get_device_capability(device)
    if dim % 16 or inner % 16:
        return f"takes widths of multiples of 16, not {dim} and {inner}"
    if backend == "triton":
        if capability < (8, 0):
            return f"needs compute capability 8.0 or newer, this GPU has {capability[0]}.{capability[1]}"
        return None if dtype in (torch.bfloat16, torch.float16, torch.float32) else f"has no {dtype}"
    if capability != (9, 0):
        return f"is for compute capability 9.0, this GPU has {capability[0]}.{capability[1]}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {dtype}"
    if has_bias or not is_gated(activation):
        return "takes gated activations without biases"
    return None


@functools.cache
def stages(backend: Backend) -> Stages:
    """The implementation of a backend."""
    if backend == "hopper":
        # Gluon exists only where triton is built for NVIDIA; nothing else here needs it.
        from moetrain.kernels import grouped_hopper

        return cast(Stages, grouped_hopper)
    if backend == "triton":
        return cast(Stages, grouped_triton)
    return grouped_torch.GROUPED if backend == "torch" else grouped_torch.REFERENCE


@torch.library.custom_op("moetrain::expert_mlp", mutates_args=())
def _forward(
    x_TD: Tensor,
    w_up_EHD: Tensor,
    w_down_EDI: Tensor,
    b_up_EH: Tensor | None,
    b_down_ED: Tensor | None,
    weights_N: Tensor,
    token_ids_N: Tensor,
    expert_offsets: Tensor,
    pair_ids_N: Tensor,
    token_offsets: Tensor,
    pairs_per_token: int | None,
    padded: bool,
    activation: str,
    backend: str,
    keep_hidden: bool,
) -> tuple[Tensor, Tensor]:
    """y [T, D] and h [N, H], the latter empty unless `keep_hidden`."""
    run = stages(cast(Backend, backend))
    pairs = (token_ids_N, weights_N.contiguous(), expert_offsets, pair_ids_N, token_offsets)
    routing = Routing(*pairs, x_TD.shape[0], w_up_EHD.shape[0], pairs_per_token, padded)
    x_TD, w_up_EHD, w_down_EDI = _ready(x_TD), _ready(w_up_EHD), _ready(w_down_EDI)
    with torch.cuda.device_of(x_TD):  # kernels are launched on the current device
        h_NH, a_NI = run.up_projection(
            x_TD, w_up_EHD, b_up_EH, routing, cast(Activation, activation), keep_hidden=keep_hidden
        )
        y_ND = run.down_projection(a_NI, w_down_EDI, b_down_ED, routing)
        y_TD = run.sum_pairs(y_ND, routing.weights_N, routing)
    return y_TD, x_TD.new_empty(0) if h_NH is None else h_NH


@_forward.register_fake
def _(x_TD: Tensor, w_up_EHD: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    weights_N, keep_hidden = others[3], others[-1]
    hidden = (weights_N.shape[0], w_up_EHD.shape[1]) if keep_hidden else (0,)
    return torch.empty_like(x_TD, memory_format=torch.contiguous_format), x_TD.new_empty(hidden)


@torch.library.custom_op("moetrain::expert_mlp_backward", mutates_args=())
def _backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    h_NH: Tensor,
    w_up_EHD: Tensor,
    w_down_EDI: Tensor,
    b_up_EH: Tensor | None,
    b_down_ED: Tensor | None,
    weights_N: Tensor,
    token_ids_N: Tensor,
    expert_offsets: Tensor,
    pair_ids_N: Tensor,
    token_offsets: Tensor,
    pairs_per_token: int | None,
    padded: bool,
    activation: str,
    backend: str,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of x, w_up, w_down, b_up, b_down and the pairs' weights; empty where not `needed`."""
    run = stages(cast(Backend, backend))
    pairs = (token_ids_N, weights_N.contiguous(), expert_offsets, pair_ids_N, token_offsets)
    routing = Routing(*pairs, x_TD.shape[0], w_up_EHD.shape[0], pairs_per_token, padded)
    dy_TD, x_TD, w_up_EHD, w_down_EDI = _ready(dy_TD), _ready(x_TD), _ready(w_up_EHD), _ready(w_down_EDI)
    needs_x, needs_w_up, needs_w_down, needs_b_up, needs_b_down, needs_weights = needed
    gradients = [x_TD.new_empty(0) for _ in needed]

    with torch.cuda.device_of(x_TD):
        dh_NH, weighted_a_NI, dweights_N = run.hidden_gradient(
            dy_TD, w_down_EDI, h_NH, routing.weights_N, routing, cast(Activation, activation)
        )
        if needs_w_down:
            gradients[2] = run.down_weight_gradient(dy_TD, weighted_a_NI, routing)
        del weighted_a_NI
        if needs_w_up:
            gradients[1] = run.up_weight_gradient(dh_NH, x_TD, routing)
        if needs_x:
            gradients[0] = run.sum_pairs(run.input_gradient(dh_NH, w_up_EHD, routing), None, routing)
        if needs_b_up and b_up_EH is not None:
            gradients[3] = run.sum_by_expert(dh_NH, routing).to(b_up_EH.dtype)
        if needs_b_down and b_down_ED is not None:
            weighted_dy_ND = dy_TD[routing.token_ids_N] * routing.weights_N[:, None].to(dy_TD.dtype)
            gradients[4] = run.sum_by_expert(weighted_dy_ND, routing).to(b_down_ED.dtype)
        if needs_weights:
            if b_down_ED is not None:
                accumulator = dweights_N.dtype
                dy_b_TE = dy_TD.to(accumulator) @ b_down_ED.to(accumulator).t()
                dweights_N = dweights_N + dy_b_TE[routing.token_ids_N, routing.expert_ids_N]
            gradients[5] = dweights_N.to(weights_N.dtype)
    return gradients


@_backward.register_fake
def _(dy_TD: Tensor, x_TD: Tensor, h_NH: Tensor, *others: Any) -> list[Tensor]:
    weights_and_biases, weights_N, needed = others[:4], others[4], others[-1]
    return [
        x_TD.new_empty(0) if tensor is None or not need else tensor.new_empty(tensor.shape)
        for tensor, need in zip((x_TD, *weights_and_biases, weights_N), needed, strict=True)
    ]


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.pairs_per_token, ctx.padded, ctx.activation, ctx.backend, _ = inputs
    h_NH = output[1]
    ctx.mark_non_differentiable(h_NH)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(h_NH, *tensors)


def _gradients(ctx: Any, dy_TD: Tensor | None, dh_NH: Tensor | None) -> tuple[Tensor | None, ...]:
    index_and_settings = (None,) * 9
    if dy_TD is None:
        return (None,) * 6 + index_and_settings
    h_NH, x_TD, *others = ctx.saved_tensors
    needed = list(ctx.needs_input_grad[:6])
    settings = (ctx.pairs_per_token, ctx.padded, ctx.activation, ctx.backend)
    gradients = _backward(dy_TD, x_TD, h_NH, *others, *settings, needed)
    return (
        *(gradient if need else None for gradient, need in zip(gradients, needed, strict=True)),
        *index_and_settings,
    )


_forward.register_autograd(_gradients, setup_context=_save_for_backward)


def _ready(tensor: Tensor) -> Tensor:
    """Contiguous and aligned to 16 bytes, as TMA and 16-byte loads ask; a copy if it was not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _check(
    x_TD: Tensor,
    w_up_EHD: Tensor,
    w_down_EDI: Tensor,
    b_up_EH: Tensor | None,
    b_down_ED: Tensor | None,
    routing: Routing,
    activation: str,
) -> None:
    experts, width, inner = routing.num_experts, x_TD.shape[-1], w_down_EDI.shape[-1]
    hidden = 2 * inner if is_gated(activation) else inner
    expected = {
        "x": (x_TD, [routing.num_tokens, width]),
        "w_gate_up": (w_up_EHD, [experts, hidden, width]),
        "w_down": (w_down_EDI, [experts, width, inner]),
        "b_gate_up": (b_up_EH, [experts, hidden]),
        "b_down": (b_down_ED, [experts, width]),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if list(tensor.shape) != shape:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}, the routing and the other tensors ask for {shape}"
            )
        if tensor.dtype != x_TD.dtype or tensor.device != x_TD.device:
            raise ValueError(
                f"x and the weights must share a dtype and a device: x is {x_TD.dtype} on {x_TD.device}, "
                f"{name} {tensor.dtype} on {tensor.device}"
            )
    if not x_TD.is_floating_point():
        raise ValueError(f"x must be floating point, not {x_TD.dtype}")
    if routing.token_ids_N.device != x_TD.device:
        raise ValueError(f"x is on {x_TD.device}, the routing on {routing.token_ids_N.device}")


@register_flop_formula(torch.ops.moetrain.expert_mlp)
def _forward_flops(
    x_shape: Sequence[int],
    w_up_shape: Sequence[int],
    w_down_shape: Sequence[int],
    b_up_shape: Sequence[int] | None,
    b_down_shape: Sequence[int] | None,
    weights_shape: Sequence[int],
    *settings: Any,
    **outputs: Any,
) -> int:
    """Of both products of every pair, for torch's FLOP counter, which does not see into the operator."""
    hidden, width = w_up_shape[1:]
    return 2 * weights_shape[0] * width * (hidden + w_down_shape[2])


@register_flop_formula(torch.ops.moetrain.expert_mlp_backward)
def _backward_flops(
    dy_shape: Sequence[int], x_shape: Sequence[int], h_shape: Sequence[int], *rest: Any, **outputs: Any
) -> int:
    """Twice the forward's: of the rows and of the weights."""
    return 2 * _forward_flops(x_shape, *rest)
