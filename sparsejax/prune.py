"""2:4 pruning as array functions: soft threshold, its scale, top two of four, unbiased sampling.

Everything here returns dense arrays with at most two non-zeros in each group of four along `axis`;
`sparsejax.formats` packs them. Sizes along `axis` must be multiples of 4 (ValueError).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from kernels.reference import GROUP, Order, select24, soft_threshold

__all__ = [
    "mvue24",
    "select24",
    "soft_threshold",
    "soft_threshold_beta",
    "soft_threshold_ste",
    "top2_of_4",
]


def soft_threshold_beta(w: ArrayLike, axis: int = -1) -> Array:
    """The scale that makes the soft-thresholded weight closest to the weight: <w, S> / <S, S>.

    It minimises the Frobenius norm of w - beta S(w) (S-STE, arXiv 2409.09099); about
    1.484 for normally distributed weights, 1.496 for a normal truncated at three sigma.

    Args:
      w: floating-point array, any rank; size along `axis` a multiple of 4.
      axis: the axis that the groups run along.

    Returns:
      float32 scalar; 1 where S(w) is zero everywhere.
    """
    return _soft_threshold_beta(jnp.asarray(w), axis)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _soft_threshold_beta(w: Array, axis: int) -> Array:
    w = w.astype(jnp.float32)
    s = soft_threshold(w, axis)
    norm = jnp.sum(s * s)
    return jnp.where(norm == 0.0, 1.0, jnp.sum(w * s) / jnp.where(norm == 0.0, 1.0, norm))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _soft_threshold_ste(w: Array, axis: int, beta: Array) -> Array:
    s = soft_threshold(w.astype(jnp.float32), axis)
    return (beta * s).astype(w.dtype)


@_soft_threshold_ste.defjvp
def _soft_threshold_ste_jvp(axis: int, primals, tangents):
    w, beta = primals
    return _soft_threshold_ste(w, axis, beta), tangents[0]


def soft_threshold_ste(w: ArrayLike, axis: int = -1, beta: ArrayLike = 1.0) -> Array:
    """beta * S(w) with a straight-through derivative: dw is the cotangent, unchanged.

    Neither the threshold nor beta enters the derivative (S-STE, arXiv 2409.09099), and
    beta gets none: it is set once, from `soft_threshold_beta`, and then frozen.

    Args:
      w: floating-point array, any rank; size along `axis` a multiple of 4.
      axis: the axis that the groups run along.
      beta: scalar, applied in float32 before the result is rounded to w's dtype.

    Returns:
      Array of w's shape and dtype.
    """
    return _soft_threshold_ste(jnp.asarray(w), axis, jnp.asarray(beta, jnp.float32))


def top2_of_4(x: ArrayLike, axis: int = -1, by: Order = "magnitude") -> Array:
    """x with the two smallest of each four along `axis` set to zero.

    Chosen on float32 values, ties to the lower index, NaN above every number. `by="value"` is for
    arrays without negative elements, such as squared-ReLU activations, where both orders agree.

    Args:
      x: floating-point array, any rank; size along `axis` a multiple of 4.
      axis: the axis that the groups run along.
      by: "magnitude" or "value".

    Returns:
      Array of x's shape and dtype.
    """
    x = jnp.asarray(x)
    return jnp.where(select24(x, axis, by), x, jnp.zeros((), x.dtype))


def mvue24(x: ArrayLike, key: Array, axis: int = -1) -> Array:
    """Unbiased 2:4 sampling of minimum variance along `axis`: the mean over keys is x.

    Each element of a group of four is kept with probability p_i and divided by p_i. Among unbiased
    estimators with at most two non-zeros the sum of variances, sum_i x_i^2 (1/p_i - 1), is smallest
    at p_i = min(1, |x_i| / tau) with sum_i p_i = 2 (after "Minimum Variance Unbiased N:M Sparsity
    for the Neural Gradients", arXiv 2203.10991). At most one of four p_i can clip at 1 with the
    others below it. One uniform number per group draws two elements with exactly these
    probabilities (systematic sampling). Groups with at most two non-zeros come back unchanged.

    Args:
      x: floating-point array, any rank; size along `axis` a multiple of 4.
      key: PRNG key.
      axis: the axis that the groups run along.

    Returns:
      Array of x's shape and dtype. Groups whose sum of magnitudes is not finite are pruned by
      `top2_of_4` instead, so that a NaN or an infinity in a gradient stays visible.
    """
    return _mvue24(jnp.asarray(x), key, axis)


@functools.partial(jax.jit, static_argnums=2, inline=True)
def _mvue24(x: Array, key: Array, axis: int) -> Array:
    moved = jnp.moveaxis(x, axis, -1)
    size = moved.shape[-1]
    if size % GROUP:
        raise ValueError(f"{size=} of {axis=} must be a multiple of {GROUP}")
    groups = moved.reshape(*moved.shape[:-1], size // GROUP, GROUP).astype(jnp.float32)
    a = jnp.abs(groups)

    total = jnp.sum(a, axis=-1, keepdims=True)
    largest = jnp.max(a, axis=-1, keepdims=True)
    # 2 |x_i| / total > 1: kept for certain, and the rest shares one place instead of two. Two
    # elements cannot both exceed half of the total, so the clipped one is unique.
    clipped = 2.0 * a > total
    one_clips = 2.0 * largest > total
    rest = jnp.where(clipped, 0.0, a)
    places = jnp.where(one_clips, 1.0, 2.0)

    # Systematic sampling: the points u and u + 1 on a line of length `places` that the elements
    # divide in proportion to `rest`. Scaled so that the line ends exactly at `places`.
    ends = jnp.cumsum(rest, axis=-1)
    length = ends[..., -1:]
    ends = ends / jnp.where(length == 0.0, 1.0, length) * places
    u = jax.random.uniform(key, (*groups.shape[:-1], 1), jnp.float32)
    points_before = jnp.ceil(jnp.concatenate([jnp.zeros_like(u), ends], axis=-1) - u)
    drawn = points_before[..., 1:] > points_before[..., :-1]

    # x_i / p_i is the same magnitude, length / places, for every element that can be left out.
    sampled = jnp.where(
        clipped, groups, jnp.where(drawn, jnp.sign(groups) * (length / places), 0.0)
    )
    sampled = jnp.where(jnp.isfinite(total), sampled, top2_of_4(groups))
    return jnp.moveaxis(sampled.reshape(moved.shape), -1, axis).astype(x.dtype)
