"""From the configuration to spans of tokens: embedded text, prepared folders, shards, text."""

import dataclasses
import glob
import hashlib
import lzma
import os
from pathlib import Path

import numpy as np

from train.data.cache import cache_folder, locked
from train.data.config import EMBEDDED, DataConfig
from train.data.documents import check_text_file
from train.data.prepare import FORMAT, META, prepare, read_meta
from train.data.shards import Span, TokenShard, check_tokens, hold_out_tail, is_shard, open_shards
from train.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer

_EMBEDDED_FILE = Path(__file__).parent / "embedded" / "python_docs.txt.xz"
# Stands between the documents of the embedded file, and in none of them.
EMBEDDED_SEPARATOR = "\f"


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Training and validation tokens with the tokenizer that made them."""

    train: list[Span]
    validation: list[Span]
    tokenizer: Tokenizer


def open_corpus(cfg: DataConfig, *, quiet: bool = False) -> Corpus:
    """Opens what the configuration names, checks it, and splits validation data off.

    Raises:
        FileNotFoundError, ValueError: one line naming path and value.
    """
    tokenizer = choose_tokenizer(cfg)
    check_end_of_document(cfg, tokenizer)
    train, held_out = _open(cfg.source, "source", cfg, tokenizer, quiet)
    if cfg.validation is not None:
        # All of the named data; for a prepared folder, its validation shards if it has any.
        rest, validation = _open(cfg.validation, "validation", cfg, tokenizer, quiet)
        validation = validation or rest
    elif held_out:
        validation = held_out
    else:
        train, validation = hold_out_tail(train, cfg.validation_fraction, tokenizer.eos_id)
    check_tokens(train + validation, tokenizer.vocab_size)
    return Corpus(train, validation, tokenizer)


def check_end_of_document(cfg: DataConfig, tokenizer: Tokenizer) -> None:
    """Refuses a name for a token that the byte-level tokenizer has no use for.

    Raises:
        ValueError: one line naming the value.
    """
    if cfg.end_of_document is not None and isinstance(tokenizer, ByteTokenizer):
        raise ValueError(
            f"data.end_of_document={cfg.end_of_document!r} needs data.tokenizer: the byte-level "
            "tokenizer has a token of its own"
        )


def choose_tokenizer(cfg: DataConfig) -> Tokenizer:
    """The tokenizer of a configuration, without reading the data.

    Raises:
        FileNotFoundError, ValueError: one line naming path and value.
    """
    if cfg.tokenizer is not None or cfg.source == EMBEDDED:
        return load_tokenizer(cfg.tokenizer, cfg.end_of_document)
    path = Path(cfg.source).expanduser()
    folder = path
    if not path.is_dir():
        paths = _expand(cfg.source, "source")
        if not is_shard(paths[0]):
            return load_tokenizer(None)
        folder = Path(paths[0]).parent
    beside = folder / "tokenizer.json"
    return load_tokenizer(beside if beside.is_file() else None, cfg.end_of_document)


def _expand(spec: str, field: str) -> list[str]:
    """Files of a path or glob, sorted."""
    spec = os.path.expanduser(spec)
    if os.path.isfile(spec):
        return [spec]
    if not glob.has_magic(spec):
        raise FileNotFoundError(f"data.{field}={spec!r} does not exist")
    paths = sorted(path for path in glob.glob(spec, recursive=True) if os.path.isfile(path))
    if not paths:
        raise FileNotFoundError(f"data.{field}={spec!r} matches no file")
    return paths


def _open(
    spec: str, field: str, cfg: DataConfig, tokenizer: Tokenizer, quiet: bool
) -> tuple[list[Span], list[Span]]:
    """(spans, own validation spans) of a source."""
    if spec == EMBEDDED:
        return _open_embedded(tokenizer), []
    folder = Path(spec).expanduser()
    if folder.is_dir():
        return _open_prepared(folder, cfg, tokenizer, quiet)
    paths = _expand(spec, field)
    shards = [path for path in paths if is_shard(path)]
    if not shards:
        return _open_text(paths, cfg, tokenizer, quiet), []
    if len(shards) < len(paths):
        other = next(path for path in paths if not is_shard(path))
        raise ValueError(f"data.{field}={spec!r} mixes token shards ({shards[0]}) and {other}")
    return _open_shards(shards, cfg, tokenizer, quiet), []


def _open_embedded(tokenizer: Tokenizer) -> list[Span]:
    with lzma.open(_EMBEDDED_FILE, "rt", encoding="utf-8", newline="") as file:
        documents = file.read().split(EMBEDDED_SEPARATOR)
    end = np.array([tokenizer.eos_id], np.uint32)
    pieces = [piece for ids in tokenizer.encode_batch(documents) for piece in (ids, end)]
    tokens = np.concatenate(pieces)
    return [Span(TokenShard(EMBEDDED, dtype="uint32", memory=tokens), 0, len(tokens))]


def _open_prepared(
    folder: Path, cfg: DataConfig, tokenizer: Tokenizer, quiet: bool
) -> tuple[list[Span], list[Span]]:
    meta = read_meta(folder)
    if meta is None:
        train, validation = _by_name(folder, "train"), _by_name(folder, "val")
        if not train:
            raise ValueError(
                f"folder {folder} has no {META} written by prepare and no shards named train*: "
                f"name its files with a glob such as '{folder}/*.bin'"
            )
    else:
        train = [str(folder / name) for name in meta["train"]]
        validation = [str(folder / name) for name in meta["validation"]]
    spans = _open_shards(train + validation, cfg, tokenizer, quiet)
    return spans[: len(train)], spans[len(train) :]


def _by_name(folder: Path, prefix: str) -> list[str]:
    """Token shards of a folder without a description, by what their names begin with."""
    return sorted(str(path) for path in folder.glob(f"{prefix}*") if is_shard(str(path)))


def _open_shards(
    paths: list[str], cfg: DataConfig, tokenizer: Tokenizer, quiet: bool
) -> list[Span]:
    """Spans over whole shards, after a check against the description beside them, if any."""
    folders = {path: Path(path).parent for path in paths}
    metas = {folder: read_meta(folder) for folder in dict.fromkeys(folders.values())}
    dtype = cfg.dtype
    for folder, meta in metas.items():
        if meta is None:
            continue
        if meta["tokenizer"] != tokenizer.fingerprint:
            name = tokenizer.file or "the byte-level tokenizer"
            raise ValueError(f"{folder} was prepared with another tokenizer than {name}")
        if dtype not in ("auto", meta["dtype"]):
            said = f"data.dtype={dtype}" if dtype == cfg.dtype else f"another {META} says {dtype}"
            raise ValueError(f"{said} but {folder / META} says {meta['dtype']}")
        dtype = meta["dtype"]
    if dtype == "auto":
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    shards = open_shards(paths, dtype=dtype, cache=cfg.cache, quiet=quiet)
    for path, shard in zip(paths, shards, strict=True):
        meta = metas[folders[path]] or {"train": {}, "validation": {}}
        name = os.path.basename(path)
        expected = {**meta["train"], **meta["validation"]}.get(name)
        if expected is not None and expected != shard.length:
            raise ValueError(
                f"token shard {path} has {shard.length} tokens where {META} says {expected}"
            )
    return [Span(shard, 0, shard.length) for shard in shards]


def _open_text(paths: list[str], cfg: DataConfig, tokenizer: Tokenizer, quiet: bool) -> list[Span]:
    """Tokenises text once for as long as files, tokenizer and field stay the same."""
    for path in paths:
        check_text_file(path)
    key = hashlib.sha256(f"{FORMAT}\n{tokenizer.fingerprint}\n{cfg.jsonl_field}".encode())
    for path in paths:
        stat = os.stat(path)
        key.update(f"\n{os.path.abspath(path)}\n{stat.st_size} {stat.st_mtime_ns}".encode())
    target = cache_folder(cfg.cache) / f"text-{key.hexdigest()[:24]}"
    with locked(target):
        if read_meta(target) is None:
            try:
                prepare(paths, tokenizer, target, jsonl_field=cfg.jsonl_field, quiet=quiet)
            except (FileExistsError, ValueError):
                # Where there are no locks, another process may have been faster.
                if read_meta(target) is None:
                    raise
    return _open_prepared(target, dataclasses.replace(cfg, dtype="auto"), tokenizer, quiet)[0]
