"""A run's folder: a new run never writes into an old one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import re
from pathlib import Path

from train import run_lock
from train.config import Config

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"


def numbered(config: Config) -> list[tuple[int, Path]]:
    """The folders of the run's name that exist, in the order in which they were made: 1 is
    output/name, 2 output/name-2, and so on. Some may have been deleted."""
    base = Path(config.output) / config.name
    pattern = re.compile(re.escape(base.name) + r"(?:-([2-9]|[1-9]\d+))?")
    found = ((pattern.fullmatch(path.name), path) for path in base.parent.glob("*"))
    return sorted((int(match[1] or 1), path) for match, path in found if match is not None)


def new_folder(config: Config) -> Path:
    """Takes the first folder of the run's name behind all that have anything in them, for this run
    alone: of two that start at the same time each gets its own.

    Raises:
      OSError: if it cannot be created.
    """
    base = Path(config.output) / config.name
    used = (i for i, path in numbered(config) if not path.is_dir() or any(path.iterdir()))
    for i in itertools.count(max(used, default=0) + 1):
        folder = base if i == 1 else base.with_name(f"{base.name}-{i}")
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever makes the file has the folder.
        with contextlib.suppress(FileExistsError):
            (folder / CONFIG_FILE).touch(exist_ok=False)
            return folder
    raise AssertionError("unreachable: numbers never end")


def resumable_folder(config: Config) -> Path:
    """The newest folder in which a run of this name was started, with or without checkpoints.

    Raises:
      ValueError: if there is none.
    """
    for _, folder in reversed(numbered(config)):
        if (folder / CONFIG_FILE).is_file():
            return folder
    base = Path(config.output) / config.name
    raise ValueError(f"nothing to resume: no run in {base}; start without --resume")


def write_config(folder: Path, config: Config) -> None:
    """Writes config.json, for the reader; checkpoints hold their own copy."""
    text = json.dumps(dataclasses.asdict(config), indent=2)
    (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")


def disown(folder: Path) -> None:
    """Takes config.json back, and the folder if that was all: a run that never began is not the one
    to resume."""
    (folder / CONFIG_FILE).unlink(missing_ok=True)
    run_lock.remove(folder)
    with contextlib.suppress(OSError):
        folder.rmdir()
