"""Squared ReLU that saves its result alone, or its argument alone."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from sparsejax.remat import keep


@jax.custom_vjp
def relu2(x: Array) -> Array:
    """max(x, 0)^2 (arXiv 2109.08668), elementwise, in x's dtype; reverse-mode derivatives only.

    The derivative 2 max(x, 0) is 2 sqrt(y), so y, which a product after it saves anyway, is all
    that is kept of x. Where y underflows the derivative does too.

    Args:
      x: floating point.
    """
    r = jnp.maximum(x, 0)
    return r * r


def _forward(x: Array) -> tuple[Array, Array]:
    y = keep(relu2(x))
    return y, y


def _backward(y: Array, g: Array) -> tuple[Array]:
    slope = 2 * jnp.sqrt(y.astype(jnp.promote_types(y.dtype, jnp.float32)))
    return ((slope * g).astype(y.dtype),)


relu2.defvjp(_forward, _backward)


@jax.custom_vjp
def relu2_of_kept(x: Array) -> Array:
    """As `relu2`, and what is kept is x: for where x exists anyway and the result does not.

    Args:
      x: floating point.
    """
    return relu2(x)


def _forward_of_kept(x: Array) -> tuple[Array, Array]:
    return relu2(x), x


def _backward_of_kept(x: Array, g: Array) -> tuple[Array]:
    return (2 * jnp.maximum(x, 0) * g,)


relu2_of_kept.defvjp(_forward_of_kept, _backward_of_kept)
