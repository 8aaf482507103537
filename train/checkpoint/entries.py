"""The checkpoints in a folder, by the names of their folders."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.checkpoint import manifest
from train.checkpoint.errors import CheckpointError, reason

CONFIG = "config.json"
STAGING = ".staging"
_NAME = re.compile(r"(\d{8,})(?:-(\d+))?")


@dataclass(frozen=True, order=True)
class Entry:
    """A checkpoint's folder. A step saved again gets a new attempt: nothing is overwritten."""

    step: int
    attempt: int
    path: Path


def read_config(folder: str | os.PathLike[str], *, step: int | None = None) -> dict[str, Any]:
    """The configuration that the newest checkpoint (or that of `step`) was saved with.

    Raises:
      ValueError: if there is no checkpoint with an intact configuration.
    """
    for entry in entries_of(Path(folder)):
        if step is not None and entry.step != step:
            continue
        if not manifest.problem(entry.path, only=[CONFIG]):
            return json.loads((entry.path / CONFIG).read_text(encoding="utf-8"))
    which = "" if step is None else f" of {step=}"
    raise ValueError(f"no checkpoint{which} in {folder}")


def entries_of(folder: Path) -> list[Entry]:
    """All checkpoints by their names, newest first, good or not."""
    try:
        found = [parse(path) for path in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise CheckpointError(f"cannot read {folder}: {reason(error)}") from error
    return sorted((entry for entry in found if entry is not None), reverse=True)


def parse(path: Path) -> Entry | None:
    match = _NAME.fullmatch(path.name)
    return match and Entry(int(match[1]), int(match[2] or 0), path)


def folder_name(step: int, attempt: int = 0) -> str:
    return f"{step:08d}" + (f"-{attempt}" if attempt else "")
