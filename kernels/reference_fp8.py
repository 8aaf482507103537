"""2:4 packing and products of 8-bit floats in plain jax.numpy: definition, CPU path, tests' oracle.

Values are `float8_e4m3fn` (3 bits after the point, up to 448: weights, activations) or
`float8_e5m2` (2 bits, up to 57,344: gradients). A packed matrix is that of `kernels.reference` but
for the order of its metadata, because one instruction contracts 64 elements of these types (PTX
ISA, sparse `wgmma`, m64nNk64; the same in CUTLASS's `ELayout_64x64`): the word of lane
4 q + 2 h + r of warp w holds row 16 w + 8 r + q of a 64 x 64 tile, elements 32 h to 32 h + 31,
eight nibbles `i0 | i1 << 2` from the low end. Shapes are the same.

Rounding is to nearest even, once, from float32, as the hardware's conversion does it (XLA may go
through float16, which rounds twice). Beyond the largest number it saturates, infinities too; NaN
stays NaN.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from kernels import reference

FP8_DTYPES = ("float8_e4m3fn", "float8_e5m2")

_TILE, _GROUP = reference.TILE, reference.GROUP


def require_fp8(name: str, dtype: DTypeLike) -> None:
    """Raises ValueError unless `dtype` is one of the two."""
    if jnp.dtype(dtype).name not in FP8_DTYPES:
        raise ValueError(f"{name}={jnp.dtype(dtype).name} must be one of {FP8_DTYPES}")


def largest(dtype: DTypeLike) -> float:
    """The largest number of an 8-bit type."""
    return float(jnp.finfo(dtype).max)


TOP_EXPONENTS = {"float8_e4m3fn": 8, "float8_e5m2": 15}
"""Of the largest numbers, 1.75 times a power of two."""


def scale_for(magnitude: ArrayLike, dtype: DTypeLike) -> Array:
    """The least power of two that brings magnitudes up to `magnitude` into the range of `dtype`.

    Args:
      magnitude: non-negative, any shape.
      dtype: float8_e4m3fn or float8_e5m2.

    Returns:
      float32, of the shape of `magnitude`: what the rounded values are to be multiplied by, at
      least 2^-126. 1 for zero, NaN where `magnitude` is not finite.

    Raises:
      ValueError: another dtype.
    """
    require_fp8("dtype", dtype)
    magnitude = jnp.asarray(magnitude, jnp.float32)
    # In bits, because compilers replace divisions by products. What follows the point carries into
    # the exponent if it is more than that of the type's largest number.
    carried = lax.bitcast_convert_type(magnitude, jnp.int32) + (0x7FFFFF - 0x600000)
    exponent = jnp.maximum((carried >> 23) - TOP_EXPONENTS[jnp.dtype(dtype).name], 1)
    scale = lax.bitcast_convert_type(exponent << 23, jnp.float32)
    scale = jnp.where(jnp.isfinite(magnitude), scale, jnp.nan)
    return jnp.where(magnitude == 0.0, 1.0, scale)


def _rounded(x: Array, dtype: DTypeLike) -> Array:
    """x on the grid of an 8-bit type that had no largest number; float32."""
    info = jnp.finfo(dtype)
    exponents = (lax.bitcast_convert_type(x, jnp.int32) >> 23) & 0xFF
    exponents = jnp.maximum(exponents, int(info.minexp) + 127) - int(info.nmant)
    step = lax.bitcast_convert_type(exponents << 23, jnp.float32)
    return jnp.round(x / step) * step


def round_fp8(x: ArrayLike, dtype: DTypeLike) -> Array:
    """x rounded to an 8-bit type, saturating.

    Args:
      x: floating point.
      dtype: float8_e4m3fn or float8_e5m2.

    Raises:
      ValueError: another dtype.
    """
    require_fp8("dtype", dtype)
    return _round_fp8(jnp.asarray(x), jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _round_fp8(x: Array, dtype: Any) -> Array:
    y = _rounded(x.astype(jnp.float32), dtype)
    top = largest(dtype)
    # Not `clip`: XLA's CPU backend lets minima and maxima swallow a NaN.
    y = jnp.where(jnp.abs(y) > top, jnp.sign(y) * top, y)
    return y.astype(dtype)


def count_saturated(x: ArrayLike, dtype: DTypeLike) -> Array:
    """How many elements rounding to an 8-bit type would bring down to its largest number; int32."""
    require_fp8("dtype", dtype)
    y = _rounded(jnp.asarray(x).astype(jnp.float32), dtype)
    return jnp.sum(jnp.abs(y) > largest(dtype), dtype=jnp.int32)


def _pack_metadata(i0: Array, i1: Array) -> Array:
    """Kept indices (m, k/4), i0 < i1, to metadata (m/64, k/64, 128) int32."""
    m, groups = i0.shape
    k = groups * _GROUP
    nibbles = (i0 | (i1 << 2)).astype(jnp.uint32).reshape(m, k // 32, 8)
    words = jnp.sum(nibbles << (4 * jnp.arange(8, dtype=jnp.uint32)), axis=-1, dtype=jnp.uint32)
    # m = (tile, warp, r, q), k / 32 = (tile, h)
    words = words.reshape(m // _TILE, 4, 2, 8, k // _TILE, 2).transpose(0, 4, 1, 3, 5, 2)
    return lax.bitcast_convert_type(words.reshape(m // _TILE, k // _TILE, 128), jnp.int32)


def unpack_metadata(metadata: Array) -> tuple[Array, Array]:
    """Kept indices i0 < i1, (m, k/4) each, of metadata (m/64, k/64, 128)."""
    tiles_m, tiles_k, _ = metadata.shape
    words = lax.bitcast_convert_type(metadata, jnp.uint32)
    words = words.reshape(tiles_m, tiles_k, 4, 8, 2, 2).transpose(0, 2, 5, 3, 1, 4)
    words = words.reshape(tiles_m * _TILE, tiles_k * 2, 1)
    nibbles = (words >> (4 * jnp.arange(8, dtype=jnp.uint32))) & 0xF
    nibbles = nibbles.reshape(tiles_m * _TILE, tiles_k * _TILE // _GROUP).astype(jnp.int32)
    return nibbles & 3, nibbles >> 2


def require_scale(name: str, scale: ArrayLike | None, size: int) -> None:
    """Raises ValueError unless a scale is None, a scalar, or a vector of `size`."""
    if scale is not None and jnp.shape(scale) not in ((), (size,)):
        raise ValueError(f"{name} has shape {jnp.shape(scale)}, must be () or ({size},)")


def require_packing(x: Array, axis: int, mode: str, scale: ArrayLike | None, dtype: Any) -> None:
    """Raises ValueError where no backend could take the arguments of `pack24_fp8`."""
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{x.shape=} must have two axes, neither of them empty")
    reference.require_one_of("axis", axis, (0, 1))
    reference.require_one_of("mode", mode, reference.MODES)
    reference.require_float("x.dtype", x.dtype)
    require_fp8("dtype", dtype)
    require_scale("scale", scale, x.shape[1 - axis])


def pack24_fp8(
    x: ArrayLike,
    *,
    axis: int,
    mode: reference.Mode,
    scale: ArrayLike | None = None,
    dtype: DTypeLike = jnp.float8_e4m3fn,
    config: None = None,
) -> tuple[Array, Array, Array]:
    """Thresholds or selects two of four along `axis`, scales, rounds to 8 bits and packs.

    Args:
      x: (rows, cols), float32, bfloat16 or float16.
      axis: 0 or 1, the contracted axis: k is x.shape[axis], m is the other one.
      mode: "magnitude", "value" or "soft_threshold", as for `kernels.reference.pack24`.
      scale: None, a float32 scalar, or (m,): multiplied in before the values are rounded. The
        caller keeps its inverse as the scale of the packed matrix.
      dtype: of the packed values.
      config: none for this backend.

    Returns:
      values (m, k/2) and metadata (m/64, k/64, 128) int32, m and k padded to multiples of 64; and
      how many of the kept values saturated, an int32 scalar.

    Raises:
      ValueError: an argument is not allowed.
    """
    del config
    x = jnp.asarray(x)
    require_packing(x, axis, mode, scale, dtype)
    return _pack24_fp8(x, scale, axis=axis, mode=mode, dtype=jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("axis", "mode", "dtype"))
def _pack24_fp8(x: Array, scale: ArrayLike | None, *, axis, mode, dtype):
    exact, metadata = reference.pack24(x, axis=axis, mode=mode, dtype=jnp.float32)
    if scale is not None:
        factors = jnp.asarray(scale, jnp.float32)
        if factors.ndim:
            factors = jnp.pad(factors, (0, exact.shape[0] - factors.shape[0]))[:, None]
        exact = exact * factors
    words = _pack_metadata(*reference._unpack_metadata(metadata))
    return round_fp8(exact, dtype), words, count_saturated(exact, dtype)


def check_pack24_fp8(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def require_packed(values: Array, metadata: Array) -> None:
    """Raises ValueError unless the arrays are a packed matrix of 8-bit floats."""
    reference.require_packed_shapes(values, metadata)
    require_fp8("values.dtype", values.dtype)


def unpack24_fp8(values: Array, metadata: Array) -> Array:
    """The dense (m, k) matrix of a packed one, in the dtype of `values`, without its scale.

    Raises:
      ValueError: the arrays do not belong together.
    """
    require_packed(values, metadata)
    return _unpack24_fp8(values, metadata)


@jax.jit
def _unpack24_fp8(values: Array, metadata: Array) -> Array:
    return reference.spread(values, *unpack_metadata(metadata))


def product_dims(
    values: Array,
    metadata: Array,
    b: Array,
    *,
    a_scale: ArrayLike | None,
    b_scale: ArrayLike | None,
    out_layout: str,
    epilogue: str | None,
) -> tuple[int, int, int]:
    """(m, n, k) of a product. ValueError unless the arguments of `spmm24_fp8` fit."""
    require_packed(values, metadata)
    reference.require_one_of("out_layout", out_layout, reference.OUT_LAYOUTS)
    reference.require_one_of("epilogue", epilogue, reference.EPILOGUES)
    m, k = values.shape[0], 2 * values.shape[1]
    if b.ndim != 2 or b.shape[1] != k:
        raise ValueError(f"{b.shape=} must be (n, {k=})")
    require_fp8("b.dtype", b.dtype)
    n = b.shape[0]
    require_scale("a_scale", a_scale, m)
    require_scale("b_scale", b_scale, n)
    return m, n, k


def spmm24_fp8(
    values: Array,
    metadata: Array,
    b: ArrayLike,
    *,
    a_scale: ArrayLike | None = None,
    b_scale: ArrayLike | None = None,
    out_layout: str = "mn",
    epilogue: str | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: None = None,
) -> Array:
    """epilogue((a_scale A) (b_scale B)) for a packed 2:4 matrix A (m, k), accumulated in float32.

    The scales are applied to the accumulators: that of A's rows to rows of the result, that of B's
    columns to columns.

    Args:
      values: of A, float8_e4m3fn or float8_e5m2.
      metadata: of A.
      b: (n, k), the contraction contiguous, as the tensor cores want it; either of the two types.
      a_scale: None, or float32, a scalar or one for each row of A, (m,).
      b_scale: None, or float32, a scalar or one for each row of `b`, (n,).
      out_layout: "mn" for a result (m, n), "nm" for (n, m).
      epilogue: None, or "relu2": max(y, 0)^2 of the scaled accumulator.
      out_dtype: bfloat16, float16 or float32.
      config: none for this backend.

    Returns:
      (m, n) or (n, m) in `out_dtype`.

    Raises:
      ValueError: an argument is not allowed, or the shapes do not fit.
    """
    del config
    b = jnp.asarray(b)
    product_dims(
        values, metadata, b, a_scale=a_scale, b_scale=b_scale, out_layout=out_layout,
        epilogue=epilogue,
    )  # fmt: skip
    reference.require_float("out_dtype", out_dtype)
    a = unpack24_fp8(values, metadata)
    # Both types are exact in 16 bits, and so are their products in float32.
    out = lax.dot_general(
        a.astype(jnp.bfloat16),
        b.astype(jnp.bfloat16),
        (((1,), (1,)), ((), ())),
        preferred_element_type=jnp.float32,
    )
    if a_scale is not None:
        out = out * jnp.asarray(a_scale, jnp.float32).reshape(-1, 1)
    if b_scale is not None:
        out = out * jnp.asarray(b_scale, jnp.float32).reshape(1, -1)
    if epilogue == "relu2":
        out = jnp.square(jax.nn.relu(out))
    return (out if out_layout == "mn" else out.T).astype(out_dtype)


def check_spmm24_fp8(*args, **kwargs) -> None:
    """The reference serves every device and shape."""
