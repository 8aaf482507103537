"""The phases of a run as functions of the step, like any optax schedule.

A run is dense (warm-up), then sparse, then dense to the end (arXiv 2602.06183). Each phase is a
different compiled step, so the trainer evaluates the schedule on the host; it also accepts traced
steps, for use inside optax chains.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import optax

Phase = Literal["dense", "sparse"]
Event = Literal["begin", "refresh"]


@dataclass(frozen=True)
class Span:
    """Steps [start, stop) of one phase."""

    phase: Phase
    start: int
    stop: int


@dataclass(frozen=True)
class PhaseSchedule:
    """Dense steps [0, warmup_steps), sparse steps [warmup_steps, warmup_steps + sparse_steps),
    dense after that.

    Attributes:
      warmup_steps: dense steps before the sparse phase.
      sparse_steps: length of the sparse phase.
      refresh_every: steps between refreshes of the neuron clusters inside the sparse phase; 0 for
        never.

    Raises:
      ValueError: for a negative length.
    """

    warmup_steps: int
    sparse_steps: int
    refresh_every: int = 0

    def __post_init__(self):
        for name in ("warmup_steps", "sparse_steps", "refresh_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")

    @property
    def sparse_stop(self) -> int:
        """First dense step after the sparse phase."""
        return self.warmup_steps + self.sparse_steps

    def __call__(self, step: int) -> Phase:
        """The phase of a step."""
        return "sparse" if self.warmup_steps <= step < self.sparse_stop else "dense"

    def event(self, step: int) -> Event | None:
        """What happens to the clusters before a step: they are made, made anew, or nothing."""
        if self(step) == "dense":
            return None
        done = step - self.warmup_steps
        if done == 0:
            return "begin"
        return "refresh" if self.refresh_every and done % self.refresh_every == 0 else None

    def flip(self, step: int) -> Phase | None:
        """The phase that takes over from another one at this step; None at every other step."""
        return self(step) if step > 0 and self(step) != self(step - 1) else None

    def spans(self, steps: int) -> Iterator[Span]:
        """The phases of a run of `steps` steps, in order, without empty ones."""
        edges = (0, self.warmup_steps, self.sparse_stop, steps)
        phases: tuple[Phase, ...] = ("dense", "sparse", "dense")
        for i, phase in enumerate(phases):
            start, stop = min(edges[i], steps), min(edges[i + 1], steps)
            if start < stop:
                yield Span(phase, start, stop)


def sparsity_schedule(phases: PhaseSchedule) -> optax.Schedule:
    """1.0 on sparse steps and 0.0 on dense ones, as an optax schedule (a step counter in, a
    float out)."""
    constant = optax.constant_schedule
    return optax.join_schedules(
        [constant(0.0), constant(1.0), constant(0.0)], [phases.warmup_steps, phases.sparse_stop]
    )


def rewarm_at_flips(
    schedule: optax.Schedule,
    phases: PhaseSchedule,
    rewarm_steps: int,
    at: Collection[Phase] = ("sparse", "dense"),
) -> optax.Schedule:
    """Brings a learning rate back linearly from zero over `rewarm_steps` steps after changes of
    phase.

    Args:
      schedule: the learning rate.
      phases: when the phases change.
      rewarm_steps: length in steps; 0 leaves the schedule alone.
      at: the phases that begin with it.

    Raises:
      ValueError: if `rewarm_steps` is negative.
    """
    if rewarm_steps < 0:
        raise ValueError(f"{rewarm_steps=} must not be negative")
    if not rewarm_steps or not phases.sparse_steps:
        return schedule
    ends = {"sparse": phases.warmup_steps, "dense": phases.sparse_stop}
    flips = [step for phase, step in ends.items() if phase in at and step > 0]

    def rewarmed(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step)
        factor = jnp.float32(1)
        for flip in flips:
            ramp = jnp.minimum((step - flip + 1) / rewarm_steps, 1.0)
            factor = factor * jnp.where(step >= flip, ramp, 1.0)
        return factor * schedule(step)

    return rewarmed
