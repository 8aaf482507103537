"""Turns text into tokenised shards with a description beside them."""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from train.data.cache import partial_path, remove
from train.data.documents import check_text_file, read_documents
from train.data.hub import DatasetSelection, open_dataset
from train.data.progress import document_progress, file_progress
from train.data.shards import Span, TokenShard, hold_out_tail
from train.data.tokenizer import Tokenizer

META = "meta.json"
FORMAT = "sparsejax tokens 1"
_BATCH_CHARACTERS = 2 << 20
_CHUNK_TOKENS = 1 << 20


def prepare(
    inputs: Sequence[str],
    tokenizer: Tokenizer,
    output: str | os.PathLike[str],
    *,
    jsonl_field: str = "text",
    dtype: Literal["auto", "uint16", "uint32"] = "auto",
    validation_fraction: float = 0.0,
    shard_tokens: int = 1 << 28,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Tokenises files into a folder of shards.

    The folder holds train-00000.bin, ... (little-endian, an end-of-document token after every
    document), val-00000.bin, ... if `validation_fraction` > 0 (the tail, cut at the end of a
    document where there is one), a copy of the tokenizer.json if there is one, and meta.json. It
    appears only when it is complete.

    Args:
        inputs: text or .jsonl files, also .xz and .gz of them, in this order.
        tokenizer: what `load_tokenizer` returns.
        output: the folder to write.
        jsonl_field: field of each JSON line that holds the document.
        dtype: type of the ids; "auto" is uint16 for up to 65,536 tokens, else uint32.
        validation_fraction: share of the tokens in the validation shards, in [0, 1).
        shard_tokens: largest number of tokens in a shard.
        overwrite: replace an existing folder that an earlier call wrote.
        quiet: show no progress.

    Returns:
        The content of meta.json.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: one line naming path and value.
    """
    if not inputs:
        raise ValueError("no input files")
    for path in inputs:
        check_text_file(path)
    target = _Target(Path(output), tokenizer, dtype, validation_fraction, shard_tokens, overwrite)
    target.check()
    with file_progress("Tokenising", inputs, quiet=quiet) as advance:
        return target.write(
            (piece for path in inputs for piece in read_documents(path, jsonl_field, advance)),
            inputs[0] if len(inputs) == 1 else str(list(inputs)),
        )


def prepare_dataset(
    selection: DatasetSelection,
    tokenizer: Tokenizer,
    output: str | os.PathLike[str],
    *,
    dtype: Literal["auto", "uint16", "uint32"] = "auto",
    validation_fraction: float = 0.0,
    shard_tokens: int = 1 << 28,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Tokenises a data set of the library `datasets` into a folder of shards.

    The data set is read once, as a stream and in its own order, so that nothing of it has to fit
    in memory or on disk and the same revision always gives the same shards. The folder is that of
    `prepare`; "dataset" in its meta.json is `DatasetStream.description`, and "source" there is a
    hash of the text itself, also for local data sets, which have no revision.

    Args:
        selection: the data set and what to read of it.
        tokenizer, output, dtype, validation_fraction, shard_tokens, overwrite, quiet: as for
            `prepare`.

    Returns:
        The content of meta.json.

    Raises:
        FileNotFoundError, FileExistsError, ValueError: one line naming data set, path and value.
    """
    target = _Target(Path(output), tokenizer, dtype, validation_fraction, shard_tokens, overwrite)
    target.check()  # before anything is asked of the network
    stream = open_dataset(selection)
    name = f"dataset {selection.name}"
    with document_progress("Tokenising", stream.total, quiet=quiet) as progress:
        return target.write(stream.pieces(), name, progress, {"dataset": stream.description})


@dataclasses.dataclass
class _Target:
    """A folder of shards to write; the fields are the arguments of `prepare`."""

    output: Path
    tokenizer: Tokenizer
    dtype: str
    validation_fraction: float
    shard_tokens: int
    overwrite: bool

    def check(self) -> None:
        """Refuses wrong arguments before any input is read, and resolves the type."""
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(f"validation_fraction={self.validation_fraction} must be in [0, 1)")
        if self.shard_tokens < 1:
            raise ValueError(f"shard_tokens={self.shard_tokens} must be at least 1")
        vocab_size = self.tokenizer.vocab_size
        if self.dtype == "auto":
            self.dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
        if vocab_size - 1 > np.iinfo(self.dtype).max:
            raise ValueError(
                f"dtype={self.dtype!r} cannot hold a vocabulary of {vocab_size} tokens"
            )
        if self.output.exists():
            if not self.overwrite:
                raise FileExistsError(f"{self.output} exists already (--overwrite replaces it)")
            if not (self.output / META).is_file():
                raise FileExistsError(
                    f"{self.output} was not written by prepare, so it is not replaced"
                )

    def write(
        self,
        pieces: Iterator[tuple[str, bool]],
        name: str,
        progress: Callable[[int, int], None] = lambda documents, tokens: None,
        description: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Writes the folder; returns the content of its meta.json.

        Args:
            pieces: (text, last) as `read_documents` yields them.
            name: of the input, for errors.
            progress: is told the documents and tokens written so far.
            description: more entries of meta.json, read when all pieces are.
        """
        output, tokenizer, dtype = self.output, self.tokenizer, self.dtype
        try:
            output.parent.mkdir(parents=True, exist_ok=True)
            folder = partial_path(output)
            folder.mkdir()
        except OSError as error:
            raise ValueError(f"cannot write {output}: {error.strerror}") from None
        try:
            writer = _Writer(folder, dtype, self.shard_tokens)
            source = hashlib.sha256()
            for texts, ends in _batched(pieces):
                for text, end, ids in zip(texts, ends, tokenizer.encode_batch(texts), strict=True):
                    source.update(text.encode("utf-8"))
                    writer.write(ids)
                    if end:
                        source.update(b"\0")
                        writer.write(np.array([tokenizer.eos_id], np.uint32))
                        writer.documents += 1
                progress(writer.documents, writer.tokens)
            shards = writer.close()
            if not shards:
                raise ValueError(f"no text in {name}")
            train, validation = _split(
                folder, shards, self.validation_fraction, tokenizer.eos_id, dtype
            )
            meta = {
                "format": FORMAT,
                "dtype": dtype,
                "vocab_size": tokenizer.vocab_size,
                "eos_id": tokenizer.eos_id,
                "tokenizer": tokenizer.fingerprint,
                "source": source.hexdigest(),
                **(description or {}),
                "documents": writer.documents,
                "tokens": sum(train.values()),
                "validation_tokens": sum(validation.values()),
                "train": train,
                "validation": validation,
            }
            if tokenizer.file is not None:
                shutil.copyfile(tokenizer.file, folder / "tokenizer.json")
            (folder / META).write_text(json.dumps(meta, indent=1) + "\n", encoding="utf-8")
            # What another process wrote meanwhile stays, unless told.
            if self.overwrite and output.exists():
                _take_place(folder, output)
            else:
                os.replace(folder, output)
            return meta
        except OSError as error:
            raise ValueError(f"cannot write {output}: {error}") from None
        finally:
            remove(folder)


def _take_place(folder: Path, output: Path) -> None:
    """Renames a folder to the name of another one, which is deleted, or put back where it fails.

    The other goes out of sight first: a deletion cut short must not look like a folder of shards.
    """
    old = partial_path(output)
    os.replace(output, old)
    try:
        os.replace(folder, output)
    except OSError:
        os.replace(old, output)
        raise
    remove(old)


def read_meta(folder: Path) -> dict[str, Any] | None:
    """The description beside tokenised shards, None if there is none of ours.

    Raises:
        ValueError: one line naming the file, if it is damaged.
    """
    path = folder / META
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        return None
    for key in ("dtype", "vocab_size", "tokenizer", "train", "validation"):
        if key not in meta:
            raise ValueError(f"{path} is damaged: no {key!r}")
    if meta["dtype"] not in ("uint16", "uint32"):
        raise ValueError(f"{path} is damaged: dtype {meta['dtype']!r}")
    for part in ("train", "validation"):
        if not isinstance(meta[part], dict):
            raise ValueError(f"{path} is damaged: {part!r} is no object of names and lengths")
        for name in meta[part]:
            # The names come from a file: they must not lead out of the folder.
            if Path(name).name != name:
                raise ValueError(f"{path} is damaged: it lists {name!r}")
    return meta


def _batched(pieces: Iterator[tuple[str, bool]]) -> Iterator[tuple[list[str], list[bool]]]:
    """Groups pieces of text so that the tokenizer can use all cores on each group."""
    texts: list[str] = []
    ends: list[bool] = []
    size, continued = 0, False
    for text, end in pieces:
        # An empty document adds nothing; the empty end of a longer one still ends it.
        if text or continued:
            texts.append(text)
            ends.append(end)
            size += len(text)
        continued = not end
        if size >= _BATCH_CHARACTERS:
            yield texts, ends
            texts, ends, size = [], [], 0
    if texts:
        yield texts, ends


class _Writer:
    """Writes a stream of token ids as shards of a bounded length."""

    def __init__(self, folder: Path, dtype: str, shard_tokens: int) -> None:
        self._folder, self._limit = folder, shard_tokens
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._lengths: list[int] = []
        self._file: BinaryIO | None = None
        self.documents = 0

    @property
    def tokens(self) -> int:
        return sum(self._lengths)

    def write(self, ids: np.ndarray) -> None:
        while len(ids):
            if self._file is None or self._lengths[-1] == self._limit:
                if self._file is not None:
                    self._file.close()
                self._file = open(  # noqa: SIM115 - closed by the next shard or by close
                    self._folder / f"train-{len(self._lengths):05d}.bin", "wb"
                )
                self._lengths.append(0)
            fitting = ids[: self._limit - self._lengths[-1]]
            self._file.write(fitting.astype(self._dtype).tobytes())
            self._lengths[-1] += len(fitting)
            ids = ids[len(fitting) :]

    def close(self) -> dict[str, int]:
        """Tokens by file name."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        return {f"train-{index:05d}.bin": length for index, length in enumerate(self._lengths)}


def _split(
    folder: Path, shards: dict[str, int], fraction: float, eos_id: int, dtype: str
) -> tuple[dict[str, int], dict[str, int]]:
    """Moves the tail of the shards just written into validation shards."""
    opened = [TokenShard(name, dtype=dtype, file=str(folder / name)) for name in shards]
    spans = [Span(shard, 0, shard.length) for shard in opened]
    train, validation = hold_out_tail(spans, fraction, eos_id)
    if fraction and not (train and validation):
        raise ValueError(
            f"validation_fraction={fraction} of {sum(shards.values())} tokens leaves "
            f"{'no training' if not train else 'no validation'} tokens"
        )
    lengths: dict[str, int] = {}
    for number, span in enumerate(validation):
        name = f"val-{number:05d}.bin"
        if span.start == 0:
            os.replace(folder / span.shard.path, folder / name)
        else:
            with open(folder / name, "wb") as file:
                for start in range(span.start, span.stop, _CHUNK_TOKENS):
                    stop = min(start + _CHUNK_TOKENS, span.stop)
                    file.write(span.shard.tokens[start:stop].tobytes())
            os.truncate(folder / span.shard.path, span.start * np.dtype(dtype).itemsize)
        lengths[name] = span.length
    return {span.shard.path: span.length for span in train}, lengths
