"""Saving in a running job: copies to host memory, a thread that writes them, and the commit by all ranks."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from moetrain.checkpoint import (
    ASIDE,
    Manifest,
    aside_of,
    checkpoint_name,
    checkpoints_in,
    discard,
    located,
    make_manifest,
    reason,
    refuse_file,
    shard_name,
    write_manifest,
)
from moetrain.checkpoint_shards import Part, host_blocks, parts_of, write_shard
from moetrain.errors import CheckpointError
from moetrain.files import fsync_folder
from moetrain.parallel import watchdog
from moetrain.parallel.agreement import on_all_ranks, on_rank_0
from moetrain.parallel.mesh import Mesh
from moetrain.parallel.sharding import ScatteredTensor


class Checkpointer:
    """Saves into one checkpoints folder, one save at a time, and deletes what need not be kept.

    A save stops the trainer while it copies to host memory what this rank will write; the rest happens in a thread,
    over the mesh's own `checkpoint_group`. Replicated tensors are copied and written by one of the ranks that hold
    them. The copy's memory is kept for the next save.

    `keep_last` newest checkpoints are kept, and those of steps divisible by `keep_every` (0: none). Those of steps
    beyond the one just written belong to another course of the run and are left alone until they are replaced.
    `resumed_step`, the step at which this course begins, sets such checkpoints aside as superseded at once (None:
    leaves everything). `asynchronous=False` waits in :meth:`save`. Creating one is collective, and so are its
    methods; it removes what a killed run left half-written in `folder`.
    """

    last_stall_seconds: float = 0.0
    """How long the last save() held up the trainer."""

    def __init__(
        self,
        folder: Path,
        mesh: Mesh,
        *,
        keep_last: int,
        keep_every: int,
        asynchronous: bool,
        resumed_step: int | None = None,
    ) -> None:
        self.folder = folder
        self.mesh = mesh
        self.keep_last = keep_last
        self.keep_every = keep_every
        self.asynchronous = asynchronous
        self._copies: dict[str, Tensor] = {}
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: tuple[Path, Future[None]] | None = None
        on_rank_0(located(lambda: self._prepare_folder(resumed_step), mesh), mesh.host_group)

    def save(self, step: int, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Start to save; the caller may change tensors and progress as soon as it returns.

        `tensors`: logical tensors by name, the same names on all ranks. A DTensor is sharded as its placements say, a
        ScatteredTensor by rows; a plain tensor is the same on all ranks. `progress` must be representable as JSON.
        Raises CheckpointError if the save before this one failed (or this one, if not asynchronous).
        """
        start = time.perf_counter()
        self.wait()
        parts = parts_of(owned(tensors, self.mesh))
        copies = self._copy(parts)
        target = self.folder / checkpoint_name(step)
        account = json.loads(json.dumps(progress))
        self._pending = target, self._thread.submit(self._write, target, step, copies, account)
        if not self.asynchronous:
            self.wait()
        self.last_stall_seconds = time.perf_counter() - start

    def wait(self) -> None:
        """Return when the last save is durable; raises CheckpointError, on all ranks, if it failed on any."""
        if self._pending is None:
            return
        target, future = self._pending
        try:
            with watchdog.paused():
                future.result()
        except Exception as error:
            failure = CheckpointError(f"saving {target} failed: {reason(error)}")
            failure.agreed = isinstance(error, CheckpointError) and error.agreed
            raise failure from error
        finally:
            self._pending = None

    def close(self) -> None:
        """wait(), and end the thread."""
        try:
            self.wait()
        finally:
            self._thread.shutdown()

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

    def _copy(self, parts: Sequence[tuple[Part, Tensor]]) -> list[tuple[Part, Tensor]]:
        """Copies in host memory, pinned if they come from a GPU."""
        copies = {}
        for part, tensor in parts:
            copy = self._copies.get(part.key)
            if copy is None or copy.shape != tensor.shape or copy.dtype != tensor.dtype:
                copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[part.key] = copy.copy_(tensor, non_blocking=True)
        if self.mesh.device.type == "cuda":
            torch.cuda.current_stream(self.mesh.device).synchronize()
        self._copies = copies
        return [(part, copies[part.key]) for part, _ in parts]

    def _write(self, target: Path, step: int, copies: Sequence[tuple[Part, Tensor]], progress: dict[str, Any]) -> None:
        """The thread's part: write aside, checksum, commit. Collective over the checkpoint group."""
        mesh, group = self.mesh, self.mesh.checkpoint_group

        def make_aside() -> Path:
            aside = aside_of(target)
            aside.mkdir()
            return aside

        aside = on_rank_0(located(make_aside, mesh), group)
        try:
            file, parts = aside / shard_name(mesh.rank), [part for part, _ in copies]
            written = on_all_ranks(located(lambda: write_shard(file, parts, host_blocks(copies)), mesh), group)
            files = {shard_name(rank): entry for rank, entry in enumerate(written)}
            manifest = make_manifest(step, mesh.world_size, mesh.ep, progress, files)
            on_rank_0(located(lambda: self._commit(aside, target, manifest), mesh), group)
        except CheckpointError:
            if mesh.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _commit(self, aside: Path, target: Path, manifest: Manifest) -> None:
        write_manifest(aside, manifest)
        fsync_folder(aside)
        if target.exists():
            replaced = target.with_name(f"{target.name}.old")
            if replaced.exists():
                discard(replaced)
            target.rename(replaced)
        aside.rename(target)
        fsync_folder(self.folder)
        self._prune(manifest.step)

    def _prune(self, step: int) -> None:
        found = [(other, path) for other, path in checkpoints_in(self.folder) if other <= step]
        steps = sorted({other for other, _ in found}, reverse=True)
        kept = set(steps[: self.keep_last])
        if self.keep_every:
            kept |= {other for other in steps if other % self.keep_every == 0}
        for other, path in found:
            current = self.folder / checkpoint_name(other)
            if other not in kept or (path != current and current.exists()):
                discard(path)


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
