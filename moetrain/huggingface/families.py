"""Families of transformers' models: what their config.json says in our sections `model` and `router`, and back.

No transformers is needed to read or write the files. What a family cannot express is told by :func:`misfits`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from moetrain.config import Config, ModelConfig
from moetrain.errors import HuggingFaceError


@dataclass(frozen=True)
class Family:
    """An architecture of transformers, by what tells it from the others."""

    model_type: str
    architecture: str
    """Class of transformers."""
    experts_key: str | None = None
    """Under which key config.json has the number of experts; None: a dense model."""
    expert_dim_key: str = "moe_intermediate_size"
    block: str = "mlp"
    """Module of a feed-forward layer."""
    projections: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    """Of an expert: gate, up, down."""
    mixes_dense: bool = False
    """Some layers may be dense."""
    shared: bool = False
    """Each MoE layer has a gated shared expert."""
    normalizes: bool = False
    """The weights of a token's experts always add up to 1; else as `norm_topk_prob` says."""
    qk_norm: Literal["none", "head", "full"] = "none"
    bias_key: str | None = None
    """Key that gives queries, keys and values a bias …"""
    biases: Literal["qkv", "all"] = "all"
    """… and attention's output too."""
    head_dim: Literal["optional", "required", "derived"] = "optional"
    """Whether config.json says how wide a head is; where it does not, it is hidden_size / num_attention_heads."""
    rope_theta: float = 10_000.0
    """What transformers takes where config.json says nothing."""


_FAMILIES = (
    Family(
        "mixtral",
        "MixtralForCausalLM",
        experts_key="num_local_experts",
        expert_dim_key="intermediate_size",
        block="block_sparse_moe",
        projections=("w1", "w3", "w2"),
        normalizes=True,
        rope_theta=1e6,
    ),
    Family(
        "olmoe",
        "OlmoeForCausalLM",
        experts_key="num_experts",
        expert_dim_key="intermediate_size",
        qk_norm="full",
        bias_key="attention_bias",
        head_dim="derived",
    ),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        experts_key="num_experts",
        mixes_dense=True,
        shared=True,
        bias_key="qkv_bias",
        biases="qkv",
    ),
    Family(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        experts_key="num_experts",
        mixes_dense=True,
        qk_norm="head",
        bias_key="attention_bias",
    ),
    Family("llama", "LlamaForCausalLM", bias_key="attention_bias"),
    Family("mistral", "MistralForCausalLM"),
    Family("qwen3", "Qwen3ForCausalLM", qk_norm="head", bias_key="attention_bias", head_dim="required"),
)
FAMILIES = {family.model_type: family for family in _FAMILIES}

_ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu": "geglu", "relu": "reglu"}
_DEFAULT_BIAS = {"qkv_bias": True, "attention_bias": False}

CARRIED = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "output_router_logits",
    "pad_token_id",
    "router_aux_loss_coef",
    "use_cache",
)
"""Keys of a config.json that say nothing of our model, and go with it from import to export."""


# ------------------------------------------------------------------------------------------------------- import


def family_of(hf: Mapping[str, Any], where: str) -> Family:
    """The family of a config.json; HuggingFaceError if it is none of ours."""
    kind = hf.get("model_type")
    if kind not in FAMILIES:
        raise HuggingFaceError(f"{where}: model_type = {kind!r}: moetrain knows {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def our_sections(hf: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    """Our sections `model` and `router` for a config.json; `where` names it in errors.

    Raises HuggingFaceError for another family, a missing key, and for what our model cannot do.
    """
    family = family_of(hf, where)
    _refuse_unknown(hf, where)
    theta, scaling = _rope(hf, family, where)
    heads, bias = _required(hf, "num_attention_heads", where), False
    if family.bias_key is not None:
        bias = bool(hf.get(family.bias_key, _DEFAULT_BIAS[family.bias_key]))
    model: dict[str, Any] = {
        "vocab_size": _required(hf, "vocab_size", where),
        "dim": _required(hf, "hidden_size", where),
        "n_layers": _required(hf, "num_hidden_layers", where),
        "n_heads": heads,
        "n_kv_heads": hf.get("num_key_value_heads"),
        "head_dim": _required(hf, "head_dim", where) if family.head_dim == "required" else hf.get("head_dim"),
        "activation": _ACTIVATIONS[hf.get("hidden_act", "silu")],
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": _required(hf, "rms_norm_eps", where),
        "qk_norm": family.qk_norm,
        "qkv_bias": bias,
        "out_bias": bias and family.biases == "all",
        "tie_embeddings": bool(hf.get("tie_word_embeddings", False)),
    }
    if family.experts_key is None:
        return {"model": model | {"num_experts": 0, "ffn_dim": _required(hf, "intermediate_size", where)}, "router": {}}

    experts = hf.get("num_experts", hf.get("num_local_experts"))  # releases of transformers have one or the other
    model |= {
        "num_experts": _required({family.experts_key: experts}, family.experts_key, where),
        "expert_dim": _required(hf, family.expert_dim_key, where),
    }
    if family.mixes_dense:
        model |= {
            "ffn_dim": _required(hf, "intermediate_size", where),
            "moe_every": hf.get("decoder_sparse_step", 1),
            "dense_layers": [n for n in hf.get("mlp_only_layers") or [] if n < model["n_layers"]],
        }
    if family.shared:
        model |= {"shared_dim": _required(hf, "shared_expert_intermediate_size", where), "shared_gate": True}
    router: dict[str, Any] = {"top_k": _required(hf, "num_experts_per_tok", where)}
    if family.normalizes:
        router["score"] = "softmax_after_topk"
    else:
        router["normalize"] = bool(_required(hf, "norm_topk_prob", where))
    return {"model": model, "router": router}


def _required(hf: Mapping[str, Any], key: str, where: str) -> Any:
    if hf.get(key) is None:
        raise HuggingFaceError(f"{where}: lacks {key}")
    return hf[key]


def _refuse_unknown(hf: Mapping[str, Any], where: str) -> None:
    """What would be another model without a word."""
    longest = hf.get("max_position_embeddings", 0)
    window = hf.get("sliding_window") or 0
    sliding = "sliding_attention" in (hf.get("layer_types") or []) or (
        0 < window < longest and hf.get("use_sliding_window", True)
    )
    rules = {
        "hidden_act": (hf.get("hidden_act", "silu") in _ACTIVATIONS, f"moetrain has {', '.join(_ACTIVATIONS)}"),
        "sliding_window": (not sliding, "moetrain's attention sees the whole sequence"),
        "clip_qkv": (hf.get("clip_qkv") is None, "moetrain does not clip queries, keys and values"),
        "mlp_bias": (not hf.get("mlp_bias"), "moetrain's feed-forward layers have no biases"),
        "quantization_config": (
            hf.get("quantization_config") is None,
            "moetrain reads no quantised weights; take the model they were made from",
        ),
    }
    for key, (fits, reason) in rules.items():
        if not fits:
            raise HuggingFaceError(f"{where}: {key} = {hf.get(key)}: {reason}")


def _rope(hf: Mapping[str, Any], family: Family, where: str) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling`, from where transformers 4 and 5 have them."""
    values = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    theta = float(values.get("rope_theta", hf.get("rope_theta", family.rope_theta)))
    kind = values.get("rope_type", values.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise HuggingFaceError(f"{where}: rope_type = {kind}: moetrain has default and llama3")
    scaling = {key: float(_required(values, key, where)) for key in ("factor", "low_freq_factor", "high_freq_factor")}
    return theta, {**scaling, "original_length": int(_required(values, "original_max_position_embeddings", where))}


# ------------------------------------------------------------------------------------------------------- export


@dataclass(frozen=True)
class Misfit:
    """Something of ours that a family has no place for."""

    what: str
    """Key, value and what it means."""
    droppable: bool
    """Without it there is still a model: one that chooses experts in another way, or trains in another way."""


def misfits(family: Family, config: Config) -> list[Misfit]:
    """What of `config` the family cannot express; empty if it can hold the model as it is."""
    model, router = config.model, config.router
    found = _shape_misfits(family, model)
    if family.experts_key is None or not model.num_experts:
        return [Misfit(what, droppable=False) for what in found]
    sums_to_1 = router.score == "softmax_after_topk" or (router.score == "softmax" and router.normalize)
    shape_rules = {
        "router.score": (router.score != "sigmoid", router.score, "it has no sigmoid scores"),
        "router.normalize": (sums_to_1 or not family.normalizes, router.normalize, "its weights add up to 1"),
        "router.scale": (router.scale == 1, router.scale, "it has no factor on the weights"),
        "router.force_balance": (not router.force_balance, True, "its router decides"),
    }
    found += [_line(key, *rule[1:]) for key, rule in shape_rules.items() if not rule[0]]
    rules = {
        "router.bias_update_rate": (
            router.bias_update_rate == 0,
            router.bias_update_rate,
            "the selection bias of each expert; others are then chosen",
        ),
        "router.top_groups": (
            router.top_groups == router.groups,
            router.top_groups,
            "the limit to the best groups; others are then chosen",
        ),
        "router.rounding": (router.rounding == "none", router.rounding, "rounding to the kernel's tile in training"),
        "router.capacity_factor": (
            router.capacity_factor is None,
            router.capacity_factor,
            "the limit of an expert's tokens in training",
        ),
        "router.jitter": (router.jitter == 0, router.jitter, "noise on the router's input in training"),
    }
    dropped = [_line(key, *rule[1:]) for key, rule in rules.items() if not rule[0]]
    return [Misfit(what, droppable=False) for what in found] + [Misfit(what, droppable=True) for what in dropped]


def _shape_misfits(family: Family, model: ModelConfig) -> list[str]:
    layers = [model.is_moe_layer(layer) for layer in range(model.n_layers)]
    has_experts, wants_experts = any(layers), family.experts_key is not None
    biases = (model.qkv_bias, model.out_bias)
    possible = {(False, False)}
    if family.bias_key is not None:
        possible.add((True, family.biases == "all"))
    widths = model.head_width * model.n_heads == model.dim
    rules = {
        "model.num_experts": (has_experts == wants_experts, model.num_experts, "it has experts, or it has not"),
        "model.dense_layers": (
            all(layers) or not wants_experts or family.mixes_dense,
            [layer for layer, moe in enumerate(layers) if not moe],
            "all its layers have experts",
        ),
        "model.qk_norm": (model.qk_norm == family.qk_norm, model.qk_norm, f"it has {family.qk_norm}"),
        "model.qkv_bias": (biases in possible, model.qkv_bias, f"with model.out_bias = {model.out_bias}"),
        "model.shared_dim": (
            (model.shared_dim > 0) == family.shared or not wants_experts,
            model.shared_dim,
            "it has a shared expert" if family.shared else "it has no shared expert",
        ),
        "model.shared_gate": (
            model.shared_gate or not (family.shared and model.shared_dim),
            model.shared_gate,
            "its shared expert is gated",
        ),
        "model.head_dim": (widths or family.head_dim != "derived", model.head_width, "it is hidden_size / heads there"),
    }
    return [_line(key, *rule[1:]) for key, rule in rules.items() if not rule[0]]


def _line(key: str, value: object, reason: str) -> str:
    return f"{key} = {value} ({reason})"


def family_for(config: Config) -> tuple[Family, list[str]]:
    """The family that holds the model, and what would be dropped; HuggingFaceError, with what is missing, if none."""
    found = {family: misfits(family, config) for family in _FAMILIES}
    best = min(found, key=lambda family: sum(not misfit.droppable for misfit in found[family]))
    missing = [misfit.what for misfit in found[best] if not misfit.droppable]
    if missing:
        raise HuggingFaceError(
            f"no family of transformers that moetrain writes ({', '.join(FAMILIES)}) has such a model; nearest is "
            f"{best.model_type}, but for {'; '.join(missing)}"
        )
    return best, [misfit.what for misfit in found[best]]


def config_json(family: Family, config: Config, dtype: str, carried: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of a model that the family can hold, for transformers 4 and 5.

    `dtype`: of the weights, as torch names it. `carried`: values of :data:`CARRIED`.
    """
    model, router = config.model, config.router
    hf: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": dtype,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "intermediate_size": model.ffn_dim,
        "num_hidden_layers": model.n_layers,
        "num_attention_heads": model.n_heads,
        "num_key_value_heads": model.kv_heads,
        "hidden_act": {"swiglu": "silu", "geglu": "gelu", "reglu": "relu"}[model.activation],
        "max_position_embeddings": config.data.seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_scaling": None,
        "tie_word_embeddings": model.tie_embeddings,
        # transformers has ids of its own for these where a file says nothing.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if family.head_dim == "required" or (family.head_dim == "optional" and model.head_dim is not None):
        hf["head_dim"] = model.head_width
    if family.bias_key is not None:
        hf[family.bias_key] = model.qkv_bias
    if model.rope_scaling is not None:
        scaling = asdict(model.rope_scaling)
        length = scaling.pop("original_length")
        hf["rope_scaling"] = {"rope_type": "llama3", **scaling, "original_max_position_embeddings": length}
    if family.experts_key is not None:
        hf |= {
            family.experts_key: model.num_experts,
            "num_experts_per_tok": router.top_k,
            family.expert_dim_key: model.expert_dim,
        }
        if not family.normalizes:
            hf["norm_topk_prob"] = router.normalize or router.score == "softmax_after_topk"
    if family.mixes_dense:
        in_turn = range(model.moe_every - 1, model.n_layers, model.moe_every)
        hf |= {
            "decoder_sparse_step": model.moe_every,
            "mlp_only_layers": [layer for layer in in_turn if not model.is_moe_layer(layer)],
        }
    if family.shared:
        hf["shared_expert_intermediate_size"] = model.shared_dim
    return hf | {key: carried[key] for key in CARRIED if key in carried}
