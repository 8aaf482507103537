"""Weak scaling drawn from results of the step benchmark: tokens/s of a GPU over the number of GPUs.

    python -m benchmarks.scaling_plot OUT.png RESULT.json ...

Results of one configuration make two lines, dense and sparse. A result's own runs on fewer GPUs
(`--scaling`, `--baseline`) count too, where no result of its own is given for as many.
"""

from __future__ import annotations

import argparse
import collections
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks.train_step_scaling import read_baseline
from train.plots import INK, MUTED, new_figure

Lines = dict[tuple[str, str], dict[int, float]]
"""By configuration and phase: devices to tokens/s of one of them."""
_COLOURS = {"dense": "#0072b2", "sparse": "#d55e00"}
_MARKERS = ("o", "s", "^", "D")


def _points(run: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The first timed row of each phase."""
    seen = set()
    for group in run["groups"]:
        for row in group["rows"]:
            if "tokens_per_second" in row and row["phase"] not in seen:
                seen.add(row["phase"])
                yield row["phase"], row["tokens_per_second"] / run["devices"]


def lines(files: Sequence[pathlib.Path]) -> Lines:
    """What the results say, fewer devices first.

    Raises:
      ValueError: a file is no result with timed steps.
    """
    found: Lines = collections.defaultdict(dict)
    others: list[dict[str, Any]] = []
    for file in files:
        own, *within = read_baseline(file)
        others += within
        for phase, rate in _points(own):
            found[own["config"], phase][own["devices"]] = rate
    for run in others:
        for phase, rate in _points(run):
            found[run["config"], phase].setdefault(run["devices"], rate)
    return {key: dict(sorted(points.items())) for key, points in found.items()}


def draw(found: Lines, file: pathlib.Path) -> None:
    """A line for each configuration and phase, with the efficiency against its fewest devices."""
    figure, axes = new_figure(6.4, 4.2)
    names = list(dict.fromkeys(config for config, _ in found))
    for (config, phase), points in found.items():
        devices, rates = list(points), list(points.values())
        marker = _MARKERS[names.index(config) % len(_MARKERS)]
        colour = _COLOURS.get(phase, INK)
        axes.plot(devices, rates, color=colour, marker=marker, label=f"{config}, {phase}")
        for count, rate in list(points.items())[1:]:
            axes.annotate(
                f"{rate / rates[0]:.1%}",
                (count, rate),
                xytext=(0, 6),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                color=MUTED,
            )
    counts = sorted({count for points in found.values() for count in points})
    axes.set_xscale("log", base=2)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.margins(x=0.15)
    axes.set_ylim(0, 1.15 * max(max(points.values()) for points in found.values()))
    axes.set_xlabel("GPUs", color=INK)
    axes.set_ylabel("tokens/s of a GPU", color=INK)
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the process's exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling_plot", description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("results", type=pathlib.Path, nargs="+")
    arguments = parser.parse_args(argv)
    try:
        draw(lines(arguments.results), arguments.out)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
