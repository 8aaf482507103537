"""The routed FFN's grouped products of 8-bit floats in plain jax.numpy: definition, oracle.

Layouts are those of `kernels.reference_grouped`, values and metadata those of
`kernels.reference_fp8`. Weights and activations are e4m3, gradients e5m2; tensor cores contract
8-bit operands along the axis that is contiguous only, so weights that are contracted along an
expert's neurons come as columns, (E, D, h).

A matrix is its values times scales, powers of two: one for a weight, one for each token of an
activation. The caller folds them into *factors*, one or two for each token, which multiply
accumulators. What a product writes in 8 bits is what it writes in bfloat16, times a factor, rounded
once more and saturating: the weight gradients, which contract tokens, read the 16 bits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from kernels import reference, reference_fp8, reference_grouped
from kernels.reference_fp8 import largest, require_fp8, round_fp8, scale_for
from kernels.reference_grouped import (
    GROUP,
    TILE,
    block_rows,
    by_token,
    expert_major,
    require_saved,
)

WEIGHT = jnp.dtype(jnp.float8_e4m3fn)
ACTIVATION = jnp.dtype(jnp.float8_e4m3fn)
GRADIENT = jnp.dtype(jnp.float8_e5m2)


def pack_dims(w: Array, num_experts: int, m: int, scale: ArrayLike) -> tuple[int, int]:
    """(h, D) of a weight (H, D). ValueError unless `pack_weight24_fp8`'s arguments fit."""
    return reference_grouped.weight_dims(w, num_experts, m, scale)


def stack_dims(x: Array, order: Array, dtype: DTypeLike) -> tuple[int, int]:
    """(T_pad, D) of a permutation. ValueError unless `stack_fp8`'s arguments fit."""
    require_fp8("dtype", dtype)
    if x.ndim != 2 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{x.shape=}, {x.dtype=} must be a matrix of floating point")
    if order.ndim != 1 or order.dtype != jnp.int32:
        raise ValueError(f"{order.shape=}, {order.dtype=} must be (rows,), int32")
    return order.shape[0], x.shape[1]


def _packed(values: Array, metadata: Array, rows: int | None, name: str) -> tuple[int, int]:
    reference_fp8.require_packed(values, metadata)
    if rows is not None and values.shape[0] != rows:
        raise ValueError(f"{name} of {values.shape=} must have {rows=}")
    return values.shape[0], 2 * values.shape[1]


def _factors(factors: Array, rows: int) -> None:
    if factors.shape != (rows, 2) or factors.dtype != jnp.float32:
        raise ValueError(f"{factors.shape=}, {factors.dtype=} must be {(rows, 2)}, float32")


def up_dims(
    values: Array,
    metadata: Array,
    x: Array,
    factors: Array,
    offsets: Array,
    block_expert: Array,
) -> tuple[int, int, int]:
    """(E, V, h) of tokens times packed weights. ValueError unless arguments fit."""
    hidden, width = _packed(values, metadata, None, "weights")
    require_fp8("x.dtype", x.dtype)
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{x.shape=} must be (rows, {width})")
    _factors(factors, x.shape[0])
    experts, v = block_rows(x.shape[0], offsets, block_expert)
    if hidden % (experts * TILE):
        raise ValueError(f"{hidden=} must be a multiple of {TILE} for each of {experts=}")
    return experts, v, hidden // experts


def backward_dims(
    values: Array,
    metadata: Array,
    dy: Array,
    factors: Array,
    y2: Array,
    y2_metadata: Array,
    offsets: Array,
    block_expert: Array,
) -> tuple[int, int, int]:
    """(E, V, h) of `up24_backward_fp8`. ValueError unless its arguments fit."""
    experts, v, live = up_dims(values, metadata, dy, factors, offsets, block_expert)
    require_saved(y2, y2_metadata, (dy.shape[0], live), jnp.bfloat16)
    return experts, v, live


def down_dims(
    y_values: Array,
    y_metadata: Array,
    columns: Array,
    scale: Array,
    offsets: Array,
    block_expert: Array,
    permutation: Array | None,
    tokens: int | None,
) -> tuple[int, int]:
    """(E, V) of `down24_fp8`. ValueError unless its arguments fit."""
    rows, live = _packed(y_values, y_metadata, None, "activations")
    experts, v = block_rows(rows, offsets, block_expert)
    require_fp8("columns.dtype", columns.dtype)
    if columns.ndim != 3 or columns.shape[::2] != (experts, live):
        raise ValueError(f"{columns.shape=} must be ({experts}, width, {live})")
    if scale.shape != (rows,) or scale.dtype != jnp.float32:
        raise ValueError(f"{scale.shape=}, {scale.dtype=} must be {(rows,)}, float32")
    if (permutation is None) != (tokens is None):
        raise ValueError(f"permutation and {tokens=} must be given both or neither")
    if permutation is not None and (permutation.shape != (rows,) or permutation.dtype != jnp.int32):
        raise ValueError(f"{permutation.shape=}, {permutation.dtype=} must be {(rows,)}, int32")
    return experts, v


def pack_weight24_fp8(
    w: Array, *, num_experts: int, m: int, scale: ArrayLike
) -> tuple[Array, Array, Array]:
    """Soft-thresholds a weight 2:4 along D, scales and rounds it to e4m3, packed and by columns.

    Args:
      w: (H, D) float32, neurons interleaved.
      num_experts: E. m: 4 E, neurons in a block.
      scale: a float32 scalar, multiplied in before rounding; what exceeds the range saturates.

    Returns:
      values (H, D / 2) e4m3 and metadata (H / 64, D / 64, 128) int32 of the matrix with expert e's
      neurons in rows e h..(e + 1) h, here in their order; and the same numbers as columns
      (E, D, h).

    Raises:
      ValueError: an argument is not allowed.
    """
    w = jnp.asarray(w)
    live, width = pack_dims(w, num_experts, m, scale)
    if live % TILE or width % TILE:
        raise ValueError(f"{live=} and {width=} must be multiples of {TILE} to be packed")
    flat = expert_major(w.astype(jnp.float32), num_experts).reshape(-1, width)
    factor = jnp.asarray(scale, jnp.float32).reshape(())
    values, metadata, _ = reference_fp8.pack24_fp8(
        flat, axis=1, mode="soft_threshold", scale=factor, dtype=WEIGHT
    )
    dense = reference_fp8.unpack24_fp8(values, metadata)
    return values, metadata, dense.reshape(num_experts, live, width).swapaxes(1, 2)


def stack_fp8(x: Array, order: Array, *, dtype: DTypeLike) -> tuple[Array, Array, Array, Array]:
    """Gathers tokens and rounds them to 8 bits, each scaled by its own largest magnitude.

    Args:
      x: (T, D) bfloat16.
      order: (T_pad,) int32: the token of each row, T or more for a row of zeros.
      dtype: float8_e4m3fn or float8_e5m2.

    Returns:
      rows (T_pad, D) in x's dtype; the same rounded, (T_pad, D) in `dtype`; their scales (T_pad,)
      float32, powers of two (1 for zeros, NaN where something is not finite); and the sums of
      squares of the rows (T_pad,) float32.

    Raises:
      ValueError: an argument is not allowed.
    """
    stack_dims(x, order, dtype)
    # Indices are never negative; padding lies one past the end and is filled.
    rows = x.at[order].get(mode="fill", fill_value=0, wrap_negative_indices=False)
    wide = rows.astype(jnp.float32)
    scale = scale_for(jnp.max(jnp.abs(wide), axis=1), dtype)
    rounded = round_fp8(wide * (1.0 / scale)[:, None], dtype)
    return rows, rounded, scale, jnp.sum(wide * wide, axis=1)


def _wide(a: Array) -> Array:
    return a.astype(jnp.bfloat16)


def _of_expert(values: Array, metadata: Array, experts: int) -> Array:
    """Packed weights as dense (E, h, D), bfloat16: both types are exact there."""
    dense = _wide(reference_fp8.unpack24_fp8(values, metadata))
    return dense.reshape(experts, -1, dense.shape[1])


def _gather(dense: Array, metadata: Array) -> Array:
    """The values (m, k/2) of a dense (m, k) matrix at the positions of `metadata`."""
    m, k = dense.shape
    positions = jnp.stack(reference_fp8.unpack_metadata(metadata), axis=-1)
    groups = dense.reshape(m, k // GROUP, GROUP)
    return jnp.take_along_axis(groups, positions, axis=-1).reshape(m, k // 2)


def _narrow(y: Array, factors: Array, metadata: Array, dtype: DTypeLike) -> Array:
    scaled = _gather(y, metadata).astype(jnp.float32) * factors[:, 1:]
    return round_fp8(scaled, dtype)


def up24_fp8(
    values: Array,
    metadata: Array,
    x_p: Array,
    factors: Array,
    offsets: Array,
    block_expert: Array,
    *,
    config: None = None,
) -> tuple[Array, Array, Array]:
    """Y2 = two of four of f0 relu(x_p W_e^T)^2, dense in bfloat16 and packed in e4m3 times f1.

    Chosen on the float32 accumulators, by value, ties to the lower index.

    Args:
      values, metadata: of `pack_weight24_fp8`.
      x_p: (T_pad, D), 8-bit.
      factors: (T_pad, 2) float32: f0, the square of both operands' scales, and f1, the inverse of
        the scale of the packed Y2.
      offsets: (E + 1,) int32. block_expert: (T_pad / V,) int32.
      config: none for this backend.

    Returns:
      y2 (T_pad, h) bfloat16, and packed along h: y2_values (T_pad, h / 2) e4m3 and y2_metadata
      (T_pad / 64, h / 64, 128) int32. In unused rows all values are zero.

    Raises:
      ValueError: an argument is not allowed, or the shapes do not fit.
    """
    del config
    experts, _, _ = up_dims(values, metadata, x_p, factors, offsets, block_expert)
    w = _of_expert(values, metadata, experts)

    def block(expert, x):
        y = jnp.square(jax.nn.relu(reference_grouped._product(x, w[expert], (1, 1))))
        return jnp.where(reference.select24(y, by="value"), y, 0.0), y

    used = jnp.arange(x_p.shape[0]) < offsets[-1]
    factors = jnp.where(used[:, None], factors, 0.0)
    kept, full = reference_grouped._by_block(block, (_wide(x_p),), offsets, block_expert)
    _, words = reference.pack24(full, axis=1, mode="value", dtype=jnp.float32)
    words = reference_fp8._pack_metadata(*reference._unpack_metadata(words))
    y2 = (kept * factors[:, :1]).astype(jnp.bfloat16)
    return y2, _narrow(y2, factors, words, ACTIVATION), words


def down24_fp8(
    y_values: Array,
    y_metadata: Array,
    columns: Array,
    scale: Array,
    offsets: Array,
    block_expert: Array,
    *,
    permutation: Array | None = None,
    tokens: int | None = None,
    config: None = None,
) -> Array:
    """scale (Y W_e) for 2:4 activations: Y3 = Y2 W2_e and dX = dY1 W1_e.

    Args:
      y_values, y_metadata: of Y (T_pad, h), packed along h, 8-bit.
      columns: (E, D, h), 8-bit, of `pack_weight24_fp8`.
      scale: (T_pad,) float32, of Y's rows and the weight together.
      offsets: (E + 1,) int32. block_expert: (T_pad / V,) int32.
      permutation: None, or (T_pad,) int32: the token of each row, T or more for padding. Then the
        result is in the order of the tokens. Every token has a row.
      tokens: T, with `permutation`.
      config: none for this backend.

    Returns:
      (T_pad, D), or (T, D) with `permutation`, bfloat16.

    Raises:
      ValueError: the shapes do not fit.
    """
    del config
    down_dims(y_values, y_metadata, columns, scale, offsets, block_expert, permutation, tokens)
    y, w = _wide(reference_fp8.unpack24_fp8(y_values, y_metadata)), _wide(columns)

    def block(expert, y, scale):
        return (reference_grouped._product(y, w[expert], (1, 1)) * scale).astype(jnp.bfloat16)

    out = reference_grouped._by_block(block, (y, scale[:, None]), offsets, block_expert)
    return by_token(out, permutation, tokens)


def up24_backward_fp8(
    values: Array,
    metadata: Array,
    dy_p: Array,
    factors: Array,
    y2: Array,
    y2_metadata: Array,
    offsets: Array,
    block_expert: Array,
    *,
    config: None = None,
) -> tuple[Array, Array]:
    """dY1 = f0 sqrt(Y2) (dy_p W_e^T) on the support of Y2, dense, and packed in e5m2 times f1.

    Args:
      values, metadata: of `pack_weight24_fp8`, of the second matrix of the network.
      dy_p: (T_pad, D), 8-bit.
      factors: (T_pad, 2) float32: f0, twice both operands' scales, and f1, the inverse of the scale
        of the packed dY1.
      y2: (T_pad, h) bfloat16 and y2_metadata: of `up24_fp8`.
      offsets: (E + 1,) int32. block_expert: (T_pad / V,) int32.
      config: none for this backend.

    Returns:
      dy1 (T_pad, h) bfloat16, and dy1_values (T_pad, h / 2) e5m2, packed at the positions of
      y2_metadata.

    Raises:
      ValueError: the shapes do not fit.
    """
    del config
    arguments = (values, metadata, dy_p, factors, y2, y2_metadata, offsets, block_expert)
    experts, _, _ = backward_dims(*arguments)
    w = _of_expert(values, metadata, experts)

    def block(expert, dy, y2, factor):
        root = jnp.sqrt(y2.astype(jnp.float32))
        product = reference_grouped._product(dy, w[expert], (1, 1))
        return (root * product * factor).astype(jnp.bfloat16)

    rows = (_wide(dy_p), y2, factors[:, :1])
    dy1 = reference_grouped._by_block(block, rows, offsets, block_expert)
    used = jnp.arange(dy_p.shape[0]) < offsets[-1]
    factors = jnp.where(used[:, None], factors, 0.0)
    return dy1, _narrow(dy1, factors, y2_metadata, GRADIENT)


def count_largest(x: Array) -> Array:
    """How many elements of 8 bits are at the largest magnitude: all that saturated; int32."""
    return jnp.sum(jnp.abs(x.astype(jnp.float32)) == largest(x.dtype), dtype=jnp.int32)


def check_pack_weight24_fp8(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def check_stack_fp8(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def check_up24_fp8(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def check_down24_fp8(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def check_up24_backward_fp8(*args, **kwargs) -> None:
    """The reference serves every device and shape."""
