"""Real runs in which one rank dies, raises, hangs or is configured otherwise: who says what, and what is left."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from processes import SMALL, environment, wait_until
from ranks import free_port
from torch.distributed import HashStore

from moetrain.checkpoint import latest, verify
from moetrain.errors import ConfigError, PeerError
from moetrain.parallel import create_mesh, destroy_mesh, watchdog
from moetrain.parallel.watchdog import Watchdog

LAUNCH = (
    "import sys; from moetrain.launch import torchrun; "
    "sys.exit(torchrun.run(sys.argv[1:], {}, module='faults.launched'))"
)


on_every_backend = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu2)])


class Run:
    """A run of eight steps with a checkpoint every three, by one launcher a node on this machine."""

    def __init__(self, folder, data, fault, *overrides, options=("2",)):
        self.folder = folder
        self.out = folder.with_suffix(".out")
        arguments = ["train", *SMALL, f"data.path={data}", f"run.dir={folder}", "train.steps=8", *overrides]
        arguments.append("checkpoint.asynchronous=false")  # saved before the fault
        path = f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}"
        self.launchers = [
            subprocess.Popen(
                [sys.executable, "-c", LAUNCH.format(launch), *arguments],
                env=environment() | {"FAULT": fault, "PYTHONPATH": path},
                stdout=self.out.open("w"),
                stderr=subprocess.PIPE,
                text=True,
            )
            for launch in options
        ]

    def end(self):
        """(exit code, stderr) of each launcher, of which nothing must be left."""
        try:
            errors = [launcher.communicate(timeout=90)[1] for launcher in self.launchers]
        finally:
            left = self.processes()
            for process in left:
                process.send_signal(signal.SIGKILL)
            for launcher in self.launchers:
                launcher.communicate()
        assert left == []
        return [(launcher.returncode, error) for launcher, error in zip(self.launchers, errors, strict=True)]

    def processes(self):
        """Launchers and workers that run."""
        everything = psutil.process_iter(["cmdline", "status"])
        mine = [process for process in everything if f"run.dir={self.folder}" in (process.info["cmdline"] or [])]
        return [process for process in mine if process.info["status"] != psutil.STATUS_ZOMBIE]

    def saved_step(self):
        """Of the newest checkpoint, which must be whole."""
        checkpoint = latest(self.folder / "checkpoints", checksums=True)
        assert checkpoint is not None
        assert verify(checkpoint) == []
        return int(checkpoint.name.removeprefix("step-"))

    def losses(self):
        """Step → loss; a step that was done again counts the last time."""
        records = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        name = "loss_metrics/global_avg_loss"
        return {record["step"]: record[name] for record in records if name in record}


@on_every_backend
def test_an_error_of_one_rank_ends_the_others_and_is_told(device, tmp_path, data_folder):
    run = Run(tmp_path / "run", data_folder, "raise:1:5", f"run.device={device}")
    [(code, error)] = run.end()
    assert code == 1
    assert re.fullmatch(
        r"moetrain: rank 1 \(pid \d+\) failed with exit code 1: RuntimeError: the disk is on fire", last_line(error)
    )
    assert run.saved_step() == 3


@on_every_backend
def test_a_rank_that_hangs_is_named(device, tmp_path, data_folder):
    seconds = 30 if device == "cuda" else 3  # of which compiling kernels takes some
    run = Run(tmp_path / "run", data_folder, "hang:1:5", f"run.timeout_minutes={seconds / 60}", f"run.device={device}")
    [(code, error)] = run.end()
    assert code == PeerError.exit_code, error
    message = (
        rf"no progress for {seconds} seconds \(run\.timeout_minutes\): waiting for rank 1 in launched\.py:\d+ "
        r"\(fail\), last begun: step 4; meanwhile rank 0 in \w+\.py:\d+ \(\w+\), last begun: step 5"
    )
    told, reported = error.splitlines()
    assert re.fullmatch(rf"moetrain: error: rank [01]: {message}", told)
    assert re.fullmatch(rf"moetrain: rank [01] \(pid \d+\) failed with exit code 75: PeerError: {message}", reported)
    assert run.saved_step() == 3


@on_every_backend
def test_a_rank_that_is_killed_is_named(device, tmp_path, data_folder):
    run = Run(tmp_path / "run", data_folder, "kill:1:5", f"run.device={device}")
    [(code, error)] = run.end()
    assert code == 137
    assert re.fullmatch(r"moetrain: rank 1 \(pid \d+\) was killed by SIGKILL .*", last_line(error))
    assert run.saved_step() == 3


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_on_one_of_two_nodes(rank, tmp_path, data_folder):
    endpoint = f"127.0.0.1:{free_port()}"
    node = f"1, nodes=2, endpoint='{endpoint}', run_id='test'"
    run = Run(tmp_path / "run", data_folder, f"kill:{rank}:5", "run.timeout_minutes=0.05", options=(node, node))
    ended = run.end()
    killed, left = ended if ended[0][0] == 137 else reversed(ended)
    assert killed[0] == 137, ended
    assert re.fullmatch(rf"moetrain: rank {rank} \(pid \d+\) was killed by SIGKILL .*", last_line(killed[1]))
    reasons = [(75, f": PeerError: rank {rank} does not answer, having died, been stopped or lost the network")]
    if rank == 0:  # with the launcher of rank 0 the store goes
        reasons += [
            (75, ": PeerError: the process that held the ranks' store has ended: rank 0, or its launcher or node")
        ]
    # If that launcher was the one at the endpoint, the other launcher cannot go on.
    reasons += [(1, f"moetrain: the launcher at {endpoint} has ended; its output says why")]
    assert any(code == left[0] and reason in last_line(left[1]) for code, reason in reasons), ended
    assert run.saved_step() == 3


def test_a_restart_goes_on_from_the_last_checkpoint(tmp_path, data_folder):
    run = Run(tmp_path / "run", data_folder, "kill:0:5:once", options=("2, max_restarts=2",))
    [(code, error)] = run.end()
    assert code == 0, error
    assert re.search(
        r"moetrain: rank 0 \(pid \d+\) was killed by SIGKILL .*; all ranks start again \(restart 1 of 2\)\n", error
    )
    assert run.saved_step() == 8
    assert f"resumed from {run.folder / 'checkpoints' / 'step-00000003'}" in run.out.read_text()
    assert list(run.losses()) == list(range(1, 9))


def test_ranks_with_different_configs_do_not_start(tmp_path, data_folder):
    run = Run(tmp_path / "run", data_folder, "config:1:0")
    [(code, error)] = run.end()
    assert code == ConfigError.exit_code
    assert error.splitlines()[0] == (
        "moetrain: error: the ranks differ: optim.lr = 0.003 (rank 0), 0.5 (rank 1); give the same config and "
        "overrides on every node"
    )
    assert not run.folder.exists()


def last_line(text):
    return text.splitlines()[-1]


# A watchdog of rank 0 alone, with a rank 1 that exists only in the store.


@pytest.fixture
def ended(monkeypatch):
    """What the watchdog ended its process with, instead of ending it: set when it did."""
    event = threading.Event()

    def end(code):
        event.code = code
        event.set()
        threading.Event().wait()  # like a process that ends, it does nothing more

    monkeypatch.setattr(os, "_exit", end)
    return event


@pytest.fixture
def watch():
    mesh = replace(create_mesh(device="cpu"), world_size=2)
    made = []

    def start(limit_seconds):
        made.append(Watchdog(HashStore(), mesh, limit_seconds))
        return made[-1]

    yield start
    for dog in made:
        dog._closed.set()
    destroy_mesh()


def test_a_rank_that_does_not_answer(watch, ended, capfd):
    watch(0.4)
    assert ended.wait(10)
    assert ended.code == PeerError.exit_code
    error = capfd.readouterr().err
    assert "no progress for 0.4 seconds (run.timeout_minutes): rank 1 does not answer" in error


def test_progress_and_pauses_are_not_stuck(watch, ended):
    dog = watch(0.4)
    for _ in range(15):
        dog.moved("step")
        assert not ended.wait(0.1)
    with dog.paused():
        assert not ended.wait(1.5)
    assert ended.wait(10)


def test_the_error_that_another_rank_brought_about(watch):
    dog = watch(8.0)
    broken = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    peer = dog.explain(broken)
    assert str(peer).startswith("rank 1 does not answer")


def test_a_store_that_does_not_answer_holds_nobody_up(watch):
    """Its process is stopped, not dead: calls of it return never, and raise nothing."""
    dog = watch(0.8)
    for_ever = threading.Event().wait
    dog._store = SimpleNamespace(set=lambda *_: for_ever(), check=lambda *_: for_ever(), compare_set=pytest.fail)
    wait_until(dog._store_is_silent)
    start = time.monotonic()
    peer = dog.explain(RuntimeError("[gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 39000ms"))
    assert str(peer).startswith("the process that holds the ranks' store does not answer: rank 0, or its launcher")
    dog.close()
    assert time.monotonic() - start < 5


def test_an_error_of_its_own_is_told_to_the_others(watch):
    dog = watch(8.0)
    assert dog.explain(ValueError("of mine")) is None
    assert dog._verdict() == "rank 0 failed: ValueError: of mine"


def test_without_other_ranks_there_is_no_watchdog():
    watchdog.moved("step 1")
    with watchdog.paused(), watchdog.watched(None, None, 1.0):
        assert watchdog._watchdog is None
