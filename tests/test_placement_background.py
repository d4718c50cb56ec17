"""A search in a process of its own: what it judges by, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from processes import wait_until

from moetrain.errors import PlacementError, TraceError
from moetrain.placement.background import Request, Search, recorded_objective
from moetrain.placement.objectives import LoadTerm, objective
from moetrain.placement.placement import Placement
from moetrain.placement.topology import Topology
from moetrain.placement.trace import Trace, save_trace

START = Placement.contiguous(1, 4, 2)
ENDLESS = Request(partial(time.sleep, 60), START, 60)  # type: ignore[arg-type]


def test_a_search_finds_what_swaps_find() -> None:
    search = Search(Request(partial(LoadTerm, np.array([[3.0, 3.0, 1.0, 1.0]])), START, 60))
    try:
        found = search.result()
    finally:
        search.close()
    assert (found.cost_before, found.solution.cost, found.gain) == (6, 4, pytest.approx(1 / 3))


def test_a_search_that_is_killed_has_failed() -> None:
    search = Search(ENDLESS)
    search._process.kill()
    with pytest.raises(PlacementError, match="search for a placement failed: exit code -9"):
        search.result()
    search.close()


def start_and_die() -> None:
    search = Search(ENDLESS)
    print(search._process.pid, flush=True)
    time.sleep(2)  # until it has begun
    os._exit(1)


def test_a_search_ends_with_who_asked(tmp_path: Path) -> None:
    """Killed, a run can neither end it nor remove its files."""
    command = "import test_placement_background as test; test.start_and_die()"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    asking = subprocess.run(
        [sys.executable, "-c", command],
        env=os.environ | {"TMPDIR": str(tmp_path), "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        check=False,
    )
    assert asking.returncode == 1
    wait_until(lambda: has_ended(int(asking.stdout)) and not any(tmp_path.iterdir()), 30)


def has_ended(process: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{process}/status").read_text()  # whom nobody waits for
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_only_the_steps_that_are_asked_for_count(tmp_path: Path) -> None:
    """Ranks go on recording while the search reads: what it finds must not depend on how far they are."""

    def recorded(steps: range) -> Trace:
        ids = [[[step % 4, (step + 1) % 4]] for step in steps for _ in range(4)]
        places = [(rank, step) for step in steps for rank in range(4)]
        source, step = np.array(places).T
        return Trace(np.array(ids), 4, source_S=source, step_S=step, layers=(0,))

    topology = Topology.uniform(2)
    for step in range(1, 7):
        save_trace(tmp_path / f"{step}.npz", recorded(range(step, step + 1)))
    window = range(3, 5)
    expected = recorded(window)
    alone = objective("traffic+load", Trace(expected.expert_ids_SLK, 4, source_S=np.tile([0, 1], 4)), topology)
    found = recorded_objective("traffic+load", tmp_path, window, topology)
    assert found.cost(START.gpu_LE) == alone.cost(START.gpu_LE)
    other = recorded_objective("traffic+load", tmp_path, range(1, 7), topology)
    assert other.cost(START.gpu_LE) != alone.cost(START.gpu_LE)
    with pytest.raises(TraceError, match="no tokens with step and source of steps 7 to 9"):
        recorded_objective("load", tmp_path, range(7, 10), topology)
