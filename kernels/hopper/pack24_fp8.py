"""Soft threshold or selection of two of four, scaling to 8 bits and packing, in one pass (Hopper).

The threads lie over the matrix as those of `kernels.hopper.pack24`, whose loads and arithmetic
these are: one takes 16 consecutive elements along k, of two rows or of four. A word of metadata is
32 elements of one row here, so two threads that are neighbours along k exchange half-words, and
each of them makes half of the words. A warp counts the values that saturate, and writes its count
to a place of its own: no atomics, the same sum on every run.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels import reference_fp8
from kernels.hopper import device, pack24, ptx
from kernels.hopper.pack24 import ARRAY, SCALAR, Pack24Config, Problem, add, mul
from kernels.hopper.spmm24_problem import FP8_DTYPES

__all__ = ["Pack24Config", "check_pack24_fp8", "pack24_fp8"]

_SHAPE = (ptx.WARPGROUP * pack24.GROUPS,)
_INFINITY_BITS = 0x7F800000
# The largest float32 numbers that are not above the type's largest number once rounded: halfway to
# the number that would follow it, a tie that goes to even, which for e5m2 is up.
_LIMIT_BITS = {"float8_e4m3fn": 0x43E80000, "float8_e5m2": 0x476FFFFF}


def count_over(low: jax.Array, high: jax.Array, dtype: str) -> jax.Array:
    """How many of two float32 values saturate, 0 to 2; elementwise, int32."""
    total = jnp.zeros(low.shape, jnp.int32)
    for x in (low, high):
        magnitude = lax.bitcast_convert_type(x, jnp.int32) & pack24.MAGNITUDE_BITS
        # Integers, so that NaN (above infinity) is not counted.
        over = (magnitude > _LIMIT_BITS[dtype]) & (magnitude <= _INFINITY_BITS)
        total = total + jnp.where(over, 1, 0)
    return total


def _row_scales(p: Problem):
    """The scales of the thread's rows, each as often as a row has groups."""
    result = [plgpu.ShapeDtypeStruct(_SHAPE, jnp.float32, layout=ARRAY)] * p.rows

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR), return_type=result)
    def load(ctx, scale_g, m_block, k_block):
        del ctx
        row, _, _ = pack24.position(p, *map(pack24.value_of, (m_block, k_block)))
        base = ptx.global_address(scale_g)
        rows = [pack24.row_of(p, row, j) for j in range(p.rows)]
        scales = [ptx.load_global_f32(ptx.offset_address(base, r, 4), 1)[0] for r in rows]
        return [pack24.to_array([s] * pack24.GROUPS) for s in scales]

    return load


def _store(p: Problem):
    """Writes values, metadata and the warp's count, from (low, high, nibble, over) of each row."""
    rows = [[ARRAY] * 4] * p.rows
    refs = (plgpu.RefType(),) * 3

    @plgpu.inline_mgpu(arg_types=(*refs, SCALAR, SCALAR, SCALAR, rows))
    def store(ctx, values_g, meta_g, counts_g, block, m_block, k_block, packed):
        del ctx
        block, m_block, k_block = map(pack24.value_of, (block, m_block, k_block))
        row, k, c = pack24.position(p, m_block, k_block)
        base = ptx.global_address(values_g)
        half_k = arith.shrui(k, ptx.const32(1))
        halves = []
        saturated = ptx.const32(0)
        for j, (low, high, nibbles, over) in enumerate(packed):
            pairs = zip(pack24.to_values(low), pack24.to_values(high), strict=True)
            values = [value for pair in pairs for value in pair]
            words = [ptx.pack_four(values[i : i + 4], FP8_DTYPES[p.out_dtype]) for i in (0, 4)]
            offset = pack24.element(pack24.row_of(p, row, j), half_k, p.k // 2)
            address = ptx.offset_address(base, offset, 1)
            ptx.asm(None, [address, *words], "st.global.v2.b32 [$0], {$1, $2};", "l,r,r")
            half = ptx.const32(0)
            for i, nibble in enumerate(pack24.to_values(nibbles)):
                half = arith.ori(half, arith.shli(nibble, ptx.const32(4 * i)))
            halves.append(half)
            for number in pack24.to_values(over):
                saturated = add(saturated, number)
        _store_metadata(p, ptx.global_address(meta_g), row, k, c, halves)
        _store_count(p, ptx.global_address(counts_g), block, m_block, saturated)

    return store


def _store_metadata(p: Problem, base, row, k, c, halves: list[ir.Value]) -> None:
    """Joins half-words of elements 16 c and 16 c + 16 and writes them at their threads' places.

    `halves` are of the thread's rows; those of the neighbour along k, c ^ 1, are in another lane.
    The thread of even c writes the words of the first half of the rows, the other one the rest.
    """
    c16 = ptx.const32(16)
    low16, high16 = ptx.const32(0xFFFF), ptx.const32(-0x10000)
    odd = arith.cmpi(
        arith.CmpIPredicate.ne, arith.andi(c, ptx.const32(1)), ptx.const32(0)
    )  # fmt: skip
    num = p.rows // 2
    # One register holds the half-words of one row, or of two.
    join = lambda words: words[0] if num == 1 else arith.ori(words[0], arith.shli(words[1], c16))
    first, last = join(halves[:num]), join(halves[num:])
    kept, sent = arith.select(odd, last, first), arith.select(odd, first, last)
    received = ptx.shuffle_xor(sent, 1 if p.axis == 1 else 8)
    lower, upper = arith.select(odd, received, kept), arith.select(odd, kept, received)
    own = arith.select(odd, ptx.const32(num), ptx.const32(0))  # the first of the thread's words

    row_tile, k_tile = (arith.shrui(at, ptx.const32(6)) for at in (row, k))
    tile = mul(pack24.element(row_tile, k_tile, p.k // 64), 128)
    h2 = arith.andi(c, ptx.const32(2))  # twice the half of the 64 elements
    for i in range(num):
        if i == 0:
            word = arith.ori(arith.andi(lower, low16), arith.shli(upper, c16))
        else:
            word = arith.ori(arith.shrui(lower, c16), arith.andi(upper, high16))
        j = add(own, i)
        r = add(row, mul(j, 8) if p.axis == 1 else j)
        place = add(mul(arith.andi(arith.shrui(r, ptx.const32(4)), ptx.const32(3)), 32), tile)
        place = add(place, mul(arith.andi(r, ptx.const32(7)), 4))
        place = add(place, h2)
        place = add(place, arith.andi(arith.shrui(r, ptx.const32(3)), ptx.const32(1)))
        ptx.asm(None, [ptx.offset_address(base, place, 4), word], "st.global.b32 [$0], $1;", "l,r")


def _store_count(p: Problem, base, block, m_block, saturated: ir.Value) -> None:
    warp = arith.divui(ptx.thread_in_warpgroup(), ptx.const32(ptx.WARP))
    # A last warp without rows of its own redoes its neighbour's (`pack24.position`).
    first = add(mul(m_block, p.block_m), mul(warp, p.warp_m))
    own = arith.cmpi(arith.CmpIPredicate.ult, first, ptx.const32(p.m))
    total = ptx.warp_sum(arith.select(own, saturated, ptx.const32(0)))
    address = ptx.offset_address(base, add(mul(block, 4), warp), 4)
    with utils.when(ptx.is_leader(ptx.WARP)):
        ptx.asm(None, [address, total], "st.global.b32 [$0], $1;", "l,r")


def _kernel(p: Problem, row_scaled: bool, x_g, *rest):
    *scale_g, values_g, meta_g, counts_g = rest
    m_block, k_block = pack24.block_of(p)
    scales: list[Any] = [None] * p.rows
    if row_scaled:
        scales = list(_row_scales(p)(*scale_g, m_block, k_block))
    elif p.scaled:
        scales = [scale_g[0][0]] * p.rows
    rows = pack24.load_groups(p)(x_g, m_block, k_block)
    packed = []
    for elements, scale in zip(rows, scales, strict=True):
        low, high, nibble = pack24.pack_group(elements, p.mode, scale)
        packed.append([low, high, nibble, count_over(low, high, p.out_dtype)])
    _store(p)(values_g, meta_g, counts_g, lax.axis_index("block"), m_block, k_block, packed)


def pack24_fp8(
    x: jax.Array,
    *,
    axis: int,
    mode: str,
    scale: jax.Array | None = None,
    dtype: Any = jnp.float8_e4m3fn,
    config: Pack24Config | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`kernels.reference_fp8.pack24_fp8`, in one pass over memory.

    Raises ValueError for arguments that are not allowed and NotImplementedError where
    `check_pack24_fp8` does.
    """
    check_pack24_fp8(x, axis=axis, mode=mode, scale=scale, dtype=dtype, config=config)
    size = x.shape[1 - axis]
    x, p = pack24.prepare(
        x, axis=axis, mode=mode, dtype=dtype, scaled=scale is not None, config=config
    )
    operands = [x]
    row_scaled = False
    if scale is not None:
        scales = jnp.asarray(scale, jnp.float32)
        row_scaled = bool(scales.ndim)
        operands.append(jnp.pad(scales, (0, p.m - size)) if row_scaled else scales.reshape(1))
    values, metadata, counts = pack24.launch(
        p,
        functools.partial(_kernel, p, row_scaled),
        operands,
        jax.ShapeDtypeStruct((pack24.num_blocks(p), 4), jnp.int32),
        name="pack24_fp8_hopper",
    )
    return values, metadata, jnp.sum(counts)


def check_pack24_fp8(
    x: jax.Array,
    *,
    axis: int,
    mode: str,
    scale: jax.Array | None = None,
    dtype: Any = jnp.float8_e4m3fn,
    config: Pack24Config | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that are never allowed raise ValueError.
    """
    del config
    reference_fp8.require_packing(x, axis, mode, scale, dtype)
    if x.size >= 1 << 31:
        raise NotImplementedError(f"{x.shape=} has 2^31 elements or more")
    device.require_hopper()
