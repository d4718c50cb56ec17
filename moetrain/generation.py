"""Text from a model, token by token, with the keys and values of earlier tokens kept.

The tokens that a rank works on are one list, of whichever sequences they are: all tokens of its prompts at first, then
one of each sequence. What a token becomes depends on nothing but its sequence, its place there and the seed.

Shapes: T tokens on this rank, D width, H query heads, G heads of keys and values, d width of a head, B sequences,
S tokens of the longest, M positions in the cache, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.errors import ConfigError
from moetrain.model import Block, Decoder, MoE, derive_seed
from moetrain.parallel import any_rank, on_all_ranks, watchdog
from moetrain.parallel.context_coherent import ContextCoherentExchange
from moetrain.parallel.dispatch import Exchange


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen."""

    max_tokens: int = 128
    """Of each sequence, at most."""
    temperature: float = 1.0
    """Of the softmax; 0 takes the likeliest token."""
    top_k: int | None = None
    """Only the k likeliest …"""
    top_p: float = 1.0
    """… and of these the likeliest that together have this probability (nucleus sampling, arXiv 1904.09751)."""
    seed: int = 0

    def check(self) -> None:
        """Raises ConfigError, which names the option."""
        rules = {
            f"--temperature {self.temperature:g}": (0 <= self.temperature < float("inf"), "a number from 0 on"),
            f"--top-p {self.top_p:g}": (0 < self.top_p <= 1, "a number above 0 and at most 1"),
        }
        for option, (fits, expected) in rules.items():
            if not fits:
                raise ConfigError(f"{option}: expected {expected}")


def sample(logits_TV: Tensor, uniform_T: Tensor, sampling: Sampling) -> Tensor:
    """A token of each row, int64 [T] on the CPU: the inverse of the distribution function at `uniform_T` in [0, 1)."""
    logits_TV = logits_TV.double().cpu()
    if sampling.temperature == 0:
        return logits_TV.argmax(-1)
    likely_TV, ids_TV = (logits_TV / sampling.temperature).softmax(-1).sort(stable=True, dim=-1, descending=True)
    before_TV = likely_TV.cumsum(-1) - likely_TV
    kept_TV = likely_TV * (before_TV < sampling.top_p)
    if sampling.top_k is not None:
        kept_TV[:, sampling.top_k :] = 0
    reached_TV = kept_TV.cumsum(-1)
    place_T1 = torch.searchsorted(reached_TV, uniform_T[:, None] * reached_TV[:, -1:], right=True)
    return ids_TV.gather(-1, place_T1).squeeze(-1)


class Cache:
    """Keys and values of all layers, for `sequences` sequences of at most `positions` tokens."""

    def __init__(self, model: Decoder, sequences: int, positions: int):
        shape = model.config.model
        self.kv = torch.zeros(
            (shape.n_layers, 2, sequences, shape.kv_heads, positions, shape.head_width),
            dtype=model.compute_dtype,
            device=model.embedding.device,
        )
        """[layers, 2, B, G, M, d]."""
        self.rotary = model.rotary(positions)

    def attend(self, layer: int, block: Block, x_TD: Tensor, sequence_T: Tensor, place_T: Tensor) -> Tensor:
        """x + attention(norm(x)) of tokens at these places of these sequences, whose keys and values are kept.

        They are either all tokens of some sequences, or the last ones of sequences of which the others are here.
        """
        if not len(x_TD):
            return x_TD
        h_1TD = block.attention_norm(x_TD)[None]
        cos_Td, sin_Td = (table[place_T] for table in self.rotary)
        q_THd, k_TGd, v_TGd = (t[0].transpose(0, 1) for t in block.attention.project(h_1TD, (cos_Td, sin_Td)))
        k_BGMd, v_BGMd = self.kv[layer]
        k_BGMd[sequence_T, :, place_T], v_BGMd[sequence_T, :, place_T] = k_TGd, v_TGd
        longest = int(place_T.max()) + 1
        held_B, row_T = sequence_T.unique(return_inverse=True)
        grouped = q_THd.shape[1] != k_TGd.shape[1]
        if len(held_B) == len(sequence_T):
            seen_T11M = (torch.arange(longest, device=place_T.device) <= place_T[:, None])[:, None, None]
            k_TGMd, v_TGMd = (t[sequence_T, :, :longest] for t in (k_BGMd, v_BGMd))
            y_TH1d = F.scaled_dot_product_attention(
                q_THd[:, :, None], k_TGMd, v_TGMd, attn_mask=seen_T11M, enable_gqa=grouped
            )
            y_TX = y_TH1d.flatten(1)
        else:
            q_BHSd = q_THd.new_zeros(len(held_B), q_THd.shape[1], longest, q_THd.shape[2])
            q_BHSd[row_T, :, place_T] = q_THd
            k_BGSd, v_BGSd = (t[held_B, :, :longest] for t in (k_BGMd, v_BGMd))
            y_BHSd = F.scaled_dot_product_attention(q_BHSd, k_BGSd, v_BGSd, is_causal=True, enable_gqa=grouped)
            y_TX = y_BHSd[row_T, :, place_T].flatten(1)
        x_TD = x_TD + block.attention.wo(y_TX)
        bias_D = block.attention.out_bias
        return x_TD if bias_D is None else x_TD + bias_D.to(x_TD.dtype)


@dataclass(frozen=True)
class Traffic:
    """What ranks send one another."""

    rows: int = 0
    """Of hidden states, to other ranks."""
    row_exchanges: int = 0
    """All-to-alls of these, counted on each rank."""
    exchanges: int = 0
    """All-to-alls of any kind, counted on each rank."""
    bytes: int = 0
    context_bytes: int = 0
    """Of `bytes`, those of keys, values and tokens that all ranks get."""

    @staticmethod
    def of(exchange: Exchange) -> Traffic:
        context = exchange.context_bytes if isinstance(exchange, ContextCoherentExchange) else 0
        return Traffic(exchange.rows_sent, exchange.row_exchanges, exchange.exchanges, exchange.bytes_sent, context)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Traffic)))

    def __sub__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(Traffic)))


class Generator:
    """Continues prompts under ordinary expert parallelism: each rank has sequences of its own, whose tokens visit their
    experts and return. Every method is collective.

    `stop`: tokens that end a sequence. `vocabulary`: tokens from this number on stand for nothing and are never chosen.
    """

    def __init__(
        self,
        model: Decoder,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stop: frozenset[int] = frozenset(),
        vocabulary: int | None = None,
    ):
        self.model = model.eval()
        self.sampling = sampling
        self.stop = stop
        self.vocabulary = model.config.model.vocab_size if vocabulary is None else vocabulary
        self.rank, self.ranks = (0, 1) if model.mesh is None else (model.mesh.rank, model.mesh.world_size)
        self.prompts = [list(prompt) for prompt in prompts]
        self.texts = [list(prompt) for prompt in prompts]
        """Prompts and continuations, as far as this rank knows."""
        self.own = list(range(self.rank, len(prompts), self.ranks))
        """The sequences whose prompts this rank reads."""
        self.here = self.own
        """The sequences whose last token is on this rank, and that go on."""
        self.cache = Cache(model, len(prompts), max(map(len, prompts)) + sampling.max_tokens)
        self.sent = Traffic()

    @torch.no_grad()
    def run(self) -> list[list[int]]:
        """The continuations of all prompts, a token that ended one included."""
        self._read_prompts()
        before = self._sent()
        while self._goes_on():
            watchdog.moved("generation")
            self._step()
        self.sent = self._sent() - before
        return self._continuations()

    def traffic(self) -> Traffic:
        """What the ranks have sent one another in :meth:`run`, after the prompts were read; collective."""
        if self.model.mesh is None:
            return self.sent
        return sum(on_all_ranks(lambda: self.sent, self.model.mesh.host_group), start=Traffic())

    def _exchanges(self) -> list[Exchange]:
        dispatchers = [cast(MoE, self.model.blocks[layer].ffn).dispatcher for layer in self.model.moe_layers]
        return [dispatcher for dispatcher in dispatchers if isinstance(dispatcher, Exchange)]

    def _sent(self) -> Traffic:
        return sum(map(Traffic.of, self._exchanges()), start=Traffic())

    def _read_prompts(self) -> None:
        tokens = [(n, place, token) for n in self.own for place, token in enumerate(self.texts[n])]
        sequence_T, place_T, token_T = self._on_device(tokens, columns=3)
        x_TD = self._embed(token_T)
        for layer, module in enumerate(self.model.blocks):
            block = cast(Block, module)
            x_TD = self.cache.attend(layer, block, x_TD, sequence_T, place_T)
            x_TD = x_TD + self._feed_forward(block, block.ffn_norm(x_TD))
        length_B = self._on_device([(len(self.texts[n]),) for n in self.own], columns=1)[0]
        self._choose(x_TD[length_B.cumsum(0) - 1], self.own)

    def _step(self) -> None:
        """One more token of each sequence."""
        last = [(n, len(self.texts[n]) - 1, self.texts[n][-1]) for n in self.here]
        sequence_T, place_T, token_T = self._on_device(last, columns=3)
        x_TD = self._embed(token_T)
        for layer, module in enumerate(self.model.blocks):
            block = cast(Block, module)
            x_TD = self.cache.attend(layer, block, x_TD, sequence_T, place_T)
            x_TD = x_TD + self._feed_forward(block, block.ffn_norm(x_TD))
        self._choose(x_TD, self.here)

    def _choose(self, x_TD: Tensor, sequences: list[int]) -> None:
        """The next tokens, of the last layer's output at the last ones."""
        logits_TV = self.model.logits(self.model.norm(x_TD))[:, : self.vocabulary]
        # Not a generator's: the same wherever and beside whatever other sequences this one is.
        seeds = [derive_seed(self.sampling.seed, n, len(self.texts[n])) for n in sequences]
        uniform_T = torch.tensor([seed / 2**63 for seed in seeds], dtype=torch.float64)
        self._append(sequences, sample(logits_TV, uniform_T, self.sampling).tolist())

    def _append(self, sequences: list[int], tokens: list[int]) -> None:
        for n, token in zip(sequences, tokens, strict=True):
            self.texts[n].append(token)
        self.here = [n for n in sequences if not self._ended(n)]

    def _ended(self, n: int) -> bool:
        written = len(self.texts[n]) - len(self.prompts[n])
        return written == self.sampling.max_tokens or (written > 0 and self.texts[n][-1] in self.stop)

    def _goes_on(self) -> bool:
        return bool(self.here) if self.model.mesh is None else any_rank(bool(self.here), self.model.mesh)

    def _continuations(self) -> list[list[int]]:
        found = {n: self.texts[n][len(self.prompts[n]) :] for n in self.own}
        if self.model.mesh is not None:
            found = {
                n: text
                for texts in on_all_ranks(lambda: found, self.model.mesh.host_group)
                for n, text in texts.items()
            }
        return [found[n] for n in range(len(self.prompts))]

    def _embed(self, token_T: Tensor) -> Tensor:
        return F.embedding(token_T, self.model.embedding).to(self.model.compute_dtype)

    def _feed_forward(self, block: Block, h_TD: Tensor) -> Tensor:
        return block.ffn(h_TD[None])[0][0] if block.is_moe else block.ffn(h_TD)

    def _on_device(self, rows: Sequence[tuple[int, ...]], columns: int) -> tuple[Tensor, ...]:
        """The columns, int64."""
        table = torch.tensor(rows, dtype=torch.int64, device=self.model.embedding.device)
        return table.view(-1, columns).unbind(1)


class ContextCoherentGenerator(Generator):
    """Continues prompts under context-coherent expert parallelism: after the prompts every rank has the keys and values
    of all sequences, and a token goes on from where its last expert was."""

    def __init__(self, model: Decoder, *arguments: Any, **options: Any):
        super().__init__(model, *arguments, **options)
        assert model.mesh is not None
        self.exchange = ContextCoherentExchange(model.mesh.ep_group)

    def _exchanges(self) -> list[Exchange]:
        return [*super()._exchanges(), self.exchange]

    def _read_prompts(self) -> None:
        super()._read_prompts()
        places = [(n, place) for n in self.own for place in range(len(self.prompts[n]))]
        sequence_T, place_T = self._on_device(places, columns=2)
        kv = self.cache.kv
        got = self.exchange.share(kv[:, :, sequence_T, :, place_T], torch.stack([sequence_T, place_T], 1))
        kv[:, :, got[1][:, 0], :, got[1][:, 1]] = got[0]

    def _step(self) -> None:
        place_B = self._on_device([(len(text) - 1,) for text in self.texts], columns=1)[0]
        sequence_T, token_T = self._on_device([(n, self.texts[n][-1]) for n in self.here], columns=2)
        x_TD, computed = self._embed(token_T), []
        for layer, module in enumerate(self.model.blocks):
            block = cast(Block, module)
            x_TD = self.cache.attend(layer, block, x_TD, sequence_T, place_B[sequence_T])
            computed.append(sequence_T)
            if block.is_moe:
                x_TD, sequence_T = self._visit(block, x_TD, sequence_T)
            else:
                x_TD = x_TD + self._feed_forward(block, block.ffn_norm(x_TD))
        self._choose(x_TD, sequence_T.tolist())
        self._share_context(computed, place_B)

    def _visit(self, block: Block, x_TD: Tensor, sequence_T: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens that are here after their experts, of whichever sequences."""
        moe = cast(MoE, block.ffn)
        routing, _ = moe.router(block.ffn_norm(x_TD)[None])
        if moe.slots is not None:
            routing = routing.renumbered(moe.slots.slot_E)
        top_k = self.model.config.router.top_k
        pairs_TK = routing.pair_ids_N.view(len(x_TD), top_k)
        experts_TK, weights_TK = routing.expert_ids_N[pairs_TK], routing.weights_N[pairs_TK]
        arrived = self.exchange.move(x_TD, sequence_T, experts_TK, weights_TK, routing.num_experts)
        h_RD = block.ffn_norm(arrived.x_RD)
        y_RD = moe.experts(h_RD, arrived.routing)
        if moe.shared is not None:
            y_RD = y_RD + moe.shared(h_RD) * (arrived.home_R == self.rank)[:, None]
        return self.exchange.settle(arrived.x_RD, y_RD, arrived, top_k)

    def _share_context(self, computed: list[Tensor], place_B: Tensor) -> None:
        """All ranks get the keys and values that any has computed, and so can go on with any sequence."""
        kv = self.cache.kv
        layer_N = torch.repeat_interleave(torch.tensor([len(t) for t in computed], device=place_B.device))
        sequence_N = torch.cat(computed)
        mine = kv[layer_N, :, sequence_N, :, place_B[sequence_N]]
        kv_N, where_N = self.exchange.share(mine, torch.stack([layer_N, sequence_N], 1))
        layer_N, sequence_N = where_N.unbind(1)
        kv[layer_N, :, sequence_N, :, place_B[sequence_N]] = kv_N

    def _append(self, sequences: list[int], tokens: list[int]) -> None:
        mine = self._on_device(list(zip(sequences, tokens, strict=True)), columns=2)
        for n, token in self.exchange.share(torch.stack(mine, 1))[0].tolist():
            self.texts[n].append(token)
        self.here = [n for n in sequences if not self._ended(n)]

    def _goes_on(self) -> bool:
        return not all(map(self._ended, range(len(self.texts))))
