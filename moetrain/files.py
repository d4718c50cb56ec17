"""Files that are complete or absent, and what tells whether they are the same."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_aside(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` to write to; it takes the name on leaving, durable, or is removed on an error."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.replace(path)
        fsync_folder(path.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def folder_written_aside(path: Path) -> Iterator[Path]:
    """A new folder beside `path` to write files to; it takes the name on leaving, durable, or is removed on an error.

    Raises OSError if there is a file, or a folder with anything in it, at `path` by then.
    """
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.mkdir()
    try:
        yield aside
        for file in aside.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        fsync_folder(aside)
        aside.rename(path)
        fsync_folder(path.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) so that `path` holds either the old contents or the new, whole."""
    with written_aside(path) as aside:
        aside.write_text(text, encoding="utf-8")


def write_all(file: io.FileIO, content: memoryview) -> None:
    """Write to an unbuffered file, which takes as much at a time as the system likes."""
    while content:
        content = content[file.write(content) :]


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's contents."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
