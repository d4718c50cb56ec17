"""Run a Python module in several processes with torchrun's elastic agent, one agent on each machine.

The workers write straight to this process's stdout and stderr. SIGTERM, SIGINT and SIGUSR1 are passed on to them, so
that they can save and end by themselves; a second SIGTERM or SIGINT kills them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

import psutil
from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousClosedError, RendezvousError, RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from moetrain.errors import PeerError

PARENT_PID = "MOETRAIN_PARENT_PID"
JOIN_SECONDS = 600
"""How long the agents of several nodes wait for one another."""
PR_SET_PDEATHSIG = 1


def run(
    arguments: list[str],
    nproc: int,
    *,
    nodes: int = 1,
    endpoint: str | None = None,
    run_id: str | None = None,
    max_restarts: int = 0,
    module: str = "moetrain",
) -> int:
    """Run ``python -m module arguments…`` in `nproc` processes that find each other through torchrun's variables.

    With several `nodes` each calls this, and the agents meet at `endpoint` (HOST:PORT on one of them) under `run_id`.
    When a worker fails the others are ended, and up to `max_restarts` times all start again.

    Returns 0 when all workers end well. When one fails for good a line on stderr says which rank it was and why, and
    its exit code is returned: 128 + n for a worker that died of signal n, as a shell has it.
    """
    _silence_elastic()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // nproc)))
    os.environ[PARENT_PID] = str(os.getpid())
    if max_restarts > 0:
        # Else torch 2.13 gives all attempts one store, in which a worker may read what dead ones wrote.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    # Those of SignalForwarder are ours; the agent answers these by ending the workers.
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGHUP,SIGQUIT"
    # Port 0: the agent's store takes a free port and the workers use that same store.
    endpoint = endpoint or "127.0.0.1:0"
    agent: _Agent | None = None
    try:
        with (
            tempfile.TemporaryDirectory(prefix="moetrain-launch-") as folder,
            SignalForwarder(lambda: psutil.Process().children()) as forwarder,
        ):
            try:
                rendezvous = get_rendezvous_handler(
                    RendezvousParameters(
                        backend="c10d",
                        endpoint=endpoint,
                        run_id=run_id or uuid.uuid4().hex,
                        min_nodes=nodes,
                        max_nodes=nodes,
                        local_addr=_own_address(endpoint),
                        join_timeout=JOIN_SECONDS,
                        read_timeout=JOIN_SECONDS,
                    )
                )
                agent = _Agent(
                    WorkerSpec(
                        role="default",
                        local_world_size=nproc,
                        entrypoint=sys.executable,
                        args=("-m", module, *arguments),
                        rdzv_handler=rendezvous,
                        max_restarts=max_restarts,
                        monitor_interval=0.1,
                    ),
                    logs_specs=DefaultLogsSpecs(log_dir=folder),
                )
                result = agent.run()
                # The agents of other nodes must not wait for this one to start again.
                rendezvous.shutdown()
            except SignalException as error:
                return _report(f"ended by {error.sigval.name}", 128 + error.sigval)
            except RendezvousError as error:
                if agent is not None and agent.has_started:
                    return _report(f"the launcher at {endpoint} has ended; its output says why", 1)
                return _report(_describe_rendezvous_error(error, nodes, endpoint), 1)
            if not result.is_failed():
                return 0
            if forwarder.killed_by is not None:
                return _report(f"killed by a second {forwarder.killed_by.name}", 128 + forwarder.killed_by)
            rank, failure = first_failure(result.failures)
            return _report(describe_failure(rank, failure), exit_status(failure.exitcode))
    finally:
        os.environ.pop(PARENT_PID, None)


class _Agent(LocalElasticAgent):
    """Says why it starts its workers again."""

    _seen: RunResult | None = None

    @property
    def has_started(self) -> bool:
        return self._seen is not None

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._seen = super()._monitor_workers(worker_group)
        return self._seen

    def _restart_workers(self, worker_group: WorkerGroup) -> None:
        if self._seen is not None and self._seen.is_failed():
            limit = worker_group.spec.max_restarts
            reason = describe_failure(*first_failure(self._seen.failures))
            _say(f"{reason}; all ranks start again (restart {limit - self._remaining_restarts} of {limit})")
        else:
            _say("another node starts its ranks again, and so does this one")
        super()._restart_workers(worker_group)


def end_with_launcher() -> None:
    """Called by a worker: let the kernel kill it if the launcher dies without having ended its workers (Linux)."""
    parent = os.environ.pop(PARENT_PID, None)
    if parent is None or not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    # The launcher may have died before the kernel knew.
    if os.getppid() != int(parent):
        os.kill(os.getpid(), signal.SIGKILL)


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def exit_status(returncode: int) -> int:
    """A child's return code as an exit status: 128 + n where Python says −n for signal n."""
    return returncode if returncode >= 0 else 128 - returncode


REPEAT_SECONDS = 1.0


class SignalForwarder:
    """While active, passes SIGTERM, SIGINT and SIGUSR1 on to `workers()`.

    A second SIGTERM or SIGINT kills every descendant of this process, unless it comes within REPEAT_SECONDS: a job
    manager that signals a whole tree of processes asks once, however often it arrives. With no worker yet, a signal
    ends this process (SystemExit 128 + n).
    """

    def __init__(self, workers: Callable[[], list[psutil.Process]]) -> None:
        self.killed_by: signal.Signals | None = None
        """The signal that had the workers killed, if any."""
        self._workers = workers
        self._asked_to_stop: float | None = None
        """When (time.monotonic)."""
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            self._previous[number] = signal.signal(number, self._forward)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        stop = number in (signal.SIGTERM, signal.SIGINT)
        now = time.monotonic()
        if stop and self._asked_to_stop is not None:
            if now - self._asked_to_stop < REPEAT_SECONDS:
                return
            self.killed_by = signal.Signals(number)
            _send(psutil.Process().children(recursive=True), signal.SIGKILL)
            return
        workers = self._workers()
        if not workers:
            raise SystemExit(128 + number)
        if stop:
            self._asked_to_stop = now
        _send(workers, number)


def first_failure(failures: dict[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """The (rank, failure) that brought the others down."""

    def order(item: tuple[int, ProcessFailure]) -> tuple[int, float]:
        failure = item[1]
        if failure.exitcode == -signal.SIGTERM:
            return 3, 0.0  # that is how the agent ends the others
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGABRT:
            return 0, failure.timestamp  # a crash or a kill is never the consequence of another rank's end
        # Recorded times are whole seconds, too coarse to tell an error from the broken connections that follow it.
        written = os.path.isfile(failure.error_file)
        when = os.path.getmtime(failure.error_file) if written else failure.timestamp
        return 2 if failure.exitcode == PeerError.exit_code else 1, when

    return min(failures.items(), key=order)


def describe_failure(rank: int, failure: ProcessFailure) -> str:
    """One line: rank, process, exit code or signal, and the worker's own error message where it left one."""
    who = f"rank {rank} (pid {failure.pid})"
    if failure.exitcode < 0:
        hint = " (by hand, or by the system for lack of memory)" if failure.exitcode == -signal.SIGKILL else ""
        return f"{who} was killed by {failure.signal_name()}{hint}"
    recorded = failure.error_file_data["message"]
    message = recorded["message"].partition("\n")[0] if isinstance(recorded, dict) else ""
    return f"{who} failed with exit code {failure.exitcode}" + (f": {message}" if message else "")


def _own_address(endpoint: str) -> str:
    """The address of this machine that the others can reach: the one that leads to the endpoint."""
    host, _, port = endpoint.rpartition(":")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)  # sends nothing
            own: str = probe.getsockname()[0]
    except OSError:  # of which the rendezvous will complain
        return socket.getfqdn()
    # A machine may know itself under a loopback address; the others know it by the name that they were given.
    return host if own.startswith("127.") or own == "::1" else own


def _describe_rendezvous_error(error: RendezvousError, nodes: int, endpoint: str) -> str:
    if nodes == 1:
        return f"the agent failed: {error}"
    if isinstance(error, RendezvousClosedError):
        return f"rendezvous at {endpoint}: the run has ended on another node, whose output says why"
    return (
        f"rendezvous at {endpoint}: {nodes} nodes have not met ({type(error).__name__}: {error}); give the same "
        f"command on each within {JOIN_SECONDS // 60} minutes, and an address and port that each can reach"
    )


def _say(line: str) -> None:
    print(f"moetrain: {line}", file=sys.stderr, flush=True)


def _report(line: str, status: int) -> int:
    _say(line)
    return status


def _send(processes: list[psutil.Process], number: int) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.NoSuchProcess:
            continue


def _silence_elastic() -> None:
    """Keep the agent's own warnings and failure box from the terminal: `run` says the same in a line."""
    for name in ("torch.distributed.elastic", "torch.distributed.launcher"):
        logger = logging.getLogger(name)
        logger.addHandler(logging.NullHandler())
        logger.propagate = False
