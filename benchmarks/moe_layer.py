"""``moetrain bench moe-layer``: one MoE layer, forward and backward, beside other implementations and the bound.

Shapes: T tokens, D width, I expert width, E experts, K experts a token, N (token, expert) pairs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moetrain.benchmarks.peers import (
    PEERS,
    Bound,
    BoundLayer,
    Layer,
    LayerInputs,
    Reference,
    Shape,
    experts_reference,
    layer_reference,
    ours,
    relative_error,
)
from moetrain.benchmarks.report import Report, say, table
from moetrain.benchmarks.timing import (
    Deadline,
    Floors,
    Timing,
    held_bytes,
    measure_floors,
    saved_bytes,
    synchronize,
    time_interleaved,
)
from moetrain.errors import ConfigError
from moetrain.kernels import Routing, choose_backend, expert_mlp
from moetrain.kernels.expert_mlp import Backend, stages
from moetrain.kernels.float32_linear import float32_linear
from moetrain.kernels.rounding import TILE, Rounding, most_pairs, round_tokens
from moetrain.kernels.topk import topk_softmax

SHAPES = (
    "24576,1536,256,128,8",
    "24576,1536,512,64,4",
    "32768,2048,768,128,8",
    "32768,2048,1024,64,8",
    "32768,4096,256,256,16",
    "32768,4096,1024,128,8",
    "16384,4096,1024,256,8",
    "40960,768,256,128,8",
)
ROUNDING_SHAPES = ("16384,4096,1024,256,8", "16384,4096,512,512,8")

TOLERANCES = {"y": 1e-2, "dx": 1.5e-2, "dw_router": 3e-2, "dw_gate_up": 1.5e-2, "dw_down": 1.5e-2, "dweights": 2e-2}
"""Largest relative norms of the error. Rounding every intermediate result (and a peer's logits) to bfloat16 costs about
half of that; one expert of 256 that is wrong costs 6e-2."""

MIB = 2**20


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    shapes: Sequence[str] | None = None
    backends: Sequence[str] | None = None
    peers: Sequence[str] | None = None
    """None: those that are installed."""
    rounding: Rounding | None = None
    parity: bool = False
    profile: bool = False
    rounds: int = 5
    budget_seconds: float | None = None
    json: str | None = None


def moe_layer_command(options: Options) -> int:
    """Run the benchmark; 1 if an implementation was wrong, else 0. Raises ConfigError for a bad option."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and options.shapes is None:
        raise ConfigError(
            "the default shapes need a GPU and there is none: give small ones, as in --shapes 64,32,32,4,2"
        )
    shapes = [parse_shape(text) for text in options.shapes or (ROUNDING_SHAPES if options.rounding else SHAPES)]
    backends = {shape: _backends(options.backends, device, shape) for shape in shapes}
    peers = [] if options.rounding else _peers(options.peers)
    deadline = Deadline(options.budget_seconds)

    report = Report("moe-layer", device, options.json)
    floors = measure_floors(device)
    report.contents["floors"] = {
        "copy_tb_per_s": floors.copy_bandwidth / 1e12,
        "matmul_tflops": floors.matmul_rate / 1e12,
    }
    machine = report.contents["machine"]
    say(f"{machine['gpu'] or 'CPU'}, {', '.join(f'{name} {v}' for name, v in machine['versions'].items())}")
    say(f"copy {floors.copy_bandwidth / 1e12:.3g} TB/s, bfloat16 product {floors.matmul_rate / 1e12:.3g} TFLOP/s")

    for shape in shapes:
        if deadline.passed:
            say(f"\n--budget-seconds is spent: {shape} and what follows was not measured")
            break
        say(f"\nT,D,I,E,K = {shape}")
        if options.rounding:
            for backend in backends[shape]:
                _bench_rounding(shape, backend, options.rounding, options, device, deadline, report)
        else:
            _bench_layers(shape, [*map(ours, backends[shape]), *peers], options, device, deadline, report)
        if options.profile and not options.parity:
            for backend in backends[shape]:
                _bench_stages(shape, backend, floors, options, device, report)
        if device.type == "cuda":
            torch.cuda.empty_cache()  # the next shape's blocks have other sizes
    return int(any(row.get("status") == "WRONG" for row in report.contents["rows"]))


def parse_shape(text: str) -> Shape:
    """A shape from `T,D,I,E,K`. Raises ConfigError."""
    words = text.split(",")
    if len(words) != 5 or not all(word.isascii() and word.isdigit() and int(word) for word in words):
        raise ConfigError(f"--shapes {text}: expected five positive numbers T,D,I,E,K, as in 24576,1536,256,128,8")
    shape = Shape(*map(int, words))
    if shape.top_k > shape.experts:
        raise ConfigError(f"--shapes {text}: K = {shape.top_k} experts a token of only E = {shape.experts}")
    return shape


def _backends(asked: Sequence[str] | None, device: torch.device, shape: Shape) -> list[Backend]:
    """Backends of ours: the one that `auto` chooses and, on Hopper, plain Triton; or those asked for."""

    def choose(name: str) -> Backend:
        return choose_backend(name, device, torch.bfloat16, shape.dim, shape.inner)

    if asked is None:
        best = choose("auto")
        return [best, choose("triton")] if best == "hopper" else [best]
    try:
        return list(dict.fromkeys(map(choose, asked)))
    except ValueError as error:
        raise ConfigError(f"--backends, with --shapes {shape}: {error}") from None


def _peers(asked: Sequence[str] | None) -> list[Layer]:
    layers = []
    for name in PEERS if asked is None else asked:
        if name not in PEERS:
            raise ConfigError(f"--peers {name}: there are {', '.join(PEERS)}")
        try:
            layers.append(PEERS[name]())
        except Exception as error:  # packages for GPUs fail in their own ways where there is none
            if asked is not None:
                raise ConfigError(f"--peers {name}: cannot be imported ({error})") from None
            say(f"{name}: cannot be imported ({error})")
    return layers


# ---------------------------------------------------------------------------------------------------------------------
# Whole layers


def _bench_layers(
    shape: Shape, layers: Sequence[Layer], options: Options, device: torch.device, deadline: Deadline, report: Report
) -> None:
    inputs = LayerInputs.random(shape, device)
    reference = layer_reference(inputs)
    rows: dict[str, dict[str, Any]] = {}
    right: list[BoundLayer] = []
    for layer in layers:
        row = rows[layer.name] = {"shape": str(shape), "name": layer.name, "status": "not run: out of time"}
        if not deadline.passed:
            bound_layer = _checked(layer, inputs, reference, row, device)
            if bound_layer is not None:
                right.append(bound_layer)
        say(f"  {layer.name}: {_check_text(row)}")
    del reference
    if options.parity or not right:
        for row in rows.values():
            report.add(row)
        return

    bound = Bound(shape, device)
    forward = {"cuBLAS bound": bound.forward, **{item.layer.name: item.forward for item in right}}
    backward = {"cuBLAS bound": bound.forward_backward, **{item.layer.name: item.forward_backward for item in right}}
    settings: dict[str, Any] = {"rounds": options.rounds, "deadline": deadline}
    forward_times = time_interleaved(forward, device, **settings)
    backward_times = time_interleaved(backward, device, **settings)
    rows = {"cuBLAS bound": {"shape": str(shape), "name": "cuBLAS bound", "status": "ok"}, **rows}
    for name, times in forward_times.items():
        rows[name] |= _speed(shape, times, backward_times[name], forward_times, backward_times)
    for item in right:
        rows[item.layer.name] |= _memory(shape, item, device)
    for row in rows.values():
        report.add(row)
    columns = {
        "": "name",
        "fwd ms": "forward_ms",
        "/bound": "forward_ratio",
        "TFLOP/s": "forward_tflops",
        "fwd+bwd ms": "forward_backward_ms",
        "/bound ": "forward_backward_ratio",
        "TFLOP/s ": "forward_backward_tflops",
        "saved MiB": "saved_mib",
        "held MiB": "held_mib",
        "/4NI": "saved_ratio",
        "host ms": "host_ms",
    }
    table(list(columns), [[_label(row), *map(row.get, list(columns.values())[1:])] for row in rows.values()])


def _checked(
    layer: Layer, inputs: LayerInputs, reference: Reference, row: dict[str, Any], device: torch.device
) -> BoundLayer | None:
    """The layer on its inputs if its results are right; `row` gets its status, errors and first-call time."""
    row["status"] = "ok"
    try:
        start = time.perf_counter()
        bound_layer = BoundLayer(layer, inputs)
        y_TD, (dx_TD, dw_router_ED, dw_gate_up, dw_down_EDI) = bound_layer.gradients(reference.dy_TD)
        synchronize(device)
        row["first_call_s"] = time.perf_counter() - start
    except Exception as error:  # whatever another project's kernel may raise: the others are still of interest
        row["status"] = f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return None
    clear_T = reference.clear_T
    row["errors"] = {
        "y": relative_error(y_TD[clear_T], reference.y_TD[clear_T]),
        "dx": relative_error(dx_TD[clear_T], reference.dx_TD[clear_T]),
        "dw_router": relative_error(dw_router_ED, reference.dw_router_ED),
        "dw_gate_up": relative_error(layer.unpack(dw_gate_up), reference.dw_gate_up_E2ID),
        "dw_down": relative_error(dw_down_EDI, reference.dw_down_EDI),
    }
    if any(error > TOLERANCES[name] for name, error in row["errors"].items()):
        row["status"] = "WRONG"
        return None
    return bound_layer


def _label(row: dict[str, Any]) -> str:
    status = row["status"].partition(":")[0]
    return str(row["name"]) if status == "ok" else f"{row['name']}: {status}"


def _check_text(row: dict[str, Any]) -> str:
    if "errors" not in row:
        return str(row["status"])
    errors = ", ".join(f"{name} {error:.1e}" for name, error in row["errors"].items())
    first = f"; first call {row['first_call_s']:.1f} s" if "first_call_s" in row else ""
    return f"{row['status']}; errors {errors}{first}"


def _speed(
    shape: Shape,
    forward: Timing,
    backward: Timing,
    all_forward: dict[str, Timing],
    all_backward: dict[str, Timing],
) -> dict[str, Any]:
    return {
        "forward_ms": forward.median,
        "forward_ms_range": [forward.low, forward.high],
        "forward_ratio": forward.median / all_forward["cuBLAS bound"].median,
        "forward_tflops": shape.forward_flops / forward.median / 1e9,
        "forward_backward_ms": backward.median,
        "forward_backward_ms_range": [backward.low, backward.high],
        "forward_backward_ratio": backward.median / all_backward["cuBLAS bound"].median,
        "forward_backward_tflops": 3 * shape.forward_flops / backward.median / 1e9,
        "host_ms": backward.host,
        "calls": [forward.calls, backward.calls],
    }


def _memory(shape: Shape, item: BoundLayer, device: torch.device) -> dict[str, Any]:
    saved = saved_bytes(item.forward, item.leaves)
    held = held_bytes(item.forward, device)
    return {
        "saved_mib": saved / MIB,
        "held_mib": None if held is None else held / MIB,
        "saved_ratio": max(saved, held or 0) / (4 * shape.pairs * shape.inner),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Token rounding


def _bench_rounding(
    shape: Shape,
    backend: str,
    rounding: Rounding,
    options: Options,
    device: torch.device,
    deadline: Deadline,
    report: Report,
) -> None:
    """The experts alone, forward and backward, on the pairs of top-k and on those after rounding to TILE."""
    inputs = LayerInputs.random(shape, device)
    with torch.no_grad():
        logits_TE = float32_linear(inputs.x_TD, inputs.w_router_ED)
    probabilities_TE = logits_TE.softmax(-1)

    def top_k() -> Routing:
        weights_TK, expert_ids_TK = topk_softmax(logits_TE, shape.top_k, softmax="before")
        return Routing.from_topk(expert_ids_TK, weights_TK, shape.experts)

    def rounded() -> Routing:
        _, expert_ids_TK = topk_softmax(logits_TE, shape.top_k, softmax="before")
        chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(1, expert_ids_TK.long(), True)
        chosen_TE = round_tokens(chosen_TE, probabilities_TE, TILE, rounding)
        room = most_pairs(shape.tokens, shape.top_k, shape.experts, TILE, rounding)
        return Routing.from_mask(chosen_TE, probabilities_TE, room)

    forward: dict[str, Callable[[], object]] = {}
    backward: dict[str, Callable[[], object]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for name, make in {"top-k": top_k, rounding: rounded}.items():
        routing = make()
        row = {"shape": str(shape), "name": f"moetrain {backend}", "routing": name, "tile": TILE, "status": "ok"}
        rows[name] = row | {"pairs": int(routing.expert_offsets[-1]), **_check_experts(inputs, routing, backend)}
        say(f"  {backend}, {name}: {_check_text(rows[name])}")
        if rows[name]["status"] != "ok" or options.parity:
            continue
        experts = _Experts(inputs, routing, backend)
        forward[name], backward[name] = experts.forward, experts.forward_backward
    if forward:
        settings: dict[str, Any] = {"rounds": options.rounds, "deadline": deadline}
        forward_times = time_interleaved(forward, device, **settings)
        backward_times = time_interleaved(backward, device, **settings)
        routing_times = time_interleaved({"top-k": top_k, rounding: rounded}, device, **settings)
        for name, times in forward_times.items():
            rows[name] |= {
                "forward_ms": times.median,
                "forward_backward_ms": backward_times[name].median,
                "speedup": backward_times["top-k"].median / backward_times[name].median
                if "top-k" in backward_times
                else None,
                "routing_ms": routing_times[name].median,
            }
        head = ("", "pairs", "fwd ms", "fwd+bwd ms", "× top-k", "routing ms")
        keys = ("routing", "pairs", "forward_ms", "forward_backward_ms", "speedup", "routing_ms")
        table(head, [[row.get(key) for key in keys] for row in rows.values()])
    for row in rows.values():
        report.add(row)


class _Experts:
    """The experts on a given routing, without a router: calls to time."""

    def __init__(self, inputs: LayerInputs, routing: Routing, backend: str) -> None:
        self._leaves = (
            inputs.x_TD.detach().requires_grad_(),
            inputs.w_gate_up_E2ID.detach().requires_grad_(),
            inputs.w_down_EDI.detach().requires_grad_(),
        )
        self._routing = replace(routing, weights_N=routing.weights_N.detach().requires_grad_())
        self._backend = backend
        self._dy_TD = inputs.dy_TD

    def forward(self) -> Tensor:
        return expert_mlp(*self._leaves, self._routing, activation="swiglu", backend=self._backend)

    def forward_backward(self) -> tuple[Tensor, ...]:
        return torch.autograd.grad(self.forward(), (*self._leaves, self._routing.weights_N), self._dy_TD)


def _check_experts(inputs: LayerInputs, routing: Routing, backend: str) -> dict[str, Any]:
    """Status and errors of the experts on a routing."""
    trimmed = routing.trimmed()
    tokens_N = trimmed.token_ids_N.long()
    experts = torch.arange(routing.num_experts, device=tokens_N.device)
    experts_N = experts.repeat_interleave(trimmed.counts_E.long())
    weights_TE = torch.zeros(routing.num_tokens, routing.num_experts, device=tokens_N.device)
    weights_TE[tokens_N, experts_N] = trimmed.weights_N.float()
    chosen_TE = torch.zeros_like(weights_TE, dtype=torch.bool)
    chosen_TE[tokens_N, experts_N] = True
    y_TD, dx_TD, dw_gate_up_E2ID, dw_down_EDI, dweights_TE = experts_reference(
        inputs.x_TD, inputs.w_gate_up_E2ID, inputs.w_down_EDI, chosen_TE, weights_TE, inputs.dy_TD
    )
    run = _Experts(inputs, routing, backend)
    actual = run.forward_backward()
    errors = {
        "y": relative_error(run.forward().detach(), y_TD),
        "dx": relative_error(actual[0], dx_TD),
        "dw_gate_up": relative_error(actual[1], dw_gate_up_E2ID),
        "dw_down": relative_error(actual[2], dw_down_EDI),
        "dweights": relative_error(actual[3][: tokens_N.numel()], dweights_TE[tokens_N, experts_N]),
    }
    wrong = any(error > TOLERANCES[name] for name, error in errors.items())
    return {"status": "WRONG" if wrong else "ok", "errors": errors}


# ---------------------------------------------------------------------------------------------------------------------
# Where the time goes


def _bench_stages(
    shape: Shape, backend: Backend, floors: Floors, options: Options, device: torch.device, report: Report
) -> None:
    """Every kernel of ours by itself, with its FLOPs, its bytes and what it needs at least."""
    inputs = LayerInputs.random(shape, device)
    calls = _stage_calls(shape, backend, inputs)
    times = time_interleaved({name: call for name, (call, _, _) in calls.items()}, device, rounds=options.rounds)
    rows: list[dict[str, Any]] = []
    for name, (_, flops, moved) in calls.items():
        floor = floors.milliseconds(flops, moved)
        milliseconds = times[name].median
        rows.append(
            {
                "shape": str(shape),
                "name": f"moetrain {backend}",
                "stage": name,
                "ms": milliseconds,
                "gflop": flops / 1e9,
                "mib": moved / MIB,
                "tflops": flops / milliseconds / 1e9,
                "tb_per_s": moved / milliseconds / 1e9,
                "floor_ms": floor,
                "ratio": milliseconds / floor,
            }
        )
        report.add(rows[-1])
    rows.append(
        {"stage": "sum", "ms": sum(row["ms"] for row in rows), "floor_ms": sum(row["floor_ms"] for row in rows)}
    )
    say(f"  {backend}, kernel by kernel:")
    head = ("", "ms", "GFLOP", "MiB", "TFLOP/s", "TB/s", "floor ms", "/floor")
    keys = ("stage", "ms", "gflop", "mib", "tflops", "tb_per_s", "floor_ms", "ratio")
    table(head, [[row.get(key) for key in keys] for row in rows])


def _stage_calls(
    shape: Shape, backend: Backend, inputs: LayerInputs
) -> dict[str, tuple[Callable[[], object], float, float]]:
    """Call, FLOPs and bytes (every operand read or written once) of each kernel of forward and backward."""
    kernels = stages(backend)
    x_TD, dy_TD = inputs.x_TD, inputs.dy_TD
    w_up_EHD, w_down_EDI = inputs.w_gate_up_E2ID, inputs.w_down_EDI
    with torch.no_grad():
        logits_TE = float32_linear(x_TD, inputs.w_router_ED)
        weights_TK, expert_ids_TK = topk_softmax(logits_TE, shape.top_k, softmax="after")
        routing = Routing.from_topk(expert_ids_TK, weights_TK, shape.experts)
        weights_N = routing.weights_N
        h_NH, a_NI = kernels.up_projection(x_TD, w_up_EHD, None, routing, "swiglu", keep_hidden=True)
        assert h_NH is not None
        y_ND = kernels.down_projection(a_NI, w_down_EDI, None, routing)
        dh_NH, weighted_a_NI, _ = kernels.hidden_gradient(dy_TD, w_down_EDI, h_NH, weights_N, routing, "swiglu")

    T, D, inner, E, N = shape.tokens, shape.dim, shape.inner, shape.experts, shape.pairs
    product = 2.0 * N * D * inner
    token, pair_D, pair_H, pair_I, up, down = (
        2.0 * size for size in (T * D, N * D, 2 * N * inner, N * inner, 2 * E * inner * D, E * D * inner)
    )
    calls: dict[str, tuple[Callable[[], object], float, float]] = {
        "router product": (
            lambda: float32_linear(x_TD, inputs.w_router_ED),
            2.0 * T * D * E,
            token + 2 * E * D + 4 * T * E,
        ),
        "top-k and softmax": (
            lambda: topk_softmax(logits_TE, shape.top_k, softmax="after"),
            0,
            4 * T * E + 8 * N,
        ),
        "routing metadata": (
            lambda: Routing.from_topk(expert_ids_TK, weights_TK, E),
            0,
            20 * N + 4 * T,
        ),
        "up-projection": (
            lambda: kernels.up_projection(x_TD, w_up_EHD, None, routing, "swiglu", keep_hidden=True),
            2 * product,
            token + up + pair_H + pair_I,
        ),
        "down-projection": (
            lambda: kernels.down_projection(a_NI, w_down_EDI, None, routing),
            product,
            pair_I + down + pair_D,
        ),
        "weighted sum": (lambda: kernels.sum_pairs(y_ND, weights_N, routing), 0, pair_D + token + 8 * N),
        "hidden gradient": (
            lambda: kernels.hidden_gradient(dy_TD, w_down_EDI, h_NH, weights_N, routing, "swiglu"),
            product,
            token + down + 2 * pair_H + pair_I + 8 * N,
        ),
        "input gradient": (
            lambda: kernels.input_gradient(dh_NH, w_up_EHD, routing),
            2 * product,
            pair_H + up + pair_D,
        ),
        "sum of input gradients": (lambda: kernels.sum_pairs(y_ND, None, routing), 0, pair_D + token + 4 * N),
        "up-weight gradient": (
            lambda: kernels.up_weight_gradient(dh_NH, x_TD, routing),
            2 * product,
            pair_H + token + up,
        ),
        "down-weight gradient": (
            lambda: kernels.down_weight_gradient(dy_TD, weighted_a_NI, routing),
            product,
            token + pair_I + down,
        ),
    }
    return {name: (torch.no_grad()(call), flops, moved) for name, (call, flops, moved) in calls.items()}
