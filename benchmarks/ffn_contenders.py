"""Feed-forward networks to compare: dense, routed alone, routed and 2:4."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.ffn_problem import GatedOperands, Operands
from sparsejax.ops import pack_ffn, routed_ffn
from sparsejax.ops.dense import product
from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.ops.relu2 import relu2_of_kept
from sparsejax.routing import assign_tokens, plan_tokens, to_expert_major
from sparsejax.spec import Precision, Sparsity

Network = Callable[..., Any]
"""Operands to the output (T, D) in bfloat16, or to output and gradients."""


def _both(function: Callable[..., Array], dy: Array, *inputs: Array) -> tuple[Array, ...]:
    # The output is returned: otherwise the compiler would leave out the product that makes it.
    y, vjp = jax.vjp(function, *inputs)
    return y, *vjp(dy)


def relu2(backward: bool) -> Network:
    """XLA's dense network, relu(X W1)^2 W2, from float32 masters."""

    def network(x: Array, w1: Array, w2: Array) -> Array:
        w1, w2 = w1.astype(x.dtype), w2.astype(x.dtype)
        return jnp.square(jax.nn.relu(x @ w1.T)) @ w2

    def dense_relu2(o: Operands) -> Any:
        return _both(network, o.dy, o.x, o.w1, o.w2) if backward else network(o.x, o.w1, o.w2)

    return dense_relu2


def relu2_fp8(backward: bool) -> Network:
    """The dense network with all six products in 8 bits, by XLA (`sparsejax.ops.dot_fp8`)."""
    dot = product("fp8")

    def network(x: Array, w1: Array, w2: Array) -> Array:
        w1, w2 = w1.astype(x.dtype), w2.astype(x.dtype)
        return dot(relu2_of_kept(dot(x, w1, axis=1)), w2, axis=0)

    def dense_relu2_fp8(o: Operands) -> Any:
        return _both(network, o.dy, o.x, o.w1, o.w2) if backward else network(o.x, o.w1, o.w2)

    return dense_relu2_fp8


def swiglu(backward: bool) -> Network:
    """XLA's dense silu(X Wg) * (X W1) W2, from float32 masters."""

    def network(x: Array, w1: Array, w2: Array, wg: Array) -> Array:
        w1, w2, wg = (w.astype(x.dtype) for w in (w1, w2, wg))
        return (jax.nn.silu(x @ wg.T) * (x @ w1.T)) @ w2

    def dense_swiglu(o: GatedOperands) -> Any:
        if backward:
            return _both(network, o.dy, o.x, o.w1, o.w2, o.wg)
        return network(o.x, o.w1, o.w2, o.wg)

    return dense_swiglu


def relu2_gated(backward: bool) -> Network:
    """XLA's dense relu(X W1)^2 * (X Wg) W2, from float32 masters."""

    def network(x: Array, w1: Array, w2: Array, wg: Array) -> Array:
        w1, w2, wg = (w.astype(x.dtype) for w in (w1, w2, wg))
        return (jnp.square(jax.nn.relu(x @ w1.T)) * (x @ wg.T)) @ w2

    def dense_relu2_gated(o: GatedOperands) -> Any:
        if backward:
            return _both(network, o.dy, o.x, o.w1, o.w2, o.wg)
        return network(o.x, o.w1, o.w2, o.wg)

    return dense_relu2_gated


def _routed(o: Operands, packed: PackedFFN, sparsity: Sparsity) -> Callable[..., Array]:
    """Routing and the routed network, a function of x, W1, W2 and, gated, Wg."""

    def network(x: Array, w1: Array, w2: Array, wg: Array | None = None) -> Array:
        expert = assign_tokens(x, o.centers, o.bias, sparsity.metric)
        plan = plan_tokens(expert, sparsity.num_experts, sparsity.v, spread=sparsity.spread_tokens)
        return routed_ffn(x, w1, w2, wg, packed, plan, sparsity)

    return network


def sparse_gated(sparsity: Sparsity, backward: bool) -> Network:
    """Routing, packing and the gated routed network on one backend's kernels."""

    def routed_24_gated(o: tuple[Operands, Array]) -> Any:
        own, wg = o
        network = _routed(own, pack_ffn(own.w1, own.w2, wg, own.betas, sparsity), sparsity)
        inputs = own.x, own.w1, own.w2, wg
        return _both(network, own.dy, *inputs) if backward else network(*inputs)

    return routed_24_gated


def sparse(sparsity: Sparsity, backward: bool, precision: Precision = "compute") -> Network:
    """Routing, packing and the routed network on one backend's kernels."""

    def routed_24(o: Operands) -> Any:
        packed = pack_ffn(o.w1, o.w2, None, o.betas, sparsity, precision=precision)
        network = _routed(o, packed, sparsity)
        return _both(network, o.dy, o.x, o.w1, o.w2) if backward else network(o.x, o.w1, o.w2)

    return routed_24


def ragged(sparsity: Sparsity, backward: bool) -> Network:
    """The same routing without 2:4: grouped dense products by jax.lax.ragged_dot, no padding."""
    experts = sparsity.num_experts

    def network(o: Operands, x: Array, w1: Array, w2: Array) -> Array:
        plan = plan_tokens(assign_tokens(x, o.centers, o.bias, sparsity.metric), experts, 1)
        w1, w2 = (to_expert_major(w.astype(x.dtype), 0, experts) for w in (w1, w2))
        rows = x[plan.permutation]
        y2 = jnp.square(jax.nn.relu(jax.lax.ragged_dot(rows, w1.swapaxes(1, 2), plan.counts)))
        return jax.lax.ragged_dot(y2, w2, plan.counts)[plan.inverse]

    def routed_ragged(o: Operands) -> Any:
        call = functools.partial(network, o)
        return _both(call, o.dy, o.x, o.w1, o.w2) if backward else call(o.x, o.w1, o.w2)

    return routed_ragged


def batched(sparsity: Sparsity, capacity: int, backward: bool) -> Network:
    """The same routing without 2:4 as one batched product, each expert with room for `capacity`.

    Training cannot know the largest load beforehand, so this is a bound on what XLA's dense
    products can do, not a way to train.
    """
    experts = sparsity.num_experts

    def network(o: Operands, x: Array, w1: Array, w2: Array) -> Array:
        expert = assign_tokens(x, o.centers, o.bias, sparsity.metric)
        plan = plan_tokens(expert, experts, 1)
        place = jnp.arange(capacity, dtype=jnp.int32)
        source = jnp.minimum(plan.offsets[:-1, None] + place, x.shape[0] - 1)
        token = jnp.where(place < plan.counts[:, None], plan.permutation[source], x.shape[0])
        rows = x.at[token].get(mode="fill", fill_value=0)
        w1, w2 = (to_expert_major(w.astype(x.dtype), 0, experts) for w in (w1, w2))
        y2 = jnp.square(jax.nn.relu(jnp.einsum("ecd,ehd->ech", rows, w1)))
        y3 = jnp.einsum("ech,ehd->ecd", y2, w2).reshape(experts * capacity, -1)
        return y3[expert * capacity + plan.inverse - plan.offsets[expert]]

    def routed_batched(o: Operands) -> Any:
        call = functools.partial(network, o)
        return _both(call, o.dy, o.x, o.w1, o.w2) if backward else call(o.x, o.w1, o.w2)

    return routed_batched
