"""The pipeline of the `hopper` spmm24: barriers, TMA producer, sparse MMA consumer."""

from __future__ import annotations

import functools

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, vector

from kernels.hopper import ptx
from kernels.hopper.spmm24_config import Spmm24Config
from kernels.hopper.spmm24_problem import (
    ACC,
    SCALAR,
    Problem,
    add_const,
    as_index,
    barrier_address,
    scalar_value,
    to_lists,
)


def init_barriers(p: Problem):
    """Barriers 0 .. stages-1 say that a stage is full, stages .. 2 stages-1 that it is empty."""
    c = p.config

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(ctx, bars):
        del ctx
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), ptx.const32(0))):
            for i in range(c.stages):
                ptx.mbarrier_init(barrier_address(bars, ptx.const32(i)), 1)
                # One arrival a warp: a warp that passed its own wait says nothing about the
                # others' reads of the stage.
                empty = barrier_address(bars, ptx.const32(c.stages + i))
                ptx.mbarrier_init(empty, 4 * c.warpgroups * c.cluster_size)
            ptx.mbarrier_init_fence()
        if c.cluster is None:
            gpu.barrier()
        else:
            ptx.cluster_barrier()

    return init


def produce(p: Problem):
    """Fills one stage: waits until it is empty, then starts the TMA copies (one thread)."""
    c = p.config
    refs = (plgpu.RefType(),) * 7
    scalars = (SCALAR,) * 5

    @plgpu.inline_mgpu(arg_types=(*refs, *scalars))
    def produce(ctx, a_g, meta_g, b_g, a_s, meta_s, b_s, bars, slot, parity, m0, n0, k0):
        slot, parity, m0, n0, k0 = map(scalar_value, (slot, parity, m0, n0, k0))
        leader = arith.cmpi(arith.CmpIPredicate.eq, ptx.thread_in_warpgroup(), ptx.const32(0))
        with utils.when(leader):
            full_address = barrier_address(bars, slot)
            ptx.mbarrier_wait(barrier_address(bars, add_const(slot, c.stages)), parity)
            ptx.mbarrier_expect(full_address, p.stage_bytes)
            full = utils.BarrierRef(utils.memref_ptr(bars), slot, None, 1)
            ds = lambda start, size: utils.DynamicSlice(as_index(start), size)
            copy = functools.partial(ctx.async_copy, barrier=full, arrive=False, predicate=None)
            # Each block of a cluster loads half of what both need and sends it to both.
            share_a = {"collective": gpu.Dimension.x} if c.cluster == "n" else {}
            share_b = {"collective": gpu.Dimension.x} if c.cluster == "m" else {}
            halved = arith.shrui(k0, ptx.const32(1))
            copy(
                src_ref=a_g,
                dst_ref=a_s,
                gmem_slice=(ds(m0, c.block_m), ds(halved, c.tile_k // 2)),
                swizzle=p.a_swizzle,
                **share_a,
            )
            copy(
                src_ref=meta_g,
                dst_ref=meta_s,
                gmem_slice=(
                    ds(arith.shrui(m0, ptx.const32(6)), c.block_m // 64),
                    ds(arith.shrui(k0, ptx.const32(6)), c.tile_k // 64),
                    slice(None),
                ),
                **share_a,
            )
            for i in range(p.b_panel[0]):
                panel = utils.memref_slice(b_s, i)
                width = p.b_panel_elems
                if p.b_layout == "nk":
                    window = (ds(n0, c.block_n), ds(add_const(k0, width * i), width))
                else:
                    window = (ds(k0, c.tile_k), ds(add_const(n0, width * i), width))
                copy(src_ref=b_g, dst_ref=panel, gmem_slice=window, swizzle=128, **share_b)

    return produce


def mma_step(p: Problem, *, first: bool):
    """Consumes one stage: acc (+)= A_stage @ B_stage, then releases the previous stage."""
    c = p.config
    shape = (64 * c.wg_m, c.tile_n)
    result = (_acc_type(c), _meta_type(c))
    refs = (plgpu.RefType(),) * 4
    scalars = (SCALAR,) * 3
    k_steps = c.tile_k // p.mma_k
    # Instructions that a word of metadata, one for 64 x 64 elements and thread, serves. With two,
    # half of the threads hold the first one's words: the selector says which.
    sharers = 64 // p.mma_k

    def body(regs, old_metas, a_s, meta_s, b_s, bars, slot, parity, previous):
        slot, parity, previous = map(scalar_value, (slot, parity, previous))
        warpgroup = arith.divui(utils.thread_idx(), ptx.const32(ptx.WARPGROUP))
        warpgroup = _uniform(warpgroup)
        a_address = ptx.shared_address(a_s)
        b_address = ptx.shared_address(b_s)
        meta_row = ptx.const32(0)
        if c.split == "m":
            rows = arith.muli(warpgroup, ptx.const32(64 * c.wg_m * p.a_swizzle))
            a_address = arith.addi(a_address, rows)
            meta_row = arith.muli(warpgroup, ptx.const32(c.wg_m))
        else:
            row_bytes = 128 if p.b_layout == "nk" else c.tile_k * p.itemsize
            cols = arith.muli(warpgroup, ptx.const32(c.tile_n * row_bytes))
            b_address = arith.addi(b_address, cols)
        a_desc = ptx.smem_descriptor(
            a_address, leading_bytes=0, stride_bytes=8 * p.a_swizzle, swizzle=p.a_swizzle
        )
        b_desc = ptx.smem_descriptor(
            b_address,
            leading_bytes=0 if p.b_layout == "nk" else c.tile_k * 128,
            stride_bytes=1024,
            swizzle=128,
        )
        lane = as_index(ptx.thread_in_warpgroup())
        ptx.mbarrier_wait(barrier_address(bars, slot), parity)
        per_row = c.tile_k // 64
        metas = [
            memref.load(
                meta_s, [as_index(add_const(meta_row, i)), utils.c(j, ir.IndexType.get()), lane]
            )
            for i in range(c.wg_m)
            for j in range(per_row)
        ]
        ptx.wgmma_fence()
        new = [] if regs is None else list(regs)
        for i in range(c.wg_m):
            acc = None if regs is None else list(regs[i])
            for step in range(k_steps):
                if p.b_layout == "nk":
                    panel, rest = divmod(step, 2)
                    b_bytes = panel * c.block_n * 128 + rest * 64
                else:
                    b_bytes = step * 32 * 128
                acc = ptx.wgmma_sparse(
                    acc,
                    ptx.advance(a_desc, i * 64 * p.a_swizzle + step * 32),
                    ptx.advance(b_desc, b_bytes),
                    metas[i * per_row + step // sharers],
                    n=c.tile_n,
                    selector=step % sharers,
                    dtype=p.dtype,
                    b_dtype=p.b_dtype,
                    b_transposed=p.b_layout == "kn",
                )
            if regs is None:
                new.append(acc)
            else:
                new[i] = acc
        ptx.wgmma_commit()
        ptx.wgmma_wait(0 if c.in_flight == 0 else 1)
        # Waiting for all but the newest group frees the stage before; waiting for all, this one.
        free = slot if c.in_flight == 0 else None if first else previous
        if free is not None:
            _release(p, bars, free)
        # An MMA in flight still reads its metadata registers, which the compiler does not know.
        # Using them here, after the wait, keeps it from loading the next words into them.
        if old_metas is not None:
            ptx.keep(_to_words(old_metas))
        return _to_array(new, shape), _from_words(metas)

    if first:

        @plgpu.inline_mgpu(arg_types=(*refs, *scalars), return_type=result)
        def start(ctx, *args):
            del ctx
            return body(None, None, *args)

        return start

    @plgpu.inline_mgpu(arg_types=(ACC, _meta_layout(c), *refs, *scalars), return_type=result)
    def step(ctx, acc, metas, *args):
        del ctx
        return body(to_lists(acc), metas, *args)

    return step


def _acc_type(c: Spmm24Config):
    return plgpu.ShapeDtypeStruct((64 * c.wg_m, c.tile_n), jnp.float32, layout=ACC)


def _meta_layout(c: Spmm24Config):
    return plgpu.Layout.WG_STRIDED((ptx.WARPGROUP * c.wg_m * (c.tile_k // 64),), vec_size=1)


def _meta_type(c: Spmm24Config):
    words = ptx.WARPGROUP * c.wg_m * (c.tile_k // 64)
    return plgpu.ShapeDtypeStruct((words,), jnp.int32, layout=_meta_layout(c))


def _from_words(words: list[ir.Value]):
    """An array of one word for each thread and entry of `words`."""
    vec = ir.VectorType.get((1,), ptx.i32_type())
    registers = np.array([vector.broadcast(vec, w) for w in words], dtype=object)
    layout = mgpu.WGStridedFragLayout((ptx.WARPGROUP * len(words),), vec_size=1)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=True)


def _to_words(array) -> list[ir.Value]:
    return [vector.extract(r, [], [0]) for r in array.registers.flat]


def _release(p: Problem, bars: ir.Value, slot: ir.Value) -> None:
    """Says, once a warp, that a stage may be overwritten, to every block that writes into it."""
    c = p.config
    address = barrier_address(bars, add_const(slot, c.stages))
    if c.cluster is None:
        with utils.when(ptx.is_leader(ptx.WARP)):
            ptx.mbarrier_arrive(address)
        return
    lane = arith.remui(utils.thread_idx(), ptx.const32(ptx.WARP))
    signals = arith.cmpi(arith.CmpIPredicate.ult, lane, ptx.const32(c.cluster_size))
    with utils.when(signals):
        ptx.mbarrier_arrive_cluster(address, lane)


def _uniform(value: ir.Value) -> ir.Value:
    """Broadcasts lane 0's value, so that the compiler knows it is the same in the whole warp."""
    return ptx.asm(ptx.i32_type(), [value], "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r")


def _to_array(regs: list[list[ir.Value]], shape: tuple[int, int]):
    layout = fragmented_array.WGMMA_LAYOUT_ACC_32BIT
    registers = np.array([r for row in regs for r in row], dtype=object)
    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def finish(p: Problem):
    """Waits for the last MMA of a tile and releases its stage."""
    c = p.config
    shape = (64 * c.wg_m, c.tile_n)
    args = (ACC, _meta_layout(c), plgpu.RefType(), SCALAR)

    @plgpu.inline_mgpu(arg_types=args, return_type=_acc_type(c))
    def finish(ctx, acc, metas, bars, previous):
        del ctx
        ptx.wgmma_wait(0)
        ptx.keep(_to_words(metas))
        regs = [ptx.pin(row) for row in to_lists(acc)]
        if c.in_flight:
            _release(p, bars, scalar_value(previous))
        return _to_array(regs, shape)

    return finish


def cluster_barrier():
    @plgpu.inline_mgpu()
    def barrier(ctx):
        del ctx
        ptx.cluster_barrier()

    return barrier
