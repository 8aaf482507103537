"""The routed feed-forward network with its four sparse products in 8-bit floats.

A backend brings five functions (definitions in `kernels.reference_grouped_fp8`):

    pack_weight24_fp8   once an optimiser step: thresholds, scales, rounds, packs, transposes
    stack_fp8           permutes tokens, and rounds them
    up24_fp8            Y2 = two of four of relu(X W1)^2, in 16 bits and packed in 8
    down24_fp8          Y3 = Y2 W2 and dX = dY1 W1^T
    up24_backward_fp8   dY1 = 2 sqrt(Y2) (dY3 W2^T), in 16 bits and packed in 8

Both weight gradients stay in 16 bits and are those of `routed_ffn_grouped`: they contract tokens,
which tensor cores do with 8 bits only if both operands lie transposed, with scales that no token
has, in accumulators of fewer bits than float32 has.

**Scales** are powers of two, and none needs a pass over memory of its own.

X and dY3: one for each token, from the token itself, in the pass that permutes them. Nothing
saturates; a token with an infinity becomes NaN.

Y2 and dY1: they are rounded where they are made, before their largest element is known. A token's
scale comes from a bound instead: |x w| <= |x| |w| (Cauchy-Schwarz) and so Y2 <= (|x| L1)^2 with the
neurons' largest norm L1, and |dY1| <= 2 |x| L1 |dY3| L2. How far the bound is above the largest
element hardly matters: a floating-point format keeps its relative precision over 15 binades (e4m3)
or 30 (e5m2), and Y2, typically D below its bound, has those to spare for D up to about 8192. For
neurons with outlying norms it would not: L1 is at most four times the root mean square of the
norms, and what exceeds the bound then saturates.

Weights: one scale for each, with room for eight times the largest magnitude of a sample, every
eighth block of 64 features of all neurons. A weight above saturates. The norms come from that
sample as well, before thresholding: beta S(w) with the best beta is a projection of w, and all in
all no longer. Where a mesh spreads the width, devices sample their own parts of those blocks and
agree on scale and norm: two small reductions for a matrix, and the numbers of one device.

`saturated` counts what did.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from kernels import reference_fp8, registry
from kernels import reference_grouped_fp8 as reference
from sparsejax.fp8 import FORWARD, GRADIENT, scale_for
from sparsejax.ops import routed_ffn_grouped as grouped
from sparsejax.ops.packed_ffn import PackedFFN, PackedMatrix8
from sparsejax.routing.neurons import repeat_shared
from sparsejax.routing.tokens import TokenPlan
from sparsejax.spec import Sparsity

_BLOCK = 64  # features that a sample of a weight takes together
_EVERY = 8  # of them it takes one
_FEWEST = 4  # blocks of a sample
_HEADROOM = 8.0  # of a weight's scale above its sample
_OUTLYING = 4.0  # norms of neurons above so many root mean squares are not reckoned with


class Saved8(NamedTuple):
    """What `backward` needs of `forward`, beside weights and plan."""

    x: Array
    """(T_pad, D): the tokens in the order of the plan, in 16 bits."""
    y2: Array
    """(T_pad, h) bfloat16."""
    metadata: Array
    """(T_pad / 64, h / 64, 128) int32: which two of four of Y2 are kept."""
    scale: Array
    """(T_pad,) float32: of Y2 in 8 bits."""


def module(kernels: registry.Backend) -> Any:
    """The backend's five functions. NotImplementedError: it has none, or not here."""
    return grouped.module(kernels, "_fp8")


def check(
    kernels: registry.Backend, sparsity: Sparsity, sizes: grouped.Sizes, *, gated: bool
) -> None:
    """Raises NotImplementedError unless the backend serves every function of this network."""
    functions = module(kernels)
    if not sparsity.weights:
        raise NotImplementedError(f"backend={kernels!r} does not serve weights=False in 8 bits")
    if gated:
        raise NotImplementedError(f"backend={kernels!r} does not serve the gated form in 8 bits")
    # The weight gradients, and what both have in common.
    grouped.check(kernels, sparsity, sizes, gated=gated)
    if sizes.dtype != jnp.bfloat16:
        raise NotImplementedError(f"8-bit products round bfloat16, not {sizes.dtype.name}")
    rows = 4 * sparsity.v * sparsity.num_experts
    tokens = rows if sizes.tokens is None else sizes.tokens
    if sizes.tokens is not None:
        rows = grouped.padded_rows(tokens, sparsity)
    experts, live = sparsity.num_experts, sparsity.live_neurons(sizes.hidden)
    width, hidden = sizes.width, experts * live

    def array(*shape: int, dtype: DTypeLike) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    f32, i32, weight = jnp.float32, jnp.int32, FORWARD
    metadata = lambda m, k: array(m // 64, k // 64, 128, dtype=i32)
    layout = array(experts + 1, dtype=i32), array(rows // sparsity.v, dtype=i32)
    packed = array(hidden, width // 2, dtype=weight), metadata(hidden, width)
    columns = array(experts, width, live, dtype=weight)
    order, scale = array(rows, dtype=i32), array(rows, dtype=f32)
    factors = array(rows, 2, dtype=f32)
    master = array(hidden, sizes.packed_columns, dtype=f32)
    functions.check_pack_weight24_fp8(master, num_experts=experts, m=4 * experts, scale=1.0)
    y2 = array(rows, live, dtype=jnp.bfloat16)
    for dtype in (FORWARD, GRADIENT):
        functions.check_stack_fp8(array(tokens, width, dtype=jnp.bfloat16), order, dtype=dtype)
        half = array(rows, live // 2, dtype=dtype)
        functions.check_down24_fp8(half, metadata(rows, live), columns, scale, *layout)
    x, dy = (array(rows, width, dtype=dtype) for dtype in (FORWARD, GRADIENT))
    functions.check_up24_fp8(*packed, x, factors, *layout)
    functions.check_up24_backward_fp8(*packed, dy, factors, y2, metadata(rows, live), *layout)


def choose(sparsity: Sparsity, sizes: grouped.Sizes, *, gated: bool) -> registry.Backend | None:
    """The backend that serves this network in 8 bits; None, with a warning, where none does.

    A named `sparsity.backend` is strict. `None` takes the fastest of the device; without a GPU
    that is the definition in jax.numpy, which rounds as the kernels do and is slow.
    """
    if sparsity.backend is not None:
        check(sparsity.backend, sparsity, sizes, gated=gated)
        return sparsity.backend
    on_gpu = registry.target_capability() is not None
    candidates = [b for b in registry.available_backends() if not (on_gpu and b == "reference")]
    serves = partial(check, gated=gated)
    kernels, refusals = grouped.first_serving(candidates, serves, sparsity, sizes)
    if kernels is None:
        report(refusals, sparsity, sizes, gated)
    return kernels


def report(refusals: list[str], *key: Any) -> None:
    """Says, once for each kind, that the sparse network is not in 8 bits."""
    what = "routed_ffn runs in its compute dtype, not in 8 bits: "
    grouped.report(refusals, "fp8", *key, what=what)


def _sample(w: Array, axis: str | None = None) -> tuple[Array, Array]:
    """Largest magnitude of a part of w (H, D), and a bound of its neurons' norms.

    The bound is the largest norm that the sample suggests, but at most `_OUTLYING` times the root
    of the mean square.

    Args:
      w: (H, D), or under `shard_map` the columns of this device.
      axis: of the mesh, over which the columns of all are spread; None if w is whole. The sample is
        that of the whole, and so are the results, the same on every device.
    """
    hidden, own = w.shape[0], w.shape[1] // _BLOCK
    blocks = own if axis is None else own * lax.axis_size(axis)
    every = max(1, min(_EVERY, blocks // _FEWEST))
    # The device's first block need not be one of the sample: then more are read than are taken.
    step = every if axis is None else math.gcd(every, own)
    # Whole blocks, so that a sample reads whole lines of memory.
    sample = w.reshape(hidden, own, _BLOCK)[:, ::step]
    if step < every:
        place = lax.axis_index(axis) * own + step * jnp.arange(sample.shape[1])
        sample = jnp.where((place % every == 0)[:, None], sample, 0.0)
    of_rows = jnp.max(jnp.abs(sample), axis=(1, 2)), jnp.sum(sample * sample, axis=(1, 2))
    # Otherwise XLA makes the first one over all rows at once, in two passes of its own.
    largest, squares = lax.optimization_barrier(of_rows)
    if axis is not None:
        # Before the largest is taken: a norm is of a whole row. Devices multiply columns that
        # others packed, so they must have one scale; a maximum is the same in any order.
        squares = lax.psum(squares, axis)
    squares = squares * (blocks / -(-blocks // every))
    bound = jnp.minimum(jnp.max(squares), _OUTLYING**2 * jnp.mean(squares))
    largest = jnp.max(largest)
    return largest if axis is None else lax.pmax(largest, axis), jnp.sqrt(bound)


def pack_network(
    w1: Array,
    w2: Array,
    betas: Array,
    sparsity: Sparsity,
    *,
    kernels: registry.Backend,
    axis: str | None = None,
) -> PackedFFN:
    """Both matrices (H, D) of a network in 8 bits.

    Args:
      w1, w2: (H, D), or under `shard_map` the columns of this device; floating point.
      betas: (3,) float32.
      sparsity: what is sparse.
      kernels: a backend that `choose` found.
      axis: as of `pack_weight`.
    """
    weight = partial(pack_weight, sparsity=sparsity, kernels=kernels, axis=axis)
    w1, w2 = (repeat_shared(w, 0, sparsity) for w in (w1, w2))
    return PackedFFN(weight(w1, betas[0]), weight(w2, betas[1]), None, kernels, "fp8")


def pack_weight(
    w: Array,
    beta: Array,
    sparsity: Sparsity,
    *,
    kernels: registry.Backend,
    axis: str | None = None,
) -> PackedMatrix8:
    """beta S(w) of a matrix (H, D) in 8 bits; of this device's columns if `axis` of the mesh
    spreads them, with the scale and norm of the whole."""

    def pack(w: Array, beta: Array) -> PackedMatrix8:
        largest, norm = _sample(w, axis)
        scale = scale_for(_HEADROOM * beta * largest, FORWARD)
        functions, experts = grouped.Functions(module(kernels)), sparsity.num_experts
        values, metadata, columns = functions.pack_weight24_fp8(
            w, num_experts=experts, m=4 * experts, scale=beta / scale
        )
        return PackedMatrix8(columns, values, metadata, scale, norm)

    return grouped.batchable(pack, kernels)(w.astype(jnp.float32), beta)


def row_tokens(
    tokens: int, plan: TokenPlan | None, sparsity: Sparsity
) -> tuple[Array, Array | None]:
    """(T_pad,) the token of each row, T for padding; and the same, None if rows are in order."""
    order = grouped.order(tokens, plan, sparsity)
    if order is not None:
        return order, order
    row = jnp.arange(grouped.padded_rows(tokens, sparsity), dtype=jnp.int32)
    return jnp.minimum(row, tokens), None


def _down(functions, values, metadata, columns, scale, layout, tokens, order) -> Array:
    """Y W (T, D) in the order of the tokens."""
    arguments = (values, metadata, columns, scale, *layout)
    if order is None:
        return functions.down24_fp8(*arguments)[:tokens]
    return functions.down24_fp8(*arguments, permutation=order, tokens=tokens)


class _Up(NamedTuple):
    """The first product, and what it was made of."""

    x: Array
    y2: Array
    values: Array
    metadata: Array
    scale: Array


def up_factors(x_scale: Array, squares: Array, w: PackedMatrix8) -> tuple[Array, Array]:
    """Of `up24_fp8`, and the scale of Y2 in 8 bits; from what `stack_fp8` says of X."""
    bound = jnp.sqrt(squares) * w.norm
    scale = scale_for(bound * bound, reference.ACTIVATION)
    factor = x_scale * w.scale
    return jnp.stack([factor * factor, 1.0 / scale], axis=1), scale


def back_factors(
    dy_scale: Array, squares: Array, y2_scale: Array, w: PackedMatrix8
) -> tuple[Array, Array]:
    """Of `up24_backward_fp8`, and the scale of dY1 in 8 bits; from what `stack_fp8` says of dY3."""
    root = jnp.sqrt(reference_fp8.largest(FORWARD) * y2_scale)
    bound = 2.0 * root * jnp.sqrt(squares) * _OUTLYING * w.norm
    scale = scale_for(bound, reference.GRADIENT)
    return jnp.stack([2.0 * dy_scale * w.scale, 1.0 / scale], axis=1), scale


def _up(functions, x: Array, rows: Array, w: PackedMatrix8, layout) -> _Up:
    stacked, x8, x_scale, squares = functions.stack_fp8(x, rows, dtype=FORWARD)
    factors, scale = up_factors(x_scale, squares, w)
    y2, values, metadata = functions.up24_fp8(w.values, w.metadata, x8, factors, *layout)
    return _Up(stacked, y2, values, metadata, scale)


def forward(
    x: Array,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
    kernels: registry.Backend,
) -> tuple[Array, Saved8]:
    """Y3 (T, D), and what `backward` needs."""
    functions = grouped.Functions(module(kernels))

    def network(x: Array, packed: PackedFFN, plan: TokenPlan | None) -> tuple[Array, Saved8]:
        tokens = x.shape[0]
        layout = grouped.layout_of(tokens, plan, sparsity)
        rows, order = row_tokens(tokens, plan, sparsity)
        up = _up(functions, x, rows, packed.w1, layout)
        scale = up.scale * packed.w2.scale
        columns = packed.w2.columns
        y3 = _down(functions, up.values, up.metadata, columns, scale, layout, tokens, order)
        return y3, Saved8(up.x, up.y2, up.metadata, up.scale)

    return grouped.batchable(network, kernels)(x, packed, plan)


class _Back(NamedTuple):
    """The product that leads back, and what it was made of."""

    dy: Array
    dy1: Array
    values: Array
    scale: Array


def _back(functions, dy: Array, rows: Array, saved: Saved8, w: PackedMatrix8, layout) -> _Back:
    stacked, dy8, dy_scale, squares = functions.stack_fp8(dy, rows, dtype=GRADIENT)
    factors, scale = back_factors(dy_scale, squares, saved.scale, w)
    dy1, values = functions.up24_backward_fp8(
        w.values, w.metadata, dy8, factors, saved.y2, saved.metadata, *layout
    )
    return _Back(stacked, dy1, values, scale)


def backward(
    dy: Array,
    saved: Saved8,
    packed: PackedFFN,
    plan: TokenPlan | None,
    sparsity: Sparsity,
    kernels: registry.Backend,
) -> tuple[Array, tuple[Array, Array, None]]:
    """dX (T, D) in x's dtype; dw1 and dw2 (H, D) in float32, and None for dwg."""
    functions = grouped.Functions(module(kernels))
    in_16_bits = grouped.Functions(grouped.module(kernels))

    def network(dy, saved, packed, plan):
        tokens = dy.shape[0]
        layout = grouped.layout_of(tokens, plan, sparsity)
        rows, order = row_tokens(tokens, plan, sparsity)
        gradient: Callable[[Array, Array], Array] = grouped.weight_gradients(
            in_16_bits, saved.y2, layout, sparsity
        )
        back = _back(functions, dy, rows, saved, packed.w2, layout)
        scale = back.scale * packed.w1.scale
        columns = packed.w1.columns
        dx = _down(functions, back.values, saved.metadata, columns, scale, layout, tokens, order)
        return dx, gradient(back.dy1, saved.x), gradient(saved.y2, back.dy)

    dx, dw1, dw2 = grouped.batchable(network, kernels)(dy, saved, packed, plan)
    return dx, (dw1, dw2, None)


class Saturated(NamedTuple):
    """Numbers of elements at the largest magnitude of their type, int32: all that saturated.

    An element whose rounded value is just that magnitude is counted too.
    """

    w1: Array
    w2: Array
    y2: Array
    dy1: Array


def saturated_weights(packed: PackedFFN) -> Array:
    """Weights at the largest magnitude of their type, in all layers of `packed`: int32.

    Raises:
      ValueError: the weights are not in 8 bits.
    """
    if packed.precision != "fp8":
        raise ValueError(f"packed.precision={packed.precision!r} must be 'fp8'")
    return reference.count_largest(packed.w1.values) + reference.count_largest(packed.w2.values)


def saturated(
    x: Array, dy: Array, packed: PackedFFN, plan: TokenPlan | None, sparsity: Sparsity
) -> Saturated:
    """What saturates in a step of the network, weights included: for a look at a run.

    Recomputes Y2 and dY1. What is infinite or NaN in x and dy makes its token NaN instead.

    Args:
      x: (T, D) bfloat16. dy: (T, D), the gradient of the loss by the network's output.
      packed: of `ops.pack_ffn(precision="fp8")`. plan, sparsity: as for `routed_ffn`.

    Raises:
      ValueError: the weights are not in 8 bits, or are those of `sharding.pack_ffn`.
    """
    if packed.precision != "fp8" or packed.kernels is None:
        raise ValueError(f"packed.precision={packed.precision!r} must be 'fp8'")
    if packed.w1.scale.ndim:
        raise ValueError(f"{packed.w1.scale.shape=} must be one scale, not those of groups")
    functions = grouped.Functions(module(packed.kernels))
    tokens = x.shape[0]
    layout = grouped.layout_of(tokens, plan, sparsity)
    rows, _ = row_tokens(tokens, plan, sparsity)
    up = _up(functions, x, rows, packed.w1, layout)
    saved = Saved8(up.x, up.y2, up.metadata, up.scale)
    back = _back(functions, dy, rows, saved, packed.w2, layout)
    parts = (packed.w1.values, packed.w2.values, up.values, back.values)
    return Saturated(*map(reference.count_largest, parts))
