"""index.json: what a built data set holds.

A data set is a folder with this file, flat shards of token ids (little-endian, each document followed by the
end-of-document id) and, where the tokenizer is not bytes, its tokenizer.json.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moetrain.errors import DataError
from moetrain.files import write_text

FORMAT_VERSION = 1
INDEX_FILE = "index.json"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True)
class Shard:
    """One file of token ids."""

    file: str
    """Name within the folder."""
    tokens: int
    """Ids in it, ends of documents included."""
    documents: int
    bytes: int
    """UTF-8 bytes of the documents' text."""
    dtype: str
    """uint16 or uint32, stored little-endian."""
    sha256: str

    @property
    def storage(self) -> np.dtype[Any]:
        """The dtype as it lies in the file."""
        return np.dtype(self.dtype).newbyteorder("<")

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.tokens * self.storage.itemsize


@dataclass(frozen=True)
class Index:
    """The contents of index.json."""

    vocab_size: int
    end_of_document: int
    tokenizer: dict[str, str]
    """:attr:`~moetrain.data.tokenizer.Tokenizer.identity`."""
    source: dict[str, Any]
    """What was built and how, for the reader."""
    train: tuple[Shard, ...]
    heldout: tuple[Shard, ...]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of the contents, shards' checksums included, wherever they came from."""
        contents = {key: value for key, value in asdict(self).items() if key != "source"}
        return hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write index.json, durable."""
        contents = {"format_version": FORMAT_VERSION, **asdict(self)}
        write_text(folder / INDEX_FILE, json.dumps(contents, indent=2) + "\n")

    @staticmethod
    def read(folder: Path) -> Index:
        """Read and check index.json.

        Raises:
            DataError: it is missing, broken, of another format version, or a split has no tokens.
        """
        path = folder / INDEX_FILE
        again = "build the data again with `moetrain data build`"
        try:
            contents = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{path}: missing: {folder} is not a folder made by `moetrain data build`") from None
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: broken index, not valid JSON ({error}): {again}") from None
        version = contents.get("format_version") if isinstance(contents, dict) else None
        if version != FORMAT_VERSION:
            raise DataError(f"{path}: format version {version}, this moetrain reads {FORMAT_VERSION}: {again}")
        try:
            index = Index(
                vocab_size=int(contents["vocab_size"]),
                end_of_document=int(contents["end_of_document"]),
                tokenizer=dict(contents["tokenizer"]),
                source=dict(contents["source"]),
                train=tuple(_shard(entry) for entry in contents["train"]),
                heldout=tuple(_shard(entry) for entry in contents["heldout"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{path}: broken index, {reason}: {again}") from None
        for name, shards in (("training", index.train), ("held-out", index.heldout)):
            if not sum(shard.tokens for shard in shards):
                raise DataError(f"{path}: no {name} tokens: {again}")
        return index


def _shard(entry: dict[str, Any]) -> Shard:
    shard = Shard(**entry)
    if Path(shard.file).name != shard.file:
        raise ValueError(f"shard {shard.file!r} is not the name of a file")
    if shard.dtype not in ("uint16", "uint32"):
        raise ValueError(f"dtype {shard.dtype!r} of {shard.file} is neither uint16 nor uint32")
    if not all(isinstance(count, int) and count > 0 for count in (shard.tokens, shard.documents, shard.bytes)):
        raise ValueError(f"counts of {shard.file} are not positive integers")
    return shard
