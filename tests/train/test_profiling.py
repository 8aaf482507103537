"""A trace of the steps that were asked for, in the run's folder."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from train import main
from train.profiling import Profiler, parse_steps


def step_names(folder):
    """Numbers of the steps that the trace in `folder` holds."""
    (file,) = folder.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    steps = [e["args"]["step_num"] for e in events if e.get("name") == "train"]
    return sorted(map(int, steps))


@pytest.fixture
def chosen(tmp_path):
    """Profiles steps 3 and 4; what it said and how often it paused are kept with it."""
    said, paused = [], []

    class Pause:
        def __enter__(self):
            paused.append("in")

        def __exit__(self, *_):
            paused.append("out")

    profiler = Profiler(range(3, 5), tmp_path / "profile", pause=Pause, say=said.append)
    return profiler, said, paused


def test_the_chosen_steps_are_traced_and_no_others(tmp_path, chosen):
    profiler, said, paused = chosen
    double = jax.jit(lambda x: 2 * x)
    with profiler:
        for step in range(8):
            assert profiler.run(step, double, jnp.float32(step)) == 2 * step
            assert (tmp_path / "profile").exists() == (step >= 4)
    assert step_names(tmp_path / "profile") == [3, 4]
    assert said == [f"profile of steps 3 to 4 in {tmp_path / 'profile'}"]
    assert paused == ["in", "out"] * 2


def test_a_run_that_ends_early_still_writes_its_trace(tmp_path, chosen):
    profiler, *_ = chosen
    profiler.run(3, lambda: jnp.ones(3))
    with pytest.raises(ZeroDivisionError), profiler:
        _ = 1 / 0
    assert step_names(tmp_path / "profile") == [3]
    # The profiler is free again.
    with Profiler(range(1), tmp_path / "again") as again:
        again.run(0, lambda: jnp.ones(3))
    assert step_names(tmp_path / "again") == [0]


def test_a_resumed_run_traces_what_is_left(tmp_path, chosen):
    profiler, *_ = chosen
    with profiler:
        profiler.run(4, lambda: jnp.ones(3))
        profiler.run(5, lambda: jnp.ones(3))
    assert step_names(tmp_path / "profile") == [4]


def test_no_steps_no_trace(tmp_path):
    with Profiler(parse_steps(None, steps=10), tmp_path / "profile") as profiler:
        assert [profiler.run(i, lambda i=i: i) for i in range(3)] == [0, 1, 2]
    assert not (tmp_path / "profile").exists()


def test_parse_steps():
    assert parse_steps("0:1", steps=1) == range(1)
    assert parse_steps("20:25", steps=100) == range(20, 25)
    assert parse_steps(None, steps=100) == range(0)


@pytest.mark.parametrize("text", ["", "5", "5:5", "6:5", "-1:3", "a:b", "0:11", "1:2:3", "0:٣x"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=r"must be A:B with 0 <= A < B <= steps=10"):
        parse_steps(text, steps=10)


def test_command_line(tmp_path, capsys):
    small = ["--steps", "3", "--batch-size", "2", "--sequence-length", "16", "--model.width", "16"]
    small += ["--model.num-layers", "1", "--model.num-heads", "1", "--model.hidden", "16"]
    small += ["--schedule.warmup-steps", "0", "--schedule.sparse-fraction", "0"]
    small += ["--optimizer.warmup-steps", "1", "--log.eval-windows", "2", "--log.every", "1"]
    out = ["--output", str(tmp_path)]
    assert main.main([*small, *out, "--profile.steps", "1:3"]) == 0
    assert "profile of steps 1 to 2" in capsys.readouterr().out
    assert step_names(tmp_path / "tiny" / "profile") == [1, 2]
    assert main.main([*small, *out, "--profile.steps", "3:4"]) == 2
    assert "error: profile.steps='3:4' must be A:B" in capsys.readouterr().err
