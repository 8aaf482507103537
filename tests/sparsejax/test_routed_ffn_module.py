"""The module: phases, routing state, and composition with plain JAX transformations."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.nn import RoutedFFN
from sparsejax.nn.routed_ffn import RoutingState, RoutingStats
from sparsejax.ops.routed_ffn import routed_ffn
from sparsejax.prune import soft_threshold_beta
from sparsejax.routing import plan_tokens
from sparsejax.spec import Sparsity

D, H, L = 16, 64, 3
SPARSITY = Sparsity(m=16, v=8)


def make(gated=False, sparsity: Sparsity | None = SPARSITY, seed=0, dtype=jnp.float32) -> RoutedFFN:
    return RoutedFFN(D, H, gated=gated, sparsity=sparsity, dtype=dtype, rngs=nnx.Rngs(seed))


def tokens(*shape, seed=1):
    return jax.random.normal(jax.random.key(seed), (*shape, D))


def stacked(gated=False):
    """State of L layers with a leading layer axis, and the structure of one."""
    split = [nnx.split(make(gated, seed=s)) for s in range(L)]
    return split[0][0], jax.tree.map(lambda *a: jnp.stack(a), *(state for _, state in split))


def test_dense_by_default_and_one_structure_for_all_phases():
    module = make()
    x = tokens(2, 5)
    y, stats = module(x)
    assert stats is None
    want = np.maximum(np.asarray(x) @ np.asarray(module.w1[...]).T, 0) ** 2 @ module.w2[...]
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)

    before = nnx.split(module)[0]
    module.apply_update(module.begin_sparse())
    assert nnx.split(module)[0] == before
    parameters, state = nnx.state(module, nnx.Param), nnx.state(module, RoutingState)
    assert set(parameters) == {"w1", "w2"}
    assert set(state) == {"centers", "bias", "beta"}
    assert set(nnx.state(make(sparsity=None))) == {"w1", "w2"}
    assert set(nnx.state(make(gated=True), nnx.Param)) == {"w1", "w2", "wg"}


@pytest.mark.parametrize("gated", [False, True])
def test_the_start_of_the_sparse_phase(gated):
    module = make(gated)
    x = tokens(7, 3)
    dense, _ = module(x)
    w1 = np.asarray(module.w1[...])
    update = module.begin_sparse()
    module.apply_update(update)

    # The dense function is what it was, the state is new, beta is that of the dense weights.
    np.testing.assert_allclose(module(x)[0], dense, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(module.w1[...], w1[np.asarray(update.permutation)])
    np.testing.assert_array_equal(module.centers[...], update.centers)
    weights = [w[...] for w in (module.w1, module.w2, module.wg) if w is not None]
    want = [soft_threshold_beta(w, 1) for w in weights]
    np.testing.assert_allclose(module.beta[...], want + [1.0] * (3 - len(want)), rtol=1e-6)
    assert (np.asarray(update.beta[:2]) > 1.2).all()

    # Expert e's centre is that of the neurons 4 e to 4 e + 3 in every block of M.
    neurons = np.asarray(module.w1[...]) / np.linalg.norm(module.w1[...], axis=1, keepdims=True)
    for e in range(4):
        center = neurons[np.arange(H) % 16 // 4 == e].mean(axis=0)
        np.testing.assert_allclose(
            update.centers[e], center / np.linalg.norm(center), rtol=1e-3, atol=1e-4
        )

    # Clustering again from there moves nothing; beta is frozen even when weights change.
    again = module.refresh()
    assert float(again.churn) == 0
    np.testing.assert_array_equal(again.permutation, np.arange(H))
    # Experts keep the identity that their centres give them, here each its neighbour's.
    module.centers[...] = jnp.roll(update.centers, 1, axis=0)
    rolled = module.refresh()
    np.testing.assert_allclose(rolled.centers, module.centers[...], rtol=1e-3, atol=1e-4)
    assert float(rolled.churn) == 1
    module.w1[...] = 2 * module.w1[...] ** 3
    np.testing.assert_array_equal(module.refresh().beta, module.beta[...])
    assert not np.allclose(module.begin_sparse().beta[0], module.beta[0])


@pytest.mark.parametrize("gated", [False, True])
def test_the_sparse_call_is_the_op(gated):
    module = make(gated)
    module.apply_update(module.begin_sparse())
    module.bias[...] = jnp.array([0.1, -0.1, 0.0, 0.0])
    x = tokens(3, 7)
    packed = module.pack()
    y, stats = module(x, packed)
    assert isinstance(stats, RoutingStats)

    flat = np.asarray(x).reshape(-1, D)
    scores = flat / np.linalg.norm(flat, axis=1, keepdims=True) @ np.asarray(module.centers[...]).T
    expert = np.argmax(scores + np.asarray(module.bias[...]), axis=1)
    np.testing.assert_array_equal(module.route(x), expert)
    counts = np.bincount(expert, minlength=4)
    np.testing.assert_array_equal(stats.counts, counts)
    np.testing.assert_allclose(stats.imbalance, counts.max() / counts.mean(), rtol=1e-6)

    plan = plan_tokens(jnp.array(expert, jnp.int32), 4, 8)
    wg = None if module.wg is None else module.wg[...]
    want = routed_ffn(jnp.array(flat), module.w1[...], module.w2[...], wg, packed, plan, SPARSITY)
    np.testing.assert_allclose(y.reshape(-1, D), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activations", [False, True])
def test_activation_capture(gated, activations):
    module = make(gated, Sparsity(m=16, v=8, activations=activations))
    module.apply_update(module.begin_sparse())
    x = np.asarray(tokens(29))
    y2 = np.maximum(x @ np.asarray(module.w1[...]).T, 0) ** 2
    if module.wg is not None:
        y2 = np.abs(y2 * (x @ np.asarray(module.wg[...]).T))
    own = np.arange(H) % 16 // 4 == np.asarray(module.route(jnp.array(x)))[:, None]
    live = y2[own].reshape(29, -1, 4)
    kept = np.sort(live, axis=-1)[..., 2:] if activations else live
    got = module.activation_capture(jnp.array(x))
    np.testing.assert_allclose(got.routed, live.sum() / y2.sum(), rtol=1e-5)
    np.testing.assert_allclose(got.kept, kept.sum() / y2.sum(), rtol=1e-5)
    # The choice by the clusters catches more than its share of a quarter.
    assert got.routed > 0.27


def test_without_routing():
    module = make(sparsity=Sparsity(routing=False))
    module.apply_update(module.begin_sparse())
    assert module.centers[...].shape == (1, D)
    y, stats = module(tokens(10), module.pack())
    assert stats is not None
    np.testing.assert_array_equal(stats.counts, [10])
    assert np.isfinite(y).all()


def test_with_nothing_sparse_it_is_the_dense_network():
    module = make(sparsity=Sparsity(weights=False, routing=False, activations=False))
    module.apply_update(module.begin_sparse())
    assert module.pack() is None
    # Two of four tokens in the weight gradients are something.
    tokens24 = dataclasses.replace(module.sparsity, weight_gradient="tokens24")
    assert make(sparsity=tokens24).pack() is not None


@pytest.mark.parametrize("gated", [False, True])
def test_scan_over_layers_with_checkpoint_is_the_loop(gated):
    """Stacked state, stacked packed weights, plain jit, grad, scan and remat; and donation."""
    structure, state = stacked(gated)

    def update_layer(state):
        module = nnx.merge(structure, state)
        module.apply_update(module.begin_sparse())
        return nnx.split(module)[1]

    state = jax.jit(lambda s: jax.lax.map(update_layer, s))(state)
    packed = jax.jit(jax.vmap(lambda s: nnx.merge(structure, s).pack()))(state)
    assert packed.w1.dense.shape == (L, 4, H // 4, D)
    x = tokens(2, 13)

    def layer(x, inputs):
        state, packed = inputs
        y, stats = nnx.merge(structure, state)(x, packed)
        return x + y, stats

    def scanned(parameters, rest, remat):
        body = jax.checkpoint(layer) if remat else layer
        y, stats = jax.lax.scan(body, x, (nnx.merge_state(parameters, rest), packed))
        return jnp.mean(y**2), stats

    def looped(parameters, rest):
        y, stats = x, []
        for i in range(L):
            pick = jax.tree.map(lambda a, i=i: a[i], (nnx.merge_state(parameters, rest), packed))
            y, s = layer(y, pick)
            stats.append(s)
        return jnp.mean(y**2), jax.tree.map(lambda *a: jnp.stack(a), *stats)

    parameters, rest = nnx.split_state(state, nnx.Param, ...)
    (loss, stats), gradients = jax.jit(jax.value_and_grad(looped, has_aux=True))(parameters, rest)
    assert set(gradients) == ({"w1", "w2", "wg"} if gated else {"w1", "w2"})
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients))
    assert stats.counts.shape == (L, 4)
    np.testing.assert_array_equal(stats.counts.sum(axis=1), 26)
    assert stats.imbalance.shape == (L,)
    for remat in (False, True):
        step = jax.jit(
            jax.value_and_grad(lambda p, r, remat=remat: scanned(p, r, remat), has_aux=True),
            donate_argnums=0,
        )
        own = jax.tree.map(jnp.copy, parameters)
        (again, stats_again), gradients_again = step(own, rest)
        np.testing.assert_allclose(again, loss, rtol=1e-6)
        np.testing.assert_array_equal(stats_again.counts, stats.counts)
        for a, b in zip(*map(jax.tree.leaves, (gradients_again, gradients)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


def test_gradients_follow_the_support():
    """Neurons whose expert no token met get no gradient; beta, bias and centres never do."""
    module = make()
    module.apply_update(module.begin_sparse())
    module.bias[...] = jnp.array([0.0, 0.0, 9.0, 0.0])
    packed = module.pack()
    structure, state = nnx.split(module)
    gradients = jax.grad(lambda s: jnp.sum(nnx.merge(structure, s)(tokens(20), packed)[0] ** 2))(
        state
    )
    met = np.arange(H) % 16 // 4 == 2
    assert not np.asarray(gradients["w1"][...])[~met].any()
    assert not np.asarray(gradients["w2"][...])[~met].any()
    assert np.asarray(gradients["w2"][...])[met].any()
    for name in ("centers", "bias", "beta"):
        assert not np.asarray(gradients[name][...]).any()


def test_dtypes():
    module = make(dtype=jnp.bfloat16)
    module.apply_update(module.begin_sparse())
    assert module.w1[...].dtype == jnp.float32
    packed = module.pack()
    assert packed.w1.dense.dtype == jnp.bfloat16
    x = tokens(24)
    sparse, dense = module(x, packed)[0], module(x)[0]
    assert sparse.dtype == dense.dtype == jnp.bfloat16
    # The sparse network is another function, of the same size.
    ratio = np.linalg.norm(sparse.astype(jnp.float32)) / np.linalg.norm(dense.astype(jnp.float32))
    assert 0.2 < ratio < 1.0


def test_bad_arguments():
    with pytest.raises(ValueError, match="hidden=60"):
        RoutedFFN(16, 60, sparsity=SPARSITY, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="width=0"):
        RoutedFFN(0, 60, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sparsity=None"):
        make(sparsity=None).pack()
    with pytest.raises(ValueError, match="width=16"):
        make()(jnp.ones((3, 8)))


@pytest.mark.parametrize("shards", [1, 2])
def test_rerouting_evens_loads_and_counts_what_moves(shards):
    module = make(sparsity=Sparsity(m=16, v=8, shards=shards))
    module.apply_update(module.begin_sparse())
    x = tokens(4, 64) + 2 * tokens(1, seed=9)
    load = lambda: np.stack([np.bincount(e, minlength=4) for e in module.route(x).reshape(-1, 256)])
    assert load().max() > 2 * 64
    before = module.centers[...], module.bias[...]
    was = np.asarray(module.route(x))
    kept, churn = module.reroute(x, before, fit=False)
    np.testing.assert_array_equal(kept, before[1])
    assert float(churn) == 0
    module.bias[...], churn = module.reroute(x, before)
    assert np.abs(load() - 64).max() <= 2
    np.testing.assert_allclose(churn, np.mean(was != module.route(x)), rtol=1e-6)
    assert float(churn) > 0.2
    # Without a state before there is nothing to compare with.
    assert float(module.reroute(x)[1]) == 0


def test_beta_is_estimated_again_where_it_is_asked_for():
    module = make(sparsity=Sparsity(m=16, v=8, reestimate_beta=True))
    module.apply_update(module.begin_sparse())
    module.w1[...] = 2 * module.w1[...] ** 3
    update = module.refresh()
    w1 = np.asarray(module.w1[...])[np.asarray(update.permutation)]
    np.testing.assert_allclose(update.beta[0], soft_threshold_beta(w1, 1), rtol=1e-5)
    np.testing.assert_allclose(update.beta[1], module.beta[1], rtol=1e-6)
