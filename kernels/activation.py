"""Activations of the experts, on a tensor and inside a kernel, with their derivatives.

A gated activation takes h = [gate | up] of width 2I and gives f(gate) ⊙ up (GLU variants, arXiv 2002.05202); a plain
one gives f(h). Shapes: N rows, H width of h (2I if gated, else I), I expert width.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

GatedActivation = Literal["swiglu", "geglu", "reglu"]
Activation = Literal["swiglu", "geglu", "reglu", "gelu", "relu", "relu2", "silu"]

FUNCTION: dict[str, str] = {
    "swiglu": "silu",
    "geglu": "gelu",
    "reglu": "relu",
    "gelu": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
}
"""The scalar function f of each activation. gelu is the exact one, with erf; relu2 is relu squared."""


def is_gated(activation: str) -> bool:
    """Whether h holds a gate and an up half. Raises ValueError for an unknown name."""
    if activation not in FUNCTION:
        raise ValueError(f"activation {activation!r}: there are {', '.join(FUNCTION)}")
    return activation in get_args(GatedActivation)


def activate(h_NH: Tensor, activation: Activation) -> Tensor:
    """f(gate) ⊙ up, or f(h): [N, H] → [N, I] in the dtype of h."""
    if not is_gated(activation):
        return _function(h_NH, FUNCTION[activation])
    gate_NI, up_NI = h_NH.chunk(2, dim=-1)
    return _function(gate_NI, FUNCTION[activation]) * up_NI


def activation_gradient(h_NH: Tensor, da_NI: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The activation a [N, I] computed again and the gradient dh [N, H] for a given da, in the dtype of h."""
    function = FUNCTION[activation]
    if not is_gated(activation):
        return _function(h_NH, function), da_NI * _derivative(h_NH, function)
    gate_NI, up_NI = h_NH.chunk(2, dim=-1)
    value_NI = _function(gate_NI, function)
    dh_NH = torch.cat([da_NI * up_NI * _derivative(gate_NI, function), da_NI * value_NI], dim=-1)
    return value_NI * up_NI, dh_NH


def _function(x: Tensor, function: str) -> Tensor:
    if function == "silu":
        return F.silu(x)
    if function == "gelu":
        return F.gelu(x)
    return F.relu(x).square() if function == "relu2" else F.relu(x)


def _derivative(x: Tensor, function: str) -> Tensor:
    if function == "silu":
        sigmoid = x.sigmoid()
        return sigmoid * (1 + x * (1 - sigmoid))
    if function == "gelu":
        density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(x / math.sqrt(2))) + x * density
    return 2 * F.relu(x) if function == "relu2" else (x > 0).to(x.dtype)


@triton.jit
def function_and_derivative(x, FUNCTION: tl.constexpr):
    """f(x) and f′(x) in float32; FUNCTION is a value of :data:`FUNCTION`."""
    if FUNCTION == "silu":
        sigmoid = 1.0 / (1.0 + tl.exp(-x))
        value = x * sigmoid
        derivative = sigmoid + value * (1.0 - sigmoid)
    elif FUNCTION == "gelu":
        cumulative = 0.5 + 0.5 * tl.erf(x * 0.7071067811865476)
        value = x * cumulative
        derivative = cumulative + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif FUNCTION == "relu2":
        positive = tl.maximum(x, 0.0)
        value = positive * positive
        derivative = 2.0 * positive
    else:
        value = tl.maximum(x, 0.0)
        derivative = tl.where(x > 0.0, 1.0, 0.0)
    return value, derivative
