"""The configuration of an experiment: typed sections, read from YAML, checked before anything runs.

A key in a YAML file is the path of a field below: ``train.steps`` is :attr:`TrainConfig.steps`. Unknown keys, wrong
types and impossible values raise :class:`~moetrain.errors.ConfigError` with one line that names the key, the value
and the rule.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from moetrain.errors import ConfigError, PlacementError
from moetrain.placement.sums import parse_sum
from moetrain.yaml_files import read_yaml


@dataclass(frozen=True)
class RunConfig:
    """Where a run lives and on what it runs."""

    dir: str = "runs/default"
    """Run folder: config.yaml, metrics.jsonl, checkpoints/, loss.png."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: one GPU for each process where there are GPUs, the CPU elsewhere."""
    timeout_minutes: float = 10.0
    """A rank for which the others wait longer ends the run, with an error that names it."""


@dataclass(frozen=True)
class RopeScalingConfig:
    """Rotary frequencies for longer texts than a model was first trained on, as Llama 3.1 has them: wave lengths beyond
    original_length / low_freq_factor are stretched by factor, those below original_length / high_freq_factor are left,
    and those between are mixed."""

    factor: float = 8.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_length: int = 8192
    """Tokens of a sequence before."""


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the decoder. Wide enough for Mixtral, OLMoE, Qwen2-MoE and Qwen3-MoE."""

    vocab_size: int = 320
    dim: int = 256
    """D, the width of the residual stream."""
    n_layers: int = 4
    n_heads: int = 4
    n_kv_heads: int | None = None
    """Grouped-query attention: heads of keys and values; default n_heads."""
    head_dim: int | None = None
    """Width of a head; default dim / n_heads."""
    ffn_dim: int = 1024
    """Width of the dense feed-forward layers."""
    num_experts: int = 8
    """E, experts in an MoE layer; 0 makes a dense model."""
    expert_dim: int = 256
    """I, width of an expert."""
    first_dense_layers: int = 0
    """The first k layers have a dense feed-forward network."""
    moe_every: int = 1
    """Of the others, every n-th layer is an MoE layer: those whose (1-based) number is a multiple of n."""
    dense_layers: list[int] = field(default_factory=list)
    """And of those the layers with these (0-based) indices are dense none the less."""
    shared_dim: int = 0
    """Width of the shared expert that sees every token; 0: none."""
    shared_gate: bool = False
    """Scale the shared expert's output by sigmoid(x·w) (Qwen2-MoE)."""
    activation: Literal["swiglu", "geglu", "reglu"] = "swiglu"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScalingConfig | None = None
    """null: positions as rope_theta has them."""
    norm_eps: float = 1e-5
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMSNorm on queries and keys: over each head (Qwen3) or over all heads at once (OLMoE)."""
    qkv_bias: bool = False
    out_bias: bool = False
    """A bias on attention's output."""
    tie_embeddings: bool = False
    init_std: float = 0.02

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_width(self) -> int:
        return self.dim // self.n_heads if self.head_dim is None else self.head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether the layer with this 0-based index has experts."""
        in_turn = layer >= self.first_dense_layers and (layer + 1) % self.moe_every == 0
        return self.num_experts > 0 and in_turn and layer not in self.dense_layers


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts."""

    top_k: int = 2
    score: Literal["softmax", "softmax_after_topk", "sigmoid"] = "softmax"
    """softmax over all experts before the choice, over the chosen ones after it (Mixtral), or sigmoid (DeepSeek-V3)."""
    normalize: bool = False
    """Divide the chosen weights by their sum."""
    scale: float = 1.0
    """Factor on the weights (DeepSeek's routed_scaling_factor)."""
    groups: int = 1
    """Group-limited choice: experts form this many groups of neighbours …"""
    top_groups: int = 1
    """… of which a token may use the best so many."""
    balance_weight: float = 0.01
    """Weight of the load-balance loss; 0: off."""
    balance_scope: Literal["sequence", "rank", "global"] = "global"
    """Tokens over which balance is asked for: each sequence, a rank's tokens of a micro-batch, or the global batch: of
    all ranks and, of a step's micro-batches, those so far (arXiv 2501.11873), so that with gradient accumulation the
    loss depends on train.micro_batch."""
    z_weight: float = 0.001
    """Weight of the router z-loss; 0: off."""
    bias_update_rate: float = 0.0
    """Auxiliary-loss-free balancing (DeepSeek-V3): step of the selection bias after each optimiser step; 0: off."""
    capacity_factor: float | None = None
    """An expert takes at most factor · T · K / E of a rank's T tokens of a micro-batch; null: dropless."""
    drop_policy: Literal["weight", "position"] = "weight"
    """Whom a full expert refuses: the pairs of lowest weight, or the last ones in the batch."""
    rounding: Literal["none", "nearest", "up", "down", "balanced"] = "none"
    """Training only: round each expert's tokens, of a rank's of a micro-batch, to a multiple of the kernel's tile, so
    that no row of it is padding (SonicMoE, docs/routing.md): to the nearest multiple, up, down, or so that the sum of
    all changes stays below half a tile. A token may gain or lose experts."""
    jitter: float = 0.0
    """Training only: multiply the router's input by uniform noise in [1 − jitter, 1 + jitter]."""
    force_balance: bool = False
    """Debugging and benchmarks: ignore the scores' order and spread the tokens evenly."""


@dataclass(frozen=True)
class DataConfig:
    """What the model reads."""

    path: str = "stdlib"
    """`stdlib` (the sources of the running Python's standard library) or a folder made by `moetrain data build`."""
    cache_dir: str = "~/.cache/moetrain"
    """Where `stdlib` is built at first use."""
    seq_len: int = 512
    """Tokens in a packed sequence."""
    mask_documents: bool = False
    """A token attends only to its own document."""
    prefetch: int = 2
    """Micro-batches prepared ahead by a background thread."""


@dataclass(frozen=True)
class ActivationCheckpointingConfig:
    """Activations to recompute in the backward pass instead of keeping them."""

    mode: Literal["none", "full", "selective"] = "none"
    """full: whole layers; selective: attention and the experts, each from its own input, so that neither routing nor
    a collective runs twice, but for the gathering of tokens before attention with parallel.tp."""
    every: int = 1
    """Only every n-th layer."""


@dataclass(frozen=True)
class ProfileConfig:
    """A torch.profiler trace of a few steps, written to the run folder."""

    start: int = 10
    """First step (1-based) that is recorded."""
    steps: int = 0
    """Steps to record; 0: no trace."""


@dataclass(frozen=True)
class TrainConfig:
    """The loop."""

    steps: int = 1000
    seed: int = 0
    tokens_per_step: int = 16_384
    """Tokens of the global batch: all ranks, all accumulation steps. Independent of the number of GPUs."""
    micro_batch: int = 1
    """Sequences of one forward pass on one rank, or on the parallel.tp ranks that split them (fewer where their share
    of a step is smaller); the rest of the share is gradient accumulation."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the layers: auto is bfloat16 on a GPU and float32 on a CPU. Norm statistics, router and loss are
    always float32."""
    param_dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Weights, gradients and Adam moments. float64 is for comparisons: topologies then agree to 1e-10."""
    compile: bool = False
    """torch.compile the dense parts of every layer, and the loss."""
    max_bad_steps: int = 5
    """A step with a NaN or Inf gradient is skipped; so many in a row stop the run."""
    activation_checkpointing: ActivationCheckpointingConfig = field(default_factory=ActivationCheckpointingConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)


@dataclass(frozen=True)
class OptimConfig:
    """AdamW and its learning-rate schedule."""

    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: list[str] = field(default_factory=lambda: ["norm", "bias", "router"])
    """Parameters whose name contains one of these are not decayed."""
    clip_norm: float = 1.0
    """Largest global gradient norm, over dense and expert parameters alike; 0: no clipping."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: cosine or straight to the floor, or stable and then a linear decay (WSD)."""
    warmup_steps: int = 100
    decay_steps: int = 0
    """wsd: length of the final decay."""
    min_lr_ratio: float = 0.1
    """The floor, as a fraction of lr."""


@dataclass(frozen=True)
class ParallelConfig:
    """How ranks share the work: world = dp × tp, and experts spread over ep consecutive ranks."""

    dp: int | None = None
    """Shares of the batch; default world / tp."""
    tp: int = 1
    """Consecutive ranks that work on one share of the batch: each has 1/tp of the heads, of the dense feed-forward
    layers, of the vocabulary, and of the tokens where they are worked on one by one."""
    ep: int = 1
    wire: Literal["compute", "bfloat16", "float8"] = "compute"
    """How rows travel to experts of other ranks: as they are, rounded to bfloat16, or as E4M3 with a scale for each 128
    columns (then the experts' sums return in bfloat16)."""
    overlap: Literal["off", "auto", "on"] = "auto"
    """In training: split a micro-batch's sequences into two halves, of which one communicates (for tp and ep) while the
    other computes (docs/overlap.md). on: wherever tp or ep is more than 1; capacity limits and token rounding then
    count the tokens of a half. auto: where it pays by the measurement of this machine (`moetrain tune overlap`), and
    changes no result beyond rounding. YAML's true and false are on and off."""
    overlap_split: int | None = None
    """Sequences of each tp rank in the first half; default: what auto finds best, half of them without a
    measurement."""
    engine: Literal["torch", "deepspeed"] = "torch"
    """Who reduces gradients and updates weights: torch, or DeepSpeed's ZeRO (docs/parallelism.md, "Engines")."""
    fsdp: bool = False
    """torch: weights, gradients and Adam moments in shards, dense ones over dp and experts over their world / ep
    copies (FSDP2); else each rank keeps all that it computes with."""
    reshard_after_forward: bool = True
    """fsdp: free a layer's gathered weights after its forward pass and gather them again for the backward pass."""
    zero_stage: int = 2
    """deepspeed: shard Adam's moments and float32 weights (1), or gradients too (2)."""
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """deepspeed: further keys of its JSON config; those that follow from other keys here are refused."""

    @property
    def weaves(self) -> bool:
        """Whether layers in training see the halves of a micro-batch, in turn; of auto, which a trainer decides, no."""
        return self.overlap == "on" and self.communicates

    @property
    def communicates(self) -> bool:
        """Whether there is communication within layers."""
        return self.tp > 1 or self.ep > 1


@dataclass(frozen=True)
class KernelsConfig:
    """Which implementation computes."""

    experts: Literal["auto", "hopper", "triton", "torch", "reference"] = "auto"
    """hopper: warp-specialised kernels for H100 and H200; triton: portable kernels, from Ampere on; torch: grouped
    matrix products; reference: a loop over the experts. auto: the first of these that this machine, dtype and width
    allow."""
    allreduce_rmsnorm: Literal["auto", "collectives"] = "collectives"
    """The sums over tp ranks with the residual add and the norm after them. auto: one kernel over peer memory where the
    GPUs of a tp group reach one another, else collectives and a kernel for a rank's own rows. It is not the default
    because the one kernel, tested by itself on two GPUs, has not been seen in training there yet."""
    autotune: bool = False
    """On a GPU: time a few configurations of each kernel when a shape first occurs (numbers of rows by powers of two),
    and keep the fastest in ~/.cache/moetrain/autotune.json ($XDG_CACHE_HOME). Configurations may add in another order,
    so a run repeats bit for bit only with the same file."""


@dataclass(frozen=True)
class TraceConfig:
    """A sample of which experts tokens go to, for `moetrain trace` and `moetrain place`."""

    every: int = 0
    """Steps between two recordings; 0: off."""
    tokens: int = 1024
    """Tokens that each rank samples from its first micro-batch of such a step (at most: all, with overlap half)."""
    dir: str | None = None
    """Folder of the recordings; default <run.dir>/trace."""


@dataclass(frozen=True)
class RebalanceConfig:
    """Looking for a better placement while the run goes on, and moving the experts to it."""

    every: int = 0
    """Steps between two searches; 0: off. With parallel.ep = 1 there is nothing to move."""
    objective: str = "load"
    """load: pairs on each layer's fullest rank, for which a step waits, by all loads since the last search; traffic:
    rows that dispatch sends; or a sum like load+0.1*traffic, both then by what placement.trace has recorded since."""
    min_gain: float = 0.05
    """Move only if the objective falls by this fraction."""
    topology: str | None = None
    """File with the links between the parallel.ep GPUs, or `detect`, as for `moetrain place --topology`; default: one
    node with NVLink. It weighs traffic and predicts how long a move takes."""


@dataclass(frozen=True)
class PlacementConfig:
    """Where the experts live."""

    file: str | None = None
    """A placement.json of `moetrain place` for parallel.ep GPUs; default: each ep rank has consecutive experts."""
    rebalance: RebalanceConfig = field(default_factory=RebalanceConfig)
    trace: TraceConfig = field(default_factory=TraceConfig)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save, what to keep and where to start."""

    every: int = 500
    """Steps between checkpoints; 0: only at the end. The last step is always saved."""
    keep_last: int = 2
    keep_every: int = 0
    """Steps divisible by this are never deleted; 0: none."""
    resume: str = "auto"
    """auto: from the newest checkpoint of the run folder, if any; never: the run folder must be new; or the path of a
    checkpoint."""
    init_from: str | None = None
    """A run, a checkpoints folder or a checkpoint, as of `moetrain hf import`, with whose weights a run begins that has
    no checkpoint to resume from. They are cast to train.param_dtype; steps, data and optimiser begin anew."""
    asynchronous: bool = True
    """Copy to host memory while the next step computes, and write from there in the background; else the run waits."""
    host_memory_gib: float | None = None
    """Host memory of each rank for what is copied and not yet written. When it is full, updates wait for the disk.
    Default: as much as two checkpoints take, but of all ranks of a machine no more than half of what it has free."""
    local_dir: str | None = None
    """Folder on each machine's own disk or in its memory (/dev/shm/x), to which ranks write first where the run folder
    is slow; from there checkpoints are brought to the run folder, of those that come faster than it takes them only
    the newest."""

    @property
    def host_memory_bytes(self) -> int | None:
        return None if self.host_memory_gib is None else int(self.host_memory_gib * 2**30)


@dataclass(frozen=True)
class EvalConfig:
    """The held-out score."""

    every: int = 500
    """Steps between evaluations; 0: only at the end."""
    tokens: int = 262_144
    """Held-out tokens read each time (at most; rounded down to whole sequences)."""


@dataclass(frozen=True)
class MetricsConfig:
    """What is reported, and where."""

    every: int = 10
    """Steps between two reports."""
    console: Literal["auto", "rich", "plain", "none"] = "auto"
    """auto: rich on a terminal, plain lines elsewhere."""
    tensorboard: bool = False
    wandb_project: str | None = None
    communication_every: int = 0
    """Steps between two whose kernels are recorded on all ranks, for time_metrics/communication(s) and
    time_metrics/exposed_communication(s): seconds of a step, all and those in which nothing else ran (docs/overlap.md);
    0: off. On a CPU there are no kernels, and no such metrics."""
    peak_tflops: float | None = None
    """Dense peak of one device that MFU divides by; default: the datasheet's, N/A on unknown hardware."""


@dataclass(frozen=True)
class Config:
    """One experiment."""

    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    @property
    def trace_folder(self) -> Path:
        """Where recordings of the routing are written."""
        folder = self.placement.trace.dir
        return Path(self.run.dir) / "trace" if folder is None else Path(folder)

    def micro_batch(self, dp: int) -> int:
        """Sequences of one forward pass on one of `dp` data-parallel ranks."""
        return min(self.train.micro_batch, self.train.tokens_per_step // (self.data.seq_len * dp))

    def accumulation_steps(self, dp: int) -> int:
        """Micro-batches of one rank in one step."""
        return self.train.tokens_per_step // (self.data.seq_len * dp * self.micro_batch(dp))


def packaged_configs() -> dict[str, Path]:
    """Name → file of the configs that come with moetrain."""
    folder = Path(str(resources.files("moetrain") / "launch" / "configs"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """The file that CONFIG on the command line means: a path, or the name of a packaged config."""
    path = Path(name)
    if path.is_file():
        return path
    packaged = packaged_configs()
    if name in packaged:
        return packaged[name]
    raise ConfigError(f"config {name!r}: no such file, and no packaged config (there are: {', '.join(packaged)})")


def load_config(name: str, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML file (or a packaged config by name) and apply `key=value` overrides.

    Checks keys, types and every rule that needs no knowledge of the machine; :func:`check_world` checks the rest.
    Without a `run.dir` the run folder is ``runs/<name of the file>``.
    """
    file = find_config(name)
    parsed = read_yaml(file, ConfigError)
    if parsed is None:
        parsed = {}
    if not isinstance(parsed, dict):
        raise ConfigError(f"{file}: expected sections (model:, train:, …), found a {type(parsed).__name__}")
    defaults = {"run": {"dir": f"runs/{file.stem}"}}
    return _resolve(_merge(OmegaConf.merge(OmegaConf.structured(Config), defaults), parsed, str(file)), overrides)


def from_dict(values: dict[str, Any], overrides: Sequence[str] = (), *, where: str = "config") -> Config:
    """A config from nested dictionaries (as a checkpoint's manifest holds one), checked like :func:`load_config`."""
    return _resolve(_merge(OmegaConf.structured(Config), values, where), overrides)


def _resolve(merged: Any, overrides: Sequence[str]) -> Config:
    for override in overrides:
        key, equals, _ = override.partition("=")
        if not equals or not key:
            raise ConfigError(f"override {override!r}: expected key=value, as in train.steps=100")
        try:
            dotlist = OmegaConf.from_dotlist([override])
        except (OmegaConfBaseException, yaml.YAMLError) as error:
            raise ConfigError(f"override {override!r}: {_first_line(error)}") from None
        merged = _merge(merged, dotlist, f"override {override!r}")
    try:
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{_key(error)}{_first_line(error)}") from None
    assert isinstance(config, Config)
    check(config)
    return config


def _merge(base: Any, update: Any, where: str) -> Any:
    try:
        update = _without_booleans(OmegaConf.create(update))
        missing = OmegaConf.missing_keys(update)
        merged = OmegaConf.merge(base, update)
    except ConfigKeyError as error:
        known = getattr(error.parent_node, "_content", None)
        choices = f" (there are: {', '.join(map(str, known))})" if isinstance(known, dict) else ""
        raise ConfigError(f"{where}: {error.full_key}: unknown key{choices}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{where}: {_key(error) or _failing_key(base, update)}{_first_line(error)}") from None
    except RecursionError:
        raise ConfigError(f"{where}: contains itself") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {_first_line(error)}") from None
    if missing:
        raise ConfigError(f"{where}: {min(missing)}: has no value")
    return merged


def _without_booleans(update: Any) -> Any:
    """With parallel.overlap as text: YAML reads a bare on or off as true or false."""
    section = update.get("parallel") if isinstance(update, DictConfig) else None
    if isinstance(section, DictConfig) and isinstance(value := section.get("overlap"), bool):
        section.overlap = "on" if value else "off"
    return update


def _key(error: OmegaConfBaseException) -> str:
    key = getattr(error, "full_key", None)
    return f"{key}: " if key else ""


def _failing_key(base: Any, update: Any, path: tuple[str, ...] = ()) -> str:
    """The first value of `update` that does not merge by itself, for the errors in which OmegaConf names no key."""
    if isinstance(update, DictConfig):
        update = OmegaConf.to_container(update)
    if isinstance(update, dict):
        return next(filter(None, (_failing_key(base, value, (*path, str(key))) for key, value in update.items())), "")
    nested = update
    for key in reversed(path):
        nested = {key: nested}
    try:
        OmegaConf.merge(base, nested)
    except OmegaConfBaseException:
        return f"{'.'.join(path)}: "
    return ""


def _first_line(error: BaseException) -> str:
    # OmegaConf leaves its placeholders in the message about an element of a tuple.
    message = str(error).replace(" '$VALUE' of type '$VALUE_TYPE'", "")
    return message.splitlines()[0] if message else type(error).__name__


def _require(condition: bool, key: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{key} = {value}: {rule}")


def check(config: Config) -> None:
    """Every rule between the values of a config that holds on any machine; raises ConfigError at the first broken."""
    model, router, data, train = config.model, config.router, config.data, config.train
    optim, parallel = config.optim, config.parallel

    for key, value in {
        "model.vocab_size": model.vocab_size,
        "model.dim": model.dim,
        "model.n_layers": model.n_layers,
        "model.n_heads": model.n_heads,
        "model.n_kv_heads": model.kv_heads,
        "model.ffn_dim": model.ffn_dim,
        "model.moe_every": model.moe_every,
        "model.expert_dim": model.expert_dim,
        "model.rope_theta": model.rope_theta,
        "model.norm_eps": model.norm_eps,
        "model.init_std": model.init_std,
        "router.top_k": router.top_k,
        "router.groups": router.groups,
        "router.top_groups": router.top_groups,
        "router.scale": router.scale,
        "data.seq_len": data.seq_len,
        "data.prefetch": data.prefetch,
        "train.steps": train.steps,
        "train.tokens_per_step": train.tokens_per_step,
        "train.micro_batch": train.micro_batch,
        "train.max_bad_steps": train.max_bad_steps,
        "train.activation_checkpointing.every": train.activation_checkpointing.every,
        "train.profile.start": train.profile.start,
        "optim.lr": optim.lr,
        "optim.eps": optim.eps,
        "parallel.tp": parallel.tp,
        "parallel.ep": parallel.ep,
        "placement.trace.tokens": config.placement.trace.tokens,
        "checkpoint.keep_last": config.checkpoint.keep_last,
        "metrics.every": config.metrics.every,
        "run.timeout_minutes": config.run.timeout_minutes,
    }.items():
        _require(0 < value < math.inf, key, value, "must be positive and finite")
    for key, value in {
        "model.num_experts": model.num_experts,
        "model.first_dense_layers": model.first_dense_layers,
        "model.shared_dim": model.shared_dim,
        "router.balance_weight": router.balance_weight,
        "router.z_weight": router.z_weight,
        "router.bias_update_rate": router.bias_update_rate,
        "train.seed": train.seed,
        "train.profile.steps": train.profile.steps,
        "optim.weight_decay": optim.weight_decay,
        "optim.clip_norm": optim.clip_norm,
        "optim.warmup_steps": optim.warmup_steps,
        "optim.decay_steps": optim.decay_steps,
        "placement.trace.every": config.placement.trace.every,
        "placement.rebalance.every": config.placement.rebalance.every,
        "checkpoint.every": config.checkpoint.every,
        "checkpoint.keep_every": config.checkpoint.keep_every,
        "eval.every": config.eval.every,
        "metrics.communication_every": config.metrics.communication_every,
    }.items():
        _require(0 <= value < math.inf, key, value, "must not be negative or infinite")

    for layer in model.dense_layers:
        _require(
            0 <= layer < model.n_layers,
            "model.dense_layers",
            layer,
            f"is no layer: they are 0 to {model.n_layers - 1}",
        )
    if model.rope_scaling is not None:
        scaling = model.rope_scaling
        for key, value in asdict(scaling).items():
            _require(0 < value < math.inf, f"model.rope_scaling.{key}", value, "must be positive and finite")
        _require(
            scaling.low_freq_factor < scaling.high_freq_factor,
            "model.rope_scaling.low_freq_factor",
            scaling.low_freq_factor,
            f"must be smaller than model.rope_scaling.high_freq_factor = {scaling.high_freq_factor}",
        )
    if model.head_dim is None:
        _require(
            model.dim % model.n_heads == 0,
            "model.n_heads",
            model.n_heads,
            f"must divide model.dim = {model.dim}, or set model.head_dim",
        )
    _require(
        model.head_width > 0 and model.head_width % 2 == 0,
        "model.head_dim",
        model.head_width,
        "must be positive and even",
    )
    _require(
        model.n_heads % model.kv_heads == 0,
        "model.n_kv_heads",
        model.kv_heads,
        f"must divide model.n_heads = {model.n_heads}",
    )
    _require(
        not model.shared_gate or model.shared_dim > 0,
        "model.shared_gate",
        model.shared_gate,
        "there is no shared expert to gate: set model.shared_dim",
    )

    if model.num_experts:
        experts = model.num_experts
        _require(
            router.top_k <= experts, "router.top_k", router.top_k, f"must be at most model.num_experts = {experts}"
        )
        _require(
            experts % router.groups == 0, "router.groups", router.groups, f"must divide model.num_experts = {experts}"
        )
        _require(
            router.top_groups <= router.groups,
            "router.top_groups",
            router.top_groups,
            f"must be at most router.groups = {router.groups}",
        )
        reachable = experts // router.groups * router.top_groups
        _require(
            router.top_k <= reachable,
            "router.top_k",
            router.top_k,
            f"router.top_groups = {router.top_groups} groups hold only {reachable} experts",
        )
        _require(
            not (router.score == "softmax_after_topk" and router.bias_update_rate > 0),
            "router.bias_update_rate",
            router.bias_update_rate,
            "the selection bias needs router.score softmax or sigmoid",
        )
        _require(
            any(model.is_moe_layer(layer) for layer in range(model.n_layers)),
            "model.num_experts",
            experts,
            "no layer is an MoE layer: see model.first_dense_layers, model.moe_every, model.dense_layers and "
            "model.n_layers",
        )
        _require(experts % parallel.ep == 0, "parallel.ep", parallel.ep, f"must divide model.num_experts = {experts}")
    else:
        _require(parallel.ep == 1, "parallel.ep", parallel.ep, "a dense model (model.num_experts = 0) has no experts")
    if router.capacity_factor is not None:
        _require(
            0 < router.capacity_factor < math.inf,
            "router.capacity_factor",
            router.capacity_factor,
            "must be positive and finite",
        )
        _require(
            router.rounding == "none",
            "router.rounding",
            router.rounding,
            "an expert is either limited by router.capacity_factor or rounded; set capacity_factor to null",
        )
    _require(0 <= router.jitter < 1, "router.jitter", router.jitter, "must be in [0, 1)")

    _require(train.seed < 2**63, "train.seed", train.seed, "must be below 2^63")
    _require(
        train.tokens_per_step % data.seq_len == 0,
        "train.tokens_per_step",
        train.tokens_per_step,
        f"must be a multiple of data.seq_len = {data.seq_len}",
    )
    _require(
        config.eval.tokens >= data.seq_len,
        "eval.tokens",
        config.eval.tokens,
        f"must hold at least one sequence of data.seq_len = {data.seq_len}",
    )
    for index, beta in enumerate(optim.betas):
        _require(0 <= beta < 1, f"optim.betas[{index}]", beta, "must be in [0, 1)")
    _require(0 <= optim.min_lr_ratio <= 1, "optim.min_lr_ratio", optim.min_lr_ratio, "must be in [0, 1]")
    if optim.schedule == "wsd":
        _require(
            optim.warmup_steps + optim.decay_steps <= train.steps,
            "optim.decay_steps",
            optim.decay_steps,
            f"warm-up and decay must fit into train.steps = {train.steps}",
        )
    else:
        _require(optim.decay_steps == 0, "optim.decay_steps", optim.decay_steps, "belongs to optim.schedule wsd only")
    _check_tensor_parallel(config)
    _check_engine(config)
    _check_overlap(config)
    _check_placement(config)
    if parallel.dp is not None:
        _require(parallel.dp > 0, "parallel.dp", parallel.dp, "must be positive")
    _require(
        config.metrics.communication_every == 0 or train.profile.steps == 0,
        "metrics.communication_every",
        config.metrics.communication_every,
        "records steps as train.profile.steps does, and there is one profiler; set one of them to 0",
    )
    if config.metrics.peak_tflops is not None:
        _require(config.metrics.peak_tflops > 0, "metrics.peak_tflops", config.metrics.peak_tflops, "must be positive")
    if (gib := config.checkpoint.host_memory_gib) is not None:
        _require(0 < gib < math.inf, "checkpoint.host_memory_gib", gib, "must be positive and finite")
    _require(
        config.run.timeout_minutes <= 10_080, "run.timeout_minutes", config.run.timeout_minutes, "is more than a week"
    )
    _require(
        config.checkpoint.init_from is None or config.checkpoint.resume in ("auto", "never"),
        "checkpoint.init_from",
        config.checkpoint.init_from,
        f"says how a run begins, but checkpoint.resume = {config.checkpoint.resume} goes on with another; set one of "
        "them",
    )
    _require(bool(config.run.dir), "run.dir", repr(config.run.dir), "must name a folder")


def _check_tensor_parallel(config: Config) -> None:
    """Everything that tp ranks split must divide evenly."""
    model, tp = config.model, config.parallel.tp
    split = {"model.n_heads": model.n_heads, "model.n_kv_heads": model.kv_heads, "data.seq_len": config.data.seq_len}
    if not all(model.is_moe_layer(layer) for layer in range(model.n_layers)):
        split["model.ffn_dim"] = model.ffn_dim
    largest = math.gcd(*split.values())
    fitting = ", ".join(str(size) for size in range(1, largest + 1) if largest % size == 0)
    for key, value in split.items():
        _require(value % tp == 0, "parallel.tp", tp, f"must divide {key} = {value}; here it can be {fitting}")
    _require(
        model.vocab_size % tp == 0,
        "model.vocab_size",
        model.vocab_size,
        f"must be a multiple of parallel.tp = {tp}: {-(-model.vocab_size // tp) * tp} is, with words that never occur",
    )


DEEPSPEED_DERIVED = {
    "train_batch_size": "train.tokens_per_step",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.tokens_per_step and train.micro_batch",
    "gradient_clipping": "optim.clip_norm",
    "gradient_allreduce_op": "the loss, whose gradients are summed",
    "zero_optimization.stage": "parallel.zero_stage",
    "bf16": "train.dtype",
    "fp16": "train.dtype",
    "optimizer": "optim",
    "scheduler": "optim.schedule",
}
"""Keys of DeepSpeed's config, and what of ours they follow from."""


def _check_engine(config: Config) -> None:
    parallel = config.parallel
    if parallel.engine != "deepspeed":
        _require(not parallel.deepspeed, "parallel.deepspeed", parallel.deepspeed, "needs parallel.engine = deepspeed")
        return
    _require(
        not parallel.fsdp, "parallel.fsdp", parallel.fsdp, "needs parallel.engine = torch; DeepSpeed has zero_stage"
    )
    stages = {
        0: "DeepSpeed without ZeRO takes wrong gradient norms of experts; use 1, 2 or parallel.engine = torch",
        3: "DeepSpeed refuses stage 3 with experts; use 2, or parallel.engine = torch with parallel.fsdp = true, which "
        "shards as much",
    }
    stage = parallel.zero_stage
    _require(stage in (1, 2), "parallel.zero_stage", stage, stages.get(stage, "must be 1 or 2"))
    _require(
        parallel.tp == 1,
        "parallel.tp",
        parallel.tp,
        "with parallel.engine = deepspeed must be 1: ZeRO would count what all tp ranks hold more than once; use "
        "parallel.engine = torch",
    )
    _require(
        config.train.param_dtype == "float32",
        "train.param_dtype",
        config.train.param_dtype,
        "DeepSpeed keeps weights and Adam's moments in float32; use float32 (train.dtype = bfloat16 rounds the weights "
        "that compute), or parallel.engine = torch",
    )
    check_zero_dtype(config, config.train.dtype)
    for path, source in DEEPSPEED_DERIVED.items():
        section: Any = parallel.deepspeed
        *parents, last = path.split(".")
        for parent in parents:
            section = section.get(parent, {})
            _require(isinstance(section, dict), f"parallel.deepspeed.{parent}", section, "must be a section of keys")
        if last in section:
            raise ConfigError(f"parallel.deepspeed.{path} = {section[last]}: follows from {source}; remove this key")


def _check_overlap(config: Config) -> None:
    parallel = config.parallel
    obstacle = overlap_obstacle(config)
    _require(parallel.overlap != "on" or obstacle is None, "parallel.overlap", "on", str(obstacle))
    split = parallel.overlap_split
    _require(split is None or split > 0, "parallel.overlap_split", split, "must be positive")


def overlap_obstacle(config: Config) -> str | None:
    """Why the two halves of a micro-batch cannot go through the layers in turn; None: they can."""
    reasons = {
        "parallel.fsdp": (config.parallel.fsdp, "FSDP would gather each layer's weights for each half by itself"),
        "parallel.engine": (
            config.parallel.engine == "deepspeed",
            "DeepSpeed collects gradients from one stream, and here they come from two",
        ),
        "train.activation_checkpointing.mode": (
            config.train.activation_checkpointing.mode == "full",
            "a layer that is computed again in one piece communicates again, beside nothing; use selective or none",
        ),
    }
    return next((f"not with this {key}: {why}" for key, (conflicts, why) in reasons.items() if conflicts), None)


def halves_obstacle(config: Config, dp: int) -> str | None:
    """Why a micro-batch of one of `dp` shares has no two halves; None: it has."""
    tp, sequences = config.parallel.tp, config.micro_batch(dp)
    if sequences % tp or sequences < 2 * tp:
        return (
            f"each tp rank needs two or more whole sequences of a micro-batch: with parallel.tp = {tp} "
            f"train.micro_batch can be {2 * tp}, {3 * tp}, …, not {sequences}"
        )
    split = config.parallel.overlap_split
    if split is not None and split >= sequences // tp:
        return f"parallel.overlap_split = {split} leaves nothing of each tp rank's {sequences // tp} sequences"
    return None


def _check_placement(config: Config) -> None:
    """What needs experts, and what a search while the run goes on needs."""
    placement, rebalance = config.placement, config.placement.rebalance
    if config.model.num_experts == 0:
        dense = "a dense model (model.num_experts = 0) has no"
        _require(
            placement.trace.every == 0, "placement.trace.every", placement.trace.every, f"{dense} routing to record"
        )
        _require(placement.file is None, "placement.file", placement.file, f"{dense} experts to place")
        _require(rebalance.every == 0, "placement.rebalance.every", rebalance.every, f"{dense} experts to move")
    _require(0 <= rebalance.min_gain < 1, "placement.rebalance.min_gain", rebalance.min_gain, "must be in [0, 1)")
    if rebalance.every == 0:
        return
    _require(
        config.parallel.engine == "torch",
        "placement.rebalance.every",
        rebalance.every,
        "with parallel.engine = deepspeed must be 0: ZeRO keeps moments and float32 weights in pieces that know no "
        "experts, so that these cannot move; use parallel.engine = torch, or placement.file, which is read at start",
    )
    try:
        parse_sum(rebalance.objective, ("load", "traffic"))
    except PlacementError as error:
        raise ConfigError(
            f"placement.rebalance.objective = {rebalance.objective}: {error}; others cost a training step nothing"
        ) from None
    _require(
        rebalance.objective == "load" or placement.trace.every > 0,
        "placement.rebalance.objective",
        rebalance.objective,
        "is judged by recorded tokens: set placement.trace.every, or use load",
    )


def check_zero_dtype(config: Config, dtype: str) -> None:
    """Whether DeepSpeed can train in this arithmetic; raises ConfigError."""
    _require(
        config.parallel.zero_stage != 1 or dtype != "bfloat16",
        "parallel.zero_stage",
        1,
        "DeepSpeed's stage 1 in bfloat16 has another optimiser, with other gradient norms; use 2, or train.dtype = "
        "float32",
    )


def check_world(config: Config, world_size: int) -> None:
    """The rules that depend on the number of ranks; raises ConfigError."""
    parallel = config.parallel
    _require(world_size % parallel.tp == 0, "parallel.tp", parallel.tp, f"must divide the world size of {world_size}")
    dp = world_size // parallel.tp
    _require(
        parallel.dp in (None, dp),
        "parallel.dp",
        parallel.dp,
        f"dp × tp must be the world size: {world_size} ranks with tp = {parallel.tp} make dp = {dp}",
    )
    _require(world_size % parallel.ep == 0, "parallel.ep", parallel.ep, f"must divide the world size of {world_size}")
    tokens, seq_len = config.train.tokens_per_step, config.data.seq_len
    _require(
        tokens % (seq_len * dp) == 0,
        "train.tokens_per_step",
        tokens,
        f"must be a multiple of data.seq_len × dp = {seq_len} × {dp}",
    )
    share = tokens // (seq_len * dp)
    _require(
        share % config.micro_batch(dp) == 0,
        "train.micro_batch",
        config.train.micro_batch,
        f"must divide a rank's share of a step: {share} sequences, with train.tokens_per_step = {tokens} and dp = {dp}",
    )
    if parallel.weaves:
        obstacle = halves_obstacle(config, dp)
        _require(obstacle is None, "parallel.overlap", "on", str(obstacle))


def to_yaml(config: Config) -> str:
    """The resolved config as YAML; :func:`load_config` reads it back to an equal Config."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def config_hash(config: Config) -> str:
    """Short SHA-256 of all values of a config."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode()).hexdigest()[:16]
