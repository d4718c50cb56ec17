"""Microscaling in plain PyTorch: the definition that the kernels of microscaling_triton.py repeat bit for bit.

Everything is computed in float32, or in float64 if x is; docs/fp4.md has the equations. Elements are brought into tiles
of the transform's or the block's size, whichever is larger, and back.

Shapes: R rows, C columns, E experts, M tiles, S elements of a tile, B elements of a block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels.microscaling_formats import ElementFormat, Format, ScaleFormat

ROUNDING_STREAM, SIGN_STREAM = 0, 1
"""Second words of the random numbers' counters."""

FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Transform:
    """A random Hadamard transform along the block axis: x ↦ H · diag(signs) · x / √size."""

    size: int
    """1 for none."""
    seed: Tensor
    """int64 scalar."""


# Random numbers ------------------------------------------------------------------------------------------------------


def philox(counter: Tensor, stream: int, seed: Tensor) -> tuple[Tensor, Tensor]:
    """Philox-2x32-10 (Salmon et al., SC11): two random words of each counter, as int64 in [0, 2³²).

    `counter` and `seed` count modulo 2³².
    """
    low, high, key = counter & 0xFFFFFFFF, torch.full_like(counter, stream), seed & 0xFFFFFFFF
    for _ in range(10):
        product = low * 0xD256D193  # modulo 2⁶⁴, of which the shift below takes the bits of the unsigned product
        low, high = (product >> 32) & 0xFFFFFFFF ^ key ^ high, product & 0xFFFFFFFF
        key = (key + 0x9E3779B9) & 0xFFFFFFFF
    return low, high


def dither(rows: int, columns: int, seed: Tensor) -> Tensor:
    """A random number of 8 bits for each place, float32 [rows, columns]: (2r − 255) / 512, evenly around 0.

    Eight columns share a counter, row · ⌈columns / 8⌉ + column // 8, whatever the blocks and whoever computes them.
    """
    groups = -(-columns // 8)
    counters = torch.arange(rows * groups, device=seed.device)
    words = torch.stack(philox(counters, ROUNDING_STREAM, seed), 1)
    random_bytes = (words[:, :, None] >> torch.tensor([0, 8, 16, 24], device=seed.device)) & 0xFF
    return (2 * random_bytes.view(rows, groups * 8)[:, :columns] - 255).to(torch.float32) / 512


# Hadamard transforms -------------------------------------------------------------------------------------------------


def signs(size: int, seed: Tensor) -> Tensor:
    """The random signs of a transform, float32 [size]: bit i % 64 of the words of counter i // 64, set for −1."""
    places = torch.arange(size, device=seed.device)
    low, high = philox(places // 64, SIGN_STREAM, seed)
    bits = torch.where(places % 64 < 32, low, high) >> (places % 32)
    return (1 - 2 * (bits & 1)).to(torch.float32)


def hadamard(tiles_MS: Tensor, valid_M: Tensor, transform: Transform, inverse: bool = False) -> Tensor:
    """The transform of the first `valid` elements of each tile, in the dtype of the tiles; S is a multiple of its size.

    Where a last transform is not full, its elements fall into powers of two, largest first, as in the binary digits of
    their number, and each is transformed on its own: a butterfly is done where the whole group that it belongs to
    exists. That is orthogonal too, and the same for both operands of a product.
    """
    if transform.size == 1:
        return tiles_MS
    size = tiles_MS.shape[1]
    sign_S = signs(transform.size, transform.seed).to(tiles_MS.dtype).repeat(size // transform.size)
    x_MS = tiles_MS if inverse else tiles_MS * sign_S
    places_S = torch.arange(size, device=tiles_MS.device)
    factor_MS = torch.ones_like(tiles_MS)
    for stage in range(transform.size.bit_length() - 1):
        stride = 2**stage
        even, odd = x_MS.view(-1, size // (2 * stride), 2, stride).unbind(2)
        added_MS = torch.stack([even + odd, even - odd], 2).reshape(x_MS.shape)
        exists_MS = (places_S // (2 * stride) + 1) * (2 * stride) <= valid_M[:, None]
        x_MS = torch.where(exists_MS, added_MS, x_MS)
        factor_MS = torch.where(exists_MS, 2 ** (-(stage + 1) / 2), factor_MS)
    x_MS = x_MS * factor_MS
    return x_MS * sign_S if inverse else x_MS


# Tiles ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tiles:
    """How the elements of a tensor lie in tiles."""

    split: Callable[[Tensor], Tensor]
    """[…, R, C] → [M, S], zeros where there is no element."""
    join: Callable[[Tensor], Tensor]
    """Back: [M, S] → […, R, C]."""
    valid_M: Tensor
    """int64: how many elements of each tile there are, from its first one on."""
    scales: Callable[[Tensor], Tensor]
    """Of each block [M, S / B] → the layout of :func:`~moetrain.kernels.microscaling.scale_shape`, 0 elsewhere."""


def tiles(x: Tensor, axis: tuple[int, ...], block: int, size: int, expert_offsets: Tensor | None) -> Tiles:
    """`axis`: (−1,), (−2,) or (−2, −1) for square tiles; `size`: of a tile, a multiple of the block."""
    if axis == (-2, -1):
        return _square_tiles(x, block)
    if axis == (-2,) and expert_offsets is not None:
        return _expert_tiles(x, block, size, expert_offsets)
    length = x.shape[axis[0]]
    missing = -length % size

    def split(values: Tensor) -> Tensor:
        return F.pad(values.movedim(axis[0], -1), (0, missing)).reshape(-1, size)

    def join(values: Tensor) -> Tensor:
        lines = (*x.movedim(axis[0], -1).shape[:-1], length + missing)
        return values.reshape(lines)[..., :length].movedim(-1, axis[0])

    def scales(values: Tensor) -> Tensor:
        lines = (*x.movedim(axis[0], -1).shape[:-1], (length + missing) // block)
        return values.reshape(lines)[..., : -(-length // block)].movedim(-1, axis[0]).contiguous()

    return Tiles(split, join, split(torch.ones_like(x, dtype=torch.int64)).sum(1), scales)


def _square_tiles(x: Tensor, block: int) -> Tiles:
    rows, columns = x.shape[-2:]
    down, across = -(-rows // block), -(-columns // block)

    def split(values: Tensor) -> Tensor:
        padded = F.pad(values, (0, across * block - columns, 0, down * block - rows))
        return padded.reshape(-1, down, block, across, block).transpose(2, 3).reshape(-1, block * block)

    def join(values: Tensor) -> Tensor:
        padded = values.reshape(-1, down, across, block, block).transpose(2, 3)
        return padded.reshape(*x.shape[:-2], down * block, across * block)[..., :rows, :columns]

    def scales(values: Tensor) -> Tensor:
        return values.reshape(*x.shape[:-2], down, across)

    return Tiles(split, join, split(torch.ones_like(x, dtype=torch.int64)).sum(1), scales)


def _expert_tiles(x_RC: Tensor, block: int, size: int, expert_offsets: Tensor) -> Tiles:
    """Blocks along the rows that start anew with every expert; rows past the last offset are in none."""
    rows, columns = x_RC.shape
    experts = expert_offsets.numel() - 1
    tile_slots, scale_slots = rows // size + experts, rows // block + experts
    offsets = expert_offsets.to(torch.int64)
    places_R = torch.arange(rows, device=x_RC.device)
    experts_R = torch.searchsorted(offsets[1:], places_R, right=True).clamp_max(experts - 1)
    since_R = places_R - offsets[experts_R]
    is_row_R = places_R < offsets[-1]
    # Rows past the last offset go to a place of their own behind the others, which is then cut off.
    padded_R = torch.where(is_row_R, slot(offsets, experts_R, size) * size + since_R, tile_slots * size)
    slots_R = torch.where(is_row_R, slot(offsets, experts_R, block) + since_R // block, scale_slots)

    def split(values: Tensor) -> Tensor:
        padded = values.new_zeros(tile_slots * size + 1, columns)
        padded[padded_R] = values
        return padded[:-1].view(tile_slots, size, columns).transpose(1, 2).reshape(-1, size)

    def join(values: Tensor) -> Tensor:
        padded = values.view(tile_slots, columns, size).transpose(1, 2).reshape(-1, columns)
        return F.pad(padded, (0, 0, 0, 1))[padded_R]

    def scales(values: Tensor) -> Tensor:
        padded = values.view(tile_slots, columns, -1).transpose(1, 2).reshape(-1, columns)
        slots = values.new_zeros(scale_slots + 1, columns)
        # The rows of a block all write the same.
        slots[slots_R] = F.pad(padded, (0, 0, 0, 1))[padded_R // block]
        return slots[:-1]

    return Tiles(split, join, split(is_row_R[:, None].expand(rows, columns).to(torch.int64)).sum(1), scales)


def slot(offsets: Tensor, experts: Tensor, block: int) -> Tensor:
    """Where the blocks of an expert start: ⌊offset / block⌋ + expert, before which those of the others fit."""
    return offsets[experts] // block + experts


# Scales --------------------------------------------------------------------------------------------------------------


def encode_scale(amax: Tensor, fmt: Format) -> Tensor:
    """The factor s_enc that brings a tensor of that largest magnitude into the format's range, a scalar.

    s_enc = fmt.largest / amax, at most the largest float32, 1 for amax = 0, NaN if it is not finite (arXiv 2509.25149,
    equation 1).
    """
    encode = (torch.full_like(amax, fmt.largest) / amax).clamp_max(FLOAT32_MAX)
    encode = torch.where(amax == 0, 1.0, encode)
    return torch.where(amax.isfinite(), encode, torch.nan)


def tensor_scale(x: Tensor, fmt: Format, encode: Tensor | None) -> Tensor:
    """(1 / s_enc) / shrink, float32 scalar on the device of x; empty if the format has neither."""
    if not fmt.scales_tensor:
        return x.new_empty(0, dtype=torch.float32)
    encode = x.new_ones((), dtype=torch.float32) if encode is None else encode.to(torch.float32)
    return ((1.0 / encode) / encode.new_full((), fmt.shrink)).view(())


def round_scale(amax: Tensor, fmt: Format, encode: Tensor | None) -> Tensor:
    """The scale of blocks with that largest magnitude, NaN where it is not finite."""
    scale = fmt.scale
    assert scale is not None
    encode = torch.ones_like(amax) if encode is None else encode
    if scale.mantissa_bits > 0:
        wanted = (amax / torch.full_like(amax, fmt.element.largest)) * encode
        rounded = _nearest(wanted.clamp_max(scale.largest), scale)
    else:
        exponent = _scale_exponent((amax * encode).clamp_max(FLOAT32_MAX), fmt)
        exponent = exponent.clamp(scale.min_exponent, round(math.log2(scale.largest)))
        rounded = torch.ldexp(torch.ones_like(amax, dtype=torch.float64), exponent).to(amax.dtype)
    return torch.where(amax.isfinite() & encode.isfinite(), rounded, torch.nan)


def _scale_exponent(amax: Tensor, fmt: Format) -> Tensor:
    """The exponent of an E8M0 scale, by the rule of the format; a very small number for zeros."""
    mantissa, exponent = torch.frexp(amax.to(torch.float64))  # amax = mantissa · 2^exponent, mantissa in [1/2, 1)
    exponent = exponent.to(torch.int64)
    if fmt.scale_rounding == "rceil":
        # amax / largest is rounded before its exponent is taken, as in cvt.rp.ue8m0 of a float32 quotient.
        mantissa, exponent = torch.frexp((amax / torch.full_like(amax, fmt.element.largest)).to(torch.float64))
        exponent = exponent.to(torch.int64) - (mantissa == 0.5).to(torch.int64)
        return torch.where(amax == 0, -10000, exponent)
    floor = exponent - 1
    if fmt.scale_rounding == "even":
        # amax rounded to the elements' mantissa, halves up, may reach the next power of two.
        bits = fmt.element.mantissa_bits
        floor = floor + (mantissa * 2 >= 2 - 2.0 ** -(bits + 1)).to(torch.int64)
    elif fmt.scale_rounding == "ceil":
        floor = floor + (mantissa > 0.5).to(torch.int64)
    return torch.where(amax == 0, -10000, floor - fmt.element.max_exponent)


def scale_codes(scales: Tensor, scale: ScaleFormat) -> Tensor:
    """uint8 codes of scales of that format, and of the zeros in places without a block."""
    if scale.mantissa_bits > 0:
        codes = _magnitude_codes(scales, scale)
    else:
        codes = torch.frexp(scales.to(torch.float64))[1].to(torch.int64) - 1 - scale.min_exponent
        codes = torch.where(scales == 0, 0, codes)
    return torch.where(scales.isnan(), scale.nan_code, codes).to(torch.uint8)


# Elements ------------------------------------------------------------------------------------------------------------


def round_elements(scaled: Tensor, element: ElementFormat, rounding: str, dithers: Tensor | None) -> Tensor:
    """The nearest number of the grid (ties to the even code), the next one towards zero, or the nearest of scaled +
    dither · step, which is stochastic rounding. Magnitudes above the largest number become it; signs stay, also of 0.
    """
    magnitudes = scaled.abs().clamp_max(element.largest)
    steps = _steps(magnitudes, element)
    if rounding == "zero":
        rounded = torch.floor(magnitudes / steps) * steps
    elif rounding == "stochastic":
        assert dithers is not None
        rounded = torch.round((magnitudes + dithers.to(scaled.dtype) * steps) / steps) * steps
    else:
        rounded = _nearest(magnitudes, element)
    return torch.where(scaled.isnan(), scaled, torch.copysign(rounded, scaled))


def _steps(magnitudes: Tensor, grid: ElementFormat | ScaleFormat) -> Tensor:
    """The distance of a number of the grid to the next larger one."""
    exponents = (torch.frexp(magnitudes)[1] - 1).clamp_min(grid.min_exponent)
    exponents = torch.where(magnitudes == 0, grid.min_exponent, exponents)
    return torch.ldexp(torch.ones_like(magnitudes), exponents - grid.mantissa_bits)


def _nearest(magnitudes: Tensor, grid: ElementFormat | ScaleFormat) -> Tensor:
    steps = _steps(magnitudes, grid)
    rounded = torch.round(magnitudes / steps) * steps
    if grid.mantissa_bits == 0:
        # Between two powers of two the even code is the one with the even exponent field.
        is_tie = (magnitudes == 1.5 * steps) & (magnitudes >= 2.0**grid.min_exponent)
        lower_is_even = (torch.frexp(steps)[1] - 1 - grid.min_exponent) % 2 == 1
        rounded = torch.where(is_tie & lower_is_even, steps, rounded)
    return rounded


def element_codes(values: Tensor, element: ElementFormat) -> Tensor:
    """uint8 codes of numbers of the grid; 0 for NaN."""
    codes = _magnitude_codes(values.abs(), element) + (values.signbit().to(torch.int64) << (element.bits - 1))
    return torch.where(values.isnan(), 0, codes).to(torch.uint8)


def pack(codes: Tensor, element: ElementFormat) -> Tensor:
    """Codes of 4 bits two a byte, the even column in the low half; others as they are."""
    if element.bits != 4:
        return codes.contiguous()
    codes = F.pad(codes, (0, codes.shape[-1] % 2))
    return codes[..., ::2] | codes[..., 1::2] << 4


def _magnitude_codes(magnitudes: Tensor, grid: ElementFormat | ScaleFormat) -> Tensor:
    """Exponent field and mantissa of numbers ≥ 0 of the grid, int64."""
    steps = _steps(magnitudes, grid)
    multiples = torch.where(magnitudes.isnan(), 0, magnitudes / steps).to(torch.int64)
    fields = torch.frexp(steps)[1].to(torch.int64) - 1 + grid.mantissa_bits - grid.min_exponent
    # A normal number's multiple has the leading one, which adds one to the exponent field.
    return (fields << grid.mantissa_bits) + multiples


# The whole -----------------------------------------------------------------------------------------------------------


def tensor_amax(
    x: Tensor, axis: tuple[int, ...], size: int, transform: Transform, expert_offsets: Tensor | None
) -> Tensor:
    """The largest magnitude after the transform: NaN if there is one, 0 of no elements; float32 or float64 scalar."""
    if transform.size == 1:
        values = rows_of_experts(compute(x), expert_offsets)
    else:
        layout = tiles(x, axis, size, size, expert_offsets)
        values = hadamard(layout.split(rows_of_experts(compute(x), expert_offsets)), layout.valid_M, transform)
    return torch.cat([values.abs().flatten(), values.new_zeros(1)]).amax()


def quantize(
    x: Tensor,
    fmt: Format,
    axis: tuple[int, ...],
    rounding: str,
    transform: Transform,
    seed: Tensor,
    expert_offsets: Tensor | None,
    amax: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Elements on the grid, the scales of their blocks in the layout of x and in that of the scales, and s_enc.

    All in float32 or float64; the scales are None where the format has none.
    """
    block = fmt.block if fmt.scale is not None else 1
    size = max(block, transform.size)
    layout = tiles(x, axis, block, size, expert_offsets)
    tiles_MS = layout.split(rows_of_experts(compute(x), expert_offsets))
    tiles_MS = hadamard(tiles_MS, layout.valid_M, transform)
    encode = None
    if fmt.tensor_scale:
        if amax is None:
            amax = torch.cat([tiles_MS.abs().flatten(), tiles_MS.new_zeros(1)]).amax()
        encode = encode_scale(amax.to(tiles_MS.dtype), fmt)

    block_elements = block * block if axis == (-2, -1) else block
    blocks_MxB = tiles_MS.view(tiles_MS.shape[0], -1, block_elements)
    scales = scales_in_place = None
    factor = encode
    if fmt.scale is not None:
        scales_Mx1 = round_scale(blocks_MxB.abs().amax(2, keepdim=True), fmt, encode)
        factor = _block_encode(scales_Mx1, encode)
        scales_in_place = layout.join(scales_Mx1.expand_as(blocks_MxB).reshape(tiles_MS.shape))
        scales = layout.scales(scales_Mx1.flatten(1))
    assert factor is not None
    if fmt.shrink != 1.0:
        factor = factor * fmt.shrink
    dithers = None
    if rounding == "stochastic":
        rows, columns = math.prod(x.shape[:-1]), x.shape[-1]
        dithers = layout.split(dither(rows, columns, seed).view(x.shape)).view(blocks_MxB.shape)
    elements_MxB = round_elements(blocks_MxB * factor, fmt.element, rounding, dithers)
    if fmt.scale is None:
        elements_MxB = torch.where(blocks_MxB.isfinite(), elements_MxB, torch.nan)
    return layout.join(elements_MxB.view(tiles_MS.shape)), scales_in_place, scales, encode


def _block_encode(scales: Tensor, encode: Tensor | None) -> Tensor:
    """1 / (scale · s_dec), at most the largest float32, 0 for a scale of 0 (arXiv 2509.25149, Appendix B.2)."""
    decoded = scales if encode is None else scales * (1.0 / encode)
    factor = (1.0 / decoded).clamp_max(FLOAT32_MAX)
    return torch.where(scales == 0, 0.0, factor)


def compute(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.to(torch.float32)


def rows_of_experts(x: Tensor, expert_offsets: Tensor | None) -> Tensor:
    """Zeros in the rows that belong to no expert, which may hold anything."""
    if expert_offsets is None:
        return x
    places = torch.arange(x.shape[0], device=x.device)
    return torch.where((places < expert_offsets[-1])[:, None], x, 0)
