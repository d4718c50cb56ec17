"""The router: scores every expert for every token and chooses.

All arithmetic is float32 (or wider). Shapes: B sequences, S positions, T = B·S tokens, D width, E experts, K chosen
experts a token, G groups, L MoE layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.config import RouterConfig
from moetrain.kernels.float32_linear import float32_linear
from moetrain.kernels.rounding import TILE, Rounding, keep_largest, most_pairs, round_tokens
from moetrain.kernels.routing import Routing
from moetrain.kernels.topk import SoftmaxPlace, topk_softmax
from moetrain.parallel.tensor import gather_rows


@dataclass(frozen=True)
class RouterSums:
    """What one layer's router counts of some tokens; those of a micro-batch are the sum of its parts'.

    Returned, never accumulated inside the module: an activation checkpoint runs the forward twice and must not count
    twice.
    """

    tokens: int
    load_E: Tensor
    """int64 [E]: pairs of each expert by top-k, before a limit or rounding; no gradient."""
    balance: Tensor
    """With gradient, of the tokens: [E] probabilities; where `router.balance_scope` is sequence 0-D, the balance loss
    of their sequences."""
    z: Tensor
    """0-D, with gradient: squared log-sum-exp of the tokens' scores."""
    entropy: Tensor
    """0-D, of the tokens' probabilities, in nats; no gradient."""
    dropped: Tensor
    """int64 0-D: pairs of top-k that the capacity limit or token rounding refused."""
    added: Tensor
    """int64 0-D: pairs beyond top-k that token rounding added."""

    def __add__(self, other: RouterSums) -> RouterSums:
        return RouterSums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class RouterStats:
    """What one forward pass of one layer says about its routing (stacked over layers by the decoder)."""

    load_E: Tensor
    """int64 [E]: pairs of each expert by top-k, before a limit or rounding, of this rank's tokens; no gradient."""
    balance_loss: Tensor
    """0-D, with gradient; 1 under perfect balance."""
    z_loss: Tensor
    """0-D, with gradient."""
    entropy: Tensor
    """0-D: mean entropy of the tokens' probabilities, in nats; no gradient."""
    dropped: Tensor
    """int64 0-D: pairs of top-k that the capacity limit or token rounding refused."""
    added: Tensor
    """int64 0-D: pairs beyond top-k that token rounding added."""


class Router(nn.Module):
    """Linear scores, top-k choice, and the balancing around it.

    Parameters: `weight` [E, D]. Buffers: `bias` [E] float32, the selection bias of auxiliary-loss-free balancing
    (arXiv 2408.15664), which moves the choice but not the weights.
    """

    weight: nn.Parameter
    bias: Tensor

    def __init__(
        self,
        dim: int,
        num_experts: int,
        config: RouterConfig,
        *,
        balance_group: dist.ProcessGroup | None = None,
        sequence_group: dist.ProcessGroup | None = None,
        param_dtype: torch.dtype = torch.float32,
        tile: int = TILE,
    ):
        """`balance_group`: ranks over which `router.balance_scope: global` counts; None: this rank alone.
        `sequence_group`: ranks whose tokens, in order, are whole sequences; None: this rank's are. `tile`: rows of a
        tile of the experts' kernel, to whose multiples `router.rounding` rounds."""
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.balance_group = balance_group
        self.sequence_group = sequence_group
        self.tile = tile
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=param_dtype))
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(self, x_BSD: Tensor, *, pieces: int = 1, noise_seed: int | None = None) -> tuple[Routing, RouterSums]:
        """Route the B·S tokens.

        `pieces`: how many consecutive rows, over the x of all ranks of `sequence_group` in order, make a sequence.
        `noise_seed`: of the jitter in training.
        """
        sequences, length, _ = x_BSD.shape
        logits_TE = self._logits(x_BSD.flatten(0, 1), noise_seed)
        scores_TE, probabilities_TE = self._scores(logits_TE)
        experts_TK, weights_TK, allowed_TE = self._choose(logits_TE, scores_TE)

        rounding = self.config.rounding
        if self.training and rounding != "none":
            weights_TE = self._weights_of_all(experts_TK, weights_TK, scores_TE, probabilities_TE)
            routing, load_E = self._rounded(experts_TK, weights_TE, allowed_TE, rounding)
        elif self.training and self.config.capacity_factor is not None:
            routing, load_E = self._limited(experts_TK, weights_TK, self.config.capacity_factor)
        else:
            routing = Routing.from_topk(experts_TK, weights_TK, self.num_experts)
            load_E = routing.counts_E.to(torch.int64)
        change_E = routing.counts_E - load_E

        with torch.no_grad():
            # p·log p with 0·log 0 = 0.
            entropy = -torch.special.xlogy(probabilities_TE, probabilities_TE).sum()
        if self.config.balance_scope == "sequence":
            shape = (sequences, length)
            losses_B = self._losses_of_sequences(
                experts_TK.unflatten(0, shape), probabilities_TE.unflatten(0, shape), pieces
            )
            balance = losses_B.sum() * length
        else:
            balance = probabilities_TE.sum(0)
        return routing, RouterSums(
            sequences * length,
            load_E,
            balance,
            z=logits_TE.logsumexp(-1).square().sum(),  # ST-MoE, arXiv 2202.08906, eq. 5
            entropy=entropy,
            dropped=change_E.clamp_max(0).sum().neg(),
            added=change_E.clamp_min(0).sum(),
        )

    def stats(self, sums: RouterSums, prior_load_E: Tensor | None = None) -> RouterStats:
        """The means and losses of a micro-batch.

        `prior_load_E`: this rank's loads of the step's earlier micro-batches, which the global balance loss adds to its
        own (arXiv 2501.11873, §3: a buffer over accumulation steps): the first micro-batch sees only itself, the last
        the whole step.
        """
        return RouterStats(
            sums.load_E,
            self._balance_loss(sums, prior_load_E),
            sums.z / sums.tokens,
            sums.entropy / sums.tokens,
            sums.dropped,
            sums.added,
        )

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower that of those above it, by a fixed step.

        b_e ← b_e + u · sign(mean(c) − c_e), DeepSeek-V3 (arXiv 2412.19437, §2.1.2). `load_E`: pairs an expert got in
        the whole step, over all ranks.
        """
        load_E = load_E.to(self.bias.dtype)
        self.bias += self.config.bias_update_rate * (load_E.mean() - load_E).sign()

    def _logits(self, x_TD: Tensor, noise_seed: int | None) -> Tensor:
        """x · Wᵀ [T, E] in float32 or wider."""
        jitter = self.config.jitter if self.training else 0.0
        if x_TD.is_cuda and x_TD.dtype == torch.bfloat16 and not jitter:
            return float32_linear(x_TD, self.weight)
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        if jitter:
            x_TD = x_TD * _jitter(x_TD, jitter, noise_seed or 0)
        return x_TD @ self.weight.to(x_TD.dtype).t()

    def _scores(self, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
        """What ranks and weighs experts, and a distribution over them: for sigmoid s / Σ s (arXiv 2412.19437, eq. 19).

        The distribution is that of the balance loss, of the entropy, and of the weights that token rounding gives.
        """
        if self.config.score == "sigmoid":
            scores_TE = logits_TE.sigmoid()
            return scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True)
        probabilities_TE = logits_TE.softmax(-1)
        return (probabilities_TE if self.config.score == "softmax" else logits_TE), probabilities_TE

    def _choose(self, logits_TE: Tensor, scores_TE: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Expert ids [T, K], their weights [T, K], and the pairs that a group limit allows (None: all) [T, E]."""
        config = self.config
        bias_E = self.bias.to(logits_TE.dtype) if config.bias_update_rate > 0 else None
        allowed_TE = None
        if config.score != "sigmoid" and config.top_groups == config.groups and not config.force_balance:
            place: SoftmaxPlace = "before" if config.score == "softmax" else "after"
            weights_TK, experts_TK = topk_softmax(logits_TE, config.top_k, softmax=place, bias_E=bias_E)
            experts_TK = experts_TK.to(torch.int64)
        else:
            choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
            if config.top_groups < config.groups:
                choice_TE = self._within_best_groups(choice_TE)
                allowed_TE = choice_TE > -torch.inf
            if config.force_balance:
                first_T1 = torch.arange(choice_TE.shape[0], device=choice_TE.device)[:, None] * config.top_k
                experts_TK = (first_T1 + torch.arange(config.top_k, device=choice_TE.device)) % self.num_experts
            else:
                experts_TK = choice_TE.topk(config.top_k, dim=-1).indices
            weights_TK = scores_TE.gather(-1, experts_TK)
            if config.score == "softmax_after_topk":
                weights_TK = weights_TK.softmax(-1)
        if config.normalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True).clamp_min(1e-20)
        return experts_TK, weights_TK * config.scale if config.scale != 1 else weights_TK, allowed_TE

    def _within_best_groups(self, choice_TE: Tensor) -> Tensor:
        """Exclude experts outside the best groups, a group's score being the sum of its best K / top_groups experts.

        Node-limited routing of DeepSeek-V3 (arXiv 2412.19437, §2.1.2).
        """
        config = self.config
        choice_TGX = choice_TE.unflatten(-1, (config.groups, -1))
        best = min(max(1, config.top_k // config.top_groups), choice_TGX.shape[-1])
        group_scores_TG = choice_TGX.topk(best, dim=-1).values.sum(-1)
        allowed_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
        allowed_TG.scatter_(-1, group_scores_TG.topk(config.top_groups, dim=-1).indices, True)
        return choice_TGX.masked_fill(~allowed_TG[..., None], -torch.inf).flatten(-2)

    def _balance_loss(self, sums: RouterSums, prior_load_E: Tensor | None) -> Tensor:
        """E · Σ_e f_e · P_e (Switch Transformer, arXiv 2101.03961, eq. 4, divided by K so that balance gives 1).

        f is the fraction of pairs that chose expert e, P its mean probability, both over the tokens of the scope; the
        mean of P over ranks and micro-batches, as over the pieces of a sequence, comes from the mean of their losses.
        """
        if self.config.balance_scope == "sequence":
            return sums.balance / sums.tokens
        load_E = sums.load_E.to(sums.balance.dtype)
        if self.config.balance_scope == "global":
            if prior_load_E is not None:
                load_E = load_E + prior_load_E
            if self.balance_group is not None:
                dist.all_reduce(load_E, group=self.balance_group)
        return self.num_experts * (load_E / load_E.sum() * sums.balance / sums.tokens).sum()

    def _losses_of_sequences(self, experts_BSK: Tensor, probabilities_BSE: Tensor, pieces: int) -> Tensor:
        """[B]: the balance loss with f of each sequence and P of each piece."""
        chosen = experts_BSK.flatten(1)
        loads_BE = probabilities_BSE.new_zeros(chosen.shape[0], self.num_experts)
        loads_BE.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=loads_BE.dtype))
        if self.sequence_group is not None and pieces > 1:
            loads_BE = _of_whole_sequences(loads_BE, pieces, self.sequence_group)
        fractions_BE = loads_BE / (pieces * chosen.shape[1])
        return self.num_experts * (fractions_BE * probabilities_BSE.mean(1)).sum(-1)

    def _weights_of_all(
        self, experts_TK: Tensor, weights_TK: Tensor, scores_TE: Tensor, probabilities_TE: Tensor
    ) -> Tensor:
        """[T, E]: the weights of top-k, and those that the other pairs get if token rounding adds them.

        A pair of top-k keeps its weight. An added one has its score: the score itself if that is what top-k's weights
        are, and the expert's share of all E where those are shares of the K.
        """
        shares = self.config.normalize or self.config.score == "softmax_after_topk"
        return ((probabilities_TE if shares else scores_TE) * self.config.scale).scatter(1, experts_TK, weights_TK)

    def _rounded(
        self, experts_TK: Tensor, weights_TE: Tensor, allowed_TE: Tensor | None, rounding: Rounding
    ) -> tuple[Routing, Tensor]:
        """Round each expert's tokens to multiples of the tile; the routing, and the loads before."""
        chosen_TE = torch.zeros_like(weights_TE, dtype=torch.bool).scatter_(1, experts_TK, True)
        rounded_TE = round_tokens(chosen_TE, weights_TE, self.tile, rounding, allowed_TE)
        bound = most_pairs(experts_TK.shape[0], experts_TK.shape[1], self.num_experts, self.tile, rounding)
        return Routing.from_mask(rounded_TE, weights_TE, bound), chosen_TE.sum(0)

    def _limited(self, experts_TK: Tensor, weights_TK: Tensor, capacity_factor: float) -> tuple[Routing, Tensor]:
        """Keep at most ⌈factor · T · K / E⌉ pairs an expert; the routing, and the loads before."""
        num_tokens, top_k = experts_TK.shape
        capacity = -int(-capacity_factor * num_tokens * top_k // self.num_experts)
        weights_TE = weights_TK.new_zeros(num_tokens, self.num_experts).scatter(1, experts_TK, weights_TK)
        chosen_TE = torch.zeros_like(weights_TE, dtype=torch.bool).scatter_(1, experts_TK, True)
        # Among equal ones the first tokens stay.
        preference_TE = weights_TE if self.config.drop_policy == "weight" else torch.zeros_like(weights_TE)
        kept_TE = keep_largest(chosen_TE, preference_TE, capacity)
        bound = min(num_tokens * top_k, capacity * self.num_experts)
        return Routing.from_mask(kept_TE, weights_TE, bound), chosen_TE.sum(0)


def _of_whole_sequences(loads_BE: Tensor, pieces: int, group: dist.ProcessGroup) -> Tensor:
    """For each of this rank's pieces the loads of the sequence that it belongs to, other ranks' pieces included."""
    whole_BE = gather_rows(loads_BE, group).unflatten(0, (-1, pieces)).sum(1).repeat_interleave(pieces, 0)
    return whole_BE.chunk(group.size())[group.rank()]


def _jitter(x: Tensor, amount: float, seed: int) -> Tensor:
    """Uniform noise in [1 − amount, 1 + amount] (Switch Transformer), the same when a checkpoint runs again."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).uniform_(1 - amount, 1 + amount, generator=generator)


class RoutingTotals:
    """Routing of a whole step: the sums of :class:`RouterStats` over its micro-batches, layer by layer."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        self.load_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self.dropped_L = torch.zeros(num_layers, dtype=torch.int64, device=device)
        self.added_L = torch.zeros_like(self.dropped_L)
        self.means_3L = torch.zeros(3, num_layers, device=device)
        """Sums of balance loss, z-loss and entropy, to be divided by the number of summands."""
        self.forwards = 0

    def add(self, layers: list[RouterStats]) -> None:
        """Count one forward pass."""
        if not layers:
            return
        self.forwards += 1
        self.load_LE += torch.stack([stats.load_E for stats in layers])
        self.dropped_L += torch.stack([stats.dropped for stats in layers])
        self.added_L += torch.stack([stats.added for stats in layers])
        self.means_3L += torch.stack(
            [
                torch.stack([getattr(stats, name).detach() for stats in layers])
                for name in ("balance_loss", "z_loss", "entropy")
            ]
        )

    def reduced(self, ranks: int) -> RoutingTotals:
        """A copy summed over all ranks (of the default process group); collective."""
        total = copy.deepcopy(self)
        total.forwards *= ranks
        if ranks > 1:
            for tensor in (total.load_LE, total.dropped_L, total.added_L, total.means_3L):
                dist.all_reduce(tensor)
        return total
