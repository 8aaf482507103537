"""Documents in text and JSON-lines files, read as a stream."""

import codecs
import contextlib
import gzip
import json
import lzma
import os
import zlib
from collections.abc import Iterator
from typing import IO

from train.data.progress import Advance

# A text file is one document, but it is tokenised in pieces, cut at line ends where possible.
_PIECE_BYTES = 1 << 20
_LONGEST_LINE = 64 << 10
_NOT_TEXT = (".bin", ".npy", ".zst", ".parquet", ".arrow", ".zip", ".tar", ".bz2")


def check_text_file(path: str) -> None:
    """Refuses what cannot be a text file, before any is read.

    Raises:
        FileNotFoundError, ValueError: one line naming the path.
    """
    if os.path.isdir(path):
        pattern = os.path.join(path, "*.txt")
        raise ValueError(f"{path} is a folder: name its files, such as {pattern!r}")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"text file {path} does not exist")
    if os.path.getsize(path) == 0:
        raise ValueError(f"text file {path} is empty")
    if _plain_name(path).endswith(_NOT_TEXT):
        raise ValueError(
            f"{path}: not a text file by its name; text may be plain, .xz or .gz, and token "
            "shards .bin, .bin.xz or .npy"
        )


def read_documents(path: str, jsonl_field: str, advance: Advance) -> Iterator[tuple[str, bool]]:
    """Streams a file's text.

    Args:
        path: .jsonl (one JSON object a line) or any other UTF-8 text; also .xz and .gz of these.
        jsonl_field: the field of the objects that holds the text.
        advance: is told the bytes read of the file as it lies on disk.

    Yields:
        (text, last): the next piece of the current document, and whether the document ends
        with it.

    Raises:
        ValueError: one line naming path and line or byte.
    """
    with open(path, "rb") as raw, _opened(path, raw) as file:
        before = 0
        pieces = (
            _json_lines(path, file, jsonl_field)
            if _plain_name(path).endswith((".jsonl", ".ndjson"))
            else _text(path, file)
        )
        try:
            for piece in pieces:
                position = raw.tell()
                advance(position - before)
                before = position
                yield piece
        except (lzma.LZMAError, gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is not a complete compressed file: {error}") from None


def encodable(text: str) -> str:
    """The text with "?" for lone halves of surrogate pairs, which JSON can spell, UTF-8 not."""
    return text if text.isascii() else text.encode("utf-8", errors="replace").decode("utf-8")


def _plain_name(path: str) -> str:
    return path.removesuffix(".xz").removesuffix(".gz")


def _opened(path: str, raw: IO[bytes]) -> contextlib.AbstractContextManager[IO[bytes]]:
    if path.endswith(".xz"):
        return lzma.open(raw)
    if path.endswith(".gz"):
        return gzip.open(raw)  # type: ignore[return-value]
    return contextlib.nullcontext(raw)


def _text(path: str, file: IO[bytes]) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8")("strict")
    position, held = 0, ""
    while block := file.read(_PIECE_BYTES):
        block += file.readline(_LONGEST_LINE)
        piece = _decode(path, decoder, block, position, final=False)
        if position == 0:
            piece = piece.removeprefix("\ufeff")  # byte order mark
        position += len(block)
        # Held back by one, since only the end of the file tells which piece is the last.
        if held:
            yield held, False
        held = piece
    _decode(path, decoder, b"", position, final=True)
    yield held, True


def _decode(
    path: str, decoder: codecs.IncrementalDecoder, block: bytes, position: int, *, final: bool
) -> str:
    pending = len(decoder.getstate()[0])
    try:
        return decoder.decode(block, final)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: {error.reason} at byte {position - pending + error.start}"
        ) from None


def _json_lines(path: str, file: IO[bytes], field: str) -> Iterator[tuple[str, bool]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, line {number}: not UTF-8 ({error.reason})") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict) or field not in record:
            has = sorted(record) if isinstance(record, dict) else type(record).__name__
            raise ValueError(f"{path}, line {number}: no field {field!r} in {has}")
        text = record[field]
        if not isinstance(text, str):
            raise ValueError(
                f"{path}, line {number}: field {field!r} is {type(text).__name__}, not a string"
            )
        yield encodable(text), True
