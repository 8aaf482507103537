"""V:N:M against a loop over blocks in numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsejax.vnm import (
    VNM,
    choose_columns,
    expert_columns,
    gather_columns,
    kept_pairs,
    pack_vnm,
    scatter_columns,
    spread_pairs,
    vnm_mask,
)


def oracle_mask(x: np.ndarray, v: int, m: int, columns: np.ndarray | None = None) -> np.ndarray:
    """Block by block and row by row; Python's sort is stable, so ties go to the lower index."""
    rows, cols = x.shape
    mask = np.zeros(x.shape, bool)
    for i in range(rows // v):
        for j in range(cols // m):
            block = np.abs(x[i * v : (i + 1) * v, j * m : (j + 1) * m].astype(np.float64))
            if columns is None:
                mass = block.sum(axis=0)
                live = sorted(sorted(range(m), key=lambda c: -mass[c])[:4])
            else:
                live = [int(c) for c in columns[i, min(j, columns.shape[1] - 1)]]
            for row in range(v):
                for c in sorted(live, key=lambda c: -block[row, c])[:2]:
                    mask[i * v + row, j * m + c] = True
    return mask


# Few shapes, many contents: each shape is compiled once.
sizes = st.sampled_from([(8, 4, 16), (6, 2, 8), (5, 1, 4), (8, 8, 32)])


@partial(jax.jit, static_argnames=("v", "m"))
def mask_and_packed(x, columns=None, *, v, m):
    packed = pack_vnm(x, v=v, m=m, columns=columns)
    again = pack_vnm(packed.unpack(), v=v, m=m, columns=columns)
    return vnm_mask(x, v=v, m=m, columns=columns), packed.unpack(), again.unpack()


@given(sizes, st.integers(0, 2**32 - 1), st.booleans())
def test_mask_and_packing_match_the_oracle(size, seed, integers):
    rows, v, m = size
    rng = np.random.default_rng(seed)
    shape = (rows, 3 * m)
    # Small integers make ties between columns and between elements.
    x = (rng.integers(-2, 3, shape) if integers else rng.normal(size=shape)).astype(np.float32)
    want = oracle_mask(x, v, m)
    mask, unpacked, again = mask_and_packed(jnp.array(x), v=v, m=m)
    np.testing.assert_array_equal(mask, want)
    np.testing.assert_array_equal(unpacked, np.where(want, x, 0))
    # What is V:2:M already survives a second round to the bit.
    np.testing.assert_array_equal(again, unpacked)


@given(sizes, st.integers(0, 2**32 - 1), st.booleans())
def test_given_columns(size, seed, constant):
    rows, v, m = size
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 3 * m)).astype(np.float32)
    choice = (rows // v, 1 if constant else 3, m)
    columns = np.sort(np.argsort(rng.random(choice), axis=-1)[..., :4], axis=-1)
    want = oracle_mask(x, v, m, columns)
    mask, unpacked, again = mask_and_packed(jnp.array(x), jnp.array(columns), v=v, m=m)
    np.testing.assert_array_equal(mask, want)
    np.testing.assert_array_equal(unpacked, np.where(want, x, 0))
    np.testing.assert_array_equal(again, unpacked)


@pytest.mark.parametrize("m", [8, 16, 32])
def test_experts_are_a_column_choice(m):
    rng = np.random.default_rng(m)
    v, blocks, cols = 8, 6, 64
    x = rng.normal(size=(v * blocks, cols)).astype(np.float32)
    expert = rng.integers(0, m // 4, blocks)
    columns = expert_columns(jnp.array(expert), m)
    live = np.asarray(gather_columns(jnp.array(x), columns, v=v, m=m))
    for b in range(blocks):
        own = np.arange(cols) % m // 4 == expert[b]
        np.testing.assert_array_equal(live[b * v : (b + 1) * v], x[b * v : (b + 1) * v][:, own])
    back = np.asarray(scatter_columns(jnp.array(live), columns, v=v, m=m))
    own = np.repeat(np.arange(cols)[None] % m // 4 == expert[:, None], v, axis=0)
    np.testing.assert_array_equal(back, np.where(own, x, 0))


def test_density_and_sizes():
    x = jax.random.normal(jax.random.key(0), (128, 64), jnp.bfloat16)
    for m in (8, 16, 32):
        packed = pack_vnm(x, v=64, m=m)
        assert packed.dtype == jnp.bfloat16
        assert packed.values.shape == (128, 2 * 64 // m)
        assert packed.positions.shape == (128, 64 // m)
        assert packed.columns.shape == (2, 64 // m, 4)
        assert np.mean(np.asarray(packed.unpack()) != 0) == 2 / m
        live = np.asarray(packed.live()).reshape(128, -1, 4)
        assert (np.sum(live != 0, axis=-1) <= 2).all()


def test_is_a_pytree_under_jit():
    x = jax.random.normal(jax.random.key(0), (16, 32))
    packed = jax.jit(lambda x: pack_vnm(x, v=8, m=16))(x)
    assert isinstance(packed, VNM)
    np.testing.assert_array_equal(jax.jit(VNM.unpack)(packed), pack_vnm(x, v=8, m=16).unpack())


def test_nan_and_negative_zero_survive():
    x = np.zeros((4, 16), np.float32)
    x[1, 9] = np.nan
    x[2, 3], x[2, 0] = -0.0, 1.0
    unpacked = np.asarray(pack_vnm(jnp.array(x), v=4, m=16).unpack())
    assert np.isnan(unpacked[1, 9])
    keep = jnp.array([[True, False, False, True]])
    pairs, positions = kept_pairs(keep, jnp.array([[1.0, 5.0, 6.0, -0.0]]))
    spread = np.asarray(spread_pairs(pairs, positions))
    np.testing.assert_array_equal(spread, [[1, 0, 0, 0]])
    assert np.signbit(spread[0, 3])


@pytest.mark.parametrize(
    ("shape", "v", "m", "message"),
    [
        ((10, 16), 4, 16, "rows=10"),
        ((8, 20), 4, 16, "cols=20"),
        ((8, 16), 0, 16, "v=0"),
        ((0, 16), 4, 16, "rows=0 must be a positive multiple"),
        ((8, 0), 4, 16, "cols=0 must be a positive multiple"),
        ((8, 12), 4, 6, "m=6"),
        ((8,), 4, 8, "shape"),
    ],
)
def test_bad_sizes(shape, v, m, message):
    for function in (choose_columns, pack_vnm, vnm_mask):
        with pytest.raises(ValueError, match=message):
            function(jnp.ones(shape), v=v, m=m)


def test_bad_columns():
    with pytest.raises(ValueError, match=r"columns\.shape"):
        pack_vnm(jnp.ones((8, 32)), v=4, m=16, columns=jnp.zeros((2, 3, 4), jnp.int32))
    with pytest.raises(ValueError, match="block_expert"):
        expert_columns(jnp.zeros((2, 2), jnp.int32), 16)
