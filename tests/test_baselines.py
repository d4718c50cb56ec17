"""Byte baselines against direct computations."""

from __future__ import annotations

import gzip
import itertools
import lzma
import math
from pathlib import Path

import numpy as np
import pytest

from moetrain import baselines
from moetrain.baselines import byte_baselines, dataset_baselines, text_bytes
from moetrain.config import DataConfig
from moetrain.data import BytesTokenizer, open_dataset
from moetrain.data.build import build
from moetrain.errors import DataError

TRAIN = b"the cat sat on the mat and the dog sat on the log " * 5
HELDOUT = b"the dog and the cat sat on a rug"


def reference(train: bytes, heldout: bytes) -> dict[str, float]:
    """Byte by byte."""

    def unigram(byte: int) -> float:
        return -math.log2((train.count(byte) + 1) / (len(train) + 256))

    def bigram(before: int, byte: int) -> float:
        pairs = list(itertools.pairwise(train))
        return -math.log2((pairs.count((before, byte)) + 1) / (sum(a == before for a, _ in pairs) + 256))

    return {
        "unigram": sum(map(unigram, heldout)) / len(heldout),
        "bigram": (unigram(heldout[0]) + sum(map(bigram, heldout, heldout[1:]))) / len(heldout),
        "gzip -9": 8 * len(gzip.compress(heldout, 9)) / len(heldout),
        "xz -9": 8 * len(lzma.compress(heldout, preset=9)) / len(heldout),
    }


@pytest.mark.parametrize("block", [1, 7, 1 << 22])
@pytest.mark.parametrize(("train", "heldout"), [(TRAIN, HELDOUT), (TRAIN, b"x"), (b"", HELDOUT), (b"a", b"ab")])
def test_baselines_equal_the_reference(
    train: bytes, heldout: bytes, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "_BLOCK", block)
    assert byte_baselines(train, heldout) == pytest.approx(reference(train, heldout), rel=1e-12)


def test_baselines_of_known_sources() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, 1 << 18, dtype=np.uint8)
    scores = byte_baselines(noise[: 1 << 17], noise[1 << 17 :])
    assert scores["unigram"] == pytest.approx(8, abs=0.02)
    assert scores["gzip -9"] > 8
    assert byte_baselines(b"ab" * 5000, b"ab" * 5000)["bigram"] < 0.1
    with pytest.raises(ValueError, match="no held-out bytes"):
        byte_baselines(TRAIN, b"")


def test_text_bytes_drops_ends_of_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i:02d}.txt").write_text(f"document {i}, é\n")
    source, out = str(tmp_path / "text"), tmp_path / "built"
    build([source], out, BytesTokenizer(), held_out_fraction=0.3, shard_tokens=100, progress=False)
    dataset = open_dataset(DataConfig(path=str(out)))
    monkeypatch.setattr(baselines, "_BLOCK", 33)
    for split in (dataset.train, dataset.heldout):
        everything = text_bytes(dataset, split)
        assert everything.dtype == np.uint8
        assert everything.size == split.num_bytes
        tokens = split.read(10, 50)
        assert text_bytes(dataset, split, 10, 50).tobytes() == bytes(tokens[tokens < 256].tolist())
        assert text_bytes(dataset, split, 0, 10**9).tobytes() == everything.tobytes()
    assert dataset_baselines(dataset, 1, 64) == byte_baselines(
        text_bytes(dataset, dataset.train), text_bytes(dataset, dataset.heldout, 1, 64)
    )


def test_baselines_need_bytes(tmp_path: Path) -> None:
    class OtherTokenizer(BytesTokenizer):
        @property
        def identity(self) -> dict[str, str]:
            return {"kind": "other"}

    (tmp_path / "a.jsonl").write_text('{"text": "something"}\n' * 40)
    build(
        [str(tmp_path / "a.jsonl")],
        tmp_path / "out",
        OtherTokenizer(),
        held_out_fraction=0.3,
        workers=1,
        progress=False,
    )
    dataset = open_dataset(DataConfig(path=str(tmp_path / "out")))
    with pytest.raises(DataError, match="--tokenizer bytes"):
        dataset_baselines(dataset, 0, 10)
