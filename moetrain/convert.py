"""Checkpoints as folders of safetensors, for other programs to read, and back again.

A folder::

    model-00001-of-00003.safetensors   tensors under their logical names, as in the checkpoint
    model.safetensors.index.json       weight_map: tensor → file, as transformers has it; and, under "checkpoint", what
                                       the checkpoint's manifest says, the dtype that weights were cast to (null: none),
                                       and size and SHA-256 of each file

The tensors are those of ``moetrain.state``: ``model.<name>`` and ``optim.<key>.<name>``, experts as [E, …], whole. One
file's tensors are in memory at a time. A folder with the optimiser's state and weights as they were gives back the same
checkpoint, to the bit. The names are moetrain's, not those of a transformers model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moetrain.checkpoint import (
    FileEntry,
    SavedTensors,
    TensorEntry,
    check_files,
    find_checkpoint,
    read_manifest,
    write_checkpoint,
)
from moetrain.errors import CheckpointError
from moetrain.files import folder_written_aside, sha256, write_text

INDEX = "model.safetensors.index.json"
FILE_BYTES = 4 * 2**30
"""Of tensors in a file, unless one tensor is larger."""
_OPTIMIZER = "optim."


def is_safetensors(path: Path) -> bool:
    """Whether `path` is a folder that :func:`to_safetensors` wrote."""
    return (path / INDEX).is_file()


def to_safetensors(
    path: Path,
    out: Path,
    *,
    weights_only: bool = False,
    dtype: torch.dtype | None = None,
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write the checkpoint that `path` means to the new folder `out`; returns the checkpoint's own path.

    `weights_only` leaves out the optimiser's state; `dtype` is what floating-point weights are cast to, router biases
    and the optimiser's state excepted. Raises CheckpointError.
    """
    refuse_existing(out)
    checkpoint = find_checkpoint(path)
    manifest = read_manifest(checkpoint)
    saved = SavedTensors(checkpoint)
    entries = {n: e for n, e in saved.entries.items() if not (weights_only and n.startswith(_OPTIMIZER))}
    written = {name: _cast(name, entry, dtype) for name, entry in entries.items()}
    parts = list(split_by_bytes({name: written[name].bytes for name in sorted(written)}, file_bytes))
    try:
        with folder_written_aside(out) as aside:
            files: dict[str, FileEntry] = {}
            for number, names in enumerate(parts, 1):
                tensors = {name: torch.empty(entries[name].shape, dtype=entries[name].dtype) for name in names}
                saved.load(tensors, strict=False)
                for name in names:
                    tensors[name] = tensors[name].to(written[name].dtype)
                file = aside / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
                save_file(tensors, file, metadata={"format": "pt"})
                files[file.name] = FileEntry(file.stat().st_size, sha256(file))
            index = {
                "metadata": {"total_size": sum(entry.bytes for entry in written.values())},
                "weight_map": {name: file for names, file in zip(parts, files, strict=True) for name in names},
                "checkpoint": {
                    **{key: value for key, value in asdict(manifest).items() if key not in ("files", "format_version")},
                    "dtype": None if dtype is None else str(dtype).removeprefix("torch."),
                    "files": {name: asdict(entry) for name, entry in files.items()},
                },
            }
            write_text(aside / INDEX, json.dumps(index, indent=2) + "\n")
            for name in files:  # which safetensors makes for their owner alone
                (aside / name).chmod((aside / INDEX).stat().st_mode)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"--out {out}: cannot be written: {error}") from error
    return checkpoint


def from_safetensors(folder: Path, out: Path) -> None:
    """Write the new checkpoint `out` from a folder that holds all of one; raises CheckpointError."""
    refuse_existing(out)
    file = folder / INDEX
    try:
        index = json.loads(file.read_text(encoding="utf-8"))
        weight_map: dict[str, str] = index["weight_map"]
        saved: dict[str, Any] = index["checkpoint"]
        dtype, files = saved.pop("dtype"), {n: FileEntry(**entry) for n, entry in saved.pop("files").items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{file}: not an index that `moetrain checkpoint convert` wrote ({type(error).__name__}: {error})"
        ) from error
    if dtype is not None:
        raise CheckpointError(
            f"{folder}: its weights were cast to {dtype}, so no run can go on from it; convert the checkpoint again "
            "without --dtype"
        )
    if not any(name.startswith(_OPTIMIZER) for name in weight_map):
        raise CheckpointError(
            f"{folder}: holds no optimiser state, so no run can go on from it; convert the checkpoint again without "
            "--weights-only"
        )
    if problems := check_files(folder, files):
        raise CheckpointError(f"{folder} is damaged: {problems[0]}")
    try:
        tensors = _mapped(folder, weight_map)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{folder}: its index does not fit its files ({error})") from error
    write_checkpoint(out, tensors, saved)


def refuse_existing(out: Path) -> None:
    """Raise CheckpointError if there is something at `out`, or no folder to make it in."""
    if out.exists() or out.is_symlink():
        raise CheckpointError(f"--out {out}: exists already; choose another name, nothing is overwritten")
    if not out.absolute().parent.is_dir():
        raise CheckpointError(f"--out {out}: there is no folder {out.absolute().parent}; make it first")


def _cast(name: str, entry: TensorEntry, dtype: torch.dtype | None) -> TensorEntry:
    """What is written of a tensor. A router's bias is the state of its update rule, and small against its own scale."""
    kept = dtype is None or not entry.dtype.is_floating_point
    if kept or name.startswith(_OPTIMIZER) or name.endswith("router.bias"):
        return entry
    assert dtype is not None
    return TensorEntry(entry.shape, dtype)


def split_by_bytes(sizes: Mapping[str, int], file_bytes: int) -> Iterator[list[str]]:
    """Names by file, in their order, so that no file but that of one larger tensor has more than `file_bytes`."""
    part: list[str] = []
    held = 0
    for name, size in sizes.items():
        if part and held + size > file_bytes:
            yield part
            part, held = [], 0
        part.append(name)
        held += size
    if part:
        yield part


def _mapped(folder: Path, weight_map: Mapping[str, str]) -> dict[str, Tensor]:
    """The tensors, in memory that the system reads from the files when it is looked at."""
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(weight_map.values())):
        with safe_open(folder / name, framework="pt") as file:
            tensors |= {key: file.get_tensor(key) for key, where in weight_map.items() if where == name}
    return tensors
