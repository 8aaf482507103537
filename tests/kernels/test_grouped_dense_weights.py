"""Products of tokens with weights that are not 2:4: layouts, the interpreter, lowering."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference, reference_grouped, registry
from kernels.hopper import grouped24 as hopper
from kernels.registry import assume_capability
from kernels.triton import grouped24 as triton
from kernels.triton.spmm24 import Spmm24Config
from sparsejax.ops import routed_ffn_grouped
from tests.kernels.test_triton import an_h100

BACKENDS = {"hopper": (hopper, (9, 0), 128), "triton": (triton, (8, 0), 64)}
# The smallest tile: the interpreter unrolls it.
CONFIG = Spmm24Config(warps_m=1, warps_n=2, frags_m=4, frags_n=4, block_k=32, stages=3, group_m=4)


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def layout(counts, v):
    blocks = -(-np.asarray(counts) // v)
    offsets = np.concatenate([[0], np.cumsum(blocks)]) * v
    numbers = [*np.repeat(np.arange(len(counts)), blocks), len(counts) - 1]
    return jnp.asarray(offsets, jnp.int32), jnp.asarray(numbers, jnp.int32)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packing_puts_rows_in_the_kernels_order(backend):
    functions, capability, neurons = BACKENDS[backend]
    w = np.asarray(draw(0, 4 * 2 * neurons, 128))
    if backend == "hopper":  # Those of 16 bits take no kernel.
        w = w.astype(jnp.bfloat16)
    with assume_capability(capability):
        values, metadata, dense = functions.pack_weight24(
            w, num_experts=2, m=8, scale=None, threshold=False
        )
    assert metadata is None
    np.testing.assert_array_equal(dense, reference_grouped.expert_major(w, 2).astype(jnp.bfloat16))
    live = dense.shape[1]
    order = functions.row_order(live)
    np.testing.assert_array_equal(values.reshape(dense.shape), dense[:, order])


@pytest.mark.core
@pytest.mark.parametrize("shared_every", [0, 4])
@pytest.mark.parametrize("scale", [None, 1.5])
def test_hoppers_kernel_lowers_for_cuda(shared_every, scale):
    pack = lambda w: hopper.pack_weight24(
        w, num_experts=4, m=16, scale=scale, threshold=False, shared_every=shared_every
    )
    with assume_capability((9, 0)):
        traced = jax.jit(pack).trace(jax.ShapeDtypeStruct((2048, 192), jnp.float32))
        assert "pack_weight24_hopper" in traced.lower(lowering_platforms=("cuda",)).as_text()
        stacked = jax.ShapeDtypeStruct((2, 2048, 192), jnp.float32)
        kernels = routed_ffn_grouped.batchable(pack, "hopper")
        jax.jit(jax.vmap(kernels)).trace(stacked).lower(lowering_platforms=("cuda",))
    values, metadata, dense = traced.out_info
    assert metadata is None
    assert values.shape == (2048, 192)
    assert dense.shape == ((2048, 192) if shared_every else (4, 512, 192))


@pytest.mark.gpu
@pytest.mark.parametrize("shared_every", [0, 4])
@pytest.mark.parametrize("scale", [None, 1.5])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_hoppers_kernel_is_the_definition_on_a_gpu(shared_every, scale, dtype):
    if "hopper" not in registry.available_backends():
        pytest.skip("needs Hopper")
    w = draw(0, 6144, 320)
    options = {"num_experts": 4, "scale": scale, "dtype": dtype, "shared_every": shared_every}
    found = hopper.pack_weight24(w, m=16, threshold=False, **options)
    expected = reference_grouped.pack_whole(w, hopper.row_order, **options)
    assert found[1] is None
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_array_equal(found[2], expected[2])


@pytest.mark.parametrize(
    ("experts", "shards"),
    [
        pytest.param(2, 1, marks=pytest.mark.processes),
        pytest.param(2, 2, marks=pytest.mark.core),
    ],
)
def test_triton_in_the_interpreter(experts, shards):
    live, width, v = 128, 128, 64
    weights = [draw(s, experts * live, width) * width**-0.5 for s in range(shards)]
    options = {"num_experts": experts, "m": 4 * experts, "scale": None, "threshold": False}
    packed = [triton.pack_weight24(w, **options, interpret=True) for w in weights]
    values = jnp.concatenate([p[0] for p in packed])
    plain = jnp.concatenate([p[2].reshape(-1, width) for p in packed])
    places = layout([70, 0, 50, 130][: experts**shards], v)
    rows = places[1].shape[0] * v
    x, dy = (draw(s, rows, width).astype(jnp.bfloat16) for s in (7, 8))
    how = {"shards": shards}
    kernel = how | {"config": CONFIG, "interpret": True}
    found = triton.up24(values, None, x, *places, **kernel)
    expected = reference_grouped.up24(plain, None, x, *places, **how)
    assert np.array_equal(reference.unpack24(*found[1:]), found[0])
    close = lambda a, b: np.testing.assert_allclose(
        np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=2e-2, atol=2e-2
    )
    close(found[0], expected[0])
    linear = triton.up24_linear(values, None, x, *places, **kernel)
    close(linear, reference_grouped.up24_linear(plain, None, x, *places, **how))
    saved = found[0], found[2]
    dy1, dy1_values = triton.up24_backward(values, None, dy, *saved, *places, **kernel)
    close(dy1, reference_grouped.up24_backward(plain, None, dy, *saved, *places, **how)[0])
    assert np.array_equal(reference.unpack24(dy1_values, found[2]), dy1)


@pytest.mark.core
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lowers_for_cuda(backend, dtype):
    functions, capability, _ = BACKENDS[backend]
    array = lambda *shape, dtype=dtype: jax.ShapeDtypeStruct(shape, dtype)
    experts, live, width, v, rows = 4, 896, 192, 128, 2048
    places = array(experts + 1, dtype=jnp.int32), array(rows // v, dtype=jnp.int32)
    w, x, y = array(experts * live, width), array(rows, width), array(rows, live)
    kept = array(rows // 64, live // 64, 128, dtype=jnp.int32)
    for name, rest in (
        ("up24", (x, *places)),
        ("up24_linear", (x, *places)),
        ("up24_backward", (x, y, kept, *places)),
    ):
        product = lambda w, *a, name=name: getattr(functions, name)(w, None, *a)
        with assume_capability(capability), an_h100():
            traced = jax.jit(product).trace(w, *rest)
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
        assert "mosaic_gpu" in text or "triton" in text
        shapes = [o.shape for o in jax.tree.leaves(traced.out_info)]
        assert shapes[0] == (rows, live)


def test_shapes_that_do_not_fit():
    places, x = layout([64], 64), draw(0, 128, 64)
    with pytest.raises(ValueError, match=r"x.shape=\(128, 64\) must be \(rows, 32\)"):
        reference_grouped.up24(draw(1, 64, 32), None, x, *places)
    with pytest.raises(ValueError, match=r"values.shape=\(64,\) must be \(rows, width\)"):
        reference_grouped.up24(draw(1, 64), None, x, *places)
