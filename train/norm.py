"""Root-mean-square normalisation, over the width of the model or of a head."""

import jax
import jax.numpy as jnp
from flax import nnx

from train import scopes


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (arXiv 1910.07467) in float32, with a learned gain."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        with jax.named_scope(scopes.NORM):
            y = x.astype(jnp.float32)
            y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
            return (y * self.scale[...]).astype(x.dtype)
