"""What a model's bits per byte compare with: n-gram models and compressors on the same held-out bytes."""

from __future__ import annotations

import gzip
import lzma

import numpy as np
from numpy.typing import NDArray

from moetrain.data.dataset import Dataset, Split
from moetrain.errors import DataError

TRAIN_BYTES = 32 << 20
"""Training bytes are counted up to here: byte frequencies need no more."""
_BLOCK = 1 << 22


def byte_baselines(
    train: bytes | bytearray | memoryview | NDArray[np.uint8], heldout: bytes | NDArray[np.uint8]
) -> dict[str, float]:
    """Bits per byte of held-out bytes.

    `unigram` and `bigram` are fitted on the training bytes with one added to every count (the first held-out byte is
    coded by the unigram); `gzip -9` and `xz -9` compress the held-out bytes alone, headers included.

    Args:
        train, heldout: [bytes] uint8, or bytes.

    Raises:
        ValueError: there are no held-out bytes.
    """
    train = np.frombuffer(train, np.uint8)
    heldout = np.frombuffer(heldout, np.uint8)
    if not heldout.size:
        raise ValueError("no held-out bytes")

    pair_counts = _pair_counts(train)
    byte_counts = np.bincount(train[:1], minlength=256) + pair_counts.sum(0)
    unigram_bits = -np.log2((byte_counts + 1) / (train.size + 256))
    bigram_bits = -np.log2((pair_counts + 1) / (pair_counts.sum(1, keepdims=True) + 256))

    seen = _pair_counts(heldout)
    first = unigram_bits[heldout[0]]
    contents = heldout.tobytes()
    return {
        "unigram": float((first + (seen.sum(0) * unigram_bits).sum()) / heldout.size),
        "bigram": float((first + (seen * bigram_bits).sum()) / heldout.size),
        "gzip -9": len(gzip.compress(contents, 9)) * 8 / heldout.size,
        "xz -9": len(lzma.compress(contents, preset=9)) * 8 / heldout.size,
    }


def text_bytes(dataset: Dataset, split: Split, start: int = 0, count: int | None = None) -> NDArray[np.uint8]:
    """The bytes among tokens start … start + count - 1 (to the end by default) of a split: [bytes] uint8.

    Ends of documents are dropped. A range that reaches beyond the split is cut.

    Raises:
        DataError: the data set is not made of bytes.
    """
    if dataset.tokenizer_identity.get("kind") != "bytes":
        raise DataError(f"{dataset.folder}: byte baselines need data built with --tokenizer bytes")
    stop = split.num_tokens if count is None else min(start + count, split.num_tokens)
    pieces = [split.read(at, min(_BLOCK, stop - at)) for at in range(start, stop, _BLOCK)]
    return np.concatenate([piece[piece < 256].astype(np.uint8) for piece in pieces] or [np.empty(0, np.uint8)])


def dataset_baselines(dataset: Dataset, start: int, count: int) -> dict[str, float]:
    """:func:`byte_baselines` of held-out tokens start … start + count - 1, fitted on the first TRAIN_BYTES of training.

    Raises:
        DataError: the data set is not made of bytes.
    """
    train = text_bytes(dataset, dataset.train, 0, TRAIN_BYTES)
    return byte_baselines(train, text_bytes(dataset, dataset.heldout, start, count))


def _pair_counts(data: NDArray[np.uint8]) -> NDArray[np.int64]:
    """How often byte b follows byte a: [256 a, 256 b] int64."""
    counts = np.zeros(1 << 16, np.int64)
    for at in range(0, data.size - 1, _BLOCK):  # bincount makes a copy in int64
        block = data[at : at + _BLOCK + 1].astype(np.uint16)
        counts += np.bincount(block[:-1] << 8 | block[1:], minlength=1 << 16)
    return counts.reshape(256, 256)
