"""`moetrain checkpoint info`, `verify` and `convert`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from moetrain.checkpoint import (
    MANIFEST,
    TensorEntry,
    checkpoints_at,
    contents,
    find_checkpoint,
    read_manifest,
    verify,
)
from moetrain.convert import from_safetensors, is_safetensors, to_safetensors
from moetrain.errors import ConfigError
from moetrain.expert_placement import ExpertPlacement
from moetrain.placement.placement import Placement

_PATH_HELP = "a run (its newest checkpoint), a checkpoints folder or a checkpoint"

PARTS = {
    "embedding and head": r"embedding|head",
    "attention": r".*\.attention\..*",
    "dense feed-forward": r"blocks\.\d+\.ffn\.w_(gate_up|down)",
    "shared experts": r".*\.ffn\.shared\..*",
    "experts": r".*\.ffn\.experts\..*",
    "router": r".*\.ffn\.router\..*",
    "norms": r"(.*[._])?norm\.weight",
}
"""Part of the model → names of its tensors, the first match counting."""


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain checkpoint info`."""
    parser.add_argument("path", metavar="PATH", help=_PATH_HELP)


def add_verify_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain checkpoint verify`."""
    parser.add_argument(
        "path", metavar="PATH", help="a run or a checkpoints folder (all its checkpoints), or a checkpoint"
    )


def add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain checkpoint convert`."""
    parser.add_argument("path", metavar="PATH", help=f"{_PATH_HELP}; or a folder that this command wrote")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--weights-only", action="store_true", help="leave out the optimiser's state")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="cast the weights (default: as they are)")


@dataclass(frozen=True)
class Part:
    """Tensors of one part of a model."""

    tensors: int
    elements: int
    bytes: int


def parts(entries: Mapping[str, TensorEntry]) -> dict[str, Part]:
    """Part of the model, "others" or "optimiser" → what it holds; only those that hold something."""
    grouped: dict[str, list[TensorEntry]] = {part: [] for part in (*PARTS, "others", "optimiser")}
    for name, entry in entries.items():
        kind, _, rest = name.partition(".")
        fitting = (part for part, pattern in PARTS.items() if re.fullmatch(pattern, rest))
        grouped["optimiser" if kind == "optim" else next(fitting, "others")].append(entry)
    return {
        part: Part(len(found), sum(entry.numel for entry in found), sum(entry.bytes for entry in found))
        for part, found in grouped.items()
        if found
    }


def info_command(args: argparse.Namespace) -> int:
    """Run `moetrain checkpoint info`; returns the exit code. Raises CheckpointError."""
    path = find_checkpoint(Path(args.path), checksums=False)
    manifest, found = read_manifest(path), parts(contents(path))
    progress = manifest.progress
    table = Table("part")
    for column in ("tensors", "elements", "MiB"):
        table.add_column(column, justify="right")
    for name, part in {**found, "total": _total(found.values())}.items():
        table.add_row(name, f"{part.tensors:,}", f"{part.elements:,}", f"{part.bytes / 2**20:,.1f}")
    saved = datetime.fromtimestamp((path / MANIFEST).stat().st_mtime).astimezone()
    model = _total(part for name, part in found.items() if name != "optimiser")
    facts = {
        "checkpoint": path,
        "step": f"{manifest.step:,}",
        "saved": f"{saved:%Y-%m-%d %H:%M:%S %z} (time of its manifest)",
        "by": f"moetrain {manifest.moetrain}, torch {manifest.torch}, {manifest.world_size} ranks, ep = {manifest.ep}",
        "progress": ", ".join(f"{progress[name]:,} {name}" for name in ("samples", "tokens") if name in progress),
        "config hash": progress.get("config_hash", "unknown"),
        "placement": _placement(progress.get("placement")),
        "in the model": f"{model.elements:,} elements (parameters and router biases)",
        "files": f"{len(manifest.files)}, {sum(entry.size for entry in manifest.files.values()) / 2**20:,.1f} MiB "
        "(sizes are right; `moetrain checkpoint verify` reads every byte)",
    }
    console = Console()
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", markup=False, highlight=False, soft_wrap=True)
    console.print(table)
    return 0


def _placement(record: Mapping[str, Any] | None) -> str:
    """Where the experts were, which the tensors do not depend on."""
    if record is None:
        return "none: experts lay as they are numbered"
    placement = ExpertPlacement(**record)
    unplaced = Placement.contiguous(len(placement.slots), len(placement.slots[0]), placement.num_gpus)
    moved = int((np.array(placement.assignment) != unplaced.gpu_LE).sum())
    return (
        f"on {placement.num_gpus} ranks, {moved:,} of {unplaced.gpu_LE.size:,} experts elsewhere than their numbers say"
    )


def _total(found: Iterable[Part]) -> Part:
    found = list(found)
    return Part(*(sum(getattr(part, field.name) for part in found) for field in fields(Part)))


def verify_command(args: argparse.Namespace) -> int:
    """Run `moetrain checkpoint verify`: one line for each problem or whole checkpoint; 1 if anything is damaged."""
    damaged = False
    for path in checkpoints_at(Path(args.path)):
        problems = verify(path)
        damaged |= bool(problems)
        if problems:
            print("\n".join(problems), flush=True)
        else:
            files = read_manifest(path).files.values()
            print(f"{path}: whole, {len(files)} files, {sum(entry.size for entry in files):,} bytes", flush=True)
    return 1 if damaged else 0


def convert_command(args: argparse.Namespace) -> int:
    """Run `moetrain checkpoint convert`; returns the exit code. Raises CheckpointError, and ConfigError for
    options that do not apply."""
    path, out = Path(args.path), Path(args.out)
    if not is_safetensors(path):
        dtype = None if args.dtype is None else getattr(torch, args.dtype)
        source = to_safetensors(path, out, weights_only=args.weights_only, dtype=dtype)
        print(f"{out}: safetensors of {source}")
        return 0
    if args.weights_only or args.dtype is not None:
        raise ConfigError(
            f"--weights-only, --dtype: {path} is a folder of safetensors, which becomes a checkpoint as it is; leave "
            "them out"
        )
    from_safetensors(path, out)
    print(f"{out}: checkpoint of {path}; go on from it with checkpoint.resume={out}")
    return 0
