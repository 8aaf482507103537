"""Traces of chosen steps with JAX's profiler."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import jax

Result = TypeVar("Result")


def parse_steps(text: str | None, *, steps: int) -> range:
    """The steps that `A:B` names: A to B - 1, counted from 0 as in the phases.

    Args:
      text: "A:B", or None for no steps.
      steps: of the whole run.

    Raises:
      ValueError: it is not of that form, empty, or reaches beyond the run.
    """
    if text is None:
        return range(0)
    match = re.fullmatch(r"(\d{1,12}):(\d{1,12})", text)
    found = range(int(match[1]), int(match[2])) if match else range(0)
    if not found or found.stop > steps:
        raise ValueError(f"profile.steps={text!r} must be A:B with 0 <= A < B <= steps={steps}")
    return found


class Profiler:
    """Runs steps, and traces the chosen ones into a folder.

    The device is idle when a trace begins and when it ends, so that it holds whole steps only;
    what happens between them (clustering, evaluation, checkpoints) is in it too. As a context
    manager it ends a trace that is under way when a run stops early.

    Args:
      steps: which, consecutive; a resumed run traces what is left of them.
      folder: for the trace; made when it begins. `tensorboard --logdir` and xprof read it as it is,
        ui.perfetto.dev the file perfetto_trace.json.gz in it.
      pause: entered around starting and writing, to leave that out of measured speeds.
      say: told where the trace is.
    """

    def __init__(
        self,
        steps: range,
        folder: Path,
        *,
        pause: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
        say: Callable[[str], None] = lambda line: None,
    ):
        self.steps = steps
        self.folder = folder
        self._pause = pause
        self._say = say
        self._tracing = False

    def __enter__(self) -> Profiler:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def run(self, step: int, function: Callable[..., Result], *args: Any) -> Result:
        """function(*args), the computation of a step, traced if the step is one of the chosen."""
        if step not in self.steps:
            return function(*args)
        if not self._tracing:
            jax.block_until_ready(args)
            with self._pause():
                jax.profiler.start_trace(self.folder, create_perfetto_trace=True)
            self._tracing = True
        # The name that profile viewers look for to divide a trace into steps.
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            result = function(*args)
        if step == self.steps[-1]:
            jax.block_until_ready(result)
            self._stop()
        return result

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            with self._pause():
                jax.profiler.stop_trace()
            self._say(f"profile of steps {self.steps[0]} to {self.steps[-1]} in {self.folder}")
