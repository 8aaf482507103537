"""Causal self-attention with rotary positions and grouped queries."""

import jax
import jax.numpy as jnp
from flax import nnx

from train.backend import attention_implementation
from train.config import ModelConfig
from train.init import linear_init


def rope(x: jax.Array, theta: float) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864) over positions 0..S-1.

    Args:
      x: (B, S, N, d) queries or keys, d even. Dimension i is rotated with dimension i + d/2.
      theta: base of the frequencies.

    Returns:
      An array like `x`, computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(x.shape[1], dtype=jnp.float32)[:, None] * frequency
    cos, sin = jnp.cos(angle)[:, None, :], jnp.sin(angle)[:, None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Attention(nnx.Module):
    """Causal multi-head or grouped-query attention; (B, S, D) to (B, S, D)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        d, n, k, h = config.width, config.num_heads, config.kv_heads, config.head_dim
        init = linear_init(config.init_scale)
        out_init = linear_init(config.init_scale / (2 * config.num_layers) ** 0.5)
        self.q = nnx.Param(init(rngs.params(), (d, n * h), jnp.float32))
        self.k = nnx.Param(init(rngs.params(), (d, k * h), jnp.float32))
        self.v = nnx.Param(init(rngs.params(), (d, k * h), jnp.float32))
        self.out = nnx.Param(out_init(rngs.params(), (n * h, d), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        batch, length, _ = x.shape
        heads = lambda w: (x @ w[...].astype(x.dtype)).reshape(batch, length, -1, config.head_dim)
        q, k = rope(heads(self.q), config.rope_theta), rope(heads(self.k), config.rope_theta)
        y = jax.nn.dot_product_attention(
            q,
            k,
            heads(self.v),
            is_causal=True,
            implementation=attention_implementation(config.attention, x.dtype, config.head_dim),
        )
        return y.reshape(batch, length, -1) @ self.out[...].astype(x.dtype)
