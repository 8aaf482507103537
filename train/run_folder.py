"""A run's folder: a new run never writes into an old one."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path

from train.config import Config

CHECKPOINTS = "checkpoints"
CONFIG_FILE = "config.json"


def candidates(config: Config):
    """output/name, output/name-2, output/name-3, ..."""
    base = Path(config.output) / config.name
    yield base
    yield from (base.with_name(f"{base.name}-{i}") for i in itertools.count(2))


def new_folder(config: Config) -> Path:
    """Creates the first folder of the run's name that does not exist or is empty.

    Raises:
      OSError: if it cannot be created.
    """
    for folder in candidates(config):
        if not folder.exists() or not any(folder.iterdir()):
            folder.mkdir(parents=True, exist_ok=True)
            return folder
    raise AssertionError("unreachable: candidates never end")


def resumable_folder(config: Config) -> Path:
    """The newest folder in which a run of this name was started, with or without checkpoints.

    Raises:
      ValueError: if there is none.
    """
    existing = list(itertools.takewhile(lambda folder: folder.exists(), candidates(config)))
    for folder in reversed(existing):
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
    with contextlib.suppress(OSError):
        folder.rmdir()
