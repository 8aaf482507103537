"""2:4 projections against thresholds and products in float64, and against matmul24."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax.ops import matmul24
from sparsejax.projection24 import pack_projection, projection24
from sparsejax.spec import Sparsity

SPARSITY = Sparsity()
BETA = 1.3


def thresholded(w, axis):
    """beta S(w), two of four along `axis`, in float64 from the definition."""
    groups = np.moveaxis(np.asarray(w, np.float64), axis, -1)
    shape = groups.shape
    groups = groups.reshape(-1, 4)
    third = np.sort(np.abs(groups), axis=1)[:, 1:2]
    kept = np.sign(groups) * np.maximum(np.abs(groups) - third, 0)
    return BETA * np.moveaxis(kept.reshape(shape), -1, axis)


def problem(axis, tokens=(2, 12), dtype="float32"):
    rng = np.random.default_rng(axis)
    size = {axis: 64, 1 - axis: 40}
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), dtype)
    w = draw(size[0], size[1]).astype(jnp.float32)
    return draw(*tokens, size[0]), w, draw(*tokens, size[1])


def apply(x, w, axis, packed=None):
    packed = packed or pack_projection(w, jnp.float32(BETA), SPARSITY, axis=axis, dtype=x.dtype)
    return projection24(x, w, packed, SPARSITY, axis=axis)


@pytest.mark.parametrize("axis", [0, 1])
def test_values_and_gradients(axis):
    x, w, dy = problem(axis)
    y, vjp = jax.vjp(lambda x, w: apply(x, w, axis), x, w)
    dx, dw = vjp(dy)
    s = thresholded(w, axis)
    assert (s == 0).mean() == pytest.approx(0.5)
    np.testing.assert_allclose(y, np.asarray(x) @ s, atol=1e-4)
    np.testing.assert_allclose(dx, np.asarray(dy) @ s.T, atol=1e-4)
    rows, columns = (np.asarray(a).reshape(24, -1) for a in (x, dy))
    np.testing.assert_allclose(dw, rows.T @ columns, atol=1e-4)


@pytest.mark.parametrize("axis", [0, 1])
def test_the_same_as_matmul24_in_16_bits(axis):
    x, w, dy = problem(axis, dtype="bfloat16")
    own = jax.vjp(lambda x, w: apply(x, w, axis), x, w)
    other = jax.vjp(lambda x, w: matmul24(x, w, axis=axis, beta=BETA), x, w)
    results = [(y, *vjp(dy)) for y, vjp in (own, other)]
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(np.float32(a), np.float32(b))


def test_what_waits_for_the_backward_pass_of_three_projections_of_one_input():
    x, w, _ = problem(0)
    packed = pack_projection(w, jnp.float32(1), SPARSITY, axis=0, dtype=x.dtype)
    function = lambda x, *ws: sum(apply(x, w, 0, packed) for w in ws)
    _, vjp = jax.vjp(function, x, w, w + 1, w + 2)
    assert [leaf.shape for leaf in jax.tree.leaves(vjp)].count(x.shape) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, p: projection24(x[..., :60], w, p, SPARSITY, axis=0), "x.shape"),
        (lambda x, w, p: projection24(x.astype("bfloat16"), w, p, SPARSITY, axis=0), "packed"),
        (lambda x, w, p: projection24(x, w.T, p, SPARSITY, axis=1), "x.shape"),
        (lambda x, w, p: projection24(x, w, p, SPARSITY, axis=2), "axis=2 must be 0 or 1"),
        (lambda x, w, p: pack_projection(w[:62], 1.0, SPARSITY, axis=0), "a multiple of 4"),
        (lambda x, w, p: pack_projection(x, 1.0, SPARSITY, axis=0), "must have two axes"),
    ],
)
def test_refusals(change, message):
    x, w, _ = problem(0)
    packed = pack_projection(w, jnp.float32(1), SPARSITY, axis=0, dtype=x.dtype)
    with pytest.raises(ValueError, match=message):
        change(x, w, packed)


@pytest.mark.gpu
@pytest.mark.parametrize("axis", [0, 1])
def test_kernels_of_the_device(axis):
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.normal(size=(4, 256, 512)), jnp.bfloat16) for _ in range(2))
    w = jnp.asarray(rng.normal(size=(512, 512)), jnp.float32)
    y, vjp = jax.vjp(jax.jit(lambda x, w: apply(x, w, axis)), x, w)
    s = np.asarray(jnp.asarray(thresholded(w, axis), jnp.bfloat16), np.float64)
    rows, columns = (np.asarray(a, np.float64).reshape(-1, 512) for a in (x, dy))
    for got, want in zip((y, *vjp(dy)), (rows @ s, columns @ s.T, rows.T @ columns), strict=True):
        got = np.asarray(got, np.float64).reshape(want.shape)
        assert np.linalg.norm(got - want) < 5e-3 * np.linalg.norm(want)
