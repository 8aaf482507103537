"""2:4-sparse times dense products on Hopper's sparse tensor cores (``wgmma.sp``).

One persistent, warp-specialised kernel: a producer warpgroup keeps a ring of shared-memory stages
filled by TMA, across output tiles, and the compute warpgroups issue sparse warpgroup MMAs, keep
one group of them in flight, and write their part of the tile through shared memory, transposed
there if asked.

What bounds it is shared-memory bandwidth, not arithmetic: an m64 nN k32 sparse MMA takes N/2
cycles and reads 64 N + 2048 bytes, that is, B alone needs every one of the 128 bytes a cycle, and
the TMA writes come on top. Larger CTA tiles need fewer writes for the same work, which is why the
best tiles fill the register file with accumulators.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, memref, vector

from kernels.hopper import device, ptx
from kernels.tuning import tables

Layout = Literal["nk", "kn"]
OutLayout = Literal["mn", "nm"]

_DTYPES = {"bfloat16": "bf16", "float16": "f16"}
_ACC = plgpu.Layout._WGMMA_ACC_32BIT
_SCALAR = plgpu.Layout.WG_SPLAT(())
# What a block may use of an SM's shared memory, less the barriers, which Mosaic GPU pads to 1 KiB,
# and less another KiB because its kernels also hold a little static shared memory.
_SMEM_BYTES = 227 * 1024 - 2048
_REGISTERS = {1: 240, 2: 232, 3: 160}  # a thread, by compute warpgroups


@dataclasses.dataclass(frozen=True)
class Spmm24Config:
    """Tiling and schedule of the `hopper` spmm24.

    warpgroups: compute warpgroups in a block.
    split: the output dimension, "m" or "n", along which they share a block's tile.
    wg_m: rows of 64 in one warpgroup's part.
    tile_n: columns of one warpgroup's part, a multiple of 64 up to 256.
    tile_k: contracted elements a pipeline stage holds, 64 or 128.
    stages: pipeline stages.
    in_flight: MMA groups left running when a stage's predecessor is released, 0 or 1.
    out_slots: output buffers, of 64 rows by epi_n columns, of each warpgroup.
    epi_n: columns of an output buffer, a multiple of 64 that divides tile_n.
    order: output dimension that varies fastest in the tile order, "m" or "n".
    width: tiles of that dimension visited before the other one advances (L2 locality).
    cluster: None, or the output dimension along which two neighbouring blocks form a cluster and
        share, by TMA multicast, the operand that does not depend on that dimension.
    """

    warpgroups: int = 2
    split: str = "m"
    wg_m: int = 1
    tile_n: int = 256
    tile_k: int = 64
    stages: int = 4
    in_flight: int = 1
    out_slots: int = 2
    epi_n: int = 64
    order: str = "m"
    width: int = 8
    cluster: str | None = None

    @property
    def block_m(self) -> int:
        return 64 * self.wg_m * (self.warpgroups if self.split == "m" else 1)

    @property
    def block_n(self) -> int:
        return self.tile_n * (self.warpgroups if self.split == "n" else 1)

    def smem_bytes(self, out_itemsize: int) -> int:
        """Shared memory of the stages and the output buffers."""
        stage = self.block_m * self.tile_k + self.block_n * self.tile_k * 2
        stage += (self.block_m // 64) * (self.tile_k // 64) * 512
        slots = self.warpgroups * self.out_slots
        return self.stages * stage + slots * 64 * self.epi_n * out_itemsize

    @property
    def cluster_size(self) -> int:
        return 1 if self.cluster is None else 2

    @property
    def cluster_m(self) -> int:
        return self.block_m * (2 if self.cluster == "m" else 1)

    @property
    def cluster_n(self) -> int:
        return self.block_n * (2 if self.cluster == "n" else 1)

    def problem(self, out_itemsize: int) -> str | None:
        """Why this configuration cannot run, or None."""
        if self.warpgroups not in _REGISTERS or self.split not in ("m", "n"):
            return f"{self.warpgroups=} {self.split=}"
        if self.tile_n % 64 or not 64 <= self.tile_n <= 256 or self.tile_k not in (64, 128):
            return f"{self.tile_n=} {self.tile_k=}"
        if self.block_m > 256 or self.block_n > 256:
            return f"{self.block_m=} {self.block_n=} exceed a TMA box of 256"
        if self.wg_m * self.tile_n // 2 + 40 > _REGISTERS[self.warpgroups]:
            return f"{self.wg_m=} {self.tile_n=} need more registers than a thread has"
        if self.in_flight not in (0, 1) or self.stages < 2 or self.out_slots < 1:
            return f"{self.in_flight=} {self.stages=} {self.out_slots=}"
        if self.epi_n % 64 or self.epi_n < 64 or self.tile_n % self.epi_n:
            return f"{self.epi_n=} is no multiple of 64 that divides {self.tile_n=}"
        if self.cluster not in (None, "m", "n"):
            return f"{self.cluster=}"
        if self.order not in ("m", "n") or self.width < 1:
            return f"{self.order=} {self.width=}"
        if self.smem_bytes(out_itemsize) > _SMEM_BYTES:
            return f"{self.smem_bytes(out_itemsize)=} exceeds {_SMEM_BYTES}"
        return None


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Static facts of one call, shared by the builders below."""

    m: int
    n: int
    k: int
    dtype: str
    b_layout: str
    out_layout: str
    out_dtype: Any
    relu2: bool
    scaled: bool
    blocks: int
    config: Spmm24Config

    @property
    def out_itemsize(self) -> int:
        return jnp.dtype(self.out_dtype).itemsize

    @property
    def out_panels(self) -> int:
        return self.out_itemsize // 2

    @property
    def out_swizzle_elems(self) -> int:
        return 128 // self.out_itemsize

    @property
    def a_swizzle(self) -> int:
        return self.config.tile_k  # bytes: tile_k/2 stored elements of two bytes

    @property
    def b_panel(self) -> tuple[int, int, int]:
        """Shape of B's stage: panels of 64 (128-byte, swizzled) columns."""
        c = self.config
        if self.b_layout == "nk":
            return (c.tile_k // 64, c.block_n, 64)
        return (c.block_n // 64, c.tile_k, 64)

    @property
    def stage_bytes(self) -> int:
        c = self.config
        return (
            c.block_m * c.tile_k
            + c.block_n * c.tile_k * 2
            + (c.block_m // 64) * (c.tile_k // 64) * 512
        )


def _index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)


def _value(scalar) -> ir.Value:
    """The MLIR value behind a scalar passed to an inline function."""
    return scalar.registers.item()


def _barrier_address(bars: ir.Value, index: ir.Value) -> ir.Value:
    return arith.addi(ptx.shared_address(bars), arith.muli(index, ptx.const32(8)))


def _offset(index: ir.Value, base: int) -> ir.Value:
    return arith.addi(index, ptx.const32(base))


def _init_barriers(p: _Problem):
    """Barriers 0 .. stages-1 say that a stage is full, stages .. 2 stages-1 that it is empty."""
    c = p.config

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def init(ctx, bars):
        del ctx
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), ptx.const32(0))):
            for i in range(c.stages):
                ptx.mbarrier_init(_barrier_address(bars, ptx.const32(i)), 1)
                # One arrival a warp: a warp that passed its own wait says nothing about the
                # others' reads of the stage.
                empty = _barrier_address(bars, ptx.const32(c.stages + i))
                ptx.mbarrier_init(empty, 4 * c.warpgroups * c.cluster_size)
            ptx.mbarrier_init_fence()
        if c.cluster is None:
            gpu.barrier()
        else:
            ptx.cluster_barrier()

    return init


def _produce(p: _Problem):
    """Fills one stage: waits until it is empty, then starts the TMA copies (one thread)."""
    c = p.config
    refs = (plgpu.RefType(),) * 7
    scalars = (_SCALAR,) * 5

    @plgpu.inline_mgpu(arg_types=(*refs, *scalars))
    def produce(ctx, a_g, meta_g, b_g, a_s, meta_s, b_s, bars, slot, parity, m0, n0, k0):
        slot, parity, m0, n0, k0 = map(_value, (slot, parity, m0, n0, k0))
        leader = arith.cmpi(arith.CmpIPredicate.eq, ptx.thread_in_warpgroup(), ptx.const32(0))
        with utils.when(leader):
            full_address = _barrier_address(bars, slot)
            ptx.mbarrier_wait(_barrier_address(bars, _offset(slot, c.stages)), parity)
            ptx.mbarrier_expect(full_address, p.stage_bytes)
            full = utils.BarrierRef(utils.memref_ptr(bars), slot, None, 1)
            ds = lambda start, size: utils.DynamicSlice(_index(start), size)
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
                if p.b_layout == "nk":
                    window = (ds(n0, c.block_n), ds(_offset(k0, 64 * i), 64))
                else:
                    window = (ds(k0, c.tile_k), ds(_offset(n0, 64 * i), 64))
                copy(src_ref=b_g, dst_ref=panel, gmem_slice=window, swizzle=128, **share_b)

    return produce


def _mma_step(p: _Problem, *, first: bool):
    """Consumes one stage: acc (+)= A_stage @ B_stage, then releases the previous stage."""
    c = p.config
    shape = (64 * c.wg_m, c.tile_n)
    result = (_acc_type(c), _meta_type(c))
    refs = (plgpu.RefType(),) * 4
    scalars = (_SCALAR,) * 3
    k_steps = c.tile_k // 32

    def body(regs, old_metas, a_s, meta_s, b_s, bars, slot, parity, previous):
        slot, parity, previous = map(_value, (slot, parity, previous))
        warpgroup = arith.divui(utils.thread_idx(), ptx.const32(ptx.WARPGROUP))
        warpgroup = _uniform(warpgroup)
        a_address = ptx.shared_address(a_s)
        b_address = ptx.shared_address(b_s)
        meta_row = ptx.const32(0)
        if c.split == "m":
            rows = arith.muli(warpgroup, ptx.const32(64 * c.wg_m * c.tile_k))
            a_address = arith.addi(a_address, rows)
            meta_row = arith.muli(warpgroup, ptx.const32(c.wg_m))
        else:
            row_bytes = 128 if p.b_layout == "nk" else c.tile_k * 2
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
        lane = _index(ptx.thread_in_warpgroup())
        ptx.mbarrier_wait(_barrier_address(bars, slot), parity)
        per_row = c.tile_k // 64
        metas = [
            memref.load(
                meta_s, [_index(_offset(meta_row, i)), utils.c(j, ir.IndexType.get()), lane]
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
                    metas[i * per_row + step // 2],
                    n=c.tile_n,
                    selector=step % 2,
                    dtype=p.dtype,
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

    @plgpu.inline_mgpu(arg_types=(_ACC, _meta_layout(c), *refs, *scalars), return_type=result)
    def step(ctx, acc, metas, *args):
        del ctx
        return body(_to_lists(acc), metas, *args)

    return step


def _acc_type(c: Spmm24Config):
    return plgpu.ShapeDtypeStruct((64 * c.wg_m, c.tile_n), jnp.float32, layout=_ACC)


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


def _release(p: _Problem, bars: ir.Value, slot: ir.Value) -> None:
    """Says, once a warp, that a stage may be overwritten, to every block that writes into it."""
    c = p.config
    address = _barrier_address(bars, _offset(slot, c.stages))
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


def _to_lists(acc) -> list[list[ir.Value]]:
    """The thread's accumulators as wgmma numbers them, a list for each 64 rows."""
    return [list(acc.registers[i : i + 1].flat) for i in range(acc.registers.shape[0])]


def _to_array(regs: list[list[ir.Value]], shape: tuple[int, int]):
    layout = fragmented_array.WGMMA_LAYOUT_ACC_32BIT
    registers = np.array([r for row in regs for r in row], dtype=object)
    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def _finish(p: _Problem):
    """Waits for the last MMA of a tile and releases its stage."""
    c = p.config
    shape = (64 * c.wg_m, c.tile_n)
    args = (_ACC, _meta_layout(c), plgpu.RefType(), _SCALAR)

    @plgpu.inline_mgpu(arg_types=args, return_type=_acc_type(c))
    def finish(ctx, acc, metas, bars, previous):
        del ctx
        ptx.wgmma_wait(0)
        ptx.keep(_to_words(metas))
        regs = [ptx.pin(row) for row in _to_lists(acc)]
        if c.in_flight:
            _release(p, bars, _value(previous))
        return _to_array(regs, shape)

    return finish


def _write_tile(p: _Problem):
    """Applies scale and epilogue, and stores the warpgroup's part, 64 x 64 elements at a time."""
    c = p.config
    args = (_ACC, plgpu.RefType(), plgpu.RefType(), *(_SCALAR,) * 3)

    @plgpu.inline_mgpu(arg_types=args)
    def write(ctx, acc, out_s, out_g, m0, n0, scale):
        m0, n0, scale = map(_value, (m0, n0, scale))
        regs = _to_lists(acc)
        thread = ptx.thread_in_warpgroup()
        warp = arith.divui(thread, ptx.const32(32))
        lane = arith.remui(thread, ptx.const32(32))
        leader = arith.cmpi(arith.CmpIPredicate.eq, thread, ptx.const32(0))
        per_slot = c.epi_n // 64
        count = 0
        for i in range(c.wg_m):
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
                    chunk = [_epilogue(p, r, scale) for r in regs[i][col : col + 32]]
                    _store_chunk(p, chunk, ptx.shared_address(panel), warp, lane)
                ptx.fence_async_shared()
                utils.warpgroup_barrier()
                for j, panel in enumerate(panels):
                    col = _offset(n0, 64 * (first + j))
                    commit = j == per_slot - 1
                    _copy_out(p, ctx, panel, out_g, _offset(m0, 64 * i), col, leader, commit)

    return write


def _epilogue(p: _Problem, register: ir.Value, scale: ir.Value) -> ir.Value:
    value = vector.extract(register, [], [0])
    if p.scaled:
        value = arith.mulf(value, scale)
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


def _store_chunk(p: _Problem, values, base, warp, lane) -> None:
    if p.out_itemsize == 4:
        _store_32bit(p, values, base, warp, lane)
        return
    name = _DTYPES[jnp.dtype(p.out_dtype).name]
    pairs = zip(values[::2], values[1::2], strict=True)
    words = [ptx.pack_pair(low, high, name) for low, high in pairs]
    _store_16bit(p, words, base, warp, lane)


def _store_16bit(p: _Problem, words, base, warp, lane) -> None:
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


def _store_32bit(p: _Problem, values, base, warp, lane) -> None:
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
            m = arith.addi(_offset(quad_row, 8 * half), arith.muli(warp, ptx.const32(16)))
            n = _offset(quad_col, 8 * j)
            pair = values[4 * j + 2 * half : 4 * j + 2 * half + 2]
            if p.out_layout == "mn":
                ptx.store_shared_f32(address(m, n), pair)
            else:
                ptx.store_shared_f32(address(n, m), pair[:1])
                ptx.store_shared_f32(address(_offset(n, 1), m), pair[1:])


def _copy_out(p: _Problem, ctx, slot, out_g, m0, n0, leader, commit: bool) -> None:
    """Starts the bulk stores of one chunk; parts beyond the output's edges are dropped by TMA."""
    width = p.out_swizzle_elems
    row, col = (m0, n0) if p.out_layout == "mn" else (n0, m0)
    for i in range(p.out_panels):
        ctx.async_copy(
            src_ref=utils.memref_slice(slot, i),
            dst_ref=out_g,
            gmem_slice=(
                utils.DynamicSlice(_index(row), 64),
                utils.DynamicSlice(_index(_offset(col, i * width)), width),
            ),
            swizzle=128,
            predicate=leader,
            arrive=commit and i == p.out_panels - 1,
        )


def _kernel(p: _Problem, a_g, meta_g, b_g, *rest):
    c = p.config
    scale_g, out_g = rest if p.scaled else (None, rest[0])
    m_tiles, n_tiles = pl.cdiv(p.m, c.cluster_m), pl.cdiv(p.n, c.cluster_n)
    k_steps = pl.cdiv(p.k, c.tile_k)
    produce = _produce(p)
    first_step, next_step = _mma_step(p, first=True), _mma_step(p, first=False)
    finish, write_tile = _finish(p), _write_tile(p)
    dtype = {"bf16": jnp.bfloat16, "f16": jnp.float16}[p.dtype]

    @functools.partial(
        pl.run_scoped,
        a_s=plgpu.SMEM((c.stages, c.block_m, c.tile_k // 2), dtype),
        b_s=plgpu.SMEM((c.stages, *p.b_panel), dtype),
        out_s=plgpu.SMEM(
            (
                c.warpgroups,
                c.out_slots,
                c.epi_n // 64 * p.out_panels,
                64,
                p.out_swizzle_elems,
            ),
            p.out_dtype,
        ),
        meta_s=plgpu.SMEM((c.stages, c.block_m // 64, c.tile_k // 64, 128), jnp.int32),
        bars=plgpu.SMEM((2 * c.stages, 2), jnp.int32),
        collective_axes="wg",
    )
    def _scope(a_s, b_s, out_s, meta_s, bars):
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        tiles = m_tiles * n_tiles
        my_tiles = lax.div(tiles - block + (p.blocks - 1), p.blocks)
        _init_barriers(p)(bars)

        def tile_origin(t):
            mi, ni = plgpu.planar_snake(
                block + t * p.blocks, (m_tiles, n_tiles), 0 if c.order == "m" else 1, c.width
            )
            m0, n0 = mi * c.cluster_m, ni * c.cluster_n
            if c.cluster == "m":
                m0 = m0 + lax.axis_index("cluster") * c.block_m
            elif c.cluster == "n":
                n0 = n0 + lax.axis_index("cluster") * c.block_n
            return m0, n0

        def advance(slot, parity):
            wrap = slot == c.stages - 1
            return jnp.where(wrap, 0, slot + 1), jnp.where(wrap, parity ^ 1, parity)

        @pl.when(wg == c.warpgroups)
        def _producer():
            plgpu.set_max_registers(40 if c.warpgroups < 3 else 32, action="decrease")

            def tile(t, state):
                m0, n0 = tile_origin(t)

                def step(i, state):
                    slot, parity = state
                    at = lambda ref: ref.at[slot]
                    produce(
                        a_g,
                        meta_g,
                        b_g,
                        at(a_s),
                        at(meta_s),
                        at(b_s),
                        bars,
                        slot,
                        parity,
                        m0,
                        n0,
                        i * c.tile_k,
                    )
                    return advance(slot, parity)

                return lax.fori_loop(0, k_steps, step, state)

            # The first lap's stages have never been full: waiting for the phase before passes.
            lax.fori_loop(0, my_tiles, tile, (jnp.int32(0), jnp.int32(1)))

        @pl.when(wg < c.warpgroups)
        def _consumer():
            plgpu.set_max_registers(_REGISTERS[c.warpgroups], action="increase")
            scale = scale_g[0] if scale_g is not None else jnp.float32(1)

            def tile(t, state):
                slot, parity = state
                at = lambda slot: (a_s.at[slot], meta_s.at[slot], b_s.at[slot], bars)
                acc, metas = first_step(*at(slot), slot, parity, slot)
                carry = (acc, metas, *advance(slot, parity), slot)

                def step(carry):
                    acc, metas, slot, parity, previous = carry
                    acc, metas = next_step(acc, metas, *at(slot), slot, parity, previous)
                    return (acc, metas, *advance(slot, parity), slot)

                # Two steps an iteration, so that the metadata of consecutive steps sit in
                # different registers without moves between them.
                pairs, odd = divmod(k_steps - 1, 2)
                carry = lax.fori_loop(0, pairs, lambda _, carry: step(step(carry)), carry)
                if odd:
                    carry = step(carry)
                acc, metas, slot, parity, previous = carry
                acc = finish(acc, metas, bars, previous)
                m0, n0 = tile_origin(t)
                if c.split == "m":
                    m0 = m0 + wg * (64 * c.wg_m)
                else:
                    n0 = n0 + wg * c.tile_n
                write_tile(acc, out_s.at[wg], out_g, m0, n0, scale)
                return slot, parity

            lax.fori_loop(0, my_tiles, tile, (jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if c.cluster is not None:
            # The other block's data and arrivals may still be on their way to this one's memory.
            _cluster_barrier()()


def _cluster_barrier():
    @plgpu.inline_mgpu()
    def barrier(ctx):
        del ctx
        ptx.cluster_barrier()

    return barrier


def spmm24(
    values: jax.Array,
    metadata: jax.Array,
    b: jax.Array,
    *,
    b_layout: Layout,
    out_layout: OutLayout = "mn",
    scale: jax.Array | None = None,
    epilogue: str | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Spmm24Config | None = None,
) -> jax.Array:
    """A @ B for A (m, k) packed 2:4 along k, accumulated in float32 on sparse tensor cores.

    values (m, k/2) bfloat16 or float16 and metadata (m/64, k/64, 128) int32 as `pack24` writes
    them; b (n, k) for `b_layout` "nk", (k, n) for "kn", of the same dtype as values. Returns
    epilogue(scale * A @ B) rounded to `out_dtype`, as (m, n) or, for `out_layout` "nm", as (n, m).
    scale: None or a float32 scalar. epilogue: None or "relu2", max(x, 0)^2. config: None takes the
    device's tuned entry for this shape, else a heuristic.

    Raises ValueError for inconsistent arguments and NotImplementedError where `check_spmm24` does.
    """
    check_spmm24(
        values,
        metadata,
        b,
        b_layout=b_layout,
        out_layout=out_layout,
        scale=scale,
        epilogue=epilogue,
        out_dtype=out_dtype,
        config=config,
    )
    m, k = values.shape[0], 2 * values.shape[1]
    n = b.shape[0] if b_layout == "nk" else b.shape[1]
    if config is None:
        config = choose_config(m, n, k, b_layout, out_layout, out_dtype)
    tiles = pl.cdiv(m, config.cluster_m) * pl.cdiv(n, config.cluster_n)
    p = _Problem(
        m=m,
        n=n,
        k=k,
        dtype=_DTYPES[values.dtype.name],
        b_layout=b_layout,
        out_layout=out_layout,
        out_dtype=jnp.dtype(out_dtype),
        relu2=epilogue == "relu2",
        scaled=scale is not None,
        blocks=min(device.num_cores() // config.cluster_size, tiles),
        config=config,
    )
    call = plgpu.kernel(
        functools.partial(_kernel, p),
        out_type=jax.ShapeDtypeStruct((m, n) if out_layout == "mn" else (n, m), out_dtype),
        grid=(p.blocks,),
        grid_names=("block",),
        cluster=(2,) if config.cluster else (),
        cluster_names=("cluster",) if config.cluster else (),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name="spmm24_hopper",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    operands = [values, metadata, b]
    if scale is not None:
        operands.append(jnp.asarray(scale, jnp.float32).reshape(1))
    return call(*operands)


def check_spmm24(
    values: jax.Array,
    metadata: jax.Array,
    b: jax.Array,
    *,
    b_layout: Layout,
    out_layout: OutLayout = "mn",
    scale: jax.Array | None = None,
    epilogue: str | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Spmm24Config | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    if b_layout not in ("nk", "kn"):
        raise ValueError(f"{b_layout=} must be 'nk' or 'kn'")
    if out_layout not in ("mn", "nm"):
        raise ValueError(f"{out_layout=} must be 'mn' or 'nm'")
    if epilogue not in (None, "relu2"):
        raise ValueError(f"{epilogue=} must be None or 'relu2'")
    if values.ndim != 2 or b.ndim != 2:
        raise ValueError(f"{values.shape=} and {b.shape=} must be matrices")
    m, k = values.shape[0], 2 * values.shape[1]
    n, b_k = b.shape if b_layout == "nk" else b.shape[::-1]
    if b_k != k:
        raise ValueError(f"{b.shape=} with {b_layout=} does not contract with {values.shape=}")
    if values.dtype != b.dtype:
        raise ValueError(f"{values.dtype=} differs from {b.dtype=}")
    if scale is not None and np.size(scale) != 1:
        raise ValueError(f"{np.shape(scale)=} must be a scalar")
    if values.dtype.name not in _DTYPES:
        raise NotImplementedError(f"{values.dtype=} is not bfloat16 or float16")
    if jnp.dtype(out_dtype).name not in (*_DTYPES, "float32"):
        raise NotImplementedError(f"{out_dtype=} is not bfloat16, float16 or float32")
    if m % 64 or k % 64 or n % 8 or not min(m, n, k):
        raise NotImplementedError(f"{m=} and {k=} must be multiples of 64, {n=} of 8")
    if metadata.shape != (m // 64, k // 64, 128) or metadata.dtype != jnp.int32:
        raise ValueError(f"{metadata.shape=} {metadata.dtype=} do not describe {values.shape=}")
    device.require_hopper()
    if config is not None:
        problem = config.problem(jnp.dtype(out_dtype).itemsize)
        if problem is not None:
            raise NotImplementedError(f"{config}: {problem}")


def choose_config(
    m: int, n: int, k: int, b_layout: str, out_layout: str, out_dtype: Any
) -> Spmm24Config:
    """The tuned configuration of this device and shape, or the one for a similar shape."""
    itemsize = jnp.dtype(out_dtype).itemsize
    key = tables.key(m=m, n=n, k=k, b=b_layout, out=out_layout)
    entry = tables.lookup("hopper", "spmm24", device.kind(), key)
    if entry is not None:
        config = Spmm24Config(**entry)
        if config.problem(itemsize) is None:
            return config
    return heuristic(m, n, k, itemsize)


def heuristic(m: int, n: int, k: int, out_itemsize: int) -> Spmm24Config:
    """A configuration for a shape that was not tuned: the largest tile that fills the device."""
    del k
    cores = device.num_cores()
    candidates = (
        Spmm24Config(wg_m=2, tile_n=128, width=8),
        Spmm24Config(wg_m=1, tile_n=128, stages=5, width=8),
        Spmm24Config(wg_m=1, tile_n=64, stages=6, width=8),
    )
    for config in candidates:
        if pl.cdiv(m, config.block_m) * pl.cdiv(n, config.block_n) >= cores:
            break
    if config.problem(out_itemsize) is not None:
        config = dataclasses.replace(config, stages=config.stages - 1, out_slots=1)
    return config
