"""Where the spread between seeds comes from: how early each of them learns, or what it ends at?

Runs whose loss is still falling fast differ at the end by how far along they are. Then the seed
that is ahead in the middle is ahead at the end, and the spread shrinks with longer runs; a spread
that comes from the end itself shows no such order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from train.plots import smoothed
from train.study.record import Record

LEAST = 4
"""Seeds that make a correlation worth printing."""
_WIDTH = 4.0
"""Of the Gaussian that smooths the training loss, in logged steps."""


@dataclass(frozen=True)
class Timing:
    """How the seeds of a label spread.

    Attributes:
      label: the label.
      seeds: finished runs.
      middle: correlation of the smoothed training loss half-way with the held-out loss at the end.
      passes: mean and standard deviation, in tokens, of where the smoothed training loss first
        falls below the seeds' mean of it half-way.
      order: correlation of that place with the held-out loss at the end.
    """

    label: str
    seeds: int
    middle: float
    passes: tuple[float, float]
    order: float


def timings(records: Iterable[Record]) -> list[Timing]:
    """One for each label with `LEAST` finished seeds, in their order."""
    by_label: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if record["status"] == "finished" and "loss_dense" in record["final"]:
            by_label[record["label"]].append(record)
    return [_timing(label, group) for label, group in by_label.items() if len(group) >= LEAST]


def describe(timing: Timing) -> str:
    """One line of a report."""
    mean, spread = (value / 1e6 for value in timing.passes)
    return (
        f"{timing.label}: over {timing.seeds} seeds the training loss half-way correlates with the "
        f"held-out loss at the end at {timing.middle:.2f}; it passes its half-way mean after "
        f"{mean:.1f} ± {spread:.1f} M tokens, which correlates at {timing.order:.2f}"
    )


def _timing(label: str, group: Sequence[Record]) -> Timing:
    losses = [smoothed(np.array(r["curve"]["loss"], np.float64), _WIDTH) for r in group]
    middle = np.array([loss[len(loss) // 2] for loss in losses])
    end = np.array([record["final"]["loss_dense"] for record in group])
    level = float(middle.mean())
    places = np.array([_passes(*pair, level) for pair in zip(group, losses, strict=True)])
    return Timing(
        label,
        len(group),
        _correlation(middle, end),
        (float(places.mean()), float(places.std(ddof=1))),
        _correlation(places, end),
    )


def _passes(record: Record, loss: np.ndarray, level: float) -> float:
    """Tokens after which the smoothed training loss is below a level; those of the run if never."""
    below = np.flatnonzero(loss < level)
    steps = record["curve"]["step"]
    return record["tokens"] * (steps[below[0]] / steps[-1] if below.size else 1.0)


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if a.std() and b.std() else float("nan")
