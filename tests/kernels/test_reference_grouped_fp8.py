"""The routed FFN's 8-bit products in jax.numpy against numpy in float64."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels import reference_fp8
from kernels import reference_grouped_fp8 as grouped

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2
LARGEST = {E4M3: 448.0, E5M2: 57344.0}
D, EXPERTS, LIVE, V = 128, 2, 64, 64
HIDDEN = EXPERTS * LIVE
OFFSETS = np.array([0, 64, 192], np.int32)
BLOCK_EXPERT = np.array([0, 1, 1, 1], np.int32)  # the last block is unused
ROWS = 4 * V
USED = slice(0, 192)
OF_ROW = np.repeat(BLOCK_EXPERT, V)


def rounded(x, dtype):
    """Once, from float32, saturating."""
    x = np.clip(np.asarray(x, np.float32), -LARGEST[dtype], LARGEST[dtype])
    return x.astype(dtype)


def wide(x):
    return np.asarray(x).astype(np.float64)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    w = normal(HIDDEN, D)
    values, metadata, columns = grouped.pack_weight24_fp8(
        w, num_experts=EXPERTS, m=4 * EXPERTS, scale=np.float32(40)
    )
    unused = np.arange(ROWS)[:, None] >= OFFSETS[-1]
    x, dy = normal(ROWS, D), normal(ROWS, D)
    # What lies in unused rows must not matter.
    x, dy = (np.where(unused, np.nan, a) for a in (x, dy))
    factors = 2.0 ** rng.integers(-12, -6, (ROWS, 2)).astype(np.float32)
    return {
        "w": w,
        "values": values,
        "metadata": metadata,
        "columns": columns,
        "x": jnp.asarray(rounded(x * 8, E4M3)),
        "dy": jnp.asarray(rounded(dy * 8, E5M2)),
        "factors": jnp.asarray(np.where(unused, np.nan, factors)),
        "layout": (jnp.asarray(OFFSETS), jnp.asarray(BLOCK_EXPERT)),
    }


def product(rows, p):
    """Rows times their expert's neurons, (ROWS, h) float64."""
    w = wide(p["columns"])
    return np.stack([row @ w[e] for row, e in zip(wide(rows), OF_ROW, strict=True)])


def test_pack_thresholds_rounds_and_splits(problem):
    w = problem["w"]
    third = -np.sort(-np.abs(w.reshape(HIDDEN, -1, 4)), axis=-1)[..., 2:3]
    groups = w.reshape(HIDDEN, -1, 4)
    kept = np.sign(groups) * np.maximum(np.abs(groups) - third, 0)
    scaled = kept.reshape(HIDDEN, D) * np.float32(40)
    assert np.abs(scaled).max() < 448
    expected = rounded(scaled, E4M3)
    # Expert e has neurons 4 e .. 4 e + 3 of every eight.
    own = [np.flatnonzero(np.arange(HIDDEN) // 4 % EXPERTS == e) for e in range(EXPERTS)]
    columns = np.asarray(problem["columns"])
    assert columns.dtype == E4M3
    for e in range(EXPERTS):
        np.testing.assert_array_equal(wide(columns[e]), wide(expected[own[e]].T))
    dense = reference_fp8.unpack24_fp8(problem["values"], problem["metadata"])
    np.testing.assert_array_equal(
        wide(dense).reshape(EXPERTS, LIVE, D), wide(columns).swapaxes(1, 2)
    )


def test_pack_saturates():
    w = np.zeros((HIDDEN, D), np.float32)
    w[0, :2] = 1000, -2000
    _, _, columns = grouped.pack_weight24_fp8(w, num_experts=EXPERTS, m=8, scale=np.float32(2))
    np.testing.assert_array_equal(wide(columns)[0, :2, 0], [448, -448])
    assert int(grouped.count_largest(columns)) == 2


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_stack(dtype):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((5, D)) * 10.0 ** rng.integers(-9, 9, (5, 1))).astype(
        ml_dtypes.bfloat16
    )
    x[1] = 0
    x[2, 3] = np.inf
    order = np.array([4, 0, 5, 2, 1, 3], np.int32)  # 5: padding
    rows, values, scale, squares = (
        np.asarray(a) for a in grouped.stack_fp8(jnp.asarray(x), jnp.asarray(order), dtype=dtype)
    )
    full = np.concatenate([x, np.zeros((1, D), x.dtype)])[order]
    np.testing.assert_array_equal(wide(rows), wide(full))
    np.testing.assert_allclose(squares, (wide(full) ** 2).sum(1), rtol=1e-5)
    assert np.isnan(scale[3])
    assert np.isnan(wide(values[3])).all()
    finite = [0, 1, 5]
    largest = np.abs(wide(full)).max(1)
    assert list(scale[[2, 4]]) == [1, 1]
    for i in finite:
        assert np.log2(scale[i]) == np.floor(np.log2(scale[i]))
        assert LARGEST[dtype] / 2 < largest[i] / scale[i] <= LARGEST[dtype]
        expected = rounded(wide(full[i]) / scale[i], dtype)
        np.testing.assert_array_equal(wide(values[i]), wide(expected))


def test_up(problem):
    p = problem
    y2, values, metadata = grouped.up24_fp8(
        p["values"], p["metadata"], p["x"], p["factors"], *p["layout"]
    )
    factors = np.asarray(p["factors"])
    full = np.maximum(product(p["x"], p), 0) ** 2 * factors[:, :1]
    groups = full[USED].reshape(-1, 4)
    order = np.argsort(-groups, axis=1, kind="stable")[:, :2]
    kept = np.zeros_like(groups)
    np.put_along_axis(kept, order, np.take_along_axis(groups, order, 1), 1)
    expected = kept.reshape(-1, LIVE)
    np.testing.assert_allclose(wide(y2)[USED], expected, rtol=2**-8)
    assert not wide(y2)[192:].any()
    narrow = wide(reference_fp8.unpack24_fp8(values, metadata))
    assert values.dtype == E4M3
    again = rounded(np.asarray(y2).astype(np.float32) * factors[:, 1:], E4M3)
    np.testing.assert_array_equal(narrow[USED], wide(again)[USED])
    assert not narrow[192:].any()


def test_up_backward(problem):
    p = problem
    y2, _, metadata = grouped.up24_fp8(
        p["values"], p["metadata"], p["x"], p["factors"], *p["layout"]
    )
    dy1, values = grouped.up24_backward_fp8(
        p["values"], p["metadata"], p["dy"], p["factors"], y2, metadata, *p["layout"]
    )
    factors = np.asarray(p["factors"])
    expected = np.sqrt(wide(y2)) * product(p["dy"], p) * factors[:, :1]
    np.testing.assert_allclose(
        wide(dy1)[USED], expected[USED], rtol=2**-7, atol=1e-6 * np.nanmax(np.abs(expected))
    )
    assert not wide(dy1)[192:].any()
    narrow = wide(reference_fp8.unpack24_fp8(values, metadata))
    assert values.dtype == E5M2
    again = rounded(np.asarray(dy1).astype(np.float32) * factors[:, 1:], E5M2)
    np.testing.assert_array_equal(narrow[USED], wide(again)[USED])


@pytest.mark.parametrize("by_token", [False, True])
def test_down(problem, by_token):
    p = problem
    rng = np.random.default_rng(2)
    y = jnp.asarray(rng.standard_normal((ROWS, LIVE)), jnp.float32)
    values, metadata, _ = reference_fp8.pack24_fp8(y, axis=1, mode="magnitude")
    columns = jnp.asarray(p["columns"])
    scale = jnp.asarray(2.0 ** rng.integers(-8, 3, ROWS), jnp.float32)
    arguments = (values, metadata, columns, scale, *p["layout"])
    dense = wide(reference_fp8.unpack24_fp8(values, metadata))
    w = wide(columns)
    expected = np.stack([w[e] @ row for row, e in zip(dense, OF_ROW, strict=True)])
    expected *= np.asarray(scale)[:, None]
    if not by_token:
        out = wide(grouped.down24_fp8(*arguments))
        np.testing.assert_allclose(out[USED], expected[USED], rtol=2**-7, atol=1e-4)
        assert not out[192:].any()
        return
    tokens = 190
    permutation = np.full(ROWS, tokens, np.int32)
    permutation[1:191] = rng.permutation(tokens)
    out = grouped.down24_fp8(*arguments, permutation=jnp.asarray(permutation), tokens=tokens)
    assert out.shape == (tokens, D)
    by_row = np.zeros((tokens, D))
    by_row[permutation[1:191]] = expected[1:191]
    np.testing.assert_allclose(wide(out), by_row, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": jnp.zeros((ROWS, D), jnp.bfloat16)}, r"^x\.dtype=bfloat16"),
        ({"x": jnp.zeros((ROWS, D - 4), jnp.float8_e4m3fn)}, r"^x\.shape"),
        ({"factors": jnp.zeros((ROWS,), jnp.float32)}, r"^factors\.shape"),
        ({"values": jnp.zeros((HIDDEN, D // 2), jnp.bfloat16)}, r"^values\.dtype"),
    ],
)
def test_refuses_what_does_not_fit(problem, changes, message):
    p = problem | changes
    with pytest.raises(ValueError, match=message):
        grouped.up24_fp8(p["values"], p["metadata"], p["x"], p["factors"], *p["layout"])
