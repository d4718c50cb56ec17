"""Choosing the fastest of a few kernel configurations by trying them, once for each kernel and shape.

Off by default: then the tables in the kernels' modules choose. On, a winner is kept for the process and, in a JSON
file, for later ones on the same kind of GPU with the same versions of triton and moetrain.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import os
import statistics
import tempfile
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from moetrain import __version__

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")

FILE_NAME = "autotune.json"
FORMAT = "moetrain autotune 1"
REPEATS = 5
"""Timed launches of each configuration, after one that is not timed."""

_logger = logging.getLogger(__name__)


def configure(enabled: bool, cache: Path | None = None) -> None:
    """Switch autotuning on or off for this process, and forget what it has chosen so far.

    `cache`: the folder of the file with the winners; default $XDG_CACHE_HOME/moetrain or ~/.cache/moetrain. Stays off
    where nothing can be timed: without a CUDA GPU, and in Triton's interpreter.
    """
    global _tuner
    _tuner = _Tuner((cache or cache_folder()) / FILE_NAME) if enabled and _can_time() else None


def choose(
    name: str, key: tuple[Hashable, ...], candidates: Sequence[Config], launch: Callable[[Config], object]
) -> Config:
    """The fastest of `candidates` (frozen dataclasses, plain values in their fields), or the first with autotuning off.

    `name` and `key` say what the choice holds for: the kernel, its dtypes and its sizes. A size that changes from call
    to call, as the number of rows does, belongs into the key as a power of two, or every call is timed anew.
    `launch(candidate)` runs the kernel on the current stream, as often as it is called: it may overwrite its outputs,
    but not add to them. A candidate that cannot be compiled or launched is passed over; if none can, the first is
    returned, for the caller to fail with. Inside the capture of a CUDA graph nothing is timed.

    Every rank chooses for itself. Candidates may add products in another order, so that two choices (of two ranks, or
    before and after a restart without the file) agree to rounding, not to the bit.

    Raises ValueError where there is no candidate.
    """
    if not candidates:
        raise ValueError(f"{name}: no configuration to choose from")
    if _tuner is None or len(candidates) == 1:
        return candidates[0]
    return _tuner.choose(name, key, candidates, launch)


class _Tuner:
    """The winners of a process and their file."""

    def __init__(self, file: Path):
        self.file: Path | None = file
        self.winners: dict[tuple[str, str, tuple[Hashable, ...]], Any] = {}
        self.stored: dict[str, Any] | None = None
        """Those of the file, as it is written: a winner's fields by what it is the winner of. None: not read yet."""

    def choose(
        self, name: str, key: tuple[Hashable, ...], candidates: Sequence[Config], launch: Callable[[Config], object]
    ) -> Config:
        gpu = _gpu_name()
        known: Config | None = self.winners.get((gpu, name, key))
        if known is not None and known in candidates:
            return known
        entry = _entry(gpu, name, key)
        winner = self._from_file(entry, candidates)
        if winner is None:
            if _capturing():
                return candidates[0]
            winner = _fastest(name, key, candidates, launch)
            if winner is None:
                return candidates[0]
            self._store(entry, winner)
        self.winners[gpu, name, key] = winner
        return winner

    def _from_file(self, entry: str, candidates: Sequence[Config]) -> Config | None:
        """The winner of an earlier process, unless it is no candidate any more."""
        if self.stored is None:
            self.stored = {} if self.file is None else _read(self.file)
        known = self.stored.get(entry)
        return next((candidate for candidate in candidates if _plain(candidate) == known), None)

    def _store(self, entry: str, winner: DataclassInstance) -> None:
        """Add a winner to the file, read again first: other processes add theirs."""
        if self.file is None:
            return
        self.stored = {**(self.stored or {}), **_read(self.file), entry: _plain(winner)}
        try:
            _write(self.file, self.stored)
        except OSError as error:
            _logger.warning(f"{self.file}: cannot be written, autotuning starts over next time: {error.strerror}")
            self.file = None


_tuner: _Tuner | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Timing


class _Timer:
    """Milliseconds of GPU work. Before each measurement a write larger than the L2 cache empties it, and gives the host
    the time to queue what is measured."""

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._filler = torch.empty(2 * l2_bytes, dtype=torch.uint8, device="cuda")
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def queue(self, work: Callable[[], object]) -> None:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._filler.zero_()
        start.record()
        work()
        end.record()
        self._events.append((start, end))

    def milliseconds(self) -> list[float]:
        """Of all that was queued since the last call, in order. Waits for it."""
        torch.cuda.current_stream().synchronize()
        times = [start.elapsed_time(end) for start, end in self._events]
        self._events.clear()
        return times


def _fastest(
    name: str, key: tuple[Hashable, ...], candidates: Sequence[Config], launch: Callable[[Config], object]
) -> Config | None:
    """The candidate with the smallest median time; None if none ran."""
    timer = _Timer()
    errors: dict[int, Exception] = {}
    for index, candidate in enumerate(candidates):
        try:
            timer.queue(functools.partial(launch, candidate))
        except (torch.AcceleratorError, torch.OutOfMemoryError):
            raise  # not the configuration's fault, or nothing can run after it
        except Exception as error:  # of the compiler, the driver or triton, in many classes
            errors[index] = error
        timer.milliseconds()
    running = [index for index in range(len(candidates)) if index not in errors]
    # In turns: the clock of a GPU changes in the meantime, for all of them alike.
    for _ in range(REPEATS):
        for index in running:
            timer.queue(functools.partial(launch, candidates[index]))
    times = timer.milliseconds()
    medians = {index: statistics.median(times[place :: len(running)]) for place, index in enumerate(running)}
    winner = min(running, key=medians.__getitem__, default=None)

    results = [
        f"{label}: failed ({type(errors[index]).__name__})"
        if index in errors
        else f"{label}: {medians[index]:.3f} ms{' *' if index == winner else ''}"
        for index, label in enumerate(_labels(candidates))
    ]
    _logger.info(f"autotuned {name} {key}: {', '.join(results)}")
    return None if winner is None else candidates[winner]


def _labels(candidates: Sequence[DataclassInstance]) -> list[str]:
    """Each candidate by the fields in which it differs from others."""
    values = [_plain(candidate) for candidate in candidates]
    names = [field.name for field in fields(candidates[0])]
    differing = [name for name in names if any(value.get(name) != values[0][name] for value in values)]
    return [" ".join(f"{name}={value.get(name)}" for name in differing) for value in values]


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def _can_time() -> bool:
    if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return False
    import triton

    return not triton.knobs.runtime.interpret


def _capturing() -> bool:
    return torch.cuda.is_current_stream_capturing()


def _gpu_name() -> str:
    return _name_of(torch.cuda.current_device())


@functools.cache
def _name_of(device: int) -> str:
    return torch.cuda.get_device_name(device)


# ---------------------------------------------------------------------------------------------------------------------
# The file


def cache_folder() -> Path:
    """Where measurements of this machine are kept."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moetrain"


def _entry(gpu: str, name: str, key: tuple[Hashable, ...]) -> str:
    import triton

    return f"{gpu}, triton {triton.__version__}, moetrain {__version__}, {name} {key}"


def _plain(config: DataclassInstance) -> dict[str, Any]:
    """The fields, as JSON gives them back."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    return plain


def _read(file: Path) -> dict[str, Any]:
    """The winners in a file; none, with a warning, if it is damaged or something else."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ValueError(f"not in the format {FORMAT!r}")
        winners = content.get("winners")
        if not isinstance(winners, dict):
            raise ValueError("holds no winners")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _logger.warning(f"{file}: ignored, and replaced by the next result of autotuning: {error}")
        return {}
    return winners


def _write(file: Path, winners: dict[str, Any]) -> None:
    """Write all of the file or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp")
    try:
        with open(descriptor, "w", encoding="utf-8") as opened:
            json.dump({"format": FORMAT, "winners": winners}, opened, indent=1, sort_keys=True)
        os.replace(aside, file)
    finally:
        with suppress(FileNotFoundError):
            os.unlink(aside)
