"""The router: scores every expert for every token and chooses.

All arithmetic is float32 (or wider). Shapes: B sequences, S positions, T = B·S tokens, D width, E experts, K chosen
experts a token, G groups, L MoE layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moetrain.config import RouterConfig
from moetrain.kernels import Routing


@dataclass(frozen=True)
class RouterStats:
    """What one forward pass of one layer says about its routing (stacked over layers by the decoder).

    Returned, never accumulated inside the module: an activation checkpoint runs the forward twice and must not count
    twice.
    """

    load_E: Tensor
    """int64 [E]: pairs that chose each expert, before any are refused, of this rank's tokens; no gradient."""
    balance_loss: Tensor
    """0-D, with gradient; 1 under perfect balance."""
    z_loss: Tensor
    """0-D, with gradient."""
    entropy: Tensor
    """0-D: mean entropy of the tokens' probabilities, in nats; no gradient."""
    dropped: Tensor
    """int64 0-D: pairs refused by the capacity limit."""


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
        param_dtype: torch.dtype = torch.float32,
    ):
        """`balance_group`: ranks over which `router.balance_scope: global` counts; None: this rank alone."""
        super().__init__()
        self.num_experts = num_experts
        self.config = config
        self.balance_group = balance_group
        self.weight = nn.Parameter(torch.empty(num_experts, dim, dtype=param_dtype))
        self.register_buffer("bias", torch.zeros(num_experts))

    def forward(
        self, x_BSD: Tensor, *, prior_load_E: Tensor | None = None, noise_seed: int | None = None
    ) -> tuple[Routing, RouterStats]:
        """Route the B·S tokens.

        `prior_load_E`: this rank's loads of the step's earlier micro-batches, which the global balance loss adds to
        its own (arXiv 2501.11873, §3: a buffer over accumulation steps): the first micro-batch sees only itself, the
        last the whole step. `noise_seed`: of the jitter in training.
        """
        sequences, length, _ = x_BSD.shape
        x_TD = x_BSD.flatten(0, 1)
        x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
        if self.training and self.config.jitter > 0:
            x_TD = x_TD * _jitter(x_TD, self.config.jitter, noise_seed or 0)
        logits_TE = x_TD @ self.weight.to(x_TD.dtype).t()
        probabilities_TE = self._probabilities(logits_TE)
        experts_TK, weights_TK = self._choose(logits_TE, probabilities_TE)

        with torch.no_grad():
            # p·log p with 0·log 0 = 0.
            entropy = -torch.special.xlogy(probabilities_TE, probabilities_TE).sum(-1).mean()
        balance_loss = self._balance_loss(
            experts_TK.unflatten(0, (sequences, length)),
            probabilities_TE.unflatten(0, (sequences, length)),
            prior_load_E,
        )
        z_loss = logits_TE.logsumexp(-1).square().mean()  # ST-MoE, arXiv 2202.08906, eq. 5

        if self.training and self.config.capacity_factor is not None:
            routing = self._limited(experts_TK, weights_TK, self.config.capacity_factor)
        else:
            routing = Routing.from_topk(experts_TK, weights_TK, self.num_experts)
        load_E = torch.zeros_like(self.bias, dtype=torch.int64)
        load_E.index_add_(0, experts_TK.flatten(), torch.ones_like(experts_TK.flatten()))
        dropped = load_E.sum() - routing.num_pairs
        return routing, RouterStats(load_E, balance_loss, z_loss, entropy, dropped)

    @torch.no_grad()
    def update_bias(self, load_E: Tensor) -> None:
        """Raise the bias of experts below the mean load and lower that of those above it, by a fixed step.

        b_e ← b_e + u · sign(mean(c) − c_e), DeepSeek-V3 (arXiv 2412.19437, §2.1.2). `load_E`: pairs an expert got in
        the whole step, over all ranks.
        """
        load_E = load_E.to(self.bias.dtype)
        self.bias += self.config.bias_update_rate * (load_E.mean() - load_E).sign()

    def _probabilities(self, logits_TE: Tensor) -> Tensor:
        """A distribution over experts for the balance loss and the entropy (eq. 18-19 of arXiv 2412.19437)."""
        if self.config.score == "sigmoid":
            scores_TE = logits_TE.sigmoid()
            return scores_TE / scores_TE.sum(-1, keepdim=True)
        return logits_TE.softmax(-1)

    def _choose(self, logits_TE: Tensor, probabilities_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Expert ids [T, K] and their weights [T, K]."""
        config = self.config
        scores_TE = {
            "softmax": probabilities_TE,
            "softmax_after_topk": logits_TE,
            "sigmoid": logits_TE.sigmoid(),
        }[config.score]
        choice_TE = scores_TE.detach()
        if config.bias_update_rate > 0:
            choice_TE = choice_TE + self.bias
        if config.top_groups < config.groups:
            choice_TE = self._within_best_groups(choice_TE)
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
        return experts_TK, weights_TK * config.scale

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

    def _balance_loss(self, experts_BSK: Tensor, probabilities_BSE: Tensor, prior_load_E: Tensor | None) -> Tensor:
        """E · Σ_e f_e · P_e (Switch Transformer, arXiv 2101.03961, eq. 4, divided by K so that balance gives 1).

        f is the fraction of pairs that chose expert e, P its mean probability, both over the tokens of the scope; the
        mean of P over ranks and micro-batches comes from the mean of their losses.
        """
        loads_BE = torch.zeros(
            experts_BSK.shape[0], self.num_experts, dtype=probabilities_BSE.dtype, device=probabilities_BSE.device
        )
        chosen = experts_BSK.flatten(1)
        loads_BE.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=loads_BE.dtype))
        if self.config.balance_scope == "sequence":
            fractions_BE = loads_BE / chosen.shape[1]
            return self.num_experts * (fractions_BE * probabilities_BSE.mean(1)).sum(-1).mean()
        load_E = loads_BE.sum(0)
        if self.config.balance_scope == "global":
            if prior_load_E is not None:
                load_E = load_E + prior_load_E
            if self.balance_group is not None:
                dist.all_reduce(load_E, group=self.balance_group)
        return self.num_experts * (load_E / load_E.sum() * probabilities_BSE.mean((0, 1))).sum()

    def _limited(self, experts_TK: Tensor, weights_TK: Tensor, capacity_factor: float) -> Routing:
        """Keep at most ⌈factor · T · K / E⌉ pairs an expert. Waits for the device: how many remain is data."""
        num_tokens, top_k = experts_TK.shape
        capacity = -int(-capacity_factor * num_tokens * top_k // self.num_experts)
        experts_N, weights_N = experts_TK.flatten(), weights_TK.flatten()
        preference_N = torch.arange(experts_N.numel(), device=experts_N.device)
        if self.config.drop_policy == "weight":
            preference_N = weights_N.detach().argsort(descending=True, stable=True)
        order_N = preference_N[experts_N[preference_N].argsort(stable=True)]
        sorted_N = experts_N[order_N]
        place_N = torch.arange(order_N.numel(), device=order_N.device) - torch.searchsorted(sorted_N, sorted_N)
        kept_N = order_N[place_N < capacity].sort().values
        return Routing.from_pairs(kept_N // top_k, experts_N[kept_N], weights_N[kept_N], num_tokens, self.num_experts)


def _jitter(x: Tensor, amount: float, seed: int) -> Tensor:
    """Uniform noise in [1 − amount, 1 + amount] (Switch Transformer), the same when a checkpoint runs again."""
    generator = torch.Generator(x.device).manual_seed(seed)
    return torch.empty_like(x).uniform_(1 - amount, 1 + amount, generator=generator)


class RoutingTotals:
    """Routing of a whole step: the sums of :class:`RouterStats` over its micro-batches, layer by layer."""

    def __init__(self, num_layers: int, num_experts: int, device: torch.device):
        self.load_LE = torch.zeros(num_layers, num_experts, dtype=torch.int64, device=device)
        self.dropped_L = torch.zeros(num_layers, dtype=torch.int64, device=device)
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
            for tensor in (total.load_LE, total.dropped_L, total.means_3L):
                dist.all_reduce(tensor)
        return total
