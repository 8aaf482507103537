"""The command line: `python -m train.study NAME`."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from sparsejax.spec import Backend
from train.data.config import DataConfig
from train.runtime import reserve_memory
from train.study import definition
from train.study.definition import Run, Study
from train.study.devices import visible_gpus
from train.study.equal_time import Speedups, read_speedups
from train.study.export import export, reuse, unpack
from train.study.pool import sharers
from train.study.record import Folders, changes, read
from train.study.report import make_report, write_header
from train.study.runner import plan, run_study, select
from train.study.tuned import read_tuned
from train.version_check import require_jax


@dataclass(frozen=True)
class Arguments:
    """Runs the configurations of a study, skips what is done, and reports. The same command
    continues a study that stopped."""

    name: tyro.conf.Positional[str] = ""
    """Name of the study: a module in configs/studies/."""
    list: bool = False
    """Print the studies, or with a name its runs and what is done, and run nothing."""
    report: bool = False
    """Print and draw the report from the results that are there, and run nothing."""
    baseline: str | None = None
    """Label that the report compares with, instead of the study's own."""
    highlight: tuple[str, ...] = ()
    """Labels, or patterns of them, that the report's pictures show beside the baseline, instead of
    what they choose themselves."""
    output: Path | None = None
    """Folder of results and report; None is runs/studies/NAME."""
    scratch: Path | None = None
    """Folder of run folders, logs and compiled programs (large); None is OUTPUT/scratch."""
    only: tuple[str, ...] = ()
    """Labels to run, or patterns of them (relu2*); all when empty."""
    seeds: tuple[int, ...] = ()
    """Seeds, instead of the study's own."""
    base: str | None = None
    """Configuration to vary, instead of the study's own: a module in configs/."""
    backend: Backend | None = None
    """Kernels of the sparse phases, instead of the configuration's own."""
    budget_seconds: float | None = None
    """Start no run that would probably end later than this many seconds after the command began."""
    jobs: int = 1
    """Runs side by side, each in a process of its own, spread over the GPUs there are. Those that
    share a GPU have parts of its memory, and their speeds say nothing."""
    isolate: bool = False
    """A process for each run: survives kernels that crash, at the cost of a start-up each."""
    export: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """All results as one small file, to commit: written after each run, and read first, so that the
    file alone is enough to continue from or to report."""
    also: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE.json ...")] = ()
    """Exported results of the same study from elsewhere, read first as well: other machines' shares
    of its labels and seeds. With --report, --export joins them all in one file."""
    reuse: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="FILE.json ...")] = ()
    """Exported results of other studies: those of the same configuration and seed are taken over
    instead of run again."""
    replace: bool = False
    """Run again what has a result of another configuration, instead of refusing."""
    speedup: float | None = None
    """How many times as fast as a dense step a sparse one is, for the speed of whole runs."""
    speedup_from: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """The same from a measurement: a JSON object with `sparse_step_speedup`, a number or an object
    from label to number."""
    tuned: Annotated[Path | None, tyro.conf.arg(metavar="FILE.json")] = None
    """What a sweep found best for each form of the FFN, as `python -m train.study.tuned` writes it;
    comparisons start from there."""
    data: DataConfig = field(default_factory=DataConfig)
    """Training and validation text."""


INTERRUPTED = 130
"""Exit code of a command that a signal stopped, as shells have it for Ctrl-C."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the process's exit code: 1 if a run failed, 2 for a refused
    command line, 130 if a signal stopped it."""
    # A file has no width: tables need not fold there.
    console = Console() if sys.stdout.isatty() else Console(width=200)
    try:
        require_jax()
        arguments = tyro.cli(Arguments, args=argv, prog="python -m train.study")
        return run(arguments, console)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(arguments: Arguments, console: Console) -> int:
    """Does what the arguments ask for; returns the exit code."""
    if not arguments.name:
        if not arguments.list:
            known = ", ".join(definition.names())
            raise ValueError(f"which study? known: {known} (--list describes them)")
        _list_studies(console)
        return 0
    budget, began = arguments.budget_seconds, time.monotonic()
    if budget is not None and not budget > 0:
        raise ValueError(f"--budget-seconds {budget:g} must be positive")
    if arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs} must be at least 1")
    output = arguments.output or Path("runs") / "studies" / arguments.name
    speedups = _speedups(arguments)
    if arguments.report:
        _gather(arguments, output)
        if arguments.also and arguments.export is not None:
            export(output, arguments.export)
        make_report(
            output,
            console,
            speedups,
            baseline=arguments.baseline,
            highlight=arguments.highlight,
        )
        return 0
    folders = Folders(output, arguments.scratch or output / "scratch")
    options = definition.Options(
        arguments.base,
        arguments.backend,
        arguments.data,
        arguments.seeds,
        speedups,
        None if arguments.tuned is None else read_tuned(arguments.tuned),
    )
    study = definition.get(arguments.name, options)
    runs = select(study, arguments.only)
    if arguments.baseline is not None and arguments.baseline not in study.labels:
        raise ValueError(f"--baseline {arguments.baseline!r} is no label of {study.name!r}: --list")
    definition.matching(arguments.highlight, study.labels, "--highlight")
    _gather(arguments, output)
    for file in arguments.reuse:
        reuse(file, study, output)
    if arguments.list:
        _list_runs(study, runs, folders, console)
        return 0
    outcome = plan(study, runs, folders, replace=arguments.replace)
    write_header(output, study, speedups)
    gpus = visible_gpus() if arguments.jobs > 1 or arguments.isolate else []
    reserve_memory(sharers(arguments.jobs, len(gpus)))

    def save() -> None:
        if arguments.export is not None:
            export(output, arguments.export)

    run_study(
        study,
        outcome,
        folders,
        console=console,
        jobs=arguments.jobs,
        isolate=arguments.isolate,
        gpus=gpus,
        budget_seconds=budget,
        began=began,
        ended=save,
    )
    save()
    if outcome.done or outcome.failed:
        make_report(output, console, baseline=arguments.baseline, highlight=arguments.highlight)
    if outcome.failed:
        return 1
    return INTERRUPTED if outcome.interrupted else 0


def _gather(arguments: Arguments, output: Path) -> None:
    """Puts results of earlier calls, here and elsewhere, into the study's folder."""
    if arguments.export is not None:
        unpack(arguments.export, output)
    for file in arguments.also:
        if not file.is_file():
            raise ValueError(f"--also {file}: no such file")
        unpack(file, output)


def _speedups(arguments: Arguments) -> Speedups:
    if arguments.speedup_from is None:
        return Speedups(arguments.speedup)
    if arguments.speedup is not None:
        raise ValueError("give --speedup or --speedup-from, not both")
    return read_speedups(arguments.speedup_from)


def _list_studies(console: Console) -> None:
    table = Table(show_header=False, box=None)
    for name in definition.names():
        table.add_row(f"[bold]{name}[/bold]", definition.summary(name))
    console.print(table)


def _millions(tokens: int) -> str:
    """Millions of tokens: four digits, but never an exponent."""
    return f"{tokens / 1e6:,.4g}" if tokens < 10**10 else f"{tokens / 1e6:,.0f}"


def _list_runs(study: Study, runs: Sequence[Run], folders: Folders, console: Console) -> None:
    def state(run: Run) -> str:
        record = read(folders.result(run))
        if record is None:
            return "to do"
        if record["status"] == "failed":
            return "failed"
        if changes(record, run):
            return "of another configuration"
        return "done" if record["status"] == "finished" else "not finite"

    study.validate()
    table = Table(title=f"{study.name}: {study.question}", title_justify="left")
    for heading in ("label", "seeds", "steps", "M tokens", "sparse steps", "state"):
        left = heading in ("label", "state")
        # In a narrow terminal a long label takes several lines, so that no number is cut off.
        table.add_column(heading, justify="left" if left else "right", no_wrap=heading != "label")
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    for label, group in groups.items():
        config = group[0].config
        counts = Counter(map(state, group))
        table.add_row(
            label,
            str(len(group)),
            str(config.steps),
            f"{group[0].tokens / 1e6:.3g}",
            str(config.sparse_steps),
            ", ".join(f"{count} {name}" for name, count in counts.items()),
        )
    console.print(table)
    tokens = sum(run.tokens for run in runs)
    console.print(f"{len(runs)} runs, {_millions(tokens)} M tokens", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
