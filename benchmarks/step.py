"""``moetrain bench step``: whole training steps of a config, on one GPU beside Hugging Face transformers' model.

Under torchrun all ranks run the step, and rank 0 measures.

The tokens are random: a step costs the same whatever they are, but for the balance of the experts, and a freshly
initialised router is nearly balanced on them.
"""

from __future__ import annotations

import gc
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType

from moetrain.benchmarks.random_tokens import on_random_tokens
from moetrain.benchmarks.report import Report, say, table
from moetrain.benchmarks.timing import Deadline, synchronize
from moetrain.config import Config, check_world, load_config
from moetrain.data import Loader, open_dataset
from moetrain.errors import ConfigError
from moetrain.flops import flops_per_token, peak_tflops
from moetrain.model import derive_seed
from moetrain.parallel import Mesh, any_rank, environment_world_size, on_all_ranks
from moetrain.plan import dispatch_bytes
from moetrain.ranks import joined_mesh
from moetrain.trainer import Trainer

GIB = 2**30
DEFAULTS = ("train.param_dtype=bfloat16", "train.activation_checkpointing.mode=none", "train.micro_batch=4")
"""Before the user's overrides; a step is one micro-batch unless train.tokens_per_step is overridden."""

PARTS = {
    "all-to-all": r"nccl\w*(SendRecv|AllToAll)",
    "other collectives": r"nccl|exchange_add_rmsnorm",
    "attention": r"flash|fmha|sdpa|attention",
    "expert products": r"(up_projection|linear|hidden_gradient|weight_gradient|contiguous)_kernel|group(?!_chosen)",
    "routing": r"topk|^_(rank|count|scan|turn|flip|count_chosen|group_chosen|cells_of_pairs|forward|backward)_kernel"
    r"|tile_schedule|sum_pairs|sort|radix|histogram|searchsorted|scan",
    "norms": r"rms_?norm|layer_?norm|GammaBeta|ComputeGradInput",
    "optimiser, gradient norm": r"adam|multi_tensor|foreach|lpnorm",
    "loss": r"softmax|logsumexp|nll|cross_entropy",
    "dense products": r"gemm|nvjet|cutlass|xmma|cublas",
    "gathers, copies": r"gather|scatter|index|memcpy|memset|copy|cat",
    "element-wise, reductions": r"elementwise|reduce",
}
"""Part → pattern of the names of its kernels; the first that matches counts."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    config: str
    overrides: Sequence[str] = ()
    peer: str | None = None
    peer_first: bool = False
    steps: int = 20
    warmup: int = 3
    budget_seconds: float | None = None
    json: str | None = None


Step = Callable[[], int]
"""Returns the bytes that this rank's MoE layers sent to others."""


def step_command(options: Options) -> int:
    """Run the benchmark; returns 0. Raises ConfigError for a bad config or a peer that has no such model."""
    config = benchmark_config(options.config, options.overrides)
    if options.peer is not None:
        _check_peer(config, environment_world_size())
    with joined_mesh(config) as mesh, on_random_tokens(config, mesh) as config:
        _bench(config, mesh, options)
    return 0


def benchmark_config(name: str, overrides: Sequence[str]) -> Config:
    """A config with the benchmarks' defaults, for as many ranks as there are; raises ConfigError if it does not fit."""
    world_size = environment_world_size()
    config = load_config(name, [*DEFAULTS, *overrides])
    if not any(override.startswith("train.tokens_per_step=") for override in overrides):
        share = config.train.micro_batch * config.data.seq_len
        tokens_per_step = share * (world_size // config.parallel.tp or 1)
        config = replace(config, train=replace(config.train, tokens_per_step=tokens_per_step))
    check_world(config, world_size)
    return config


def _bench(config: Config, mesh: Mesh, options: Options) -> None:
    deadline = Deadline(options.budget_seconds)
    report = Report("step", mesh.device, options.json if mesh.rank == 0 else None)
    report.contents |= {"data": "random tokens", "parallel": asdict(config.parallel), "world_size": mesh.world_size}
    say(
        f"{config.train.tokens_per_step:,} random tokens a step on {mesh.world_size} ranks, "
        f"{config.micro_batch(mesh.dp)} × {config.data.seq_len} at a time"
    )
    runs = {"moetrain": _moetrain}
    if options.peer is not None:
        runs["transformers"] = _transformers
    for name in reversed(runs) if options.peer_first else runs:
        if any_rank(deadline.passed, mesh):
            say(f"--budget-seconds is spent: {name} was not measured")
            break
        with runs[name](config, mesh) as step:
            row = {"name": name, **_measure(step, config, mesh, options, deadline)}
        del step  # holds the model
        gc.collect()
        if mesh.device.type == "cuda":
            torch.cuda.empty_cache()
            row["left_gib"] = torch.cuda.memory_allocated(mesh.device) / GIB
        report.add(row)
        _show(row)


@contextmanager
def _loader(config: Config, device: torch.device) -> Iterator[Loader]:
    """The batches that the trainer gets on one rank."""
    dataset = open_dataset(config.data)
    loader = Loader(
        split=dataset.train,
        seq_len=config.data.seq_len,
        micro_batch=config.micro_batch(1),
        accumulation=config.accumulation_steps(1),
        dp_rank=0,
        dp_size=1,
        seed=config.train.seed,
        end_of_document=dataset.end_of_document,
        mask_documents=config.data.mask_documents,
        prefetch=config.data.prefetch,
        pin=device.type == "cuda",
    )
    try:
        yield loader
    finally:
        loader.close()


@contextmanager
def _moetrain(config: Config, mesh: Mesh) -> Iterator[Step]:
    """A step of the trainer."""
    trainer = Trainer(config, mesh)
    backend = trainer.model.expert_backend if trainer.model.moe_layers else "none"
    say(f"moetrain: experts by {backend}, compile={config.train.compile}")
    loader = trainer._loader()

    def step() -> int:
        trainer._step(loader)
        return trainer.dispatch_bytes

    try:
        yield step
    finally:
        loader.close()
        trainer.checkpointer.close()
        if trainer.logger is not None:
            trainer.logger.close()


def _check_peer(config: Config, world_size: int) -> None:
    if world_size > 1:
        raise ConfigError("--peer transformers: runs on one rank; start it without torchrun")
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise ConfigError("--peer transformers: it is not installed; install moetrain[hf]") from None
    model = config.model
    others = model.shared_dim or model.qkv_bias or model.out_bias or model.rope_scaling
    olmoe = model.qk_norm == "full" and model.activation == "swiglu" and not others
    if not olmoe or not all(map(model.is_moe_layer, range(model.n_layers))) or config.router.score != "softmax":
        raise ConfigError("--peer transformers: compares OLMoE only; this config describes another architecture")


@contextmanager
def _transformers(config: Config, mesh: Mesh) -> Iterator[Step]:
    """transformers' OLMoE of the same shape in bfloat16, torch's fused AdamW, the same tokens and clipping."""
    from transformers import AutoModelForCausalLM, OlmoeConfig

    model, optim, device = config.model, config.optim, mesh.device
    settings: dict[str, Any] = {"experts_implementation": "grouped_mm", "attn_implementation": "sdpa"}
    description = OlmoeConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.dim,
        intermediate_size=model.expert_dim,
        num_hidden_layers=model.n_layers,
        num_attention_heads=model.n_heads,
        num_key_value_heads=model.kv_heads,
        num_experts=model.num_experts,
        num_experts_per_tok=config.router.top_k,
        norm_topk_prob=config.router.normalize,
        rms_norm_eps=model.norm_eps,
        max_position_embeddings=config.data.seq_len,
        tie_word_embeddings=model.tie_embeddings,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    torch.manual_seed(derive_seed(config.train.seed) % 2**32)
    with torch.device(device):
        network = AutoModelForCausalLM.from_config(description, dtype=torch.bfloat16)
    network.train()
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=optim.lr, betas=optim.betas, eps=optim.eps, weight_decay=optim.weight_decay, fused=True
    )
    accumulation = config.accumulation_steps(1)
    say(f"transformers: experts by {description._experts_implementation}, no auxiliary loss")

    with _loader(config, device) as loader:

        def step() -> int:
            for _ in range(accumulation):
                tokens_BS = next(loader).to(device).tokens_BS
                (network(input_ids=tokens_BS, labels=tokens_BS).loss / accumulation).backward()
            if optim.clip_norm > 0:
                nn.utils.clip_grad_norm_(network.parameters(), optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            return 0

        yield step


# ---------------------------------------------------------------------------------------------------------------------
# Measuring


def _measure(step: Step, config: Config, mesh: Mesh, options: Options, deadline: Deadline) -> dict[str, Any]:
    device = mesh.device
    start = time.perf_counter()
    sent = step()
    synchronize(device)
    first_step = time.perf_counter() - start
    for _ in range(options.warmup - 1):
        sent = step()
    synchronize(device)
    row: dict[str, Any] = {"first_step_s": first_step}
    if mesh.ep > 1:
        row["dispatch_bytes"] = sum(on_all_ranks(lambda: sent, mesh.host_group))
        row["dispatch_bytes_predicted"] = dispatch_bytes(config)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = _step_seconds(step, options.steps, mesh, deadline)
    tokens = config.train.tokens_per_step
    rate = tokens / statistics.median(seconds)
    row |= {
        "steps": len(seconds),
        "tokens_per_step": tokens,
        "step_ms": statistics.median(seconds) * 1e3,
        "step_ms_range": [min(seconds) * 1e3, max(seconds) * 1e3],
        "tokens_per_s": rate,
    }
    if device.type != "cuda":
        return row
    peak = config.metrics.peak_tflops or peak_tflops(torch.cuda.get_device_name(device))
    row |= {
        "peak_allocated_gib": torch.cuda.max_memory_allocated(device) / GIB,
        "peak_reserved_gib": torch.cuda.max_memory_reserved(device) / GIB,
        "mfu": None if peak is None else rate / mesh.world_size * flops_per_token(config).total / (peak * 1e12),
    }
    if not any_rank(deadline.passed, mesh):
        row |= _profile(step, device)
    return row


def _step_seconds(step: Step, steps: int, mesh: Mesh, deadline: Deadline) -> list[float]:
    """Seconds of each step, without waiting between them; a passed deadline ends early, after three."""
    device = mesh.device
    if device.type != "cuda":
        times = [time.perf_counter()]
        while len(times) <= steps and not (len(times) > 3 and any_rank(deadline.passed, mesh)):
            step()
            times.append(time.perf_counter())
        return [end - start for start, end in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True)]
    events[0].record()
    while len(events) <= steps and not (len(events) > 3 and any_rank(deadline.passed, mesh)):
        step()
        events.append(torch.cuda.Event(enable_timing=True))
        events[-1].record()
    torch.cuda.synchronize(device)
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]


def _profile(step: Step, device: torch.device, steps: int = 2) -> dict[str, Any]:
    """Milliseconds of a step's kernels by part, and the kernels that take longest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(steps):
            step()
        torch.cuda.synchronize(device)
    kernels: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        if event.device_type == DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            total, count = kernels.get(event.key, (0.0, 0))
            kernels[event.key] = (total + event.self_device_time_total / 1e3 / steps, count + event.count // steps)
    parts = dict.fromkeys([*PARTS, "other"], 0.0)
    for name, (milliseconds, _) in kernels.items():
        parts[part_of(name)] += milliseconds
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:30]
    return {
        "parts_ms": parts,
        "kernels": [{"name": name[:120], "part": part_of(name), "ms": ms, "count": n} for name, (ms, n) in longest],
    }


def part_of(kernel: str) -> str:
    """The part of the step that a kernel of this name belongs to."""
    for part, pattern in PARTS.items():
        if re.search(pattern, kernel, re.IGNORECASE):
            return part
    return "other"


def _show(row: dict[str, Any]) -> None:
    memory = f", peak memory {row['peak_allocated_gib']:.1f} GiB" if "peak_allocated_gib" in row else ""
    mfu = f", MFU {row['mfu']:.1%}" if row.get("mfu") is not None else ""
    say(
        f"{row['name']}: {row['tokens_per_s']:,.0f} tokens/s, {row['step_ms']:.1f} ms a step (median of "
        f"{row['steps']}){mfu}{memory}; first step {row['first_step_s']:.1f} s"
    )
    if "dispatch_bytes" in row:
        measured, predicted = row["dispatch_bytes"], row["dispatch_bytes_predicted"]
        say(f"dispatched {measured:,} bytes a step, {measured / predicted:.3f} of the {predicted:,.0f} of even routing")
    if "parts_ms" in row:
        total = sum(row["parts_ms"].values())
        table(
            ("kernels of", "ms", "%"),
            [(part, ms, 100 * ms / total) for part, ms in [*row["parts_ms"].items(), ("sum", total)] if ms],
        )
        table(("longest", "ms", "times"), [(k["name"][:80], k["ms"], k["count"]) for k in row["kernels"][:15]])
