"""The trainer's command line, with a signal to itself at a chosen moment.

    python -m tests.rig.victim PLAN.json [argument of train.main ...]

The plan is a JSON object: `place`, `signal` ("KILL" or "TERM"), `index`, `delay` (seconds) and
`report`, a file that is written just before the signal. Places:

    step      `delay` after step `index` was logged
    save      `delay` after the save of step `index`, or the next one, began
    file      before the index-th file operation (open, rename, mkdir, remove) below the output
              folder, not counting reads
    flip      `delay` after a change of phase or a clustering, at step `index` or later, began
    restore   `delay` after a checkpoint began to be restored
"""

import json
import os
import pathlib
import signal
import sys
import threading

from sparsejax.schedule import PhaseSchedule
from train import main
from train.checkpoint import Checkpointer
from train.metrics import RunLogger


class Executioner:
    """Sends the planned signal to this process, once."""

    def __init__(self, plan: dict):
        self.place, self.index, self.delay = plan["place"], plan["index"], plan["delay"]
        self.signal = signal.Signals[f"SIG{plan['signal']}"]
        self.report = pathlib.Path(plan["report"])
        self.armed = True

    def strike(self) -> None:
        """Now."""
        self.armed = False
        self.report.write_text("struck")
        os.kill(os.getpid(), self.signal)

    def strike_soon(self) -> None:
        """After the planned delay, whatever the process does by then."""
        self.armed = False
        timer = threading.Timer(self.delay, self.strike)
        timer.daemon = True
        timer.start()

    def at_step(self) -> None:
        log = RunLogger.log

        def hooked(logger, step, *args, **kwargs):
            record = log(logger, step, *args, **kwargs)
            if self.armed and step >= self.index:
                self.strike_soon()
            return record

        RunLogger.log = hooked

    def at_save(self) -> None:
        save = Checkpointer.save

        def hooked(checkpointer, step, *args, **kwargs):
            if self.armed and step >= self.index:
                self.strike_soon()
            return save(checkpointer, step, *args, **kwargs)

        Checkpointer.save = hooked

    def at_restore(self) -> None:
        restore = Checkpointer.restore

        def hooked(*args, **kwargs):
            self.strike_soon()
            return restore(*args, **kwargs)

        Checkpointer.restore = hooked

    def at_flip(self) -> None:
        event = PhaseSchedule.event

        def hooked(phases, step):
            changed = step > 0 and phases(step) != phases(step - 1)
            found = event(phases, step)
            if self.armed and step >= self.index and (found or changed):
                self.strike_soon()
            return found

        PhaseSchedule.event = hooked

    def at_file_operation(self, output: str) -> None:
        root = os.path.abspath(output)
        count = 0

        def hook(name: str, args: tuple) -> None:
            nonlocal count
            if not self.armed or name not in _FILE_EVENTS or not args:
                return
            if name == "open" and not args[2] & (os.O_WRONLY | os.O_RDWR):
                return
            if not isinstance(args[0], str | os.PathLike) or not os.fspath(args[0]):
                return
            if os.path.abspath(args[0]).startswith(root):
                count += 1
                if count == self.index:
                    self.strike()

        sys.addaudithook(hook)


_FILE_EVENTS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate"}


def run(plan: dict, argv: list[str]) -> int:
    """Trains until the plan's moment, or to the end."""
    executioner = Executioner(plan)
    if executioner.place == "file":
        executioner.at_file_operation(argv[argv.index("--output") + 1])
    else:
        getattr(executioner, f"at_{executioner.place}")()
    return main.main(argv)


if __name__ == "__main__":
    sys.exit(run(json.loads(pathlib.Path(sys.argv[1]).read_text()), sys.argv[2:]))
