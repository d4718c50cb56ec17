"""The record of a run, the timer, the metrics of experts, the console, the trackers and the picture."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from moetrain import metrics
from moetrain.config import Config, MetricsConfig, TrainConfig
from moetrain.errors import UserError
from moetrain.flops import flops_per_token
from moetrain.metrics import MetricsLogger, Throughput, check_trackers, moe_metrics, read_metrics
from moetrain.plot import _smooth, plot_losses

LOSS = "loss_metrics/global_avg_loss"


def make_config(**changes: Any) -> Config:
    return Config(train=TrainConfig(steps=100), metrics=MetricsConfig(**{"console": "none", **changes}))


def write(run_dir: Path, steps: range, *, resume_step: int = 0) -> None:
    logger = MetricsLogger(make_config(), run_dir, resume_step=resume_step)
    for step in steps:
        logger.log(step, {LOSS: 1.0 / step})
    logger.close()


# The file


def test_records(tmp_path: Path) -> None:
    logger = MetricsLogger(make_config(), tmp_path / "new" / "run", resume_step=0)
    logger.log(10, {LOSS: 2.5, "n_tokens_seen": 4096})
    logger.heldout(10, {"heldout/loss": 2.6})
    expected = [{"step": 10, LOSS: 2.5, "n_tokens_seen": 4096}, {"step": 10, "heldout/loss": 2.6}]
    assert read_metrics(tmp_path / "new" / "run") == expected, "every record is in the file before close"
    logger.close()


def test_numbers_that_are_not_finite_are_strict_json(tmp_path: Path) -> None:
    logger = MetricsLogger(make_config(), tmp_path, resume_step=0)
    logger.log(1, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    logger.close()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "a": None, "b": None, "c": None, "d": 1.5}


def test_resume_drops_what_will_be_repeated(tmp_path: Path) -> None:
    write(tmp_path, range(1, 8))
    write(tmp_path, range(6, 9), resume_step=5)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_start_keeps_nothing(tmp_path: Path) -> None:
    logger = MetricsLogger(make_config(), tmp_path, resume_step=0)
    logger.heldout(0, {"heldout/loss": 5.0})
    logger.close()
    write(tmp_path, range(1, 3))
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize("cut", [1, 2, 10])
def test_a_half_written_line_is_dropped(tmp_path: Path, cut: int) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    complete = [1, 2, 3] if cut == 1 else [1, 2]  # without its line break alone, a record is still whole
    assert [record["step"] for record in read_metrics(tmp_path)] == complete
    write(tmp_path, range(4, 5), resume_step=3)
    assert [record["step"] for record in read_metrics(tmp_path)] == [*complete, 4]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    write(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 2', '{"stop": 2'))
    with pytest.raises(UserError, match=r"metrics\.jsonl:2: "):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="nothing"):
        read_metrics(tmp_path / "nothing")


def test_the_file_is_never_half_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes()

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, range(6, 8), resume_step=5)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


# The timer


class Clock:
    """Stands in for the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(metrics, "time", clock)
    return clock


def test_throughput(clock: Clock) -> None:
    config = Config(train=TrainConfig(tokens_per_step=1000), metrics=MetricsConfig(peak_tflops=0.5))
    throughput = Throughput(config, torch.device("cpu"), 4, tokens_seen=5000)
    for _ in range(2):
        with throughput.data_loading():
            clock.now += 0.5
        clock.now += 1.5
        throughput.step()
    with throughput.paused():
        clock.now += 60.0
    values = throughput.report()
    tflops = flops_per_token(config).total * 125.0 / 1e12
    assert values == pytest.approx(
        {
            "n_tokens_seen": 7000,
            "throughput(tps)": 125.0,  # 2000 tokens in 4 seconds on 4 devices
            "throughput(global_tps)": 500.0,
            "tflops": tflops,
            "mfu(%)": 100 * tflops / 0.5,
            "time_metrics/end_to_end(s)": 2.0,
            "time_metrics/data_loading(s)": 0.5,
            "time_metrics/data_loading(%)": 25.0,
            "memory/max_rss(GiB)": values["memory/max_rss(GiB)"],
        }
    )
    assert 0.05 < values["memory/max_rss(GiB)"] < 64
    assert throughput.peak_description == "MFU divides by 0.5 TFLOP/s a device (metrics.peak_tflops)"

    # The next window starts at the report.
    clock.now += 1.0
    throughput.step()
    values = throughput.report()
    assert values["throughput(global_tps)"] == pytest.approx(1000.0)
    assert values["time_metrics/data_loading(s)"] == 0.0
    assert values["n_tokens_seen"] == 8000


def test_no_utilisation_without_a_peak(clock: Clock) -> None:
    throughput = Throughput(Config(), torch.device("cpu"), 1)
    throughput.step()
    clock.now += 1.0
    assert "mfu(%)" not in throughput.report()
    assert throughput.peak_description == "MFU: N/A, no known peak of the CPU; set metrics.peak_tflops"
    with pytest.raises(ValueError, match="no step"):
        throughput.report()


@pytest.mark.gpu
@pytest.mark.gpu
def test_memory_of_a_gpu() -> None:
    device = torch.device("cuda", 0)
    throughput = Throughput(Config(), device, 1)
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    del block
    throughput.step()
    first = throughput.report()
    throughput.step()
    second = throughput.report()
    assert 0.25 <= first["memory/max_active(GiB)"] <= first["memory/max_reserved(GiB)"]
    assert 0 < first["memory/max_active(%)"] < 100
    assert second["memory/max_active(GiB)"] < first["memory/max_active(GiB)"], "the peak is of the window"
    assert first["memory/num_ooms"] == 0


# Experts


def test_moe_metrics() -> None:
    values = moe_metrics(
        layers=[1, 3],
        load_LE=torch.tensor([[4.0, 2.0, 1.0, 1.0], [6.0, 2.0, 0.0, 0.0]]),
        entropy_L=torch.tensor([1.0, 0.5]),
        balance_loss_L=torch.tensor([1.25, 1.75]),
        z_loss_L=torch.tensor([4.0, 6.0]),
        dropped_L=torch.tensor([3, 4]),
        added_L=torch.tensor([5, 0]),
        bias_LE=torch.tensor([[0.5, 0.0, -0.25, 0.0], [0.0, 0.0, 0.0, 0.125]]),
    )
    assert values == {
        "moe/max_over_mean_load": 3.0,
        "moe/dead_experts": 2,
        "moe/router_entropy": 0.75,
        "moe/balance_loss": 1.5,
        "moe/z_loss": 5.0,
        "moe/dropped_tokens": 7,
        "moe/added_tokens": 5,
        "moe/bias_range": 0.75,
        "moe/layer_01/max_over_mean_load": 2.0,
        "moe/layer_03/max_over_mean_load": 3.0,
        "moe/layer_01/dead_experts": 0,
        "moe/layer_03/dead_experts": 2,
        "moe/layer_01/router_entropy": 1.0,
        "moe/layer_03/router_entropy": 0.5,
        "moe/layer_01/balance_loss": 1.25,
        "moe/layer_03/balance_loss": 1.75,
        "moe/layer_01/z_loss": 4.0,
        "moe/layer_03/z_loss": 6.0,
        "moe/layer_01/dropped_tokens": 3,
        "moe/layer_03/dropped_tokens": 4,
        "moe/layer_01/added_tokens": 5,
        "moe/layer_03/added_tokens": 0,
        "moe/layer_01/bias_range": 0.75,
        "moe/layer_03/bias_range": 0.125,
    }


def test_moe_metrics_without_bias() -> None:
    loads = torch.ones(2, 4, dtype=torch.int64)
    zeros = torch.zeros(2)
    values = moe_metrics([0, 1], loads, zeros, zeros, zeros, zeros, zeros, None)
    assert values["moe/max_over_mean_load"] == 1.0
    assert not any("bias" in key for key in values)
    with pytest.raises(ValueError):
        moe_metrics([0], loads, zeros, zeros, zeros, zeros, zeros, None)


# The console

REPORT = {
    LOSS: 2.34567,
    "grad_norm": 0.5,
    "lr": 3e-4,
    "throughput(global_tps)": 12345.6,
    "mfu(%)": 41.26,
    "time_metrics/end_to_end(s)": 2.0,
}


def show(tmp_path: Path, kind: str) -> None:
    logger = MetricsLogger(make_config(console=kind), tmp_path, resume_step=0)
    logger.message("resumed from [step 0]")
    logger.heldout(40, {"heldout/loss": 2.5, "heldout/bits_per_byte": 3.6})
    logger.log(40, REPORT)
    logger.close()


def test_plain_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(tmp_path, "plain")
    assert capsys.readouterr().out.splitlines() == [
        "resumed from [step 0]",
        "step  40/100  held-out  loss 2.5000  bits per byte 3.6000",
        "step  40/100  loss 2.3457  grad norm 0.500  lr 3.00e-04  12,346 tokens/s  MFU 41.3%  ETA 0:02:00",
    ]


def test_rich_console(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    show(tmp_path, "rich")
    printed = capsys.readouterr().out
    for text in (
        "resumed from [step 0]",
        "step 40: held-out  loss 2.5000  bits per byte 3.6000",
        "step 40/100",
        "loss 2.3457  12,346 tokens/s  MFU 41.3%  ETA 0:02:00  held-out 2.5000",
    ):
        assert text in printed


def test_what_modules_log_is_shown_until_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    module = logging.getLogger("moetrain.kernels.autotune")
    logger = MetricsLogger(make_config(console="plain"), tmp_path, resume_step=0)
    module.info("autotuned %s", "up")
    logging.getLogger("another").error("theirs")
    logger.close()
    module.info("later")
    assert capsys.readouterr().out == "autotuned up\n"


def test_silent_and_automatic_console(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(tmp_path, "none")
    assert capsys.readouterr().out == ""
    show(tmp_path, "auto")  # no terminal here
    automatic = capsys.readouterr().out
    show(tmp_path, "plain")
    assert capsys.readouterr().out == automatic


def test_console_says_na_without_a_peak(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    logger = MetricsLogger(make_config(console="plain"), tmp_path, resume_step=0)
    logger.log(1, {"throughput(global_tps)": 10.0})
    logger.close()
    assert "MFU N/A" in capsys.readouterr().out


# Trackers


@pytest.mark.parametrize(
    ("package", "change"), [("tensorboard", {"tensorboard": True}), ("wandb", {"wandb_project": "moe"})]
)
def test_a_missing_tracker_names_the_extra(
    package: str, change: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None if name == package else object())
    with pytest.raises(UserError, match=r"pip install 'moetrain\[tracking\]'"):
        MetricsLogger(make_config(**change), tmp_path / "run", resume_step=0)
    assert not (tmp_path / "run").exists()
    check_trackers(make_config())


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    logger = MetricsLogger(make_config(tensorboard=True), tmp_path, resume_step=0)
    logger.log(10, {LOSS: 2.5, "lr": 0.125})
    logger.heldout(10, {"heldout/loss": 2.75})
    logger.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for key, value in ((LOSS, 2.5), ("lr", 0.125), ("heldout/loss", 2.75)):
        assert [(event.step, event.value) for event in events.Scalars(key)] == [(10, value)]


class FakeWandB(types.ModuleType):
    """The calls that W&B gets."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.starts: list[dict[str, Any]] = []
        self.records: list[dict[str, float]] = []
        self.finished = 0

    def init(self, **arguments: Any) -> FakeWandB:
        self.starts.append(arguments)
        return self

    def define_metric(self, name: str, *, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, record: dict[str, float]) -> None:
        self.records.append(record)

    def finish(self) -> None:
        self.finished += 1


def test_wandb_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = FakeWandB()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: object())
    for resume_step in (0, 10, 0):
        logger = MetricsLogger(make_config(wandb_project="moe"), tmp_path, resume_step=resume_step)
        logger.log(resume_step + 1, {"lr": 0.5})
        logger.close()
    first, resumed, fresh = (start["id"] for start in wandb.starts)
    assert first == resumed != fresh
    assert wandb.starts[0]["project"] == "moe"
    assert wandb.starts[0]["config"]["train"]["steps"] == 100
    assert wandb.records == [{"step": 1, "lr": 0.5}, {"step": 11, "lr": 0.5}, {"step": 1, "lr": 0.5}]
    assert wandb.finished == 3


# The picture

BLUE, ORANGE, GREY = (0x2F, 0x6D, 0xB3), (0xD9, 0x70, 0x2A), (0x5F, 0x66, 0x70)


def drawn(run_dir: Path, colour: tuple[int, int, int]) -> int:
    """Pixels of a colour in the picture of a run."""
    pixels = np.round(imread(plot_losses(run_dir))[..., :3] * 255).astype(int)
    return int((pixels == colour).all(-1).sum())


def test_plot(tmp_path: Path) -> None:
    logger = MetricsLogger(make_config(), tmp_path, resume_step=0)
    for step in range(1, 101):
        loss = math.nan if step in (20, 50) else 3.0 / step**0.3
        logger.log(step, {LOSS: loss, "throughput(global_tps)": 1e4 + step})
    logger.close()
    assert drawn(tmp_path, BLUE) > 2000
    assert drawn(tmp_path, ORANGE) == 0
    speed = drawn(tmp_path, GREY)
    logger = MetricsLogger(make_config(), tmp_path, resume_step=100)
    logger.heldout(50, {"heldout/loss": 1.4})
    logger.heldout(100, {"heldout/loss": 1.2, "moe/max_over_mean_load": 1.5})
    logger.close()
    assert drawn(tmp_path, ORANGE) > 200
    assert drawn(tmp_path, GREY) != speed
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_plot_of_one_point(tmp_path: Path) -> None:
    write(tmp_path, range(1, 2))
    assert drawn(tmp_path, BLUE) > 100


def test_smoothing() -> None:
    values = np.array([5.0, 1.0, np.nan, 3.0, 8.0])
    # Windows of one to each side, one value alone at the start, cut at the end.
    np.testing.assert_allclose(_smooth(values), [5.0, 3.0, np.nan, 5.5, 5.5])


def test_nothing_to_plot(tmp_path: Path) -> None:
    logger = MetricsLogger(make_config(), tmp_path, resume_step=0)
    logger.log(1, {LOSS: math.nan})
    logger.close()
    with pytest.raises(UserError, match="no loss"):
        plot_losses(tmp_path)
    assert not (tmp_path / "loss.png").exists()
