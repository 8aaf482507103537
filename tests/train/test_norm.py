"""The model's norms: by kernels or by XLA the same function, and what waits for the backward."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.remat import products
from tests.train.test_step import CONFIG, Rig, batch
from train.norm import RMSNorm


def gradients(by, dtype, function):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 5, 24)) * 3, dtype)
    g = jnp.asarray(rng.normal(size=(2, 2, 5, 24)), jnp.float32)
    norm = RMSNorm(24, 1e-5, by)
    norm.scale[...] = jnp.asarray(rng.uniform(0.5, 2, 24), jnp.float32)
    graph, params = nnx.split(norm)

    def loss(params, x):
        return sum(
            jnp.sum(out * g_)
            for out, g_ in zip(function(nnx.merge(graph, params), x), g, strict=False)
        )

    return jax.value_and_grad(loss, argnums=(0, 1))(params, x)


@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-5), ("bfloat16", 3e-2)])
@pytest.mark.parametrize(
    "function", [lambda norm, x: (norm(x),), lambda norm, x: norm.with_input(x)]
)
def test_kernels_and_xla_give_the_same_gradients(dtype, rtol, function):
    kernel, xla = (gradients(by, dtype, function) for by in ("kernel", "xla"))
    chex.assert_trees_all_equal_shapes_and_dtypes(kernel, xla)
    chex.assert_trees_all_close(kernel, xla, rtol=rtol, atol=rtol)


def test_the_input_is_not_kept():
    """The result and a number a row are, with and without rematerialisation."""
    norm, x = RMSNorm(8, 1e-5, "kernel"), jnp.ones((1, 16, 8))
    for function in (norm, jax.checkpoint(norm, policy=products)):
        _, vjp = jax.vjp(lambda x, function=function: function(x * 2) * 3, x)
        rows = [leaf.shape for leaf in jax.tree.leaves(vjp) if 16 in leaf.shape]
        assert sorted(rows) == [(1, 16, 8), (16,)]


def test_a_step_is_the_same():
    results = []
    for norm in ("kernel", "xla"):
        rig = Rig(model=dataclasses.replace(CONFIG.model, norm=norm, remat="dots"))
        state, metrics = rig.step("dense")(rig.state, batch())
        results.append((metrics["loss"], metrics["grad_norm"], state.opt_state[0].mu))
    chex.assert_trees_all_close(*results, rtol=1e-4, atol=1e-6)
