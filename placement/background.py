"""A search in a process of its own: a thread would hold up whoever asks for it, by the interpreter's lock."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread

import numpy as np

from moetrain.errors import PlacementError, TraceError
from moetrain.placement.objectives import Objective, objective
from moetrain.placement.placement import Placement
from moetrain.placement.problem import Problem, Solution
from moetrain.placement.solve import solve
from moetrain.placement.topology import Topology
from moetrain.placement.trace import load_trace


@dataclass(frozen=True)
class Request:
    """What to look for: a placement with as many experts on every GPU."""

    objective: Callable[[], Objective]
    """Called by the search; as all here it must pickle."""
    start: Placement
    """Where the experts are. The search goes on from there, by swaps, so that few experts move."""
    time_limit: float
    """Seconds. A search that ends before finds the same in every run."""


@dataclass(frozen=True)
class Found:
    solution: Solution
    cost_before: float
    """Of the placement where the search started."""

    @property
    def gain(self) -> float:
        """By which fraction the cost falls."""
        return 1 - self.solution.cost / self.cost_before if self.cost_before > 0 else 0.0


def find(request: Request) -> Found:
    """Do the search here. Raises PlacementError or TraceError."""
    start, term = request.start, request.objective()
    problem = Problem.equal(term, start.num_layers, start.num_experts, start.num_gpus)
    return Found(solve(problem, "swaps", time_limit=request.time_limit, start=start), term.cost(start.gpu_LE))


def recorded_objective(name: str, folder: Path, steps: range, topology: Topology) -> Objective:
    """The objective of that name for the tokens that were recorded in a folder in these steps; later ones may be there
    already.

    A GPU is what has this place in any ep group. Raises TraceError where there are no such tokens.
    """
    trace = load_trace(folder)
    if trace.step_S is None or trace.source_S is None or not (chosen_S := np.isin(trace.step_S, steps)).any():
        raise TraceError(
            f"{folder}: no tokens with step and source of steps {steps.start} to {steps.stop - 1}; see "
            "placement.trace.every"
        )
    recent = trace.select(chosen_S)
    assert recent.source_S is not None
    return objective(name, replace(recent, source_S=recent.source_S % topology.num_gpus), topology)


class Search:
    """A running search."""

    def __init__(self, request: Request):
        """Raises OSError where no process can be started."""
        self._folder = tempfile.TemporaryDirectory(prefix="moetrain-search-")
        folder = Path(self._folder.name)
        self._answer, self._log = folder / "answer", folder / "log"
        self._until = time.monotonic() + 2 * request.time_limit
        (folder / "request").write_bytes(pickle.dumps(request))
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import _search; _search()", str(folder), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for whoever asked
            )

    def result(self) -> Found:
        """Waits for the end of the search. Raises PlacementError where it failed or takes more than twice its time."""
        try:
            code = self._process.wait(self._until - time.monotonic())
        except subprocess.TimeoutExpired:
            raise PlacementError("the search for a placement took more than twice its time") from None
        if code != 0:
            lines = self._log.read_text(errors="replace").strip().splitlines()
            raise PlacementError(f"the search for a placement failed: {lines[-1] if lines else f'exit code {code}'}")
        found = pickle.loads(self._answer.read_bytes())
        assert isinstance(found, Found)
        return found

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()
        self._folder.cleanup()


def _search() -> None:
    """What the process does."""
    os.nice(10)
    folder = Path(sys.argv[1])
    Thread(target=_end_with, args=(int(sys.argv[2]), folder), daemon=True).start()
    (folder / "answer").write_bytes(pickle.dumps(find(pickle.loads((folder / "request").read_bytes()))))


def _end_with(parent: int, folder: Path) -> None:
    """End this process, and remove its folder, when the one that asked is gone: killed, it cannot do so itself."""
    while os.getppid() == parent:
        time.sleep(1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)
