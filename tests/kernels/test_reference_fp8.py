"""The definitions of 8-bit packing and products, against numpy written element by element."""

import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference, reference_fp8, registry
from tests.kernels import oracle

DTYPES = (jnp.float8_e4m3fn, jnp.float8_e5m2)


def grid(dtype) -> np.ndarray:
    """Every finite number of an 8-bit type, sorted, float64, without the second zero."""
    every = np.arange(256, dtype=np.uint8).view(np.dtype(dtype)).astype(np.float64)
    return np.unique(every[np.isfinite(every)])


def nearest(x: np.ndarray, dtype) -> np.ndarray:
    """To the nearest number of the type, ties to even, beyond the ends to the ends; float64."""
    numbers = grid(dtype)
    x = np.clip(x.astype(np.float64), numbers[0], numbers[-1])
    above = np.clip(np.searchsorted(numbers, x), 1, len(numbers) - 1)
    low, high = numbers[above - 1], numbers[above]
    # Neighbours differ in the last bit: the even one of the two has it clear.
    even_low = (low.astype(np.dtype(dtype)).view(np.uint8) & 1) == 0
    tie = x - low == high - x
    return np.where(tie, np.where(even_low, low, high), np.where(x - low < high - x, low, high))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding_is_to_nearest_even_and_saturates(dtype):
    numbers = grid(dtype)
    middles = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)
    rng = np.random.default_rng(0)
    spread = rng.standard_normal(5000) * 2.0 ** rng.integers(-20, 20, 5000)
    x = np.concatenate([
        numbers, middles, np.nextafter(middles, np.float32(np.inf)),
        np.nextafter(middles, np.float32(-np.inf)), spread, [1e38, -1e38, np.inf, -np.inf],
    ]).astype(np.float32)  # fmt: skip
    # XLA's CPU arithmetic may flush subnormal float32 numbers, which round to zero anyway.
    got = np.asarray(reference_fp8.round_fp8(x, dtype).astype(jnp.float32), np.float64)
    np.testing.assert_array_equal(got, nearest(x, dtype))
    assert np.isnan(np.asarray(reference_fp8.round_fp8(np.float32(np.nan), dtype), np.float32))


@pytest.mark.parametrize(("dtype", "top", "first"), [
    (jnp.float8_e4m3fn, 464.0, 464.0001), (jnp.float8_e5m2, 61439.99, 61440.0),
])  # fmt: skip
def test_what_saturates_is_counted(dtype, top, first):
    """The last number that rounds down to the largest one, and the first that does not."""
    x = jnp.asarray([top, -top, 0.0, jnp.nan], jnp.float32)
    assert int(reference_fp8.count_saturated(x, dtype)) == 0
    x = jnp.asarray([first, -first, jnp.inf, jnp.nan, top], jnp.float32)
    assert int(reference_fp8.count_saturated(x, dtype)) == 3


def metadata_oracle(indices: np.ndarray) -> np.ndarray:
    """(m/64, k/64, 128) int32, thread by thread, from kept indices (m, k/4, 2)."""
    m, groups, _ = indices.shape
    words = np.zeros((m // 64, groups // 16, 128), np.uint32)
    for tile_m, tile_k, thread in np.ndindex(words.shape):
        warp, lane = divmod(thread, 32)
        q, rest = divmod(lane, 4)
        half, r = divmod(rest, 2)
        row, first = 64 * tile_m + 16 * warp + 8 * r + q, 16 * tile_k + 8 * half
        for j in range(8):
            i0, i1 = (int(v) for v in indices[row, first + j])
            words[tile_m, tile_k, thread] |= np.uint32((i0 | i1 << 2) << (4 * j))
    return words.view(np.int32)


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mode", reference.MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_matches_the_oracle(mode, axis, dtype):
    rng = np.random.default_rng(1)
    a = rng.standard_normal((128, 192)).astype(np.float32)
    a[rng.random(a.shape) < 0.3] = 0.5  # ties
    scale = (10 * rng.random(128)).astype(np.float32)
    x = a if axis == 1 else a.T
    values, metadata, saturated = reference_fp8.pack24_fp8(
        x, axis=axis, mode=mode, scale=scale, dtype=dtype
    )
    pruned, indices = oracle.prune(a, mode)
    np.testing.assert_array_equal(np.asarray(metadata), metadata_oracle(indices))
    kept = np.take_along_axis(pruned.reshape(128, 48, 4), indices, axis=2).reshape(128, 96)
    scaled = kept * scale[:, None]
    got = np.asarray(values.astype(jnp.float32), np.float64)
    np.testing.assert_array_equal(got, nearest(scaled, dtype))
    assert int(saturated) == 0
    # And back: what was kept, where it was.
    dense = np.asarray(reference_fp8.unpack24_fp8(values, metadata).astype(jnp.float32))
    expected = np.where(pruned != 0, nearest(pruned * scale[:, None], dtype), 0)
    np.testing.assert_array_equal(dense, expected)


@given(
    m=st.sampled_from([64, 128]),
    k=st.sampled_from([64, 128]),
    seed=st.integers(0, 2**32 - 1),
)
def test_metadata_round_trips(m, k, seed):
    pairs = np.asarray(oracle.PATTERNS)[np.random.default_rng(seed).integers(0, 6, (m, k // 4))]
    words = reference_fp8._pack_metadata(*(jnp.asarray(pairs[..., i], jnp.int32) for i in (0, 1)))
    np.testing.assert_array_equal(np.asarray(words), metadata_oracle(pairs))
    back = np.stack(reference_fp8.unpack_metadata(words), axis=-1)
    np.testing.assert_array_equal(back, pairs)


def test_padding_and_saturation():
    x = np.full((65, 72), 1000.0, np.float32)
    values, metadata, saturated = reference_fp8.pack24_fp8(x, axis=1, mode="magnitude")
    assert (values.shape, metadata.shape) == ((128, 64), (2, 2, 128))
    assert int(saturated) == 65 * 36
    dense = np.asarray(reference_fp8.unpack24_fp8(values, metadata).astype(jnp.float32))
    assert dense[:65, :72].max() == 448
    assert not dense[65:].any()
    assert not dense[:, 72:].any()


@pytest.mark.core
@pytest.mark.parametrize("out_layout", ["mn", "nm"])
@pytest.mark.parametrize(
    ("a_shape", "b_shape"), [(None, None), ((), ()), ((64,), (40,)), ((64,), ())]
)
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[::-1]])
def test_product(out_layout, a_shape, b_shape, dtypes):
    rng = np.random.default_rng(2)
    a = rng.standard_normal((64, 128)).astype(np.float32)
    b = reference_fp8.round_fp8(rng.standard_normal((40, 128)), dtypes[1])
    values, metadata, _ = reference_fp8.pack24_fp8(a, axis=1, mode="magnitude", dtype=dtypes[0])
    draw = lambda shape: None if shape is None else rng.random(shape, np.float32) + 0.5
    a_scale, b_scale = draw(a_shape), draw(b_shape)
    got = registry.spmm24_fp8(
        values, metadata, b, a_scale=a_scale, b_scale=b_scale, out_layout=out_layout,
        epilogue="relu2", out_dtype=jnp.float32,
    )  # fmt: skip
    wide = lambda x: np.asarray(x.astype(jnp.float32), np.float64)
    expected = wide(reference_fp8.unpack24_fp8(values, metadata)) @ wide(b).T
    for scale, shape in ((a_scale, (-1, 1)), (b_scale, (1, -1))):
        expected = expected if scale is None else expected * np.reshape(scale, shape)
    expected = np.maximum(expected, 0) ** 2
    expected = expected if out_layout == "mn" else expected.T
    np.testing.assert_allclose(np.asarray(got), expected, rtol=1e-4, atol=1e-4)


def packed(m=64, k=64, dtype=jnp.float8_e4m3fn):
    return reference_fp8.pack24_fp8(jnp.ones((m, k)), axis=1, mode="value", dtype=dtype)[:2]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"axis": 2}, "axis=2"),
        ({"mode": "best"}, "mode='best'"),
        ({"dtype": jnp.bfloat16}, "dtype=bfloat16"),
        ({"scale": jnp.ones(3)}, "(3,)"),
    ],
)
def test_packing_names_the_wrong_argument(options, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        registry.pack24_fp8(jnp.ones((64, 64)), **({"axis": 1, "mode": "value"} | options))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"b": jnp.ones((8, 64))}, "b.dtype=float32"),
        ({"b": jnp.ones((64, 8), jnp.float8_e5m2)}, "b.shape=(64, 8)"),
        ({"a_scale": jnp.ones(8)}, "a_scale has shape (8,)"),
        ({"b_scale": jnp.ones(64)}, "b_scale has shape (64,)"),
        ({"out_layout": "xy"}, "out_layout='xy'"),
        ({"epilogue": "gelu"}, "epilogue='gelu'"),
    ],
)
def test_product_names_the_wrong_argument(options, named):
    values, metadata = packed()
    options = {"b": jnp.ones((8, 64), jnp.float8_e4m3fn)} | options
    with pytest.raises(ValueError, match=re.escape(named)):
        registry.spmm24_fp8(values, metadata, options.pop("b"), **options)


def test_16_bit_functions_refuse_8_bit_values():
    values, metadata = packed()
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        reference.unpack24(values, metadata)
    with pytest.raises(ValueError, match="bfloat16"):
        reference_fp8.unpack24_fp8(values.astype(jnp.bfloat16), metadata)


def test_types_are_those_of_the_hardware():
    assert ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max == 448
    assert ml_dtypes.finfo(ml_dtypes.float8_e5m2).max == 57344
