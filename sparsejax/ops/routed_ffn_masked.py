"""The routed feed-forward network on a GPU without sparse kernels: dense products, masked.

All tokens meet all neurons in one product, and each token keeps its expert's. That is E times the
arithmetic of `routed_ffn_blocks`, in a few large products instead of many small ones after each
other: about the time of a dense network, whatever the options. For comparing recipes, not for
speed. Of the size (T, H) there are two or three arrays at a time; what is saved is (T, h).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array

from sparsejax.ops import routed_ffn_blocks
from sparsejax.ops.packed_ffn import PackedFFN, PackedMatrix
from sparsejax.ops.routed_ffn_blocks import Saved
from sparsejax.ops.routed_ffn_rows import (
    Differentiated,
    activate,
    densest,
    differentiate,
    nonzeros,
)
from sparsejax.routing.neurons import from_expert_major, sum_shared
from sparsejax.routing.tokens import TokenPlan
from sparsejax.spec import Sparsity


def _experts(plan: TokenPlan) -> Array:
    """(T,) the expert of each token."""
    v = plan.permutation.shape[0] // plan.block_expert.shape[0]
    return plan.block_expert[plan.inverse // v]


def _rows(matrix: PackedMatrix) -> Array:
    """(E h, D): the neurons, expert by expert."""
    return matrix.dense.reshape(-1, matrix.dense.shape[-1])


def _up(x: Array, matrix: PackedMatrix, expert: Array) -> Array:
    """x (T, D) times the neurons of each token's expert: (T, h) float32."""
    product = jnp.dot(x, _rows(matrix).T, preferred_element_type=jnp.float32)
    product = product.reshape(x.shape[0], matrix.dense.shape[0], -1)
    return jnp.take_along_axis(product, expert[:, None, None], axis=1)[:, 0]


def _spread(a: Array, expert: Array, experts: int) -> Array:
    """(T, h) of each token's expert among zeros: (T, E h)."""
    own = expert[:, None] == jnp.arange(experts)
    return jnp.where(own[..., None], a[:, None], jnp.zeros((), a.dtype)).reshape(a.shape[0], -1)


def _down(a: Array, matrix: PackedMatrix) -> Array:
    """(T, E h) times the neurons' rows: (T, D) float32."""
    return jnp.dot(a, _rows(matrix), preferred_element_type=jnp.float32)


def forward(
    x: Array, packed: PackedFFN, plan: TokenPlan | None, sparsity: Sparsity, kernels: None
) -> tuple[Array, Saved]:
    """Y3 (T, D), and what `backward` needs beside weights and plan."""
    if plan is None:
        return routed_ffn_blocks.forward(x, packed, plan, sparsity, kernels)
    expert = _experts(plan)
    gate = None if packed.wg is None else _up(x, packed.wg, expert)
    y1 = _up(x, packed.w1, expert)
    y2, rows = activate(y1, gate, activations=sparsity.activations, dtype=x.dtype)
    y3 = _down(_spread(y2, expert, sparsity.num_experts), packed.w2)
    return y3.astype(x.dtype), Saved(x, rows)


def backward(
    dy: Array,
    saved: Saved,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
    kernels: None,
) -> tuple[Array, list[Array | None]]:
    """dX (T, D) in x's dtype; dw1, dw2 and dwg (H, D) in float32."""
    if plan is None:
        return routed_ffn_blocks.backward(dy, saved, packed, plan, sparsity, kernels)
    x, rows = saved
    expert, experts = _experts(plan), sparsity.num_experts
    exact = differentiate(_up(dy, packed.w2, expert), rows)
    spread = lambda a: _spread(a, expert, experts)
    dx = _down(spread(exact.dy1), packed.w1)
    if exact.dgate is not None:
        assert packed.wg is not None
        dx += _down(spread(exact.dgate), packed.wg)
    y2, dy1, dgate = exact
    if sparsity.weight_gradient == "tokens24":
        own = expert[:, None] == jnp.arange(experts)
        counts = jnp.einsum("te,th->eh", own.astype(jnp.int32), nonzeros(rows).astype(jnp.int32))
        dense = densest(counts, sparsity.densest(counts.shape[1]))
        y2, dy1, dgate = _thinned(exact, plan, dense)

    def gradient(a: Array | None, b: Array) -> Array | None:
        if a is None:
            return None
        product = jnp.dot(spread(a).T, b, preferred_element_type=jnp.float32)
        return sum_shared(from_expert_major(product.reshape(experts, -1, b.shape[1]), 0), sparsity)

    return dx.astype(x.dtype), [gradient(dy1, x), gradient(y2, dy), gradient(dgate, x)]


def _thinned(exact: Differentiated, plan: TokenPlan, dense: Array) -> Differentiated:
    """`Differentiated.thinned` in the blocks of the plan's layout; back in the tokens' order."""
    blocks = plan.block_expert.shape[0]

    def lay_out(a: Array) -> Array:
        rows = a.at[plan.permutation].get(mode="fill", fill_value=0)
        return rows.reshape(blocks, -1, a.shape[1])

    chosen = jax.vmap(Differentiated.thinned)(
        jax.tree.map(lay_out, exact), dense[plan.block_expert]
    )
    return jax.tree.map(lambda a: a.reshape(-1, a.shape[2])[plan.inverse], chosen)
