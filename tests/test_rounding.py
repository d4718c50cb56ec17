"""Token rounding and the capacity limit against their definitions, token by token."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moetrain.kernels.rounding import Rounding, keep_largest, most_pairs, round_tokens

ROUNDINGS: tuple[Rounding, ...] = get_args(Rounding)


def topk_mask(scores_TE: Tensor, top_k: int) -> Tensor:
    return torch.zeros_like(scores_TE, dtype=torch.bool).scatter_(1, scores_TE.topk(top_k).indices, True)


def by_hand(chosen: Tensor, weights: Tensor, tile: int, rounding: str, allowed: Tensor) -> list[set[int]]:
    """The tokens of each expert: its candidates in order, of which so many stay."""
    result, error = [], 0  # `error`: how many more pairs than before, so far
    for expert in range(chosen.shape[1]):
        taken = [bool(c) for c in chosen[:, expert]]
        order = [token for token in range(chosen.shape[0]) if taken[token] or allowed[token, expert]]
        order.sort(key=lambda token: (not taken[token], -weights[token, expert].item(), token))
        count = sum(taken)
        down = count - count % tile
        up = down if count == down else down + tile
        if rounding == "nearest":
            target = up if up - count < count - down else down
        elif rounding == "balanced":
            target = up if abs(up - count + error) < abs(down - count + error) else down
            error += target - count
        else:
            target = {"up": up, "down": down}[rounding]
        result.append(set(order[:target]))
    return result


def tokens_of(chosen: Tensor) -> list[set[int]]:
    return [set(column.nonzero().flatten().tolist()) for column in chosen.t()]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_rounding_is_the_definition(rounding: Rounding, data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(0, 14)), data.draw(st.integers(1, 5))
    top_k, tile = data.draw(st.integers(1, experts)), data.draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    # Few different weights, so that many are equal, and a choice that does not follow them.
    weights = torch.randint(0, data.draw(st.sampled_from([2, 5, 1000])), (tokens, experts), generator=generator) / 8
    chosen = topk_mask(torch.rand(tokens, experts, generator=generator), top_k)
    allowed = chosen | (torch.rand(tokens, experts, generator=generator) < data.draw(st.sampled_from([0.5, 1.0])))
    rounded = round_tokens(chosen, weights, tile, rounding, allowed)
    assert tokens_of(rounded) == by_hand(chosen, weights, tile, rounding, allowed)
    assert int(rounded.sum()) <= most_pairs(tokens, top_k, experts, tile, rounding)
    if bool(allowed.all()):
        assert torch.equal(round_tokens(chosen, weights, tile, rounding), rounded)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_what_rounding_promises(rounding: Rounding) -> None:
    """On a skewed routing of a realistic shape, without the definition's help."""
    tokens, experts, top_k, tile = 1000, 24, 3, 64
    generator = torch.Generator().manual_seed(0)
    scores = (torch.randn(tokens, experts, generator=generator) + torch.linspace(0, 4, experts)).softmax(-1)
    chosen = topk_mask(scores, top_k)
    rounded = round_tokens(chosen, scores, tile, rounding)
    before, after = chosen.sum(0), rounded.sum(0)
    assert not torch.equal(before, after)
    assert bool(((after % tile == 0) | (after == tokens)).all())
    assert int((after - before).abs().max()) < tile
    if rounding == "nearest":
        assert int((after - before).abs().max()) <= tile // 2
    if rounding == "balanced":
        assert int((after - before).cumsum(0).abs().max()) <= tile // 2
    for expert in range(experts):
        was, now, score = chosen[:, expert], rounded[:, expert], scores[:, expert]
        if before[expert] >= after[expert]:
            assert bool((now <= was).all())
            if bool((was & ~now).any() and now.any()):
                assert score[was & ~now].max() <= score[now].min()
        else:
            assert bool((now >= was).all())
            if not bool(now.all()):
                assert score[now & ~was].min() >= score[~now].max()


def test_the_last_tile_stays_open_where_tokens_run_out() -> None:
    """Ten tokens cannot fill a third tile of four."""
    scores = torch.rand(10, 2, generator=torch.Generator().manual_seed(0)) + torch.tensor([1.0, 0.0])
    rounded = round_tokens(topk_mask(scores, 1), scores, 4, "up")
    assert rounded.sum(0).tolist() == [10, 0]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_bound_on_pairs_is_tight(rounding: Rounding) -> None:
    """`most_pairs` sizes buffers: the worst case reaches it, so that no smaller number would do."""
    tile, experts = 8, 5
    worst = {"nearest": tile // 2 + 1, "up": 1, "down": tile, "balanced": 0}[rounding]
    counts = [worst] * experts if worst else [tile // 2 + 1, *[tile] * (experts - 1)]
    chosen = torch.zeros(sum(counts), experts, dtype=torch.bool)
    chosen[torch.arange(sum(counts)), torch.arange(experts).repeat_interleave(torch.tensor(counts))] = True
    rounded = round_tokens(chosen, torch.rand(chosen.shape), tile, rounding)
    assert int(rounded.sum()) == most_pairs(sum(counts), 1, experts, tile, rounding)


def test_nan_weights_stay_and_the_bound_holds() -> None:
    scores = torch.rand(50, 4, generator=torch.Generator().manual_seed(0))
    chosen = topk_mask(scores, 2)
    scores[::3] = torch.nan
    for rounding in ROUNDINGS:
        rounded = round_tokens(chosen, scores, 16, rounding)
        assert torch.equal(rounded[::3], chosen[::3])
        assert int(rounded.sum()) <= most_pairs(50, 2, 4, 16, rounding)


@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_limit_keeps_the_largest_and_then_the_first(data: st.DataObject) -> None:
    tokens, experts = data.draw(st.integers(0, 12)), data.draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    weights = torch.randint(0, data.draw(st.sampled_from([1, 3, 1000])), (tokens, experts), generator=generator) / 8
    chosen = torch.rand(tokens, experts, generator=generator) < 0.6
    limit = data.draw(st.integers(1, 12))
    expected = []
    for expert, taken in enumerate(tokens_of(chosen)):
        expected.append(set(sorted(taken, key=lambda token: (-weights[token, expert].item(), token))[:limit]))
    assert tokens_of(keep_largest(chosen, weights, limit)) == expected


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda mask, weights: round_tokens(mask, weights, 0, "up"), "at least 1"),
        (lambda mask, weights: round_tokens(mask, weights, 4, "upwards"), "there are nearest"),
        (lambda mask, weights: round_tokens(mask, weights[:1], 4, "up"), "one shape"),
        (lambda mask, weights: round_tokens(mask, weights, 4, "up", mask[:1]), "one shape"),
    ],
)
def test_bad_input_is_refused(call: Callable[[Tensor, Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 2, dtype=torch.bool), torch.ones(3, 2))


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_nothing_depends_on_values_that_only_the_device_knows(rounding: Rounding) -> None:
    """Tensors without values refuse every operation that would have to wait for one."""
    with FakeTensorMode():
        scores = torch.rand(300, 8)
        chosen = scores > 0.5
        assert round_tokens(chosen, scores, 16, rounding).shape == (300, 8)
        assert keep_largest(chosen, scores, 5).shape == (300, 8)
        with pytest.raises(DataDependentOutputException):
            int(chosen.sum())


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_gpu_rounds_like_the_cpu_and_the_host_does_not_wait(rounding: Rounding) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5000, 60, generator=generator) + torch.linspace(0, 3, 60)
    scores = (logits.softmax(-1) * 2**10).round() / 2**10  # many equal ones
    chosen = topk_mask(logits, 6)
    expected = round_tokens(chosen, scores, 128, rounding)
    limited = keep_largest(chosen, scores, 300)
    on_gpu, scores_on_gpu = chosen.cuda(), scores.cuda()
    round_tokens(on_gpu, scores_on_gpu, 128, rounding)
    torch.cuda.set_sync_debug_mode("error")
    try:
        runs = [round_tokens(on_gpu, scores_on_gpu, 128, rounding) for _ in range(3)]
        kept = keep_largest(on_gpu, scores_on_gpu, 300)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for rounded in runs:
        assert torch.equal(rounded.cpu(), expected)
    assert torch.equal(kept.cpu(), limited)
