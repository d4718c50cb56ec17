"""Microscaling against tables, its own definition and independent implementations.

Shapes: R rows, C columns, M blocks of B elements.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import microscaling_reference as reference
import numpy as np
import pytest
import torch
from torch import Tensor

from moetrain.kernels import microscaling_twin as twin
from moetrain.kernels.microscaling import (
    ELEMENTS,
    PRESETS,
    SCALES,
    Axis,
    Format,
    Rounding,
    decode_scales,
    dequantize,
    expand_scales,
    fake_quantize,
    hadamard_transform,
    quantize,
    scale_shape,
    tensor_amax,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

OTHERS = 15 if DEVICE == "cuda" else 3
"""Elements of a block beside its largest; the kernels take blocks of 8 and more."""

EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)

FORMATS = [
    "mxfp4",
    "e2m1:e8m0:32:even",
    "e2m1:e8m0:32:rceil",
    "e2m1:e8m0:32:ceil",
    "nvfp4",
    "e2m1:e4m3:16:nearest",
    "ue5m3",
    "e2m1:ue5m3_61440:16:nearest",
    "e3m0:e8m0:16:even",
    "e1m2:e8m0:32:even",
    "e1m2:e4m3:16:nearest:tensor",
    "mxfp6_e2m3",
    "e3m2:e8m0:32:rceil",
    "mxfp8_e4m3",
    "e5m2:e8m0:32:ceil",
    "e5m2:e8m0:32:floor:tensor",
]


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit, except that all NaNs are one."""
    if a.is_floating_point():
        return bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def unpacked(codes: Tensor, fmt: Format, columns: int) -> Tensor:
    if fmt.element.bits != 4:
        return codes
    return torch.stack([codes % 16, codes // 16], -1).flatten(-2)[..., :columns]


def blocks_with(largest_M: Tensor, others_MB: Tensor) -> Tensor:
    """Blocks [M, B + 1] with these largest magnitudes: of the others smaller ones stay, larger ones are reduced."""
    largest_M1 = largest_M[:, None]
    fractions_MB = torch.arange(others_MB.numel()).view(others_MB.shape) * 37 % 256 / 256 * largest_M1.float()
    others_MB = torch.where(others_MB.abs() <= largest_M1.abs(), others_MB, fractions_MB.bfloat16())
    return torch.cat([others_MB, largest_M1], 1)


def of_every_scale(step: int = 1) -> Tensor:
    """Every `step`-th bfloat16 number as the largest of a block."""
    largest_M = EVERY_BFLOAT16[::step]
    return blocks_with(largest_M, largest_M.repeat(OTHERS).view(-1, OTHERS).roll(12345))


def of_every_element(fmt: Format, step: int = 1) -> Tensor:
    """Every `step`-th bfloat16 number as an element, under scales at both ends and in the middle of their range."""
    assert fmt.scale is not None
    exponents = [-14, -9, -3, 0, 8] if fmt.scale.mantissa_bits else [-133, -127, -124, 0, 61, 127]
    others_MB = EVERY_BFLOAT16[::step][: 65536 // step // OTHERS * OTHERS].view(-1, OTHERS)
    limits = [fmt.element.largest * 2.0**e * m for e in exponents[:-1] for m in (1.0, 1.0625)] + [2.0 ** exponents[-1]]
    return torch.cat([blocks_with(torch.full((len(others_MB),), limit).bfloat16(), others_MB) for limit in limits])


# Every bit pattern ---------------------------------------------------------------------------------------------------


def check_against_tables(blocks_MB: Tensor, fmt: Format, rounding: Rounding, tensor_scale: float = 4.0) -> None:
    assert fmt.scale is not None
    fmt = replace(fmt, block=blocks_MB.shape[1])
    amax = float(np.float32(tensor_scale * fmt.largest)) if fmt.tensor_scale else None
    names = fmt.element.name, fmt.scale.name, fmt.scale_rounding
    codes, scales, values = reference.quantize(blocks_MB.double().numpy(), *names, rounding, amax)
    blocks_MB = blocks_MB.to(DEVICE)
    held = None if amax is None else torch.tensor(amax, device=DEVICE)
    result = quantize(blocks_MB, fmt, rounding=rounding, amax=held)
    assert result.scales is not None
    assert np.array_equal(result.scales.flatten().cpu().numpy(), scales)
    assert np.array_equal(unpacked(result.codes, fmt, fmt.block).cpu().numpy(), codes)
    expected = torch.from_numpy(values).bfloat16()
    assert same(fake_quantize(blocks_MB, fmt, rounding=rounding, amax=held)[0].cpu(), expected)
    assert same(dequantize(result.codes, result.scales, fmt).cpu(), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_codes_scales_and_values_are_those_of_the_tables(name: str) -> None:
    """Of every bfloat16 number for the presets, else of each 16th."""
    fmt = Format.parse(name)
    step = 1 if name in PRESETS else 16
    check_against_tables(of_every_scale(step), fmt, "nearest")
    check_against_tables(of_every_element(fmt, step), fmt, "nearest")
    check_against_tables(of_every_scale(32), fmt, "zero")
    if fmt.tensor_scale:
        # Not a power of two: then the order of operations matters.
        for tensor_scale in (0.0137, 0.3, 2.9e-5):
            check_against_tables(of_every_scale(8), fmt, "nearest", tensor_scale)


def test_numbers_and_casts_are_those_of_ml_dtypes() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes")
    dtypes = {
        "e2m1": ml_dtypes.float4_e2m1fn,
        "e2m3": ml_dtypes.float6_e2m3fn,
        "e3m2": ml_dtypes.float6_e3m2fn,
        "e4m3": ml_dtypes.float8_e4m3fn,
        "e5m2": ml_dtypes.float8_e5m2,
    }
    for name, dtype in dtypes.items():
        element = ELEMENTS[name]
        theirs = np.arange(2**element.bits, dtype=np.uint8).view(dtype).astype(np.float64)
        theirs[~np.isfinite(theirs)] = np.nan
        assert same(element.values(), torch.from_numpy(theirs)), name
        # Beyond the largest number they give infinity or NaN where the format has one.
        x = EVERY_BFLOAT16[EVERY_BFLOAT16.abs() <= element.largest]
        codes = torch.from_numpy(x.float().numpy().astype(dtype).view(np.uint8).copy())
        assert torch.equal(twin.element_codes(twin.round_elements(x.float(), element, "nearest", None), element), codes)
    for name, dtype in (("e8m0", ml_dtypes.float8_e8m0fnu), ("e4m3", ml_dtypes.float8_e4m3fn)):
        codes = np.arange(256 if name == "e8m0" else 128, dtype=np.uint8)
        numbers = torch.from_numpy(codes.view(dtype).astype(np.float64))
        assert same(SCALES[name].values()[: len(codes)], numbers), name


# Against other implementations (pip install torchao) -----------------------------------------------------------------


@pytest.mark.parametrize("rounding", ["floor", "even", "rceil", "ceil"])
def test_mx_is_torchaos(rounding: str) -> None:
    """Except for what docs/fp4.md says: blocks that are not finite, and blocks of the smallest scale."""
    mx_tensor = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    mode = mx_tensor.ScaleCalculationMode[rounding.upper()]
    dtypes = {
        "e2m1": torch.float4_e2m1fn_x2,
        "e2m3": "fp6_e2m3",
        "e3m2": "fp6_e3m2",
        "e4m3": torch.float8_e4m3fn,
        "e5m2": torch.float8_e5m2,
    }
    x = blocks_with(EVERY_BFLOAT16[::9], torch.randn(len(EVERY_BFLOAT16[::9]), 31).bfloat16())
    for name, dtype in dtypes.items():
        result = quantize(x, Format(ELEMENTS[name], SCALES["e8m0"], 32, rounding))  # type: ignore[arg-type]
        assert result.scales is not None
        scales, codes = (tensor.view(torch.uint8) for tensor in mx_tensor.to_mx(x, dtype, 32, mode))
        is_finite = x.isfinite().all(1)
        assert torch.equal(result.scales[is_finite], scales[is_finite])
        # torchao divides by 2⁻¹²⁶ (1 by "rceil") where it stores 2⁻¹²⁷.
        is_same = is_finite & (result.scales[:, 0] > 0)
        assert torch.equal(result.codes[is_same], codes[is_same])
        # A NaN makes a NaN of the scale there too; an infinity is given a finite scale there.
        is_nan = x.isnan().any(1)
        assert (scales[is_nan] == 255).all()
        assert (result.scales[~is_finite] == 255).all()


@pytest.mark.parametrize("amax", [2688.0, 2.625, 3.7, 0.0123])
def test_nvfp4_is_torchaos(amax: float) -> None:
    """Except where torchao's scale is clamped to E4M3's smallest normal number: docs/fp4.md."""
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = (torch.randn(2048, 64) * torch.exp(torch.randn(2048, 1)) * amax / 20).bfloat16()
    result = quantize(x, PRESETS["nvfp4"], amax=torch.tensor(amax))
    assert result.scales is not None
    assert result.tensor_scale is not None
    tensor_scale = nvfp4.per_tensor_amax_to_scale(torch.tensor(amax))
    assert result.tensor_scale.item() == pytest.approx(tensor_scale.item(), rel=2.0**-23)
    scales, codes = nvfp4.nvfp4_quantize(x, 16, tensor_scale)
    is_same = scales.float() > 2.0**-6
    assert is_same.float().mean() > 0.5
    assert torch.equal(result.scales[is_same], scales.view(torch.uint8)[is_same])
    of_blocks = [unpacked(c, PRESETS["nvfp4"], 64).view(-1, 4, 16)[is_same] for c in (result.codes, codes)]
    # They multiply by (1 / s) / scale, we by 1 / (scale · s): another float32 rounding, which shows only where an
    # element lies that near to the middle between two numbers.
    assert (of_blocks[0] != of_blocks[1]).float().mean() < 1e-5


# Behaviour -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "ue5m3", "mxfp8_e4m3", "e2m1:none:16:nearest:tensor"])
def test_what_is_not_finite_shows_and_zeros_stay(name: str) -> None:
    fmt = Format.parse(name)
    x = torch.randn(4, 64, device=DEVICE).bfloat16()
    x[0, :32] = 0.0
    x[0, 3] = -0.0
    x[1, 5], x[2, 40] = torch.inf, torch.nan
    for part in (x, x[:2], x[2:]):  # both, an infinity, a NaN
        values, tensor_scale = fake_quantize(part, fmt)
        if fmt.tensor_scale:
            assert values.isnan().all()
            assert tensor_scale is not None
            assert tensor_scale.isnan()
    values, _ = fake_quantize(x, fmt, amax=torch.tensor(4.0))
    is_bad = torch.zeros(4, 64, dtype=torch.bool, device=DEVICE)
    if fmt.scale is None:
        is_bad[1, 5] = is_bad[2, 40] = True
    else:
        is_bad[1, : fmt.block] = is_bad[2, 40 // fmt.block * fmt.block : (40 // fmt.block + 1) * fmt.block] = True
    assert torch.equal(values.isnan(), is_bad)
    assert (values[0, :32] == 0).all()
    assert torch.equal(values[0, :32].signbit(), x[0, :32].signbit())
    codes, scales, _ = quantize(x, fmt, amax=torch.tensor(4.0))
    assert same(dequantize(codes, scales, fmt), values) or fmt.scale is None


def test_blocks_whose_scale_is_too_small_for_the_format_become_zero() -> None:
    """NVFP4's scale of 2⁻¹¹ rounds to 0 (arXiv 2509.25149, equation 3), that of 2⁻⁹ is its smallest number."""
    x = torch.full((2, 16), 1.0, device=DEVICE)
    x[1] = -6 * 2.0**-11
    x[0] = 6 * 2.0**-9
    values, _ = fake_quantize(x, PRESETS["nvfp4"], amax=torch.tensor(2688.0))
    assert (values[0] == 6 * 2.0**-9).all()
    assert (values[1] == 0).all()
    assert values[1].signbit().all()


def test_subnormal_blocks_are_scaled_exactly() -> None:
    x = (torch.tensor([[6.0, 4.0, -3.0, 0.5]], device=DEVICE) * 2.0**-120 * 2.0**-7).bfloat16().repeat(1, 4)
    values, _ = fake_quantize(x, replace(PRESETS["mxfp4"], block=16))
    assert torch.equal(values, x)


def test_a_held_amax_saturates() -> None:
    x = torch.tensor([[100.0, -100.0, 1.0, 0.0] * 4], device=DEVICE)
    values, tensor_scale = fake_quantize(x, PRESETS["nvfp4"], amax=torch.tensor(10.0))
    assert tensor_scale is not None
    assert (values * tensor_scale)[0, :4].tolist() == pytest.approx([10.0, -10.0, 10 / 12, 0.0])


def test_the_tensor_scale_brings_the_largest_element_to_the_end_of_the_range() -> None:
    x = torch.randn(16, 64, device=DEVICE)
    for name in ("nvfp4", "ue5m3", "e2m1:none:16:nearest:tensor", "e2m1:e8m0:32:floor:tensor"):
        fmt = Format.parse(name)
        values, tensor_scale = fake_quantize(x, fmt)
        assert tensor_scale is not None
        assert values.abs().max() == fmt.largest
        assert (values * tensor_scale).abs().max().item() == pytest.approx(x.abs().max().item(), rel=1e-6)
        held, held_scale = fake_quantize(x, fmt, amax=tensor_amax(x))
        assert same(held, values)
        assert held_scale == tensor_scale


def test_shrinking_keeps_the_floor_rule_from_clipping() -> None:
    """Tseng et al.: elements up to 8 · 3/4 = 6; the tensor scale takes the 3/4 back."""
    x = torch.full((1, 32), 7.75, device=DEVICE)
    fmt = replace(PRESETS["mxfp4"], shrink=0.75)
    assert fake_quantize(x, PRESETS["mxfp4"])[0].max() == 6
    draws = []
    for seed in range(400):
        values, tensor_scale = fake_quantize(x, fmt, rounding="stochastic", seed=seed)
        assert tensor_scale is not None
        draws.append(values * tensor_scale)
    # 5.8125 becomes 4 or 6; of 12800 draws the mean has a standard error of 0.0078, and 8 random bits a bias of 0.004.
    assert torch.stack(draws).mean().item() == pytest.approx(7.75, abs=0.04)


# Layout --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4"])
@pytest.mark.parametrize("hadamard", [None, 64])
def test_blocks_along_rows_are_those_along_columns_of_the_transposed(name: str, hadamard: int | None) -> None:
    """Also where the last block and the last transform are partial."""
    x = torch.randn(3, 77, 40, device=DEVICE).bfloat16()
    fmt = Format.parse(name)
    values, scale = fake_quantize(x, fmt, axis=-2, hadamard=hadamard)
    expected, expected_scale = fake_quantize(x.mT, fmt, axis=-1, hadamard=hadamard)
    assert same(values, expected.mT)
    assert scale == expected_scale
    scales, expected_scales = (quantize(y, fmt, axis=a, hadamard=hadamard).scales for y, a in ((x, -2), (x.mT, -1)))
    assert scales is not None
    assert expected_scales is not None
    assert scales.shape == scale_shape(x.shape, fmt, -2) == (3, -(-77 // fmt.block), 40)
    assert torch.equal(scales, expected_scales.mT)


def test_a_partial_block_is_a_block_of_what_it_has() -> None:
    x = torch.randn(5, 70, device=DEVICE).bfloat16()
    values, _ = fake_quantize(x, PRESETS["mxfp4"])
    assert same(values[:, 64:], fake_quantize(x[:, 64:], PRESETS["mxfp4"])[0])


def test_square_tiles_have_one_scale_each() -> None:
    x = torch.randn(2, 40, 72, device=DEVICE).bfloat16()
    fmt = PRESETS["nvfp4"]
    amax = tensor_amax(x)
    codes, scales, _ = quantize(x, fmt, axis=(-2, -1), amax=amax)
    assert scales is not None
    assert scales.shape == (2, 3, 5)
    values, _ = fake_quantize(x, fmt, axis=(-2, -1), amax=amax)
    assert same(dequantize(codes, scales, fmt, axis=(-2, -1)), values)
    of_elements = expand_scales(decode_scales(scales, fmt), x.shape, fmt, (-2, -1))
    for rows in (slice(0, 16), slice(32, 40)):
        for columns in (slice(0, 16), slice(64, 72)):
            tile = x[1, rows, columns].reshape(1, -1)
            alone = replace(fmt, block=tile.numel())
            assert same(values[1, rows, columns].reshape(1, -1), fake_quantize(tile, alone, amax=amax)[0])
            assert (of_elements[1, rows, columns] == of_elements[1, rows.start, columns.start]).all()
    # Transposing neither moves a tile nor changes its scale: the reason for tiles on weights.
    assert same(fake_quantize(x.mT, fmt, axis=(-2, -1), amax=amax)[0], values.mT)


OFFSETS = [0, 5, 5, 37, 70, 71]
"""Of 6 experts in 80 rows, of which 9 are padding: one without rows, one with one row."""


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "e2m1:e8m0:64:floor"])
@pytest.mark.parametrize("hadamard", [None, 16, 32])
@pytest.mark.parametrize("rounding", ["nearest", "zero"])
def test_no_block_and_no_transform_straddles_two_experts(name: str, hadamard: int | None, rounding: Rounding) -> None:
    fmt = Format.parse(name)
    x = torch.randn(80, 24, device=DEVICE).bfloat16()
    x[71:] = torch.nan
    offsets = torch.tensor(OFFSETS, dtype=torch.int32, device=DEVICE)
    amax = tensor_amax(x, axis=-2, hadamard=hadamard, expert_offsets=offsets)
    assert amax.isfinite()
    values, _ = fake_quantize(x, fmt, axis=-2, hadamard=hadamard, rounding=rounding, expert_offsets=offsets)
    codes, scales, _ = quantize(x, fmt, axis=-2, hadamard=hadamard, rounding=rounding, expert_offsets=offsets)
    assert scales is not None
    assert scales.shape == scale_shape(x.shape, fmt, -2, num_experts=5)
    for expert, (start, end) in enumerate(pairwise(OFFSETS)):
        alone = {"axis": -2, "hadamard": hadamard, "rounding": rounding, "amax": amax}
        assert same(values[start:end], fake_quantize(x[start:end], fmt, **alone)[0])
        first, blocks = start // fmt.block + expert, -(-(end - start) // fmt.block)
        expected = quantize(x[start:end], fmt, **alone).scales
        assert expected is not None
        assert torch.equal(scales[first : first + blocks], expected)
    assert (values[71:] == 0).all()
    assert same(dequantize(codes, scales, fmt, axis=-2, expert_offsets=offsets), values)
    # Along columns, the padding alone matters.
    along_columns, _ = fake_quantize(x, PRESETS["nvfp4"], expert_offsets=offsets)
    assert same(along_columns[:71], fake_quantize(x[:71], PRESETS["nvfp4"])[0])
    assert (along_columns[71:] == 0).all()


# Stochastic rounding -------------------------------------------------------------------------------------------------

PLAIN = Format.parse("e2m1:none:16:nearest:tensor")
"""No blocks: with an amax of 6, elements are rounded as they are."""
SIX = torch.tensor(6.0)


def test_stochastic_rounding_is_unbiased_and_takes_a_neighbour() -> None:
    values = torch.cat([torch.linspace(0, 6, 97), -torch.linspace(0, 6, 97)])
    x = values.repeat(4096, 1).to(DEVICE)
    drawn, _ = fake_quantize(x, PLAIN, rounding="stochastic", seed=11, amax=SIX)
    down, _ = fake_quantize(x, PLAIN, rounding="zero", amax=SIX)
    grid = torch.tensor(reference.E2M1, device=DEVICE)
    up = grid[torch.searchsorted(grid, x.abs().contiguous())].copysign(x)
    assert ((drawn == down) | (drawn == up)).all()
    # 5 standard errors of each mean, and half a step of 1/256 that 8 random bits leave.
    step = (up - down).abs()[0]
    fraction = ((x - down).abs()[0] / step).nan_to_num(0)
    error = (drawn.double().mean(0) - values.to(DEVICE)).abs()
    assert (error <= step * (5 * (fraction * (1 - fraction) / 4096).sqrt() + 1 / 512)).all()
    on_the_grid = step == 0
    assert torch.equal(drawn[:, on_the_grid], x[:, on_the_grid])


def test_the_mean_of_draws_converges_at_one_over_the_square_root() -> None:
    """Root mean squares over 1024 elements of the error of means over n draws."""
    x = torch.rand(16, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(DEVICE) * 6
    total, errors = torch.zeros_like(x), {}
    for draw in range(1, 257):
        total += fake_quantize(x, PLAIN, rounding="stochastic", seed=draw, amax=SIX)[0]
        errors[draw] = (total / draw - x).square().mean().sqrt().item()
    for n in (16, 64, 256):
        assert errors[n] * math.sqrt(n) == pytest.approx(errors[1], rel=0.08)


def test_random_numbers_belong_to_places_and_seeds() -> None:
    x = torch.full((64, 64), 0.75, device=DEVICE)

    def drawn(x: Tensor, seed: int | Tensor, axis: Axis = -1, fmt: Format = PLAIN) -> Tensor:
        return fake_quantize(x, fmt, rounding="stochastic", seed=seed, axis=axis, amax=SIX)[0]

    first = drawn(x, 5)
    # Blocks, tiles and launches are cut differently.
    assert torch.equal(drawn(x, 5, axis=-2), first)
    assert torch.equal(drawn(x, 5, axis=(-2, -1)), first)
    assert torch.equal(drawn(x.view(4, 16, 64), 5, axis=-2).view(64, 64), first)
    assert torch.equal(drawn(x[:40], 5), first[:40])
    assert torch.equal(drawn(x, torch.tensor(5, device=DEVICE)), first)
    assert torch.equal(drawn(x, 5 + 2**32), first)
    # Bits of two seeds, of neighbours, and of a seed in two places agree half of the time: ±5 standard errors.
    for other in (drawn(x, 6), first.roll(1, 0), first.roll(1, 1), first.roll(8, 1), first.T):
        assert (other == first).float().mean().item() == pytest.approx(0.5, abs=5 * 0.5 / 64)


def test_random_numbers_are_philoxs() -> None:
    """Known answers of Random123 (kat_vectors, philox2x32 10)."""
    for counter, key, words in (
        ((0, 0), 0, (0xFF1DAE59, 0x6CD10DF2)),
        ((0xFFFFFFFF, 0xFFFFFFFF), 0xFFFFFFFF, (0x2C3F628B, 0xAB4FD7AD)),
        ((0x243F6A88, 0x85A308D3), 0x13198A2E, (0xDD7CE038, 0xF62A4C12)),
    ):
        low, high = twin.philox(torch.tensor(counter[0]), counter[1], torch.tensor(key))
        assert (low.item(), high.item()) == words


# Hadamard transforms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [16, 32, 64, 128])
def test_transforms_are_orthogonal_and_have_an_inverse(size: int) -> None:
    """Also a partial one: 13 elements are transformed as 8, 4 and 1."""
    for elements in (size, 2 * size + 13, 13):
        matrix = hadamard_transform(torch.eye(elements, dtype=torch.float64), size, seed=3)
        identity = torch.eye(elements, dtype=torch.float64)
        assert (matrix @ matrix.T - identity).abs().max() < 1e-14
        x = torch.randn(5, elements)
        there = hadamard_transform(x, size, seed=3)
        back = hadamard_transform(there, size, seed=3, inverse=True)
        # log2(size) additions each way, each of which is off by at most 2⁻²⁴ of its result.
        assert (back - x).norm() / x.norm() < 2 * math.log2(size) * 2.0**-24
        assert same(there.T, hadamard_transform(x.T, size, axis=-2, seed=3))
    full = hadamard_transform(torch.eye(size, dtype=torch.float64), size, seed=3) * math.sqrt(size)
    assert torch.allclose(full.abs(), torch.ones_like(full))
    # Row i is sign i times that of Sylvester's matrix.
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < size:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    signs = (full * sylvester).round()
    assert torch.equal(signs, signs[:, :1].expand_as(signs))
    assert 0.2 < (signs[:, 0] < 0).double().mean() < 0.8


def test_the_product_of_transformed_operands_is_that_of_the_operands() -> None:
    a, b = torch.randn(77, 24, dtype=torch.float64), torch.randn(77, 40, dtype=torch.float64)
    offsets = torch.tensor([*OFFSETS[:-1], 77])
    product = a.T @ b
    for seed in (0, torch.tensor(2**40 + 1)):
        pair = [hadamard_transform(x, 32, axis=-2, seed=seed, expert_offsets=offsets) for x in (a, b)]
        assert (pair[0].T @ pair[1] - product).norm() / product.norm() < 1e-14
    # Each expert's product on its own, too: nothing of another expert is mixed in.
    for start, end in pairwise(offsets.tolist()):
        of_expert = pair[0][start:end].T @ pair[1][start:end] - a[start:end].T @ b[start:end]
        assert of_expert.norm() < 1e-13


def test_a_transform_spreads_an_outlier_before_the_scale_is_chosen() -> None:
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    x[:, 5] = 40
    plain, _ = fake_quantize(x, PRESETS["mxfp4"])
    rotated, _ = fake_quantize(x, PRESETS["mxfp4"], hadamard=32, hadamard_seed=1)
    back = hadamard_transform(rotated, 32, seed=1, inverse=True)
    small = torch.arange(128) != 5
    assert (back - x)[:, small].norm() < 0.8 * (plain - x)[:, small].norm()
    assert not torch.equal(rotated, fake_quantize(x, PRESETS["mxfp4"], hadamard=32, hadamard_seed=2)[0])


# As an operator ------------------------------------------------------------------------------------------------------


def test_operators_describe_themselves_to_torch_compile() -> None:
    x = torch.randn(48, 40, device=DEVICE).bfloat16()
    seed = torch.tensor(3, device=DEVICE)
    offsets = torch.tensor([0, 7, 48], device=DEVICE, dtype=torch.int32)
    tests = ("test_schema", "test_faketensor")
    for fmt in (PRESETS["nvfp4"], PRESETS["mxfp6_e2m3"]):
        shared = (str(fmt), [-2], "stochastic", 0, seed, 16, 0, seed, offsets, None)
        torch.library.opcheck(
            torch.ops.moetrain.microscaling_fake_quantize, (x, *shared, torch.float32), test_utils=tests
        )
        torch.library.opcheck(torch.ops.moetrain.microscaling_quantize, (x, *shared), test_utils=tests)
        torch.library.opcheck(torch.ops.moetrain.microscaling_amax, (x, [-2], 16, 0, seed, offsets), test_utils=tests)
        codes, scales, _ = quantize(x, fmt, axis=-2, expert_offsets=offsets)
        given = (codes, scales, str(fmt), [-2], 40, offsets, torch.bfloat16)
        torch.library.opcheck(torch.ops.moetrain.microscaling_dequantize, given, test_utils=tests)

    def product(x: Tensor, seed: Tensor) -> Tensor:
        values, scale = fake_quantize(x, PRESETS["nvfp4"], rounding="stochastic", seed=seed, hadamard=16)
        assert scale is not None
        return (values.float() @ values.float().T) * scale * scale

    compiled = torch.compile(product, backend="aot_eager", fullgraph=True)
    for number in (3, 4):
        assert torch.equal(
            compiled(x, torch.tensor(number, device=DEVICE)), product(x, torch.tensor(number, device=DEVICE))
        )


def test_dtypes_and_empty_tensors() -> None:
    x = torch.randn(32, 32, device=DEVICE)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        values, _ = fake_quantize(x.to(dtype), PRESETS["nvfp4"])
        assert values.dtype == dtype
        assert same(values.float(), fake_quantize(x.to(dtype).float(), PRESETS["nvfp4"])[0])
    # Master weights in float32 become what bfloat16 holds exactly.
    values, _ = fake_quantize(x, PRESETS["nvfp4"], dtype=torch.bfloat16)
    assert values.dtype == torch.bfloat16
    assert torch.equal(values.float(), fake_quantize(x, PRESETS["nvfp4"])[0])
    # In float64 no intermediate is rounded to float32.
    exact, scale = fake_quantize(x.double(), PRESETS["nvfp4"])
    assert exact.dtype == torch.float64
    assert scale is not None
    assert scale.dtype == torch.float32
    for shape in ((0, 32), (4, 0)):
        nothing = torch.empty(shape, device=DEVICE)
        values, scale = fake_quantize(nothing, PRESETS["nvfp4"])
        assert values.shape == shape
        assert scale == 1
        codes, scales, _ = quantize(nothing, PRESETS["nvfp4"], axis=-2)
        assert dequantize(codes, scales, PRESETS["nvfp4"], axis=-2).shape == shape
        assert tensor_amax(nothing) == 0


def test_formats_are_read_as_they_are_written() -> None:
    for name in [*FORMATS, "e2m1:e8m0:32:floor:shrink=0.75"]:
        assert Format.parse(str(Format.parse(name))) == Format.parse(name)
    for text, message in {
        "fp4": "a preset",
        "e2m9:e8m0:32:floor": "elements are e2m1",
        "e2m1:e9m0:32:floor": "scales are e8m0",
        "e2m1:e8m0:x:floor": "block is a number",
        "e2m1:e8m0:0:floor": "block is 0",
        "e2m1:e8m0:32:nearest": "e8m0 takes floor",
        "e2m1:e4m3:16:floor": "the others nearest",
        "e2m1:e4m3:16:down": "there are nearest",
        "e2m1:none:16:nearest": "needs tensor_scale",
        "e2m1:e8m0:32:floor:tensors": "'tensors' is not an option",
        "e2m1:e8m0:32:floor:shrink=2": "shrink is 2.0",
    }.items():
        with pytest.raises(ValueError, match=message):
            Format.parse(text)


def test_what_does_not_fit_is_refused() -> None:
    x, fmt = torch.randn(32, 32), PRESETS["mxfp4"]
    for arguments, message in (
        ({"axis": 0}, "axis is 0"),
        ({"rounding": "up"}, "rounding 'up'"),
        ({"rounding": "stochastic"}, "needs a seed"),
        ({"hadamard": 24}, "hadamard is 24"),
        ({"hadamard": 16, "axis": (-2, -1)}, "square tiles take no"),
        ({"expert_offsets": torch.tensor([32])}, "expert_offsets"),
        ({"amax": torch.ones(2)}, "amax has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            fake_quantize(x, fmt, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="do not lie in one another"):
        fake_quantize(x, replace(fmt, block=24), hadamard=16)
    with pytest.raises(ValueError, match="must be floating point"):
        fake_quantize(x.int(), fmt)
    with pytest.raises(ValueError, match="needs rows and columns"):
        fake_quantize(x[0], fmt)
    codes, scales, _ = quantize(x, fmt)
    with pytest.raises(ValueError, match="scales have shape"):
        dequantize(codes, scales, fmt, axis=-2)
    with pytest.raises(ValueError, match="31 columns of 4 bits take 16 bytes, codes have 15"):
        dequantize(codes[:, :15], scales, fmt, columns=31)
