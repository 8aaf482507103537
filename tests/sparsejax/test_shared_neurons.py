"""Neurons that every token meets, beside neurons that are routed."""

import re
from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import registry
from sparsejax import ops, sharding
from sparsejax.nn import RoutedFFN
from sparsejax.ops import routed_ffn_grouped
from sparsejax.prune import select24, soft_threshold
from sparsejax.routing import (
    assign_tokens,
    plan_tokens,
    repeat_shared,
    routed_neurons,
    sum_shared,
    to_expert_major,
)
from sparsejax.spec import Sparsity
from tests.train.simulated import run_script

D, V = 64, 16


# Everything is compiled for each size that is drawn.
@settings(max_examples=10)
@given(m=st.sampled_from([8, 16, 32]), every=st.integers(2, 5), blocks=st.integers(1, 3))
def test_every_expert_has_all_shared_neurons_and_its_own(m, every, blocks):
    sparsity, hidden = Sparsity(m=m, shared_every=every), m * every * blocks
    neuron = jnp.arange(hidden, dtype=jnp.int32)
    rows = repeat_shared(neuron[:, None], 0, sparsity)
    assert len(rows) == sparsity.rows_of_experts(hidden)
    experts = np.asarray(to_expert_major(rows, 0, m // 4))[..., 0]
    assert experts.shape == (m // 4, sparsity.live_neurons(hidden))
    routed = routed_neurons(hidden, sparsity)
    shared = np.setdiff1d(neuron, routed)
    assert len(shared) == sparsity.shared_neurons(hidden) == m * blocks
    for e, own in enumerate(experts):
        # Clusters interleave what is routed, as if nothing else were there.
        place = np.flatnonzero(np.arange(len(routed)) % m // 4 == e)
        np.testing.assert_array_equal(np.sort(own), np.union1d(routed[place], shared))
        # Groups of four are neighbours, as without shared neurons.
        np.testing.assert_array_equal(
            own.reshape(-1, 4) - own[::4, None], [[0, 1, 2, 3]] * (len(own) // 4)
        )


@settings(max_examples=10)
@given(m=st.sampled_from([8, 16]), every=st.integers(2, 4), seed=st.integers(0, 99))
def test_sum_is_the_transpose_of_repeat(m, every, seed):
    sparsity, hidden = Sparsity(m=m, shared_every=every), m * every * 2
    key, other = jax.random.split(jax.random.key(seed))
    w = jax.random.normal(key, (hidden, 3))
    rows, transpose = jax.vjp(lambda w: repeat_shared(w, 0, sparsity), w)
    g = jax.random.normal(other, rows.shape)
    np.testing.assert_allclose(sum_shared(g, sparsity), transpose(g)[0], rtol=1e-5, atol=1e-6)


def test_nothing_is_repeated_where_nothing_is_shared():
    w = jnp.ones((64, 8))
    for sparsity in (
        Sparsity(),
        Sparsity(m=4, shared_every=4),
        Sparsity(routing=False, shared_every=4),
    ):
        assert not sparsity.shares
        assert repeat_shared(w, 0, sparsity) is w
        assert sum_shared(w, sparsity) is w
        assert sparsity.rows_of_experts(64) == 64


def test_sizes():
    sparsity = Sparsity(m=16, shared_every=4)
    assert sparsity.live_neurons(8192) == 2048 + 6144 // 4
    assert sparsity.density == pytest.approx((1 / 4 + 3 / 16) / 2)
    assert replace(sparsity, activations=False).density == pytest.approx(1 / 4 + 3 / 16)


@pytest.mark.parametrize(
    ("changes", "hidden", "message"),
    [
        ({"shared_every": 1}, 64, r"shared_every=1 must be 0 .* or at least 2"),
        ({"shared_every": -2}, 64, "shared_every=-2 must be"),
        (
            {"shared_every": 4},
            96,
            "hidden=96 must be a positive multiple of m=16 times shared_every=4",
        ),
        ({"shared_every": 2, "shards": 2}, 96, "m=16 times shared_every=2 times shards=2"),
    ],
)
def test_refused(changes, hidden, message):
    with pytest.raises(ValueError, match=message):
        Sparsity(**changes).validate(width=D, hidden=hidden)


def test_a_mixture_shares_no_neurons():
    with pytest.raises(ValueError, match="shared_every=4"):
        Sparsity(m=16, shared_every=4).validate_experts(hidden=1024, num_experts=4)


def problem(sparsity, hidden, tokens=256, dtype=jnp.float32, width=D):
    keys = jax.random.split(jax.random.key(hidden + sparsity.m), 5)
    shape = (sparsity.num_shards * sparsity.num_experts, width)
    x, dy = (jax.random.normal(k, (4, tokens // 4, width), dtype) for k in keys[:2])
    w1, w2 = (jax.random.normal(k, (hidden, width)) * width**-0.5 for k in keys[2:4])
    centers = jax.random.normal(keys[4], shape)
    return x, dy, w1, w2, centers, jnp.zeros(shape[0])


def live(x, centers, sparsity, hidden):
    """(T, H) bool: which neurons a token meets, from the definition."""
    shards, experts = sparsity.num_shards, sparsity.num_experts
    rows = hidden // shards
    routed = routed_neurons(rows, sparsity)
    masks = []
    for s in range(shards):
        own = centers[s * experts : (s + 1) * experts]
        chosen = assign_tokens(x.reshape(-1, x.shape[-1]), own, jnp.zeros(experts), sparsity.metric)
        expert = np.full(rows, -1)
        expert[routed] = np.arange(routed.size) % sparsity.m // 4
        masks.append((expert == -1) | (expert == np.asarray(chosen)[:, None]))
    return jnp.asarray(np.concatenate(masks, 1))


def expected(x, dy, w1, w2, mask, sparsity):
    """Forward and gradients as masked dense products, in float32."""
    betas = jnp.array([1.4, 1.3, 1.0])
    thin = lambda w, b: b * soft_threshold(w, 1) if sparsity.weights else w
    s1, s2 = thin(w1, betas[0]), thin(w2, betas[1])
    rows, g = (a.reshape(-1, a.shape[-1]) for a in (x, dy))
    r = jnp.where(mask, jnp.maximum(rows @ s1.T, 0), 0)
    # Four neighbours are all live or all not: two of four of the masked ones.
    r = jnp.where(select24(r * r), r, 0) if sparsity.activations else r
    dy1 = 2 * r * (g @ s2.T)
    return (r * r) @ s2, dy1 @ s1, dy1.T @ rows, (r * r).T @ g


def run(sparsity, x, dy, w1, w2, centers, bias, axes=None):
    betas = jnp.array([1.4, 1.3, 1.0])
    packed = sharding.pack_ffn(w1, w2, None, betas, sparsity, dtype=x.dtype, axes=axes)

    def network(x, w1, w2):
        return sharding.routed_ffn(x, w1, w2, None, packed, centers, bias, sparsity, axes=axes)

    (y, counts), vjp = jax.vjp(network, x, w1, w2)
    dx, dw1, dw2 = vjp((dy, np.zeros(counts.shape, jax.dtypes.float0)))
    return *(a.reshape(-1, a.shape[-1]) for a in (y, dx)), dw1, dw2


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"m": 8, "shared_every": 2},
        {"shards": 2},
        {"m": 8, "shards": 2, "shared_every": 3},
        {"weights": False, "activations": False},
    ],
    ids=str,
)
def test_network_is_the_masked_one(monkeypatch, changes, backend):
    sparsity = replace(Sparsity(m=16, v=64, shared_every=4), backend=backend, **changes)
    if backend and not sparsity.activations:
        pytest.skip("kernels need 2:4 activations")
    hidden = 64 * sparsity.block * sparsity.num_shards // 4
    x, dy, w1, w2, centers, bias = problem(sparsity, hidden)
    found = run(sparsity, x, dy, w1, w2, centers, bias)
    mask = live(x, centers, sparsity, hidden)
    for a, b in zip(found, expected(x, dy, w1, w2, mask, sparsity), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("once", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("weights", [True, False])
def test_grouped_products_make_the_masked_network(monkeypatch, weights, shards, once):
    """As on a GPU, with the definitions in place of kernels: shared neurons once, or repeated."""
    monkeypatch.setattr(routed_ffn_grouped, "choose", lambda *args, **kwargs: "reference")
    monkeypatch.setattr(routed_ffn_grouped, "recheck", lambda packed, *args, **kwargs: packed)
    monkeypatch.setattr("kernels.reference_grouped.SHARED_ONCE", once)
    sparsity = Sparsity(m=8, v=64, shared_every=3, shards=shards, weights=weights)
    # Of every shard an expert has 128 neurons of its own and 128 shared ones.
    hidden = 16 * 24 * shards
    x, dy, w1, w2, centers, bias = problem(sparsity, hidden, tokens=1024)
    packed = sharding.pack_ffn(w1, w2, None, jnp.ones(3), sparsity, dtype=x.dtype, axes=None)
    assert packed.kernels == "reference"
    found = run(sparsity, x, dy, w1, w2, centers, bias)
    mask = live(x, centers, sparsity, hidden)
    for a, b in zip(found, expected(x, dy, w1, w2, mask, sparsity), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("weights", [True, False])
def test_weights_packed_once_serve_where_no_kernels_do(monkeypatch, weights):
    """Such as where tokens are too few: jax.numpy takes them over."""
    monkeypatch.setattr(routed_ffn_grouped, "choose", lambda *args, **kwargs: "reference")
    monkeypatch.setattr(routed_ffn_grouped, "recheck", lambda *args, **kwargs: None)
    sparsity, hidden = Sparsity(m=8, v=64, shared_every=3, weights=weights), 16 * 24
    x, dy, w1, w2, centers, bias = problem(sparsity, hidden, tokens=1024)
    betas = jnp.array([1.4, 1.3, 1.0])
    packed = ops.pack_ffn(w1, w2, None, betas, sparsity, dtype=x.dtype)
    assert (packed.kernels, packed.shared_every) == ("reference", 3)
    mask = live(x, centers, sparsity, hidden)
    reference = expected(x, dy, w1, w2, mask, sparsity)
    tokens = x.reshape(-1, D)
    plan = plan_tokens(assign_tokens(tokens, centers, bias, sparsity.metric), 2, sparsity.v)
    y = ops.routed_ffn(tokens, w1, w2, None, packed, plan, sparsity)
    on_a_mesh = run(sparsity, x, dy, w1, w2, centers, bias)
    for a, b in zip((y, *on_a_mesh), (reference[0], *reference), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("kernels", [None, "reference"])
@pytest.mark.parametrize("every", [0, 2])
def test_weights_packed_for_other_shared_neurons_are_refused(monkeypatch, every, kernels):
    monkeypatch.setattr(routed_ffn_grouped, "choose", lambda *args, **kwargs: "reference")
    monkeypatch.setattr(routed_ffn_grouped, "recheck", lambda *args, **kwargs: kernels)
    sparsity, hidden = Sparsity(m=8, v=64, shared_every=3), 16 * 48
    x, _, w1, w2, centers, bias = problem(sparsity, hidden, tokens=1024)
    packed = ops.pack_ffn(w1, w2, None, jnp.ones(3), sparsity, dtype=x.dtype)
    other = replace(sparsity, shared_every=every)
    tokens = x.reshape(-1, D)
    plan = plan_tokens(jnp.zeros(1024, jnp.int32), 2, sparsity.v)
    with pytest.raises(ValueError, match=f"packed shared_every=3 must be 0 or {every}"):
        ops.routed_ffn(tokens, w1, w2, None, packed, plan, other)
    with pytest.raises(ValueError, match=f"packed shared_every=3 must be 0 or {every}"):
        sharding.routed_ffn(x, w1, w2, None, packed, centers, bias, other, axes=None)
    with pytest.raises(ValueError, match="must hold 2 experts of live=256, shared neurons once"):
        ops.routed_ffn(tokens, w1[:384], w2[:384], None, packed, plan, sparsity)


@pytest.mark.parametrize("shards", [1, 2])
def test_clusters_leave_shared_neurons_where_they_are(shards):
    sparsity = Sparsity(m=8, v=V, shared_every=3, shards=shards)
    hidden = 24 * 4 * shards
    w1 = jax.random.normal(jax.random.key(0), (hidden, D))
    permutation, centers, churn = sharding.cluster(w1, None, sparsity, axes=None)
    chex.assert_shape(centers, (2 * shards, D))
    np.testing.assert_array_equal(np.sort(permutation), np.arange(hidden))
    neuron = np.arange(hidden)
    shared = neuron % 24 // 8 == 2
    np.testing.assert_array_equal(permutation[shared], neuron[shared])
    assert 0 < churn <= 1
    # What is routed is clustered as a network of those neurons alone.
    rows = w1.reshape(shards, -1, D)[:, routed_neurons(hidden // shards, sparsity)].reshape(-1, D)
    alone = replace(sparsity, shared_every=0)
    order, others, _ = sharding.cluster(rows, None, alone, axes=None)
    chex.assert_trees_all_close(centers, others)
    np.testing.assert_array_equal(w1[permutation][~shared], rows[order])


@pytest.mark.parametrize("gated", [False, True])
def test_module(gated):
    sparsity = Sparsity(m=16, v=V, shared_every=4)
    ffn = RoutedFFN(D, 256, gated=gated, sparsity=sparsity, dtype=jnp.float32, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (128, D))
    dense = ffn(x)[0]
    ffn.apply_update(ffn.begin_sparse())
    np.testing.assert_allclose(ffn(x)[0], dense, rtol=1e-4, atol=1e-5)
    y, stats = ffn(x, ffn.pack())
    assert stats.counts.sum() == 128
    w1, w2 = ffn.w1[...], ffn.w2[...]
    betas, thin = ffn.beta[...], lambda w, b: b * soft_threshold(w, 1)
    mask = live(x, ffn.centers[...], sparsity, 256)
    r = jnp.maximum(x @ thin(w1, betas[0]).T, 0)
    y2 = r * r * (x @ thin(ffn.wg[...], betas[2]).T if gated else 1)
    y2 = jnp.where(mask, y2, 0)
    np.testing.assert_allclose(
        y, jnp.where(select24(y2), y2, 0) @ thin(w2, betas[1]), rtol=1e-4, atol=1e-5
    )
    capture = ffn.activation_capture(x)
    r = jnp.maximum(x @ w1.T, 0)
    y2 = jnp.abs(r * r * (x @ ffn.wg[...].T if gated else 1))
    routed = jnp.where(mask, y2, 0)
    np.testing.assert_allclose(capture.routed, routed.sum() / y2.sum(), rtol=1e-5)
    kept = jnp.where(select24(routed), routed, 0).sum() / y2.sum()
    np.testing.assert_allclose(capture.kept, kept, rtol=1e-5)


ON_A_MESH = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType
    from sparsejax.sharding import MeshAxes
    from sparsejax.spec import Sparsity
    from tests.sparsejax.test_shared_neurons import problem, run

    for shards, tensor in ((2, 2), (1, 2), (2, 1)):
        sparsity = Sparsity(m=8, v=16, shared_every=2, shards=shards)
        arguments = problem(sparsity, 128)
        alone = run(sparsity, *arguments)
        axes = (1, 4 // tensor, tensor), ("data", "fsdp", "tensor")
        with jax.set_mesh(jax.make_mesh(*axes, axis_types=(AxisType.Auto,) * 3)):
            found = jax.jit(lambda *a: run(sparsity, *a, axes=MeshAxes()))(*arguments)
        for a, b in zip(found, alone, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-5 * float(jnp.abs(b).max()))
        print(shards, tensor)
"""


def test_a_mesh_computes_the_same():
    assert run_script(ON_A_MESH, devices=4).split("\n")[:3] == ["2 2", "1 2", "2 1"]


def kernels_called(sparsity, hidden):
    """How often a step lowered for an H100 calls each of hopper's products."""
    arguments = problem(sparsity, hidden, tokens=1 << 14, dtype=jnp.bfloat16)
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    with registry.assume_capability((9, 0)), jax.sharding.use_abstract_mesh(mesh):
        trace = jax.jit(lambda *a: run(sparsity, *a)).trace(*arguments)
        text = trace.lower(lowering_platforms=("cuda",)).as_text()
    names = "up24", "down24", "up24_backward", "weight_gradient"
    return [len(re.findall(rf"call @{name}(?:_\d+)?\(", text)) for name in names]


@pytest.mark.parametrize(("shards", "calls"), [(1, 1), (2, 1), (4, 2)])
def test_lowers_for_a_gpu_on_any_machine(shards, calls):
    sparsity = Sparsity(m=16, v=128, shared_every=4, shards=shards, backend="hopper")
    assert kernels_called(sparsity, 2048 * shards) == [calls, 2 * calls, calls, 2 * calls]


def agrees_with_the_definition(sparsity, width):
    """A step on this GPU, with the kernels of `sparsity.backend`, against plain jax.numpy."""
    if sparsity.backend not in registry.available_backends():
        pytest.skip(f"{sparsity.backend} does not run on {jax.devices()[0].device_kind}")
    arguments = problem(sparsity, 4096, tokens=1 << 13, dtype=jnp.bfloat16, width=width)
    found = jax.jit(lambda *a: run(sparsity, *a))(*arguments)
    plain = replace(sparsity, backend="reference")
    definition = jax.jit(lambda *a: run(plain, *a))(*arguments)
    for pair in zip(found, definition, strict=True):
        a, b = (np.asarray(v, np.float64) for v in pair)
        assert np.linalg.norm(a - b) < 1e-2 * np.linalg.norm(b)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize(
    ("m", "every", "shards"), [(16, 4, 1), (16, 4, 2), (32, 4, 1), (8, 2, 1)], ids=str
)
def test_on_a_gpu(backend, m, every, shards):
    sparsity = Sparsity(m=m, v=128, shared_every=every, shards=shards, backend=backend)
    agrees_with_the_definition(sparsity, D)
