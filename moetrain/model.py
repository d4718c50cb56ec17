"""The decoder: embedding, attention, dense or MoE feed-forward layers, head.

Under tensor parallelism a rank has 1 / tp of the heads, of the dense feed-forward layers and of the vocabulary, and
1 / tp of the tokens wherever each token is worked on by itself: in the residual stream, norms and MoE layers.

Shapes: B sequences, S positions, T = B·S tokens, D width, H query heads, V vocabulary, F dense feed-forward width,
E experts (on this rank: E / ep), I expert width, L MoE layers. Where a rank has but its share of the tokens, B and S
are the number and the length of its pieces: whole sequences, or equal parts of sequences.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from operator import add
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moetrain.config import ActivationCheckpointingConfig, Config, ModelConfig, RopeScalingConfig
from moetrain.data import IGNORED
from moetrain.kernels import GatedActivation, Routing, activate, choose_backend, expert_mlp
from moetrain.parallel import (
    AllToAllDispatcher,
    Dispatcher,
    ExpertSlots,
    LocalDispatcher,
    Mesh,
    Phases,
    Sharding,
    add_rmsnorm_all_gather,
    complete,
    embed,
    fused_allreduce_rmsnorm,
    gather_rows,
    gather_sequences,
    reduce_scatter_add_rmsnorm,
    split_cross_entropy,
    sum_over_ranks,
    sum_to_pieces,
    weave,
)
from moetrain.router import Router, RouterStats, RouterSums


class Linear(nn.Module):
    """y = x Wᵀ (+ b) in the dtype of x; the weight [out, in] is kept in its own dtype (master weights)."""

    def __init__(self, inputs: int, outputs: int, *, bias: bool = False, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(outputs, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class RMSNorm(nn.Module):
    """x / rms(x) ⊙ w over the last dimension (arXiv 1910.07467), statistics in float32.

    `group`: the ranks over which that dimension is split, `dim` of it on each.
    """

    def __init__(
        self,
        dim: int,
        eps: float,
        dtype: torch.dtype = torch.float32,
        *,
        group: dist.ProcessGroup | None = None,
        backend: str = "auto",
    ):
        """`backend`: of :meth:`add`, as of :func:`fused_allreduce_rmsnorm`."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, dtype=dtype))
        self.eps = eps
        self.group = group
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        if self.group is None:
            return F.rms_norm(x, weight.shape, weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = sum_over_ranks(wide.square().mean(-1, keepdim=True), self.group) / self.group.size()
        return (wide * (mean_square + self.eps).rsqrt() * weight).to(x.dtype)

    def add(
        self, x_BSD: Tensor, y_BSD: Tensor | None, group: dist.ProcessGroup | None, gather_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The norm of x + y, and x + y, of this rank's tokens; y None is 0.

        A y of all tokens is this rank's summand of what is to be added up over the tp ranks of `group`. With
        `gather_length` the norm is of all sequences, [B, gather_length, D].
        """
        if y_BSD is None:
            h_BSD = self(x_BSD)
            return h_BSD if gather_length is None else gather_sequences(h_BSD, gather_length, group), x_BSD
        x_RD, y = x_BSD.flatten(0, 1), y_BSD.flatten(0, 1)
        weight = self.weight.to(x_RD.dtype)
        if y.shape == x_RD.shape:
            group = None if gather_length is None else group
            h, x_RD = add_rmsnorm_all_gather(y, x_RD, weight, self.eps, group, backend=self.backend)
        else:
            add = reduce_scatter_add_rmsnorm if gather_length is None else fused_allreduce_rmsnorm
            h, x_RD = add(y, x_RD, weight, self.eps, group, backend=self.backend)
        return h.unflatten(0, (-1, gather_length or x_BSD.shape[1])), x_RD.view_as(x_BSD)


def rotary_tables(
    length: int, head_dim: int, theta: float, device: torch.device, scaling: RopeScalingConfig | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_dim] of rotary position embedding (arXiv 2104.09864, eq. 15), float32.

    Halves are rotated against each other (dimension i with i + head_dim/2), as Hugging Face checkpoints have it.
    """
    frequencies = theta ** -(torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim)
    if scaling is not None:
        waves = scaling.original_length * frequencies / (2 * math.pi)  # in a sequence of the original length
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = ((waves - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (kept + (1 - kept) / scaling.factor)
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float64), frequencies).repeat(1, 2)
    return angles.cos().float(), angles.sin().float()


def apply_rotary(x_BHSd: Tensor, cos_Sd: Tensor, sin_Sd: Tensor) -> Tensor:
    """Rotate queries or keys by their positions; computed in float32, returned in the dtype of x."""
    x = x_BHSd.to(torch.promote_types(x_BHSd.dtype, torch.float32))
    first, second = x.chunk(2, dim=-1)
    return (x * cos_Sd + torch.cat([-second, first], -1) * sin_Sd).to(x_BHSd.dtype)


class Attention(nn.Module):
    """Grouped-query causal self-attention with rotary positions and optional query/key norms.

    `group`: the ranks over which the heads are split; each computes its heads' summand of the output.
    """

    def __init__(self, model: ModelConfig, group: dist.ProcessGroup | None, dtype: torch.dtype):
        super().__init__()
        self.head_dim = model.head_width
        tp = 1 if group is None else group.size()
        queries, keys = (heads // tp * self.head_dim for heads in (model.n_heads, model.kv_heads))
        self.wq = Linear(model.dim, queries, bias=model.qkv_bias, dtype=dtype)
        self.wk = Linear(model.dim, keys, bias=model.qkv_bias, dtype=dtype)
        self.wv = Linear(model.dim, keys, bias=model.qkv_bias, dtype=dtype)
        self.wo = Linear(queries, model.dim, dtype=dtype)
        self.out_bias = nn.Parameter(torch.empty(model.dim, dtype=dtype)) if model.out_bias else None
        """For the sum of what the ranks return."""
        self.norm_per_head = model.qk_norm == "head"
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if model.qk_norm == "head":
            self.q_norm = RMSNorm(self.head_dim, model.norm_eps, dtype)
            self.k_norm = RMSNorm(self.head_dim, model.norm_eps, dtype)
        elif model.qk_norm == "full":
            self.q_norm = RMSNorm(queries, model.norm_eps, dtype, group=group)
            self.k_norm = RMSNorm(keys, model.norm_eps, dtype, group=group)

    def forward(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask_B1SS: Tensor | None) -> Tensor:
        q, k, v = self.project(x_BSD, rotary)
        y_BHSd = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask_B1SS, is_causal=mask_B1SS is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.wo(y_BHSd.transpose(1, 2).flatten(-2))

    def project(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values [B, heads, S, d], normalised and rotated, as attention takes them."""
        q, k = self.wq(x_BSD), self.wk(x_BSD)
        if self.q_norm is not None and self.k_norm is not None and not self.norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.unflatten(-1, (-1, self.head_dim)) for t in (q, k, self.wv(x_BSD)))
        if self.q_norm is not None and self.k_norm is not None and self.norm_per_head:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return apply_rotary(q, *rotary), apply_rotary(k, *rotary), v


class FeedForward(nn.Module):
    """W_down (act(W_gate x) ⊙ W_up x).

    `w_gate_up` [2, F, D] is gate and up, multiplied as one matrix [2F, D]: so that 1 / tp of both is one part of it.
    With part of the `inner` = F hidden units the result is their summand of the output.
    """

    def __init__(self, dim: int, inner: int, activation: GatedActivation, dtype: torch.dtype):
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(2, inner, dim, dtype=dtype))
        self.w_down = nn.Parameter(torch.empty(dim, inner, dtype=dtype))
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w_gate_up.flatten(0, 1).to(x.dtype))
        return F.linear(activate(h, self.activation), self.w_down.to(x.dtype))


class SharedExpert(nn.Module):
    """A feed-forward network that sees every token, optionally scaled by sigmoid(x·w)."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype):
        super().__init__()
        self.ffn = FeedForward(model.dim, model.shared_dim, model.activation, dtype)
        self.gate = Linear(model.dim, 1, dtype=dtype) if model.shared_gate else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.ffn(x)
        return y if self.gate is None else y * self.gate(x).sigmoid()


class Experts(nn.Module):
    """The experts of one layer that live on this rank: `w_gate_up` [E, 2I, D] and `w_down` [E, D, I]."""

    def __init__(self, model: ModelConfig, num_local: int, backend: str, dtype: torch.dtype):
        super().__init__()
        self.w_gate_up = nn.Parameter(torch.empty(num_local, 2 * model.expert_dim, model.dim, dtype=dtype))
        self.w_down = nn.Parameter(torch.empty(num_local, model.dim, model.expert_dim, dtype=dtype))
        self.activation = model.activation
        self.backend = backend

    def forward(self, x_RD: Tensor, routing: Routing) -> Tensor:
        return expert_mlp(
            x_RD,
            self.w_gate_up.to(x_RD.dtype),
            self.w_down.to(x_RD.dtype),
            routing,
            activation=self.activation,
            backend=self.backend,
        )


class MoE(nn.Module):
    """Router, dispatcher, experts: three parts that know one another only through `Routing`.

    `slots`: where a placement puts the experts; None: in their own order. The router and its statistics know them by
    their numbers alone, dispatcher and experts by their slots.
    """

    def __init__(self, config: Config, mesh: Mesh | None, slots: ExpertSlots | None, dtype: torch.dtype):
        super().__init__()
        self.slots = slots
        model = config.model
        ep = 1 if mesh is None else mesh.ep
        self.router = Router(
            model.dim,
            model.num_experts,
            config.router,
            balance_group=None if mesh is None or mesh.world_size == 1 else cast(Any, dist.group.WORLD),
            sequence_group=_tp_group(mesh),
            param_dtype=dtype,
        )
        self.dispatcher: Dispatcher = (
            LocalDispatcher() if mesh is None or ep == 1 else AllToAllDispatcher(mesh.ep_group, config.parallel.wire)
        )
        self.experts = Experts(model, model.num_experts // ep, config.kernels.experts, dtype)
        self.shared = SharedExpert(model, dtype) if model.shared_dim else None
        self.recompute_experts = False

    def forward(self, *inputs: Any) -> tuple[Tensor, RouterSums]:
        return complete(self.phases(*inputs))

    def phases(
        self, x_BSD: Tensor, pieces: int = 1, noise_seed: int | None = None
    ) -> Phases[tuple[Tensor, RouterSums]]:
        """y [B, S, D], and what the router counted. Arguments as of :meth:`Router.forward`."""
        routing, sums = self.router(x_BSD, pieces=pieces, noise_seed=noise_seed)
        if self.slots is not None:
            routing = routing.renumbered(self.slots.slot_E)
        dispatched = self.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        yield x_BSD, dispatched
        y_RD = _maybe_checkpoint(self.recompute_experts, self.experts, dispatched.x_RD, dispatched.routing)
        shared_BSD = None if self.shared is None else self.shared(x_BSD)
        yield y_RD, shared_BSD
        y_BSD = self.dispatcher.combine(y_RD, dispatched).view_as(x_BSD)
        return y_BSD if shared_BSD is None else y_BSD + shared_BSD, sums


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    x and its norms are of this rank's tokens, attention and a dense feed-forward network of all tokens of its share of
    the batch: gathered before, and their summands added up and scattered after.

    In phases (parallel/overlap.py): those that communicate have the norms, the router and the sums too, which are short
    and stand between two collectives.
    """

    def __init__(self, config: Config, layer: int, mesh: Mesh | None, slots: ExpertSlots | None, dtype: torch.dtype):
        super().__init__()
        model = config.model
        self.tp_group = _tp_group(mesh)
        norms = config.kernels.allreduce_rmsnorm
        self.attention_norm = RMSNorm(model.dim, model.norm_eps, dtype, backend=norms)
        self.attention = Attention(model, self.tp_group, dtype)
        self.ffn_norm = RMSNorm(model.dim, model.norm_eps, dtype, backend=norms)
        self.is_moe = model.is_moe_layer(layer)
        if self.is_moe:
            self.ffn: nn.Module = MoE(config, mesh, slots, dtype)
        else:
            inner = model.ffn_dim if mesh is None else model.ffn_dim // mesh.tp
            self.ffn = FeedForward(model.dim, inner, model.activation, dtype)
        self.recompute_attention = False

    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor, RouterSums | None]:
        return complete(self.phases(*inputs))

    def phases(
        self,
        x_BSD: Tensor,
        y_BSD: Tensor | None,
        rotary: tuple[Tensor, Tensor],
        mask_B1SS: Tensor | None,
        noise_seed: int | None,
    ) -> Phases[tuple[Tensor, Tensor, RouterSums | None]]:
        """x, y and what the router counted, from x and y: y, with the rows that :meth:`RMSNorm.add` takes, has yet to
        be added, together with the next norm."""
        length = rotary[0].shape[0]
        if self.recompute_attention:  # from this rank's tokens: those that are gathered are tp times as many
            x_BSD = _added(x_BSD, y_BSD, self.tp_group)
            yield x_BSD
            partial_BSD = _maybe_checkpoint(True, self.attend, x_BSD, rotary, mask_B1SS)
        else:
            h_BSD, x_BSD = self.attention_norm.add(x_BSD, y_BSD, self.tp_group, length)
            yield h_BSD
            partial_BSD = self.attention(h_BSD, rotary, mask_B1SS)
        yield partial_BSD
        if self.attention.out_bias is not None:
            x_BSD = x_BSD + self.attention.out_bias.to(x_BSD.dtype)
        if self.is_moe:
            h_BSD, x_BSD = self.ffn_norm.add(x_BSD, partial_BSD, self.tp_group)
            y_BSD, sums = yield from cast(MoE, self.ffn).phases(h_BSD, length // h_BSD.shape[1], noise_seed)
            return x_BSD, y_BSD, sums
        h_BSD, x_BSD = self.ffn_norm.add(x_BSD, partial_BSD, self.tp_group, length)
        yield h_BSD
        partial_BSD = self.ffn(h_BSD)
        yield partial_BSD
        return x_BSD, partial_BSD, None

    def attend(self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask_B1SS: Tensor | None) -> Tensor:
        h_BSD = gather_sequences(self.attention_norm(x_BSD), rotary[0].shape[0], self.tp_group)
        return self.attention(h_BSD, rotary, mask_B1SS)


class Decoder(nn.Module):
    """A decoder-only language model, or this rank's share of one.

    Under ``torch.device("meta")`` it is built without memory. Weights are undefined until :meth:`initialize` or a
    checkpoint fills them.
    """

    def __init__(self, config: Config, mesh: Mesh | None = None, slots_LE: Sequence[Sequence[int]] | None = None):
        """`mesh` None: everything on this rank and no collectives. `slots_LE`: of each MoE layer's experts, a
        permutation, the first E / ep slots being on the first ep rank; None: as they are numbered. It changes no result
        and no checkpoint."""
        super().__init__()
        model = config.model
        dtype = getattr(torch, config.train.param_dtype)
        self.config = config
        self.mesh = mesh
        self.tp_group = _tp_group(mesh)
        vocabulary = model.vocab_size if mesh is None else model.vocab_size // mesh.tp
        self.embedding = nn.Parameter(torch.empty(vocabulary, model.dim, dtype=dtype))
        self.moe_layers = [layer for layer in range(model.n_layers) if model.is_moe_layer(layer)]
        self.slots: dict[int, ExpertSlots] = {}
        """By MoE layer; empty where the experts are in their own order."""
        if slots_LE is not None:
            device = self.embedding.device
            self.slots = {n: ExpertSlots(slots, device) for n, slots in zip(self.moe_layers, slots_LE, strict=True)}
        self.blocks = nn.ModuleList(
            Block(config, layer, mesh, self.slots.get(layer), dtype) for layer in range(model.n_layers)
        )
        self.norm = RMSNorm(model.dim, model.norm_eps, dtype, backend=config.kernels.allreduce_rmsnorm)
        self.head = None if model.tie_embeddings else nn.Parameter(torch.empty_like(self.embedding))
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._linear_cross_entropy: Callable[..., Tensor] = linear_cross_entropy
        self._apply_activation_checkpointing(config.train.activation_checkpointing)

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype of the activations between the layers."""
        name = self.config.train.dtype
        if name == "auto":
            on_gpu = self.embedding.device.type == "cuda"
            return torch.bfloat16 if on_gpu else torch.promote_types(self.embedding.dtype, torch.float32)
        return getattr(torch, name)

    @property
    def _weaves(self) -> bool:
        return self.training and self.config.parallel.weaves

    @property
    def expert_backend(self) -> str:
        """Name of the implementation that computes the experts here."""
        model = self.config.model
        return choose_backend(
            self.config.kernels.experts,
            self.embedding.device,
            self.compute_dtype,
            model.dim,
            model.expert_dim,
            activation=model.activation,
        )

    @property
    def dispatch_bytes(self) -> int:
        """Bytes that this rank's MoE layers have sent to other ranks so far, forward and backward."""
        return sum(cast(MoE, self.blocks[layer].ffn).dispatcher.bytes_sent for layer in self.moe_layers)

    @property
    def expert_ranks(self) -> list[list[int]]:
        """[L, E]: the ep rank of each expert of each MoE layer."""
        experts, ep = self.config.model.num_experts, 1 if self.mesh is None else self.mesh.ep
        unplaced = list(range(experts))
        slots_LE = [self.slots[n].slots if n in self.slots else unplaced for n in self.moe_layers]
        return [[slot // (experts // ep) for slot in slots] for slots in slots_LE]

    def routers(self) -> list[Router]:
        """The routers of the MoE layers, in order."""
        return [cast(MoE, self.blocks[layer].ffn).router for layer in self.moe_layers]

    def sharding(self, name: str) -> Sharding:
        """How the parameter or buffer `name` lies on the ranks of the mesh, without which no model is trained."""
        mesh = self.mesh
        assert mesh is not None
        if is_expert_parameter(name):
            return Sharding(mesh.experts, dim=0, slots=self._slots(name))
        if mesh.tp == 1:
            return Sharding(mesh.dense, dim=None)
        dims = dict(_SPLIT_DIMS)
        if self.config.model.qk_norm == "full":
            dims[r"blocks\.\d+\.attention\.[qk]_norm\.weight"] = 0
        return Sharding(mesh.dense, next((dim for pattern, dim in dims.items() if re.fullmatch(pattern, name)), None))

    def _slots(self, name: str) -> ExpertSlots | None:
        """Those of the layer that this parameter of the experts belongs to."""
        return self.slots.get(int(name.removeprefix("blocks.").split(".")[0]))

    def compile_dense_parts(self) -> None:
        """torch.compile attention, feed-forward networks (dense and of shared experts), norms and loss; routing depends
        on data and is not."""
        for module in self.modules():
            if isinstance(module, Attention | FeedForward | RMSNorm):
                module.compile()
        self._linear_cross_entropy = torch.compile(linear_cross_entropy)

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Fill the weights from a generator for each parameter and expert, so that they do not depend on tp and ep.

        Matrices are normal with `model.init_std`, those that write into the residual stream scaled by 1/√(2·layers)
        (GPT-2); norms are 1, biases 0.
        """
        model = self.config.model
        residual_scale = (2 * model.n_layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name else 0.0)
                continue
            residual = name.endswith((".wo.weight", ".w_down"))
            std = model.init_std * (residual_scale if residual else 1.0)
            sharding = None if self.mesh is None else self.sharding(name)
            if is_expert_parameter(name):
                first = 0 if sharding is None else sharding.index * parameter.shape[0]
                slots = self._slots(name)
                for slot, weights in enumerate(parameter, first):
                    expert = slot if slots is None else slots.experts[slot]
                    weights.normal_(0.0, std, generator=_generator(seed, f"{name}.{expert}", parameter.device))
            elif sharding is None or sharding.shards == 1:
                parameter.normal_(0.0, std, generator=_generator(seed, name, parameter.device))
            else:
                whole = torch.empty(sharding.logical(parameter).shape, dtype=parameter.dtype, device=parameter.device)
                whole.normal_(0.0, std, generator=_generator(seed, name, parameter.device))
                parameter.copy_(sharding.part(whole))
        for router in self.routers():
            router.bias.zero_()

    def forward(
        self,
        tokens_BS: Tensor,
        documents_BS: Tensor | None = None,
        *,
        prior_load_LE: Tensor | None = None,
        noise_seed: int | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        """Hidden states [B, S, D] after the last norm, and the router statistics of the MoE layers in order.

        `tokens_BS` int64; `documents_BS` int: a token attends only to tokens of its own document. `prior_load_LE` and
        `noise_seed` are described at :meth:`Router.stats` and :meth:`Router.forward`. The tp ranks of a share of the
        batch are all given all of its tokens, and each returns hidden states and statistics of its own part of them.
        """
        rotary = self.rotary(tokens_BS.shape[1])
        mask = None if documents_BS is None else document_mask(documents_BS)
        embedded_BSD = embed(tokens_BS, self.embedding, self.tp_group).to(self.compute_dtype)
        x_BSD = sum_to_pieces(embedded_BSD, self.tp_group)
        if self._weaves:
            hidden_BSD, sums_L = self._woven(x_BSD, rotary, mask, noise_seed)
        else:
            hidden_BSD, sums_L = complete(self.phases(x_BSD, rotary, mask, noise_seed))
        prior_loads = [None] * len(sums_L) if prior_load_LE is None else prior_load_LE
        stats = map(Router.stats, self.routers(), sums_L, prior_loads)
        return hidden_BSD, list(stats)

    def phases(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask_B1SS: Tensor | None, noise_seed: int | None
    ) -> Phases[tuple[Tensor, list[RouterSums]]]:
        """Those of all layers and the last norm; where nothing is woven a single one, in which they are called."""
        y_BSD: Tensor | None = None
        sums_L: list[RouterSums] = []
        for layer, block in enumerate(self.blocks):
            seed = None if noise_seed is None else derive_seed(noise_seed, layer)
            if self._recompute[layer]:  # keeps one tensor of this rank's tokens
                x_BSD, y_BSD = _added(x_BSD, y_BSD, self.tp_group), None
            arguments = (x_BSD, y_BSD, rotary, mask_B1SS, seed)
            if self._weaves:
                x_BSD, y_BSD, sums = yield from cast(Block, block).phases(*arguments)
            else:
                x_BSD, y_BSD, sums = _maybe_checkpoint(self._recompute[layer], block, *arguments)
            if sums is not None:
                sums_L.append(sums)
        return self.norm.add(x_BSD, y_BSD, self.tp_group)[0], sums_L

    def _woven(
        self, x_BSD: Tensor, rotary: tuple[Tensor, Tensor], mask_B1SS: Tensor | None, noise_seed: int | None
    ) -> tuple[Tensor, list[RouterSums]]:
        """Two halves of the share: the first of each tp rank's sequences, and the others, so that a rank has the tokens
        that it always has. It needs whole sequences, two or more."""
        tp = 1 if self.tp_group is None else self.tp_group.size()
        split = [self.config.parallel.overlap_split or (len(x_BSD) + 1) // 2]
        masks: list[Tensor | None] = [None, None]
        if mask_B1SS is not None:
            masks = [half.flatten(0, 1) for half in mask_B1SS.unflatten(0, (tp, -1)).tensor_split(split, 1)]
        halves = [
            self.phases(x, rotary, mask, None if noise_seed is None else derive_seed(noise_seed, "half", place))
            for place, (x, mask) in enumerate(zip(x_BSD.tensor_split(split), masks, strict=True))
        ]
        (first_BSD, first_L), (second_BSD, second_L) = weave(halves, x_BSD, x_BSD.device)
        return torch.cat([first_BSD, second_BSD]), list(map(add, first_L, second_L))

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: this rank's words."""
        return self.embedding if self.head is None else self.head

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of all words as the next token, [..., V] in the dtype of `hidden`."""
        return F.linear(hidden, gather_rows(self.head_weight.to(hidden.dtype), self.tp_group))

    def cross_entropy(self, hidden_BSD: Tensor, targets_BS: Tensor, *, chunk_tokens: int = 8192) -> Tensor:
        """Sum of −log p(target) over the targets that are not IGNORED, in nats; 0-D float32 or wider.

        The logits of `chunk_tokens` tokens at a time exist, and are computed again in the backward pass. `targets_BS`
        are those of all tokens of this rank's share of the batch; its tp ranks return summands of their sum.
        """
        total = hidden_BSD.new_zeros((), dtype=torch.promote_types(hidden_BSD.dtype, torch.float32))
        hidden_TD, targets_T = gather_rows(hidden_BSD.flatten(0, 1), self.tp_group), targets_BS.flatten()
        chunks = list(zip(hidden_TD.split(chunk_tokens), targets_T.split(chunk_tokens), strict=True))
        for hidden, targets in chunks:
            total = total + _maybe_checkpoint(
                len(chunks) > 1, self._linear_cross_entropy, hidden, self.head_weight, targets, self.tp_group
            )
        return total

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin [length, d] for positions 0 … length − 1, made once."""
        if self._rotary is None or self._rotary[0].shape[0] < length:
            model = self.config.model
            self._rotary = rotary_tables(
                length, model.head_width, model.rope_theta, self.embedding.device, model.rope_scaling
            )
        return self._rotary[0][:length], self._rotary[1][:length]

    def _apply_activation_checkpointing(self, config: ActivationCheckpointingConfig) -> None:
        chosen = [layer % config.every == 0 for layer in range(len(self.blocks))]
        self._recompute = [config.mode == "full" and on for on in chosen]
        for module, on in zip(self.blocks, chosen, strict=True):
            block = cast(Block, module)
            block.recompute_attention = config.mode == "selective" and on
            if block.is_moe:
                cast(MoE, block.ffn).recompute_experts = config.mode == "selective" and on


def is_expert_parameter(name: str) -> bool:
    """Whether `name` is a parameter [E, …] of the experts."""
    return ".ffn.experts." in name


# Along which dimension tensor parallelism splits; what is not here is the same on all ranks.
_SPLIT_DIMS = {
    r"embedding|head": 0,
    r"blocks\.\d+\.attention\.w[qkv]\.(weight|bias)": 0,
    r"blocks\.\d+\.attention\.wo\.weight": 1,
    r"blocks\.\d+\.ffn\.w_(gate_up|down)": 1,
}


def _tp_group(mesh: Mesh | None) -> dist.ProcessGroup | None:
    """The ranks over which tensors are split; None where they are whole."""
    return None if mesh is None or mesh.tp == 1 else mesh.tp_group


def linear_cross_entropy(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Sum of −log softmax(W x)[target] over the targets that are not IGNORED; 0-D float32 or wider.

    `group`: the ranks over which the vocabulary is split, each of which gets a summand.
    """
    logits_TV = F.linear(hidden_TD, weight_VD.to(hidden_TD.dtype))
    logits_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    if group is not None:
        return split_cross_entropy(logits_TV, targets_T, group, ignored=IGNORED)
    return F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED, reduction="sum")


def _added(x_BSD: Tensor, y_BSD: Tensor | None, group: dist.ProcessGroup | None) -> Tensor:
    """x + y of this rank's tokens; y as in :meth:`RMSNorm.add`."""
    if y_BSD is None:
        return x_BSD
    return x_BSD + (y_BSD if y_BSD.shape == x_BSD.shape else sum_to_pieces(y_BSD, group))


def document_mask(documents_BS: Tensor) -> Tensor:
    """bool [B, 1, S, S], True where a query may see a key: the same document and not later."""
    length = documents_BS.shape[1]
    same_BSS = documents_BS[:, :, None] == documents_BS[:, None, :]
    return (same_BSS & torch.ones(length, length, dtype=torch.bool, device=documents_BS.device).tril())[:, None]


def _maybe_checkpoint(recompute: bool, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call the function, in training keeping only its inputs if `recompute`."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)
    return function(*arguments)


def derive_seed(*parts: object) -> int:
    """A seed for torch (63 bits) that differs for every sequence of parts."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8]) >> 1


def _generator(seed: int, name: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(derive_seed(seed, name))
