"""The routed feed-forward network as one differentiable op, so that what it saves is chosen.

    Y2 = relu(X W1)^2  [ * (X Wg) ],    Y3 = Y2 W2

Each token meets only its expert's neurons; of four live neurons in a row it keeps two; the weights
are soft-thresholded 2:4. Gradients go straight through to the dense master weights.

Five paths compute it. `routed_ffn_grouped` calls kernels on sparse tensor cores, a set for each
backend, `routed_ffn_gated` those of the gated form, and `routed_ffn_fp8` those of 8-bit floats;
`routed_ffn_blocks` is a scan in jax.numpy
that serves every option on every device; `routed_ffn_masked` does the same where a scan of small
products would be slow, on GPUs.
"""

from __future__ import annotations

from functools import partial
from typing import get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels import registry
from sparsejax import stored_once
from sparsejax.ops import (
    routed_ffn_blocks,
    routed_ffn_fp8,
    routed_ffn_gated,
    routed_ffn_grouped,
    routed_ffn_masked,
)
from sparsejax.ops.packed_ffn import PackedFFN, PackedMatrix
from sparsejax.prune import soft_threshold
from sparsejax.remat import keep
from sparsejax.routing.neurons import repeat_shared, to_expert_major
from sparsejax.routing.tokens import TokenPlan, padded_tokens
from sparsejax.spec import Precision, Sparsity


def _check_weights(w1: Array, w2: Array, wg: Array | None, sparsity: Sparsity) -> tuple[int, int]:
    """Width and hidden size."""
    if w1.ndim != 2 or w2.shape != w1.shape or (wg is not None and wg.shape != w1.shape):
        gate = None if wg is None else wg.shape
        raise ValueError(f"{w1.shape=}, {w2.shape=}, wg {gate} must all be (hidden, width)")
    hidden, width = w1.shape
    sparsity.validate(width=width, hidden=hidden)
    return width, hidden


def pack_ffn(
    w1: Array,
    w2: Array,
    wg: Array | None,
    betas: Array | None,
    sparsity: Sparsity,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    precision: Precision = "compute",
) -> PackedFFN:
    """Thresholds, scales and lays out the weights: once for each optimiser step.

    beta S(w) along the width D, in float32, rounded once (w itself where `sparsity.weights` is
    off), then split by expert: the neurons must be in `interleave`'s order. Not differentiated:
    `routed_ffn` gives the gradients of the weights themselves.

    Args:
      w1, w2: (H, D). wg: (H, D) or None. Floating point; row n is neuron n, so w1 and wg are the
        transposes of W1 and Wg.
      betas: (3,) float32: scales of w1, w2 and wg (`soft_threshold_beta`); None only where weights
        stay dense.
      sparsity: what is sparse, and the backend: a name is strict; None takes the fastest that
        serves this device, and says so once where it has to pass one over.
      dtype: of the packed weights: the compute dtype.
      precision: "fp8" rounds the operands of the four products with a 2:4 operand to 8 bits
        (`sparsejax.ops.routed_ffn_fp8`), where a backend serves that. A named backend is strict;
        otherwise a `registry.FallbackWarning` says why the network stays in `dtype`.

    Returns:
      `PackedFFN`.

    Raises:
      ValueError: shapes that do not fit.
      NotImplementedError: the named backend does not serve this device, shape or option.
    """
    width, hidden = _check_weights(w1, w2, wg, sparsity)
    if sparsity.weights and (betas is None or betas.shape != (3,)):
        shape = None if betas is None else betas.shape
        raise ValueError(f"betas of shape {shape} must be (3,): one for each of w1, w2, wg")
    if precision not in get_args(Precision):
        raise ValueError(f"{precision=} must be one of {get_args(Precision)}")
    # Kernels that pack have no derivative.
    w1, w2, wg, betas = jax.lax.stop_gradient((w1, w2, wg, betas))
    sizes = routed_ffn_grouped.Sizes(width=width, hidden=hidden, dtype=jnp.dtype(dtype))
    if precision == "fp8":
        kernels = routed_ffn_fp8.choose(sparsity, sizes, gated=wg is not None)
        if kernels is not None:
            assert betas is not None
            return routed_ffn_fp8.pack_network(w1, w2, betas, sparsity, kernels=kernels)
    kernels = routed_ffn_grouped.choose(sparsity, sizes, gated=wg is not None)
    return _pack(w1, w2, wg, betas, sparsity, dtype=dtype, kernels=kernels)


def _pack(w1, w2, wg, betas, sparsity, *, dtype, kernels) -> PackedFFN:
    def pack(w: Array | None, i: int) -> PackedMatrix | None:
        if w is None:
            return None
        if kernels is not None:
            values, metadata, dense = routed_ffn_grouped.pack_weight(
                w,
                betas[i] if sparsity.weights else None,
                sparsity,
                dtype=dtype,
                kernels=kernels,
            )
            return PackedMatrix(dense, values, metadata)
        w = repeat_shared(w, 0, sparsity)
        if sparsity.weights:
            w = betas[i] * soft_threshold(w.astype(jnp.float32), 1)
        return PackedMatrix(to_expert_major(w.astype(dtype), 0, sparsity.num_experts))

    hidden = w1.shape[0]
    padding = routed_ffn_grouped.padding_of(kernels, sparsity.live_neurons(hidden))
    once = routed_ffn_grouped.reads_once(kernels, sparsity, hidden)
    return PackedFFN(
        pack(w1, 0),
        pack(w2, 1),
        pack(wg, 2),
        kernels,
        padding=padding,
        shared_every=sparsity.shared_every if once else 0,
    )


def _serving(
    packed: PackedFFN,
    sparsity: Sparsity,
    sizes: routed_ffn_grouped.Sizes,
    *,
    gated: bool,
) -> tuple[registry.Backend | None, PackedFFN]:
    """The backend for these weights, now that the number of tokens is known, and what it reads.

    Raises:
      ValueError: they were packed for other shared neurons.
      NotImplementedError: a backend that was named, or that packed in 8 bits, does not serve them.
    """
    shared = sparsity.shared_every if sparsity.shares else 0
    if packed.shared_every not in (0, shared):
        raise ValueError(f"packed shared_every={packed.shared_every} must be 0 or {shared}")
    if packed.precision != "fp8":
        kernels = routed_ffn_grouped.recheck(packed.kernels, sparsity, sizes, gated=gated)
        return kernels, packed if kernels is not None else packed.without_padding()
    assert packed.kernels is not None
    routed_ffn_fp8.check(packed.kernels, sparsity, sizes, gated=gated)
    return packed.kernels, packed


def _path(kernels: registry.Backend | None, packed: PackedFFN):
    if kernels is None:
        return routed_ffn_blocks if registry.target_capability() is None else routed_ffn_masked
    if packed.precision == "fp8":
        return routed_ffn_fp8
    return routed_ffn_grouped if packed.wg is None else routed_ffn_gated


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _routed_ffn(x, w1, w2, wg, packed, plan, sparsity, kernels):
    del w1, w2, wg
    return _path(kernels, packed).forward(x, packed, plan, sparsity, kernels)[0]


def _routed_ffn_fwd(x, w1, w2, wg, packed, plan, sparsity, kernels):
    plan = keep(plan)
    y, saved = _path(kernels, packed).forward(x, packed, plan, sparsity, kernels)
    saved = keep(saved)
    # Of the master weights only the dtypes matter; arrays of no elements carry them.
    dtypes = tuple(None if w is None else jnp.zeros((0,), w.dtype) for w in (w1, w2, wg))
    return y, (saved, packed, plan, dtypes)


def _routed_ffn_bwd(sparsity, kernels, residuals, dy):
    saved, packed, plan, dtypes = residuals
    dx, dw = _path(kernels, packed).backward(dy, saved, packed, plan, sparsity, kernels)
    dw1, dw2, dwg = (
        None if d is None else d.astype(like.dtype) for d, like in zip(dw, dtypes, strict=True)
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
    rounded to x's dtype. Kernels of the gated form round X W1 and X Wg as well, before the choice.
    Weights packed in 8 bits choose the network of `routed_ffn_fp8`. First reverse-mode derivatives
    only: a gradient that goes straight through has no second one (it would come out NaN or zero).

    Saved for the backward pass: x once (by kernels in the order of the plan), T_pad h numbers in
    x's dtype (twice that for the gated form without 2:4, or on kernels), 2:4 metadata where kernels
    made any for it, the plan and the packed weights.

    Args:
      x: (T, D), the dtype of `packed`, bfloat16 where that is in 8 bits.
      w1, w2: (H, D). wg: (H, D) or None. Row n is neuron n, in `interleave`'s order: w1 and wg are
        the transposes of W1 and Wg.
      packed: `pack_ffn` of these weights, on this device.
      plan: `plan_tokens` of these tokens with E = M / 4 experts; None if there is one expert.
      sparsity: what is sparse; static.

    Returns:
      (T, D) in x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit.
      NotImplementedError: the named backend does not serve this device, shape or option.
    """
    x, w1, w2 = jnp.asarray(x), jnp.asarray(w1), jnp.asarray(w2)
    wg = None if wg is None else jnp.asarray(wg)
    width, hidden = _check_weights(w1, w2, wg, sparsity)
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{x.shape=} must be (tokens, {width})")
    experts, live = sparsity.num_experts, sparsity.live_neurons(hidden) + packed.padding
    in_8_bits = packed.precision == "fp8"
    arrays = [w.columns if in_8_bits else w.dense for w in (packed.w1, packed.w2)]
    expected: tuple[int, ...] = (experts, width, live) if in_8_bits else (experts, live, width)
    if packed.shared_every:
        expected = hidden, width
    shapes = arrays[0].shape, arrays[1].shape
    if shapes != (expected,) * 2:
        once = ", shared neurons once" if packed.shared_every else ""
        raise ValueError(
            f"packed w1 and w2 of {shapes=} must hold {experts} experts of {live=}{once}"
        )
    if (wg is None) != (packed.wg is None):
        raise ValueError("packed weights and wg must both have a gate, or neither")
    if packed.dtype != x.dtype:
        raise ValueError(f"packed dtype={packed.dtype} must be {x.dtype=}")
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
    sizes = routed_ffn_grouped.Sizes(width=width, hidden=hidden, dtype=x.dtype, tokens=x.shape[0])
    kernels, packed = _serving(packed, sparsity, sizes, gated=wg is not None)
    if packed.shared_every and not routed_ffn_grouped.reads_once(kernels, sparsity, hidden):
        again = lambda w: stored_once.for_each_expert(w, sparsity, hidden)
        packed = packed.changed(again, shared_every=0)
    return _routed_ffn(x, w1, w2, wg, packed, plan, sparsity, kernels)
