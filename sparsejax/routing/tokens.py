"""Which expert a token meets, how loads are kept even, and where its row goes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from sparsejax.routing.clustering import balancing_prices
from sparsejax.spec import Metric

_STRIDES = 64
"""Into at most so many runs are tokens cut that are laid out side by side."""

_SWEEPS = 8
"""Passes over the experts' biases in one fit."""


class TokenPlan(NamedTuple):
    """Rows of the routed matrix: tokens of one expert together, padded to whole blocks of V rows.

    T_pad = ceil((T + E (V - 1)) / V) V is enough for every distribution of tokens, so that shapes
    are static and no token is dropped.
    """

    permutation: Array
    """(T_pad,) int32: the token that a row holds, or T for padding."""
    inverse: Array
    """(T,) int32: the row that holds a token."""
    block_expert: Array
    """(T_pad / V,) int32, increasing: the expert of each block. Blocks behind the last token hold
    padding only and carry the last expert's number."""
    counts: Array
    """(E,) int32: tokens of each expert."""
    offsets: Array
    """(E + 1,) int32: expert e has rows offsets[e] to offsets[e + 1], multiples of V; the rows from
    offsets[E] on are unused."""


def padded_tokens(tokens: int, num_experts: int, v: int) -> int:
    """T_pad: the rows that `plan_tokens` lays out, for any distribution of the tokens."""
    return -(-(tokens + num_experts * (v - 1)) // v) * v


def _visited(chosen: Array, back: bool) -> Array:
    """Columns of (E, T) with runs of tokens side by side, or those back in their order.

    The runs are as many as T has factors of two, up to a limit: a token's neighbours are then from
    other places of the batch.
    """
    experts, tokens = chosen.shape
    runs = math.gcd(tokens, _STRIDES)
    shape = (tokens // runs, runs) if back else (runs, tokens // runs)
    return chosen.reshape(experts, *shape).swapaxes(1, 2).reshape(experts, tokens)


def _inverse(x: Array) -> Array:
    return jnp.where(x > 0, 1 / jnp.where(x > 0, x, 1), 0)


def token_scores(x: Array, centers: Array, metric: Metric = "cosine") -> Array:
    """How well each expert suits each token, (T, E) float32, comparable with a cosine.

    "cosine": x.c / (|x| |c|). "l2": (2 x.c - |c|^2) / (2 |x| mean|c|), which orders experts as the
    distance |x - c| does (what is left out or divided by is the same for every expert of a token),
    on a scale on which one rate of the bias serves both metrics.

    Products of x and the centres rounded to x's dtype, accumulated in float32.

    Args:
      x: (T, D) floating point. centers: (E, D). metric: "cosine" or "l2".
    """
    if metric not in get_args(Metric):
        raise ValueError(f"{metric=} must be one of {get_args(Metric)}")
    if x.ndim != 2 or centers.ndim != 2 or x.shape[1] != centers.shape[1]:
        raise ValueError(f"{x.shape=} and {centers.shape=} must be (tokens, D) and (experts, D)")
    centers = centers.astype(jnp.float32)
    norms = jnp.linalg.norm(centers, axis=1)
    if metric == "cosine":
        centers = centers * _inverse(norms)[:, None]
    rounded = centers.astype(x.dtype)
    products = jnp.einsum(
        "td,ed->te", x, rounded, precision="highest", preferred_element_type=jnp.float32
    )
    x_norm = jnp.sqrt(jnp.sum(jnp.square(x.astype(jnp.float32)), axis=1, keepdims=True))
    if metric == "cosine":
        return products * _inverse(x_norm)
    return (products - norms**2 / 2) * _inverse(x_norm * jnp.mean(norms))


@partial(jax.jit, static_argnames="metric")
def assign_tokens(
    x: Array, centers: Array, bias: Array | None = None, metric: Metric = "cosine"
) -> Array:
    """The expert of each token: the best score plus bias, ties to the lower index.

    No gradient flows through the choice.

    Args:
      x: (T, D) floating point: input of the feed-forward network.
      centers: (E, D) float32 from `cluster_neurons`.
      bias: (E,) float32 from `update_bias`, or None.
      metric: "cosine" or "l2".

    Returns:
      (T,) int32 in 0..E-1.
    """
    if bias is not None and bias.shape != centers.shape[:1]:
        raise ValueError(f"{bias.shape=} must be {centers.shape[:1]}")
    x, centers = jax.lax.stop_gradient((x, centers))
    scores = token_scores(x, centers, metric)
    if bias is not None:
        scores = scores + jax.lax.stop_gradient(bias)
    return jnp.argmax(scores, axis=1).astype(jnp.int32)


@jax.jit
def update_bias(bias: Array, counts: Array, rate: ArrayLike) -> Array:
    """One step of load evening without an auxiliary loss (arXiv 2408.15664).

    The bias of an expert with too few tokens rises, of one with too many falls, by at most `rate`.
    There the step is the sign of the difference; here it is the difference relative to the mean
    load, clipped to one, which comes to rest instead of chattering about an even load. The mean of
    the bias stays zero, since a constant does not change the choice.

    Args:
      bias: (..., E) float32 (leading axes: layers). counts: (..., E) tokens of each expert.
      rate: scalar, in units of the score.

    Returns:
      (..., E) float32.
    """
    if bias.shape != counts.shape:
        raise ValueError(f"{bias.shape=} and {counts.shape=} must be equal")
    load = counts.astype(jnp.float32)
    mean = jnp.mean(load, axis=-1, keepdims=True)
    step = jnp.clip((mean - load) * _inverse(mean), -1.0, 1.0)
    bias = bias + jnp.asarray(rate, jnp.float32) * step
    return bias - jnp.mean(bias, axis=-1, keepdims=True)


def fit_bias(scores: Array, bias: Array, members: Array | None = None) -> Array:
    """The biases under which these tokens load all experts evenly.

    Where `update_bias` takes many steps, this takes one: the prices of the balanced assignment
    problem, with the opposite sign. For the start of a sparse phase, whose first batches would
    otherwise meet a few experts only.

    Args:
      scores: (T, E) from `token_scores`, of a batch that is like those to come; T at least E.
      bias: (E,) float32 to start from.
      members: (T,) bool, the tokens that count; None for all. Fewer than E leave the biases as they
        are.

    Returns:
      (E,) float32 of mean zero.

    Raises:
      ValueError: fewer tokens than experts, or shapes that do not fit.
    """
    if scores.ndim != 2 or bias.shape != scores.shape[1:]:
        raise ValueError(f"{scores.shape=} and {bias.shape=} must be (tokens, experts), (experts,)")
    tokens, experts = scores.shape
    if tokens < experts:
        raise ValueError(f"{tokens=} must be at least {experts=}")
    if experts == 1:
        return bias
    return -balancing_prices(scores.T, -bias, _SWEEPS, members)


def combine(experts: Sequence[Array], num_experts: int) -> Array:
    """The combination of experts that each token has in several shards: sum over s of e_s E^s.

    Args:
      experts: of each shard the expert of each token, (T,) int32 in 0..E-1. num_experts: E.

    Returns:
      (T,) int32 in 0..E^S-1, which `plan_tokens` takes for the experts of one shard.
    """
    first, *others = experts
    return sum((e * num_experts**s for s, e in enumerate(others, 1)), start=first)


def counts_by_shard(counts: Array, num_experts: int, shards: int) -> Array:
    """Tokens of each expert, shard by shard, from those of each combination.

    Args:
      counts: (E^S,) int32. num_experts: E. shards: S.

    Returns:
      (S E,) int32.
    """
    if shards == 1:
        return counts
    # The last axis is the first shard's.
    cube = counts.reshape((num_experts,) * shards)
    axes = set(range(shards))
    parts = [jnp.sum(cube, tuple(axes - {shards - 1 - s})) for s in range(shards)]
    return jnp.concatenate(parts).astype(counts.dtype)


@partial(jax.jit, static_argnames=("num_experts", "v", "spread"))
def plan_tokens(expert: Array, num_experts: int, v: int, *, spread: bool = False) -> TokenPlan:
    """Lays out tokens by expert, in their order, each expert padded to a multiple of V rows.

    Static shapes, for any distribution: all tokens to one expert and empty experts included.

    Args:
      expert: (T,) int32 in 0..E-1 (not checked under jit).
      num_experts: E. v: rows in a block, V.
      spread: whether to take an expert's tokens from places of the batch that lie apart, T / 64 if
        T is a multiple of 64, in turn: neighbours of one text tend to need the same neurons, which
        is what 2:4 along tokens should not find in one group of four.

    Returns:
      `TokenPlan`.

    Raises:
      ValueError: shapes or numbers that do not fit.
    """
    if expert.ndim != 1 or expert.shape[0] < 1:
        raise ValueError(f"expert of shape {expert.shape} must be a vector with a token at least")
    if num_experts < 1 or v < 1:
        raise ValueError(f"{num_experts=} and {v=} must be at least 1")
    tokens = expert.shape[0]
    rows = padded_tokens(tokens, num_experts, v)
    token = jnp.arange(tokens, dtype=jnp.int32)
    chosen = (expert == jnp.arange(num_experts, dtype=expert.dtype)[:, None]).astype(jnp.int32)
    if spread:
        running = jnp.cumsum(_visited(chosen, back=False), axis=1, dtype=jnp.int32)
        counts, running = running[:, -1], _visited(running, back=True)
    else:
        running = jnp.cumsum(chosen, axis=1, dtype=jnp.int32)
        counts = running[:, -1]
    ends = jnp.cumsum(-(-counts // v) * v, dtype=jnp.int32)
    offsets = jnp.concatenate([jnp.zeros((1,), jnp.int32), ends])
    # The rank among the expert's tokens: summed over experts, of which one is the token's.
    inverse = jnp.sum(chosen * (offsets[:-1, None] + running - 1), axis=0, dtype=jnp.int32)
    permutation = (
        jnp.full((rows,), tokens, jnp.int32)
        .at[inverse]
        .set(token, unique_indices=True, mode="promise_in_bounds")
    )
    first_row = jnp.arange(rows // v, dtype=jnp.int32) * v
    block_expert = jnp.sum(first_row[:, None] >= ends[:-1], axis=1, dtype=jnp.int32)
    return TokenPlan(permutation, inverse, block_expert, counts, offsets)
