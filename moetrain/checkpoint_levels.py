"""A first level of storage before the run folder: each machine's own disk or memory, fast, and lost with the machine.

    <checkpoint.local_dir>/<run>/<attempt>/rank-00003/step-00000100/

is of one rank: its files, and the manifest of the whole checkpoint, which it gets when all ranks have written theirs.
From there the files are brought to the run folder; only there a checkpoint counts. What an attempt that was killed had
not brought there is brought at the next start, if all its files are still to be found on the machines of the ranks.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch.distributed as dist

from moetrain.checkpoint import (
    Manifest,
    check_files,
    checkpoint_name,
    checkpoints_in,
    commit,
    latest,
    located,
    new_aside,
    prune,
    read_manifest,
    saving,
)
from moetrain.checkpoint_shards import BLOCK_BYTES, SUFFIX, FileEntry
from moetrain.errors import CheckpointError
from moetrain.files import write_all, write_text
from moetrain.parallel import watchdog
from moetrain.parallel.agreement import on_all_ranks, on_rank_0
from moetrain.parallel.mesh import Mesh

_ATTEMPT = "attempt"
"""A file of the checkpoints folder that names the last attempt. What any other has left on a machine is not of this
course of the run."""


class LocalLevel:
    """The first level of the run with this checkpoints folder, under `root`."""

    def __init__(self, root: Path, checkpoints: Path, mesh: Mesh) -> None:
        self.checkpoints = checkpoints
        self._mesh = mesh
        of_path = hashlib.sha256(str(checkpoints.resolve()).encode()).hexdigest()
        self._run = root / f"{checkpoints.resolve().parent.name}-{of_path[:8]}"
        self._attempt: str | None = None

    @property
    def folder(self) -> Path:
        """Of this rank, once an attempt has begun."""
        assert self._attempt is not None
        return self._run / self._attempt / f"rank-{self._mesh.rank:05d}"

    def begin(self) -> None:
        """Begin an attempt, and delete what others have left on this machine. Collective."""
        self._attempt = on_rank_0(located(self._name_attempt, self._mesh), self._mesh.host_group)
        self.clear()
        on_all_ranks(located(self._make, self._mesh), self._mesh.host_group)

    def bring_up(self) -> None:
        """Bring the newest whole checkpoint to the run folder if that has none as new. Collective, without threads."""
        mesh, group = self._mesh, self._mesh.host_group
        newest = on_rank_0(located(self._newest_step, mesh), group)
        attempt = on_rank_0(located(self._last_attempt, mesh), group)
        held = on_all_ranks(located(lambda: _held(self._run / attempt), mesh), group)
        for step in sorted({step for found in held for step in found if step > newest}, reverse=True):
            found = _whole([found.get(step) for found in held])
            if found is None:
                continue
            manifest, places = found
            mine = {name: path for name, (rank, path) in places.items() if rank == mesh.rank}

            def check(manifest: Manifest = manifest, mine: Mapping[str, Path] = mine) -> list[str]:
                return [p for n, path in mine.items() for p in check_files(path.parent, {n: manifest.files[n]})]

            problems = [problem for problems in on_all_ranks(located(check, mesh), group) for problem in problems]
            if not problems:
                with watchdog.paused():
                    bring(manifest, mine, self.checkpoints, mesh, group)
                return
            if mesh.rank == 0:
                warnings.warn(f"skipping the damaged checkpoint of step {step}: {problems[0]}", stacklevel=2)

    def clear(self) -> None:
        """Delete all that is on this machine. Collective."""
        if self._mesh.local_rank == 0:
            shutil.rmtree(self._run, ignore_errors=True)
        dist.barrier(self._mesh.host_group)

    def _last_attempt(self) -> str:
        file = self.checkpoints / _ATTEMPT
        return file.read_text(encoding="utf-8") if file.is_file() else "none"

    def _name_attempt(self) -> str:
        attempt = secrets.token_hex(8)
        write_text(self.checkpoints / _ATTEMPT, attempt)
        return attempt

    def _make(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"checkpoint.local_dir: {self.folder}: {error.strerror}; choose another") from None

    def _newest_step(self) -> int:
        newest = latest(self.checkpoints)
        return -1 if newest is None else read_manifest(newest).step


Held = tuple[Manifest, dict[str, Path]]
"""Of a checkpoint, those of its files that are on a machine."""


def _held(attempt: Path) -> dict[int, Held]:
    """By step, on this machine."""
    held: dict[int, Held] = {}
    for folder in sorted(attempt.glob("rank-*")):
        for step, path in checkpoints_in(folder):
            try:
                manifest = read_manifest(path)
            except CheckpointError:
                continue
            files = {
                name: path / name
                for name, entry in manifest.files.items()
                if (path / name).is_file() and (path / name).stat().st_size == entry.size
            }
            held.setdefault(step, (manifest, {}))[1].update(files)
    return held


def _whole(held: Sequence[Held | None]) -> tuple[Manifest, dict[str, tuple[int, Path]]] | None:
    """Which rank finds each file of a checkpoint, and where; None if one is missing. `held`: by rank."""
    manifests = [found[0] for found in held if found is not None]
    if any(manifest != manifests[0] for manifest in manifests):
        return None
    places: dict[str, tuple[int, Path]] = {}
    for rank, found in enumerate(held):
        for name, path in () if found is None else found[1].items():
            places.setdefault(name, (rank, path))
    return (manifests[0], places) if places.keys() == manifests[0].files.keys() else None


class Uploads:
    """Brings checkpoints of the first level to the run folder, in a thread over a process group of its own.

    One that comes while another is on its way is left out if a newer one comes in the meantime, unless `kept_for_ever`
    says otherwise of its step. `prune`: deletes in the run folder what a step makes needless, on rank 0. Creating one
    is collective.
    """

    def __init__(
        self, level: LocalLevel, mesh: Mesh, kept_for_ever: Callable[[int], bool], prune: Callable[[int], None]
    ) -> None:
        self._level, self._mesh = level, mesh
        self._kept_for_ever, self._prune = kept_for_ever, prune
        self._group = mesh.new_host_group()
        self._thread = ThreadPoolExecutor(1, "checkpoint-upload")
        self._newest: Manifest | None = None
        self._begun: tuple[int, Future[None]] | None = None
        """The last step that was or is on its way."""

    def offer(self, manifest: Manifest) -> None:
        """Bring this checkpoint of the first level now, or leave it for later. Collective over the checkpoint group."""
        self._newest = manifest
        if self._kept_for_ever(manifest.step):
            self._wait()
        group = self._mesh.checkpoint_group
        busy = self._begun is not None and not self._begun[1].done()
        if not on_rank_0(lambda: busy, group):
            self._wait()
            if not self.failed:
                self._begin(manifest)
        on_all_ranks(located(self._forget_others, self._mesh), group)

    def finish(self) -> None:
        """Bring the newest, and forget the first level. Collective; nothing is offered meanwhile. Raises
        CheckpointError, on all ranks, if a checkpoint could not be brought."""
        self._wait()
        newest, begun = self._newest, self._begun
        if newest is not None and begun is not None and newest.step != begun[0] and not self.failed:
            self._begin(newest)
        begun, self._begun = self._begun, None
        if begun is not None:
            begun[1].result()
        self._level.clear()

    @property
    def failed(self) -> bool:
        return self._begun is not None and self._begun[1].done() and self._begun[1].exception() is not None

    def close(self) -> None:
        self._thread.shutdown()

    def _forget_others(self) -> None:
        """Delete on the first level what is neither the newest nor on its way."""
        kept = [self._newest.step] if self._newest is not None else []
        kept += [self._begun[0]] if self._begun is not None else []
        steps = [step for step, _ in checkpoints_in(self._level.folder)]
        prune(self._level.folder, steps, kept)

    def _wait(self) -> None:
        if self._begun is not None:
            wait([self._begun[1]])

    def _begin(self, manifest: Manifest) -> None:
        self._begun = manifest.step, self._thread.submit(self._upload, manifest)

    def _upload(self, manifest: Manifest) -> None:
        folder = checkpoint_name(manifest.step)
        mine = {path.name: path for path in (self._level.folder / folder).glob(f"*{SUFFIX}")}
        with saving(self._level.checkpoints / folder):
            bring(manifest, mine, self._level.checkpoints, self._mesh, self._group)
            on_rank_0(located(lambda: self._prune(manifest.step), self._mesh), self._group)


def bring(
    manifest: Manifest, mine: Mapping[str, Path], checkpoints: Path, mesh: Mesh, group: dist.ProcessGroup
) -> None:
    """Make a checkpoint in the folder `checkpoints` of the files that all ranks bring; collective over the group.

    `mine`: those of this rank, by name. Raises CheckpointError if a file is not what the manifest says.
    """
    target = checkpoints / checkpoint_name(manifest.step)
    aside = on_rank_0(located(lambda: new_aside(target), mesh), group)

    def copy() -> None:
        for name, path in mine.items():
            _copy_file(path, aside / name, manifest.files[name])

    try:
        on_all_ranks(located(copy, mesh), group)
        on_rank_0(located(lambda: commit(aside, target, manifest), mesh), group)
    except Exception:
        if mesh.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
        raise


def _copy_file(source: Path, target: Path, entry: FileEntry) -> None:
    """To a new file, durable; CheckpointError if it is not what it must be."""
    digest = hashlib.sha256()
    with source.open("rb") as read, target.open("xb", buffering=0) as written:
        while block := read.read(BLOCK_BYTES):
            digest.update(block)
            write_all(written, memoryview(block))
        os.fsync(written.fileno())
    if digest.hexdigest() != entry.sha256:
        raise CheckpointError(f"{source}: its SHA-256 is wrong, the file was altered")
