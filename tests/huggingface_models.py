"""Small random models of transformers, one or more of each family, and the settings that moetrain should read there."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

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


class Kind(NamedTuple):
    prefix: str
    """Of transformers' classes."""
    theirs: dict[str, Any]
    """Beyond COMMON."""
    model: dict[str, Any]
    router: dict[str, Any]
    """Ours, beyond what COMMON says."""


EXPERTS = {"num_experts": 6, "expert_dim": 24}
KINDS = {
    "mixtral": Kind(
        "Mixtral",
        {"intermediate_size": 24, "num_local_experts": 6, "num_experts_per_tok": 2},
        {**EXPERTS, "rope_theta": 1e6},
        {"top_k": 2, "score": "softmax_after_topk"},
    ),
    "mixtral, stretched positions": Kind(
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
        {**EXPERTS, "rope_theta": 50.0, "rope_scaling": {"factor": 4.0, "original_length": 32}},
        {"top_k": 2, "score": "softmax_after_topk"},
    ),
    "olmoe": Kind(
        "Olmoe",
        {"intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False},
        {**EXPERTS, "qk_norm": "full"},
        {"top_k": 3},
    ),
    "qwen3_moe": Kind(
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
        {**EXPERTS, "qk_norm": "head", "head_dim": 16, "ffn_dim": 40, "dense_layers": [0]},
        {"top_k": 3, "normalize": True},
    ),
    "qwen3_moe, biases, a dense layer between, tied": Kind(
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
            "tie_word_embeddings": True,
        },
        {**EXPERTS, "qk_norm": "head", "ffn_dim": 40, "qkv_bias": True, "out_bias": True, "n_layers": 4}
        | {"moe_every": 2, "dense_layers": [1], "tie_embeddings": True, "head_dim": 8},
        {"top_k": 3},
    ),
    "qwen2_moe": Kind(
        "Qwen2Moe",
        {
            "moe_intermediate_size": 24,
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "norm_topk_prob": False,
            "shared_expert_intermediate_size": 20,
            "intermediate_size": 40,
        },
        {**EXPERTS, "ffn_dim": 40, "qkv_bias": True, "shared_dim": 20, "shared_gate": True},
        {"top_k": 3},
    ),
    "llama": Kind("Llama", {"intermediate_size": 48}, {"num_experts": 0, "ffn_dim": 48, "head_dim": 8}, {}),
    "mistral": Kind(
        "Mistral",
        {"intermediate_size": 48, "sliding_window": None},
        {"num_experts": 0, "ffn_dim": 48, "head_dim": 8},
        {},
    ),
    "qwen3": Kind(
        "Qwen3",
        {"intermediate_size": 48, "head_dim": 16, "tie_word_embeddings": True},
        {"num_experts": 0, "ffn_dim": 48, "qk_norm": "head", "head_dim": 16, "tie_embeddings": True},
        {},
    ),
}


def make(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """transformers' model, with weights so large that every part of it matters."""
    import transformers

    prefix, theirs, *_ = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**{**COMMON, **theirs, **changes})
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.to(dtype)


def save(kind: str, folder: Path, dtype: torch.dtype = torch.float32, *, fused: bool = False, **changes: Any) -> Any:
    """The model, saved in `folder`; `fused`: with all experts of a layer in one tensor."""
    model = make(kind, dtype, **changes)
    model.save_pretrained(folder, save_original_format=not fused)
    return model
