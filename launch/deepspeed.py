"""Run a Python module in several processes, of this machine or of several, with DeepSpeed's launcher."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import torch

from moetrain.errors import ConfigError
from moetrain.launch.torchrun import SignalForwarder, exit_status, usable_cores


def run(arguments: list[str], nproc: int, *, hosts: tuple[tuple[str, int], ...] = (), module: str = "moetrain") -> int:
    """Run ``deepspeed --num_gpus nproc --module module arguments…``; on the CPU where there is no GPU.

    Signals go straight to the workers, which can then save and end by themselves (DeepSpeed's launcher would end
    them). Returns their exit code, 128 + n for a worker that died of signal n; DeepSpeed names the command that failed.

    With `hosts` (name, processes) the workers run there, reached by pdsh and ssh, in this folder; `nproc` is then the
    most on one host, which share its cores.
    SIGTERM and SIGINT then have DeepSpeed end them, unsaved, and SIGUSR1 is ignored: pdsh passes no signals on.
    ConfigError without pdsh.
    """
    if hosts and shutil.which("pdsh") is None:
        raise ConfigError("--hostfile: DeepSpeed reaches other machines by pdsh, which is not installed here")
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    with tempfile.TemporaryDirectory(prefix="moetrain-launch-") as folder:
        command = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
        command.append(f"--master_port={_free_port()}")  # of our own, so that two runs can coexist
        if hosts:
            hostfile = Path(folder, "hosts")
            hostfile.write_text("".join(f"{host} slots={slots}\n" for host, slots in hosts))
            command.append(f"--hostfile={hostfile}")
        else:
            command += _this_machine(environment, nproc)
        command += ["--no_local_rank", "--module", module, *arguments]
        return _run(command, environment, remote=len(hosts) > 1)


def _this_machine(environment: dict[str, str], nproc: int) -> list[str]:
    """Options for `nproc` processes here, whatever a host file of the cluster says; may change the environment."""
    options = [f"--hostfile={os.devnull}"]
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    if visible and torch.cuda.is_available():
        # With --num_gpus the launcher would count from GPU 0 and ignore the choice.
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(visible.split(",")[:nproc])
        return options
    return [*options, f"--num_gpus={nproc}"]


def _run(command: list[str], environment: dict[str, str], remote: bool) -> int:
    """Run DeepSpeed's runner with signals passed on; its exit code as a shell has it."""
    previous = signal.signal(signal.SIGUSR1, signal.SIG_IGN) if remote else None  # the runner inherits it
    # In a session of its own, so that Ctrl-C reaches the workers through the forwarder and not DeepSpeed's launchers.
    process = subprocess.Popen(command, env=environment, start_new_session=True)
    if previous is not None:
        signal.signal(signal.SIGUSR1, previous)
    with SignalForwarder(lambda: _listeners(process.pid, remote)) as forwarder:
        try:
            returncode = process.wait()
        except SystemExit:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if forwarder.killed_by is not None:
        return 128 + forwarder.killed_by
    # A worker's −n (there are 64 signals) has become 256 − n on its way through two launchers.
    return exit_status(returncode - 256 if returncode >= 192 else returncode)


def _listeners(runner: int, remote: bool) -> list[psutil.Process]:
    """Who gets the signals: the workers, whom DeepSpeed's runner starts through a launcher, or the runner itself."""
    try:
        process = psutil.Process(runner)
        return [process] if remote else [worker for launcher in process.children() for worker in launcher.children()]
    except psutil.NoSuchProcess:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
