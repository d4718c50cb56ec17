"""x · Wᵀ in float32 from bfloat16 activations, on tensor cores.

A product of two bfloat16 numbers is exact in float32, and a float32 number w is the sum of three bfloat16 ones: hi =
bf16(w), mid = bf16(w − hi), lo = w − hi − mid, each taking 8 of its 24 bits. So three bfloat16 products that accumulate
in float32 replace the float32 product, which has no tensor cores, and the copy of x in float32 that it would read and
keep for the backward pass.

Shapes: T rows, D width, E outputs, P = 1 … 3 parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def float32_linear(x_TD: Tensor, w_ED: Tensor) -> Tensor:
    """x · Wᵀ, float32 [T, E], of bfloat16 x and float32 or bfloat16 W; differentiable in both.

    Forward it is the float32 product (W is split exactly; below 2⁻¹¹⁰ the last part underflows). Backward the gradient
    is split into two parts, whose error of 2⁻¹⁷ of each of its elements is what float32 accumulation over T adds:
    dW is accumulated in float32, dx rounded once, to bfloat16. Saves x and W, no copies.

    On the CPU the same products are done in float32. Raises ValueError on other dtypes.
    """
    if x_TD.dtype != torch.bfloat16 or w_ED.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"x must be bfloat16 and W float32 or bfloat16, not {x_TD.dtype} and {w_ED.dtype}")
    return _Float32Linear.apply(x_TD, w_ED)


def split(values: Tensor, parts: int) -> list[Tensor]:
    """Float32 as a sum of bfloat16 tensors, largest first: with 2 parts within 2⁻¹⁷ of each element, with 3 exact."""
    split_values = []
    for _ in range(parts):
        split_values.append(values.to(torch.bfloat16))
        values = values - split_values[-1]
    return split_values


class _Float32Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, w_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, w_ED)
        if w_ED.dtype == torch.bfloat16:
            return _product(x_TD, w_ED.t())
        hi_TE, mid_TE, lo_TE = _product(x_TD, torch.cat(split(w_ED, 3)).t()).chunk(3, dim=1)
        return (lo_TE + mid_TE) + hi_TE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, w_ED = ctx.saved_tensors
        hi_TE, mid_TE = split(grads[0], 2)
        # dx = hi·W_hi + mid·W_hi + hi·W_mid as one product, the parts side by side; mid·W_mid is below its rounding.
        w_parts = split(w_ED, 2) if w_ED.dtype == torch.float32 else [w_ED]
        left_TPE = torch.cat([hi_TE, mid_TE, hi_TE][: len(w_parts) + 1], dim=1)
        dx_TD = dw_ED = None
        if ctx.needs_input_grad[0]:
            dx_TD = _product(left_TPE, torch.cat([w_parts[0], *w_parts]), torch.bfloat16)
        if ctx.needs_input_grad[1]:
            hi_ED, mid_ED = _product(left_TPE[:, : 2 * w_ED.shape[0]].t(), x_TD).chunk(2)
            dw_ED = (mid_ED + hi_ED).to(w_ED.dtype)
        return dx_TD, dw_ED


def _product(a: Tensor, b: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """a · b of bfloat16 matrices, accumulated in float32."""
    if a.device.type == "cuda":
        return a @ b if out_dtype == a.dtype else torch.mm(a, b, out_dtype=out_dtype)
    return (a.to(torch.float32) @ b.to(torch.float32)).to(out_dtype)
