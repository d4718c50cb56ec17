"""What a command line starts: by which launcher, how many processes on how many nodes."""

from __future__ import annotations

import argparse
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moetrain.config import CheckpointConfig
from moetrain.errors import ConfigError

Launcher = Literal["torchrun", "deepspeed", "none"]


@dataclass(frozen=True)
class Processes:
    """`per_node` processes on each of `nodes` machines; launcher "none": this process does the work."""

    launcher: Launcher
    per_node: int
    nodes: int = 1
    endpoint: str | None = None
    """HOST:PORT at which torchrun's agents meet; None: one node."""
    run_id: str | None = None
    """Tells the agents of this run from others that meet there."""
    hosts: tuple[tuple[str, int], ...] = ()
    """Machines of a DeepSpeed host file with their processes; (): this machine."""
    max_restarts: int = 0

    @property
    def world_size(self) -> int:
        return sum(slots for _, slots in self.hosts) or self.per_node * self.nodes


def add_launch_arguments(parser: argparse.ArgumentParser, *, restarts: bool) -> None:
    """The options that :func:`choose_processes` reads; `restarts`: also --max-restarts."""
    group = parser.add_argument_group("processes")
    group.add_argument(
        "--nproc",
        type=_nproc,
        metavar="N",
        help="processes on this machine, or on each of --nnodes; auto: one a GPU, or on a CPU 2 where there are two "
        "cores (default: 1; with --launcher, --nnodes or --hostfile, auto)",
    )
    group.add_argument(
        "--launcher",
        choices=["torchrun", "deepspeed", "none"],
        help="what starts the processes (default: torchrun for more than one, else none). Not needed under torchrun or "
        "deepspeed: the command then joins the processes that they started",
    )
    group.add_argument(
        "--nnodes",
        type=positive,
        default=1,
        metavar="N",
        help="machines; give the same command on each (torchrun; default: %(default)s)",
    )
    group.add_argument(
        "--rdzv-endpoint", metavar="HOST:PORT", help="one of these machines, and a free port there, where they meet"
    )
    group.add_argument(
        "--rdzv-id", metavar="ID", help="tells this run from another that meets there (default: moetrain)"
    )
    group.add_argument(
        "--hostfile",
        metavar="F",
        help="machines to reach by pdsh and ssh, a line 'HOST slots=N' each, from which this one command starts all "
        "(deepspeed)",
    )
    if restarts:
        group.add_argument(
            "--max-restarts",
            type=_count,
            default=0,
            metavar="N",
            help="start all processes again from the last checkpoint, up to N times, when one fails "
            "(torchrun; default: %(default)s)",
        )


def positive(text: str) -> int:
    """argparse type of a number from 1 on."""
    return _number(text, 1, "a positive number")


def _count(text: str) -> int:
    return _number(text, 0, "a number from 0 on")


def _number(text: str, least: int, what: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return int(text)


def _nproc(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else positive(text)


def is_worker() -> bool:
    """Whether a launcher (torchrun, DeepSpeed, a Slurm script) started this process as one of several."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_processes(arguments: argparse.Namespace, device: str) -> Processes:
    """What the options ask for, `device` being the config's run.device; ConfigError if they contradict one another."""
    if is_worker():
        return _already_started(arguments)
    max_restarts = getattr(arguments, "max_restarts", 0)
    launcher, nproc, nodes = arguments.launcher, arguments.nproc, arguments.nnodes
    if launcher is None:
        if arguments.hostfile is not None:
            launcher = "deepspeed"
        elif nodes > 1 or max_restarts > 0:
            launcher = "torchrun"
    for option, given, needed in (
        ("--hostfile", arguments.hostfile is not None, "deepspeed"),
        ("--nnodes", nodes > 1, "torchrun"),
        ("--rdzv-endpoint", arguments.rdzv_endpoint is not None, "torchrun"),
        ("--rdzv-id", arguments.rdzv_id is not None, "torchrun"),
        ("--max-restarts", max_restarts > 0, "torchrun"),
    ):
        if given and launcher not in (needed, None):
            raise ConfigError(f"{option}: needs --launcher {needed}, got {launcher}")
    if (nodes > 1) != (arguments.rdzv_endpoint is not None):
        raise ConfigError("--nnodes, --rdzv-endpoint: several nodes need both, one node needs neither")
    if arguments.rdzv_id is not None and nodes == 1:
        raise ConfigError("--rdzv-id: only several nodes meet somewhere; give --nnodes and --rdzv-endpoint too")
    if nodes > 1:
        _check_endpoint(arguments.rdzv_endpoint)

    if arguments.hostfile is not None:
        hosts = read_hostfile(Path(arguments.hostfile), nproc if isinstance(nproc, int) else None)
        return Processes("deepspeed", per_node=max(slots for _, slots in hosts), hosts=hosts)
    if nproc is None:
        nproc = 1 if launcher in (None, "none") else "auto"
    if nproc == "auto":
        nproc = _auto_nproc(device)
    if launcher == "none" and nproc > 1:
        raise ConfigError(f"--nproc {nproc}: --launcher none runs in this process only")
    if launcher is None:
        launcher = "torchrun" if nproc > 1 else "none"
    return Processes(
        launcher,
        per_node=nproc,
        nodes=nodes,
        endpoint=arguments.rdzv_endpoint,
        run_id=(arguments.rdzv_id or "moetrain") if nodes > 1 else None,
        max_restarts=max_restarts,
    )


def _already_started(arguments: argparse.Namespace) -> Processes:
    world_size = os.environ["WORLD_SIZE"]
    asked = (
        arguments.nproc is not None
        or arguments.launcher not in (None, "none")
        or arguments.nnodes > 1
        or getattr(arguments, "max_restarts", 0) > 0
        or not all(option is None for option in (arguments.hostfile, arguments.rdzv_endpoint, arguments.rdzv_id))
    )
    if asked:
        raise ConfigError(
            "--nproc, --launcher, --nnodes, --rdzv-endpoint, --rdzv-id, --hostfile, --max-restarts: a launcher has "
            f"already started this process (WORLD_SIZE={world_size} is set)"
        )
    if not world_size.isascii() or not world_size.isdigit() or int(world_size) == 0:
        raise ConfigError(f"WORLD_SIZE = {world_size!r} in the environment: must be a positive number")
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    return Processes("none", per_node=int(world_size), max_restarts=int(restarts))


def check_restarts(processes: Processes, checkpoint: CheckpointConfig) -> None:
    """Refuse restarts that would fail (resume = never) or throw away what was trained since (a path)."""
    if processes.max_restarts == 0 or checkpoint.resume == "auto":
        return
    if checkpoint.resume == "never":
        reason = "a restart finds the checkpoints of its own run and never forbids to go on from them"
    else:
        reason = "every restart would begin there again and set aside what was trained since"
    raise ConfigError(
        f"checkpoint.resume = {checkpoint.resume} with --max-restarts {processes.max_restarts}: {reason}; use "
        "checkpoint.resume=auto, or no restarts"
    )


def read_hostfile(file: Path, slots: int | None = None) -> tuple[tuple[str, int], ...]:
    """Hosts and processes of a DeepSpeed host file, `slots` on each if given; ConfigError names the line."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(f"--hostfile {file}: {error.strerror}") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        entry = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)\s*(#.*)?", line.strip())
        if entry is None or entry[1] in hosts:
            problem = "expected 'HOST slots=N'" if entry is None else "this host stands there twice"
            raise ConfigError(f"--hostfile {file}, line {number}: {line.strip()!r}: {problem}")
        hosts[entry[1]] = int(entry[2]) if slots is None else slots
    if not hosts:
        raise ConfigError(f"--hostfile {file}: names no host; write a line 'HOST slots=N' for each")
    return tuple(hosts.items())


def _check_endpoint(endpoint: str) -> None:
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--rdzv-endpoint {endpoint}: expected HOST:PORT, with a port from 1 to 65535")


def _auto_nproc(device: str) -> int:
    import torch

    from moetrain.launch.torchrun import usable_cores

    gpus = 0 if device == "cpu" else torch.cuda.device_count()
    return gpus or min(2, usable_cores())


def start(processes: Processes, command: list[str], device: str) -> int:
    """Run ``moetrain command…`` in these processes; returns the exit code. ConfigError where GPUs are missing."""
    import torch

    from moetrain.launch import deepspeed, torchrun

    if processes.hosts:  # whose GPUs their ranks will count
        return deepspeed.run(command, processes.per_node, hosts=processes.hosts)
    gpus = torch.cuda.device_count()
    if device == "cuda" and gpus == 0:
        raise ConfigError("run.device = cuda: there is no GPU here")
    if device != "cpu" and 0 < gpus < processes.per_node:
        raise ConfigError(
            f"--nproc {processes.per_node}: more than the {gpus} GPUs here; use run.device=cpu for more processes"
        )
    if processes.launcher == "deepspeed":
        return deepspeed.run(command, processes.per_node)
    return torchrun.run(
        command,
        processes.per_node,
        nodes=processes.nodes,
        endpoint=processes.endpoint,
        run_id=processes.run_id,
        max_restarts=processes.max_restarts,
    )
