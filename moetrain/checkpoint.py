"""Checkpoints: what is in one, when it counts, and how it is found, verified and read.

A run's checkpoints/ folder::

    step-00000100/                a checkpoint: complete by construction, because this name is given last
        manifest.json             step, progress, versions, and the size and SHA-256 of every other file
        rank-00003-00.safetensors what this rank wrote of the logical tensors (moetrain/checkpoint_shards.py)
    step-00000100.old/            a checkpoint while another of the same step takes its name
    step-00000200.superseded/     of a course that was abandoned: the run resumed from an earlier step by its path
    step-00000200.tmp-1f3a9c0e/   being written, being deleted, or left by a killed run

A superseded checkpoint is neither the newest one nor ever deleted, but it can be resumed from by its path.

The contents are logical tensors, so a checkpoint does not depend on the number of ranks that wrote it. Ranks share
the file system. How a running job saves: moetrain/checkpointer.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import secrets
import shutil
import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultLoadPlanner

import moetrain
from moetrain.checkpoint_shards import (
    SUFFIX,
    FileEntry,
    LazyTensor,
    Part,
    ShardReader,
    TensorEntry,
    files_of,
    host_blocks,
    read_parts,
    write_shard,
)
from moetrain.errors import CheckpointError, UserError
from moetrain.files import folder_written_aside, fsync_folder, sha256, written_aside
from moetrain.parallel import watchdog
from moetrain.parallel.agreement import on_all_ranks, on_rank_0, raise_together
from moetrain.parallel.mesh import Mesh

T = TypeVar("T")

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
ASIDE = "step-*.tmp-*"
"""What is being written or deleted, or was when a run was killed."""
_NAME = re.compile(r"step-(\d+)(\.old)?")

# DCP makes two debug records for every tensor, which cost more than small tensors do.
logging.getLogger("c10d-NullHandler-dcp_logger").setLevel(logging.CRITICAL)


# ---------------------------------------------------------------------------------------------------- on disk


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
                f"{file}: format {version}; this moetrain {moetrain.__version__} reads {FORMAT_VERSION}, so go on with "
                "the one that wrote it"
            )
        checksum = content.pop("sha256")
        if checksum != _json_sha256(content):
            raise CheckpointError(f"{file}: its SHA-256 is wrong, the file was altered")
        content["files"] = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        return Manifest(**content)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{file}: unreadable: {reason(error)}") from error


def contents(path: Path) -> dict[str, TensorEntry]:
    """The logical tensors in the checkpoint `path`, by name; CheckpointError if its files cannot be read."""
    return SavedTensors(path).entries


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
            return f"{file}: {reason(error)}"
        return None

    with watchdog.paused(), ThreadPoolExecutor() as pool:  # hashing leaves the interpreter lock
        return [line for line in pool.map(problem, files) if line is not None]


def latest(folder: Path, *, checksums: bool = False) -> Path | None:
    """The newest whole checkpoint in `folder`, None if there is none; damaged ones are passed over with a warning."""
    return _first_whole([path for _, path in checkpoints_in(folder)], lambda path: verify(path, checksums=checksums))


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
        on_rank_0(located(lambda: refuse_file(folder), mesh), mesh.host_group)
        return find_together(Path(resume), mesh, "checkpoint.resume = ", "give auto, never, or the path of a run, ")

    def candidates() -> list[Path]:
        refuse_file(folder)
        found = [path for _, path in checkpoints_in(folder)]
        if found and resume == "never":
            raise CheckpointError(
                f"{folder} holds checkpoints, but checkpoint.resume = never: choose another run.dir or "
                "checkpoint.resume=auto"
            )
        return found

    paths = on_rank_0(located(candidates, mesh), mesh.host_group)

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

    paths = on_rank_0(located(candidates, mesh), mesh.host_group)
    return _told_by_rank_0(lambda: _choose(path, paths, partial(_verify_together, mesh=mesh)), mesh)


def _verify_together(path: Path, mesh: Mesh) -> list[str]:
    """:func:`verify`, shared among the ranks: reading terabytes takes longer than a collective waits."""
    problems = on_rank_0(located(lambda: verify(path, checksums=False), mesh), mesh.host_group)
    if problems:
        return problems
    part = slice(mesh.rank, None, mesh.world_size)
    found = on_all_ranks(located(lambda: verify(path, part=part), mesh), mesh.host_group)
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
    return [found for folder in (path / "checkpoints", path) for _, found in checkpoints_in(folder)]


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


def refuse_file(folder: Path) -> None:
    """Raise CheckpointError if the folder cannot be made because a file is in its place or in its parents'."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise CheckpointError(f"run.dir: {path} is a file, not a folder; move it away or choose another run.dir")


def checkpoints_in(folder: Path) -> list[tuple[int, Path]]:
    """(step, path) of whatever has the name of a checkpoint, newest first; a replaced one after its successor."""
    if not folder.is_dir():
        return []
    named = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    named.sort(key=lambda item: (int(item[0][1]), item[0][2] is None), reverse=True)
    return [(int(match[1]), path) for match, path in named]


def _json_sha256(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_manifest(
    step: int, world_size: int, ep: int, progress: Mapping[str, Any], files: Mapping[str, FileEntry]
) -> Manifest:
    """Of a checkpoint that this moetrain writes."""
    return Manifest(
        FORMAT_VERSION, step, moetrain.__version__, torch.__version__, world_size, ep, dict(progress), dict(files)
    )


def write_manifest(path: Path, manifest: Manifest) -> None:
    """The last file of the checkpoint `path`, durable; the names of the others are with it."""
    content = asdict(manifest)
    with written_aside(path / MANIFEST) as aside:
        aside.write_text(json.dumps(content | {"sha256": _json_sha256(content)}, indent=1), encoding="utf-8")


def new_aside(target: Path) -> Path:
    """A new folder beside `target`, in which that checkpoint is written."""
    aside = _aside_of(target)
    aside.mkdir(parents=True)
    return aside


def commit(aside: Path, target: Path, manifest: Manifest) -> None:
    """Give what is durable in the folder `aside` its manifest and its name. Killed anywhere, it leaves what was there
    under that name or, as ``.old``, beside it."""
    write_manifest(aside, manifest)
    fsync_folder(aside)
    if target.exists():
        replaced = target.with_name(f"{target.name}.old")
        if replaced.exists():
            discard(replaced)
        target.rename(replaced)
    aside.rename(target)
    fsync_folder(target.parent)


def prune(folder: Path, steps: Iterable[int], kept: Container[int]) -> None:
    """Delete the checkpoints of these steps that are not `kept`, and of the others those that have been replaced."""
    of_interest = set(steps)
    for step, path in checkpoints_in(folder):
        current = folder / checkpoint_name(step)
        if step in of_interest and (step not in kept or (path != current and current.exists())):
            discard(path)


def discard(path: Path) -> None:
    """Delete a checkpoint; killed in the middle, it leaves no checkpoint's name on half of one."""
    shutil.rmtree(path.rename(_aside_of(path)))


def _aside_of(target: Path) -> Path:
    """A name beside `target` that nothing has, not even the remains of a killed run."""
    return target.with_name(f"{target.name}.tmp-{secrets.token_hex(4)}")


# ------------------------------------------------------------------------------------------------------ errors


def located(work: Callable[[], T], mesh: Mesh) -> Callable[[], T]:
    """`work`, all of whose errors are CheckpointErrors, those from below with the rank if there are several."""

    def work_here() -> T:
        try:
            return work()
        except CheckpointError:
            raise
        except Exception as error:
            where = f"rank {mesh.rank}: " if mesh.world_size > 1 else ""
            raise CheckpointError(where + reason(error)) from error

    return work_here


@contextmanager
def saving(target: Path) -> Iterator[None]:
    """Errors inside say which checkpoint could not be saved."""
    try:
        yield
    except Exception as error:
        failure = CheckpointError(f"saving {target} failed: {reason(error)}")
        failure.agreed = isinstance(error, CheckpointError) and error.agreed
        raise failure from error


def reason(error: BaseException) -> str:
    """One line that says what went wrong, without DCP's tracebacks."""
    if isinstance(error, CheckpointException):
        return reason(next(iter(error.failures.values()))[0])
    if isinstance(error, UserError | OSError):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _few(lines: list[str]) -> str:
    more = f" (and {len(lines) - 3} more)" if len(lines) > 3 else ""
    return "; ".join(lines[:3]) + more


# ---------------------------------------------------------------------------------------------- writing, loading


def write_checkpoint(
    path: Path,
    tensors: Mapping[str, Tensor | LazyTensor],
    like: Mapping[str, Any],
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write whole tensors as the new checkpoint `path`, in this process alone; raises CheckpointError.

    `like`: step, world_size, ep and progress of the manifest; the versions are this process's. `files`: contents of
    further files in the same folder, by name. Tensors are looked at one after the other.
    """
    whole = [(Part.of_whole(name, tuple(tensor.shape), tensor.dtype), tensor) for name, tensor in tensors.items()]
    added = files or {}
    try:
        with folder_written_aside(path) as aside:
            entries = {
                name: write_shard(aside / name, [part for part, _ in parts], host_blocks(_made(parts)))
                for name, parts in files_of(whole, rank=0).items()
            }
            for name, content in added.items():
                (aside / name).write_bytes(content)
                entries[name] = FileEntry(len(content), hashlib.sha256(content).hexdigest())
            said = {key: like[key] for key in ("step", "world_size", "ep", "progress")}
            write_manifest(aside, make_manifest(**said, files=entries))
    except Exception as error:  # of the disk, and of what makes a tensor
        raise CheckpointError(f"{path}: cannot be written: {reason(error)}") from error


def _made(parts: Iterable[tuple[Part, Tensor | LazyTensor]]) -> Iterator[Tensor]:
    for _, tensor in parts:
        yield tensor.make() if isinstance(tensor, LazyTensor) else tensor


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
        SavedTensors(path).load(tensors, strict=strict, cast=cast)
        return manifest.progress

    return read() if mesh is None else on_all_ranks(located(read, mesh), mesh.host_group)[0]


class SavedTensors:
    """The tensors of a checkpoint. Its files' headers are read once: with many ranks they say more than one tensor
    is large, so whoever loads one after the other keeps this. Raises CheckpointError if they cannot be read.
    """

    entries: dict[str, TensorEntry]
    """What there is, by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        files = [path / name for name in read_manifest(path).files if name.endswith(SUFFIX)]
        try:
            shards = {file: read_parts(file) for file in files}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{path}: its files cannot be read: {reason(error)}") from error
        self.entries = {part.name: part.whole for parts in shards.values() for part in parts}
        self._reader = ShardReader(shards)

    def load(self, tensors: Mapping[str, Tensor], *, strict: bool = True, cast: bool = False) -> None:
        """:func:`load`, without the progress."""
        _check_fit(self.path, tensors, self.entries, strict, cast)
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            with warnings.catch_warnings():  # that a load without collectives is meant for one process
                warnings.simplefilter("ignore")
                dcp.load(dict(tensors), storage_reader=self._reader, planner=planner, no_dist=True)
        except (Exception, CheckpointException) as error:
            raise CheckpointError(f"{self.path}: cannot be read: {reason(error)}") from error


def _check_fit(
    path: Path, tensors: Mapping[str, Tensor], saved: Mapping[str, TensorEntry], strict: bool, cast: bool
) -> None:
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
