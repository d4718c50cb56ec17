"""`moetrain data build` and `moetrain data info`."""

from __future__ import annotations

import argparse
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from moetrain.config import DataConfig
from moetrain.data.build import HELD_OUT_FRACTION, build
from moetrain.data.corpus import SUFFIXES, Corpus
from moetrain.data.dataset import open_dataset
from moetrain.data.tokenizer import load_tokenizer
from moetrain.errors import DataError


def add_build_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain data build`."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help=f"stdlib, a file ({' '.join(SUFFIXES)}), a folder of those, or hf:NAME[:SPLIT[:CONFIG]]",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument(
        "--tokenizer", default="bytes", metavar="NAME", help="bytes (default) or the path of a tokenizer.json"
    )
    parser.add_argument("--field", default="text", metavar="NAME", help="the text in records (default: text)")
    parser.add_argument("--eod", metavar="TOKEN", help="token that ends a document (default: the usual ones)")
    parser.add_argument(
        "--held-out",
        type=float,
        default=HELD_OUT_FRACTION,
        metavar="FRACTION",
        help="fraction of documents to hold out (default: %(default)s)",
    )
    parser.add_argument("--workers", type=int, metavar="N", help="processes (default: one a core; bytes need one)")
    parser.add_argument("--force", action="store_true", help="replace a data set that is already there")


def build_command(args: argparse.Namespace) -> int:
    """Run `moetrain data build`; returns the exit code. Raises DataError."""
    tokenizer = load_tokenizer(args.tokenizer, args.eod)
    with _sigterm_exits():
        build(
            args.sources,
            args.out,
            tokenizer,
            held_out_fraction=args.held_out,
            workers=args.workers,
            field=args.field,
            force=args.force,
        )
    dataset = open_dataset(DataConfig(path=args.out))
    console = Console(soft_wrap=True, highlight=False)
    console.print(escape(f"{args.out}: {dataset.describe()}"))
    skipped = Corpus(args.sources, args.field).skipped
    if skipped:
        console.print(escape(f"skipped {len(skipped)} files of other kinds, such as {skipped[0]}"))
    return 0


def add_info_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain data info`."""
    parser.add_argument("dir", metavar="DIR", help="a folder made by `moetrain data build`, or stdlib")
    parser.add_argument("--verify", action="store_true", help="compare checksums (reads all of the data)")
    parser.add_argument("--sample", type=int, default=0, metavar="N", help="show the first N training tokens as text")


def info_command(args: argparse.Namespace) -> int:
    """Run `moetrain data info`; returns the exit code. Raises DataError."""
    if args.sample < 0:
        raise DataError(f"--sample {args.sample}: must not be negative")
    folder = Path(args.dir).expanduser()
    if args.dir != "stdlib" and not folder.is_dir():
        problem = "not a folder" if folder.exists() else "no such folder"
        raise DataError(f"{args.dir}: {problem}: give a folder made by `moetrain data build`, or stdlib")
    dataset = open_dataset(DataConfig(path=args.dir))
    if args.verify:
        dataset.verify()
    splits = (dataset.train, dataset.heldout)
    table = Table(title=escape(dataset.name))
    table.add_column()
    for split in splits:
        table.add_column(split.name, justify="right")
    table.add_row("tokens", *(f"{split.num_tokens:,}" for split in splits))
    table.add_row("bytes of text", *(f"{split.num_bytes:,}" for split in splits))
    table.add_row("documents", *(f"{split.num_documents:,}" for split in splits))
    table.add_row("shards", *(f"{len(split.shards)} × {split.shards[0].dtype}" for split in splits))
    table.add_row("checksums", *("OK" if args.verify else "not read (--verify)" for _ in splits))
    identity = ", ".join(f"{key} {value}" for key, value in dataset.tokenizer_identity.items())
    console = Console()
    console.print(table)
    facts = {
        "folder": dataset.folder,
        "tokenizer": identity,
        "vocabulary": f"{dataset.vocab_size:,} (end of document: {dataset.end_of_document})",
    }
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", markup=False, highlight=False, soft_wrap=True)
    if args.sample:
        tokens = dataset.train.read(0, min(args.sample, dataset.train.num_tokens))
        console.print(dataset.tokenizer().decode(tokens), markup=False, highlight=False, soft_wrap=True)
    return 0


@contextmanager
def _sigterm_exits() -> Iterator[None]:
    """SIGTERM raises SystemExit, so that clean-up runs.

    Here and not in `build`, which also runs inside a training process: there signals are the trainer's.
    """

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
