"""Balanced k-means over the rows of W1, one a neuron: which neurons make an expert."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array

from sparsejax.spec import Metric

_SWEEPS = 3
"""Passes over the experts' prices in one assignment; prices carry over between iterations."""


class Clusters(NamedTuple):
    """Result of `cluster_neurons`."""

    assignment: Array
    """(H,) int32: the expert of each neuron; every expert has exactly H / E."""
    centers: Array
    """(E, D) float32: unit vectors for "cosine", means of neurons for "l2"."""


def _product(a: Array, b: Array) -> Array:
    # Not TF32: clustering is rare and cheap, and should not depend on the device's defaults.
    return jnp.matmul(a, b, precision="highest", preferred_element_type=jnp.float32)


def _inverse(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def _unit(x: Array, axis: int) -> Array:
    return x * _inverse(jnp.linalg.norm(x, axis=axis, keepdims=True))


def balancing_prices(
    scores: Array, prices: Array, sweeps: int, members: Array | None = None
) -> Array:
    """Coordinate ascent on the dual of the balanced assignment problem.

    An expert's price is set to the value at which exactly its share of the neurons (or tokens)
    prefers it, the other prices being what they are. E sorts a sweep, no loop on the host.

    Args:
      scores: (E, N) float32, larger is better; N at least E.
      prices: (E,) float32 to start from.
      sweeps: passes over all experts.
      members: (N,) bool, the neurons (or tokens) that count; None for all. With fewer than E of
        them prices stay.

    Returns:
      (E,) float32 of mean zero; `argmax(scores - prices[:, None], axis=0)` is about balanced.
    """
    num_experts, size = scores.shape
    count = size if members is None else jnp.sum(members, dtype=jnp.int32)
    share = count // num_experts

    def set_price(i: Array, prices: Array) -> Array:
        expert = i % num_experts
        own = jnp.arange(num_experts) == expert
        net = jnp.where(own[:, None], -jnp.inf, scores - prices[:, None])
        gap = scores[expert] - jnp.max(net, axis=0)
        # Who does not count comes never: below all others, where no price is looked for.
        gap = jnp.sort(gap if members is None else jnp.where(members, gap, -jnp.inf))
        # Between the last neuron that should come and the first that should not.
        price = 0.5 * (gap[size - share] + gap[size - share - 1])
        if members is not None:
            price = jnp.where(share > 0, price, prices[expert])
        return prices.at[expert].set(price)

    prices = jax.lax.fori_loop(0, sweeps * num_experts, set_price, prices)
    return prices - jnp.mean(prices)


def _evict(net: Array) -> Array:
    """Best expert of each neuron, then overflow moved on until every expert has its exact share.

    Full experts keep the neurons that would lose most by leaving and are closed; the others go to
    their best expert that is still open. A round with overflow closes at least one expert for good,
    so E rounds are enough for any scores.
    """
    num_experts, size = net.shape
    share = size // num_experts
    index = jnp.arange(size, dtype=jnp.int32)
    choice = jnp.argmax(net, axis=0).astype(jnp.int32)

    def one_round(_: Array, choice: Array) -> Array:
        counts = jnp.bincount(choice, length=num_experts)
        is_open = counts < share
        elsewhere = jnp.where(is_open[:, None], net, -jnp.inf)
        second = jnp.argmax(elsewhere, axis=0).astype(jnp.int32)
        # -inf when no expert is open, but then none overflows and nobody leaves.
        loss = jnp.take_along_axis(net, choice[None], axis=0)[0] - jnp.max(elsewhere, axis=0)
        _, _, order = jax.lax.sort((choice, -loss, index), num_keys=2, is_stable=True)
        rank = jnp.zeros_like(index).at[order].set(index) - (jnp.cumsum(counts) - counts)[choice]
        return jnp.where(rank >= share, second, choice)

    return jax.lax.fori_loop(0, num_experts, one_round, choice)


def balanced_assignment(
    scores: Array, prices: Array | None = None, sweeps: int = 8
) -> tuple[Array, Array]:
    """Assigns N neurons to E experts, N / E each, for a large sum of scores.

    Prices make the experts equally wanted (an auction by coordinate ascent), and the few neurons
    that still overflow move to the best expert with room. The balance is exact for any finite
    scores; the sum is within a fraction of a per cent of the optimum in practice.

    Args:
      scores: (E, N) float32, larger is better; N a multiple of E.
      prices: (E,) float32 to start from, for instance those of a similar problem; None for zeros.
      sweeps: passes over all experts' prices.

    Returns:
      (assignment (N,) int32, prices (E,) float32).
    """
    num_experts, size = scores.shape
    if size % num_experts:
        raise ValueError(f"{size=} neurons must be a multiple of {num_experts=}")
    if prices is None:
        prices = jnp.zeros((num_experts,), jnp.float32)
    if num_experts == 1:
        return jnp.zeros((size,), jnp.int32), prices
    prices = balancing_prices(scores, prices, sweeps)
    return _evict(scores - prices[:, None]), prices


def _farthest_point(affinity, neuron, num_experts: int, mean: Array) -> Array:
    """E neurons that are far from each other: (E, D). The first is the farthest from the mean."""

    def pick(e: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        centers, nearest = carry
        center = neuron(jnp.argmin(nearest))
        here = affinity(center[None])[0]
        # Distance to the mean only serves to choose the first.
        nearest = jnp.where(e == 0, here, jnp.maximum(nearest, here))
        return centers.at[e].set(center), nearest

    start = jnp.zeros((num_experts, mean.shape[0]), jnp.float32), affinity(mean[None])[0]
    return jax.lax.fori_loop(0, num_experts, pick, start)[0]


@partial(jax.jit, static_argnames=("num_experts", "metric", "iterations"))
def _cluster(
    w1: Array, init_centers: Array | None, *, num_experts: int, metric: Metric, iterations: int
) -> Clusters:
    w1 = w1.astype(jnp.float32)
    hidden = w1.shape[0]
    share = hidden // num_experts
    square_norm = jnp.sum(w1 * w1, axis=1)
    # Scaling scores and sums by this is the same as normalising W1, without a copy of it.
    scale = _inverse(jnp.sqrt(square_norm)) if metric == "cosine" else jnp.ones_like(square_norm)

    def affinity(centers: Array) -> Array:
        """(E, H): cosine, or minus the squared distance less a term of the neuron alone."""
        products = _product(centers, w1.T) * scale
        if metric == "cosine":
            return products
        return 2 * products - jnp.sum(centers * centers, axis=1, keepdims=True)

    def nearness(centers: Array) -> Array:
        return affinity(centers) - (0 if metric == "cosine" else square_norm)

    def update(assignment: Array) -> tuple[Array, Array]:
        """Centres of an assignment and its objective, which k-means increases."""
        members = (assignment[:, None] == jnp.arange(num_experts)) * scale[:, None]
        sums = _product(members.T, w1)
        norms = jnp.linalg.norm(sums, axis=1)
        if metric == "cosine":
            return sums * _inverse(norms)[:, None], jnp.sum(norms)
        return sums / share, jnp.sum(norms * norms) / share

    def neuron(i: Array) -> Array:
        return jax.lax.dynamic_index_in_dim(w1, i, axis=0, keepdims=False) * scale[i]

    if init_centers is None:
        mean = _product(scale[None], w1)[0] / hidden
        if metric == "cosine":
            mean = _unit(mean, 0)
        centers = _farthest_point(nearness, neuron, num_experts, mean)
    else:
        centers = init_centers.astype(jnp.float32)
        if metric == "cosine":
            centers = _unit(centers, 1)

    def iterate(carry, _):
        centers, prices, best, best_assignment = carry
        assignment, prices = balanced_assignment(affinity(centers), prices, _SWEEPS)
        centers, objective = update(assignment)
        # The balanced assignment is not always optimal, so the objective can fall: keep the best.
        better = objective > best
        best_assignment = jnp.where(better, assignment, best_assignment)
        return (centers, prices, jnp.where(better, objective, best), best_assignment), None

    start = (
        centers,
        jnp.zeros((num_experts,), jnp.float32),
        jnp.float32(-jnp.inf),
        # Only a result if every objective is NaN; balanced all the same.
        jnp.arange(hidden, dtype=jnp.int32) // share,
    )
    (_, _, _, assignment), _ = jax.lax.scan(iterate, start, length=iterations)
    return Clusters(assignment, update(assignment)[0])


def cluster_neurons(
    w1: Array,
    num_experts: int,
    *,
    metric: Metric = "cosine",
    iterations: int = 10,
    init_centers: Array | None = None,
) -> Clusters:
    """Balanced k-means over the neurons, the rows of W1, on the device.

    Lloyd's iterations with an exactly balanced assignment step: cosine (spherical k-means on the
    normalised rows) or L2, as in Figure 4 (a) of arXiv 2602.06183. Deterministic, usable under
    jit and vmap; five passes over W1 for each iteration, E sorts of H numbers for each sweep.

    Args:
      w1: (H, D), any floating dtype, H a multiple of E; computed in float32.
      num_experts: E.
      metric: "cosine" or "l2".
      iterations: at least 1.
      init_centers: (E, D) to start from, for instance the previous clusters', so that an expert
        stays recognisably the same; None takes neurons that are far from each other.

    Returns:
      `Clusters`: assignment (H,) int32 and centers (E, D) float32.

    Raises:
      ValueError: a shape, metric or number that does not fit.
    """
    if w1.ndim != 2:
        raise ValueError(f"w1 of shape {w1.shape} must be a matrix (hidden, width)")
    hidden, width = w1.shape
    if num_experts < 1 or hidden % num_experts:
        raise ValueError(f"{hidden=} must be a multiple of {num_experts=}")
    if metric not in get_args(Metric):
        raise ValueError(f"{metric=} must be one of {get_args(Metric)}")
    if iterations < 1:
        raise ValueError(f"{iterations=} must be at least 1")
    if init_centers is not None and init_centers.shape != (num_experts, width):
        raise ValueError(f"{init_centers.shape=} must be {(num_experts, width)}")
    return _cluster(w1, init_centers, num_experts=num_experts, metric=metric, iterations=iterations)
