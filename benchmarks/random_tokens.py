"""Data for benchmarks of training steps: random tokens, which cost what others do."""

from __future__ import annotations

import io
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path

import numpy as np

from moetrain.config import Config
from moetrain.data.index import Index, Shard
from moetrain.files import sha256
from moetrain.parallel import Mesh, on_rank_0


@contextmanager
def on_random_tokens(config: Config, mesh: Mesh, within: str | None = None) -> Iterator[Config]:
    """The config without checkpoints, evaluation and reports, of a run in a folder of its own, `within` the system's
    temporary one by default, on random tokens there; gone at the end. Rank 0 alone prints."""
    folder = on_rank_0(lambda: Path(tempfile.mkdtemp(dir=within)), mesh.host_group)
    try:
        config = replace(
            config,
            run=replace(config.run, dir=str(folder / "run")),
            data=replace(config.data, path=str(folder / "data")),
            checkpoint=replace(config.checkpoint, every=0, resume="never"),
            eval=replace(config.eval, every=0, tokens=config.data.seq_len),
            metrics=replace(config.metrics, every=10**9, console="none", tensorboard=False, wandb_project=None),
        )
        on_rank_0(lambda: _write_random_tokens(folder / "data", config), mesh.host_group)
        with redirect_stdout(sys.stdout if mesh.rank == 0 else io.StringIO()):
            yield config
    finally:
        if mesh.rank == 0:
            shutil.rmtree(folder)


def _write_random_tokens(folder: Path, config: Config) -> None:
    """A data set of uniformly random tokens of the model's vocabulary."""
    folder.mkdir()
    vocabulary = config.model.vocab_size
    dtype = "uint16" if vocabulary <= 2**16 else "uint32"
    generator = np.random.default_rng(config.train.seed)
    shards = {}
    for name, tokens in (("train", 8 * config.train.tokens_per_step + 1), ("heldout", 2 * config.data.seq_len + 1)):
        file = folder / f"{name}.bin"
        file.write_bytes(
            generator.integers(vocabulary, size=tokens).astype(f"<{dtype[0]}{int(dtype[4:]) // 8}").tobytes()
        )
        shards[name] = (Shard(file.name, tokens, 1, tokens, dtype, sha256(file)),)
    # No text was tokenised; "bytes" is the kind that needs no tokenizer file.
    tokenizer = {"kind": "bytes", "name": "random tokens"}
    Index(vocabulary, 0, tokenizer, {"made": "by moetrain bench"}, **shards).write(folder)
