"""Squared ReLU against its textbook derivative, and what it and rematerialisation keep."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops.relu2 import relu2, relu2_of_kept
from sparsejax.remat import products


@pytest.mark.parametrize("square", [relu2, relu2_of_kept])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("bfloat16", 1.6e-2)])
def test_value_and_gradient(square, dtype, rtol):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)) * 3, dtype)
    x = x.at[0].set(0.0)
    y, vjp = jax.vjp(square, x)
    (dx,) = vjp(jnp.full_like(x, 3.0))
    exact = np.maximum(np.float64(x), 0)
    np.testing.assert_allclose(np.float64(y), exact**2, rtol=rtol)
    np.testing.assert_allclose(np.float64(dx), 6 * exact, rtol=rtol)
    assert (y.dtype, dx.dtype) == (x.dtype, x.dtype)


def test_only_the_square_is_kept_between_two_products():
    """Neither x W nor a mask waits for the backward pass, with and without rematerialisation."""
    x, w1, w2 = jnp.ones((16, 4)), jnp.ones((4, 8)), jnp.ones((8, 4))
    network = lambda x, w1, w2: relu2(x @ w1) @ w2
    for function in (network, jax.checkpoint(network, policy=products)):
        _, vjp = jax.vjp(function, x, w1, w2)
        rows = [leaf.shape for leaf in jax.tree.leaves(vjp) if leaf.shape[:1] == (16,)]
        assert sorted(rows) == [(16, 4), (16, 8)]
