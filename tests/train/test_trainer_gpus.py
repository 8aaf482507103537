"""The trainer's command line on GPUs: the recipe of `configs/`, small, through all phases."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]
KILLED_AFTER = 7
# Dense steps 1 to 2, sparse 3 to 8 (clustered before 3 and 6), dense to the end.
ARGUMENTS = [
    *("--config", "tiny", "--steps", "12", "--batch-size", "8", "--sequence-length", "256"),
    *("--model.num-layers", "2", "--model.num-heads", "1"),
    *("--model.width", "128", "--model.hidden", "4096", "--model.no-scan-layers"),
    *("--sparsity.m", "32", "--sparsity.shared-every", "4", "--sparsity.attention-projections"),
    *("--sparsity.v", "128", "--sparsity.refresh-every", "3"),
    *("--schedule.warmup-steps", "2", "--schedule.sparse-fraction", "0.5"),
    *("--optimizer.warmup-steps", "2", "--checkpoint.every", "3"),
    *("--log.every", "1", "--log.eval-every", "0", "--log.eval-windows", "4"),
]


def run(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=400,
    )


def steps(folder: pathlib.Path) -> dict[int, tuple[str, float, float]]:
    """Phase, loss and gradient norm of every step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if record["kind"] == "train"]
    return {r["step"]: (r["phase"], r["loss"], r["grad_norm"]) for r in found}


def trained(folder: pathlib.Path, *more: object) -> dict[int, tuple[str, float, float]]:
    ended = run("train.main", *ARGUMENTS, *more, "--output", folder, "--name", "whole")
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = steps(folder / "whole")
    phases = [phase for phase, *_ in found.values()]
    assert phases == ["dense"] * 2 + ["sparse"] * 6 + ["dense"] * 4
    losses = np.array([loss for _, loss, _ in found.values()])
    assert np.isfinite(losses).all()
    assert losses[-1] < losses[0] - 0.5
    return found


def resumed(folder: pathlib.Path, *more: object) -> dict[int, tuple[str, float, float]]:
    """The same run, ended by SIGKILL in its sparse phase and resumed from the step before."""
    plan = folder / "plan.json"
    # One output folder: `--deterministic` keeps there which algorithms were chosen.
    report, more = folder / "report", (*more, "--output", folder, "--name", "killed")
    moment = {"place": "step", "index": KILLED_AFTER, "delay": 0.0}
    plan.write_text(json.dumps(moment | {"signal": "KILL", "report": str(report)}))
    ended = run("tests.rig.victim", plan, *ARGUMENTS, *more)
    assert report.exists(), ended.stderr[-3000:]
    ended = run("train.main", *ARGUMENTS, *more, "--resume")
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert "starting at step 0" not in ended.stdout
    return steps(folder / "killed")


def on(gpus: int, monkeypatch) -> tuple[str, ...]:
    """Shows so many GPUs to the trainer, and says so in its arguments."""
    if len(jax.devices()) < gpus:
        pytest.skip(f"needs {gpus} GPUs")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or "0,1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", ",".join(visible.split(",")[:gpus]))
    return ("--mesh.fsdp", str(gpus))


@pytest.mark.gpu
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_the_trainer_runs_on_two_gpus(tmp_path, monkeypatch, micro_batches):
    trained(tmp_path, *on(2, monkeypatch), "--micro-batches", micro_batches)


@pytest.mark.gpu
@pytest.mark.parametrize("gpus", [1, 2])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_a_deterministic_run_is_resumed_to_the_bit(tmp_path, monkeypatch, gpus, micro_batches):
    more = (*on(gpus, monkeypatch), "--micro-batches", micro_batches, "--deterministic")
    assert resumed(tmp_path, *more) == trained(tmp_path, *more)
