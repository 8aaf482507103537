"""Weights that are not 2:4 through the grouped products: routing and 2:4 activations alone."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference_grouped, registry
from sparsejax.ops import pack_ffn, routed_ffn_fp8, routed_ffn_grouped
from sparsejax.spec import Sparsity
from tests.sparsejax.test_shared_neurons import (
    agrees_with_the_definition,
    expected,
    kernels_called,
    live,
    problem,
    run,
)
from tests.train.simulated import run_script

DENSE = Sparsity(m=16, v=64, weights=False)


@pytest.mark.parametrize("changes", [{}, {"shards": 2}, {"shared_every": 4}, {"m": 4}], ids=str)
def test_network_is_the_masked_one(changes):
    sparsity = replace(DENSE, backend="reference", **changes)
    hidden = 64 * sparsity.block * sparsity.num_shards // 4
    x, dy, w1, w2, centers, bias = problem(sparsity, hidden)
    packed = routed_ffn_grouped.pack_weight(w1, None, DENSE, dtype=x.dtype, kernels="reference")
    assert packed[0].shape == w1.shape
    assert packed[1] is None
    found = run(sparsity, x, dy, w1, w2, centers, bias)
    mask = live(x, centers, sparsity, hidden)
    for a, b in zip(found, expected(x, dy, w1, w2, mask, sparsity), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("weights", [True, False])
def test_packing_is_not_differentiated(weights):
    """Kernels that pack have no derivative, so no other way of packing has one."""

    def total(w, backend):
        sparsity = replace(DENSE, v=128, weights=weights, backend=backend)
        return jnp.sum(pack_ffn(w, w, None, jnp.ones(3), sparsity).w1.dense.astype(jnp.float32))

    w = jnp.asarray(np.random.default_rng(0).standard_normal((2048, 128)), jnp.float32)
    assert total(w, "reference") != 0
    assert not jax.grad(total)(w, "reference").any()
    with registry.assume_capability((9, 0)):
        jaxpr = jax.make_jaxpr(jax.grad(lambda w: total(w, "hopper")))(w)
    assert jaxpr.out_avals[0].shape == w.shape


def test_a_backend_without_them_refuses(monkeypatch):
    names = [n for n in dir(reference_grouped) if n.startswith("check_")]
    without = SimpleNamespace(NEURONS=64, SHARDS=True, DENSE_WEIGHTS=False)
    without.__dict__.update({n: getattr(reference_grouped, n) for n in names})
    sizes = routed_ffn_grouped.Sizes(64, 1024, jnp.dtype(jnp.bfloat16), 4096)
    routed_ffn_grouped.check("reference", DENSE, sizes, gated=False)
    with pytest.raises(NotImplementedError, match="weights=False in 8 bits"):
        routed_ffn_fp8.check("reference", DENSE, sizes, gated=False)
    monkeypatch.setattr(routed_ffn_grouped, "module", lambda _: without)
    with pytest.raises(NotImplementedError, match="does not serve weights=False"):
        routed_ffn_grouped.check("reference", DENSE, sizes, gated=False)


ON_A_MESH = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType
    from dataclasses import replace
    from sparsejax.sharding import MeshAxes
    from tests.sparsejax.test_dense_weights import DENSE, problem, run

    for gather in ("packed", "rows"):
        sparsity = replace(DENSE, backend="reference", gather=gather)
        arguments = problem(sparsity, 256, width=128)
        alone = run(sparsity, *arguments)
        mesh = jax.make_mesh((1, 2, 1), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            found = jax.jit(lambda *a: run(sparsity, *a, axes=MeshAxes()))(*arguments)
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max()))
        print(gather)
"""


def test_a_mesh_computes_the_same():
    assert run_script(ON_A_MESH, devices=2).split() == ["packed", "rows"]


@pytest.mark.parametrize("shards", [1, 2])
def test_lowers_for_a_gpu_on_any_machine(shards):
    sparsity = replace(DENSE, v=128, shared_every=4, shards=shards, backend="hopper")
    assert kernels_called(sparsity, 2048 * shards) == [1, 2, 1, 2]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "every", "shards"), [(16, 0, 1), (16, 4, 1), (8, 0, 2), (32, 4, 1)], ids=str
)
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_on_a_gpu(backend, m, every, shards):
    sparsity = replace(DENSE, m=m, v=128, shared_every=every, shards=shards, backend=backend)
    agrees_with_the_definition(sparsity, 192)
