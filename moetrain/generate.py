"""Text from a model, token by token, with the keys and values of earlier tokens kept.

The tokens that a rank works on are one list, of whichever sequences they are: all tokens of its prompts at first, then
one of each sequence. What a token becomes depends on nothing but its sequence, its place there and the seed.

Shapes: T tokens on this rank, D width, H query heads, G heads of keys and values, d width of a head, B sequences,
S tokens of the longest, M positions in the cache, V vocabulary.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from moetrain.checkpoint import Manifest, find_checkpoint, find_together, load, read_manifest
from moetrain.config import Config, from_dict
from moetrain.data import Tokenizer
from moetrain.errors import ConfigError, UserError
from moetrain.expert_placement import initial_placement
from moetrain.files import write_text
from moetrain.huggingface.companions import companions_of, tokenizer_of
from moetrain.model import Block, Decoder, derive_seed
from moetrain.parallel import any_rank, environment_world_size, on_all_ranks, on_rank_0, watchdog
from moetrain.ranks import joined_mesh
from moetrain.state import logical_tensors


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

    @torch.no_grad()
    def run(self) -> list[list[int]]:
        """The continuations of all prompts, a token that ended one included."""
        self._read_prompts()
        while self._goes_on():
            watchdog.moved("generation")
            self._step()
        return self._continuations()

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
        return block.ffn(h_TD[None], 1, None, None)[0][0] if block.is_moe else block.ffn(h_TD)

    def _on_device(self, rows: Sequence[tuple[int, ...]], columns: int) -> tuple[Tensor, ...]:
        """The columns, int64."""
        table = torch.tensor(rows, dtype=torch.int64, device=self.model.embedding.device)
        return table.view(-1, columns).unbind(1)


def generation_config(saved: dict[str, Any], ranks: int, overrides: Sequence[str], where: str) -> Config:
    """A run's config for `ranks` ranks that share its experts and nothing else."""
    return from_dict(
        saved,
        [
            "parallel.dp=null",
            "parallel.tp=1",
            f"parallel.ep={ranks}",
            "parallel.wire=compute",
            "parallel.fsdp=false",
            "parallel.engine=torch",
            "parallel.deepspeed={}",
            "placement.file=null",
            "placement.rebalance.every=0",
            "placement.trace.every=0",
            "router.balance_scope=rank",  # nobody asks for the balance
            *overrides,
        ],
        where=where,
    )


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    target: str
    prompts: Sequence[str]
    sampling: Sampling
    overrides: Sequence[str] = ()
    json: str | None = None


def generate_command(options: Options) -> int:
    """Continue the prompts with the model of a run's newest checkpoint, or of the one given; returns the exit code."""
    options.sampling.check()
    if options.json is not None and not Path(options.json).absolute().parent.is_dir():
        raise UserError(f"--json {options.json}: no such folder")
    checkpoint = find_checkpoint(Path(options.target), checksums=False)
    manifest = read_manifest(checkpoint)
    config = generation_config(
        manifest.progress["config"], environment_world_size(), options.overrides, str(checkpoint)
    )
    with joined_mesh(config) as mesh:
        checkpoint = find_together(checkpoint, mesh)
        tokenizer = on_rank_0(lambda: _tokenizer(checkpoint, manifest), mesh.host_group)
        placement, _ = on_rank_0(lambda: initial_placement(config, None), mesh.host_group)
        with torch.device(mesh.device):
            model = Decoder(config, mesh, None if placement is None else placement.slots)
        load(checkpoint, logical_tensors(model), mesh, strict=False)
        prompts = [tokenizer.encode(prompt).tolist() or [tokenizer.end_of_document] for prompt in options.prompts]
        stop = _stop_tokens(tokenizer, companions_of(checkpoint, manifest).config_json)
        vocabulary = min(tokenizer.vocab_size, config.model.vocab_size)
        start = time.perf_counter()
        generator = Generator(model, prompts, options.sampling, stop, vocabulary)
        continuations = generator.run()
        seconds = time.perf_counter() - start
        if mesh.rank == 0:
            _print(options, tokenizer, prompts, continuations, stop, seconds)
    return 0


def _tokenizer(checkpoint: Path, manifest: Manifest) -> Tokenizer:
    tokenizer = tokenizer_of(checkpoint, manifest)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint}: its tokenizer is not there: neither in the model that it began with nor in data.path"
        )
    return tokenizer


def _stop_tokens(tokenizer: Tokenizer, config_json: Mapping[str, Any]) -> frozenset[int]:
    """What ends a document, or by its config a model's answer."""
    own = config_json.get("eos_token_id")
    return frozenset([tokenizer.end_of_document, *(own if isinstance(own, list) else [own])]) - {None}


def _print(
    options: Options,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    continuations: list[list[int]],
    stop: frozenset[int],
    seconds: float,
) -> None:
    texts = [[token for token in tokens if token not in stop] for tokens in continuations]
    for prompt, text in zip(prompts, texts, strict=True):
        # Of both at once: what a token stands for may depend on the one before it.
        print(tokenizer.decode([token for token in prompt if token not in stop] + text) + "\n")
    tokens = sum(map(len, continuations))
    print(f"{tokens:,} tokens in {seconds:.1f} s")
    if options.json is not None:
        result = {
            "continuations": [
                {"prompt": prompt, "text": tokenizer.decode(text), "tokens": tokens}
                for prompt, text, tokens in zip(options.prompts, texts, continuations, strict=True)
            ],
            "seconds": seconds,
        }
        write_text(Path(options.json), json.dumps(result, indent=2) + "\n")
