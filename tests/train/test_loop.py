"""A whole run, small: three phases on the embedded text, its log, its plots, its bad ends."""

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest
from rich.console import Console

import configs
from train import loop
from train.config import (
    CheckpointConfig,
    Config,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from train.data.config import DataConfig
from train.loop import NonFiniteError, train
from train.run_folder import new_folder

SILENT = Console(quiet=True)


def small(folder, **changes) -> Config:
    base = configs.get("tiny")
    config = Config(
        name="small",
        output=str(folder),
        steps=30,
        batch_size=4,
        sequence_length=64,
        model=ModelConfig(width=32, num_layers=2, num_heads=2),
        sparsity=dataclasses.replace(base.sparsity, m=8, v=32, refresh_every=6),
        schedule=ScheduleConfig(warmup_steps=8, sparse_fraction=0.5),
        optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=4),
        checkpoint=CheckpointConfig(every=10),
        log=LogConfig(every=3, eval_every=10, eval_windows=6),
    )
    return dataclasses.replace(config, **changes)


def two_steps(folder, **changes) -> Config:
    """Of `small`, dense: what happens before and after them matters."""
    optimizer = OptimizerConfig(warmup_steps=1)
    return small(folder, steps=2, schedule=ScheduleConfig(), optimizer=optimizer, **changes)


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory):
    config = small(tmp_path_factory.mktemp("runs"))
    return config, train(config, console=SILENT)


@pytest.mark.core
def test_all_three_phases_run_and_the_loss_falls(run):
    _, result = run
    assert result.finished
    assert result.step == 30
    steps = [r for r in records(result.folder) if r["kind"] == "train"]
    phases = {r["step"]: r["phase"] for r in steps}
    # A step is named by how many are done after it: 8 dense, 15 sparse, 7 dense.
    assert {p for s, p in phases.items() if 8 < s <= 23} == {"sparse"}
    assert {p for s, p in phases.items() if not 8 < s <= 23} == {"dense"}
    assert steps[-1]["loss"] < steps[0]["loss"] - 1.0
    loads = [r["expert_load_max"] for r in steps if r["phase"] == "sparse"]
    assert all(1.0 <= load <= 2.0 for load in loads)


def test_clusterings_say_what_they_moved(run):
    _, result = run
    moved = {r["step"]: r for r in records(result.folder) if r["kind"] == "clusters"}
    # At the start of the sparse phase, and every six steps.
    assert sorted(moved) == [8, 14, 20]
    assert all(len(r["neuron_churn"]) == 2 for r in moved.values())
    assert "token_churn" not in moved[8]
    for step in (14, 20):
        assert 0 < moved[step]["token_churn_mean"] < 1
        mean = np.mean(moved[step]["token_churn"])
        np.testing.assert_allclose(moved[step]["token_churn_mean"], mean)


def test_both_views_are_evaluated_once_there_are_clusters(run):
    _, result = run
    evals = {r["step"]: r for r in records(result.folder) if r["kind"] == "eval"}
    assert sorted(evals) == [10, 20, 30]
    for r in evals.values():
        assert np.isfinite([r["loss_dense"], r["loss_sparse"]]).all()
    assert evals[30]["loss_dense"] < evals[10]["loss_dense"]
    assert result.losses["loss_dense"] == evals[30]["loss_dense"]
    # Each view is better at the end of its own phase than the other way round.
    gap = {step: r["loss_sparse"] - r["loss_dense"] for step, r in evals.items()}
    assert gap[20] < gap[30]


def test_the_folder_holds_what_a_user_looks_for(run):
    config, result = run
    assert (result.folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((result.folder / "config.json").read_text())
    assert written["steps"] == config.steps
    assert written["model"]["vocab_size"] == 384
    assert any((result.folder / "checkpoints").iterdir())


def test_a_second_run_of_the_same_name_gets_its_own_folder(run):
    config, first = run
    before = (first.folder / "metrics.jsonl").read_bytes()
    second = train(two_steps(config.output), console=SILENT)
    assert second.folder.name == "small-2"
    assert (first.folder / "metrics.jsonl").read_bytes() == before


def test_the_same_run_twice_gives_the_same_losses(run, tmp_path):
    config, first = run
    again = train(dataclasses.replace(config, output=str(tmp_path)), console=SILENT)
    losses = lambda folder: [r["loss"] for r in records(folder) if r["kind"] == "train"]
    assert losses(again.folder) == losses(first.folder)


def test_resuming_a_finished_run_does_nothing_at_once(run, tmp_path):
    config, first = run
    folder = shutil.copytree(first.folder, tmp_path / "small")
    console = Console(record=True, file=io.StringIO(), width=200)
    again = train(dataclasses.replace(config, output=str(tmp_path)), resume=True, console=console)
    assert (again.folder, again.step, again.finished) == (folder, 30, True)
    said = console.export_text()
    assert "finished already" in said
    assert "compiled" not in said
    assert records(folder) == records(first.folder)


def test_a_run_without_a_last_checkpoint_writes_none(tmp_path, monkeypatch):
    data = DataConfig(seed=5)
    seeds = []
    open_data = loop.open_data
    spy = lambda *args, seed, **options: (
        seeds.append(seed) or open_data(*args, seed=seed, **options)
    )
    monkeypatch.setattr(loop, "open_data", spy)
    config = two_steps(
        tmp_path,
        checkpoint=CheckpointConfig(every=0, final=False),
        data=data,
    )
    result = train(config, console=SILENT)
    assert result.finished
    assert result.losses["loss_dense"] > 0
    assert not (result.folder / "checkpoints").exists()
    assert seeds == [5]


def test_a_run_without_held_out_text_has_no_evaluations(tmp_path):
    config = two_steps(
        tmp_path,
        data=DataConfig(validation_fraction=0.0),
        log=LogConfig(every=1, eval_every=1),
    )
    result = train(config, console=SILENT)
    assert result.finished
    assert result.losses == {}
    assert [r["kind"] for r in records(result.folder)] == ["train", "train", "summary"]


def test_a_run_killed_before_its_first_checkpoint_resumes_from_the_start(tmp_path):
    config = two_steps(tmp_path, checkpoint=CheckpointConfig(every=0))
    first = train(config, console=SILENT)
    shutil.rmtree(first.folder / "checkpoints")
    console = Console(record=True, quiet=False, file=io.StringIO(), width=200)
    again = train(config, resume=True, console=console)
    assert again.folder == first.folder
    assert "no complete checkpoint" in console.export_text()
    assert [r["step"] for r in records(again.folder) if r["kind"] == "train"] == [2]


def test_a_run_killed_when_it_had_its_folder_resumes_from_the_start(tmp_path):
    config = two_steps(
        tmp_path,
        checkpoint=CheckpointConfig(every=0),
    )
    folder = new_folder(config)
    assert train(config, resume=True, console=SILENT).folder == folder
    assert json.loads((folder / "config.json").read_text())["steps"] == 2


def test_a_run_refused_before_its_first_step_leaves_no_folder(tmp_path):
    """Else --resume would take that, and not the run before it."""
    config = small(tmp_path)
    kernels = dataclasses.replace(config.sparsity, backend="hopper")  # these sizes: on no device
    with pytest.raises(NotImplementedError, match="hopper"):
        train(dataclasses.replace(config, sparsity=kernels), console=SILENT)
    assert not list(tmp_path.iterdir())


def test_a_non_finite_loss_stops_the_run_and_says_where(tmp_path):
    bad = OptimizerConfig(learning_rate=1e30, warmup_steps=0, clip_norm=0.0)
    config = small(tmp_path, optimizer=bad, checkpoint=CheckpointConfig(every=1))
    with pytest.raises(NonFiniteError, match=r"(loss|grad_norm) is (nan|inf) at step \d+ of 30"):
        train(config, console=SILENT)
    # The checkpoint of the last step with a finite loss is there.
    assert any((tmp_path / "small" / "checkpoints").iterdir())
