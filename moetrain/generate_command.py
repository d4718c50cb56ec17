"""`moetrain generate`: a model's text after a prompt, and what ranks sent one another for it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from moetrain.checkpoint import Manifest, find_checkpoint, find_together, load, read_manifest
from moetrain.config import Config, from_dict
from moetrain.data import Tokenizer
from moetrain.errors import ConfigError, UserError
from moetrain.expert_placement import initial_placement
from moetrain.files import write_text
from moetrain.generation import ContextCoherentGenerator, Generator, Sampling, Traffic
from moetrain.huggingface.companions import companions_of, tokenizer_of
from moetrain.model import Decoder
from moetrain.parallel import environment_world_size, on_rank_0
from moetrain.ranks import joined_mesh
from moetrain.state import logical_tensors

SCHEMES: dict[str, type[Generator]] = {"ordinary": Generator, "context-coherent": ContextCoherentGenerator}


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
    schemes: Sequence[str] = ("ordinary",)
    """Of SCHEMES: how tokens reach experts of other ranks."""
    overrides: Sequence[str] = ()
    json: str | None = None


@dataclass(frozen=True)
class Run:
    """What one scheme came to."""

    continuations: list[list[int]]
    seconds: float
    traffic: Traffic


def generate_command(options: Options) -> int:
    """Continue the prompts with the model of a run's newest checkpoint, or of the one given; returns the exit code."""
    options.sampling.check()
    if environment_world_size() == 1 and "context-coherent" in options.schemes:
        raise ConfigError("--scheme: one rank has all experts, and no tokens go anywhere; use --nproc")
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
        stop = frozenset([tokenizer.end_of_document, *companions_of(checkpoint, manifest).end_ids])
        vocabulary = min(tokenizer.vocab_size, config.model.vocab_size)
        runs: dict[str, Run] = {}
        for scheme in options.schemes:
            start = time.perf_counter()
            generator = SCHEMES[scheme](model, prompts, options.sampling, stop, vocabulary)
            continuations = generator.run()
            runs[scheme] = Run(continuations, time.perf_counter() - start, generator.traffic())
        if mesh.rank == 0:
            texts = _texts(tokenizer, prompts, next(iter(runs.values())).continuations, stop)
            print("\n\n".join(whole for whole, _ in texts))
            _print_runs(runs, mesh.world_size, len(model.moe_layers))
            if options.json is not None:
                _write(Path(options.json), options.prompts, [text for _, text in texts], runs)
    return 0


def _tokenizer(checkpoint: Path, manifest: Manifest) -> Tokenizer:
    tokenizer = tokenizer_of(checkpoint, manifest)
    if tokenizer is None:
        raise UserError(
            f"{checkpoint}: its tokenizer is not there: neither in the model that it began with nor in data.path"
        )
    return tokenizer


def _texts(
    tokenizer: Tokenizer, prompts: list[list[int]], continuations: list[list[int]], stop: frozenset[int]
) -> list[tuple[str, str]]:
    """Of each prompt: the whole text, and what the model has added, without ends of documents."""
    texts = []
    for prompt, tokens in zip(prompts, continuations, strict=True):
        shown = [token for token in tokens if token not in stop]
        # What a token stands for may depend on the one before it.
        whole = tokenizer.decode([token for token in prompt if token not in stop] + shown)
        texts.append((whole, tokenizer.decode(shown)))
    return texts


def _print_runs(runs: Mapping[str, Run], ranks: int, layers: int) -> None:
    """Tokens and time; on several ranks also what a token and an MoE layer cost, the prompts and first tokens apart."""
    first = next(iter(runs.values()))
    print()
    for scheme, run in runs.items():
        how = f", {scheme}" if ranks > 1 else ""
        print(f"{sum(map(len, run.continuations)):,} tokens in {run.seconds:.1f} s on {_plural(ranks, 'rank')}{how}")
    if ranks == 1:
        return
    if len(runs) > 1:
        same = all(run.continuations == first.continuations for run in runs.values())
        print(f"the tokens are {'the same' if same else 'not the same: rounding has parted them'}")
    table = Table("after the\nprompts")
    columns = ("all-to-alls\nof rows", "all-to-alls\nin all", "rows\nsent", "bytes\nsent", "of them\ncontexts")
    for column in columns:
        table.add_column(column, justify="right")
    for scheme, run in runs.items():
        sent = run.traffic
        counts = (sent.row_exchanges // ranks, sent.exchanges // ranks, sent.rows, sent.bytes, sent.context_bytes)
        table.add_row(scheme, *(f"{count:,}" for count in counts))
    Console().print(table)
    steps = max(map(len, first.continuations)) - 1
    decoded = sum(map(len, first.continuations)) - len(first.continuations)
    print(f"{steps:,} steps of {_plural(layers, 'MoE layer')}, {decoded:,} tokens")


def _plural(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _write(path: Path, prompts: Sequence[str], texts: Sequence[str], runs: Mapping[str, Run]) -> None:
    result = {"prompts": list(prompts), "texts": list(texts), "runs": {name: asdict(run) for name, run in runs.items()}}
    write_text(path, json.dumps(result, indent=2) + "\n")
