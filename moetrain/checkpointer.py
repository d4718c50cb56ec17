"""Saving in a running job: copies to host memory, a thread that writes them, and the commit by all ranks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.checkpoint import (
    ASIDE,
    Manifest,
    checkpoint_name,
    checkpoints_in,
    commit,
    discard,
    located,
    make_manifest,
    new_aside,
    prune,
    refuse_file,
    saving,
)
from moetrain.checkpoint_levels import LocalLevel, Uploads
from moetrain.checkpoint_shards import FileEntry, Part, files_of, parts_of, write_shard
from moetrain.checkpoint_staging import Copy, Stager, threads
from moetrain.files import fsync_folder
from moetrain.parallel import watchdog
from moetrain.parallel.agreement import on_all_ranks, on_rank_0
from moetrain.parallel.mesh import Mesh
from moetrain.parallel.sharding import ScatteredTensor

T = TypeVar("T")

FILES_AT_ONCE = 4
"""That a rank writes and hashes; one thread hashes 2 GB/s."""


class Checkpointer:
    """Saves into one checkpoints folder, and deletes what need not be kept.

    A save begins with copies to host memory (moetrain/checkpoint_staging.py), of replicated tensors by one of the ranks
    that hold them, and a thread writes them, save after save, over the mesh's own `checkpoint_group`. The trainer goes
    on meanwhile, but calls :meth:`wait_for_copies` before it changes a tensor.

    `keep_last` newest checkpoints are kept, and those of steps divisible by `keep_every` (0: none). Those of steps
    beyond the one just written belong to another course of the run and are left alone until they are replaced.
    `resumed_step`, the step at which this course begins, sets such checkpoints aside as superseded at once (None:
    leaves everything). `asynchronous=False` waits in :meth:`save`. `host_memory_bytes`: for copies that are not written
    yet; None: see :func:`moetrain.checkpoint_staging.default_limit`. With a `local` level checkpoints are written there
    and then brought to the folder, by a third thread. Creating one is collective, and so are its methods but for
    :meth:`wait_for_copies` and :meth:`close`; it removes what a killed run left half-written in `folder`.
    """

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        *,
        keep_last: int,
        keep_every: int,
        asynchronous: bool,
        resumed_step: int | None = None,
        host_memory_bytes: int | None = None,
        local: LocalLevel | None = None,
    ) -> None:
        self.folder = folder
        self.mesh = mesh
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self._stager = Stager(mesh.device, host_memory_bytes)
        self._copies: list[Copy] = []
        """What may not have been copied yet."""
        self._writer = threads(1, "checkpoint-write", mesh.device)
        self._files = threads(FILES_AT_ONCE, "checkpoint-file", mesh.device)
        self._pending: list[Future[None]] = []
        """Saves that are not durable, and those that failed, oldest first."""
        self._stalls = Stalls(mesh.device)
        on_rank_0(located(lambda: self._prepare_folder(resumed_step), mesh), mesh.host_group)
        self._local = local
        self._uploads: Uploads | None = None
        if local is not None:
            local.begin()
            self._uploads = Uploads(local, mesh, self._kept_for_ever, self._prune)

    def save(self, step: int, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> Future[None]:
        """Begin to save; the caller may change `progress`, and after :meth:`wait_for_copies` the tensors.

        What is returned is done when the checkpoint is durable (on the first level, if there is one), or has failed.

        `tensors`: logical tensors by name, the same names on all ranks. A DTensor is sharded as its placements say, a
        ScatteredTensor by rows; a plain tensor is the same on all ranks. `progress` must be representable as JSON.
        Raises CheckpointError only if not asynchronous; else see :attr:`failed`.
        """
        account = json.loads(json.dumps(progress))
        self.wait_for_copies()
        with self._stalls.host():
            named = files_of(parts_of(owned(tensors, self.mesh)), self.mesh.rank)
            self._copies = self._stager.copy([[tensor for _, tensor in parts] for parts in named.values()])
            files = [
                _File(name, [part for part, _ in parts], copy)
                for (name, parts), copy in zip(named.items(), self._copies, strict=True)
            ]
            written = self._writer.submit(self._write, step, files, account)
            self._pending = [save for save in self._pending if not save.done() or _failed(save)] + [written]
            if not self.asynchronous:
                self.wait()
        return written

    def wait_for_copies(self) -> None:
        """Return when the tensors of the last save may change: here and now, or on a GPU in the current stream."""
        if self._copies:
            with self._stalls.stream():
                self._wait_for_copies()

    @property
    def failed(self) -> bool:
        """Whether this rank knows of a save that failed: :meth:`wait` will raise its error on all ranks."""
        uploads = self._uploads
        return any(map(_failed, self._pending)) or (uploads is not None and uploads.failed)

    def wait(self) -> None:
        """Return when all saves are durable; raises CheckpointError, on all ranks, if one failed on any."""
        self._wait_for_copies()
        pending, self._pending = self._pending, []
        with watchdog.paused():
            errors = [error for save in pending if (error := save.exception()) is not None]
            if errors:
                raise errors[0]
            if self._uploads is not None:
                self._uploads.finish()

    def close(self) -> None:
        """End the threads, which write what is pending first."""
        with watchdog.paused():
            self._writer.shutdown()
            self._files.shutdown()
            self._stager.close()
            if self._uploads is not None:
                self._uploads.close()

    def take_stall(self) -> float:
        """Seconds for which saves have held the trainer up since this was last called."""
        return self._stalls.take()

    def _wait_for_copies(self) -> None:
        with watchdog.paused():
            for copy in self._copies:
                copy.wait()
        self._copies = []

    def _prepare_folder(self, resumed_step: int | None) -> None:
        refuse_file(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(ASIDE):
            shutil.rmtree(path)
        for step, path in reversed(checkpoints_in(self.folder)):  # a replaced one makes way for its successor
            if resumed_step is not None and step > resumed_step:
                superseded = self.folder / f"{checkpoint_name(step)}.superseded"
                if superseded.exists():
                    discard(superseded)
                path.rename(superseded)
        fsync_folder(self.folder)

    def _write(self, step: int, files: Sequence[_File], progress: dict[str, Any]) -> None:
        """The thread's part: write, agree, commit. Collective over the checkpoint group."""
        folder = self.folder if self._local is None else self._local.folder
        target = folder / checkpoint_name(step)
        with saving(target):
            try:
                manifest = self._write_to(target, step, files, progress)
            finally:
                for file in files:
                    file.copy.drop()  # or the trainer would wait for it
            if self._uploads is None:
                on_rank_0(located(lambda: self._prune(step), self.mesh), self.mesh.checkpoint_group)
            else:
                self._uploads.offer(manifest)

    def _write_to(self, target: Path, step: int, files: Sequence[_File], progress: dict[str, Any]) -> Manifest:
        """Into the folder that all ranks share, or that each has for itself."""
        mesh, shared = self.mesh, self._local is None

        def by_owner(work: Callable[[], T]) -> T:
            if shared:
                return on_rank_0(located(work, mesh), mesh.checkpoint_group)
            return on_all_ranks(located(work, mesh), mesh.checkpoint_group)[mesh.rank]

        def write() -> dict[str, FileEntry]:
            entries = {file.name: self._files.submit(file.write, aside) for file in files}
            wait(entries.values())
            return {name: entry.result() for name, entry in entries.items()}

        aside = by_owner(lambda: new_aside(target))
        try:
            written = on_all_ranks(located(write, mesh), mesh.checkpoint_group)
            entries = {name: entry for found in written for name, entry in found.items()}
            manifest = make_manifest(step, mesh.world_size, mesh.ep, progress, entries)
            by_owner(lambda: commit(aside, target, manifest))
        except Exception:
            if mesh.rank == 0 or not shared:
                shutil.rmtree(aside, ignore_errors=True)
            raise
        return manifest

    def _prune(self, step: int) -> None:
        steps = sorted({other for other, _ in checkpoints_in(self.folder) if other <= step}, reverse=True)
        prune(self.folder, steps, {*steps[: self.keep_last], *filter(self._kept_for_ever, steps)})

    def _kept_for_ever(self, step: int) -> bool:
        return self.keep_every > 0 and step % self.keep_every == 0


@dataclass(frozen=True)
class _File:
    """What a file of a checkpoint will hold, and the copy of it that is under way."""

    name: str
    parts: Sequence[Part]
    copy: Copy

    def write(self, folder: Path) -> FileEntry:
        try:
            with closing(self.copy.blocks()) as blocks:
                return write_shard(folder / self.name, self.parts, blocks)
        finally:
            self.copy.drop()  # its blocks are wanted by other files


class Stalls:
    """For how long saves have held the trainer up."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def host(self) -> Iterator[None]:
        """Time inside counts."""
        start = time.perf_counter()
        yield
        self._seconds += time.perf_counter() - start

    @contextmanager
    def stream(self) -> Iterator[None]:
        """What of the time inside the current stream has nothing else to do counts; without a GPU all of it."""
        if self._device.type != "cuda":
            with self.host():
                yield
            return
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        yield
        after.record()
        self._waits.append((before, after))

    def take(self) -> float:
        """Seconds so far, of a stream until where it has come; begins anew."""
        passed = [wait for wait in self._waits if wait[1].query()]
        self._waits = self._waits[len(passed) :]
        seconds = self._seconds + sum(before.elapsed_time(after) for before, after in passed) / 1e3
        self._seconds = 0.0
        return seconds


def _failed(save: Future[None]) -> bool:
    return save.done() and save.exception() is not None


def owned(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Those tensors, or shards of them, that this rank writes.

    Of the ranks that hold the same data it is the one with the fewest bytes so far. All ranks come to the same
    result without talking, so that none copies to the host what another writes.
    """
    mine: dict[str, Tensor] = {}
    assigned: dict[int, list[int]] = {}
    for name in sorted(tensors):
        tensor = tensors[name]
        replica, replicas = mesh.rank, mesh.world_size
        if isinstance(tensor, DTensor):
            replica, replicas = 0, 1
            coordinates = tensor.device_mesh.get_coordinate()
            assert coordinates is not None, "every rank is in the mesh"
            for placement, size, coordinate in zip(
                tensor.placements, tensor.device_mesh.shape, coordinates, strict=True
            ):
                if placement.is_replicate():
                    replica, replicas = replica * size + coordinate, replicas * size
        elif isinstance(tensor, ScatteredTensor):
            replica, replicas = tensor.copies
        load = assigned.setdefault(replicas, [0] * replicas)
        writer = load.index(min(load))
        load[writer] += tensor.numel() * tensor.element_size()
        if replica == writer:
            mine[name] = tensor
    return mine
