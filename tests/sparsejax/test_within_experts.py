"""Clusters within experts: one order of neurons for both levels, even loads, choice, refusals."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsejax.routing import (
    choose_groups,
    cluster_within_experts,
    expert_counts,
    fit_within_experts,
    interleave,
    update_within_experts,
)


def owner(hidden: int, groups: int) -> np.ndarray:
    """Of each column in the order of so many groups."""
    return np.arange(hidden) % (4 * groups) // 4


@given(
    experts=st.integers(1, 6), clusters=st.integers(1, 5), blocks=st.integers(1, 4), data=st.data()
)
@settings(max_examples=15, deadline=None)
def test_one_order_serves_both_levels(experts, clusters, blocks, data):
    """Group s E + e has columns of expert e only, and any reordering by groups of neurons that stay
    with their expert leaves them in its columns."""
    groups = experts * clusters
    hidden = 4 * groups * blocks
    np.testing.assert_array_equal(owner(hidden, groups) % experts, owner(hidden, experts))
    # Any assignment of equal sizes in which every neuron goes to a cluster of its own expert.
    seed = data.draw(st.integers(0, 2**31))
    rng = np.random.default_rng(seed)
    assignment = np.empty(hidden, np.int32)
    for e in range(experts):
        own = np.flatnonzero(owner(hidden, experts) == e)
        assignment[rng.permutation(own)] = np.repeat(np.arange(clusters), 4 * blocks) * experts + e
    permutation = np.asarray(interleave(jnp.asarray(assignment), 4 * groups))
    np.testing.assert_array_equal(np.sort(permutation), np.arange(hidden))
    np.testing.assert_array_equal(assignment[permutation], owner(hidden, groups))
    np.testing.assert_array_equal(owner(hidden, experts)[permutation], owner(hidden, experts))


@pytest.mark.parametrize("metric", ["cosine", "l2"])
def test_clusters_of_each_expert(metric):
    """Each expert's neurons come from two directions of its own: those are found, in halves."""
    experts, clusters, width, hidden = 4, 2, 8, 256
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(clusters, experts, width)).astype(np.float32)
    kind = np.empty(hidden, int)
    for e in range(experts):
        own = np.flatnonzero(owner(hidden, experts) == e)
        kind[rng.permutation(own)] = np.repeat([0, 1], len(own) // 2)
    w1 = directions[kind, owner(hidden, experts)] + 0.01 * rng.normal(size=(hidden, width))
    w1 = jnp.asarray(w1, jnp.float32)
    permutation, centers, churn = cluster_within_experts(w1, experts, clusters, metric=metric)
    np.testing.assert_array_equal(np.sort(permutation), np.arange(hidden))
    mine = owner(hidden, experts)
    np.testing.assert_array_equal(mine[np.asarray(permutation)], mine)
    group, new = owner(hidden, experts * clusters), np.asarray(w1)[np.asarray(permutation)]
    for g in range(experts * clusters):
        assert len(set(kind[np.asarray(permutation)][group == g])) == 1
        mean = new[group == g].mean(0)
        mean = mean / np.linalg.norm(mean) if metric == "cosine" else mean
        np.testing.assert_allclose(centers[g], mean, atol=1e-2)
    assert 0.2 < float(churn) < 0.8
    # From where it is, nothing moves, and centres keep their places.
    again = cluster_within_experts(
        w1[permutation], experts, clusters, metric=metric, init_centers=centers
    )
    np.testing.assert_array_equal(again[0], np.arange(hidden))
    np.testing.assert_allclose(again[1], centers, atol=1e-5)
    assert float(again[2]) == 0


def problem(tokens=256, experts=4, clusters=4, k=2):
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(tokens, experts * clusters)) + rng.normal(size=experts * clusters)
    chosen = np.argsort(rng.normal(size=(tokens, experts)) + np.arange(experts) / 4)[:, -k:]
    return jnp.asarray(scores, jnp.float32), jnp.asarray(chosen, jnp.int32)


def loads(scores, bias, chosen, experts=4):
    group = np.asarray(choose_groups(scores, bias, chosen, experts))
    return np.bincount(group.ravel(), minlength=scores.shape[1])


def test_a_token_meets_the_best_cluster_of_each_expert():
    scores, chosen = problem()
    bias = jnp.asarray(np.random.default_rng(2).normal(size=16), jnp.float32)
    got = np.asarray(choose_groups(scores, bias, chosen, 4))
    total = np.asarray(scores) + np.asarray(bias)
    for t, experts in enumerate(np.asarray(chosen)):
        for j, e in enumerate(experts):
            assert got[t, j] == e + 4 * np.argmax(total[t, e::4])


def test_loads_are_evened_within_experts():
    """At once, and step by step; how many tokens an expert has is left as it is."""
    scores, chosen = problem()
    zero = jnp.zeros(16)
    before = loads(scores, zero, chosen).reshape(4, 4)
    assert np.ptp(before.sum(0)) > 20
    assert (before.max(0) / before.mean(0)).max() > 1.5
    np.testing.assert_array_equal(expert_counts(jnp.asarray(before.ravel()), 4), before.sum(0))
    fitted = fit_within_experts(scores, zero, chosen, 4)
    stepped = zero
    for _ in range(300):
        counts = jnp.asarray(loads(scores, stepped, chosen))
        stepped = update_within_experts(stepped, counts, 4, 0.02)
    for bias, limit in ((fitted, 1.1), (stepped, 1.15)):
        after = loads(scores, bias, chosen).reshape(4, 4)
        np.testing.assert_array_equal(after.sum(0), before.sum(0))
        assert (after.max(0) / after.mean(0)).max() < limit
        np.testing.assert_allclose(bias.reshape(4, 4).sum(0), 0, atol=1e-5)


def test_experts_with_few_tokens_or_none():
    scores, chosen = problem(k=1)
    chosen = jnp.where(jnp.arange(256)[:, None] < 3, chosen * 0, chosen * 0 + 2)
    start = jnp.asarray(np.tile([[0.2], [-0.2], [0.1], [-0.1]], (1, 4)).ravel(), jnp.float32)
    bias = np.asarray(fit_within_experts(scores, start, chosen, 4)).reshape(4, 4)
    assert np.isfinite(bias).all()
    # Expert 0 has three tokens, 1 and 3 none: fewer than clusters, and they keep what they had.
    np.testing.assert_allclose(
        bias[:, [0, 1, 3]], np.asarray(start).reshape(4, 4)[:, :3], atol=1e-6
    )
    assert not np.allclose(bias[:, 2], np.asarray(start)[::4])
    counts = jnp.zeros(16, jnp.int32).at[2].set(8)
    stepped = np.asarray(update_within_experts(jnp.zeros(16), counts, 4, 0.1)).reshape(4, 4)
    np.testing.assert_array_equal(stepped[:, [0, 1, 3]], 0)
    assert stepped[0, 2] < 0 < stepped[1, 2]


def test_fits_are_those_of_the_members_alone():
    scores, chosen = problem(k=1)
    fitted = np.asarray(
        jax.jit(fit_within_experts, static_argnums=3)(scores, jnp.zeros(16), chosen, 4)
    )
    for e in range(4):
        own = np.asarray(scores)[np.asarray(chosen)[:, 0] == e][:, e::4]
        alone = fit_within_experts(
            jnp.asarray(own), jnp.zeros(4), jnp.zeros((len(own), 1), jnp.int32), 1
        )
        np.testing.assert_allclose(fitted[e::4], alone, atol=1e-5)


@pytest.mark.parametrize(("shape", "experts", "clusters"), [((48, 8), 4, 2), ((32, 8), 0, 2)])
def test_refusals_name_the_value(shape, experts, clusters):
    with pytest.raises(ValueError, match=re.escape(str(shape))):
        cluster_within_experts(jnp.ones(shape), experts, clusters)
