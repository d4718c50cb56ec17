"""Files that go with a model's weights from import to export: its tokenizer, generation settings and licence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from moetrain.checkpoint import Manifest, find_checkpoint, read_manifest
from moetrain.config import Config, from_dict
from moetrain.data import BytesTokenizer, Dataset, HuggingFaceTokenizer, Tokenizer, open_dataset
from moetrain.errors import CheckpointError, DataError, HuggingFaceError

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "spiece.model",
    "chat_template.json",
    "chat_template.jinja",
)
_OTHERS = ("config.json", "generation_config.json", "LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE")
FILES = (*TOKENIZER_FILES, *_OTHERS, "README.md", "model.safetensors.index.json")
"""What a download needs besides the weights."""
END_OF_TEXT = "<|endoftext|>"


@dataclass(frozen=True)
class Companions:
    """What is known of a model besides its weights and config."""

    source: str | None = None
    """Folder or repository that it was imported from, of some steps ago perhaps."""
    from_hub: bool = False
    """`source` is a repository."""
    license: str | None = None
    """As its model card names it."""
    config_json: Mapping[str, Any] = field(default_factory=dict)
    """Of the source."""
    files: Mapping[str, bytes] = field(default_factory=dict)
    """By name: tokenizer, generation settings, licence."""

    @property
    def end_ids(self) -> list[int]:
        """Tokens that end a text by the source's config."""
        ids = self.config_json.get("eos_token_id")
        return ids if isinstance(ids, list) else [] if ids is None else [ids]

    @property
    def has_tokenizer(self) -> bool:
        return any(name in self.files for name in TOKENIZER_FILES)


def read_files(folder: Path) -> dict[str, bytes]:
    """The companions in a Hugging Face folder, and its config.json."""
    return {name: (folder / name).read_bytes() for name in (*TOKENIZER_FILES, *_OTHERS) if (folder / name).is_file()}


def license_of(folder: Path) -> str | None:
    """What the front matter of the folder's model card says."""
    try:
        _, front, _ = (folder / "README.md").read_text(encoding="utf-8").split("---", 2)
        found = yaml.safe_load(front)["license"]
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return None
    return str(found)


def companions_of(checkpoint: Path, manifest: Manifest) -> Companions:
    """Those of an imported checkpoint, or of the one that its run began with, as long as it is there."""
    seen: set[Path] = set()
    while checkpoint.resolve() not in seen:
        seen.add(checkpoint.resolve())
        record = manifest.progress.get("huggingface")
        if record is not None:
            files = read_files(checkpoint)
            config_json = json.loads(files.pop("config.json", b"{}"))
            return Companions(record["source"], record["from_hub"], record["license"], config_json, files)
        began_with = manifest.progress["config"]["checkpoint"].get("init_from")
        if began_with is None:
            break
        try:
            checkpoint = find_checkpoint(Path(began_with), checksums=False)
            manifest = read_manifest(checkpoint)
        except CheckpointError:
            break
    return Companions()


def with_tokenizer(companions: Companions, manifest: Manifest, config: Config, folder: Path | None) -> Companions:
    """The same with the tokenizer of `folder`, if given; else with its own, or else with that of the run's data.

    Without any of them there is none. Raises HuggingFaceError if `folder` has none.
    """
    if folder is not None:
        others = {name: content for name, content in companions.files.items() if name not in TOKENIZER_FILES}
        found = {name: content for name, content in read_files(folder).items() if name in TOKENIZER_FILES}
        if not found:
            raise HuggingFaceError(f"--tokenizer {folder}: holds none of {', '.join(TOKENIZER_FILES)}")
        return replace(companions, files=others | found)
    if companions.has_tokenizer:
        return companions
    tokenizer = _data_tokenizer(manifest, config)
    if tokenizer is None:
        return companions
    made = _bytes_definition() if isinstance(tokenizer, BytesTokenizer) else tokenizer.definition
    assert made is not None
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": tokenizer.identity.get("end_of_document_token", END_OF_TEXT),
        "model_max_length": config.data.seq_len,
        "clean_up_tokenization_spaces": False,
    }
    files = {"tokenizer.json": made, "tokenizer_config.json": _json(settings)}
    known = {"eos_token_id": tokenizer.end_of_document}
    return replace(companions, files=files | dict(companions.files), config_json=known | dict(companions.config_json))


def tokenizer_of(checkpoint: Path, manifest: Manifest) -> Tokenizer | None:
    """What makes text of a checkpoint's tokens: of the model that it began with, or of its run's data; else None."""
    companions = companions_of(checkpoint, manifest)
    definition = companions.files.get("tokenizer.json")
    if definition is not None:
        name = str(checkpoint / "tokenizer.json")
        try:
            return HuggingFaceTokenizer(definition, name)
        except DataError:  # no usual token ends a document, but perhaps what ends the model's answers
            tokens = {token["id"]: token["content"] for token in json.loads(definition).get("added_tokens", [])}
            ends = [tokens[n] for n in companions.end_ids if n in tokens]
            if not ends:
                raise
            return HuggingFaceTokenizer(definition, name, ends[0])
    return _data_tokenizer(manifest, from_dict(manifest.progress["config"], where=str(checkpoint)))


def speaks_otherwise(checkpoint: Path, manifest: Manifest, dataset: Dataset) -> bool:
    """Whether the data's tokens are known to be others than those of the checkpoint's model."""
    definition = companions_of(checkpoint, manifest).files.get("tokenizer.json")
    if definition is not None:
        return dataset.tokenizer_identity.get("sha256") != hashlib.sha256(definition).hexdigest()
    own = _data_of(manifest, from_dict(manifest.progress["config"], where=str(checkpoint)))
    return own is not None and own.tokenizer_identity != dataset.tokenizer_identity


def _data_tokenizer(manifest: Manifest, config: Config) -> Tokenizer | None:
    dataset = _data_of(manifest, config)
    return None if dataset is None else dataset.tokenizer()


def _data_of(manifest: Manifest, config: Config) -> Dataset | None:
    """What `data.path` holds, if the run has read from there and it still is there."""
    if manifest.progress.get("data") is None:
        return None
    try:
        return open_dataset(config.data)
    except DataError:
        return None


def _bytes_definition() -> bytes:
    """A tokenizer.json that does what :class:`BytesTokenizer` does.

    Byte-level BPE without merges, over the characters by which GPT-2 shows bytes.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in shown]
    characters = dict(zip(shown, map(chr, shown), strict=True)) | {b: chr(256 + n) for n, b in enumerate(others)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    end = {"id": 256, "content": END_OF_TEXT, "special": True, "normalized": False}
    return _json(
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [end | {"single_word": False, "lstrip": False, "rstrip": False}],
            "normalizer": None,
            "pre_tokenizer": level,
            "post_processor": None,
            "decoder": level,
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": {characters[byte]: byte for byte in range(256)},
                "merges": [],
            },
        }
    )


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
