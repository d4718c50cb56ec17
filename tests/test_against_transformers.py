"""Logits and auxiliary pieces against Hugging Face transformers, for every family whose shape the model claims."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moetrain.config import from_dict
from moetrain.model import Decoder

transformers = pytest.importorskip("transformers", reason="needs the extra moetrain[hf]")

COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attn_implementation": "eager",
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
OURS = {"vocab_size": 64, "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "expert_dim": 24, "num_experts": 6}

FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "mixtral": (
        "Mixtral",
        {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2, "rope_theta": 1e6},
        {"rope_theta": 1e6},
        {"top_k": 2, "score": "softmax_after_topk"},
    ),
    "olmoe": (
        "Olmoe",
        {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
        {"qk_norm": "full"},
        {"top_k": 3},
    ),
    "qwen3": (
        "Qwen3Moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": True,
            "head_dim": 16,
            "intermediate_size": 40,
            "mlp_only_layers": [0],
        },
        {"qk_norm": "head", "head_dim": 16, "ffn_dim": 40, "first_dense_layers": 1},
        {"top_k": 3, "normalize": True},
    ),
    "mixtral, stretched positions": (
        "Mixtral",
        {
            "intermediate_size": 24,
            "num_local_experts": 6,
            "num_experts_per_tok": 2,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 50.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        {"rope_theta": 50.0, "rope_scaling": {"factor": 4.0, "original_length": 32}},
        {"top_k": 2, "score": "softmax_after_topk"},
    ),
    "qwen3, biases, a dense layer between": (
        "Qwen3Moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "head_dim": 8,
            "intermediate_size": 40,
            "attention_bias": True,
            "num_hidden_layers": 4,
            "decoder_sparse_step": 2,
            "mlp_only_layers": [1],
        },
        {
            "qk_norm": "head",
            "ffn_dim": 40,
            "qkv_bias": True,
            "out_bias": True,
            "n_layers": 4,
            "moe_every": 2,
            "dense_layers": [1],
        },
        {"top_k": 3},
    ),
    "qwen2": (
        "Qwen2Moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 20,
            "intermediate_size": 40,
        },
        {"qkv_bias": True, "shared_dim": 20, "shared_gate": True},
        {"top_k": 3},
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family: str) -> None:
    prefix, theirs_config, model, router = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **theirs_config})
    theirs = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)  # large enough for every part to matter
    ours = Decoder(
        from_dict(
            {
                "model": {**OURS, "norm_eps": config.rms_norm_eps, "rope_theta": rope_theta(config), **model},
                "router": router,
                "train": {"dtype": "float32"},
            }
        )
    ).eval()
    copy_weights(theirs.state_dict(), ours)
    tokens = torch.randint(0, 64, (2, 16))
    with torch.no_grad():
        expected = theirs(tokens).logits
        actual = ours.logits(ours(tokens)[0])
    assert float((actual - expected).norm() / expected.norm()) < 2e-5


def rope_theta(config: Any) -> float:
    parameters = getattr(config, "rope_parameters", None)
    return float(parameters["rope_theta"] if parameters else config.rope_theta)


def copy_weights(theirs: dict[str, Tensor], ours: Decoder) -> None:
    """By name, with every one of theirs used exactly once."""
    left = dict(theirs)
    for name, target in ours.state_dict().items():
        if name.endswith("router.bias"):
            target.zero_()
            continue
        target.copy_(take(left, name))
    assert not left, f"not used: {sorted(left)}"


def take(left: dict[str, Tensor], name: str) -> Tensor:
    if name == "embedding":
        return left.pop("model.embed_tokens.weight")
    if name == "head":
        return left.pop("lm_head.weight")
    if name == "norm.weight":
        return left.pop("model.norm.weight")
    _, layer, part = name.split(".", 2)
    base = f"model.layers.{layer}."
    attention = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
    if part == "attention_norm.weight":
        return left.pop(base + "input_layernorm.weight")
    if part == "ffn_norm.weight":
        return left.pop(base + "post_attention_layernorm.weight")
    if part.startswith("attention."):
        module, kind = part.removeprefix("attention.").replace("out_", "wo.").split(".")
        return left.pop(f"{base}self_attn.{attention.get(module, module)}.{kind}")
    mlp = base + "mlp."
    if part == "ffn.router.weight":
        return left.pop(mlp + "gate.weight")
    if part == "ffn.experts.w_gate_up":
        return left.pop(mlp + "experts.gate_up_proj")
    if part == "ffn.experts.w_down":
        return left.pop(mlp + "experts.down_proj")
    if part == "ffn.shared.gate.weight":
        return left.pop(mlp + "shared_expert_gate.weight")
    dense = mlp + "shared_expert." if "shared" in part else mlp
    if part.endswith("w_gate_up"):
        return torch.stack([left.pop(dense + "gate_proj.weight"), left.pop(dense + "up_proj.weight")])
    return left.pop(dense + "down_proj.weight")
