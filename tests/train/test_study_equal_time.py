"""Speed of whole runs, and configurations of equal wall-clock."""

import dataclasses
import json

import numpy as np
import pytest

import configs
from train.config import Config, OptimizerConfig, ScheduleConfig, validate
from train.optimizer import learning_rate_schedule
from train.study.equal_time import (
    Speedups,
    dense_tokens,
    equal_time,
    read_speedups,
    scale_steps,
    whole_run_speedup,
)


def dense_small():
    config = configs.get("small")
    schedule = dataclasses.replace(config.schedule, warmup_steps=0, sparse_fraction=0.0)
    return dataclasses.replace(config, schedule=schedule)


def test_whole_run_speedup():
    # A third of the time is dense, the other two halve: 3 / (1 + 1).
    assert whole_run_speedup(2 / 3, 2.0) == pytest.approx(1.5)
    assert whole_run_speedup(0.0, 1.7) == 1.0
    assert whole_run_speedup(1.0, 1.7) == pytest.approx(1.7)
    for bad in ((-0.1, 1.3), (1.1, 1.3), (0.5, 0.0)):
        with pytest.raises(ValueError, match="must be"):
            whole_run_speedup(*bad)


@pytest.mark.parametrize("speedup", [0.8, 1.3, 2.0])
def test_equal_time_both_ways_round(speedup):
    dense, sparse = dense_small(), configs.get("small")
    longer = equal_time(sparse, dense, speedup)
    shorter = equal_time(dense, sparse, speedup)
    # Time in seconds, counted step by step: a dense step takes 1, a sparse one 1 / s.
    seconds = lambda c: c.steps - c.sparse_steps + c.sparse_steps / speedup
    assert seconds(longer) == pytest.approx(dense.steps, abs=1.0)
    assert seconds(shorter) == pytest.approx(seconds(sparse), abs=1.0)
    assert (longer.steps > sparse.steps) == (speedup > 1)
    assert longer.sparse_steps / longer.steps == pytest.approx(0.5, abs=1e-3)
    assert dense_tokens(longer, speedup) == pytest.approx(
        seconds(longer) * longer.tokens_per_step, rel=1e-6
    )
    validate(longer)
    validate(shorter)


def test_equal_time_counts_tokens_and_not_steps():
    dense = dense_small()
    halved = dataclasses.replace(dense, batch_size=dense.batch_size // 2)
    assert equal_time(halved, dense, 1.3).steps == 2 * dense.steps


def test_the_whole_schedule_scales():
    config = configs.get("small")
    optimizer = dataclasses.replace(config.optimizer, rewarm_steps=20)
    schedule = dataclasses.replace(config.schedule, warmup_steps=140)
    config = dataclasses.replace(config, optimizer=optimizer, schedule=schedule)
    twice = scale_steps(config, 2.0)
    assert (twice.steps, twice.log.eval_every) == (2800, 400)
    assert twice.schedule.warmup_steps == 280
    assert twice.sparsity == config.sparsity
    at = np.array([40, 99, 150, 700, 845, 1300])
    rates = np.array([learning_rate_schedule(config)(s) for s in at])
    stretched = np.array([learning_rate_schedule(twice)(2 * s + 1) for s in at])
    np.testing.assert_allclose(stretched, rates, rtol=1e-3)
    with pytest.raises(ValueError, match="at least one step"):
        scale_steps(config, 1e-4)


@pytest.mark.parametrize(
    ("steps", "warmup", "share", "factor"), [(10, 1, 0.9, 1.5), (10, 2, 0.84, 10)]
)
def test_a_sparse_phase_up_to_the_end_still_fits(steps, warmup, share, factor):
    schedule = ScheduleConfig(warmup_steps=warmup, sparse_fraction=share)
    optimizer = OptimizerConfig(warmup_steps=0)
    config = Config(steps=steps, schedule=schedule, optimizer=optimizer)
    validate(config)
    scaled = scale_steps(config, factor)
    validate(scaled)
    assert scaled.steps == round(factor * steps)
    assert scaled.schedule.warmup_steps + scaled.sparse_steps == scaled.steps


def test_evaluation_only_at_the_end_stays_so():
    config = configs.get("small")
    config = dataclasses.replace(config, log=dataclasses.replace(config.log, eval_every=0))
    assert scale_steps(config, 2.0).log.eval_every == 0


def test_speedups_by_label():
    speedups = Speedups(1.2, {"sparse": 1.4, "sparse, M8": 1.1})
    assert speedups.of("sparse") == 1.4
    assert speedups.of("sparse, equal time") == 1.4
    assert speedups.of("sparse, M8") == 1.1
    assert speedups.of("other") == 1.2
    # Labels with a share of sparse steps: the share's own, or that of the kind.
    shares = Speedups(None, {"M16": 1.3, "M16 70%": 1.4, "gated M16": 1.5})
    assert shares.of("M16 50%, equal time") == 1.3
    assert shares.of("M16 70%, equal time") == 1.4
    assert shares.of("gated M16 70%") == 1.5
    assert shares.of("M32 70%") is None
    faster = Speedups(1.2, {"M16": 1.3, "M16 50%, 8 bits": None})
    assert faster.of("M16 50%, 8 bits") is None
    assert faster.of("M16 50%, warm-up") == 1.3
    with pytest.raises(ValueError, match=r"'other'.*--speedup"):
        Speedups().required("other")
    for bad in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="positive"):
            Speedups(bad)


def test_read_speedups(tmp_path):
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"config": "llama1b", "sparse_step_speedup": 1.25}))
    assert read_speedups(file) == Speedups(1.25)
    file.write_text(json.dumps({"sparse_step_speedup": {"default": 1.2, "M8": 1}}))
    assert read_speedups(file) == Speedups(1.2, {"M8": 1.0})
    file.write_text(json.dumps({"sparse_step_speedup": {"M16": 1.2, "M16, 8 bits": None}}))
    assert read_speedups(file) == Speedups(None, {"M16": 1.2, "M16, 8 bits": None})
    # A result of the step benchmark: its default is one recipe's.
    found = {"default": 1.4, "M=16": 1.4, "M=32": 1.5}
    file.write_text(json.dumps({"benchmark": "train_step", "sparse_step_speedup": found}))
    assert read_speedups(file) == Speedups(None, {"M16": 1.4, "M32": 1.5})
    for bad in (
        "[1.3]",
        "{}",
        '{"sparse_step_speedup": "1.3"}',
        '{"sparse_step_speedup": {}}',
        '{"sparse_step_speedup": null}',
        '{"sparse_step_speedup": {"M16": null}}',
    ):
        file.write_text(bad)
        with pytest.raises(ValueError, match="sparse_step_speedup"):
            read_speedups(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        read_speedups(file)
    with pytest.raises(OSError, match="nowhere"):
        read_speedups(tmp_path / "nowhere.json")
