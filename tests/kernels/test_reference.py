"""The reference kernels against oracles written element by element in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from tests.kernels import oracle

pytestmark = pytest.mark.core

DTYPES = [jnp.bfloat16, jnp.float16]


def draw(seed: int, shape: tuple[int, ...], ties: bool = False) -> np.ndarray:
    rng = np.random.default_rng(seed)
    if ties:
        return rng.integers(-2, 3, shape).astype(np.float32)
    return rng.standard_normal(shape, np.float32)


@pytest.mark.parametrize("mode", reference.MODES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("ties", [False, True])
def test_pack_matches_oracle(mode, axis, ties):
    a = draw(0, (64, 128), ties)
    pruned, indices = oracle.prune(a, mode)
    x = a.T if axis == 0 else a
    values, metadata = reference.pack24(x, axis=axis, mode=mode, dtype=jnp.float32)
    np.testing.assert_array_equal(metadata, oracle.metadata(indices))
    rows = np.take_along_axis(pruned.reshape(64, 32, 4), indices, axis=-1).reshape(64, 64)
    np.testing.assert_array_equal(values, rows)
    np.testing.assert_array_equal(reference.unpack24(values, metadata), pruned)


@pytest.mark.parametrize("pattern", oracle.PATTERNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_of_each_pattern(pattern, dtype):
    dense = np.zeros((64, 64), np.float32)
    for position in pattern:
        dense[:, position::4] = draw(position, (64, 16)) + 3
    x = jnp.asarray(dense, dtype)
    values, metadata = reference.pack24(x, axis=1, mode="magnitude", dtype=dtype)
    assert values.dtype == dtype
    np.testing.assert_array_equal(reference.unpack24(values, metadata), x)


@given(
    st.lists(
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, -2.0, 1e-42, np.inf, -np.inf, np.nan]),
        min_size=4,
        max_size=4,
    ),
    st.sampled_from(["magnitude", "value"]),
)
def test_selection_rule(group, by):
    mask = np.asarray(reference.select24(np.asarray(group, np.float32), by=by))
    assert np.flatnonzero(mask).tolist() == oracle.kept_pair(np.asarray(group), by)


def test_selection_ranks_rounded_inputs_as_float32():
    # 16-bit inputs that are equal after rounding tie, and the lower index wins.
    x = jnp.asarray([1.0, 1.001, 1.002, 1.003], jnp.bfloat16)
    assert np.asarray(reference.select24(x)).tolist() == [True, True, False, False]
    x = jnp.asarray([1.0, 1.001, 1.002, 1.003], jnp.float32)
    assert np.asarray(reference.select24(x)).tolist() == [False, False, True, True]


def test_an_infinite_threshold_is_not_silent():
    x = np.zeros((64, 64), np.float32)
    x[0, :4] = [np.inf, np.inf, -np.inf, 1]
    dense = reference.soft_threshold(x)
    assert np.isnan(dense[0, :2]).all()
    assert np.isfinite(dense[1:]).all()
    values, _ = reference.pack24(x, axis=1, mode="soft_threshold")
    assert np.isnan(np.asarray(values[0, :2], np.float32)).all()


def test_nan_and_infinity_survive_packing():
    groups = np.asarray(
        [[1, np.nan, 3, np.inf], [np.nan, 1, np.nan, 2], [-np.inf, 5, 4, 1], [np.nan, 1, 2, 3]]
    )
    x = jnp.asarray(groups.reshape(1, 16), jnp.float32)
    for mode in ("magnitude", "soft_threshold"):
        values, metadata = reference.pack24(x, axis=1, mode=mode)
        found = np.asarray(reference.unpack24(values, metadata)[:1, :16], np.float32)
        found = found.reshape(4, 4)
        np.testing.assert_array_equal(found[0], [0, np.nan, 0, np.inf])
        np.testing.assert_array_equal(found[1], [np.nan, 0, np.nan, 0])
        assert found[2, 0] == -np.inf
        assert np.isfinite(found[2, 1])
        assert np.isnan(found[3, 0])
        assert np.isfinite(found[3, 1:]).all()


def test_scale_is_applied_before_rounding():
    x = draw(1, (64, 64))
    values, _ = reference.pack24(x, axis=1, mode="soft_threshold", scale=1.484)
    exact, _ = reference.pack24(x, axis=1, mode="soft_threshold", dtype=jnp.float32)
    np.testing.assert_array_equal(values, (exact * np.float32(1.484)).astype(jnp.bfloat16))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("rows", "cols"), [(1, 1), (3, 66), (64, 63), (65, 64), (130, 7)])
def test_padding(rows, cols, axis):
    x = draw(rows * 1000 + cols, (rows, cols))
    values, metadata = reference.pack24(x, axis=axis, mode="magnitude", dtype=jnp.float32)
    a = x.T if axis == 0 else x
    m, k = a.shape
    pad_m, pad_k = -m % 64, -k % 64
    assert values.shape == (m + pad_m, (k + pad_k) // 2)
    dense = np.asarray(reference.unpack24(values, metadata))
    assert not dense[m:].any()
    assert not dense[:, k:].any()
    whole = k - k % 4
    kept = dense[:m, :whole].reshape(m, -1, 4)
    assert ((kept != 0).sum(-1) == 2).all()
    np.testing.assert_array_equal(dense[:m, :k][dense[:m, :k] != 0], a[dense[:m, :k] != 0])


@pytest.mark.parametrize("b_layout", reference.B_LAYOUTS)
@pytest.mark.parametrize("out_layout", reference.OUT_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_product_matches_float64(b_layout, out_layout, dtype):
    a, b = draw(2, (128, 192)), jnp.asarray(draw(3, (40, 192)), dtype)
    values, metadata = reference.pack24(a, axis=1, mode="magnitude", dtype=dtype)
    sparse = np.asarray(reference.unpack24(values, metadata), np.float64)
    expected = 0.5 * sparse @ np.asarray(b, np.float64).T
    out = reference.spmm24(
        values,
        metadata,
        b if b_layout == "nk" else b.T,
        b_layout=b_layout,
        out_layout=out_layout,
        scale=0.5,
        out_dtype=jnp.float32,
    )
    expected = expected if out_layout == "mn" else expected.T
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-4)


def test_epilogue_follows_the_scale():
    a, b = draw(4, (64, 64)), jnp.asarray(draw(5, (24, 64)), jnp.bfloat16)
    values, metadata = reference.pack24(a, axis=1, mode="magnitude")
    y = 3.0 * reference.spmm24(values, metadata, b, b_layout="nk", out_dtype=jnp.float32)
    out = reference.spmm24(values, metadata, b, b_layout="nk", scale=3.0, epilogue="relu2")
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), np.square(np.maximum(y, 0)), rtol=2e-2)


def test_soft_threshold_is_continuous_and_two_of_four():
    w = jnp.asarray([[4.0, -3.0, 2.0, 1.0], [0, 0, 0, 0], [1, 1, 1, 1]])
    np.testing.assert_array_equal(
        reference.soft_threshold(w), [[2, -1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    )
    # Across a swap of the second and third magnitude nothing jumps.
    before = reference.soft_threshold(jnp.asarray([4.0, 2.001, 2.0, 1.0]))
    after = reference.soft_threshold(jnp.asarray([4.0, 2.0, 2.001, 1.0]))
    assert np.abs(before - after).max() < 3e-3


def test_under_jit_and_vmap():
    x = draw(6, (3, 64, 64))
    stacked = jax.jit(jax.vmap(lambda a: reference.pack24(a, axis=0, mode="soft_threshold")))(x)
    for i in range(3):
        single = reference.pack24(x[i], axis=0, mode="soft_threshold")
        for got, expected in zip(stacked, single, strict=True):
            np.testing.assert_array_equal(got[i], expected)


X = np.ones((64, 64), np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.ones(64, np.float32)}, "two axes"),
        ({"axis": 2}, "axis=2"),
        ({"mode": "largest"}, "mode='largest'"),
        ({"dtype": jnp.int8}, "dtype=int8"),
        ({"x": np.ones((64, 64), np.int32)}, "int32"),
    ],
)
def test_pack_refuses(arguments, message):
    call = {"x": X, "axis": 1, "mode": "magnitude", **arguments}
    with pytest.raises(ValueError, match=message):
        reference.pack24(call.pop("x"), **call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"b": jnp.ones((8, 60), jnp.bfloat16)}, r"k=64"),
        ({"b": jnp.ones((64, 8), jnp.bfloat16)}, r"k=64"),
        ({"b": jnp.ones((8, 64), jnp.float16)}, "float16"),
        ({"b": jnp.ones((8, 8, 64), jnp.bfloat16)}, "two axes"),
        ({"b_layout": "mk"}, "b_layout='mk'"),
        ({"out_layout": "nk"}, "out_layout='nk'"),
        ({"epilogue": "gelu"}, "epilogue='gelu'"),
        ({"out_dtype": jnp.int32}, "out_dtype=int32"),
        ({"metadata": jnp.zeros((1, 2, 128), jnp.int32)}, "metadata.shape"),
        ({"values": jnp.ones((60, 32), jnp.bfloat16)}, "m=60"),
    ],
)
def test_product_refuses(arguments, message):
    values, metadata = reference.pack24(X, axis=1, mode="magnitude")
    call = {
        "values": values,
        "metadata": metadata,
        "b": jnp.ones((8, 64), jnp.bfloat16),
        "b_layout": "nk",
        **arguments,
    }
    with pytest.raises(ValueError, match=message):
        reference.spmm24(**call)


def test_selection_refuses_ragged_groups():
    with pytest.raises(ValueError, match="size=6"):
        reference.select24(np.ones((4, 6), np.float32))
    with pytest.raises(ValueError, match="by='rank'"):
        reference.select24(X, by="rank")  # type: ignore[arg-type]
