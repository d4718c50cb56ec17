"""Token rounding and the capacity limit against their definitions, token by token; the kernels against the twin."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from moetrain.kernels import Routing, grouped_triton, rounding_triton
from moetrain.kernels.rounding import (
    TILE,
    Rounding,
    keep_largest,
    most_pairs,
    round_tokens,
    round_tokens_twin,
    rounded_counts,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    if data.draw(st.booleans()):
        weights = torch.where(weights == 0, -torch.inf, torch.where(weights == 0.125, torch.inf, weights))
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


def test_the_tile_is_a_multiple_of_every_kernels() -> None:
    assert all(TILE % config.BLOCK_M == 0 for (stage, _), config in grouped_triton.CONFIGS.items() if stage != "weight")
    pytest.importorskip("triton.experimental.gluon.nvidia.hopper")
    from moetrain.kernels import grouped_hopper

    assert TILE % grouped_hopper.ROWS_PER_TILE == 0


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


def test_nan_is_the_smallest_weight_and_the_bound_holds() -> None:
    scores = torch.rand(200, 16, generator=torch.Generator().manual_seed(0))
    chosen = topk_mask(scores, 3)
    scores[torch.rand(200, 16, generator=torch.Generator().manual_seed(1)) < 0.7] = torch.nan
    counts = chosen.sum(0)
    for rounding in ROUNDINGS:
        rounded = round_tokens(chosen, scores, 16, rounding)
        assert torch.equal(rounded.sum(0), rounded_counts(counts, torch.full_like(counts, 200), 16, rounding))
        assert int(rounded.sum()) <= most_pairs(200, 3, 16, 16, rounding)
        numbers = ~scores.isnan()
        for expert in range(16):
            dropped, added = chosen[:, expert] & ~rounded[:, expert], rounded[:, expert] & ~chosen[:, expert]
            # A number is dropped only after every NaN, and a NaN is added only after every number.
            if (dropped & numbers[:, expert]).any():
                assert not (rounded & ~numbers)[:, expert].any()
            if (added & ~numbers[:, expert]).any():
                assert rounded[numbers[:, expert], expert].all()


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


def random_case(
    tokens: int, experts: int, *, density: float, levels: int, special: bool, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Mask, weights of so many values on either side of zero, and allowed pairs."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randint(-levels, levels + 1, (tokens, experts), generator=generator) / 8
    if special:
        draw = torch.rand(tokens, experts, generator=generator)
        for at, value in enumerate((torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0)):
            weights[(draw >= at / 32) & (draw < (at + 1) / 32)] = value
    chosen = torch.rand(tokens, experts, generator=generator) < density
    return chosen, weights, chosen | (torch.rand(tokens, experts, generator=generator) < 0.5)


def same_as_the_twin(chosen: Tensor, weights: Tensor, tile: int, rounding: Rounding, allowed: Tensor | None) -> None:
    expected = round_tokens_twin(chosen, weights, tile, rounding, allowed)
    actual = rounding_triton.round_tokens(chosen, weights, tile, rounding, allowed)
    assert actual.dtype == torch.bool
    assert actual.t().is_contiguous()
    assert torch.equal(actual, expected)


CASES = [  # tokens, experts, tile, density, levels
    (1, 1, 2, 1.0, 1),
    (5, 3, 8, 0.5, 1),
    (128, 16, 16, 0.3, 10**6),
    (300, 20, 128, 0.2, 10**6),
    (257, 33, 64, 0.9, 2),
    (200, 7, 32, 0.0, 3),
    (200, 7, 3, 1.0, 3),
    (4200, 2, 1000, 0.6, 50),  # more tokens than the bisection reads at a time
]


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "tile", "density", "levels"), CASES)
def test_kernels_equal_the_twin(
    tokens: int, experts: int, tile: int, density: float, levels: int, special: bool, rounding: Rounding
) -> None:
    case = random_case(tokens, experts, density=density, levels=levels, special=special, seed=tile)
    chosen, weights, allowed = (tensor.to(DEVICE) for tensor in case)
    same_as_the_twin(chosen, weights, tile, rounding, None)
    # Group limits, and inputs whose tokens are adjacent.
    same_as_the_twin(chosen.t().contiguous().t(), weights.t().contiguous().t(), tile, rounding, allowed)


def test_kernels_sum_the_counts_of_many_experts() -> None:
    """`balanced` needs those of all experts before, a block of them at a time."""
    chosen, weights, _ = random_case(6, 300, density=0.4, levels=10**6, special=False)
    same_as_the_twin(chosen.to(DEVICE), weights.to(DEVICE), 5, "balanced", None)


def test_weights_that_are_all_nan_or_equal_in_the_kernels() -> None:
    chosen, weights, _ = random_case(150, 3, density=0.3, levels=1, special=False)
    for value in (torch.nan, 1.5, torch.inf, -torch.inf):
        for rounding in ROUNDINGS:
            same_as_the_twin(chosen.to(DEVICE), torch.full_like(weights, value).to(DEVICE), 64, rounding, None)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(16384, 256, 8), (16384, 512, 8), (33001, 60, 4)])
def test_kernels_equal_the_twin_on_large_shapes(tokens: int, experts: int, top_k: int, rounding: Rounding) -> None:
    logits = torch.randn(tokens, experts, generator=torch.Generator().manual_seed(1)).cuda()
    logits += torch.linspace(0, 2, experts, device="cuda")
    chosen = topk_mask(logits, top_k)
    for scores in (logits.softmax(-1), (logits * 8).round()):
        same_as_the_twin(chosen, scores, 128, rounding, None)
        same_as_the_twin(chosen, scores, 128, rounding, chosen | (logits > 0))


@pytest.mark.gpu
def test_kernels_reach_cells_beyond_32_bits() -> None:
    tokens, experts = 2**20, 2**11 + 1
    weights = torch.rand(tokens, experts, device="cuda")
    chosen = weights > 0.999
    rounded = rounding_triton.round_tokens(chosen, weights, 128, "nearest")
    for some in (slice(0, 3), slice(experts - 3, experts)):
        assert torch.equal(rounded[:, some], round_tokens_twin(chosen[:, some], weights[:, some], 128, "nearest"))


@pytest.mark.gpu
def test_rounding_and_its_routing_in_a_graph() -> None:
    tokens, experts, top_k = 4096, 60, 4
    static = torch.empty(tokens, experts, device="cuda", requires_grad=True)
    chosen = torch.empty(tokens, experts, dtype=torch.bool, device="cuda")
    bound = most_pairs(tokens, top_k, experts, 128, "nearest")

    def step() -> tuple[Routing, Tensor]:
        routing = Routing.from_mask(round_tokens(chosen, static, 128, "nearest"), static, bound)
        return routing, torch.autograd.grad(routing.weights_N.square().sum(), static)[0]

    def fill(seed: int) -> None:
        scores = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            static.copy_(scores)
        chosen.copy_(topk_mask(scores, top_k))

    fill(0)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        routing, gradient = step()
    for seed in (1, 2):
        fill(seed)
        graph.replay()
        rounded = round_tokens_twin(chosen, static, 128, "nearest")
        expected = Routing.from_mask(rounded.cpu(), static.detach().cpu(), bound)
        for name in ("token_ids_N", "weights_N", "expert_offsets", "pair_ids_N", "token_offsets"):
            assert torch.equal(getattr(routing, name).cpu(), getattr(expected, name)), name
        assert torch.equal(gradient, 2 * static.detach() * rounded)
