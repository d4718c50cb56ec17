"""Where text comes from: documents out of files, folders, the Python standard library and Hugging Face datasets."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from moetrain.errors import DataError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
"""Files that are read, by the end of their name."""

_STDLIB = "stdlib"
_HUB = "hf:"
_NOT_LIBRARY = {"site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Document:
    """A text and its stable name."""

    key: str
    """Path below the source it was found in, with `:line` or `:row` (from 1) where a file holds many."""
    text: bytes
    """UTF-8, not empty."""


@dataclass(frozen=True)
class _File:
    path: Path
    key: str
    size: int
    is_library: bool = False


class Corpus:
    """The documents of some sources, in an order that depends on nothing but their names.

    Args:
        sources: each `stdlib`, a file (see SUFFIXES), a folder of those, or `hf:NAME[:SPLIT[:CONFIG]]`.
        field: name of the text in JSON records, Parquet columns and datasets.

    Raises:
        DataError: a source is missing or of an unknown kind; while iterating: a file is empty, damaged, not UTF-8, or
            lacks the field. One line that names the file (and line or row) and says what to do.
    """

    def __init__(self, sources: Sequence[str], field: str = "text") -> None:
        self.field = field
        self.position = 0
        """Bytes of the files read so far."""
        self.skipped: list[Path] = []
        """Files in the folders that are none of SUFFIXES."""
        self._sources: list[_File | str] = []
        for source in sources:
            if source.startswith(_HUB):
                self._sources.append(source)
            elif source == _STDLIB:
                self._sources += stdlib_files()
            else:
                self._sources += self._find(Path(source))
        if not self._sources:
            raise DataError("no sources: name stdlib, files, folders or hf:NAME")

    @property
    def total_bytes(self) -> int | None:
        """Bytes of all files as they are stored; None where a dataset of unknown size is among the sources."""
        files = [source for source in self._sources if isinstance(source, _File)]
        return sum(file.size for file in files) if len(files) == len(self._sources) else None

    def __iter__(self) -> Iterator[Document]:
        finished = 0
        for source in self._sources:
            if isinstance(source, str):
                yield from _read_hub(source, self.field)
                continue
            found = False
            try:
                with source.path.open("rb") as raw:
                    for document in _read(source, raw, self.field):
                        self.position = finished + min(raw.tell(), source.size)
                        if document.text:
                            found = True
                            yield document
            except OSError as error:
                raise DataError(f"{source.path}: cannot be read: {error.strerror or error}") from None
            if not found and not source.is_library:
                raise DataError(f"{source.path}: empty: there is no text in it; remove it from the sources")
            finished += source.size
            self.position = finished

    def _find(self, path: Path) -> list[_File]:
        known = ", ".join(SUFFIXES)
        if path.is_file():
            if not path.name.lower().endswith(SUFFIXES):
                raise DataError(f"{path}: unknown kind of file: expected {known}")
            return [_File(path, path.name, path.stat().st_size)]
        if not path.is_dir():
            raise DataError(f"{path}: no such file or folder (sources are stdlib, files, folders and hf:NAME)")
        files = sorted(
            (file for file in path.rglob("*") if file.is_file() and not _is_hidden(file.relative_to(path))),
            key=lambda file: file.relative_to(path).as_posix(),
        )
        chosen = [file for file in files if file.name.lower().endswith(SUFFIXES)]
        self.skipped += [file for file in files if not file.name.lower().endswith(SUFFIXES)]
        if not chosen:
            raise DataError(f"{path}: no file in this folder is one of {known}")
        return [_File(file, file.relative_to(path).as_posix(), file.stat().st_size) for file in chosen]


def stdlib_files() -> list[_File]:
    """The Python sources of the running interpreter's standard library, in the order of a hash of their paths.

    By path, a stretch of the corpus would be one package, such as the tables of `encodings`; so it is a sample of all.

    Raises:
        DataError: this Python comes without sources.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    files = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        paths = (Path(folder, name) for name in names if name.endswith(".py"))
        files += [_File(p, p.relative_to(root).as_posix(), p.stat().st_size, True) for p in paths if p.is_file()]
    if not files:
        raise DataError(f"stdlib: no Python sources below {root}: name other data in data.path")
    return sorted(files, key=lambda file: hashlib.sha256(file.key.encode()).digest())


def _is_hidden(relative: Path) -> bool:
    return any(part.startswith(".") for part in relative.parts)


def _read(file: _File, raw: BinaryIO, field: str) -> Iterator[Document]:
    name = file.path.name.lower()
    if file.is_library:
        return _read_library(file, raw)
    if name.endswith(".txt"):
        return _read_text(file, raw)
    if name.endswith(".jsonl"):
        return _read_json_lines(file, raw, field)
    if name.endswith(".gz"):
        return _read_json_lines(file, _gzip_lines(file, raw), field)
    if name.endswith(".zst"):
        return _read_json_lines(file, _zstandard_lines(file, raw), field)
    return _read_parquet(file, raw, field)


def _read_library(file: _File, raw: BinaryIO) -> Iterator[Document]:
    text = raw.read()
    try:
        text.decode()
    except UnicodeDecodeError:  # a few sources are in other encodings on purpose
        return
    yield Document(file.key, text)


def _read_text(file: _File, raw: BinaryIO) -> Iterator[Document]:
    text = raw.read()
    try:
        text.decode()
    except UnicodeDecodeError as error:
        line = text.count(b"\n", 0, error.start) + 1
        raise DataError(f"{file.path}:{line}: not UTF-8: convert the file, for example with iconv") from None
    yield Document(file.key, text)


def _read_json_lines(file: _File, lines: Iterable[bytes], field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{file.path}:{number}"
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError:
            raise DataError(f"{where}: not UTF-8: convert the file, for example with iconv") from None
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not valid JSON ({error}): each line must be one JSON object") from None
        if not isinstance(record, dict):
            raise DataError(f"{where}: expected a JSON object, found a {type(record).__name__}")
        yield Document(f"{file.key}:{number}", _field(record, field, where))


def _read_parquet(file: _File, raw: BinaryIO, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise DataError(f"{file.path}: needs the library pyarrow: pip install 'moetrain[data]'") from None
    row = 0
    try:
        table = pyarrow.parquet.ParquetFile(raw)
        if field not in table.schema_arrow.names:
            columns = ", ".join(table.schema_arrow.names)
            raise DataError(f"{file.path}: no column {field!r} (there are: {columns}): name it with --field")
        for batch in table.iter_batches(batch_size=1024, columns=[field]):
            for value in batch.column(0):
                row += 1
                yield Document(f"{file.key}:{row}", _field({field: value.as_py()}, field, f"{file.path}: row {row}"))
    except UnicodeDecodeError:
        raise DataError(f"{file.path}: row {row}: not UTF-8: write the column again as UTF-8 strings") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.path}: not a readable Parquet file: {_first_line(error)}") from None


def _read_hub(source: str, field: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"{source}: needs the library datasets: pip install 'moetrain[data]'") from None
    name, split, config, *extra = [*source.removeprefix(_HUB).split(":"), "", ""]
    if not name or any(extra):
        raise DataError(f"{source}: expected hf:NAME[:SPLIT[:CONFIG]]")
    split = split or "train"
    found = False
    try:
        for row, record in enumerate(datasets.load_dataset(name, config or None, split=split, streaming=True), start=1):
            text = _field(record, field, f"{source}: row {row}")
            if text:
                found = True
                yield Document(f"{name}:{split}:{row}", text)
    except DataError:
        raise
    except Exception as error:  # the library raises errors of many kinds: network, hub, formats
        raise DataError(f"{source}: cannot be read: {_first_line(error)}") from None
    if not found:
        raise DataError(f"{source}: empty: there is no text in it")


def _field(record: dict[str, Any], field: str, where: str) -> bytes:
    """The text of a record as UTF-8."""
    if field not in record:
        present = ", ".join(map(str, record)) or "none"
        raise DataError(f"{where}: no field {field!r} (there are: {present}): name the text's field with --field")
    value = record[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: field {field!r} is not a string but a {type(value).__name__}")
    try:
        return value.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: field {field!r} holds half a surrogate pair: it cannot be written as UTF-8"
        ) from None


def _gzip_lines(file: _File, raw: BinaryIO) -> Iterator[bytes]:
    try:
        with gzip.GzipFile(fileobj=raw) as lines:
            yield from lines
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{file.path}: truncated or damaged gzip file ({_first_line(error)}): fetch it again") from None


def _zstandard_lines(file: _File, raw: BinaryIO) -> Iterator[bytes]:
    rest = b""
    for chunk in _zstandard_chunks(file, raw):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _zstandard_chunks(file: _File, raw: BinaryIO) -> Iterator[bytes]:
    # zstandard's own stream reader takes the end of a truncated file for the end of its text, so frames are followed
    # here.
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{file.path}: needs the library zstandard: pip install 'moetrain[data]'") from None
    decompressor = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    try:
        while compressed := raw.read(1 << 20):
            while compressed:
                frame = frame or decompressor.decompressobj()
                yield frame.decompress(compressed)
                compressed = frame.unused_data
                if frame.eof:
                    frame = None
    except zstandard.ZstdError as error:
        raise DataError(f"{file.path}: damaged zstd file ({_first_line(error)}): fetch it again") from None
    if frame is not None:
        raise DataError(f"{file.path}: truncated zstd file: fetch it again")


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
