"""A run that is killed again and again ends with the losses of one that was never disturbed."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]

# Dense steps 1 to 6, sparse 7 to 14 (clustered before 7, again before 11), dense to the end;
# checkpoints after 3, 6, 9, 12, 15, 18 and 20.
ARGUMENTS = [
    *("--config", "tiny", "--steps", "20", "--batch-size", "4", "--sequence-length", "64"),
    *("--model.width", "32", "--model.num-layers", "2", "--model.num-heads", "2"),
    *("--schedule.warmup-steps", "6", "--schedule.sparse-fraction", "0.4"),
    *("--sparsity.refresh-every", "4", "--sparsity.v", "32", "--optimizer.warmup-steps", "3"),
    *("--log.every", "1", "--log.eval-every", "0", "--log.eval-windows", "4"),
    *("--checkpoint.every", "3"),
    # Everything that may happen at a change of phase.
    *("--optimizer.reset-moments", "both", "--optimizer.rewarm-steps", "2"),
    *("--schedule.rescale-dense", "--sparsity.reestimate-beta", "--data.seed", "3"),
]

# The command line, with something that happens at a given step:
#   kill    SIGKILL right after that step was logged, all saves before it being durable;
#   race    the same while the saves before it may still be under way;
#   save    SIGKILL while that step is being saved, all of it written but the manifest;
#   term    SIGTERM right after that step was logged.
DRIVER = """
    import os, signal, sys
    from train import main
    from train.checkpoint import Checkpointer, manifest
    from train.metrics import RunLogger
    what, at = sys.argv[1], int(sys.argv[2])
    die = lambda: os.kill(os.getpid(), signal.SIGTERM if what == "term" else signal.SIGKILL)
    log, save, write = RunLogger.log, Checkpointer.save, manifest.write
    def log_and_die(self, step, *args, **kwargs):
        log(self, step, *args, **kwargs)
        if what != "save" and step == at:
            die()
    def save_and_wait(self, *args, **kwargs):
        save(self, *args, **kwargs)
        if what != "race":
            self.wait()
    def write_or_die(folder):
        if what == "save" and int(folder.name) == at:
            die()
        write(folder)
    RunLogger.log, Checkpointer.save, manifest.write = log_and_die, save_and_wait, write_or_die
    sys.exit(main.main(sys.argv[3:]))
"""


@pytest.fixture(scope="module")
def area(tmp_path_factory):
    """A folder for the runs and one that keeps compiled programs between processes."""
    return tmp_path_factory.mktemp("resume")


def launch(area, output, *arguments, happening=None, code=0):
    """Runs the trainer; checks its exit code and returns what it printed and its errors."""
    program = ["-m", "train.main"]
    if happening:
        program = ["-c", textwrap.dedent(DRIVER), *map(str, happening)]
    folders = ["--output", str(area / output), "--data.cache", str(area / "data")]
    result = subprocess.run(
        [sys.executable, *program, *ARGUMENTS, *folders, *arguments],
        cwd=ROOT,
        env=os.environ
        | {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(area / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "COLUMNS": "200",
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout, result.stderr


def records(area, output):
    """What was logged, without the times: the bits of every loss and norm, step by step."""
    lines = (area / output / "tiny" / "metrics.jsonl").read_text().splitlines()
    timing = ("elapsed", "tokens_per_second", "step_seconds", "mfu", "eta_seconds")
    return [
        {name: value for name, value in record.items() if name not in timing}
        for record in map(json.loads, lines)
        if record["kind"] != "summary"
    ]


def checkpoints(area, output):
    """Steps of the complete checkpoints, oldest first."""
    folder = area / output / "tiny" / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdecimal())


def continued_at(out):
    [line] = [line for line in out.splitlines() if "continuing at step" in line]
    return int(line.rsplit(" ", 1)[1])


@pytest.fixture(scope="module")
def undisturbed(area):
    """What an uninterrupted run logged."""
    launch(area, "undisturbed")
    logged = records(area, "undisturbed")
    train = [record for record in logged if record["kind"] == "train"]
    assert [record["step"] for record in train] == list(range(1, 21))
    assert [record["phase"] for record in train] == ["dense"] * 6 + ["sparse"] * 8 + ["dense"] * 6
    assert len({record["loss"] for record in train}) == 20
    moved = [record["step"] for record in logged if record["kind"] == "clusters"]
    assert moved == [6, 10]
    return logged


def test_killed_runs_continue_bit_for_bit(area, undisturbed):
    def check(out, start, logged_to):
        assert continued_at(out) == start
        steps = [(record["kind"], record["step"]) for record in undisturbed]
        upto = steps.index(("train", logged_to)) + 1
        assert records(area, "killed") == undisturbed[:upto]

    # At the flip: the first sparse step is done, the newest checkpoint is from before the
    # clustering.
    launch(area, "killed", happening=("kill", 7), code=-9)
    assert checkpoints(area, "killed") == [3, 6]
    # Within the sparse phase, after a second clustering that the checkpoint has not seen.
    out, _ = launch(area, "killed", "--resume", happening=("kill", 11), code=-9)
    check(out, start=6, logged_to=11)
    # During a save.
    out, _ = launch(area, "killed", "--resume", happening=("save", 12), code=-9)
    check(out, start=9, logged_to=12)
    assert checkpoints(area, "killed") == [3, 6, 9]
    # After the flip back, while a save may be under way; the save of 12 is repeated.
    out, _ = launch(area, "killed", "--resume", happening=("race", 16), code=-9)
    check(out, start=9, logged_to=16)
    before, newest = checkpoints(area, "killed")[-2:]
    assert newest in (12, 15)

    # A damaged checkpoint costs some steps, and a warning: back to one from before the flip.
    # SIGTERM costs nothing.
    folder = area / "killed" / "tiny" / "checkpoints" / f"{newest:08d}"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    out, err = launch(area, "killed", "--resume", happening=("term", 16))
    check(out, start=before, logged_to=17)
    warnings = [line for line in err.splitlines() if "damaged" in line]
    assert len(warnings) == 1
    assert f"skipping damaged checkpoint {folder}: " in warnings[0]
    assert "stopped by a signal after step 17" in out
    assert checkpoints(area, "killed")[-1] == 17

    out, err = launch(area, "killed", "--resume")
    assert continued_at(out) == 17
    assert records(area, "killed") == undisturbed
    assert "damaged" not in err


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (("--optimizer.b2", "0.9"), "optimizer.b2: 0.99 in the checkpoint, 0.9 now"),
        (("--schedule.warmup-steps", "7"), "schedule.warmup_steps: 6 in the checkpoint, 7 now"),
    ],
)
def test_a_checkpoint_of_another_config_is_refused(area, undisturbed, change, difference):
    _, err = launch(area, "undisturbed", "--resume", *change, code=2)
    assert err.splitlines() == [f"error: the checkpoint is of another config: {difference}"]
    assert records(area, "undisturbed") == undisturbed


def test_without_a_checkpoint_there_is_nothing_to_resume(area):
    _, err = launch(area, "nowhere", "--resume", code=2)
    assert len(err.splitlines()) == 1
    assert err.startswith("error: nothing to resume")
