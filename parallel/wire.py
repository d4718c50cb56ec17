"""The formats in which rows travel between ranks.

Shapes: S rows, D width, C = ⌈D / BLOCK⌉ blocks of a row.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Wire = Literal["compute", "bfloat16", "float8"]
"""As they are; rounded to bfloat16; E4M3 with a float32 scale for each block of a row."""

BLOCK = 128
"""Columns that share a scale (DeepSeek-V3, arXiv 2412.19437, §3.3.2)."""
LARGEST = torch.finfo(torch.float8_e4m3fn).max


def row_bytes(wire: Wire, width: int, itemsize: int) -> int:
    """What one row of `width` numbers of `itemsize` bytes takes on its way."""
    return {"compute": width * itemsize, "bfloat16": 2 * width, "float8": width + 4 * -(-width // BLOCK)}[wire]


def homeward(wire: Wire) -> Wire:
    """The format of what experts return where rows come to them as `wire`: at least bfloat16, for it is a sum."""
    return "bfloat16" if wire == "float8" else wire


def pack(rows_SD: Tensor, wire: Wire) -> Tensor:
    """What is sent for these rows, [S, …] and contiguous: floating-point [S, D], or anything [S, …] as "compute"."""
    if wire == "compute":
        return rows_SD.contiguous()
    if wire == "bfloat16":
        return rows_SD.to(torch.bfloat16, memory_format=torch.contiguous_format)
    rows, width = rows_SD.shape
    padded = F.pad(rows_SD.float(), (0, -width % BLOCK)).view(rows, -1, BLOCK)
    # A row of zeros needs a scale too; a NaN or Inf makes its block NaN.
    scales_SC1 = (padded.abs().amax(-1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    values_SD = (padded / scales_SC1).to(torch.float8_e4m3fn).flatten(1)[:, :width]
    return torch.cat([values_SD.view(torch.uint8), scales_SC1.flatten(1).view(torch.uint8)], 1)


def unpack(packed: Tensor, wire: Wire, width: int, dtype: torch.dtype) -> Tensor:
    """The rows [S, width] of `dtype` that :func:`pack` made this of, as far as the format holds them."""
    if wire != "float8":
        return packed.to(dtype)
    values_SD = packed[:, :width].view(torch.float8_e4m3fn).float()
    scales_SC = packed[:, width:].contiguous().view(torch.float32)
    return (values_SD * scales_SC.repeat_interleave(BLOCK, 1)[:, :width]).to(dtype)
