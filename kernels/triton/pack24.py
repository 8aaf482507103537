"""Selection or soft threshold, then packing to 2:4, in one pass over memory (Pallas Triton)."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
from jax import lax

from kernels.triton import device, ptx

MODES = ("magnitude", "value", "soft_threshold")

_MAGNITUDE_BITS = 0x7FFFFFFF
_INFINITY_BITS = 0x7F800000


@dataclasses.dataclass(frozen=True)
class Pack24Config:
    """Tiling of `pack24`.

    Attributes:
      tiles_k: 64 x 64 tiles of a program along k, a power of two; 4 warps work on each.
    """

    tiles_k: int = 1


def _check_arguments(x, *, axis, mode, scale, dtype) -> None:
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{x.shape=} must be two-dimensional and not empty")
    if axis not in (0, 1):
        raise ValueError(f"{axis=} must be 0 or 1")
    if x.shape[axis] % 4:
        raise ValueError(f"{x.shape[axis]=} of {axis=} must be a multiple of 4")
    if mode not in MODES:
        raise ValueError(f"{mode=} must be one of {MODES}")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{x.dtype=} must be a floating-point type")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{dtype=} must be a floating-point type")
    if scale is not None and jnp.shape(scale) != ():
        raise ValueError(f"scale must be a scalar, not of shape {jnp.shape(scale)}")


def check_pack24(
    x,
    *,
    axis: int,
    mode: str,
    scale=None,
    dtype: Any = jnp.bfloat16,
    config: Pack24Config | None = None,
) -> None:
    """Raises NotImplementedError where `pack24` does not serve this device, shape or dtype."""
    del mode, scale, config
    device.require_capability("pack24", 8.0)
    if x.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"triton pack24 takes float32, bfloat16 or float16, not {x.dtype=}"
        )
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"triton pack24 writes bfloat16 or float16, not {dtype=}")
    vector = 16 // jnp.dtype(x.dtype).itemsize
    if axis == 1 and x.shape[1] % vector:
        raise NotImplementedError(
            f"triton pack24 needs {x.shape[1]=} of {x.dtype=} to be a multiple of {vector}"
        )


def pack24(
    x: jax.Array,
    *,
    axis: int,
    mode: str,
    scale: jax.Array | None = None,
    dtype: Any = jnp.bfloat16,
    config: Pack24Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Prunes `x` to 2:4 along `axis` and packs it, reading it once.

    Args:
      x: (rows, cols) float32, bf16 or fp16. The packed operand is (m, k) with k = x.shape[axis] and
        m the other size, so axis=0 packs the transpose.
      axis: 0 or 1, the contracted axis; its size is a multiple of 4.
      mode: "magnitude" or "value" keep the two highest-ranking elements of each group of four, ties
        to the lower index, NaN above all numbers; "soft_threshold" also subtracts the group's
        second-smallest magnitude from the magnitudes of the kept ones (S-STE, arXiv 2409.09099).
      scale: None or a float32 scalar that multiplies the kept values before they are rounded.
      dtype: of the packed values, bfloat16 or float16.
      config: tiling; None takes a heuristic.
      interpret: run in Pallas's interpreter, with jax.numpy in place of the inline PTX.

    Returns:
      values (m, k // 2) and metadata (m // 64, k // 64, 128) int32, m and k padded with zeros to
      multiples of 64.

    Raises:
      ValueError: on malformed arguments.
      NotImplementedError: where `check_pack24` does.
    """
    _check_arguments(x, axis=axis, mode=mode, scale=scale, dtype=dtype)
    if not interpret:
        check_pack24(x, axis=axis, mode=mode, dtype=dtype)
    if config is None:
        # Along axis 0 a wider program reads more rows at once; along axis 1 it gains nothing.
        config = Pack24Config(tiles_k=2 if axis == 0 else 1)
    if config.tiles_k not in (1, 2, 4, 8):
        raise ValueError(f"{config=}: tiles_k must be 1, 2, 4 or 8")
    return _pack24(
        x, scale, axis=axis, mode=mode, dtype=jnp.dtype(dtype), config=config, interpret=interpret
    )


@functools.partial(jax.jit, static_argnames=("axis", "mode", "dtype", "config", "interpret"))
def _pack24(x, scale, *, axis, mode, dtype, config, interpret):
    m, k = x.shape[1 - axis], x.shape[axis]
    tiles_m, tiles_k = math.ceil(m / 64), math.ceil(k / 64)
    grid_k = math.ceil(tiles_k / config.tiles_k)
    warps = 4 * config.tiles_k

    def kernel(x_ref, *rest):
        *scale_ref, values_ref, metadata_ref = rest
        program = pl.program_id(0)
        tile_m, thread = program // grid_k, lax.broadcasted_iota(jnp.int32, (32 * warps,), 0)
        tile_k = program % grid_k * config.tiles_k + thread // 128
        # A thread makes one word of metadata: 16 elements along k of rows q and q + 8 of 16.
        word = thread % 128
        row = 64 * tile_m + word // 32 * 16 + word % 32 // 4
        col = 64 * tile_k + word % 4 * 16
        inside = tile_k < tiles_k
        metadata = jnp.zeros(thread.shape, jnp.uint32)
        loaded = [load_16(x_ref, row + 8 * half, col, axis, interpret) for half in range(2)]
        for half, elements in enumerate(loaded):
            packed = []
            for g in range(4):
                first, second, nibble = select(elements[4 * g : 4 * g + 4], mode, x.dtype)
                metadata |= nibble << (16 * half + 4 * g)
                if scale_ref:
                    first, second = first * scale_ref[0][0], second * scale_ref[0][0]
                packed.append(ptx.pack_pair(first, second, dtype, emulate=interpret))
            ptx.store_words(
                values_ref,
                row + 8 * half,
                col // 2,
                packed,
                inside.astype(jnp.int32),
                emulate=interpret,
            )
        ptx.store_words(
            metadata_ref,
            jnp.full(thread.shape, tile_m),
            128 * tile_k + word,
            [metadata],
            inside.astype(jnp.int32),
            emulate=interpret,
        )

    values, metadata = pl.pallas_call(
        kernel,
        grid=(tiles_m * grid_k,),
        out_shape=(
            jax.ShapeDtypeStruct((64 * tiles_m, 32 * tiles_k), dtype),
            jax.ShapeDtypeStruct((tiles_m, 128 * tiles_k), jnp.int32),
        ),
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="pack24",
    )(x, *([] if scale is None else [jnp.asarray(scale, jnp.float32).reshape(1)]))
    return values, metadata.reshape(tiles_m, tiles_k, 128)


def load_16(x_ref, row, col, axis: int, emulate: bool) -> list[jax.Array]:
    """16 consecutive elements along k, as float32; zeros past the edges."""
    if axis == 0:
        rows, cols = x_ref.shape
        elements = []
        for i in range(16):
            inside = (col + i < rows) & (row < cols)
            at = x_ref.at[jnp.minimum(col + i, rows - 1), jnp.minimum(row, cols - 1)]
            loaded = plt.load(at, mask=inside, other=0.0)
            elements.append(loaded.astype(jnp.float32))
        return elements
    per_vector = 16 // jnp.dtype(x_ref.dtype).itemsize
    elements = []
    for i in range(0, 16, per_vector):
        inside = (row < x_ref.shape[0]) & (col + i < x_ref.shape[1])
        words = ptx.load_words(x_ref, row, col + i, inside.astype(jnp.int32), emulate=emulate)
        for word in words:
            elements += from_word(word, x_ref.dtype)
    return elements


def from_word(word: jax.Array, dtype) -> list[jax.Array]:
    """The float32 values in a uint32 word: one float32, or two of 16 bits."""
    if dtype == jnp.float32:
        return [lax.bitcast_convert_type(word, jnp.float32)]
    if dtype == jnp.bfloat16:
        # bf16 is the upper half of a float32.
        halves = [word << 16, word & jnp.uint32(0xFFFF0000)]
        return [lax.bitcast_convert_type(h, jnp.float32) for h in halves]
    halves = [word & 0xFFFF, word >> 16]
    return [
        lax.bitcast_convert_type(h.astype(jnp.uint16), dtype).astype(jnp.float32) for h in halves
    ]


def select(x: list[jax.Array], mode: str, dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The two kept values of a group of four and the nibble that names their positions.

    Args:
      x: four float32 arrays, which came from `dtype`.
      mode: as for `pack24`.
    """
    keys = [_rank_key(e, mode, dtype) for e in x]
    # All ones where the later element j ranks above i, else zero; ties go to the earlier one. Masks
    # in ordinary registers: the few predicate registers would spill.
    above = {
        (i, j): _above(keys[j], keys[i], mode, dtype) for i in range(4) for j in range(i + 1, 4)
    }

    def kept(i: int) -> jax.Array:
        # An element is kept if it ranks above two of the other three.
        a, b, c = (~above[i, j] if i < j else above[j, i] for j in range(4) if j != i)
        return (a & b) | (c & (a | b))

    # Two of four are kept, so the first is one of 0, 1, 2 and the second one of 1, 2, 3.
    kept0, kept1, kept2, kept3 = (kept(i) for i in range(4))
    if mode == "soft_threshold":
        low, high = jnp.minimum(keys[0], keys[1]), jnp.maximum(keys[0], keys[1])
        low2, high2 = jnp.minimum(keys[2], keys[3]), jnp.maximum(keys[2], keys[3])
        second_smallest = jnp.minimum(jnp.maximum(low, low2), jnp.minimum(high, high2))
        threshold = lax.bitcast_convert_type(second_smallest, jnp.float32)
    bits = [lax.bitcast_convert_type(e, jnp.int32) for e in x]
    first = _blend(kept0, bits[0], _blend(kept1, bits[1], bits[2]))
    second = _blend(kept3, bits[3], _blend(kept2, bits[2], bits[1]))
    i0 = ~kept0 & (2 + kept1)
    i1 = 1 + _blend(kept3, jnp.full_like(kept3, 2), kept2 & 1)
    values = [lax.bitcast_convert_type(v, jnp.float32) for v in (first, second)]
    if mode == "soft_threshold":
        values = [_shrink(v, threshold) for v in values]
    return values[0], values[1], (i0 | (i1 << 2)).astype(jnp.uint32)


def _above(a: jax.Array, b: jax.Array, mode: str, dtype) -> jax.Array:
    """All ones where a > b, else zero."""
    if mode == "value" and dtype == jnp.float32:
        return -(a > b).astype(jnp.int32)  # The difference of two signed keys may overflow.
    return (b - a) >> 31


def _blend(mask: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    return (mask & a) | (~mask & b)


def _rank_key(x: jax.Array, mode: str, dtype) -> jax.Array:
    # Integers order floats exactly, subnormals and NaN included.
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = bits & _MAGNITUDE_BITS
    nan = magnitude > _INFINITY_BITS
    if mode != "value":
        return jnp.where(nan, _MAGNITUDE_BITS, magnitude)
    key = jnp.where(nan, _MAGNITUDE_BITS, jnp.where(bits < 0, -magnitude, magnitude))
    # A 16-bit float leaves the low bit clear: halved, no difference of two keys overflows.
    return key if dtype == jnp.float32 else key >> 1


def _shrink(x: jax.Array, threshold: jax.Array) -> jax.Array:
    reduced = jnp.abs(x) - threshold
    reduced = jnp.where(reduced <= 0.0, 0.0, reduced)  # Not jnp.maximum: Triton's drops NaN.
    bits = lax.bitcast_convert_type(reduced, jnp.uint32)
    sign = lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x80000000)
    return lax.bitcast_convert_type(bits | sign, jnp.float32)
