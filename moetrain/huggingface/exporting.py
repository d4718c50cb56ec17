"""From a checkpoint to a folder that transformers loads.

Several ranks share the files among them, and each reads from the checkpoint what it writes, one tensor of ours at a
time: no rank ever holds the model.
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moetrain.checkpoint import Manifest, SavedTensors, TensorEntry, contents, find_together, read_manifest
from moetrain.config import Config, from_dict
from moetrain.convert import refuse_existing, split_by_bytes
from moetrain.errors import HuggingFaceError
from moetrain.files import fsync_folder, written_aside
from moetrain.huggingface.card import model_card
from moetrain.huggingface.companions import Companions, companions_of, with_tokenizer
from moetrain.huggingface.families import CARRIED, Family, config_json, family_for
from moetrain.huggingface.keys import classic_keys, classic_shape, is_ours_alone
from moetrain.huggingface.reader import INDEX
from moetrain.huggingface.writer import Slot, assign, write_safetensors
from moetrain.parallel import Mesh, on_all_ranks, on_rank_0, watchdog

FILE_BYTES = 5_000_000_000
"""Of tensors in a file, unless one tensor of ours is larger; what transformers 4 takes too."""


@dataclass(frozen=True)
class Export:
    """What was written."""

    checkpoint: Path
    family: Family
    dropped: list[str]
    has_tokenizer: bool


def export_model(
    path: Path,
    out: Path,
    mesh: Mesh,
    *,
    dtype: torch.dtype | None = None,
    lossy: bool = False,
    tokenizer: Path | None = None,
    file_bytes: int = FILE_BYTES,
) -> Export:
    """Write the checkpoint that `path` means to the new folder `out`; collective.

    `dtype`: of the weights there (None: as they are). `lossy`: leave out what the family has no place for, if there is
    a model without it. `tokenizer`: a folder to take the tokenizer from, instead of the one that the model began with
    or that its data have. Raises CheckpointError, and HuggingFaceError where no family has such a model.
    """
    on_rank_0(lambda: refuse_existing(out), mesh.host_group)
    checkpoint = find_together(path, mesh)
    plan = on_rank_0(lambda: _plan(checkpoint, dtype, lossy, tokenizer, file_bytes), mesh.host_group)
    aside = on_rank_0(lambda: _make_aside(out), mesh.host_group)
    try:
        writers = assign([plan.bytes_of(file) for file in plan.files], mesh.world_size)
        mine = [file for file, writer in zip(plan.files, writers, strict=True) if writer == mesh.rank]

        def write() -> None:
            saved = SavedTensors(checkpoint)
            for file in mine:
                _write_file(aside, file, plan, saved)

        with watchdog.paused():
            on_all_ranks(write, mesh.host_group)
        on_rank_0(lambda: _finish(aside, out, plan), mesh.host_group)
    finally:
        if mesh.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
    return Export(checkpoint, plan.family, plan.dropped, plan.companions.has_tokenizer)


@dataclass(frozen=True)
class _Plan:
    """Which tensors go where, decided by rank 0 for all."""

    family: Family
    config: Config
    manifest: Manifest
    dropped: list[str]
    companions: Companions
    sources: dict[str, TensorEntry]
    """Of our tensors, in the checkpoint."""
    dtype: torch.dtype | None
    files: dict[str, list[str]]
    """File → our tensors."""

    def slots(self, name: str) -> dict[str, Slot]:
        """Their tensors that our tensor becomes, in order."""
        keys, entry = classic_keys(self.family, name, self.config.model.num_experts), self.sources[name]
        shape = classic_shape(entry.shape, len(keys))
        return dict.fromkeys(keys, Slot(shape, self.dtype or entry.dtype))

    def bytes_of(self, file: str) -> int:
        return sum(slot.bytes for name in self.files[file] for slot in self.slots(name).values())

    @property
    def dtype_name(self) -> str:
        dtype = self.dtype or self.sources["embedding"].dtype
        return str(dtype).removeprefix("torch.")


def _plan(checkpoint: Path, dtype: torch.dtype | None, lossy: bool, tokenizer: Path | None, file_bytes: int) -> _Plan:
    manifest = read_manifest(checkpoint)
    config = from_dict(manifest.progress["config"], where=str(checkpoint))
    family, dropped = family_for(config)
    if dropped and not lossy:
        raise HuggingFaceError(
            f"{checkpoint}: {family.model_type} has no place for {'; '.join(dropped)}. With --lossy these are left out"
        )
    companions = with_tokenizer(companions_of(checkpoint, manifest), manifest, config, tokenizer)
    named = {name.removeprefix("model."): e for name, e in contents(checkpoint).items() if name.startswith("model.")}
    sources = {name: entry for name, entry in named.items() if not is_ours_alone(name)}
    plan = _Plan(family, config, manifest, dropped, companions, sources, dtype, {})
    sizes = {name: sum(slot.bytes for slot in plan.slots(name).values()) for name in sorted(sources, key=_model_order)}
    parts = list(split_by_bytes(sizes, file_bytes))
    names = [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    if len(parts) == 1:
        names = ["model.safetensors"]
    plan.files.update(zip(names, parts, strict=True))
    return plan


def _model_order(name: str) -> tuple[int, int, str]:
    """Embedding, layers by number, last norm and head."""
    if name.startswith("blocks."):
        return 1, int(name.split(".")[1]), name
    return (0 if name == "embedding" else 2), 0, name


def _make_aside(out: Path) -> Path:
    aside = out.with_name(f".{out.name}.{secrets.token_hex(4)}.tmp")
    aside.mkdir()
    return aside


def _write_file(aside: Path, file: str, plan: _Plan, saved: SavedTensors) -> None:
    slots: dict[str, Slot] = {}
    for name in plan.files[file]:
        slots |= plan.slots(name)
    write_safetensors(aside / file, slots, _pieces(plan, file, saved))


def _pieces(plan: _Plan, file: str, saved: SavedTensors) -> Iterator[Tensor]:
    for name in plan.files[file]:
        entry = plan.sources[name]
        tensor = torch.empty(entry.shape, dtype=entry.dtype)
        saved.load({f"model.{name}": tensor}, strict=False)
        slots = list(plan.slots(name).values())
        for piece, slot in zip(tensor.flatten().chunk(len(slots)), slots, strict=True):
            yield piece.view(slot.shape).to(slot.dtype)


def _finish(aside: Path, out: Path, plan: _Plan) -> None:
    """Rank 0's part: everything but the weights, and the name."""
    if len(plan.files) > 1:
        weight_map = {key: file for file, names in plan.files.items() for name in names for key in plan.slots(name)}
        total = sum(map(plan.bytes_of, plan.files))
        with written_aside(aside / INDEX) as part:
            part.write_bytes(_json({"metadata": {"total_size": total}, "weight_map": weight_map}))
    carried = {key: value for key, value in plan.companions.config_json.items() if key in CARRIED}
    config = config_json(plan.family, plan.config, plan.dtype_name, carried)
    ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    card = model_card(out.name, plan.family, plan.config, plan.manifest, plan.companions, plan.dtype_name, plan.dropped)
    files = {"generation_config.json": _json({"_from_model_config": True, **ids}), **plan.companions.files}
    for name, content in {**files, "config.json": _json(config), "README.md": card.encode()}.items():
        with written_aside(aside / name) as part:
            part.write_bytes(content)
    fsync_folder(aside)
    aside.rename(out)
    fsync_folder(out.parent)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
