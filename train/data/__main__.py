"""Data from the command line: `python -m train.data prepare ...` and `... show ...`."""

import dataclasses
import glob
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from train.data.config import DataConfig
from train.data.hub import DatasetSelection
from train.data.pipeline import open_data
from train.data.prepare import prepare, prepare_dataset
from train.data.tokenizer import load_tokenizer


@dataclasses.dataclass(frozen=True)
class Prepare:
    """Tokenises files or a Hugging Face data set into a folder that `data.source` can name."""

    output: Path
    """Folder to write. It appears when it is complete."""

    input: tuple[str, ...] = ()
    """Files or globs: .jsonl, or any other UTF-8 text (one document a file); .xz and .gz too."""

    dataset: str | None = None
    """Instead of --input, a data set for the `datasets` library to stream: a name on the Hugging
    Face hub, a local folder, or a path or glob of .jsonl, .parquet, .csv or .arrow files."""

    dataset_config: str | None = None
    """Configuration (subset) of the data set. None is its default."""

    dataset_revision: str | None = None
    """Branch, tag or commit of the data set on the hub. None is the newest."""

    split: str = "train"
    """Split of the data set."""

    text_field: str = "text"
    """Column of the data set that holds the document."""

    max_documents: int | None = None
    """Read only this many rows of the data set, from its start."""

    tokenizer: Path | None = None
    """Path of a tokenizer.json. None is the built-in byte-level tokenizer."""

    end_of_document: str | None = None
    """Text of the token to put after each document. None looks for the usual names."""

    jsonl_field: str = "text"
    """Field of each JSON line of --input that holds the document."""

    dtype: Literal["auto", "uint16", "uint32"] = "auto"
    """Type of the ids. "auto" is uint16 for up to 65,536 tokens, else uint32."""

    validation_fraction: float = 0.0
    """Share of the tokens, from the end of the input, to put into validation shards."""

    shard_tokens: int = 1 << 28
    """Largest number of tokens in one file."""

    overwrite: bool = False
    """Replace the output folder if an earlier call wrote it."""


@dataclasses.dataclass(frozen=True)
class Show:
    """Opens data as a training run would, checks it, and shows its sizes and a sample."""

    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """The data."""

    sequence_length: int = 256
    """Tokens of a row."""

    seed: int = 0
    """Seed of the order of the windows."""


def _expand(patterns: tuple[str, ...]) -> list[str]:
    paths = []
    for pattern in patterns:
        pattern = os.path.expanduser(pattern)
        matches = [pattern]
        if glob.has_magic(pattern) and not os.path.exists(pattern):
            matches = sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
            if not matches:
                raise FileNotFoundError(f"input {pattern!r} matches no file")
        paths += matches
    return paths


# Options of one kind of input, with the values that leave them unused.
_INPUT_ONLY = {"jsonl_field": "text"}
_DATASET_ONLY = {
    "dataset_config": None,
    "dataset_revision": None,
    "split": "train",
    "text_field": "text",
    "max_documents": None,
}


def _prepare(args: Prepare) -> None:
    if bool(args.input) == (args.dataset is not None):
        raise ValueError(
            "--input and --dataset exclude each other" if args.input else "no --input or --dataset"
        )
    other, needed = (_DATASET_ONLY, "--dataset") if args.input else (_INPUT_ONLY, "--input")
    for name, unused in other.items():
        if getattr(args, name) != unused:
            option = name.replace("_", "-")
            raise ValueError(f"--{option} {getattr(args, name)} needs {needed}")
    if args.end_of_document is not None and args.tokenizer is None:
        raise ValueError(f"--end-of-document {args.end_of_document} needs --tokenizer")
    tokenizer = load_tokenizer(args.tokenizer, args.end_of_document)
    if args.dataset is not None:
        selection = DatasetSelection(
            name=args.dataset,
            config=args.dataset_config,
            split=args.split,
            text_field=args.text_field,
            revision=args.dataset_revision,
            max_documents=args.max_documents,
        )
        meta = prepare_dataset(
            selection,
            tokenizer,
            args.output,
            dtype=args.dtype,
            validation_fraction=args.validation_fraction,
            shard_tokens=args.shard_tokens,
            overwrite=args.overwrite,
        )
        if skipped := meta["dataset"]["null_documents"]:
            print(f"{skipped:,} rows without {args.text_field!r} were skipped")
    else:
        meta = prepare(
            _expand(args.input),
            tokenizer,
            args.output,
            jsonl_field=args.jsonl_field,
            dtype=args.dtype,
            validation_fraction=args.validation_fraction,
            shard_tokens=args.shard_tokens,
            overwrite=args.overwrite,
        )
    print(
        f"{args.output}: {meta['documents']:,} documents, {meta['tokens']:,} training and "
        f"{meta['validation_tokens']:,} validation tokens, {meta['dtype']}, vocabulary "
        f"{meta['vocab_size']:,}\nTrain on it with --data.source {args.output}"
    )


def _show(args: Show) -> None:
    with open_data(
        args.data, sequence_length=args.sequence_length, global_batch=1, seed=args.seed
    ) as data:
        print(data.describe())
        print(f"fingerprint {data.fingerprint}")
        sample = data.tokenizer.decode(next(data.train_batches())["inputs"][0])
        print(f"first training window:\n{sample}")


def main() -> int:
    """Runs one command; returns the exit code: 0, or 2 after a one-line error."""
    args = tyro.cli(
        Annotated[Prepare, tyro.conf.subcommand("prepare")]
        | Annotated[Show, tyro.conf.subcommand("show")],
        prog="python -m train.data",
        description="Prepares and shows training data.",
    )
    try:
        _prepare(args) if isinstance(args, Prepare) else _show(args)
    except (ValueError, OSError) as error:
        Console(stderr=True, soft_wrap=True).print("error:", str(error), style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
