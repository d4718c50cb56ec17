"""Dense models made into mixtures of experts (sparse upcycling, arXiv 2212.05055).

Each feed-forward layer becomes E experts: E / G copies of it, each cut into G experts of 1/G of its width (fine-grained
upcycling with virtual groups, arXiv 2410.07524). The experts of one copy have the same row in the router, so that a
token which chooses K of them chooses K / G whole copies. As its weights add up to 1, a whole copy's G experts get 1/G
of the copy's weight each; the down projections are multiplied by G instead. So without noise the new model computes
what the dense one does, but for rounding.

Shapes: D width, F feed-forward width, E experts, I = F / G.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moetrain.checkpoint_shards import LazyTensor, TensorEntry
from moetrain.config import ModelConfig, from_dict
from moetrain.convert import refuse_existing
from moetrain.errors import ConfigError, HuggingFaceError
from moetrain.huggingface.importing import write_imported
from moetrain.huggingface.reader import HuggingFaceModel, local_folder, shapes_of
from moetrain.model import derive_seed


@dataclass(frozen=True)
class Recipe:
    """How experts are made of a dense layer."""

    experts: int
    top_k: int
    granularity: int = 1
    """G, into how many experts each copy is cut."""
    noise: float = 0.0
    """Standard deviation of normal noise on the experts' matrices, as a fraction of that of their own numbers."""
    seed: int = 0
    """Of the noise and of the routers."""


def upcycle(source: str, out: Path, recipe: Recipe) -> HuggingFaceModel:
    """Write the dense model that `source` names, made into a mixture of experts, as the new checkpoint `out`.

    Returns the dense model. One tensor of ours is in memory at a time, and what it is made of. Raises
    HuggingFaceError, CheckpointError, and ConfigError for a recipe that makes no model.
    """
    refuse_existing(out)
    dense = HuggingFaceModel(local_folder(source))
    if dense.family.experts_key is not None:
        raise HuggingFaceError(f"{source}: {dense.family.architecture} has experts already; give a dense model")
    _check(recipe, dense.config.model)
    sections = {
        "model": asdict(dense.config.model)
        | {"num_experts": recipe.experts, "expert_dim": dense.config.model.ffn_dim // recipe.granularity},
        # Those of the families that have such attention, Mixtral and Qwen3-MoE.
        "router": {"top_k": recipe.top_k}
        | ({"score": "softmax_after_topk"} if dense.family.qk_norm == "none" else {"normalize": True}),
    }
    config = from_dict(sections)
    tensors: dict[str, LazyTensor] = {}
    for name, shape in shapes_of(config).items():
        entry = TensorEntry(shape, torch.float32 if name.endswith("router.bias") else dense.dtype)
        tensors[f"model.{name}"] = LazyTensor(shape, entry.dtype, partial(_make, dense, recipe, name, entry))
    write_imported(out, tensors, dense, source, asdict(config.model), asdict(config.router))
    return dense


def _check(recipe: Recipe, model: ModelConfig) -> None:
    for name, value in (("--experts", recipe.experts), ("--top-k", recipe.top_k)):
        if value % recipe.granularity:
            raise ConfigError(f"{name} {value}: must be a multiple of --granularity {recipe.granularity}")
    if model.ffn_dim % recipe.granularity:
        raise ConfigError(
            f"--granularity {recipe.granularity}: must divide the width of the feed-forward layers, {model.ffn_dim}"
        )
    if recipe.top_k > recipe.experts:
        raise ConfigError(f"--top-k {recipe.top_k}: must be at most --experts {recipe.experts}")
    if not 0 <= recipe.noise < float("inf"):
        raise ConfigError(f"--noise {recipe.noise:g}: expected a number from 0 on")


def _make(dense: HuggingFaceModel, recipe: Recipe, name: str, entry: TensorEntry) -> Tensor:
    """The new model's tensor, of the dense one's."""
    if name in dense.entries:
        return dense.tensor(name)
    generator = torch.Generator().manual_seed(derive_seed(recipe.seed, name))
    if name.endswith("router.bias"):
        return torch.zeros(entry.shape, dtype=entry.dtype)
    copies, parts = recipe.experts // recipe.granularity, recipe.granularity
    if name.endswith("router.weight"):
        rows = torch.empty(copies, entry.shape[1]).normal_(0.0, dense.config.model.init_std, generator=generator)
        return rows.repeat_interleave(parts, 0).to(entry.dtype)
    source = dense.tensor(name.replace(".experts.", "."))
    if name.endswith("w_gate_up"):
        cut = torch.cat(source.chunk(parts, dim=1), 0).view(parts, *entry.shape[1:])  # [2, F, D] → G × [2I, D]
    else:
        cut = torch.stack(source.chunk(parts, dim=1)) * parts  # [D, F] → G × [D, I]
    whole = torch.empty(entry.shape, dtype=entry.dtype)
    scale = recipe.noise * float(source.float().std())
    for expert in range(recipe.experts):
        weights = cut[expert % parts]
        if scale:
            of_down = parts if name.endswith("w_down") else 1
            weights = weights + torch.randn(weights.shape, generator=generator) * (scale * of_down)
        whole[expert] = weights
    return whole
