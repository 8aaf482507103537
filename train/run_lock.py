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

    Two that resumed one run would both write its checkpoints and its log. Where there can be no
    lock, nobody is kept out, and a warning says so.

    Args:
      folder: the run's, which exists.

    Raises:
      ValueError: another process trains there.
    """
    path = folder / LOCK
    with contextlib.ExitStack() as held:
        try:
            # Not truncated: it says who has it. Not buffered: on a full disk it need not say.
            lock = held.enter_context(open(path, "ab+", buffering=0))
            if fcntl is not None:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            owner = lock.read().decode(errors="replace").strip() or "another process"
            raise ValueError(
                f"the run in {folder} is being trained by {owner}: stop that first (or delete "
                f"{path}, if a machine that is gone held it)"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): start no other process on it", folder, error)
        else:
            with contextlib.suppress(OSError):
                lock.truncate(0)
                lock.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield folder


def remove(folder: Path) -> None:
    """Deletes the file, for whoever deletes the folder and holds the lock."""
    (folder / LOCK).unlink(missing_ok=True)
