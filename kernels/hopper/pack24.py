"""Soft threshold or selection of two of four, and packing, in one pass over memory (Hopper).

Memory-bound, so everything stays in registers: a thread takes the 16 consecutive elements along k
that make one 16-bit half-word of metadata, for two rows (groups along rows of x) or for four
neighbouring columns (groups along columns), so that metadata needs no exchange at all or one
shuffle. Stores of values are 16 bytes a thread, and four threads write 64 contiguous bytes. Loads
are 16 bytes a thread, but 8 for 16-bit input along columns: eight columns a thread would need 254
registers, and the lower occupancy costs more (2.0 TB/s against a copy's 2.85 on an H100).

The arithmetic of a group is `pack_group`, plain jax.numpy, traced into the kernel and tested as
such; loads, shuffles and stores are inline.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from kernels.hopper import device, ptx
from kernels.tuning import tables

MODES = ("magnitude", "value", "soft_threshold")

_PTX_NAMES = {"bfloat16": "bf16", "float16": "f16"}
MAGNITUDE_BITS = 0x7FFFFFFF
_SIGN_BIT = -0x80000000
_NAN_KEY = 0x7F800001  # one key for every NaN, above infinity's
GROUPS = 4  # a thread and row: 16 elements, one half-word of metadata
SCALAR = plgpu.Layout.WG_SPLAT(())
ARRAY = plgpu.Layout.WG_STRIDED((ptx.WARPGROUP * GROUPS,), vec_size=1)


@dataclasses.dataclass(frozen=True)
class Pack24Config:
    """Schedule of the `hopper` pack24.

    k_first: consecutive blocks advance along k (contiguous writes), not along m.
    """

    k_first: bool = True


def pack_group(x: list[jax.Array], mode: str, scale: jax.Array | None):
    """The kept pair of groups of four: float32 (low, high) and the metadata nibble.

    x: the groups' elements 0..3, four float32 arrays of one shape. Keeps the two largest by
    magnitude ("magnitude", "soft_threshold") or by value ("value"), ties to the lower index and
    NaN above all; "soft_threshold" shrinks them by the third-largest magnitude.
    """
    keys = [_rank_key(v, mode) for v in x]
    second, fourth = keys[1] > keys[0], keys[3] > keys[2]  # the larger of each pair of neighbours
    high_a, low_a = jnp.maximum(keys[0], keys[1]), jnp.minimum(keys[0], keys[1])
    high_b, low_b = jnp.maximum(keys[2], keys[3]), jnp.minimum(keys[2], keys[3])
    both_a = low_a >= high_b  # a tie goes to the first pair, which has the lower indices
    both_b = low_b > high_a
    pick = lambda of_a, of_b, mixed: jnp.where(both_a, of_a, jnp.where(both_b, of_b, mixed))
    low = pick(x[0], x[2], jnp.where(second, x[1], x[0]))
    high = pick(x[1], x[3], jnp.where(fourth, x[3], x[2]))
    nibble = pick(0b0100, 0b1110, jnp.where(second, 1, 0) | jnp.where(fourth, 0b1100, 0b1000))
    if mode == "soft_threshold":
        third = jnp.minimum(jnp.maximum(low_a, low_b), jnp.minimum(high_a, high_b))
        threshold = lax.bitcast_convert_type(third, jnp.float32)
        low, high = _shrink(low, threshold), _shrink(high, threshold)
    if scale is not None:
        low, high = low * scale, high * scale
    return low, high, nibble


def _rank_key(x: jax.Array, mode: str) -> jax.Array:
    """int32 keys that order float32 values; integers, so that subnormals are never flushed."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    if mode != "value":
        return jnp.minimum(bits & MAGNITUDE_BITS, _NAN_KEY)
    # The magnitude with its sign (so that both zeros are equal), less 2^31 - infinity's bits: -inf
    # becomes the least integer, a NaN below it wraps around to the top, and one clamp then gives
    # NaNs of either sign the same key, above +inf's.
    sign = bits >> 31
    signed = (bits ^ (sign & MAGNITUDE_BITS)) - sign
    return jnp.minimum(signed - 0x800000, 0x7F000001)


def _shrink(x: jax.Array, threshold: jax.Array) -> jax.Array:
    bits = lax.bitcast_convert_type(x, jnp.int32)
    magnitude = lax.bitcast_convert_type(bits & MAGNITUDE_BITS, jnp.float32)
    shrunk = lax.bitcast_convert_type(jnp.maximum(magnitude - threshold, 0.0), jnp.int32)
    return lax.bitcast_convert_type(shrunk | (bits & _SIGN_BIT), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one call."""

    m: int
    k: int
    axis: int
    mode: str
    x_dtype: str
    out_dtype: str
    scaled: bool
    k_first: bool

    @property
    def rows(self) -> int:
        """Rows of the packed matrix that a thread makes."""
        return 2 if self.axis == 1 else 4

    @property
    def x_itemsize(self) -> int:
        return 4 if self.x_dtype == "float32" else 2

    @property
    def warp_m(self) -> int:
        return 16 if self.axis == 1 else 8 * self.rows

    @property
    def block_m(self) -> int:
        return 4 * self.warp_m


def value_of(scalar) -> ir.Value:
    return scalar.registers.item()


def mul(x: ir.Value, y: int) -> ir.Value:
    return arith.muli(x, ptx.const32(y))


def add(x: ir.Value, y: ir.Value | int) -> ir.Value:
    return arith.addi(x, ptx.const32(y) if isinstance(y, int) else y)


def element(row: ir.Value, col: ir.Value, width: int) -> ir.Value:
    return add(mul(row, width), col)


def position(p: Problem, m_block: ir.Value, k_block: ir.Value):
    """The thread's first packed row and k, and its place c in a quad."""
    thread = utils.thread_idx()
    warp = arith.divui(thread, ptx.const32(32))
    lane = arith.remui(thread, ptx.const32(32))
    warp_row = add(mul(m_block, p.block_m), mul(warp, p.warp_m))
    if p.axis == 1:
        c = arith.remui(lane, ptx.const32(4))
        row = add(warp_row, arith.divui(lane, ptx.const32(4)))
    else:
        # m need not be a multiple of the block: the last warps then redo a neighbour's rows and
        # write the same words.
        warp_row = arith.minui(warp_row, ptx.const32(p.m - p.warp_m))
        c = arith.divui(lane, ptx.const32(8))
        row = add(warp_row, mul(arith.remui(lane, ptx.const32(8)), p.rows))
    return row, add(mul(k_block, 64), mul(c, 16)), c


def row_of(p: Problem, row: ir.Value, j: int) -> ir.Value:
    return add(row, 8 * j if p.axis == 1 else j)


def _load_words(address: ir.Value, num: int) -> list[ir.Value]:
    """Loads 2 or 4 consecutive 32-bit words."""
    i32 = ptx.i32_type()
    struct = llvm.StructType.get_literal([i32] * num)
    names = ", ".join(f"${i}" for i in range(num))
    text = f"ld.global.v{num}.b32 {{{names}}}, [${num}];"
    out = ptx.asm(struct, [address], text, ",".join(["=r"] * num + ["l"]))
    return [llvm.extractvalue(i32, out, [i]) for i in range(num)]


def _floats(p: Problem, word: ir.Value) -> list[ir.Value]:
    """The one or two elements of a 32-bit word, as float32."""
    f32 = ir.F32Type.get()
    if p.x_dtype == "float32":
        return [arith.bitcast(f32, word)]
    if p.x_dtype == "bfloat16":
        low = arith.shli(word, ptx.const32(16))
        high = arith.andi(word, ptx.const32(-0x10000))
        return [arith.bitcast(f32, low), arith.bitcast(f32, high)]
    halves = []
    for shift in (0, 16):
        bits = arith.trunci(ir.IntegerType.get_signless(16), arith.shrui(word, ptx.const32(shift)))
        halves.append(arith.extf(f32, arith.bitcast(ir.F16Type.get(), bits)))
    return halves


def to_array(values: list[ir.Value]):
    vec = ir.VectorType.get((1,), values[0].type)
    registers = np.array([vector.broadcast(vec, v) for v in values], dtype=object)
    return mgpu.FragmentedArray(_registers=registers, _layout=ARRAY.to_mgpu(), _is_signed=None)


def to_values(array) -> list[ir.Value]:
    return [vector.extract(r, [], [0]) for r in array.registers.flat]


def load_groups(p: Problem):
    """Elements 0..3 of the groups of each of the thread's rows: [row][element] -> 4 groups."""
    array = plgpu.ShapeDtypeStruct((ptx.WARPGROUP * GROUPS,), jnp.float32, layout=ARRAY)
    result = [[array] * 4] * p.rows

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), SCALAR, SCALAR), return_type=result)
    def load(ctx, x_g, m_block, k_block):
        del ctx
        row, k, _ = position(p, value_of(m_block), value_of(k_block))
        base = ptx.global_address(x_g)
        address = lambda offset: ptx.offset_address(base, offset, p.x_itemsize)
        elements: list[list[ir.Value]] = [[] for _ in range(p.rows)]
        per_load = 16 // p.x_itemsize
        if p.axis == 1:
            words = [
                _load_words(address(element(row_of(p, row, j), add(k, i), p.k)), 4)
                for j in range(p.rows)
                for i in range(0, 16, per_load)
            ]
            loads = 16 // per_load
            for j in range(p.rows):
                for four in words[j * loads : (j + 1) * loads]:
                    for word in four:
                        elements[j] += _floats(p, word)
        else:
            words = [
                _load_words(address(element(add(k, i), row, p.m)), p.rows * p.x_itemsize // 4)
                for i in range(16)
            ]
            for four in words:
                columns = [value for word in four for value in _floats(p, word)]
                for j in range(p.rows):
                    elements[j].append(columns[j])
        return [[to_array(elements[j][e::4]) for e in range(4)] for j in range(p.rows)]

    return load


def _store(p: Problem):
    """Writes values and metadata of the thread's rows, from (low, high, nibble) of each row."""
    rows = [[ARRAY] * 3] * p.rows
    refs = (plgpu.RefType(), plgpu.RefType())

    @plgpu.inline_mgpu(arg_types=(*refs, SCALAR, SCALAR, rows))
    def store(ctx, values_g, meta_g, m_block, k_block, packed):
        del ctx
        row, k, c = position(p, value_of(m_block), value_of(k_block))
        base = ptx.global_address(values_g)
        halves = []
        half_k = arith.shrui(k, ptx.const32(1))
        for j, (low, high, nibbles) in enumerate(packed):
            pairs = zip(to_values(low), to_values(high), strict=True)
            words = [ptx.pack_pair(a, b, _PTX_NAMES[p.out_dtype]) for a, b in pairs]
            address = ptx.offset_address(base, element(row_of(p, row, j), half_k, p.k // 2), 2)
            ptx.asm(
                None, [address, *words], "st.global.v4.b32 [$0], {$1, $2, $3, $4};", "l,r,r,r,r"
            )
            half = ptx.const32(0)
            for i, nibble in enumerate(to_values(nibbles)):
                half = arith.ori(half, arith.shli(nibble, ptx.const32(4 * i)))
            halves.append(half)
        _store_metadata(p, ptx.global_address(meta_g), row, k, c, halves)

    return store


def _store_metadata(p: Problem, base, row, k, c, halves: list[ir.Value]) -> None:
    """Joins half-words of rows q and q + 8 and writes them at their thread's place of the tile."""
    c16 = ptx.const32(16)
    low16 = ptx.const32(0xFFFF)
    high16 = ptx.const32(-0x10000)
    tile = element(arith.shrui(row, ptx.const32(6)), arith.shrui(k, ptx.const32(6)), p.k // 64)
    warp = arith.andi(arith.shrui(row, ptx.const32(4)), ptx.const32(3))
    start = add(add(mul(tile, 128), mul(warp, 32)), c)

    def put(q: ir.Value, word: ir.Value) -> None:
        address = ptx.offset_address(base, add(start, mul(q, 4)), 4)
        ptx.asm(None, [address, word], "st.global.b32 [$0], $1;", "l,r")

    if p.axis == 1:
        q = arith.andi(row, ptx.const32(7))
        put(q, arith.ori(halves[0], arith.shli(halves[1], c16)))
        return
    # Rows r .. r + rows - 1 are here, r + 8 .. in the thread `distance` lanes on. Each of the two
    # makes half of the words.
    distance = 8 // p.rows
    upper = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(row, ptx.const32(8)), ptx.const32(0))
    pairs = [arith.ori(halves[i], arith.shli(halves[i + 1], c16)) for i in range(0, p.rows, 2)]
    middle = len(pairs) // 2
    q0 = add(
        arith.andi(row, ptx.const32(7)),
        arith.select(upper, ptx.const32(p.rows // 2), ptx.const32(0)),
    )
    for i in range(middle):
        first, last = pairs[i], pairs[middle + i]
        sent = arith.select(upper, first, last)
        received = ptx.shuffle_xor(sent, distance)
        lows = arith.select(upper, received, first)
        highs = arith.select(upper, last, received)
        put(add(q0, 2 * i), arith.ori(arith.andi(lows, low16), arith.shli(highs, c16)))
        put(add(q0, 2 * i + 1), arith.ori(arith.shrui(lows, c16), arith.andi(highs, high16)))


def block_of(p: Problem) -> tuple[jax.Array, jax.Array]:
    """The part of the matrix that this block packs, in blocks along m and along k."""
    index = lax.axis_index("block")
    k_blocks, m_blocks = p.k // 64, pl.cdiv(p.m, p.block_m)
    if p.k_first:
        return lax.div(index, k_blocks), lax.rem(index, k_blocks)
    return lax.rem(index, m_blocks), lax.div(index, m_blocks)


def _kernel(p: Problem, x_g, *rest):
    scale_g, values_g, meta_g = rest if p.scaled else (None, *rest)
    scale = scale_g[0] if scale_g is not None else None
    m_block, k_block = block_of(p)
    rows = load_groups(p)(x_g, m_block, k_block)
    packed = [list(pack_group(elements, p.mode, scale)) for elements in rows]
    _store(p)(values_g, meta_g, m_block, k_block, packed)


def prepare(
    x: jax.Array, *, axis: int, mode: str, dtype: Any, scaled: bool, config: Pack24Config | None
) -> tuple[jax.Array, Problem]:
    """x padded with zeros to multiples of 64, and the problem that it poses.

    config: None takes the device's tuned entry, else the default.
    """
    padding = (-x.shape[0] % 64, -x.shape[1] % 64)
    if any(padding):
        x = jnp.pad(x, ((0, padding[0]), (0, padding[1])))
    m, k = x.shape if axis == 1 else x.shape[::-1]
    if config is None:
        key = tables.key(axis=axis, dtype=x.dtype.name)
        entry = tables.lookup("hopper", "pack24", device.kind(), key)
        config = Pack24Config(**entry) if entry else Pack24Config()
    return x, Problem(
        m=m,
        k=k,
        axis=axis,
        mode=mode,
        x_dtype=x.dtype.name,
        out_dtype=jnp.dtype(dtype).name,
        scaled=scaled,
        k_first=config.k_first,
    )


def num_blocks(p: Problem) -> int:
    return pl.cdiv(p.m, p.block_m) * (p.k // 64)


def launch(
    p: Problem,
    body: Callable[..., None],
    operands: Sequence[jax.Array],
    *further: jax.ShapeDtypeStruct,
    name: str,
) -> Sequence[jax.Array]:
    """Runs a kernel that writes values, metadata and what is `further` asked for."""
    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((p.m, p.k // 2), jnp.dtype(p.out_dtype)),
            jax.ShapeDtypeStruct((p.m // 64, p.k // 64, 128), jnp.int32),
            *further,
        ),
        grid=(num_blocks(p),),
        grid_names=("block",),
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )(*operands)


def pack24(
    x: jax.Array,
    *,
    axis: int,
    mode: str,
    scale: jax.Array | None = None,
    dtype: Any = jnp.bfloat16,
    config: Pack24Config | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Thresholds or selects two of four along `axis` and packs them, in one pass over memory.

    x: (rows, cols), float32, bfloat16 or float16. axis: 0 or 1, the contracted axis: k is
    x.shape[axis], m the other; axis 0 packs x transposed. mode: "magnitude", "value" or
    "soft_threshold". scale: None or a float32 scalar, multiplied in before rounding. dtype:
    bfloat16 or float16.

    Returns values (m, k/2) and metadata (m/64, k/64, 128) int32, m and k padded with zeros to
    multiples of 64 (padding costs another pass over x).

    Raises ValueError for arguments that are not allowed and NotImplementedError where
    `check_pack24` does.
    """
    check_pack24(x, axis=axis, mode=mode, scale=scale, dtype=dtype, config=config)
    x, p = prepare(x, axis=axis, mode=mode, dtype=dtype, scaled=scale is not None, config=config)
    operands = [x]
    if scale is not None:
        operands.append(jnp.asarray(scale, jnp.float32).reshape(1))
    values, metadata = launch(p, functools.partial(_kernel, p), operands, name="pack24_hopper")
    return values, metadata


def check_pack24(
    x: jax.Array,
    *,
    axis: int,
    mode: str,
    scale: jax.Array | None = None,
    dtype: Any = jnp.bfloat16,
    config: Pack24Config | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that are never allowed raise ValueError.
    """
    del config
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{x.shape=} must be two-dimensional and not empty")
    if axis not in (0, 1):
        raise ValueError(f"{axis=} must be 0 or 1")
    if mode not in MODES:
        raise ValueError(f"{mode=} must be one of {MODES}")
    if scale is not None and np.size(scale) != 1:
        raise ValueError(f"{np.shape(scale)=} must be a scalar")
    if x.dtype.name not in ("float32", *_PTX_NAMES):
        raise NotImplementedError(f"{x.dtype=} is not float32, bfloat16 or float16")
    if jnp.dtype(dtype).name not in _PTX_NAMES:
        raise NotImplementedError(f"dtype={jnp.dtype(dtype).name} is not bfloat16 or float16")
    if x.size >= 1 << 31:
        raise NotImplementedError(f"{x.shape=} has 2^31 elements or more")
    device.require_hopper()
