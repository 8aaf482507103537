"""What the trainer reads: one frozen dataclass, shown field by field on the command line."""

import dataclasses
from typing import Literal

EMBEDDED = "embedded"


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how they are read.

    Raises:
        ValueError: one line naming the value, if a field is out of range.
    """

    source: str = EMBEDDED
    """Training data: "embedded" (documentation text that comes with the repository), a folder
    written by `python -m train.data prepare` or one with tokenised shards named train* and val*, or
    a path or glob of tokenised shards (.bin, .bin.xz, .npy) or of text (.jsonl and any other UTF-8
    text; .xz and .gz of them)."""

    validation: str | None = None
    """Validation data, the same forms as `source`. None holds out the tail of the source."""

    validation_fraction: float = 0.05
    """Share of the source's tokens held out for validation, cut at the end of a document where
    there is one. Ignored if `validation` is given or the source's folder has validation shards of
    its own; 0 means no validation data, and a run without evaluations."""

    tokenizer: str | None = None
    """Path of a tokenizer.json. None takes the tokenizer.json in the folder of the tokenised
    shards if there is one, else the built-in byte-level tokenizer (256 bytes, 1 end of document).
    """

    end_of_document: str | None = None
    """Text of the token between documents. None looks for the usual names (<|endoftext|>,
    <|end_of_text|>, </s>, <eos>, ...) in tokenizer.json."""

    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Integer type of tokenised shards, little-endian. "auto" reads it from meta.json beside the
    shards, else takes uint16 for vocabularies of up to 65,536 tokens and uint32 above."""

    jsonl_field: str = "text"
    """Field of each JSON line that holds the document."""

    shuffle: bool = True
    """Visit the windows in a new pseudo-random order every epoch; False reads them in order."""

    seed: int | None = None
    """Seeds the order of the windows. None takes the run's seed; with one of their own, runs that
    differ in their initialisation read the same batches."""

    overlap: int = 0
    """Tokens that consecutive training windows share, 0 to sequence length. 1 makes every token
    of the source a target once. Validation windows never overlap."""

    workers: int = 0
    """Processes that read batches. 0 reads in threads of this process, which is enough for
    memory-mapped tokens."""

    threads: int = 2
    """Reader threads of this process, or of each worker process."""

    read_ahead: int = 8
    """Batches kept ready ahead of the training step (by each worker, if there are workers)."""

    cache: str | None = None
    """Folder for decompressed shards and for text tokenised on the fly. None is
    $XDG_CACHE_HOME/sparsejax, or ~/.cache/sparsejax."""

    def __post_init__(self) -> None:
        for name in ("source", "jsonl_field"):
            if not getattr(self, name):
                raise ValueError(f"data.{name} must not be empty")
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"data.validation_fraction={self.validation_fraction} must be in [0, 1)"
            )
        if self.dtype not in ("auto", "uint16", "uint32"):
            raise ValueError(f"data.dtype={self.dtype!r} must be auto, uint16 or uint32")
        for name, least in (("overlap", 0), ("workers", 0), ("threads", 1), ("read_ahead", 1)):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"data.{name}={value} must be at least {least}")
