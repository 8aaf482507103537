"""Tokenizers: bytes without a file, or a tokenizer.json read by the `tokenizers` package."""

import hashlib
import os
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import tokenizers

# Names that published tokenizers give to the token between documents, most specific first.
_END_NAMES = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|endofdocument|>",
    "<|eos|>",
    "<eos>",
    "</s>",
    "[SEP]",
)


class Tokenizer(Protocol):
    """Maps text to token ids below `vocab_size`; no method adds the end-of-document token."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def eos_id(self) -> int:
        """Id of the token that stands between documents."""

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the ids."""

    @property
    def file(self) -> str | None:
        """Path of the tokenizer.json, None for a built-in tokenizer."""

    def encode(self, text: str) -> np.ndarray:
        """Token ids of one text, (n,) uint32."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Token ids of many texts, each (n,) uint32; uses all cores where that pays."""

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of the ids; end-of-document tokens are left out."""


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255, and 256 between documents."""

    vocab_size = 257
    eos_id = 256
    file = None
    fingerprint = hashlib.sha256(b"utf-8 bytes; 256 ends a document").hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode("utf-8"), np.uint8).astype(np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"token ids {ids.min()} to {ids.max()} are not in [0, 257)")
        # A window may begin or end inside a character.
        return ids[ids < 256].astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class FileTokenizer:
    """A tokenizer.json.

    Special tokens written out in a text are encoded as the characters they are made of, so that
    no document can end another.

    Raises:
        FileNotFoundError, ValueError: one line naming the path.
    """

    def __init__(self, path: str | os.PathLike[str], end_of_document: str | None = None) -> None:
        self.file = os.fspath(path)
        try:
            with open(self.file, "rb") as file:
                content = file.read()
        except FileNotFoundError:
            raise FileNotFoundError(f"data.tokenizer={self.file!r} does not exist") from None
        except OSError as error:
            raise ValueError(f"data.tokenizer={self.file!r}: {error.strerror}") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the Rust library raises plain Exception
            raise ValueError(f"{self.file} is not a tokenizer.json: {error}") from None
        # Such settings serve other uses of the same file; here they would drop or add tokens.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        if not vocabulary:
            raise ValueError(f"{self.file} has an empty vocabulary")
        self.vocab_size = max(vocabulary.values()) + 1
        names = _END_NAMES if end_of_document is None else (end_of_document,)
        found = [vocabulary[name] for name in names if name in vocabulary]
        if not found:
            raise ValueError(
                f"{self.file} has no token {' or '.join(names)}: name its end-of-document token "
                "with data.end_of_document"
            )
        self.eos_id = found[0]
        self.fingerprint = hashlib.sha256(content + b"\n%d" % self.eos_id).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.uint32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        ids = np.asarray(ids, np.int64)
        if ids.size and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(
                f"token ids {ids.min()} to {ids.max()} are not in [0, {self.vocab_size})"
            )
        return self._tokenizer.decode(ids.tolist(), skip_special_tokens=True)


def load_tokenizer(
    path: str | os.PathLike[str] | None, end_of_document: str | None = None
) -> Tokenizer:
    """The tokenizer of a tokenizer.json, or the byte-level one for None."""
    if path is None:
        return ByteTokenizer()
    return FileTokenizer(os.path.expanduser(path), end_of_document)
