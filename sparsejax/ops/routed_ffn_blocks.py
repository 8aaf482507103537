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
from sparsejax.prune import select24
from sparsejax.routing.neurons import from_expert_major
from sparsejax.routing.tokens import TokenPlan
from sparsejax.spec import Sparsity
from sparsejax.vnm import kept_pairs, spread_pairs


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


class _Rows(NamedTuple):
    """What the backward pass needs of the activations of some rows.

    Two-matrix form: Y2 (rows, h), which holds relu(X W1) as its root and the support as its
    non-zeros. Gated form: relu(X W1) and X Wg, which with 2:4 are the kept halves (rows, h / 2).
    """

    live: Array
    gate: Array | None = None
    positions: Array | None = None
    """(rows, h / 4) uint8, i0 | i1 << 2: where the kept halves belong."""


class _Saved(NamedTuple):
    """What `backward` needs of `forward`: the tokens (T, D) as they came, and their activations."""

    x: Array
    rows: _Rows


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward_rows(x: Array, w: _Weights, activations: bool) -> tuple[Array, _Rows]:
    """Rows of one expert: x (rows, D), weights (h, D) to Y3 (rows, D)."""
    r = jnp.maximum(_dot(x, w.w1, (1, 1)), 0.0)
    gate = None if w.wg is None else _dot(x, w.wg, (1, 1))
    y2 = r * r if gate is None else r * r * gate
    # Chosen on the float32 accumulators: rounding first would change the choice.
    keep = select24(y2, -1, "magnitude") if activations else None
    y2 = (y2 if keep is None else jnp.where(keep, y2, 0.0)).astype(x.dtype)
    if gate is None:
        rows = _Rows(y2)
    elif keep is None:
        rows = _Rows(r.astype(x.dtype), gate.astype(x.dtype))
    else:
        rows = _Rows(*kept_pairs(keep, r.astype(x.dtype), gate.astype(x.dtype)))
    return _dot(y2, w.w2, (1, 0)).astype(x.dtype), rows


def _backward_rows(
    x: Array, dy: Array, rows: _Rows, w: _Weights
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of one expert's rows: dX in x's dtype; dw1, dw2, dwg (h, D) in float32.

    The support needs no mask of its own: it is where relu(X W1) was saved and is positive. The
    derivative is zero elsewhere, because of relu or because the element was not kept.
    """
    dy2 = _dot(dy, w.w2, (1, 1))
    if rows.gate is None:
        y2 = rows.live
        dy1 = (2.0 * jnp.sqrt(y2.astype(jnp.float32)) * dy2).astype(x.dtype)
        dx = _dot(dy1, w.w1, (1, 0))
        dwg = None
    else:
        r, gate = rows.live, rows.gate
        if rows.positions is not None:
            r, gate = (spread_pairs(half, rows.positions) for half in (r, gate))
        r, gate = r.astype(jnp.float32), gate.astype(jnp.float32)
        y2 = (r * r * gate).astype(x.dtype)
        dy1 = (2.0 * r * gate * dy2).astype(x.dtype)
        dgate = (r * r * dy2).astype(x.dtype)
        assert w.wg is not None
        dx = _dot(dy1, w.w1, (1, 0)) + _dot(dgate, w.wg, (1, 0))
        dwg = _dot(dgate, x, (0, 0))
    return dx.astype(x.dtype), _dot(dy1, x, (0, 0)), _dot(y2, dy, (0, 0)), dwg


def _rows_of(x: Array, rows: Array) -> Array:
    return jnp.asarray(x).at[rows].get(mode="fill", fill_value=0)


def forward(
    x: Array, packed: PackedFFN, plan: TokenPlan | None, sparsity: Sparsity, kernels: None
) -> tuple[Array, _Saved]:
    """Y3 (T, D), and what `backward` needs beside weights and plan."""
    del kernels
    weights = _weights(packed)
    if plan is None:
        y, rows = _forward_rows(x, weights.expert(0), sparsity.activations)
        return y, _Saved(x, rows)

    # A block of V rows at a time: weights are read where they lie, nothing is masked out, and no
    # float32 copy of the activations outlives its block.
    def block(_, inputs):
        rows, e = inputs
        return None, _forward_rows(_rows_of(x, rows), weights.expert(e), sparsity.activations)

    blocks = plan.permutation.reshape(plan.block_expert.shape[0], -1)
    _, (y, rows) = jax.lax.scan(block, None, (blocks, plan.block_expert))
    return y.reshape(-1, x.shape[1])[plan.inverse], _Saved(x, rows)


def backward(
    dy: Array,
    saved: _Saved,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
    kernels: None,
) -> tuple[Array, list[Array | None]]:
    """dX (T, D) in x's dtype; dw1, dw2 and dwg (H, D) in float32."""
    del sparsity, kernels
    x, saved_rows = saved
    weights = _weights(packed)
    if plan is None:
        dx, *dw = _backward_rows(x, dy, saved_rows, weights.expert(0))
        return dx, dw

    def block(dw, inputs):
        rows, e, own_rows = inputs
        dx, *own = _backward_rows(_rows_of(x, rows), _rows_of(dy, rows), own_rows,
                                  weights.expert(e))  # fmt: skip
        return [None if d is None else d.at[e].add(o) for d, o in zip(dw, own, strict=True)], dx

    zeros = [None if w is None else jnp.zeros(w.shape, jnp.float32) for w in weights]
    blocks = plan.permutation.reshape(plan.block_expert.shape[0], -1)
    dw, dx = jax.lax.scan(block, zeros, (blocks, plan.block_expert, saved_rows))
    dw = [None if d is None else from_expert_major(d, 0) for d in dw]
    return dx.reshape(-1, x.shape[1])[plan.inverse], dw
