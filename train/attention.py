"""Causal self-attention with rotary positions and grouped queries."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.nn.routed_ffn import RoutingState
from sparsejax.projection24 import Axis, PackedProjection, pack_projection, projection24
from sparsejax.prune import soft_threshold_beta
from sparsejax.remat import keep
from sparsejax.spec import Sparsity
from train import scopes
from train.backend import attention_implementation, compute_dtype
from train.config import ModelConfig
from train.cudnn_attention import announce_determinism
from train.init import linear_init
from train.mesh import ACT_BTNH, FFN_AXES, constrain, gathered
from train.norm import RMSNorm


class KeyValues(NamedTuple):
    """Rotated keys and values of positions 0, 1, ... of each sequence; in front, perhaps, an axis
    over the layers."""

    k: jax.Array
    """(B, C, K, d): C positions, K key and value heads."""
    v: jax.Array
    """(B, C, K, d)."""


class PackedAttention(NamedTuple):
    """The projections as a sparse step reads them; perhaps with an axis over the layers."""

    q: PackedProjection
    k: PackedProjection
    v: PackedProjection
    out: PackedProjection


WIDTH_AXIS: dict[str, Axis] = {"q": 0, "k": 0, "v": 0, "out": 1}
"""The projections in the order of their scales, and the axis of each that is the model's width,
along which it is 2:4."""


def rope(x: jax.Array, theta: float, position: jax.Array | None = None) -> jax.Array:
    """Rotary position embedding (arXiv 2104.09864).

    Args:
      x: (B, S, N, d) queries or keys, d even. Dimension i is rotated with dimension i + d/2.
      theta: base of the frequencies.
      position: (B, S) int32; 0..S-1 for None.

    Returns:
      An array like `x`, computed in float32.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    position = jnp.arange(x.shape[1], dtype=jnp.float32) if position is None else position
    angle = position.astype(jnp.float32)[..., None] * frequency
    cos, sin = jnp.cos(angle)[..., None, :], jnp.sin(angle)[..., None, :]
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def products_of_one(x: jax.Array, weights: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """x (..., D) times each of several matrices (D, n); reverse-mode derivatives only.

    The gradient with respect to x is a sum of as many products. Its order is such that XLA lets
    cuBLAS add each to the others: it tries the left operand alone, which must be a plain product.
    """
    return tuple(x @ w for w in weights)


def _products_fwd(x, weights):
    # Plain products, not the rule within itself, so that checkpoint policies can tell them.
    return tuple(x @ w for w in weights), (x, weights)


def _products_bwd(saved, gradients):
    x, weights = saved
    rows = tuple(range(x.ndim - 1))
    dx = None
    for w, g in zip(weights, gradients, strict=True):
        own = jnp.tensordot(g, w, axes=(-1, 1))
        dx = own if dx is None else own + dx
    return dx, tuple(jnp.tensordot(x, g, axes=(rows, rows)) for g in gradients)


products_of_one.defvjp(_products_fwd, _products_bwd)


class Attention(nnx.Module):
    """Causal multi-head or grouped-query attention; (B, S, D) to (B, S, D).

    With `Sparsity.attention_projections` it has scales of its 2:4 weights, `beta` (4,) float32, and
    a call with packed ones uses them.
    """

    def __init__(self, config: ModelConfig, sparsity: Sparsity | None = None, *, rngs: nnx.Rngs):
        self.config = config
        d, n, k, h = config.width, config.num_heads, config.kv_heads, config.head_dim
        init = linear_init(config.init_scale)
        out_init = linear_init(config.init_scale * config.residual_scale)
        self.q = nnx.Param(init(rngs.params(), (d, n * h), jnp.float32))
        self.k = nnx.Param(init(rngs.params(), (d, k * h), jnp.float32))
        self.v = nnx.Param(init(rngs.params(), (d, k * h), jnp.float32))
        self.out = nnx.Param(out_init(rngs.params(), (n * h, d), jnp.float32))
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(h, config.norm_eps) for _ in range(2))
        self.sparsity = sparsity
        if sparsity is not None and sparsity.attention_projections:
            self.beta = RoutingState(jnp.ones((len(WIDTH_AXIS),), jnp.float32))

    def betas(self) -> jax.Array:
        """(4,) float32: scales for the weights as they are now, for `beta`."""
        scales = [soft_threshold_beta(getattr(self, n)[...], a) for n, a in WIDTH_AXIS.items()]
        return jnp.stack(scales)

    def pack(self) -> PackedAttention | None:
        """The 2:4 weights, scaled by `beta`: once for each optimiser step, not differentiated.
        None where projections stay dense."""
        if self.sparsity is None or not self.sparsity.attention_projections:
            return None
        dtype = compute_dtype(self.config)
        packed = [
            pack_projection(
                getattr(self, name)[...],
                self.beta[...][i],
                self.sparsity,
                axis=axis,
                dtype=dtype,
                axes=FFN_AXES,
            )
            for i, (name, axis) in enumerate(WIDTH_AXIS.items())
        ]
        return PackedAttention(*packed)

    def __call__(self, x: jax.Array, packed: PackedAttention | None = None) -> jax.Array:
        return self.prefill(x, packed)[0]

    def prefill(
        self, x: jax.Array, packed: PackedAttention | None = None
    ) -> tuple[jax.Array, KeyValues]:
        """(B, S, D) to (B, S, D), and the keys and values of these S positions."""
        config = self.config
        implementation = attention_implementation(config.attention, x.dtype, config.head_dim)
        if implementation == "cudnn":
            announce_determinism()
        q, k, v = self._project(x, packed)
        with jax.named_scope(scopes.ATTENTION):
            y = jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)
        return self._mix(y, packed), KeyValues(k, v)

    def decode(
        self,
        x: jax.Array,
        packed: PackedAttention | None,
        cache: KeyValues,
        position: jax.Array,
    ) -> tuple[jax.Array, KeyValues]:
        """One more token of each sequence, which sees all positions up to its own.

        Args:
          x: (B, 1, D).
          packed: `pack` of these parameters, or None for dense projections.
          cache: of C positions; what stands at `position` and after it has no influence.
          position: (B,) int32 below C: where the token stands in its sequence.

        Returns:
          (B, 1, D), and the cache with this token's key and value.
        """
        q, k, v = self._project(x, packed, position[:, None])
        row = jnp.arange(x.shape[0])
        cache = KeyValues(
            cache.k.at[row, position].set(k[:, 0]), cache.v.at[row, position].set(v[:, 0])
        )
        # A single query is bound by reading the cache: flash attention has nothing to save.
        y = jax.nn.dot_product_attention(
            q, *cache, key_value_seq_lengths=position + 1, implementation="xla"
        )
        return self._mix(y, packed), cache

    def _linear(self, x: jax.Array, name: str, packed: PackedAttention | None) -> jax.Array:
        """x times one of the four matrices."""
        w = getattr(self, name)[...]
        with jax.named_scope(scopes.PROJECTIONS):
            if packed is None or self.sparsity is None:
                return x @ gathered(w, x.dtype, name)
            return projection24(
                x,
                w,
                getattr(packed, name),
                self.sparsity,
                axis=WIDTH_AXIS[name],
                axes=FFN_AXES,
            )

    def _project(
        self,
        x: jax.Array,
        packed: PackedAttention | None,
        position: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Rotated queries, rotated keys, and values: (B, S, heads, d)."""
        theta, head_dim = self.config.rope_theta, self.config.head_dim

        def heads(y: jax.Array) -> jax.Array:
            return constrain(y.reshape(*x.shape[:2], -1, head_dim), ACT_BTNH)

        names = ("q", "k", "v")
        if packed is None or self.sparsity is None:
            with jax.named_scope(scopes.PROJECTIONS):
                weights = tuple(gathered(getattr(self, n)[...], x.dtype, n) for n in names)
                q, k, v = map(heads, products_of_one(x, weights))
        else:
            q, k, v = (heads(self._linear(x, name, packed)) for name in names)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        with jax.named_scope(scopes.ROPE):
            # Rotated ones are kept in place of the products, which nothing needs any more.
            return keep(rope(q, theta, position)), keep(rope(k, theta, position)), v

    def _mix(self, y: jax.Array, packed: PackedAttention | None) -> jax.Array:
        return self._linear(y.reshape(*y.shape[:2], -1), "out", packed)
