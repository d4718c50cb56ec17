"""A built data set, opened for reading: two splits of token ids through memory maps."""

from __future__ import annotations

import hashlib
import json
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from moetrain.config import DataConfig
from moetrain.data.build import HELD_OUT_FRACTION, build
from moetrain.data.corpus import stdlib_files
from moetrain.data.index import FORMAT_VERSION, INDEX_FILE, TOKENIZER_FILE, Index, Shard
from moetrain.data.tokenizer import BytesTokenizer, HuggingFaceTokenizer, Tokenizer
from moetrain.errors import DataError
from moetrain.files import sha256

VERIFIED_AT_START = 8 << 30
"""Bytes of shards up to which :func:`open_dataset` compares checksums: ranks wait for it at every start."""
_HASH_THREADS = 8


class Split:
    """The tokens of all training or all held-out documents, one after the other.

    Raises:
        DataError: a shard is missing, or its size is not what the index says.
    """

    def __init__(self, folder: Path, name: str, shards: tuple[Shard, ...]) -> None:
        self.folder = folder
        self.name = name
        self.shards = shards
        self.num_tokens = sum(shard.tokens for shard in shards)
        self.num_bytes = sum(shard.bytes for shard in shards)
        """UTF-8 bytes of the text, without ends of documents."""
        self.num_documents = sum(shard.documents for shard in shards)
        self._starts = np.cumsum([0, *(shard.tokens for shard in shards)])
        self._maps = []
        for shard in shards:
            path = folder / shard.file
            expected = shard.size
            try:
                size = path.stat().st_size
                if size != expected:
                    kind = "truncated" if size < expected else "altered"
                    raise DataError(f"{path}: {kind} shard: {size} bytes, the index says {expected}: {_remedy(folder)}")
                self._maps.append(np.memmap(path, dtype=shard.storage, mode="r"))
            except FileNotFoundError:
                raise DataError(f"{path}: missing shard: {_remedy(folder)}") from None
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None

    def read(self, start: int, count: int) -> NDArray[np.int64]:
        """Tokens start … start + count - 1 of the split: [count] int64, a copy.

        Raises:
            IndexError: the range is not inside the split.
        """
        if start < 0 or count < 0 or start + count > self.num_tokens:
            raise IndexError(f"tokens {start}:{start + count} of a {self.name} split of {self.num_tokens}")
        tokens = np.empty(count, np.int64)
        done = 0
        shard = int(np.searchsorted(self._starts, start, side="right")) - 1
        while done < count:
            offset = start + done - int(self._starts[shard])
            piece = self._maps[shard][offset : offset + count - done]
            tokens[done : done + piece.size] = piece
            done += piece.size
            shard += 1
        return tokens


@dataclass(frozen=True)
class Dataset:
    """A folder made by :func:`~moetrain.data.build.build`, opened."""

    name: str
    """`stdlib` or the folder's name, for people."""
    folder: Path
    index: Index
    train: Split
    heldout: Split

    @property
    def vocab_size(self) -> int:
        return self.index.vocab_size

    @property
    def end_of_document(self) -> int:
        return self.index.end_of_document

    @property
    def tokenizer_identity(self) -> dict[str, str]:
        return self.index.tokenizer

    @property
    def fingerprint(self) -> str:
        """Another one tells that the data were built again, from other text or in another way."""
        return self.index.fingerprint

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that made the tokens.

        Raises:
            DataError: its tokenizer.json is missing or altered, or the library tokenizers is not installed.
        """
        identity = self.tokenizer_identity
        if identity.get("kind") == "bytes":
            return BytesTokenizer()
        path = self.folder / TOKENIZER_FILE
        self._compare(TOKENIZER_FILE, identity.get("sha256"), "tokenizer")
        return HuggingFaceTokenizer(path.read_bytes(), str(path), identity.get("end_of_document_token"))

    def verify(self) -> None:
        """Compare everything with its checksum; reads all of the data. Raises DataError at the first difference."""
        files = [(shard.file, shard.sha256, "shard") for shard in (*self.train.shards, *self.heldout.shards)]
        if self.tokenizer_identity.get("kind") != "bytes":
            files.append((TOKENIZER_FILE, self.tokenizer_identity.get("sha256", ""), "tokenizer"))
        with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashing lets other threads run
            list(pool.map(lambda file: self._compare(*file), files))

    def count_text_bytes(self, split: Split, start: int, count: int) -> int:
        """UTF-8 bytes of the text that tokens start … start + count - 1 of a split stand for.

        Ends of documents stand for none. Exact for bytes. For other tokenizers the ids are decoded, document by
        document: exact where decoding gives back the text, but for a few bytes at either end of a range that begins or
        ends in the middle of a character or, for some tokenizers, of a document.

        Raises:
            IndexError: the range is not inside the split.
            DataError: see :meth:`tokenizer`.
        """
        tokens = split.read(start, count)
        ends = np.flatnonzero(tokens == self.end_of_document)
        if self.tokenizer_identity.get("kind") == "bytes":
            return count - ends.size
        tokenizer = self.tokenizer()
        # Not all at once: decoders treat the first token of a document in their own way, as encoders do.
        documents = np.split(tokens, ends)
        return sum(len(tokenizer.decode(ids[ids != self.end_of_document]).encode()) for ids in documents)

    def describe(self) -> str:
        """One line for a log."""
        return (
            f"{self.name}: {self.train.num_tokens:,} training and {self.heldout.num_tokens:,} held-out tokens, "
            f"{self.train.num_documents + self.heldout.num_documents:,} documents, vocabulary {self.vocab_size:,} "
            f"({self.tokenizer_identity.get('name', self.tokenizer_identity.get('kind'))})"
        )

    def _compare(self, file: str, expected: str | None, kind: str) -> None:
        path = self.folder / file
        try:
            actual = sha256(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror or error}") from None
        if actual != expected:
            raise DataError(f"{path}: altered {kind}: its SHA-256 is not the index's: {_remedy(self.folder)}")


def open_dataset(config: DataConfig, *, verify: bool = False) -> Dataset:
    """Open the data set that `data.path` names; `stdlib` is built in `data.cache_dir` at first use.

    Sizes of shards are always compared with the index. Processes may call this at the same time.

    Args:
        verify: compare checksums too, which reads all of the data; not those of more than VERIFIED_AT_START bytes,
            which `moetrain data info --verify` checks.

    Raises:
        DataError: the folder is missing, damaged, altered or of another format version.
    """
    folder = _stdlib_folder(config) if config.path == "stdlib" else Path(config.path).expanduser()
    if not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise DataError(f"data.path = {config.path}: {problem}: make it with `moetrain data build`, or use stdlib")
    index = Index.read(folder)
    name = "stdlib" if config.path == "stdlib" else folder.resolve().name
    dataset = Dataset(name, folder, index, Split(folder, "train", index.train), Split(folder, "heldout", index.heldout))
    if verify and sum(shard.size for shard in (*index.train, *index.heldout)) <= VERIFIED_AT_START:
        dataset.verify()
    return dataset


def check_vocabulary(dataset: Dataset, model_vocab_size: int) -> None:
    """Raise DataError unless every token id of the data has a row in the model's embedding."""
    if model_vocab_size < dataset.vocab_size:
        raise DataError(
            f"model.vocab_size = {model_vocab_size} is smaller than the tokenizer's {dataset.vocab_size} "
            f"({dataset.folder}): set it to {dataset.vocab_size} or more"
        )


def _stdlib_folder(config: DataConfig) -> Path:
    # Distributions ship the same Python with different parts of the library, and a cache may be shared by machines.
    tokenizer = BytesTokenizer()
    settings = [
        FORMAT_VERSION,
        HELD_OUT_FRACTION,
        tokenizer.identity,
        [(file.key, file.size) for file in stdlib_files()],
    ]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]
    folder = Path(config.cache_dir).expanduser() / f"stdlib-{platform.python_version()}-{digest}"
    if not folder.exists():
        try:
            build(["stdlib"], folder, tokenizer)
        except DataError:
            # Another process was faster: its folder is complete, for it appears by one rename.
            if not (folder / INDEX_FILE).is_file():
                raise
    return folder


def _remedy(folder: Path) -> str:
    if folder.name.startswith("stdlib-"):
        return f"remove {folder}, it is built again at the next start"
    return "build the data again with `moetrain data build --force`"
