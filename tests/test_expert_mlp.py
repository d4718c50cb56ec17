"""The experts against a token-by-token float64 loop, forward and every gradient, for every backend."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels import Activation, Routing, choose_backend, expert_mlp
from moetrain.kernels.activation import FUNCTION, is_gated

FUNCTIONS = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "relu2": lambda x: F.relu(x).square()}
CASES = ("uniform", "skewed", "some empty", "one expert", "pairs", "padded")


def by_definition(tensors: dict[str, Tensor], pairs: list[tuple[int, int]], activation: str, num_tokens: int) -> Tensor:
    """Σ over a token's pairs of w · (W_down act(W_up x + b_up) + b_down), one pair at a time."""
    rows = [torch.zeros_like(row) for row in tensors["x"]]
    function = FUNCTIONS[FUNCTION[activation]]
    for (token, expert), weight in zip(pairs, tensors["weights"], strict=True):
        h = tensors["w_up"][expert] @ tensors["x"][token] + tensors["b_up"][expert]
        a = function(h)
        if is_gated(activation):
            gate, up = h.chunk(2)
            a = function(gate) * up
        rows[token] = rows[token] + weight * (tensors["w_down"][expert] @ a + tensors["b_down"][expert])
    return torch.stack(rows)


def random_tensors(
    seed: int, num_tokens: int, dim: int, inner: int, num_experts: int, activation: str
) -> dict[str, Tensor]:
    """float64 inputs whose outputs are of order one."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 2 * inner if is_gated(activation) else inner
    shapes = {
        "x": (num_tokens, dim),
        "w_up": (num_experts, hidden, dim),
        "w_down": (num_experts, dim, inner),
        "b_up": (num_experts, hidden),
        "b_down": (num_experts, dim),
    }
    scale = {"w_up": dim**-0.5, "w_down": inner**-0.5}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64) * scale.get(name, 1.0)
        for name, shape in shapes.items()
    }


def random_mask(seed: int, num_tokens: int, num_experts: int, top_k: int, case: str) -> Tensor:
    """Which token goes to which expert, bool [T, E]."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_tokens, num_experts, generator=generator)
    if case == "skewed":
        scores += torch.linspace(0, 4, num_experts)
    if case == "some empty":
        scores[:, ::3] = -torch.inf
    if case == "one expert":
        return torch.nn.functional.one_hot(torch.full((num_tokens,), num_experts - 1), num_experts).bool()
    if case in ("pairs", "padded"):  # from 0 to all experts a token
        return torch.rand(num_tokens, num_experts, generator=generator) < top_k / num_experts
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, scores.topk(top_k).indices, True)


def route(mask_TE: Tensor, weights_N: Tensor, case: str, device: str) -> Routing:
    """The routing of a mask; `weights_N` belong to its pairs in the order of the tokens."""
    num_tokens, num_experts = mask_TE.shape
    tokens, experts = mask_TE.nonzero(as_tuple=True)
    if case == "padded":
        weights_TE = torch.zeros_like(mask_TE, dtype=weights_N.dtype, device=device)
        weights_TE = weights_TE.index_put((tokens.to(device), experts.to(device)), weights_N)
        return Routing.from_mask(mask_TE.to(device), weights_TE, max_pairs=len(tokens) + 37)
    if case == "pairs":
        return Routing.from_pairs(tokens.to(device), experts.to(device), weights_N, num_tokens, num_experts)
    ids_TK = experts.view(num_tokens, -1).to(device)
    return Routing.from_topk(ids_TK, weights_N.view(ids_TK.shape), num_experts)


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double().cpu(), reference.detach().double().cpu()
    return float((value - reference).norm() / reference.norm().clamp_min(1e-30))


def leaves(tensors: dict[str, Tensor], dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Copies that require gradients; the pairs' weights stay at float32 or wider."""
    wide = torch.promote_types(dtype, torch.float32)
    return {
        name: tensor.detach().clone().to(device, wide if name == "weights" else dtype).requires_grad_()
        for name, tensor in tensors.items()
    }


def run(case: dict[str, Tensor], routing: Routing, activation: Activation, backend: str, biases: bool) -> Tensor:
    return expert_mlp(
        case["x"],
        case["w_up"],
        case["w_down"],
        routing,
        b_gate_up_E2I=case["b_up"] if biases else None,
        b_down_ED=case["b_down"] if biases else None,
        activation=activation,
        backend=backend,
    )


@pytest.mark.parametrize("activation", list(FUNCTION))
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-14), ("reference", torch.float32, 1e-6), ("torch", torch.float32, 1e-6)],
)
@pytest.mark.parametrize("routed", ["some empty", "padded"])
def test_matches_the_definition(
    backend: str, activation: Activation, dtype: torch.dtype, tolerance: float, routed: str
) -> None:
    """13 tokens, 6 experts, biases; each backend that runs on a CPU."""
    mask = random_mask(7, 13, 6, 3, routed)
    pairs = [(int(t), int(e)) for t, e in mask.nonzero()]
    tensors = random_tensors(7, 13, 32, 48, 6, activation)
    tensors["weights"] = torch.rand(len(pairs), generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    exact, actual = leaves(tensors, torch.float64, "cpu"), leaves(tensors, dtype, "cpu")
    y = run(actual, route(mask, actual["weights"], routed, "cpu"), activation, backend, biases=True)
    reference = by_definition(exact, pairs, activation, 13)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y.backward(dy.to(y))
    reference.backward(dy)
    assert relative_error(y, reference) <= tolerance
    for name, tensor in actual.items():
        assert tensor.grad is not None
        assert exact[name].grad is not None
        assert relative_error(tensor.grad, exact[name].grad) <= tolerance, name


@pytest.mark.parametrize("activation", list(FUNCTION))
@pytest.mark.filterwarnings("ignore:Backwards compatibility")
def test_gradcheck_of_the_twin(activation: Activation) -> None:
    tensors = random_tensors(1, 5, 16, 16, 4, activation)
    tensors["weights"] = torch.rand(5, 2, dtype=torch.float64)
    ids = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:2] for t in range(5)])

    def function(x: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor, b_down: Tensor, weights: Tensor) -> Tensor:
        routing = Routing.from_topk(ids, weights, 4)
        return expert_mlp(x, w_up, w_down, routing, b_gate_up_E2I=b_up, b_down_ED=b_down, activation=activation)

    names = ("x", "w_up", "w_down", "b_up", "b_down", "weights")
    assert torch.autograd.gradcheck(function, [tensors[n].requires_grad_() for n in names], fast_mode=True)


def test_the_operator_is_registered_right() -> None:
    """Schema, autograd and fake implementation, as torch.compile relies on them."""
    tensors = leaves(random_tensors(0, 9, 16, 16, 4, "swiglu"), torch.float32, "cpu")
    ids = torch.tensor([[t % 4, (t + 1) % 4] for t in range(9)])
    routing = Routing.from_topk(ids, torch.rand(9, 2), 4)
    index = (routing.token_ids_N, routing.expert_offsets, routing.pair_ids_N, routing.token_offsets)
    arguments = (tensors["x"], tensors["w_up"], tensors["w_down"], None, None, routing.weights_N, *index)
    torch.library.opcheck(torch.ops.moetrain.expert_mlp.default, (*arguments, 2, False, "swiglu", "reference", True))


def test_what_is_saved_for_the_backward_pass() -> None:
    """x, h, the weights and the routing: no gathered rows, no activations, no outputs of experts."""
    tensors = leaves(random_tensors(0, 64, 32, 16, 4, "swiglu"), torch.float32, "cpu")
    ids = torch.stack([torch.randperm(4)[:2] for _ in range(64)])
    routing = Routing.from_topk(ids, torch.rand(64, 2), 4)
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        expert_mlp(tensors["x"], tensors["w_up"], tensors["w_down"], routing)
    for owned in (tensors["x"], tensors["w_up"], tensors["w_down"]):
        saved.pop(owned.untyped_storage().data_ptr())
    hidden = 4 * 128 * 16 * 2  # bytes of h: N · 2I float32
    index = 4 * (3 * 128 + 5 + 65)  # weights, token ids, pair ids, offsets
    assert sum(tensor.untyped_storage().nbytes() for tensor in saved.values()) == hidden + index


def test_inference_keeps_nothing() -> None:
    tensors = random_tensors(0, 8, 16, 16, 4, "swiglu")
    routing = Routing.from_topk(torch.tensor([[t % 4] for t in range(8)]), torch.rand(8, 1), 4)
    with torch.no_grad():
        y = expert_mlp(tensors["x"].requires_grad_(), tensors["w_up"], tensors["w_down"], routing)
    assert not y.requires_grad


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    from torch.utils.checkpoint import checkpoint

    tensors = leaves(random_tensors(0, 32, 32, 16, 4, "swiglu"), torch.float64, "cpu")
    weights = torch.rand(32, 2, dtype=torch.float64, requires_grad=True)
    ids = torch.stack([torch.randperm(4, generator=torch.Generator().manual_seed(t))[:2] for t in range(32)])

    def gradients(recompute: bool) -> list[Tensor]:
        routing = Routing.from_topk(ids, weights, 4)
        arguments = (tensors["x"], tensors["w_up"], tensors["w_down"], routing)
        y = checkpoint(expert_mlp, *arguments, use_reentrant=False) if recompute else expert_mlp(*arguments)
        return list(torch.autograd.grad(y.square().sum(), [*(tensors[n] for n in ("x", "w_up", "w_down")), weights]))

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_no_pairs_at_all_gives_zeros(backend: str) -> None:
    none = torch.empty(0, dtype=torch.int64)
    routing = Routing.from_pairs(none, none, torch.empty(0), 4, 3)
    x = torch.randn(4, 8, requires_grad=True)
    w1, w2 = torch.randn(3, 12, 8, requires_grad=True), torch.randn(3, 8, 6, requires_grad=True)
    y = expert_mlp(x, w1, w2, routing, backend=backend)
    y.sum().backward()
    assert torch.equal(y, torch.zeros(4, 8))
    assert x.grad is not None
    assert torch.equal(x.grad, torch.zeros(4, 8))


def test_backends_say_what_they_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu, bf16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
    monkeypatch.setattr(importlib.import_module("moetrain.kernels.expert_mlp"), "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert choose_backend("auto", cuda, bf16, 64, 32) == "hopper"
    assert choose_backend("auto", cuda, bf16, 64, 32, has_bias=True) == "triton"
    assert choose_backend("auto", cuda, bf16, 64, 32, activation="relu2") == "triton"
    assert choose_backend("auto", cuda, torch.float32, 64, 32) == "triton"
    assert choose_backend("auto", cuda, bf16, 64, 24) == "torch"
    assert choose_backend("auto", cuda, torch.float64, 64, 32) == "reference"
    assert choose_backend("auto", cpu, bf16, 64, 32) == "reference"
    with pytest.raises(ValueError, match="CUDA GPUs, not on cpu"):
        choose_backend("triton", cpu, bf16, 64, 32)
    with pytest.raises(ValueError, match="multiples of 16"):
        choose_backend("hopper", cuda, bf16, 64, 36)
    with pytest.raises(ValueError, match="16-byte"):
        choose_backend("torch", cuda, bf16, 60, 32)
    with pytest.raises(ValueError, match="no float64"):
        choose_backend("torch", cpu, torch.float64, 64, 32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    assert choose_backend("auto", cuda, bf16, 64, 32) == "triton"
    with pytest.raises(ValueError, match=r"9\.0, this GPU has 8\.6"):
        choose_backend("hopper", cuda, bf16, 64, 32)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert choose_backend("auto", cuda, bf16, 64, 32) == "torch"
    with pytest.raises(ValueError, match=r"8\.0 or newer"):
        choose_backend("triton", cuda, bf16, 64, 32)


def test_disagreeing_shapes_and_dtypes_are_refused() -> None:
    routing = Routing.from_topk(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    x, w1, w2 = torch.randn(2, 8), torch.randn(2, 12, 8), torch.randn(2, 8, 6)
    with pytest.raises(ValueError, match="w_gate_up has shape"):
        expert_mlp(x, w1[:, :10], w2, routing)
    with pytest.raises(ValueError, match="x has shape"):
        expert_mlp(x[:1], w1, w2, routing)
    with pytest.raises(ValueError, match="share a dtype"):
        expert_mlp(x.half(), w1, w2, routing)
    with pytest.raises(ValueError, match="must be floating point"):
        expert_mlp(x.long(), w1.long(), w2.long(), routing)
    with pytest.raises(ValueError, match="b_down has shape"):
        expert_mlp(x, w1, w2, routing, b_down_ED=torch.zeros(2, 6))
    with pytest.raises(ValueError, match="activation 'tanh'"):
        expert_mlp(x, w1, w2, routing, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend 'fast'"):
        expert_mlp(x, w1, w2, routing, backend="fast")


# --- On a GPU ------------------------------------------------------------------------------------------------------


def gpu_case(seed: int) -> tuple[dict[str, int], str]:
    """Sizes and kind of routing of a random case: odd row counts, widths with and without tails."""
    draw = torch.Generator().manual_seed(seed)
    pick = lambda *choices: choices[int(torch.randint(len(choices), (), generator=draw))]  # noqa: E731
    sizes = {
        "num_tokens": pick(77, 300, 1000, 2049),
        "dim": pick(64, 128, 256, 528, 768, 1040, 2048),
        "inner": pick(16, 64, 128, 208, 256, 272, 768),
        "num_experts": pick(3, 8, 33, 128),
    }
    return sizes, CASES[seed % len(CASES)]


@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(48))
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_kernels_match_float32(backend: str, seed: int) -> None:
    """Random sizes and routings in bfloat16 against the twin in float32 on the same rounded inputs.

    A rounding to bfloat16 is 1.7e-3 in the norm: a, y and their sum are rounded on the way forward, three times 1.7e-3
    as independent errors; h, dh and the result on the way back.
    """
    sizes, routed = gpu_case(seed)
    num_tokens, experts = sizes["num_tokens"], sizes["num_experts"]
    top_k = 1 if routed == "one expert" else min(1 + seed % 8, experts - (experts + 2) // 3)
    activation: Activation = ("swiglu", "geglu", "reglu")[seed % 3]  # type: ignore[assignment]
    mask = random_mask(seed, num_tokens, experts, top_k, routed)
    tensors = random_tensors(seed, num_tokens, sizes["dim"], sizes["inner"], experts, activation)
    tensors["weights"] = torch.rand(int(mask.sum()), generator=torch.Generator().manual_seed(seed)).double()
    actual = leaves(tensors, torch.bfloat16, "cuda")
    exact = {name: tensor.detach().float().requires_grad_() for name, tensor in actual.items()}
    y = run(actual, route(mask, actual["weights"], routed, "cuda"), activation, backend, biases=False)
    reference = run(exact, route(mask, exact["weights"], routed, "cuda"), activation, "reference", biases=False)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    reference.backward(dy.float())
    assert relative_error(y, reference) <= 4e-3
    for name in ("x", "w_up", "w_down", "weights"):
        grad, expected = actual[name].grad, exact[name].grad
        assert grad is not None
        assert expected is not None
        assert relative_error(grad, expected) <= 6e-3, name


@pytest.mark.gpu
@pytest.mark.parametrize("activation", list(FUNCTION))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_portable_kernels_take_every_activation_and_biases(activation: Activation, dtype: torch.dtype) -> None:
    mask = random_mask(5, 300, 8, 2, "some empty")
    tensors = random_tensors(5, 300, 272, 208, 8, activation)
    tensors["weights"] = torch.rand(int(mask.sum()), dtype=torch.float64)
    actual, exact = leaves(tensors, dtype, "cuda"), leaves(tensors, torch.float64, "cuda")
    exact = {name: actual[name].detach().double().requires_grad_() for name in exact}
    y = run(actual, route(mask, actual["weights"], "some empty", "cuda"), activation, "triton", biases=True)
    reference = run(exact, route(mask, exact["weights"], "some empty", "cuda"), activation, "reference", biases=True)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    reference.backward(dy.double())
    # Roundings of 2⁻¹² (float16) on the way; float32 sums of a few hundred terms.
    tolerance = 1e-3 if dtype == torch.float16 else 3e-6
    assert relative_error(y, reference) <= tolerance
    for name, tensor in actual.items():
        assert relative_error(tensor.grad, exact[name].grad) <= tolerance, name  # type: ignore[arg-type]


def gpu_layer(seed: int = 0) -> tuple[dict[str, Tensor], Routing]:
    mask = random_mask(seed, 1000, 16, 4, "skewed")
    tensors = random_tensors(seed, 1000, 512, 256, 16, "swiglu")
    tensors["weights"] = torch.rand(int(mask.sum()), dtype=torch.float64)
    case = leaves(tensors, torch.bfloat16, "cuda")
    return case, route(mask, case["weights"], "skewed", "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_the_same_bits_every_time(backend: str) -> None:
    case, routing = gpu_layer()
    results = []
    for _ in range(20):
        y = run(case, routing, "swiglu", backend, biases=False)
        inputs = [case[n] for n in ("x", "w_up", "w_down", "weights")]
        results.append([y, *torch.autograd.grad(y.float().square().sum(), inputs, retain_graph=True)])
    for again in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], again, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_no_wait_for_the_device_and_graph_capture(backend: str) -> None:
    case, routing = gpu_layer()
    run(case, routing, "swiglu", backend, biases=False).sum().backward()  # compiles
    case, routing = gpu_layer()
    torch.cuda.set_sync_debug_mode("error")
    try:
        y = run(case, routing, "swiglu", backend, biases=False)
        y.sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.no_grad():
        run(case, routing, "swiglu", backend, biases=False)  # compiles the variant that keeps nothing
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run(case, routing, "swiglu", backend, biases=False)
        captured.zero_()
        graph.replay()
        assert torch.equal(captured, y)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_neighbours_do_not_leak(backend: str) -> None:
    """A NaN in one token reaches no expert that the token does not use, and no other token."""
    case, _ = gpu_layer()
    ids = torch.arange(1000, device="cuda")[:, None] // 63 % 16
    weights = torch.rand(1000, 1, device="cuda", requires_grad=True)
    with torch.no_grad():
        case["x"][500] = torch.nan
    y = expert_mlp(case["x"], case["w_up"], case["w_down"], Routing.from_topk(ids, weights, 16), backend=backend)
    y.backward(torch.ones_like(y))
    others = torch.arange(1000, device="cuda") != 500
    expert = int(ids[500])
    assert torch.isfinite(y[others]).all()
    for name in ("w_up", "w_down"):
        grad = case[name].grad
        assert grad is not None
        assert torch.isfinite(grad[torch.arange(16, device="cuda") != expert]).all(), name


@pytest.mark.gpu
def test_strided_and_unaligned_tensors_are_copied() -> None:
    case, routing = gpu_layer()
    expected = run(case, routing, "swiglu", "auto", biases=False)
    strided = {**case, "x": case["x"].detach().t().contiguous().t()}
    shifted = torch.empty(case["x"].numel() + 1, dtype=torch.bfloat16, device="cuda")[1:].view_as(case["x"])
    shifted.copy_(case["x"].detach())
    for other in (strided, {**case, "x": shifted}):
        assert torch.equal(run(other, routing, "swiglu", "auto", biases=False), expected)


@pytest.mark.gpu2
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_on_a_device_that_is_not_the_current_one(backend: str) -> None:
    mask = random_mask(3, 300, 8, 2, "skewed")
    tensors = random_tensors(3, 300, 256, 128, 8, "swiglu")
    tensors["weights"] = torch.rand(int(mask.sum()), dtype=torch.float64)
    results = []
    for device in ("cuda:0", "cuda:1"):
        case = leaves(tensors, torch.bfloat16, device)
        y = run(case, route(mask, case["weights"], "skewed", device), "swiglu", backend, biases=False)
        y.sum().backward()
        results.append([y.detach().cpu(), *(case[name].grad.cpu() for name in ("x", "w_up", "w_down"))])  # type: ignore[union-attr]
    assert torch.cuda.current_device() == 0
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@pytest.mark.gpu
def test_compiles_with_torch_compile() -> None:
    case, routing = gpu_layer()
    arguments = (case["x"], case["w_up"], case["w_down"], routing)
    compiled = torch.compile(lambda x, up, down, r: expert_mlp(x, up, down, r) * 2, fullgraph=True)
    assert torch.equal(compiled(*arguments), expert_mlp(*arguments) * 2)
