"""The routed feed-forward network as one differentiable op, so that what it saves is chosen.

    Y2 = relu(X W1)^2  [ * (X Wg) ],    Y3 = Y2 W2

Each token meets only its expert's neurons; of four live neurons in a row it keeps two; the weights
are soft-thresholded 2:4. Gradients go straight through to the dense master weights.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sparsejax.prune import select24, soft_threshold
from sparsejax.routing.neurons import from_expert_major, to_expert_major
from sparsejax.routing.tokens import TokenPlan, padded_tokens
from sparsejax.spec import Sparsity
from sparsejax.vnm import kept_pairs, spread_pairs


class PackedFFN(NamedTuple):
    """Weights of a feed-forward network as the sparse products read them; made by `pack_ffn`."""

    w1: Any
    """(E, h, D) array, h = H / E live neurons."""
    w2: Any
    """(E, h, D) array."""
    wg: Any = None
    """As w1, for the gated form."""


def _check_weights(w1: Array, w2: Array, wg: Array | None, sparsity: Sparsity) -> tuple[int, int]:
    if w1.ndim != 2 or w2.shape != w1.shape or (wg is not None and wg.shape != w1.shape):
        gate = None if wg is None else wg.shape
        raise ValueError(f"{w1.shape=}, {w2.shape=}, wg {gate} must all be (hidden, width)")
    hidden, width = w1.shape
    sparsity.validate(width=width, hidden=hidden)
    if sparsity.backend not in (None, "reference"):
        raise NotImplementedError(f"backend={sparsity.backend!r} does not serve routed_ffn yet")
    return width, hidden


def pack_ffn(
    w1: Array,
    w2: Array,
    wg: Array | None,
    betas: Array | None,
    sparsity: Sparsity,
    *,
    dtype: DTypeLike = jnp.bfloat16,
) -> PackedFFN:
    """Thresholds, scales and lays out the weights: once for each optimiser step.

    beta S(w) along the width D, in float32, rounded once (w itself where `sparsity.weights` is
    off), then split by expert: the neurons must be in `interleave`'s order.

    Args:
      w1, w2: (H, D). wg: (H, D) or None. Floating point; a row is a neuron.
      betas: (3,) float32: scales of w1, w2 and wg (`soft_threshold_beta`); None only where weights
        stay dense.
      sparsity: what is sparse.
      dtype: of the packed weights: the compute dtype.

    Returns:
      `PackedFFN`.
    """
    _check_weights(w1, w2, wg, sparsity)
    if sparsity.weights and (betas is None or betas.shape != (3,)):
        shape = None if betas is None else betas.shape
        raise ValueError(f"betas of shape {shape} must be (3,): one for each of w1, w2, wg")

    def pack(w: Array, i: int) -> Array:
        if sparsity.weights:
            assert betas is not None
            w = betas[i] * soft_threshold(w.astype(jnp.float32), 1)
        return to_expert_major(w.astype(dtype), 0, sparsity.num_experts)

    return PackedFFN(pack(w1, 0), pack(w2, 1), None if wg is None else pack(wg, 2))


class _Rows(NamedTuple):
    """What the backward pass needs of the activations of some rows.

    Two-matrix form: Y2 (rows, h), which holds relu(X W1) as its root and the support as its
    non-zeros. Gated form: relu(X W1) and X Wg, which with 2:4 are the kept halves (rows, h / 2).
    """

    live: Array
    gate: Array | None = None
    positions: Array | None = None
    """(rows, h / 4) uint8, i0 | i1 << 2: where the kept halves belong."""


def _dot(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def _forward_rows(x: Array, w: PackedFFN, activations: bool) -> tuple[Array, _Rows]:
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
    x: Array, dy: Array, rows: _Rows, w: PackedFFN
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients of one expert's rows: dX in x's dtype; dW1, dW2, dWg in float32.

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
        dx = _dot(dy1, w.w1, (1, 0)) + _dot(dgate, w.wg, (1, 0))
        dwg = _dot(dgate, x, (0, 0))
    return dx.astype(x.dtype), _dot(dy1, x, (0, 0)), _dot(y2, dy, (0, 0)), dwg


def _rows_of(x: Array, rows: Array) -> Array:
    return jnp.asarray(x).at[rows].get(mode="fill", fill_value=0)


def _expert(packed: PackedFFN, e: Array | int) -> PackedFFN:
    return jax.tree.map(lambda w: w[e], packed)


def _forward(
    x: Array, packed: PackedFFN, plan: TokenPlan | None, sparsity: Sparsity
) -> tuple[Array, _Rows]:
    if plan is None:
        return _forward_rows(x, _expert(packed, 0), sparsity.activations)

    # A block of V rows at a time: weights are read where they lie, nothing is masked out, and no
    # float32 copy of the activations outlives its block.
    def block(_, inputs):
        rows, e = inputs
        return None, _forward_rows(_rows_of(x, rows), _expert(packed, e), sparsity.activations)

    blocks = plan.permutation.reshape(plan.block_expert.shape[0], -1)
    _, (y, saved) = jax.lax.scan(block, None, (blocks, plan.block_expert))
    return y.reshape(-1, x.shape[1])[plan.inverse], saved


@partial(jax.custom_vjp, nondiff_argnums=(6,))
def _routed_ffn(x, w1, w2, wg, packed, plan, sparsity):
    del w1, w2, wg
    return _forward(x, packed, plan, sparsity)[0]


def _routed_ffn_fwd(x, w1, w2, wg, packed, plan, sparsity):
    y, saved = _forward(x, packed, plan, sparsity)
    # Of the master weights only the dtypes matter; arrays of no elements carry them.
    dtypes = tuple(None if w is None else jnp.zeros((0,), w.dtype) for w in (w1, w2, wg))
    return y, (x, saved, packed, plan, dtypes)


def _routed_ffn_bwd(sparsity, residuals, dy):
    del sparsity
    x, saved, packed, plan, dtypes = residuals
    if plan is None:
        dx, *dw = _backward_rows(x, dy, saved, _expert(packed, 0))
        dw = [None if d is None else d[None] for d in dw]
    else:

        def block(dw, inputs):
            rows, e, saved_rows = inputs
            dx, *own = _backward_rows(
                _rows_of(x, rows), _rows_of(dy, rows), saved_rows, _expert(packed, e)
            )
            return [None if d is None else d.at[e].add(o) for d, o in zip(dw, own, strict=True)], dx

        zeros = [
            None if w is None else jnp.zeros(w.shape, jnp.float32)
            for w in (packed.w1, packed.w2, packed.wg)
        ]
        blocks = plan.permutation.reshape(plan.block_expert.shape[0], -1)
        dw, dx = jax.lax.scan(block, zeros, (blocks, plan.block_expert, saved))
        dx = dx.reshape(-1, x.shape[1])[plan.inverse]
    dw1, dw2, dwg = (
        None if d is None else from_expert_major(d, 0).astype(like.dtype)
        for d, like in zip(dw, dtypes, strict=True)
    )
    # None: no gradient into the packed weights (it goes straight through) nor into the plan.
    return dx, dw1, dw2, dwg, None, None


_routed_ffn.defvjp(_routed_ffn_fwd, _routed_ffn_bwd)


def routed_ffn(
    x: Array,
    w1: Array,
    w2: Array,
    wg: Array | None,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
) -> Array:
    """(relu(x W1)^2 [* (x Wg)]) W2 with V:N:M activations and 2:4 weights.

    The values come from `packed` alone. w1, w2 and wg are here to receive gradients: straight
    through beta S(w), in their own dtype (equation 7 of arXiv 2409.09099). The choice of two of
    four is made on float32 accumulators, by magnitude, ties to the lower index, and the gradient
    has the same support. Products accumulate in float32; Y2, its gradient and the results are
    rounded to x's dtype.

    Saved for the backward pass: x as it came, T_pad h numbers in x's dtype (twice that for the
    gated form without 2:4), the plan and the packed weights.

    Args:
      x: (T, D), the dtype of `packed`.
      w1, w2: (H, D). wg: (H, D) or None. Row n is neuron n, in `interleave`'s order: w1 and wg
        are the transposes of W1 and Wg.
      packed: `pack_ffn` of these weights.
      plan: `plan_tokens` of these tokens with E = M / 4 experts; None if there is one expert.
      sparsity: what is sparse; static.

    Returns:
      (T, D) in x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit. NotImplementedError: no such backend yet.
    """
    x, w1, w2 = jnp.asarray(x), jnp.asarray(w1), jnp.asarray(w2)
    wg = None if wg is None else jnp.asarray(wg)
    width, hidden = _check_weights(w1, w2, wg, sparsity)
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{x.shape=} must be (tokens, {width})")
    experts, live = sparsity.num_experts, sparsity.live_neurons(hidden)
    if packed.w1.shape != (experts, live, width) or packed.w2.shape != packed.w1.shape:
        raise ValueError(
            f"{packed.w1.shape=} and {packed.w2.shape=} must hold {experts} experts of {live=}"
        )
    if (wg is None) != (packed.wg is None):
        raise ValueError("packed weights and wg must both have a gate, or neither")
    if packed.w1.dtype != x.dtype:
        raise ValueError(f"{packed.w1.dtype=} must be {x.dtype=}")
    if experts == 1:
        plan = None
    elif plan is None:
        raise ValueError(f"a plan is needed for {experts} experts")
    else:
        rows = padded_tokens(x.shape[0], experts, sparsity.v)
        blocks = rows // sparsity.v
        if plan.permutation.shape != (rows,) or plan.block_expert.shape != (blocks,):
            raise ValueError(
                f"{plan.permutation.shape=} must be {(rows,)} for {x.shape[0]} tokens, "
                f"{experts} experts and v={sparsity.v}"
            )
    return _routed_ffn(x, w1, w2, wg, packed, plan, sparsity)
