"""Timing of asynchronous device work: interleaved rounds, so that drifts meet every contender."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Timed:
    """Something to time.

    Attributes:
      run: starts one execution and returns a handle to its result.
      wait: returns when the execution behind a handle, and all before it, are done.
    """

    run: Callable[[], Any]
    wait: Callable[[Any], None]

    def seconds(self, executions: int) -> float:
        """Mean time of one of several executions in a row."""
        start = time.perf_counter()
        for _ in range(executions):
            handle = self.run()
        self.wait(handle)
        return (time.perf_counter() - start) / executions


@dataclass(frozen=True)
class Samples:
    """Times of one execution, in seconds, one for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def as_row(self) -> dict[str, Any]:
        """For a result file, in milliseconds."""
        return {"ms": 1e3 * self.median, "rounds_ms": [1e3 * s for s in self.seconds]}


@dataclass(frozen=True)
class Sampling:
    """How much is timed: `rounds` samples of each contender, of `round_seconds` each.

    `settle_seconds`: how long a contender runs before each of its samples, not counted, so that
    clock and temperature are those of its own power and not of the contender's before it.
    """

    rounds: int
    round_seconds: float
    settle_seconds: float = 0.0


def jax_timed(compiled: Callable[..., Any], *operands: Any) -> Timed:
    """Calls of a compiled JAX function; one device runs them in order: the last one ends last."""
    return Timed(lambda: compiled(*operands), jax.block_until_ready)


def interleaved(calls: Mapping[str, Timed], sampling: Sampling) -> dict[str, Samples]:
    """Times several contenders in turns.

    A round runs each of them for a while, starting with another one every time, after a warm-up
    that is not counted. Device work queues up behind the host, so launch costs are hidden as long
    as an execution takes longer than its launch.

    Args:
      calls: contenders by name.
      sampling: rounds, and time that a contender runs in each.

    Returns:
      `Samples` by name, in the order of `calls`.

    Raises:
      ValueError: no contender, no round or no time.
    """
    rounds, round_seconds = sampling.rounds, sampling.round_seconds
    settle_seconds = sampling.settle_seconds
    if not calls or rounds < 1 or round_seconds <= 0 or settle_seconds < 0:
        raise ValueError(
            f"{len(calls)=}, {rounds=} and {round_seconds=} must be positive, "
            f"{settle_seconds=} not negative"
        )
    executions, settling = {}, {}
    for name, call in calls.items():
        call.seconds(2)
        estimate = max(call.seconds(2), 1e-9)
        executions[name] = max(2, math.ceil(round_seconds / estimate))
        settling[name] = math.ceil(settle_seconds / estimate)
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            if settling[name]:
                calls[name].seconds(settling[name])
            samples[name].append(calls[name].seconds(executions[name]))
    return {name: Samples(tuple(times)) for name, times in samples.items()}
