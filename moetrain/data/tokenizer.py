"""Tokenizers: text to ids and back, by bytes or by a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from moetrain.errors import DataError

END_OF_DOCUMENT_TOKENS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eot_id|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|eos|>",
)
"""Tokens that end a document in public tokenizers, in the order in which they are looked for."""


class Tokenizer(Protocol):
    """What building and reading a data set need of a tokenizer. Instances can be pickled."""

    @property
    def vocab_size(self) -> int:
        """Every id is smaller than this."""

    @property
    def end_of_document(self) -> int:
        """The id that follows each document; :meth:`encode` never returns it."""

    @property
    def identity(self) -> dict[str, str]:
        """What tells this tokenizer from another, as it stands in a data set's index."""

    @property
    def definition(self) -> bytes | None:
        """Contents of the tokenizer.json that a data set keeps beside its shards; None where none is needed."""

    def encode(self, text: str | bytes) -> NDArray[np.integer[Any]]:
        """Ids of a text (str, or bytes in UTF-8), without special tokens: [tokens], an unsigned dtype."""

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Text of ids; what is not valid UTF-8 appears as U+FFFD."""


class BytesTokenizer:
    """Id = byte of the UTF-8 text; 256 ends a document."""

    vocab_size = 257
    end_of_document = 256
    definition = None

    @property
    def identity(self) -> dict[str, str]:
        return {"kind": "bytes"}

    def encode(self, text: str | bytes) -> NDArray[np.integer[Any]]:
        return np.frombuffer(text.encode() if isinstance(text, str) else text, dtype=np.uint8)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        """Text of ids; the end of a document appears as a blank line."""
        documents = np.split(np.asarray(ids), np.flatnonzero(np.asarray(ids) == self.end_of_document))
        texts = [document[document < 256].astype(np.uint8).tobytes() for document in documents]
        return "\n\n".join(text.decode(errors="replace") for text in texts)


class HuggingFaceTokenizer:
    """A Hugging Face `tokenizer.json`.

    Args:
        definition: contents of the file.
        name: how errors call it.
        end_of_document_token: the token that ends a document; None: the first of END_OF_DOCUMENT_TOKENS that the
            vocabulary has.

    Raises:
        DataError: not a tokenizer, no such token, or the library tokenizers is not installed.
    """

    def __init__(self, definition: bytes, name: str, end_of_document_token: str | None = None) -> None:
        try:
            import tokenizers
        except ImportError:
            raise DataError(f"{name}: needs the library tokenizers: pip install 'moetrain[data]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(definition)
        except Exception as error:  # the library raises bare Exceptions
            raise DataError(f"{name}: not a Hugging Face tokenizer.json: {_first_line(error)}") from None
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        # A document that mentions <|endoftext|> must not end there.
        self._tokenizer.encode_special_tokens = True
        self._name = name
        self._definition = definition

        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if end_of_document_token is None:
            end_of_document_token = next((token for token in END_OF_DOCUMENT_TOKENS if token in vocabulary), None)
            if end_of_document_token is None:
                usual = " ".join(END_OF_DOCUMENT_TOKENS)
                raise DataError(f"{name}: none of the usual end-of-document tokens ({usual}): name one with --eod")
        elif end_of_document_token not in vocabulary:
            raise DataError(f"{name}: --eod {end_of_document_token!r} is not in its vocabulary")
        self._end_of_document_token = end_of_document_token
        self.end_of_document: int = vocabulary[end_of_document_token]
        # Ids need not be contiguous, so the number of entries may be too small.
        self.vocab_size: int = max(vocabulary.values()) + 1

    def __reduce__(self) -> tuple[Any, ...]:
        return HuggingFaceTokenizer, (self._definition, self._name, self._end_of_document_token)

    @property
    def identity(self) -> dict[str, str]:
        return {
            "kind": "tokenizer.json",
            "name": Path(self._name).name,
            "sha256": hashlib.sha256(self._definition).hexdigest(),
            "end_of_document_token": self._end_of_document_token,
        }

    @property
    def definition(self) -> bytes | None:
        return self._definition

    def encode(self, text: str | bytes) -> NDArray[np.integer[Any]]:
        decoded = text.decode() if isinstance(text, bytes) else text
        return np.asarray(self._tokenizer.encode(decoded, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Sequence[int] | NDArray[np.integer[Any]]) -> str:
        text: str = self._tokenizer.decode(np.asarray(ids).tolist(), skip_special_tokens=False)
        return text


def load_tokenizer(name: str, end_of_document_token: str | None = None) -> Tokenizer:
    """The tokenizer called `bytes`, or the one in the file `name`.

    Raises:
        DataError: the file is missing or not a tokenizer.json, or `end_of_document_token` does not fit.
    """
    if name == "bytes":
        if end_of_document_token is not None:
            raise DataError(f"--eod {end_of_document_token!r}: the bytes tokenizer has its own end of document")
        return BytesTokenizer()
    path = Path(name)
    if path.is_dir():
        path = path / "tokenizer.json"
    try:
        definition = path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"{path}: {reason}: a tokenizer is `bytes` or the path of a tokenizer.json") from None
    return HuggingFaceTokenizer(definition, str(path), end_of_document_token)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
