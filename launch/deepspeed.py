"""Run a Python module in several processes of this machine with DeepSpeed's launcher."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import psutil
import torch

from moetrain.launch.torchrun import SignalForwarder, exit_status, usable_cores


def run(arguments: list[str], nproc: int, module: str = "moetrain") -> int:
    """Run ``deepspeed --num_gpus nproc --module module arguments…``; on the CPU where there is no GPU.

    Signals go straight to the workers, which can then save and end by themselves (DeepSpeed's launcher would end
    them). Returns their exit code, 128 + n for a worker that died of signal n; DeepSpeed names the command that failed.
    """
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    # This machine only, whatever a host file of the cluster says; a port of our own, so that two runs can coexist.
    command += [f"--hostfile={os.devnull}", f"--master_port={_free_port()}"]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible and torch.cuda.is_available():
        # With --num_gpus the launcher would count from GPU 0 and ignore the choice.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:nproc])
    else:
        command.append(f"--num_gpus={nproc}")
    command += ["--no_local_rank", "--module", module, *arguments]

    # In a session of its own, so that Ctrl-C reaches the workers through the forwarder and not DeepSpeed's launchers.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    with SignalForwarder(lambda: _workers(process.pid)) as forwarder:
        try:
            returncode = process.wait()
        except SystemExit:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if forwarder.killed_by is not None:
        return 128 + forwarder.killed_by
    # A worker's −n (there are 64 signals) has become 256 − n on its way through two launchers.
    return exit_status(returncode - 256 if returncode >= 192 else returncode)


def _workers(runner: int) -> list[psutil.Process]:
    """DeepSpeed's runner starts a launcher, and that starts the workers."""
    try:
        return [worker for launcher in psutil.Process(runner).children() for worker in launcher.children()]
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
