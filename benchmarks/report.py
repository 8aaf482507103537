"""What the GEMM benchmark shows: summary figures, one table on the console, a plot."""

from __future__ import annotations

import math
import pathlib
import statistics
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Row = dict[str, Any]

UNSTEADY = 1.5
"""Slowest over fastest sample from which a contender is called unsteady."""

_COLOURS = {
    "xla dense": "#9aa0a6",
    "cusparselt": "#e8a33d",
    "triton": "#5b8def",
    "hopper": "#1b9e77",
    "reference": "#b07aa1",
    "xla dense fp8": "#5f6368",
    "hopper fp8": "#0b5d43",
    "reference fp8": "#6b4a63",
}


def _rivals(contender: str) -> tuple[str, ...]:
    """Whom a contender is compared with in the summary."""
    if contender == "xla dense fp8":
        return ("xla dense",)
    if contender.endswith(" fp8"):
        return ("xla dense fp8", contender.removesuffix(" fp8"), "xla dense")
    return ("xla dense", "cusparselt")


def _vendor(contender: str) -> str:
    """One name for both forms of cuSPARSELt."""
    return "cusparselt" if contender.startswith("cusparselt") else contender


def best(rows: list[Row]) -> dict[tuple[str, str], dict[str, Row]]:
    """Timed rows by (product, data) and contender; of cuSPARSELt's two forms the faster one."""
    groups: dict[tuple[str, str], dict[str, Row]] = {}
    for row in rows:
        if "ms" not in row:
            continue
        group = groups.setdefault((f"{row['model']} {row['kind']}", row["data"]), {})
        name = _vendor(row["contender"])
        if name not in group or row["ms"] < group[name]["ms"]:
            group[name] = row
    return groups


def summary(rows: list[Row], packing: list[Row]) -> Row:
    """Speed-ups over each rival by backend and data, and shares of the copy bandwidth."""
    groups = best(rows)
    found: Row = {}
    backends = sorted({r["contender"] for r in rows if r["contender"] in _COLOURS})
    for backend in backends:
        for rival in _rivals(backend):
            for data in sorted({data for _, data in groups}):
                ratios = [
                    g[rival]["ms"] / g[backend]["ms"]
                    for (_, d), g in groups.items()
                    if d == data and rival in g and backend in g
                ]
                if not ratios or backend in (rival, "xla dense", "cusparselt"):
                    continue
                found[f"{backend} over {rival}, {data} data"] = {
                    "geometric_mean": math.exp(statistics.mean(map(math.log, ratios))),
                    "least": min(ratios),
                    "products": len(ratios),
                }
        mine = [r.get("share_of_copy") for r in packing if r["contender"] == backend]
        shares = [share for share in mine if share is not None]
        if shares:
            found[f"{backend} packing, share of copy bandwidth"] = {
                "median": statistics.median(shares),
                "least": min(shares),
            }
    return found


def unsteady(rows: list[Row]) -> list[str]:
    """Contenders whose slowest sample took half as long again as their fastest, or longer.

    Something else ran, or the host did not keep up with the device: a ratio with such a median in
    it is not a figure of the kernel.
    """
    found = []
    for row in rows:
        low, high = min(row.get("rounds_ms", [1])), max(row.get("rounds_ms", [1]))
        if high >= UNSTEADY * low:
            parts = [row.get(key) for key in ("name", "model", "kind", "data", "contender")]
            what = " ".join(part for part in parts if part)
            found.append(f"{what}: samples from {low:.3f} to {high:.3f} ms")
    return found


def _contenders(result: Row) -> list[str]:
    rows = result["products"] + result["packing"]
    present = {_vendor(r["contender"]) for r in rows}
    return [name for name in _COLOURS if name in present]


def _title(result: Row) -> str:
    device = result["device"]["kind"]
    note = ": a smoke test, its times say nothing about speed" if result["smoke"] else ""
    return f"2:4 products on {device}{note}"


def _bound_ms(group: dict[str, Row], *, in_8_bits: bool) -> float | None:
    """Least time of the 2:4 product in one precision: the largest bound, without the dense one."""
    for name, row in group.items():
        if name.endswith("fp8") == in_8_bits:
            known = [v for k, v in row["bounds_ms"].items() if k != "dense" and v is not None]
            return max(known) if known else None
    return None


def _packing_cell(row: Row) -> str:
    if "ms" not in row:
        return "-"
    share = row["share_of_copy"]
    rate = f"{row['bytes_per_second'] / 1e12:.2f} TB/s" if share is None else f"{share:.0%} copy"
    return f"{1e3 * row['ms']:.0f} µs {rate}"


def table(result: Row, console: Console | None = None) -> None:
    """Prints products (ms, speed-up over dense) and packing (µs, share of the copy bandwidth)."""
    names = _contenders(result)
    view = Table(title=_title(result), title_justify="left", caption_justify="left")
    for heading in ("product", "data", "m, n, k"):
        view.add_column(heading)
    for name in names:
        view.add_column(name, justify="right")
    view.add_column("16-bit bound", justify="right")
    for (product, data), group in best(result["products"]).items():
        some = next(iter(group.values()))
        cells = [product, data, f"{some['m']}, {some['n']}, {some['k']}"]
        for name in names:
            row = group.get(name)
            cells.append(
                "-" if row is None else f"{row['ms']:.3f} ms {row['speedup_over_dense']:.2f}x"
            )
        bound = _bound_ms(group, in_8_bits=False)
        cells.append("-" if bound is None else f"{bound:.3f} ms")
        view.add_row(*cells)
    view.add_section()
    packings = list(dict.fromkeys(row["name"] for row in result["packing"]))
    for packing in packings:
        rows = {r["contender"]: r for r in result["packing"] if r["name"] == packing}
        some = next(iter(rows.values()))
        cells = [
            f"pack {packing}",
            f"{some['dtype']}, axis {some['axis']}",
            f"{some['rows']} x {some['cols']}",
        ]
        for name in names:
            row = rows.get(name, {})
            cells.append(_packing_cell(row))
        view.add_row(*cells, "-")
    copied = result["copy_bytes_per_second"]
    lines = ["copy: no baseline" if copied is None else f"copy {copied / 1e12:.2f} TB/s"]
    for name, figures in result["summary"].items():
        values = ", ".join(f"{k.replace('_', ' ')} {v:.3g}" for k, v in figures.items())
        lines.append(f"{name}: {values}")
    for model, facts in result["capture"].items():
        lines.append(
            f"{model} captured after {facts['steps']} steps, loss {facts['first_loss']:.2f} to "
            f"{facts['last_loss']:.2f}, {facts['active_share']:.0%} of neurons active"
        )
    lines += [f"unsteady: {line}" for line in result["unsteady"]]
    view.caption = "\n".join(lines)
    (console or Console(width=200)).print(view)


def plot(result: Row, file: pathlib.Path) -> None:
    """Effective TFLOP/s of every product and contender, one panel for each kind of data.

    A line over a product's bars is the bound of its 2:4 form in the precision of those bars.

    Nothing is drawn where nothing was timed.
    """
    groups = best(result["products"])
    if not groups:
        return
    datasets = sorted({data for _, data in groups}, reverse=True)
    names = [n for n in _contenders(result) if any(n in g for g in groups.values())]
    # Not pyplot: a report must not switch the backend of a notebook that imports it.
    # Wide enough that the figures over neighbouring bars do not touch.
    bars_in_all = len(names) * len({product for product, _ in groups})
    figure = Figure(figsize=(max(8, 0.4 * bars_in_all), 4 * len(datasets)))
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(datasets), 1, sharey=True, squeeze=False)
    for axis, data in zip(axes[:, 0], datasets, strict=True):
        products = [p for p, d in groups if d == data]
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            rates = [
                groups[p, data].get(name, {}).get("effective_tflops", math.nan) for p in products
            ]
            places = [j + (i - (len(names) - 1) / 2) * width for j in range(len(products))]
            bars = axis.bar(places, rates, width * 0.92, color=_COLOURS[name], label=name)
            for bar, product in zip(bars, products, strict=True):
                speedup = groups[product, data].get(name, {}).get("speedup_over_dense")
                if speedup is not None and name != "xla dense":
                    axis.annotate(
                        f"{speedup:.2f}x",
                        (bar.get_x() + bar.get_width() / 2, bar.get_height()),
                        ha="center",
                        va="bottom",
                        fontsize=6.5,
                    )
        for j, product in enumerate(products):
            for in_8_bits in (False, True):
                bound = _bound_ms(groups[product, data], in_8_bits=in_8_bits)
                bars = [i for i, name in enumerate(names) if name.endswith("fp8") == in_8_bits]
                if bound is None or not bars:
                    continue
                some = next(iter(groups[product, data].values()))
                rate = 2.0 * some["m"] * some["n"] * some["k"] / bound / 1e9
                left, right = (j + (i - len(names) / 2) * width for i in (min(bars), max(bars) + 1))
                label = "bound of 2:4" if j == 0 and not in_8_bits else None
                axis.hlines(rate, left, right, colors="black", lw=1, label=label)
        axis.set_xticks(range(len(products)), [p.replace(" ", "\n") for p in products])
        axis.set_title(f"{data} data", loc="left", fontsize=10)
        axis.set_ylabel("effective TFLOP/s")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(frameon=False, ncols=len(names) + 1, fontsize=8, loc="upper left",
                      bbox_to_anchor=(0, 1.25))  # fmt: skip
    figure.suptitle(_title(result), x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
