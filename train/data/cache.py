"""Files that appear whole or not at all, also across kills and concurrent processes."""

import contextlib
import glob
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: concurrent processes then do the same work twice, harmlessly
    fcntl = None  # type: ignore[assignment]

_PARTIAL = ".partial"


def cache_folder(configured: str | None) -> Path:
    """The cache folder of the configuration, created if missing.

    Raises:
        ValueError: one line naming the folder, if it cannot be written.
    """
    if configured is not None:
        folder = Path(configured).expanduser()
    else:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        folder = Path(base) / "sparsejax"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK)
    except OSError:
        writable = False
    if not writable:
        raise ValueError(f"cache folder {folder} cannot be written: set data.cache")
    return folder


@contextlib.contextmanager
def locked(target: Path) -> Iterator[None]:
    """Holds an advisory lock on `target`; the system frees it when a process dies."""
    if fcntl is None:
        yield
        return
    with open(target.with_name(target.name + ".lock"), "wb") as lock:
        # A file system without locks costs repeated work, never a wrong result.
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def partial_path(target: Path) -> Path:
    """A fresh name beside `target` for what will be renamed to it.

    Partial files and folders of dead processes of this host are deleted first.
    """
    host = socket.gethostname()
    for stale in target.parent.glob(f".{glob.escape(target.name)}.{host}.*{_PARTIAL}"):
        if not _alive(int(stale.name.split(".")[-3])):
            remove(stale)
    unique = f".{target.name}.{host}.{os.getpid()}.{uuid.uuid4().hex[:8]}{_PARTIAL}"
    return target.with_name(unique)


def remove(path: Path) -> None:
    """Deletes a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
