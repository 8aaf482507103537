"""The Hopper kernels of 8-bit floats without a GPU: lowering, counting, refusals."""

import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference_fp8
from kernels.hopper import pack24_fp8 as packing
from kernels.hopper import spmm24_fp8 as products
from kernels.hopper.spmm24_config import heuristic
from kernels.hopper.spmm24_problem import Problem
from kernels.registry import assume_capability, select
from kernels.tuning import tables

# What these kernels need of JAX is private or experimental: every version must lower them.
pytestmark = pytest.mark.core

WIDE = products.Spmm24Config(
    wg_m=2, tile_n=192, tile_k=128, epi_n=192, out_slots=1, in_flight=0, order="n"
)
CONFIGS = [
    WIDE,
    products.Spmm24Config(tile_k=128, in_flight=0),
    products.Spmm24Config(wg_m=2, tile_n=128, split="n", tile_k=128, in_flight=0),
    products.Spmm24Config(tile_n=128, tile_k=256, stages=2, warpgroups=1, in_flight=0),
    products.Spmm24Config(tile_k=128, in_flight=0, cluster="m"),
    products.Spmm24Config(tile_k=128, in_flight=0, cluster="n"),
]
E4M3, E5M2 = jnp.dtype(jnp.float8_e4m3fn), jnp.dtype(jnp.float8_e5m2)


def shape(*sizes, dtype=E4M3):
    return jax.ShapeDtypeStruct(sizes, dtype)


def operands(m, n, k, a=E4M3, b=E4M3):
    metadata = shape(m // 64, k // 64, 128, dtype=jnp.int32)
    return shape(m, k // 2, dtype=a), metadata, shape(n, k, dtype=b)


def lower(function, *args):
    with assume_capability((9, 0)):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_spmm24_fp8_lowers_for_cuda(config):
    call = functools.partial(products.spmm24_fp8, config=config, out_layout="nm")
    scales = shape(512, dtype=jnp.float32), shape(520, dtype=jnp.float32)

    def scaled(values, metadata, b, a_scale, b_scale):
        return call(values, metadata, b, a_scale=a_scale, b_scale=b_scale)

    text = lower(scaled, *operands(512, 520, 192), *scales)
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("a", [E4M3, E5M2])
@pytest.mark.parametrize("b", [E4M3, E5M2])
def test_instruction_of_every_pair_of_types(a, b):
    call = functools.partial(products.spmm24_fp8, config=CONFIGS[1])
    text = lower(call, *operands(128, 256, 128, a, b))
    names = {E4M3: "e4m3", E5M2: "e5m2"}
    found = re.search(r"wgmma\.mma_async\.sp\.sync\.aligned\.m64n256k64\.f32\.(\w+)\.(\w+)", text)
    # Compressed in some versions of JAX; where it can be read, it must be the right one.
    if found is not None:
        assert found.groups() == (names[a], names[b])


@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("epilogue", [None, "relu2"])
def test_spmm24_fp8_lowers_with_every_epilogue(out_dtype, epilogue):
    for a_scale, b_scale in ((1.0, 2.0), (jnp.ones(64), 2.0), (None, jnp.ones(8))):
        options = {"a_scale": a_scale, "b_scale": b_scale, "epilogue": epilogue}
        call = functools.partial(products.spmm24_fp8, **options, out_dtype=jnp.dtype(out_dtype))
        assert "mosaic_gpu" in lower(call, *operands(64, 8, 64))


@pytest.mark.parametrize("scaled", [None, (), "row"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("x", "out"), [(jnp.float32, E4M3), (jnp.bfloat16, E5M2)])
def test_pack24_fp8_lowers_for_cuda(x, out, axis, scaled):
    call = functools.partial(packing.pack24_fp8, axis=axis, mode="soft_threshold", dtype=out)
    sizes = (128, 192)
    scale = None if scaled is None else jnp.ones(sizes[1 - axis] if scaled else (), jnp.float32)
    text = lower(lambda x: call(x, scale=scale), shape(*sizes, dtype=jnp.dtype(x)))
    assert "mosaic_gpu" in text


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_counting_is_that_of_the_reference(dtype):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(4096) * 2.0 ** rng.integers(0, 20, 4096)).astype(np.float32)
    edges = [464.0, 464.0001, 61439.99, 61440.0, np.inf, -np.inf, np.nan, -np.nan, 0.0, 3e38]
    x[: len(edges)] = edges
    low, high = jnp.asarray(x[::2]), jnp.asarray(x[1::2])
    counts = np.asarray(packing.count_over(low, high, dtype.name))
    assert counts.max() == 2
    assert counts.sum() == int(reference_fp8.count_saturated(x, dtype))


@given(
    m=st.integers(1, 300).map(lambda i: 64 * i),
    n=st.integers(1, 3000).map(lambda i: 8 * i),
    k=st.integers(1, 300).map(lambda i: 64 * i),
    out_itemsize=st.sampled_from([2, 4]),
)
def test_heuristic_configurations_are_valid(m, n, k, out_itemsize):
    config = heuristic(m, n, k, out_itemsize, itemsize=1)
    assert config.problem(out_itemsize, itemsize=1) is None
    assert config.in_flight == 0


def test_tuned_configurations_are_valid():
    for file in tables.FOLDER.glob("hopper_*.json"):
        for fields in json.loads(file.read_text())["entries"].get("spmm24_fp8", {}).values():
            assert products.Spmm24Config(**fields).problem(2, itemsize=1) is None, fields


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_stage_has_the_bytes_that_are_announced(config):
    """`stage_bytes` is what the barrier waits for; a wrong number hangs the kernel."""
    p = Problem(
        512, 512, 256, "e4m3", "nk", "mn", jnp.bfloat16, False, False, 132, config, b_dtype="e5m2"
    )
    a = config.block_m * config.tile_k // 2
    b = p.b_panel[0] * p.b_panel[1] * p.b_panel[2]
    metadata = config.block_m // 64 * (config.tile_k // 64) * 128 * 4
    assert p.stage_bytes == a + b + metadata
    assert (p.b_panel[2], p.a_swizzle, p.mma_k) == (128, config.tile_k // 2, 64)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 60}, "n=60"),
        ({"out_dtype": jnp.int8}, "int8"),
        ({"config": products.Spmm24Config(tile_k=64, in_flight=0)}, "tile_k=64"),
        ({"config": products.Spmm24Config(tile_k=128, in_flight=1)}, "in_flight=1"),
        ({"config": products.Spmm24Config(tile_k=128, in_flight=0, stages=9)}, "smem_bytes"),
    ],
)
def test_spmm24_fp8_refuses_what_it_does_not_serve(options, named):
    n = options.get("n", 64)
    options = {key: value for key, value in options.items() if key != "n"}
    with (
        assume_capability((9, 0)),
        pytest.raises(NotImplementedError, match=re.escape(named)),
    ):
        products.check_spmm24_fp8(*operands(64, n, 64), **options)


def test_registry_serves_8_bit_floats():
    for capability, backend in (((9, 0), "hopper"), ((8, 0), "reference"), ((10, 0), "reference")):
        with assume_capability(capability):
            if backend == "reference":
                with pytest.warns(UserWarning, match="no op='spmm24_fp8'"):
                    assert select("spmm24_fp8", *operands(64, 64 + capability[0] * 8, 64))[0]
            else:
                assert select("spmm24_fp8", *operands(64, 64, 64))[0] == backend
            with pytest.raises(NotImplementedError):
                select("spmm24_fp8", *operands(64, 64, 64), backend="triton")
