"""Pictures of a study."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Collection, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from sparsejax.schedule import PhaseSchedule
from train.plots import INK, MUTED, new_figure, smoothed
from train.study.definition import Axis
from train.study.equal_time import SUFFIX
from train.study.record import Record

if TYPE_CHECKING:
    from train.study.report import Row

# Okabe and Ito's palette, which colour-blind readers tell apart; grey-black is the baseline's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1")
BASELINE = "#33475b"
LOSS = "held-out loss, nats a token"
NAME_WIDTH = 36
"""Letters of a line of a label beside its point."""


def colours(rows: Sequence[Row], baseline: str | None) -> dict[str, str]:
    """A colour for each label; they repeat after seven."""
    others = [row.label for row in rows if row.label != baseline]
    found = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(others)}
    return found | ({} if baseline is None else {baseline: BASELINE})


def limits(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of an axis of losses that a few bad ones do not press flat.

    Losses further from the median than five times its distance to the 16th percentile are cut off:
    that is beyond five standard deviations of normal ones.
    """
    values = [value for value in values if math.isfinite(value)]
    middle = float(np.median(values))
    # The 16th percentile, so that one bad run cannot stretch the lower end either.
    reach = max(5 * (middle - float(np.quantile(values, 0.16))), 0.02)
    low, high = (
        max(float(np.min(values)), middle - reach),
        min(float(np.max(values)), middle + reach),
    )
    room = 0.06 * (high - low) or 0.01
    return low - room, high + room


def curves(
    png: Path,
    rows: Sequence[Row],
    records: Sequence[Record],
    baseline: str | None,
    marked: Collection[str] = (),
) -> bool:
    """Training loss (smoothed; mean and standard deviation over seeds) and held-out loss (dots; of
    the phase's view) against steps, or tokens where batches differ. Of many labels, the baseline
    and those that are marked, or else the four with most seeds, the first ones of those with as
    many.

    Returns:
      Whether there was anything to draw.
    """
    if not marked:
        most = sorted(rows, key=lambda row: (row.label != baseline, -len(row.losses)))
        marked = {row.label for row in most[:5]}  # more bands hide one another
    kept = [row for row in rows if row.label == baseline or row.label in marked]
    done = [r for r in records if r["status"] == "finished" and r["curve"]["step"]]
    groups = {row.label: [r for r in done if r["label"] == row.label] for row in kept}
    sizes = {_tokens_per_step(r) for group in groups.values() for r in group}
    if not sizes:
        return False
    unit = (lambda r: 1.0) if len(sizes) == 1 else (lambda r: _tokens_per_step(r) / 1e6)
    figure, axes = new_figure(9, 5)
    colour = colours(kept, baseline)
    uses: Counter[str] = Counter()
    shown: list[float] = []
    for label, group in groups.items():
        if not group:
            continue
        steps = np.array(group[0]["curve"]["step"], np.float64)
        alike = [r for r in group if r["curve"]["step"] == group[0]["curve"]["step"]]
        lines = np.array([_smooth(r["curve"]) for r in alike])
        x, mean = steps * unit(group[0]), lines.mean(axis=0)
        # A colour's second line is dashed, its third dotted.
        dash = ("-", "--", ":")[uses[colour[label]] % 3]
        uses[colour[label]] += 1
        axes.plot(x, mean, color=colour[label], linestyle=dash, linewidth=1.5, label=label)
        if len(lines) > 1:
            sd = lines.std(axis=0, ddof=1)
            band: dict[str, Any] = {"alpha": 0.15, "linewidth": 0}
            axes.fill_between(x, mean - sd, mean + sd, color=colour[label], **band)
        shown += list(mean[(steps >= 0.1 * steps[-1]) & np.isfinite(mean)])
        held_out = [_held_out(r) for r in group if r["evaluations"].get("loss_dense")]
        held_out = [(at, e) for at, e in held_out if at == held_out[0][0]]
        if held_out:
            values = np.array([losses for _, losses in held_out], np.float64).mean(axis=0)
            at = np.array(held_out[0][0]) * unit(group[0])
            axes.plot(at, values, "o", color=colour[label], markersize=4, clip_on=True)
            shown += list(values[at >= 0.1 * at[-1]])
    axes.set_ylim(*limits(shown))
    axes.set_xlim(left=0)
    _finish(axes, "step" if len(sizes) == 1 else "tokens, millions", "loss, nats a token")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    title = "Training loss (lines) and held-out loss (dots)"
    if len(kept) < len(rows):
        title += f", {len(kept)} of {len(rows)} labels"
    _title(axes, title)
    figure.savefig(png, dpi=150)
    return True


def final_losses(png: Path, rows: Sequence[Row], baseline: str | None) -> bool:
    """Final held-out losses (seeds, mean, standard deviation) and, beside them, the paired
    differences to the baseline with their 95% intervals.

    Returns:
      Whether there was anything to draw.
    """
    compared = any(row.paired is not None for row in rows)
    size = (10 if compared else 7, 1.3 + 0.34 * len(rows))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2 if compared else 1, sharey=True, squeeze=False)[0]
    colour = colours(rows, baseline)
    low, high = limits([loss for row in rows for loss in row.losses.values()])
    for y, row in enumerate(rows):
        line: dict[str, Any] = {"color": colour[row.label], "capsize": 3, "markersize": 6}
        if _mean(row) > high:
            _beyond(panels[0], y, f"{_mean(row):.3f}", colour[row.label])
        else:
            seeds = list(row.losses.values())
            panels[0].plot(seeds, [y] * len(seeds), "|", color=colour[row.label], markersize=9)
            panels[0].errorbar(_mean(row), y, xerr=_sd(row), fmt="o", **line)
        if compared and row.paired is not None:
            reach = 0.0 if math.isnan(row.paired.se) else row.paired.high - row.paired.mean
            panels[1].errorbar(row.paired.mean, y, xerr=reach, fmt="o", **line)
    panels[0].set_xlim(low, high)
    panels[0].set_yticks(range(len(rows)), [row.label for row in rows])
    panels[0].set_ylim(len(rows) - 0.5, -0.5)
    _style(panels[0])
    _finish(panels[0], LOSS, "", grid="x")
    _title(panels[0], "Final loss: seeds, mean, sd")
    if compared:
        means = [row.paired.mean for row in rows if row.paired is not None]
        left, right = limits([*means, 0.0])
        # The interval of two pairs is so wide that it would press the others flat: it is cut off.
        several = [r.paired for r in rows if r.paired and len(r.losses) > 2]
        ends = [v for paired in several for v in (paired.low, paired.high)]
        inside = [v for v in ends if left - (right - left) <= v <= right + (right - left)]
        left, right = min([left, *inside]), max([right, *inside])
        room = 0.03 * (right - left)
        panels[1].set_xlim(left - room, right + room)
        panels[1].axvline(0, color=BASELINE, linewidth=1)
        for y, row in enumerate(rows):
            if row.paired is not None and row.paired.mean > right + room:
                _beyond(panels[1], y, f"{row.paired.mean:+.3f}", colour[row.label])
        _style(panels[1])
        # The panel is narrow beside long labels, and the baseline's may be one.
        below = textwrap.fill(f"difference to {baseline}, nats", 30)
        _finish(panels[1], below, "", grid="x")
        _title(panels[1], "Paired difference, 95% interval")
    figure.savefig(png, dpi=150)
    return True


def sweep(png: Path, rows: Sequence[Row], axis: Axis, baseline: str | None) -> bool:
    """Final loss (mean, standard deviation) against a factor; a line for each setting of the other
    factors that has two values of this one. With several seeds, lines stand a little beside each
    other, so that bars of the same value can be told apart; a single one beside them is hollow.

    Returns:
      Whether there was anything to draw.
    """
    lines: dict[tuple[tuple[str, Any], ...], dict[Any, Row]] = {}
    for row in rows:
        if axis.factor in row.factors:
            others = sorted((k, v) for k, v in row.factors.items() if k != axis.factor)
            lines.setdefault(tuple(others), {})[row.factors[axis.factor]] = row
    lines = {rest: points for rest, points in lines.items() if len(points) > 1}
    if not lines:
        return False
    figure, axes = new_figure(7.5, 4.5)
    values = list(dict.fromkeys(x for points in lines.values() for x in points))
    numeric = all(isinstance(x, int | float) for x in values)
    position = (lambda x: x) if numeric else values.index
    width = max(map(position, values)) - min(map(position, values))
    varying = {pair for rest in lines for pair in rest}
    varying = {pair for pair in varying if not all(pair in rest for rest in lines)}
    # A number that only some lines have, and always the same one, tells none of those apart.
    counts = Counter(name for name, _ in varying)
    varying = {(k, v) for k, v in varying if isinstance(v, str) or counts[k] > 1}
    most = max(len(row.losses) for points in lines.values() for row in points.values())
    hollow: dict[str, Any] = {"markersize": 5, "markerfacecolor": "white", "zorder": 3}
    shown = []
    for i, (rest, points) in enumerate(lines.items()):
        order = sorted(points, key=position)
        means = [_mean(points[x]) for x in order]
        name = ", ".join(
            str(v) if isinstance(v, str) else f"{k} {v:g}" for k, v in rest if (k, v) in varying
        )
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "capsize": 3, "markersize": 5}
        spread = [_sd(points[x]) for x in order]
        aside = i - (len(lines) - 1) / 2 if most > 1 else 0
        places = [position(x) for x in order]
        if numeric and axis.log:
            places = [x * 1.012**aside for x in places]
        else:
            places = [x + 0.012 * width * aside for x in places]
        axes.errorbar(places, means, yerr=spread, fmt="o-", label=name, **style)
        for place, x, mean in zip(places, order, means, strict=True):
            if len(points[x].losses) == 1 < most:
                axes.plot(place, mean, "o", **hollow, color=style["color"])
        # Both ends of the bars, but a bad run's long bar should not set the scale either.
        shown += [m + side * s for m, s in zip(means, spread, strict=True) for side in (-1, 0, 1)]
    base = next((row for row in rows if row.label == baseline), None)
    if base is not None and axis.factor not in base.factors:
        axes.axhline(_mean(base), color=BASELINE, linestyle="--", linewidth=1.2, label=base.label)
        shown.append(_mean(base))
    axes.set_ylim(*limits(shown))
    if numeric:
        if axis.log:
            axes.set_xscale("log")
        axes.set_xticks(sorted(values), [f"{x:g}" for x in sorted(values)], minor=False)
        axes.minorticks_off()
    else:
        axes.set_xticks(range(len(values)), [str(x) for x in values])
    _finish(axes, axis.factor.replace("_", " "), LOSS)
    if any(text for text in axes.get_legend_handles_labels()[1]):
        axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    _title(axes, f"Final loss against {axis.factor.replace('_', ' ')}: mean, standard deviation")
    figure.savefig(png, dpi=150)
    return True


def pareto(
    png: Path, rows: Sequence[Row], baseline: str | None, marked: Collection[str] = ()
) -> bool:
    """Final loss against the speed-up of the whole run: by how much it differs from the baseline's
    of the same seeds, with the standard error. Runs that no other beats in both are joined.

    Runs of the baseline's time (`equal_time.SUFFIX`) stand as open diamonds above or below the
    recipe that they stretch, and are no part of the front. Labels that are neither at the front nor
    marked are grey and have no name; with none marked, those that vary a recipe without changing
    its speed (a comma in the label).

    Returns:
      Whether there was anything to draw.
    """
    known = [row for row in rows if not math.isnan(row.run_speedup) and row.losses]
    if not known:
        return False
    base = next((row for row in known if row.label == baseline), None)
    speed = {row.label: row.run_speedup for row in known}
    stretched = {
        row.label: row.label.removesuffix(SUFFIX) for row in known if row.label.endswith(SUFFIX)
    }
    recipes = [row for row in known if row.label not in stretched]
    height = {row.label: _against(row, base) for row in known}
    front = [
        row
        for row in recipes
        if not any(
            other.run_speedup >= row.run_speedup and height[other.label][0] < height[row.label][0]
            for other in recipes
        )
    ]
    front.sort(key=lambda row: row.run_speedup)
    figure, axes = new_figure(8, 5)

    def has_name(row: Row) -> bool:
        plain = "," not in row.label or row.label in stretched
        return row in front or (row.label in marked if marked else plain)

    # Only those with a name take one of the few colours.
    coloured = {stretched.get(row.label, row.label) for row in known if has_name(row)}
    colour = colours([row for row in recipes if row.label in coloured], baseline)
    names, points = [], []
    for row in known:
        named, own = has_name(row), stretched.get(row.label, row.label)
        style: dict[str, Any] = {"color": colour.get(own, INK) if named else "#c3cad0"}
        style |= {"capsize": 3 if named else 0, "markersize": 7 if named else 4}
        style |= (
            {"fmt": "D", "markerfacecolor": "white"} if row.label in stretched else {"fmt": "o"}
        )
        x = speed.get(own, row.run_speedup)
        middle, error = height[row.label]
        axes.errorbar(x, middle, yerr=error, zorder=2 if named else 1, **style)
        if named:
            points.append((x, middle))
            text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8, "color": INK}
            label = textwrap.fill(row.label, NAME_WIDTH)
            names.append(axes.annotate(label, (x, middle), xytext=(8, -3), **text))
        if row.label in stretched and own in height:
            dots: dict[str, Any] = {"color": style["color"], "linestyle": ":", "linewidth": 1}
            axes.plot([x, x], [height[own][0], middle], zorder=0, **dots)
    line = [(row.run_speedup, height[row.label][0]) for row in front]
    axes.plot(*zip(*line, strict=True), color=MUTED, linewidth=1, zorder=0)
    if base is not None:
        axes.axhline(height[base.label][0], color=BASELINE, linestyle="--", linewidth=1, zorder=0)
    left, right = min(speed.values()), max(speed.values())
    room = max(right - left, 0.02)
    axes.set_xlim(left - 0.05 * room, right + 0.25 * room)
    what = LOSS if base is None else f"held-out loss against {baseline}, %"
    _finish(axes, "speed-up of the whole run", what)
    _title(axes, "Final loss against speed; diamonds: stretched to the baseline's time")
    _apart(figure, axes, names, points)
    figure.savefig(png, dpi=150)
    return True


def _apart(
    figure: Figure,
    axes: Axes,
    names: Sequence[Annotation],
    points: Sequence[tuple[float, float]],
) -> None:
    """Moves names up or down, as little as will do, that would cover a point or a name above them,
    or stand outside the axes; a thin line leads from them to their point."""
    figure.canvas.draw()
    # Half a marker's width, in the pixels of the drawing.
    half = 4 * figure.dpi / 72
    taken = [Bbox.from_extents(x - half, y - half, x + half, y + half)
             for x, y in axes.transData.transform(points)]  # fmt: skip
    bottom, top = axes.get_window_extent().intervaly

    def stands(name: Annotation) -> bool:
        own = name.get_window_extent()
        inside = bottom <= own.y0 and own.y1 <= top
        return inside and not any(own.overlaps(other) for other in taken)

    for name in sorted(names, key=lambda name: -name.get_window_extent().y0):
        x, y = name.get_position()
        # Down before up; where there is no room at all, it stays.
        away = (sign * step for step in range(1, round(top - bottom)) for sign in (-1, 1))
        for shift in chain([0], away, [0]):
            name.set_position((x, y + shift))
            if stands(name):
                break
        taken.append(name.get_window_extent())
    lead: dict[str, Any] = {"arrowstyle": "-", "color": MUTED, "linewidth": 0.6}
    lead |= {"shrinkA": 0, "shrinkB": 4}
    for name, point in zip(names, points, strict=True):
        x, y = name.get_position()
        place: dict[str, Any] = {"xytext": (x - 1, y + 3), "textcoords": "offset points"}
        axes.annotate("", point, arrowprops=lead, zorder=1, **place)


def _against(row: Row, base: Row | None) -> tuple[float, float]:
    """Height and error of a point: loss and standard deviation, or percent of the baseline's."""
    if base is None:
        return _mean(row), _sd(row)
    if row.paired is None:
        return 100 * (_mean(row) / _mean(base) - 1), 0.0
    scale = 100 * row.paired.relative / row.paired.mean if row.paired.mean else 100 / _mean(base)
    error = 0.0 if math.isnan(row.paired.se) else row.paired.se * abs(scale)
    return 100 * row.paired.relative, error


def _mean(row: Row) -> float:
    return math.inf if row.dense is None else row.dense.mean


def _sd(row: Row) -> float:
    return 0.0 if row.dense is None or math.isnan(row.dense.sd) else row.dense.sd


def _tokens_per_step(record: Record) -> int:
    return record["config"]["batch_size"] * record["config"]["sequence_length"]


def _held_out(record: Record) -> tuple[list[int], list[float | None]]:
    """Steps and losses of a run's evaluations, in the sparse phase of the sparse view: the dense
    one means nothing there."""
    config, found = record["config"], record["evaluations"]
    schedule = config["schedule"]
    sparse_steps = round(schedule["sparse_fraction"] * config["steps"])
    phase = PhaseSchedule(schedule["warmup_steps"], sparse_steps)
    sparse = found.get("loss_sparse") or [None] * len(found["step"])
    pairs = zip(found["step"], found["loss_dense"], sparse, strict=True)
    # An evaluation follows its step.
    own = [s if phase(step - 1) == "sparse" and s is not None else d for step, d, s in pairs]
    return found["step"], own


def _smooth(curve: dict[str, Any]) -> np.ndarray:
    """The training loss, averaged over about a fortieth of the run, within each phase."""
    losses = np.array([math.nan if v is None else v for v in curve["loss"]], np.float64)
    phases = np.array(curve["phase"])
    result = np.full(len(losses), math.nan)
    for part in np.split(np.arange(len(phases)), np.flatnonzero(phases[1:] != phases[:-1]) + 1):
        result[part] = smoothed(losses[part], width=max(len(losses) / 80, 1.0))
    return result


def _beyond(axes: Axes, y: float, value: str, colour: str) -> None:
    """Says what lies beyond the right end."""
    axes.annotate(
        f"{value} →",
        (1.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(-3, 0),
        textcoords="offset points",
        ha="right",
        va="center",
        fontsize=8,
        color=colour,
    )


def _style(axes: Axes) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("bottom", "left"):
        axes.spines[side].set_color(MUTED)
    axes.tick_params(colors=MUTED, labelcolor=INK, labelsize=9)


def _finish(axes: Axes, x: str, y: str, *, grid: Any = "y") -> None:
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.grid(axis=grid, color="#e6e9ec", linewidth=0.8)
    axes.set_axisbelow(True)


def _title(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", color=INK, fontsize=11)
