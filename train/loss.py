"""Cross-entropy without all logits at once: product, loss and both gradients chunk by chunk."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp


def _chunk_loss(x: jax.Array, head: jax.Array, targets: jax.Array, weights: jax.Array):
    """Sum of weighted losses of one chunk, and the float32 logits' softmax ingredients."""
    logits = jnp.dot(x, head, preferred_element_type=jnp.float32)
    top = jnp.max(logits, axis=-1, keepdims=True)
    log_z = jnp.log(jnp.sum(jnp.exp(logits - top), axis=-1, keepdims=True)) + top
    target = jnp.take_along_axis(logits, targets[:, None], axis=-1)
    return jnp.sum((log_z - target)[:, 0] * weights), logits, log_z


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_loss(x, head, targets, weights, chunk):
    def body(total, args):
        return total + _chunk_loss(args[0], head.astype(x.dtype), args[1], args[2])[0], None

    total, _ = jax.lax.scan(body, jnp.float32(0), _chunks(x, targets, weights, chunk))
    return total


def _chunks(x, targets, weights, chunk):
    return (
        x.reshape(-1, chunk, x.shape[-1]),
        targets.reshape(-1, chunk),
        weights.reshape(-1, chunk),
    )


def _summed_loss_fwd(x, head, targets, weights, chunk):
    # Both gradients are made while a chunk's logits exist: three products in all, none recomputed.
    low = head.astype(x.dtype)

    def body(carry, args):
        total, grad_head = carry
        x_c, targets_c, weights_c = args
        loss, logits, log_z = _chunk_loss(x_c, low, targets_c, weights_c)
        one_hot = jax.nn.one_hot(targets_c, logits.shape[-1], dtype=jnp.float32)
        d_logits = ((jnp.exp(logits - log_z) - one_hot) * weights_c[:, None]).astype(x.dtype)
        grad_head += jnp.dot(x_c.T, d_logits, preferred_element_type=jnp.float32)
        return (total + loss, grad_head), jnp.dot(d_logits, low.T)

    start = (jnp.float32(0), jnp.zeros(head.shape, jnp.float32))
    (total, grad_head), grad_x = jax.lax.scan(body, start, _chunks(x, targets, weights, chunk))
    return total, (grad_x.reshape(x.shape), grad_head.astype(head.dtype))


def _summed_loss_bwd(chunk, saved, g):
    grad_x, grad_head = saved
    return (g * grad_x).astype(grad_x.dtype), (g * grad_head).astype(grad_head.dtype), None, None


_summed_loss.defvjp(_summed_loss_fwd, _summed_loss_bwd)


def cross_entropy(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array | None = None,
    *,
    chunk: int,
) -> jax.Array:
    """Mean next-token cross-entropy in nats.

    Args:
      x: (T, D) hidden states in the compute dtype.
      head: (D, vocabulary) float32 weights.
      targets: (T,) int32 ids.
      weights: (T,) float32 weights of the tokens, all one when None. Their sum divides the loss.
      chunk: tokens whose logits are held at the same time; the largest divisor of T up to it is
        used.

    Returns:
      float32 scalar. Its gradients with respect to `x` and `head` are computed with the loss.
    """
    tokens = x.shape[0]
    weights = jnp.ones((tokens,), jnp.float32) if weights is None else weights.astype(jnp.float32)
    size = next(c for c in range(min(chunk, tokens), 0, -1) if tokens % c == 0)
    # Normalised before the sum, so that bf16 gradients of the chunks keep their scale.
    return _summed_loss(x, head, targets, weights / jnp.maximum(jnp.sum(weights), 1.0), size)
