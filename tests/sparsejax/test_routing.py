"""Clusters and the order of neurons, against exact or brute-force solutions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from sparsejax.routing import (
    balanced_assignment,
    cluster_neurons,
    from_expert_major,
    interleave,
    permute_ffn,
    to_expert_major,
)


def objective(w: np.ndarray, assignment: np.ndarray, num_experts: int, metric: str) -> float:
    """What k-means minimises, from its definition: mean distance of neurons to their centre."""
    neurons = w.astype(np.float64)
    if metric == "cosine":
        neurons = neurons / np.linalg.norm(neurons, axis=1, keepdims=True)
    total = 0.0
    for e in range(num_experts):
        members = neurons[assignment == e]
        center = members.mean(axis=0)
        if metric == "cosine":
            total += np.sum(1 - members @ center / np.linalg.norm(center))
        else:
            total += np.sum((members - center) ** 2)
    return total / w.shape[0]


def mixture(
    num_clusters: int, width: int, hidden: int, noise: float, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Neurons around well separated centres, in shuffled order; and their true clusters."""
    rng = np.random.default_rng(seed)
    truth = rng.permutation(np.arange(hidden) % num_clusters)
    centers = rng.normal(size=(num_clusters, width))
    w = centers[truth] + noise * rng.normal(size=(hidden, width))
    return w.astype(np.float32), truth


def same_partition(a: np.ndarray, b: np.ndarray) -> bool:
    return len(set(zip(a.tolist(), b.tolist(), strict=True))) == len(set(a.tolist()))


@pytest.mark.parametrize("kind", ["normal", "skewed", "ties"])
def test_balanced_assignment_is_nearly_optimal(kind):
    rng = np.random.default_rng(1)
    experts, share = 8, 32
    scores = rng.normal(size=(experts, experts * share))
    if kind == "skewed":
        scores += 3 * rng.normal(size=(experts, 1))
    if kind == "ties":
        scores = np.round(scores)
    assignment = np.asarray(balanced_assignment(jnp.array(scores, jnp.float32))[0])
    np.testing.assert_array_equal(np.bincount(assignment, minlength=experts), share)
    got = scores[assignment, np.arange(scores.shape[1])].sum()
    rows, cols = linear_sum_assignment(np.repeat(scores, share, axis=0), maximize=True)
    best = np.repeat(scores, share, axis=0)[rows, cols].sum()
    random = scores.mean() * scores.shape[1]
    assert got <= best + 1e-3
    assert best - got < 1e-3 * (best - random)


@given(
    st.sampled_from([(1, 3), (2, 1), (4, 5), (8, 3)]),
    st.integers(0, 2**32 - 1),
    st.sampled_from(["equal", "one_wins", "integers", "huge"]),
)
def test_balance_is_exact_for_any_scores(size, seed, kind):
    experts, share = size
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(experts, experts * share))
    if kind == "equal":
        scores[:] = 1.0
    elif kind == "one_wins":
        scores[0] += 1e6
    elif kind == "integers":
        scores = np.round(scores)
    else:
        scores *= 1e30
    assignment, _ = jax.jit(balanced_assignment, static_argnames="sweeps")(
        jnp.array(scores, jnp.float32), sweeps=2
    )
    np.testing.assert_array_equal(np.bincount(assignment, minlength=experts), share)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_clusters_are_balanced_better_than_random_and_repeatable(metric, experts):
    w, _ = mixture(24, 16, 192, noise=0.5)
    w = w * np.exp(np.random.default_rng(3).normal(size=(192, 1))).astype(np.float32)
    clusters = cluster_neurons(jnp.array(w), experts, metric=metric)
    assignment = np.asarray(clusters.assignment)
    assert assignment.dtype == np.int32
    np.testing.assert_array_equal(np.bincount(assignment, minlength=experts), 192 // experts)
    again = cluster_neurons(jnp.array(w), experts, metric=metric)
    np.testing.assert_array_equal(again.assignment, assignment)
    np.testing.assert_array_equal(again.centers, clusters.centers)

    # Centres are those of the definition.
    neurons = w.astype(np.float64)
    if metric == "cosine":
        neurons = neurons / np.linalg.norm(neurons, axis=1, keepdims=True)
    for e in range(experts):
        center = neurons[assignment == e].mean(axis=0)
        if metric == "cosine":
            center /= np.linalg.norm(center)
        np.testing.assert_allclose(clusters.centers[e], center, rtol=2e-4, atol=1e-5)

    if experts > 1:
        found = objective(w, assignment, experts, metric)
        rng = np.random.default_rng(0)
        random = [objective(w, rng.permutation(192) % experts, experts, metric) for _ in range(20)]
        assert found < (0.99 if experts == 2 else 0.93) * min(random)


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_more_iterations_never_hurt(metric):
    w, _ = mixture(24, 16, 192, noise=0.5, seed=2)
    found = [
        objective(
            w,
            np.asarray(cluster_neurons(jnp.array(w), 4, metric=metric, iterations=n)[0]),
            4,
            metric,
        )
        for n in (1, 3, 12)
    ]
    assert found[-1] < found[0]
    assert all(b <= a + 1e-6 for a, b in itertools.pairwise(found))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
@pytest.mark.parametrize("experts", [2, 4, 8])
def test_planted_clusters_are_found(metric, experts):
    w, truth = mixture(experts, 32, 128, noise=0.15)
    clusters = cluster_neurons(jnp.array(w), experts, metric=metric)
    assert same_partition(truth, np.asarray(clusters.assignment))
    # In another order they are the same clusters.
    order = np.random.default_rng(5).permutation(128)
    permuted = cluster_neurons(jnp.array(w[order]), experts, metric=metric)
    np.testing.assert_array_equal(permuted.assignment, np.asarray(clusters.assignment)[order])


def test_refresh_starts_from_the_given_centers():
    w, _ = mixture(8, 32, 128, noise=0.15)
    first = cluster_neurons(jnp.array(w), 8)
    # Experts given in another order keep that order.
    order = np.random.default_rng(5).permutation(8)
    again = cluster_neurons(jnp.array(w), 8, init_centers=first.centers[order], iterations=1)
    np.testing.assert_array_equal(order[np.asarray(again.assignment)], first.assignment)


def test_cosine_ignores_lengths_and_zero_neurons_are_harmless():
    w, _ = mixture(4, 32, 64, noise=0.15)
    lengths = 2.0 ** np.random.default_rng(0).integers(-3, 4, (64, 1)).astype(np.float32)
    first = cluster_neurons(jnp.array(w), 4).assignment
    np.testing.assert_array_equal(cluster_neurons(jnp.array(w * lengths), 4).assignment, first)
    w[::4] = 0
    clusters = cluster_neurons(jnp.array(w), 4)
    np.testing.assert_array_equal(np.bincount(clusters.assignment), 16)
    assert np.isfinite(clusters.centers).all()


def test_layers_at_once():
    w = np.stack([mixture(4, 16, 32, noise=0.2, seed=s)[0] for s in range(3)])
    together = jax.vmap(lambda w: cluster_neurons(w, 4))(jnp.array(w)).assignment
    mapped = jax.lax.map(lambda w: cluster_neurons(w, 4), jnp.array(w)).assignment
    for layer in range(3):
        alone = cluster_neurons(jnp.array(w[layer]), 4).assignment
        np.testing.assert_array_equal(together[layer], alone)
        np.testing.assert_array_equal(mapped[layer], alone)


interleave_jit = jax.jit(interleave, static_argnums=1)


@given(st.sampled_from([(4, 8), (8, 8), (16, 64), (32, 96)]), st.integers(0, 2**32 - 1))
def test_interleave(size, seed):
    m, hidden = size
    assignment = np.random.default_rng(seed).permutation(hidden) % (m // 4)
    perm = np.asarray(interleave_jit(jnp.array(assignment, jnp.int32), m))
    np.testing.assert_array_equal(np.sort(perm), np.arange(hidden))
    for j in range(hidden):
        b, rest = divmod(j, m)
        e, r = divmod(rest, 4)
        assert b * m + 4 * e + r == j
        assert assignment[perm[j]] == e
        # Nobody moves without need.
        if assignment[j] == e:
            assert perm[j] == j
    # Applied, nothing is left to move.
    np.testing.assert_array_equal(
        interleave_jit(jnp.array(assignment[perm], jnp.int32), m), np.arange(hidden)
    )


@pytest.mark.parametrize("gated", [False, True])
def test_the_permutation_leaves_the_dense_function_alone(gated):
    rng = np.random.default_rng(0)
    x, w1, w2, wg = (rng.normal(size=s) for s in ((20, 16), (64, 16), (64, 16), (64, 16)))
    perm = np.asarray(interleave(cluster_neurons(jnp.array(w1, jnp.float32), 4).assignment, 16))
    assert (perm != np.arange(64)).sum() > 16
    v1, v2, vg = w1[perm], w2[perm], wg[perm] if gated else None
    # The library moves float32 weights in the same way.
    moved = permute_ffn(*(jnp.array(w, jnp.float32) for w in (w1, w2)), jnp.array(perm))
    np.testing.assert_array_equal(moved[0], v1.astype(np.float32))
    np.testing.assert_array_equal(moved[1], v2.astype(np.float32))
    assert moved[2] is None
    if gated:
        one, two, gate = (jnp.array(w, jnp.float32) for w in (w1, w2, wg))
        np.testing.assert_array_equal(
            permute_ffn(one, two, jnp.array(perm), gate)[2], wg[perm].astype(np.float32)
        )

    def ffn(w1, w2, wg):
        y2 = np.maximum(x @ w1.T, 0) ** 2
        return (y2 if wg is None else y2 * (x @ wg.T)) @ w2

    before = ffn(w1, w2, wg if gated else None)
    after = ffn(v1, v2, vg)
    np.testing.assert_allclose(after, before, rtol=1e-12, atol=1e-12 * np.abs(before).max())

    # Pre-activations are the same numbers to the last bit, in the precision of training too.
    a = jnp.array(x, jnp.float32)
    b, c = jnp.array(w1, jnp.float32), jnp.array(v1, jnp.float32)
    np.testing.assert_array_equal(np.asarray(a @ c.T), np.asarray(a @ b.T)[:, perm])


@pytest.mark.parametrize("axis", [0, 1])
def test_expert_major_order(axis):
    m, experts, hidden = 16, 4, 48
    w = np.random.default_rng(0).normal(size=(5, hidden) if axis else (hidden, 5))
    split = np.asarray(to_expert_major(jnp.array(w), axis, experts))
    for e in range(experts):
        own = [n for n in range(hidden) if n % m // 4 == e]
        np.testing.assert_array_equal(split[e], np.take(w, own, axis=axis).astype(np.float32))
    np.testing.assert_array_equal(from_expert_major(jnp.array(split), axis), w.astype(np.float32))


def test_bad_arguments():
    w = jnp.ones((12, 8))
    with pytest.raises(ValueError, match="hidden=12"):
        cluster_neurons(w, 8)
    with pytest.raises(ValueError, match="metric='dot'"):
        cluster_neurons(w, 4, metric="dot")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="iterations=0"):
        cluster_neurons(w, 4, iterations=0)
    with pytest.raises(ValueError, match="init_centers"):
        cluster_neurons(w, 4, init_centers=jnp.ones((4, 9)))
    with pytest.raises(ValueError, match="matrix"):
        cluster_neurons(w[0], 4)
    with pytest.raises(ValueError, match="size=12"):
        balanced_assignment(jnp.ones((5, 12)))
    with pytest.raises(ValueError, match="hidden=12"):
        interleave(jnp.zeros((12,), jnp.int32), 8)
    with pytest.raises(ValueError, match="m=6"):
        interleave(jnp.zeros((12,), jnp.int32), 6)
    with pytest.raises(ValueError, match="neurons"):
        permute_ffn(w, w, jnp.arange(11))
    with pytest.raises(ValueError, match="hidden=12"):
        to_expert_major(w, 0, 2)
