"""What a rank does to itself. Nothing of it is in moetrain: Python's own tracing counts lines, and acts at them."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.util import Finalize
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import moetrain
from moetrain.trainer import Trainer

SOURCES = Path(moetrain.__file__).resolve().parent
SAVING = ("checkpointer.py", "checkpoint.py", "checkpoint_shards.py", "checkpoint_staging.py", "files.py")
FIRST_LEVEL = ("checkpoint_levels.py",)
MOVING = ("migration.py", "rebalance.py")
LOOP = ("trainer.py",)
FILES = frozenset((*SAVING, *FIRST_LEVEL, *MOVING, *LOOP))


@dataclass(frozen=True)
class Place:
    """A line of a function, and the how-manieth time that one of its lines is about to be executed."""

    phase: str
    """ "start", before training begins, or "training"."""
    function: str
    """ "checkpointer.py:Checkpointer.save"."""
    number: int

    def __str__(self) -> str:
        return f"{self.function} ({self.phase}, line {self.number} executed)"


class Tracer:
    """Calls `on_line(phase, function, number)` before each line of moetrain's FILES, in every thread."""

    def __init__(self, on_line: Callable[[str, str, int], None]) -> None:
        self._on_line = on_line
        self._names: dict[CodeType, str | None] = {}
        self._phase = "start"
        self.counts: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        threading.settrace(self._call)
        sys.settrace(self._call)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        if code not in self._names:
            file = Path(code.co_filename)
            own = file.name in FILES and SOURCES in file.resolve().parents
            own = own or (file.name in MOVING and file.parent.name == "parallel")
            self._names[code] = f"{file.name}:{code.co_qualname}" if own else None
        if self._names[code] is None:
            return None
        if self._names[code] == "trainer.py:Trainer._train":
            self._phase = "training"
        return self._line

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event == "line":
            with self._lock:
                key = self._phase, str(self._names[frame.f_code])
                self.counts[key] += 1
                number = self.counts[key]
            self._on_line(*key, number)
        return self._line


@dataclass(frozen=True)
class Count:
    """Leaves how many lines of each function were executed."""

    def install(self, rank: int, logs: Path) -> None:
        tracer = Tracer(lambda *place: None)

        def leave() -> None:
            counts = [[*key, number] for key, number in tracer.counts.items()]
            (logs / f"lines-{rank}.json").write_text(json.dumps(counts))

        Finalize(None, leave, exitpriority=0)


@dataclass(frozen=True)
class AtLine:
    """Does something at a line."""

    place: Place
    action: str

    def install(self, rank: int, logs: Path) -> None:
        def on_line(*place: Any) -> None:
            if Place(*place) == self.place:
                act(self.action, rank, logs, str(self.place))

        Tracer(on_line)


@dataclass(frozen=True)
class AtStep:
    """Does something at the beginning of a step."""

    step: int
    action: str

    def install(self, rank: int, logs: Path) -> None:
        original = Trainer._step

        def step(self_: Trainer, batches: Any) -> None:
            if self_.progress.step + 1 == self.step:
                act(self.action, rank, logs, f"step {self.step}")
            original(self_, batches)

        Trainer._step = step  # type: ignore[method-assign]


@dataclass(frozen=True)
class BadGradient:
    """Is there at some steps: NaN."""

    steps: tuple[int, ...]

    def install(self, rank: int, logs: Path) -> None:
        original = Trainer._accumulate_gradients

        def accumulate(self_: Trainer, batches: Any) -> Any:
            result = original(self_, batches)
            if self_.progress.step + 1 in self.steps:
                assert self_.model.embedding.grad is not None
                self_.model.embedding.grad[0, 0] = math.nan
                mark(rank, logs, f"NaN in the gradient of step {self_.progress.step + 1}")
            return result

        Trainer._accumulate_gradients = accumulate  # type: ignore[method-assign]


@dataclass(frozen=True)
class LargestFile:
    """No file can be larger: each write beyond fails, as on a full disk."""

    bytes: int

    def install(self, rank: int, logs: Path) -> None:
        mark(rank, logs, f"no file above {self.bytes:,} bytes")
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, resource.RLIM_INFINITY))


def act(action: str, rank: int, logs: Path, where: str) -> None:
    """kill, kill all, stop or terminate all processes of the run, or hang."""
    mark(rank, logs, f"{action} in {where}")
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "hang":
        time.sleep(600)
    elif action == "kill all":
        _signal_all(logs, signal.SIGKILL)
    elif action == "terminate all":
        _signal_all(logs, signal.SIGTERM)
    else:
        raise ValueError(action)


def mark(rank: int, logs: Path, what: str) -> None:
    """Say that the fault has happened."""
    with (logs / f"fault-{rank}").open("a") as file:
        file.write(f"rank {rank}: {what}\n")


def _signal_all(logs: Path, number: int) -> None:
    pids: Iterable[int] = (int(file.read_text()) for file in logs.glob("pid-*"))
    for pid in sorted(pids, key=lambda pid: pid == os.getpid()):  # itself last
        with suppress(ProcessLookupError):
            os.kill(pid, number)
