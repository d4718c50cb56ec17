"""What a run reports: metrics.jsonl, TensorBoard, W&B and the console.

Names are torchtitan's where it has one. The file is the record: one JSON object a line, each with its "step"; a run
that resumes drops what it is going to repeat.

Shapes: L MoE layers, E experts.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import resource
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from torch import Tensor

from moetrain.config import Config
from moetrain.errors import UserError
from moetrain.files import write_text
from moetrain.flops import flops_per_token, peak_tflops

FILE_NAME = "metrics.jsonl"
GIB = 2**30
LOG = logging.getLogger("moetrain")
"""Above those of all modules."""


class MetricsLogger:
    """Writes a run's metrics to its folder and shows them. For rank 0 only.

    An existing metrics.jsonl loses its records of steps after `resume_step` (all of them, if the run starts at 0) and
    a half-written last line. Until :meth:`close`, what moetrain's modules log is shown as messages. Raises UserError
    if a tracker that the config asks for is not installed.
    """

    def __init__(self, config: Config, run_dir: Path, *, resume_step: int) -> None:
        check_trackers(config)
        run_dir.mkdir(parents=True, exist_ok=True)
        path = run_dir / FILE_NAME
        if path.exists():
            _drop_after(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        self._trackers: list[_Tracker] = []
        if config.metrics.tensorboard:
            self._trackers.append(_TensorBoard(run_dir, resume_step))
        if config.metrics.wandb_project is not None:
            self._trackers.append(_WandB(config, run_dir, resume_step))
        self._console = _console(config, resume_step)
        self._log_handler = _LogHandler(self._console)
        LOG.addHandler(self._log_handler)
        LOG.setLevel(logging.INFO)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Record the training metrics of `step`, and show them."""
        self._record(step, values)
        self._console.report(step, values)

    def heldout(self, step: int, values: Mapping[str, float]) -> None:
        """Record a held-out score (``heldout/loss`` in nats a token, ``heldout/bits_per_byte``, …), and show it."""
        self._record(step, values)
        self._console.heldout(step, values)

    def message(self, text: str) -> None:
        """Show a line that is not a metric: resumed from …, checkpoint saved …"""
        self._console.message(text)

    def close(self) -> None:
        """Flush and close everything; the terminal is as it was."""
        LOG.removeHandler(self._log_handler)
        self._console.close()
        for tracker in self._trackers:
            tracker.close()
        self._file.close()

    def _record(self, step: int, values: Mapping[str, float]) -> None:
        # JSON has no NaN and no infinity.
        record = {"step": step, **{key: value if math.isfinite(value) else None for key, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        for tracker in self._trackers:
            tracker.log(step, values)


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run in the order they were written; a half-written last line is left out.

    Values that were NaN or infinite are None. Raises UserError if there is no file or if another line is damaged.
    """
    path = run_dir / FILE_NAME
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return _parse(path, text)


def _parse(path: Path, text: str) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    lines = text.removesuffix("\n").split("\n") if text else []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError
        except ValueError:
            if number == len(lines):
                break
            raise UserError(f"{path}:{number}: not a metrics record; delete the line") from None
        records.append(record)
    return records


def _drop_after(path: Path, step: int) -> None:
    """Rewrite the file without the records of later steps; a kill at any moment leaves the old file or the new."""
    kept = [record for record in read_metrics(path.parent) if record["step"] <= step] if step else []
    write_text(path, "".join(json.dumps(record) + "\n" for record in kept))


# ---------------------------------------------------------------------------------------------------------------------
# Speed and memory


class Throughput:
    """Speed, utilisation and memory over the steps since the last report.

    `world_size` is the number of devices, `tokens_seen` what the run had trained on before. Speeds are of the whole
    run, under the premise that all ranks keep step; memory is of this rank's `device`.

    Kernels run behind the host: call :meth:`report` after reading a value that the last step computed, such as its
    loss, or the window ends too early.
    """

    def __init__(self, config: Config, device: torch.device, world_size: int, *, tokens_seen: int = 0) -> None:
        self._device = device
        self._world_size = world_size
        self._tokens_per_step = config.train.tokens_per_step
        self._tokens_seen = tokens_seen
        self._flops_per_token = flops_per_token(config).total
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
        if config.metrics.peak_tflops is not None:
            self.peak_tflops: float | None = config.metrics.peak_tflops
            source = "metrics.peak_tflops"
        else:
            self.peak_tflops = peak_tflops(name)
            source = f"dense bfloat16, datasheet of {name}"
        self.peak_description: str = (
            f"MFU: N/A, no known peak of {name}; set metrics.peak_tflops"
            if self.peak_tflops is None
            else f"MFU divides by {self.peak_tflops:g} TFLOP/s a device ({source})"
        )
        self._start_window()

    def _start_window(self) -> None:
        self._steps = 0
        self._data_seconds = 0.0
        self._paused_seconds = 0.0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._start = time.perf_counter()

    @contextmanager
    def data_loading(self) -> Iterator[None]:
        """Time inside is waiting for data."""
        start = time.perf_counter()
        yield
        self._data_seconds += time.perf_counter() - start

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside is not training and is left out: evaluation."""
        start = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - start

    def step(self) -> None:
        """Count one optimiser step of ``train.tokens_per_step`` tokens."""
        self._steps += 1
        self._tokens_seen += self._tokens_per_step

    def report(self) -> dict[str, float]:
        """Metrics of the steps since the last report (or the start); the next window begins.

        - ``throughput(tps)``: tokens a second and device; ``throughput(global_tps)``: of all devices.
        - ``tflops``: model TFLOP/s of a device, :func:`~moetrain.flops.flops_per_token` × throughput(tps); ``mfu(%)``:
          the percentage of the peak, missing where that is unknown.
        - ``time_metrics/end_to_end(s)`` and ``time_metrics/data_loading(s)``: seconds of a step;
          ``time_metrics/data_loading(%)``: their ratio.
        - ``memory/max_active(GiB)``, ``memory/max_reserved(GiB)`` and both as ``(%)`` of the device: peaks in the
          window; ``memory/num_alloc_retries`` and ``memory/num_ooms``: since the process began. On a CPU
          ``memory/max_rss(GiB)``: peak resident memory since the process began.
        - ``n_tokens_seen``: tokens of the whole run.

        Raises ValueError if there was no step.
        """
        if self._steps == 0:
            raise ValueError("no step to report")
        seconds = time.perf_counter() - self._start - self._paused_seconds
        global_tps = self._steps * self._tokens_per_step / seconds
        tps = global_tps / self._world_size
        tflops = self._flops_per_token * tps / 1e12
        values = {
            "n_tokens_seen": self._tokens_seen,
            "throughput(tps)": tps,
            "throughput(global_tps)": global_tps,
            "tflops": tflops,
            "time_metrics/end_to_end(s)": seconds / self._steps,
            "time_metrics/data_loading(s)": self._data_seconds / self._steps,
            "time_metrics/data_loading(%)": 100 * self._data_seconds / seconds,
            **_memory(self._device),
        }
        if self.peak_tflops is not None:
            values["mfu(%)"] = 100 * tflops / self.peak_tflops
        self._start_window()
        return values


def _memory(device: torch.device) -> dict[str, float]:
    if device.type != "cuda":
        # getrusage counts kibibytes, but bytes on a Mac.
        unit = 1 if sys.platform == "darwin" else 1024
        return {"memory/max_rss(GiB)": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / GIB}
    stats = torch.cuda.memory_stats(device)
    capacity = torch.cuda.get_device_properties(device).total_memory
    active, reserved = stats["active_bytes.all.peak"], stats["reserved_bytes.all.peak"]
    return {
        "memory/max_active(GiB)": active / GIB,
        "memory/max_active(%)": 100 * active / capacity,
        "memory/max_reserved(GiB)": reserved / GIB,
        "memory/max_reserved(%)": 100 * reserved / capacity,
        "memory/num_alloc_retries": stats["num_alloc_retries"],
        "memory/num_ooms": stats["num_ooms"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# Experts


def moe_metrics(
    layers: Sequence[int],
    load_LE: Tensor,
    entropy_L: Tensor,
    balance_loss_L: Tensor,
    z_loss_L: Tensor,
    dropped_L: Tensor,
    added_L: Tensor,
    bias_LE: Tensor | None,
) -> dict[str, float]:
    """Metrics of the routing, for each MoE layer (``moe/layer_03/…``) and over all of them (``moe/…``).

    `layers`: 0-based indices of the L MoE layers. The tensors are on the CPU, float or integer, and already summed or
    averaged over ranks: load [L, E] pairs (or a share of them) of each expert by top-k, before a limit or rounding,
    entropy [L] of the router in nats, the two losses [L] before their weights, [L] pairs that were dropped and added
    after top-k, and the selection bias [L, E], if there is one.

    ==================  ================================================  ========
    metric              of a layer                                        over all
    ==================  ================================================  ========
    max_over_mean_load  load of the fullest expert / mean; NaN if empty   largest
    dead_experts        experts with a load of exactly 0                  sum
    router_entropy      nats a token; ln E is uniform                     mean
    balance_loss        load-balance loss                                 mean
    z_loss              router z-loss                                     mean
    dropped_tokens      pairs refused by a capacity limit or by rounding  sum
    added_tokens        pairs added by rounding                           sum
    bias_range          largest − smallest selection bias                 largest
    ==================  ================================================  ========
    """
    load_LE = load_LE.double()
    load_L = load_LE.amax(1) / load_LE.mean(1)
    dead_L = (load_LE == 0).sum(1)
    columns = [
        ("max_over_mean_load", load_L, load_L.max()),
        ("dead_experts", dead_L, dead_L.sum()),
        ("router_entropy", entropy_L, entropy_L.double().mean()),
        ("balance_loss", balance_loss_L, balance_loss_L.double().mean()),
        ("z_loss", z_loss_L, z_loss_L.double().mean()),
        ("dropped_tokens", dropped_L, dropped_L.sum()),
        ("added_tokens", added_L, added_L.sum()),
    ]
    if bias_LE is not None:
        range_L = bias_LE.amax(1) - bias_LE.amin(1)
        columns.append(("bias_range", range_L, range_L.max()))
    values = {f"moe/{name}": overall.item() for name, _, overall in columns}
    for name, column_L, _ in columns:
        for layer, value in zip(layers, column_L.tolist(), strict=True):
            values[f"moe/layer_{layer:02d}/{name}"] = value
    return values


# ---------------------------------------------------------------------------------------------------------------------
# Trackers


class _Tracker(Protocol):
    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


def check_trackers(config: Config) -> None:
    """Raise UserError if TensorBoard or W&B is asked for and not installed. Needs no process group."""
    for key, wanted, package in (
        ("metrics.tensorboard", config.metrics.tensorboard, "tensorboard"),
        ("metrics.wandb_project", config.metrics.wandb_project is not None, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise UserError(f"{key}: {package} is not installed: pip install 'moetrain[tracking]'")


class _TensorBoard:
    def __init__(self, run_dir: Path, resume_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=resume_step + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()


class _WandB:
    def __init__(self, config: Config, run_dir: Path, resume_step: int) -> None:
        import wandb

        # A resumed run goes on in the same curves.
        id_file = run_dir / "wandb_id.txt"
        if resume_step == 0 or not id_file.exists():
            id_file.write_text(uuid.uuid4().hex[:12], encoding="utf-8")
        self._run = wandb.init(
            project=config.metrics.wandb_project,
            name=run_dir.resolve().name,
            id=id_file.read_text(encoding="utf-8"),
            resume="allow",
            dir=str(run_dir),
            config=asdict(config),
        )
        # W&B drops records whose own step goes backwards, as it does after a kill; so `step` is a metric like others.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def close(self) -> None:
        self._run.finish()


# ---------------------------------------------------------------------------------------------------------------------
# Console


class _SilentConsole:
    """Shows nothing."""

    def report(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def heldout(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _PlainConsole(_SilentConsole):
    """One line a report."""

    def __init__(self, steps: int) -> None:
        self._steps = steps

    def report(self, step: int, values: Mapping[str, float]) -> None:
        self.message(f"{self._step(step)}  {'  '.join(_fields(self._steps - step, values).values())}")

    def heldout(self, step: int, values: Mapping[str, float]) -> None:
        self.message(f"{self._step(step)}  {_heldout_line(values)}")

    def message(self, text: str) -> None:
        print(text, flush=True)

    def _step(self, step: int) -> str:
        return f"step {step:>{len(str(self._steps))}}/{self._steps}"


class _RichConsole(_SilentConsole):
    """A live progress bar under the messages."""

    def __init__(self, steps: int, done: int) -> None:
        self._steps = steps
        self._heldout = ""
        self._progress = Progress(
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            console=Console(),
        )
        self._task: TaskID = self._progress.add_task("starting", total=steps, completed=done)
        self._progress.start()

    def report(self, step: int, values: Mapping[str, float]) -> None:
        fields = _fields(self._steps - step, values)
        shown = [fields[key] for key in ("loss", "tokens/s", "MFU", "ETA") if key in fields]
        if self._heldout:
            shown.append(self._heldout)
        self._progress.update(self._task, completed=step, description="  ".join(shown))

    def heldout(self, step: int, values: Mapping[str, float]) -> None:
        self._heldout = f"held-out {values['heldout/loss']:.4f}" if "heldout/loss" in values else ""
        self.message(f"step {step}: {_heldout_line(values)}")

    def message(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


class _LogHandler(logging.Handler):
    """Shows what is logged."""

    def __init__(self, console: _SilentConsole) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.message(self.format(record))


def _console(config: Config, resume_step: int) -> _SilentConsole:
    kind = config.metrics.console
    if kind == "auto":
        kind = "rich" if sys.stdout.isatty() else "plain"
    if kind == "rich":
        return _RichConsole(config.train.steps, resume_step)
    return _PlainConsole(config.train.steps) if kind == "plain" else _SilentConsole()


def _fields(steps_left: int, values: Mapping[str, float]) -> dict[str, str]:
    """What the console shows of a report, ready to print."""
    fields = {}
    if "loss_metrics/global_avg_loss" in values:
        fields["loss"] = f"loss {values['loss_metrics/global_avg_loss']:.4f}"
    if "grad_norm" in values:
        fields["grad norm"] = f"grad norm {values['grad_norm']:.3f}"
    if "lr" in values:
        fields["lr"] = f"lr {values['lr']:.2e}"
    if "moe/max_over_mean_load" in values:
        fields["load"] = f"load {values['moe/max_over_mean_load']:.2f}"
    if "throughput(global_tps)" in values:
        fields["tokens/s"] = f"{values['throughput(global_tps)']:,.0f} tokens/s"
        fields["MFU"] = f"MFU {values['mfu(%)']:.1f}%" if "mfu(%)" in values else "MFU N/A"
    if "time_metrics/end_to_end(s)" in values:
        seconds = steps_left * values["time_metrics/end_to_end(s)"]
        fields["ETA"] = f"ETA {timedelta(seconds=round(seconds))}"
    return fields


def _heldout_line(values: Mapping[str, float]) -> str:
    return "held-out  " + "  ".join(
        f"{key.removeprefix('heldout/').replace('_', ' ')} {value:.4f}" for key, value in values.items()
    )
