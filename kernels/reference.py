"""2:4 packing and products in plain jax.numpy: the definition, the CPU path and the tests' oracle.

A matrix A (m, k) is 2:4 along k when every group of four consecutive elements of a row has at most
two non-zeros. Packed it is

* `values` (m, k/2): the two kept elements of each group, in the order of their index;
* `metadata` (m/64, k/64, 128) int32: the kept indices in the order in which the 128 threads of a
  warpgroup hand them to the sparse MMA (PTX ISA, "Sparse matrix storage", 16-bit types). A group's
  nibble is `i0 | i1 << 2` with i0 < i1; four nibbles make the half-word of 16 elements; the word of
  lane 4q + 2s + h of warp w holds row 16w + q (low half) and row 16w + q + 8 (high half), elements
  32s + 16h to 32s + 16h + 15 of a 64 x 64 tile.

m and k are padded with zeros to multiples of 64.

Selection keeps the two highest-ranking elements of a group, ties to the lower index, on float32
values. NaN outranks every number, so a NaN in the input is never dropped while it is one of at most
two; infinities rank as numbers do.
"""

import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

GROUP = 4
TILE = 64

Order = Literal["magnitude", "value"]
Mode = Literal["magnitude", "value", "soft_threshold"]

ORDERS = ("magnitude", "value")
MODES = ("magnitude", "value", "soft_threshold")
B_LAYOUTS = ("nk", "kn")
OUT_LAYOUTS = ("mn", "nm")
EPILOGUES = (None, "relu2")

_MAGNITUDE_BITS = 0x7FFFFFFF
_INFINITY_BITS = 0x7F800000
_FLOATS = ("bfloat16", "float16", "float32")


def require_one_of(name: str, value: object, allowed: tuple) -> None:
    """Raises ValueError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} must be one of {allowed}")


def require_float(name: str, dtype: DTypeLike) -> None:
    """Raises ValueError unless `dtype` is bfloat16, float16 or float32."""
    if jnp.dtype(dtype).name not in _FLOATS:
        raise ValueError(f"{name}={jnp.dtype(dtype).name} must be one of {_FLOATS}")


def padded(size: int, multiple: int = TILE) -> int:
    """`size` rounded up to a multiple."""
    return math.ceil(size / multiple) * multiple


def _rank_key(x: Array, order: Order) -> Array:
    """int32 keys that order float32 values; integers, so that subnormals are never flushed."""
    bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.int32)
    magnitude = bits & _MAGNITUDE_BITS
    # One key for every NaN, whatever its sign and payload: ties between NaNs go to the lower index.
    is_nan = magnitude > _INFINITY_BITS
    key = magnitude if order == "magnitude" else jnp.where(bits < 0, -magnitude, magnitude)
    return jnp.where(is_nan, _MAGNITUDE_BITS, key)


def _ranks(groups: Array, order: Order) -> Array:
    """Rank (0 is the highest) of each element of the last axis; ties to the lower index."""
    keys = [_rank_key(groups[..., i], order) for i in range(GROUP)]
    ranks = [jnp.zeros(groups.shape[:-1], jnp.int32) for _ in range(GROUP)]
    for i in range(GROUP):
        for j in range(i + 1, GROUP):
            later_wins = (keys[j] > keys[i]).astype(jnp.int32)
            ranks[i] += later_wins
            ranks[j] += 1 - later_wins
    return jnp.stack(ranks, axis=-1)


def _soft(groups: Array, ranks: Array) -> Array:
    """Soft threshold of float32 groups of 4 at their third-largest magnitude."""
    magnitude = jnp.abs(groups)
    # A masked sum would turn a NaN elsewhere in the group into a NaN threshold; `max` over a fill
    # of zeros only sees the selected element.
    t = jnp.max(jnp.where(ranks == 2, magnitude, 0.0), axis=-1, keepdims=True)
    # Not `maximum`: XLA's CPU backend lets it swallow a NaN.
    above = magnitude - t
    shrunk = jnp.sign(groups) * jnp.where(above <= 0.0, 0.0, above)
    return jnp.where(ranks < 2, shrunk, 0.0)


def _grouped(x: Array, axis: int) -> Array:
    """Moves `axis` last and splits it into groups: (..., size/4, 4)."""
    x = jnp.moveaxis(x, axis, -1)
    size = x.shape[-1]
    if size % GROUP:
        raise ValueError(f"{size=} of {axis=} must be a multiple of {GROUP}")
    return x.reshape(*x.shape[:-1], size // GROUP, GROUP)


def _ungrouped(groups: Array, axis: int) -> Array:
    x = groups.reshape(*groups.shape[:-2], groups.shape[-2] * GROUP)
    return jnp.moveaxis(x, -1, axis)


def select24(x: ArrayLike, axis: int = -1, by: Order = "magnitude") -> Array:
    """Mask of the two kept elements of each group of four along `axis`.

    Args:
      x: floating-point array, any rank; size along `axis` a multiple of 4.
      axis: the axis that the groups run along.
      by: "magnitude" or "value".

    Returns:
      bool array of x's shape, exactly two True in each group (so an all-zero group keeps its
      elements 0 and 1). Ties go to the lower index; NaN outranks every number.

    Raises:
      ValueError: size or `by` is not allowed.
    """
    require_one_of("by", by, ORDERS)
    return _select24(jnp.asarray(x), axis, by)


@functools.partial(jax.jit, static_argnums=(1, 2), inline=True)
def _select24(x: Array, axis: int, by: Order) -> Array:
    return _ungrouped(_ranks(_grouped(x, axis), by) < 2, axis)


def soft_threshold(w: ArrayLike, axis: int = -1) -> Array:
    """S(w) = sign(w) max(|w| - t, 0), t the second-smallest magnitude of each group of four.

    The result is 2:4 along `axis` and continuous in w (S-STE, arXiv 2409.09099).
    Computed in float32 and returned in w's dtype.

    Args:
      w: floating-point array, any rank; size along `axis` a multiple of 4.
      axis: the axis that the groups run along.

    Returns:
      Array of w's shape and dtype. A NaN among the two kept elements stays NaN. An infinity among
      them stays unless t is infinite too (then inf - inf gives NaN).

    Raises:
      ValueError: the size along `axis` is not a multiple of 4.
    """
    return _soft_threshold(jnp.asarray(w), axis)


@functools.partial(jax.jit, static_argnums=1, inline=True)
def _soft_threshold(w: Array, axis: int) -> Array:
    groups = _grouped(w, axis).astype(jnp.float32)
    return _ungrouped(_soft(groups, _ranks(groups, "magnitude")), axis).astype(w.dtype)


def _pack_metadata(i0: Array, i1: Array) -> Array:
    """Kept indices (m, k/4), i0 < i1, to metadata (m/64, k/64, 128) int32."""
    m, groups = i0.shape
    k = groups * GROUP
    nibbles = (i0 | (i1 << 2)).astype(jnp.uint32).reshape(m, k // 16, 4)
    halves = jnp.sum(nibbles << (4 * jnp.arange(4, dtype=jnp.uint32)), axis=-1, dtype=jnp.uint32)
    # m = (tile, warp, low or high half-word, q), k/16 = (tile, selector s, half h)
    halves = halves.reshape(m // TILE, 4, 2, 8, k // TILE, 2, 2)
    words = halves[:, :, 0] | (halves[:, :, 1] << 16)
    words = words.transpose(0, 3, 1, 2, 4, 5).reshape(m // TILE, k // TILE, 128)
    return lax.bitcast_convert_type(words, jnp.int32)


def _unpack_metadata(metadata: Array) -> tuple[Array, Array]:
    """Inverse of `_pack_metadata`."""
    tiles_m, tiles_k, _ = metadata.shape
    words = lax.bitcast_convert_type(metadata, jnp.uint32)
    words = words.reshape(tiles_m, tiles_k, 4, 8, 2, 2).transpose(0, 2, 3, 1, 4, 5)
    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=2)
    halves = halves.reshape(tiles_m * TILE, tiles_k * TILE // 16, 1)
    nibbles = (halves >> (4 * jnp.arange(4, dtype=jnp.uint32))) & 0xF
    nibbles = nibbles.reshape(tiles_m * TILE, tiles_k * TILE // GROUP).astype(jnp.int32)
    return nibbles & 3, nibbles >> 2


def require_packed(values: Array, metadata: Array) -> None:
    """Raises ValueError unless the arrays are a packed matrix of a type of `pack24`."""
    require_packed_shapes(values, metadata)
    require_float("values.dtype", values.dtype)


def require_packed_shapes(values: Array, metadata: Array) -> None:
    """Raises ValueError unless the arrays have the shapes of a packed matrix, of any type."""
    if values.ndim != 2:
        raise ValueError(f"{values.shape=} must have two axes")
    m, k = values.shape[0], 2 * values.shape[1]
    if m % TILE or k % TILE:
        raise ValueError(f"packed {m=} and {k=} must be multiples of {TILE}")
    expected = (m // TILE, k // TILE, 128)
    if metadata.shape != expected or metadata.dtype != jnp.int32:
        raise ValueError(f"{metadata.shape=}, {metadata.dtype=} must be {expected}, int32")


def pack24(
    x: ArrayLike,
    *,
    axis: int,
    mode: Mode,
    scale: ArrayLike | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    config: None = None,
) -> tuple[Array, Array]:
    """Thresholds or selects two of four along `axis` and packs them.

    Args:
      x: (rows, cols), float32, bfloat16 or float16.
      axis: 0 or 1, the contracted axis: k is x.shape[axis], m is the other one.
      mode: "magnitude" or "value" (keep the two largest by that order), or "soft_threshold".
      scale: None or a float32 scalar, multiplied in before the values are rounded to `dtype`.
      dtype: of the packed values: bfloat16 or float16 (float32 only here, for exact tests).
      config: none for this backend.

    Returns:
      values and metadata (see the module's docstring), m and k padded to multiples of 64.

    Raises:
      ValueError: an argument is not allowed.
    """
    del config
    x = jnp.asarray(x)
    if x.ndim != 2:
        raise ValueError(f"{x.shape=} must have two axes")
    require_one_of("axis", axis, (0, 1))
    require_one_of("mode", mode, MODES)
    require_float("dtype", dtype)
    require_float("x.dtype", x.dtype)

    return _pack24(x, scale, axis=axis, mode=mode, dtype=jnp.dtype(dtype))


@functools.partial(jax.jit, static_argnames=("axis", "mode", "dtype"))
def _pack24(
    x: Array,
    scale: ArrayLike | None,
    *,
    axis: int,
    mode: Mode,
    dtype: DTypeLike,
) -> tuple[Array, Array]:
    a = (x.T if axis == 0 else x).astype(jnp.float32)
    m, k = a.shape
    a = jnp.pad(a, ((0, padded(m) - m), (0, padded(k) - k)))
    m, k = a.shape

    groups = a.reshape(m, k // GROUP, GROUP)
    ranks = _ranks(groups, "value" if mode == "value" else "magnitude")
    kept = ranks < 2
    if mode == "soft_threshold":
        groups = _soft(groups, ranks)
    if scale is not None:
        groups = groups * jnp.asarray(scale, jnp.float32)

    i0 = jnp.argmax(kept, axis=-1).astype(jnp.int32)
    i1 = (GROUP - 1 - jnp.argmax(kept[..., ::-1], axis=-1)).astype(jnp.int32)
    values = jnp.take_along_axis(groups, jnp.stack([i0, i1], axis=-1), axis=-1)
    values = values.reshape(m, k // 2).astype(dtype)
    return values, _pack_metadata(i0, i1)


def check_pack24(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def unpack24(values: Array, metadata: Array) -> Array:
    """The dense (m, k) matrix of a packed one, in the dtype of `values`.

    Raises:
      ValueError: the arrays do not belong together.
    """
    require_packed(values, metadata)
    return _unpack24(values, metadata)


@jax.jit
def _unpack24(values: Array, metadata: Array) -> Array:
    return spread(values, *_unpack_metadata(metadata))


def spread(values: Array, i0: Array, i1: Array) -> Array:
    """Pairs (m, k / 2) at the positions i0 < i1 (m, k / 4) of their groups, among zeros: (m, k)."""
    m, half_k = values.shape
    pairs = values.reshape(m, half_k // 2, 2)
    zero = jnp.zeros((), values.dtype)  # 8-bit floats take no other type's.
    columns = [
        jnp.where(i0 == i, pairs[..., 0], jnp.where(i1 == i, pairs[..., 1], zero))
        for i in range(GROUP)
    ]
    return jnp.stack(columns, axis=-1).reshape(m, 2 * half_k)


def spmm24(
    values: Array,
    metadata: Array,
    b: ArrayLike,
    *,
    b_layout: Literal["nk", "kn"],
    out_layout: Literal["mn", "nm"] = "mn",
    scale: ArrayLike | None = None,
    epilogue: Literal["relu2"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    config: None = None,
) -> Array:
    """epilogue(scale * A @ B) for a packed 2:4 matrix A (m, k), accumulated in float32.

    Args:
      values: of A.
      metadata: of A.
      b: (n, k) for b_layout "nk" (contraction contiguous), (k, n) for "kn"; dtype of `values`.
      b_layout: "nk" or "kn".
      out_layout: "mn" for a result (m, n), "nm" for (n, m).
      scale: None or a float32 scalar, applied to the accumulator.
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
    require_packed(values, metadata)
    require_one_of("b_layout", b_layout, B_LAYOUTS)
    require_one_of("out_layout", out_layout, OUT_LAYOUTS)
    require_one_of("epilogue", epilogue, EPILOGUES)
    require_float("out_dtype", out_dtype)
    if b.ndim != 2:
        raise ValueError(f"{b.shape=} must have two axes")
    if b.dtype != values.dtype:
        raise ValueError(f"{b.dtype=} must be {values.dtype=}")
    k = 2 * values.shape[1]
    b_contraction = 1 if b_layout == "nk" else 0
    if b.shape[b_contraction] != k:
        raise ValueError(f"{b.shape=} in {b_layout=} must have {k=} along the contraction")

    a = unpack24(values, metadata)
    operands = (a, b) if out_layout == "mn" else (b, a)
    contraction = (1, b_contraction) if out_layout == "mn" else (b_contraction, 1)
    out = lax.dot_general(
        *operands,
        dimension_numbers=(((contraction[0],), (contraction[1],)), ((), ())),
        # float32 operands are there for exact tests: no TF32 then. 16-bit products are exact.
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    if scale is not None:
        out = out * jnp.asarray(scale, jnp.float32)
    if epilogue == "relu2":
        out = jnp.square(jax.nn.relu(out))
    return out.astype(out_dtype)


def check_spmm24(*args, **kwargs) -> None:
    """The reference serves every device and shape."""
