"""``moetrain bench microscaling``: quantisers of one tensor, beside a copy of it and other implementations.

Shapes: R rows, C columns, E experts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moetrain.benchmarks.report import Report, say, table
from moetrain.benchmarks.timing import Call, Deadline, time_interleaved
from moetrain.errors import ConfigError
from moetrain.kernels import microscaling_twin as twin
from moetrain.kernels.microscaling import (
    PRESETS,
    Axis,
    Format,
    dequantize,
    fake_quantize,
    quantize,
    tensor_amax,
)

SHAPES = ("16384,4096",)
EXPERTS = 64
COPY = "copy"


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    shapes: Sequence[str] | None = None
    peers: Sequence[str] | None = None
    """None: those that are installed."""
    rounds: int = 5
    budget_seconds: float | None = None
    json: str | None = None


@dataclass(frozen=True)
class Case:
    """One call of ours, what it moves, and what it must give."""

    name: str
    call: Callable[[], Tensor]
    moved_bytes: float
    """Every operand read and written once."""
    expected: Callable[[], Tensor]


def microscaling_command(options: Options) -> int:
    """Run the benchmark; 1 if a result was not the twin's, else 0. Raises ConfigError for a bad option."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and options.shapes is None:
        raise ConfigError("the default shape needs a GPU and there is none: give a small one, as in --shapes 64,128")
    shapes = [parse_shape(text) for text in options.shapes or SHAPES]
    peers = _peers(options.peers, device)
    deadline = Deadline(options.budget_seconds)
    report = Report("microscaling", device, options.json)
    machine = report.contents["machine"]
    say(f"{machine['gpu'] or 'CPU'}, {', '.join(f'{name} {v}' for name, v in machine['versions'].items())}")
    for rows, columns in shapes:
        if deadline.passed:
            say(f"\n--budget-seconds is spent: {rows},{columns} and what follows was not measured")
            break
        say(f"\nR,C = {rows},{columns}")
        _bench(rows, columns, peers, options.rounds, device, deadline, report)
    return int(any(row["status"] == "WRONG" for row in report.contents["rows"]))


def parse_shape(text: str) -> tuple[int, int]:
    """Rows and columns from `R,C`. Raises ConfigError."""
    words = text.split(",")
    if len(words) != 2 or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--shapes {text}: expected two positive numbers R,C, as in 16384,4096")
    if int(words[1]) % 32:
        raise ConfigError(f"--shapes {text}: C must be a multiple of 32, the largest block")
    return int(words[0]), int(words[1])


# ---------------------------------------------------------------------------------------------------------------------
# Ours


def _cases(x_RC: Tensor) -> list[Case]:
    """The quantisers that a training step needs: amax is held except where it is said to be found."""
    numel, device = x_RC.numel(), x_RC.device
    seed = torch.tensor(1, device=device)
    offsets = _uneven_offsets(len(x_RC), device)
    held = tensor_amax(x_RC)

    def fake(name: str, fmt: Format, axis: Axis = -1, *, finds_amax: bool = False, **arguments: Any) -> Case:
        if fmt.tensor_scale and not finds_amax:
            arguments["amax"] = held
        transform = twin.Transform(arguments.get("hadamard") or 1, arguments.get("hadamard_seed", seed))

        def expected() -> Tensor:
            axes = (axis,) if isinstance(axis, int) else axis
            rounding, experts = arguments.get("rounding", "nearest"), arguments.get("expert_offsets")
            amax = arguments.get("amax")
            elements, scales, _, _ = twin.quantize(x_RC, fmt, axes, rounding, transform, seed, experts, amax)
            assert scales is not None
            return (elements * scales).to(x_RC.dtype)

        def call() -> Tensor:
            return fake_quantize(x_RC, fmt, axis=axis, **arguments)[0]

        return Case(name, call, (6 if finds_amax and fmt.tensor_scale else 4) * numel, expected)

    nvfp4, mxfp4 = PRESETS["nvfp4"], PRESETS["mxfp4"]
    stochastic: dict[str, Any] = {"rounding": "stochastic", "seed": seed}
    rotated: dict[str, Any] = {"hadamard": 16, "hadamard_seed": seed}
    cases = [
        fake("nvfp4 nearest", nvfp4),
        fake("nvfp4 Hadamard-16", nvfp4, **rotated),
        fake("nvfp4 stochastic", nvfp4, **stochastic),
        fake("nvfp4 Hadamard-16 stochastic", nvfp4, **rotated, **stochastic),
        fake("nvfp4 nearest, finding amax", nvfp4, finds_amax=True),
        fake("nvfp4 Hadamard-16, finding amax", nvfp4, finds_amax=True, **rotated),
        fake("nvfp4 rows nearest", nvfp4, -2),
        fake("nvfp4 rows Hadamard-16", nvfp4, -2, **rotated),
        fake("nvfp4 rows stochastic", nvfp4, -2, **stochastic),
        fake("nvfp4 rows Hadamard-16 stochastic, experts", nvfp4, -2, expert_offsets=offsets, **rotated, **stochastic),
        fake("nvfp4 16×16 tiles nearest", nvfp4, (-2, -1)),
        fake("mxfp4 nearest", mxfp4),
        fake("mxfp4 Hadamard-64 stochastic", mxfp4, hadamard=64, hadamard_seed=seed, **stochastic),
        fake("mxfp4 rows nearest", mxfp4, -2),
        fake("mxfp8_e4m3 nearest", PRESETS["mxfp8_e4m3"]),
    ]
    packed = quantize(x_RC, nvfp4, amax=held)
    packed_bytes = numel * (0.5 + 1 / 16)
    cases += [
        Case(
            "nvfp4 to codes",
            lambda: quantize(x_RC, nvfp4, amax=held).codes,
            2 * numel + packed_bytes,
            lambda: twin.pack(
                twin.element_codes(
                    twin.quantize(x_RC, nvfp4, (-1,), "nearest", twin.Transform(1, seed), seed, None, held)[0],
                    nvfp4.element,
                ),
                nvfp4.element,
            ),
        ),
        Case(
            "nvfp4 from codes",
            lambda: dequantize(packed.codes, packed.scales, nvfp4),
            packed_bytes + 2 * numel,
            lambda: fake_quantize(x_RC, nvfp4, amax=held)[0],
        ),
        Case("amax", lambda: tensor_amax(x_RC), 2 * numel, lambda: x_RC.abs().amax().float()),
    ]
    return cases


def _uneven_offsets(rows: int, device: torch.device) -> Tensor:
    """Of experts whose shares of the rows differ by a factor of ten and more."""
    shares_E = torch.rand(EXPERTS, generator=torch.Generator().manual_seed(0)) + 0.1
    ends_E = (shares_E.cumsum(0) / shares_E.sum() * rows).round().to(torch.int32)
    return torch.cat([ends_E.new_zeros(1), ends_E]).to(device)


# ---------------------------------------------------------------------------------------------------------------------
# Peers


def _torchao(device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    """torchao's conversions there and back; on a GPU as torch.compile makes them, which is their emulated path."""
    from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
    from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor

    def mxfp4(x_RC: Tensor) -> Tensor:
        scales, codes = to_mx(x_RC, torch.float4_e2m1fn_x2, 32)
        values: Tensor = to_dtype(codes, scales, torch.float4_e2m1fn_x2, 32, x_RC.dtype)
        return values

    def nvfp4(x_RC: Tensor, amax: Tensor) -> Tensor:
        values: Tensor = NVFP4Tensor.to_nvfp4(x_RC, per_tensor_scale=amax / 2688).dequantize(x_RC.dtype)
        return values

    calls = {"mxfp4": mxfp4, "nvfp4": lambda x_RC: nvfp4(x_RC, tensor_amax(x_RC))}
    if device.type == "cuda":
        return {f"torchao {name}, compiled": torch.compile(call) for name, call in calls.items()}
    return {f"torchao {name}": call for name, call in calls.items()}


PEERS = {"torchao": _torchao}


def _peers(asked: Sequence[str] | None, device: torch.device) -> dict[str, Callable[[Tensor], Tensor]]:
    calls: dict[str, Callable[[Tensor], Tensor]] = {}
    for name in PEERS if asked is None else asked:
        if name not in PEERS:
            raise ConfigError(f"--peers {name}: there are {', '.join(PEERS)}")
        try:
            calls |= PEERS[name](device)
        except Exception as error:  # packages for GPUs fail in their own ways where there is none
            if asked is not None:
                raise ConfigError(f"--peers {name}: cannot be imported ({error})") from None
            say(f"{name}: cannot be imported ({error})")
    return calls


# ---------------------------------------------------------------------------------------------------------------------


def _bench(
    rows: int,
    columns: int,
    peers: dict[str, Callable[[Tensor], Tensor]],
    rounds: int,
    device: torch.device,
    deadline: Deadline,
    report: Report,
) -> None:
    x_RC = torch.randn(rows, columns, device=device).to(torch.bfloat16)
    copied_RC = torch.empty_like(x_RC)
    results: dict[str, dict[str, Any]] = {COPY: {"status": "ok", "moved_bytes": 4 * x_RC.numel()}}
    calls: dict[str, Call] = {COPY: lambda: copied_RC.copy_(x_RC)}
    for case in _cases(x_RC):
        is_right = torch.equal(case.call(), case.expected())
        results[case.name] = {"status": "ok" if is_right else "WRONG", "moved_bytes": case.moved_bytes}
        if is_right:
            calls[case.name] = case.call
    for name, peer in peers.items():
        results[name] = {"status": "ok", "moved_bytes": 4 * x_RC.numel()}
        try:
            peer(x_RC)
        except Exception as error:  # a peer's failure is its result
            results[name]["status"] = f"not run: {type(error).__name__}: {str(error).splitlines()[0][:100]}"
        else:
            calls[name] = functools.partial(peer, x_RC)

    times = time_interleaved(calls, device, rounds=rounds, deadline=deadline)
    copy_rate = 4 * x_RC.numel() / times[COPY].median
    for name, result in results.items():
        row = {"shape": f"{rows},{columns}", "name": name, **result}
        if name in times:
            timing = times[name]
            row |= {
                "ms": timing.median,
                "ms_low": timing.low,
                "ms_high": timing.high,
                "host_ms": timing.host,
                "tb_per_s": result["moved_bytes"] / timing.median / 1e9,
                # The time of copying as many bytes by the time that was taken.
                "of_copy": result["moved_bytes"] / copy_rate / timing.median,
            }
        report.add(row)
    columns_of_table = {
        "": "name",
        "ms": "ms",
        "low": "ms_low",
        "high": "ms_high",
        "host ms": "host_ms",
        "TB/s": "tb_per_s",
        "of copy": "of_copy",
        "result": "status",
    }
    shown = [row for row in report.contents["rows"] if row["shape"] == f"{rows},{columns}"]
    table(list(columns_of_table), [[row.get(key) for key in columns_of_table.values()] for row in shown])
