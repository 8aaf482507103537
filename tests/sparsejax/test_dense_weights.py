"""Weights that are not 2:4 through the grouped products: routing and 2:4 activations alone."""

import re
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference_grouped, registry
from sparsejax.ops import routed_ffn_fp8, routed_ffn_grouped
from sparsejax.spec import Sparsity
from tests.sparsejax.test_shared_neurons import expected, live, problem, run
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


@pytest.mark.parametrize(("shards", "calls"), [(1, 1), (2, 1)])
def test_lowers_for_a_gpu_on_any_machine(monkeypatch, shards, calls):
    monkeypatch.setattr("kernels.hopper.grouped24.DENSE_WEIGHTS", True)
    sparsity = replace(DENSE, v=128, shared_every=4, shards=shards, backend="hopper")
    arguments = problem(sparsity, 2048 * shards, tokens=1 << 14, dtype=jnp.bfloat16)
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    with registry.assume_capability((9, 0)), jax.sharding.use_abstract_mesh(mesh):
        trace = jax.jit(lambda *a: run(sparsity, *a)).trace(*arguments)
        text = trace.lower(lowering_platforms=("cuda",)).as_text()
    for name, times in (("up24", 1), ("down24", 2), ("up24_backward", 1), ("weight_gradient", 2)):
        assert len(re.findall(rf"call @{name}(?:_\d+)?\(", text)) == calls * times


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("m", "every", "shards"), [(16, 0, 1), (16, 4, 1), (8, 0, 2), (32, 4, 1)], ids=str
)
@pytest.mark.parametrize("backend", ["hopper", "triton"])
def test_on_a_gpu(monkeypatch, backend, m, every, shards):
    if backend not in registry.available_backends():
        pytest.skip(f"{backend} does not run on {jax.devices()[0].device_kind}")
    monkeypatch.setattr(f"kernels.{backend}.grouped24.DENSE_WEIGHTS", True)
    sparsity = replace(DENSE, m=m, v=128, shared_every=every, shards=shards, backend=backend)
    arguments = problem(sparsity, 4096, tokens=1 << 13, dtype=jnp.bfloat16, width=192)
    found = jax.jit(lambda *a: run(sparsity, *a))(*arguments)
    plain = replace(sparsity, backend="reference")
    definition = jax.jit(lambda *a: run(plain, *a))(*arguments)
    for pair in zip(found, definition, strict=True):
        a, b = (np.asarray(v, np.float64) for v in pair)
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)
