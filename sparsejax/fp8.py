"""8-bit floats: how tensors are scaled to their range, and what rounding them loses.

Scaling is *current*: a scale comes from the largest magnitude of the very tensor, not from those of
earlier steps (*delayed* scaling, which saves a reduction and pays with state in every checkpoint,
with saturation whenever magnitudes jump, and with gradients whose scales must be carried out of the
backward pass). A scale for each row, where the product allows one, is local to the row, and small
rows beside large ones keep their bits.

A scale is a power of two. It costs up to one binade of range and no precision, dividing by it is
exact, and a tensor is the same whether its scale is applied before a product, in 16 bits, or to the
accumulators. Values are rounded to nearest even, once. With current scaling only infinities
overflow: they make their scale NaN, and with it all that it scales, so that they stay visible.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from kernels import reference, reference_fp8

Scaling = Literal["row", "tensor"]

FORWARD = jnp.dtype(jnp.float8_e4m3fn)
"""Of weights and activations."""
GRADIENT = jnp.dtype(jnp.float8_e5m2)
"""Of gradients: a bit less after the point, a bit more in the exponent."""


class Quantized(NamedTuple):
    """A matrix in 8 bits: `values` times `scale`, a scalar or one for each row."""

    values: Array
    scale: Array


class Losses(NamedTuple):
    """What rounding a tensor to 8 bits lost, as numbers of elements; float32 scalars."""

    overflowed: Array
    """Beyond the largest number, or infinite."""
    underflowed: Array
    """Not zero before, zero now."""


def is_fp8(dtype: DTypeLike) -> bool:
    """Whether a dtype is one of the two."""
    return jnp.dtype(dtype).name in reference_fp8.FP8_DTYPES


scale_for = reference_fp8.scale_for


def quantize(
    x: ArrayLike,
    dtype: DTypeLike,
    *,
    scaling: Scaling = "row",
    scale: ArrayLike | None = None,
) -> Quantized:
    """A matrix in 8 bits, scaled by the largest magnitude of each row or of all.

    Args:
      x: (rows, k), floating point.
      dtype: float8_e4m3fn or float8_e5m2.
      scaling: a scale for each "row" or for the "tensor".
      scale: use this one instead, a scalar or (rows,); what exceeds the range then saturates.

    Raises:
      ValueError: an argument is not allowed.
    """
    x = jnp.asarray(x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{x.shape=} must have two axes, neither of them empty")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{x.dtype=} must be floating point")
    reference.require_one_of("scaling", scaling, get_args(Scaling))
    reference_fp8.require_fp8("dtype", dtype)
    if scale is not None:
        reference_fp8.require_scale("scale", scale, x.shape[0])
        scale = jnp.asarray(scale, jnp.float32)
    return _quantize(x, scale, jnp.dtype(dtype), scaling)


@functools.partial(jax.jit, static_argnums=(2, 3), inline=True)
def _quantize(x: Array, scale: Array | None, dtype: Any, scaling: Scaling) -> Quantized:
    if scale is None:
        scale = scale_for(jnp.max(jnp.abs(x), axis=1 if scaling == "row" else None), dtype)
    return Quantized(reference_fp8.round_fp8(_scaled(x, scale), dtype), scale)


def _scaled(x: Array, scale: Array) -> Array:
    return x.astype(jnp.float32) * (1.0 / scale).reshape(-1, 1)


def dequantize(quantized: Quantized) -> Array:
    """The float32 matrix that `quantized` stands for."""
    return quantized.values.astype(jnp.float32) * quantized.scale.reshape(-1, 1)


def losses(x: ArrayLike, quantized: Quantized) -> Losses:
    """What `quantized` lost of x, (rows, k)."""
    return _losses(jnp.asarray(x), quantized)


@functools.partial(jax.jit, inline=True)
def _losses(x: Array, quantized: Quantized) -> Losses:
    scaled = _scaled(x, quantized.scale)
    dtype = quantized.values.dtype
    count = lambda mask: jnp.sum(mask, dtype=jnp.float32)
    infinite = count(jnp.isinf(x) & jnp.isnan(scaled))
    saturated = reference_fp8.count_saturated(scaled, dtype).astype(jnp.float32)
    underflowed = count((x != 0) & (quantized.values.astype(jnp.float32) == 0))
    return Losses(saturated + infinite, underflowed)


def dot(
    a: Quantized,
    b: Quantized,
    *,
    contract: tuple[int, int],
    out_dtype: DTypeLike,
    precision: lax.Precision | None = None,
) -> Array:
    """Dense product of two matrices in 8 bits, accumulated in float32.

    On Hopper XLA turns it into one call of cuBLASLt on the 8-bit operands, with the scales applied
    by the call: the form of this function is the one that it recognises. Elsewhere it multiplies
    in 16 bits; the scales are powers of two, so the operands are exact in either.

    Args:
      a, b: matrices with one scale each.
      contract: contracted axis of each. cuBLASLt wants the last one of both: XLA transposes others.
      out_dtype: of the result.
      precision: Hopper's 8-bit units add up with fewer bits than float32 has; HIGHEST moves their
        sums to float32 now and then, at some cost in speed.

    Raises:
      ValueError: a scale is not that of a whole tensor.
    """
    for name, operand in (("a", a), ("b", b)):
        if operand.scale.shape != ():
            raise ValueError(f"{name}.scale has shape {operand.scale.shape}, must be a scalar")
    wide = lambda q: q.values.astype(jnp.bfloat16) * q.scale.astype(jnp.bfloat16)
    return lax.dot_general(
        wide(a),
        wide(b),
        (((contract[0],), (contract[1],)), ((), ())),
        precision=precision,
        preferred_element_type=jnp.dtype(out_dtype),
    )
