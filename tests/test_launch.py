"""Real launches of a throw-away worker module: exit codes, signals, and that nothing outlives a launcher."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from processes import wait_until
from ranks import free_port

from moetrain.launch import torchrun

WORKER = '''
"""worker.py MODE FOLDER: each rank leaves its process id in FOLDER and then does as MODE says."""
import os, signal, sys, time
from pathlib import Path

mode, folder = sys.argv[1:]
rank = os.environ["RANK"]


def leave_id():
    written = Path(folder, rank + ".partial")
    written.write_text(str(os.getpid()))
    written.rename(Path(folder, rank))


def stop(number, frame):
    Path(folder, f"stopped-{rank}").write_text(signal.Signals(number).name)
    sys.exit(0)


def main():
    if mode == "reduce":
        import torch
        from moetrain.parallel.mesh import create_mesh, destroy_mesh

        mesh = create_mesh(device="cpu")
        total = torch.tensor([mesh.rank + 1.0])
        torch.distributed.all_reduce(total)
        destroy_mesh()
        line = f"rank {mesh.rank} of {mesh.world_size}: {total.item()} {os.environ['OMP_NUM_THREADS']}"
        sys.stdout.write(line + "\\n")
        sys.stdout.flush()
    if mode == "orphan":
        from moetrain.launch.torchrun import end_with_launcher

        end_with_launcher()
    if mode == "reduce":
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, stop)
    if mode == "stubborn":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    leave_id()
    while not (Path(folder, "0").exists() and Path(folder, "1").exists()):
        time.sleep(0.01)
    if mode == "code" and rank == "1":
        sys.exit(2)
    if mode == "error" and rank == "1":
        raise RuntimeError("the disk is on fire\\nand more")
    if mode == "killed" and rank == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(120)


if mode == "error":
    from torch.distributed.elastic.multiprocessing.errors import record

    main = record(main)
main()
'''

LAUNCH = """
import sys
from moetrain.launch import {0}
sys.exit({0}.run(sys.argv[1:], {1}, module='worker'))
"""

PDSH = """#!/usr/bin/env bash
# pdsh -S -f N -w HOST,HOST COMMAND…, where every host is this machine.
IFS=, read -ra hosts <<<"$5"
shift 5
for node in "${!hosts[@]}"; do
    bash -c "${*//%n/$node}" &
    tasks+=($!)
done
code=0
for task in "${tasks[@]}"; do
    wait "$task" || code=$?
done
exit "$code"
"""


class Launch:
    """A launcher process with two workers."""

    def __init__(self, folder: Path, mode: str, launcher: str = "torchrun", options: str = "2") -> None:
        (folder / "worker.py").write_text(WORKER)
        self.folder = folder
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LAUNCH.format(launcher, options), mode, str(folder)],
            env=environment | {"PYTHONPATH": str(folder)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def workers(self) -> list[int]:
        """The workers' process ids, once both run."""
        files = [self.folder / "0", self.folder / "1"]
        wait_until(lambda: all(file.exists() for file in files) or self.process.poll() is not None)
        return [int(file.read_text()) for file in files]

    def end(self) -> tuple[int, str, str]:
        """Exit code, stdout and stderr."""
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def launch(tmp_path):
    launches = []

    def start(mode: str, launcher: str = "torchrun", options: str = "2") -> Launch:
        launches.append(Launch(tmp_path, mode, launcher, options))
        return launches[-1]

    yield start
    for launched in launches:
        launched.process.kill()
        launched.process.communicate()
    for pid in [int(file.read_text()) for file in tmp_path.glob("[01]")]:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)
            pytest.fail(f"worker {pid} outlived its launcher")


@pytest.mark.parametrize(("launcher", "number"), [("torchrun", signal.SIGUSR1), ("deepspeed", signal.SIGTERM)])
def test_workers_find_each_other_and_end_well_on_a_signal(launch, launcher, number):
    launched = launch("reduce", launcher)
    launched.workers()
    launched.process.send_signal(number)
    code, out, err = launched.end()
    assert (code, err) == (0, "")
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    assert sorted(out.splitlines()) == [f"rank {rank} of 2: 3.0 {threads}" for rank in range(2)]
    assert [(launched.folder / f"stopped-{rank}").read_text() for rank in range(2)] == [number.name] * 2


@pytest.mark.parametrize(
    ("mode", "code", "line"),
    [
        ("code", 2, r"moetrain: rank 1 \(pid (\d+)\) failed with exit code 2"),
        ("error", 1, r"moetrain: rank 1 \(pid (\d+)\) failed with exit code 1: RuntimeError: the disk is on fire"),
        ("killed", 137, r"moetrain: rank 0 \(pid (\d+)\) was killed by SIGKILL .*"),
    ],
)
def test_failure_names_the_rank_and_ends_the_others(launch, mode, code, line):
    launched = launch(mode)
    returned, out, err = launched.end()
    assert returned == code
    assert out == ""
    last = err.splitlines()[-1]
    found = re.fullmatch(line, last)
    assert found, err
    pids = launched.workers()
    assert int(found[1]) == pids[0 if mode == "killed" else 1]
    assert len(err.splitlines()) == 1 or mode == "error"  # that worker prints its own traceback
    assert not any(map(is_running, pids))


def test_second_signal_kills(launch):
    launched = launch("stubborn")
    pids = launched.workers()
    launched.process.send_signal(signal.SIGINT)
    time.sleep(0.1)
    launched.process.send_signal(signal.SIGINT)  # too soon to be another request
    time.sleep(2 * torchrun.REPEAT_SECONDS)
    assert all(map(is_running, pids))
    launched.process.send_signal(signal.SIGINT)
    assert launched.end() == (130, "", "moetrain: killed by a second SIGINT\n")
    assert not any(map(is_running, pids))


def test_workers_die_with_a_killed_launcher(launch):
    launched = launch("orphan")
    pids = launched.workers()
    launched.process.kill()
    wait_until(lambda: not any(map(is_running, pids)), seconds=5)


def test_deepspeed_returns_the_workers_exit_code(launch):
    code, _, err = launch("killed", "deepspeed").end()
    assert code == 137, err


def test_deepspeed_on_two_hosts(launch, tmp_path, monkeypatch):
    for name, text in {"pdsh": PDSH, "ssh": "#!/bin/sh\necho 127.0.0.1\n"}.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    launched = launch("reduce", "deepspeed", "1, hosts=(('here', 1), ('there', 1))")
    for pid in launched.workers():
        os.kill(pid, signal.SIGTERM)
    code, out, err = launched.end()
    assert (code, err) == (0, "")
    expected = [f"rank {rank} of 2: 3.0 {len(os.sched_getaffinity(0))}" for rank in range(2)]
    lines = [line for line in sorted(out.splitlines()) if line.startswith("rank")]
    assert [line[: len(expected[0])] for line in lines] == expected


def test_nodes_that_do_not_meet(monkeypatch, capsys):
    monkeypatch.setattr(torchrun, "JOIN_SECONDS", 1)
    endpoint = f"127.0.0.1:{free_port()}"
    assert torchrun.run([], 1, nodes=2, endpoint=endpoint, run_id="test") == 1
    line = capsys.readouterr().err
    assert line.startswith(f"moetrain: rendezvous at {endpoint}: 2 nodes have not met (RendezvousTimeoutError")
    assert line.count("\n") == 1
