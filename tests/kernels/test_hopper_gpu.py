"""The Hopper kernels on a GPU: every orientation and epilogue against float32 references.

A sweep of the same cases under NVIDIA's checkers:
``compute-sanitizer --tool memcheck python -m tests.kernels.sanitize hopper`` (or racecheck).
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference
from kernels.hopper.pack24 import MODES, Pack24Config, pack24
from kernels.hopper.spmm24 import Spmm24Config, check_spmm24, spmm24
from kernels.registry import target_capability

pytestmark = pytest.mark.gpu

WIDE = Spmm24Config(wg_m=2, tile_n=192, epi_n=192, out_slots=1, order="n")
MAX_ERROR = 5e-3


@pytest.fixture(autouse=True)
def hopper():
    if target_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def make_operands(m, n, k, b_layout, dtype=jnp.bfloat16):
    """Fresh random operands: packed A, B, and A pruned."""
    seed = np.random.SeedSequence().entropy
    print(f"{seed=}")
    rng = np.random.default_rng(seed)
    a = jnp.asarray(rng.standard_normal((m, k)), dtype)
    b_shape = (n, k) if b_layout == "nk" else (k, n)
    b = jnp.asarray(rng.standard_normal(b_shape), dtype)
    values, metadata = reference.pack24(a, axis=1, mode="magnitude", dtype=dtype)
    return values, metadata, b, reference.unpack24(values, metadata)


def expected_output(a, b, b_layout, out_layout, scale, epilogue):
    b = b.T if b_layout == "nk" else b
    out = jnp.dot(a.astype(jnp.float32), b.astype(jnp.float32), precision="highest")
    out = out if scale is None else out * scale
    out = jnp.maximum(out, 0) ** 2 if epilogue == "relu2" else out
    return out.T if out_layout == "nm" else out


def relative_error(got, expected):
    assert got.shape == expected.shape
    difference = got.astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))


def check(m, n, k, b_layout, out_layout, *, scale=None, epilogue=None, config=None, **dtypes):
    """Correct, fully written over NaN, and the same bits twice."""
    dtype, out_dtype = dtypes.get("dtype", jnp.bfloat16), dtypes.get("out_dtype", jnp.bfloat16)
    values, metadata, b, a = make_operands(m, n, k, b_layout, dtype)
    factor = None if scale is None else jnp.float32(scale)

    def run(poison, values, metadata, b, factor):
        del poison  # donated: the output takes its place, so unwritten elements stay NaN
        return spmm24(
            values,
            metadata,
            b,
            b_layout=b_layout,
            out_layout=out_layout,
            scale=factor,
            epilogue=epilogue,
            out_dtype=out_dtype,
            config=config,
        )

    call = jax.jit(run, donate_argnums=0, keep_unused=True)
    outputs = []
    for _ in range(2):
        poison = jnp.full((m, n) if out_layout == "mn" else (n, m), jnp.nan, out_dtype)
        place = poison.unsafe_buffer_pointer()
        out = call(poison, values, metadata, b, factor)
        assert out.unsafe_buffer_pointer() == place
        outputs.append(out)
    expected = expected_output(a, b, b_layout, out_layout, scale, epilogue)
    assert relative_error(outputs[0], expected) < MAX_ERROR
    first, second = (np.asarray(o, np.float32) for o in outputs)
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("b_layout", "out_layout"), [("nk", "mn"), ("nk", "nm"), ("kn", "mn"), ("kn", "nm")]
)
@pytest.mark.parametrize("config", [WIDE, Spmm24Config()], ids=["256x192", "128x256"])
def test_every_orientation(b_layout, out_layout, config):
    check(512, 776, 1088, b_layout, out_layout, config=config)


@pytest.mark.parametrize("out_layout", ["mn", "nm"])
@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_epilogues_and_dtypes(out_layout, out_dtype):
    # Small enough for relu2 to stay in float16's range.
    check(
        320,
        264,
        256,
        "kn",
        out_layout,
        scale=0.1,
        epilogue="relu2",
        dtype=jnp.float16,
        out_dtype=out_dtype,
    )


@pytest.mark.parametrize(
    "config",
    [
        Spmm24Config(wg_m=2, tile_n=128, split="n", in_flight=0, out_slots=1),
        Spmm24Config(tile_n=128, tile_k=128, stages=3, warpgroups=1),
        Spmm24Config(wg_m=2, tile_n=192, epi_n=192, out_slots=1, cluster="m"),
        Spmm24Config(cluster="n"),
        Spmm24Config(warpgroups=3, tile_n=192, stages=3),
    ],
    ids=str,
)
def test_other_schedules(config):
    check(832, 1032, 704, "nk", "nm", config=config)


@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (64, 8, 64),
        (64, 184, 64),
        (192, 192, 128),
        (256, 200, 192),
        (320, 384, 256),
        (320, 392, 320),
        # More tiles than blocks, an odd number of steps, all edges ragged.
        (64 * 67, 8 * 171, 64 * 9),
    ],
)
def test_sizes_around_tile_boundaries(m, n, k):
    check(m, n, k, "kn", "mn", config=WIDE)


def test_chosen_configuration_runs():
    check(1024, 2048, 2048, "nk", "nm")


def test_many_steps_do_not_race():
    """Long enough for every stage and metadata register to be reused many times."""
    for _ in range(3):
        check(1024, 1152, 8192, "nk", "mn", config=WIDE)


def test_served_shapes_pass_the_check():
    values, metadata, b, _ = make_operands(64, 64, 64, "nk")
    check_spmm24(values, metadata, b, b_layout="nk")


def pack_input(shape, dtype):
    rng = np.random.default_rng(np.random.SeedSequence().entropy)
    # A third are small integers, so that ties are common.
    ties = rng.integers(-2, 3, shape)
    x = np.where(rng.random(shape) < 0.3, ties, rng.standard_normal(shape))
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_pack24_equals_the_reference(dtype, axis, mode):
    """Bit for bit: selection and rounding are exact."""
    for shape, k_first in (((192, 320), True), ((100, 72), False)):
        x = pack_input(shape, dtype)
        scale = jnp.float32(0.83) if k_first else None
        out_dtype = jnp.float16 if k_first and dtype == jnp.float16 else jnp.bfloat16
        options = {"axis": axis, "mode": mode, "dtype": out_dtype}
        call = jax.jit(functools.partial(pack24, **options, config=Pack24Config(k_first=k_first)))
        got = call(x, scale=scale)
        again = call(x, scale=scale)
        expected = reference.pack24(x, scale=scale, **options)
        for g, a, e in zip(got, again, expected, strict=True):
            assert (g.shape, g.dtype) == (e.shape, e.dtype)
            np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(e, np.float32))
            np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(a, np.float32))


def test_pack24_keeps_nan_and_infinity():
    x = np.zeros((64, 64), np.float32)
    x[:, 1::4], x[:, 2::4], x[:, 3::4] = np.nan, -np.inf, 5
    values, metadata = pack24(jnp.asarray(x), axis=1, mode="magnitude")
    expected, expected_metadata = reference.pack24(x, axis=1, mode="magnitude")
    np.testing.assert_array_equal(np.asarray(metadata), np.asarray(expected_metadata))
    np.testing.assert_array_equal(np.asarray(values, np.float32), np.asarray(expected, np.float32))


def test_packed_operand_multiplies():
    """pack24 along columns feeds spmm24: the weights path of a feed-forward network."""
    w = pack_input((256, 512), jnp.float32)
    b = pack_input((392, 256), jnp.bfloat16)
    values, metadata = pack24(w, axis=0, mode="soft_threshold")
    got = spmm24(values, metadata, b, b_layout="nk", out_layout="nm")
    a = reference.unpack24(*reference.pack24(w, axis=0, mode="soft_threshold"))
    assert relative_error(got, expected_output(a, b, "nk", "nm", None, None)) < MAX_ERROR
