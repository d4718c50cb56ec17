"""The training loop: data → loss → gradients → update, with metrics, held-out scores and checkpoints around it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import IO, Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch._inductor.async_compile import AsyncCompile

from moetrain.checkpoint import checkpoint_name, contents, find_resume, find_together, load, read_manifest
from moetrain.checkpoint_levels import LocalLevel
from moetrain.checkpointer import Checkpointer
from moetrain.communication_meter import CommunicationMeter
from moetrain.config import Config, ModelConfig, RouterConfig, check_world, config_hash, to_yaml
from moetrain.data import (
    Batch,
    Dataset,
    Loader,
    check_vocabulary,
    heldout_samples,
    num_samples,
    open_dataset,
)
from moetrain.engine import create_engine
from moetrain.errors import CheckpointError, UserError
from moetrain.evaluate import Score, heldout_baselines, heldout_score, print_score
from moetrain.expert_placement import initial_placement
from moetrain.files import write_text
from moetrain.flops import parameters
from moetrain.huggingface.companions import speaks_otherwise
from moetrain.kernels import autotune
from moetrain.kernels.compilations import Compilations
from moetrain.metrics import MetricsLogger, Throughput, check_trackers, moe_metrics
from moetrain.model import Decoder, derive_seed
from moetrain.optim import learning_rate
from moetrain.overlap import choose_overlap
from moetrain.parallel import (
    Mesh,
    any_rank,
    check_symmetric,
    environment_world_size,
    first_on_each_node,
    on_rank_0,
    raise_together,
    watchdog,
)
from moetrain.parallel.engines import ReplicatedEngine
from moetrain.placement.trace import save_trace
from moetrain.plan import check_memory
from moetrain.plot import plot_losses
from moetrain.ranks import joined_mesh
from moetrain.rebalance import Rebalancer, rank_load
from moetrain.router import RouterStats, RoutingTotals
from moetrain.state import logical_tensors
from moetrain.trace_recorder import TraceRecorder, drop_after, recording_name

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
"""Asked to stop, a run finishes its step, saves and ends with exit code 0."""
REPEAT_SECONDS = 1.0


def train(config: Config) -> int:
    """Train as the config says, in the process group that the environment describes; returns the exit code."""
    check_world(config, environment_world_size())
    check_trackers(config)
    with joined_mesh(config) as mesh:
        try:
            Trainer(config, mesh).run()
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise UserError(
                    "out of memory: lower train.micro_batch, set train.activation_checkpointing.mode, or use a smaller "
                    f"model; `moetrain plan` shows what takes how much ({str(error).splitlines()[0]})"
                ) from error
            raise
    return 0


def start_compile_workers() -> None:
    """Start the processes in which torch.compile makes code, deaf to the signals that ask for an end.

    A job manager signals a whole process group. Without its workers torch would wait for them for ever, at the first
    shape to be compiled after the signal: that of the held-out text.
    """
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # which processes inherit
    try:
        AsyncCompile.warm_pool()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


@dataclass
class Progress:
    """How far a run is. Saved in every checkpoint."""

    step: int = 0
    """Steps done."""
    samples: int = 0
    """Sequences read by all ranks."""
    tokens: int = 0
    bad_steps: int = 0
    """Steps skipped for a NaN or Inf gradient …"""
    bad_steps_in_a_row: int = 0
    """… and how many of them were the last ones."""


class Trainer:
    """One rank of a run."""

    def __init__(self, config: Config, mesh: Mesh):
        on_rank_0(lambda: check_memory(config, mesh.world_size, _total_memory(mesh.device)), mesh.host_group)
        autotune.configure(config.kernels.autotune)
        self.config = config
        self.mesh = mesh
        self.folder = Path(config.run.dir)
        self.accumulation = config.accumulation_steps(mesh.dp)
        self.progress = Progress()
        self.stop_requested = False
        self.saved_step: int | None = None
        self.dispatch_bytes = 0
        """Sent by this rank's MoE layers in the last step."""
        self.placement_metrics: dict[str, float] = {}
        """Since the last report."""
        self.changes: list[str] = []
        self.logger: MetricsLogger | None = None

        self._lock = self._lock_folder()
        self.dataset = first_on_each_node(self._open_dataset, mesh)
        checkpoints = self.folder / "checkpoints"
        local = self._local_level(checkpoints)
        source = find_resume(checkpoints, config.checkpoint.resume, mesh)
        saved = None if source is None else on_rank_0(lambda: self._saved_progress(source), mesh.host_group)
        begun_with = None
        if source is None and config.checkpoint.init_from is not None:
            begun_with = find_together(Path(config.checkpoint.init_from), mesh, "checkpoint.init_from = ")
        self.placement, placed = on_rank_0(lambda: initial_placement(config, saved), mesh.host_group)
        self.overlap = choose_overlap(config, mesh)
        with torch.device(mesh.device):
            slots_LE = None if self.placement is None else self.placement.slots
            self.model = Decoder(self.overlap.applied(config), mesh, slots_LE)
        if begun_with is not None:
            load(begun_with, logical_tensors(self.model), mesh, strict=False, cast=True)
            self.changes = on_rank_0(lambda: self._changes_since(begun_with), mesh.host_group)
        elif source is None:
            self.model.initialize(config.train.seed)
        self.engine = create_engine(config, mesh, self.model)
        if source is not None and saved is not None:
            self._resume(source, saved)
        self.rebalancer = self._rebalancer()
        self.checkpointer = Checkpointer(
            checkpoints,
            mesh,
            keep_last=config.checkpoint.keep_last,
            keep_every=config.checkpoint.keep_every,
            asynchronous=config.checkpoint.asynchronous,
            host_memory_bytes=config.checkpoint.host_memory_bytes,
            local=local,
            # Going on from an earlier step of this folder leaves the later ones to the course they belong to.
            resumed_step=None if config.checkpoint.resume in ("auto", "never") else self.saved_step,
        )
        self.recorder = TraceRecorder(
            self.model.routers(),
            self.model.moe_layers,
            tokens=config.placement.trace.tokens,
            seed=config.train.seed,
            rank=mesh.rank,
        )
        if config.train.compile:
            start_compile_workers()
            self.model.compile_dense_parts()
        self.throughput = Throughput(config, mesh.device, mesh.world_size, tokens_seen=self.progress.tokens)
        self.communication = CommunicationMeter(config, mesh, self.throughput)
        on_rank_0(lambda: self._open_logs(source, begun_with, placed), mesh.host_group)

    def run(self) -> None:
        """Train to the last step (or until asked to stop), then save, score and plot."""
        try:
            self._train()
        finally:
            if self.rebalancer is not None:
                self.rebalancer.close()
            self.checkpointer.close()
            if self.logger is not None:
                self.logger.close()

    def _train(self) -> None:
        total_steps = self.config.train.steps
        loader = self._loader()
        compilations = Compilations()
        try:
            with self._stop_signals(), self._profiler() as profiler:
                batches = iter(loader)
                while self.progress.step < total_steps and not any_rank(self._should_stop(), self.mesh):
                    self._step(batches)
                    if compiled := compilations.stop():
                        self._message(f"first step: {compiled}")
                    if profiler is not None:
                        profiler.step()
                    self.progress.samples = loader.state_dict()["samples"]
                    last = self.progress.step == total_steps
                    if not last and _due(self.progress.step, self.config.checkpoint.every):
                        self._save()
                    if not last and _due(self.progress.step, self.config.eval.every):
                        self._evaluate()
                self._finish()
        finally:
            compilations.stop()
            loader.close()

    def _should_stop(self) -> bool:
        return self.stop_requested or self.checkpointer.failed

    def _loader(self) -> Loader:
        """This rank's batches from where the run stands."""
        config, mesh = self.config, self.mesh
        return Loader(
            split=self.dataset.train,
            seq_len=config.data.seq_len,
            micro_batch=config.micro_batch(mesh.dp),
            accumulation=self.accumulation,
            dp_rank=mesh.dp_rank,
            dp_size=mesh.dp,
            seed=config.train.seed,
            end_of_document=self.dataset.end_of_document,
            mask_documents=config.data.mask_documents,
            prefetch=config.data.prefetch,
            pin=mesh.device.type == "cuda",
            start_sample=self.progress.samples,
        )

    # One step

    def _step(self, batches: Iterator[Batch]) -> None:
        """Forward and backward over the micro-batches, one update, and the report."""
        config, progress = self.config, self.progress
        self.model.train()
        sent_before = self.model.dispatch_bytes
        lr = learning_rate(progress.step, config.train.steps, config.optim)
        with self.communication.step(progress.step + 1):
            loss, routing = self._accumulate_gradients(batches)
            self.checkpointer.wait_for_copies()  # nothing that a checkpoint holds has changed since it was begun
            norm = self.engine.step(lr)
        check_symmetric()  # the norm waited for the device: a kernel that missed another rank has said so
        self.dispatch_bytes = self.model.dispatch_bytes - sent_before
        finite = math.isfinite(norm)
        if finite:
            self._update_router_biases(routing)

        progress.step += 1
        progress.tokens += config.train.tokens_per_step
        self.throughput.step()
        progress.bad_steps += not finite
        progress.bad_steps_in_a_row = 0 if finite else progress.bad_steps_in_a_row + 1
        if progress.step == 1 or _due(progress.step, config.metrics.every) or progress.step == config.train.steps:
            self._report(loss, norm, lr, routing)
        if _due(progress.step, config.placement.trace.every):
            self._save_trace()
        if self.rebalancer is not None and progress.step < config.train.steps:
            self.placement_metrics |= self.rebalancer.after_step(progress.step, routing.load_LE)
        if not finite:
            self._check_bad_steps(norm)

    def _accumulate_gradients(self, batches: Iterator[Batch]) -> tuple[Tensor, RoutingTotals]:
        """Gradients of this rank's share of the step; its part of the mean loss, and its routing statistics."""
        config = self.config
        wide = torch.promote_types(self.model.compute_dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=self.mesh.device)
        routing = RoutingTotals(len(self.model.moe_layers), config.model.num_experts, self.mesh.device)
        for micro_step in range(self.accumulation):
            watchdog.moved(f"step {self.progress.step + 1}")
            with self.throughput.data_loading():
                batch = next(batches).to(self.mesh.device)
            with self._recording(micro_step):
                hidden_BSD, layer_stats = self.engine.forward(
                    batch.tokens_BS,
                    batch.documents_BS,
                    prior_load_LE=routing.load_LE if micro_step else None,
                    noise_seed=self._noise_seed(micro_step),
                )
            # The mean over all tokens of the global batch, whatever the split; see parallel/gradients.py.
            share = self.model.cross_entropy(hidden_BSD, batch.targets_BS) / config.train.tokens_per_step
            auxiliary = _auxiliary_loss(layer_stats, config) / (self.accumulation * self.mesh.world_size)
            self.engine.backward(share + auxiliary)
            loss += share.detach()
            routing.add(layer_stats)
        return loss, routing

    def _recording(self, micro_step: int) -> AbstractContextManager[None]:
        """Around a forward pass: records the first one of a step that placement.trace asks for."""
        step = self.progress.step + 1
        due = micro_step == 0 and _due(step, self.config.placement.trace.every)
        return self.recorder.recording(step) if due else nullcontext()

    def _save_trace(self) -> None:
        save_trace(self.config.trace_folder / recording_name(self.progress.step, self.mesh.rank), self.recorder.trace())

    def _update_router_biases(self, routing: RoutingTotals) -> None:
        if self.config.router.bias_update_rate > 0:
            load_LE = routing.reduced(self.mesh.world_size).load_LE
            for router, load_E in zip(self.model.routers(), load_LE, strict=True):
                router.update_bias(load_E)

    def _noise_seed(self, micro_step: int) -> int:
        """Different for each forward pass of each rank, and the same again when the step is repeated."""
        return derive_seed(self.config.train.seed, self.progress.step, micro_step, self.mesh.rank)

    def _check_bad_steps(self, norm: float) -> None:
        progress, limit = self.progress, self.config.train.max_bad_steps
        self._message(f"step {progress.step}: gradient norm is {norm}, update skipped")
        if progress.bad_steps_in_a_row >= limit:
            raise UserError(
                f"step {progress.step}: {limit} steps in a row had a NaN or Inf gradient (train.max_bad_steps); lower "
                f"optim.lr, or resume from an earlier checkpoint of {self.folder / 'checkpoints'}"
            )

    # Around the steps

    def _report(self, loss: Tensor, norm: float, lr: float, routing: RoutingTotals) -> None:
        if self.mesh.world_size > 1:
            dist.all_reduce(loss)
        values = {
            "loss_metrics/global_avg_loss": float(loss),
            "grad_norm": norm,
            "lr": lr,
            "bad_steps": float(self.progress.bad_steps),
            "time_metrics/checkpoint_stall(s)": self.checkpointer.take_stall(),
            **self.throughput.report(),
            **self.communication.report(),
            **self.placement_metrics,
        }
        self.placement_metrics = {}
        if self.model.moe_layers:
            total = routing.reduced(self.mesh.world_size)
            balance_L, z_L, entropy_L = (total.means_3L / total.forwards).cpu()
            values |= moe_metrics(
                self.model.moe_layers,
                total.load_LE.cpu(),
                entropy_L,
                balance_L,
                z_L,
                total.dropped_L.cpu(),
                total.added_L.cpu(),
                self._router_biases(),
            )
        if self.mesh.ep > 1:
            values["placement/rank_load"] = rank_load(total.load_LE, self.model.expert_ranks, self.mesh.ep)
            sent = torch.tensor(self.dispatch_bytes, device=self.mesh.device)
            dist.all_reduce(sent)
            values["moe/dispatch_bytes"] = float(sent)
        if self.logger is not None:
            self.logger.log(self.progress.step, values)

    def _router_biases(self) -> Tensor | None:
        if self.config.router.bias_update_rate == 0:
            return None
        return torch.stack([router.bias for router in self.model.routers()]).cpu()

    def _evaluate(self) -> Score:
        with self.throughput.paused():
            score = heldout_score(self.model, self.dataset, self.config, self.mesh)
        if self.logger is not None:
            self.logger.heldout(self.progress.step, score.metrics())
        return score

    def _save(self) -> None:
        progress = {
            **asdict(self.progress),
            "data": self.dataset.fingerprint,
            "placement": self._placement_record(),
            "config": asdict(self.config),
            "config_hash": config_hash(self.config),
        }
        self.checkpointer.save(self.progress.step, logical_tensors(self.model, self.engine), progress)
        self.saved_step = self.progress.step

    def _finish(self) -> None:
        """Save what is not saved yet; after the last step also score and plot."""
        step, steps = self.progress.step, self.config.train.steps
        self.checkpointer.wait()
        if self.saved_step != step:
            self._save()
            self.checkpointer.wait()
        if step < steps:
            same = self.config.checkpoint.resume == "auto"
            how = "the same command goes on" if same else "with checkpoint.resume=auto the same command goes on"
            self._message(f"asked to stop: saved step {step} of {steps}; {how} from there")
            return
        score = self._evaluate()
        if self.logger is not None:
            self.logger.close()
            print_score(score, heldout_baselines(self.dataset, score.tokens))
            print(f"loss plot:  {plot_losses(self.folder)}")
            print(f"run folder: {self.folder}")

    # Before and around the loop

    def _open_dataset(self, first: bool) -> Dataset:
        """`first`: this process is its node's first, which builds the embedded data set and reads the checksums."""
        dataset = open_dataset(self.config.data, verify=first)
        check_vocabulary(dataset, self.config.model.vocab_size)
        num_samples(dataset.train, self.config.data.seq_len)
        heldout_samples(dataset.heldout, self.config.data.seq_len, self.config.eval.tokens)
        return dataset

    def _lock_folder(self) -> IO[str] | None:
        """Held by rank 0 as long as this object lives: two runs in one folder would destroy each other's files."""
        error: Exception | None = None
        file = None
        if self.mesh.rank == 0:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = (self.folder / ".lock").open("w")
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                error = UserError(f"run.dir = {self.folder}: another run is using this folder; choose another run.dir")
            except FileExistsError:
                error = UserError(f"run.dir = {self.folder}: is a file, not a folder; choose another run.dir")
            except OSError as problem:
                error = UserError(f"run.dir = {self.folder}: {problem.strerror}; choose another run.dir")
        raise_together(error, self.mesh)
        return file

    def _local_level(self, checkpoints: Path) -> LocalLevel | None:
        """The first level of storage; what a killed run has left there is in the run folder then."""
        settings = self.config.checkpoint
        if settings.local_dir is None:
            return None
        level = LocalLevel(Path(settings.local_dir), checkpoints, self.mesh)
        if settings.resume == "auto":
            level.bring_up()
        return level

    def _placement_record(self) -> dict[str, Any] | None:
        """Where the experts are now, for the manifest."""
        if self.placement is None:
            return None
        return asdict(replace(self.placement, slots=[slots.slots for slots in self.model.slots.values()]))

    def _rebalancer(self) -> Rebalancer | None:
        if self.config.placement.rebalance.every == 0 or self.mesh.ep == 1:
            return None
        assert isinstance(self.engine, ReplicatedEngine)
        return Rebalancer(self.config, self.mesh, self.model, self.engine, self.progress.step, self._message)

    def _open_logs(self, source: Path | None, begun_with: Path | None, placed: str | None) -> None:
        write_text(self.folder / "config.yaml", to_yaml(self.config))
        if self.config.placement.trace.every:
            folder = self.config.trace_folder
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"placement.trace.dir = {folder}: {error.strerror}; choose another folder") from None
            drop_after(folder, self.progress.step)
        self.logger = MetricsLogger(self.config, self.folder, resume_step=self.progress.step)
        self._announce(source, begun_with, placed)

    def _saved_progress(self, source: Path) -> dict[str, Any]:
        """What a checkpoint says of its run. Raises CheckpointError if that was of another model."""
        saved = read_manifest(source).progress
        if not any(name.startswith("optim.") for name in contents(source)):
            raise CheckpointError(
                f"{source}: holds no optimiser's state, so no run can go on from it; begin one with its weights: "
                f"checkpoint.init_from={source}"
            )
        old, new = saved["config"]["model"], self._config_as_json()["model"]
        unset = asdict(ModelConfig())  # what keys mean that were unknown then
        different = [f"model.{k}" for k, value in new.items() if old.get(k, unset[k]) != value]
        if different:
            raise CheckpointError(
                f"{source}: was written by a model with other {', '.join(different)}; restore them, or choose another "
                "run.dir"
            )
        return saved

    def _config_as_json(self) -> dict[str, Any]:
        """As a checkpoint has it: a tuple comes back as a list."""
        return json.loads(json.dumps(asdict(self.config)))

    def _resume(self, source: Path, saved: dict[str, Any]) -> None:
        """Continue where a checkpoint of the same model left off."""
        old, new = saved["config"], self._config_as_json()
        tensors = logical_tensors(self.model, self.engine)
        load(source, tensors, self.mesh)
        self.engine.restore(tensors)
        self.progress = Progress(**{name: saved[name] for name in asdict(self.progress)})
        if source.resolve() == (self.folder / "checkpoints" / checkpoint_name(self.progress.step)).resolve():
            self.saved_step = self.progress.step
        self.changes = [
            f"{section}.{key} = {value} (was {old.get(section, {}).get(key)})"
            for section in ("router", "data", "train", "optim")
            for key, value in new[section].items()
            if old.get(section, {}).get(key) != value
        ]
        sequences = [(values["data"]["seq_len"], values["train"]["seed"]) for values in (old, new)]
        if saved["data"] != self.dataset.fingerprint or sequences[0] != sequences[1]:
            self.progress.samples = 0  # the count was of other sequences
            self.changes.append("other sequences: reading the data from their beginning")

    def _changes_since(self, begun_with: Path) -> list[str]:
        """What the model, its router and its tokenizer have become since these weights were written."""
        manifest = read_manifest(begun_with)
        old, new = manifest.progress["config"], self._config_as_json()
        unset = {"model": asdict(ModelConfig()), "router": asdict(RouterConfig())}
        changes = [
            f"{section}.{key} = {value} (was {old[section].get(key, unset[section][key])})"
            for section in unset
            for key, value in new[section].items()
            if old[section].get(key, unset[section][key]) != value
        ]
        if speaks_otherwise(begun_with, manifest, self.dataset):
            changes.append(
                "the tokenizer: data.path has other tokens than those that the model knows; `moetrain data build "
                f"--tokenizer {begun_with}` makes its own"
            )
        return changes

    def _announce(self, source: Path | None, begun_with: Path | None, placed: str | None) -> None:
        config, mesh = self.config, self.mesh
        count = parameters(config)
        experts = self.model.expert_backend if self.model.moe_layers else "none"
        self._message(self.dataset.describe())
        self._message(
            f"{count.total / 1e6:,.1f}M parameters, {count.active / 1e6:,.1f}M active; {mesh.world_size} × "
            f"{mesh.device.type}, tp = {mesh.tp}, ep = {mesh.ep}, {self.accumulation} micro-batches a step, experts: "
            f"{experts}"
        )
        self._message(self.throughput.peak_description)
        if self.overlap.reason is not None:
            self._message(self.overlap.reason)
        if self.model.moe_layers and (warning := _rounding_warning(config, mesh.dp, self.model.routers()[0].tile)):
            self._message(warning)
        if source is not None:
            self._message(f"resumed from {source}: step {self.progress.step} of {config.train.steps}")
        if begun_with is not None:
            self._message(f"begun with the weights of {begun_with}")
        for change in self.changes:
            self._message(f"  changed since then: {change}")
        if placed is not None:
            self._message(placed)

    def _message(self, text: str) -> None:
        if self.logger is not None:
            self.logger.message(text)

    @contextmanager
    def _stop_signals(self) -> Iterator[None]:
        """Note the signals that ask for an end; SIGTERM or SIGINT once more, later, acts as if this did not exist.

        A job manager may signal a launcher and its workers alike, so that one request arrives here twice. Only the main
        thread can listen; ranks of a mock world are others.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        first: dict[int, float] = {}

        def note(number: int, frame: FrameType | None) -> None:
            self.stop_requested = True
            now = time.monotonic()
            if number != signal.SIGUSR1 and now - first.setdefault(number, now) > REPEAT_SECONDS:
                signal.signal(number, before[signal.Signals(number)])
                os.kill(os.getpid(), number)

        for number in STOP_SIGNALS:
            signal.signal(number, note)
        # A job runner may have started this process with some of them blocked.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def _profiler(self) -> Iterator[torch.profiler.profile | None]:
        """Records the steps of train.profile into profile/rank<r>.json.gz, for Perfetto or chrome://tracing."""
        profile = self.config.train.profile
        if profile.steps == 0:
            yield None
            return
        file = self.folder / "profile" / f"rank{self.mesh.rank}.json.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        wait = max(0, profile.start - 1 - self.progress.step)
        with torch.profiler.profile(
            schedule=torch.profiler.schedule(
                skip_first=max(0, wait - 1), wait=0, warmup=min(1, wait), active=profile.steps, repeat=1
            ),
            on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(file)),
            record_shapes=True,
        ) as profiler:
            yield profiler


def _auxiliary_loss(layers: list[RouterStats], config: Config) -> Tensor | float:
    """Weighted balance loss and z-loss, summed over layers."""
    return sum(
        (config.router.balance_weight * stats.balance_loss + config.router.z_weight * stats.z_loss for stats in layers),
        start=0.0,
    )


def _total_memory(device: torch.device) -> int:
    """Bytes of a GPU, or of this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return psutil.virtual_memory().total


def _rounding_warning(config: Config, dp: int, tile: int) -> str | None:
    """What to do where token rounding moves much of an expert's load: with fewer than two tiles of tokens an expert."""
    seq_len, experts = config.data.seq_len, config.model.num_experts
    micro_batch = config.micro_batch(dp)
    parts = config.parallel.tp * (2 if config.parallel.weaves else 1)  # of a micro-batch, each rounded by itself
    pairs = seq_len * config.router.top_k // parts  # for each sequence of the micro-batch
    if config.router.rounding == "none" or micro_batch * pairs >= 2 * tile * experts:
        return None
    needed = -(-2 * tile * experts // pairs)
    share = config.train.tokens_per_step // (seq_len * dp)
    needed = next((size for size in range(needed, share + 1) if share % size == 0), needed)
    larger_step = f" with train.tokens_per_step = {needed * seq_len * dp}" if needed > share else ""
    return (
        f"warning: router.rounding = {config.router.rounding} with train.micro_batch = {micro_batch}: an expert gets "
        f"{micro_batch * pairs / experts:,.0f} tokens on average, fewer than two tiles of {tile}, so that "
        f"rounding changes much of the routing; use train.micro_batch = {needed} or more{larger_step}, or "
        "router.rounding = none"
    )


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
