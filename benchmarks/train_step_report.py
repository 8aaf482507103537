"""What the train step benchmark shows: derived figures, one table on the console, a plot."""

from __future__ import annotations

import pathlib
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from train import scopes
from train.accounting import amdahl
from train.study.equal_time import KEY

Row = dict[str, Any]

# Part of a breakdown to the scopes that it sums; what is left of the step's time is the rest.
PARTS = {
    "FFN": (scopes.FFN,),
    "attention": (scopes.ATTENTION,),
    "projections": (scopes.PROJECTIONS,),
    "head and loss": (scopes.HEAD,),
    "optimiser": (scopes.OPTIMIZER,),
}
TALK = "collectives"
REST = "the rest"

_COLOURS = {
    "FFN": "#1b9e77",
    "attention": "#5b8def",
    "projections": "#8fb8f0",
    "head and loss": "#e8a33d",
    "optimiser": "#b07aa1",
    TALK: "#d1495b",
    REST: "#c5c8cc",
}


def brief(row: Row) -> str:
    """A row in a line."""
    if "tokens_per_second" not in row:
        return str(row.get("note", "compiled"))
    mfu = "" if row.get("mfu") is None else f", MFU {row['mfu']:.1%}"
    guess = " (extrapolated)" if row.get("extrapolated") else ""
    each = ""
    if row.get("devices", 1) > 1:
        each = f" ({row['tokens_per_second_per_device']:,.0f} a device)"
    return (
        f"{1e3 * row['seconds']:.1f} ms, {row['tokens_per_second']:,.0f} tokens/s{each}{mfu}{guess}"
    )


def parts(row: Row) -> dict[str, float] | None:
    """Seconds of a step by part, which add up to the step's time; None without a profile, or with
    one that caught no kernel.

    Communication counts where nothing runs beside it. The rest is what no other part took:
    embedding, norms, rotary positions, residual sums, and times at which the device stood still.
    """
    if "breakdown" not in row or not any(row["breakdown"]["parts"].values()):
        return None
    found = row["breakdown"]["parts"]
    named = {name: sum(found[scope] for scope in own) for name, own in PARTS.items()}
    named[TALK] = row["breakdown"].get("collectives", {}).get("exposed", 0.0)
    return {**named, REST: row["seconds"] - sum(named.values())}


def amdahl_row(dense: Row, sparse: Row) -> Row | None:
    """FFN share f of the dense step, the FFN's own speed-up s, the bound 1 / (1 - f + f / s), and
    how much of it the step reaches; None without profiles.

    By token, because the steps may differ in their number.
    """
    of_dense, of_sparse = parts(dense), parts(sparse)
    if of_dense is None or of_sparse is None:
        return None
    ffn_dense, ffn_sparse = of_dense["FFN"] / dense["tokens"], of_sparse["FFN"] / sparse["tokens"]
    if not (ffn_dense > 0 and ffn_sparse > 0):
        return None
    share = min(ffn_dense * dense["tokens"] / dense["seconds"], 1.0)
    gain = ffn_dense / ffn_sparse
    bound = amdahl(share, gain)
    return {
        "ffn_share": share,
        "ffn_speedup": gain,
        "bound": bound,
        "speedup": sparse["speedup"],
        "share_of_bound": sparse["speedup"] / bound,
    }


def whole_run(run: Row, dense: Row, sparse: Row, clustering: Row) -> Row:
    """Time of a run under its schedule against the same run without a sparse phase.

    Args:
      run: steps, sparse_steps, refreshes and tokens_per_step of the configuration.
      dense, sparse: measured rows.
      clustering: measured seconds of the flip and of a refresh.
    """
    by_step = {
        name: run["tokens_per_step"] / row["tokens_per_second"]
        for name, row in (("dense", dense), ("sparse", sparse))
    }
    refresh = clustering.get("refresh_seconds", clustering["begin_seconds"])
    extra = clustering["begin_seconds"] + run["refreshes"] * refresh
    dense_steps = run["steps"] - run["sparse_steps"]
    recipe = dense_steps * by_step["dense"] + run["sparse_steps"] * by_step["sparse"] + extra
    alone = run["steps"] * by_step["dense"]
    return {
        "seconds_dense": alone,
        "seconds_recipe": recipe,
        "seconds_clustering": extra,
        "speedup": alone / recipe,
    }


def derive(result: Row) -> None:
    """Adds to the result what follows from its rows."""
    speedups: dict[str, float] = {}
    for group in result["groups"]:
        timed = [row for row in group["rows"] if "tokens_per_second" in row]
        sparse = next((row for row in timed if row["phase"] == "sparse"), None)
        if sparse is None or not timed or timed[0]["phase"] != "dense":
            continue
        group["amdahl"] = amdahl_row(timed[0], sparse)
        if "run" in result:
            group["whole_run"] = whole_run(result["run"], timed[0], sparse, group["clustering"])
        speedups.setdefault("default", sparse["speedup"])
        speedups[group["name"]] = sparse["speedup"]
    if speedups:
        result[KEY] = speedups


def _devices(result: Row) -> str:
    count = result.get("devices", 1)
    if count == 1:
        return str(result["device"]["kind"])
    axes = ", ".join(f"{name} {size}" for name, size in result["mesh"].items() if size > 1)
    return f"{count} x {result['device']['kind']} ({axes})"


def _talk(row: Row) -> str | None:
    """One line about communication; None where there is none."""
    found = row.get("breakdown", {}).get("collectives")
    if not found or not found["seconds"]:
        return None
    share = found["overlapped"] / found["seconds"]
    kinds = ", ".join(
        f"{kind} {1e3 * own['seconds']:.1f} ms in {own['calls']:.0f} calls"
        for kind, own in sorted(found["kinds"].items(), key=lambda item: -item[1]["seconds"])
    )
    of_step = lambda name: f"{1e3 * found[name]:.1f} ms ({found[name] / row['seconds']:.1%})"
    return (
        f"a device talks {of_step('seconds')} of a step, {share:.1%} of it beside products, "
        f"{of_step('exposed')} exposed: {kinds}"
    )


def _scaling(result: Row) -> list[str]:
    lines = []
    for run in result.get("scaling", []):
        name = f"{result['devices']} devices against {run['devices']}"
        if "file" in run:
            name += f" of {run['file']}"
        for phase, share in run["efficiency"].items():
            lines.append(f"{name}, {phase}: weak-scaling efficiency {share:.1%}")
        lines += [f"{name}: {note}" for note in run["notes"]]
    return lines


def _note(result: Row) -> str:
    return ": a smoke test, its times say nothing about speed" if result["smoke"] else ""


def _gigabytes(row: Row) -> str:
    return f"{row['memory']['total'] / 1e9:.1f}" if "memory" in row else "-"


def _candidates(result: Row, console: Console) -> None:
    table = Table(title="Candidates", title_justify="left")
    for heading, justify in (("phase", "left"), ("settings", "left"), ("ms", "right"),
                             ("tokens/s", "right"), ("MFU", "right"), ("GB", "right"),
                             ("compiled", "right"), ("", "left")):  # fmt: skip
        table.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in result["candidates"]:
        timed = "seconds" in row
        mfu = row.get("mfu")
        table.add_row(
            row["phase"],
            row["settings"],
            f"{1e3 * row['seconds']:.1f}" if timed else "-",
            f"{row['tokens_per_second']:,.0f}" if timed else "-",
            "-" if mfu is None else f"{mfu:.1%}",
            _gigabytes(row),
            f"{row['compile_seconds']:.0f} s" if "compile_seconds" in row else "-",
            row.get("note", "extrapolated" if row.get("extrapolated") else ""),
        )
    console.print(table)


def table(result: Row, console: Console | None = None) -> None:
    """Prints candidates, contenders and breakdowns."""
    console = console or Console(width=170)
    console.print(
        f"Train steps of {result['settings']['config']} on {_devices(result)}{_note(result)}",
        highlight=False,
    )
    if len(result["candidates"]) > 2 or not result["groups"]:
        _candidates(result, console)
    if not result["groups"]:
        return
    view = Table(title="Steps", title_justify="left", caption_justify="left")
    for heading in ("group", "phase", "settings"):
        view.add_column(heading)
    many = result.get("devices", 1) > 1
    columns = (*PARTS, *((TALK,) if many else ()), REST)
    rate = "tokens/s a device" if many else "tokens/s"
    for heading in ("tokens", "ms", rate, "speed-up", "MFU", "GB", *columns):
        view.add_column(heading, justify="right")
    lines = []
    for group in result["groups"]:
        for row in group["rows"]:
            if "seconds" not in row:
                continue
            mine = parts(row) or {}
            mfu = row.get("mfu")
            view.add_row(
                group["name"],
                row["phase"],
                row["settings"],
                f"{row['tokens']:,}",
                f"{1e3 * row['seconds']:.1f}",
                f"{row['tokens_per_second'] / result.get('devices', 1):,.0f}",
                f"{row['speedup']:.3f}x",
                "-" if mfu is None else f"{mfu:.1%}",
                _gigabytes(row),
                *(f"{1e3 * mine[n]:.1f}" if n in mine else "-" for n in columns),
            )
            if talk := _talk(row):
                lines.append(f"{group['name']}, {row['phase']}: {talk}")
        view.add_section()
        if found := group.get("amdahl"):
            lines.append(
                f"{group['name']}: FFN share f {found['ffn_share']:.3f}, FFN speed-up s "
                f"{found['ffn_speedup']:.2f}, bound {found['bound']:.3f}, measured "
                f"{found['speedup']:.3f} = {found['share_of_bound']:.1%} of it"
            )
        if found := group.get("whole_run"):
            lines.append(
                f"{group['name']}: whole run {found['speedup']:.3f}x; clustering takes "
                f"{found['seconds_clustering']:.0f} s of its {found['seconds_recipe'] / 3600:.1f} h"
            )
    view.caption = "\n".join([*lines, *_scaling(result)])
    console.print(view)


def _label(result: Row, group: str, row: Row) -> str:
    """Of a bar: its phase, its group, and what its settings have beyond the first of its group.

    A group's name is what its sparse step has; the dense one is beside it.
    """
    rows = next(g["rows"] for g in result["groups"] if g["name"] == group)
    first = next(r["settings"] for r in rows if r["phase"] == row["phase"])
    own = row["settings"].removeprefix(first)
    # An option's name is too long for a line: break it where its parts meet.
    what = own if group == row["phase"] else f"{group} {own}"
    if group != row["phase"] and row["phase"] == "dense":
        what = f"beside {what}"
    words = what.replace("--", "").replace(".", ".\n").replace("-", "-\n")
    return f"{row['phase']}\n" + "\n".join(words.split())


def plot(result: Row, file: pathlib.Path) -> None:
    """Time of 1,000 tokens in each contender by part, of one without a profile as a whole. Nothing
    is drawn without any profile."""
    bars = [
        (group["name"], row, parts(row))
        for group in result["groups"]
        for row in group["rows"]
        if "seconds" in row
    ]
    if all(mine is None for _, _, mine in bars):
        return
    # Not pyplot: a report must not switch the backend of a notebook that imports it.
    figure = Figure(figsize=(max(5.0, 1.4 * len(bars) + 2.5), 4.4))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    names = (*PARTS, TALK, REST) if result.get("devices", 1) > 1 else (*PARTS, REST)
    scale = [1e6 * result.get("devices", 1) / row["tokens"] for _, row, _ in bars]
    start = [0.0] * len(bars)
    for name in names:
        heights = [
            max(factor * mine[name], 0.0) if mine else 0.0
            for factor, (_, _, mine) in zip(scale, bars, strict=True)
        ]
        axis.bar(range(len(bars)), heights, 0.7, bottom=start, color=_COLOURS[name], label=name)
        start = [a + b for a, b in zip(start, heights, strict=True)]
    for i, (_, row, mine) in enumerate(bars):
        if mine is None:
            start[i] = scale[i] * row["seconds"]
            axis.bar(i, start[i], 0.7, facecolor="none", edgecolor="black", linewidth=0.8)
            axis.annotate("parts not known", (i, start[i] / 2), ha="center", fontsize=7)
        rate = row["tokens_per_second"] / result.get("devices", 1)
        text = f"{rate:,.0f} tokens/s\n{row['speedup']:.2f}x"
        axis.annotate(text, (i, start[i]), ha="center", va="bottom", fontsize=7)
    labels = [_label(result, group, row) for group, row, _ in bars]
    axis.set_xticks(range(len(bars)), labels, fontsize=7)
    axis.set_ylabel("ms for 1,000 tokens of a device")
    axis.set_ylim(0, 1.18 * max(start))
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8, bbox_to_anchor=(1.0, 1.0), loc="upper left")
    axis.set_title(
        f"{result['settings']['config']} on {_devices(result)}{_note(result)}",
        loc="left",
        fontsize=10,
    )
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
