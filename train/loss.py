"""Cross-entropy without all logits at once: product, loss and both gradients chunk by chunk."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from sparsejax.sharding import current_mesh
from train.mesh import FFN_AXES, SPECS, gathered


class _Spread:
    """What the mesh does to the loss: tokens over `batch`, the head's columns over `tensor`."""

    def sum_vocabulary(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, FFN_AXES.tensor)

    def max_vocabulary(self, x: jax.Array) -> jax.Array:
        return jax.lax.pmax(x, FFN_AXES.tensor)

    def sum_tokens(self, x: jax.Array) -> jax.Array:
        return jax.lax.psum(x, FFN_AXES.batch)

    def scatter_head(self, grad: jax.Array, dtype: jnp.dtype) -> jax.Array:
        """A partial gradient (D, v) to the part of the sum that this device stores, moved in
        `dtype` like those of all other weights."""
        shard = FFN_AXES.shard
        grad = jax.lax.psum_scatter(grad.astype(dtype), shard, scatter_dimension=0, tiled=True)
        return jax.lax.psum(grad, tuple(axis for axis in FFN_AXES.batch if axis != shard))

    def first_column(self, columns: int) -> jax.Array:
        return columns * jax.lax.axis_index(FFN_AXES.tensor)


class _Alone:
    """The same on one device."""

    sum_vocabulary = max_vocabulary = sum_tokens = staticmethod(lambda x: x)

    def scatter_head(self, grad: jax.Array, dtype: jnp.dtype) -> jax.Array:
        del dtype
        return grad

    def first_column(self, columns: int) -> int:
        del columns
        return 0


def _top_and_total(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The largest logit of each row, and the sum of exp(logit - largest), in one pass over them.

    Chunks of logits are larger than caches, and the head's speed is that of reading them. One
    exponential for each pair (arXiv 1805.02867 has two).
    """

    def combine(a: Any, b: Any) -> Any:
        (top_a, total_a), (top_b, total_b) = a, b
        apart = top_a - top_b
        smaller = jnp.exp(-jnp.abs(apart))
        total = jnp.where(apart >= 0, total_a + total_b * smaller, total_a * smaller + total_b)
        return jnp.maximum(top_a, top_b), total

    # A finite start: infinity less infinity would be NaN.
    start = jnp.float32(jnp.finfo(jnp.float32).min), jnp.float32(0)
    return jax.lax.reduce((logits, jnp.ones_like(logits)), start, combine, (1,))


def _chunk_loss(
    x: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    over: Any,
    dtype: jnp.dtype,
):
    """Sum of weighted losses of one chunk, its logits, log of the softmax's denominator, and which
    column is the target. Logits are stored in `dtype`; everything else is float32."""
    logits = jnp.dot(x, head, preferred_element_type=dtype)
    columns = logits.shape[-1]
    own = targets - over.first_column(columns)
    is_target = own[:, None] == jnp.arange(columns)
    # One element a token: a sum over a row would read all of it once more.
    found = jnp.take_along_axis(logits, jnp.clip(own, 0, columns - 1)[:, None], axis=1)[:, 0]
    here = (own >= 0) & (own < columns)
    target = over.sum_vocabulary(jnp.where(here, found.astype(jnp.float32), 0.0))
    logits = logits.astype(jnp.float32)
    local_top, local_total = _top_and_total(logits)
    top = over.max_vocabulary(local_top)
    total = over.sum_vocabulary(local_total * jnp.exp(local_top - top))
    log_z = jnp.log(total) + top
    return jnp.sum((log_z - target) * weights), logits, log_z[:, None], is_target


def _chunks(x, targets, weights, chunk):
    return (
        x.reshape(-1, chunk, x.shape[-1]),
        targets.reshape(-1, chunk),
        weights.reshape(-1, chunk),
    )


def _loss_alone(low, x, targets, weights, *, chunk, logits, over):
    """Sum of the losses; `low` the head (D, v) in x's dtype."""

    def body(total, args):
        return total + _chunk_loss(args[0], low, args[1], args[2], over, logits)[0], None

    total, _ = jax.lax.scan(body, jnp.float32(0), _chunks(x, targets, weights, chunk))
    return over.sum_tokens(total)


def _loss_and_gradients(low, x, targets, weights, *, chunk, logits, over):
    """Sum of the losses, its gradient with respect to x, and to the head in float32."""

    # Both gradients are made while a chunk's logits exist: three products in all, none recomputed.
    def body(carry, args):
        total, grad_head = carry
        x_c, targets_c, weights_c = args
        loss, y, log_z, is_target = _chunk_loss(x_c, low, targets_c, weights_c, over, logits)
        d_logits = ((jnp.exp(y - log_z) - is_target) * weights_c[:, None]).astype(x.dtype)
        grad_head += jnp.dot(x_c.T, d_logits, preferred_element_type=jnp.float32)
        return (total + loss, grad_head), jnp.dot(d_logits, low.T)

    start = (jnp.float32(0), jnp.zeros(low.shape, jnp.float32))
    (total, grad_head), grad_x = jax.lax.scan(body, start, _chunks(x, targets, weights, chunk))
    grad_x = over.sum_vocabulary(grad_x.reshape(x.shape))
    return over.sum_tokens(total), grad_x, over.scatter_head(grad_head, x.dtype)


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static part of a call: tokens of a chunk, dtype of the logits, and the mesh."""

    chunk: int
    logits: jnp.dtype
    mesh: AbstractMesh | None


def _spread(function, options: _Options, out_specs: Any):
    """`function` on each device's tokens and columns of the head, if there is a mesh."""
    mesh = options.mesh
    function = functools.partial(function, chunk=options.chunk, logits=options.logits)
    if mesh is None:
        return functools.partial(function, over=_Alone())
    tokens = P(FFN_AXES.batch)
    return jax.shard_map(
        functools.partial(function, over=_Spread()),
        mesh=mesh,
        in_specs=(P(None, FFN_AXES.tensor), tokens, tokens, tokens),
        out_specs=out_specs,
        check_vma=False,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _summed_loss(x, head, targets, weights, options):
    low = gathered(head, x.dtype, "head")
    return _spread(_loss_alone, options, P())(low, x, targets, weights)


def _summed_loss_fwd(x, head, targets, weights, options):
    low = gathered(head, x.dtype, "head")
    out = (P(), P(FFN_AXES.batch), SPECS["head"])
    function = _spread(_loss_and_gradients, options, out)
    total, grad_x, grad_head = function(low, x, targets, weights)
    return total, (grad_x, grad_head.astype(head.dtype))


def _summed_loss_bwd(options, saved, g):
    del options
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
    logits_dtype: DTypeLike = jnp.float32,
) -> jax.Array:
    """Mean next-token cross-entropy in nats.

    Args:
      x: (T, D) hidden states in the compute dtype.
      head: (D, vocabulary) float32 weights.
      targets: (T,) int32 ids.
      weights: (T,) float32 weights of the tokens, all one when None. Their sum divides the loss.
      chunk: tokens whose logits a device holds at the same time; the largest divisor of its tokens
        up to it is used.
      logits_dtype: in which a chunk's logits are stored: products accumulate in float32, and loss
        and softmax are float32 whatever it is.

    Returns:
      float32 scalar. Its gradients with respect to `x` and `head` are computed with the loss.
    """
    tokens = x.shape[0]
    weights = jnp.ones((tokens,), jnp.float32) if weights is None else weights.astype(jnp.float32)
    mesh = current_mesh(FFN_AXES)
    devices = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in FFN_AXES.batch)
    if tokens % devices:
        raise ValueError(f"{tokens=} must be a multiple of {devices=}")
    local = tokens // devices
    size = next(c for c in range(min(chunk, local), 0, -1) if local % c == 0)
    options = _Options(size, jnp.dtype(logits_dtype), mesh)
    # Normalised before the sum, so that bf16 gradients of the chunks keep their scale.
    return _summed_loss(x, head, targets, weights / jnp.maximum(jnp.sum(weights), 1.0), options)
