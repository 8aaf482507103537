"""Runs side by side on several GPUs: which process sees which."""

import os
import subprocess

import pytest

from tests.train.study_processes import answer, see
from train.study import definition, devices
from train.study.definition import Options
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


def test_a_process_gets_runs_whose_programs_it_has(tmp_path):
    runs = definition.get("smoke", Options(seeds=(0, 1, 2))).runs
    by_key = {run.key: run for run in runs}
    with Pool(answer, "smoke", Folders(tmp_path, tmp_path), jobs=2) as pool:
        waiting = [by_key["relu2-seed1"], by_key["sparse-seed0"]]
        assert pool.pick(waiting) == 0
        for run in waiting:
            pool.start(run)
        ended = []
        while not ended:
            ended = pool.wait(0.2)
        process = ended[0].record["process"]
        # relu2 is compiled in the busy process, sparse in the idle one, swiglu in none.
        relu2, sparse, swiglu = (by_key[f"{k}-seed2"] for k in ("relu2", "sparse", "swiglu"))
        assert pool.pick([relu2, swiglu, sparse]) == 0  # beyond the two that would start soon
        assert pool.pick([relu2, sparse]) == 1
        assert pool.pick([swiglu, sparse]) == 0
        pool.start(sparse)
        (tmp_path / "end").touch()
        while pool.running:
            ended += pool.wait(0.2)
        assert process in {e.record["process"] for e in ended if e.run is sparse}
