"""The manifest of a checkpoint: size and checksum of every file, written last and durably."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

from train.checkpoint.errors import reason

MANIFEST = "manifest.json"
_THREADS = min(8, os.cpu_count() or 1)


def write(folder: Path) -> None:
    """Makes every file below `folder` durable, then writes the manifest in one atomic step.

    Raises:
      OSError: as the file system says.
    """
    paths = sorted(p for p in folder.rglob("*") if p.is_file())
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = list(pool.map(_hash_and_sync, paths))
    for directory in [p for p in folder.rglob("*") if p.is_dir()]:
        sync_folder(directory)
    names = [p.relative_to(folder).as_posix() for p in paths]
    text = json.dumps({"files": dict(zip(names, entries, strict=True))}, indent=1)
    write_durably(folder / MANIFEST, text)


def problem(folder: Path, *, only: Iterable[str] | None = None, sizes_only: bool = False) -> str:
    """What is wrong with the checkpoint in `folder`; empty if nothing is.

    Args:
      folder: a checkpoint.
      only: the files to look at, by their names in the manifest; None is every file.
      sizes_only: leave the contents unread, for a quick look.
    """
    try:
        files = _read(folder)
        names = list(files) if only is None else list(only)
        missing = [name for name in names if name not in files]
        if missing:
            return f"{MANIFEST} does not list {missing[0]}"
        for name in names:
            size = (folder / name).stat().st_size
            if size != files[name]["size"]:
                return f"{name} has {size} bytes instead of {files[name]['size']}"
        if sizes_only:
            return ""
        with ThreadPoolExecutor(_THREADS) as pool:
            digests = pool.map(lambda name: _digest(folder / name), names)
            for name, digest in zip(names, digests, strict=True):
                if digest != files[name]["blake2b"]:
                    return f"the contents of {name} have changed"
    except FileNotFoundError as error:
        return f"{_relative(error.filename, folder)} is missing"
    except OSError as error:
        return reason(error)
    except (ValueError, TypeError, KeyError) as error:
        return f"{MANIFEST} is unreadable ({reason(error)})"
    return ""


def write_durably(path: Path, text: str) -> None:
    """Writes a text file so that after a crash it is there in full or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    for name in files:
        # The names come from a file: they must not lead out of the checkpoint.
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise ValueError(f"it lists {name!r}")
    return files


def _hash_and_sync(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, _new_hash).hexdigest()
        os.fsync(file.fileno())
        return {"size": os.fstat(file.fileno()).st_size, "blake2b": digest}


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _new_hash).hexdigest()


def _new_hash() -> Any:
    return hashlib.blake2b(digest_size=16)


def _relative(name: str, folder: Path) -> str:
    return os.path.relpath(name, folder)
