"""Runs a study: one run after another, or several side by side, past failures, with the time that
is left.

Runs share this process by default. What they would gain from a process each (a kernel's crash stays
alone, memory starts afresh) is worth less than the start-up of the accelerator and of JAX, tens of
seconds beside runs of a minute; `isolate` buys it where kernels are young. Runs side by side fill
the device where one alone would leave it waiting for the host, or for the compiler; their speeds
say nothing. Compiled programs are kept on disk, so that no way compiles twice what seeds share.

A half-finished run starts over: its curve and speed then come from one process and one device, and
a checkpoint of every minute would cost more than it saves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from rich.console import Console

from train.determinism import make_deterministic
from train.metrics import duration
from train.signals import StopRequest
from train.study.definition import Run, Study, matching
from train.study.execute import device_answers, execute
from train.study.pool import Pool
from train.study.record import Folders, Record, changes, read


@dataclass
class Outcome:
    """What came of the runs asked for.

    Attributes:
      done: results of runs that came to their end, finite or not; earlier ones included.
      failed: results of runs that raised an error.
      left: runs that still have to be run.
      stopped: why not all were run; None if all were.
      interrupted: whether a signal stopped them.
    """

    done: list[Record] = field(default_factory=list)
    failed: list[Record] = field(default_factory=list)
    left: list[Run] = field(default_factory=list)
    stopped: str | None = None
    interrupted: bool = False

    def interrupt(self, what: str) -> None:
        """Notes that a signal stopped the study, and what it was at."""
        self.stopped, self.interrupted = what, True


def select(study: Study, only: Sequence[str]) -> list[Run]:
    """The runs whose label is, or matches the pattern of, one of `only`; all if that is empty.

    Raises:
      ValueError: one of them matches no label.
    """
    wanted = matching(only, study.labels, "--only")
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
        elif not (changed := changes(record, run)):
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
    jobs: int = 1,
    isolate: bool = False,
    gpus: Sequence[str] = (),
    budget_seconds: float | None = None,
    began: float | None = None,
    ended: Callable[[], None] = lambda: None,
) -> None:
    """Runs what is left.

    Args:
      study: what the runs belong to.
      outcome: what `plan` returned; what comes of the runs is entered. Errors of single runs are
        in there too, not raised.
      folders: where results go.
      console: where progress is printed.
      jobs: runs side by side, each in a process of its own if there are several.
      isolate: a new process for each run.
      gpus: that runs in processes of their own are spread over, as CUDA_VISIBLE_DEVICES names
        them; empty leaves it to JAX.
      budget_seconds: start no run that would probably end later than this; the first one starts
        whatever is expected of it.
      began: time.monotonic() from which the budget counts; None is now.
      ended: called after each run.

    Raises:
      OSError: results cannot be written.
    """
    if any(run.config.deterministic for run in outcome.left):
        make_deterministic(folders.scratch)
    total = len(outcome.left)
    skipped = f", {len(outcome.done)} done before" if outcome.done else ""
    beside = f", {jobs} side by side" if jobs > 1 else ""
    beside += f" on {len(gpus)} GPUs" if jobs > 1 and len(gpus) > 1 else ""
    console.print(
        f"[bold]{study.name}[/bold]: {total} runs to do{skipped}{beside}", highlight=False
    )
    progress = _Progress(outcome, console, folders, total, jobs, ended)
    budget = _Budget(budget_seconds, time.monotonic() if began is None else began, outcome)
    if jobs > 1 or isolate:
        with Pool(execute, study.name, folders, jobs=jobs, isolate=isolate, gpus=gpus) as pool:
            _beside(pool, outcome, progress, budget, console)
    else:
        _one_by_one(study, outcome, folders, progress, budget, console)
    if outcome.stopped and outcome.left:
        text = f"stopped: {outcome.stopped}; {len(outcome.left)} runs left for the same command"
        console.print(text, highlight=False, markup=False, soft_wrap=True)


@dataclass
class _Budget:
    """Whether there is time for one more run."""

    seconds: float | None
    began: float
    outcome: Outcome
    started: int = 0

    def allows(self, run: Run) -> bool:
        """Asked before each start. The first run may start, or nothing ever would."""
        elapsed = time.monotonic() - self.began
        expected = expected_seconds(run, self.outcome.done) or 0
        if self.seconds is not None and self.started and elapsed + expected > self.seconds:
            self.outcome.stopped = f"the next run would end after --budget-seconds {self.seconds:g}"
            return False
        self.started += 1
        return True


def _one_by_one(
    study: Study,
    outcome: Outcome,
    folders: Folders,
    progress: _Progress,
    budget: _Budget,
    console: Console,
) -> None:
    """In this process."""
    while outcome.left and budget.allows(outcome.left[0]):
        run = outcome.left[0]
        title = progress.title(run)
        try:
            with console.status(title) as status:
                line = lambda text, title=title: status.update(f"{title}  [dim]{text}")
                record = execute(run, study.name, folders, line)
        except KeyboardInterrupt:
            record = None
        if record is None:
            outcome.interrupt(f"{run.key} was interrupted and will start over")
            return
        progress.end(run, record)
        if record["status"] == "failed" and not device_answers():
            outcome.stopped = "the device no longer answers in this process; --isolate survives it"
            return


def _beside(
    pool: Pool, outcome: Outcome, progress: _Progress, budget: _Budget, console: Console
) -> None:
    """In processes of their own. `outcome.left` keeps a run until it has ended."""
    waiting = list(outcome.left)
    with console.status("") as status, StopRequest() as stop:
        while True:
            while waiting and not (pool.full or outcome.stopped):
                next_ = pool.pick(waiting)
                if budget.allows(waiting[next_]):
                    pool.start(waiting.pop(next_))
            if not pool.running:
                return
            status.update(", ".join(progress.title(run) for run in pool.running))
            for done in pool.wait(0.2):
                if done.record is None:
                    outcome.interrupt(f"{done.run.key} was interrupted and will start over")
                else:
                    progress.end(done.run, done.record)
            if stop.requested:
                running = pool.running[0].key if pool.running else "it"
                outcome.interrupt(f"{running} was interrupted")
                pool.stop()


class _Progress:
    """Enters the runs that end into the outcome, and says so."""

    def __init__(
        self,
        outcome: Outcome,
        console: Console,
        folders: Folders,
        total: int,
        jobs: int,
        ended: Callable[[], None],
    ) -> None:
        self._outcome, self._console, self._folders = outcome, console, folders
        self._total, self._jobs, self._ended = total, jobs, ended
        self._number: dict[str, int] = {}

    def title(self, run: Run) -> str:
        """Number, label and seed; numbers in the order in which runs start."""
        number = self._number.setdefault(run.key, len(self._number) + 1)
        return f"[{number}/{self._total}] {run.label}, seed {run.seed}"

    def end(self, run: Run, record: Record) -> None:
        outcome = self._outcome
        outcome.left.remove(run)
        (outcome.failed if record["status"] == "failed" else outcome.done).append(record)
        if record["status"] == "finished":
            losses = "  ".join(
                f"{view.removeprefix('loss_')} {loss:.4f}" for view, loss in record["final"].items()
            )
            text = f"{self.title(run)}  {losses}"
        else:
            status = record["status"].replace("_", "-")
            log = self._folders.log(run)
            text = f"{self.title(run)}  {status}: {record['error']} (log: {log})"
        text += f"  {duration(record['wall_seconds'])}"
        left = [expected_seconds(other, outcome.done) for other in outcome.left]
        known = [seconds for seconds in left if seconds is not None]
        if known and len(known) == len(left):
            text += f"  eta {duration(sum(known) / self._jobs)}"
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)
        self._ended()
