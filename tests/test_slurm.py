"""The Slurm script with stand-ins for Slurm: two nodes that are launchers on this machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from processes import SMALL, environment, wait_until
from ranks import free_port

from moetrain.checkpoint import latest
from moetrain.launch import torchrun

SCRIPT = Path(torchrun.__file__).parent / "slurm" / "moetrain.sbatch"

SRUN = """#!/usr/bin/env bash
# One task a node, all here. A signal goes on to the tasks, as srun does it; the highest exit code is returned.
while [[ $1 == --* ]]; do shift; done
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    "$@" &
    tasks+=($!)
done
trap 'kill -USR1 "${tasks[@]}"' USR1
code=0
for task in "${tasks[@]}"; do
    while kill -0 "$task" 2>/dev/null; do
        wait "$task"
        last=$?
    done
    wait "$task" || last=$?
    ((last > code)) && code=$last
done
exit "$code"
"""

SCONTROL = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
if [[ $1 == show ]]; then
    printf '127.0.0.1\\n127.0.0.2\\n'
fi
"""


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job of two nodes."""
    for name, text in {"srun": SRUN, "scontrol": SCONTROL}.items():
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return environment() | {
        "PATH": f"{tmp_path / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_ID": str(free_port() % 10_000),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


def submit(arguments, environment):
    return subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_two_nodes_save_before_the_time_limit_and_queue_again(slurm, tmp_path, data_folder):
    folder = tmp_path / "run"
    job = submit([*SMALL, f"data.path={data_folder}", f"run.dir={folder}", "train.steps=100000", "--nproc", "1"], slurm)
    try:
        # Until both have done a step, and so listen.
        metrics = folder / "metrics.jsonl"
        wait_until(lambda: (metrics.exists() and metrics.stat().st_size > 0) or job.poll() is not None)
        job.send_signal(signal.SIGUSR1)
        out, _ = job.communicate(timeout=60)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
            job.communicate()
    assert job.returncode == 0, out
    assert "2 × cpu" in out, out
    assert "asked to stop: saved step" in out, out
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["show hostnames node[1-2]", f"requeue {slurm['SLURM_JOB_ID']}"]
    checkpoint = latest(folder / "checkpoints", checksums=True)
    assert checkpoint is not None
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert checkpoint.name == f"step-{last['step']:08}"


def test_a_run_that_fails_is_not_queued_again(slurm, tmp_path):
    job = submit(["tiny", "parallel.ep=3", "--nproc", "1"], slurm)
    out, _ = job.communicate(timeout=60)
    assert job.returncode == 2, out
    assert "parallel.ep" in out
    assert (tmp_path / "calls").read_text().splitlines() == ["show hostnames node[1-2]"]


def test_usage(slurm):
    job = submit([], slurm)
    out, _ = job.communicate(timeout=60)
    assert (job.returncode, out.split()[0]) == (2, "usage:")
