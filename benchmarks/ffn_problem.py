"""Operands of the feed-forward benchmark, made of a briefly trained network, and their check."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.capture import FfnTensors
from sparsejax.prune import select24, soft_threshold, soft_threshold_beta, top2_of_4
from sparsejax.routing import (
    assign_tokens,
    cluster_neurons,
    interleave,
    permute_ffn,
    plan_tokens,
    update_bias,
)
from sparsejax.spec import Sparsity

_BIAS_STEPS = 300
_BIAS_RATE = 0.003


class Operands(NamedTuple):
    """What every contender gets; shapes with T tokens, width D, H neurons, E experts."""

    x: Array
    """(T, D) bfloat16."""
    dy: Array
    """(T, D) bfloat16: gradient of the loss by the network's output."""
    w1: Array
    """(H, D) float32, neurons in the experts' interleaved order."""
    w2: Array
    """(H, D) float32."""
    betas: Array
    """(3,) float32."""
    centers: Array
    """(E, D) float32."""
    bias: Array
    """(E,) float32."""


class GatedOperands(NamedTuple):
    """Of the dense SwiGLU with as many parameters: H' = 2 H / 3 neurons."""

    x: Array
    dy: Array
    w1: Array
    w2: Array
    wg: Array


def gated_hidden(hidden: int) -> int:
    """H' of equal parameters, a multiple of 128 where H is large enough."""
    multiple = 128 if hidden >= 1024 else 8
    return max(1, round(2 * hidden / 3 / multiple)) * multiple


def operand_shapes(width: int, hidden: int, tokens: int, experts: int) -> Operands:
    """Shapes and dtypes, to compile for before there are values."""
    array: Any = jax.ShapeDtypeStruct
    f32 = jnp.float32
    return Operands(
        x=array((tokens, width), jnp.bfloat16),
        dy=array((tokens, width), jnp.bfloat16),
        w1=array((hidden, width), f32),
        w2=array((hidden, width), f32),
        betas=array((3,), f32),
        centers=array((experts, width), f32),
        bias=array((experts,), f32),
    )


def tensor_shapes(width: int, hidden: int, tokens: int) -> FfnTensors:
    """Shapes and dtypes of captured tensors."""
    array: Any = jax.ShapeDtypeStruct
    return FfnTensors(
        x=array((tokens, width), jnp.bfloat16),
        w1=array((width, hidden), jnp.float32),
        w2=array((hidden, width), jnp.float32),
        y2=array((tokens, hidden), jnp.bfloat16),
        dy3=array((tokens, width), jnp.bfloat16),
    )


def preparation(sparsity: Sparsity) -> Callable[[FfnTensors], tuple[Operands, Array, Array]]:
    """The start of a sparse phase: clusters, order of neurons, scales, and a bias that has settled.

    The bias is fitted on the first half of the tokens, as training would have, so that the loads of
    all tokens are as uneven as a step of training finds them.

    Returns:
      A jitted function of the tensors that gives operands, the experts' loads (E,) and the rows
      that their tokens take with padding.
    """
    experts, metric = sparsity.num_experts, sparsity.metric

    @jax.jit
    def begin(t: FfnTensors) -> tuple[Operands, Array, Array]:
        w1, w2 = t.w1.T, t.w2
        clusters = cluster_neurons(w1, experts, metric=metric)
        w1, w2, _ = permute_ffn(w1, w2, interleave(clusters.assignment, sparsity.m))
        half = t.x[: t.x.shape[0] // 2]

        def settle(bias: Array, _: None) -> tuple[Array, None]:
            expert = assign_tokens(half, clusters.centers, bias, metric)
            return update_bias(bias, jnp.bincount(expert, length=experts), _BIAS_RATE), None

        bias, _ = jax.lax.scan(settle, jnp.zeros((experts,)), length=_BIAS_STEPS)
        betas = jnp.stack([soft_threshold_beta(w1), soft_threshold_beta(w2), jnp.float32(1)])
        expert = assign_tokens(t.x, clusters.centers, bias, metric)
        operands = Operands(t.x, t.dy3, w1, w2, betas, clusters.centers, bias)
        plan = plan_tokens(expert, experts, sparsity.v)
        return operands, plan.counts, plan.offsets[-1]

    return begin


def gated(t: FfnTensors, hidden: int | None = None) -> GatedOperands:
    """Operands of dense gated networks: neurons of the same network, of as many parameters or so
    many neurons. Silu leaves no zeros whose number would matter."""
    hidden = gated_hidden(t.w1.shape[1]) if hidden is None else hidden
    w1 = t.w1.T
    return jax.tree.map(
        jnp.copy, GatedOperands(t.x, t.dy3, w1[:hidden], t.w2[:hidden], w1[-hidden:])
    )


class _Weights(NamedTuple):
    w1: Array
    w2: Array


def _multiplied(o: Operands, sparse: bool) -> _Weights:
    """The weights that multiply, rounded to bfloat16, as float32."""

    def rounded(w: Array, beta: Array) -> Array:
        w = beta * soft_threshold(w) if sparse else w
        return w.astype(jnp.bfloat16).astype(jnp.float32)

    return _Weights(rounded(o.w1, o.betas[0]), rounded(o.w2, o.betas[1]))


_dot: Callable[..., Array] = functools.partial(jnp.matmul, precision="highest")


def _activations(x: Array, w1: Array, own: Array, sparse: bool) -> Array:
    """Y2 of some tokens and neurons, rounded to bfloat16, as float32; groups of four are whole."""
    y2 = jnp.where(own, jnp.square(jax.nn.relu(_dot(x, w1.T))), 0.0)
    y2 = jnp.where(select24(y2, by="value"), y2, 0.0) if sparse else y2
    return y2.astype(jnp.bfloat16).astype(jnp.float32)


def _rounded(a: Array) -> Array:
    return a.astype(jnp.bfloat16).astype(jnp.float32)


def _nearer(a: Array, b: Array, c: Array) -> Array:
    """b or c, row by row, whichever is nearer to a."""
    distance = lambda x: jnp.linalg.norm(a - x, axis=1, keepdims=True)
    return jnp.where(distance(b) < distance(c), b, c)


@functools.partial(jax.jit, static_argnames=("sparsity", "sparse"))
def errors(o: Operands, outputs: tuple[Array, ...], *, sparsity: Sparsity, sparse: bool) -> Array:
    """Relative Frobenius errors of y, dx, dw1, dw2 against float32, on samples of them.

    All neurons of a few tokens, and all tokens of a few neurons: every contraction is complete.
    With weight gradients 2:4 along tokens, a neuron's may be that or the dense one, whichever is
    nearer: which neurons are the densest is decided by counts that rounding may move.

    Args:
      o: operands.
      outputs: y and dx (T, D), dw1 and dw2 (H, D).
      sparsity: routing.
      sparse: whether weights and activations are 2:4, or only routed.

    Returns:
      (4,) float32.
    """
    y, dx, dw1, dw2 = (a.astype(jnp.float32) for a in outputs)
    w = _multiplied(o, sparse)
    x, dy = o.x.astype(jnp.float32), o.dy.astype(jnp.float32)
    expert = assign_tokens(o.x, o.centers, o.bias, sparsity.metric)[:, None]
    hidden, tokens = o.w1.shape[0], x.shape[0]
    owner = jnp.arange(hidden) % sparsity.m // 4

    # All neurons for a few tokens.
    some = jnp.r_[: min(128, tokens // 2), tokens - min(128, tokens // 2) : tokens]
    y2 = _activations(x[some], w.w1, expert[some] == owner, sparse)
    dy1 = _rounded(2 * jnp.sqrt(y2) * _dot(dy[some], w.w2.T))
    pairs = [(y[some], _dot(y2, w.w2)), (dx[some], _dot(dy1, w.w1))]

    # All tokens for a few blocks of neurons.
    few = jnp.r_[: sparsity.m, hidden - sparsity.m : hidden]
    y2 = _activations(x, w.w1[few], expert == owner[few], sparse)
    dy1 = _rounded(2 * jnp.sqrt(y2) * _dot(dy, w.w2[few].T))
    expected = [(dw1[few], _dot(dy1.T, x)), (dw2[few], _dot(y2.T, dy))]
    if sparse and sparsity.weight_gradient == "tokens24":
        plan = plan_tokens(
            expert[:, 0], sparsity.num_experts, sparsity.v, spread=sparsity.spread_tokens
        )
        rows = lambda a: a.at[plan.permutation].get(mode="fill", fill_value=0)
        kept = (top2_of_4(rows(y), axis=0).T for y in (dy1, y2))
        thin = [_dot(y, rows(g)) for y, g in zip(kept, (x, dy), strict=True)]
        expected = [
            (dw, _nearer(dw, whole, part)) for (dw, whole), part in zip(expected, thin, strict=True)
        ]
    pairs += expected
    return jnp.stack([jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in pairs])
