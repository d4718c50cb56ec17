"""Building and opening data sets: round trips, splits, atomicity and one clear line for each kind of damage."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import platform
import re
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import zstandard

from moetrain.config import DataConfig
from moetrain.data import (
    BytesTokenizer,
    Tokenizer,
    add_build_arguments,
    add_info_arguments,
    build_command,
    check_vocabulary,
    info_command,
    load_tokenizer,
    open_dataset,
)
from moetrain.data.build import build, is_held_out
from moetrain.data.corpus import Corpus
from moetrain.errors import DataError
from moetrain.files import sha256

TEXTS = [f"document {i}: ärger, 数据 and <|endoftext|>\n" * (i % 7 + 1) for i in range(120)]


def write_jsonl(path: Path, texts: list[str], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({field: text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", TEXTS)


@pytest.fixture
def built(tmp_path: Path, corpus_file: Path) -> Path:
    """A data set of TEXTS with several shards."""
    folder = tmp_path / "built"
    build([str(corpus_file)], folder, BytesTokenizer(), held_out_fraction=0.2, shard_tokens=3000, progress=False)
    return folder


@pytest.fixture(scope="session")
def tokenizer_json(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small byte-level BPE with a truncation that must not be applied and an id beyond the number of entries."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.enable_truncation(4)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def documents_of(folder: Path) -> dict[str, list[str]]:
    """Decoded documents of both splits, from the shards."""
    dataset = open_dataset(DataConfig(path=str(folder)), verify=True)
    tokenizer = dataset.tokenizer()
    documents = {}
    for split in (dataset.train, dataset.heldout):
        tokens = split.read(0, split.num_tokens)
        assert tokens[-1] == dataset.end_of_document
        pieces = np.split(tokens, np.flatnonzero(tokens == dataset.end_of_document) + 1)[:-1]
        assert len(pieces) == split.num_documents
        documents[split.name] = [tokenizer.decode(piece[:-1]) for piece in pieces]
        assert sum(len(text.encode()) for text in documents[split.name]) == split.num_bytes
    return documents


def expected_documents(fraction: float, name: str = "corpus.jsonl") -> dict[str, list[str]]:
    held_out = [is_held_out(f"{name}:{line}", fraction) for line in range(1, len(TEXTS) + 1)]
    return {
        "train": [text for text, out in zip(TEXTS, held_out, strict=True) if not out],
        "heldout": [text for text, out in zip(TEXTS, held_out, strict=True) if out],
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


# Tokenizers


def test_bytes_tokenizer_round_trip() -> None:
    tokenizer = BytesTokenizer()
    text = "naïve 数据\n"
    assert tokenizer.encode(text).tolist() == list(text.encode())
    assert tokenizer.decode(tokenizer.encode(text.encode())) == text
    assert tokenizer.decode([104, 105, 256, 72, 105, 300]) == "hi\n\nHi"


def test_hugging_face_tokenizer_round_trip(tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    assert tokenizer.vocab_size == 300
    for text in TEXTS[:8]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.end_of_document not in ids, "a special token in the text must stay text"
    assert load_tokenizer(str(tokenizer_json.parent)).identity == tokenizer.identity


@pytest.mark.parametrize(
    ("name", "eod", "message"),
    [
        ("nowhere.json", None, "nowhere.json"),
        ("broken.json", None, "broken.json: not a Hugging Face tokenizer.json"),
        ("unended.json", None, "unended.json: none of the usual end-of-document tokens"),
        ("unended.json", "<end>", "unended.json: --eod '<end>' is not in its vocabulary"),
        ("bytes", "</s>", "--eod"),
    ],
)
def test_tokenizer_errors(tmp_path: Path, name: str, eod: str | None, message: str) -> None:
    (tmp_path / "broken.json").write_text("{}")
    tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "unended.json"))
    with pytest.raises(DataError, match=re.escape(message)) as error:
        load_tokenizer(name if name == "bytes" else str(tmp_path / name), eod)
    assert "\n" not in str(error.value)


def test_missing_library_names_the_extra(tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"moetrain\[data\]"):
        load_tokenizer(str(tokenizer_json))


# Building


def test_build_keeps_every_document(built: Path) -> None:
    assert len(list(built.glob("train-*.bin"))) > 1
    assert documents_of(built) == expected_documents(0.2)


def test_build_with_tokenizer_json(tmp_path: Path, corpus_file: Path, tokenizer_json: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_json))
    build([str(corpus_file)], tmp_path / "out", tokenizer, held_out_fraction=0.2, workers=1, progress=False)
    assert documents_of(tmp_path / "out") == expected_documents(0.2)
    dataset = open_dataset(DataConfig(path=str(tmp_path / "out")))
    assert dataset.vocab_size == 300
    assert dataset.train.num_tokens < dataset.train.num_bytes
    (tmp_path / "out" / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="altered tokenizer"):
        dataset.verify()


class LargeVocabulary(BytesTokenizer):
    """Ids that need more than 16 bits."""

    vocab_size = 70_000
    end_of_document = 69_999


def test_large_vocabulary_uses_uint32(tmp_path: Path, corpus_file: Path) -> None:
    build([str(corpus_file)], tmp_path / "out", LargeVocabulary(), held_out_fraction=0.2, progress=False)
    dataset = open_dataset(DataConfig(path=str(tmp_path / "out")), verify=True)
    assert dataset.train.shards[0].dtype == "uint32"
    assert np.count_nonzero(dataset.train.read(0, dataset.train.num_tokens) == 69_999) == dataset.train.num_documents


@pytest.mark.parametrize("kind", ["txt", "jsonl", "jsonl.gz", "jsonl.zst", "parquet"])
def test_every_kind_of_file_gives_the_same_text(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"corpus.{kind}"
    lines = "\n\n".join(json.dumps({"id": 1, "body": text}) for text in TEXTS).encode()
    half = len(lines) // 2
    if kind == "txt":
        path = tmp_path / "folder"
        (path / "b").mkdir(parents=True)
        (path / ".hidden").mkdir()
        (path / ".hidden" / "no.txt").write_text("hidden")
        (path / "readme.md").write_text("not text")
        for i, text in enumerate(TEXTS):
            (path / ("a.txt" if i == 0 else f"b/{i:03d}.txt")).write_bytes(text.encode())
    elif kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines[:half]) + gzip.compress(lines[half:]))
    elif kind == "jsonl.zst":
        compressor = zstandard.ZstdCompressor()
        path.write_bytes(compressor.compress(lines[:half]) + compressor.compress(lines[half:]))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": range(len(TEXTS)), "body": TEXTS}), path, row_group_size=50)
    corpus = Corpus([str(path)], "body")
    documents = list(corpus)
    assert [document.text.decode() for document in documents] == TEXTS
    assert len({document.key for document in documents}) == len(TEXTS)
    assert corpus.position == corpus.total_bytes
    assert [file.name for file in corpus.skipped] == (["readme.md"] if kind == "txt" else [])


def test_hub_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, str]]:
        calls.append((name, config, split, streaming))
        if split == "absent":
            raise ValueError("Unknown split absent.\nlong explanation")
        return iter([{"text": "one"}, {"text": ""}, {"text": "two"}])

    library = ModuleType("datasets")
    library.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", library)
    assert [document.text for document in Corpus(["hf:owner/name:test:small"])] == [b"one", b"two"]
    assert [document.key for document in Corpus(["hf:name"])] == ["name:train:1", "name:train:3"]
    assert calls == [("owner/name", "small", "test", True), ("name", None, "train", True)]
    for source, message in {
        "hf:name:absent": "hf:name:absent: cannot be read: Unknown split absent.",
        "hf:": "hf:: expected hf:NAME",
    }.items():
        with pytest.raises(DataError, match=f"^{re.escape(message)}"):
            list(Corpus([source]))
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"moetrain\[data\]"):
        list(Corpus(["hf:name"]))


def test_parallel_build_equals_serial_build(
    tmp_path: Path, tokenizer_json: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetrain.data.build._CHUNK_BYTES", 500)
    source = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    tokenizer = load_tokenizer(str(tokenizer_json))
    for workers in (1, 2):
        out = tmp_path / f"workers-{workers}"
        build([str(source)], out, tokenizer, held_out_fraction=0.2, shard_tokens=2000, workers=workers, progress=False)
    assert contents(tmp_path / "workers-1") == contents(tmp_path / "workers-2")


class DyingTokenizer(BytesTokenizer):
    """Ends the process that uses it."""

    def encode(self, text: str | bytes) -> Any:
        os._exit(9)


def test_dead_worker_is_an_error(tmp_path: Path, corpus_file: Path) -> None:
    with pytest.raises(DataError, match="a tokenising process died"):
        build([str(corpus_file)], tmp_path / "out", DyingTokenizer(), workers=2, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_held_out_split_is_stable_and_disjoint(tmp_path: Path) -> None:
    assert [line for line in range(1, 9) if is_held_out(f"corpus.jsonl:{line}", 0.2)] == [4, 5, 8]
    fraction = np.mean([is_held_out(str(i), 0.05) for i in range(20_000)])
    assert abs(fraction - 0.05) < 0.005
    splits = []
    for count in (60, 120):  # more documents do not move those that were there
        source = write_jsonl(tmp_path / "corpus.jsonl", TEXTS[:count])
        build([str(source)], tmp_path / str(count), BytesTokenizer(), held_out_fraction=0.2, progress=False)
        splits.append(documents_of(tmp_path / str(count)))
    assert splits[1]["heldout"][: len(splits[0]["heldout"])] == splits[0]["heldout"]
    assert splits[1]["train"][: len(splits[0]["train"])] == splits[0]["train"]
    assert not set(splits[1]["train"]) & set(splits[1]["heldout"])


class FailingTokenizer(BytesTokenizer):
    """Fails after some documents were written."""

    def __init__(self, error: BaseException) -> None:
        self.error, self.calls = error, 0

    def encode(self, text: str | bytes) -> Any:
        self.calls += 1
        if self.calls > 50:
            raise self.error
        return super().encode(text)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (RuntimeError("wrong"), RuntimeError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), DataError),
    ],
)
def test_failing_build_leaves_nothing(
    tmp_path: Path, error: BaseException, raised: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moetrain.data.build._CHUNK_BYTES", 500)
    source = write_jsonl(tmp_path / "corpus.jsonl", TEXTS)
    with pytest.raises(raised):
        build([str(source)], tmp_path / "out", FailingTokenizer(error), shard_tokens=500, progress=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]


def test_killed_build_is_cleared_by_the_next(tmp_path: Path, corpus_file: Path) -> None:
    out = tmp_path / "out"
    killed = get_context("spawn").Process(target=build, args=([str(corpus_file)], out, DyingTokenizer()))
    killed.start()
    killed.join()
    (staging,) = tmp_path.glob(".out.*")
    assert str(killed.pid) in staging.name
    old = staging.with_name(f"{staging.name}.old")
    old.mkdir()
    kept = {
        f".out.{platform.node()}.{os.getpid()}.01234567.tmp": "of a living process",
        staging.name.replace(platform.node(), "elsewhere"): "of another machine",
        f".out.two.{platform.node()}.{killed.pid}.01234567.tmp": "of another destination",
    }
    for name in kept:
        (tmp_path / name).mkdir()
    build([str(corpus_file)], out, BytesTokenizer(), held_out_fraction=0.2, progress=False)
    expected = {*kept, "corpus.jsonl", "out"}
    assert {path.name for path in tmp_path.iterdir()} == {*expected, old.name}, "what was replaced is not replaced yet"
    build([str(corpus_file)], out, BytesTokenizer(), held_out_fraction=0.2, force=True, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == expected


def test_existing_folders(tmp_path: Path, corpus_file: Path, built: Path) -> None:
    before = contents(built)
    with pytest.raises(DataError, match="already exists"):
        build([str(corpus_file)], built, BytesTokenizer(), progress=False)
    with pytest.raises(RuntimeError):  # a failing replacement keeps what was there
        build([str(corpus_file)], built, FailingTokenizer(RuntimeError()), force=True, progress=False)
    assert contents(built) == before
    build([str(corpus_file)], built, BytesTokenizer(), held_out_fraction=0.3, force=True, progress=False)
    assert documents_of(built) == expected_documents(0.3)

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.tex").write_text("years of work")
    with pytest.raises(DataError, match="is not a data set"):
        build([str(corpus_file)], precious, BytesTokenizer(), force=True, progress=False)
    assert contents(precious) == {"thesis.tex": b"years of work"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["built", "corpus.jsonl", "precious"]


@pytest.mark.parametrize("interrupted", ["before the new takes the name", "after the old has lost it"])
def test_failed_replacement_restores_what_was_there(
    built: Path, corpus_file: Path, interrupted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(built)
    rename = Path.rename

    def failing_rename(path: Path, target: Path) -> Path:
        if path.suffix == ".tmp":
            raise OSError(5, "Input/output error")
        renamed = rename(path, target)
        if path == built and interrupted == "after the old has lost it":  # a signal's exception, say
            raise OSError(5, "Input/output error")
        return renamed

    monkeypatch.setattr(Path, "rename", failing_rename)
    with pytest.raises(DataError, match="Input/output error"):
        build([str(corpus_file)], built, BytesTokenizer(), force=True, progress=False)
    assert contents(built) == before
    assert sorted(path.name for path in built.parent.iterdir()) == ["built", "corpus.jsonl"]


@pytest.mark.parametrize(("fraction", "message"), [(1e-9, "held-out document"), (1 - 1e-9, "training document")])
def test_empty_split_is_an_error(tmp_path: Path, corpus_file: Path, fraction: float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        build([str(corpus_file)], tmp_path / "out", BytesTokenizer(), held_out_fraction=fraction, progress=False)
    assert not (tmp_path / "out").exists()


GOOD = b'{"text": "fine"}\n'
PARQUET_BYTES = pyarrow.BufferOutputStream()
pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), PARQUET_BYTES)
PARQUET = PARQUET_BYTES.getvalue().to_pybytes()

MALFORMED: dict[str, tuple[str, bytes, str]] = {
    "broken JSON": ("a.jsonl", GOOD + b'{"text": "half', "a.jsonl:2: not valid JSON"),
    "JSON without the field": (
        "a.jsonl",
        GOOD + b'{"body": 1, "id": 2}',
        "a.jsonl:2: no field 'text' (there are: body",
    ),
    "JSON field of another type": ("a.jsonl", b'{"text": null}', "a.jsonl:1: field 'text' is not a string"),
    "JSON that is no object": ("a.jsonl", GOOD + b'\n["text"]', "a.jsonl:3: expected a JSON object"),
    "JSON nested too deeply": ("a.jsonl", b"[" * 200_000, "a.jsonl:1: not valid JSON"),
    "JSON with half a surrogate": ("a.jsonl", rb'{"text": "\ud800"}', "a.jsonl:1: field 'text' holds half a surrogate"),
    "JSON not UTF-8": ("a.jsonl", GOOD + '{"text": "é"}'.encode("latin-1"), "a.jsonl:2: not UTF-8"),
    "text not UTF-8": ("a.txt", b"fine\nfine\n\xff\xfe\x00", "a.txt:3: not UTF-8"),
    "empty text": ("a.txt", b"", "a.txt: empty"),
    "empty JSON lines": ("a.jsonl", b"", "a.jsonl: empty"),
    "only empty documents": ("a.jsonl", b'\n{"text": ""}\n', "a.jsonl: empty"),
    "empty gzip": ("a.jsonl.gz", b"", "a.jsonl.gz: empty"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(GOOD * 99)[:-9], "a.jsonl.gz: truncated or damaged gzip"),
    "no gzip": ("a.jsonl.gz", GOOD, "a.jsonl.gz: truncated or damaged gzip"),
    "altered gzip": ("a.jsonl.gz", gzip.compress(GOOD)[:-8] + b"\0" * 8, "a.jsonl.gz: truncated or damaged gzip"),
    "truncated zstd": ("a.jsonl.zst", zstandard.compress(GOOD * 99)[:-5], "a.jsonl.zst: truncated zstd"),
    "no zstd": ("a.jsonl.zst", GOOD, "a.jsonl.zst: damaged zstd"),
    "truncated Parquet": ("a.parquet", PARQUET[:-20], "a.parquet: not a readable Parquet file"),
    "altered Parquet": ("a.parquet", PARQUET[:40] + b"\xff" * 80 + PARQUET[120:], "a.parquet: not a readable Parquet"),
    "empty Parquet": ("a.parquet", b"", "a.parquet: not a readable Parquet file"),
    "unknown suffix": ("a.docx", b"PK", "a.docx: unknown kind of file"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_file_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    name, raw, message = MALFORMED[case]
    path = tmp_path / "sources" / name
    path.parent.mkdir()
    path.write_bytes(raw)
    with pytest.raises(DataError) as error:
        build([str(path)], tmp_path / "out", BytesTokenizer(), progress=False)
    assert str(error.value).startswith(f"{path.parent / message.partition(':')[0]}:")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sources"]


def test_parquet_columns(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for column, values, message in (
        ("body", ["x"], "no column 'text' (there are: body)"),
        ("text", [1], "row 1: field 'text' is not a string but a int"),
        ("text", ["x", None], "row 2: field 'text' is not a string but a NoneType"),
    ):
        pyarrow.parquet.write_table(pyarrow.table({column: values}), path)
        with pytest.raises(DataError, match=re.escape(f"{path}: {message}")):
            list(Corpus([str(path)]))


def test_missing_sources(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: no such file or folder"):
        Corpus([str(tmp_path / "nowhere")])
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError, match="no file in this folder"):
        Corpus([str(tmp_path)])


# Opening


def edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    index = json.loads((folder / "index.json").read_text())
    change(index)
    (folder / "index.json").write_text(json.dumps(index))


def flip_last_byte(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (shutil.rmtree, "no such folder"),
    "no index": (lambda folder: (folder / "index.json").unlink(), "index.json: missing"),
    "broken index": (lambda folder: (folder / "index.json").write_text('{"format'), "index.json: broken index"),
    "index is no object": (lambda folder: (folder / "index.json").write_text("[]"), "index.json: format version None"),
    "other version": (lambda folder: edit_index(folder, lambda i: i.update(format_version=99)), "format version 99"),
    "missing key": (lambda folder: edit_index(folder, lambda i: i.pop("vocab_size")), "'vocab_size' is missing"),
    "foreign shard": (
        lambda folder: edit_index(folder, lambda i: i["train"][0].update(file="../corpus.jsonl")),
        "is not the name of a file",
    ),
    "unknown dtype": (lambda folder: edit_index(folder, lambda i: i["train"][0].update(dtype="int8")), "dtype 'int8'"),
    "no held-out shard": (lambda folder: edit_index(folder, lambda i: i.update(heldout=[])), "no held-out tokens"),
    "missing shard": (lambda folder: (folder / "train-00001.bin").unlink(), "train-00001.bin: missing shard"),
    "truncated shard": (lambda folder: os.truncate(folder / "train-00001.bin", 100), "train-00001.bin: truncated"),
    "empty shard": (lambda folder: os.truncate(folder / "heldout-00000.bin", 0), "heldout-00000.bin: truncated"),
    "altered shard": (lambda folder: flip_last_byte(folder / "heldout-00000.bin"), "heldout-00000.bin: altered shard"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_data_set_is_one_line_that_names_the_file(built: Path, damage: str) -> None:
    config = DataConfig(path=str(built))
    open_dataset(config, verify=True)
    inflict, message = DAMAGE[damage]
    inflict(built)
    with pytest.raises(DataError, match=re.escape(message)) as error:
        open_dataset(config, verify=True)
    assert str(built) in str(error.value)
    assert "\n" not in str(error.value)


def test_split_reads_across_shards(built: Path) -> None:
    split = open_dataset(DataConfig(path=str(built))).train
    raw = np.concatenate([np.fromfile(built / shard.file, "<u2") for shard in split.shards]).astype(np.int64)
    assert len(split.shards) > 2
    rng = np.random.default_rng(0)
    for start in [0, *(shard.tokens for shard in split.shards[:1]), *rng.integers(0, split.num_tokens, 30).tolist()]:
        for count in (0, 1, 2999, split.num_tokens - start):
            if start + count <= split.num_tokens:
                tokens = split.read(start, count)
                assert tokens.dtype == np.int64
                np.testing.assert_array_equal(tokens, raw[start : start + count])
    for start, count in ((-1, 2), (0, split.num_tokens + 1), (split.num_tokens, 1)):
        with pytest.raises(IndexError):
            split.read(start, count)


@pytest.mark.parametrize("kind", ["bytes", "byte-level", "metaspace"])
def test_count_text_bytes(tmp_path: Path, corpus_file: Path, tokenizer_json: Path, kind: str) -> None:
    name = "bytes" if kind == "bytes" else str(tokenizer_json)
    if kind == "metaspace":  # its decoder drops the blank that its encoder puts before each document
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
        tokenizer.decoder = tokenizers.decoders.Metaspace()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=200, special_tokens=["</s>"], show_progress=False)
        tokenizer.train_from_iterator(TEXTS, trainer)
        name = str(tmp_path / "metaspace.json")
        tokenizer.save(name)
    build([str(corpus_file)], tmp_path / "out", load_tokenizer(name), held_out_fraction=0.2, workers=1, progress=False)
    dataset = open_dataset(DataConfig(path=str(tmp_path / "out")))
    split = dataset.heldout
    assert dataset.count_text_bytes(split, 0, split.num_tokens) == split.num_bytes
    texts = [len(text.encode()) for text in expected_documents(0.2)["heldout"]]
    ends = np.flatnonzero(split.read(0, split.num_tokens) == dataset.end_of_document)
    start = int(ends[1]) + 1
    assert dataset.count_text_bytes(split, start, int(ends[4]) - start) == sum(texts[2:5])
    middle = start + 7  # of a document, perhaps of a character
    halves = [(0, middle), (middle, split.num_tokens - middle)]
    error = sum(dataset.count_text_bytes(split, *half) for half in halves) - split.num_bytes
    assert abs(error) <= (0 if kind == "bytes" else 6)
    assert dataset.count_text_bytes(split, int(ends[0]), 1) == dataset.count_text_bytes(split, 3, 0) == 0
    with pytest.raises(IndexError):
        dataset.count_text_bytes(split, 1, split.num_tokens)


def test_verify_hashes_in_parallel(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(2)
    calls = iter(range(100))

    def slow_sha256(path: Path) -> str:
        if next(calls) < 2:
            together.wait(timeout=20)
        return sha256(path)

    monkeypatch.setattr("moetrain.data.dataset.sha256", slow_sha256)
    open_dataset(DataConfig(path=str(built)), verify=True)


def test_start_verifies_small_data_only(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = sum(path.stat().st_size for path in built.glob("*.bin"))
    flip_last_byte(built / "heldout-00000.bin")
    monkeypatch.setattr("moetrain.data.dataset.VERIFIED_AT_START", size - 1)
    open_dataset(DataConfig(path=str(built)), verify=True)
    with pytest.raises(DataError, match="altered shard"):
        run(add_info_arguments, info_command, str(built), "--verify")
    monkeypatch.setattr("moetrain.data.dataset.VERIFIED_AT_START", size)
    with pytest.raises(DataError, match="altered shard"):
        open_dataset(DataConfig(path=str(built)), verify=True)


def test_fingerprint_tells_of_a_rebuild(built: Path, corpus_file: Path) -> None:
    def rebuilt(fraction: float) -> str:
        build([str(corpus_file)], built, BytesTokenizer(), held_out_fraction=fraction, force=True, progress=False)
        return open_dataset(DataConfig(path=str(built))).fingerprint

    first = rebuilt(0.2)
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert rebuilt(0.2) == first
    assert rebuilt(0.3) != first
    write_jsonl(corpus_file, [text.swapcase() for text in TEXTS])  # as long as before
    assert rebuilt(0.2) != first


def test_check_vocabulary(built: Path) -> None:
    dataset = open_dataset(DataConfig(path=str(built)))
    check_vocabulary(dataset, 257)
    with pytest.raises(DataError, match=r"model\.vocab_size = 256 is smaller than the tokenizer's 257"):
        check_vocabulary(dataset, 256)


@pytest.fixture
def small_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of a few files."""
    root = tmp_path / "lib"
    for folder in ("", "json", "site-packages", "__pycache__"):
        (root / folder).mkdir(exist_ok=True)
        for i in range(30):
            (root / folder / f"m{i:02d}.py").write_text(f"# module {folder}/{i}\n")
    (root / "latin.py").write_bytes("# é\n".encode("latin-1"))
    (root / "empty.py").write_bytes(b"")
    (root / "data.txt").write_text("not a source")
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(root)})
    return root


def test_stdlib_is_built_once(tmp_path: Path, small_library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    dataset = open_dataset(config, verify=True)
    documents = documents_of(dataset.folder)
    assert sorted(documents["train"] + documents["heldout"]) == sorted(
        f"# module {folder}/{i}\n" for folder in ("", "json") for i in range(30)
    )
    with monkeypatch.context() as patch:
        patch.setattr("moetrain.data.dataset.build", lambda *args: pytest.fail("built again"))
        assert open_dataset(config).folder == dataset.folder
    (small_library / "m00.py").write_text("# another library under the same version\n")
    assert open_dataset(config).folder != dataset.folder
    assert not list((tmp_path / "cache").glob(".*"))

    flip_last_byte(dataset.folder / "train-00000.bin")
    with pytest.raises(DataError, match=r"altered shard.*remove"):
        open_dataset(DataConfig(path=str(dataset.folder)), verify=True)


@pytest.mark.usefixtures("small_library")
def test_stdlib_built_by_two_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both tokenise, one rename wins, the other uses the winner's folder."""
    barrier = threading.Barrier(2)
    results: list[str] = []

    def build_together(sources: list[str], out: Path, tokenizer: Tokenizer) -> None:
        barrier.wait(timeout=20)
        try:
            build(sources, out, TogetherTokenizer(), progress=False)
            results.append("won")
        except DataError as error:
            results.append(str(error))
            raise

    class TogetherTokenizer(BytesTokenizer):
        waited = False

        def encode(self, text: str | bytes) -> Any:
            if not self.waited:
                self.waited = True
                barrier.wait(timeout=20)  # neither has published
            return super().encode(text)

    monkeypatch.setattr("moetrain.data.dataset.build", build_together)
    config = DataConfig(cache_dir=str(tmp_path / "cache"))
    folders: list[Path] = []
    threads = [threading.Thread(target=lambda: folders.append(open_dataset(config, verify=True).folder)) for _ in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(folders)) == 1
    assert len(folders) == 2
    assert sorted("appeared" in result for result in results) == [False, True]
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [folders[0].name]


def test_unwritable_cache_is_an_error(tmp_path: Path, small_library: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="cannot be written"):
        open_dataset(DataConfig(cache_dir=str(tmp_path / "file" / "cache")))


# Commands


def run(add_arguments: Callable[..., None], command: Callable[..., int], *args: str) -> int:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return command(parser.parse_args(args))


def test_commands(tmp_path: Path, tokenizer_json: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_jsonl(tmp_path / "corpus.jsonl", TEXTS, "body")
    out = str(tmp_path / "out")
    build_arguments = ["--out", out, "--field", "body", "--held-out", "0.2", "--workers", "1"]
    build_arguments += ["--tokenizer", str(tokenizer_json), "--eod", "<|endoftext|>", str(source)]
    assert run(add_build_arguments, build_command, *build_arguments) == 0
    with pytest.raises(DataError, match="already exists"):
        run(add_build_arguments, build_command, *build_arguments)
    assert run(add_build_arguments, build_command, *build_arguments, "--force") == 0
    dataset = open_dataset(DataConfig(path=out))
    capsys.readouterr()
    assert run(add_info_arguments, info_command, out, "--verify", "--sample", "20") == 0
    shown = capsys.readouterr().out
    assert f"{dataset.train.num_tokens:,}" in shown
    assert shown.count("OK") == 2
    assert "document 0: ärger" in shown


def test_info_of_a_path_that_is_no_folder(tmp_path: Path, corpus_file: Path) -> None:
    for path, problem in ((corpus_file, "not a folder"), (tmp_path / "nowhere", "no such folder")):
        with pytest.raises(DataError, match=f"^{re.escape(str(path))}: {problem}: give"):
            run(add_info_arguments, info_command, str(path))
        with pytest.raises(DataError, match=f"^data.path = {re.escape(str(path))}: {problem}: make"):
            open_dataset(DataConfig(path=str(path)))


def test_sigterm_cleans_up(tmp_path: Path, corpus_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class TerminatedTokenizer(BytesTokenizer):
        def encode(self, text: str | bytes) -> Any:
            os.kill(os.getpid(), signal.SIGTERM)
            return super().encode(text)

    def of_the_caller(*_: object) -> None:
        raise RuntimeError("the caller's handler")

    monkeypatch.setattr("moetrain.data.commands.load_tokenizer", lambda *_: TerminatedTokenizer())
    before = signal.signal(signal.SIGTERM, of_the_caller)
    try:
        with pytest.raises(SystemExit) as exit_:
            run(add_build_arguments, build_command, "--out", str(tmp_path / "out"), str(corpus_file))
        assert exit_.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is of_the_caller
        with pytest.raises(RuntimeError):  # the embedded build leaves signals alone
            build([str(corpus_file)], tmp_path / "out", TerminatedTokenizer(), progress=False)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus.jsonl"]
