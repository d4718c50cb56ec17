"""Microscaling: numbers of few bits whose blocks share a scale, simulated exactly on hardware without such units.

`fake_quantize` gives a tensor as the hardware would read it: every element a number of the format times the scale of
its block, which bfloat16 holds exactly, so that a bfloat16 product of two such tensors differs from the hardware's only
in the order of its sums. The float32 scale of the tensor is not in it: it is returned, and belongs on the product.

docs/fp4.md has the definitions and the table of formats; microscaling_formats.py the formats.

Shapes: R rows, C columns, E experts; leading dimensions are a batch.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from moetrain.kernels import microscaling_twin as twin
from moetrain.kernels.microscaling_formats import ELEMENTS, PRESETS, SCALES, ElementFormat, Format, ScaleFormat

__all__ = [
    "ELEMENTS",
    "PRESETS",
    "SCALES",
    "Axis",
    "ElementFormat",
    "Format",
    "Quantized",
    "Rounding",
    "ScaleFormat",
    "decode_scales",
    "dequantize",
    "expand_scales",
    "fake_quantize",
    "hadamard_transform",
    "quantize",
    "scale_shape",
    "tensor_amax",
]

Rounding = Literal["nearest", "stochastic", "zero"]
"""Of elements: to the nearest, ties to the even code; up or down with the probability that makes the mean right;
towards zero."""

Axis = int | tuple[int, int]
"""Along which axis blocks extend: −1 (columns), −2 (rows), or (−2, −1) for square tiles."""

HADAMARD_SIZES = (16, 32, 64, 128)


class Quantized(NamedTuple):
    """What :func:`quantize` returns."""

    codes: Tensor
    """uint8 in the layout of x; of 4 bits each: two a byte, [..., ⌈C / 2⌉], the even column in the low half."""
    scales: Tensor | None
    """uint8 codes of the blocks' scales, in the shape of :func:`scale_shape`; None if the format has none."""
    tensor_scale: Tensor | None
    """float32 scalar: x ≈ tensor_scale · scale · element; None if the format has none."""


def fake_quantize(
    x: Tensor,
    fmt: Format,
    *,
    axis: Axis = -1,
    rounding: Rounding = "nearest",
    seed: int | Tensor | None = None,
    hadamard: int | None = None,
    hadamard_seed: int | Tensor = 0,
    expert_offsets: Tensor | None = None,
    amax: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x after quantisation and back, in its shape, and the float32 scale that a product of it must be multiplied by.

    `x`: floating point [..., R, C], quantised in float32, or in float64 if it is that; the result has `dtype` (that of
    x by default). `axis`: where blocks extend. A last block may be partial: its scale is that of the elements it has.

    `rounding`: see :data:`Rounding`; "stochastic" needs a `seed`, an int or an int64 scalar on the device (of which 32
    bits count). A random number belongs to an element's place in the tensor alone, so the result does not depend on how
    it is computed.

    `hadamard`: 16, 32, 64 or 128: rows or columns are first multiplied by H · diag(±1) / √size in groups of so many
    along the axis, with the random signs of `hadamard_seed`. Two operands that are transformed alike along the axis
    that they are contracted over have the same product. A last group that is not full falls into powers of two. The
    block must divide the size or the size the block; not with tiles.

    `expert_offsets`: int [E + 1]: row r of a two-dimensional x belongs to expert e if offsets[e] ≤ r < offsets[e + 1].
    Along rows, blocks and transforms start anew with each expert. Rows past the last offset are padding: what they hold
    is not looked at, and they become 0.

    `amax`: scalar, the largest magnitude of the tensor for its scale, e.g. one of an earlier step; larger elements
    saturate. By default it is found first, in a pass of its own.

    Non-finite elements make NaN of their block, and of the whole tensor where its scale is computed from them.

    Returns (values, tensor scale); the latter is None if the format needs none. Not differentiable: estimators of the
    gradient call it from their own autograd function. Raises ValueError for arguments that do not fit.
    """
    arguments = _arguments(x, fmt, axis, rounding, seed, hadamard, hadamard_seed, expert_offsets, amax)
    values, tensor_scale = _fake_quantize(x, *arguments, x.dtype if dtype is None else dtype)
    return values, tensor_scale if fmt.scales_tensor else None


def quantize(
    x: Tensor,
    fmt: Format,
    *,
    axis: Axis = -1,
    rounding: Rounding = "nearest",
    seed: int | Tensor | None = None,
    hadamard: int | None = None,
    hadamard_seed: int | Tensor = 0,
    expert_offsets: Tensor | None = None,
    amax: Tensor | None = None,
) -> Quantized:
    """Codes, scales and tensor scale of x; the arguments are those of :func:`fake_quantize`.

    Elements of a block whose scale is NaN, and those of rows without an expert, have code 0.
    """
    arguments = _arguments(x, fmt, axis, rounding, seed, hadamard, hadamard_seed, expert_offsets, amax)
    codes, scales, tensor_scale = _quantize(x, *arguments)
    return Quantized(codes, scales if fmt.scale is not None else None, tensor_scale if fmt.scales_tensor else None)


def dequantize(
    codes: Tensor,
    scales: Tensor | None,
    fmt: Format,
    *,
    axis: Axis = -1,
    columns: int | None = None,
    expert_offsets: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Element times scale of what :func:`quantize` gave, without the tensor scale and without undoing a transform.

    `columns`: C, if it is odd and codes are packed. These are the values of :func:`fake_quantize`, bit for bit.
    """
    if fmt.element.bits == 4:
        columns = 2 * codes.shape[-1] if columns is None else columns
        if codes.shape[-1] != (columns + 1) // 2:
            raise ValueError(
                f"{columns} columns of 4 bits take {(columns + 1) // 2} bytes, codes have {codes.shape[-1]}"
            )
    else:
        columns = codes.shape[-1]
    shape = (*codes.shape[:-1], columns)
    axes = _axes(axis)
    if (scales is None) != (fmt.scale is None):
        raise ValueError(f"format {fmt} and scales {scales if scales is None else 'given'} do not fit")
    if scales is not None:
        _check_scales(scales, shape, fmt, axes, expert_offsets)
    return _dequantize(codes, scales, str(fmt), axes, columns, expert_offsets, dtype)


def tensor_amax(
    x: Tensor,
    *,
    axis: Axis = -1,
    hadamard: int | None = None,
    hadamard_seed: int | Tensor = 0,
    expert_offsets: Tensor | None = None,
) -> Tensor:
    """The largest magnitude of x, after the transform if there is one: what `amax` of :func:`fake_quantize` may be.

    Scalar, float32 (float64 if x is); NaN if x has one; 0 of no elements. Always the same bits.
    """
    _check_transform(_axes(axis), hadamard, block=1)
    _check_tensor(x, expert_offsets)
    return _amax(x, _axes(axis), hadamard or 1, *_seed(hadamard_seed), expert_offsets)


def hadamard_transform(
    x: Tensor,
    size: int,
    *,
    axis: int = -1,
    seed: int | Tensor = 0,
    expert_offsets: Tensor | None = None,
    inverse: bool = False,
) -> Tensor:
    """The transform that `hadamard` of :func:`fake_quantize` does first, in float32 or float64; or its inverse."""
    axes = _axes(axis)
    _check_transform(axes, size, block=1)
    _check_tensor(x, expert_offsets)
    if x.numel() == 0:
        return twin.compute(x).clone()
    values = twin.rows_of_experts(twin.compute(x), expert_offsets)
    layout = twin.tiles(x, axes, size, size, expert_offsets)
    transform = twin.Transform(size, _as_tensor(*_seed(seed), x.device))
    return layout.join(twin.hadamard(layout.split(values), layout.valid_M, transform, inverse))


def scale_shape(shape: Sequence[int], fmt: Format, axis: Axis = -1, num_experts: int | None = None) -> tuple[int, ...]:
    """The shape of the scales of a tensor of that shape.

    [..., R, ⌈C / B⌉], [..., ⌈R / B⌉, C] or [..., ⌈R / B⌉, ⌈C / B⌉] for tiles; along the rows of E experts
    [⌊R / B⌋ + E, C], where the blocks of expert e start at ⌊offsets[e] / B⌋ + e and unused places hold 0.
    """
    *batch, rows, columns = shape
    axes, block = _axes(axis), fmt.block
    if axes == (-2,) and num_experts is not None:
        return (rows // block + num_experts, columns)
    down = -(-rows // block) if -2 in axes else rows
    return (*batch, down, -(-columns // block) if -1 in axes else columns)


def decode_scales(scales: Tensor, fmt: Format) -> Tensor:
    """float32 numbers of uint8 codes of scales; exact."""
    if fmt.scale is None:
        raise ValueError(f"format {fmt} has no block scales")
    return _table(fmt.scale, scales.device).index_select(0, scales.flatten().to(torch.int64)).view(scales.shape)


def expand_scales(
    scales: Tensor, shape: Sequence[int], fmt: Format, axis: Axis = -1, expert_offsets: Tensor | None = None
) -> Tensor:
    """The scale of every element, [..., R, C], of codes or of numbers; 0 in rows without an expert."""
    axes, (rows, columns) = _axes(axis), shape[-2:]
    _check_scales(scales, shape, fmt, axes, expert_offsets)
    if axes == (-2,) and expert_offsets is not None:
        offsets = expert_offsets.to(torch.int64)
        places_R = torch.arange(rows, device=scales.device)
        experts_R = torch.searchsorted(offsets[1:], places_R, right=True).clamp_max(offsets.numel() - 2)
        slots_R = twin.slot(offsets, experts_R, fmt.block) + (places_R - offsets[experts_R]) // fmt.block
        return twin.rows_of_experts(scales[slots_R.clamp_max(scales.shape[0] - 1)], expert_offsets)
    if -2 in axes:
        scales = scales.repeat_interleave(fmt.block, dim=-2)[..., :rows, :]
    if -1 in axes:
        scales = scales.repeat_interleave(fmt.block, dim=-1)[..., :columns]
    if expert_offsets is not None:
        scales = twin.rows_of_experts(scales, expert_offsets)
    return scales


# Operators -----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("moetrain::microscaling_fake_quantize", mutates_args=())
def _fake_quantize(
    x: Tensor,
    fmt: str,
    axis: Sequence[int],
    rounding: str,
    seed: int,
    seed_tensor: Tensor | None,
    hadamard: int,
    hadamard_seed: int,
    hadamard_seed_tensor: Tensor | None,
    expert_offsets: Tensor | None,
    amax: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Values and tensor scale, the latter empty if there is none."""
    parsed, axes = Format.parse(fmt), tuple(axis)
    if x.numel() == 0:
        return x.new_empty(x.shape, dtype=dtype), twin.tensor_scale(x, parsed, None)
    if _has_kernels(x, parsed):
        from moetrain.kernels import microscaling_triton

        seeds = (seed, seed_tensor), hadamard, (hadamard_seed, hadamard_seed_tensor)
        return microscaling_triton.fake_quantize(x, parsed, axes, rounding, *seeds, expert_offsets, amax, dtype)
    transform = twin.Transform(hadamard, _as_tensor(hadamard_seed, hadamard_seed_tensor, x.device))
    seeds_of_x = _as_tensor(seed, seed_tensor, x.device)
    elements, scales, _, encode = twin.quantize(x, parsed, axes, rounding, transform, seeds_of_x, expert_offsets, amax)
    values = elements if scales is None else elements * scales
    return values.to(dtype).contiguous(), twin.tensor_scale(x, parsed, encode)


@_fake_quantize.register_fake
def _(x: Tensor, fmt: str, *others: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=others[-1]), _fake_tensor_scale(x, fmt)


@torch.library.custom_op("moetrain::microscaling_quantize", mutates_args=())
def _quantize(
    x: Tensor,
    fmt: str,
    axis: Sequence[int],
    rounding: str,
    seed: int,
    seed_tensor: Tensor | None,
    hadamard: int,
    hadamard_seed: int,
    hadamard_seed_tensor: Tensor | None,
    expert_offsets: Tensor | None,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and tensor scale, the latter two empty if there are none."""
    parsed, axes = Format.parse(fmt), tuple(axis)
    scales_shape = _scales_shape(x, parsed, axis, expert_offsets)
    if x.numel() == 0:
        codes, scale_codes, _ = _fake_quantized(x, fmt, axis, expert_offsets)
        return codes, scale_codes.zero_(), twin.tensor_scale(x, parsed, None)
    if _has_kernels(x, parsed):
        from moetrain.kernels import microscaling_triton

        seeds = (seed, seed_tensor), hadamard, (hadamard_seed, hadamard_seed_tensor)
        return microscaling_triton.quantize(x, parsed, axes, rounding, *seeds, expert_offsets, amax, scales_shape)
    transform = twin.Transform(hadamard, _as_tensor(hadamard_seed, hadamard_seed_tensor, x.device))
    seeds_of_x = _as_tensor(seed, seed_tensor, x.device)
    elements, in_place, scales, encode = twin.quantize(
        x, parsed, axes, rounding, transform, seeds_of_x, expert_offsets, amax
    )
    if in_place is not None:
        elements = torch.where(in_place.isnan(), 0.0, elements)
    codes = twin.pack(twin.element_codes(elements, parsed.element), parsed.element)
    scale_codes = x.new_empty(0, dtype=torch.uint8)
    if scales is not None and parsed.scale is not None:
        scale_codes = twin.scale_codes(scales, parsed.scale)
    return codes, scale_codes, twin.tensor_scale(x, parsed, encode)


@_quantize.register_fake
def _(x: Tensor, fmt: str, axis: Sequence[int], *others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return _fake_quantized(x, fmt, axis, others[-2])


def _fake_quantized(
    x: Tensor, fmt: str, axis: Sequence[int], expert_offsets: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    parsed = Format.parse(fmt)
    columns = (x.shape[-1] + 1) // 2 if parsed.element.bits == 4 else x.shape[-1]
    return (
        x.new_empty((*x.shape[:-1], columns), dtype=torch.uint8),
        x.new_empty(_scales_shape(x, parsed, axis, expert_offsets), dtype=torch.uint8),
        _fake_tensor_scale(x, fmt),
    )


def _scales_shape(x: Tensor, fmt: Format, axis: Sequence[int], expert_offsets: Tensor | None) -> tuple[int, ...]:
    if fmt.scale is None:
        return (0,)
    return scale_shape(x.shape, fmt, _axis(axis), None if expert_offsets is None else expert_offsets.shape[0] - 1)


@torch.library.custom_op("moetrain::microscaling_dequantize", mutates_args=())
def _dequantize(
    codes: Tensor,
    scales: Tensor | None,
    fmt: str,
    axis: Sequence[int],
    columns: int,
    expert_offsets: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    parsed = Format.parse(fmt)
    if _has_kernels(codes, parsed) and codes.numel():
        from moetrain.kernels import microscaling_triton

        return microscaling_triton.dequantize(codes, scales, parsed, tuple(axis), columns, expert_offsets, dtype)
    places = _unpack(codes, columns) if parsed.element.bits == 4 else codes
    values = _table(parsed.element, codes.device).index_select(0, places.flatten().to(torch.int64)).view(places.shape)
    if scales is not None:
        numbers = decode_scales(scales, parsed)
        values = values * expand_scales(numbers, values.shape, parsed, _axis(axis), expert_offsets)
    return values.to(dtype)


@_dequantize.register_fake
def _(codes: Tensor, scales: Tensor | None, fmt: str, axis: Sequence[int], columns: int, *others: Any) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], columns), dtype=others[-1])


@torch.library.custom_op("moetrain::microscaling_amax", mutates_args=())
def _amax(
    x: Tensor,
    axis: Sequence[int],
    hadamard: int,
    hadamard_seed: int,
    hadamard_seed_tensor: Tensor | None,
    expert_offsets: Tensor | None,
) -> Tensor:
    if x.numel() == 0:
        return x.new_zeros((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    if _has_kernels(x):
        from moetrain.kernels import microscaling_triton

        seeds = hadamard_seed, hadamard_seed_tensor
        return microscaling_triton.tensor_amax(x, tuple(axis), hadamard, seeds, expert_offsets)
    transform = twin.Transform(hadamard, _as_tensor(hadamard_seed, hadamard_seed_tensor, x.device))
    return twin.tensor_amax(x, tuple(axis), hadamard, transform, expert_offsets)


@_amax.register_fake
def _(x: Tensor, *others: Any) -> Tensor:
    return x.new_empty((), dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


# Arguments -----------------------------------------------------------------------------------------------------------


def _arguments(
    x: Tensor,
    fmt: Format,
    axis: Axis,
    rounding: str,
    seed: int | Tensor | None,
    hadamard: int | None,
    hadamard_seed: int | Tensor,
    expert_offsets: Tensor | None,
    amax: Tensor | None,
) -> tuple[Any, ...]:
    """Checked, in the order that the operators take them."""
    _check_tensor(x, expert_offsets)
    if rounding not in get_args(Rounding):
        raise ValueError(f"rounding {rounding!r}: there are {', '.join(get_args(Rounding))}")
    if rounding == "stochastic" and seed is None:
        raise ValueError("stochastic rounding needs a seed")
    axes = _axes(axis)
    _check_transform(axes, hadamard, fmt.block if fmt.scale is not None else 1)
    if amax is not None and amax.numel() != 1:
        raise ValueError(f"amax has shape {list(amax.shape)}, must be a scalar")
    return (
        str(fmt),
        axes,
        rounding,
        *_seed(0 if seed is None else seed),
        hadamard or 1,
        *_seed(hadamard_seed),
        expert_offsets,
        amax if fmt.tensor_scale else None,
    )


def _axes(axis: Axis) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if axes not in ((-1,), (-2,), (-2, -1)):
        raise ValueError(f"axis is {axis}, must be -1, -2 or (-2, -1)")
    return axes


def _axis(axes: Sequence[int]) -> Axis:
    return axes[0] if len(axes) == 1 else (axes[0], axes[1])


def _check_transform(axes: tuple[int, ...], hadamard: int | None, block: int) -> None:
    if hadamard is None:
        return
    if hadamard not in HADAMARD_SIZES:
        raise ValueError(f"hadamard is {hadamard}: there are {', '.join(map(str, HADAMARD_SIZES))}")
    if len(axes) == 2:
        raise ValueError("square tiles take no Hadamard transform: it mixes one axis only")
    if hadamard % block and block % hadamard:
        raise ValueError(f"a transform of {hadamard} and blocks of {block} do not lie in one another")


def _check_tensor(x: Tensor, expert_offsets: Tensor | None) -> None:
    if not x.is_floating_point():
        raise ValueError(f"x must be floating point, not {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"x has {x.dim()} dimensions, needs rows and columns")
    if expert_offsets is not None and (x.dim() != 2 or expert_offsets.dim() != 1 or expert_offsets.numel() < 2):
        raise ValueError(
            f"expert_offsets [E + 1] divide the rows of a two-dimensional x; "
            f"x has {x.dim()} dimensions, the offsets shape {list(expert_offsets.shape)}"
        )


def _check_scales(
    scales: Tensor, shape: Sequence[int], fmt: Format, axes: tuple[int, ...], expert_offsets: Tensor | None
) -> None:
    experts = None if expert_offsets is None else expert_offsets.numel() - 1
    expected = scale_shape(shape, fmt, _axis(axes), experts)
    if tuple(scales.shape) != expected:
        raise ValueError(f"scales have shape {list(scales.shape)}, {list(shape)} in {fmt} needs {list(expected)}")


def _seed(seed: int | Tensor) -> tuple[int, Tensor | None]:
    """As the operators take it: a number, or a tensor on the device."""
    return (0, seed) if isinstance(seed, Tensor) else (seed, None)


def _as_tensor(seed: int, seed_tensor: Tensor | None, device: torch.device) -> Tensor:
    return torch.tensor(seed, device=device) if seed_tensor is None else seed_tensor.to(torch.int64).view(())


def _fake_tensor_scale(x: Tensor, fmt: str) -> Tensor:
    return x.new_empty(() if Format.parse(fmt).scales_tensor else (0,), dtype=torch.float32)


def _has_kernels(tensor: Tensor, fmt: Format | None = None) -> bool:
    if not tensor.is_cuda or not importlib.util.find_spec("triton"):
        return False
    from moetrain.kernels import microscaling_triton

    return microscaling_triton.supports(tensor, fmt)


# Codes ---------------------------------------------------------------------------------------------------------------


@functools.cache
def _table(numbers: ElementFormat | ScaleFormat, device: torch.device) -> Tensor:
    return numbers.values().to(device=device, dtype=torch.float32)


def _unpack(codes: Tensor, columns: int) -> Tensor:
    return torch.stack([codes & 0xF, codes >> 4], -1).flatten(-2)[..., :columns]
