"""Names the rank that the others wait for, and ends the run, where a collective would hang or fail in the depths.

A thread on every rank looks at what the main thread does and writes it into the ranks' common store, beside a counter
that shows that the process lives. A rank is *stuck* when its main thread has stood at the same place, with no step or
batch begun and no child process finished, for run.timeout_minutes. The first stuck rank reads what all have written,
finds the one that does not answer, is behind, or has not come to the collective in which the others wait, and leaves
this verdict in the store. Each rank ends when it reads a verdict. A rank that fails leaves one too.

It works alike for gloo and NCCL, because it never asks them. What it cannot see: a rank that runs for ever without
coming to a collective is not stuck itself, the others that wait for it are; and when all stand at a synchronisation
with the device it can only list where. The groups' own timeouts come GRACE_MINUTES later, for when this thread does
not run (native code that holds the interpreter on every rank).
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from moetrain.errors import PeerError, UserError
from moetrain.parallel.agreement import on_rank_0
from moetrain.parallel.environment import name_ranks
from moetrain.parallel.mesh import Mesh

GRACE_MINUTES = 0.5
_LOOK_SECONDS = 2.0
_ANSWER_LOOKS = 3
"""A rank that writes nothing while another looks so often does not answer."""
_TORCH = str(Path(torch.__file__).parent)
_DISTRIBUTED = str(Path(dist.__file__).parent)


@dataclass(frozen=True)
class State:
    """What a rank does."""

    beat: int
    """Grows as long as the process lives."""
    moves: int
    """Batches begun."""
    doing: str
    place: str
    waits: bool
    """In a collective."""

    def __str__(self) -> str:
        return f"in {self.place}, last begun: {self.doing}"


class Watchdog:
    """The thread of this rank; :meth:`close` ends it. Creating one is collective over the mesh's host group.

    `store` is common to the ranks; `limit_seconds` is how long the main thread, which creates this, may be stuck.
    """

    def __init__(self, store: dist.Store, mesh: Mesh, limit_seconds: float) -> None:
        self._rank, self._size = mesh.rank, mesh.world_size
        self._limit = limit_seconds
        self._interval = min(_LOOK_SECONDS, limit_seconds / 8)
        # A connection of its own, because one that waits in `get` keeps others from using it; and names of its own,
        # because a launcher that starts all ranks again may keep the store.
        own_names = on_rank_0(lambda: f"watchdog/{secrets.token_hex(8)}", mesh.host_group)
        self._store = dist.PrefixStore(own_names, store.clone())  # type: ignore[attr-defined]
        self._main = threading.get_ident()
        self._moves, self._doing, self._pauses, self._beat = 0, "starting", 0, 0
        self._heard = time.monotonic()
        """When the store last answered the thread."""
        self._ending = threading.Lock()
        """Held by whoever ends this process, for ever."""
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def moved(self, doing: str) -> None:
        """The main thread begins another batch of what it does ("step 12")."""
        self._moves += 1
        self._doing = doing

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The main thread may stand still here: it waits for no rank."""
        self._pauses += 1
        try:
            yield
        finally:
            self._pauses -= 1

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        self._thread.join(2 * _ANSWER_LOOKS * self._interval)  # it may wait for a store that does not answer

    def explain(self, error: Exception) -> PeerError | None:
        """What another rank has to do with the error that ends this one; None, and the others are told, if nothing.

        After a broken collective this takes seconds: a rank that died says nothing, it must be found silent.
        """
        if isinstance(error, UserError) and error.agreed:
            return None
        broken = _is_broken_collective(error)
        if not self._ending.acquire(blocking=False):
            time.sleep(self._limit)  # the thread is about to end this process
        try:
            if self._store_is_silent():  # and would hold this thread up too
                if not broken:
                    return None
                return PeerError(
                    "the process that holds the ranks' store does not answer: rank 0, or its launcher or node, was "
                    "stopped or lost the network"
                )
            message = self._verdict_or_silence() if broken else None
            if message is None:
                self._proclaim(f"{name_ranks([self._rank])} failed: {type(error).__name__}: {_first_line(error)}")
                return None
        except RuntimeError:
            if not broken:
                return None
            message = "the process that held the ranks' store has ended: rank 0, or its launcher or node"
        peer = PeerError(message)
        peer.agreed = not self._tells()
        time.sleep(2 * self._interval)  # let the rank that failed end first, so that launchers report that one
        return peer

    def _store_is_silent(self) -> bool:
        return time.monotonic() - self._heard > 2 * _ANSWER_LOOKS * self._interval

    def _verdict_or_silence(self) -> str | None:
        """Why a collective broke, once a rank has said it or one has been silent for long enough."""
        before = self._states()
        deadline = time.monotonic() + _ANSWER_LOOKS * self._interval
        while (message := self._verdict()) is None and time.monotonic() < deadline:
            time.sleep(self._interval / 4)
        if message is None and (silent := self._silent(before, self._states())):
            message = self._proclaim(self._describe_silent(silent, before))
        return message

    # The thread

    def _watch(self) -> None:
        last: object = None
        since = time.monotonic()
        while not self._closed.is_set():
            stack, state = self._look()
            # Kernels are tuned by compiling them in child processes from one line of code.
            now = (state.moves, os.times().children_user, stack)
            if now != last or self._pauses:
                last, since = now, time.monotonic()
            stuck = time.monotonic() - since > self._limit
            message: str | None
            try:
                self._write(state)
                message = self._verdict()
                self._heard = time.monotonic()
                if message is None and stuck and (judgement := self._judge()) is not None:
                    message = self._proclaim(judgement)
            except RuntimeError:  # the store has gone
                message = f"no progress {state}; the process that held the ranks' store has ended" if stuck else None
            if message is not None and self._ending.acquire(blocking=False):
                self._end(message)
            self._closed.wait(self._interval)

    def _look(self) -> tuple[tuple[tuple[int, int], ...], State]:
        """What tells one place in the main thread's program from another, and the state of this rank."""
        frame: FrameType | None = sys._current_frames().get(self._main)
        stack: list[tuple[int, int]] = []
        place, waits = "", frame is not None and frame.f_code.co_filename.startswith(_DISTRIBUTED)
        while frame is not None:  # held no longer than needed: it keeps the tensors of its variables alive
            code = frame.f_code
            stack.append((id(code), frame.f_lasti))
            if not place and not code.co_filename.startswith(_TORCH):
                place = f"{Path(code.co_filename).name}:{frame.f_lineno} ({code.co_name})"
            frame = frame.f_back
        self._beat += 1
        return tuple(stack), State(self._beat, self._moves, self._doing, place, waits)

    def _judge(self) -> str | None:
        """Which rank is waited for, and where the others are; None if this rank goes on after all."""
        before, moves = self._states(), self._moves
        for _ in range(_ANSWER_LOOKS):
            if self._closed.wait(self._interval) or self._moves != moves:
                return None
            self._write(self._look()[1])  # others may be judging too
        states = self._states()
        limit = f"{self._limit:g} seconds" if self._limit < 60 else f"{self._limit / 60:g} minutes"
        start = f"no progress for {limit} (run.timeout_minutes): "
        if silent := self._silent(before, states):
            return start + self._describe_silent(silent, states)
        most = max(state.moves for state in states.values())
        late = [rank for rank, state in states.items() if state.moves < most]
        if not late and any(state.waits for state in states.values()):
            late = [rank for rank, state in states.items() if not state.waits]
        others = [rank for rank in states if rank not in late]
        if late and others:
            return f"{start}waiting for {_places(late, states)}; meanwhile {_places(others, states)}"
        return f"{start}all ranks stand still; {_places(others or late, states)}"

    def _end(self, message: str) -> None:
        if self._closed.is_set():
            return
        error = PeerError(message)
        if self._tells():
            os.write(2, f"moetrain: error: rank {self._rank}: {message}\n".encode())
        if "TORCHELASTIC_ERROR_FILE" in os.environ:
            get_error_handler().record_exception(error)
        time.sleep(2 * self._interval)  # as above; and the others may need this process to read the verdict
        os._exit(PeerError.exit_code)

    # The store

    def _write(self, state: State) -> None:
        self._store.set(f"rank {self._rank}", json.dumps(asdict(state)))

    def _verdict(self) -> str | None:
        return self._store.get("verdict").decode() if self._store.check(["verdict"]) else None

    def _proclaim(self, message: str) -> str:
        """Leave a verdict, or read the one that was faster."""
        return self._store.compare_set("verdict", "", message).decode()

    def _tells(self) -> bool:
        """Whether this rank says what all know: the first one on each node does."""
        try:
            first = self._store.compare_set(f"teller {socket.gethostname()}", "", str(self._rank))
        except RuntimeError:
            return True
        return first.decode() == str(self._rank)

    def _states(self) -> dict[int, State]:
        """Of the ranks that have written one."""
        names = {rank: f"rank {rank}" for rank in range(self._size)}
        written = {rank: name for rank, name in names.items() if self._store.check([name])}
        values = self._store.multi_get(list(written.values()))
        return {rank: State(**json.loads(value)) for rank, value in zip(written, values, strict=True)}

    def _silent(self, before: dict[int, State], after: dict[int, State]) -> list[int]:
        """Ranks that have written nothing between two readings."""
        beats = [{rank: state.beat for rank, state in states.items()} for states in (before, after)]
        return [r for r in range(self._size) if r != self._rank and beats[0].get(r) == beats[1].get(r)]

    def _describe_silent(self, silent: Sequence[int], states: dict[int, State]) -> str:
        seen = [rank for rank in silent if rank in states]
        last = f", last seen: {_places(seen, states)}" if seen else ""
        verb = "does" if len(silent) == 1 else "do"
        return f"{name_ranks(silent)} {verb} not answer, having died, been stopped or lost the network{last}"


_watchdog: Watchdog | None = None


@contextmanager
def watched(store: dist.Store | None, mesh: Mesh, limit_seconds: float) -> Iterator[None]:
    """The body under a watchdog, on all ranks; without one where there is no store (a single process, a mock world).

    An error in the body that another rank brought about leaves as a PeerError that names it.
    """
    global _watchdog
    if store is None:
        yield
        return
    _watchdog = Watchdog(store, mesh, limit_seconds)
    try:
        yield
    except Exception as error:
        peer = _watchdog.explain(error)
        if peer is not None:
            raise peer from error
        raise
    finally:
        _watchdog.close()
        _watchdog = None


def moved(doing: str) -> None:
    """See :meth:`Watchdog.moved`; nothing without a watchdog."""
    if _watchdog is not None:
        _watchdog.moved(doing)


@contextmanager
def paused() -> Iterator[None]:
    """See :meth:`Watchdog.paused`; nothing without a watchdog."""
    if _watchdog is None:
        yield
    else:
        with _watchdog.paused():
            yield


def _places(ranks: Sequence[int], states: dict[int, State]) -> str:
    """Ranks by where they are: "rank 1 in loader.py:31 (read), step 5; ranks 0, 2–7 in …"."""
    together: dict[str, list[int]] = {}
    for rank in ranks:
        together.setdefault(str(states[rank]), []).append(rank)
    return "; ".join(f"{name_ranks(members)} {where}" for where, members in together.items())


def _is_broken_collective(error: BaseException) -> bool:
    """Whether a collective ended with an error, also behind the error of whoever used it."""
    if isinstance(error, dist.DistError) or "gloo/transport" in str(error):
        return True
    return error.__cause__ is not None and _is_broken_collective(error.__cause__)


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0]
