"""Phases, events and learning-rate re-warming against a plain enumeration of steps."""

import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.schedule import PhaseSchedule, Span, rewarm_at_flips, sparsity_schedule

LENGTHS = st.integers(0, 12)


@given(LENGTHS, LENGTHS, LENGTHS)
def test_phases_agree_with_enumeration(warmup, sparse, after):
    phases = PhaseSchedule(warmup, sparse)
    steps = warmup + sparse + after
    expected = ["dense"] * warmup + ["sparse"] * sparse + ["dense"] * after
    assert [phases(step) for step in range(steps)] == expected
    listed = [s.phase for s in phases.spans(steps) for _ in range(s.start, s.stop)]
    assert listed == expected
    flag = sparsity_schedule(phases)
    traced = jax.jit(flag)
    for step in range(steps):
        assert float(flag(step)) == (expected[step] == "sparse")
    if steps:
        assert float(traced(steps - 1)) == (expected[-1] == "sparse")


@given(LENGTHS, LENGTHS, st.integers(0, 5))
def test_events_come_at_the_start_and_then_every_r_steps(warmup, sparse, refresh):
    phases = PhaseSchedule(warmup, sparse, refresh)
    events = {s: e for s in range(40) if (e := phases.event(s)) is not None}
    expected = {}
    if sparse:
        expected[warmup] = "begin"
    if refresh:
        expected |= {s: "refresh" for s in range(warmup + refresh, warmup + sparse, refresh)}
    assert events == expected


@given(LENGTHS, LENGTHS, LENGTHS)
def test_flips_are_where_the_phase_changes(warmup, sparse, after):
    phases = PhaseSchedule(warmup, sparse)
    steps = ["dense"] * warmup + ["sparse"] * sparse + ["dense"] * (after + 1)
    expected = {i: p for i, p in enumerate(steps) if i and p != steps[i - 1]}
    found = {i: p for i in range(len(steps)) if (p := phases.flip(i)) is not None}
    assert found == expected


def test_spans_of_a_run_shorter_than_its_schedule():
    assert list(PhaseSchedule(4, 8).spans(6)) == [Span("dense", 0, 4), Span("sparse", 4, 6)]


def test_rewarming_ramps_after_each_flip_only():
    phases = PhaseSchedule(10, 20)
    schedule = rewarm_at_flips(optax.constant_schedule(2.0), phases, 4)
    rates = np.array([float(schedule(s)) for s in range(40)])
    expected = np.full(40, 2.0)
    expected[10:14] = expected[30:34] = 2.0 * np.arange(1, 5) / 4
    np.testing.assert_allclose(rates, expected)
    dense_only = rewarm_at_flips(optax.constant_schedule(2.0), phases, 4, at=("dense",))
    expected[10:14] = 2.0
    np.testing.assert_allclose([float(dense_only(s)) for s in range(40)], expected)


def test_bad_lengths_are_refused():
    with pytest.raises(ValueError, match="sparse_steps=-1"):
        PhaseSchedule(0, -1)
    with pytest.raises(ValueError, match="rewarm_steps=-2"):
        rewarm_at_flips(optax.constant_schedule(1.0), PhaseSchedule(1, 1), -2)
