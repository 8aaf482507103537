"""A network of several shards in one call of the kernels, and when that is done."""

import re
import warnings
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import registry
from sparsejax import sharding
from sparsejax.ops import routed_ffn_grouped
from sparsejax.spec import Sparsity

D, V = 64, 64


def problem(m: int, shards: int, tokens: int, width: int = D):
    """x, dy, w1, w2, centers, bias; 64 neurons of an expert in a shard."""
    experts = shards * m // 4
    hidden = 64 * experts
    rng = np.random.default_rng(m + shards)
    sizes = (4, tokens // 4, width), (4, tokens // 4, width), (hidden, width), (hidden, width)
    arrays = [rng.normal(size=s) for s in (*sizes, (experts, width), (experts,))]
    arrays[-1] *= 0.05
    return [jnp.asarray(a, jnp.float32) for a in arrays]


def run(sparsity, x, dy, w1, w2, centers, bias, dtype=jnp.float32, gated=False):
    betas, wg = jnp.asarray([1.5, 1.25, 1.0]), w1[::-1] if gated else None
    packed = sharding.pack_ffn(w1, w2, wg, betas, sparsity, dtype=dtype, axes=None)
    f = lambda x, w1, w2, wg: sharding.routed_ffn(
        x, w1, w2, wg, packed, centers, bias, sparsity, axes=None
    )
    y, vjp, counts = jax.vjp(f, x.astype(dtype), w1, w2, wg, has_aux=True)
    return y, counts, *(d for d in vjp(dy.astype(dtype)) if d is not None)


@pytest.fixture
def on_reference(monkeypatch):
    """Kernels that run on a CPU stand in for those of a GPU: the same layouts."""
    monkeypatch.setattr(routed_ffn_grouped, "choose", lambda *args, **kwargs: "reference")
    monkeypatch.setattr(routed_ffn_grouped, "recheck", lambda packed, *args, **kwargs: packed)


@pytest.mark.parametrize(
    ("m", "shards", "tokens", "together", "gated"),
    [
        (8, 2, 1024, 2, False),
        (8, 2, 1024, 2, True),
        (8, 4, 4096, 4, False),
        pytest.param(8, 4, 4096, 4, True, marks=pytest.mark.processes),
        (16, 2, 4096, 2, False),
        pytest.param(16, 2, 4096, 2, True, marks=pytest.mark.processes),
        pytest.param(16, 4, 4096, 2, False, marks=pytest.mark.processes),
        (16, 4, 4096, 2, True),
    ],
)
def test_the_network_is_the_same_together_and_one_by_one(
    on_reference, monkeypatch, m, shards, tokens, together, gated
):
    sparsity, arguments = Sparsity(m=m, v=V, shards=shards), problem(m, shards, tokens)
    layout = sharding._layout(sparsity, None, D, arguments[2].shape[0])
    sizes = routed_ffn_grouped.Sizes(D, 64 * m // 4, jnp.dtype(jnp.float32), tokens)
    assert sharding._together(layout, "reference", sizes, gated=False) == together
    found = jax.jit(lambda *a: run(sparsity, *a, gated=gated))(*arguments)
    monkeypatch.setattr(sharding, "COMBINATIONS", 1)
    assert sharding._together(layout, "reference", sizes, gated=False) == 1
    expected = jax.jit(lambda *a: run(sparsity, *a, gated=gated))(*arguments)
    np.testing.assert_array_equal(found[1], expected[1])
    assert found[1].sum() == shards * tokens
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("changes", "tokens", "together"),
    [
        ({}, 4096, 4),
        ({"shards": 3}, 4096, 3),
        ({"shards": 6}, 4096, 3),  # 64 combinations would be too many
        ({}, 4095, 2),  # padding of 16 combinations more than an eighth
        ({}, 1000, 1),
        ({"m": 128, "shards": 2}, 1 << 20, 1),
        ({"routing": False}, 4096, 1),
        ({"weight_gradient": "tokens24"}, 4096, 1),
    ],
)
def test_how_many_shards_go_together(on_reference, changes, tokens, together):
    sparsity = replace(Sparsity(m=8, v=V, shards=4), **changes)
    hidden = 64 * sparsity.num_experts
    layout = sharding._layout(sparsity, None, D, hidden * sparsity.num_shards)
    sizes = routed_ffn_grouped.Sizes(D, hidden, jnp.dtype(jnp.bfloat16), tokens)
    assert sharding._together(layout, "reference", sizes, gated=False) == together


def test_a_backend_that_takes_one_shard_gets_one(on_reference, monkeypatch):
    sparsity = Sparsity(m=8, v=V, shards=4)
    layout = sharding._layout(sparsity, None, D, 512)
    sizes = routed_ffn_grouped.Sizes(D, 128, jnp.dtype(jnp.bfloat16), 4096)
    reference = routed_ffn_grouped.module("reference")
    names = [n for n in dir(reference) if n.startswith("check_")]
    one = SimpleNamespace(NEURONS=64, SHARDS=False, **{n: getattr(reference, n) for n in names})
    monkeypatch.setattr(routed_ffn_grouped, "module", lambda _: one)
    assert sharding._together(layout, "triton", sizes, gated=False) == 1


@pytest.mark.parametrize(("at_once", "calls"), [(True, 1), (False, 4)])
def test_lowers_for_a_gpu_on_any_machine(monkeypatch, at_once, calls):
    monkeypatch.setattr("kernels.hopper.grouped24.SHARDS", at_once)
    sparsity = Sparsity(m=8, v=128, shards=4, backend="hopper")
    arguments = problem(8, 4, 8192)
    arguments[2:4] = [jnp.concatenate([w, w]) for w in arguments[2:4]]
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    with registry.assume_capability((9, 0)), jax.sharding.use_abstract_mesh(mesh):
        trace = jax.jit(lambda *a: run(sparsity, *a, dtype=jnp.bfloat16)).trace(*arguments)
        text = trace.lower(lowering_platforms=("cuda",)).as_text()
    for name, times in (("up24", 1), ("down24", 2), ("up24_backward", 1), ("weight_gradient", 2)):
        assert len(re.findall(rf"call @{name}(?:_\d+)?\(", text)) == calls * times


@pytest.mark.gpu
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("m", "shards"), [(8, 4), (16, 2), (16, 4)])
def test_on_a_gpu(monkeypatch, m, shards, gated):
    if "hopper" not in registry.available_backends():
        pytest.skip(f"hopper does not run on {jax.devices()[0].device_kind}")
    sparsity = Sparsity(m=m, v=128, shards=shards, backend="hopper")
    x, dy, w1, w2, *router = problem(m, shards, 1 << 14, width=256)
    arguments = x, dy, *(jnp.concatenate([w, 0.5 * w]) for w in (w1, w2)), *router
    found = []
    for shards_at_once in (True, False):
        monkeypatch.setattr("kernels.hopper.grouped24.SHARDS", shards_at_once)
        with warnings.catch_warnings():
            warnings.simplefilter("error", registry.FallbackWarning)
            step = jax.jit(lambda *a: run(sparsity, *a, dtype=jnp.bfloat16, gated=gated))
            found.append(step(*arguments))
    np.testing.assert_array_equal(found[0][1], found[1][1])
    for a, b in zip(*found, strict=True):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        # Shards one by one are each rounded before they are added.
        assert np.linalg.norm(a - b) < 6e-3 * np.linalg.norm(b)
