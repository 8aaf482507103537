"""Runs of a study in processes of their own, several side by side."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from train.config import Config
from train.programs import step_compiled_from
from train.study.definition import Run
from train.study.devices import VISIBLE
from train.study.record import Folders, Record, failure, write

Execute = Callable[..., Record | None]
"""`train.study.execute.execute`, or something like it."""

# Spawned: a fork would inherit threads of JAX and of the data pipeline.
_CONTEXT = multiprocessing.get_context("spawn")


@dataclass(frozen=True)
class Ended:
    """A run that came to its end in a process.

    Attributes:
      run: the run.
      record: its result; None if a signal stopped it, and it has to start over.
    """

    run: Run
    record: Record | None


class Pool:
    """Up to `jobs` processes that execute runs. Use it as a context manager.

    A process serves one run after another, since its start (JAX, the device, the data) costs as
    much as a short run; with `isolate` each run gets a new one. A process that dies is a failed run
    and is replaced.

    Args:
      execute: what to do with a run; importable by name.
      study: name of the study.
      folders: where results go.
      jobs: processes at a time.
      isolate: a new process for each run.
      gpus: as CUDA_VISIBLE_DEVICES names them; each process sees one, and all
        serve as many processes, give or take one. Empty leaves the processes what this one sees.
    """

    def __init__(
        self,
        execute: Execute,
        study: str,
        folders: Folders,
        *,
        jobs: int,
        isolate: bool = False,
        gpus: Sequence[str] = (),
    ) -> None:
        self._arguments = (execute, study, folders, sharers(jobs, len(gpus)))
        self._gpus = tuple(gpus)
        self._study, self._folders = study, folders
        self._jobs, self._isolate = jobs, isolate
        self._idle: list[_Worker] = []
        self._busy: list[_Worker] = []

    @property
    def running(self) -> tuple[Run, ...]:
        """The runs under way."""
        return tuple(worker.run for worker in self._busy if worker.run is not None)

    @property
    def full(self) -> bool:
        """Whether every process has a run."""
        return len(self._busy) >= self._jobs

    def pick(self, waiting: Sequence[Run]) -> int:
        """Which of the runs to start next: the first one, unless a busy process has its programs
        and an idle one has those of another run that would start soon."""
        busy, idle = (
            {config for worker in workers for config in worker.programs}
            for workers in (self._busy, self._idle)
        )
        first = step_compiled_from(waiting[0].config)
        if first in idle or first not in busy:
            return 0
        soon = enumerate(waiting[: self._jobs])
        return next((i for i, run in soon if step_compiled_from(run.config) in idle), 0)

    def start(self, run: Run) -> None:
        """Gives a run to an idle process, one that has its programs if there is one, or to a new
        process."""
        self._folders.result(run).unlink(missing_ok=True)
        # One that died while it had nothing to do takes no run with it.
        for dead in [worker for worker in self._idle if not worker.process.is_alive()]:
            self._idle.remove(dead)
            dead.close()
        if self._idle:
            programs = step_compiled_from(run.config)
            worker = next((w for w in self._idle if programs in w.programs), self._idle[-1])
            self._idle.remove(worker)
        else:
            worker = _Worker(*self._arguments, self._free_gpu())
        self._busy.append(worker)
        worker.start(run)

    def wait(self, seconds: float) -> list[Ended]:
        """The runs that have ended since the last call; waits for one at most `seconds`."""
        waiting: dict[Any, _Worker] = {worker.connection: worker for worker in self._busy}
        ready = multiprocessing.connection.wait(list(waiting), timeout=seconds)
        ended = []
        for connection in ready:
            worker = waiting[connection]
            run = worker.run
            assert run is not None
            record, alive = self._result(worker, run)
            ended.append(Ended(run, record))
            self._busy.remove(worker)
            if alive and not self._isolate:
                self._idle.append(worker)
            else:
                worker.close()
        return ended

    def stop(self) -> None:
        """Asks the runs under way to end after the step at hand; `wait` then returns them."""
        for worker in self._busy:
            worker.process.terminate()  # its own handler ends the run

    def _free_gpu(self) -> str | None:
        """The GPU with the fewest processes."""
        load = Counter({gpu: 0 for gpu in self._gpus})
        load.update(worker.gpu for worker in self._busy + self._idle if worker.gpu is not None)
        return min(self._gpus, key=load.__getitem__, default=None)

    def _result(self, worker: _Worker, run: Run) -> tuple[Record | None, bool]:
        """What came of a run, and whether its process can take another one."""
        try:
            return worker.connection.recv(), True
        except (EOFError, OSError):
            worker.process.join()
        code = worker.process.exitcode or 0
        if code in (0, -signal.SIGTERM):
            return None, False
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        seconds = time.monotonic() - worker.began
        record = failure(run, self._study, f"its process died: {cause}", seconds)
        write(self._folders.result(run), record)
        return record, False

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        for worker in self._idle + self._busy:
            worker.close()


def sharers(jobs: int, gpus: int) -> int:
    """Most runs that share a device, when `jobs` are spread over so many (0: one device)."""
    return -(-jobs // max(gpus, 1))


@contextlib.contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """The environment in which a process starts."""
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


class _Worker:
    """A process and the pipe to it."""

    def __init__(
        self, execute: Execute, study: str, folders: Folders, jobs: int, gpu: str | None
    ) -> None:
        self.gpu = gpu
        self.connection, theirs = _CONTEXT.Pipe()
        self.process = _CONTEXT.Process(target=_serve, args=(theirs, execute, study, folders, jobs))
        with _environment({} if gpu is None else {VISIBLE: gpu}):
            self.process.start()
        theirs.close()  # else the end of the process would not close the pipe
        self.run: Run | None = None
        self.began = 0.0
        self.programs: set[Config] = set()

    def start(self, run: Run) -> None:
        self.run, self.began = run, time.monotonic()
        self.programs.add(step_compiled_from(run.config))
        # A process that died meanwhile is noticed by whoever waits for its answer.
        with contextlib.suppress(OSError):
            self.connection.send(run)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.send(None)
        self.connection.close()
        self.process.join()


def _serve(
    connection: multiprocessing.connection.Connection,
    execute: Execute,
    study: str,
    folders: Folders,
    jobs: int,
) -> None:
    """The process: runs until there is none left."""
    # Ctrl-C goes to all processes of a terminal; the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    while True:
        # The parent may be gone. What goes wrong in a run is another matter: it ends the process
        # with an exit code that says so.
        try:
            run = connection.recv()
        except (EOFError, OSError):
            return
        if run is None:
            return
        record = execute(run, study, folders, jobs=jobs)
        with contextlib.suppress(OSError):
            connection.send(record)
