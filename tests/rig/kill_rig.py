"""Kills a very small run at random moments and checks that it goes on to the last bit.

    python -m tests.rig.kill_rig --kills 200 --seed 0 --out result.json
    python -m tests.rig.kill_rig --kills 30 --seed 1 --platform gpu

Runs are on the CPU unless `--platform gpu` is given, whatever the machine has. On a GPU they are
larger, so that the sparse kernels serve them, and `--deterministic`, since without it no two runs
there are equal.

An undisturbed run is the oracle. Then one run after another is killed a few times, resumed each
time, and at last left to finish. After every kill:

* the log is, but for times, a prefix of the undisturbed run's;
* no checkpoint that was complete before is older than the newest one now, none is damaged;
* the next process goes on from the newest complete checkpoint, and says so;
* after SIGTERM the process ends with code 0 and has saved the step it names;
* nobody sees a traceback.

At the end of each run its whole log and every array of its last checkpoint equal the oracle's.
Kills are drawn from places (see `tests.rig.victim`) and signals by the seed; how far a process is
when its delay is over depends on the machine.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import pathlib
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from typing import Any

ROOT = pathlib.Path(__file__).parents[2]
# The largest delay of each place in seconds; of "anywhere" in times of a whole process.
DELAYS = {"anywhere": 1.0, "step": 0.05, "save": 0.15, "file": 0.0, "flip": 0.1, "restore": 0.3}
PLACES = tuple(DELAYS)
STEPS = 20
OPERATIONS = 260
"""About as many file operations does a whole run make, most of them in saves."""

# Dense steps 1 to 6, sparse 7 to 14 (clustered before 7, again before 11), dense to the end; a
# checkpoint every other step, two of which are kept.
_ARGUMENTS = [
    *("--config", "tiny", "--steps", str(STEPS), "--batch-size", "2"),
    *("--model.num-layers", "2", "--model.num-heads", "1"),
    *("--schedule.warmup-steps", "6", "--schedule.sparse-fraction", "0.4"),
    *("--sparsity.refresh-every", "4", "--optimizer.warmup-steps", "3"),
    *("--log.every", "1", "--log.eval-every", "5", "--log.eval-windows", "2"),
    *("--checkpoint.every", "2", "--checkpoint.keep", "2"),
]
# As small as can be on a CPU; on a GPU the smallest that its kernels serve.
ARGUMENTS = {
    "cpu": [
        *_ARGUMENTS,
        *("--sequence-length", "16", "--sparsity.v", "16"),
        *("--model.width", "16", "--model.hidden", "16"),
    ],
    "gpu": [
        *_ARGUMENTS,
        *("--sequence-length", "256", "--sparsity.v", "128"),
        *("--model.width", "64", "--model.hidden", "512", "--deterministic"),
    ],
}
PLATFORMS = tuple(ARGUMENTS)
_TIMES = ("elapsed", "tokens_per_second", "step_seconds", "mfu", "eta_seconds")


class RigError(AssertionError):
    """The trainer broke a promise."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """One kill."""

    place: str
    signal: str
    index: int
    """The step, or the number of the file operation."""
    delay: float
    """Seconds."""


@dataclasses.dataclass
class Ended:
    """How a process ended."""

    code: int
    out: str
    err: str
    struck: bool
    """Whether the planned signal was sent."""
    seconds: float


class Workplace:
    """A folder with the runs, compiled programs and decompressed data.

    Args:
      folder: which.
      platform: one of PLATFORMS, on which the runs are.
    """

    def __init__(self, folder: pathlib.Path, platform: str = "cpu"):
        self.folder = folder
        self.arguments = ARGUMENTS[platform]
        self.environment = os.environ | {
            "JAX_PLATFORMS": {"cpu": "cpu", "gpu": "cuda"}[platform],
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "COLUMNS": "200",
        }

    def launch(self, output: str, plan: Plan | None = None) -> Ended:
        """Starts or resumes the run named `output` and waits until it is dead or done."""
        program = ["-m", "train.main"]
        report = self.folder / "struck"
        report.unlink(missing_ok=True)
        if plan is not None and plan.place != "anywhere":
            file = self.folder / "plan.json"
            file.write_text(json.dumps(dataclasses.asdict(plan) | {"report": str(report)}))
            program = ["-m", "tests.rig.victim", str(file)]
        # One output folder: `--deterministic` keeps there which algorithms were chosen.
        arguments = [*self.arguments, "--output", str(self.folder / "runs"), "--name", output]
        arguments += ["--data.cache", str(self.folder / "data")]
        if self.config(output).exists():
            arguments.append("--resume")
        began = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=ROOT,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        struck = False
        try:
            patience = plan.delay if plan is not None and plan.place == "anywhere" else 600.0
            out, err = process.communicate(timeout=patience)
        except subprocess.TimeoutExpired:
            if patience == 600.0:
                process.kill()
                out, err = process.communicate()
                raise RigError(f"{plan}: still running after {patience} s\n{out}{err}") from None
            assert plan is not None
            struck = process.poll() is None
            process.send_signal(signal.Signals[f"SIG{plan.signal}"])
            out, err = process.communicate(timeout=600)
        struck = struck or report.exists()
        return Ended(process.returncode, out, err, struck, time.monotonic() - began)

    def config(self, output: str) -> pathlib.Path:
        """The file whose existence makes a run resumable."""
        return self.folder / "runs" / output / "config.json"

    def log(self, output: str) -> list[dict[str, Any]]:
        """What was logged, without times: the bits of every loss and norm, step by step."""
        from train.metrics import read

        file = self.folder / "runs" / output / "metrics.jsonl"
        return [
            {name: value for name, value in record.items() if name not in _TIMES}
            for record in (read(file) if file.exists() else [])
            if record["kind"] != "summary"
        ]

    def newest(self, output: str) -> pathlib.Path | None:
        """The newest complete checkpoint."""
        from train.checkpoint.entries import entries_of

        entries = entries_of(self.folder / "runs" / output / "checkpoints")
        return entries[0].path if entries else None

    def arrays(self, output: str) -> dict[str, Any]:
        """Every array of the newest checkpoint, by name."""
        import jax
        import orbax.checkpoint as ocp

        newest = self.newest(output)
        assert newest is not None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where the arrays lived does not matter here
            handler = ocp.PyTreeCheckpointHandler()
            tree = handler.restore(newest / "arrays", args=ocp.args.PyTreeRestore())
        return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def draw(rng: random.Random, place: str, start: int, seconds: float) -> Plan:
    """A random kill at a kind of place, of a process that begins at step `start`.

    Args:
      rng: decides.
      place: one of PLACES.
      start: steps done.
      seconds: how long an undisturbed process takes.
    """
    index, delay = rng.randint(min(start + 1, STEPS), STEPS), rng.uniform(0.0, DELAYS[place])
    if place == "anywhere":
        delay *= seconds
    elif place == "file":
        index = rng.randint(1, 5 + OPERATIONS * (STEPS - start) // STEPS)
    return Plan(place, rng.choice(("KILL", "KILL", "KILL", "TERM")), index, round(delay, 4))


def _step_of(folder: pathlib.Path | None) -> int:
    return 0 if folder is None else int(folder.name.partition("-")[0])


def check(
    work: Workplace, output: str, plan: Plan | None, ended: Ended, before: int, oracle: list
) -> None:
    """Raises RigError unless the process that just ended kept every promise."""

    def require(truth: bool, what: str) -> None:
        if not truth:
            raise RigError(
                f"{output}, {plan}: {what}\ncode {ended.code}, struck {ended.struck}, checkpoint "
                f"before {before}\n--- out\n{ended.out}\n--- err\n{ended.err}"
            )

    require("Traceback" not in ended.err, "a traceback")
    require("damaged" not in ended.err, "a kill damaged a checkpoint")
    log = work.log(output)
    require(log == oracle[: len(log)], f"the log {log[-1:]} is not that of an undisturbed run")
    after = _step_of(work.newest(output))
    require(after >= before, f"the newest checkpoint is now of step {after}")
    started = re.search(r"phases: .*", ended.out)
    if started:
        continued = re.search(r"continuing at step (\d+)", started[0])
        start = int(continued[1]) if continued else 0
        require(start == before, f"it went on from step {start}")
    if plan is None:
        require(ended.code == 0 and after == STEPS, "it did not finish")
        require(log == oracle, "the log is not complete")
    elif not ended.struck:
        require(ended.code == 0 and after == STEPS, "nothing struck it, and it did not finish")
    elif plan.signal == "KILL":
        require(ended.code in (-9, 0), "SIGKILL was not what ended it")
    else:
        # -15: before the trainer could install its handler; nothing was done by then.
        require(ended.code in (0, -15), "SIGTERM was not obeyed")
        stopped = re.search(r"stopped by a signal after step (\d+)", ended.out)
        if stopped:
            require(after == int(stopped[1]), f"it saved step {after}, but said {stopped[1]}")
        elif ended.code == 0 and started:
            require(after == STEPS, "it neither stopped nor finished")
        elif ended.code == -15:
            require(not started or after == before, "it died of SIGTERM at work")


def same_arrays(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Whether all arrays are equal to the last bit."""
    import numpy as np

    bits = lambda a: (np.asarray(a).dtype, np.asarray(a).shape, np.asarray(a).tobytes())
    return found.keys() == expected.keys() and all(
        bits(found[name]) == bits(expected[name]) for name in expected
    )


def run(
    folder: pathlib.Path,
    *,
    kills: int,
    seed: int,
    kills_per_run: int = 10,
    platform: str = "cpu",
    say: Any = print,
) -> dict[str, Any]:
    """Kills runs until `kills` signals have struck; each run is left to finish in the end.

    Args:
      folder: for everything.
      kills: signals that must strike.
      seed: of places, signals and moments.
      kills_per_run: at most so many before a run is left to finish.
      platform: one of PLATFORMS.
      say: told what happened, line by line.

    Returns:
      What happened, for the record.

    Raises:
      RigError: at the first broken promise; everything is left in `folder`.
    """
    began = time.monotonic()
    work, rng = Workplace(folder, platform), random.Random(seed)
    ended = work.launch("oracle")
    if ended.code:
        raise RigError(f"the undisturbed run failed\n{ended.out}{ended.err}")
    if "FallbackWarning" in ended.err:
        raise RigError(f"the device's kernels do not serve the run\n{ended.err}")
    device = _device(ended.out)
    oracle, state = work.log("oracle"), work.arrays("oracle")
    if [r["step"] for r in oracle if r["kind"] == "train"] != list(range(1, STEPS + 1)):
        raise RigError(f"the undisturbed run logged {oracle}")
    # How long a process takes when it need not compile; re-measured with every run that finishes.
    seconds = min(ended.seconds, 6.0)
    struck: collections.Counter[str] = collections.Counter()
    processes, missed, runs = 1, 0, 0
    while struck.total() < kills:
        output, runs, here = f"run{runs}", runs + 1, 0
        places: list[str] = []
        while here < kills_per_run and struck.total() < kills:
            # Every kind of place comes equally often, in random order.
            places = places or rng.sample(PLACES, len(PLACES))
            before = _step_of(work.newest(output))
            plan = draw(rng, places.pop(), before, seconds)
            if plan.place == "restore" and not work.config(output).exists():
                plan = dataclasses.replace(plan, place="step", index=1)
            ended = work.launch(output, plan)
            processes += 1
            check(work, output, plan, ended, before, oracle)
            here += ended.struck
            if ended.struck:
                struck[f"{plan.place} {plan.signal}"] += 1
            else:
                missed += 1
            after = _step_of(work.newest(output))
            say(
                f"{struck.total():4d} {output} {plan.place:<8} SIG{plan.signal} "
                f"{'struck' if ended.struck else 'missed'}, code {ended.code}, checkpoint "
                f"{before} -> {after}"
            )
            if after == STEPS and (not ended.struck or rng.random() < 0.5):
                break  # now and then a finished run is started, and killed, once more
        before = _step_of(work.newest(output))
        ended = work.launch(output)
        processes += 1
        check(work, output, None, ended, before, oracle)
        seconds = ended.seconds
        if not same_arrays(work.arrays(output), state):
            raise RigError(f"{output}: the last checkpoint is not that of an undisturbed run")
        say(f"     {output} finished, equal to the undisturbed run")
    return {
        "kills": struck.total(),
        "by_place_and_signal": dict(sorted(struck.items())),
        "finished_before_the_signal": missed,
        "runs_finished_and_bit_exact": runs,
        "processes": processes,
        "seed": seed,
        "device": device,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "versions": _versions(),
    }


def _device(out: str) -> str:
    """Where a run was, as it said: "1 x cpu"."""
    found = re.search(r"tokens a step, on (.+)", out)
    if not found:
        raise RigError(f"the undisturbed run does not say where it was\n{out}")
    return found[1].strip()


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("jax", "flax", "orbax-checkpoint", "numpy")
    return {name: version(name) for name in names} | {"python": platform.python_version()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.rig.kill_rig", description=__doc__)
    parser.add_argument("--kills", type=int, default=200, help="signals that must strike")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills-per-run", type=int, default=10)
    parser.add_argument("--platform", choices=PLATFORMS, default="cpu", help="where runs are")
    parser.add_argument("--folder", type=pathlib.Path, help="kept; default: a temporary one")
    parser.add_argument("--out", type=pathlib.Path, help="JSON file for the outcome")
    options = parser.parse_args()
    if options.kills < 1 or options.kills_per_run < 1:
        parser.error("--kills and --kills-per-run must be positive")
    # This process only reads checkpoints: the GPU is the runs'.
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or pathlib.Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        result = run(
            folder,
            kills=options.kills,
            seed=options.seed,
            kills_per_run=options.kills_per_run,
            platform=options.platform,
            say=lambda line: print(line, flush=True),
        )
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
