"""The grouped kernels of 8-bit floats without a GPU: lowering, refusals, a group's arithmetic."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kernels import groups24
from kernels.hopper import grouped24_fp8
from kernels.registry import assume_capability
from tests.kernels.ptx_words import interpret, pack, words
from tests.kernels.test_grouped import groups, halves

pytestmark = pytest.mark.core

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
# D, H, T, M
LLAMA1B = (2048, 8192, 16384, 16)
SMALL = [(256, 512, 300, 8), (512, 128, 128, 4), LLAMA1B]


def arguments(d: int, hidden: int, tokens: int, m: int, v: int = 128) -> dict:
    """Arguments of the functions, as shapes, and the shapes of their results."""
    experts = m // 4
    live, rows = hidden // experts, -(-(tokens + experts * (v - 1)) // v) * v
    array = lambda *shape, dtype: jax.ShapeDtypeStruct(shape, dtype)
    metadata = lambda m, k: array(m // 64, k // 64, 128, dtype=jnp.int32)
    layout = array(experts + 1, dtype=jnp.int32), array(rows // v, dtype=jnp.int32)
    packed = array(hidden, d // 2, dtype=E4M3), metadata(hidden, d)
    factors, scale = array(rows, 2, dtype=jnp.float32), array(rows, dtype=jnp.float32)
    order = array(rows, dtype=jnp.int32)
    y2, columns = array(rows, live, dtype=jnp.bfloat16), array(experts, d, live, dtype=E4M3)
    kept = metadata(rows, live)
    half = lambda dtype: array(rows, live // 2, dtype=dtype)
    weight = array(hidden, d, dtype=jnp.float32)
    return {
        "pack_weight24_fp8": (
            (weight, array(dtype=jnp.float32)),
            (*packed, columns),
            lambda w, scale: grouped24_fp8.pack_weight24_fp8(
                w, num_experts=experts, m=m, scale=scale
            ),
        ),
        "stack_fp8": (
            (array(tokens, d, dtype=jnp.bfloat16), order),
            (
                array(rows, d, dtype=jnp.bfloat16),
                array(rows, d, dtype=E5M2),
                scale,
                scale,
            ),
            lambda x, order: grouped24_fp8.stack_fp8(x, order, dtype=E5M2),
        ),
        "up24_fp8": (
            (*packed, array(rows, d, dtype=E4M3), factors, *layout),
            (y2, half(E4M3), kept),
            grouped24_fp8.up24_fp8,
        ),
        "up24_backward_fp8": (
            (*packed, array(rows, d, dtype=E5M2), factors, y2, kept, *layout),
            (y2, half(E5M2)),
            grouped24_fp8.up24_backward_fp8,
        ),
        "down24_fp8": (
            (half(E4M3), kept, columns, scale, *layout),
            (array(rows, d, dtype=jnp.bfloat16),),
            grouped24_fp8.down24_fp8,
        ),
        "down24_fp8 by token": (
            (half(E5M2), kept, columns, scale, *layout, order),
            (array(tokens, d, dtype=jnp.bfloat16),),
            lambda *a: grouped24_fp8.down24_fp8(*a[:-1], permutation=a[-1], tokens=tokens),
        ),
    }


@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_lowers_for_cuda(sizes):
    for args, expected, function in arguments(*sizes).values():
        with assume_capability((9, 0)):
            traced = jax.jit(function).trace(*args)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text
        found = [(o.shape, o.dtype) for o in jax.tree.leaves(traced.out_info)]
        assert found == [(o.shape, o.dtype) for o in expected]


def test_refuses_other_devices():
    for args, _, function in arguments(256, 512, 300, 8).values():
        with assume_capability((8, 0)), pytest.raises(NotImplementedError, match="9"):
            jax.eval_shape(function, *args)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((192, 512, 300, 8), "width=192"), ((256, 512, 300, 8, 64), "v=64")],
)
def test_refusals(sizes, message):
    args, _, function = arguments(*sizes)["up24_fp8"]
    with assume_capability((9, 0)), pytest.raises(NotImplementedError, match=message):
        jax.eval_shape(function, *args)


@pytest.mark.parametrize("width", [128, 16384])
def test_stack_refuses_widths(width):
    args, _, function = arguments(width, 512, 300, 8)["stack_fp8"]
    with assume_capability((9, 0)), pytest.raises(NotImplementedError, match=f"{width=}"):
        jax.eval_shape(function, *args)


def test_choice_scales_what_it_keeps():
    x = groups()
    factor = np.tile(np.array([0.125, 2.0, 0.5], np.float32), x.shape[1])[: x.shape[1]]
    inputs = {f"${2 + i}": words(x[i]) for i in range(4)}
    plain = interpret(groups24.CHOOSE.replace("DTYPE", "bf16"), inputs)
    text = groups24.CHOOSE_SCALED.replace("DTYPE", "bf16")
    scaled = interpret(text, inputs | {"$6": words(factor)})
    np.testing.assert_array_equal(scaled["$1"], plain["$1"])
    np.testing.assert_array_equal(halves(scaled["$0"]), halves(plain["$0"]) * factor)


def test_gradient_takes_its_factor():
    rng = np.random.default_rng(0)
    y2 = (rng.random((4, 300)) * (rng.random((4, 300)) < 0.6)).astype(np.float32)
    dy2, factor = rng.standard_normal((4, 300)).astype(np.float32), np.float32(2**-7)
    nibble = np.array([0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110] * 50, np.uint32)
    inputs = {"$3": pack(y2[0], y2[1]), "$4": pack(y2[2], y2[3]), "$9": nibble}
    inputs |= {f"${5 + i}": words(dy2[i]) for i in range(4)}
    inputs["$10"] = words(np.full(300, factor))
    text = groups24.SCALE_SCALED.replace("WIDEN", groups24.WIDENINGS["bf16"])
    text = text.replace("DTYPE", "bf16")
    out = interpret(text, inputs)
    rounded = y2.astype(ml_dtypes.bfloat16).astype(np.float32)
    expected = (np.sqrt(rounded) * factor * dy2).astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(np.concatenate([halves(out["$0"]), halves(out["$1"])]), expected)
    columns = np.arange(300)
    kept = [expected[nibble & 3, columns], expected[nibble >> 2, columns]]
    np.testing.assert_array_equal(halves(out["$2"]), kept)


@pytest.mark.parametrize("dtype", ["e4m3", "e5m2"])
def test_narrowing_rounds_once_and_saturates(dtype):
    numpy_type = {"e4m3": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[dtype]
    largest = float(ml_dtypes.finfo(numpy_type).max)
    rng = np.random.default_rng(1)
    pairs = rng.standard_normal((2, 400)) * 10.0 ** rng.integers(-8, 6, (2, 400))
    pairs[0, :3] = 0, np.nan, 1e30
    pairs = pairs.astype(ml_dtypes.bfloat16).astype(np.float32)
    factor = np.full(400, 0.25, np.float32)
    text = groups24.NARROW.replace("DTYPE", dtype)
    out = interpret(text, {"$1": pack(*pairs), "$2": words(factor)})["$0"]
    scaled = pairs * np.float32(0.25)
    expected = np.where(np.isnan(scaled), np.nan, np.clip(scaled, -largest, largest))
    expected = expected.astype(numpy_type).astype(np.float32)
    found = [(out >> np.uint32(s) & np.uint32(0xFF)).astype(np.uint8) for s in (0, 8)]
    found = [f.view(numpy_type).astype(np.float32) for f in found]
    np.testing.assert_array_equal(found, expected)
    assert not (out >> np.uint32(16)).any()
