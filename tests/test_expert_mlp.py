"""The experts against a token-by-token float64 loop, forward and every gradient, for every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.kernels import Routing, choose_backend, expert_mlp

GATES = {"swiglu": F.silu, "geglu": F.gelu, "reglu": F.relu}


def by_definition(
    x_TD: Tensor, w_gate_up: Tensor, w_down: Tensor, pairs: list[tuple[int, int]], weights: Tensor, activation: str
) -> Tensor:
    rows = [torch.zeros_like(row) for row in x_TD]
    inner = w_down.shape[2]
    for (token, expert), weight in zip(pairs, weights, strict=True):
        gate, up = w_gate_up[expert, :inner] @ x_TD[token], w_gate_up[expert, inner:] @ x_TD[token]
        rows[token] = rows[token] + weight * (w_down[expert] @ (GATES[activation](gate) * up))
    return torch.stack(rows)


def random_case(seed: int, dtype: torch.dtype, device: str = "cpu") -> dict[str, Tensor]:
    """13 tokens with 0 to 4 of 6 experts each, expert 2 empty."""
    generator = torch.Generator().manual_seed(seed)
    pairs = [
        (token, expert)
        for token in range(13)
        for expert in torch.randperm(6, generator=generator)[
            : int(torch.randint(0, 5, (), generator=generator))
        ].tolist()
        if expert != 2
    ]
    shapes = {"x": (13, 32), "w_gate_up": (6, 96, 32), "w_down": (6, 32, 48), "weights": (len(pairs),)}
    tensors = {n: torch.randn(s, generator=generator, dtype=torch.float64) / 4 for n, s in shapes.items()}
    case = {n: t.to(device=device, dtype=dtype) for n, t in tensors.items()}
    return {**case, "pairs": torch.tensor(pairs, device=device)}


def relative_error(value: Tensor, reference: Tensor) -> float:
    value, reference = value.detach().double(), reference.detach().double()
    return float((value - reference).norm() / reference.norm())


def check_against_definition(backend: str, activation: str, dtype: torch.dtype, device: str, tolerance: float) -> None:
    case = random_case(7, dtype, device)
    pairs = case.pop("pairs")
    actual = {n: t.clone().requires_grad_() for n, t in case.items()}
    exact = {n: t.double().requires_grad_() for n, t in case.items()}
    routing = Routing.from_pairs(pairs[:, 0], pairs[:, 1], actual["weights"], 13, 6)
    y = expert_mlp(actual["x"], actual["w_gate_up"], actual["w_down"], routing, activation=activation, backend=backend)
    reference = by_definition(
        exact["x"],
        exact["w_gate_up"],
        exact["w_down"],
        [tuple(p) for p in pairs.tolist()],
        exact["weights"],
        activation,
    )
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
    y.backward(dy)
    reference.backward(dy.double())
    assert relative_error(y, reference) <= tolerance
    for name, tensor in actual.items():
        assert tensor.grad is not None
        assert exact[name].grad is not None
        assert relative_error(tensor.grad, exact[name].grad) <= tolerance, name


@pytest.mark.parametrize("activation", ["swiglu", "geglu", "reglu"])
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-14), ("reference", torch.float32, 1e-6), ("torch", torch.float32, 1e-6)],
)
def test_matches_the_definition(backend: str, activation: str, dtype: torch.dtype, tolerance: float) -> None:
    check_against_definition(backend, activation, dtype, "cpu", tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_matches_the_definition_on_a_gpu(backend: str) -> None:
    # bfloat16 keeps 8 bits: 2⁻⁹ relative a rounding, a handful of roundings on the way.
    check_against_definition(backend, "swiglu", torch.bfloat16, "cuda", 1e-2)


@pytest.mark.parametrize("top_k", [1, 3])
def test_constant_number_of_experts_equals_general_pairs(top_k: int) -> None:
    """The two ways of summing a token's pairs, and of transposing that, agree."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = torch.stack([torch.randperm(5, generator=generator)[:top_k] for _ in range(9)])
    x, w1, w2 = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((9, 8), (5, 12, 8), (5, 8, 6)))
    weights_TK = torch.rand(9, top_k, generator=generator, dtype=torch.float64)
    results = []
    for routing in (
        Routing.from_topk(ids_TK, weights_TK, 5),
        Routing.from_pairs(torch.arange(9).repeat_interleave(top_k), ids_TK.flatten(), weights_TK.flatten(), 9, 5),
    ):
        leaf = x.clone().requires_grad_()
        y = expert_mlp(leaf, w1, w2, routing)
        y.square().sum().backward()
        assert leaf.grad is not None
        results.append((y.detach(), leaf.grad))
    for first, second in zip(*results, strict=True):
        assert relative_error(first, second) <= 1e-14


def test_auto_takes_the_grouped_product_only_where_it_has_a_kernel() -> None:
    cuda, cpu, bf16 = torch.device("cuda"), torch.device("cpu"), torch.bfloat16
    assert choose_backend("auto", cuda, bf16, 64, 32) == "torch"
    assert choose_backend("auto", cuda, bf16, 64, 36) == "reference"
    assert choose_backend("auto", cuda, torch.float32, 64, 32) == "reference"
    assert choose_backend("auto", cpu, bf16, 64, 32) == "reference"
    with pytest.raises(ValueError, match="16-byte"):
        choose_backend("torch", cuda, bf16, 60, 32)
    with pytest.raises(ValueError, match="no float64"):
        choose_backend("torch", cpu, torch.float64, 64, 32)


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


def test_disagreeing_shapes_and_dtypes_are_refused() -> None:
    routing = Routing.from_topk(torch.tensor([[0], [1]]), torch.ones(2, 1), 2)
    x, w1, w2 = torch.randn(2, 8), torch.randn(2, 12, 8), torch.randn(2, 8, 6)
    with pytest.raises(ValueError, match="w_gate_up has shape"):
        expert_mlp(x, w1[:, :10], w2, routing)
    with pytest.raises(ValueError, match="x has shape"):
        expert_mlp(x[:1], w1, w2, routing)
    with pytest.raises(ValueError, match="share a dtype"):
        expert_mlp(x.half(), w1, w2, routing)
    with pytest.raises(ValueError, match="activation 'tanh'"):
        expert_mlp(x, w1, w2, routing, activation="tanh")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend 'fast'"):
        expert_mlp(x, w1, w2, routing, backend="fast")
