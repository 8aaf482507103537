"""The order of neurons: interleaved by expert, so that four in every block of M share one."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from kernels import shared_rows
from sparsejax.spec import GROUP, Sparsity


@partial(jax.jit, static_argnames="m")
def interleave(assignment: Array, m: int) -> Array:
    """The permutation of neurons that makes "expert" and "live columns of a block" the same thing.

    Afterwards neuron n = b M + 4 e + r (block b, expert e, r in 0..3) belongs to expert e. Neurons
    whose place already belongs to their expert stay; the others fill the places that became free,
    in increasing order, so that a refresh moves as few groups of four as it can.

    Args:
      assignment: (H,) int32 in 0..M/4-1, each value exactly 4 H / M times (as `cluster_neurons`
        gives it; with other counts the result is still a permutation, but not this one).
      m: neurons in a block, a multiple of 4 that divides H.

    Returns:
      (H,) int32: new neuron j is old neuron perm[j].

    Raises:
      ValueError: shapes that do not fit.
    """
    if assignment.ndim != 1:
        raise ValueError(f"assignment of shape {assignment.shape} must be a vector")
    hidden = assignment.shape[0]
    if m < GROUP or m % GROUP:
        raise ValueError(f"{m=} must be a positive multiple of {GROUP}")
    if hidden % m:
        raise ValueError(f"{hidden=} must be a multiple of {m=}")
    place = jnp.arange(hidden, dtype=jnp.int32)
    owner = place % m // GROUP
    # Staying neurons sort behind every expert, in the same order on both sides.
    stays = assignment == owner
    last = m // GROUP
    movers = jnp.argsort(jnp.where(stays, last, assignment), stable=True).astype(jnp.int32)
    free = jnp.argsort(jnp.where(stays, last, owner), stable=True)
    return jnp.zeros_like(place).at[free].set(movers)


@jax.jit
def permute_ffn(
    w1: Array, w2: Array, perm: Array, wg: Array | None = None
) -> tuple[Array, Array, Array | None]:
    """Reorders the neurons of a feed-forward network; the function it computes stays the same.

    Moments of an optimiser have the shapes of their parameters and take the same permutation.

    Args:
      w1, w2: (H, D). perm: (H,) integers. wg: (H, D) or None.

    Returns:
      (w1[perm], w2[perm], wg[perm] or None).
    """
    hidden = perm.shape[0]
    if w1.shape[0] != hidden or w2.shape != w1.shape or (wg is not None and wg.shape != w1.shape):
        gate = None if wg is None else wg.shape
        raise ValueError(f"{w1.shape=}, {w2.shape=} and wg {gate} must have {hidden=} neurons")
    return w1[perm], w2[perm], None if wg is None else wg[perm]


def repeat_shared(w: Array, axis: int, sparsity: Sparsity) -> Array:
    """Neurons of all experts, shared ones once for each expert.

    Of each `Sparsity.shared_every` blocks of M the last is shared (`kernels.shared_rows`). Then, of
    each four shared neurons, a block of M holds them M / 4 times, so that by `to_expert_major`
    every expert has all of them, behind its own.

    Args:
      w: (.., H, ..), neurons along `axis`.

    Returns:
      (.., H', ..), H' = `Sparsity.rows_of_experts` of H; w itself where no neurons are shared.
    """
    if not sparsity.shares:
        return w
    return shared_rows.repeat(w, axis, sparsity.num_experts, sparsity.shared_every)


def sum_shared(dw: Array, sparsity: Sparsity, shards: int = 1) -> Array:
    """The gradient by w of `repeat_shared`: (H', D), neurons in front, to (H, D).

    shards: so many networks' rows, one behind the other.
    """
    if not sparsity.shares:
        return dw
    experts, every = sparsity.num_experts, sparsity.shared_every
    parts = [shared_rows.add_up(part, experts, every) for part in jnp.split(dw, shards)]
    return parts[0] if shards == 1 else jnp.concatenate(parts)


def routed_neurons(hidden: int, sparsity: Sparsity) -> np.ndarray:
    """(H - shared,) int32: the neurons that clusters divide among them, in order."""
    neuron = np.arange(hidden, dtype=np.int32)
    if not sparsity.shares:
        return neuron
    every = sparsity.shared_every
    return neuron[neuron // sparsity.m % every != every - 1]


def to_expert_major(w: Array, axis: int, num_experts: int) -> Array:
    """Splits the interleaved neurons along `axis` by expert: (.., H, ..) to (E, .., H / E, ..)."""
    hidden = w.shape[axis]
    if hidden % (GROUP * num_experts):
        raise ValueError(f"{hidden=} must be a multiple of {GROUP * num_experts}")
    axis %= w.ndim
    before, after = w.shape[:axis], w.shape[axis + 1 :]
    blocks = hidden // (GROUP * num_experts)
    split = w.reshape(*before, blocks, num_experts, GROUP, *after)
    return jnp.moveaxis(split, axis + 1, 0).reshape(num_experts, *before, GROUP * blocks, *after)


def from_expert_major(w: Array, axis: int) -> Array:
    """Inverse of `to_expert_major`; `axis` is that of the result: (E, .., h, ..) to (.., E h, ..).

    As a gradient's layout it needs no sum: every neuron belongs to exactly one expert.
    """
    num_experts = w.shape[0]
    axis %= w.ndim - 1
    before, live, after = w.shape[1 : axis + 1], w.shape[axis + 1], w.shape[axis + 2 :]
    split = w.reshape(num_experts, *before, live // GROUP, GROUP, *after)
    return jnp.moveaxis(split, 0, axis + 1).reshape(*before, num_experts * live, *after)
