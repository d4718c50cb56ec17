"""Whole runs on the CPU: the same numbers on every topology, after every interruption, and nothing lost."""

from __future__ import annotations

import dataclasses
import fcntl
import gzip
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from ranks import free_port, run_ranks
from torch._inductor import config as inductor_config
from torch._inductor.async_compile import AsyncCompile
from torch.distributed.tensor import DTensor

from moetrain import checkpointer
from moetrain.checkpoint import checkpoint_name, load, read_manifest
from moetrain.checkpoint_staging import Copy
from moetrain.config import Config, from_dict, load_config, to_yaml
from moetrain.errors import CheckpointError, DataError, UserError
from moetrain.evaluate import evaluate_command
from moetrain.kernels import autotune
from moetrain.state import logical_tensors
from moetrain.trainer import Trainer, _rounding_warning, start_compile_workers, train

SMALL: dict[str, Any] = {
    "model": {"dim": 32, "n_layers": 2, "n_heads": 2, "num_experts": 4, "expert_dim": 32, "shared_dim": 16},
    "router": {"score": "sigmoid", "normalize": True, "bias_update_rate": 0.01, "balance_scope": "global"},
    "data": {"seq_len": 32},
    "train": {"steps": 8, "tokens_per_step": 512, "micro_batch": 4},
    "optim": {"lr": 5e-3, "warmup_steps": 2},
    "checkpoint": {"every": 3},
    "eval": {"every": 4, "tokens": 512},
    "metrics": {"every": 1, "console": "none"},
    "run": {"device": "cpu"},
}


def make_config(folder: Path, data: Path, *overrides: str) -> Config:
    return from_dict(SMALL, [f"run.dir={folder}", f"data.path={data}", *overrides])


def run(config: Config) -> None:
    assert train(config) == 0


def metrics(folder: Path | str) -> dict[int, dict[str, float]]:
    """step → everything reported at it."""
    records: dict[int, dict[str, float]] = {}
    for line in (Path(folder) / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        records.setdefault(record["step"], {}).update(record)
    return records


NUMBERS = ("loss_metrics/global_avg_loss", "grad_norm", "lr", "moe/balance_loss", "moe/max_over_mean_load")


def numbers(folder: Path | str) -> dict[int, tuple[float, ...]]:
    """What must not depend on topology or interruptions, step by step."""
    return {step: tuple(record[key] for key in NUMBERS) for step, record in metrics(folder).items()}


def test_a_run_leaves_what_it_promises(tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path / "run", data_folder)
    run(config)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"config.yaml", "metrics.jsonl", "checkpoints", "loss.png", ".lock"}
    assert load_config(str(tmp_path / "run" / "config.yaml")) == config
    recorded = metrics(tmp_path / "run")
    assert list(recorded) == list(range(1, 9))
    assert recorded[8]["loss_metrics/global_avg_loss"] < recorded[1]["loss_metrics/global_avg_loss"]
    assert recorded[8]["n_tokens_seen"] == 8 * 512
    assert {"heldout/loss", "heldout/bits_per_byte"} <= recorded[4].keys() & recorded[8].keys()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("unigram", "bigram", "gzip -9", "this model", "loss.png", "run folder"))


@pytest.mark.parametrize("crash_after", [2, 5])
def test_resume_after_a_crash_is_bit_exact(
    tmp_path: Path, data_folder: Path, crash_after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config(tmp_path / "whole", data_folder))
    config = make_config(tmp_path / "crashed", data_folder)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_evaluate", lambda self: None)
        original = Trainer._step

        def crash(self: Trainer, batches: Any) -> None:
            original(self, batches)
            if self.progress.step == crash_after:
                raise RuntimeError("power cut")

        patch.setattr(Trainer, "_step", crash)
        with pytest.raises(RuntimeError, match="power cut"):
            train(config)
    run(config)
    assert numbers(tmp_path / "crashed") == numbers(tmp_path / "whole")
    assert metrics(tmp_path / "crashed")[8]["heldout/loss"] == metrics(tmp_path / "whole")[8]["heldout/loss"]


def test_running_a_finished_run_again_only_scores_it(tmp_path: Path, data_folder: Path) -> None:
    config = make_config(tmp_path / "run", data_folder)
    run(config)
    before = metrics(tmp_path / "run")
    run(config)
    assert numbers(tmp_path / "run") == {s: tuple(r[k] for k in NUMBERS) for s, r in before.items()}


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_copied_behind_the_next_step_is_the_state_before_it(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """A checkpoint of every step, of which every other copy begins late."""
    fill, save = Copy._fill, Trainer._save
    expected: dict[str, dict[str, torch.Tensor]] = {}

    def late(self: Copy, stream: Any) -> Iterator[Any]:
        time.sleep(0.05 * (len(expected) % 2))
        yield from fill(self, stream)

    def save_and_remember(self: Trainer) -> None:
        tensors = logical_tensors(self.model, self.engine)
        plain = {name: tensor.to_local() if isinstance(tensor, DTensor) else tensor for name, tensor in tensors.items()}
        expected[checkpoint_name(self.progress.step)] = {name: tensor.clone().cpu() for name, tensor in plain.items()}
        save(self)

    monkeypatch.setattr(Copy, "_fill", late)
    monkeypatch.setattr(Trainer, "_save", save_and_remember)
    settings = ["checkpoint.every=1", "checkpoint.keep_last=9", "eval.every=0", f"run.device={device}"]
    run(make_config(tmp_path / "run", data_folder, *settings))
    assert len(expected) == 8
    for name, tensors in expected.items():
        loaded = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        load(tmp_path / "run" / "checkpoints" / name, loaded)
        assert all(torch.equal(tensor, loaded[key]) for key, tensor in tensors.items()), name
    assert sum(record["time_metrics/checkpoint_stall(s)"] for record in metrics(tmp_path / "run").values()) > 0


def test_a_save_that_fails_ends_the_run_at_the_next_step(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = threading.Event()
    write_shard, step = checkpointer.write_shard, Trainer._step

    def full(file: Path, *arguments: Any) -> Any:
        if "step-00000006" in str(file):
            failed.set()
            raise OSError(28, "No space left on device")
        return write_shard(file, *arguments)

    def step_after_failure(self: Trainer, batches: Any) -> None:
        step(self, batches)
        if self.progress.step == 7:
            assert failed.wait(timeout=20)
            time.sleep(0.1)

    monkeypatch.setattr(checkpointer, "write_shard", full)
    monkeypatch.setattr(Trainer, "_step", step_after_failure)
    config = make_config(tmp_path / "run", data_folder, "train.steps=20")
    with pytest.raises(CheckpointError, match=r"saving .*step-00000006 failed: .*No space left on device"):
        train(config)
    assert max(metrics(tmp_path / "run")) == 7
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000003"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_asked_to_stop_it_saves_and_the_same_command_goes_on(
    tmp_path: Path, data_folder: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(make_config(tmp_path / "whole", data_folder))
    config = make_config(tmp_path / "stopped", data_folder)
    original = Trainer._step

    def stop_in_step_five(self: Trainer, batches: Any) -> None:
        if self.progress.step == 4:
            os.kill(os.getpid(), number)
        original(self, batches)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_step", stop_in_step_five)
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])  # as some job runners leave it
        run(config)
    assert (tmp_path / "stopped" / "checkpoints" / "step-00000005").is_dir()
    assert max(metrics(tmp_path / "stopped")) == 5
    run(config)
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")


def test_a_bad_gradient_skips_the_update_and_too_many_stop_the_run(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._accumulate_gradients
    bad = {3}
    weights: dict[int, torch.Tensor] = {}

    def poison(self: Trainer, batches: Any) -> Any:
        result = original(self, batches)
        step = self.progress.step + 1
        weights[step] = self.model.embedding.detach().clone()
        if step in bad:
            assert self.model.embedding.grad is not None
            self.model.embedding.grad[0, 0] = math.nan
        return result

    monkeypatch.setattr(Trainer, "_accumulate_gradients", poison)
    run(make_config(tmp_path / "one", data_folder, "train.max_bad_steps=2"))
    assert torch.equal(weights[3], weights[4])
    assert not torch.equal(weights[4], weights[5])
    assert [record["bad_steps"] for record in metrics(tmp_path / "one").values()] == [0, 0, 1, 1, 1, 1, 1, 1]
    assert metrics(tmp_path / "one")[3]["grad_norm"] is None

    bad.update({4})
    with pytest.raises(UserError, match="step 4: 2 steps in a row had a NaN or Inf gradient"):
        train(make_config(tmp_path / "two", data_folder, "train.max_bad_steps=2"))


def test_rounding_is_reported_and_few_tokens_are_warned_of(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["router.rounding=up", "train.steps=1", "metrics.console=plain"]
    run(make_config(tmp_path / "run", data_folder, *settings))
    assert "router.rounding = up with train.micro_batch = 4: an expert gets 64 tokens" in capsys.readouterr().out
    record = metrics(tmp_path / "run")[1]
    assert record["moe/added_tokens"] == record["moe/layer_00/added_tokens"] + record["moe/layer_01/added_tokens"] > 0
    assert record["moe/dropped_tokens"] == 0


def test_rounding_warning(tmp_path: Path, data_folder: Path) -> None:
    def warning(*overrides: str, dp: int = 1, tile: int = 16) -> str | None:
        config = make_config(tmp_path, data_folder, "router.rounding=nearest", *overrides)
        return _rounding_warning(config, dp, tile)

    assert warning() is None  # 4 · 32 tokens · 2 / 4 experts = 64 = 4 tiles
    assert warning(tile=32) is None
    assert warning("router.rounding=none", tile=33) is None
    assert warning(tile=33) == (
        "warning: router.rounding = nearest with train.micro_batch = 4: an expert gets 64 tokens on average, fewer "
        "than two tiles of 33, so that rounding changes much of the routing; use train.micro_batch = 8 or more, or "
        "router.rounding = none"
    )
    # Eight ranks have a share of two sequences each.
    assert "train.micro_batch = 2: an expert gets 32 tokens" in (warning(dp=8, tile=32) or "")
    # Two tensor-parallel ranks have half of a sequence each.
    assert "an expert gets 32 tokens" in (warning("parallel.tp=2", tile=32) or "")
    assert "use train.micro_batch = 8 or more" in (warning("parallel.tp=2", tile=32) or "")
    # Halves are rounded each by itself, where there are halves.
    assert "an expert gets 32 tokens" in (warning("parallel.ep=2", "parallel.overlap=true", tile=32) or "")
    assert warning("parallel.overlap=true", tile=32) is None
    assert "use train.micro_batch = 4 or more with train.tokens_per_step = 1024, or" in (warning(dp=8, tile=32) or "")


def test_kernels_are_configured_and_their_compilation_is_reported_once(
    tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    triton = pytest.importorskip("triton")
    configured: list[bool] = []
    monkeypatch.setattr(autotune, "configure", configured.append)
    original = Trainer._step

    def compiling(self: Trainer, batches: Any) -> None:
        original(self, batches)
        if (listener := triton.knobs.compilation.listener) is not None:
            times = triton.knobs.CompileTimes(ir_initialization=500_000, lowering_stages=[], store_results=0)
            listener(src=None, metadata={}, metadata_group={}, times=times, cache_hit=False)

    monkeypatch.setattr(Trainer, "_step", compiling)
    settings = ["kernels.autotune=true", "train.steps=2", "metrics.console=plain"]
    run(make_config(tmp_path / "run", data_folder, *settings))
    printed = capsys.readouterr().out
    assert printed.count("compiled") == 1
    assert "first step: compiled 1 kernel in 0.5 s, 0 from cache" in printed
    assert configured == [True]


@inductor_config.patch(compile_threads=2)
def test_a_signal_to_the_whole_process_group_leaves_the_compilers_at_work() -> None:
    """Without them torch waits for ever at the next compilation."""
    AsyncCompile.process_pool.cache_clear()  # another test may have started one
    before = set(psutil.Process().children())
    start_compile_workers()
    (started,) = set(psutil.Process().children()) - before
    try:
        doubled = AsyncCompile.process_pool().submit(len, "ab")
        for process in (started, *started.children(recursive=True)):
            process.send_signal(signal.SIGTERM)
        assert doubled.result(timeout=60) == 2
        assert AsyncCompile.process_pool().submit(len, "abc").result(timeout=60) == 3
    finally:
        AsyncCompile.process_pool().shutdown()
        AsyncCompile.process_pool.cache_clear()


def test_what_cannot_be_scored_is_refused_before_training(tmp_path: Path, data_folder: Path) -> None:
    settings = ["data.seq_len=8192", "train.tokens_per_step=8192", "eval.tokens=8192"]
    with pytest.raises(DataError, match="heldout split"):
        train(make_config(tmp_path / "run", data_folder, *settings))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    "settings",
    [
        ["train.param_dtype=bfloat16", "train.dtype=bfloat16"],
        ["model.num_experts=0"],
        ["data.mask_documents=true", "model.tie_embeddings=true"],
        ["router.groups=2", "router.top_groups=1", "checkpoint.asynchronous=false", "kernels.experts=torch"],
        ["model.first_dense_layers=1", "optim.clip_norm=0", "metrics.tensorboard=true"],
    ],
    ids=lambda settings: settings[0],
)
def test_options_train(tmp_path: Path, data_folder: Path, settings: list[str]) -> None:
    run(make_config(tmp_path / "run", data_folder, *settings))
    recorded = metrics(tmp_path / "run")
    assert recorded[8]["heldout/loss"] < recorded[4]["heldout/loss"] < recorded[1]["loss_metrics/global_avg_loss"]


def test_going_on_from_an_earlier_step_leaves_the_old_course(tmp_path: Path, data_folder: Path) -> None:
    run(make_config(tmp_path / "run", data_folder))
    checkpoints = tmp_path / "run" / "checkpoints"
    run(
        make_config(
            tmp_path / "run", data_folder, f"checkpoint.resume={checkpoints / 'step-00000006'}", "train.steps=7"
        )
    )
    assert {path.name for path in checkpoints.iterdir()} >= {"step-00000007", "step-00000008.superseded"}
    run(make_config(tmp_path / "run", data_folder))  # auto: from step 7 of the new course
    assert list(metrics(tmp_path / "run")) == list(range(1, 9))
    assert (checkpoints / "step-00000008").is_dir()


def test_a_run_folder_that_is_a_file(tmp_path: Path, data_folder: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(UserError, match="is a file, not a folder"):
        train(make_config(tmp_path / "run", data_folder))


def test_two_runs_do_not_share_a_folder(tmp_path: Path, data_folder: Path) -> None:
    config = make_config(tmp_path / "run", data_folder)
    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another run is using this folder"):
            train(config)
    run(config)


def test_a_request_that_arrives_twice_is_one_request(
    tmp_path: Path, data_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer._step

    def stop_twice(self: Trainer, batches: Any) -> None:
        if self.progress.step == 2:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
        original(self, batches)

    monkeypatch.setattr(Trainer, "_step", stop_twice)
    run(make_config(tmp_path / "run", data_folder))
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert max(metrics(tmp_path / "run")) == 3


@pytest.mark.parametrize("seed", [20_240_501, 2**63 - 1])
def test_any_seed_that_the_config_accepts(tmp_path: Path, data_folder: Path, seed: int) -> None:
    settings = [f"train.seed={seed}", "router.jitter=0.1", "train.steps=2"]
    run(make_config(tmp_path / "run", data_folder, *settings))


def test_resuming_says_what_changed(tmp_path: Path, data_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(make_config(tmp_path / "run", data_folder, "train.steps=3"))
    run(make_config(tmp_path / "run", data_folder, "train.steps=4", "train.seed=5", "metrics.console=plain"))
    printed = capsys.readouterr()
    assert "train.seed = 5 (was 0)" in printed.out + printed.err
    assert (printed.out + printed.err).count(" (was ") == 2  # the number of steps is the other
    assert "reading the data from their beginning" in printed.out + printed.err
    saved = read_manifest(tmp_path / "run" / "checkpoints" / "step-00000004").progress
    assert saved["samples"] == 512 // 32


def test_profile_after_a_resume_counts_from_the_first_step(tmp_path: Path, data_folder: Path) -> None:
    run(make_config(tmp_path / "run", data_folder, "train.steps=3"))
    settings = ["train.profile.start=5", "train.profile.steps=1", "train.steps=7"]
    run(make_config(tmp_path / "run", data_folder, *settings))
    with gzip.open(tmp_path / "run" / "profile" / "rank0.json.gz") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"] if "ProfilerStep" in event.get("name", "")}
    assert names == {"ProfilerStep#1"}  # counted from the step after the resume, 4: this is step 5


@pytest.mark.parametrize("split", ["dp", "tp"])
def test_a_run_of_two_ranks_is_scored_by_one(tmp_path: Path, data_folder: Path, split: str) -> None:
    topology = [f"parallel.{split}=2", "parallel.ep=2"]
    values = dataclasses.asdict(make_config(tmp_path, data_folder, *topology, "train.steps=2"))
    run_ranks(2, train_topologies, values, [(str(tmp_path / "run"), [])], [free_port()])
    assert evaluate_command(str(tmp_path / "run"), [], str(tmp_path / "score.json")) == 0
    score = json.loads((tmp_path / "score.json").read_text())
    assert score["heldout/loss"] == pytest.approx(metrics(tmp_path / "run")[2]["heldout/loss"], rel=5e-6)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path, data_folder: Path) -> None:
    run(make_config(tmp_path / "run", data_folder, "train.steps=2"))
    with pytest.raises(CheckpointError, match="model\\.expert_dim"):
        train(make_config(tmp_path / "run", data_folder, "model.expert_dim=64"))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_changes_no_number(tmp_path: Path, data_folder: Path, mode: str) -> None:
    settings = ["router.jitter=0.1", "router.capacity_factor=1.0", "train.steps=3"]
    run(make_config(tmp_path / "none", data_folder, *settings))
    run(make_config(tmp_path / mode, data_folder, *settings, f"train.activation_checkpointing.mode={mode}"))
    assert numbers(tmp_path / mode) == numbers(tmp_path / "none")


def test_profile_records_the_steps_asked_for(tmp_path: Path, data_folder: Path) -> None:
    settings = ["train.profile.start=3", "train.profile.steps=2", "train.steps=6"]
    run(make_config(tmp_path / "run", data_folder, *settings))
    with gzip.open(tmp_path / "run" / "profile" / "rank0.json.gz") as file:
        names = {event["name"] for event in json.load(file)["traceEvents"] if "ProfilerStep" in event.get("name", "")}
    assert names == {"ProfilerStep#2", "ProfilerStep#3"}  # counted from 0


def test_document_mask_keeps_documents_apart(tmp_path: Path, data_folder: Path) -> None:
    """What stands before the end of a document does not change the scores after it; without the mask it does."""
    from moetrain.model import Decoder

    config = make_config(tmp_path, data_folder)
    model = Decoder(config)
    model.initialize(0)
    model.eval()
    tokens = torch.randint(0, 256, (1, 12))
    documents = torch.tensor([[0] * 5 + [1] * 7])
    changed = tokens.clone()
    changed[0, :5] = (changed[0, :5] + 1) % 256
    with torch.no_grad():
        masked = [model(t, documents)[0][0, 5:] for t in (tokens, changed)]
        plain = [model(t)[0][0, 5:] for t in (tokens, changed)]
    torch.testing.assert_close(masked[0], masked[1])
    assert not torch.allclose(plain[0], plain[1])


# ---------------------------------------------------------------------------------------------------- several ranks


def train_topologies(values: dict[str, Any], topologies: list[tuple[str, list[str]]], ports: list[int]) -> None:
    """One process of four: a run for each topology, in its own process group."""
    for (name, overrides), port in zip(topologies, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        train(from_dict(values, [f"run.dir={name}", *overrides]))


def test_losses_and_gradient_norms_do_not_depend_on_the_topology(tmp_path: Path, data_folder: Path) -> None:
    """EP = 1, 2 and 4, and TP = 2, on four ranks, and one rank, ten steps from one checkpoint: equal to float32's
    rounding."""
    seed = make_config(tmp_path / "seed", data_folder, "train.steps=1", "train.micro_batch=16", "metrics.every=1")
    run(seed)
    checkpoint = tmp_path / "seed" / "checkpoints" / "step-00000001"
    values = dataclasses.asdict(
        make_config(tmp_path, data_folder, "train.steps=11", f"checkpoint.resume={checkpoint}", "checkpoint.every=0")
    )
    run(from_dict(values, [f"run.dir={tmp_path / 'one'}", "train.micro_batch=16"]))
    topologies = [(str(tmp_path / f"ep{ep}"), [f"parallel.ep={ep}", "train.micro_batch=4"]) for ep in (1, 2, 4)]
    topologies.append((str(tmp_path / "tp2"), ["parallel.tp=2", "parallel.ep=4", "train.micro_batch=8"]))
    run_ranks(4, train_topologies, values, topologies, [free_port() for _ in topologies])
    expected = numbers(tmp_path / "one")
    assert list(expected) == list(range(2, 12))
    for folder, _ in topologies:
        for step, values_there in numbers(folder).items():
            assert values_there == pytest.approx(expected[step], rel=5e-6), (folder, step)
        assert ("moe/dispatch_bytes" in metrics(folder)[11]) == (not folder.endswith("ep1"))
        assert metrics(folder)[11]["heldout/loss"] == pytest.approx(
            metrics(tmp_path / "one")[11]["heldout/loss"], rel=5e-6
        )


def test_a_killed_rank_ends_the_run_and_the_same_command_finishes_it_bit_for_bit(
    tmp_path: Path, data_folder: Path
) -> None:
    overrides = ["train.steps=40", "train.micro_batch=8", "checkpoint.every=5", "eval.every=0", "parallel.ep=2"]
    config_file = tmp_path / "config.yaml"

    def command(folder: str) -> list[str]:
        config_file.write_text(to_yaml(make_config(tmp_path / folder, data_folder, *overrides)))
        return [
            sys.executable,
            "-m",
            "moetrain",
            "train",
            str(config_file),
            "--nproc",
            "2",
            f"run.dir={tmp_path / folder}",
        ]

    assert subprocess.run(command("whole"), timeout=120).returncode == 0

    process = subprocess.Popen(command("killed"), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 90
    while not list((tmp_path / "killed" / "checkpoints").glob("step-*[0-9]")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    workers = psutil.Process(process.pid).children(recursive=True)
    ranks = {worker.environ().get("RANK"): worker for worker in workers if worker.environ().get("RANK")}
    ranks["1"].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 137
    assert "rank 1" in errors
    assert "SIGKILL" in errors
    assert not any(worker.is_running() for worker in workers)
    assert max(metrics(tmp_path / "killed")) < 40

    assert subprocess.run(command("killed"), timeout=120).returncode == 0
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "whole")
    assert metrics(tmp_path / "killed")[40]["heldout/loss"] == metrics(tmp_path / "whole")[40]["heldout/loss"]
