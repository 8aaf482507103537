"""Runs side by side on several GPUs: which process sees which."""

import os
import subprocess

import pytest

from train.study import definition, devices
from train.study.definition import Options, Run
from train.study.devices import VISIBLE, visible_gpus
from train.study.pool import Pool, sharers
from train.study.record import Folders


def test_gpus_are_found_without_jax(monkeypatch):
    listed = subprocess.CompletedProcess((), 0, stdout="0\n1\n2\n")
    monkeypatch.setattr(devices.subprocess, "run", lambda *_, **__: listed)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv(VISIBLE, raising=False)
    assert visible_gpus() == ["0", "1", "2"]
    monkeypatch.setenv(VISIBLE, "1, GPU-a")
    assert visible_gpus() == ["1", "GPU-a"]
    monkeypatch.setenv(VISIBLE, "")
    assert visible_gpus() == []
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv(VISIBLE, "0")
    assert visible_gpus() == []


def test_no_gpus_without_a_driver(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("nvidia-smi")

    monkeypatch.setattr(devices.subprocess, "run", missing)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv(VISIBLE, raising=False)
    assert visible_gpus() == []


@pytest.mark.parametrize(("jobs", "gpus", "most"), [(1, 0, 1), (3, 0, 3), (8, 4, 2), (5, 4, 2)])
def test_sharers(jobs, gpus, most):
    assert sharers(jobs, gpus) == most


def see(run: Run, study: str, folders: Folders, jobs: int):
    """What the process of a run sees; it waits until all four are there."""
    folders.scratch.joinpath(run.key).touch()
    while len(list(folders.scratch.glob("relu2*"))) < 4:
        pass
    return {"gpu": os.environ.get(VISIBLE), "jobs": jobs}


def test_processes_are_spread_evenly(tmp_path, monkeypatch):
    monkeypatch.delenv(VISIBLE, raising=False)
    runs = definition.get("smoke", Options(seeds=(0, 1, 2, 3))).runs
    runs = [run for run in runs if run.label == "relu2"]
    seen = []
    with Pool(see, "smoke", Folders(tmp_path, tmp_path), jobs=4, gpus=("3", "7")) as pool:
        for run in runs:
            pool.start(run)
        while pool.running:
            seen += [ended.record for ended in pool.wait(0.2)]
    assert sorted(record["gpu"] for record in seen) == ["3", "3", "7", "7"]
    assert {record["jobs"] for record in seen} == {2}
    assert VISIBLE not in os.environ
