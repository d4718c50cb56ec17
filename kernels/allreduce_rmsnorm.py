"""Residual add and RMSNorm of the rows that a rank owns, with the sums over the ranks before them and gradients.

    h = round(Σ_r x_r + residual),   y = h / rms(h) ⊙ w,   rms(h)² = mean(h²) + eps

Of W ranks, rank r owns rows r·n … of the T, n = ⌈T / W⌉; the last ones may own fewer, or none. This is the plain twin
of :mod:`moetrain.kernels.allreduce_rmsnorm_triton`, which also fetches the summands from the other ranks and gives them
the results, as TokenWeave does (arXiv 2505.11329, §3).

Shapes: T rows on all ranks, R rows that this rank owns, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def owned_rows(total: int, world: int, rank: int) -> tuple[int, int]:
    """The first row that a rank owns, and how many."""
    share = -(-total // world)
    first = min(rank * share, total)
    return first, min(share, total - first)


def add_rmsnorm(
    summands_RD: Sequence[Tensor], residual_RD: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """y [R, D] in the dtype of the summands, h [R, D] in the dtype of the residual, and 1 / rms(h) [R].

    Sums and norms are computed in float32 (float64 in float64); h is rounded before the norm, because that is what the
    backward pass will see.
    """
    dtype = summands_RD[0].dtype
    wide = torch.promote_types(dtype, torch.float32)
    sum_RD = summands_RD[0].to(wide)
    for summand_RD in summands_RD[1:]:
        sum_RD = sum_RD + summand_RD.to(wide)
    h_RD = (sum_RD + residual_RD.to(wide)).to(residual_RD.dtype)
    wide_h_RD = h_RD.to(wide)
    rstd_R = (wide_h_RD.square().mean(-1) + eps).rsqrt()
    return (wide_h_RD * rstd_R[:, None] * weight_D.to(wide)).to(dtype), h_RD, rstd_R


def add_rmsnorm_backward(
    summands_RD: Sequence[Tensor], dresidual_RD: Tensor, h_RD: Tensor, rstd_R: Tensor, weight_D: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of h [R, D], in its dtype, and of the weight, by these rows [D].

    `summands_RD` are what the ranks send back for y, `dresidual_RD` is the gradient of h as an output:

        dh = (g − x̂ · mean(g ⊙ x̂)) / rms(h) + dresidual,   g = dy ⊙ w,   x̂ = h / rms(h),   dw = Σ_rows dy ⊙ x̂
    """
    wide = rstd_R.dtype
    dy_RD = summands_RD[0].to(wide)
    for summand_RD in summands_RD[1:]:
        dy_RD = dy_RD + summand_RD.to(wide)
    normed_RD = h_RD.to(wide) * rstd_R[:, None]
    g_RD = dy_RD * weight_D.to(wide)
    mean_R1 = (g_RD * normed_RD).mean(-1, keepdim=True)
    dh_RD = rstd_R[:, None] * (g_RD - normed_RD * mean_R1) + dresidual_RD.to(wide)
    return dh_RD.to(h_RD.dtype), (dy_RD * normed_RD).sum(0).to(weight_D.dtype)
