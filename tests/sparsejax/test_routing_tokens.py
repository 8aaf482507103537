"""Token assignment, load evening and the plan, against numpy."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.routing import (
    assign_tokens,
    fit_bias,
    plan_tokens,
    token_scores,
    update_bias,
)


def oracle_plan(expert: np.ndarray, num_experts: int, v: int):
    """Row lists, built by appending."""
    tokens = len(expert)
    rows: list[int] = []
    blocks: list[int] = []
    offsets = [0]
    for e in range(num_experts):
        own = [t for t in range(tokens) if expert[t] == e]
        own += [tokens] * (-len(own) % v)
        rows += own
        blocks += [e] * (len(own) // v)
        offsets.append(len(rows))
    size = -(-(tokens + num_experts * (v - 1)) // v) * v
    rows += [tokens] * (size - len(rows))
    blocks += [num_experts - 1] * (size // v - len(blocks))
    return rows, blocks, offsets


plan_jit = jax.jit(plan_tokens, static_argnums=(1, 2))


@given(
    st.sampled_from([(1, 4, 8), (40, 1, 8), (37, 4, 8), (24, 2, 1), (30, 8, 5)]),
    st.integers(0, 2**32 - 1),
)
def test_plan_matches_the_oracle(size, seed):
    tokens, experts, v = size
    rng = np.random.default_rng(seed)
    # A random subset of the experts is used, often one alone.
    used = rng.permutation(experts)[: rng.integers(1, experts + 1)]
    expert = rng.choice(used, tokens).astype(np.int32)
    plan = plan_jit(jnp.array(expert), experts, v)
    rows, blocks, offsets = oracle_plan(expert, experts, v)
    np.testing.assert_array_equal(plan.permutation, rows)
    np.testing.assert_array_equal(plan.block_expert, blocks)
    np.testing.assert_array_equal(plan.offsets, offsets)
    np.testing.assert_array_equal(plan.counts, np.bincount(expert, minlength=experts))
    # Nothing is dropped: every token has one row, which holds it, in a block of its expert.
    inverse = np.asarray(plan.inverse)
    np.testing.assert_array_equal(np.asarray(plan.permutation)[inverse], np.arange(tokens))
    np.testing.assert_array_equal(np.asarray(plan.block_expert)[inverse // v], expert)


def test_plan_is_one_program_for_every_distribution():
    traces = []

    @jax.jit
    def plan(expert):
        traces.append(1)
        return plan_tokens(expert, 4, 8)

    for expert in (np.zeros(100), np.full(100, 3), np.arange(100) % 4, np.arange(100) // 99):
        got = plan(jnp.array(expert, jnp.int32))
        np.testing.assert_array_equal(got.permutation, oracle_plan(expert, 4, 8)[0])
    assert len(traces) == 1


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_tokens_go_to_the_nearest_center(metric, dtype):
    rng = np.random.default_rng(0)
    x = jnp.array(2 * rng.normal(size=(200, 16)), dtype)
    # Centres whose unit vectors, and themselves, are exact in bfloat16.
    centers = np.array(
        [[1.0] * 16, [1.0, -1.0] * 8, [0.5] * 8 + [-0.5] * 8, [0.25, 0.25, -0.25, -0.25] * 4]
    )
    got = np.asarray(assign_tokens(x, jnp.array(centers, jnp.float32), metric=metric))
    exact = np.asarray(x).astype(np.float64)
    if metric == "cosine":
        unit = exact / np.linalg.norm(exact, axis=1, keepdims=True)
        want = np.argmax(
            unit @ (centers / np.linalg.norm(centers, axis=1, keepdims=True)).T, axis=1
        )
    else:
        want = np.argmin(((exact[:, None] - centers) ** 2).sum(axis=-1), axis=1)
    np.testing.assert_array_equal(got, want)
    assert len(set(want.tolist())) == 4
    scores = token_scores(x, jnp.array(centers, jnp.float32), metric)
    assert scores.dtype == jnp.float32


def test_ties_go_to_the_lower_index_and_the_bias_counts():
    x = jnp.ones((3, 8))
    centers = jnp.ones((4, 8))
    np.testing.assert_array_equal(assign_tokens(x, centers), 0)
    np.testing.assert_array_equal(assign_tokens(x, jnp.zeros((4, 8))), 0)
    bias = jnp.array([0.0, 0.1, 0.3, 0.3])
    np.testing.assert_array_equal(assign_tokens(x, centers, bias), 2)
    # A difference of scores of 0.2 is a difference of cosines of 0.2.
    opposed = jnp.array([[1.0] + [0.0] * 7, [0.6, 0.8] + [0.0] * 6])
    token = jnp.array([[1.0] + [0.0] * 7])
    np.testing.assert_array_equal(assign_tokens(token, opposed, jnp.array([0.0, 0.39])), 0)
    np.testing.assert_array_equal(assign_tokens(token, opposed, jnp.array([0.0, 0.41])), 1)


def test_no_gradient_flows_through_the_choice():
    x, c = (
        jax.random.normal(jax.random.key(0), (8, 16)),
        jax.random.normal(jax.random.key(1), (4, 16)),
    )

    def loss(x, c, b):
        return jnp.sum(assign_tokens(x, c, b) * x[:, 0])

    gx, gc, gb = jax.grad(loss, argnums=(0, 1, 2))(x, c, jnp.zeros(4))
    np.testing.assert_array_equal(gx[:, 1:], 0)
    np.testing.assert_array_equal(gc, 0)
    np.testing.assert_array_equal(gb, 0)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_loads_even_out_on_skewed_data(metric):
    """Tokens with a strong common direction all prefer one expert until the bias has grown."""
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(4, 32))
    data = rng.normal(size=(64, 512, 32)) + 3.0 * centers[1] / np.linalg.norm(centers[1])
    experts, batches = jnp.array(centers, jnp.float32), jnp.array(data, jnp.float32)

    def step(bias, x):
        counts = jnp.bincount(assign_tokens(x, experts, bias, metric), length=4)
        return update_bias(bias, counts, 0.005), counts

    def epoch(bias, _):
        return jax.lax.scan(step, bias, batches)

    bias, counts = jax.jit(lambda b: jax.lax.scan(epoch, b, length=4))(jnp.zeros(4))
    counts = np.asarray(counts).reshape(-1, 4)
    assert counts[0].max() / counts[0].mean() > 2
    late = counts[-64:]
    assert late.max() / late.mean() < 1.25
    assert late.mean(axis=0).max() / late.mean() < 1.02
    assert abs(float(bias.mean())) < 1e-6


def test_bias_rule():
    bias = jnp.array([[0.0, 0.0, 0.0, 0.0], [0.5, -0.5, 0.25, -0.25]])
    counts = jnp.array([[400, 0, 0, 0], [50, 50, 100, 200]])
    got = np.asarray(update_bias(bias, counts, 0.01))
    # First row: clip((100 - 400) / 100) = -1 and three times +1, less their mean of 0.5.
    np.testing.assert_allclose(got[0], [-0.015, 0.005, 0.005, 0.005], rtol=1e-5)
    step = np.array([0.5, 0.5, 0.0, -1.0])
    np.testing.assert_allclose(got[1] - np.asarray(bias[1]), 0.01 * step, atol=1e-7)
    # At rest when even; no tokens, no change.
    even = jnp.full((2, 4), 7)
    np.testing.assert_array_equal(update_bias(bias, even, 0.01), bias)
    np.testing.assert_array_equal(update_bias(bias, jnp.zeros((2, 4), jnp.int32), 0.01), bias)


def test_bad_arguments():
    x, c = jnp.ones((4, 8)), jnp.ones((2, 8))
    with pytest.raises(ValueError, match="metric='dot'"):
        assign_tokens(x, c, metric="dot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape"):
        assign_tokens(x, jnp.ones((2, 9)))
    with pytest.raises(ValueError, match="bias"):
        assign_tokens(x, c, jnp.zeros(3))
    with pytest.raises(ValueError, match="vector"):
        plan_tokens(jnp.zeros((0,), jnp.int32), 2, 4)
    with pytest.raises(ValueError, match="v=0"):
        plan_tokens(jnp.zeros((3,), jnp.int32), 2, 0)
    with pytest.raises(ValueError, match="counts"):
        update_bias(jnp.zeros(3), jnp.zeros(4), 0.1)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("experts", [2, 8])
def test_fitted_biases_even_the_load_of_their_tokens(experts, metric):
    rng = np.random.default_rng(experts)
    # Tokens around one direction: without biases almost all of them meet one expert.
    x = jnp.array(rng.normal(size=(600, 16)) + 3 * rng.normal(size=16), jnp.float32)
    centers = jnp.array(rng.normal(size=(experts, 16)), jnp.float32)
    load = lambda bias: np.bincount(assign_tokens(x, centers, bias, metric), minlength=experts)
    start = jnp.zeros((experts,), jnp.float32)
    assert load(start).max() > 0.6 * 600
    scores = token_scores(x, centers, metric)
    bias = jax.jit(fit_bias)(scores, start)
    assert np.abs(load(bias) - 600 / experts).max() <= 2
    np.testing.assert_allclose(np.mean(bias), 0, atol=1e-6)
    # From a good start it stays there; a constant in the scores changes nothing.
    again = fit_bias(scores, bias)
    np.testing.assert_allclose(again, bias, atol=1e-3)
    np.testing.assert_allclose(fit_bias(scores + 5.0, start), bias, atol=1e-3)


def test_biases_of_too_few_tokens_are_not_fitted():
    with pytest.raises(ValueError, match="tokens=3 must be at least experts=4"):
        fit_bias(jnp.zeros((3, 4)), jnp.zeros(4))
    with pytest.raises(ValueError, match="must be"):
        fit_bias(jnp.zeros((8, 4)), jnp.zeros(3))
    np.testing.assert_array_equal(fit_bias(jnp.ones((8, 1)), jnp.zeros(1)), [0.0])


@pytest.mark.parametrize("tokens", [512, 500, 7])
def test_spread_tokens_have_neighbours_from_elsewhere(tokens):
    expert = np.random.default_rng(0).integers(0, 3, tokens).astype(np.int32)
    plan = plan_tokens(jnp.array(expert), 4, 8, spread=True)
    plain = plan_tokens(jnp.array(expert), 4, 8)
    for name in ("block_expert", "counts", "offsets"):
        np.testing.assert_array_equal(getattr(plan, name), getattr(plain, name))
    np.testing.assert_array_equal(plan.permutation[plan.inverse], np.arange(tokens))
    permutation = np.asarray(plan.permutation)
    runs = math.gcd(tokens, 64)
    for e in range(4):
        first = int(plan.offsets[e])
        own = permutation[first : first + int(plan.counts[e])]
        assert sorted(own) == list(np.flatnonzero(expert == e))
        # Place in a run first, then the run.
        order = sorted(own, key=lambda t: (t % (tokens // runs), t // (tokens // runs)))
        np.testing.assert_array_equal(own, order)
