"""Sparse24: exact packing, static shape, transposition, padding, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.formats import Sparse24, pack
from sparsejax.prune import soft_threshold
from tests.kernels.oracle import PATTERNS

pytestmark = pytest.mark.core


def two_of_four(seed: int, shape: tuple[int, int], axis: int, dtype) -> jax.Array:
    """A random 2:4 matrix whose groups take all six patterns; ragged ends keep everything."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape)
    x = x.T if axis == 0 else x
    patterns = np.asarray(PATTERNS)[rng.integers(0, 6, (x.shape[0], -(-x.shape[1] // 4)))]
    keep = np.zeros((x.shape[0], patterns.shape[1], 4), bool)
    np.put_along_axis(keep, patterns, True, axis=-1)
    x = np.where(keep.reshape(x.shape[0], -1)[:, : x.shape[1]], x, 0)
    return jnp.asarray(x.T if axis == 0 else x, dtype)


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1, 3), (64, 64), (63, 130), (128, 72)]),
    axis=st.sampled_from([0, 1]),
    dtype=st.sampled_from([jnp.bfloat16, jnp.float16]),
)
def test_round_trip(seed, shape, axis, dtype):
    x = two_of_four(seed, shape, axis, dtype)
    packed = pack(x, axis=axis, mode="magnitude", dtype=dtype)
    assert (packed.shape, packed.dtype, packed.ndim) == (shape, dtype, 2)
    assert (packed.m, packed.k) == (shape if axis == 1 else shape[::-1])
    np.testing.assert_array_equal(packed.unpack(), x)
    np.testing.assert_array_equal(packed.T.unpack(), x.T)


@given(seed=st.integers(0, 2**31), axis=st.sampled_from([0, 1]))
def test_ties_go_to_the_lower_index(seed, axis):
    x = np.random.default_rng(seed).integers(-1, 2, (64, 64)).astype(np.float32)
    dense = np.asarray(pack(x, axis=axis, mode="magnitude").unpack(), np.float32)
    groups = np.moveaxis(x, axis, -1).reshape(-1, 4)
    expected = np.where((groups != 0) & (np.cumsum(groups != 0, -1) <= 2), groups, 0)
    np.testing.assert_array_equal(np.moveaxis(dense, axis, -1).reshape(-1, 4), expected)


def test_nan_and_infinities_are_kept():
    x = np.ones((64, 64), np.float32)
    x[3, 5], x[4, 6], x[5, 7] = np.nan, np.inf, -np.inf
    for axis in (0, 1):
        dense = np.asarray(pack(x, axis=axis, mode="magnitude").unpack(), np.float32)
        assert np.isnan(dense[3, 5])
        assert dense[4, 6] == np.inf
        assert dense[5, 7] == -np.inf
        assert np.isfinite(dense).sum() == x.size - 3


def test_soft_threshold_mode_matches_prune():
    w = jax.random.normal(jax.random.key(0), (96, 64))
    for axis in (0, 1):
        packed = pack(w, axis=axis, mode="soft_threshold", scale=1.5)
        expected = (1.5 * soft_threshold(w, axis)).astype(jnp.bfloat16)
        np.testing.assert_array_equal(packed.unpack(), expected)


def test_is_a_pytree():
    packed = pack(jax.random.normal(jax.random.key(1), (64, 128)), axis=0, mode="magnitude")
    leaves, structure = jax.tree.flatten(packed)
    assert [leaf.shape for leaf in leaves] == [(128, 32), (2, 1, 128)]
    again = jax.jit(lambda s: s)(packed)
    assert isinstance(again, Sparse24)
    structures = [str(structure), str(jax.tree.structure(again)), str(jax.tree.structure(packed.T))]
    assert structures[0] == structures[1] != structures[2]
    assert packed.nbytes == 128 * 32 * 2 + 2 * 128 * 4
    names = [jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(packed)]
    assert names == [".values", ".metadata"]


def test_stack_under_vmap_and_scan():
    w = jax.random.normal(jax.random.key(2), (3, 64, 64))
    stack = jax.vmap(lambda w: pack(w, axis=0, mode="soft_threshold"))(w)
    expected = soft_threshold(w, 1).astype(jnp.bfloat16)
    np.testing.assert_array_equal(jax.vmap(Sparse24.unpack)(stack), expected)
    _, dense = jax.lax.scan(lambda c, s: (c, s.unpack()), None, stack)
    np.testing.assert_array_equal(dense, expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.ones((4, 4, 4), np.float32)}, "two axes"),
        ({"x": np.ones((0, 4), np.float32)}, "neither of them empty"),
        ({"x": np.ones((4, 4), np.int32)}, "x.dtype=int32"),
        ({"axis": -1}, "axis=-1"),
        ({"mode": "top2"}, "mode='top2'"),
        ({"dtype": jnp.float8_e4m3b11fnuz}, "float8_e4m3b11fnuz"),
        ({"scale": np.ones(3)}, r"\(3,\)"),
        ({"backend": "cutlass"}, "'cutlass'"),
    ],
)
def test_pack_refuses(arguments, message):
    call = {"x": np.ones((8, 8), np.float32), "axis": 1, "mode": "magnitude", **arguments}
    with pytest.raises(ValueError, match=message):
        pack(call.pop("x"), **call)


def test_unpack_refuses_arrays_that_do_not_fit():
    packed = pack(np.ones((64, 64), np.float32), axis=1, mode="magnitude")
    with pytest.raises(ValueError, match="must be"):
        Sparse24(packed.values, packed.metadata, (128, 64), 1).unpack()
    with pytest.raises(ValueError, match="metadata"):
        Sparse24(packed.values, packed.metadata[:, :, :64], (64, 64), 1).unpack()
