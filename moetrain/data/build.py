"""Text to a data set: tokenise in parallel, split off held-out documents, write memory-mapped shards."""

from __future__ import annotations

import errno
import hashlib
import os
import platform
import re
import secrets
import shutil
import signal
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from moetrain.data.corpus import Corpus, Document
from moetrain.data.index import INDEX_FILE, TOKENIZER_FILE, Index, Shard
from moetrain.data.tokenizer import Tokenizer
from moetrain.errors import DataError
from moetrain.files import fsync_folder, written_aside

HELD_OUT_FRACTION = 0.05
SHARD_TOKENS = 1 << 28
_CHUNK_BYTES = 1 << 20
"""Text handed to a tokenising process at a time."""

Tokens = NDArray[np.unsignedinteger[Any]]


def build(
    sources: Sequence[str],
    out_dir: str | Path,
    tokenizer: Tokenizer,
    *,
    held_out_fraction: float = HELD_OUT_FRACTION,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    field: str = "text",
    force: bool = False,
    progress: bool = True,
) -> Index:
    """Build a data set in the folder `out_dir`, which is complete or absent whatever happens.

    It grows in a hidden folder beside `out_dir`; those that killed builds left there are removed.

    The result does not depend on `workers`. A document is held out by a hash of its key, so it stays on its side when
    other documents come or go.

    Args:
        sources: see :class:`~moetrain.data.corpus.Corpus`.
        held_out_fraction: expected fraction of documents that are held out.
        shard_tokens: a shard ends with the document that reaches this many tokens.
        workers: processes that tokenise; default: the bytes tokenizer runs in this process, others on every core.
        field: name of the text in records.
        force: replace a data set that is already there.
        progress: show a progress bar on standard error.

    Raises:
        DataError: bad sources (see Corpus), `out_dir` exists, no space, or one of the splits would be empty.
    """
    out = Path(out_dir)
    if not 0 < held_out_fraction < 1:
        raise DataError(f"--held-out {held_out_fraction}: must be between 0 and 1")
    if workers is not None and workers < 1:
        raise DataError(f"--workers {workers}: must be positive")
    _check_destination(out, force)
    corpus = Corpus(sources, field)
    if workers is None:
        workers = 1 if tokenizer.identity["kind"] == "bytes" else os.cpu_count() or 1

    staging = out.with_name(f"{_staging_prefix(out)}{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        staging.mkdir()
        train, heldout = _write_shards(
            corpus, staging, tokenizer, held_out_fraction, shard_tokens, workers, progress=progress
        )
        for shards, name, remedy in ((train, "training", "lower"), (heldout, "held-out", "raise")):
            if not shards:
                raise DataError(
                    f"{', '.join(sources)}: no {name} document at --held-out {held_out_fraction}: give more documents "
                    f"(a .txt file is one, a line of .jsonl is one) or {remedy} --held-out"
                )
        index = Index(
            vocab_size=tokenizer.vocab_size,
            end_of_document=tokenizer.end_of_document,
            tokenizer=tokenizer.identity,
            source={"sources": list(sources), "field": field, "held_out_fraction": held_out_fraction},
            train=train,
            heldout=heldout,
        )
        if tokenizer.definition is not None:
            with written_aside(staging / TOKENIZER_FILE) as aside:
                aside.write_bytes(tokenizer.definition)
        index.write(staging)
        _publish(staging, out, force)
    except OSError as error:
        raise DataError(f"{out}: cannot be written: {error.strerror or error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return index


def is_held_out(key: str, fraction: float) -> bool:
    """Whether the document called `key` belongs to the held-out split: a function of its arguments alone."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) < fraction * 2**64


def _check_destination(out: Path, force: bool) -> None:
    if not out.exists():
        return
    if not force:
        raise DataError(f"{out}: already exists: choose another folder, or replace it with --force")
    if not out.is_dir() or (any(out.iterdir()) and not (out / INDEX_FILE).is_file()):
        raise DataError(f"{out}: exists and is not a data set: --force does not replace it")


def _staging_prefix(out: Path) -> str:
    # The machine's name, because a folder may be shared by machines and a process id says nothing on another one.
    return f".{out.name}.{platform.node()}."


def _remove_stale(out: Path) -> None:
    """Remove what builds of `out` on this machine left when they were killed."""
    pattern = re.compile(re.escape(_staging_prefix(out)) + r"(\d+)\.[0-9a-f]{8}\.tmp(\.old)?")
    for folder in list(out.parent.iterdir()):
        match = pattern.fullmatch(folder.name)
        # Killed in the middle of a replacement: what was replaced may be the only data set there is.
        if match and not _is_alive(int(match[1])) and (match[2] is None or out.exists()):
            shutil.rmtree(folder, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def _publish(staging: Path, out: Path, force: bool) -> None:
    fsync_folder(staging)
    if force and out.exists():
        old = staging.with_name(f"{staging.name}.old")
        try:
            out.rename(old)
            staging.rename(out)
        except BaseException:
            if not out.exists():
                old.rename(out)
            raise
        shutil.rmtree(old)
    else:
        try:
            staging.rename(out)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            raise DataError(f"{out}: appeared while it was being built; nothing was replaced") from None
    fsync_folder(out.parent)


class _ShardWriter:
    """The shards of one split, each hashed while it is written."""

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._file: BinaryIO | None = None
        self.shards: list[Shard] = []

    def add(self, tokens: Tokens, text_bytes: int) -> None:
        if self._file is None:
            self._name = f"{self._split}-{len(self.shards):05d}.bin"
            self._file = (self._folder / self._name).open("wb")
            self._hash = hashlib.sha256()
            self._tokens = self._documents = self._bytes = 0
        contents = tokens.tobytes()
        self._file.write(contents)
        self._hash.update(contents)
        self._tokens += tokens.size
        self._documents += 1
        self._bytes += text_bytes
        if self._tokens >= self._shard_tokens:
            self.finish_shard()

    def finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.flush()
        os.fsync(self._file.fileno())
        self.close()
        self.shards.append(
            Shard(self._name, self._tokens, self._documents, self._bytes, self._dtype, self._hash.hexdigest())
        )

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None


def _write_shards(
    corpus: Corpus,
    folder: Path,
    tokenizer: Tokenizer,
    held_out_fraction: float,
    shard_tokens: int,
    workers: int,
    *,
    progress: bool,
) -> tuple[tuple[Shard, ...], tuple[Shard, ...]]:
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    total_documents = total_tokens = 0
    with (
        closing(_ShardWriter(folder, "train", dtype, shard_tokens)) as train,
        closing(_ShardWriter(folder, "heldout", dtype, shard_tokens)) as heldout,
        closing(_tokenized(_chunks(corpus), tokenizer, dtype, workers)) as chunks,
        Progress(
            TextColumn("tokenising"),
            BarColumn(),
            TextColumn("{task.fields[documents]:,} documents, {task.fields[tokens]:,} tokens"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            disable=not progress,
        ) as bar,
    ):
        task = bar.add_task("", total=corpus.total_bytes, documents=0, tokens=0)
        for documents, arrays in chunks:
            for document, tokens in zip(documents, arrays, strict=True):
                writer = heldout if is_held_out(document.key, held_out_fraction) else train
                writer.add(tokens, len(document.text))
                total_documents += 1
                total_tokens += tokens.size
            bar.update(task, completed=corpus.position, documents=total_documents, tokens=total_tokens)
        train.finish_shard()
        heldout.finish_shard()
    return tuple(train.shards), tuple(heldout.shards)


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    size = 0
    for document in documents:
        chunk.append(document)
        size += len(document.text)
        if size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _tokenized(
    chunks: Iterable[list[Document]], tokenizer: Tokenizer, dtype: str, workers: int
) -> Generator[tuple[list[Document], list[Tokens]]]:
    """Chunks in their order, each with the ids of its documents."""
    if workers == 1:
        for chunk in chunks:
            yield chunk, [_encode(tokenizer, dtype, document.text) for document in chunk]
        return
    pool = ProcessPoolExecutor(
        workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(tokenizer, dtype)
    )
    pending: deque[tuple[list[Document], Future[list[Tokens]]]] = deque()
    try:
        for chunk in chunks:
            pending.append((chunk, pool.submit(_encode_chunk, [document.text for document in chunk])))
            if len(pending) > 2 * workers:
                first, future = pending.popleft()
                yield first, future.result()
        for chunk, future in pending:
            yield chunk, future.result()
    except BrokenProcessPool:
        raise DataError("a tokenising process died (out of memory?): use fewer --workers") from None
    finally:
        pool.shutdown(cancel_futures=True)


def _encode(tokenizer: Tokenizer, dtype: str, text: bytes) -> Tokens:
    ids = tokenizer.encode(text)
    tokens = np.empty(ids.size + 1, np.dtype(dtype).newbyteorder("<"))
    tokens[:-1] = ids
    tokens[-1] = tokenizer.end_of_document
    return tokens


_worker: tuple[Tokenizer, str]
"""Set in tokenising processes only: a tokenizer is too large to send with each chunk."""


def _start_worker(tokenizer: Tokenizer, dtype: str) -> None:
    global _worker
    _worker = tokenizer, dtype
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle


def _encode_chunk(texts: list[bytes]) -> list[Tokens]:
    return [_encode(*_worker, text) for text in texts]
