"""Gathers rows of tokens and rounds them to 8 bits, in one pass over memory (Hopper).

A warp does a row: it reads the token's, finds the largest magnitude in its registers, and writes
the row in 16 bits (for the weight gradient, which contracts tokens) and in 8.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.typing import DTypeLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels import reference_fp8
from kernels import reference_grouped_fp8 as reference
from kernels.hopper import device, ptx
from kernels.hopper import grouped_common as common

_WARPS = 4  # of a block: a row each
_CHUNK = 8 * ptx.WARP  # elements of a row that a warp loads at once
_LARGEST_WIDTH = 8192  # what fits into a warp's registers

# Loads 16 bytes, or makes zeros where $5 is zero.
_LOAD = """{ .reg .pred used;
setp.ne.b32 used, $5, 0;
mov.b32 $0, 0;
mov.b32 $1, 0;
mov.b32 $2, 0;
mov.b32 $3, 0;
@used ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }"""


def _floats(word: ir.Value) -> list[ir.Value]:
    """The two bfloat16 of a word."""
    f32 = ir.F32Type.get()
    low = arith.shli(word, ptx.const32(16))
    high = arith.andi(word, ptx.const32(-0x10000))
    return [arith.bitcast(f32, low), arith.bitcast(f32, high)]


def _largest(words: list[ir.Value]) -> ir.Value:
    """The bits of the largest magnitude in the warp's words, as a float32; NaN above infinity."""
    i32 = ptx.i32_type()
    top = ptx.const32(0)
    for word in words:
        magnitudes = arith.andi(word, ptx.const32(0x7FFF7FFF))
        top = ptx.asm(i32, [top, magnitudes], "max.u16x2 $0, $1, $2;", "=r,r,r")
    low, high = arith.shli(top, ptx.const32(16)), arith.andi(top, ptx.const32(-0x10000))
    both = arith.maxui(low, high)
    return ptx.asm(i32, [both], "redux.sync.max.u32 $0, $1, 0xffffffff;", "=r,r")


def _scale(bits: ir.Value, dtype: str) -> tuple[ir.Value, ir.Value]:
    """`kernels.reference_fp8.scale_for` of a magnitude's bits, and its inverse, as bits."""
    top = reference_fp8.TOP_EXPONENTS[dtype]
    carried = arith.shrui(common.add(bits, 0x7FFFFF - 0x600000), ptx.const32(23))
    exponent = arith.maxsi(common.add(carried, -top), ptx.const32(1))
    shifted = lambda e: arith.shli(e, ptx.const32(23))
    found = [shifted(exponent), shifted(arith.subi(ptx.const32(254), exponent))]
    zero = arith.cmpi(arith.CmpIPredicate.eq, bits, ptx.const32(0))
    wild = arith.cmpi(arith.CmpIPredicate.uge, bits, ptx.const32(0x7F800000))
    one, nan = ptx.const32(0x3F800000), ptx.const32(0x7FC00000)
    scale, inverse = (arith.select(wild, nan, arith.select(zero, one, s)) for s in found)
    return scale, inverse


def _warp_sum(total: ir.Value) -> ir.Value:
    """The sum of a float32 over the warp."""
    f32, i32 = ir.F32Type.get(), ptx.i32_type()
    for mask in (16, 8, 4, 2, 1):
        other = ptx.shuffle_xor(arith.bitcast(i32, total), mask)
        total = arith.addf(total, arith.bitcast(f32, other))
    return total


def _row(width: int, tokens: int, dtype: str):
    """One row for each warp of the block."""
    name = common.ptx_name(dtype)

    @plgpu.inline_mgpu(arg_types=(*(common.REF,) * 6, common.SCALAR))
    def row_of_warp(ctx, x_g, order_g, rows_g, rounded_g, scale_g, squares_g, block):
        del ctx
        i32 = ptx.i32_type()
        warp, lane = common.warp_and_lane()
        row = common.add(common.mul(common.scalar(block), _WARPS), warp)
        address = ptx.offset_address(ptx.global_address(order_g), row, 4)
        token = ptx.asm(i32, [address], "ld.global.nc.b32 $0, [$1];", "=r,l")
        used = arith.cmpi(arith.CmpIPredicate.ult, token, ptx.const32(tokens))
        used = arith.extui(i32, used)

        def address_of(ref, row: ir.Value, size: int) -> ir.Value:
            start = ptx.offset_address(ptx.global_address(ref), row, size * width)
            return ptx.offset_address(start, lane, 8 * size)

        four = llvm.StructType.get_literal([i32] * 4)
        source = address_of(x_g, token, 2)
        chunks = []
        for i in range(width // _CHUNK):
            at = arith.addi(source, ptx.const64(2 * _CHUNK * i))
            loaded = ptx.asm(four, [at, used], _LOAD, "=&r,=&r,=&r,=&r,l,r")
            chunks.append([llvm.extractvalue(i32, loaded, [j]) for j in range(4)])
        words = [word for chunk in chunks for word in chunk]
        scale, inverse = _scale(_largest(words), dtype)
        factor = arith.bitcast(ir.F32Type.get(), inverse)
        squares = arith.bitcast(ir.F32Type.get(), ptx.const32(0))
        target, narrow = address_of(rows_g, row, 2), address_of(rounded_g, row, 1)
        for i, chunk in enumerate(chunks):
            at = arith.addi(target, ptx.const64(2 * _CHUNK * i))
            ptx.asm(None, [at, *chunk], "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r")
            floats = [x for word in chunk for x in _floats(word)]
            for x in floats:
                squares = arith.addf(squares, arith.mulf(x, x))
            values = [arith.mulf(x, factor) for x in floats]
            rounded = [ptx.pack_four(values[j : j + 4], name) for j in (0, 4)]
            at = arith.addi(narrow, ptx.const64(_CHUNK * i))
            ptx.asm(None, [at, *rounded], "st.global.v2.b32 [$0], {$1, $2};", "l,r,r")
        total = arith.bitcast(i32, _warp_sum(squares))
        with utils.when(ptx.is_leader(ptx.WARP)):
            for ref, value in ((scale_g, scale), (squares_g, total)):
                at = ptx.offset_address(ptx.global_address(ref), row, 4)
                ptx.asm(None, [at, value], "st.global.b32 [$0], $1;", "l,r")

    return row_of_warp


def stack_fp8(
    x: jax.Array, order: jax.Array, *, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`kernels.reference_grouped_fp8.stack_fp8`.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_stack_fp8`
    does.
    """
    check_stack_fp8(x, order, dtype=dtype)
    rows, width = reference.stack_dims(x, order, dtype)
    narrow = jnp.dtype(dtype)

    def body(*refs):
        _row(width, x.shape[0], narrow.name)(*refs, lax.axis_index("block"))

    array: Any = jax.ShapeDtypeStruct
    call = plgpu.kernel(
        body,
        out_type=(
            array((rows, width), x.dtype),
            array((rows, width), narrow),
            array((rows,), jnp.float32),
            array((rows,), jnp.float32),
        ),
        grid=(rows // _WARPS,),
        grid_names=("block",),
        kernel_name="stack_fp8_hopper",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    stacked, rounded, scale, squares = call(x, order)
    return stacked, rounded, scale, squares


def check_stack_fp8(x: jax.Array, order: jax.Array, *, dtype: DTypeLike) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    rows, width = reference.stack_dims(x, order, dtype)
    if x.dtype != jnp.bfloat16:
        raise NotImplementedError(f"{x.dtype=} is not bfloat16")
    if rows % _WARPS or width % _CHUNK or width > _LARGEST_WIDTH:
        raise NotImplementedError(
            f"{rows=} must be a multiple of {_WARPS}, {width=} of {_CHUNK} and at most "
            f"{_LARGEST_WIDTH}"
        )
    device.require_hopper()
