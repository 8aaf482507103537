"""What makes two runs the same, and what a result file holds."""

import dataclasses
import json
import math

import pytest

from sparsejax.spec import Sparsity
from train.config import (
    CheckpointConfig,
    Config,
    LogConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from train.data.config import DataConfig
from train.study import record
from train.study.record import config_hash, differences


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"output": "elsewhere"},
        {"checkpoint": CheckpointConfig(every=7)},
        {"log": LogConfig(tensorboard=True)},
        {"data": DataConfig(threads=5, cache="/tmp")},
        {"sparsity": Sparsity(m=8)},  # of a dense run
    ],
)
def test_convenience_makes_no_other_run(change):
    config = dataclasses.replace(Config(), **change)
    assert config_hash(config) == config_hash(Config())
    assert differences({"config": dataclasses.asdict(Config())}, config) == []


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"steps": 7}, "steps: 1000, now 7"),
        ({"seed": 3}, "seed: 0, now 3"),
        ({"log": LogConfig(eval_windows=5)}, "log.eval_windows: 64, now 5"),
        ({"data": DataConfig(source="x.bin")}, "data.source: embedded, now x.bin"),
        (
            {"optimizer": OptimizerConfig(learning_rate=1.0)},
            "optimizer.learning_rate: 0.003, now 1.0",
        ),
    ],
)
def test_what_decides_the_result_makes_another_run(change, line):
    config = dataclasses.replace(Config(), **change)
    assert config_hash(config) != config_hash(Config())
    stored = json.loads(json.dumps(dataclasses.asdict(Config())))
    assert differences({"config": stored}, config) == [line]


def test_a_dense_mixture_has_loads_to_even():
    config = dataclasses.replace(Config(), model=ModelConfig(experts=4))
    faster = dataclasses.replace(config, sparsity=Sparsity(bias_rate=0.5))
    stored = {"config": dataclasses.asdict(config)}
    assert config_hash(faster) != config_hash(config)
    assert differences(stored, faster) == ["sparsity.bias_rate: 0.001, now 0.5"]
    assert differences(stored, dataclasses.replace(config, sparsity=Sparsity(m=8))) == []


def test_a_new_switch_counts_as_its_default():
    stored = dataclasses.asdict(Config())
    del stored["optimizer"]["rewarm_steps"]
    assert differences({"config": stored}, Config()) == []
    sparse = dataclasses.replace(Config(), schedule=ScheduleConfig(sparse_fraction=0.5))
    stored = dataclasses.asdict(sparse)
    del stored["optimizer"]["rewarm_steps"]
    assert differences({"config": stored}, sparse) == []
    config = dataclasses.replace(sparse, optimizer=OptimizerConfig(rewarm_steps=4))
    assert differences({"config": stored}, config) == ["optimizer.rewarm_steps: 0, now 4"]
    config = dataclasses.replace(sparse, sparsity=Sparsity(m=8))
    assert "sparsity.m: 16, now 8" in differences({"config": stored}, config)
    assert config_hash(config) != config_hash(sparse)
    stored = dataclasses.asdict(Config())
    assert differences({"config": {**stored, "gone": 1}}, Config()) == ["gone: 1, now None"]


def test_stating_what_a_size_was_makes_no_other_run():
    open_ = dataclasses.replace(Config(), model=ModelConfig(ffn="relu2_gated"))
    stated = dataclasses.replace(open_, model=dataclasses.replace(open_.model, hidden=384))
    of_128 = {"config": dataclasses.asdict(open_), "model": {"hidden": 384, "parameters": 1}}
    assert differences(of_128, stated) == []
    other = dataclasses.replace(open_, model=dataclasses.replace(open_.model, hidden=512))
    assert differences(of_128, other) == ["model.hidden: 384, now 512"]
    for unknown in ({"model": None}, {}):
        found = differences({"config": dataclasses.asdict(open_), **unknown}, stated)
        assert found == ["model.hidden: None, now 384"]


def test_files_are_strict_json_and_whole(tmp_path):
    path = tmp_path / "results" / "a.json"
    record.write(path, {"format": record.FORMAT, "x": [math.nan, 1.0, {"y": math.inf}]})
    assert record.read(path)["x"] == [None, 1.0, {"y": None}]
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert record.read(tmp_path / "none.json") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"format": 99}'])
def test_foreign_files_are_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"a\.json is not"):
        record.read(path)


def test_a_log_that_ends_early_or_not_at_all(tmp_path):
    assert record.trained(tmp_path)["curve"]["step"] == []
    assert record.trained(tmp_path)["final"] == {}
    lines = [
        {"kind": "train", "step": 2, "phase": "dense", "loss": 3.0, "grad_norm": 1.0},
        {"kind": "eval", "step": 2, "loss_dense": 2.0},
        {"kind": "train", "step": 4, "phase": "sparse", "loss": 2.5, "expert_load_max": 1.5},
        {"kind": "eval", "step": 4, "loss_dense": None, "loss_sparse": 2.75},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"kind": "tr'
    (tmp_path / "metrics.jsonl").write_text(text)
    found = record.trained(tmp_path)
    assert found["curve"]["loss"] == [3.0, 2.5]
    assert found["curve"]["grad_norm"] == [1.0, None]
    assert found["evaluations"] == {
        "step": [2, 4],
        "loss_dense": [2.0, None],
        "loss_sparse": [None, 2.75],
    }
    assert found["final"] == {"loss_sparse": 2.75}
    assert found["best"]["loss_dense"] == {"loss": 2.0, "step": 2}
    assert (found["steps_done"], found["expert_load"], found["loop_seconds"]) == (4, 1.5, None)
