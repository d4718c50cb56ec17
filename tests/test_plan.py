"""Parameter counts, model FLOPs, peaks and memory plans."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from moetrain.config import (
    ActivationCheckpointingConfig,
    Config,
    DataConfig,
    ModelConfig,
    ParallelConfig,
    RouterConfig,
    RunConfig,
    TrainConfig,
)
from moetrain.errors import ConfigError, UserError
from moetrain.flops import flops_per_token, parameters, peak_tflops
from moetrain.model import Decoder
from moetrain.parallel import Mesh, create_mesh
from moetrain.parallel.mock import MockWorld
from moetrain.plan import activation_bytes, check_memory, make_plan, plan_command

OLMOE = Config(
    model=ModelConfig(
        vocab_size=50304, dim=2048, n_layers=16, n_heads=16, num_experts=64, expert_dim=1024, qk_norm="full"
    ),
    router=RouterConfig(top_k=8),
)
QWEN3 = Config(
    model=ModelConfig(
        vocab_size=151936,
        dim=2048,
        n_layers=48,
        n_heads=32,
        n_kv_heads=4,
        head_dim=128,
        num_experts=128,
        expert_dim=768,
        qk_norm="head",
    ),
    router=RouterConfig(top_k=8),
)
MIXTRAL = Config(
    model=ModelConfig(
        vocab_size=32000, dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, num_experts=8, expert_dim=14336
    ),
    router=RouterConfig(top_k=2),
)
QWEN_MOE = Config(
    model=ModelConfig(
        vocab_size=151936,
        dim=2048,
        n_layers=24,
        n_heads=16,
        num_experts=60,
        expert_dim=1408,
        shared_dim=5632,
        shared_gate=True,
        qkv_bias=True,
    ),
    router=RouterConfig(top_k=4),
)


@pytest.mark.parametrize(
    ("config", "total"),
    [
        pytest.param(OLMOE, 6_919_161_856, id="OLMoE-1B-7B"),
        pytest.param(QWEN3, 30_532_122_624, id="Qwen3-30B-A3B"),
        pytest.param(MIXTRAL, 46_702_792_704, id="Mixtral-8x7B"),
        pytest.param(QWEN_MOE, 14_315_784_192, id="Qwen1.5-MoE-A2.7B"),
    ],
)
def test_totals_of_published_models(config: Config, total: int) -> None:
    assert parameters(config).total == total


def test_active_parameters() -> None:
    # Of OLMoE's 64 experts a token uses 8: 56 experts of 3 · 2048 · 1024 rest in each of the 16 layers.
    count = parameters(OLMOE)
    assert count.active == count.total - 16 * 56 * 3 * 2048 * 1024
    assert count.active == 1_282_017_280


SHAPES: dict[str, dict[str, Any]] = {
    "moe": {},
    "dense": {"num_experts": 0},
    "mixed": {"first_dense_layers": 1, "moe_every": 2, "n_layers": 5},
    "qk_norm head, grouped queries, wide heads": {"qk_norm": "head", "n_kv_heads": 1, "head_dim": 24},
    "one dense layer among others": {"dense_layers": [1], "n_layers": 3},
    "qk_norm full, bias": {"qk_norm": "full", "n_kv_heads": 2, "qkv_bias": True, "out_bias": True},
    "shared, gated": {"shared_dim": 40, "shared_gate": True},
    "tied": {"tie_embeddings": True},
}
TINY = Config(
    run=RunConfig(device="cpu"),
    model=ModelConfig(vocab_size=96, dim=64, n_layers=2, n_heads=4, ffn_dim=80, num_experts=8, expert_dim=48),
    router=RouterConfig(top_k=2),
    data=DataConfig(seq_len=128),
    train=TrainConfig(tokens_per_step=1024),
)


def with_model(config: Config, **changes: Any) -> Config:
    return replace(config, model=replace(config.model, **changes))


@pytest.mark.parametrize("shape", SHAPES)
def test_count_is_that_of_the_model(shape: str) -> None:
    config = with_model(TINY, **SHAPES[shape])
    with torch.device("meta"):
        model = Decoder(config)
    assert parameters(config).total == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_of_a_rank_are_those_of_its_model(shape: str) -> None:
    parallel = ParallelConfig(tp=2, ep=4 if SHAPES[shape].get("num_experts", 8) else 1)
    config = replace(with_model(TINY, **{**SHAPES[shape], "n_kv_heads": 2}), parallel=parallel)

    def count() -> int:
        mesh = create_mesh(tp=parallel.tp, ep=parallel.ep, device="cpu")
        return sum(parameter.numel() for parameter in Decoder(config, mesh).parameters())

    assert MockWorld(4).run(count) == [make_plan(config, 4).rank_parameters] * 4


@pytest.mark.parametrize("shape", SHAPES)
def test_matmul_flops_are_those_of_the_model(shape: str) -> None:
    """torch counts the products of a forward and backward pass; sequences of one token have no masked half."""
    from torch.utils.flop_counter import FlopCounterMode

    config = with_model(TINY, **SHAPES[shape])
    model = Decoder(config)
    model.initialize(0)
    tokens = torch.randint(config.model.vocab_size, (1, config.data.seq_len))
    with FlopCounterMode(display=False) as counter:
        hidden, stats = model(tokens)
        loss = model.cross_entropy(hidden, tokens) + sum(layer.balance_loss for layer in stats)
        loss.backward()
    products = {op: flops for op, flops in counter.get_flop_counts()["Global"].items() if "attention" not in str(op)}
    assert sum(products.values()) == flops_per_token(config).matmul * config.data.seq_len


def test_attention_flops_by_counting_pairs() -> None:
    config = replace(with_model(TINY, head_dim=24, n_layers=3), data=DataConfig(seq_len=256))
    visible = sum(position + 1 for position in range(256))
    forward = 3 * 4 * visible * (2 + 2) * 24  # layers, heads, pairs, score and value product of width 24
    # The diagonal belongs to neither half: the formula leaves half of it out.
    assert flops_per_token(config).attention * 256 == pytest.approx(3 * forward, rel=1 / 256)
    assert flops_per_token(config).total == flops_per_token(config).matmul + flops_per_token(config).attention


def test_tied_head_still_computes() -> None:
    tied = with_model(TINY, tie_embeddings=True)
    assert flops_per_token(tied) == flops_per_token(TINY)
    assert parameters(TINY).total - parameters(tied).total == 96 * 64


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L40S", 362),
        ("NVIDIA L40", 181),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 3090", 71),
        ("AMD Instinct MI300X", 1307.4),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Tesla V100-SXM2-16GB", None),
        ("the CPU", None),
    ],
)
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_tflops(name) == peak


def test_plan_of_a_rank() -> None:
    config = replace(TINY, parallel=ParallelConfig(ep=4), train=TrainConfig(tokens_per_step=4096, dtype="bfloat16"))
    plan = make_plan(config, 8)
    expert = 3 * 64 * 48
    dense = 2 * 96 * 64 + 64 + 2 * (4 * 64 * 64 + 2 * 64 + 8 * 64)
    assert plan.parameters.total == dense + 2 * 8 * expert
    assert plan.rank_parameters == dense + 2 * 2 * expert
    assert plan.weight_bytes == plan.gradient_bytes == 4 * plan.rank_parameters
    assert plan.moment_bytes == 8 * plan.rank_parameters
    assert plan.copy_bytes == 2 * plan.rank_parameters
    assert plan.rank_bytes == (4 + 4 + 8 + 2) * plan.rank_parameters + plan.activation_bytes
    assert plan.accumulation_steps == 4
    assert plan.flops_per_step == 4096 * flops_per_token(config).total
    assert [(list(experts), list(ranks)) for experts, ranks in plan.expert_ranks] == [
        ([0, 1], [0, 4]),
        ([2, 3], [1, 5]),
        ([4, 5], [2, 6]),
        ([6, 7], [3, 7]),
    ]


def test_low_precision_weights_are_half_and_need_no_copy() -> None:
    half = replace(TINY, train=replace(TINY.train, param_dtype="bfloat16", dtype="bfloat16"))
    plan = make_plan(half, 1)
    assert plan.weight_bytes == 2 * plan.rank_parameters
    assert plan.moment_bytes == 4 * plan.rank_parameters
    assert plan.copy_bytes == 0


def test_memory_of_a_rank_by_engine() -> None:
    """Eight ranks, ep = 2, so four copies of the experts; dense parameters on all."""
    count = parameters(TINY)
    held, shard = count.dense + count.experts // 2, count.dense // 8 + count.experts // 8

    def plan(dtype: str = "float32", **parallel: Any) -> tuple[int, ...]:
        train = replace(TINY.train, dtype=dtype)  # type: ignore[arg-type]
        made = make_plan(replace(TINY, train=train, parallel=ParallelConfig(ep=2, **parallel)), 8)
        assert made.rank_parameters == held
        return made.weight_bytes, made.gradient_bytes, made.moment_bytes, made.copy_bytes

    layer, root = (held - 2 * 96 * 64 - 64) // 2, 2 * 96 * 64 + 64
    assert plan() == (4 * held, 4 * held, 8 * held, 0)
    assert plan(fsdp=True) == (4 * shard, 4 * shard, 8 * shard, 4 * (root + 2 * layer))
    assert plan("bfloat16", fsdp=True, reshard_after_forward=False)[3] == 4 * root + 2 * 2 * layer
    assert plan(engine="deepspeed", zero_stage=1) == (4 * held, 4 * held, 8 * shard, 4 * shard)
    assert plan("bfloat16", engine="deepspeed") == (2 * held, 4 * shard, 8 * shard, 4 * shard)


def test_each_half_of_a_micro_batch_has_its_copies_of_the_weights() -> None:
    def copies(overlap: Literal["off", "auto", "on"]) -> int:
        train = replace(TINY.train, dtype="bfloat16", micro_batch=2, tokens_per_step=4 * TINY.data.seq_len)
        return make_plan(replace(TINY, train=train, parallel=ParallelConfig(ep=2, overlap=overlap)), 2).copy_bytes

    assert copies("on") == 2 * copies("off") == 2 * copies("auto") > 0


def kept_bytes(config: Config, mesh: Mesh | None = None) -> int:
    """Bytes of the distinct storages that autograd keeps for one micro-batch, weights excluded."""
    model = Decoder(config, mesh)
    model.initialize(0)
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.randint(config.model.vocab_size, (config.train.micro_batch, config.data.seq_len))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, stats = model(tokens)
        losses = [model.cross_entropy(hidden, tokens), *(s.balance_loss for s in stats), *(s.z_loss for s in stats)]
    assert losses
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "change",
    [
        {"expert_dim": 96},
        {"ffn_dim": 160, "first_dense_layers": 1},
        {"shared_dim": 40},
        {"n_heads": 8},
        {"n_layers": 4},
        {"dim": 128, "head_dim": 16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_activations_grow_as_autograd_keeps_them(change: dict[str, Any]) -> None:
    """The estimate counts the norms of a GPU; on a CPU the first one, which has nothing to add, keeps one row more."""
    base = with_model(TINY, first_dense_layers=change.get("first_dense_layers", 0), head_dim=16)
    grown = with_model(base, **change)

    def estimate(config: Config) -> int:
        return activation_bytes(config) + config.model.dim * 4 * config.data.seq_len

    measured = kept_bytes(grown) - kept_bytes(base)
    assert estimate(grown) - estimate(base) == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("change", [{"expert_dim": 96}, {"ffn_dim": 160}, {"n_layers": 4}, {"vocab_size": 192}])
def test_activations_of_a_tensor_parallel_rank(change: dict[str, Any]) -> None:
    def estimate(config: Config) -> int:
        # As above. What is gathered is kept once, and beside it the two copies that a norm on a CPU makes of a shard.
        return activation_bytes(config) + config.model.dim * 4 * config.data.seq_len // 2

    def measure(config: Config) -> int:
        return kept_bytes(config, create_mesh(tp=2, device="cpu"))

    base = replace(with_model(TINY, first_dense_layers=1, head_dim=16), parallel=ParallelConfig(tp=2))
    grown = with_model(base, **change)
    measured = MockWorld(2).run(measure, grown)[0] - MockWorld(2).run(measure, base)[0]
    assert estimate(grown) - estimate(base) == pytest.approx(measured, rel=0.05)


def test_activation_checkpointing() -> None:
    def plan(mode: Any, every: int = 1, layers: int = 8, ep: int = 1) -> int:
        checkpointing = ActivationCheckpointingConfig(mode=mode, every=every)
        config = replace(with_model(TINY, n_layers=layers), parallel=ParallelConfig(ep=ep))
        return activation_bytes(replace(config, train=replace(config.train, activation_checkpointing=checkpointing)))

    assert plan("full") < plan("selective") < plan("none")
    assert plan("full") < plan("full", every=2) < plan("none")
    # Of another layer remains its input, D float32 for each of the 128 tokens …
    assert plan("full", layers=9) - plan("full") == 4 * 64 * 128
    # … and in selective mode also the input of the feed-forward part, before and after its norm, and the router's 3E …
    assert plan("selective", layers=9) - plan("selective") == 4 * (3 * 64 + 3 * 8) * 128
    # … and the two rows that arrive for each token, if the experts are elsewhere.
    assert plan("selective", layers=9, ep=2) - plan("selective", ep=2) == 4 * (5 * 64 + 3 * 8) * 128


def test_micro_batch_and_dtype_scale_activations() -> None:
    double = replace(TINY, train=replace(TINY.train, micro_batch=2))
    assert activation_bytes(double) == 2 * activation_bytes(TINY)
    half = replace(TINY, train=replace(TINY.train, dtype="bfloat16"))
    assert 0.5 < activation_bytes(half) / activation_bytes(TINY) < 0.65


def test_world_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"parallel\.ep = 4"):
        make_plan(replace(TINY, parallel=ParallelConfig(ep=4)), 6)


@pytest.mark.parametrize(
    ("config", "world_size", "expected"),
    [
        (replace(OLMOE, train=TrainConfig(tokens_per_step=2**20)), 1, ["6,919,161,856", "1.282 G", "Experts 0–63"]),
        (
            replace(OLMOE, parallel=ParallelConfig(ep=64), train=TrainConfig(tokens_per_step=2**20)),
            128,
            ["1/64 of the experts", "Expert 6 ", "ranks 6, 70", "and so on: 1 expert a rank"],
        ),
        (with_model(TINY, num_experts=0), 2, ["100.0% of all", "float32", "1,024"]),
        (
            replace(TINY, parallel=ParallelConfig(tp=2, ep=4)),
            8,
            ["tp = 2, ep = 4", "1/2 of tp's part, 1/4 of the experts", "Heads 2–3", "ranks 1, 3, 5, 7"],
        ),
        (replace(TINY, parallel=ParallelConfig(fsdp=True)), 2, ["2 ranks, tp = 1, ep = 1, FSDP", "gathered weights"]),
        (replace(TINY, parallel=ParallelConfig(engine="deepspeed")), 2, ["ZeRO-2", "shards of float32 weights"]),
    ],
    ids=["one rank", "many ranks", "dense", "tensor parallel", "FSDP", "DeepSpeed"],
)
def test_printed_plan(config: Config, world_size: int, expected: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command(config, world_size) == 0
    printed = capsys.readouterr().out
    for text in expected:
        assert text in printed


def test_plan_touches_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a plan must not start CUDA")

    monkeypatch.setattr(torch.cuda, "_lazy_init", refuse)
    monkeypatch.setattr(torch.cuda, "is_available", refuse)
    make_plan(TINY, 2)


def test_a_model_that_cannot_fit_is_refused_before_it_is_built() -> None:
    plan = make_plan(OLMOE, 1)
    state = plan.weight_bytes + plan.gradient_bytes + plan.moment_bytes
    check_memory(OLMOE, 1, state)
    with pytest.raises(UserError, match=r"moments take 103\.1 GiB, and its device has 24 GiB: use"):
        check_memory(OLMOE, 1, 24 * 2**30)
    check_memory(replace(OLMOE, parallel=ParallelConfig(ep=8)), 8, 24 * 2**30)
