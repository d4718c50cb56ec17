"""A Hugging Face model folder, opened: its config, and its weights as our tensors, one at a time.

Files are mapped into memory only while a tensor is read, so that what is resident stays as small as that tensor.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from moetrain.checkpoint import TensorEntry
from moetrain.config import Config, from_dict
from moetrain.errors import ConfigError, HuggingFaceError
from moetrain.huggingface.companions import FILES
from moetrain.huggingface.families import Family, family_of, our_sections
from moetrain.huggingface.keys import classic_keys, classic_shape, fused_keys, is_ours_alone
from moetrain.model import Decoder

INDEX = "model.safetensors.index.json"
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LEFT_OUT = (".rotary_emb.inv_freq", ".masked_bias")
"""Ends of names of constants that old releases wrote among the weights."""


def local_folder(source: str) -> Path:
    """The folder that `source` is, or of the repository of this name on the Hugging Face Hub, downloaded."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    owner, _, name = source.partition("/")
    if not owner or not name or "/" in name or path.is_absolute():
        raise HuggingFaceError(f"{source}: no such folder, and no OWNER/NAME of a repository on the Hugging Face Hub")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise HuggingFaceError(
            f"{source}: no such folder; to download a repository: pip install 'moetrain[hf]'"
        ) from None
    try:
        return Path(snapshot_download(source, allow_patterns=["*.safetensors", *FILES]))
    except Exception as error:  # of the hub, of the network, of the disk
        first_line = (str(error).strip().splitlines() or [""])[0]
        raise HuggingFaceError(f"{source}: no such folder, and it cannot be downloaded: {first_line}") from error


@dataclass(frozen=True)
class _Parts:
    """Where a tensor of ours lies."""

    keys: list[str]
    shape: tuple[int, ...]
    """Of each of them."""


class HuggingFaceModel:
    """A folder with config.json and safetensors.

    Raises HuggingFaceError where the folder holds no such model, where a tensor is missing, has another shape or is
    none of the model's, and where a file is damaged.
    """

    folder: Path
    config_json: dict[str, Any]
    family: Family
    config: Config
    """Of our model and router; everything else has its defaults."""
    dtype: torch.dtype
    """Of the weights: theirs if all have the same one that a run can have, else float32, which holds them all."""
    entries: dict[str, TensorEntry]
    """Of our tensors, by their names in the model, router biases included."""

    def __init__(self, folder: Path):
        self.folder = folder
        file = folder / "config.json"
        self.config_json = read_json(file)
        self.family = family_of(self.config_json, str(file))
        self._files = _files_of_tensors(folder)
        self._headers = _headers(folder, self._files)
        sections = our_sections(self.config_json, str(file))
        try:
            self.config = from_dict(sections)
        except ConfigError as error:
            raise HuggingFaceError(f"{file}: {error}") from None
        shapes = shapes_of(self.config)
        self._parts = {name: self._find(name, shape) for name, shape in shapes.items() if not is_ours_alone(name)}
        self._refuse_unused()
        self.dtype = self._common_dtype()
        self.entries = {
            name: TensorEntry(shape, torch.float32 if is_ours_alone(name) else self.dtype)
            for name, shape in shapes.items()
        }

    def tensor(self, name: str) -> Tensor:
        """Our tensor, read now."""
        entry = self.entries[name]
        if is_ours_alone(name):
            return torch.zeros(entry.shape, dtype=entry.dtype)
        whole, start = torch.empty(entry.numel, dtype=entry.dtype), 0
        keys = self._parts[name].keys
        for file, group in groupby(keys, key=self._files.__getitem__):
            with _opened(self.folder / file) as opened:
                for key in group:
                    part = opened.get_tensor(key).flatten()
                    whole[start : start + part.numel()] = part
                    start += part.numel()
        return whole.view(entry.shape)

    def _find(self, name: str, shape: tuple[int, ...]) -> _Parts:
        classic, fused = classic_keys(self.family, name, self.config.model.num_experts), fused_keys(name)
        parts = _Parts(classic, classic_shape(shape, len(classic)))
        if fused and fused[0] in self._files:
            parts = _Parts(fused, shape)
        missing = [key for key in parts.keys if key not in self._files]
        if missing:
            raise HuggingFaceError(f"{self.folder}: lacks {_few(missing)}")
        for key in parts.keys:
            found = self._headers[key][0]
            if found != parts.shape:
                raise HuggingFaceError(
                    f"{self.folder / self._files[key]}: {key} is {list(found)}; by config.json it is "
                    f"{list(parts.shape)}"
                )
        return parts

    def _refuse_unused(self) -> None:
        used = {key for parts in self._parts.values() for key in parts.keys}
        if self.config.model.tie_embeddings:
            used.add("lm_head.weight")  # some write it, though it is the embedding
        unused = [key for key in self._files if key not in used and not key.endswith(_LEFT_OUT)]
        if unused:
            raise HuggingFaceError(f"{self.folder}: {_few(unused)}: {self.family.architecture} has no such tensor")

    def _common_dtype(self) -> torch.dtype:
        keys = [key for parts in self._parts.values() for key in parts.keys]
        for key in keys:
            if self._headers[key][1] not in _DTYPES:
                raise HuggingFaceError(
                    f"{self.folder / self._files[key]}: {key} is {self._headers[key][1]}: moetrain reads "
                    f"{', '.join(_DTYPES)}"
                )
        found = {_DTYPES[self._headers[key][1]] for key in keys}
        return found.pop() if len(found) == 1 and torch.float16 not in found else torch.float32


def shapes_of(config: Config) -> dict[str, tuple[int, ...]]:
    """Name → shape of all tensors of a model, router biases included; makes none of them."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Decoder(config).state_dict().items()}


def _files_of_tensors(folder: Path) -> dict[str, str]:
    """Tensor → file, as the index says, or of the only file."""
    index = folder / INDEX
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise HuggingFaceError(f"{index}: lacks weight_map")
        return weight_map
    single = folder / "model.safetensors"
    if not single.is_file():
        raise HuggingFaceError(
            f"{folder}: holds neither {INDEX} nor model.safetensors; other formats of weights can run code when they "
            "are read: load and save the model with transformers first"
        )
    with _opened(single) as opened:
        return dict.fromkeys(opened.keys(), single.name)


def _headers(folder: Path, files: Mapping[str, str]) -> dict[str, tuple[tuple[int, ...], str]]:
    """Tensor → shape and dtype, as its file says."""
    headers = {}
    for name in sorted(set(files.values())):
        with _opened(folder / name) as opened:
            held = set(opened.keys())
            for key in (key for key, file in files.items() if file == name):
                if key not in held:
                    raise HuggingFaceError(f"{folder / name}: lacks {key}, which is there by {INDEX}")
                header = opened.get_slice(key)
                headers[key] = (tuple(header.get_shape()), header.get_dtype())
    return headers


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """safe_open, whose errors name the file."""
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except FileNotFoundError:
        raise HuggingFaceError(f"{file}: missing") from None
    except (OSError, SafetensorError) as error:
        raise HuggingFaceError(f"{file}: no whole safetensors file: {error}") from error


def read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HuggingFaceError(f"{file}: missing; give the folder of a model that transformers has saved") from None
    except (OSError, ValueError, RecursionError) as error:
        raise HuggingFaceError(f"{file}: unreadable: {error}") from None
    if not isinstance(content, dict):
        raise HuggingFaceError(f"{file}: expected an object, found a {type(content).__name__}")
    return content


def _few(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
