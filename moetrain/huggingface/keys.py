"""Names of tensors in transformers' checkpoints for the names of ours.

Whatever the family, a tensor of ours is the tensors of theirs one after the other in memory: gate and up of a dense
layer [2, F, D], gate and up of each expert [E, 2I, D], down of each expert [E, D, I]. So both directions only copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from moetrain.huggingface.families import Family

_TOP = {"embedding": "model.embed_tokens.weight", "head": "lm_head.weight", "norm.weight": "model.norm.weight"}
_BLOCK = {
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
    "attention.q_norm.weight": "self_attn.q_norm.weight",
    "attention.k_norm.weight": "self_attn.k_norm.weight",
    "attention.out_bias": "self_attn.o_proj.bias",
    **{
        f"attention.w{projection}.{kind}": f"self_attn.{projection}_proj.{kind}"
        for projection in "qkvo"
        for kind in ("weight", "bias")
    },
    "ffn.shared.gate.weight": "mlp.shared_expert_gate.weight",
}
_DENSE = {"w_gate_up": ("gate_proj", "up_proj"), "w_down": ("down_proj",)}


def is_ours_alone(name: str) -> bool:
    """Whether transformers has no such tensor: the router's selection bias."""
    return name.endswith("ffn.router.bias")


def classic_keys(family: Family, name: str, num_experts: int) -> list[str]:
    """Their tensors, in order, for our tensor `name`, with one for each matrix of each expert."""
    if name in _TOP:
        return [_TOP[name]]
    _, layer, part = name.split(".", 2)
    base = f"model.layers.{layer}."
    if part in _BLOCK:
        return [base + _BLOCK[part]]
    if part == "ffn.router.weight":
        return [f"{base}{family.block}.gate.weight"]
    module, kind = part.rsplit(".", 1)
    if module == "ffn.experts":
        gate, up, down = family.projections
        matrices = (gate, up) if kind == "w_gate_up" else (down,)
        return [f"{base}{family.block}.experts.{e}.{m}.weight" for e in range(num_experts) for m in matrices]
    dense = {"ffn": "mlp", "ffn.shared.ffn": "mlp.shared_expert"}[module]
    return [f"{base}{dense}.{matrix}.weight" for matrix in _DENSE[kind]]


def fused_keys(name: str) -> list[str]:
    """The same with all experts of a layer in one tensor, as transformers 5 may write them; [] if that has no name."""
    fused = {
        "ffn.experts.w_gate_up": "mlp.experts.gate_up_proj",
        "ffn.experts.w_down": "mlp.experts.down_proj",
        "ffn.router.weight": "mlp.gate.weight",
    }
    if name in _TOP:
        return []
    _, layer, part = name.split(".", 2)
    return [f"model.layers.{layer}.{fused[part]}"] if part in fused else []


def classic_shape(shape: Sequence[int], pieces: int) -> tuple[int, ...]:
    """Shape of each of their `pieces` equal tensors that make up one of ours of this shape: stacks of matrices come
    apart."""
    return tuple(shape) if len(shape) < 3 else (math.prod(shape) // pieces // shape[-1], shape[-1])
