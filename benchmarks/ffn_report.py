"""What the feed-forward benchmark shows: speed-ups, one table on the console, a plot."""

from __future__ import annotations

import math
import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

_DENSE = ("dense relu2", "dense relu2 fp8", "dense swiglu")
_COLOURS = {
    "dense relu2 fp8": "#8e9aa6",
    "dense swiglu": "#c5cdd4",
    "ragged_dot": "#e8a33d",
    "batched": "#f2cf8f",
    "triton": "#5b8def",
    "hopper": "#1b9e77",
    "hopper fp8": "#0b5d45",
    "reference": "#b07aa1",
    "reference fp8": "#7a4e6e",
}
_LABELS = {
    "dense relu2": "dense relu²",
    "dense relu2 fp8": "dense relu², fp8",
    "dense swiglu": "dense SwiGLU",
    "ragged_dot": "routed, ragged_dot",
    "batched": "routed, batched",
}


def _timed(result: Row) -> dict[tuple, Row]:
    """Rows with times, by model, contender, M and passes."""
    return {
        (r["model"], r["contender"], r["m"], r["passes"]): r
        for r in result["networks"]
        if "ms" in r
    }


def _models(result: Row) -> list[str]:
    return list(dict.fromkeys(r["model"] for r in result["networks"]))


def summary(result: Row) -> list[Row]:
    """Speed-ups of each 2:4 contender over every rival that was timed in the same run, and of one
    in 8 bits over its twin in 16."""
    rows = _timed(result)
    found = []
    for (model, contender, m, passes), row in rows.items():
        twin, _, bits = contender.partition(" ")
        if twin not in result["settings"]["backends"]:
            continue
        over = {}
        for rival in (*_DENSE, "ragged_dot", "batched", *([twin] if bits else [])):
            other = rows.get((model, rival, None if rival in _DENSE else m, passes))
            if other is not None:
                over[rival] = other["ms"] / row["ms"]
        found.append(
            {"model": model, "m": m, "contender": contender, "passes": passes, "speedup_over": over}
        )
    return found


def _title(result: Row) -> str:
    note = ": a smoke test, its times say nothing about speed" if result["smoke"] else ""
    settings = result["settings"]
    if settings.get("weight_gradient", "dense") != "dense":
        share = settings["dense_neurons"]
        note = f", weight gradients 2:4 along tokens but for {share:.0%} of neurons{note}"
    return f"Feed-forward networks on {result['device']['kind']}{note}"


def _names(result: Row) -> list[str]:
    present = {r["contender"] for r in result["networks"]}
    return [name for name in _COLOURS if name in present]


def table(result: Row, console: Console | None = None) -> None:
    """Prints times and speed-ups over the dense squared ReLU, and below them each stage of a step
    with its share."""
    rows, names = _timed(result), _names(result)
    view = Table(title=_title(result), title_justify="left", caption_justify="left")
    for heading in ("model", "M", "passes"):
        view.add_column(heading)
    for name in ("dense relu2", *names):
        view.add_column(_LABELS.get(name, f"2:4, {name}"), justify="right")
    blocks = result["settings"]["blocks"]
    for model in _models(result):
        for passes in ("forward", "forward+backward"):
            for m in blocks:
                cells = [model, str(m), passes]
                for name in ("dense relu2", *names):
                    row = rows.get((model, name, None if name in _DENSE else m, passes))
                    if row is None:
                        cells.append("-")
                    elif name == "dense relu2":
                        cells.append(f"{row['ms']:.3f} ms")
                    else:
                        ratio = row.get("speedup_over_dense", math.nan)
                        cells.append(f"{row['ms']:.3f} ms {ratio:.2f}x")
                view.add_row(*cells)
        view.add_section()
    view.caption = "\n".join([*_stage_lines(result), *_notes(result)])
    (console or Console(width=150)).print(view)


def _stage_lines(result: Row) -> list[str]:
    """One line for each stage: microseconds and, for products, executed TFLOP/s, by M."""
    lines = []
    groups: dict[tuple, dict[int, list[Row]]] = {}
    for row in result["stages"]:
        if "ms" in row:
            key = row["model"], row["contender"]
            groups.setdefault(key, {}).setdefault(row["m"], []).append(row)
    whole = _timed(result)
    for (model, contender), by_block in groups.items():
        heads = "".join(f"{f'M={m}':>22}" for m in by_block)
        lines.append(f"{model} {contender}, each stage alone".ljust(46) + heads)
        for i, stage in enumerate(next(iter(by_block.values()))):
            cells = []
            for stages in by_block.values():
                rate = stages[i].get("tflops")
                text = f"{1e3 * stages[i]['ms']:.0f} µs"
                cells.append(text + (f" {rate:>5.0f} TFLOP/s" if rate else " " * 14))
            lines.append(f"  {stage['stage']}".ljust(46) + "".join(f"{c:>22}" for c in cells))
        sums = []
        for m, stages in by_block.items():
            total = sum(s["ms"] for s in stages)
            row = whole.get((model, contender, m, "forward+backward"))
            share = f" of {1e3 * row['ms']:.0f}" if row else ""
            sums.append(f"{1e3 * total:.0f}{share} µs")
        lines.append(
            "  sum, of the time of the whole".ljust(46) + "".join(f"{s:>22}" for s in sums)
        )
    return lines


def _notes(result: Row) -> list[str]:
    lines = []
    for load in result["loads"]:
        lines.append(
            f"{load['model']} M={load['m']}: fullest expert {load['imbalance']:.2f} of the mean, "
            f"{load['rows_used']} rows with padding"
        )
    for model, facts in result["capture"].items():
        lines.append(
            f"{model} captured after {facts['steps']} steps, loss {facts['first_loss']:.2f} to "
            f"{facts['last_loss']:.2f}, {facts['active_share']:.0%} of neurons active"
        )
    backends = result["settings"]["backends"]
    for what, suffix in (("", ""), (" in 8 bits", " fp8")):
        worst = [
            max(r["relative_errors"].values())
            for r in result["networks"]
            if r["contender"] in [b + suffix for b in backends] and "relative_errors" in r
        ]
        if worst:
            lines.append(
                f"largest relative error of a 2:4 network's output or gradient{what} "
                f"{max(worst):.1e}"
            )
    for row in result["networks"]:
        if "note" in row:
            lines.append(f"{row['model']} {row['contender']} M={row['m']} {row['passes']}: "
                         f"{row['note']}")  # fmt: skip
    return [*lines, *result["notes"]]


def plot(result: Row, file: pathlib.Path) -> None:
    """Speed-ups over the dense squared ReLU, a panel for each model and pass.

    Nothing is drawn where nothing was timed.
    """
    rows, models = _timed(result), _models(result)
    names = [n for n in _names(result) if any(key[1] == n for key in rows)]
    if not names or not any("speedup_over_dense" in r for r in rows.values()):
        return
    blocks = result["settings"]["blocks"]
    passes = ("forward", "forward+backward")
    # Not pyplot: a report must not switch the backend of a notebook that imports it.
    figure = Figure(figsize=(1.5 + 5 * len(models), 7))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(passes), len(models), sharey="row", squeeze=False)
    width = 0.84 / len(names)
    for axis, (which, model) in zip(
        axes.flat, ((p, m) for p in passes for m in models), strict=True
    ):
        for i, name in enumerate(names):
            ratios = [
                rows.get((model, name, None if name in _DENSE else m, which), {}).get(
                    "speedup_over_dense", math.nan
                )
                for m in blocks
            ]
            places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(blocks))]
            label = _LABELS.get(name, f"routed and 2:4, {name}")
            bars = axis.bar(places, ratios, width * 0.92, color=_COLOURS[name], label=label)
            for bar, ratio in zip(bars, ratios, strict=True):
                if math.isfinite(ratio):
                    axis.annotate(
                        f"{ratio:.2f}", (bar.get_x() + bar.get_width() / 2, bar.get_height()),
                        ha="center", va="bottom", fontsize=7,
                    )  # fmt: skip
        axis.axhline(1.0, color="#5f6368", lw=1)
        axis.set_xticks(range(len(blocks)), [f"M = {m}" for m in blocks])
        axis.set_title(f"{model}, {which}", loc="left", fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("speed-up over dense relu²")
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=11)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    columns = 3 * len(models)
    lines = -(-len(names) // columns)
    figure.legend(
        handles, labels, frameon=False, ncols=min(columns, len(names)), fontsize=8,
        loc="upper left", bbox_to_anchor=(0.005, 0.965),
    )  # fmt: skip
    figure.tight_layout(rect=(0, 0, 1, 0.975 - 0.03 * lines))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
