"""The kinds of fault: each does something to a run, starts it again, and compares what comes out with a whole run's."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint import checkpoint_name, checkpoints_in, contents, load, read_manifest, verify
from moetrain.data.build import build
from moetrain.data.tokenizer import BytesTokenizer
from moetrain.errors import PeerError

from .inject import FIRST_LEVEL, LOOP, MOVING, SAVING, AtLine, AtStep, BadGradient, Count, LargestFile, Place
from .run import RANKS, STEPS, Ended, Fault, Run, losses

SECONDS = 120
"""By then every rank has ended, or it hangs. A writer that hangs is given up after run.timeout_minutes and a half."""

VARIANTS: dict[str, list[str]] = {
    "plain": [],
    "levels": ["checkpoint.local_dir={folder}/local"],
    "moving": ["placement.rebalance.every=2", "placement.rebalance.min_gain=0", "train.param_dtype=float64"],
}
"""Further overrides of a run. One that moves experts adds in another order after a restart, so that it is computed, and
compared, in float64."""


class Failure(Exception):
    """A fault lost or changed something, or left something hanging."""


@dataclass(frozen=True)
class Outcome:
    """Of one fault."""

    kind: str
    what: str
    """What was done, and where."""
    result: str
    """ "recovered", "refused" (which is right), or what is wrong."""
    seconds: float

    @property
    def good(self) -> bool:
        return self.result in ("recovered", "refused")


@dataclass
class Whole:
    """A run without faults, to compare with."""

    losses: dict[int, tuple[float | None, ...]]
    files: Mapping[str, Any]
    """Of the last checkpoint, with their checksums."""
    tensors: dict[str, Tensor]


@dataclass
class Laboratory:
    """A folder for runs, their data, and what runs without faults give."""

    folder: Path
    _whole: dict[tuple[str, tuple[Fault, ...]], Whole] = field(default_factory=dict)
    _lines: dict[str, dict[str, list[tuple[str, str, int]]]] = field(default_factory=dict)
    _numbers: int = 0

    @cached_property
    def data(self) -> Path:
        texts = self.folder / "texts"
        texts.mkdir()
        for number in range(40):
            lines = (f"{number + i} squared is {(number + i) ** 2}" for i in range(20))
            (texts / f"{number:02}.txt").write_text("\n".join(lines))
        build([str(texts)], self.folder / "data", BytesTokenizer(), held_out_fraction=0.2, workers=1, progress=False)
        return self.folder / "data"

    def experiment(self, variant: str = "plain") -> Experiment:
        self._numbers += 1
        return Experiment(self, self.folder / f"{self._numbers:04}", variant)

    def whole(self, variant: str, faults: Sequence[Fault] = ()) -> Whole:
        """Of the run without interruptions; `faults` are those that do not interrupt it, on all ranks."""
        key = variant, tuple(faults)
        if key not in self._whole:
            experiment = self.experiment(variant)
            ended = experiment.run(dict.fromkeys(range(RANKS), faults))
            if not ended.succeeded:
                raise RuntimeError(f"a run without faults failed: {ended.codes}\n{ended.output}")
            if variant == "moving" and ": moved " not in ended.output:
                raise RuntimeError(f"no experts have moved\n{ended.output}")
            last = experiment.checkpoints / checkpoint_name(STEPS)
            self._whole[key] = Whole(losses(experiment.run_folder), read_manifest(last).files, _tensors(last))
            experiment.forget()
        return self._whole[key]

    def places(self, variant: str, phase: str, files: Sequence[str]) -> list[tuple[str, str, int]]:
        """Functions of these files that rank 0 runs through: phase, function, and how many of its lines are executed.

        "start": when it goes on from a checkpoint.
        """
        if variant not in self._lines:
            experiment, count = self.experiment(variant), {rank: [Count()] for rank in range(RANKS)}
            experiment.run({rank: [Count(), AtStep(STEPS // 2, "terminate all")] for rank in range(RANKS)})
            shutil.rmtree(experiment.logs[-1])
            if not experiment.run(count).succeeded:
                raise RuntimeError("a run without faults failed")
            lines = json.loads((experiment.logs[-1] / "lines-0.json").read_text())
            by_phase: dict[str, list[tuple[str, str, int]]] = {"start": [], "training": []}
            for phase_, function, number in lines:
                by_phase[phase_].append((phase_, function, number))
            self._lines[variant] = by_phase
            experiment.forget()
        found = [place for place in self._lines[variant][phase] if place[1].partition(":")[0] in files]
        if not found:
            raise RuntimeError(f"{variant}: nothing of {files} is executed ({phase})")
        return found

    def place(self, random: Random, variant: str, phase: str, files: Sequence[str]) -> Place:
        """A random function of these files, and one of the times that one of its lines is executed."""
        phase, function, number = random.choice(self.places(variant, phase, files))
        return Place(phase, function, random.randint(1, number))


@dataclass
class Experiment:
    """A run folder, in which a run is started again and again."""

    laboratory: Laboratory
    folder: Path
    variant: str
    logs: list[Path] = field(default_factory=list)
    said: list[str] = field(default_factory=list)
    """What has happened to it."""

    @property
    def run_folder(self) -> Path:
        return self.folder / "run"

    @property
    def checkpoints(self) -> Path:
        return self.run_folder / "checkpoints"

    def start(self, faults: Mapping[int, Sequence[Fault]] | None = None, *overrides: str) -> Run:
        self.folder.mkdir(exist_ok=True)
        self.logs.append(self.folder / f"logs-{len(self.logs)}")
        settings = [override.format(folder=self.folder) for override in VARIANTS[self.variant]]
        where = [f"data.path={self.laboratory.data}", f"run.dir={self.run_folder}"]
        return Run(self.logs[-1], [*where, *settings, *overrides], faults)

    def run(
        self, faults: Mapping[int, Sequence[Fault]] | None = None, *overrides: str, stopped: Sequence[int] = ()
    ) -> Ended:
        """Start it, and wait until all ranks have ended by themselves (but for those that are stopped)."""
        return self.end(self.start(faults, *overrides), stopped)

    def end(self, run: Run, stopped: Sequence[int] = ()) -> Ended:
        ended = run.end(SECONDS, stopped)
        if ended.faults:
            self.said.append(ended.faults.replace("\n", "; "))
        if ended.stuck:
            raise Failure(f"HANGS: ranks {ended.stuck} did not end")
        if "Traceback" in ended.output:
            raise Failure("TRACEBACK")
        return ended

    def go_on(self, faults: Sequence[Fault] = (), *, mentions: str = "") -> str:
        """The same command again, which must end well and give the same losses and weights as without any fault."""
        ended = self.run(dict.fromkeys(range(RANKS), faults))
        if not ended.succeeded:
            raise Failure(f"LOST: the run does not go on: {ended.codes}")
        if mentions not in ended.output:
            raise Failure(f"SILENT: nothing says {mentions!r}")
        whole = self.laboratory.whole(self.variant, faults)
        last = self.checkpoints / checkpoint_name(STEPS)
        if problems := verify(last):
            raise Failure(f"LOST: {problems[0]}")
        if self.variant == "moving":
            _compare(losses(self.run_folder), whole.losses, rel=1e-10)
            _compare_tensors(_tensors(last), whole.tensors, rel=1e-10)
        elif losses(self.run_folder) != whole.losses:
            raise Failure("CHANGED: other losses")
        elif read_manifest(last).files != whole.files:
            raise Failure("CHANGED: other weights")
        if left := list(self.checkpoints.glob("*.tmp-*")):
            raise Failure(f"LEFT BEHIND: {left[0].name}")
        return "recovered"

    def refused(self, ended: Ended, code: int, *mentions: str) -> None:
        if set(ended.codes) != {code}:
            raise Failure(f"NOT REFUSED: exit codes {ended.codes}")
        if missing := [text for text in mentions if text not in ended.output]:
            raise Failure(f"SILENT: nothing says {missing[0]!r}")

    def steps(self) -> list[int]:
        """Of the checkpoints, newest first."""
        return [step for step, _ in checkpoints_in(self.checkpoints)]

    def forget(self) -> None:
        shutil.rmtree(self.folder)


def _tensors(checkpoint: Path) -> dict[str, Tensor]:
    tensors = {name: torch.empty(entry.shape, dtype=entry.dtype) for name, entry in contents(checkpoint).items()}
    load(checkpoint, tensors)
    return tensors


def _compare(left: Mapping[int, tuple[float | None, ...]], right: Mapping[int, Any], rel: float) -> None:
    if left.keys() != right.keys():
        raise Failure("CHANGED: other steps")
    for step, values in left.items():
        for a, b in zip(values, right[step], strict=True):
            if not math.isclose(a or 0, b or 0, rel_tol=rel):
                raise Failure(f"CHANGED: step {step}: {a} instead of {b}")


def _compare_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor], rel: float) -> None:
    for name, tensor in left.items():
        expected = right[name].double()
        if float((tensor.double() - expected).norm()) > rel * float(expected.norm()):
            raise Failure(f"CHANGED: {name}")


# --------------------------------------------------------------------------------------------------------- the kinds


class NotReached(Exception):
    """The run ended before the fault could happen: another draw."""


Case = Callable[[Laboratory, Random, Experiment], str]
KINDS: dict[str, tuple[int, str, Case]] = {}
"""Name → weight, variant, what it does."""


def kind(name: str, weight: int, variant: str = "plain") -> Callable[[Case], Case]:
    def register(case: Case) -> Case:
        KINDS[name] = weight, variant, case
        return case

    return register


def _one_or_all(random: Random, place: Place) -> dict[int, list[Fault]]:
    return {random.randrange(RANKS): [AtLine(place, random.choice(["kill", "kill all"]))]}


def _interrupted(experiment: Experiment, faults: Mapping[int, Sequence[Fault]]) -> Ended:
    ended = experiment.run(faults)
    if not ended.faults:
        raise NotReached
    return ended


@kind("kill one rank in a save", 36)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    place = lab.place(random, "plain", "training", SAVING)
    _interrupted(experiment, {random.randrange(RANKS): [AtLine(place, "kill")]})
    return experiment.go_on()


@kind("kill all ranks in a save", 24)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    place = lab.place(random, "plain", "training", SAVING)
    _interrupted(experiment, {random.randrange(RANKS): [AtLine(place, "kill all")]})
    return experiment.go_on()


@kind("kill in a resume", 24)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    experiment.run({0: [AtStep(random.randint(3, STEPS), "kill all")]})
    place = lab.place(random, "plain", "start", (*SAVING, *LOOP))
    _interrupted(experiment, _one_or_all(random, place))
    return experiment.go_on()


@kind("kill while experts move", 12, "moving")
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    place = lab.place(random, "moving", "training", MOVING)
    _interrupted(experiment, _one_or_all(random, place))
    return experiment.go_on()


@kind("kill in a step", 14)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    place = lab.place(random, "plain", "training", LOOP)
    _interrupted(experiment, _one_or_all(random, place))
    return experiment.go_on()


@kind("kill at any time", 20)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    """From outside: in native code, in a write, in the first meeting of the ranks."""
    lab.whole("plain")
    run, ranks = experiment.start(), random.choice([[0], [1], [0, 1]])
    seconds = random.uniform(0, 4)
    time.sleep(seconds)
    run.signal(signal.SIGKILL, ranks)
    ended = experiment.end(run)
    if -signal.SIGKILL not in ended.codes:
        raise NotReached
    experiment.said.append(f"SIGKILL to {ranks} after {seconds:.2f} s")
    return experiment.go_on()


@kind("kill with a first level of storage", 16, "levels")
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    files = random.choice([FIRST_LEVEL, FIRST_LEVEL, SAVING])
    _interrupted(experiment, _one_or_all(random, lab.place(random, "levels", "training", files)))
    if random.random() < 0.3:
        experiment.said.append("the machine is gone")
        shutil.rmtree(experiment.folder / "local", ignore_errors=True)
    return experiment.go_on()


@kind("kill while the first level is brought up", 8, "levels")
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    place = lab.place(random, "levels", "training", SAVING)
    experiment.run(_one_or_all(random, place))
    _interrupted(experiment, _one_or_all(random, lab.place(random, "levels", "start", FIRST_LEVEL)))
    return experiment.go_on()


@kind("SIGTERM", 12)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    place = lab.place(random, "plain", "training", random.choice([SAVING, LOOP]))
    ended = _interrupted(experiment, {random.randrange(RANKS): [AtLine(place, "terminate all")]})
    # Before it listens, and when it has ended, it is killed, and leaves the other alone.
    killed = {0, -signal.SIGTERM, PeerError.exit_code} if -signal.SIGTERM in ended.codes else {0}
    if not killed.issuperset(ended.codes):
        raise Failure(f"SILENT: exit codes {ended.codes}")
    if ended.succeeded and "asked to stop: saved step " in ended.output:
        saved = int(ended.output.partition("asked to stop: saved step ")[2].split()[0])
        if experiment.steps()[:1] != [saved]:
            raise Failure(f"LOST: {experiment.steps()} instead of {saved}")
    return experiment.go_on()


@kind("disk full", 12)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    experiment.run_folder.mkdir(parents=True)
    kilobytes = random.randint(4, 1500)
    with _small_disk(experiment.run_folder, kilobytes) as mounted:
        if not mounted:
            raise NotReached
        experiment.said.append(f"a disk of {kilobytes} KiB")
        ended = experiment.run()
        if ended.succeeded:
            raise NotReached
        if 1 not in ended.codes or "No space left on device" not in ended.output:
            raise Failure(f"SILENT: exit codes {ended.codes}")
        for path in experiment.checkpoints.glob("step-*[0-9]"):
            if problems := verify(path):
                raise Failure(f"LOST: {problems[0]}")
        subprocess.run(["mount", "-o", "remount,size=64m", str(experiment.run_folder)], check=True)
        return experiment.go_on()


@contextmanager
def _small_disk(folder: Path, kilobytes: int) -> Iterator[bool]:
    """A file system of that size at the folder; False where this process may not mount one."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True).returncode != 0:
        yield False
        return
    try:
        yield True
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@kind("a file cannot grow", 8)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    """On one rank: what a quota or a full disk of one machine does."""
    size = max(entry.size for entry in lab.whole("plain").files.values())
    rank = random.randrange(RANKS)
    ended = _interrupted(experiment, {rank: [LargestFile(random.randrange(size))]})
    if ended.codes != (1, 1) or "File too large" not in ended.output:
        raise Failure(f"SILENT: exit codes {ended.codes}")
    return experiment.go_on()


def _damage(random: Random, file: Path) -> str:
    """Do something to a file; says what."""
    how, size = random.choice(["flip", "flip", "truncate", "empty", "delete"]), file.stat().st_size
    if how == "flip":
        place = random.randrange(8 * size)
        content = bytearray(file.read_bytes())
        content[place // 8] ^= 1 << place % 8
        file.write_bytes(content)
        return f"bit {place} flipped in {file.name}"
    if how == "truncate":
        os.truncate(file, length := random.randrange(size))
        return f"{file.name} cut to {length} bytes"
    if how == "empty":
        os.truncate(file, 0)
        return f"{file.name} emptied"
    file.unlink()
    return f"{file.name} deleted"


def _left_by_a_killed_run(random: Random, experiment: Experiment) -> list[Path]:
    """Its checkpoints, newest first."""
    experiment.run({0: [AtStep(random.randint(5, STEPS), "kill all")]})
    experiment.said.clear()
    return [path for _, path in checkpoints_in(experiment.checkpoints)]


@kind("damage to the newest checkpoint", 24)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    newest, *_ = _left_by_a_killed_run(random, experiment)
    file = random.choice(sorted(newest.iterdir()))
    experiment.said.append(_damage(random, file))
    if random.random() < 0.4:
        ended = experiment.run(None, f"checkpoint.resume={newest}")
        experiment.refused(ended, 1, "is damaged", str(file))
    return experiment.go_on(mentions=f"skipping the damaged checkpoint {newest}: {file}")


@kind("damage to all checkpoints", 6)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    paths = _left_by_a_killed_run(random, experiment)
    shutil.copytree(experiment.checkpoints, experiment.folder / "copy")
    for path in paths:
        experiment.said.append(_damage(random, random.choice(sorted(path.iterdir()))))
    experiment.refused(experiment.run(), 1, "every checkpoint is damaged")
    shutil.rmtree(experiment.checkpoints)
    (experiment.folder / "copy").rename(experiment.checkpoints)
    experiment.go_on()
    return "refused"


@kind("damage to other files of the run", 8)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    _left_by_a_killed_run(random, experiment)
    what = random.choice(["record", "config", "lock", "junk"])
    if what == "record":  # a torn last line, as a power cut leaves it
        file = experiment.run_folder / "metrics.jsonl"
        content = file.read_bytes()
        last = content.rstrip(b"\n").rfind(b"\n") + 1
        os.truncate(file, random.randint(last, len(content)))
    elif what == "config":
        _damage(random, experiment.run_folder / "config.yaml")
    elif what == "lock":
        (experiment.run_folder / ".lock").unlink()
    else:
        (experiment.checkpoints / checkpoint_name(99)).mkdir()
        (experiment.checkpoints / "step-00000098").write_text("not a folder")
        (experiment.checkpoints / "step-00000004.tmp-00000000").mkdir()
        (experiment.checkpoints / "step-00000004.tmp-00000000" / "rank-00000-00.safetensors").write_text("half")
    experiment.said.append(f"damage to {what}")
    return experiment.go_on()


@kind("damage to the data", 6)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    _left_by_a_killed_run(random, experiment)
    file = random.choice([path for path in sorted(lab.data.iterdir()) if path.suffix in (".bin", ".json")])
    before = file.read_bytes()
    try:
        experiment.said.append(_damage(random, file))
        ended = experiment.run()
        experiment.refused(ended, 1, str(lab.data))
    finally:
        file.write_bytes(before)
    experiment.go_on()
    return "refused"


@kind("a rank hangs", 8)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    """Its main thread, or one of those that save."""
    place = lab.place(random, "plain", "training", random.choice([SAVING, LOOP]))
    ended = _interrupted(experiment, {random.randrange(RANKS): [AtLine(place, "hang")]})
    if not ended.faults or 0 in ended.codes:
        raise Failure(f"NOT NOTICED: exit codes {ended.codes}")
    return experiment.go_on()


@kind("a rank is stopped", 6)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    place, rank = lab.place(random, "plain", "training", random.choice([SAVING, LOOP])), random.randrange(RANKS)
    ended = experiment.run({rank: [AtLine(place, "stop")]}, stopped=[rank])
    if not ended.faults:
        raise NotReached
    if ended.codes[1 - rank] not in (PeerError.exit_code, 1, 0):
        raise Failure(f"NOT NOTICED: exit codes {ended.codes}")
    return experiment.go_on()


@kind("NaN in a gradient", 6)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    """Once: the step is skipped, whatever comes then. Twice, where that is too often: the run ends."""
    step = random.choice([3, 5])
    if random.random() < 0.3:
        ended = experiment.run({1: [BadGradient((step, step + 1))]}, "train.max_bad_steps=2")
        experiment.refused(ended, 1, f"step {step + 1}: 2 steps in a row had a NaN or Inf gradient")
        return "refused"
    bad = BadGradient((step,))
    kill = AtStep(random.randint(step, STEPS), "kill all")
    experiment.run({0: [bad, kill], 1: [bad]})
    return experiment.go_on([bad])


@kind("ranks with different configs", 4)
def _(lab: Laboratory, random: Random, experiment: Experiment) -> str:
    override = random.choice(["optim.lr=0.5", "train.seed=7", "checkpoint.every=2", "router.top_k=1"])
    experiment.said.append(override)
    key = override.partition("=")[0]
    run = experiment.start({1: [Override(override)]})
    experiment.refused(experiment.end(run), 2, f"the ranks differ: {key} = ")
    if experiment.run_folder.exists():
        raise Failure("LEFT BEHIND: a run folder")
    experiment.go_on()
    return "refused"


@dataclass(frozen=True)
class Override:
    """A key that one rank alone is given."""

    text: str

    def install(self, rank: int, logs: Path) -> None:
        from . import run

        started = run.main
        run.main = lambda arguments: started([*arguments, self.text])  # type: ignore[assignment, misc]


def inject(name: str, laboratory: Laboratory, random: Random) -> Outcome:
    """One fault of a kind; draws again until it does happen."""
    _, variant, case = KINDS[name]
    while True:
        experiment, start = laboratory.experiment(variant), time.monotonic()
        try:
            result = case(laboratory, random, experiment)
        except NotReached:
            experiment.forget()
            continue
        except Failure as failure:
            result = str(failure)
        outcome = Outcome(name, "; then ".join(experiment.said), result, time.monotonic() - start)
        if outcome.good:
            experiment.forget()
        return outcome
