"""What the processes of a study do in its tests, instead of training.

A process imports the module that its function is of: this one imports no trainer.
"""

import dataclasses
import errno
import os
import signal
import time
from collections.abc import Callable

from train.study.definition import Run
from train.study.devices import VISIBLE
from train.study.record import FORMAT, Folders, write


def until(condition: Callable[[], bool], seconds: float = 60.0) -> bool:
    """Waits without keeping a core from the processes that are waited for."""
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return met


def fake(run: Run, study: str, status: str = "finished", seconds: float = 1.0):
    return {
        "format": FORMAT,
        "label": run.label,
        "seed": run.seed,
        "status": status,
        "error": None if status == "finished" else "boom",
        "config": dataclasses.asdict(run.config),
        "tokens": run.tokens,
        "final": {"loss_dense": 1.0},
        "wall_seconds": seconds,
    }


def die(run: Run, study: str, folders: Folders, jobs: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fill_the_disk(run: Run, study: str, folders: Folders, jobs: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def wait(run: Run, study: str, folders: Folders, jobs: int):
    """A run that comes to its end unless something ends it long before."""
    folders.scratch.joinpath("started").touch()
    time.sleep(60)
    return fake(run, study)


def pretend(run: Run, study: str, folders: Folders, jobs: int):
    """A run that needs another one beside it to come to its end; one label kills its process."""
    if run.label == "swiglu":
        os.kill(os.getpid(), signal.SIGKILL)
    folders.scratch.joinpath(run.key).touch()
    if until(folders.scratch.joinpath(f"{run.label}-seed{1 - run.seed}").exists):
        record = fake(run, study) | {"jobs": jobs, "process": os.getpid()}
        write(folders.result(run), record)
        return record
    return fake(run, study, "failed")


def see(run: Run, study: str, folders: Folders, jobs: int):
    """What the process of a run sees; it waits until all four are there."""
    folders.scratch.joinpath(run.key).touch()
    if not until(lambda: len(list(folders.scratch.glob("relu2*"))) == 4):
        return fake(run, study, "failed")
    return {"gpu": os.environ.get(VISIBLE), "jobs": jobs}


def answer(run: Run, study: str, folders: Folders, jobs: int):
    """A run of a process; that of seed 1 waits until it is told to end."""
    if run.seed == 1 and not until(folders.scratch.joinpath("end").exists):
        return fake(run, study, "failed")
    return {"process": os.getpid()}
