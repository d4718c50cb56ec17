"""Microscaling formats: what grid elements lie on, what format a block's scale has, and how large a block is.

Every format here is a grid of numbers ±m · 2^e without infinities: docs/fp4.md has the table of values.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

ScaleRounding = Literal["nearest", "floor", "even", "rceil", "ceil"]
"""How a block's scale is rounded; `nearest` (ties to even) for scales with a mantissa, the others for E8M0."""


@dataclass(frozen=True)
class ElementFormat:
    """A signed number of `bits` bits: sign, exponent, mantissa; a step of 2^(max(⌊log2 |v|⌋, min_exponent) − M)."""

    name: str
    bits: int
    mantissa_bits: int
    min_exponent: int
    """Of the smallest normal number; below it the grid is even."""
    largest: float

    @property
    def max_exponent(self) -> int:
        """Of the largest number: emax of the OCP specification."""
        return math.frexp(self.largest)[1] - 1

    def values(self) -> Tensor:
        """The number of each code, float64 [2^bits]; NaN for codes beyond the largest number."""
        codes = torch.arange(2 ** (self.bits - 1))
        values = _magnitudes(codes, self.mantissa_bits, self.min_exponent)
        values = values.masked_fill(values > self.largest, torch.nan)
        return torch.cat([values, -values])


@dataclass(frozen=True)
class ScaleFormat:
    """An unsigned number of 8 bits."""

    name: str
    mantissa_bits: int
    min_exponent: int
    largest: float
    nan_code: int
    normal: float
    """The scale of the block that holds the tensor's largest element, where a tensor scale is used: `largest` uses all
    of the format's range (NVFP4); 1 where the range is wide enough without."""

    def values(self) -> Tensor:
        """The number of each code, float64 [256]; NaN for codes beyond the largest number."""
        codes = torch.arange(256)
        if self.mantissa_bits == 0:  # no zero and no subnormal numbers: code 0 is the smallest power of two
            values = torch.ldexp(torch.ones(256, dtype=torch.float64), codes + self.min_exponent)
        else:
            values = _magnitudes(codes, self.mantissa_bits, self.min_exponent)
        values = values.masked_fill(values > self.largest, torch.nan)
        values[self.nan_code] = torch.nan
        return values


def _magnitudes(codes: Tensor, mantissa_bits: int, min_exponent: int) -> Tensor:
    """Of exponent and mantissa, an IEEE-like number with subnormal numbers."""
    exponents, mantissas = codes >> mantissa_bits, codes & (2**mantissa_bits - 1)
    mantissas = torch.where(exponents > 0, mantissas + 2**mantissa_bits, mantissas)
    return torch.ldexp(mantissas.to(torch.float64), exponents.clamp_min(1) - 1 + min_exponent - mantissa_bits)


ELEMENTS = {
    element.name: element
    for element in (
        ElementFormat("e2m1", 4, 1, 0, 6.0),
        ElementFormat("e3m0", 4, 0, -2, 16.0),
        ElementFormat("e1m2", 4, 2, 0, 1.75),
        ElementFormat("e2m3", 6, 3, 0, 7.5),
        ElementFormat("e3m2", 6, 2, -2, 28.0),
        ElementFormat("e4m3", 8, 3, -6, 448.0),
        ElementFormat("e5m2", 8, 2, -14, 57344.0),
    )
}
"""E1M2 is the symmetric INT4 grid −7 … 7 in quarters."""

SCALES = {
    scale.name: scale
    for scale in (
        ScaleFormat("e8m0", 0, -127, 2.0**127, 0xFF, 1.0),
        ScaleFormat("e4m3", 3, -6, 448.0, 0x7F, 448.0),
        ScaleFormat("ue5m3", 3, -14, 114688.0, 0xFF, 114688.0),
        ScaleFormat("ue5m3_61440", 3, -14, 61440.0, 0xFF, 61440.0),
    )
}
"""UE5M3 with only its last code a NaN, or, as in IEEE formats, the whole last exponent."""


@dataclass(frozen=True)
class Format:
    """Elements, the scale of a block, and the optional float32 scale of the tensor.

    Raises ValueError where the parts do not fit together.
    """

    element: ElementFormat
    scale: ScaleFormat | None
    """None: the tensor scale alone."""
    block: int
    """Elements along the contraction axis that share a scale; the side of a tile where tiles are asked for."""
    scale_rounding: ScaleRounding = "nearest"
    tensor_scale: bool = False
    shrink: float = 1.0
    """A factor on the scaled elements before they are rounded, undone by the returned tensor scale: 3/4 keeps the floor
    rule from clipping, so that stochastic rounding stays unbiased (Tseng et al., arXiv 2502.20586, Algorithm 2)."""

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block is {self.block}, must be at least 1")
        if self.scale_rounding not in get_args(ScaleRounding):
            raise ValueError(f"scale rounding {self.scale_rounding!r}: there are {', '.join(get_args(ScaleRounding))}")
        if self.scale is None and not self.tensor_scale:
            raise ValueError("a format without block scales needs tensor_scale")
        has_mantissa = self.scale is None or self.scale.mantissa_bits > 0
        if has_mantissa != (self.scale_rounding == "nearest"):
            name = "none" if self.scale is None else self.scale.name
            raise ValueError(
                f"scale rounding {self.scale_rounding!r} with scale {name}: e8m0 takes floor, even, rceil or ceil, "
                "the others nearest"
            )
        if not 0.0 < self.shrink <= 1.0:
            raise ValueError(f"shrink is {self.shrink}, must be in (0, 1]")

    @property
    def scales_tensor(self) -> bool:
        """Whether values must be multiplied by a tensor scale."""
        return self.tensor_scale or self.shrink != 1.0

    @property
    def largest(self) -> float:
        """Of element times scale, to which a tensor scale brings the tensor's largest element."""
        return self.element.largest * (1.0 if self.scale is None else self.scale.normal)

    def __str__(self) -> str:
        """As :meth:`parse` reads it: element:scale:block:scale_rounding[:tensor][:shrink=F]."""
        scale = "none" if self.scale is None else self.scale.name
        parts = [self.element.name, scale, str(self.block), self.scale_rounding]
        parts += ["tensor"] * self.tensor_scale + [f"shrink={self.shrink!r}"] * (self.shrink != 1.0)
        return ":".join(parts)

    @staticmethod
    @functools.cache
    def parse(text: str) -> Format:
        """A preset's name, or what :meth:`__str__` gives. Raises ValueError that says what there is."""
        if text in PRESETS:
            return PRESETS[text]
        usage = f"format {text!r}: a preset ({', '.join(PRESETS)}) or element:scale:block:scale_rounding[:tensor]"
        parts = text.split(":")
        if len(parts) < 4:
            raise ValueError(usage)
        element, scale, block, rounding, *options = parts
        shrink, tensor_scale = 1.0, False
        for option in options:
            if option == "tensor":
                tensor_scale = True
            elif option.startswith("shrink="):
                shrink = float(option.removeprefix("shrink="))
            else:
                raise ValueError(f"{usage}: {option!r} is not an option")
        if element not in ELEMENTS:
            raise ValueError(f"{usage}: elements are {', '.join(ELEMENTS)}")
        if scale != "none" and scale not in SCALES:
            raise ValueError(f"{usage}: scales are {', '.join(SCALES)}, none")
        if not block.isdecimal():
            raise ValueError(f"{usage}: block is a number")
        scale_format = None if scale == "none" else SCALES[scale]
        # The constructor refuses an unknown rounding.
        return Format(ELEMENTS[element], scale_format, int(block), rounding, tensor_scale, shrink)  # type: ignore[arg-type]


PRESETS = {
    "mxfp4": Format(ELEMENTS["e2m1"], SCALES["e8m0"], 32, "floor"),
    "nvfp4": Format(ELEMENTS["e2m1"], SCALES["e4m3"], 16, tensor_scale=True),
    "ue5m3": Format(ELEMENTS["e2m1"], SCALES["ue5m3"], 16, tensor_scale=True),
    "mxfp6_e2m3": Format(ELEMENTS["e2m3"], SCALES["e8m0"], 32, "floor"),
    "mxfp8_e4m3": Format(ELEMENTS["e4m3"], SCALES["e8m0"], 32, "floor"),
}
"""mxfp*: OCP Microscaling Formats 1.0; nvfp4: arXiv 2509.25149, Appendix B; ue5m3: arXiv 2509.17791."""
