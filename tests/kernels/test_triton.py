"""The Triton backend on a CPU: lowering for CUDA, and the interpreter with the MMA emulated."""

import contextlib
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractDevice, AbstractMesh

from kernels.triton import mainloop
from kernels.triton.pack24 import Pack24Config, check_pack24, pack24
from kernels.triton.spmm24 import Spmm24Config, check_spmm24, spmm24
from tests.kernels import oracle

SMALL = Spmm24Config(
    warps_m=2, warps_n=2, frags_m=2, frags_n=4, block_k=32, stages=3, group_m=2
)  # 64 x 64


@contextlib.contextmanager
def an_h100():
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        yield


def lowered(f, *shapes) -> str:
    with an_h100():
        traced = jax.jit(f).trace(*(jax.ShapeDtypeStruct(s, d) for s, d in shapes))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


def sparse_operand(rng, m: int, k: int, dtype=ml_dtypes.bfloat16):
    """Packed values, metadata, and the dense float32 matrix they stand for."""
    groups = rng.standard_normal((m, k // 4, 4)).astype(dtype).astype(np.float32)
    order = np.argsort(-np.abs(groups), axis=-1, kind="stable")
    np.put_along_axis(groups, order[..., 2:], 0, axis=-1)
    indices = np.sort(order[..., :2], axis=-1)
    values = np.take_along_axis(groups, indices, axis=-1).reshape(m, k // 2)
    return values.astype(dtype), oracle.metadata(indices), groups.reshape(m, k)


# What these kernels need of JAX is private or experimental: every version must lower them.
@pytest.mark.core
@pytest.mark.parametrize("b_layout", ["nk", "kn"])
@pytest.mark.parametrize("out_layout", ["mn", "nm"])
@pytest.mark.parametrize(
    ("dtype", "out_dtype"),
    [(jnp.bfloat16, jnp.bfloat16), (jnp.float16, jnp.float16), (jnp.bfloat16, jnp.float32)],
)
def test_spmm24_lowers_for_cuda(b_layout, out_layout, dtype, out_dtype):
    m, n, k = 8192, 16384, 2048

    def product(values, metadata, b, scale):
        return spmm24(
            values,
            metadata,
            b,
            b_layout=b_layout,
            out_layout=out_layout,
            scale=scale,
            epilogue="relu2",
            out_dtype=out_dtype,
        )

    text = lowered(
        product,
        ((m, k // 2), dtype),
        ((m // 64, k // 64, 128), jnp.int32),
        ((n, k) if b_layout == "nk" else (k, n), dtype),
        ((), jnp.float32),
    )
    assert "__gpu$xla.gpu.triton" in text


@pytest.mark.core
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_pack24_lowers_for_cuda(axis, dtype):
    text = lowered(
        lambda x, scale: pack24(x, axis=axis, mode="soft_threshold", scale=scale),
        ((520, 264), dtype),
        ((), jnp.float32),
    )
    assert "__gpu$xla.gpu.triton" in text


@pytest.mark.parametrize("b_layout", ["nk", "kn"])
@pytest.mark.parametrize("block_k", [32, 64])
def test_main_loop_has_every_product_and_copy_once(b_layout, block_k):
    tile = mainloop.Tile(4, 2, 4, 8, block_k, 4)
    ptx = mainloop._Writer(tile, 512, 512, 512, b_layout, "bf16").write()
    before, loop = ptx.split("ROUND:")
    products = re.findall(r"mma\.sp.* \{acc(\d+),.*0x([01]);", loop)
    assert len(products) == len(set(products)) == 2 * tile.frags_m * tile.frags_n
    # A round covers k = 64: this many 16-byte chunks of both operands.
    chunks = (tile.block_m * 64 + tile.block_n * 128) // 16
    assert loop.count("cp.async.cg") * tile.threads == chunks
    assert before.count("cp.async.cg") == loop.count("cp.async.cg") * block_k // 64 * 2
    # Both operands pass through ldmatrix, four 8 x 8 matrices at a time, B transposed if "kn".
    assert loop.count("ldmatrix") == 2 * (tile.frags_m + tile.frags_n)
    assert loop.count(".trans.") == (2 * tile.frags_n if b_layout == "kn" else 0)


@pytest.mark.parametrize(
    ("b_layout", "out_layout", "epilogue", "dtype", "out_dtype"),
    [
        ("nk", "mn", None, ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        ("kn", "mn", "relu2", ml_dtypes.bfloat16, np.float32),
        ("nk", "nm", "relu2", np.float16, np.float16),
        ("kn", "nm", None, ml_dtypes.bfloat16, ml_dtypes.bfloat16),
        ("kn", "nm", None, ml_dtypes.bfloat16, np.float32),
    ],
)
def test_spmm24_interpreted_matches_float32(b_layout, out_layout, epilogue, dtype, out_dtype):
    rng = np.random.default_rng(0)
    m, n, k = 192, 72, 128  # A ragged last tile along n, a ragged last group of tiles along m.
    values, metadata, dense = sparse_operand(rng, m, k, dtype)
    b = rng.standard_normal((n, k)).astype(dtype)
    out = spmm24(
        jnp.asarray(values),
        jnp.asarray(metadata),
        jnp.asarray(b if b_layout == "nk" else np.ascontiguousarray(b.T)),
        b_layout=b_layout,
        out_layout=out_layout,
        scale=jnp.float32(0.25),
        epilogue=epilogue,
        out_dtype=out_dtype,
        config=SMALL,
        interpret=True,
    )
    expected = 0.25 * (dense @ b.astype(np.float32).T)
    if epilogue == "relu2":
        expected = np.maximum(expected, 0) ** 2
    if out_layout == "nm":
        expected = expected.T
    assert out.shape == expected.shape
    assert out.dtype == out_dtype
    error = np.linalg.norm(np.asarray(out, np.float32) - expected) / np.linalg.norm(expected)
    assert error < (1e-6 if out_dtype == np.float32 else 3e-3)


@pytest.mark.core
def test_spmm24_interpreted_single_tile():
    rng = np.random.default_rng(3)
    values, metadata, dense = sparse_operand(rng, 64, 64)
    b = rng.standard_normal((16, 64)).astype(ml_dtypes.bfloat16)
    out = spmm24(
        jnp.asarray(values),
        jnp.asarray(metadata),
        jnp.asarray(b),
        b_layout="nk",
        config=SMALL,
        interpret=True,
    )
    expected = dense @ b.astype(np.float32).T
    np.testing.assert_allclose(np.asarray(out, np.float32), expected, rtol=1e-2, atol=1e-2)


def expected_pack(x: np.ndarray, axis: int, mode: str, scale: float):
    """Values (float32, unrounded) and metadata of the padded operand."""
    a = x.astype(np.float32)
    a = a if axis == 1 else a.T
    m, k = (-(-s // 64) * 64 for s in a.shape)
    padded = np.zeros((m, k), np.float32)
    padded[: a.shape[0], : a.shape[1]] = a
    pruned, indices = oracle.prune(padded, mode)
    values = np.take_along_axis(pruned.reshape(m, k // 4, 4), indices, axis=-1)
    return values.reshape(m, k // 2) * np.float32(scale), oracle.metadata(indices)


def assert_packed(packed, x, axis, mode, scale, dtype=ml_dtypes.bfloat16):
    values, metadata = expected_pack(np.asarray(x), axis, mode, scale)
    np.testing.assert_array_equal(
        np.asarray(packed[0], np.float32), values.astype(dtype).astype(np.float32)
    )
    np.testing.assert_array_equal(np.asarray(packed[1]), metadata)


@pytest.mark.parametrize(
    ("axis", "dtype", "mode"),
    [
        (0, np.float32, "magnitude"),
        (0, np.float32, "value"),
        (0, np.float16, "soft_threshold"),
        (1, np.float32, "value"),
        (1, ml_dtypes.bfloat16, "magnitude"),
        (1, ml_dtypes.bfloat16, "soft_threshold"),
    ],
)
def test_pack24_interpreted_is_exact(axis, dtype, mode):
    rng = np.random.default_rng(1)
    shape = (72, 24) if axis == 1 else (36, 70)  # Neither fills its tiles.
    x = rng.standard_normal(shape)
    # Many ties, zeros of both signs, and the extremes.
    x = np.where(rng.random(shape) < 0.5, np.round(x), x).astype(dtype)
    x.flat[:8] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, np.nan, -1.0]
    with np.errstate(invalid="ignore"):
        packed = pack24(
            jnp.asarray(x), axis=axis, mode=mode, scale=jnp.float32(1.5), interpret=True
        )
        assert_packed(packed, x, axis, mode, 1.5)


@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 4))
def test_pack24_interpreted_breaks_ties_to_the_lower_index(seed, levels):
    rng = np.random.default_rng(seed)
    x = rng.integers(-levels, levels + 1, (8, 16)).astype(np.float32)
    packed = pack24(jnp.asarray(x), axis=1, mode="magnitude", interpret=True)
    assert_packed(packed, x, 1, "magnitude", 1.0)


@pytest.mark.core
def test_pack24_several_tiles_a_program():
    x = np.random.default_rng(2).standard_normal((16, 144)).astype(np.float32)
    packed = pack24(
        jnp.asarray(x), axis=1, mode="value", config=Pack24Config(tiles_k=2), interpret=True
    )
    assert_packed(packed, x, 1, "value", 1.0)


def operands(m=64, n=64, k=64, dtype=jnp.bfloat16):
    return (
        jnp.zeros((m, k // 2), dtype),
        jnp.zeros((m // 64, k // 64, 128), jnp.int32),
        jnp.zeros((n, k), dtype),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b_layout": "mk"}, "b_layout='mk'"),
        ({"out_layout": "mk"}, "out_layout='mk'"),
        ({"epilogue": "gelu"}, "epilogue='gelu'"),
        ({"scale": jnp.ones(2)}, "scale must be a scalar"),
        ({"b": jnp.zeros((64, 128), jnp.bfloat16)}, "b.shape"),
        ({"b": jnp.zeros((64, 64), jnp.float16)}, "b.dtype"),
        ({"metadata": jnp.zeros((1, 2, 128), jnp.int32)}, "metadata.shape"),
        ({"values": jnp.zeros((32, 32), jnp.bfloat16)}, "m=32"),
        ({"values": jnp.zeros(32, jnp.bfloat16)}, "two-dimensional"),
        ({"config": Spmm24Config(stages=2)}, "stages"),
        ({"config": Spmm24Config(frags_m=3)}, "frags_m"),
        ({"config": Spmm24Config(stages=9)}, "ring_bytes"),
        ({"config": Spmm24Config(warps_m=1, frags_m=2)}, "multiples of 64"),
    ],
)
def test_spmm24_refuses_bad_arguments(change, message):
    values, metadata, b = operands()
    arguments = {"values": values, "metadata": metadata, "b": b, "b_layout": "nk"} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        spmm24(**arguments, interpret=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"axis": 2}, "axis=2"),
        ({"mode": "largest"}, "mode='largest'"),
        ({"x": jnp.zeros((64, 66))}, "multiple of 4"),
        ({"x": jnp.zeros((0, 64))}, "not empty"),
        ({"x": jnp.zeros((64, 64), jnp.int32)}, "x.dtype"),
        ({"scale": jnp.ones(3)}, "scale must be a scalar"),
        ({"config": Pack24Config(tiles_k=3)}, "tiles_k"),
    ],
)
def test_pack24_refuses_bad_arguments(change, message):
    arguments = {"x": jnp.zeros((64, 64)), "axis": 1, "mode": "value"} | change
    with pytest.raises(ValueError, match=re.escape(message)):
        pack24(**arguments, interpret=True)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU serves these")
def test_checks_refuse_a_cpu():
    with pytest.raises(NotImplementedError, match="compute capability"):
        check_spmm24(*operands(), b_layout="nk")
    with pytest.raises(NotImplementedError, match="compute capability"):
        check_pack24(jnp.zeros((64, 64)), axis=1, mode="value")


def test_checks_name_what_is_not_served():
    with an_h100():
        check_spmm24(*operands(), b_layout="nk")
        check_pack24(jnp.zeros((64, 64)), axis=1, mode="value")
        with pytest.raises(NotImplementedError, match="n=12"):
            check_spmm24(*operands(n=12), b_layout="nk")
        with pytest.raises(NotImplementedError, match=r"values\.dtype"):
            check_spmm24(*operands(dtype=jnp.float32), b_layout="nk")
        with pytest.raises(NotImplementedError, match="out_dtype"):
            check_spmm24(*operands(), b_layout="nk", out_dtype=jnp.float8_e4m3fn)
        with pytest.raises(NotImplementedError, match="multiple of 8"):
            check_pack24(jnp.zeros((64, 68), jnp.bfloat16), axis=1, mode="value")
