"""Real ranks for tests: processes of one gloo group on this machine."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing

from moetrain.parallel import destroy_mesh


def run_ranks(size: int, function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` in `size` processes that find one another through the environment.

    The first exception of any of them is raised here. `function` must be importable (a module's top level).
    """
    # A server that has imported torch once, from which ranks fork, saves seconds a rank.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["pytest", "moetrain.trainer"])
    torch.multiprocessing.start_processes(
        _rank, (size, free_port(), function, arguments), nprocs=size, start_method="forkserver"
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _rank(rank: int, size: int, port: int, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    function(*arguments)
    destroy_mesh()
