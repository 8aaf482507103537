"""The routed feed-forward network in jax.numpy, a block of V tokens at a time.

Serves every option on every device, and is the definition that the kernels are compared with. On a
CPU it is the fastest path: nothing is masked out, and a block stays in the cache.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.ops.routed_ffn_rows import (
    Rows,
    activate,
    densest,
    differentiate,
    nonzeros,
)
from sparsejax.routing.neurons import from_expert_major, sum_shared
from sparsejax.routing.tokens import TokenPlan
from sparsejax.spec import Sparsity


class _Weights(NamedTuple):
    """(E, h, D) each, or (h, D) of one expert."""

    w1: Array
    w2: Array
    wg: Array | None

    def expert(self, e: Array | int) -> _Weights:
        return jax.tree.map(lambda w: w[e], self)


def _weights(packed: PackedFFN) -> _Weights:
    gate = None if packed.wg is None else packed.wg.dense
    return _Weights(packed.w1.dense, packed.w2.dense, gate)


class Saved(NamedTuple):
    """What `backward` needs of `forward`: the tokens (T, D) as they came, and their activations."""

    x: Array
    rows: Rows


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward_rows(x: Array, w: _Weights, activations: bool) -> tuple[Array, Rows]:
    """Rows of one expert: x (rows, D), weights (h, D) to Y3 (rows, D)."""
    gate = None if w.wg is None else _dot(x, w.wg, (1, 1))
    y2, rows = activate(_dot(x, w.w1, (1, 1)), gate, activations=activations, dtype=x.dtype)
    return _dot(y2, w.w2, (1, 0)).astype(x.dtype), rows


def _backward_rows(
    x: Array, dy: Array, rows: Rows, w: _Weights, dense: Array | None, spread: bool = False
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of one expert's rows: dX in x's dtype; dw1, dw2, dwg (h, D) in float32.

    `dense` (h,) says which neurons' weight gradients see all tokens; None: all neurons'. `spread`
    as for `two_of_four_tokens`.
    """
    exact = differentiate(_dot(dy, w.w2, (1, 1)), rows)
    dx = _dot(exact.dy1, w.w1, (1, 0))
    if exact.dgate is not None:
        assert w.wg is not None
        dx += _dot(exact.dgate, w.wg, (1, 0))
    y2, dy1, dgate = exact if dense is None else exact.thinned(dense, spread)
    dw1, dw2 = _dot(dy1, x, (0, 0)), _dot(y2, dy, (0, 0))
    return dx.astype(x.dtype), dw1, dw2, None if dgate is None else _dot(dgate, x, (0, 0))


def _rows_of(x: Array, rows: Array) -> Array:
    return jnp.asarray(x).at[rows].get(mode="fill", fill_value=0)


def forward(
    x: Array, packed: PackedFFN, plan: TokenPlan | None, sparsity: Sparsity, kernels: None
) -> tuple[Array, Saved]:
    """Y3 (T, D), and what `backward` needs beside weights and plan."""
    del kernels
    weights = _weights(packed)
    if plan is None:
        y, rows = _forward_rows(x, weights.expert(0), sparsity.activations)
        return y, Saved(x, rows)

    # A block of V rows at a time: weights are read where they lie, nothing is masked out, and no
    # float32 copy of the activations outlives its block.
    def block(_, inputs):
        rows, e = inputs
        return None, _forward_rows(_rows_of(x, rows), weights.expert(e), sparsity.activations)

    blocks = plan.permutation.reshape(plan.block_expert.shape[0], -1)
    _, (y, rows) = jax.lax.scan(block, None, (blocks, plan.block_expert))
    return y.reshape(-1, x.shape[1])[plan.inverse], Saved(x, rows)


def backward(
    dy: Array,
    saved: Saved,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
    kernels: None,
) -> tuple[Array, list[Array | None]]:
    """dX (T, D) in x's dtype; dw1, dw2 and dwg (H, D) in float32."""
    del kernels
    x, saved_rows = saved
    weights = _weights(packed)
    dense = None
    if sparsity.weight_gradient == "tokens24":
        experts, live, _ = weights.w1.shape
        dense = _densest(saved_rows, plan, experts, sparsity.densest(live))
    if plan is None:
        own = None if dense is None else dense[0]
        dx, *dw = _backward_rows(x, dy, saved_rows, weights.expert(0), own, spread=True)
        return dx, dw

    def block(dw, inputs):
        rows, e, own_rows = inputs
        own = None if dense is None else dense[e]
        parts = _rows_of(x, rows), _rows_of(dy, rows)
        dx, *new = _backward_rows(*parts, own_rows, weights.expert(e), own)
        return [None if d is None else d.at[e].add(o) for d, o in zip(dw, new, strict=True)], dx

    zeros = [None if w is None else jnp.zeros(w.shape, jnp.float32) for w in weights]
    blocks = plan.permutation.reshape(plan.block_expert.shape[0], -1)
    dw, dx = jax.lax.scan(block, zeros, (blocks, plan.block_expert, saved_rows))
    dw = [None if d is None else sum_shared(from_expert_major(d, 0), sparsity) for d in dw]
    return dx.reshape(-1, x.shape[1])[plan.inverse], dw


def _densest(saved: Rows, plan: TokenPlan | None, experts: int, number: int) -> Array:
    """(E, h) bool."""
    counts = jnp.sum(nonzeros(saved), axis=-2, dtype=jnp.int32)  # of all rows, or of each block
    if plan is None:
        return densest(counts[None], number)
    return densest(jax.ops.segment_sum(counts, plan.block_expert, experts), number)
