"""README.md of an exported model: what it is, where it comes from, how to load it."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

import moetrain
from moetrain.checkpoint import Manifest
from moetrain.config import Config
from moetrain.flops import parameters
from moetrain.huggingface.companions import Companions
from moetrain.huggingface.families import Family


def model_card(
    name: str,
    family: Family,
    config: Config,
    manifest: Manifest,
    companions: Companions,
    dtype: str,
    dropped: Sequence[str],
) -> str:
    """Markdown with the front matter that the Hub reads. `dropped`: what the family has no place for."""
    model, router, count = config.model, config.router, parameters(config)
    front: dict[str, object] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["moetrain"]}
    if model.num_experts:
        front["tags"] = ["moetrain", "mixture-of-experts"]
    if companions.license is not None:
        front["license"] = companions.license
    if companions.from_hub:
        front["base_model"] = companions.source
    rows = {
        "architecture": family.architecture,
        "parameters": f"{count.total:,}",
        "of a token": f"{count.active:,}",
        "layers": f"{model.n_layers}",
        "width": f"{model.dim}",
        "heads": f"{model.n_heads}, {model.kv_heads} of keys and values, of width {model.head_width}",
        "experts": f"{model.num_experts} of width {model.expert_dim} a layer, {router.top_k} a token",
        "vocabulary": f"{model.vocab_size:,}",
        "weights": dtype,
    }
    if not model.num_experts:
        del rows["experts"], rows["of a token"]
    table = "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())])
    origin = f"It began with {companions.source}. " if companions.source is not None else ""
    tokens = manifest.progress.get("tokens", 0)
    trained = (
        f"{origin}moetrain {manifest.moetrain} trained it for {manifest.step:,} steps on {tokens:,} tokens of "
        f"{config.data.path}."
        if manifest.step
        else f"{origin}moetrain {manifest.moetrain} wrote it without training."
    )
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {name}\n{trained}",
        table,
        "## Use\n```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
        + (f'tokenizer = AutoTokenizer.from_pretrained("{name}")\n' if companions.has_tokenizer else "")
        + "```",
    ]
    if dropped:
        listed = "\n".join(f"- {what}" for what in dropped)
        parts.append(
            f"## Left out\n{family.architecture} has no place for these, so the model here is another:\n{listed}"
        )
    parts.append(f"Written by moetrain {moetrain.__version__}.")
    return "\n\n".join(parts) + "\n"
