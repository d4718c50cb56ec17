"""Two of the faults that `python -m tests.faults` injects by the hundred, and that it notices what it looks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faults.__main__ import shares, table
from faults.cases import KINDS, Failure, Laboratory, Outcome
from faults.inject import AtLine, Place


def test_a_run_that_is_killed_in_a_save_and_in_the_resume_after_it(tmp_path: Path) -> None:
    experiment = Laboratory(tmp_path).experiment()
    for place, action in (
        (Place("training", "checkpoint.py:commit", 30), "kill all"),  # of the fifth save or so
        (Place("start", "checkpoint.py:check_files", 2), "kill"),
    ):
        ended = experiment.run({0: [AtLine(place, action)]})
        assert ended.faults == f"rank 0: {action} in {place}"
        assert -9 in ended.codes
    assert experiment.go_on() == "recovered"

    record = experiment.run_folder / "metrics.jsonl"
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    lines[3]["grad_norm"] += 1e-9
    record.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(Failure, match="CHANGED: other losses"):  # by a run that has ended and is scored again
        experiment.go_on()


def test_every_kind_has_its_share() -> None:
    weights = {name: weight for name, (weight, *_) in KINDS.items()}
    for count in (3, len(weights), 200):
        names = shares(count, weights)
        assert len(names) == count
        assert len(set(names)) == min(count, len(weights))
    assert names.count("kill one rank in a save") == max(map(names.count, names))


def test_the_table_tells_what_was_lost() -> None:
    results = ["recovered", "refused", "CHANGED: other losses"]
    rows = table([Outcome("SIGTERM", "", result, 1.0) for result in results]).splitlines()
    assert [row.split()[-4:] for row in rows[1:]] == [["3", "1", "1", "1"]] * 2
