"""What goes wrong in a benchmark without ending it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Failures(list[str]):
    """What went wrong; the run goes on, and says so at its end."""

    def attempt(self, what: str, function: Callable[[], Any]) -> tuple[Any, str | None]:
        """The function's result, or None with a note of why: refusals are no failures."""
        try:
            return function(), None
        except NotImplementedError as error:
            return None, f"not served: {error}"
        except Exception as error:
            # A broken contender must not cost the results of the others.
            line = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            self.append(f"{what}: {line}")
            return None, f"failed: {line}"
