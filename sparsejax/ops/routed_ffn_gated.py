"""The gated routed network on kernels: Y2 = two of four of relu(X W1)^2 * (X Wg), Y3 = Y2 W2.

All products are grouped products of a backend (`routed_ffn_grouped`), and all but the weight
gradients have a 2:4 operand:

    up24_linear       Y1 = X W1, Yg = X Wg, and dY2 = dY3 W2^T
    pack24            Y2, and the gradients dY1 and dYg, to 2:4 operands
    down24            Y3 = Y2 W2, dX = dY1 W1^T + dYg Wg^T
    weight_gradient   dW1^T = dY1^T X, dWg^T = dYg^T X, dW2 = Y2^T dY3

Between them XLA does what is elementwise. The choice of two of four is made once, in float32, on
Y1 and Yg as they come from their kernels, in x's dtype; the other paths choose on accumulators, so
that near-ties may fall the other way. Everything that follows takes the support from the outcome:
where a neuron was not kept, its relu is saved as zero, and so Y2, dY1 and dYg are zero there.
Packing never chooses: it finds at most two non-zeros in four.

Saved: x, the kept relu(Y1) among zeros, and Yg whole: 4 bytes for each token and live neuron in
16 bits. Kept halves would be 2 to hold, but passes of their own to make and to spread. As XLA fuses
it, 41 bytes move for each: 6 when Y1, Yg and dY2 are stored, 14 to gate and 3 to pack in the
forward pass, 12 and 6 in the backward one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels import registry
from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.ops.routed_ffn_grouped import (
    Functions,
    batchable,
    down,
    layout_of,
    module,
    options_of,
    order,
    shards_of,
    stack,
    weight_gradients,
)
from sparsejax.ops.routed_ffn_rows import Rows, differentiate
from sparsejax.prune import select24
from sparsejax.routing.tokens import TokenPlan
from sparsejax.spec import Sparsity


class Saved(NamedTuple):
    """What `backward` needs of `forward`, beside weights and plan."""

    x: Array
    """(T_pad, D): the tokens in the order of the plan, so that they are permuted once."""
    rows: Rows
    """(T_pad, h) in x's dtype: relu(Y1) with zeros where a neuron was not kept, and Yg."""


def gate(y1: Array, yg: Array) -> tuple[Array, Rows]:
    """Y2 with two of four, by magnitude, ties to the lower index; and what is kept of it.

    Args:
      y1, yg: (T_pad, h), the products with W1 and Wg; computed with in float32.

    Returns:
      Y2 in their dtype, `Rows`.
    """
    r = jnp.maximum(y1.astype(jnp.float32), 0.0)
    y2 = r * r * yg.astype(jnp.float32)
    keep = select24(y2, -1, "magnitude")
    y2, r = (jnp.where(keep, a, 0.0).astype(y1.dtype) for a in (y2, r))
    return y2, Rows(r, yg)


def pack(y: Array, kernels: registry.Backend) -> tuple[Array, Array]:
    """values (T_pad, h / 2) and metadata of a matrix that is 2:4 along its rows already."""
    function, _ = registry.load("pack24", kernels)
    packing = registry.traced_once(function, ("axis", "mode", "dtype"))
    return packing(y, axis=1, mode="magnitude", dtype=y.dtype)


def forward(
    x: Array,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
    kernels: registry.Backend,
) -> tuple[Array, Saved]:
    """Y3 (T, D), and what `backward` needs."""
    functions = Functions(module(kernels))

    def network(x: Array, packed: PackedFFN, plan: TokenPlan | None) -> tuple[Array, Saved]:
        assert packed.wg is not None
        tokens = x.shape[0]
        layout, by_row = layout_of(tokens, plan, sparsity), order(tokens, plan, sparsity)
        x, options = stack(x, plan, sparsity), options_of(packed, layout, sparsity)
        y1, yg = (
            functions.up24_linear(w.values, w.metadata, x, *layout, **options)
            for w in (packed.w1, packed.wg)
        )
        y2, rows = gate(y1, yg)
        kept = pack(y2, kernels)
        y3 = down(functions, kept, packed.w2.dense, layout, tokens, by_row, options)
        return y3, Saved(x, rows)

    return batchable(network, kernels)(x, packed, plan)


def backward(
    dy: Array,
    saved: Saved,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
    kernels: registry.Backend,
) -> tuple[Array, tuple[Array, Array, Array]]:
    """dX (T, D) in x's dtype; dw1, dw2 and dwg (H, D) in float32."""
    functions = Functions(module(kernels))

    def network(dy, saved, packed, plan):
        tokens = dy.shape[0]
        layout, by_row = layout_of(tokens, plan, sparsity), order(tokens, plan, sparsity)
        shards, options = shards_of(layout, sparsity), options_of(packed, layout, sparsity)
        live = saved.rows.live
        weight_gradient = weight_gradients(
            functions, live, layout, sparsity, padding=packed.padding, **shards
        )
        dy = stack(dy, plan, sparsity)
        dy2 = functions.up24_linear(packed.w2.values, packed.w2.metadata, dy, *layout, **options)
        y2, dy1, dyg = differentiate(dy2.astype(jnp.float32), saved.rows)
        assert dyg is not None
        dx1, dxg = (
            down(functions, pack(d, kernels), w.dense, layout, tokens, by_row, options)
            for d, w in ((dy1, packed.w1), (dyg, packed.wg))
        )
        dw1, dwg = (weight_gradient(d, saved.x) for d in (dy1, dyg))
        return dx1 + dxg, (dw1, weight_gradient(y2, dy), dwg)

    return batchable(network, kernels)(dy, saved, packed, plan)
