"""The reliability rig in short form; `python -m tests.rig.kill_rig` is the long one."""

import dataclasses
import random

import jax.numpy as jnp
import pytest

from kernels import registry
from sparsejax.ops.routed_ffn_grouped import Sizes, choose
from tests.rig import kill_rig
from train import main


@pytest.mark.processes
def test_four_kills_cost_nothing(tmp_path):
    """At the places and with the signal that `tests/train/test_resume.py` leaves out: this seed
    draws a step, anywhere, a file operation, and SIGTERM while restoring."""
    lines = []
    result = kill_rig.run(tmp_path, kills=4, seed=5, kills_per_run=4, say=lines.append)
    assert result["kills"] == 4
    assert result["runs_finished_and_bit_exact"] >= 1
    assert result["device"] == "1 x cpu"


def test_runs_on_a_gpu_are_deterministic_and_on_its_kernels(tmp_path, monkeypatch):
    """Whatever the environment says, `platform` is where the runs are."""
    monkeypatch.setenv("JAX_PLATFORMS", "rocm")
    environments = {p: kill_rig.Workplace(tmp_path, p).environment for p in kill_rig.PLATFORMS}
    names = {platform: e["JAX_PLATFORMS"] for platform, e in environments.items()}
    assert names == {"cpu": "cpu", "gpu": "cuda"}
    configs = {p: main.parse(arguments) for p, arguments in kill_rig.ARGUMENTS.items()}
    assert [configs[p].deterministic for p in ("cpu", "gpu")] == [False, True]
    config = configs["gpu"]
    sizes = Sizes(
        config.model.width, config.model.ffn_hidden, jnp.dtype("bfloat16"), config.tokens_per_step
    )
    with registry.assume_capability((9, 0)):
        assert choose(config.sparsity, sizes, gated=False) == "hopper"


def test_draws_cover_every_place_and_both_signals():
    rng = random.Random(0)
    plans = [kill_rig.draw(rng, p, 10, 5.0) for p in kill_rig.PLACES for _ in range(50)]
    assert {plan.place for plan in plans} == set(kill_rig.PLACES)
    assert {plan.signal for plan in plans} == {"KILL", "TERM"}
    assert all(plan.index > 10 or plan.place == "file" for plan in plans)
    assert max(plan.delay for plan in plans) > 4.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"log": 1}, "is not that of an undisturbed run"),
        ({"newest": 4}, "the newest checkpoint is now of step 4"),
        ({"out": "phases: dense; continuing at step 4"}, "went on from step 4"),
        ({"err": "skipping damaged checkpoint"}, "damaged"),
        ({"err": "Traceback (most recent call last)"}, "traceback"),
        ({"code": 1}, "SIGKILL was not what ended it"),
    ],
)
def test_a_broken_promise_is_noticed(tmp_path, monkeypatch, change, message):
    work = kill_rig.Workplace(tmp_path)
    log = [{"kind": "train", "step": step, "loss": 1.0 / step} for step in range(1, 7)]
    seen = [*log[:5], log[5] | {"loss": 0.5}] if "log" in change else log
    newest = tmp_path / f"{change.get('newest', 6):08d}"
    monkeypatch.setattr(work, "log", lambda output: seen)
    monkeypatch.setattr(work, "newest", lambda output: newest)
    ended = kill_rig.Ended(-9, "phases: dense; continuing at step 6", "", True, 1.0)
    plan = kill_rig.Plan("step", "KILL", 6, 0.0)
    values = {key: change[key] for key in ("out", "err", "code") if key in change}
    broken = dataclasses.replace(ended, **values)
    with pytest.raises(kill_rig.RigError, match=message):
        kill_rig.check(work, "run0", plan, broken, 6, log)


def test_a_kept_promise_is_accepted(tmp_path, monkeypatch):
    work = kill_rig.Workplace(tmp_path)
    log = [{"kind": "train", "step": step, "loss": 1.0 / step} for step in range(1, 7)]
    monkeypatch.setattr(work, "log", lambda output: log[:5])
    monkeypatch.setattr(work, "newest", lambda output: tmp_path / "00000004")
    ended = kill_rig.Ended(-9, "phases: dense; continuing at step 4", "", True, 1.0)
    kill_rig.check(work, "run0", kill_rig.Plan("step", "KILL", 5, 0.0), ended, 4, log)
