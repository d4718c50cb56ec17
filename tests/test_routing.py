"""Routing metadata against its definition, pair by pair."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moetrain.kernels import Routing


def pairs_by_expert(routing: Routing) -> list[tuple[int, int, float]]:
    """(expert, token, weight) in the stored order."""
    experts = torch.arange(routing.num_experts).repeat_interleave(routing.counts_E.long())
    return list(zip(experts.tolist(), routing.token_ids_N.tolist(), routing.weights_N.tolist(), strict=True))


def check_token_walk(routing: Routing) -> None:
    """Walking by token visits every pair once, each under its own token."""
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
