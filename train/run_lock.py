"""One process at a time trains in a run's folder."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""File of a run's folder that the process which trains in it holds a lock on; it says which."""

log = logging.getLogger(__name__)


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[Path]:
    """Keeps other trainers out of the folder until the block ends, or this process does: the system
    frees the lock, whatever ended it.

    Two that resumed one run would both write its checkpoints and its log. Where the file system has
    no locks, nobody is kept out, and a warning says so.

    Args:
      folder: the run's, which exists.

    Raises:
      ValueError: another process trains there.
      OSError: the folder cannot be written.
    """
    if fcntl is None:
        yield folder
        return
    path = folder / LOCK
    # Not truncated when it is opened: it says who has it.
    with open(path, "a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().strip() or "another process"
            raise ValueError(
                f"the run in {folder} is being trained by {owner}: stop that first (or delete "
                f"{path}, if a machine that is gone held it)"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no other process in it", folder, error)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield folder


def remove(folder: Path) -> None:
    """Deletes the file, for whoever deletes the folder and holds the lock."""
    (folder / LOCK).unlink(missing_ok=True)
