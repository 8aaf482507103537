"""The Triton backend on a GPU: numbers, repeatability and the instructions behind them."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from benchmarks import device_code
from kernels.triton.pack24 import MODES, Pack24Config, pack24
from kernels.triton.spmm24 import Spmm24Config, spmm24
from tests.kernels.test_triton import SMALL, assert_packed, sparse_operand

pytestmark = pytest.mark.gpu

TOLERANCE = 5e-3


def fresh_rng() -> np.random.Generator:
    """New numbers in each run: the kernels must be right on any input."""
    seed = np.random.SeedSequence().entropy
    print(f"{seed=}")
    return np.random.default_rng(seed)


def poison(shape, dtype) -> None:
    """Leaves NaN in the memory that the next array of this size is likely to get."""
    jnp.full(shape, jnp.nan, dtype).block_until_ready().delete()


def check_product(
    m, n, k, *, b_layout, out_layout="mn", epilogue=None, dtype=None, out_dtype=None, config=None
):
    dtype = dtype or ml_dtypes.bfloat16
    out_dtype = out_dtype or dtype
    rng = fresh_rng()
    values, metadata, dense = sparse_operand(rng, m, k, dtype)
    b = rng.standard_normal((n, k)).astype(dtype)
    scale = jnp.float32(rng.uniform(0.1, 1.0))
    operands = [values, metadata, b if b_layout == "nk" else np.ascontiguousarray(b.T)]
    operands = [jnp.asarray(x) for x in operands]

    def product():
        poison((m, n), out_dtype)
        out = spmm24(
            *operands,
            b_layout=b_layout,
            out_layout=out_layout,
            scale=scale,
            epilogue=epilogue,
            out_dtype=out_dtype,
            config=config,
        )
        return np.asarray(out)

    first, second = product(), product()
    expected = float(scale) * (dense @ b.astype(np.float32).T)
    if epilogue == "relu2":
        expected = np.maximum(expected, 0) ** 2
    if out_layout == "nm":
        expected = expected.T
    difference = first.astype(np.float32) - expected
    assert np.linalg.norm(difference) / np.linalg.norm(expected) < TOLERANCE
    # A wrong tile hides in the norm of a large matrix, a wrong element in that of a tile.
    assert np.abs(difference).max() < 0.05 * np.abs(expected).max()
    np.testing.assert_array_equal(first.view(np.uint16), second.view(np.uint16))


@pytest.mark.parametrize("b_layout", ["nk", "kn"])
@pytest.mark.parametrize("out_layout", ["mn", "nm"])
@pytest.mark.parametrize(
    ("epilogue", "dtype", "out_dtype"),
    [
        (None, ml_dtypes.bfloat16, None),
        ("relu2", np.float16, None),
        (None, ml_dtypes.bfloat16, np.float32),
    ],
)
def test_spmm24_every_orientation_and_epilogue(b_layout, out_layout, epilogue, dtype, out_dtype):
    check_product(
        320, 264, 192, b_layout=b_layout, out_layout=out_layout, epilogue=epilogue, dtype=dtype,
        out_dtype=out_dtype, config=Spmm24Config(),
    )  # fmt: skip


@pytest.mark.parametrize("b_layout", ["nk", "kn"])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    # The first has a single tile, and fewer steps along k than stages.
    [(64, 8, 64), (256, 128, 128), (192, 120, 256), (320, 136, 320), (576, 392, 1088)],
)
def test_spmm24_around_tile_boundaries(m, n, k, b_layout):
    check_product(m, n, k, b_layout=b_layout, config=Spmm24Config())


@pytest.mark.parametrize("b_layout", ["nk", "kn"])
@pytest.mark.parametrize(
    "config",
    [
        None,
        SMALL,
        Spmm24Config(stages=3),
        Spmm24Config(stages=4, group_m=1),
        Spmm24Config(block_k=32, stages=8),
        Spmm24Config(warps_m=2, warps_n=4, frags_m=8, frags_n=4, stages=4),
        Spmm24Config(warps_m=4, warps_n=1, frags_m=2, frags_n=16, stages=3),
    ],
)
def test_spmm24_tilings(config, b_layout):
    check_product(640, 512, 448, b_layout=b_layout, config=config)


def test_spmm24_fills_the_device_many_times():
    # More programs than multiprocessors, uneven groups of tiles, a long ring.
    check_product(4416, 2440, 512, b_layout="nk", out_layout="nm", config=Spmm24Config())


def test_spmm24_under_vmap():
    rng = fresh_rng()
    stacks = [sparse_operand(rng, 128, 128) for _ in range(3)]
    values, metadata, dense = (np.stack(x) for x in zip(*stacks, strict=True))
    b = rng.standard_normal((3, 72, 128)).astype(ml_dtypes.bfloat16)
    out = jax.vmap(lambda v, e, b: spmm24(v, e, b, b_layout="nk"))(
        jnp.asarray(values), jnp.asarray(metadata), jnp.asarray(b)
    )
    expected = np.einsum("smk,snk->smn", dense, b.astype(np.float32))
    difference = np.asarray(out, np.float32) - expected
    assert np.linalg.norm(difference) / np.linalg.norm(expected) < TOLERANCE


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_pack24_is_exact(axis, mode, dtype):
    rng = fresh_rng()
    shape = (136, 200)
    x = rng.standard_normal(shape)
    x = np.where(rng.random(shape) < 0.5, np.round(x), x).astype(dtype)
    x.flat[:8] = [np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, np.nan, -1.0]
    poison((shape[1 - axis], shape[axis] // 2), jnp.bfloat16)
    with np.errstate(invalid="ignore"):
        packed = pack24(jnp.asarray(x), axis=axis, mode=mode, scale=jnp.float32(1.3))
        assert_packed(packed, x, axis, mode, 1.3)


@pytest.mark.parametrize("tiles_k", [2, 4])
def test_pack24_tilings(tiles_k):
    x = fresh_rng().standard_normal((68, 328)).astype(np.float32)
    packed = pack24(jnp.asarray(x), axis=1, mode="magnitude", config=Pack24Config(tiles_k=tiles_k))
    assert_packed(packed, x, 1, "magnitude", 1.0)


@pytest.mark.skipif(device_code.cuobjdump() is None, reason="needs cuobjdump of the CUDA toolkit")
def test_spmm24_runs_on_sparse_tensor_cores():
    config = Spmm24Config()
    arguments = (
        jax.ShapeDtypeStruct((256, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((4, 4, 128), jnp.int32),
        jax.ShapeDtypeStruct((128, 256), jnp.bfloat16),
    )
    product = functools.partial(spmm24, b_layout="nk", config=config)
    operands = [jnp.zeros(a.shape, a.dtype) for a in arguments]
    jax.block_until_ready(jax.jit(product)(*operands))
    code = device_code.compiled("spmm24")
    assert code is not None
    # Two k32 steps a round.
    assert code.count("HMMA.SP.16832.F32.BF16") >= 2 * config.frags_m * config.frags_n
    assert "LDSM" in code.sass
    assert "LDGSTS" in code.sass
    assert code.stack_bytes == 0  # No spills.
