"""Runs a study: one run after another, past failures, with the time that is left.

Runs share this process by default. What they would gain from a process each (a kernel's crash stays
alone, memory starts afresh) is worth less than the start-up of the accelerator and of JAX, tens of
seconds beside runs of a minute; `isolate` buys it where kernels are young. Compiled programs are
kept on disk, so that neither way compiles twice what seeds share.

A half-finished run starts over: its curve and speed then come from one process and one device, and
a checkpoint of every minute would cost more than it saves.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import multiprocessing
import signal
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from train.determinism import make_deterministic
from train.metrics import duration
from train.signals import StopRequest
from train.study.definition import Run, Study
from train.study.execute import device_answers, execute
from train.study.record import FORMAT, Folders, Record, config_hash, differences, read, write


@dataclass
class Outcome:
    """What came of the runs asked for.

    Attributes:
      done: results of runs that came to their end, finite or not; earlier ones included.
      failed: results of runs that raised an error.
      left: runs that still have to be run.
      stopped: why not all were run; None if all were.
    """

    done: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)
    left: list[Run] = field(default_factory=list)
    stopped: str | None = None


def select(study: Study, only: Sequence[str]) -> list[Run]:
    """The runs whose label is, or matches the pattern of, one of `only`; all if that is empty.

    Raises:
      ValueError: one of them matches no label.
    """
    wanted: set[str] = set()
    for pattern in only:
        found = {label for label in study.labels if label == pattern}
        found = found or set(fnmatch.filter(study.labels, pattern))
        if not found:
            raise ValueError(
                f"--only {pattern!r} matches no label of study {study.name!r}: "
                f"{', '.join(study.labels)}"
            )
        wanted |= found
    return [run for run in study.runs if not only or run.label in wanted]


def expected_seconds(run: Run, records: Iterable[Record]) -> float | None:
    """How long a run will take, from finished ones: of its label, or of any; None without any."""
    finished = [r for r in records if r["status"] == "finished"]
    alike = [r for r in finished if r["label"] == run.label] or finished
    if not alike:
        return None
    return run.tokens * sum(r["wall_seconds"] for r in alike) / sum(r["tokens"] for r in alike)


def plan(study: Study, runs: Sequence[Run], folders: Folders, *, replace: bool = False) -> Outcome:
    """What is done and what is left; runs nothing and changes nothing.

    Args:
      study: what the runs belong to.
      runs: the runs wanted, in order.
      folders: where results are.
      replace: leave to run what has a result of another configuration, instead of refusing.

    Raises:
      ValueError: a configuration that cannot run, an unreadable result file, or one made with
        another configuration.
    """
    study.validate()
    outcome = Outcome()
    for run in runs:
        path = folders.result(run)
        record = read(path)
        if record is None or record["status"] == "failed":
            outcome.left.append(run)
        elif not (changed := differences(record["config"], run.config)):
            outcome.done.append(record)
        elif replace:
            outcome.left.append(run)
        else:
            # Perhaps an option was forgotten: hours of results are not lightly thrown away.
            raise ValueError(
                f"{path} was made with another configuration ({'; '.join(changed)}): run it again "
                "with --replace, or give another --output"
            )
    return outcome


def run_study(
    study: Study,
    outcome: Outcome,
    folders: Folders,
    *,
    console: Console,
    isolate: bool = False,
    max_minutes: float | None = None,
) -> None:
    """Runs what is left.

    Args:
      study: what the runs belong to.
      outcome: what `plan` returned; what comes of the runs is entered. Errors of single runs are
        in there too, not raised.
      folders: where results go.
      console: where progress is printed.
      isolate: a process for each run.
      max_minutes: start no run that would probably end later than this; the first one starts
        whatever is expected of it.

    Raises:
      OSError: results cannot be written.
    """
    if any(run.config.deterministic for run in outcome.left):
        make_deterministic(folders.scratch)
    total = len(outcome.left)
    skipped = f", {len(outcome.done)} done before" if outcome.done else ""
    console.print(f"[bold]{study.name}[/bold]: {total} runs to do{skipped}", highlight=False)
    began = time.monotonic()
    while outcome.left:
        run = outcome.left[0]
        elapsed = time.monotonic() - began
        number = total - len(outcome.left) + 1
        expected = expected_seconds(run, outcome.done)
        if max_minutes is not None and number > 1 and elapsed + (expected or 0) > 60 * max_minutes:
            outcome.stopped = f"the next run would end after --max-minutes {max_minutes:g}"
            break
        title = f"[{number}/{total}] {run.label}, seed {run.seed}"
        try:
            record = _one(run, study.name, folders, console, title, isolate)
        except KeyboardInterrupt:
            record = None
        if record is None:
            outcome.stopped = f"{run.key} was interrupted and will start over"
            break
        outcome.left.pop(0)
        (outcome.failed if record["status"] == "failed" else outcome.done).append(record)
        _print_end(console, title, record, outcome, folders.log(run))
        if record["status"] == "failed" and not isolate and not device_answers():
            outcome.stopped = "the device no longer answers in this process; --isolate survives it"
            break
    if outcome.stopped and outcome.left:
        text = f"stopped: {outcome.stopped}; {len(outcome.left)} runs left for the same command"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _one(
    run: Run, study: str, folders: Folders, console: Console, title: str, isolate: bool
) -> Record | None:
    if isolate:
        with console.status(title):
            return _isolated(run, study, folders)
    with console.status(title) as status:
        return execute(run, study, folders, lambda line: status.update(f"{title}  [dim]{line}"))


def _isolated(run: Run, study: str, folders: Folders) -> Record | None:
    folders.result(run).unlink(missing_ok=True)
    began = time.monotonic()
    # Spawned: a fork would inherit threads of JAX and of the data pipeline.
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=execute, args=(run, study, folders))
    process.start()
    with StopRequest() as stop:
        while process.is_alive():
            process.join(0.2)
            if stop.requested:
                process.terminate()  # its own handler ends it after the step at hand
                process.join()
    record = read(folders.result(run))
    if record is None and process.exitcode and not stop.requested:
        code = process.exitcode
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        record = _died(run, study, cause, time.monotonic() - began)
        write(folders.result(run), record)
    return record


def _died(run: Run, study: str, cause: str, seconds: float) -> Record:
    """The record of a run whose process left none."""
    return {
        "format": FORMAT,
        "study": study,
        "label": run.label,
        "seed": run.seed,
        "factors": dict(run.factors),
        "status": "failed",
        "error": f"its process died: {cause}",
        "hash": config_hash(run.config),
        "config": dataclasses.asdict(run.config),
        "wall_seconds": seconds,
        "tokens": run.tokens,
    }


def _print_end(console: Console, title: str, record: Record, outcome: Outcome, log: object) -> None:
    if record["status"] == "finished":
        losses = "  ".join(
            f"{view.removeprefix('loss_')} {loss:.4f}" for view, loss in record["final"].items()
        )
        text = f"{title}  {losses}"
    else:
        text = f"{title}  {record['status'].replace('_', '-')}: {record['error']} (log: {log})"
    text += f"  {duration(record['wall_seconds'])}"
    left = [expected_seconds(run, outcome.done) for run in outcome.left]
    known = [seconds for seconds in left if seconds is not None]
    if known and len(known) == len(left):
        text += f"  eta {duration(sum(known))}"
    console.print(text, highlight=False, markup=False, soft_wrap=True)
