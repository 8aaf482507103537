"""RMSNorm and its backward pass in plain jax.numpy: definition, and the path without a kernel."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from kernels import reference


def require_norm(x: Array, scale: Array) -> None:
    """Raises ValueError unless `rms_norm` takes these arguments."""
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{x.shape=} must be two-dimensional and not empty")
    reference.require_float("x.dtype", x.dtype)
    if scale.shape != x.shape[1:] or scale.dtype != jnp.float32:
        raise ValueError(f"{scale.shape=} {scale.dtype=} must be float32 {x.shape[1:]}")


def require_norm_backward(
    y: Array, rstd: Array, scale: Array, g: Array, passed: Array | None
) -> None:
    """Raises ValueError unless `rms_norm_backward` takes these arguments."""
    require_norm(y, scale)
    if rstd.shape != y.shape[:1] or rstd.dtype != jnp.float32:
        raise ValueError(f"{rstd.shape=} {rstd.dtype=} must be float32 {y.shape[:1]}")
    for name, other in (("g", g), ("passed", passed)):
        if other is not None and (other.shape != y.shape or other.dtype != y.dtype):
            raise ValueError(
                f"{name} of shape {other.shape} and dtype {other.dtype} must be like y: "
                f"{y.shape} and {y.dtype}"
            )


def rms_norm(x: Array, scale: Array, *, eps: float) -> tuple[Array, Array]:
    """y = x rstd scale with rstd = (mean(x^2) + eps)^-1/2 of each row (arXiv 1910.07467).

    Args:
      x: (T, D) floating point.
      scale: (D,) float32.
      eps: what is added to the mean square.

    Returns:
      y (T, D), x's dtype, computed in float32; rstd (T,) float32.

    Raises:
      ValueError: on malformed arguments.
    """
    require_norm(x, scale)
    wide = x.astype(jnp.float32)
    rstd = lax.rsqrt(jnp.mean(wide * wide, axis=1, keepdims=True) + eps)
    return (wide * rstd * scale).astype(x.dtype), rstd[:, 0]


def check_rms_norm(*args, **kwargs) -> None:
    """The reference serves every call."""


def inverse_gain(scale: Array) -> Array:
    """1 / scale, and 0 where that would not be finite."""
    return jnp.where(jnp.abs(scale) < jnp.finfo(jnp.float32).tiny, 0.0, 1 / scale)


def rms_norm_backward(
    y: Array, rstd: Array, scale: Array, g: Array, passed: Array | None = None
) -> tuple[Array, Array]:
    """Gradients of `rms_norm` from its results, so that its input need not be kept.

    With z = y / scale, the input over its root mean square, dx = rstd (g scale - z mean(g y)) +
    passed, and dscale is the sum over rows of g z. Where a gain is zero z is lost and counts as
    zero: that gain's gradient is zero too. Computed in float32.

    Args:
      y, rstd, scale: results (T, D) and (T,) and gain (D,) of `rms_norm`.
      g: (T, D) gradient with respect to y, y's dtype.
      passed: None, or a gradient (T, D) of x from elsewhere, y's dtype, which is added.

    Returns:
      dx (T, D), y's dtype, rounded once; and partial sums of dscale (P, D) float32, P as the
      backend likes it, here 1: their sum over the first axis is dscale.

    Raises:
      ValueError: on malformed arguments.
    """
    require_norm_backward(y, rstd, scale, g, passed)
    inverse = inverse_gain(scale)
    h = g.astype(jnp.float32)
    product = h * y
    mean = jnp.mean(product, axis=1, keepdims=True)
    dx = rstd[:, None] * (h * scale - y * inverse * mean)
    if passed is not None:
        dx += passed.astype(jnp.float32)
    return dx.astype(y.dtype), jnp.sum(product, axis=0, keepdims=True) * inverse


def check_rms_norm_backward(*args, **kwargs) -> None:
    """The reference serves every call."""
