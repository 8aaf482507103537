"""Routing within the experts of a mixture: clusters of one expert's neurons, one of them a token.

E experts of S clusters make E S groups; group g = s E + e is cluster s of expert e. In the order of
`interleave` with M' = 4 E S, group g has the columns 4 g to 4 g + 3 of every block of M'. Since M'
is a multiple of M = 4 E and 4 g mod M = 4 e, these are columns of expert e in blocks of M as well:
one order of the neurons serves the mixture with whole experts (M) and with clusters (M'), and a
clustering moves neurons within their experts only.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sparsejax.routing.clustering import cluster_neurons
from sparsejax.routing.neurons import from_expert_major, interleave, to_expert_major
from sparsejax.routing.tokens import fit_bias, update_bias
from sparsejax.spec import GROUP, Metric


def _by_expert(groups: Array, num_experts: int) -> Array:
    """(E S, ...) to (E, S, ...)."""
    return groups.reshape(-1, num_experts, *groups.shape[1:]).swapaxes(0, 1)


def _by_group(clusters: Array) -> Array:
    """Inverse of `_by_expert`: (E, S, ...) to (E S, ...)."""
    return clusters.swapaxes(0, 1).reshape(-1, *clusters.shape[2:])


def cluster_within_experts(
    w1: Array,
    num_experts: int,
    clusters: int,
    *,
    metric: Metric = "cosine",
    iterations: int = 10,
    init_centers: Array | None = None,
) -> tuple[Array, Array, Array]:
    """Balanced clusters of each expert's neurons (`cluster_neurons`, expert by expert).

    Args:
      w1: (H, D), in interleaved order of E experts, H a multiple of 4 E S.
      num_experts: E. clusters: S.
      metric, iterations: as for `cluster_neurons`.
      init_centers: (E S, D) to start from, or None.

    Returns:
      permutation (H,) int32 (new neuron j is old neuron permutation[j], of the same expert) that
      makes the order that of E S groups; centers (E S, D) float32; and the share of neurons that
      were in another cluster's place, scalar float32.

    Raises:
      ValueError: shapes or numbers that do not fit.
    """
    block = GROUP * num_experts * clusters
    if num_experts < 1 or clusters < 1 or w1.ndim != 2 or w1.shape[0] % block:
        raise ValueError(
            f"{w1.shape=} must be (hidden, width), hidden a multiple of {GROUP} {num_experts=} "
            f"{clusters=}"
        )
    hidden, own_block = w1.shape[0], GROUP * clusters

    def one(w1: Array, centers: Array | None) -> tuple[Array, Array, Array]:
        found = cluster_neurons(
            w1, clusters, metric=metric, iterations=iterations, init_centers=centers
        )
        # Of one expert's neurons alone, each four of a block of M' are four of a block of 4 S.
        place = jnp.arange(hidden // num_experts, dtype=jnp.int32)
        moved = found.assignment != place % own_block // GROUP
        return interleave(found.assignment, own_block), found.centers, moved

    start = None if init_centers is None else _by_expert(init_centers, num_experts)
    own = to_expert_major(w1, 0, num_experts)
    order, centers, moved = jax.vmap(one, in_axes=(0, None if start is None else 0))(own, start)
    neuron = to_expert_major(jnp.arange(hidden, dtype=jnp.int32), 0, num_experts)
    permutation = from_expert_major(jnp.take_along_axis(neuron, order, axis=1), 0)
    return permutation, _by_group(centers), jnp.mean(moved, dtype=jnp.float32)


def choose_groups(scores: Array, bias: Array, experts: Array, num_experts: int) -> Array:
    """The group that a token meets of each of its experts: the best score plus bias of the expert's
    clusters, ties to the lower index.

    Args:
      scores: (T, E S) from `token_scores`. bias: (E S,).
      experts: (T, k) int32 in 0..E-1. num_experts: E.

    Returns:
      (T, k) int32 in 0..E S - 1.
    """
    of_clusters = (scores + bias).reshape(scores.shape[0], -1, num_experts)
    best = jnp.argmax(of_clusters, axis=1).astype(jnp.int32)
    return jnp.take_along_axis(best, experts, axis=1) * num_experts + experts


def fit_within_experts(scores: Array, bias: Array, experts: Array, num_experts: int) -> Array:
    """The biases under which the clusters of each expert share its tokens evenly (`fit_bias`).

    Args:
      scores, bias, experts, num_experts: as for `choose_groups`.

    Returns:
      (E S,) float32, of mean zero within each expert.
    """
    members = jnp.any(experts[..., None] == jnp.arange(num_experts), axis=1)
    fitted = jax.vmap(fit_bias)(
        _by_expert(scores.T, num_experts).swapaxes(1, 2), _by_expert(bias, num_experts), members.T
    )
    return _by_group(fitted)


def update_within_experts(bias: Array, counts: Array, num_experts: int, rate: ArrayLike) -> Array:
    """`update_bias` of each expert's clusters, whose loads are compared with their own mean.

    Args:
      bias: (E S,) float32. counts: (E S,), tokens of each group. num_experts: E. rate: scalar.

    Returns:
      (E S,) float32.
    """
    own = (_by_expert(a, num_experts) for a in (bias, counts))
    return _by_group(update_bias(*own, rate))


def expert_counts(counts: Array, num_experts: int) -> Array:
    """(E S,) tokens of groups to (E,) tokens of experts."""
    return jnp.sum(_by_expert(counts, num_experts), axis=1)
