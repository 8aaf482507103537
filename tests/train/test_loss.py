"""The chunked cross-entropy against a float64 numpy oracle, values and gradients."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.loss import _top_and_total, cross_entropy

T, D, V = 24, 16, 40


def oracle(x, head, targets, weights):
    """Mean loss and gradients in float64, from the textbook formulas."""
    logits = x @ head
    top = logits.max(-1, keepdims=True)
    p = np.exp(logits - top)
    z = p.sum(-1, keepdims=True)
    losses = (np.log(z) + top)[:, 0] - logits[np.arange(len(x)), targets]
    w = weights / weights.sum()
    d = (p / z - np.eye(head.shape[1])[targets]) * w[:, None]
    return (losses * w).sum(), d @ head.T, x.T @ d


@pytest.fixture(name="case")
def _case():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(T, D)) * 3
    return x, rng.normal(size=(D, V)), rng.integers(0, V, T), rng.integers(0, 2, T).astype(float)


@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 1000])
def test_value_and_gradients(case, chunk):
    x, head, targets, weights = case
    f = lambda x, head: cross_entropy(x, head, jnp.asarray(targets), weights, chunk=chunk)
    loss, (dx, dhead) = jax.value_and_grad(f, (0, 1))(jnp.float32(x), jnp.float32(head))
    want, want_dx, want_dhead = oracle(*case)
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_allclose(dx, want_dx, atol=1e-5)
    np.testing.assert_allclose(dhead, want_dhead, atol=1e-5)


def test_no_weights_means_all_ones(case):
    x, head, targets, _ = case
    loss = cross_entropy(jnp.float32(x), jnp.float32(head), jnp.asarray(targets), chunk=6)
    np.testing.assert_allclose(loss, oracle(x, head, targets, np.ones(T))[0], rtol=1e-5)


def test_bf16_keeps_gradient_dtypes_and_accuracy(case):
    x, head, targets, weights = case
    x16 = jnp.asarray(x, jnp.bfloat16)
    f = lambda x, head: cross_entropy(x, head, jnp.asarray(targets), weights, chunk=8)
    loss, (dx, dhead) = jax.value_and_grad(f, (0, 1))(x16, jnp.float32(head))
    want, want_dx, want_dhead = oracle(np.float64(x16), head, targets, weights)
    chex.assert_type([dx, dhead], [jnp.bfloat16, jnp.float32])
    np.testing.assert_allclose(loss, want, rtol=2e-2)
    for got, expected in ((dx, want_dx), (dhead, want_dhead)):
        error = np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(expected)
        assert error < 2e-2


def test_all_logits_never_exist():
    """No intermediate of the compiled gradient is as large as all logits."""
    tokens, width, vocabulary, chunk = 512, 8, 4096, 32
    x = jax.ShapeDtypeStruct((tokens, width), jnp.float32)
    head = jax.ShapeDtypeStruct((width, vocabulary), jnp.float32)
    targets = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    grad = jax.jit(jax.grad(lambda x, h, t: cross_entropy(x, h, t, chunk=chunk), (0, 1)))
    memory = grad.lower(x, head, targets).compile().memory_analysis()
    assert memory.temp_size_in_bytes < tokens * vocabulary * 4 / 2


def test_logits_may_be_stored_in_the_compute_dtype(case):
    """Loss and gradients stay within rounding of the exact ones."""
    x, head, targets, weights = case
    x16, head = jnp.asarray(x, jnp.bfloat16), jnp.float32(head)
    f = lambda x, head, dtype: cross_entropy(
        x, head, jnp.asarray(targets), weights, chunk=8, logits_dtype=dtype
    )
    loss, (dx, dhead) = jax.value_and_grad(f, (0, 1))(x16, head, jnp.bfloat16)
    want, want_dx, want_dhead = oracle(np.float64(x16), np.float64(head), targets, weights)
    chex.assert_type([loss, dx, dhead], [jnp.float32, jnp.bfloat16, jnp.float32])
    np.testing.assert_allclose(loss, want, rtol=2e-2)
    for got, expected in ((dx, want_dx), (dhead, want_dhead)):
        error = np.linalg.norm(np.float64(got) - expected) / np.linalg.norm(expected)
        assert error < 3e-2


def test_the_denominator_of_logits_far_apart():
    """Sums of exponentials that overflow, vanish or start late, in one pass as in float64."""
    rng = np.random.default_rng(1)
    rows = np.stack(
        [
            rng.normal(size=300) * 5,
            np.linspace(-1e4, 1e4, 300),
            np.linspace(1e4, -1e4, 300),
            np.zeros(300),
            np.full(300, -3e38),
            np.r_[np.full(299, -1e30), 1e30],
            np.r_[88.0, np.full(299, -88.0)],
            np.r_[np.full(299, -np.inf), 2.0],
        ]
    )
    top, total = jax.jit(_top_and_total)(jnp.float32(rows))
    want = np.float32(rows).astype(np.float64)
    np.testing.assert_array_equal(top, want.max(1))
    with np.errstate(over="ignore"):
        exact = np.exp(want - want.max(1, keepdims=True)).sum(1)
    np.testing.assert_allclose(total, exact, rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_logit_that_is_no_number_shows_in_the_loss(case, bad):
    x, head, targets, weights = case
    head = head.copy()
    head[0, 7] = bad
    loss = cross_entropy(jnp.float32(x), jnp.float32(head), jnp.asarray(targets), weights, chunk=8)
    assert not np.isfinite(float(loss))
