"""The routed network on a backend's kernels: their composition, and which backend is taken."""

import collections
import re
import types
import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import registry
from sparsejax.ops import pack_ffn, routed_ffn, routed_ffn_grouped
from sparsejax.ops.routed_ffn import _pack
from sparsejax.routing import assign_tokens, plan_tokens
from sparsejax.spec import Sparsity
from tests.sparsejax.test_routed_ffn import assert_close, float64, oracle_ffn, oracle_threshold

D, H, T, V = 64, 512, 150, 64
BETAS = np.array([1.5, 1.25, 1.0], np.float32)


def problem(seed=0, tokens=T, hidden=H):
    rng = np.random.default_rng(seed)
    shapes = (tokens, D), (tokens, D), (hidden, D), (hidden, D)
    return [rng.normal(size=s).astype(np.float32) for s in shapes]


def experts_of(distribution: str, num_experts: int, tokens=T) -> np.ndarray:
    choice = {
        "even": np.arange(tokens) % num_experts,
        "skewed": np.minimum(np.arange(tokens) // 90, num_experts - 1),
        "all_to_last": np.full(tokens, num_experts - 1),
    }
    return choice[distribution].astype(np.int32)


def make_plan(expert, sparsity):
    if sparsity.num_experts == 1:
        return None
    return plan_tokens(jnp.array(expert), sparsity.num_experts, sparsity.v)


@partial(jax.jit, static_argnames=("sparsity", "dtype", "kernels", "remat"))
def value_and_gradients(x, dy, w1, w2, plan, *, sparsity, dtype, kernels, remat=False):
    packed = _pack(w1, w2, None, jnp.array(BETAS), sparsity, dtype=dtype, kernels=kernels)

    def f(x, w1, w2):
        return routed_ffn(x, w1, w2, None, packed, plan, sparsity)

    y, vjp = jax.vjp(jax.checkpoint(f) if remat else f, x.astype(dtype), w1, w2)
    return [y, *vjp(dy.astype(dtype)), None]


@pytest.mark.parametrize("distribution", ["even", "skewed", "all_to_last"])
@pytest.mark.parametrize(
    ("m", "hidden"), [(4, H), (8, H), (16, H), (32, H), (64, 1024), (128, 2048)]
)
def test_kernels_compose_to_the_network(m, hidden, distribution):
    """In float32 against float64: skewed and empty experts, T no multiple of V."""
    sparsity = Sparsity(m=m, v=V)
    data = problem(m, hidden=hidden)
    x, dy, w1, w2 = float64(data)
    expert = experts_of(distribution, m // 4)
    plan = make_plan(expert, sparsity)
    got = value_and_gradients(
        *data, plan, sparsity=sparsity, dtype=jnp.float32, kernels="reference"
    )
    w1, w2 = (float(b) * oracle_threshold(w) for b, w in zip(BETAS, (w1, w2), strict=False))
    y, gradients = oracle_ffn(x, dy, w1, w2, None, expert, sparsity)
    assert_close(got, [y, *gradients], 1e-5)
    idle = ~np.isin(np.arange(hidden) % m // 4, expert)
    assert not np.asarray(got[2])[idle].any()
    assert not np.asarray(got[3])[idle].any()


@pytest.mark.parametrize(
    ("m", "distribution", "share"), [(4, "even", 0.05), (16, "skewed", 0.05), (16, "even", 0.0)]
)
def test_kernels_compose_to_gradients_along_tokens(m, distribution, share):
    sparsity = Sparsity(m=m, v=V, weight_gradient="tokens24", dense_neurons=share)
    data = problem(m)
    x, dy, w1, w2 = float64(data)
    expert = experts_of(distribution, m // 4)
    plan = make_plan(expert, sparsity)
    got = value_and_gradients(
        *data, plan, sparsity=sparsity, dtype=jnp.float32, kernels="reference"
    )
    w1, w2 = (float(b) * oracle_threshold(w) for b, w in zip(BETAS, (w1, w2), strict=False))
    y, gradients = oracle_ffn(x, dy, w1, w2, None, expert, sparsity)
    assert_close(got, [y, *gradients], 1e-5)


@pytest.mark.parametrize(
    "sparsity",
    [
        Sparsity(m=16, v=V),
        Sparsity(routing=False, v=V),
        Sparsity(m=16, v=V, weight_gradient="tokens24"),
    ],
)
def test_both_paths_agree_in_bfloat16(sparsity):
    data = problem()
    plan = make_plan(experts_of("skewed", sparsity.num_experts), sparsity)
    run = partial(value_and_gradients, *data, plan, sparsity=sparsity, dtype=jnp.bfloat16)
    grouped, blocks = run(kernels="reference"), run(kernels=None)
    assert [a.dtype for a in grouped[:4]] == [jnp.bfloat16] * 2 + [jnp.float32] * 2
    assert_close(grouped, [np.asarray(a, np.float64) for a in blocks[:4]] + [None], 2e-3)


def test_what_is_saved_for_the_backward_pass():
    """x once, T_pad h numbers, metadata and the plan; nothing of T x H."""
    sparsity = Sparsity(m=16, v=V)
    x, _, w1, w2 = map(jnp.array, problem())
    plan = make_plan(experts_of("even", 4), sparsity)
    assert plan is not None
    packed = _pack(w1, w2, None, jnp.array(BETAS), sparsity, dtype=jnp.float32, kernels="reference")
    _, vjp = jax.vjp(lambda *a: routed_ffn(*a, None, packed, plan, sparsity), x, w1, w2)
    rows, live = plan.permutation.size, H // 4
    held = sorted(a.size for a in jax.tree.leaves(vjp))
    metadata = rows // 64 * (live // 64) * 128
    own = [rows * x.shape[1], rows * live, metadata, 0, 0]
    given = [a.size for a in jax.tree.leaves((packed, plan))]
    # Given arrays may be left out where they are not needed.
    for size in own:
        held.remove(size)
    for size in held:
        given.remove(size)


def test_repeatable_under_remat_scan_and_donation():
    sparsity = Sparsity(m=16, v=V)
    x, dy, w1, w2 = problem()
    stacked = [np.stack([w, 0.5 * w]) for w in (w1, w2)]
    centers = np.random.default_rng(3).normal(size=(4, D)).astype(np.float32)

    def network(weights, x, scan, remat):
        packed = jax.lax.map(
            lambda w: _pack(
                *w, None, jnp.array(BETAS), sparsity, dtype=jnp.float32, kernels="reference"
            ),
            weights,
        )

        def layer(x, inputs):
            w1, w2, packed = inputs
            plan = plan_tokens(assign_tokens(x, jnp.array(centers)), 4, V)
            return x + 0.01 * routed_ffn(x, w1, w2, None, packed, plan, sparsity), None

        layer = jax.checkpoint(layer) if remat else layer
        if scan:
            return jnp.sum(dy * jax.lax.scan(layer, x, (*weights, packed))[0])
        for i in range(2):
            x, _ = layer(x, jax.tree.map(lambda a, i=i: a[i], (*weights, packed)))
        return jnp.sum(dy * x)

    @partial(jax.jit, static_argnames=("scan", "remat"), donate_argnums=0)
    def step(weights, x, scan, remat):
        return jax.value_and_grad(network)(weights, x, scan, remat)

    run = lambda scan, remat: step(tuple(map(jnp.array, stacked)), x, scan, remat)
    loss, gradients = run(False, False)
    assert all(np.abs(g).max() > 0 for g in gradients)
    again = run(True, False)
    np.testing.assert_allclose(again[0], loss, rtol=1e-5)
    for g, w in zip(again[1], gradients, strict=True):
        np.testing.assert_allclose(g, w, rtol=1e-4, atol=1e-4 * np.abs(w).max())
    for a, b in ((run(True, False), again), (run(True, True), again)):
        for g, w in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_array_equal(g, w)


SIZES = routed_ffn_grouped.Sizes(width=D, hidden=H, dtype=jnp.dtype(jnp.bfloat16))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there are kernels for a GPU")
def test_the_backend_without_a_gpu():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert routed_ffn_grouped.choose(Sparsity(v=V), SIZES, gated=False) is None
    _, _, w1, w2 = problem()
    for backend in ("hopper", "triton"):
        sparsity = Sparsity(v=V, backend=backend)
        with pytest.raises(NotImplementedError, match=backend):
            pack_ffn(w1, w2, None, jnp.array(BETAS), sparsity)
        with pytest.raises(NotImplementedError, match="the device is no NVIDIA GPU"):
            routed_ffn_grouped.recheck(backend, sparsity, SIZES, gated=False)


@pytest.mark.parametrize(
    ("changes", "gated", "reason"),
    [
        ({"activations": False}, False, "activations=False"),
        ({"activations": False}, True, "activations=False"),
        ({"v": 96}, False, "v=96"),
        ({"m": 64}, True, "32: hidden=1856 would do .* not 512"),
    ],
)
def test_options_without_kernels_fall_back_visibly(changes, gated, reason):
    sparsity = Sparsity(**{"v": 128, **changes})
    with registry.assume_capability((9, 0)):
        named = replace(sparsity, backend="hopper")
        with pytest.raises(NotImplementedError, match=reason):
            routed_ffn_grouped.choose(named, SIZES, gated=gated)
        routed_ffn_grouped._reported.clear()
        with pytest.warns(registry.FallbackWarning, match=reason):
            assert routed_ffn_grouped.choose(sparsity, SIZES, gated=gated) is None
        # Said once.
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert routed_ffn_grouped.choose(sparsity, SIZES, gated=gated) is None


def test_gradients_along_tokens_choose_their_backend(monkeypatch):
    sparsity = Sparsity(v=128, weight_gradient="tokens24")
    sizes = SIZES._replace(hidden=2048)
    with registry.assume_capability((9, 0)):
        assert routed_ffn_grouped.choose(sparsity, sizes, gated=False) == "hopper"

    # A backend with the five functions only.
    names = "pack_weight24", "up24", "down24", "up24_backward", "weight_gradient"
    checks = {f"check_{name}": lambda *_, **__: None for name in names}
    five = types.SimpleNamespace(NEURONS=64, **checks)
    monkeypatch.setattr(routed_ffn_grouped, "module", lambda _: five)
    monkeypatch.setattr(routed_ffn_grouped, "_reported", set())
    reason = "does not serve weight_gradient='tokens24'"
    with registry.assume_capability((8, 0)):
        dense = replace(sparsity, weight_gradient="dense")
        assert routed_ffn_grouped.choose(dense, sizes, gated=False) == "triton"
        with pytest.raises(NotImplementedError, match=reason):
            routed_ffn_grouped.choose(replace(sparsity, backend="triton"), sizes, gated=False)
        with pytest.warns(registry.FallbackWarning, match=reason):
            assert routed_ffn_grouped.choose(sparsity, sizes, gated=False) is None


@pytest.mark.parametrize(
    ("capability", "target", "downs", "spare", "option"),
    # Rematerialisation does not need the down of the forward pass. JAX leaves it out of triton's
    # calls, which have a batching rule, and lowers what it has cut down once more; of others XLA
    # leaves it out.
    [
        ((9, 0), r"custom_call @mosaic_gpu", 3, 0, "dense"),
        ((9, 0), r"custom_call @mosaic_gpu", 3, 0, "tokens24"),
        ((8, 0), r"custom_call @[\w$.]*triton", 2, 2, "dense"),
    ],
    ids=["hopper", "hopper-along-tokens", "triton"],
)
def test_lowers_for_a_gpu_on_any_machine(capability, target, downs, spare, option):
    """All five kernels, under scan, remat, donation and vmap."""
    sparsity = Sparsity(m=16, v=128, weight_gradient=option)
    width, hidden, tokens = 256, 2048, 1024

    def step(weights, x, dy, centers):
        packed = jax.lax.map(lambda w: pack_ffn(*w, None, jnp.ones((3,)), sparsity), weights)

        def network(weights, x):
            @jax.checkpoint
            def layer(x, inputs):
                w1, w2, packed = inputs
                plan = plan_tokens(assign_tokens(x, centers), 4, sparsity.v)
                return x + routed_ffn(x, w1, w2, None, packed, plan, sparsity), None

            return jax.lax.scan(layer, x, (*weights, packed))[0]

        return jax.vjp(network, weights, x)[1](dy)

    weight = jax.ShapeDtypeStruct((2, hidden, width), jnp.float32)
    x = jax.ShapeDtypeStruct((tokens, width), jnp.bfloat16)
    arguments = (weight, weight), x, x, jax.ShapeDtypeStruct((4, width), jnp.float32)
    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    with (
        registry.assume_capability(capability),
        jax.sharding.use_abstract_mesh(mesh),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", registry.FallbackWarning)
        trace = jax.jit(step, donate_argnums=0).trace(*arguments)
        text = trace.lower(lowering_platforms=("cuda",)).as_text()
        stacked = jax.tree.map(lambda a: jax.ShapeDtypeStruct((2, *a.shape), a.dtype), arguments)
        jax.jit(jax.vmap(step)).trace(*stacked).lower(lowering_platforms=("cuda",))
    gradient = "weight_gradient" if option == "dense" else "weight_gradient24"
    names = re.findall(r"call @(\w+24|weight_gradient|up24_backward)(?:_\d+)?\(", text)
    calls = {name: count for name, count in collections.Counter(names).items() if "_24" not in name}
    # Two packings; up and down, and up again for the backward pass; backward: up, down, two weight
    # gradients.
    assert calls == {
        "pack_weight24": 2, "up24": 2, "down24": downs, "up24_backward": 1, gradient: 2
    }  # fmt: skip
    # Each is lowered once, for all of its calls and layers.
    assert len(calls) <= len(re.findall(target, text)) <= len(calls) + spare


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("distribution", ["even", "skewed", "all_to_last"])
@pytest.mark.parametrize("m", [4, 8, 16, 32, 64])
@pytest.mark.parametrize("option", ["dense", "tokens24"])
def test_backends_on_a_gpu(backend, m, distribution, option):
    """Named kernels against the path in jax.numpy, T no multiple of V; and bit for bit twice."""
    hidden, width, tokens = 2048, 256, 1000
    sparsity = Sparsity(m=m, v=128, backend=backend, weight_gradient=option)
    sizes = routed_ffn_grouped.Sizes(width, hidden, jnp.dtype(jnp.bfloat16), tokens)
    try:
        routed_ffn_grouped.check(backend, sparsity, sizes, gated=False)
    except NotImplementedError as error:
        pytest.skip(str(error))
    rng = np.random.default_rng(m)
    shapes = (tokens, width), (tokens, width), (hidden, width), (hidden, width)
    data = [jnp.array(rng.normal(size=s), jnp.float32) for s in shapes]
    plan = make_plan(experts_of(distribution, m // 4, tokens), sparsity)
    run = partial(value_and_gradients, *data, plan, sparsity=sparsity, dtype=jnp.bfloat16)
    got, again, remat = run(kernels=backend), run(kernels=backend), run(kernels=backend, remat=True)
    # Two in four along tokens are chosen among values rounded to 16 bits, which the two paths sum
    # in another order: a near-tie in 10^5 falls the other way, and moves a whole element.
    limit = 5e-3 if option == "dense" else 2e-2
    assert_close(got, [np.asarray(a, np.float64) for a in run(kernels=None)[:4]] + [None], limit)
    for a, b, c in zip(got[:4], again[:4], remat[:4], strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
