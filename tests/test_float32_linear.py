"""The float32 product of bfloat16 activations against float64.

On the CPU the same bfloat16 parts are multiplied in float32, so that the splitting is tested without a GPU.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moetrain.kernels.float32_linear import float32_linear, split


def error(value: Tensor, reference: Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def make(rows: int, width: int, outputs: int, weight_dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, width, generator=generator).bfloat16()
    w = (torch.randn(outputs, width, generator=generator) * 0.02).to(weight_dtype)
    dy = torch.randn(rows, outputs, generator=generator)
    return tuple(tensor.to(device) for tensor in (x, w, dy))


def test_three_parts_are_exact_and_two_nearly() -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(10_000, generator=generator) * 10.0 ** torch.randint(-25, 30, (10_000,), generator=generator)
    edges = torch.tensor([0.0, 1 + 2**-23, 1 - 2**-24, 1 + 2**-8, 1 + 2**-9 - 2**-23, 3e38, 2**-100 * (1 + 2**-23)])
    values = torch.cat([values, edges, -edges])
    assert torch.equal(sum(part.double() for part in split(values, 3)), values.double())
    two = sum(part.double() for part in split(values, 2))
    assert bool(((two - values.double()).abs() <= 2**-17 * values.double().abs()).all())


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("device", "rows", "width", "outputs"),
    [("cpu", 500, 256, 24), pytest.param("cuda", 8192, 1536, 128, marks=pytest.mark.gpu)],
)
def test_product_and_gradients_have_float32_quality(
    device: str, rows: int, width: int, outputs: int, weight_dtype: torch.dtype
) -> None:
    x, w, dy = make(rows, width, outputs, weight_dtype, device)
    x.requires_grad_()
    w.requires_grad_()
    y = float32_linear(x, w)
    y.backward(dy)
    assert x.grad is not None
    assert w.grad is not None
    assert y.dtype == torch.float32
    assert (x.grad.dtype, w.grad.dtype) == (x.dtype, w.dtype)

    x64, w64, dy64 = x.detach().double(), w.detach().double(), dy.double()
    # √D or √T roundings of 2⁻²⁴ of sums as large as the result; tensor cores truncate.
    rounding = 2**-24 if device == "cpu" else 2**-22
    assert error(y.detach(), x64 @ w64.t()) < rounding * width**0.5
    dw_bound = 2**-18 + rounding * rows**0.5 if weight_dtype == torch.float32 else 2**-8
    assert error(w.grad, dy64.t() @ x64) < dw_bound
    # dx is rounded to bfloat16 once: it may not be measurably worse than the best bfloat16 there is.
    dx64 = dy64 @ w64
    assert error(x.grad, dx64) < 1.001 * error(dx64.bfloat16(), dx64)


def test_gradients_only_where_they_are_asked_for() -> None:
    x, w, dy = make(8, 16, 4, torch.float32)
    w.requires_grad_()
    float32_linear(x, w).backward(dy)
    assert x.grad is None
    assert w.grad is not None


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.bfloat16, torch.float16)])
def test_other_dtypes_are_refused(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    with pytest.raises(ValueError, match="must be bfloat16"):
        float32_linear(torch.ones(2, 4, dtype=dtypes[0]), torch.ones(3, 4, dtype=dtypes[1]))
