"""Soft threshold, its scale, top two of four and unbiased sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from sparsejax import prune


def nonzeros(x, axis):
    x = np.moveaxis(np.asarray(x), axis, -1)
    return (x.reshape(*x.shape[:-1], -1, 4) != 0).sum(-1)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_beta_at_gaussian_initialisation(axis):
    w = jax.random.normal(jax.random.key(0), (2048, 2048))
    assert abs(float(prune.soft_threshold_beta(w, axis)) - 1.484) < 1e-3


def test_beta_at_truncated_initialisation():
    w = 0.02 * jax.random.truncated_normal(jax.random.key(1), -3.0, 3.0, (2048, 2048))
    assert abs(float(prune.soft_threshold_beta(w, 0)) - 1.496) < 1e-3


def test_beta_minimises_the_distance():
    w = jax.random.normal(jax.random.key(2), (64, 64))
    s, beta = prune.soft_threshold(w, 0), prune.soft_threshold_beta(w, 0)
    losses = [float(jnp.sum((w - b * s) ** 2)) for b in (beta - 0.01, beta, beta + 0.01)]
    assert losses[1] < min(losses[0], losses[2])


def test_beta_of_a_constant_weight_is_one():
    assert float(prune.soft_threshold_beta(jnp.ones((8, 8)))) == 1.0


@given(
    hnp.arrays(np.float32, (4, 8), elements=st.floats(-4, 4, width=16), fill=st.nothing()),
    st.sampled_from([0, 1]),
)
def test_soft_threshold_properties(w, axis):
    s = np.asarray(prune.soft_threshold(w, axis))
    assert (nonzeros(s, axis) <= 2).all()
    kept = s != 0
    t = np.sort(np.abs(np.moveaxis(w, axis, -1)).reshape(-1, 4), axis=-1)[:, 1]
    s_groups = np.moveaxis(s, axis, -1).reshape(-1, 4)
    w_groups = np.moveaxis(w, axis, -1).reshape(-1, 4)
    expected = np.sign(w_groups) * np.maximum(np.abs(w_groups) - t[:, None], 0)
    np.testing.assert_array_equal(s_groups, expected)
    assert (np.sign(s[kept]) == np.sign(w[kept])).all()


def test_soft_threshold_keeps_dtype():
    w = jax.random.normal(jax.random.key(3), (8, 16), jnp.bfloat16)
    assert prune.soft_threshold(w, 1).dtype == jnp.bfloat16


@pytest.mark.core
@pytest.mark.parametrize("axis", [0, 1])
def test_straight_through(axis):
    w = jax.random.normal(jax.random.key(4), (16, 32))
    c = jax.random.normal(jax.random.key(5), (16, 32))

    def loss(w, beta):
        return jnp.sum(c * prune.soft_threshold_ste(w, axis, beta))

    value, (dw, dbeta) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(w, 1.5)
    expected = jnp.sum(c * 1.5 * prune.soft_threshold(w, axis))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_array_equal(dw, c)
    assert dbeta == 0
    _, tangent = jax.jvp(lambda w: prune.soft_threshold_ste(w, axis, 1.5), (w,), (c,))
    np.testing.assert_array_equal(tangent, c)


@pytest.mark.parametrize("by", ["magnitude", "value"])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_top2_of_4(by, axis):
    x = jax.random.normal(jax.random.key(6), (8, 4, 12))
    y = np.asarray(prune.top2_of_4(x, axis, by))
    assert (nonzeros(y, axis) == 2).all()
    groups = np.moveaxis(np.asarray(x), axis, -1).reshape(-1, 4)
    kept = np.moveaxis(y, axis, -1).reshape(-1, 4)
    keys = np.abs(groups) if by == "magnitude" else groups
    worst_kept = np.where(kept != 0, keys, np.inf).min(-1)
    best_dropped = np.where(kept == 0, keys, -np.inf).max(-1)
    assert (worst_kept >= best_dropped).all()
    np.testing.assert_array_equal(kept[kept != 0], groups[kept != 0])


def test_orders_agree_on_nonnegative_values():
    x = jnp.square(jax.nn.relu(jax.random.normal(jax.random.key(7), (64, 64))))
    np.testing.assert_array_equal(prune.top2_of_4(x, 1), prune.top2_of_4(x, 1, "value"))


@pytest.mark.core
def test_top2_of_4_gradient_follows_the_mask():
    x = jnp.asarray([3.0, 1.0, -2.0, 0.5])
    grad = jax.grad(lambda x: jnp.sum(prune.top2_of_4(x) ** 2))(x)
    np.testing.assert_array_equal(grad, [6, 0, -4, 0])


def optimal_variance(group: np.ndarray) -> float:
    """Least sum of variances over inclusion probabilities, by bisection on tau."""
    a = np.abs(group.astype(np.float64))
    if (a > 0).sum() <= 2:
        return 0.0
    low, high = 0.0, a.sum()
    for _ in range(200):
        tau = (low + high) / 2
        low, high = (tau, high) if np.minimum(1, a / tau).sum() > 2 else (low, tau)
    p = np.minimum(1, a / high)
    return float(np.sum(a[a > 0] ** 2 * (1 / p[a > 0] - 1)))


def test_mvue_is_unbiased_and_of_least_variance():
    groups = np.asarray(
        [[1, 2, 3, 4], [10, 1, -1, 0.5], [5, 5, 0.1, 0.1], [1, 1, 1, 1], [-3, 0, 2, 1]], np.float32
    )
    draws = 40_000
    keys = jax.random.split(jax.random.key(8), draws)
    samples = np.asarray(jax.jit(jax.vmap(lambda k: prune.mvue24(groups, k)))(keys))
    assert ((samples != 0).sum(-1) == 2).all()
    variance = samples.astype(np.float64).var(0)
    error = np.abs(samples.mean(0, dtype=np.float64) - groups)
    assert (error <= 5 * np.sqrt(variance / draws) + 1e-5).all()
    expected = [optimal_variance(g) for g in groups]
    np.testing.assert_allclose(variance.sum(-1), expected, rtol=0.03)


@pytest.mark.parametrize("axis", [0, 1])
def test_mvue_shape_axis_and_dtype(axis):
    x = jax.random.normal(jax.random.key(9), (16, 24), jnp.bfloat16)
    y = prune.mvue24(x, jax.random.key(0), axis)
    assert (y.shape, y.dtype) == (x.shape, x.dtype)
    assert (nonzeros(y, axis) <= 2).all()
    assert (np.sign(y) * np.sign(x) >= 0).all()


def test_mvue_keeps_two_of_four_exactly():
    x = prune.top2_of_4(jax.random.normal(jax.random.key(10), (32, 32)))
    np.testing.assert_array_equal(prune.mvue24(x, jax.random.key(1)), x)
    zeros = jnp.zeros((8, 8))
    np.testing.assert_array_equal(prune.mvue24(zeros, jax.random.key(1)), zeros)


def test_mvue_does_not_hide_overflow():
    x = jnp.asarray([[1.0, np.nan, 2.0, 3.0], [np.inf, 1.0, 2.0, 3.0], [1.0, 2.0, 3.0, 4.0]])
    y = np.asarray(prune.mvue24(x, jax.random.key(2)))
    assert np.isnan(y[0, 1])
    assert np.isinf(y[1, 0])
    assert np.isfinite(y[2]).all()


@pytest.mark.parametrize(
    "function",
    [
        prune.soft_threshold,
        prune.soft_threshold_beta,
        prune.soft_threshold_ste,
        prune.top2_of_4,
        lambda x: prune.mvue24(x, jax.random.key(0)),
    ],
)
def test_refuses_ragged_groups(function):
    with pytest.raises(ValueError, match="size=6"):
        function(jnp.ones((4, 6)))
