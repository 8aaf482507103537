"""Mixtures of experts on a Hopper GPU: kernels against jax.numpy, dense and sparse."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from kernels.registry import target_capability
from sparsejax.nn import MoEFFN
from sparsejax.ops.grouped_dot import grouped_dot
from sparsejax.spec import Sparsity

pytestmark = pytest.mark.gpu

D, H, E, T = 512, 4096, 8, 2048


@pytest.fixture(autouse=True)
def hopper():
    if target_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")


def relative_error(got, expected):
    got, expected = got.astype(jnp.float32), expected.astype(jnp.float32)
    return float(jnp.linalg.norm(got - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("sizes", [[300, 0, 1000, 1, 7, 540, 128, 72], [0, 2048, 0, 0, 0, 0, 0, 0]])
def test_grouped_dot_and_its_gradients(sizes):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (T, D), jnp.bfloat16)
    w = jax.random.normal(keys[1], (E, D, 640), jnp.bfloat16)
    dy = jax.random.normal(keys[2], (T, 640), jnp.bfloat16)
    counts = jnp.asarray(sizes, jnp.int32)

    def products(backend):
        y, vjp = jax.vjp(lambda x, w: grouped_dot(x, w, counts, backend=backend), x, w)
        return y, *vjp(dy)

    found, expected = (jax.jit(lambda b=b: products(b))() for b in ("pallas", "xla"))
    for got, reference in zip(found, expected, strict=True):
        assert relative_error(got, reference) < 1e-2


def gradients(backend, clusters):
    sparsity = Sparsity(m=4 * E * clusters, v=128, backend=backend)
    module = MoEFFN(D, H, num_experts=E, sparsity=sparsity, rngs=nnx.Rngs(params=0))
    module.apply_update(module.begin_sparse())
    graph, params, rest = nnx.split(module, nnx.Param, ...)
    packed = jax.jit(lambda: nnx.merge(graph, params, rest).pack())()
    x = jax.random.normal(jax.random.key(1), (T, D), jnp.bfloat16)
    dy = jax.random.normal(jax.random.key(2), (T, D), jnp.bfloat16)

    @jax.jit
    def run(params, x, packed):
        apply = lambda params, x: nnx.merge(graph, params, rest)(x, packed)[0]
        y, vjp = jax.vjp(apply, params, x)
        return y, *vjp(dy)

    return jax.tree.leaves(run(params, x, packed))


@pytest.mark.parametrize("clusters", [1, 2])
def test_sparse_experts_equal_the_reference(clusters):
    """Two clusters of 256 neurons in each of eight experts are M = 64."""
    found = (gradients(backend, clusters) for backend in ("hopper", "reference"))
    for got, expected in zip(*found, strict=True):
        assert relative_error(got, expected) < 2e-2
