"""The Hopper kernels without a GPU: lowering, tile schedule, packing arithmetic, refusals."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference
from kernels.hopper import device
from kernels.hopper import pack24 as packing
from kernels.hopper import spmm24 as products
from kernels.hopper.spmm24_config import choose_config, heuristic
from kernels.hopper.spmm24_problem import Problem
from kernels.registry import assume_capability
from kernels.tuning import tables
from tests.kernels import oracle

# What these kernels need of JAX is private or experimental: every version must lower them.
pytestmark = pytest.mark.core

CONFIGS = [
    products.Spmm24Config(),
    products.Spmm24Config(wg_m=2, tile_n=192, epi_n=192, out_slots=1, order="n"),
    products.Spmm24Config(wg_m=2, tile_n=128, split="n", in_flight=0),
    products.Spmm24Config(tile_n=128, tile_k=128, stages=3, warpgroups=1),
    products.Spmm24Config(cluster="m"),
    products.Spmm24Config(wg_m=2, tile_n=128, cluster="n"),
    products.Spmm24Config(warpgroups=3, tile_n=192),
]


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def operands(m, n, k, b_layout, dtype=jnp.bfloat16):
    b = (n, k) if b_layout == "nk" else (k, n)
    metadata = shape(m // 64, k // 64, 128, dtype=jnp.int32)
    return shape(m, k // 2, dtype=dtype), metadata, shape(*b, dtype=dtype)


def lower(function, *args):
    with assume_capability((9, 0)):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def lower_spmm24(m, n, k, b_layout, out_layout, dtype=jnp.bfloat16, **options):
    call = functools.partial(products.spmm24, b_layout=b_layout, out_layout=out_layout, **options)
    return lower(call, *operands(m, n, k, b_layout, dtype))


def tuned_tables():
    for file in sorted(tables.FOLDER.glob("hopper_*.json")):
        yield json.loads(file.read_text())


def tuned_spmm24():
    """Every distinct tuned configuration and orientation, with one of its problems."""
    found = {}
    for table in tuned_tables():
        for key, fields in table["entries"].get("spmm24", {}).items():
            pattern = r"m(\d+)-n(\d+)-k(\d+)-b(nk|kn)-out(mn|nm)"
            [(m, n, k, b_layout, out_layout)] = re.findall(pattern, key)
            found[json.dumps(fields), b_layout, out_layout] = (int(m), int(n), int(k), fields)
    return [(*sizes, b, out, fields) for (_, b, out), (*sizes, fields) in found.items()]


@pytest.mark.core
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(("b_layout", "out_layout"), [("nk", "mn"), ("kn", "nm")])
def test_spmm24_lowers_for_cuda(config, b_layout, out_layout):
    assert "mosaic_gpu" in lower_spmm24(512, 520, 192, b_layout, out_layout, config=config)


@pytest.mark.core
@pytest.mark.parametrize("out_dtype", ["bfloat16", "float16", "float32"])
def test_spmm24_lowers_with_every_epilogue(out_dtype):
    scale = jnp.float32(0.5)
    for epilogue in (None, "relu2"):
        options = {"scale": scale, "epilogue": epilogue, "out_dtype": jnp.dtype(out_dtype)}
        lower_spmm24(64, 8, 64, "nk", "nm", jnp.float16, **options)
        lower_spmm24(8192, 8192, 128, "kn", "mn", **options)


@pytest.mark.core
@pytest.mark.parametrize("case", tuned_spmm24(), ids=str)
def test_tuned_spmm24_lowers_for_cuda(case):
    m, n, k, b_layout, out_layout, fields = case
    config = products.Spmm24Config(**fields)
    lower_spmm24(m, n, k, b_layout, out_layout, config=config)


@pytest.mark.core
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("mode", packing.MODES)
def test_pack24_lowers_for_cuda(dtype, axis, mode):
    for k_first in (True, False):
        config = packing.Pack24Config(k_first=k_first)
        call = functools.partial(packing.pack24, axis=axis, mode=mode, config=config)
        x = shape(128, 192, dtype=jnp.dtype(dtype))
        assert "mosaic_gpu" in lower(call, x)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from(packing.MODES),
    st.sampled_from([None, 0.7]),
    st.sampled_from(["float32", "bfloat16", "float16"]),
)
def test_pack_group_matches_the_oracle(seed, mode, scale, dtype):
    rng = np.random.default_rng(seed)
    # Few distinct values, so that ties are common; a few groups of special ones.
    x = rng.integers(-3, 4, (64, 4)).astype(np.float32) * rng.choice([1.0, 0.3], (64, 1))
    if mode != "soft_threshold":
        largest = float(jnp.finfo(dtype).max)
        # XLA's CPU arithmetic flushes subnormals; only their selection is what is tested.
        tiny = float(jnp.finfo(dtype).smallest_subnormal) if scale is None else 0.0
        special = [0.0, -0.0, np.nan, -np.nan, np.inf, -np.inf, largest, -largest, tiny, -tiny]
        x[:16] = rng.choice(special, (16, 4))
    x = np.asarray(jnp.asarray(x, dtype), np.float32)
    factor = None if scale is None else jnp.float32(scale)
    low, high, nibbles = packing.pack_group(list(jnp.asarray(x.T)), mode, factor)
    pruned, indices = oracle.prune(x, mode)
    expected_nibbles = indices[:, 0, 0] | (indices[:, 0, 1] << 2)
    np.testing.assert_array_equal(np.asarray(nibbles), expected_nibbles)
    kept = np.take_along_axis(pruned, indices[:, 0], axis=1)
    if scale is not None:
        kept = kept * np.float32(scale)
    np.testing.assert_array_equal(np.stack([low, high], axis=1), kept)


@given(
    m=st.integers(1, 40).map(lambda i: 64 * i),
    n=st.integers(1, 200).map(lambda i: 8 * i),
    cores=st.integers(2, 150),
    config=st.sampled_from(CONFIGS),
    order=st.sampled_from("mn"),
    width=st.integers(1, 9),
    linked=st.booleans(),
)
def test_tiles_cover_the_output_once(m, n, cores, config, order, width, linked):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kernels.hopper.device.linked", lambda: linked)
        cover_the_output_once(m, n, cores, config, order, width)


def cover_the_output_once(m, n, cores, config, order, width):
    config = dataclasses.replace(config, order=order, width=width)
    p = Problem(m, n, 64, "bf16", "nk", "mn", jnp.bfloat16, False, False, cores, config)
    linear = np.arange(p.tiles, dtype=np.int32)
    # As in the kernel, block b takes tiles b, b + blocks, ...: together every tile once.
    taken = np.concatenate([linear[b :: p.blocks] for b in range(p.blocks)])
    assert sorted(taken) == list(linear)
    covered = np.zeros((m // 64 + 8, n // 8 + 64), int)
    # One shape for all, so that JAX compiles once.
    padded = jnp.arange(1024, dtype=jnp.int32)
    assert p.tiles <= padded.size
    origin = jax.vmap(lambda t, rank: products.tile_origin(p, t, rank), in_axes=(0, None))
    for rank in range(config.cluster_size):
        origins = (np.asarray(o)[: p.tiles] for o in origin(padded, rank))
        for m0, n0 in zip(*origins, strict=True):
            rows = slice(m0 // 64, (m0 + config.block_m) // 64)
            covered[rows, n0 // 8 : (n0 + config.block_n) // 8] += 1
    assert (covered[: m // 64, : n // 8] == 1).all()


@given(
    m=st.integers(1, 300).map(lambda i: 64 * i),
    n=st.integers(1, 3000).map(lambda i: 8 * i),
    k=st.integers(1, 300).map(lambda i: 64 * i),
    itemsize=st.sampled_from([2, 4]),
)
def test_heuristic_configurations_are_valid(m, n, k, itemsize):
    assert heuristic(m, n, k, itemsize).problem(itemsize) is None


def test_heuristic_takes_small_tiles_for_small_products():
    large, small = heuristic(8192, 16384, 2048, 2), heuristic(512, 512, 2048, 2)
    assert large.block_m * large.block_n > small.block_m * small.block_n


def test_tuned_entry_is_chosen(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr("kernels.hopper.device.kind", lambda: "NVIDIA Test GPU")
    untuned = choose_config(256, 512, 128, "nk", "mn", jnp.bfloat16)
    key = tables.key(m=256, n=512, k=128, b="nk", out="mn")
    file = tables.save("hopper", "NVIDIA Test GPU", "spmm24", {key: {"width": 3}})
    assert file == tmp_path / "hopper_nvidia_test_gpu.json"
    tuned = choose_config(256, 512, 128, "nk", "mn", jnp.bfloat16)
    assert tuned == products.Spmm24Config(width=3)
    assert tuned != untuned
    assert choose_config(256, 512, 128, "nk", "nm", jnp.bfloat16) == untuned


@pytest.mark.parametrize("itemsize", [1, 2])
def test_tiles_fit_the_registers_that_a_thread_has(tmp_path, monkeypatch, itemsize):
    """Where a kernel is assembled for a linker, no tile needs more than a thread's share."""
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    monkeypatch.setattr("kernels.hopper.device.kind", lambda: "NVIDIA Test GPU")
    wide = {"wg_m": 2, "tile_n": 192, "epi_n": 192, "out_slots": 1}
    key = tables.key(m=8192, n=16384, k=2048, b="nk", out="mn")
    tables.save("hopper", "NVIDIA Test GPU", "spmm24", {key: wide})
    choose = lambda: choose_config(8192, 16384, 2048, "nk", "mn", jnp.bfloat16)
    accumulators = lambda c: c.wg_m * c.tile_n // 2
    monkeypatch.setattr("kernels.hopper.device.linked", lambda: False)
    assert choose() == products.Spmm24Config(**wide)
    assert accumulators(heuristic(8192, 16384, 2048, 2, itemsize)) == 192
    monkeypatch.setattr("kernels.hopper.device.linked", lambda: True)
    assert accumulators(choose()) == 128
    assert accumulators(heuristic(8192, 16384, 2048, 2, itemsize)) == 128
    assert choose().problem(2) is None


@pytest.mark.parametrize(
    ("version", "linked"), [("0.10.2", False), ("0.11.2", False), ("0.12.0", True), ("1.0", True)]
)
def test_which_jaxlib_assembles_for_a_linker(monkeypatch, version, linked):
    monkeypatch.setattr("jaxlib.__version__", version)
    assert device.linked() is linked


def test_save_merges_entries(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "FOLDER", tmp_path)
    tables.save("hopper", "A b", "x", {"p": {"f": 1}})
    tables.save("hopper", "A b", "x", {"q": {"f": 2}})
    tables.save("hopper", "A b", "y", {"p": {"f": 3}})
    assert tables.lookup("hopper", "x", "A b", "p") == {"f": 1}
    assert tables.lookup("hopper", "x", "A b", "q") == {"f": 2}
    assert tables.lookup("hopper", "y", "A b", "p") == {"f": 3}
    assert tables.lookup("hopper", "y", "A b", "q") is None
    assert tables.lookup("triton", "y", "A b", "p") is None


def check_spmm24(m=64, n=64, k=64, b_layout="nk", **options):
    with assume_capability((9, 0)):
        products.check_spmm24(*operands(m, n, k, b_layout), b_layout=b_layout, **options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"b_layout": "xy"}, "b_layout='xy'"),
        ({"out_layout": "xy"}, "out_layout='xy'"),
        ({"epilogue": "gelu"}, "epilogue='gelu'"),
        ({"scale": jnp.ones(3)}, "(3,)"),
    ],
)
def test_spmm24_names_the_wrong_argument(options, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        check_spmm24(**options)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"n": 60}, "n=60"),
        ({"out_dtype": jnp.int8}, "int8"),
        ({"config": products.Spmm24Config(stages=9)}, "smem_bytes"),
        ({"config": products.Spmm24Config(tile_n=96)}, "tile_n=96"),
        ({"config": products.Spmm24Config(wg_m=3, tile_n=192)}, "block_m=384"),
        ({"config": products.Spmm24Config(epi_n=192)}, "epi_n=192"),
    ],
)
def test_spmm24_refuses_what_it_does_not_serve(options, named):
    with pytest.raises(NotImplementedError, match=re.escape(named)):
        check_spmm24(**options)


def test_spmm24_refuses_operands_that_do_not_match():
    a, metadata, b = operands(64, 64, 64, "nk")
    with assume_capability((9, 0)):
        check = functools.partial(products.check_spmm24, b_layout="nk")
        with pytest.raises(ValueError, match=r"b.shape=\(64, 128\)"):
            check(a, metadata, shape(64, 128))
        with pytest.raises(ValueError, match="float16"):
            check(a, metadata, shape(64, 64, dtype=jnp.float16))
        with pytest.raises(ValueError, match=r"metadata\.shape"):
            check(a, shape(1, 2, 128, dtype=jnp.int32), b)


@pytest.mark.parametrize(
    ("options", "error", "named"),
    [
        ({"axis": 2}, ValueError, "axis=2"),
        ({"mode": "best"}, ValueError, "mode='best'"),
        ({"dtype": jnp.float32}, NotImplementedError, "float32"),
        ({"scale": jnp.ones(2)}, ValueError, "(2,)"),
    ],
)
def test_pack24_names_the_wrong_argument(options, error, named):
    options = {"axis": 1, "mode": "magnitude"} | options
    with assume_capability((9, 0)), pytest.raises(error, match=re.escape(named)):
        packing.check_pack24(shape(64, 64), **options)


def test_other_devices_are_refused():
    for capability in ((8, 0), (10, 0)):
        with assume_capability(capability), pytest.raises(NotImplementedError, match="Hopper"):
            products.check_spmm24(*operands(64, 64, 64, "nk"), b_layout="nk")
        with assume_capability(capability), pytest.raises(NotImplementedError, match="Hopper"):
            packing.check_pack24(shape(64, 64), axis=1, mode="value")


def test_reference_agrees_that_padding_is_zeros():
    """The kernel pads x before packing, as the reference pads while packing."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((100, 72)), jnp.float32)
    padded = jnp.pad(x, ((0, 28), (0, 56)))
    for axis in (0, 1):
        pack = functools.partial(reference.pack24, axis=axis, mode="soft_threshold")
        for got, expected in zip(pack(padded), pack(x), strict=True):
            np.testing.assert_array_equal(np.asarray(got), np.asarray(expected))
