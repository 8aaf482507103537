"""Mixtures of experts: dense and sparse against loops over tokens in numpy, loads, refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from kernels.hopper.grouped_common import PART
from sparsejax.nn import MoEFFN
from sparsejax.ops.grouped_dot import group_rows, grouped_dot
from sparsejax.prune import select24, soft_threshold, top2_of_4
from sparsejax.routing import choose_groups, to_expert_major, token_scores, update_bias
from sparsejax.spec import SMALLEST_CLUSTER, Sparsity

D, H, E, K, T = 16, 128, 4, 2, 48
SPARSITY = Sparsity(m=16, v=8, backend="reference")


def make(dtype=jnp.float32, **options) -> MoEFFN:
    options = {"num_experts": E, "experts_per_token": K, "sparsity": SPARSITY} | options
    return MoEFFN(D, H, dtype=dtype, rngs=nnx.Rngs(params=0), **options)


def inputs() -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, T // 2, D))


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def by_expert(w, num_experts=E) -> np.ndarray:
    return float64(to_expert_major(w, 0, num_experts))


def expected(moe: MoEFFN, x, w1, w2, keep_two: bool) -> np.ndarray:
    """Token by token: scores, the best k with the bias, gates of the scores alone."""
    rows, router = float64(x).reshape(-1, D), float64(moe.router[...])
    out = np.zeros((rows.shape[0], D))
    for t, row in enumerate(rows):
        scores = 1 / (1 + np.exp(-router @ row))
        chosen = np.argsort(-(scores + float64(moe.bias[...])), kind="stable")[
            : moe.experts_per_token
        ]
        for e in chosen:
            y2 = np.maximum(w1[e] @ row, 0) ** 2
            if keep_two:
                y2 = float64(top2_of_4(jnp.asarray(y2, jnp.float32)))
            # One of several is weighed by its score: scaled to one it would say nothing.
            total = 1.0 if len(chosen) == 1 else scores[chosen].sum()
            out[t] += scores[e] / total * (y2 @ w2[e])
    return out.reshape(x.shape)


@pytest.mark.core
@pytest.mark.parametrize("experts_per_token", [1, 2, 4])
def test_dense_experts(experts_per_token):
    moe, x = make(experts_per_token=experts_per_token), inputs()
    moe.bias[...] = jnp.asarray([0.3, -0.2, 0.1, -0.2])
    y, stats = nnx.jit(lambda m, x: m(x))(moe, x)
    reference = expected(moe, x, by_expert(moe.w1[...]), by_expert(moe.w2[...]), False)
    np.testing.assert_allclose(y, reference, rtol=1e-4, atol=1e-5)
    # Nothing is dropped: every token meets all of its experts.
    assert int(stats.counts.sum()) == experts_per_token * T
    chosen = np.asarray(moe.route(x).experts)
    np.testing.assert_array_equal(stats.counts, np.bincount(chosen.ravel(), minlength=E))


@pytest.mark.parametrize("experts_per_token", [1, 2])
def test_the_router_learns(experts_per_token):
    moe, x = make(experts_per_token=experts_per_token), inputs()
    found = nnx.grad(lambda moe: jnp.sum(jnp.square(moe(x)[0])))(moe)["router"][...]
    # The derivative of one entry, by a difference that no token's choice depends on.
    at, step = np.unravel_index(int(jnp.argmax(jnp.abs(found))), found.shape), 1e-3
    values = []
    for sign in (1, -1):
        other = make(experts_per_token=experts_per_token)
        other.router[...] = other.router[...].at[at].add(sign * step)
        np.testing.assert_array_equal(other.route(x).experts, moe.route(x).experts)
        values.append(float(jnp.sum(jnp.square(other(x)[0]))))
    slope = (values[0] - values[1]) / (2 * step)
    assert abs(slope) > 1e-2
    np.testing.assert_allclose(found[at], slope, rtol=2e-2)


@pytest.mark.core
@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("weights", [True, False])
def test_sparse_experts(weights, activations):
    sparsity = Sparsity(m=16, v=8, backend="reference", weights=weights, activations=activations)
    moe, x = make(sparsity=sparsity), inputs()
    moe.beta[...] = moe.begin_sparse().beta
    y, stats = nnx.jit(lambda m, x: m(x, m.pack()))(moe, x)
    w1, w2 = moe.w1[...], moe.w2[...]
    if weights:
        w1, w2 = (b * soft_threshold(w, 1) for b, w in zip(moe.beta[...], (w1, w2), strict=False))
    reference = expected(moe, x, by_expert(w1), by_expert(w2), activations)
    np.testing.assert_allclose(y, reference, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(stats.counts, moe(x)[1].counts)


def clustered(experts: int, clusters: int, **options) -> MoEFFN:
    """A mixture with its neurons clustered, with biases at both levels."""
    sparsity = Sparsity(m=4 * experts * clusters, v=8, backend="reference", **options)
    hidden = SMALLEST_CLUSTER * experts * clusters
    moe = MoEFFN(
        D,
        hidden,
        num_experts=experts,
        experts_per_token=min(2, experts),
        sparsity=sparsity,
        dtype=jnp.float32,
        rngs=nnx.Rngs(params=0),
    )
    moe.apply_update(moe.begin_sparse())
    keys = jax.random.split(jax.random.key(5))
    moe.bias[...] = 0.1 * jax.random.normal(keys[0], (experts,))
    moe.cluster_bias[...] = 0.1 * jax.random.normal(keys[1], (experts * clusters,))
    return moe


@pytest.mark.core
@pytest.mark.parametrize(
    ("experts", "clusters", "metric"),
    # M = 64 and 128 among them.
    [(8, 2, "cosine"), (8, 4, "cosine"), (1, 4, "l2")],
)
def test_experts_routed_further(experts, clusters, metric):
    """A token meets one cluster of each of its experts: the oracle goes token by token."""
    moe, x = clustered(experts, clusters, metric=metric), inputs()
    k = moe.experts_per_token
    y, stats = nnx.jit(lambda m, x: m(x, m.pack()))(moe, x)
    w1, w2 = (
        by_expert(b * soft_threshold(w[...], 1), experts * clusters)
        for b, w in zip(moe.beta[...], (moe.w1, moe.w2), strict=False)
    )
    rows, centers = float64(x).reshape(-1, D), float64(moe.centers[...])
    norms = np.linalg.norm(centers, axis=1)
    counts, out = np.zeros(experts * clusters, int), np.zeros((T, D))
    for t, row in enumerate(rows):
        scores = 1 / (1 + np.exp(-float64(moe.router[...]) @ row))
        chosen = np.argsort(-(scores + float64(moe.bias[...])), kind="stable")[:k]
        for e in chosen:
            length = np.linalg.norm(row)
            near = centers @ row / (norms * length)
            if metric == "l2":
                near = (centers @ row - norms**2 / 2) / (length * norms.mean())
            g = e + experts * np.argmax((near + float64(moe.cluster_bias[...]))[e::experts])
            counts[g] += 1
            y2 = float64(top2_of_4(jnp.asarray(np.maximum(w1[g] @ row, 0) ** 2, jnp.float32)))
            out[t] += scores[e] / scores[chosen].sum() * (y2 @ w2[g])
    np.testing.assert_array_equal(stats.counts, counts)
    np.testing.assert_allclose(y, out.reshape(x.shape), rtol=1e-4, atol=1e-5)


def test_clustering_leaves_the_dense_mixture_what_it_is():
    sparsity = Sparsity(m=32, v=8, backend="reference")
    moe = MoEFFN(D, 2048, num_experts=4, sparsity=sparsity, dtype=jnp.float32,
                 rngs=nnx.Rngs(params=0))  # fmt: skip
    structure, x = jax.tree.structure(nnx.state(moe)), inputs()
    assert not np.asarray(moe.centers[...]).any()
    before, y = by_expert(moe.w1[...]), moe(x)[0]
    update = moe.begin_sparse()
    moe.apply_update(update)
    assert float(update.churn) > 0.2
    np.testing.assert_allclose(moe(x)[0], y, rtol=1e-4, atol=1e-5)
    # Each expert has its neurons, in another order.
    for old, new in zip(before, by_expert(moe.w1[...]), strict=True):
        np.testing.assert_array_equal(np.sort(old, axis=0), np.sort(new, axis=0))
    assert jax.tree.structure(nnx.state(moe)) == structure
    again = moe.refresh()
    np.testing.assert_array_equal(again.beta, moe.beta[...])
    assert float(again.churn) < 0.1
    # Clusters keep their identity.
    assert (np.sum(again.centers * moe.centers[...], axis=1) > 0.85).all()


def test_biases_of_both_levels():
    moe, x = clustered(4, 4), jax.random.normal(jax.random.key(3), (512, D)) + 0.5
    moe.bias[...] = jnp.zeros(4)
    loads = lambda: np.asarray(moe(x, moe.pack())[1].counts).reshape(4, 4)
    before, previous = loads(), moe.clustering()
    kept, churn = moe.reroute(x, previous, fit=False)
    assert float(churn) == 0
    np.testing.assert_array_equal(kept["cluster_bias"], previous[1])
    biases, churn = moe.reroute(x, previous)
    assert 0.05 < float(churn) < 1
    for name, bias in biases.items():
        getattr(moe, name)[...] = bias
    after = loads()
    assert (before.max(0) / before.mean(0)).max() > 1.5
    assert (after.max(0) / after.mean(0)).max() < 1.2
    # Experts have biases now, which stay, and were zero before.
    assert np.asarray(biases["bias"]).any()
    np.testing.assert_array_equal(moe.reroute(x)[0]["bias"], biases["bias"])


def test_gradients_of_experts_routed_further_are_those_of_the_rows():
    """Of whole experts whose other clusters' activations are masked out."""
    moe, x = clustered(4, 2, weights=False), inputs().reshape(-1, D)
    graph, params, rest = nnx.split(moe, nnx.Param, ...)

    def ours(params, x):
        m = nnx.merge(graph, params, rest)
        return jnp.sum(m(x, m.pack())[0] ** 2)

    experts = moe.route(x).experts
    near = token_scores(x, moe.centers[...]) + moe.cluster_bias[...]
    group = choose_groups(near, moe.cluster_bias[...] * 0, experts, 4)

    def masked(params, x):
        w1, w2, router = (params[n][...] for n in ("w1", "w2", "router"))
        y2 = jnp.square(jax.nn.relu(jnp.einsum("td,ghd->tgh", x, to_expert_major(w1, 0, 8))))
        y2 = jnp.where(jax.lax.stop_gradient(select24(y2)), y2, 0)
        y = jnp.einsum("tgh,ghd->tgd", y2, to_expert_major(w2, 0, 8))
        mine = jnp.take_along_axis(jax.nn.sigmoid(x @ router.T), experts, 1)
        gates = mine / jnp.sum(mine, 1, keepdims=True)
        picked = jnp.take_along_axis(y, group[..., None], 1)
        return jnp.sum(jnp.sum(gates[..., None] * picked, 1) ** 2)

    for a, b in zip(*(jax.tree.leaves(jax.jit(jax.grad(f, argnums=(0, 1)))(params, x))
                      for f in (ours, masked)), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_the_smallest_cluster_is_the_tile_of_the_kernels():
    assert SMALLEST_CLUSTER == 2 * PART


def test_a_sparse_network_without_sparsity_is_the_dense_one():
    """The two phases share routing, gates and layout: only the zeros differ."""
    sparsity = Sparsity(m=16, v=8, backend="reference", weights=False, activations=False)
    moe, x = make(sparsity=sparsity), inputs()

    def loss(state, x, sparse):
        m = nnx.merge(graph, state)
        return jnp.sum(m(x, m.pack() if sparse else None)[0] ** 2)

    graph, state = nnx.split(moe)
    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)), static_argnums=2)
    (dense, dense_grads), (sparse, sparse_grads) = (gradient(state, x, s) for s in (False, True))
    np.testing.assert_allclose(dense, sparse, rtol=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (dense_grads, sparse_grads)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    found = dense_grads[0]
    assert float(jnp.abs(found["router"][...]).max()) > 0
    # The bias chooses, and has no gradient.
    assert not np.asarray(found["bias"][...]).any()


def test_dense_gradients_are_those_of_all_experts_masked():
    moe, x = make(), inputs().reshape(-1, D)

    def masked(params, x):
        w1, w2, router = params
        chosen = moe.route(x)
        y2 = jnp.square(jax.nn.relu(jnp.einsum("td,ehd->teh", x, to_expert_major(w1, 0, E))))
        y = jnp.einsum("teh,ehd->ted", y2, to_expert_major(w2, 0, E))
        scores = jax.nn.sigmoid(x @ router.T)
        mine = jnp.take_along_axis(scores, chosen.experts, 1)
        gates = mine / jnp.sum(mine, 1, keepdims=True)
        picked = jnp.take_along_axis(y, chosen.experts[..., None], 1)
        return jnp.sum(jnp.sum(gates[..., None] * picked, 1) ** 2)

    def ours(params, x):
        m = make()
        m.w1[...], m.w2[...], m.router[...] = params
        return jnp.sum(m(x)[0] ** 2)

    params = moe.w1[...], moe.w2[...], moe.router[...]
    for a, b in zip(*(jax.tree.leaves(jax.jit(jax.grad(f, argnums=(0, 1)))(params, x))
                      for f in (ours, masked)), strict=True):  # fmt: skip
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_the_bias_evens_loads():
    moe, x = make(), inputs() + 1.0
    graph, state = nnx.split(moe)

    @jax.jit
    def counts(bias, x, state=state):
        m = nnx.merge(graph, state)
        m.bias = m.bias.replace(bias)
        return m(x)[1].counts

    bias = jnp.zeros(E)
    first = np.asarray(counts(bias, x))
    for _ in range(200):
        bias = update_bias(bias, counts(bias, x), 0.02)
    last = np.asarray(counts(bias, x))
    assert first.max() > 1.3 * K * T / E
    assert last.max() < 1.15 * K * T / E


def test_interface_of_the_routed_network():
    moe, x = make(), inputs()
    update = moe.begin_sparse()
    np.testing.assert_array_equal(update.permutation, np.arange(H))
    assert float(update.churn) == 0
    assert 1.2 < float(update.beta[0]) < 1.8
    np.testing.assert_array_equal(moe.refresh().beta, np.ones(3))
    biases, churn = moe.reroute(x, None)
    assert ({n: b.shape for n, b in biases.items()}, float(churn)) == ({"bias": (E,)}, 0)
    moe.bias[...] = jnp.arange(4.0)
    np.testing.assert_array_equal(moe.reroute(x, None)[0]["bias"], np.arange(4.0))
    with pytest.raises(ValueError, match="sparsity=None"):
        make(sparsity=None).pack()


@pytest.mark.core
@pytest.mark.parametrize("sizes", [[10, 0, 25, 5], [0, 0, 0, 40], [40, 0, 0, 0]])
def test_grouped_dot(sizes):
    keys = jax.random.split(jax.random.key(0), 2)
    x, w = jax.random.normal(keys[0], (40, 8)), jax.random.normal(keys[1], (4, 8, 12))
    got = grouped_dot(x, w, jnp.asarray(sizes, jnp.int32))
    group = np.repeat(np.arange(4), sizes)
    reference = np.einsum("rk,rkn->rn", float64(x), float64(w)[group])
    np.testing.assert_allclose(got, reference, rtol=1e-5, atol=1e-5)


def test_group_rows():
    group = jnp.asarray([2, 0, 2, 1, 0, 2], jnp.int32)
    order, inverse, sizes = group_rows(group, 4)
    np.testing.assert_array_equal(order, [1, 4, 3, 0, 2, 5])
    np.testing.assert_array_equal(np.asarray(order)[np.asarray(inverse)], np.arange(6))
    np.testing.assert_array_equal(sizes, [2, 1, 3, 0])


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"num_experts": 3}, "num_experts=3"),
        ({"experts_per_token": 5}, "experts_per_token=5"),
        ({"sparsity": Sparsity(m=8, v=8)}, "m=8"),
        ({"sparsity": Sparsity(m=32, v=8)}, "m=32 makes 2 clusters of 16 neurons"),
        ({"num_experts": 2, "sparsity": Sparsity(m=256, v=8)}, "m=256"),
        ({"sparsity": Sparsity(m=16, v=8, routing=False)}, "routing=False"),
        ({"sparsity": Sparsity(m=16, v=8, shards=2)}, "shards=2"),
    ],
)
def test_refusals_name_the_value(options, named):
    with pytest.raises(ValueError, match=re.escape(named)):
        make(**options)


def test_grouped_dot_refuses():
    x, w, sizes = jnp.ones((4, 8)), jnp.ones((2, 8, 3)), jnp.ones(2, jnp.int32)
    for arguments, named in (
        ((x, w[:, :4], sizes), "w.shape"),
        ((x, w.astype(jnp.bfloat16), sizes), "x.dtype"),
        ((x, w, sizes.astype(jnp.float32)), "int32"),
    ):
        with pytest.raises(ValueError, match=named):
            grouped_dot(*arguments)
    with pytest.raises(ValueError, match="backend='cutlass'"):
        grouped_dot(x, w, sizes, backend="cutlass")
