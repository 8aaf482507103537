"""The report of a study, drawn from its result files alone: a table, Markdown, pictures."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from train.study import figures, seeds
from train.study.definition import Axis, Study, matching
from train.study.equal_time import Speedups, whole_run_speedup
from train.study.export import HEADER
from train.study.record import FORMAT, Record, read, read_all, write
from train.study.statistics import Paired, Sample, held_out_error, paired, sample

REPORT = "report.md"


@dataclass(frozen=True)
class Header:
    """What a report knows about a study besides its results; study.json in the results' folder.

    Attributes:
      name, question, baseline, axes: as in `Study`.
      labels: in the order of the table; labels of results that are not among them come last.
      speedups: of a sparse step, for the speed of whole runs.
    """

    name: str
    question: str
    baseline: str | None
    axes: tuple[Axis, ...]
    labels: tuple[str, ...]
    speedups: Speedups


@dataclass(frozen=True)
class Row:
    """A label's results.

    Attributes:
      label: the label.
      factors: what it sets.
      losses: final held-out loss (nats a token, dense view) by seed, of runs that ended finite.
      dense, best, sparse: final dense, best dense and final sparse view over the seeds; None
        without any.
      paired: dense view against the baseline.
      held_out_se: standard error of that difference over held-out batches; NaN where unknown.
      tokens: of one run.
      sparse_share: share of its steps that were sparse.
      step_speedup: sparse step against dense step, measured in the same runs; NaN where unknown.
      run_speedup: baseline's time over this run's by the given speed-ups; NaN where unknown.
      tokens_per_second: by phase, mean over the seeds.
      wall_seconds: of a run, compilation and evaluation included, mean over the seeds.
      non_finite: runs whose loss or gradient stopped being finite.
      failed: runs that raised an error.
    """

    label: str
    factors: Mapping[str, Any]
    losses: Mapping[int, float]
    dense: Sample | None
    best: Sample | None
    sparse: Sample | None
    paired: Paired | None
    held_out_se: float
    tokens: int
    sparse_share: float
    step_speedup: float
    run_speedup: float
    tokens_per_second: Mapping[str, float]
    wall_seconds: float
    non_finite: int
    failed: int


def write_header(output: Path, study: Study, speedups: Speedups) -> None:
    """Writes study.json; speed-ups that an earlier one knows stay, unless there are new ones."""
    if not speedups.known and read(output / HEADER) is not None:
        speedups = read_header(output).speedups
    content = {
        "format": FORMAT,
        "name": study.name,
        "question": study.question,
        "baseline": study.baseline,
        "axes": [dataclasses.asdict(axis) for axis in study.axes],
        "labels": study.labels,
        "speedups": {"default": speedups.default, "by_label": dict(speedups.by_label)},
    }
    write(output / HEADER, content)


def read_header(output: Path) -> Header:
    """Reads study.json.

    Raises:
      ValueError: there is none, or it is none of this format.
    """
    found = read(output / HEADER)
    if found is None:
        raise ValueError(f"{output} holds no results: there is no {HEADER} in it")
    return Header(
        found["name"],
        found["question"],
        found["baseline"],
        tuple(Axis(**axis) for axis in found["axes"]),
        tuple(found["labels"]),
        Speedups(**found["speedups"]),
    )


def make_report(
    output: Path,
    console: Console,
    speedups: Speedups | None = None,
    *,
    baseline: str | None = None,
    highlight: Sequence[str] = (),
) -> list[Row]:
    """Prints the table and writes report.md and the pictures into the results' folder.

    Args:
      output: the folder.
      console: where the table is printed.
      speedups: replace those in study.json.
      baseline: the label to compare with, instead of the one in study.json.
      highlight: labels, or patterns of them, that the pictures of curves and of the front show
        beside the baseline, instead of what those choose themselves.

    Returns:
      The table's rows.

    Raises:
      ValueError: no results, or unreadable ones, a baseline that no label is, or a pattern that
        matches none.
    """
    header = read_header(output)
    if speedups is not None and speedups.known:
        header = dataclasses.replace(header, speedups=speedups)
    records = read_all(output)
    if not records:
        raise ValueError(f"{output} holds no results yet")
    # Some of the study's labels may have runs that are still to be done.
    labels = list(dict.fromkeys((*header.labels, *(record["label"] for record in records))))
    marked = matching(highlight, labels, "--highlight")
    if baseline is not None:
        if baseline not in labels:
            raise ValueError(f"{baseline=} is no label of study {header.name!r}")
        header = dataclasses.replace(header, baseline=baseline)
    rows = summarise(header, records)
    console.print(_console_table(header, rows))
    notes = remarks(header, records)
    for note in notes:
        console.print(f"[yellow]note[/yellow] {note}", highlight=False)
    pictures = _draw(output, header, rows, records, marked)
    text = markdown(header, rows, records, notes, pictures)
    (output / REPORT).write_text(text, encoding="utf-8")
    console.print(f"report: {output / REPORT}", highlight=False, soft_wrap=True)
    return rows


def summarise(header: Header, records: Sequence[Record]) -> list[Row]:
    """A row for every label that has a result, the study's order first."""
    found = dict.fromkeys(r["label"] for r in records)
    labels = [label for label in header.labels if label in found]
    labels += [label for label in found if label not in labels]
    groups = {label: [r for r in records if r["label"] == label] for label in labels}
    reference = groups.get(header.baseline or "", [])
    return [_row(label, groups[label], reference, header) for label in labels]


def _row(label: str, group: list[Record], reference: list[Record], header: Header) -> Row:
    finished = [r for r in group if r["status"] == "finished"]
    shown = (finished or group)[0]
    final = lambda records, view: {
        r["seed"]: r["final"][view]
        for r in records
        if r["status"] == "finished" and r["final"].get(view) is not None
    }
    batches = lambda records: {
        r["seed"]: r["final_batches"]
        for r in records
        if r["status"] == "finished" and r.get("final_batches")
    }
    dense, sparse = final(group, "loss_dense"), list(final(group, "loss_sparse").values())
    best = [r["best"]["loss_dense"]["loss"] for r in finished if "loss_dense" in r["best"]]
    rates: dict[str, float] = {}
    for phase in ("dense", "sparse"):
        seen = [r["phases"][phase]["step_seconds"] for r in finished if phase in r["phases"]]
        if seen:
            rates[phase] = _tokens_per_step(shown) / _mean(seen)
    compare = label != header.baseline and bool(reference)
    return Row(
        label=label,
        factors=shown["factors"],
        losses=dense,
        dense=_sample(list(dense.values())),
        best=_sample(best),
        sparse=_sample(sparse),
        paired=paired(dense, final(reference, "loss_dense")) if compare else None,
        held_out_se=held_out_error(batches(group), batches(reference)) if compare else math.nan,
        tokens=shown["tokens"],
        sparse_share=_sparse_share(shown),
        step_speedup=rates["sparse"] / rates["dense"] if len(rates) == 2 else math.nan,
        run_speedup=_run_speedup(label, shown, reference, header),
        tokens_per_second=rates,
        wall_seconds=_mean([r["wall_seconds"] for r in finished]) if finished else math.nan,
        non_finite=sum(r["status"] == "non_finite" for r in group),
        failed=sum(r["status"] == "failed" for r in group),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _sample(losses: Sequence[float]) -> Sample | None:
    return sample(losses) if losses else None


def _tokens_per_step(record: Record) -> int:
    return record["config"]["batch_size"] * record["config"]["sequence_length"]


def _sparse_share(record: Record) -> float:
    steps = record["config"]["steps"]
    return round(record["config"]["schedule"]["sparse_fraction"] * steps) / steps


def _run_speedup(label: str, record: Record, reference: list[Record], header: Header) -> float:
    """The baseline's time over this run's; without a baseline, over a dense run of its tokens."""

    def time(label: str, record: Record) -> float:
        share, speedup = _sparse_share(record), header.speedups.of(label)
        if not share:
            return record["tokens"]
        return record["tokens"] / whole_run_speedup(share, speedup) if speedup else math.nan

    if not header.speedups.known:
        return math.nan
    base = time(header.baseline or "", reference[0]) if reference else record["tokens"]
    return base / time(label, record)


def remarks(header: Header, records: Sequence[Record]) -> list[str]:
    """What stands in the way of a fair comparison."""
    notes = []
    good = [r for r in records if r["status"] == "finished"]
    for name, value in (
        ("training data", lambda r: r["data"]["fingerprint"][:12]),
        ("numbers of held-out windows", lambda r: str(r["data"]["evaluated_windows"])),
        ("devices", lambda r: f"{r['device']['count']} x {r['device']['kind']}"),
        ("numbers of runs side by side", lambda r: str(r.get("jobs", 1))),
        ("JAX versions", lambda r: r["versions"]["jax"]),
        ("commits", lambda r: r["versions"].get("commit", "unknown")),
    ):
        seen = sorted({value(r) for r in good})
        if len(seen) > 1:
            few = ", ".join(seen[:4]) + (f" and {len(seen) - 4} more" if len(seen) > 4 else "")
            notes.append(f"results come from different {name}: {few}")
    # A run of one epoch and a few steps repeats nothing to speak of.
    if repeated := sorted({r["label"] for r in good if r["data"]["epochs"] > 1.005}):
        most = max(r["data"]["epochs"] for r in good)
        notes.append(f"training data repeat up to {most:.1f} times in: {', '.join(repeated)}")
    if (crowded := max((r.get("jobs", 1) for r in good), default=1)) > 1:
        notes.append(
            f"up to {crowded} runs shared the device: their tokens/s and seconds are not speeds"
        )
    if header.baseline is not None and good:
        base = {r["seed"] for r in good if r["label"] == header.baseline}
        if not base:
            notes.append(f"the baseline {header.baseline!r} has no results: nothing is compared")
        lonely = sorted({r["label"] for r in good if r["seed"] not in base})
        if base and lonely:
            notes.append(
                f"seeds without a run of the baseline are not compared: {', '.join(lonely)}"
            )
    for record in records:
        if record["status"] != "finished":
            status = record["status"].replace("_", "-")
            notes.append(f"{record['label']}, seed {record['seed']}: {status}: {record['error']}")
    return notes


def _number(value: float | None, spec: str = ".4f") -> str:
    return "" if value is None or math.isnan(value) else format(value, spec)


def _spread(value: Sample | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.4f}" + ("" if math.isnan(value.sd) else f" ± {value.sd:.4f}")


def _sd_interval(value: Sample | None) -> str:
    if value is None or math.isnan(value.sd):
        return ""
    return f"{value.sd_low:.4f} to {value.sd_high:.4f}"


def _difference(value: Paired | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:+.4f}" + ("" if math.isnan(value.se) else f" ± {value.se:.4f}")


def _interval(value: Paired | None) -> str:
    if value is None or math.isnan(value.se):
        return ""
    return f"{value.low:+.4f} to {value.high:+.4f}"


_Column = tuple[str, Callable[[Row], str], bool]
# Heading, text, and whether the console shows it as well.
_COLUMNS: tuple[_Column, ...] = (
    ("label", lambda r: r.label, True),
    ("seeds", lambda r: str(len(r.losses)), True),
    ("held-out loss ± sd", lambda r: _spread(r.dense), True),
    ("95% of sd", lambda r: _sd_interval(r.dense), False),
    ("difference ± se", lambda r: _difference(r.paired), True),
    ("95% of difference", lambda r: _interval(r.paired), True),
    ("held-out se", lambda r: _number(r.held_out_se), False),
    ("relative", lambda r: f"{100 * r.paired.relative:+.2f}%" if r.paired else "", True),
    ("sparse view ± sd", lambda r: _spread(r.sparse), False),
    ("best loss", lambda r: f"{r.best.mean:.4f}" if r.best else "", False),
    ("M tokens", lambda r: f"{r.tokens / 1e6:.3g}", True),
    ("sparse share", lambda r: f"{r.sparse_share:.0%}" if r.sparse_share else "", False),
    ("run speed-up", lambda r: _number(r.run_speedup, ".3f"), True),
    ("step speed-up here", lambda r: _number(r.step_speedup, ".3f"), False),
    ("dense tokens/s", lambda r: _number(r.tokens_per_second.get("dense"), ",.0f"), False),
    ("sparse tokens/s", lambda r: _number(r.tokens_per_second.get("sparse"), ",.0f"), False),
    ("seconds a run", lambda r: _number(r.wall_seconds, ".0f"), False),
    ("non-finite", lambda r: str(r.non_finite or ""), True),
    ("failed", lambda r: str(r.failed or ""), True),
)


def _filled(rows: Sequence[Row], everything: bool) -> list[_Column]:
    return [c for c in _COLUMNS if (everything or c[2]) and any(c[1](row) for row in rows)]


def _console_table(header: Header, rows: Sequence[Row]) -> Table:
    table = Table(title=f"{header.name}: {header.question}", title_justify="left")
    columns = _filled(rows, everything=False)
    if len({row.tokens for row in rows}) == 1:
        columns = [column for column in columns if column[0] != "M tokens"]
    for heading, _, _ in columns:
        table.add_column(heading, justify="left" if heading == "label" else "right")
    for row in rows:
        style = "bold" if row.label == header.baseline else None
        table.add_row(*(text(row) for _, text, _ in columns), style=style)
    return table


def markdown(
    header: Header,
    rows: Sequence[Row],
    records: Sequence[Record],
    notes: Sequence[str],
    pictures: Mapping[str, str],
) -> str:
    """The report as Markdown.

    Args:
      header: the study.
      rows: its table.
      records: the results.
      notes: what stands in the way of a fair comparison.
      pictures: file name to description.
    """
    columns = _filled(rows, everything=True)
    lines = [f"# {header.name}", "", header.question, ""]
    lines.append("| " + " | ".join(heading for heading, _, _ in columns) + " |")
    lines.append("| --- |" + " ---: |" * (len(columns) - 1))
    for row in rows:
        cells = [text(row).replace("|", "\\|") for _, text, _ in columns]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", *_explanation(header, records), ""]
    if found := seeds.timings(records):
        lines += ["## Seeds", "", *(f"* {seeds.describe(timing)}" for timing in found), ""]
    if notes:
        lines += ["## Notes", "", *(f"* {note}" for note in notes), ""]
    for name, description in pictures.items():
        lines += [f"![{description}]({name})", ""]
    return "\n".join(lines)


def _explanation(header: Header, records: Sequence[Record]) -> list[str]:
    good = [r for r in records if r["status"] == "finished"]
    several = lambda value: ", ".join(sorted({value(r) for r in good}))
    lines = [
        "Losses are in nats a token on held-out text, of the dense view at the end of the run; sd "
        "is the standard deviation over seeds."
    ]
    if header.baseline is not None:
        lines.append(
            f"Differences are to **{header.baseline}**, paired by seed, with their standard error "
            "and 95% interval by Student's t. The held-out se is what the choice of the held-out "
            "text adds: the standard error of the difference over batches of it."
        )
    if header.speedups.known:
        given = [] if header.speedups.default is None else [f"{header.speedups.default:g}"]
        given += [f"{label} {s:g}" for label, s in header.speedups.by_label.items() if s]
        lines.append(
            "The run speed-up is the baseline's time over the run's, with a sparse step as many "
            f"times as fast as a dense one as measured elsewhere: {', '.join(given)}. Dense steps "
            "of all labels count alike."
        )
    if good:
        windows = several(lambda r: f"{r['data']['evaluated_windows']} windows")
        tokens = several(lambda r: f"{r['data']['evaluated_tokens']:,}")
        lines.append(
            f"Evaluated on the first {windows} ({tokens} tokens). Device: "
            f"{several(lambda r: str(r['device']['count']) + ' x ' + r['device']['kind'])}; JAX "
            f"{several(lambda r: r['versions']['jax'])}; body parameters "
            f"{several(lambda r: format(r['model']['body_parameters'], ','))}."
        )
    return lines


def _draw(
    output: Path,
    header: Header,
    rows: Sequence[Row],
    records: Sequence[Record],
    marked: set[str],
) -> dict[str, str]:
    pictures: dict[str, str] = {}
    shown = [row for row in rows if row.dense is not None]
    if not shown:
        return pictures

    def draw(name: str, description: str, drawn: bool) -> None:
        if drawn:
            pictures[name] = description
        else:
            (output / name).unlink(missing_ok=True)

    curves = figures.curves(output / "curves.png", shown, records, header.baseline, marked)
    draw("curves.png", "loss against training", curves)
    final = figures.final_losses(output / "final_loss.png", shown, header.baseline)
    draw("final_loss.png", "final losses and their differences to the baseline", final)
    for axis in header.axes:
        name = f"sweep_{axis.factor}.png"
        swept = figures.sweep(output / name, shown, axis, header.baseline)
        draw(name, f"final loss against {axis.factor}", swept)
    known = any(not math.isnan(row.run_speedup) for row in shown)
    drawn = known and figures.pareto(output / "pareto.png", shown, header.baseline, marked)
    draw("pareto.png", "final loss against the speed of the whole run", drawn)
    return pictures
