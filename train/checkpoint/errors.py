"""The error of the file system, in one line."""

from __future__ import annotations

import os
import re


class CheckpointError(OSError):
    """A checkpoint could not be written or read; what was saved before is intact. One line."""


def reason(error: BaseException) -> str:
    """What went wrong, short enough for one line of a log."""
    if isinstance(error, OSError) and error.strerror:
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{where}"
    # Tensorstore wraps the system's error in several lines of its own.
    if code := re.search(r"os_error_code='(\d+)'", str(error)):
        return os.strerror(int(code[1]))
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
