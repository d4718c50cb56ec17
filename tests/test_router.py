"""Every way to choose and weigh experts against its formula, and the balancing around it."""

from __future__ import annotations

import dataclasses
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from moetrain.config import RouterConfig, from_dict
from moetrain.errors import ConfigError
from moetrain.kernels import Routing
from moetrain.kernels.rounding import Rounding, round_tokens
from moetrain.router import Router, RouterStats, RoutingTotals

TOKENS, DIM, EXPERTS = 24, 16, 8


def make_router(tile: int = 128, **settings: Any) -> Router:
    router = Router(DIM, EXPERTS, RouterConfig(**settings), param_dtype=torch.float64, tile=tile)
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(0))
    return router


def route(
    router: Router, x: Tensor, prior_load_E: Tensor | None = None, **settings: Any
) -> tuple[Routing, RouterStats]:
    routing, sums = router(x, **settings)
    return routing, router.stats(sums, prior_load_E)


def make_input(seed: int = 1, sequences: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sequences, TOKENS // sequences, DIM, dtype=torch.float64, generator=generator)


def dense_weights(routing: Routing) -> Tensor:
    """[T, E]: the weight of each pair, 0 where there is none."""
    routing = routing.trimmed()
    weights = torch.zeros(routing.num_tokens, routing.num_experts, dtype=routing.weights_N.dtype)
    experts = torch.arange(routing.num_experts).repeat_interleave(routing.counts_E.long())
    return weights.index_put((routing.token_ids_N, experts), routing.weights_N)


def expected_weights(choice: Tensor, weights: Tensor, top_k: int) -> Tensor:
    mask = torch.zeros_like(choice, dtype=torch.bool).scatter_(1, choice.topk(top_k).indices, True)
    return torch.where(mask, weights, 0.0)


def test_softmax_before_the_choice() -> None:
    router, x = make_router(top_k=3), make_input()
    routing, _ = router(x)
    scores = (x.flatten(0, 1) @ router.weight.T).softmax(-1)
    torch.testing.assert_close(dense_weights(routing), expected_weights(scores, scores, 3))


def test_softmax_after_the_choice_is_the_renormalised_softmax_before_it() -> None:
    x = make_input()
    after, _ = make_router(top_k=3, score="softmax_after_topk")(x)
    before, _ = make_router(top_k=3, score="softmax", normalize=True)(x)
    torch.testing.assert_close(dense_weights(after), dense_weights(before))
    torch.testing.assert_close(dense_weights(after).sum(1), torch.ones(TOKENS, dtype=torch.float64))


def test_sigmoid_normalised_and_scaled() -> None:
    router, x = make_router(top_k=2, score="sigmoid", normalize=True, scale=2.5), make_input()
    routing, _ = router(x)
    scores = (x.flatten(0, 1) @ router.weight.T).sigmoid()
    chosen = expected_weights(scores, scores, 2)
    torch.testing.assert_close(dense_weights(routing), 2.5 * chosen / chosen.sum(1, keepdim=True))


def test_group_limited_choice_stays_in_the_best_groups() -> None:
    router, x = make_router(top_k=4, groups=4, top_groups=2), make_input()
    routing, _ = router(x)
    scores = (x.flatten(0, 1) @ router.weight.T).softmax(-1)
    # Two experts a group, and two may be used of each: a group's score is the sum of both.
    groups = scores.view(TOKENS, 4, 2).sum(-1).topk(2).indices
    allowed = torch.zeros(TOKENS, 4, dtype=torch.bool).scatter_(1, groups, True).repeat_interleave(2, 1)
    expected = expected_weights(scores.masked_fill(~allowed, -1), scores, 4)
    torch.testing.assert_close(dense_weights(routing), expected)


def test_bias_moves_the_choice_but_not_the_weights() -> None:
    router, x = make_router(top_k=2, score="sigmoid", bias_update_rate=0.1), make_input()
    router.bias[5] = 10.0
    routing, _ = router(x)
    scores = (x.flatten(0, 1) @ router.weight.T).sigmoid()
    assert routing.counts_E[5] == TOKENS
    torch.testing.assert_close(dense_weights(routing), expected_weights(scores + router.bias, scores, 2))


def test_bias_update_pulls_towards_the_mean() -> None:
    router = make_router(bias_update_rate=0.01)
    router.update_bias(torch.tensor([4, 4, 4, 4, 4, 4, 0, 8]))
    assert router.bias.tolist() == pytest.approx([0, 0, 0, 0, 0, 0, 0.01, -0.01])


def test_bias_balances_a_skewed_router() -> None:
    """The loop that the bias is for: with it a lopsided router ends nearly even, without it it stays lopsided."""
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(4, 250, DIM, dtype=torch.float64, generator=generator) + 0.5  # the same for all tokens
    router = make_router(top_k=2, score="sigmoid", bias_update_rate=0.002)
    with torch.no_grad():
        router.weight /= 8  # scores away from 0 and 1, where steps of the bias would be coarse
    mean = 1000 * 2 / EXPERTS
    assert router(x)[0].counts_E.max() > 1.7 * mean
    for _ in range(200):
        router.update_bias(router(x)[0].counts_E)
    assert router(x)[0].counts_E.max() < 1.1 * mean


@pytest.mark.parametrize("scope", ["sequence", "rank", "global"])
def test_balance_loss_is_the_formula(scope: str) -> None:
    router, x = make_router(top_k=2, balance_scope=scope), make_input()
    _, stats = route(router, x)
    probabilities = (x @ router.weight.T).softmax(-1)
    chosen = torch.zeros_like(probabilities).scatter_(2, probabilities.topk(2).indices, 1.0)
    fractions, means = chosen / 2, probabilities
    if scope == "sequence":
        expected = EXPERTS * (fractions.mean(1) * means.mean(1)).sum(-1).mean()
    else:
        expected = EXPERTS * (fractions.mean((0, 1)) * means.mean((0, 1))).sum()
    torch.testing.assert_close(stats.balance_loss, expected)
    torch.testing.assert_close(stats.z_loss, (x @ router.weight.T).logsumexp(-1).square().mean())
    torch.testing.assert_close(stats.entropy, -(probabilities * probabilities.log()).sum(-1).mean())
    assert stats.load_E.tolist() == chosen.sum((0, 1)).tolist()


def test_global_balance_loss_counts_earlier_micro_batches() -> None:
    router, x = make_router(top_k=2, balance_scope="global"), make_input()
    prior = torch.tensor([100, 0, 0, 0, 0, 0, 0, 0])
    _, stats = route(router, x, prior)
    probabilities = (x @ router.weight.T).softmax(-1)
    load = stats.load_E + prior
    torch.testing.assert_close(stats.balance_loss, EXPERTS * (load / load.sum() * probabilities.mean((0, 1))).sum())


def test_perfect_balance_has_loss_one() -> None:
    router, x = make_router(top_k=2, force_balance=True), make_input()
    with torch.no_grad():
        router.weight.zero_()
    _, stats = route(router, x)
    assert float(stats.balance_loss.detach()) == pytest.approx(1.0)
    assert stats.load_E.tolist() == [TOKENS * 2 // EXPERTS] * EXPERTS


@pytest.mark.parametrize("policy", ["weight", "position"])
def test_capacity_refuses_what_the_policy_says(policy: str) -> None:
    router, x = make_router(top_k=2, capacity_factor=0.5, drop_policy=policy), make_input()
    capacity = 3  # 0.5 · 24 · 2 / 8
    routing, stats = route(router.train(), x)
    router.config = dataclasses.replace(router.config, capacity_factor=None)
    full = dense_weights(router(x)[0])
    kept = dense_weights(routing)
    assert int(stats.dropped) == int((full > 0).sum() - (kept > 0).sum()) > 0
    for expert in range(EXPERTS):
        wanted = full[:, expert].nonzero().flatten()
        order = wanted if policy == "position" else wanted[full[wanted, expert].argsort(descending=True)]
        assert sorted(order[:capacity].tolist()) == kept[:, expert].nonzero().flatten().tolist()
        torch.testing.assert_close(kept[order[:capacity], expert], full[order[:capacity], expert])


@pytest.mark.parametrize("rounding", get_args(Rounding))
def test_rounding_fills_tiles_and_is_counted(rounding: str) -> None:
    router, x = make_router(top_k=3, rounding=rounding, tile=4).train(), make_input()
    routing, stats = route(router, x)
    plain, plain_stats = route(make_router(top_k=3), x)
    before, after = dense_weights(plain) > 0, dense_weights(routing) > 0
    assert bool((after.sum(0) % 4 == 0).all())
    assert stats.load_E.tolist() == plain_stats.load_E.tolist() == before.sum(0).tolist()
    assert (int(stats.dropped), int(stats.added)) == (int((before & ~after).sum()), int((after & ~before).sum()))
    assert int(stats.dropped) + int(stats.added) > 0
    torch.testing.assert_close(stats.balance_loss, plain_stats.balance_loss)
    again, _ = router(x)
    assert torch.equal(dense_weights(again), dense_weights(routing))


@pytest.mark.parametrize(
    ("settings", "weight", "added_weight"),
    [
        ({"score": "softmax"}, "score", "score"),
        ({"score": "softmax", "normalize": True}, "of chosen", "of all"),
        ({"score": "softmax_after_topk"}, "of chosen", "of all"),
        ({"score": "sigmoid", "bias_update_rate": 0.1}, "score", "score"),
        ({"score": "sigmoid", "normalize": True, "scale": 2.5}, "of chosen", "of all"),
    ],
)
def test_rounded_pairs_weigh_what_the_expert_scores(settings: dict[str, Any], weight: str, added_weight: str) -> None:
    router, x = make_router(top_k=2, rounding="up", tile=8, **settings).train(), make_input()
    routing, _ = router(x)
    logits = x.flatten(0, 1) @ router.weight.T
    scores = logits.sigmoid() if settings["score"] == "sigmoid" else logits.softmax(-1)
    chosen = expected_weights(scores, scores, 2) > 0
    weights = {
        "score": scores,
        "of chosen": scores / (scores * chosen).sum(1, keepdim=True),
        "of all": scores / scores.sum(1, keepdim=True),
    }
    both = torch.where(chosen, weights[weight], weights[added_weight])
    rounded = round_tokens(chosen, both, 8, "up")
    assert int((rounded & ~chosen).sum()) > 0
    torch.testing.assert_close(dense_weights(routing), torch.where(rounded, both, 0.0) * settings.get("scale", 1.0))


@pytest.mark.parametrize("settings", [{}, {"normalize": True}, {"score": "sigmoid", "normalize": True}])
def test_added_pairs_teach_the_router(settings: dict[str, Any]) -> None:
    """The gradient of the weights of the added pairs alone is that of the formula."""
    router, x = make_router(top_k=2, rounding="up", tile=8, **settings).train(), make_input()
    logits = x.flatten(0, 1) @ router.weight.T
    scores = logits.sigmoid() if settings.get("score") == "sigmoid" else logits.softmax(-1)
    chosen = expected_weights(scores, scores, 2) > 0
    added = (dense_weights(router(x)[0]) > 0) & ~chosen
    factors = torch.randn(TOKENS, EXPERTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * added
    (expected,) = torch.autograd.grad((scores / scores.sum(1, keepdim=True) * factors).sum(), router.weight)
    assert expected.norm() > 0
    (gradient,) = torch.autograd.grad((dense_weights(router(x)[0]) * factors).sum(), router.weight)
    torch.testing.assert_close(gradient, expected)


def test_rounding_stays_within_the_groups_of_a_token() -> None:
    router, x = make_router(top_k=2, groups=4, top_groups=2, rounding="up", tile=8).train(), make_input()
    routing, stats = route(router, x)
    scores = (x.flatten(0, 1) @ router.weight.T).softmax(-1)
    groups = scores.view(TOKENS, 4, 2).amax(-1).topk(2).indices
    allowed = torch.zeros(TOKENS, 4, dtype=torch.bool).scatter_(1, groups, True).repeat_interleave(2, 1)
    assert int(stats.added) > 0
    assert bool((dense_weights(routing)[~allowed] == 0).all())


def test_evaluation_does_not_round() -> None:
    router, x = make_router(top_k=2, rounding="down", tile=8).eval(), make_input()
    routing, stats = route(router, x)
    torch.testing.assert_close(dense_weights(routing), dense_weights(make_router(top_k=2)(x)[0]))
    assert int(stats.dropped) == int(stats.added) == 0


def test_rounding_and_a_capacity_limit_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"router\.rounding = nearest: .*capacity_factor"):
        from_dict({"router": {"rounding": "nearest", "capacity_factor": 1.0}})
    assert from_dict({"router": {"rounding": "balanced"}}).router.rounding == "balanced"


def test_evaluation_drops_nothing_and_adds_no_noise() -> None:
    router, x = make_router(top_k=2, capacity_factor=0.5, jitter=0.5).eval(), make_input()
    routing, stats = route(router, x, noise_seed=1)
    plain, _ = make_router(top_k=2)(x)
    assert int(stats.dropped) == 0
    torch.testing.assert_close(dense_weights(routing), dense_weights(plain))


def test_jitter_is_reproducible_and_differs_between_seeds() -> None:
    router, x = make_router(top_k=2, jitter=0.3).train(), make_input()
    first, again, other = (dense_weights(router(x, noise_seed=seed)[0]) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_router_is_float32_under_bfloat16_activations() -> None:
    router = Router(DIM, EXPERTS, RouterConfig(top_k=2))
    torch.nn.init.normal_(router.weight)
    routing, stats = route(router, make_input().bfloat16())
    assert routing.weights_N.dtype == stats.z_loss.dtype == torch.float32


@pytest.mark.gpu
@pytest.mark.parametrize(
    "settings",
    [{}, {"rounding": "nearest"}, {"rounding": "balanced"}, {"capacity_factor": 1.0}, {"score": "sigmoid"}],
)
def test_the_host_never_waits_for_the_gpu(settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    router = Router(256, 64, RouterConfig(top_k=4, **settings)).cuda()
    torch.nn.init.normal_(router.weight, std=0.02)
    x = torch.randn(2, 1024, 256, device="cuda").bfloat16().requires_grad_()

    def step() -> Tensor:
        routing, stats = route(router, x)
        (routing.weights_N.square().sum() + stats.balance_loss + stats.z_loss).backward()
        return routing.weights_N

    step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(step(), weights)


@pytest.mark.gpu
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_router_on_the_gpu_has_float32_quality(weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    router = Router(512, 64, RouterConfig(top_k=4), param_dtype=weight_dtype).cuda()
    torch.nn.init.normal_(router.weight, std=0.05)
    x = torch.randn(1, 4096, 512, device="cuda").bfloat16().requires_grad_()
    factors = torch.randn(4096, 64, device="cuda", dtype=torch.float64)
    routing, stats = route(router, x)
    experts = torch.arange(64, device="cuda").repeat_interleave(routing.counts_E.long())
    pairs = (routing.token_ids_N.long(), experts)
    ((routing.weights_N * factors[pairs]).sum() + stats.z_loss).backward()

    x64, w64 = x.detach().double().requires_grad_(), router.weight.detach().double().requires_grad_()
    logits = x64.flatten(0, 1) @ w64.T
    scores = logits.softmax(-1)
    mask = torch.zeros_like(scores)
    mask[pairs] = 1.0
    ((scores * factors * mask).sum() + logits.logsumexp(-1).square().mean()).backward()

    def error(value: Tensor | None, reference: Tensor | None) -> float:
        assert value is not None
        assert reference is not None
        return float((value.double() - reference).norm() / reference.norm())

    assert error(routing.weights_N.detach(), scores.detach()[pairs]) < 1e-5
    assert error(x.grad, x64.grad) < 2**-9  # rounded to bfloat16
    assert error(router.weight.grad, w64.grad) < (3e-5 if weight_dtype == torch.float32 else 2**-9)
    swapped = scores.topk(4).indices.sort().values != (mask.topk(4).indices.sort().values)
    assert float(swapped.double().mean()) < 1e-4


def test_totals_add_up_over_micro_batches() -> None:
    router = make_router(top_k=2)
    totals = RoutingTotals(1, EXPERTS, torch.device("cpu"))
    stats = [route(router, make_input(seed))[1] for seed in (1, 2)]
    for one in stats:
        totals.add([one])
    assert totals.forwards == 2
    assert totals.load_LE.tolist() == [(stats[0].load_E + stats[1].load_E).tolist()]
    assert totals.added_L.tolist() == totals.dropped_L.tolist() == [0]
    assert totals.means_3L[0, 0].item() == pytest.approx(
        float((stats[0].balance_loss + stats[1].balance_loss).detach())
    )
    assert totals.reduced(1).load_LE is not totals.load_LE
