"""The Hopper kernels of 8-bit floats on a GPU, against their definitions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference_fp8
from kernels.hopper.pack24 import MODES, Pack24Config
from kernels.hopper.pack24_fp8 import pack24_fp8
from kernels.hopper.spmm24_fp8 import Spmm24Config, spmm24_fp8
from kernels.registry import target_capability
from sparsejax import fp8
from sparsejax.ops import matmul24
from tests.kernels import oracle
from train.compiler import CUBLAS

pytestmark = pytest.mark.gpu

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
WIDE = Spmm24Config(wg_m=2, tile_n=192, tile_k=128, epi_n=192, out_slots=1, in_flight=0, order="n")
PLAIN = Spmm24Config(tile_k=128, in_flight=0)
# Small integers are exact in both types, and their sums in the tensor cores' accumulators.
EXACT = 1e-6
# Of normal data: the accumulators keep fewer bits than float32.
MAX_ERROR = 1e-2


@pytest.fixture(autouse=True)
def hopper():
    if target_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def generator():
    seed = np.random.SeedSequence().entropy
    print(f"{seed=}")
    return np.random.default_rng(seed)


def make_operands(m, n, k, a_dtype, b_dtype, integers):
    rng = generator()
    draw = (lambda s: rng.integers(-4, 5, s)) if integers else rng.standard_normal
    a, b = draw((m, k)), draw((n, k))
    values, metadata, _ = reference_fp8.pack24_fp8(
        jnp.asarray(a, jnp.float32), axis=1, mode="magnitude", dtype=a_dtype
    )
    scales = [jnp.asarray(2.0 ** rng.integers(-3, 4, size), jnp.float32) for size in (m, n)]
    return values, metadata, reference_fp8.round_fp8(b, b_dtype), scales


def relative_error(got, expected):
    assert got.shape == expected.shape
    difference = got.astype(jnp.float32) - expected.astype(jnp.float32)
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected.astype(jnp.float32)))


def check(
    m,
    n,
    k,
    *,
    config=None,
    out_layout="mn",
    scaled=(True, True),
    epilogue=None,
    a_dtype=E4M3,
    b_dtype=E4M3,
    out_dtype=jnp.float32,
    integers=True,
    limit=None,
):
    """Correct, fully written over NaN, and the same bits twice."""
    values, metadata, b, (a_scale, b_scale) = make_operands(m, n, k, a_dtype, b_dtype, integers)
    # One for all is at most 1: squares of what it scales must stay in float16's range.
    one = lambda scale: jnp.minimum(scale[0], 1.0)
    pick = lambda scale, how: scale if how is True else None if how is None else one(scale)
    scales = {"a_scale": pick(a_scale, scaled[0]), "b_scale": pick(b_scale, scaled[1])}
    options = {"out_layout": out_layout, "epilogue": epilogue, "out_dtype": out_dtype}

    def run(poison, values, metadata, b, scales):
        del poison  # donated: the output takes its place, so unwritten elements stay NaN
        return spmm24_fp8(values, metadata, b, **scales, **options, config=config)

    call = jax.jit(run, donate_argnums=0, keep_unused=True)
    outputs = []
    for _ in range(2):
        poison = jnp.full((m, n) if out_layout == "mn" else (n, m), jnp.nan, out_dtype)
        place = poison.unsafe_buffer_pointer()
        out = call(poison, values, metadata, b, scales)
        assert out.unsafe_buffer_pointer() == place
        outputs.append(out)
    expected = reference_fp8.spmm24_fp8(values, metadata, b, **scales, **options)
    error = relative_error(outputs[0], expected)
    print(f"{error=:.2e}")
    assert error < (limit or (EXACT if integers else MAX_ERROR))
    np.testing.assert_array_equal(*(np.asarray(o, np.float32) for o in outputs))


@pytest.mark.parametrize("a_dtype", [E4M3, E5M2])
@pytest.mark.parametrize("b_dtype", [E4M3, E5M2])
def test_one_instruction_of_every_pair_of_types(a_dtype, b_dtype):
    """One tile, one K = 64: metadata, operands and accumulators of the plain instruction."""
    config = dataclasses.replace(PLAIN, warpgroups=1, tile_n=64, stages=2, out_slots=1)
    check(64, 64, 64, config=config, scaled=(None, None), a_dtype=a_dtype, b_dtype=b_dtype)


def test_every_position_of_two_in_four():
    """Rows that keep (i, j) only, against a B that tells all columns apart."""
    a = np.zeros((64, 128), np.float32)
    for row in range(64):
        for group in range(32):
            pair = oracle.PATTERNS[(row + group) % 6]
            a[row, [4 * group + i for i in pair]] = 1 + (row + group) % 3
    values, metadata, _ = reference_fp8.pack24_fp8(a, axis=1, mode="magnitude")
    for first in (0, 64):
        b = np.zeros((64, 128), np.float32)
        b[np.arange(64), first + np.arange(64)] = 1
        got = spmm24_fp8(values, metadata, jnp.asarray(b, E4M3), out_dtype=jnp.float32)
        np.testing.assert_array_equal(np.asarray(got), a[:, first : first + 64])


@pytest.mark.parametrize("out_layout", ["mn", "nm"])
@pytest.mark.parametrize("config", [WIDE, PLAIN], ids=["256x192", "128x256"])
@pytest.mark.parametrize("scaled", [(True, True), (True, False), (False, True), (None, None)])
def test_orientations_and_scales(out_layout, config, scaled):
    """Rounding to bf16 is all that may differ."""
    check(
        512, 776, 1088, config=config, out_layout=out_layout, scaled=scaled,
        out_dtype=jnp.bfloat16, limit=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("out_layout", ["mn", "nm"])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_epilogues_and_dtypes(out_layout, out_dtype):
    check(
        320, 264, 256, out_layout=out_layout, scaled=(False, None), epilogue="relu2",
        out_dtype=out_dtype, integers=False, b_dtype=E5M2,
    )  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        Spmm24Config(wg_m=2, tile_n=128, split="n", tile_k=128, in_flight=0, out_slots=1),
        Spmm24Config(tile_n=128, tile_k=256, stages=2, warpgroups=1, in_flight=0),
        dataclasses.replace(PLAIN, cluster="n", out_slots=1),
        Spmm24Config(warpgroups=3, tile_n=192, tile_k=128, stages=3, in_flight=0),
    ],
    ids=str,
)
def test_other_schedules(config):
    check(832, 1032, 704, config=config, out_layout="nm", out_dtype=jnp.bfloat16, limit=1e-3)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [(64, 8, 64), (64, 184, 64), (192, 192, 128), (256, 200, 192), (320, 392, 320),
     (64 * 67, 8 * 171, 64 * 9)],
)  # fmt: skip
def test_sizes_around_tile_boundaries(m, n, k):
    check(m, n, k, config=WIDE, out_dtype=jnp.bfloat16, limit=1e-3)


def test_many_steps_and_normal_data():
    for _ in range(3):
        check(1024, 1152, 8192, out_dtype=jnp.bfloat16, integers=False)


def pack_input(shape, dtype):
    rng = generator()
    ties = rng.integers(-2, 3, shape)
    x = np.where(rng.random(shape) < 0.3, ties, 100 * rng.standard_normal(shape))
    return jnp.asarray(x, dtype), rng


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("out", [E4M3, E5M2])
def test_pack24_fp8_equals_the_reference(dtype, axis, mode, out):
    """Bit for bit: selection, scaling and rounding are exact, and so is the count."""
    for shape, k_first, rows in (((192, 320), True, True), ((100, 72), False, False)):
        x, rng = pack_input(shape, dtype)
        scale = jnp.asarray(8 * rng.random(shape[1 - axis]), jnp.float32)
        scale = scale if rows else scale[0]
        options = {"axis": axis, "mode": mode, "dtype": out}
        config = Pack24Config(k_first=k_first)
        got = jax.jit(functools.partial(pack24_fp8, **options, config=config))(x, scale=scale)
        expected = reference_fp8.pack24_fp8(x, scale=scale, **options)
        for g, e in zip(got, expected, strict=True):
            assert (g.shape, g.dtype) == (e.shape, e.dtype)
            np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(e, np.float32))


def test_pack24_fp8_keeps_nan_and_saturates():
    x = np.zeros((64, 64), np.float32)
    x[:, 1::4], x[:, 2::4], x[:, 3::4] = np.nan, -np.inf, 5
    got = pack24_fp8(jnp.asarray(x), axis=1, mode="magnitude")
    expected = reference_fp8.pack24_fp8(x, axis=1, mode="magnitude")
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(e, np.float32))
    assert int(got[2]) == 64 * 16


@pytest.mark.parametrize("axis", [0, 1])
def test_matmul24_equals_the_reference(axis):
    rng = generator()
    x = jnp.asarray(rng.standard_normal((1000, 512)), jnp.bfloat16)
    w = jnp.asarray(rng.standard_normal((512, 768)), jnp.float32)
    dy = jnp.asarray(rng.standard_normal((1000, 768)), jnp.bfloat16)

    def products(x, w, dy, backend):
        call = lambda x, w: matmul24(x, w, axis=axis, precision="fp8", backend=backend)
        y, vjp = jax.vjp(call, x, w)
        return y, *vjp(dy)

    run = jax.jit(products, static_argnums=3)
    for got, expected in zip(run(x, w, dy, "hopper"), run(x, w, dy, "reference"), strict=True):
        assert relative_error(got, expected) < MAX_ERROR


def test_dense_product_is_one_call_of_8_bit_cublaslt():
    """The baseline is what it says: XLA rewrites the dequantised product to 8-bit operands."""
    a = fp8.quantize(jnp.ones((512, 1024), jnp.bfloat16), E4M3, scaling="tensor")
    b = fp8.quantize(jnp.ones((768, 1024), jnp.bfloat16), E4M3, scaling="tensor")
    call = functools.partial(fp8.dot, contract=(1, 1), out_dtype=jnp.bfloat16)
    text = jax.jit(call).lower(a, b).compile(compiler_options=CUBLAS).as_text()
    assert "__cublas$lt$matmul$f8" in text
