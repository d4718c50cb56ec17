"""``moetrain bench checkpoint``: what saving costs a run, beside torch.save and torch.distributed.checkpoint.

Steps of the trainer on random tokens. A save is timed by itself, from a quiet disk: how long the call holds the loop
up, by how much the steps until the checkpoint is durable take longer than others just before, and when it is durable.
Then one is made after every step. All implementations write the same tensors to the same folder, with fsync, in one
process after another save has warmed them up. Under torchrun all ranks save, and rank 0 measures.
"""

from __future__ import annotations

import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncSaveResponse

from moetrain.benchmarks.random_tokens import on_random_tokens
from moetrain.benchmarks.report import Report, say, table
from moetrain.benchmarks.timing import Deadline, synchronize
from moetrain.checkpoint_shards import host_blocks, parts_of
from moetrain.checkpointer import owned
from moetrain.config import Config, check_world, load_config
from moetrain.errors import ConfigError
from moetrain.files import write_all
from moetrain.parallel import Mesh, any_rank, environment_world_size
from moetrain.ranks import joined_mesh
from moetrain.state import logical_tensors
from moetrain.trainer import Trainer

MIB = 2**20
PLAIN_STEPS = 3
"""Timed without a save before each save."""


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    config: str
    overrides: Sequence[str] = ()
    methods: Sequence[str] | None = None
    repeats: int = 5
    steps: int = 20
    folder: str | None = None
    budget_seconds: float | None = None
    json: str | None = None


def checkpoint_command(options: Options) -> int:
    """Run the benchmark; returns 0. Raises ConfigError for a bad config or a method that there is none of."""
    config = load_config(options.config, options.overrides)
    check_world(config, environment_world_size())
    names = list(METHODS) if options.methods is None else list(options.methods)
    if unknown := [name for name in names if name not in METHODS]:
        raise ConfigError(f"--methods {unknown[0]}: there are {', '.join(METHODS)}")
    with joined_mesh(config) as mesh, on_random_tokens(config, mesh, options.folder) as config:
        config = replace(config, train=replace(config.train, steps=10**9))  # the last step is reported, and saved
        _bench(config, mesh, names, options, Path(config.run.dir).parent)
    return 0


def _bench(config: Config, mesh: Mesh, names: Sequence[str], options: Options, folder: Path) -> None:
    deadline = Deadline(options.budget_seconds)
    report = Report("checkpoint", mesh.device, options.json if mesh.rank == 0 else None)
    trainer = Trainer(config, mesh)
    loader = trainer._loader()
    with closing(loader), closing(trainer.checkpointer):
        own = owned(logical_tensors(trainer.model, trainer.engine), mesh)
        size = sum(part.bytes for part, _ in parts_of(own))
        report.contents |= {
            "parallel": asdict(config.parallel),
            "world_size": mesh.world_size,
            "tokens_per_step": config.train.tokens_per_step,
            "bytes_of_rank_0": size,
        }
        loop = Loop(trainer, loader, mesh)
        loop.steps(3)  # compile, tune, allocate
        say(
            f"{config.train.tokens_per_step:,} tokens a step, {1e3 * loop.timed(PLAIN_STEPS):.1f} ms; rank 0 writes "
            f"{size / MIB:,.1f} MiB to {folder}"
        )
        for name in names:
            if any_rank(deadline.passed, mesh):
                say(f"--budget-seconds is spent: {name} was not measured")
                break
            if name not in available(mesh):
                say(f"{name}: not here ({METHODS[name].needs})")
                continue
            with METHODS[name].make(trainer, mesh, folder / "checkpoints") as method:
                row = {"name": name, **_measure(method, loop, options, deadline)}
            report.add(row)
        say()
        _show(report.contents["rows"])
        if trainer.logger is not None:
            trainer.logger.close()


class Loop:
    """The training loop, as far as it is timed."""

    def __init__(self, trainer: Trainer, loader: Iterator[Any], mesh: Mesh) -> None:
        self.trainer, self._loader, self.mesh = trainer, loader, mesh

    def step(self) -> None:
        self.trainer._step(self._loader)

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()

    def timed(self, count: int) -> float:
        """Seconds of one of so many steps."""
        synchronize(self.mesh.device)
        start = time.perf_counter()
        self.steps(count)
        synchronize(self.mesh.device)
        return (time.perf_counter() - start) / count


class Method(Protocol):
    """A way to save. It stands in for the trainer's checkpointer, which says before an update that it must wait."""

    def save(self) -> None:
        """Begin to save what the trainer has."""

    def wait_for_copies(self) -> None:
        """Called before each update."""

    def durable_after(self) -> float | None:
        """Seconds from the last save to when it was durable; None: it is not yet."""

    def wait(self) -> None:
        """Until it is."""


def _measure(method: Method, loop: Loop, options: Options, deadline: Deadline) -> dict[str, Any]:
    mesh = loop.mesh
    with _instead_of_the_checkpointer(loop.trainer, method):
        first = _one_save(method, loop)
        saves = [_one_save(method, loop)]
        while len(saves) < options.repeats and not any_rank(deadline.passed, mesh):
            saves.append(_one_save(method, loop))
        row: dict[str, Any] = {
            "saves": len(saves),
            "first_stall_s": first["stall_s"],
            **{key: statistics.median(save[key] for save in saves) for key in first},
            "each_save": saves,
        }
        if not any_rank(deadline.passed, mesh):
            row |= _every_step(method, loop, options.steps)
    return row


def _one_save(method: Method, loop: Loop) -> dict[str, float]:
    """Seconds that it holds the call up, that the steps until it is durable take longer by, and until that."""
    plain = loop.timed(PLAIN_STEPS)
    synchronize(loop.mesh.device)
    start = time.perf_counter()
    method.save()
    blocked = time.perf_counter() - start
    steps = 0
    while steps < PLAIN_STEPS or any_rank(method.durable_after() is None, loop.mesh):
        loop.step()
        steps += 1
    synchronize(loop.mesh.device)
    total = time.perf_counter() - start
    durable = method.durable_after()
    assert durable is not None
    return {"blocked_s": blocked, "stall_s": total - steps * plain, "durable_s": durable, "step_s": plain}


def _every_step(method: Method, loop: Loop, steps: int) -> dict[str, float]:
    """Seconds of a step without saves, and with one after each; half of the former before, half after."""

    def save_each() -> float:
        synchronize(loop.mesh.device)
        start = time.perf_counter()
        for _ in range(steps):
            method.save()
            loop.step()
        synchronize(loop.mesh.device)
        seconds = time.perf_counter() - start
        method.wait()
        return seconds / steps

    save_each()  # takes all the memory that it will have
    before = loop.timed(steps)
    saving = save_each()
    plain = (before + loop.timed(steps)) / 2
    return {"plain_step_s": plain, "saving_step_s": saving, "cost": saving / plain - 1}


@contextmanager
def _instead_of_the_checkpointer(trainer: Trainer, method: Method) -> Iterator[None]:
    own, trainer.checkpointer = trainer.checkpointer, method  # type: ignore[assignment]
    try:
        yield
    finally:
        trainer.checkpointer = own


def _show(rows: Sequence[dict[str, Any]]) -> None:
    table(
        ("", "blocked ms", "stall ms", "durable s", "first stall", "step ms", "saving each", "cost %"),
        [
            (
                row["name"],
                1e3 * row["blocked_s"],
                1e3 * row["stall_s"],
                row["durable_s"],
                1e3 * row["first_stall_s"],
                1e3 * row.get("plain_step_s", row["step_s"]),
                1e3 * row["saving_step_s"] if "saving_step_s" in row else None,
                100 * row["cost"] if "cost" in row else None,
            )
            for row in rows
        ],
    )


# ----------------------------------------------------------------------------------------------------------- methods


class Ours:
    """The trainer's checkpointer."""

    def __init__(self, trainer: Trainer, mesh: Mesh, folder: Path) -> None:
        self._trainer, self._checkpointer = trainer, trainer.checkpointer
        self._clock = Clock()

    def save(self) -> None:
        self._clock.begin()
        saved = self._checkpointer.save(
            self._trainer.progress.step, logical_tensors(self._trainer.model, self._trainer.engine), {}
        )
        self._clock.until(saved)

    def wait_for_copies(self) -> None:
        self._checkpointer.wait_for_copies()

    def durable_after(self) -> float | None:
        return self._clock.seconds

    def wait(self) -> None:
        self._checkpointer.wait()

    def close(self) -> None:
        self.wait()


class Blocking:
    """Something that returns when it has saved."""

    def __init__(self, write: Callable[[Path], None], folder: Path) -> None:
        self._write, self._folders = write, Folders(folder)
        self._clock = Clock()

    def save(self) -> None:
        self._clock.begin()
        self._write(self._folders.next())
        self._clock.end()

    def wait_for_copies(self) -> None:
        """All are done."""

    def durable_after(self) -> float | None:
        return self._clock.seconds

    def wait(self) -> None:
        """All are done."""

    def close(self) -> None:
        self._folders.close()


class AsyncSave:
    """torch.distributed.checkpoint.async_save, as it is by default, or with what it has for GPUs."""

    def __init__(self, trainer: Trainer, mesh: Mesh, folder: Path, stager: DefaultStager | None) -> None:
        self._trainer, self._mesh, self._stager = trainer, mesh, stager
        self._folders, self._clock = Folders(folder), Clock()
        self._written: Future[Any] | None = None
        self._staged: Future[Any] | None = None

    def save(self) -> None:
        self.wait()
        self._clock.begin()
        if self._stager is not None:
            torch.cuda.current_stream().synchronize()  # its stream does not wait for the update
        response = dcp.async_save(
            logical_tensors(self._trainer.model, self._trainer.engine),
            checkpoint_id=self._folders.next(),
            process_group=self._mesh.checkpoint_group,
            async_stager=self._stager,
        )
        if isinstance(response, AsyncSaveResponse):
            self._staged, self._written = response.staging_completion, response.upload_completion
        else:
            self._written = response
        self._clock.until(self._written)

    def wait_for_copies(self) -> None:
        if self._staged is not None:
            self._staged.result()

    def durable_after(self) -> float | None:
        return self._clock.seconds

    def wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def close(self) -> None:
        self.wait()
        self._folders.close()
        if self._stager is not None:
            self._stager.close()


class Clock:
    """Seconds from the beginning of a save to when it is durable; None until then."""

    seconds: float | None = None

    def begin(self) -> None:
        self._start, self.seconds = time.perf_counter(), None

    def end(self) -> None:
        self.seconds = time.perf_counter() - self._start

    def until(self, saved: Future[Any]) -> None:
        """The saves before it may still be on their way: only the last counts."""
        start = self._start

        def done(_: Future[Any]) -> None:
            if start == self._start:
                self.end()

        saved.add_done_callback(done)


class Folders:
    """Of the checkpoints of a method, of which the last two are kept, as moetrain's are; deleted by a thread, too."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._number = folder, 0
        self._thread = ThreadPoolExecutor(1)

    def next(self) -> Path:
        self._number += 1
        self._thread.submit(shutil.rmtree, self._path(self._number - 3), ignore_errors=True)
        return self._path(self._number)

    def close(self) -> None:
        self._thread.shutdown()
        for number in range(self._number - 2, self._number + 1):
            shutil.rmtree(self._path(number), ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self._folder / f"peer-{number}"


@dataclass(frozen=True)
class Making:
    """How a method is made, and what it needs."""

    make: Callable[[Trainer, Mesh, Path], Any]
    needs: str = ""


def _ours(trainer: Trainer, mesh: Mesh, folder: Path) -> Any:
    return closing(Ours(trainer, mesh, folder))


def _torch_save(trainer: Trainer, mesh: Mesh, folder: Path) -> Any:
    def write(path: Path) -> None:
        path.mkdir(parents=True)
        state = {"model": trainer.model.state_dict(), "optimizer": trainer.engine.optimizer.state_dict()}
        with (path / "state.pt").open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())

    return closing(Blocking(write, folder))


def _dcp_save(trainer: Trainer, mesh: Mesh, folder: Path) -> Any:
    def write(path: Path) -> None:
        tensors = logical_tensors(trainer.model, trainer.engine)
        dcp.save(tensors, checkpoint_id=path, process_group=mesh.checkpoint_group)

    return closing(Blocking(write, folder))


def _dcp_async_save(trainer: Trainer, mesh: Mesh, folder: Path) -> Any:
    return closing(AsyncSave(trainer, mesh, folder, stager=None))


def _dcp_pinned(trainer: Trainer, mesh: Mesh, folder: Path) -> Any:
    return closing(AsyncSave(trainer, mesh, folder, DefaultStager(StagingOptions())))


def _plain_write(trainer: Trainer, mesh: Mesh, folder: Path) -> Any:
    """What the disk takes: the same bytes from host memory, one write after another, and fsync."""
    own = owned(logical_tensors(trainer.model, trainer.engine), mesh)
    parts = [tensor.cpu() for _, tensor in parts_of(own)]

    def write(path: Path) -> None:
        with suppress(FileExistsError):  # all ranks write there
            path.mkdir(parents=True)
        with (path / f"rank-{mesh.rank}").open("xb", buffering=0) as file:
            for block in host_blocks(parts):
                write_all(file, block)
            os.fsync(file.fileno())

    return closing(Blocking(write, folder))


METHODS = {
    "moetrain": Making(_ours),
    "torch.save": Making(_torch_save, "one rank"),
    "DCP save": Making(_dcp_save),
    "DCP async_save": Making(_dcp_async_save),
    "DCP async_save, pinned": Making(_dcp_pinned, "a GPU"),
    "write and fsync alone": Making(_plain_write),
}


def available(mesh: Mesh) -> list[str]:
    """The methods that there are on these ranks."""
    missing = {"one rank": mesh.world_size > 1, "a GPU": mesh.device.type != "cuda", "": False}
    return [name for name, making in METHODS.items() if not missing[making.needs]]
