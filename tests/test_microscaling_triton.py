"""The microscaling kernels bit for bit against their twin, on the GPU or, without one, under Triton's interpreter.

And that they compile for Hopper, without a GPU too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.kernels import microscaling_triton as kernels
from moetrain.kernels import microscaling_twin as twin
from moetrain.kernels.microscaling import (
    PRESETS,
    Axis,
    Format,
    dequantize,
    fake_quantize,
    quantize,
    scale_shape,
    tensor_amax,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes with NumPy, which warns of what GPUs do silently.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")

FORMATS = [
    "mxfp4",
    "nvfp4",
    "mxfp6_e2m3",
    "e3m0:e8m0:16:even",
    "e1m2:e8m0:8:ceil:shrink=0.75",
    "e5m2:ue5m3:128:nearest",
]
OTHER_FORMATS = [
    "e2m1:e8m0:32:rceil:tensor:shrink=0.75",
    "e2m1:none:16:nearest:tensor",
    "e3m2:e4m3:64:nearest",
    "mxfp8_e4m3",
]
OFFSETS = [0, 5, 5, 28, 36, 37]
"""Of 5 experts: one without rows, one with one row; the rows behind are padding."""


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN, so that what a kernel should have written shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def same(a: Tensor, b: Tensor | None) -> bool:
    """Bit for bit, except that all NaNs are one."""
    if b is None:
        return a.numel() == 0
    a, b = a.cpu(), b.cpu()
    if a.is_floating_point():
        return a.dtype == b.dtype and bool((((a == b) & (a.signbit() == b.signbit())) | (a.isnan() & b.isnan())).all())
    return torch.equal(a, b)


def check(x: Tensor, fmt: Format, axis: Axis = -1, hadamard: int | None = None, **arguments: Any) -> None:
    """Values, codes, scales and the largest magnitude; the twin runs where tensors are on the CPU."""
    offsets, amax = arguments.get("expert_offsets"), arguments.get("amax")
    axes = (axis,) if isinstance(axis, int) else axis
    on_device = [None if tensor is None else tensor.to(DEVICE) for tensor in (offsets, amax)]
    seed = torch.tensor(9, device=DEVICE)
    shared: tuple[Any, ...] = (axes, arguments.get("rounding", "nearest"), (5, None), hadamard or 1, (0, seed))
    arguments = {"axis": axis, "hadamard": hadamard, "seed": 5, "hadamard_seed": 9, **arguments}

    values, scale = fake_quantize(x, fmt, **arguments)
    result, result_scale = kernels.fake_quantize(x.to(DEVICE), fmt, *shared, *on_device, x.dtype)
    assert same(result, values)
    assert same(result_scale, scale)

    codes, scales, _ = quantize(x, fmt, **arguments)
    experts = None if offsets is None else len(offsets) - 1
    shape = (0,) if fmt.scale is None else scale_shape(x.shape, fmt, axis, experts)
    result, result_scales, result_scale = kernels.quantize(x.to(DEVICE), fmt, *shared, *on_device, shape)
    assert same(result, codes)
    assert same(result_scales, scales)
    assert same(result_scale, scale)


def random(*shape: int, seed: object = 0) -> Tensor:
    """Of magnitudes from 1e−6 to 1e6."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr((shape, seed)).encode()))
    return (torch.randn(shape, generator=generator) * torch.exp(4 * torch.randn(shape, generator=generator))).bfloat16()


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("axis", [-1, -2, (-2, -1)])
def test_formats_and_roundings_are_the_twins(name: str, axis: Axis) -> None:
    """Sizes that are no multiple of a tile or a block."""
    for rounding in ("nearest", "stochastic", "zero"):
        check(random(37, 75, seed=name), Format.parse(name), axis, rounding=rounding)


@pytest.mark.parametrize("name", OTHER_FORMATS)
@pytest.mark.parametrize("axis", [-1, -2])
def test_whole_tiles_and_batches_are_the_twins(name: str, axis: Axis) -> None:
    check(random(2, 64, 64), Format.parse(name), axis, hadamard=64, rounding="stochastic")
    check(random(2, 64, 64), Format.parse(name), axis)


@pytest.mark.parametrize("size", [16, 32, 64, 128])
@pytest.mark.parametrize("axis", [-1, -2])
def test_transforms_are_the_twins(size: int, axis: Axis) -> None:
    """Larger and smaller than the block, partial and whole."""
    x = random(141, 24).mT if axis == -1 else random(141, 24)
    check(x, PRESETS["mxfp4" if size in (16, 64) else "nvfp4"], axis, hadamard=size)
    amax = tensor_amax(x, axis=axis, hadamard=size, hadamard_seed=9)
    assert same(kernels.tensor_amax(x.to(DEVICE), (axis,), size, (9, None), None), amax)


@pytest.mark.parametrize(
    ("name", "hadamard"), [("nvfp4", None), ("nvfp4", 16), ("e2m1:e8m0:64:floor", 16), ("mxfp4", 128)]
)
def test_experts_are_the_twins(name: str, hadamard: int | None) -> None:
    """Padding of NaN; offsets that leave no padding, and offsets without rows."""
    x, offsets = random(44, 24), torch.tensor(OFFSETS, dtype=torch.int32)
    x[37:] = torch.nan
    amax = tensor_amax(x, axis=-2, hadamard=hadamard, expert_offsets=offsets)
    assert same(kernels.tensor_amax(x.to(DEVICE), (-2,), hadamard or 1, (0, None), offsets.to(DEVICE)), amax)
    for axis in (-2,) if hadamard else (-1, -2, (-2, -1)):
        check(x, Format.parse(name), axis, hadamard, expert_offsets=offsets, amax=amax)
    check(x[:37], Format.parse(name), -2, expert_offsets=torch.tensor([0, *OFFSETS]))
    check(x, Format.parse(name), -2, hadamard, expert_offsets=torch.zeros(2, dtype=torch.int32))


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "e2m1:none:16:nearest:tensor", "e1m2:e8m0:8:even", "ue5m3"])
def test_every_bfloat16_number_is_the_twins(name: str) -> None:
    """Infinities, NaN and subnormal numbers too: as elements, and as the largest of a block; without a GPU each fourth.

    As float32, because Triton's interpreter casts subnormal bfloat16 numbers wrongly; bfloat16 too on a GPU.
    """
    fmt = Format.parse(name)
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    step = 4 if DEVICE == "cpu" else 1
    elements = numbers[numbers.abs() < 8].view(-1, fmt.block)[::step]
    largest = (numbers[:: step * fmt.block // 4, None] * (torch.arange(fmt.block) / fmt.block).flip(0)).bfloat16()
    for x in (elements, largest):
        for dtype in (torch.float32,) if DEVICE == "cpu" else (torch.float32, torch.bfloat16):
            check(x.to(dtype), fmt, amax=torch.tensor(3.0))


@pytest.mark.parametrize("amax", [0.0, 1e-38, 1e-45, 3.0, 1e38, torch.inf, torch.nan])
def test_extreme_tensor_scales_are_the_twins(amax: float) -> None:
    for name in ("nvfp4", "ue5m3", "e2m1:e8m0:32:floor:tensor", "e2m1:none:16:nearest:tensor"):
        check(random(8, 32), Format.parse(name), amax=torch.tensor(amax))


@pytest.mark.parametrize("name", ["nvfp4", "mxfp8_e4m3", "e3m2:e8m0:16:even", "e2m1:none:16:nearest:tensor"])
def test_dequantizing_is_the_twins(name: str) -> None:
    """Odd columns, all axes, experts."""
    fmt, x = Format.parse(name), random(13, 45)
    x[3, 4] = torch.nan
    for axis in (-1, -2, (-2, -1)):
        for offsets in (None, torch.tensor([0, 3, 3, 11])):
            amax = torch.tensor(4.0)
            codes, scales, _ = quantize(x, fmt, axis=axis, expert_offsets=offsets, amax=amax)
            values = dequantize(codes, scales, fmt, axis=axis, columns=45, expert_offsets=offsets)
            on_device = (None if tensor is None else tensor.to(DEVICE) for tensor in (codes, scales, offsets))
            codes, scales, offsets = on_device  # type: ignore[assignment]
            axes = (axis,) if isinstance(axis, int) else axis
            assert same(kernels.dequantize(codes, scales, fmt, axes, 45, offsets, torch.bfloat16), values)


def test_what_is_not_transformed_has_the_twins_largest_magnitude() -> None:
    x = random(300, 77)
    x[299] = torch.nan
    for offsets in (None, torch.tensor([0, 299]), torch.tensor([0, 0])):
        amax = tensor_amax(x, expert_offsets=offsets)
        on_device = None if offsets is None else offsets.to(DEVICE)
        assert same(kernels.tensor_amax(x.to(DEVICE), (-1,), 1, (0, None), on_device), amax)


def test_dtypes_are_the_twins() -> None:
    x = random(33, 48)
    check(x.half(), PRESETS["nvfp4"])
    check(x.float(), PRESETS["mxfp4"], -2)
    values, _ = kernels.fake_quantize(
        x.float().to(DEVICE), PRESETS["mxfp4"], (-1,), "nearest", (0, None), 1, (0, None), None, None, torch.bfloat16
    )
    assert same(values, fake_quantize(x.float(), PRESETS["mxfp4"], dtype=torch.bfloat16)[0])


def test_what_the_kernels_do_not_take_is_left_to_the_twin() -> None:
    x = torch.empty(4, 4)
    assert kernels.supports(x, PRESETS["mxfp4"])
    assert not kernels.supports(x.double(), PRESETS["mxfp4"])
    assert not kernels.supports(x, Format.parse("e2m1:e8m0:24:floor"))
    assert not kernels.supports(x, Format.parse("e2m1:e8m0:256:floor"))


# Compiled for Hopper -------------------------------------------------------------------------------------------------

COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from moetrain.kernels import microscaling_triton as kernels
from moetrain.kernels.microscaling_formats import PRESETS

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = get_current_stream = staticmethod(lambda *_: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))

driver.set_active(Hopper())
launch = JITFunction.run
compiled = []
JITFunction.run = lambda self, *args, warmup, **kwargs: compiled.append(launch(self, *args, warmup=True, **kwargs))

x, amax, offsets = torch.empty(64, 4096, dtype=torch.bfloat16), torch.ones(()), torch.tensor([0, 64], dtype=torch.int32)
for axis, rounding, hadamard in (((-1,), "nearest", 1), ((-1,), "stochastic", 16), ((-2,), "stochastic", 1)):
    seeds = (0, None), hadamard, (0, None)
    kernels.fake_quantize(x, PRESETS["nvfp4"], axis, rounding, *seeds, None, amax, torch.bfloat16)
shared = ("zero", (0, None), 16, (0, None), offsets, None)
kernels.fake_quantize(x, PRESETS["nvfp4"], (-2,), *shared, torch.bfloat16)
codes, scales, _ = kernels.quantize(x, PRESETS["mxfp4"], (-1,), *shared, (64, 128))
kernels.dequantize(codes, scales, PRESETS["mxfp4"], (-1,), 4096, offsets, torch.bfloat16)

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for kernel in compiled:
    # Contracted operations or flushed subnormal numbers would not give the twin's bits.
    assert not re.search(r"fma\\.|\\.ftz", kernel.asm["ptx"]), kernel.name
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(kernel.asm["cubin"])
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True)
    stack = int(re.search(r"STACK:(\\d+)", usage.stdout + usage.stderr)[1])
    assert stack == 0, (kernel.name, usage.stdout)
print(len(compiled), "kernels")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="triton compiles for NVIDIA GPUs there")
def test_the_kernels_compile_for_hopper_and_spill_nothing(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_DEFAULT_FP_FUSION": "1"}
    ended = subprocess.run(
        [sys.executable, "-W", "error", "-c", COMPILE], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith(" kernels\n")


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [-1, -2, (-2, -1)])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("hadamard", [1, 16, 128])
def test_large_tensors_are_the_twins(axis: Axis, rounding: str, hadamard: int) -> None:
    """The twin on the GPU, whose operations round as the CPU's do."""
    axes = (axis,) if isinstance(axis, int) else axis
    if len(axes) == 2 and hadamard > 1:
        pytest.skip("tiles take no transform")
    x = (
        torch.randn(4096, 2048, device="cuda").bfloat16()
        * torch.exp(2 * torch.randn(4096, 1, device="cuda")).bfloat16()
    )
    offsets = torch.tensor([0, 100, 100, 1999, 4000], device="cuda", dtype=torch.int32)
    seed = torch.tensor(77, device="cuda")
    for fmt in (PRESETS["mxfp4"], PRESETS["nvfp4"]):
        for experts in (None, offsets):
            shared = (fmt, axes, rounding)
            values, scale = kernels.fake_quantize(
                x, *shared, (0, seed), hadamard, (0, seed), experts, None, torch.bfloat16
            )
            elements, scales, _, encode = twin.quantize(x, *shared, twin.Transform(hadamard, seed), seed, experts, None)
            assert scales is not None
            assert same(values, (elements * scales).bfloat16())
            assert encode is None or scale == 1 / encode
