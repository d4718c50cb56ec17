"""What a model weighs and what a token costs: parameter counts, model FLOPs and the peaks that MFU divides by.

Everything is computed from the config; no tensor is made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moetrain.config import Config


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by what they do. The parts are disjoint and add up to `total`."""

    embedding: int
    """The table [V, D]. A tied head is the same table and is counted here."""
    head: int
    """The output projection [V, D]; 0 when it is tied to the embedding."""
    attention: int
    """Projections of queries, keys, values and outputs."""
    feed_forward: int
    """Dense feed-forward layers."""
    shared_experts: int
    """Shared experts and their gates."""
    routers: int
    experts: int
    """All routed experts."""
    used_experts: int
    """Of `experts`, those that one token uses: K / E of them. Not a part of its own."""
    vectors: int
    """Norm weights and biases: the parameters, besides the embedding, that no matrix product reads."""
    split: int
    """Of those that are not experts' the ones that tensor parallelism splits, the others being on every rank. Not a
    part of its own."""

    @property
    def dense(self) -> int:
        """All but the routed experts."""
        return (
            self.embedding
            + self.head
            + self.attention
            + self.feed_forward
            + self.shared_experts
            + self.routers
            + self.vectors
        )

    @property
    def total(self) -> int:
        return self.dense + self.experts

    @property
    def active(self) -> int:
        """Parameters that take part in one token: all but the experts it does not use."""
        return self.dense + self.used_experts


@dataclass(frozen=True)
class TrainingFlops:
    """Model FLOPs of one token, forward and backward; a multiply and an add are two."""

    matmul: int
    """Products with weights."""
    attention: int
    """Products of queries with keys and of attention weights with values."""

    @property
    def total(self) -> int:
        return self.matmul + self.attention


def parameters(config: Config) -> ParameterCount:
    """Count the parameters of the model that `config` describes; exact.

    The selection bias of auxiliary-loss-free balancing is a buffer and is not counted.
    """
    model = config.model
    D, hd, H, Hkv = model.dim, model.head_width, model.n_heads, model.kv_heads
    moe_layers = sum(model.is_moe_layer(layer) for layer in range(model.n_layers))
    dense_layers = model.n_layers - moe_layers

    qk_norm = {"none": 0, "head": 2 * hd, "full": (H + Hkv) * hd}[model.qk_norm]
    qkv_bias = (H + 2 * Hkv) * hd if model.qkv_bias else 0
    out_bias = D if model.out_bias else 0
    # gate, up and down: three D × width matrices in every feed-forward network.
    expert = 3 * D * model.expert_dim
    shared_expert = 3 * D * model.shared_dim + (D if model.shared_gate else 0)
    embedding = model.vocab_size * D
    head = 0 if model.tie_embeddings else embedding
    attention = model.n_layers * 2 * D * (H + Hkv) * hd
    feed_forward = dense_layers * 3 * D * model.ffn_dim
    of_heads = model.n_layers * (qkv_bias + (qk_norm if model.qk_norm == "full" else 0))
    return ParameterCount(
        embedding=embedding,
        head=head,
        attention=attention,
        feed_forward=feed_forward,
        shared_experts=moe_layers * shared_expert,
        routers=moe_layers * model.num_experts * D,
        experts=moe_layers * model.num_experts * expert,
        used_experts=moe_layers * config.router.top_k * expert,
        vectors=model.n_layers * (2 * D + qk_norm + qkv_bias + out_bias) + D,
        split=embedding + head + attention + feed_forward + of_heads,
    )


def flops_per_token(config: Config) -> TrainingFlops:
    """Model FLOPs of training on one token (PaLM, arXiv 2204.02311, appendix B), the numerator of MFU.

    matmul = 6 × the active parameters that a matrix product reads: 2 forward (multiply, add), 4 backward (the
    gradients of input and weight). That excludes the embedding lookup, norms and biases, and includes the output
    projection, tied or not.

    attention = 6 · n_layers · n_heads · head_width · seq_len: the causal half only. A token attends to itself and
    those before it, seq_len / 2 on average; for each of them and each head a score and a value product take
    2 · head_width forward each, and backward takes twice the forward: 3 · (2 + 2) · head_width · seq_len / 2. PaLM and
    torchtitan count the masked half too, 12 in place of 6.

    Not counted: recomputation, optimiser, routing, softmax and activations. Tokens that a capacity limit drops are
    counted as if they were computed, and attention as if documents were not masked.
    """
    model = config.model
    count = parameters(config)
    matrices = count.attention + count.feed_forward + count.shared_experts + count.routers + count.used_experts
    return TrainingFlops(
        matmul=6 * (matrices + model.vocab_size * model.dim),
        attention=6 * model.n_layers * model.n_heads * model.head_width * config.data.seq_len,
    )


# Dense bfloat16 TFLOP/s from the makers' datasheets (those with sparsity halved; GeForce: float32 accumulation).
# The first entry all of whose words are in the device's name counts.
_PEAK_TFLOPS: tuple[tuple[str, float], ...] = (
    ("GB200", 2500.0),
    ("B200", 2250.0),
    ("GH200", 989.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800 PCIe", 756.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("A40", 149.7),
    ("A30", 165.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("RTX 6000 Ada", 364.2),
    ("RTX A6000", 154.8),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("MI325X", 1307.4),
    ("MI300X", 1307.4),
    ("MI250X", 191.5),  # of one die, which is what torch calls a device
)
# Slices and variants of a listed device that have another peak.
_VARIANTS = frozenset({"mig", "laptop", "ti", "d"})


def peak_tflops(device_name: str) -> float | None:
    """Dense bfloat16 peak in TFLOP/s of the device that torch.cuda.get_device_name calls `device_name`.

    From the datasheet, without sparsity; None for a device that is not in the table.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    if words & _VARIANTS:
        return None
    for device, peak in _PEAK_TFLOPS:
        if words.issuperset(device.lower().split()):
            return peak
    return None
