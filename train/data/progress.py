"""Progress bars over files and documents, on the error stream, so that pipes stay clean."""

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

Advance = Callable[[int], None]


@contextlib.contextmanager
def file_progress(what: str, paths: Sequence[str], *, quiet: bool = False) -> Iterator[Advance]:
    """Shows bytes read, speed and time left over all of `paths` together.

    Yields:
        A function, callable from any thread, that adds a number of bytes; the bar appears with
        its first call, so that work which turns out to be cached shows nothing.
    """
    if quiet or not paths:
        yield lambda _: None
        return
    total = sum(os.path.getsize(path) for path in paths)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    name = paths[0] if len(paths) == 1 else f"{len(paths)} files"
    task = progress.add_task(f"{what} {os.path.basename(name)}", total=total)
    lock, started = threading.Lock(), False

    def advance(count: int) -> None:
        nonlocal started
        with lock:
            if not started:
                progress.start()
                started = True
        progress.advance(task, count)

    try:
        yield advance
    finally:
        if started:
            progress.stop()


@contextlib.contextmanager
def document_progress(
    what: str, total: int | None, *, quiet: bool = False
) -> Iterator[Callable[[int, int], None]]:
    """Shows documents, tokens and time, and how much is left if `total` documents are known.

    Yields:
        A function that takes the documents and the tokens done so far.
    """
    if quiet:
        yield lambda documents, tokens: None
        return
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:,.0f} documents, {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
        *([TimeRemainingColumn()] if total is not None else []),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task(what, total=total, tokens=0)
        yield lambda documents, tokens: progress.update(task, completed=documents, tokens=tokens)
