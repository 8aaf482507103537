"""Tokenised shards: flat arrays of token ids, memory-mapped, possibly xz-compressed on disk."""

import dataclasses
import functools
import glob
import hashlib
import lzma
import mmap
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from train.data.cache import cache_folder, locked, partial_path, remove
from train.data.progress import Advance, file_progress

# Shards that decompress to no more than this stay in memory.
_IN_MEMORY_BYTES = 16 << 20
# Spans up to this many tokens are checked and hashed whole, longer ones at _SAMPLES places.
_WHOLE_TOKENS = 16 << 20
_SAMPLES, _SAMPLE_TOKENS = 128, 8192
_CHUNK = 1 << 20


class TokenShard:
    """Token ids in a file or in memory.

    Attributes:
        path: what messages call it.
        length: number of tokens.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str,
        file: str | None = None,
        memory: np.ndarray | None = None,
    ) -> None:
        self.path, self.dtype = path, dtype
        self._file, self._memory = file, memory
        self.length = len(self.tokens)

    @functools.cached_property
    def tokens(self) -> np.ndarray:
        """(length,) uint16 or uint32, read-only."""
        if self._memory is not None:
            return self._memory
        assert self._file is not None
        if self._file.endswith(".npy"):
            return np.load(self._file, mmap_mode="r")
        return np.memmap(self._file, dtype=np.dtype(self.dtype).newbyteorder("<"), mode="r")

    def require_whole(self) -> None:
        """Raises ValueError if the mapped file has shrunk: reading beyond its end is fatal."""
        mapped = self.tokens.base
        if isinstance(mapped, mmap.mmap) and mapped.size() < len(mapped):
            raise ValueError(
                f"token shard {self.path} has shrunk from {len(mapped)} to {mapped.size()} bytes "
                "since it was opened"
            )

    def __getstate__(self) -> dict[str, object]:
        # A memory map would be pickled with all of its data; the other process maps it itself.
        return {name: value for name, value in self.__dict__.items() if name != "tokens"}


@dataclasses.dataclass(frozen=True)
class Span:
    """Tokens [start, stop) of a shard."""

    shard: TokenShard
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Number of tokens."""
        return self.stop - self.start

    @property
    def tokens(self) -> np.ndarray:
        """(length,) uint16 or uint32, a view."""
        return self.shard.tokens[self.start : self.stop]


def is_shard(path: str) -> bool:
    """Whether the name is one of a tokenised shard."""
    return path.endswith((".bin", ".bin.xz", ".npy"))


def open_shards(
    paths: Sequence[str],
    *,
    dtype: str,
    cache: str | None = None,
    quiet: bool = False,
) -> list[TokenShard]:
    """Opens .bin, .bin.xz and .npy files of token ids.

    A .bin file is nothing but little-endian integers of `dtype` (uint16 or uint32). Large .xz
    files are decompressed once into the cache folder and memory-mapped from there.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: one line naming path and value: an empty file, a size that is no multiple of
            the integer's, a damaged .xz, an array of another type or rank.
    """
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"token shard {path} does not exist")
        if os.path.getsize(path) == 0:
            raise ValueError(f"token shard {path} is empty")
    compressed = [path for path in paths if path.endswith(".xz")]
    with file_progress("Decompressing", compressed, quiet=quiet) as advance:

        def open_one(path: str) -> TokenShard:
            if path.endswith(".xz"):
                return _open_xz(path, dtype, cache, advance)
            if path.endswith(".npy"):
                return _open_npy(path)
            _check_size(path, os.path.getsize(path), dtype)
            return TokenShard(path, dtype=dtype, file=path)

        # liblzma works without the interpreter's lock, so threads decompress in parallel.
        with ThreadPoolExecutor(max(1, min(len(paths), os.cpu_count() or 1, 16))) as pool:
            return list(pool.map(open_one, paths))


def _check_size(path: str, size: int, dtype: str) -> None:
    itemsize = np.dtype(dtype).itemsize
    if size == 0:
        raise ValueError(f"token shard {path} is empty")
    if size % itemsize:
        raise ValueError(
            f"token shard {path}: {size} bytes are not a multiple of {itemsize} ({dtype}); "
            "it is truncated or of another dtype"
        )


def _open_npy(path: str) -> TokenShard:
    try:
        array = np.load(path, mmap_mode="r")
    except ValueError as error:
        raise ValueError(f"token shard {path} is not a .npy array: {error}") from None
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError(f"token shard {path} is not a .npy array: it is an archive, .npz")
    if array.ndim != 1 or array.dtype not in (np.dtype("<u2"), np.dtype("<u4")):
        raise ValueError(
            f"token shard {path} has dtype {array.dtype} and shape {array.shape}: "
            "it must be one row of uint16 or uint32"
        )
    if array.size == 0:
        raise ValueError(f"token shard {path} is empty")
    return TokenShard(path, dtype=array.dtype.name, file=path)


def _blocks(path: str, advance: Advance) -> Iterator[bytes]:
    """Decompressed blocks of an .xz file; every block passed its checksum or an error is raised."""
    try:
        with open(path, "rb") as raw, lzma.open(raw) as file:
            before = 0
            while block := file.read(_CHUNK):
                position = raw.tell()
                advance(position - before)
                before = position
                yield block
    except (lzma.LZMAError, EOFError) as error:
        raise ValueError(f"{path} is not a complete .xz file: {error}") from None


def _open_xz(path: str, dtype: str, cache: str | None, advance: Advance) -> TokenShard:
    if os.path.getsize(path) <= _IN_MEMORY_BYTES:
        kept, size = [], 0
        for block in _blocks(path, lambda _: None):
            kept.append(block)
            size += len(block)
            if size > _IN_MEMORY_BYTES:
                break
        else:
            _check_size(path, size, dtype)
            little = np.frombuffer(b"".join(kept), np.dtype(dtype).newbyteorder("<"))
            return TokenShard(path, dtype=dtype, memory=little)
        del kept
    key = _file_key(path)
    folder = cache_folder(cache)
    target = folder / f"{Path(path).name.removesuffix('.bin.xz')}-{key}.bin"
    with locked(target):
        file = _cached(target)
        if file is None:
            file = _decompress(path, target, dtype, advance)
    _check_size(path, file.stat().st_size, dtype)
    return TokenShard(path, dtype=dtype, file=str(file))


def _cached(target: Path) -> Path | None:
    """The decompressed file, whose name holds its size, if it is there and whole."""
    # A shard's name may hold characters of patterns.
    for found in target.parent.glob(f"{glob.escape(target.stem)}.*.bin"):
        if found.stat().st_size == int(found.name.split(".")[-2]):
            return found
        remove(found)
    return None


def _decompress(path: str, target: Path, dtype: str, advance: Advance) -> Path:
    partial = partial_path(target)
    try:
        with open(partial, "wb") as out:
            for block in _blocks(path, advance):
                out.write(block)
            out.flush()
            os.fsync(out.fileno())
            size = out.tell()
        _check_size(path, size, dtype)
        file = target.with_name(f"{target.stem}.{size}.bin")
        os.replace(partial, file)
        return file
    except OSError as error:
        raise ValueError(f"cannot decompress {path} into {target.parent}: {error}") from None
    finally:
        remove(partial)


def _file_key(path: str) -> str:
    """Hash of a compressed file: size, ends and samples; any change alters what follows it."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest.update(b"%d" % size)
        for start in np.linspace(0, max(0, size - (64 << 10)), 32, dtype=np.int64):
            file.seek(int(start))
            digest.update(file.read(64 << 10))
    return digest.hexdigest()[:24]


def _samples(span: Span) -> Iterator[tuple[int, np.ndarray]]:
    """(position, tokens) of pieces of a span: all of it if short, else evenly spaced ones."""
    if span.length <= _WHOLE_TOKENS:
        starts, size = list(range(0, span.length, _CHUNK)), _CHUNK
    else:
        starts = np.linspace(0, span.length - _SAMPLE_TOKENS, _SAMPLES, dtype=np.int64).tolist()
        size = _SAMPLE_TOKENS
    for start in starts:
        yield start, span.tokens[start : start + size]


def check_tokens(spans: Sequence[Span], vocab_size: int) -> None:
    """Refuses token ids outside the vocabulary; long spans are sampled.

    Raises:
        ValueError: one line naming path, position and id.
    """
    for span in spans:
        for start, tokens in _samples(span):
            if np.max(tokens) >= vocab_size:
                at = int(np.argmax(tokens))
                raise out_of_vocabulary(span, start + at, int(tokens[at]), vocab_size)


def out_of_vocabulary(span: Span, position: int, token: int, vocab_size: int) -> ValueError:
    """The error for a token id that the tokenizer does not have."""
    return ValueError(
        f"{span.shard.path}: token id {token} at position {span.start + position} is not below "
        f"the vocabulary size {vocab_size} (wrong data.tokenizer or data.dtype?)"
    )


def fingerprint(spans: Sequence[Span]) -> str:
    """Hash of the spans' lengths and tokens (sampled in long ones).

    The same tokens give the same hash whatever the file's name, place, compression or dtype.
    """
    digest = hashlib.sha256()
    for span in spans:
        digest.update(b"%d:" % span.length)
        for _, tokens in _samples(span):
            digest.update(tokens.astype("<u4").tobytes())
    return digest.hexdigest()


def hold_out_tail(
    spans: Sequence[Span], fraction: float, eos_id: int
) -> tuple[list[Span], list[Span]]:
    """Splits the last `fraction` of the tokens off.

    The cut is moved forward to just after an end-of-document token if there is one within the
    first half of the tail, so that no document is on both sides.

    Returns:
        (training spans, validation spans); the second is empty for fraction 0.
    """
    total = sum(span.length for span in spans)
    tail = round(total * fraction)
    if tail == 0:
        return list(spans), []
    cut = _end_of_document(spans, total - tail, total - tail + tail // 2, eos_id)
    training: list[Span] = []
    validation: list[Span] = []
    for span in spans:
        middle = span.start + min(max(cut, 0), span.length)
        cut -= span.length
        if middle > span.start:
            training.append(Span(span.shard, span.start, middle))
        if middle < span.stop:
            validation.append(Span(span.shard, middle, span.stop))
    return training, validation


def _end_of_document(spans: Sequence[Span], first: int, last: int, eos_id: int) -> int:
    """The place after the first end-of-document token at `first` or later and before `last`, of
    the tokens of all spans together; `first` if there is none."""
    before = 0
    for span in spans:
        begin, end = max(first - before, 0), min(last - before, span.length)
        for start in range(begin, end, _CHUNK):
            ends = np.flatnonzero(span.tokens[start : min(end, start + _CHUNK)] == eos_id)
            if ends.size:
                return before + start + int(ends[0]) + 1
        before += span.length
    return first
