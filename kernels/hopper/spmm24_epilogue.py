"""The epilogue of the `hopper` spmm24: scale, function, rounding, and stores by TMA."""

from __future__ import annotations

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from kernels.hopper import ptx
from kernels.hopper.spmm24_problem import (
    ACC,
    DTYPES,
    SCALAR,
    Problem,
    add_const,
    as_index,
    scalar_value,
    to_lists,
)

# An array of one element for each thread.
_ONE_EACH = plgpu.Layout.WG_STRIDED((ptx.WARPGROUP,), vec_size=1)


def write_tile(p: Problem):
    """Applies scale and epilogue, and stores the warpgroup's part, 64 x 64 elements at a time.

    Arguments: accumulators, output buffers, output, first row and column, the scale of the whole
    product, and the scales of rows and of columns that the problem has (global memory), with what
    `touch_scales` read of them.
    """
    c = p.config
    num_vectors = p.m_scaled + p.n_scaled
    vectors = [*(plgpu.RefType(),) * num_vectors, *(_ONE_EACH,) * (num_vectors > 0)]
    args = (ACC, plgpu.RefType(), plgpu.RefType(), *(SCALAR,) * 3, *vectors)

    @plgpu.inline_mgpu(arg_types=args)
    def write(ctx, acc, out_s, out_g, m0, n0, scale, *vectors):
        m0, n0, scale = map(scalar_value, (m0, n0, scale))
        regs = to_lists(acc)
        thread = ptx.thread_in_warpgroup()
        warp = arith.divui(thread, ptx.const32(32))
        lane = arith.remui(thread, ptx.const32(32))
        leader = arith.cmpi(arith.CmpIPredicate.eq, thread, ptx.const32(0))
        per_slot = c.epi_n // 64
        if num_vectors:
            ptx.use(vector.extract(vectors[-1].registers.item(), [], [0]))
        m_scales, n_scales = _vector_scales(p, m0, n0, warp, lane, list(vectors[:num_vectors]))
        count = 0
        for i in range(c.wg_m):
            of_m = m_scales(i)
            for first in range(0, c.tile_n // 64, per_slot):
                slot = utils.memref_slice(out_s, count % c.out_slots)
                count += 1
                ptx.bulk_wait_read(c.out_slots - 1)
                utils.warpgroup_barrier()
                panels = [
                    utils.memref_slice(slot, utils.ds(j * p.out_panels, p.out_panels))
                    for j in range(per_slot)
                ]
                for j, panel in enumerate(panels):
                    col = 32 * (first + j)
                    of_n = n_scales(first + j)
                    chunk = [
                        _epilogue(p, r, scale, of_m[e // 2 % 2], of_n[e // 4 * 2 + e % 2])
                        for e, r in enumerate(regs[i][col : col + 32])
                    ]
                    _store_chunk(p, chunk, ptx.shared_address(panel), warp, lane)
                ptx.fence_async_shared()
                utils.warpgroup_barrier()
                for j, panel in enumerate(panels):
                    col = add_const(n0, 64 * (first + j))
                    commit = j == per_slot - 1
                    _copy_out(p, ctx, panel, out_g, add_const(m0, 64 * i), col, leader, commit)

    return write


def touch_scales(p: Problem):
    """Reads one scale of every cache line that `write_tile` will want, a tile's time before.

    Returns the thread's value, which `write_tile` takes: a load whose result is not used is no load
    to the compiler.
    """
    vectors = (plgpu.RefType(),) * (p.m_scaled + p.n_scaled)
    result = plgpu.ShapeDtypeStruct((ptx.WARPGROUP,), jnp.float32, layout=_ONE_EACH)

    @plgpu.inline_mgpu(arg_types=(*vectors, SCALAR, SCALAR), return_type=result)
    def touch(ctx, *args):
        del ctx
        *vectors, m0, n0 = args
        lane = arith.remui(utils.thread_idx(), ptx.const32(ptx.WARP))
        # A warpgroup's part has at most 256 rows and columns: eight lines of 32 scales of each.
        line = arith.muli(arith.andi(lane, ptx.const32(7)), ptx.const32(32))
        places = []
        if p.m_scaled:
            places.append((arith.addi(scalar_value(m0), line), p.m))
        if p.n_scaled:
            places.append((arith.addi(scalar_value(n0), line), p.n))
        addresses = [
            ptx.offset_address(ptx.global_address(v), arith.minui(index, ptx.const32(size - 1)), 4)
            for v, (index, size) in zip(vectors, places, strict=True)
        ]
        address = addresses[0]
        if len(addresses) == 2:
            rows = arith.cmpi(
                arith.CmpIPredicate.eq, arith.andi(lane, ptx.const32(8)), ptx.const32(0)
            )
            address = arith.select(rows, *addresses)
        value = ptx.load_global_f32(address, 1)[0]
        vec = ir.VectorType.get((1,), ir.F32Type.get())
        registers = np.array([vector.broadcast(vec, value)], dtype=object)
        return mgpu.FragmentedArray(
            _registers=registers, _layout=_ONE_EACH.to_mgpu(), _is_signed=None
        )

    return touch


def _vector_scales(p: Problem, m0, n0, warp, lane, vectors: list[ir.Value]):
    """Functions that load the scales of a thread's accumulators, None where there are none.

    The first one takes a block of 64 rows and returns the scales of its two rows of the thread, the
    second one takes a chunk of 64 columns and returns those of its 16 columns.
    """
    m_scales, n_scales = (lambda i: [None] * 2), (lambda chunk: [None] * 16)
    if p.m_scaled:
        m_base = ptx.global_address(vectors.pop(0))
        row = arith.addi(arith.muli(warp, ptx.const32(16)), arith.shrui(lane, ptx.const32(2)))
        row = arith.addi(m0, row)

        def m_scales(i: int) -> list[ir.Value]:
            rows = [add_const(row, 64 * i + 8 * half) for half in range(2)]
            return [s for at in rows for s in _load_scales(m_base, at, p.m, 1)]

    if p.n_scaled:
        n_base = ptx.global_address(vectors.pop(0))
        pair = arith.muli(arith.andi(lane, ptx.const32(3)), ptx.const32(2))
        column = arith.addi(n0, pair)

        def n_scales(chunk: int) -> list[ir.Value]:
            columns = [add_const(column, 64 * chunk + 8 * j) for j in range(8)]
            return [s for at in columns for s in _load_scales(n_base, at, p.n, 2)]

    return m_scales, n_scales


def _load_scales(base: ir.Value, index: ir.Value, size: int, num: int) -> list[ir.Value]:
    """One or two neighbouring elements of a float32 vector; beyond its end, its last ones."""
    index = arith.minui(index, ptx.const32(size - num))
    return ptx.load_global_f32(ptx.offset_address(base, index, 4), num)


def _epilogue(p: Problem, register: ir.Value, scale: ir.Value, of_m, of_n) -> ir.Value:
    value = vector.extract(register, [], [0])
    if p.scaled:
        value = arith.mulf(value, scale)
    for factor in (of_m, of_n):
        if factor is not None:
            value = arith.mulf(value, factor)
    if p.relu2:
        zero = arith.constant(ir.F32Type.get(), ir.FloatAttr.get(ir.F32Type.get(), 0.0))
        value = arith.maximumf(value, zero)
        value = arith.mulf(value, value)
    return value


def _swizzled(base: ir.Value, row: ir.Value, chunk: ir.Value) -> ir.Value:
    """Address of the 16-byte chunk of a row of 128 bytes in TMA's 128-byte swizzle."""
    mixed = arith.xori(chunk, arith.andi(row, ptx.const32(7)))
    offset = arith.addi(arith.muli(row, ptx.const32(128)), arith.muli(mixed, ptx.const32(16)))
    return arith.addi(base, offset)


def _store_chunk(p: Problem, values, base, warp, lane) -> None:
    if p.out_itemsize == 4:
        _store_32bit(p, values, base, warp, lane)
        return
    name = DTYPES[jnp.dtype(p.out_dtype).name]
    pairs = zip(values[::2], values[1::2], strict=True)
    words = [ptx.pack_pair(low, high, name) for low, high in pairs]
    _store_16bit(p, words, base, warp, lane)


def _store_16bit(p: Problem, words, base, warp, lane) -> None:
    """Stores a 64 x 64 chunk; word 2j+h of a thread holds columns 8j.. of rows 8h + lane/4."""
    in_matrix = arith.remui(lane, ptx.const32(8))
    matrix = arith.divui(lane, ptx.const32(8))
    half = arith.andi(matrix, ptx.const32(1))
    pair = arith.shrui(matrix, ptx.const32(1))
    rows16 = arith.addi(arith.muli(warp, ptx.const32(2)), half)  # in eights of m
    for j in range(0, 8, 2):
        col8 = arith.addi(pair, ptx.const32(j))  # in eights of n
        if p.out_layout == "mn":
            row = arith.addi(arith.muli(rows16, ptx.const32(8)), in_matrix)
            address = _swizzled(base, row, col8)
        else:
            row = arith.addi(arith.muli(col8, ptx.const32(8)), in_matrix)
            address = _swizzled(base, row, rows16)
        quad = [words[2 * j], words[2 * j + 1], words[2 * j + 2], words[2 * j + 3]]
        ptx.stmatrix_x4(address, quad, transpose=p.out_layout == "nm")


def _store_32bit(p: Problem, values, base, warp, lane) -> None:
    """Stores a 64 x 64 float32 chunk as two panels of 32 columns (128 bytes)."""
    quad_row = arith.divui(lane, ptx.const32(4))
    quad_col = arith.muli(arith.remui(lane, ptx.const32(4)), ptx.const32(2))

    def address(row, col):
        panel = arith.muli(arith.divui(col, ptx.const32(32)), ptx.const32(64 * 128))
        within = arith.remui(col, ptx.const32(32))
        chunk = arith.divui(within, ptx.const32(4))
        byte = arith.muli(arith.remui(within, ptx.const32(4)), ptx.const32(4))
        return arith.addi(arith.addi(_swizzled(base, row, chunk), byte), panel)

    for j in range(8):
        for half in range(2):
            m = arith.addi(add_const(quad_row, 8 * half), arith.muli(warp, ptx.const32(16)))
            n = add_const(quad_col, 8 * j)
            pair = values[4 * j + 2 * half : 4 * j + 2 * half + 2]
            if p.out_layout == "mn":
                ptx.store_shared_f32(address(m, n), pair)
            else:
                ptx.store_shared_f32(address(n, m), pair[:1])
                ptx.store_shared_f32(address(add_const(n, 1), m), pair[1:])


def _copy_out(p: Problem, ctx, slot, out_g, m0, n0, leader, commit: bool) -> None:
    """Starts the bulk stores of one chunk; parts beyond the output's edges are dropped by TMA."""
    width = p.out_swizzle_elems
    row, col = (m0, n0) if p.out_layout == "mn" else (n0, m0)
    for i in range(p.out_panels):
        ctx.async_copy(
            src_ref=utils.memref_slice(slot, i),
            dst_ref=out_g,
            gmem_slice=(
                utils.DynamicSlice(as_index(row), 64),
                utils.DynamicSlice(as_index(add_const(col, i * width)), width),
            ),
            swizzle=128,
            predicate=leader,
            arrive=commit and i == p.out_panels - 1,
        )
