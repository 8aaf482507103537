"""Pictures of a run. Figures are drawn without pyplot: no global state, no display."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train.metrics import read

INK = "#22303c"
MUTED = "#6b7884"
_TRAIN = "#8fa3b5"
_SMOOTH = "#33475b"
_VIEWS = {"loss_dense": ("#0072b2", "o"), "loss_sparse": ("#d55e00", "s")}
_PHASES = {"dense": "#f2f4f6", "sparse": "#fdeedd"}


def new_figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Returns a figure of this size in inches with one plain set of axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)
    return figure, axes


def loss_plot(
    metrics_jsonl: str | os.PathLike[str],
    png: str | os.PathLike[str],
    *,
    title: str | None = None,
) -> None:
    """Draws training and held-out losses over the steps, with the phases shaded.

    Args:
      metrics_jsonl: what `train.metrics.RunLogger` wrote. Where a loss is null, lines break.
      png: the picture to write.
      title: the heading; None takes the name of the folder of `metrics_jsonl`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it holds no training loss.
    """
    records = read(metrics_jsonl)
    train = [record for record in records if record["kind"] == "train"]
    steps = np.array([record["step"] for record in train])
    losses = _column(train, "loss")
    if not np.isfinite(losses).any():
        raise ValueError(f"{os.fspath(metrics_jsonl)} holds no training loss")
    name = os.path.basename(os.path.dirname(os.path.abspath(metrics_jsonl)))

    figure, axes = new_figure(9, 5)
    labels: list[tuple[float, str, str]] = []
    axes.plot(steps, losses, color=_TRAIN, linewidth=0.9, alpha=0.8)
    phases = np.array([record["phase"] for record in train])
    smooth = np.full(len(losses), math.nan)
    # Between phases the loss jumps: no average reaches across.
    for part in np.split(np.arange(len(phases)), np.flatnonzero(phases[1:] != phases[:-1]) + 1):
        smooth[part] = smoothed(losses[part], width=max(len(losses) / 80, 1.0))
    axes.plot(steps, smooth, color=_SMOOTH, linewidth=1.8)
    labels.append((_last(smooth), "training", _SMOOTH))
    # The fall of the first steps would press everything that matters flat.
    settled = losses[steps >= 0.05 * steps[-1]]
    lowest, highest = np.nanmin(losses), np.nanmax(settled)
    evals = [record for record in records if record["kind"] == "eval"]
    for key, (colour, marker) in _VIEWS.items():
        points = [record for record in evals if record.get(key) is not None]
        if points:
            values = _column(points, key)
            at = [record["step"] for record in points]
            style: dict[str, Any] = {"marker": marker, "markersize": 5, "linewidth": 1.4}
            axes.plot(at, values, color=colour, clip_on=False, zorder=3, **style)
            labels.append((_last(values), f"held-out, {key.removeprefix('loss_')} view", colour))
            lowest, highest = min(lowest, values.min()), max(highest, values.max())

    room = 0.04 * (highest - lowest) or 0.05
    axes.set_ylim(lowest - room, highest + room)
    axes.set_xlim(0, max(record["step"] for record in [*train, *evals]))
    _shade(axes, train)
    _label_ends(axes, labels)
    axes.set_xlabel("step", color=INK)
    axes.set_ylabel("loss, nats a token", color=INK)
    axes.grid(axis="y", color="white", linewidth=1.2)
    axes.set_axisbelow(True)
    axes.set_title(title if title is not None else name, loc="left", color=INK, fontsize=12, pad=20)
    figure.savefig(png, dpi=150)


def smoothed(values: np.ndarray, width: float) -> np.ndarray:
    """Returns the average under a Gaussian centred on each value; NaN where the input is.

    Args:
      values: (n,) float64, evenly spaced.
      width: standard deviation of the Gaussian, in values.
    """
    known = np.isfinite(values)
    reach = max(min(math.ceil(4 * width), len(values) - 1), 0)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / max(width, 1e-3)) ** 2)

    def average(x: np.ndarray) -> np.ndarray:
        return np.convolve(x, kernel)[reach : reach + len(x)]

    with np.errstate(invalid="ignore"):  # 0 / 0 only where no value is near
        result = average(np.where(known, values, 0.0)) / average(known.astype(np.float64))
    return np.where(known, result, math.nan)


def _shade(axes: Axes, train: list[dict[str, Any]]) -> None:
    """Colours and names the phases; a record's phase reaches back to the record before it."""
    spans: list[tuple[str, float, float]] = []
    start = 0.0
    for record in train:
        if spans and spans[-1][0] == record["phase"]:
            spans[-1] = (record["phase"], spans[-1][1], record["step"])
        else:
            spans.append((record["phase"], start, record["step"]))
        start = record["step"]
    left, right = axes.get_xlim()
    for i, (phase, begin, end) in enumerate(spans):
        end = right if i == len(spans) - 1 else end
        axes.axvspan(begin, end, color=_PHASES.get(phase, "#eeeeee"), zorder=-2, linewidth=0)
        if end - begin > 0.04 * (right - left):
            axes.text(
                (begin + end) / 2,
                1.01,
                phase,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                fontsize=9,
                color=MUTED,
            )


def _label_ends(axes: Axes, labels: Iterable[tuple[float, str, str]]) -> None:
    """Writes each line's name and last value at its end, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.085 * (top - bottom)
    wanted = sorted(labels)
    heights = [max(value, bottom + 0.5 * gap) for value, _, _ in wanted]
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    for (value, text, colour), height in zip(wanted, heights, strict=True):
        axes.annotate(
            f"{text}\n{value:.3f}",
            (1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            color=colour,
            annotation_clip=False,
        )


def _column(records: list[dict[str, Any]], key: str) -> np.ndarray:
    numbers = (record.get(key) for record in records)
    return np.array([math.nan if number is None else number for number in numbers], np.float64)


def _last(values: np.ndarray) -> float:
    return float(values[np.isfinite(values)][-1])
