"""Microscaling on the device: x is read once and written once, with the bits of microscaling_twin.py.

A program takes tiles of the block or of the transform, whichever is larger, into registers: of consecutive elements of
rows (axis −1), or of consecutive rows of a range of columns (axis −2, and square tiles). Exponents are taken from bits;
numbers are rounded to a grid of step s by adding and subtracting 1.5 · 2²³ · s, which rounds to a multiple of s.

Floating point contraction is off: x · factor must be rounded before the grid sees it, as in the twin.

Names: A and W: a tile of a row is A runs of W consecutive elements; N tiles of a program; L rows of a tile, C columns,
E experts, G columns that share a random number's counter.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moetrain.kernels import microscaling_twin as twin
from moetrain.kernels.microscaling_formats import Format

MIN_BLOCK, MAX_BLOCK = 8, 128
"""Blocks of powers of two in between; the twin takes others."""

FLOAT32_MAX = tl.constexpr(torch.finfo(torch.float32).max)
INFINITY_BITS = tl.constexpr(0x7F800000)
GROUP = tl.constexpr(8)
ROUNDING_STREAM = tl.constexpr(twin.ROUNDING_STREAM)
SIGN_STREAM = tl.constexpr(twin.SIGN_STREAM)

Seed = tuple[int, Tensor | None]
"""A number, or a tensor that holds it."""


def supports(tensor: Tensor, fmt: Format | None = None) -> bool:
    """Whether the kernels take that tensor, x or codes; the twin takes everything."""
    if tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32, torch.uint8) or tensor.numel() >= 2**34:
        return False
    if fmt is None or fmt.scale is None:
        return True
    return MIN_BLOCK <= fmt.block <= MAX_BLOCK and fmt.block & (fmt.block - 1) == 0


def fake_quantize(
    x: Tensor,
    fmt: Format,
    axis: tuple[int, ...],
    rounding: str,
    seed: Seed,
    hadamard: int,
    hadamard_seed: Seed,
    expert_offsets: Tensor | None,
    amax: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Values and the tensor scale, the latter empty if the format has none; `hadamard` is 1 for none."""
    values = torch.empty(x.shape, dtype=dtype, device=x.device)
    tensor_scale = _launch(
        x, values, None, "values", fmt, axis, rounding, seed, hadamard, hadamard_seed, expert_offsets, amax
    )
    return values, tensor_scale


def quantize(
    x: Tensor,
    fmt: Format,
    axis: tuple[int, ...],
    rounding: str,
    seed: Seed,
    hadamard: int,
    hadamard_seed: Seed,
    expert_offsets: Tensor | None,
    amax: Tensor | None,
    scale_shape: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, codes of the scales, tensor scale; the latter two empty if the format has none."""
    columns = (x.shape[-1] + 1) // 2 if fmt.element.bits == 4 else x.shape[-1]
    codes = torch.empty((*x.shape[:-1], columns), dtype=torch.uint8, device=x.device)
    # Places without a block stay 0.
    scales = torch.zeros(scale_shape, dtype=torch.uint8, device=x.device)
    tensor_scale = _launch(
        x, codes, scales, "codes", fmt, axis, rounding, seed, hadamard, hadamard_seed, expert_offsets, amax
    )
    return codes, scales, tensor_scale


def tensor_amax(
    x: Tensor, axis: tuple[int, ...], hadamard: int, hadamard_seed: Seed, expert_offsets: Tensor | None
) -> Tensor:
    """The largest magnitude after the transform, float32 scalar. A maximum of bits has no order, so atomics do."""
    x = x.contiguous()
    amax = torch.zeros((), dtype=torch.int32, device=x.device)
    with torch.cuda.device_of(x):
        if hadamard == 1:
            _amax_kernel[(min(triton.cdiv(x.numel(), 16384), 2048),)](
                x,
                amax,
                None if expert_offsets is None else expert_offsets[-1:],
                x.numel(),
                x.shape[-1],
                BLOCK=4096,
                num_warps=8,
            )
        else:
            _transform(x, amax, hadamard, axis, hadamard_seed, expert_offsets)
    return amax.view(torch.float32)


def dequantize(
    codes: Tensor,
    scales: Tensor | None,
    fmt: Format,
    axis: tuple[int, ...],
    columns: int,
    expert_offsets: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Element times scale, [..., R, columns]."""
    codes = codes.contiguous()
    values = torch.empty((*codes.shape[:-1], columns), dtype=dtype, device=codes.device)
    rows, experts = codes.shape[-2], 0 if expert_offsets is None else expert_offsets.numel() - 1
    block = min(1024, triton.next_power_of_2(columns))
    with torch.cuda.device_of(codes):
        _dequantize_kernel[(math.prod(codes.shape[:-1]) * triton.cdiv(columns, block),)](
            codes,
            values,
            scales if scales is None else scales.contiguous(),
            expert_offsets,
            rows,
            columns,
            codes.shape[-1],
            DOWN=-2 in axis,
            ACROSS=-1 in axis,
            BLOCK=fmt.block,
            E=experts,
            EXPERTS=triton.next_power_of_2(experts + 1),
            BLOCK_C=block,
            FMT=fmt,
            num_warps=max(1, block // 256),
        )
    return values


# Launching -----------------------------------------------------------------------------------------------------------


def _int32(seed: Seed) -> Seed:
    """The seed's 32 bits as an int32, so that no number needs a kernel of its own."""
    return ((seed[0] & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000, seed[1]


def _launch(
    x: Tensor,
    out: Tensor,
    scales: Tensor | None,
    what: str,
    fmt: Format,
    axis: tuple[int, ...],
    rounding: str,
    seed: Seed,
    hadamard: int,
    hadamard_seed: Seed,
    expert_offsets: Tensor | None,
    amax: Tensor | None,
) -> Tensor:
    """Fills `out` and `scales`; returns the tensor scale, empty if there is none."""
    x = x.contiguous()
    if fmt.tensor_scale and amax is None:
        amax = tensor_amax(x, axis, hadamard, hadamard_seed, expert_offsets)
    amax = None if amax is None or not fmt.tensor_scale else amax.to(device=x.device, dtype=torch.float32)
    computed = torch.empty((), dtype=torch.float32, device=x.device) if fmt.tensor_scale else None
    block = fmt.block if fmt.scale is not None else max(hadamard, MIN_BLOCK)
    pointers = (x, out, scales, amax, computed, *_int32(seed), *_int32(hadamard_seed), expert_offsets)
    constants = {"WHAT": what, "HADAMARD": hadamard, "ROUNDING": rounding, "FMT": fmt}
    with torch.cuda.device_of(x):
        if axis == (-1,):
            _launch_columns(x, pointers, block, hadamard, constants)
        else:
            _launch_rows(x, pointers, block, hadamard, axis, expert_offsets, constants)
    return twin.tensor_scale(x, fmt, None) if computed is None else computed


def _transform(
    x: Tensor,
    amax: Tensor,
    hadamard: int,
    axis: tuple[int, ...],
    hadamard_seed: Seed,
    expert_offsets: Tensor | None,
) -> None:
    """The largest magnitude after a transform, into `amax`."""
    pointers = (x, amax, None, None, None, 0, None, *_int32(hadamard_seed), expert_offsets)
    constants = {"WHAT": "amax", "HADAMARD": hadamard, "ROUNDING": "nearest", "FMT": None}
    if axis == (-1,):
        _launch_columns(x, pointers, hadamard, hadamard, constants)
    else:
        _launch_rows(x, pointers, hadamard, hadamard, axis, expert_offsets, constants)


def _launch_columns(x: Tensor, pointers: tuple[Any, ...], block: int, hadamard: int, constants: dict[str, Any]) -> None:
    columns = x.shape[-1]
    size = max(block, hadamard)
    # Transformed tiles are held by one thread each, so that butterflies are between its registers.
    width = GROUP.value if hadamard > 1 else max(GROUP.value, block // 4)
    tiles = math.prod(x.shape[:-1]) * triton.cdiv(columns, size)
    per_program = 128 if size == 64 else 4096 // size
    _columns_kernel[(triton.cdiv(tiles, per_program),)](
        *pointers,
        tiles,
        columns,
        triton.cdiv(columns, size),
        BLOCK=block,
        EVEN=columns % size == 0,
        E=0 if pointers[-1] is None else pointers[-1].numel() - 1,
        A=size // width,
        W=width,
        N=per_program,
        num_warps=4,
        enable_fp_fusion=False,
        **constants,
    )


def _launch_rows(
    x: Tensor,
    pointers: tuple[Any, ...],
    block: int,
    hadamard: int,
    axis: tuple[int, ...],
    expert_offsets: Tensor | None,
    constants: dict[str, Any],
) -> None:
    rows, columns = x.shape[-2:]
    size = max(block, hadamard)
    experts = 0 if expert_offsets is None else expert_offsets.numel() - 1
    # The rows past the last expert's are one more expert, whose elements count as zeros.
    down = triton.cdiv(rows, size) if expert_offsets is None or len(axis) == 2 else rows // size + experts + 1
    # 64 elements a thread: all rows of a few columns.
    width = max(block if len(axis) == 2 else 64, 4096 // size)
    across = triton.cdiv(columns, width)
    _rows_kernel[(math.prod(x.shape[:-2]) * down * across,)](
        *pointers,
        rows,
        columns,
        down,
        across,
        BLOCK=block,
        SQUARE=len(axis) == 2,
        E=experts,
        EXPERTS=triton.next_power_of_2(experts + 1),
        EVEN=rows % size == 0 and expert_offsets is None,
        VECTOR=max(1, min(8, 64 // size)),
        L=size,
        C=width,
        num_warps=max(2, size * width // 2048),
        enable_fp_fusion=False,
        **constants,
    )


# Random numbers ------------------------------------------------------------------------------------------------------


@triton.jit
def _key(number, pointer):
    return (tl.load(pointer) if pointer is not None else number).to(tl.uint32)


@triton.jit
def _philox(low, stream: tl.constexpr, key):
    """Philox-2x32-10 of counters (low, stream), uint32."""
    high = tl.zeros_like(low) + stream
    for _ in tl.static_range(10):
        product_high = tl.umulhi(low, 0xD256D193)
        low, high = product_high ^ key ^ high, low * 0xD256D193
        key += 0x9E3779B9
    return low, high


@triton.jit
def _dither(counters, key):
    """(2r − 255) / 512 of the 8 bytes r of each counter, float32 [..., 8]; r / 256 is put into the bits of 1.0."""
    first, second = _philox(counters.to(tl.uint32), ROUNDING_STREAM, key)
    place = tl.arange(0, 8)[None, None, None, :]
    words = tl.where(place < 4, first[:, :, :, None], second[:, :, :, None])
    random_bytes = (words >> ((place % 4) * 8).to(tl.uint32)) & 0xFF
    return ((random_bytes << 15) | 0x3F800000).to(tl.float32, bitcast=True) - 1.498046875


@triton.jit
def _sign_bits(places, key, SIZE: tl.constexpr):
    """The sign bit of each place of a transform, int32."""
    counter = tl.zeros((1,), tl.uint32)
    first, second = _philox(counter, SIGN_STREAM, key)
    words = tl.where(places % 64 < 32, tl.sum(first, 0), tl.sum(second, 0))
    if SIZE > 64:
        third, fourth = _philox(counter + 1, SIGN_STREAM, key)
        later = tl.where(places % 64 < 32, tl.sum(third, 0), tl.sum(fourth, 0))
        words = tl.where(places % SIZE < 64, words, later)
    return (((words >> (places % 32).to(tl.uint32)) & 1) << 31).to(tl.int32, bitcast=True)


# Hadamard transforms -------------------------------------------------------------------------------------------------


@triton.jit
def _flip(x, sign_bits):
    return (x.to(tl.int32, bitcast=True) ^ sign_bits).to(tl.float32, bitcast=True)


@triton.jit
def _butterfly(x, STRIDE: tl.constexpr, P: tl.constexpr, S: tl.constexpr, Q: tl.constexpr):
    """Sum and difference of the elements of x [P, S, Q] that are STRIDE apart along S."""
    x = tl.reshape(x, (P, S // (2 * STRIDE), 2, STRIDE * Q))
    even, odd = tl.split(tl.permute(x, (0, 1, 3, 2)))
    x = tl.permute(tl.join(even + odd, even - odd), (0, 1, 3, 2))
    return tl.reshape(x, (P, S, Q))


@triton.jit
def _power(EXPONENT: tl.constexpr):
    """2^(−EXPONENT / 2) as a float32 number."""
    SQRT_HALF: tl.constexpr = 0.7071067811865476
    return (SQRT_HALF if EXPONENT % 2 == 1 else 1.0) / (1 << (EXPONENT // 2))


@triton.jit
def _transform_tiles(
    x, sign_bits, valid, HADAMARD: tl.constexpr, EVEN: tl.constexpr, A: tl.constexpr, N: tl.constexpr, W: tl.constexpr
):
    """The transform along (A, W) of x [A, N, W], of which `valid` elements of each tile exist, [1, N, 1]."""
    x = _flip(x, sign_bits)
    STAGES: tl.constexpr = HADAMARD.bit_length() - 1
    if EVEN:
        for stage in tl.static_range(STAGES):
            x = _stage(x, 1 << stage, A, N, W)
        return x * _power(STAGES)
    place = tl.arange(0, A)[:, None, None] * W + tl.arange(0, W)[None, None, :]
    factor = tl.full((A, N, W), 1.0, tl.float32)
    for stage in tl.static_range(STAGES):
        exists = ((place >> (stage + 1)) + 1) << (stage + 1) <= valid
        x = tl.where(exists, _stage(x, 1 << stage, A, N, W), x)
        factor = tl.where(exists, _power(stage + 1), factor)
    return x * factor


@triton.jit
def _stage(x, STRIDE: tl.constexpr, A: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    if STRIDE < W:
        x = _butterfly(tl.reshape(x, (A * N, W, 1)), STRIDE, A * N, W, 1)
    else:
        x = _butterfly(tl.reshape(x, (1, A, N * W)), STRIDE // W, 1, A, N * W)
    return tl.reshape(x, (A, N, W))


# Scales --------------------------------------------------------------------------------------------------------------


@triton.jit
def _encode_scale(amax, FMT: tl.constexpr):
    number = tl.load(amax)
    encode = tl.minimum(tl.div_rn(FMT.largest, number), FLOAT32_MAX)
    encode = tl.where(number == 0.0, 1.0, encode)
    return tl.where(tl.abs(number) < float("inf"), encode, float("nan"))


@triton.jit
def _block_scale(amax_bits, encode, FMT: tl.constexpr):
    """The scale of blocks from the bits of their largest magnitude, and the factor of their elements."""
    SCALE: tl.constexpr = FMT.scale
    amax = amax_bits.to(tl.float32, bitcast=True)
    if SCALE.mantissa_bits > 0:
        wanted = tl.div_rn(amax, FMT.element.largest)
        if FMT.tensor_scale:
            wanted = wanted * encode
        scale = _round(tl.minimum(wanted, SCALE.largest), 0.0, SCALE, "nearest")
    else:
        if FMT.tensor_scale:
            amax = tl.minimum(amax * encode, FLOAT32_MAX)
        scale = _power_of_two(amax, FMT)
    if FMT.tensor_scale:
        scale = tl.where(encode == encode, scale, float("nan"))
        factor = tl.minimum(tl.div_rn(1.0, scale * tl.div_rn(1.0, encode)), FLOAT32_MAX)
    else:
        factor = tl.minimum(tl.div_rn(1.0, scale), FLOAT32_MAX)
    if FMT.shrink != 1.0:
        factor = factor * FMT.shrink
    factor = tl.where(scale == 0.0, 0.0, factor)
    return tl.where(amax_bits < INFINITY_BITS, scale, float("nan")), factor


@triton.jit
def _power_of_two(amax, FMT: tl.constexpr):
    """The E8M0 scale of blocks with that largest magnitude, by the format's rule."""
    if FMT.scale_rounding == "rceil":
        amax = tl.div_rn(amax, FMT.element.largest)
    is_subnormal = amax < 1.1754943508222875e-38
    bits = tl.where(is_subnormal, amax * 16777216.0, amax).to(tl.int32, bitcast=True)
    exponent = (bits >> 23) - tl.where(is_subnormal, 24 + 127, 127)
    mantissa = bits & 0x7FFFFF
    if FMT.scale_rounding == "even":
        exponent += (mantissa >= 0x800000 - (1 << (22 - FMT.element.mantissa_bits))).to(tl.int32)
    elif FMT.scale_rounding != "floor":
        exponent += (mantissa > 0).to(tl.int32)
    if FMT.scale_rounding != "rceil":
        exponent -= FMT.element.max_exponent
    field = tl.where(amax > 0.0, tl.minimum(tl.maximum(exponent, -127), 127), -127) + 127
    return tl.where(field > 0, field << 23, 0x400000).to(tl.float32, bitcast=True)


# Numbers of a grid: an ElementFormat or a ScaleFormat ----------------------------------------------------------------


@triton.jit
def _round(x, dither, GRID: tl.constexpr, ROUNDING: tl.constexpr):
    """Magnitudes x on the grid; x is at most the grid's largest number."""
    M: tl.constexpr = GRID.mantissa_bits
    SMALLEST: tl.constexpr = (GRID.min_exponent + 127) << 23
    # 2^max(⌊log2 x⌋, min_exponent): the power of two below x is what masking the mantissa leaves.
    power = tl.maximum(x.to(tl.int32, bitcast=True) & 0x7F800000, SMALLEST)
    magic = (power + (((23 - M) << 23) + 0x400000)).to(tl.float32, bitcast=True)
    step = (power - (M << 23)).to(tl.float32, bitcast=True)
    if ROUNDING == "stochastic":
        x = x + dither * step
    rounded = (x + magic) - magic
    if ROUNDING == "zero":
        rounded = tl.where(rounded > x, rounded - step, rounded)
    if ROUNDING == "nearest" and M == 0:
        # A tie goes to the even code: down where the lower power of two has it.
        is_tie = x.to(tl.int32, bitcast=True) == power + 0x400000
        lower_is_even = ((power - SMALLEST) >> 23) % 2 == 1
        rounded = tl.where(is_tie & lower_is_even, step, rounded)
    return rounded


@triton.jit
def _codes(x, GRID: tl.constexpr):
    """Exponent field and mantissa of numbers x ≥ 0 on the grid, int32."""
    M: tl.constexpr = GRID.mantissa_bits
    SMALLEST: tl.constexpr = 2.0**GRID.min_exponent
    is_subnormal = x < SMALLEST
    # A number with a leading 1 as the others have.
    bits = tl.where(is_subnormal, x + SMALLEST, x).to(tl.int32, bitcast=True)
    return (bits >> (23 - M)) - ((GRID.min_exponent + 126) << M) - tl.where(is_subnormal, 1 << M, 0)


@triton.jit
def _numbers(codes, GRID: tl.constexpr):
    """The numbers of exponent fields and mantissas, float32."""
    M: tl.constexpr = GRID.mantissa_bits
    SMALLEST: tl.constexpr = 2.0**GRID.min_exponent
    is_subnormal = codes < (1 << M)
    bits = (codes + tl.where(is_subnormal, 1 << M, 0) + ((GRID.min_exponent + 126) << M)) << (23 - M)
    numbers = bits.to(tl.float32, bitcast=True)
    return tl.where(is_subnormal, numbers - SMALLEST, numbers)


@triton.jit
def _element_codes(magnitudes, sign_bits, element_scales, FMT: tl.constexpr):
    """Codes, uint8; 0 where the scale is NaN."""
    ELEMENT: tl.constexpr = FMT.element
    BITS: tl.constexpr = FMT.element.bits
    codes = _codes(magnitudes, ELEMENT) | ((sign_bits >> (32 - BITS)) & (1 << (BITS - 1)))
    return tl.where(element_scales == element_scales, codes, 0).to(tl.uint8)


@triton.jit
def _scale_codes(scales, FMT: tl.constexpr):
    SCALE: tl.constexpr = FMT.scale
    codes = _codes(scales, SCALE) if SCALE.mantissa_bits > 0 else scales.to(tl.int32, bitcast=True) >> 23
    return tl.where(scales == scales, codes, SCALE.nan_code).to(tl.uint8)


@triton.jit
def _scale_numbers(codes, FMT: tl.constexpr):
    SCALE: tl.constexpr = FMT.scale
    if SCALE.mantissa_bits > 0:
        numbers = _numbers(codes, SCALE)
    else:
        numbers = tl.where(codes > 0, codes << 23, 0x400000).to(tl.float32, bitcast=True)
    return tl.where(codes == SCALE.nan_code, float("nan"), numbers)


# Tiles [A, N, W], of A · W elements each -----------------------------------------------------------------------------


@triton.jit
def _block_amax(x, BLOCK: tl.constexpr, SQUARE: tl.constexpr, A: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """Bits of the largest magnitude of each block, int32 [A · W / BLOCK, N]; a NaN's are the largest."""
    bits = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    bits = tl.reshape(bits, (A * W // BLOCK, BLOCK // W, N, W))
    amax = tl.max(tl.max(bits, 3), 1)
    if SQUARE:
        of_square = tl.max(tl.reshape(amax, (N // BLOCK, BLOCK)), 1)
        amax = tl.reshape(tl.broadcast_to(of_square[:, None], (N // BLOCK, BLOCK)), (1, N))
    return amax


@triton.jit
def _of_elements(of_blocks, BLOCK: tl.constexpr, A: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """What belongs to blocks [A · W / BLOCK, N] for each of their elements, [A, N, W]."""
    spread = tl.broadcast_to(of_blocks[:, None, :, None], (A * W // BLOCK, BLOCK // W, N, W))
    return tl.reshape(spread, (A, N, W))


@triton.jit
def _quantize_tiles(
    x,
    dither,
    amax,
    FMT: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUARE: tl.constexpr,
    A: tl.constexpr,
    N: tl.constexpr,
    W: tl.constexpr,
):
    """Of x [A, N, W] the magnitudes on the grid, the sign bits and the scales, NaN for bad elements, [A, N, W]; the
    scales of the blocks [A · W / BLOCK, N]."""
    ELEMENT: tl.constexpr = FMT.element
    encode = _encode_scale(amax, FMT) if FMT.tensor_scale else 1.0
    if FMT.scale is not None:
        scales, factors = _block_scale(_block_amax(x, BLOCK, SQUARE, A, N, W), encode, FMT)
        factors = _of_elements(factors, BLOCK, A, N, W)
        element_scales = _of_elements(scales, BLOCK, A, N, W)
    else:
        scales = tl.zeros((A * W // BLOCK, N), tl.float32)
        factors = encode * FMT.shrink if FMT.shrink != 1.0 else encode
        element_scales = tl.where(encode == encode, 1.0, float("nan"))
        element_scales = tl.where(tl.abs(x) < float("inf"), element_scales, float("nan"))
    scaled = tl.minimum(tl.abs(x * factors), ELEMENT.largest)
    magnitudes = _round(scaled, dither, ELEMENT, ROUNDING)
    return magnitudes, x.to(tl.int32, bitcast=True) & -2147483648, element_scales, scales


@triton.jit
def _store_tensor_scale(tensor_scale, amax, FMT: tl.constexpr):
    """By the first program, whether or not it has elements."""
    if tensor_scale is not None and tl.program_id(0) == 0:
        decode = tl.div_rn(1.0, _encode_scale(amax, FMT))
        tl.store(tensor_scale, tl.div_rn(decode, FMT.shrink) if FMT.shrink != 1.0 else decode)


@triton.jit
def _store_amax(x, amax):
    bits = tl.reshape(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, (x.numel,))
    tl.atomic_max(amax, tl.max(bits, 0), sem="relaxed")


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["seed", "hadamard_seed"])
def _columns_kernel(
    x,
    out,
    scales,
    amax,
    tensor_scale,
    seed,
    seed_pointer,
    hadamard_seed,
    hadamard_seed_pointer,
    expert_offsets,
    tiles,
    columns,
    tiles_per_row,
    WHAT: tl.constexpr,
    FMT: tl.constexpr,
    HADAMARD: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    E: tl.constexpr,
    A: tl.constexpr,
    W: tl.constexpr,
    N: tl.constexpr,
):
    """Blocks of consecutive elements of a row; EVEN if rows are whole tiles, which then follow one another."""
    _store_tensor_scale(tensor_scale, amax, FMT)
    first = tl.program_id(0).to(tl.int64) * N
    tile_N = tl.arange(0, N)
    run_A = tl.arange(0, A)[:, None, None] * W
    in_run_W = tl.arange(0, W)[None, None, :]
    is_tile_N = (tile_N < tiles - first)[None, :, None]
    is_read_N = is_tile_N
    if E > 0:
        is_read_N = (tile_N < tiles_per_row * tl.load(expert_offsets + E).to(tl.int64) - first)[None, :, None]
    if EVEN:
        place = tile_N[None, :, None] * (A * W) + run_A + in_run_W
        start = first * (A * W)
        is_there, is_read = is_tile_N, is_read_N
        valid = A * W
    else:
        row_N = (first + tile_N) // tiles_per_row
        column_N = ((first + tile_N) - row_N * tiles_per_row).to(tl.int32) * (A * W)
        column = column_N[None, :, None] + run_A + in_run_W
        place = row_N[None, :, None] * columns + column
        start = 0
        is_there, is_read = is_tile_N & (column < columns), is_read_N & (column < columns)
        valid = (columns - column_N)[None, :, None]

    # Of the dimensions without contiguous elements threads shall divide N, so that each has whole tiles in registers:
    # the hint makes it the one that the compiler takes first.
    place = tl.max_contiguous(place, [1, 2, W])
    values = tl.load(x + start + place, mask=is_read, other=0.0).to(tl.float32)
    if HADAMARD > 1:
        key = _key(hadamard_seed, hadamard_seed_pointer)
        sign_bits = _sign_bits((run_A + in_run_W) % HADAMARD, key, HADAMARD)
        values = _transform_tiles(values, sign_bits, valid, HADAMARD, EVEN, A, N, W)
    if WHAT == "amax":
        _store_amax(values, out)
    else:
        dither = 0.0
        if ROUNDING == "stochastic":
            group_W = tl.arange(0, W // GROUP)[None, None, :]
            if EVEN:
                counter = start // GROUP + (tile_N[None, :, None] * (A * W // GROUP) + run_A // GROUP + group_W)
            else:
                groups = (columns + GROUP - 1) // GROUP
                counter = (row_N * groups + column_N // GROUP)[None, :, None] + (run_A // GROUP + group_W)
            dither = tl.reshape(_dither(counter, _key(seed, seed_pointer)), (A, N, W))
        magnitudes, sign_bits, element_scales, block_scales = _quantize_tiles(
            values, dither, amax, FMT, ROUNDING, BLOCK, False, A, N, W
        )
        if WHAT == "values":
            values = _flip(magnitudes, sign_bits) * element_scales
            tl.store(out + start + place, values.to(out.dtype.element_ty), mask=is_there)
        else:
            codes = _element_codes(magnitudes, sign_bits, element_scales, FMT)
            if FMT.element.bits == 4:
                pair_W = tl.arange(0, W // 2)[None, None, :]
                low, high = tl.split(tl.reshape(codes, (A, N, W // 2, 2)))
                codes = low | (high << 4)
                if EVEN:
                    tl.store(
                        out + start // 2 + (tile_N[None, :, None] * (A * W // 2) + run_A // 2 + pair_W),
                        codes,
                        mask=is_tile_N,
                    )
                else:
                    pairs = (columns + 1) // 2
                    pair = column_N[None, :, None] // 2 + run_A // 2 + pair_W
                    tl.store(out + row_N[None, :, None] * pairs + pair, codes, mask=is_tile_N & (pair < pairs))
            else:
                tl.store(out + start + place, codes, mask=is_there)
            if FMT.scale is not None:
                block_G = tl.arange(0, A * W // BLOCK)[:, None]
                scale_codes = _scale_codes(block_scales, FMT)
                is_read_N = tl.reshape(is_read_N, (1, N))
                if EVEN:
                    scale_place = (first + tile_N)[None, :] * (A * W // BLOCK) + block_G
                    tl.store(scales + scale_place, scale_codes, mask=is_read_N)
                else:
                    blocks = (columns + BLOCK - 1) // BLOCK
                    block = column_N[None, :] // BLOCK + block_G
                    tl.store(scales + row_N[None, :] * blocks + block, scale_codes, mask=is_read_N & (block < blocks))


@triton.jit(do_not_specialize=["seed", "hadamard_seed"])
def _rows_kernel(
    x,
    out,
    scales,
    amax,
    tensor_scale,
    seed,
    seed_pointer,
    hadamard_seed,
    hadamard_seed_pointer,
    expert_offsets,
    rows,
    columns,
    down,
    across,
    WHAT: tl.constexpr,
    FMT: tl.constexpr,
    HADAMARD: tl.constexpr,
    ROUNDING: tl.constexpr,
    BLOCK: tl.constexpr,
    SQUARE: tl.constexpr,
    EVEN: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    VECTOR: tl.constexpr,
    L: tl.constexpr,
    C: tl.constexpr,
):
    """Blocks of consecutive elements of a column, or square ones; EVEN if the rows are whole tiles."""
    _store_tensor_scale(tensor_scale, amax, FMT)
    program = tl.program_id(0)
    tile = program // across % down
    matrix = (program // (across * down)).to(tl.int64)
    first = tile * L
    # Rows up to `end` are read, rows up to `written` get a result.
    end = rows
    written = rows
    scale_first = tile * (L // BLOCK)
    if E > 0:
        if SQUARE:
            end = tl.load(expert_offsets + E).to(tl.int32)
        else:
            first, end, written, scale_first = _expert_tile(expert_offsets, tile, rows, E, EXPERTS, BLOCK, L)
    if first >= written:
        return
    row_L = first + tl.arange(0, L)
    # So narrow that a thread has all rows of its columns, and not too many of these.
    column_C = tl.max_contiguous(program % across * C + tl.arange(0, C), VECTOR)
    is_column_C = (column_C < columns)[None, :]
    start = (matrix * rows + first) * columns
    place = tl.arange(0, L)[:, None] * columns + column_C[None, :]
    is_there = is_column_C if EVEN else is_column_C & (row_L < written)[:, None]
    is_read = is_column_C if EVEN else is_column_C & (row_L < end)[:, None]

    values = tl.reshape(tl.load(x + start + place, mask=is_read, other=0.0).to(tl.float32), (L, C, 1))
    if HADAMARD > 1:
        sign_bits = _sign_bits(
            tl.arange(0, L)[:, None, None] % HADAMARD, _key(hadamard_seed, hadamard_seed_pointer), HADAMARD
        )
        if EVEN:
            values = _transform_tiles(values, sign_bits, L, HADAMARD, True, L, C, 1)
        else:
            if first + L <= end:
                values = _transform_tiles(values, sign_bits, L, HADAMARD, True, L, C, 1)
            else:
                values = _transform_tiles(values, sign_bits, end - first, HADAMARD, False, L, C, 1)
                # A flipped sign makes −0 of the zeros in rows that are not there.
                values = tl.where((row_L < end)[:, None, None], values, 0.0)
    if WHAT == "amax":
        _store_amax(values, out)
    else:
        dither = 0.0
        if ROUNDING == "stochastic":
            groups = (columns + GROUP - 1) // GROUP
            group = program % across * (C // GROUP) + tl.arange(0, C // GROUP)
            counter = (matrix * rows + first) * groups + (tl.arange(0, L)[:, None] * groups + group[None, :])
            dither = tl.reshape(_dither(counter[:, :, None], _key(seed, seed_pointer)), (L, C, 1))
        magnitudes, sign_bits, element_scales, block_scales = _quantize_tiles(
            values, dither, amax, FMT, ROUNDING, BLOCK, SQUARE, L, C, 1
        )
        if WHAT == "values":
            values = tl.reshape(_flip(magnitudes, sign_bits) * element_scales, (L, C))
            tl.store(out + start + place, values.to(out.dtype.element_ty), mask=is_there)
        else:
            codes = _element_codes(magnitudes, sign_bits, element_scales, FMT)
            if FMT.element.bits == 4:
                low, high = tl.split(tl.reshape(codes, (L, C // 2, 2)))
                pairs = (columns + 1) // 2
                pair_C = program % across * (C // 2) + tl.arange(0, C // 2)
                pair_place = (matrix * rows + row_L)[:, None] * pairs + pair_C[None, :]
                is_pair = (pair_C < pairs)[None, :] & (row_L < written)[:, None]
                tl.store(out + pair_place, low | (high << 4), mask=is_pair)
            else:
                tl.store(out + start + place, tl.reshape(codes, (L, C)), mask=is_there)
            if FMT.scale is not None:
                scale_codes = _scale_codes(block_scales, FMT)
                block_G = tl.arange(0, L // BLOCK)
                is_block_G = (first + block_G * BLOCK < end)[:, None]
                if SQUARE:
                    blocks_down, blocks_across = down, (columns + BLOCK - 1) // BLOCK
                    scale_column = column_C // BLOCK
                    is_block = is_block_G & is_column_C & (column_C % BLOCK == 0)[None, :]
                else:
                    blocks_down, blocks_across = (rows + BLOCK - 1) // BLOCK, columns
                    scale_column = column_C
                    is_block = is_block_G & is_column_C
                scale_row = (matrix * blocks_down + scale_first + block_G)[:, None]
                tl.store(scales + scale_row * blocks_across + scale_column[None, :], scale_codes, mask=is_block)


@triton.jit
def _expert_tile(
    expert_offsets, tile, rows, E: tl.constexpr, EXPERTS: tl.constexpr, BLOCK: tl.constexpr, L: tl.constexpr
):
    """First row of a tile, where its expert's rows end, up to where it writes, and its first place among the scales.

    The tiles of an expert start at ⌊offset / L⌋ + expert. Rows behind the last expert are one more, which reads none.
    """
    experts = tl.arange(0, EXPERTS)
    offsets = tl.load(expert_offsets + experts, mask=experts <= E, other=0).to(tl.int32)
    starts = offsets // L + experts
    expert = tl.sum(((starts <= tile) & (experts <= E)).to(tl.int32), 0) - 1
    offset = tl.load(expert_offsets + expert).to(tl.int32)
    first = offset + (tile - (offset // L + expert)) * L
    next_offset = tl.load(expert_offsets + expert + 1, mask=expert < E, other=0).to(tl.int32)
    end = tl.where(expert < E, next_offset, first)
    written = tl.where(expert < E, next_offset, rows)
    return first, end, written, offset // BLOCK + expert + (first - offset) // BLOCK


@triton.jit
def _amax_kernel(x, amax, last_offset, numel, columns, BLOCK: tl.constexpr):
    """The largest magnitude of consecutive elements, of the rows before the last offset if there is one."""
    end = numel if last_offset is None else tl.load(last_offset).to(tl.int64) * columns
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, end, tl.num_programs(0) * BLOCK):
        place = start + tl.arange(0, BLOCK)
        values = tl.load(x + place, mask=place < end, other=0.0).to(tl.float32)
        largest = tl.maximum(largest, values.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    tl.atomic_max(amax, tl.max(largest, 0), sem="relaxed")


@triton.jit
def _dequantize_kernel(
    codes,
    out,
    scales,
    expert_offsets,
    rows,
    columns,
    code_columns,
    FMT: tl.constexpr,
    DOWN: tl.constexpr,
    ACROSS: tl.constexpr,
    BLOCK: tl.constexpr,
    E: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    ELEMENT: tl.constexpr = FMT.element
    BITS: tl.constexpr = FMT.element.bits
    across = (columns + BLOCK_C - 1) // BLOCK_C
    line = tl.program_id(0) // across
    row = line % rows
    matrix = (line // rows).to(tl.int64)
    column_C = tl.program_id(0) % across * BLOCK_C + tl.arange(0, BLOCK_C)
    is_column_C = column_C < columns
    code_column_C = column_C // 2 if BITS == 4 else column_C
    code = tl.load(codes + line.to(tl.int64) * code_columns + code_column_C, mask=is_column_C, other=0).to(tl.int32)
    if BITS == 4:
        code = (code >> ((column_C % 2) * 4)) & 0xF
    values = _numbers(code & ((1 << (BITS - 1)) - 1), ELEMENT)
    values = _flip(values, (code >> (BITS - 1)) << 31)
    if FMT.scale is not None:
        scale_row = row // BLOCK if DOWN else row
        scale_rows = (rows + BLOCK - 1) // BLOCK if DOWN else rows
        is_scaled_C = is_column_C
        if E > 0:
            is_scaled_C = column_C < tl.where(row < tl.load(expert_offsets + E), columns, 0)
            if DOWN and not ACROSS:
                experts = tl.arange(0, EXPERTS)
                offsets = tl.load(expert_offsets + experts, mask=experts < E, other=2147483647)
                expert = tl.sum((offsets <= row).to(tl.int32), 0) - 1
                offset = tl.load(expert_offsets + expert).to(tl.int32)
                scale_row = offset // BLOCK + expert + (row - offset) // BLOCK
        scale_columns = (columns + BLOCK - 1) // BLOCK if ACROSS else columns
        scale_column_C = column_C // BLOCK if ACROSS else column_C
        scale_place = (matrix * scale_rows + scale_row) * scale_columns + scale_column_C
        scale_code = tl.load(scales + scale_place, mask=is_scaled_C, other=0).to(tl.int32)
        values = values * _scale_numbers(scale_code, FMT)
    tl.store(out + line.to(tl.int64) * columns + column_C, values.to(out.dtype.element_ty), mask=is_column_C)
