"""Runs of one process share what they compile, and only what is the same."""

import dataclasses

import pytest
from rich.console import Console

from configs.studies._base import changed
from train import metrics
from train.loop import train
from train.optimizer import learning_rate_schedule
from train.programs import compiled_from, step_compiled_from
from train.study import definition
from train.study.definition import Options

SILENT = Console(quiet=True)


def small():
    runs = definition.get("smoke", Options()).runs
    config = next(run.config for run in runs if run.label == "sparse")
    return changed(dataclasses.replace(config, steps=8), schedule={"warmup_steps": 2})


def losses(config, folder, shared):
    config = dataclasses.replace(config, output=str(folder))
    result = train(config, console=SILENT, shared=shared)
    lines = [r for r in metrics.read(result.folder / metrics.FILE_NAME) if r["kind"] == "train"]
    return result.losses, [r["learning_rate"] for r in lines]


def test_another_seed_and_schedule_compile_nothing(tmp_path):
    shared = {}
    first = small()
    losses(first, tmp_path / "a", shared)
    programs = dict(shared)
    assert len(programs) == 5  # two steps, two views, one clustering
    optimizer = {"learning_rate": 3e-3, "decay": "linear", "final_fraction": 0.0, "rewarm_steps": 1}
    other = dataclasses.replace(changed(first, optimizer=optimizer), seed=5)
    found, rates = losses(other, tmp_path / "b", shared)
    assert shared == programs
    # As if they had been its own, and with its own rates.
    alone, _ = losses(other, tmp_path / "c", None)
    assert found == alone
    assert rates[-1] == pytest.approx(float(learning_rate_schedule(other)(7)), abs=1e-9)


def test_the_key_keeps_what_is_compiled():
    config = small()
    for changes in (
        {"optimizer": {"weight_decay": 0.2}},
        {"optimizer": {"attention_rate": 0.5}},
        {"optimizer": {"reset_moments": "dense"}},
        {"schedule": {"rescale_dense": True}},
        {"schedule": {"threshold_dense": True}},
        {"model": {"ffn": "relu2_gated"}},
        {"sparsity": {"m": 16}},
        {"sparsity": {"metric": "l2"}},
        {"sparsity": {"kmeans_iterations": 3}},
        {"schedule": {"sparse_fraction": 0.0}},
    ):
        assert compiled_from(changed(config, **changes)) != compiled_from(config), changes
    for changes in (
        {"optimizer": {"learning_rate": 0.5, "warmup_steps": 1}},
        {"schedule": {"warmup_steps": 1, "sparse_fraction": 0.25}},
        {"sparsity": {"refresh_every": 3}},
    ):
        assert compiled_from(changed(config, **changes)) == compiled_from(config), changes
    resets = changed(config, optimizer={"reset_moments": "dense"}, schedule={"rescale_dense": True})
    assert step_compiled_from(resets) == step_compiled_from(config)
    thresholds = changed(config, schedule={"threshold_dense": True})
    assert step_compiled_from(thresholds) == step_compiled_from(config)
