"""From a Hugging Face folder to a checkpoint that runs start from.

The checkpoint has no optimiser state and no steps. In its folder are also the model's tokenizer, its own config.json,
and config.yaml, which trains on from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from moetrain.checkpoint import write_checkpoint
from moetrain.checkpoint_shards import LazyTensor
from moetrain.config import Config, ModelConfig, RouterConfig, config_hash, from_dict
from moetrain.convert import refuse_existing
from moetrain.huggingface.companions import license_of, read_files
from moetrain.huggingface.reader import HuggingFaceModel, local_folder

LONGEST = 4096
"""Tokens of a training sequence that config.yaml asks for, of a model that can take more."""


def import_model(source: str, out: Path) -> HuggingFaceModel:
    """Write the model that `source` names, a folder or a repository on the Hub, as the new checkpoint `out`.

    One tensor of ours is in memory at a time. Raises HuggingFaceError and CheckpointError.
    """
    refuse_existing(out)
    model = HuggingFaceModel(local_folder(source))
    tensors = {
        f"model.{name}": LazyTensor(entry.shape, entry.dtype, partial(model.tensor, name))
        for name, entry in model.entries.items()
    }
    write_imported(out, tensors, model, source, asdict(model.config.model), asdict(model.config.router))
    return model


def write_imported(
    out: Path,
    tensors: Mapping[str, LazyTensor],
    origin: HuggingFaceModel,
    source: str,
    model: Mapping[str, Any],
    router: Mapping[str, Any],
) -> None:
    """Write tensors and what goes with them: `model` and `router` are those sections of the config."""
    dtype = str(origin.dtype).removeprefix("torch.")
    longest = min(int(origin.config_json.get("max_position_embeddings", LONGEST)), LONGEST)
    seq_len = 2 ** int(math.log2(longest))  # a power of two, so that it divides the default train.tokens_per_step
    sections: dict[str, Any] = {"model": dict(model), "router": dict(router), "data": {"seq_len": seq_len}}
    config = from_dict({**sections, "train": {"param_dtype": dtype}})
    progress = {
        "step": 0,
        "samples": 0,
        "tokens": 0,
        "bad_steps": 0,
        "bad_steps_in_a_row": 0,
        "data": None,
        "placement": None,
        "config": asdict(config),
        "config_hash": config_hash(config),
        "huggingface": {
            "source": source,
            "from_hub": not Path(source).expanduser().is_dir(),
            "license": license_of(origin.folder),
        },
    }
    files = read_files(origin.folder) | {"config.yaml": _config_yaml(out, source, config)}
    write_checkpoint(out, tensors, {"step": 0, "world_size": 1, "ep": 1, "progress": progress}, files)


def _config_yaml(out: Path, source: str, config: Config) -> bytes:
    """What differs from the defaults, and where to start."""
    sections = {
        "run": {"dir": f"runs/{out.name}"},
        "model": _changed(config.model, ModelConfig()),
        "router": _changed(config.router, RouterConfig()),
        "data": {"seq_len": config.data.seq_len},
        "checkpoint": {"init_from": str(out.absolute())},
    }
    heading = (
        f"# From {source}. Data in its own tokens, and training on from it:\n"
        f"#   moetrain data build TEXTS --tokenizer {out} --out DATA\n"
        f"#   moetrain train {out / 'config.yaml'} data.path=DATA\n"
    )
    return (heading + yaml.safe_dump(sections, sort_keys=False)).encode()


def _changed(section: Any, default: Any) -> dict[str, Any]:
    unset = asdict(default)
    return {key: value for key, value in asdict(section).items() if value != unset[key]}
