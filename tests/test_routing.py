"""Routing metadata against its definition, pair by pair; the Triton kernels against their twin, bit by bit."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moetrain.kernels import Routing, routing_triton
from moetrain.kernels.routing import cells_of_pairs, group_by_expert, group_chosen

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pairs_by_expert(routing: Routing) -> list[tuple[int, int, float]]:
    """(expert, token, weight) in the stored order."""
    experts = torch.arange(routing.num_experts).repeat_interleave(routing.counts_E.long())
    return list(zip(experts.tolist(), routing.token_ids_N.tolist(), routing.weights_N.tolist(), strict=True))


def check_token_walk(routing: Routing) -> None:
    """Walking by token visits every pair once, each under its own token."""
    for indices in (routing.token_ids_N, routing.expert_offsets, routing.pair_ids_N, routing.token_offsets):
        assert indices.dtype == torch.int32
    offsets = routing.token_offsets.tolist()
    assert len(offsets) == routing.num_tokens + 1
    assert sorted(routing.pair_ids_N.tolist()) == list(range(routing.num_pairs))
    for token in range(routing.num_tokens):
        for pair in routing.pair_ids_N[offsets[token] : offsets[token + 1]]:
            assert routing.token_ids_N[pair] == token


@given(data=st.data(), experts=st.integers(1, 9), tokens=st.integers(0, 12))
@settings(deadline=None, max_examples=60)
def test_topk_pairs_are_sorted_by_expert_and_then_by_token(data: st.DataObject, experts: int, tokens: int) -> None:
    top_k = data.draw(st.integers(1, experts))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    ids_TK = (
        torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
        if tokens
        else (torch.empty(0, top_k, dtype=torch.int64))
    )
    weights_TK = torch.rand(tokens, top_k, generator=generator)
    routing = Routing.from_topk(ids_TK, weights_TK, experts)
    expected = sorted((ids_TK[t, k].item(), t, weights_TK[t, k].item()) for t in range(tokens) for k in range(top_k))
    assert pairs_by_expert(routing) == expected
    check_token_walk(routing)


@given(
    pairs=st.sets(st.tuples(st.integers(0, 6), st.integers(0, 4))),
    shuffle=st.randoms(use_true_random=False),
)
@settings(deadline=None, max_examples=60)
def test_any_set_of_pairs_in_any_order(pairs: set[tuple[int, int]], shuffle) -> None:  # type: ignore[no-untyped-def]
    listed = sorted(pairs)
    shuffle.shuffle(listed)
    tokens = torch.tensor([t for t, _ in listed], dtype=torch.int64)
    experts = torch.tensor([e for _, e in listed], dtype=torch.int64)
    weights = torch.arange(len(listed), dtype=torch.float32)
    routing = Routing.from_pairs(tokens, experts, weights, num_tokens=7, num_experts=5)
    expected = [(e, t, float(i)) for e in range(5) for i, (t, pair_expert) in enumerate(listed) if pair_expert == e]
    assert pairs_by_expert(routing) == expected
    check_token_walk(routing)


def test_weights_carry_the_gradient_back() -> None:
    weights_TK = torch.rand(3, 2, requires_grad=True)
    routing = Routing.from_topk(torch.tensor([[2, 0], [1, 2], [0, 1]]), weights_TK, 3)
    (routing.weights_N * torch.tensor([1.0, 2, 3, 4, 5, 6])).sum().backward()
    # Order by expert: (0: t0 k1), (0: t2 k0), (1: t1 k0), (1: t2 k1), (2: t0 k0), (2: t1 k1).
    assert weights_TK.grad is not None
    assert weights_TK.grad.tolist() == [[5, 1], [3, 6], [2, 4]]


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        (torch.tensor([[0, 4]]), torch.ones(1, 2), "must be in"),
        (torch.tensor([[-1, 0]]), torch.ones(1, 2), "must be in"),
        (torch.tensor([[0.0, 1.0]]), torch.ones(1, 2), "int32 or int64"),
        (torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.int64), "floating point"),
        (torch.tensor([[0, 1]]), torch.ones(2), "equal 2-D shapes"),
    ],
)
def test_bad_pairs_are_refused(ids: torch.Tensor, weights: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Routing.from_topk(ids, weights, 4)


@given(data=st.data(), tokens=st.integers(0, 7), experts=st.integers(1, 6), spare=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_mask_of_any_size_in_a_room(data: st.DataObject, tokens: int, experts: int, spare: int) -> None:
    cells = data.draw(st.lists(st.booleans(), min_size=tokens * experts, max_size=tokens * experts))
    chosen_TE = torch.tensor(cells, dtype=torch.bool).view(tokens, experts)
    weights_TE = torch.arange(1.0, tokens * experts + 1).view(tokens, experts).requires_grad_()
    routing = Routing.from_mask(chosen_TE, weights_TE, int(chosen_TE.sum()) + spare)

    trimmed = routing.trimmed()
    assert (routing.padded, trimmed.padded) == (True, False)
    assert routing.num_pairs == trimmed.num_pairs + spare
    for padding in (routing.token_ids_N, routing.pair_ids_N, routing.weights_N):
        assert padding[trimmed.num_pairs :].tolist() == [0] * spare
    assert pairs_by_expert(trimmed) == [
        (e, t, weights_TE[t, e].item()) for e in range(experts) for t in range(tokens) if chosen_TE[t, e]
    ]
    check_token_walk(trimmed)
    if tokens:
        # The padding's gradient must reach no cell.
        (routing.weights_N * (weights_TE.detach().sum() + torch.arange(routing.num_pairs))).sum().backward()
        order_N = torch.arange(trimmed.num_pairs) + weights_TE.detach().sum()
        expected_ET = torch.zeros(experts, tokens).masked_scatter(chosen_TE.t(), order_N)
        assert torch.equal(weights_TE.grad, expected_ET.t())  # type: ignore[arg-type]


def test_mask_is_refused_where_its_pairs_do_not_fit() -> None:
    chosen = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="6 pairs are chosen"):
        Routing.from_mask(chosen, torch.ones(2, 3), 5)
    with pytest.raises(ValueError, match="must be bool"):
        Routing.from_mask(chosen.int(), torch.ones(2, 3), 6)
    with pytest.raises(ValueError, match="equal 2-D shapes"):
        Routing.from_mask(chosen, torch.ones(3, 2), 6)


@given(data=st.data(), tokens=st.integers(0, 7), experts=st.integers(1, 6), spare=st.integers(0, 5))
@settings(deadline=None, max_examples=60)
def test_experts_with_other_numbers(data: st.DataObject, tokens: int, experts: int, spare: int) -> None:
    cells = data.draw(st.lists(st.booleans(), min_size=tokens * experts, max_size=tokens * experts))
    number_E = torch.tensor(data.draw(st.permutations(range(experts))), dtype=torch.int64)
    chosen_TE = torch.tensor(cells, dtype=torch.bool).view(tokens, experts)
    leaf_TE = torch.arange(1.0, tokens * experts + 1).view(tokens, experts).requires_grad_()
    renamed_TE = [torch.empty_like(x).index_copy(1, number_E, x) for x in (chosen_TE, leaf_TE)]
    room = int(chosen_TE.sum()) + spare
    routing = Routing.from_mask(chosen_TE, leaf_TE, room).renumbered(number_E)
    expected = Routing.from_mask(*renamed_TE, room)  # type: ignore[arg-type]

    trimmed = routing.trimmed()
    assert pairs_by_expert(trimmed) == pairs_by_expert(expected.trimmed())
    check_token_walk(trimmed)
    for padding in (routing.token_ids_N, routing.pair_ids_N, routing.weights_N):
        assert padding[trimmed.num_pairs :].tolist() == [0] * spare
    factors_N = torch.rand(room)
    grads = [torch.autograd.grad((r.weights_N * factors_N).sum(), leaf_TE)[0] for r in (routing, expected)]
    assert torch.equal(*grads)


def test_trimming_keeps_the_gradient() -> None:
    weights = torch.ones(2, 2, requires_grad=True)
    routing = Routing.from_mask(torch.tensor([[True, False], [True, True]]), weights, 9)
    (routing.trimmed().weights_N * torch.tensor([1.0, 2, 3])).sum().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[1, 0], [2, 3]]


def test_strided_input_is_read_as_it_is() -> None:
    ids_KT, weights_KT = torch.tensor([[2, 1, 0], [0, 2, 1]]), torch.arange(6.0).view(2, 3)
    strided = Routing.from_topk(ids_KT.t(), weights_KT.t(), 3)
    assert_same(strided, Routing.from_topk(ids_KT.t().contiguous(), weights_KT.t().contiguous(), 3))


def test_weights_can_be_differentiated_twice() -> None:
    ids_TK = torch.tensor([[2, 0], [1, 2], [0, 1]], device=DEVICE)
    weights_TK = torch.rand(3, 2, dtype=torch.float64, device=DEVICE, requires_grad=True)
    mask_TE = torch.rand(3, 4, device=DEVICE) < 0.5
    weights_TE = torch.rand(3, 4, dtype=torch.float64, device=DEVICE, requires_grad=True)
    for loss, leaf in (
        (lambda w: Routing.from_topk(ids_TK, w, 3).weights_N ** 3, weights_TK),
        (lambda w: Routing.from_pairs(ids_TK[:, 1], ids_TK[:, 0], w[:, 0], 3, 3).weights_N ** 3, weights_TK),
        (lambda w: Routing.from_mask(mask_TE, w, 12).weights_N ** 3, weights_TE),
    ):
        assert torch.autograd.gradcheck(loss, leaf)
        assert torch.autograd.gradgradcheck(loss, leaf)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "dtype"),
    [
        (1, 1, 1, torch.int64),
        (3, 8, 3, torch.int32),
        (300, 3, 129, torch.int64),  # blocks that end within a token
        (521, 1, 60, torch.int32),
        (64, 8, 4096, torch.int64),
    ],
)
def test_kernels_equal_their_twin(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # Ids out of range on both sides: kernels clamp them.
    ids_N = torch.randint(-2, experts + 2, (tokens * top_k,), generator=generator, dtype=dtype).to(DEVICE)
    weights_N = torch.rand(tokens * top_k, generator=generator).to(DEVICE)
    actual = routing_triton.group_by_expert(ids_N, weights_N, experts, top_k)
    expected = group_by_expert(ids_N, weights_N, experts, top_k)
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_scan_walks_many_blocks() -> None:
    counts_BE = torch.randint(0, 9, (1300, 11), generator=torch.Generator().manual_seed(3), dtype=torch.int32)
    scanned_BE, totals_E = counts_BE.to(DEVICE, copy=True), torch.empty(11, dtype=torch.int32, device=DEVICE)
    routing_triton._scan_kernel[(2,)](scanned_BE, totals_E, 1300, 11, ROWS=512, COLUMNS=8)
    assert torch.equal(scanned_BE.cpu(), (counts_BE.cumsum(0) - counts_BE).int())
    assert torch.equal(totals_E.cpu(), counts_BE.sum(0).int())


@pytest.mark.parametrize(
    ("tokens", "experts", "density"),
    [
        (1, 1, 1.0),
        (3, 40, 0.0),
        (64, 32, 0.3),
        (65, 33, 1.0),
        (200, 60, 0.1),
        (7, 300, 0.5),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64])
def test_kernels_group_a_mask_like_their_twin(tokens: int, experts: int, density: float, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    chosen_TE = (torch.rand(tokens, experts, generator=generator) < density).to(DEVICE)
    chosen_TE[:, experts // 2] = False
    weights_TE = torch.rand(tokens, experts, generator=generator).to(DEVICE, dtype)
    strided_TE = chosen_TE.t().contiguous().t()
    for room in (int(chosen_TE.sum()), int(chosen_TE.sum()) + 1500):
        expected = group_chosen(chosen_TE, weights_TE, room)
        values_N = torch.rand(room, generator=generator).to(DEVICE, dtype)
        expected_TE = cells_of_pairs(values_N, chosen_TE, expected[2], expected[4])
        for mask_TE, of_mask_TE in ((chosen_TE, weights_TE), (strided_TE, weights_TE.t().contiguous().t())):
            actual = routing_triton.group_chosen(mask_TE, of_mask_TE, room)
            for one, other in zip(actual, expected, strict=True):
                assert one.dtype == other.dtype
                assert torch.equal(one, other)
            actual_TE = routing_triton.cells_of_pairs(values_N, mask_TE, actual[2], actual[4])
            assert actual_TE.dtype == dtype
            assert torch.equal(actual_TE, expected_TE)


def test_a_mask_by_the_kernels_is_differentiable_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moetrain.kernels.routing._has_kernels", lambda tensor: True)
    calls = []
    cells = routing_triton.cells_of_pairs
    monkeypatch.setattr(routing_triton, "cells_of_pairs", lambda *inputs: calls.append(1) or cells(*inputs))
    mask_TE = torch.tensor([[True, False, True], [False, False, True]], device=DEVICE)
    weights_TE = torch.rand(2, 3, device=DEVICE, requires_grad=True)
    factors_N = torch.tensor([1.0, 2, 4, 8, 16], device=DEVICE)
    weights_N = Routing.from_mask(mask_TE, weights_TE, 5).weights_N
    # By expert: (0: t0), (2: t0), (2: t1), and two places of padding.
    expected_TE = torch.tensor([[1.0, 0, 2], [0, 0, 4]], device=DEVICE)
    (once_TE,) = torch.autograd.grad((weights_N * factors_N).sum(), weights_TE, retain_graph=True)
    assert torch.equal(once_TE, expected_TE)
    assert len(calls) == 1
    (first_TE,) = torch.autograd.grad((weights_N**2 * factors_N).sum(), weights_TE, create_graph=True)
    (second_TE,) = torch.autograd.grad(first_TE.sum(), weights_TE)
    assert torch.equal(second_TE, 2 * expected_TE)


@pytest.mark.gpu
@pytest.mark.parametrize("experts", [256, 512, 60])
def test_kernels_group_large_masks_like_their_twin(experts: int) -> None:
    tokens = 16384 if experts > 60 else 40001
    weights_TE = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(experts)).cuda()
    for chosen_TE in (weights_TE > 0.97, (weights_TE > 0.97).t().contiguous().t(), weights_TE >= 0):
        room = int(chosen_TE.sum()) + 12345
        expected = group_chosen(chosen_TE, weights_TE, room)
        values_N = torch.rand(room, device="cuda")
        expected_TE = cells_of_pairs(values_N, chosen_TE, expected[2], expected[4])
        for _ in range(3):
            actual = routing_triton.group_chosen(chosen_TE, weights_TE, room)
            assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))
            actual_TE = routing_triton.cells_of_pairs(values_N, chosen_TE, actual[2], actual[4])
            assert torch.equal(actual_TE, expected_TE)


@pytest.mark.gpu
def test_kernels_reach_cells_beyond_32_bits() -> None:
    tokens, experts, pairs = 2**20, 2**11 + 1, 10**5
    cells_N = torch.randint(tokens * experts, (pairs,), generator=torch.Generator().manual_seed(0)).unique().cuda()
    weights_TE = torch.rand(tokens, experts, device="cuda", requires_grad=True)
    chosen_TE = torch.zeros(tokens, experts, dtype=torch.bool, device="cuda")
    chosen_TE[cells_N // experts, cells_N % experts] = True
    routing = Routing.from_mask(chosen_TE, weights_TE, pairs)
    # Cells are sorted by token; a stable sort by expert gives the pairs.
    by_expert_N = cells_N[(cells_N % experts).sort(stable=True).indices]
    trimmed = routing.trimmed()
    assert torch.equal(trimmed.token_ids_N.long(), by_expert_N // experts)
    assert torch.equal(trimmed.expert_ids_N, by_expert_N % experts)
    assert torch.equal(trimmed.weights_N, weights_TE[by_expert_N // experts, by_expert_N % experts])
    factors_N = torch.rand(pairs, device="cuda")
    (gradient_TE,) = torch.autograd.grad((routing.weights_N * factors_N).sum(), weights_TE)
    assert torch.equal(gradient_TE[by_expert_N // experts, by_expert_N % experts], factors_N[: trimmed.num_pairs])
    gradient_TE[by_expert_N // experts, by_expert_N % experts] = 0
    assert not bool(gradient_TE.any())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(24576, 8, 128), (1000, 6, 60), (4096, 16, 257), (777, 2, 5000)]
)
def test_routing_on_a_gpu_equals_the_cpu_without_waiting(tokens: int, top_k: int, experts: int) -> None:
    generator = torch.Generator().manual_seed(experts)
    ids_TK = torch.rand(tokens, experts, generator=generator).argsort(1)[:, :top_k]
    weights_TE = torch.rand(tokens, experts, generator=generator)
    mask_TE = weights_TE > 1 - top_k / experts / 2
    pairs = torch.randint(tokens, (tokens,), generator=generator), ids_TK[:, 0]
    gradient_N = torch.rand(tokens * top_k, generator=generator)
    on: dict[str, list[Routing]] = {}
    grads: dict[str, list[Tensor]] = {}
    for device in ("cpu", "cuda"):
        leaf = weights_TE.to(device, copy=True).requires_grad_()
        inputs = [tensor.to(device) for tensor in (ids_TK, *pairs, mask_TE, gradient_N)]
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            on[device] = [
                Routing.from_topk(inputs[0], leaf[:, :top_k], experts),
                Routing.from_topk(inputs[0].to(torch.int32), leaf[:, :top_k].to(torch.bfloat16), experts),
                Routing.from_pairs(inputs[1], inputs[2], leaf[:, 0], tokens, experts),
                Routing.from_mask(inputs[3], leaf, tokens * top_k),
            ]
            on[device] += [routing.renumbered(torch.arange(experts, device=device).flip(0)) for routing in on[device]]
            grads[device] = [
                torch.autograd.grad((r.weights_N * inputs[4][: r.num_pairs]).sum(), leaf)[0] for r in on[device]
            ]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(on["cuda"], on["cpu"], strict=True):
        assert_same(one, other)
    for one, other in zip(grads["cuda"], grads["cpu"], strict=True):
        assert torch.equal(one.cpu(), other)


@pytest.mark.gpu
def test_ids_out_of_range_stay_inside_on_a_gpu() -> None:
    ids_TK = torch.tensor([[-5, 9], [2, 1 << 40]], device="cuda")
    routing = Routing.from_topk(ids_TK, torch.ones(2, 2, device="cuda"), 4)
    assert routing.counts_E.tolist() == [1, 0, 1, 2]
    check_token_walk(routing)


def assert_same(one: Routing, other: Routing) -> None:
    for field in dataclasses.fields(Routing):
        ours, theirs = getattr(one, field.name), getattr(other, field.name)
        assert torch.equal(ours.cpu(), theirs.cpu()) if isinstance(ours, Tensor) else ours == theirs, field.name
