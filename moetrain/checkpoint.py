"""Checkpoints: what is in one, when it counts, how it is written behind the training loop's back and read again.

A run's checkpoints/ folder::

    step-00000100/                a checkpoint: complete by construction, because this name is given last
        manifest.json             step, progress, versions, and the size and SHA-256 of every other file
        .metadata, __0_0.distcp   torch.distributed.checkpoint: every tensor under its logical name, in shards
    step-00000100.old/            a checkpoint while another of the same step takes its name
    step-00000200.superseded/     of a course that was abandoned: the run resumed from an earlier step by its path
    step-00000200.tmp-1f3a9c0e/   being written, being deleted, or left by a killed run

A superseded checkpoint is neither the newest one nor ever deleted, but it can be resumed from by its path.

The contents are logical tensors, so a checkpoint does not depend on the number of ranks that wrote it. Ranks share
the file system.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import re
import secrets
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor

import moetrain
from moetrain.errors import CheckpointError, UserError
from moetrain.files import folder_written_aside, fsync_folder, sha256, written_aside
from moetrain.parallel import watchdog
from moetrain.parallel.agreement import on_all_ranks, on_rank_0, raise_together
from moetrain.parallel.mesh import Mesh
from moetrain.parallel.sharding import ScatteredTensor

T = TypeVar("T")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)(\.old)?")
_ASIDE = "step-*.tmp-*"

# DCP makes two debug records for every tensor, which cost more than small tensors do.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.CRITICAL)


# ---------------------------------------------------------------------------------------------------- on disk


@dataclass(frozen=True)
class FileEntry:
    """What a file of a checkpoint must be."""

    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """manifest.json without its last key, the SHA-256 of the others."""

    format_version: int
    step: int
    moetrain: str
    torch: str
    world_size: int
    ep: int
    progress: dict[str, Any]
    """The trainer's own account: samples, tokens, config_hash, …"""
    files: dict[str, FileEntry]


def checkpoint_name(step: int) -> str:
    """Folder name of the checkpoint of `step`."""
    return f"step-{step:08d}"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint `path`; raises CheckpointError if it is missing, unreadable or altered."""
    file = path / MANIFEST
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        version = content["format_version"]
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"{file}: format {version}; this moetrain {moetrain.__version__} reads {FORMAT_VERSION}"
            )
        checksum = content.pop("sha256")
        if checksum != _json_sha256(content):
            raise CheckpointError(f"{file}: its SHA-256 is wrong, the file was altered")
        content["files"] = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        return Manifest(**content)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: unreadable: {_reason(error)}") from error


@dataclass(frozen=True)
class TensorEntry:
    """What a checkpoint knows of a tensor without reading it."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * self.dtype.itemsize


def contents(path: Path) -> dict[str, TensorEntry]:
    """The logical tensors in the checkpoint `path`, by name; CheckpointError if its metadata cannot be read."""
    try:
        saved = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    except Exception as error:
        raise CheckpointError(f"{path}: its metadata cannot be read: {_reason(error)}") from error
    entries: dict[str, TensorEntry] = {}
    for name, entry in saved.items():
        assert isinstance(entry, TensorStorageMetadata)
        entries[name] = TensorEntry(tuple(entry.size), entry.properties.dtype)
    return entries


def verify(path: Path, *, checksums: bool = True, part: slice = slice(None)) -> list[str]:
    """What is wrong with the checkpoint `path`, one line for each file; empty if nothing is.

    Without `checksums` it looks at the manifest and at the sizes of the files only; with them it reads every byte.
    `part`: which of the files to look at.
    """
    try:
        manifest = read_manifest(path)
    except CheckpointError as error:
        return [str(error)]
    return check_files(path, dict(list(manifest.files.items())[part]), checksums=checksums)


def check_files(folder: Path, files: Mapping[str, FileEntry], *, checksums: bool = True) -> list[str]:
    """Which of these files are not what they must be, one line each."""

    def problem(name: str) -> str | None:
        file, entry = folder / name, files[name]
        try:
            size = file.stat().st_size
            if size != entry.size:
                return f"{file}: {size} bytes instead of {entry.size}"
            if checksums and sha256(file) != entry.sha256:
                return f"{file}: its SHA-256 is wrong, the file was altered"
        except FileNotFoundError:
            return f"{file}: missing"
        except OSError as error:
            return f"{file}: {_reason(error)}"
        return None

    with watchdog.paused(), ThreadPoolExecutor() as pool:  # hashing leaves the interpreter lock
        return [line for line in pool.map(problem, files) if line is not None]


def latest(folder: Path, *, checksums: bool = False) -> Path | None:
    """The newest whole checkpoint in `folder`, None if there is none; damaged ones are passed over with a warning."""
    return _first_whole([path for _, path in _checkpoints(folder)], lambda path: verify(path, checksums=checksums))


def find_checkpoint(path: Path, *, checksums: bool = True) -> Path:
    """The checkpoint that a user means by `path`: a checkpoint, a checkpoints folder, or a run folder (the newest).

    It is verified, without `checksums` by the sizes of its files only. Raises CheckpointError if there is none, or if
    the one that was named is damaged.
    """
    return _choose(path, checkpoints_at(path), lambda checkpoint: verify(checkpoint, checksums=checksums))


def checkpoints_at(path: Path) -> list[Path]:
    """All checkpoints that `path` holds, whole or not, newest first; CheckpointError if there is none."""
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; give a run, a checkpoints folder or a checkpoint")
    found = _meant(path)
    if not found:
        raise CheckpointError(f"{path}: holds no checkpoint; give a run, a checkpoints folder or a checkpoint")
    return found


def find_resume(folder: Path, resume: str, mesh: Mesh) -> Path | None:
    """The checkpoint from which a run starts, the same on all ranks; None: from scratch. Collective.

    `folder` is the checkpoints folder of the run, `resume` is the config's ``checkpoint.resume``. Raises
    CheckpointError where starting would lose something: never, but there are checkpoints; auto, but all are damaged;
    a path that :func:`find_checkpoint` refuses.
    """
    if resume not in ("auto", "never"):
        on_rank_0(_located(lambda: _refuse_file(folder), mesh), mesh.host_group)
        return find_together(Path(resume), mesh, "checkpoint.resume = ", "give auto, never, or the path of a run, ")

    def candidates() -> list[Path]:
        _refuse_file(folder)
        found = [path for _, path in _checkpoints(folder)]
        if found and resume == "never":
            raise CheckpointError(
                f"{folder} holds checkpoints, but checkpoint.resume = never: choose another run.dir or "
                "checkpoint.resume=auto"
            )
        return found

    paths = on_rank_0(_located(candidates, mesh), mesh.host_group)

    def newest() -> Path | None:
        found = _first_whole(paths, partial(_verify_together, mesh=mesh))
        if found is None and paths:
            raise CheckpointError(
                f"{folder}: every checkpoint is damaged; move them away or choose another run.dir to start anew"
            )
        return found

    return _told_by_rank_0(newest, mesh)


def find_together(path: Path, mesh: Mesh, key: str = "", instead: str = "give a run, ") -> Path:
    """:func:`find_checkpoint`, of whose files each rank verifies a part; collective.

    `key` and `instead` are how an error begins that there is no such folder, and that it tells what else may stand
    there.
    """

    def candidates() -> list[Path]:
        if not path.is_dir():
            raise CheckpointError(f"{key}{path}: no such folder; {instead}a checkpoints folder or a checkpoint")
        return _meant(path)

    paths = on_rank_0(_located(candidates, mesh), mesh.host_group)
    return _told_by_rank_0(lambda: _choose(path, paths, partial(_verify_together, mesh=mesh)), mesh)


def _verify_together(path: Path, mesh: Mesh) -> list[str]:
    """:func:`verify`, shared among the ranks: reading terabytes takes longer than a collective waits."""
    problems = on_rank_0(_located(lambda: verify(path, checksums=False), mesh), mesh.host_group)
    if problems:
        return problems
    part = slice(mesh.rank, None, mesh.world_size)
    found = on_all_ranks(_located(lambda: verify(path, part=part), mesh), mesh.host_group)
    return [problem for problems in found for problem in problems]


def _told_by_rank_0(work: Callable[[], T], mesh: Mesh) -> T:
    """What `work`, collective, finds on all ranks; warnings are rank 0's, and errors everybody's."""
    error: CheckpointError | None = None
    with warnings.catch_warnings():
        if mesh.rank > 0:
            warnings.simplefilter("ignore")
        try:
            found = work()
        except CheckpointError as caught:
            error = caught
    raise_together(error, mesh)
    return found


def _meant(path: Path) -> list[Path]:
    """The checkpoints that a user may mean by the folder `path`, best first: [path] if it is one itself."""
    if _NAME.fullmatch(path.resolve().name) or (path / MANIFEST).exists():
        return [path]
    return [found for folder in (path / "checkpoints", path) for _, found in _checkpoints(folder)]


def _choose(path: Path, meant: list[Path], check: Callable[[Path], list[str]]) -> Path:
    """The first whole checkpoint of those that are meant by `path`."""
    if meant == [path]:
        problems = check(path)
        if problems:
            raise CheckpointError(f"{path} is damaged: {_few(problems)}; choose another checkpoint")
        return path
    found = _first_whole(meant, check)
    if found is None:
        raise CheckpointError(f"{path}: holds no whole checkpoint")
    return found


def _first_whole(paths: list[Path], check: Callable[[Path], list[str]]) -> Path | None:
    for path in paths:
        problems = check(path)
        if not problems:
            return path
        warnings.warn(f"skipping the damaged checkpoint {path}: {problems[0]}", stacklevel=3)
    return None


def _refuse_file(folder: Path) -> None:
    """Raise CheckpointError if the folder cannot be made because a file is in its place or in its parents'."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"run.dir: {path} is a file, not a folder; move it away or choose another run.dir")


def _checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of whatever has the name of a checkpoint, newest first; a replaced one after its successor."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    named.sort(key=lambda item: (int(item[0][1]), item[0][2] is None), reverse=True)
    return [(int(match[1]), path) for match, path in named]


def _json_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_manifest(path: Path, manifest: Manifest) -> None:
    content = asdict(manifest)
    with written_aside(path / MANIFEST) as aside:
        aside.write_text(json.dumps(content | {"sha256": _json_sha256(content)}, indent=1), encoding="utf-8")


def _aside_of(target: Path) -> Path:
    """A name beside `target` that nothing has, not even the remains of a killed run."""
    return target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")


def _discard(path: Path) -> None:
    """Delete a checkpoint; killed in the middle, it leaves no checkpoint's name on half of one."""
    shutil.rmtree(path.rename(_aside_of(path)))


# ------------------------------------------------------------------------------------------------------ errors


def _located(work: Callable[[], T], mesh: Mesh) -> Callable[[], T]:
    """`work`, all of whose errors are CheckpointErrors, those from below with the rank if there are several."""

    def located() -> T:
        try:
            return work()
        except CheckpointError:
            raise
        except Exception as error:
            where = f"rank {mesh.rank}: " if mesh.world_size > 1 else ""
            raise CheckpointError(where + _reason(error)) from error

    return located


def _reason(error: BaseException) -> str:
    """One line that says what went wrong, without DCP's tracebacks."""
    if isinstance(error, CheckpointException):
        return _reason(next(iter(error.failures.values()))[0])
    if isinstance(error, UserError | OSError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _few(lines: list[str]) -> str:
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


# ------------------------------------------------------------------------------------------------------ saving


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
        on_rank_0(_located(lambda: self._prepare_folder(resumed_step), mesh), mesh.host_group)

    def save(self, step: int, tensors: Mapping[str, Tensor], progress: Mapping[str, Any]) -> None:
        """Start to save; the caller may change tensors and progress as soon as it returns.

        `tensors`: logical tensors by name, the same names on all ranks. A DTensor is sharded as its placements say, a
        ScatteredTensor by rows; a plain tensor is the same on all ranks. `progress` must be representable as JSON.
        Raises CheckpointError if the save before this one failed (or this one, if not asynchronous).
        """
        start = time.perf_counter()
        self.wait()
        owned = _owned(tensors, self.mesh)
        plan = create_default_local_save_plan(owned, is_coordinator=False)
        copies = self._copy(owned)
        target = self.folder / checkpoint_name(step)
        account = json.loads(json.dumps(progress))
        self._pending = target, self._thread.submit(self._write, target, step, plan, copies, account)
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
        except (Exception, CheckpointException) as error:
            failure = CheckpointError(f"saving {target} failed: {_reason(error)}")
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
        _refuse_file(self.folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob(_ASIDE):
            shutil.rmtree(path)
        for step, path in reversed(_checkpoints(self.folder)):  # a replaced one makes way for its successor
            if resumed_step is not None and step > resumed_step:
                superseded = self.folder / f"{checkpoint_name(step)}.superseded"
                if superseded.exists():
                    _discard(superseded)
                path.rename(superseded)
        fsync_folder(self.folder)

    @torch.no_grad()
    def _copy(self, owned: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Copies of the local shards in host memory, pinned if they come from a GPU."""
        copies = {}
        for name, tensor in owned.items():
            local = tensor.to_local() if isinstance(tensor, DTensor | ScatteredTensor) else tensor
            copy = self._copies.get(name)
            if copy is None or copy.shape != local.shape or copy.dtype != local.dtype:
                copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            copies[name] = copy.copy_(local, non_blocking=True)
        if self.mesh.device.type == "cuda":
            torch.cuda.current_stream(self.mesh.device).synchronize()
        self._copies = copies
        return {
            name: tensor.like(copies[name]) if isinstance(tensor, ScatteredTensor) else copies[name]
            for name, tensor in owned.items()
        }

    def _write(
        self, target: Path, step: int, plan: SavePlan, copies: dict[str, Tensor], progress: dict[str, Any]
    ) -> None:
        """The thread's part: write aside, checksum, commit. Collective over the checkpoint group."""
        group = self.mesh.checkpoint_group

        def make_aside() -> Path:
            aside = _aside_of(target)
            aside.mkdir()
            return aside

        aside = on_rank_0(_located(make_aside, self.mesh), group)
        try:
            writer = _Writer(aside)
            dcp.save(copies, storage_writer=writer, planner=_Planner(plan), process_group=group)
            written = on_all_ranks(_located(writer.files, self.mesh), group)
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                step=step,
                moetrain=moetrain.__version__,
                torch=torch.__version__,
                world_size=self.mesh.world_size,
                ep=self.mesh.ep,
                progress=progress,
                files={name: entry for files in written for name, entry in files.items()},
            )
            on_rank_0(_located(lambda: self._commit(aside, target, manifest), self.mesh), group)
        except (CheckpointError, CheckpointException):
            if self.mesh.rank == 0:
                shutil.rmtree(aside, ignore_errors=True)
            raise

    def _commit(self, aside: Path, target: Path, manifest: Manifest) -> None:
        _write_manifest(aside, manifest)
        fsync_folder(aside)
        if target.exists():
            replaced = target.with_name(f"{target.name}.old")
            if replaced.exists():
                _discard(replaced)
            target.rename(replaced)
        aside.rename(target)
        fsync_folder(self.folder)
        self._prune(manifest.step)

    def _prune(self, step: int) -> None:
        found = [(other, path) for other, path in _checkpoints(self.folder) if other <= step]
        steps = sorted({other for other, _ in found}, reverse=True)
        kept = set(steps[: self.keep_last])
        if self.keep_every:
            kept |= {other for other in steps if other % self.keep_every == 0}
        for other, path in found:
            current = self.folder / checkpoint_name(other)
            if other not in kept or (path != current and current.exists()):
                _discard(path)


def _owned(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """Those tensors, or shards of them, that this rank writes.

    Of the ranks that hold the same data it is the one with the fewest bytes so far. All ranks come to the same
    result without talking, so that none copies to the host what another writes.
    """
    owned: dict[str, Tensor] = {}
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
            owned[name] = tensor
    return owned


class _Planner(DefaultSavePlanner):
    """Carries out a plan that was made of the trainer's tensors on their copies."""

    def __init__(self, plan: SavePlan) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.plan = plan

    def create_local_plan(self) -> SavePlan:
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Any:
        copy = self.state_dict[index.fqn]
        return copy.__get_tensor_shard__(index) if isinstance(copy, ScatteredTensor) else copy


class _Writer(dcp.FileSystemWriter):
    """Writes one rank's files and keeps an error to itself until :meth:`files` is asked.

    DCP would send the error to rank 0 with its traceback, which cannot be pickled on Python 3.13 with torch 2.11: the
    sender then raises something else and the other ranks wait for it until they time out.
    """

    def __init__(self, folder: Path, *, single_file: bool = True) -> None:
        """`single_file` False: one for each tensor. DCP keeps the tensors of a file until it is written."""
        # No copy ahead: the data is in host memory, and in this thread CUDA's current device is GPU 0 on every rank.
        super().__init__(folder, single_file_per_rank=single_file, per_thread_copy_ahead=0)
        self._folder = folder
        self._names: set[str] = set()
        self._error: Exception | None = None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> torch.futures.Future[list[WriteResult]]:
        done: torch.futures.Future[list[WriteResult]]
        try:
            done = super().write_data(plan, planner)
            self._names |= {result.storage_data.relative_path for result in done.value()}
        except Exception as error:
            self._error = error
            done = torch.futures.Future()
            done.set_result([])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        try:
            super().finish(metadata, results)
            self._names.add(".metadata")
        except Exception as error:
            self._error = error

    def files(self) -> dict[str, FileEntry]:
        """Size and checksum of every file that this rank wrote; raises the error that kept it from it."""
        if self._error is not None:
            raise self._error
        files = {name: self._folder / name for name in sorted(self._names)}
        return {name: FileEntry(file.stat().st_size, sha256(file)) for name, file in files.items()}


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Any], files: Mapping[str, bytes] | None = None
) -> None:
    """Write whole tensors as the new checkpoint `path`, in this process alone; raises CheckpointError.

    `like`: step, world_size, ep and progress of the manifest; the versions are this process's. `files`: contents of
    further files in the same folder, by name. Tensors are looked at one after the other.
    """
    try:
        _write_checkpoint(path, tensors, like, files or {})
    except (Exception, CheckpointException) as error:
        raise CheckpointError(f"{path}: cannot be written: {_reason(error)}") from error


def _write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], like: Mapping[str, Any], files: Mapping[str, bytes]
) -> None:
    with folder_written_aside(path) as aside:
        writer = _Writer(aside, single_file=False)
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        with warnings.catch_warnings():  # that a save without collectives is meant for one process
            warnings.simplefilter("ignore")
            dcp.save(dict(tensors), storage_writer=writer, planner=planner, no_dist=True)
        for name, content in files.items():
            (aside / name).write_bytes(content)
        added = {name: FileEntry(len(content), hashlib.sha256(content).hexdigest()) for name, content in files.items()}
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            step=like["step"],
            moetrain=moetrain.__version__,
            torch=torch.__version__,
            world_size=like["world_size"],
            ep=like["ep"],
            progress=like["progress"],
            files=writer.files() | added,
        )
        _write_manifest(aside, manifest)


# ----------------------------------------------------------------------------------------------------- loading


def load(
    path: Path, tensors: Mapping[str, Tensor], mesh: Mesh | None = None, *, strict: bool = True, cast: bool = False
) -> dict[str, Any]:
    """Fill `tensors` in place from the checkpoint `path`; returns the `progress` that was saved with them.

    DTensors and ScatteredTensors receive this rank's part, plain tensors the whole logical tensor, whatever the number
    of ranks that wrote it. Every name in `tensors` must be in the checkpoint with the same shape and dtype (with
    `cast`: any floating-point dtype for any other); with `strict` the checkpoint must hold nothing else. Otherwise, and
    if it cannot be read, CheckpointError; then nothing was changed, unless a file is damaged (see :func:`verify`).

    Collective if `mesh` is given: an error on one rank is raised on all. Without a mesh each process loads by itself.
    """

    def read() -> dict[str, Any]:
        manifest = read_manifest(path)
        try:
            _check_fit(path, tensors, strict, cast)
            planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            with warnings.catch_warnings():  # that a load without collectives is meant for one process
                warnings.simplefilter("ignore")
                dcp.load(dict(tensors), storage_reader=dcp.FileSystemReader(path), planner=planner, no_dist=True)
        except CheckpointError:
            raise
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{path}: cannot be read: {_reason(error)}") from error
        return manifest.progress

    return read() if mesh is None else on_all_ranks(_located(read, mesh), mesh.host_group)[0]


def _check_fit(path: Path, tensors: Mapping[str, Tensor], strict: bool, cast: bool) -> None:
    saved = contents(path)
    problems = []
    missing = sorted(tensors.keys() - saved.keys())
    if missing:
        problems.append(f"it lacks {_few(missing)}")
    unexpected = sorted(saved.keys() - tensors.keys())
    if unexpected and strict:
        problems.append(f"it has, unasked, {_few(unexpected)}")
    differing = []
    for name in sorted(tensors.keys() & saved.keys()):
        tensor, entry = tensors[name], saved[name]
        was, wanted = (entry.shape, entry.dtype), (tuple(tensor.shape), tensor.dtype)
        castable = cast and entry.dtype.is_floating_point and tensor.dtype.is_floating_point
        if was[0] != wanted[0] or (was[1] != wanted[1] and not castable):
            differing.append(f"{name} {list(was[0])} {was[1]}, wanted {list(wanted[0])} {wanted[1]}")
    if differing:
        problems.append(f"it holds {_few(differing)}")
    if problems:
        raise CheckpointError(
            f"{path} belongs to another model: {'. And '.join(problems)}. Use the config.yaml of the run that wrote it"
        )
