"""Real ranks for the faults: processes that a server forks which has imported all, so that a run takes seconds."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from moetrain import checkpoint_levels, checkpoint_shards, checkpoint_staging, rebalance
from moetrain.cli import main
from moetrain.placement.background import Found, Request, find

RANKS = 2
STEPS = 8
BLOCK_BYTES, FILE_BYTES = 1 << 16, 1 << 18
"""Of host memory and of a file: small, so that a checkpoint has many."""

TINY = [
    "tiny",
    "model.dim=32",
    "model.n_layers=2",
    "model.n_heads=2",
    "model.num_experts=8",
    "model.expert_dim=16",
    "router.bias_update_rate=0.01",
    "data.seq_len=32",
    "train.tokens_per_step=256",
    "train.micro_batch=2",
    f"train.steps={STEPS}",
    "optim.warmup_steps=2",
    "checkpoint.every=1",
    "checkpoint.keep_last=3",
    "checkpoint.host_memory_gib=0.0003",
    "eval.every=0",
    "eval.tokens=64",
    "metrics.every=1",
    "metrics.console=plain",
    "parallel.ep=2",
    "run.device=cpu",
    "run.timeout_minutes=0.15",
]


class Fault(Protocol):
    """What a rank does to itself; it must pickle."""

    def install(self, rank: int, logs: Path) -> None: ...


@dataclass(frozen=True)
class Ended:
    """A run that is over."""

    codes: tuple[int, ...]
    """Exit codes by rank; −n for signal n."""
    output: str
    faults: str
    """What the ranks say has happened to them; empty if nothing has."""
    stuck: tuple[int, ...]
    """Ranks that did not end by themselves."""
    seconds: float

    @property
    def succeeded(self) -> bool:
        return not self.stuck and not any(self.codes)


class Run:
    """`moetrain train` on several ranks, without a launcher that would end the others when one dies."""

    def __init__(
        self, logs: Path, overrides: Sequence[str], faults: Mapping[int, Sequence[Fault]] | None = None
    ) -> None:
        logs.mkdir(parents=True)
        self.logs = logs
        self._start = time.monotonic()
        port = get_free_port()
        self._ranks = [
            _context().Process(target=_rank, args=(rank, port, logs, [*TINY, *overrides], (faults or {}).get(rank, ())))
            for rank in range(RANKS)
        ]
        for rank in self._ranks:
            rank.start()

    def signal(self, number: int, ranks: Sequence[int] = range(RANKS)) -> None:
        """Send a signal to those that are alive."""
        for rank in ranks:
            process = self._ranks[rank]
            if process.is_alive() and process.pid is not None:
                os.kill(process.pid, number)

    def end(self, seconds: float, stopped: Sequence[int] = ()) -> Ended:
        """Wait for the ranks. Those that are `stopped` (SIGSTOP) are killed once the others have ended, as a launcher
        would."""
        deadline = time.monotonic() + seconds
        for number, rank in enumerate(self._ranks):
            if number not in stopped:
                rank.join(max(0.0, deadline - time.monotonic()))
        stuck = tuple(n for n, rank in enumerate(self._ranks) if rank.is_alive() and n not in stopped)
        for rank in self._ranks:
            if rank.is_alive():
                rank.kill()
            rank.join()
        output = "".join((self.logs / f"rank-{rank}.log").read_text() for rank in range(RANKS))
        faults = "".join(file.read_text() for file in sorted(self.logs.glob("fault-*")))
        codes = tuple(int(rank.exitcode or 0) for rank in self._ranks)
        return Ended(codes, output, faults.strip(), stuck, time.monotonic() - self._start)


def _context() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "moetrain.trainer", "moetrain.evaluate", "matplotlib.pyplot"])
    return context


def _rank(rank: int, port: int, logs: Path, arguments: Sequence[str], faults: Sequence[Fault]) -> None:
    output = os.open(logs / f"rank-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    (logs / f"pid-{rank}").write_text(str(os.getpid()))
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(RANKS),
        LOCAL_WORLD_SIZE=str(RANKS),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    for module in (checkpoint_shards, checkpoint_staging, checkpoint_levels):
        module.BLOCK_BYTES = BLOCK_BYTES  # type: ignore[attr-defined]
    checkpoint_shards.FILE_BYTES = FILE_BYTES
    rebalance.Search = _SearchHere  # type: ignore[assignment, misc]
    for fault in faults:
        fault.install(rank, logs)
    sys.exit(main(["train", *arguments]))


class _SearchHere:
    """A search for a placement that starts no process."""

    def __init__(self, request: Request) -> None:
        self._request = request

    def result(self) -> Found:
        return find(self._request)

    def close(self) -> None:
        """There is nothing to end."""


def losses(folder: Path) -> dict[int, tuple[float | None, ...]]:
    """Step → loss and gradient norm of a run."""
    found: dict[int, tuple[float | None, ...]] = {}
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        if "grad_norm" in record:
            found[record["step"]] = record["loss_metrics/global_avg_loss"], record["grad_norm"]
    return found


def processes_of(folder: Path) -> list[psutil.Process]:
    """What still works for the run in this folder."""
    everything = psutil.process_iter(["cmdline"])
    return [p for p in everything if any(str(folder) in word for word in p.info["cmdline"] or [])]
