"""What the grouped kernels share: a ring of shared-memory stages and the sparse main loop over it.

A block is persistent and warp-specialised: one producer warpgroup keeps a ring of stages filled by
TMA, across tiles, and the compute warpgroups, which share a tile's rows of A, multiply, with one
group of MMAs in flight, and write their part. Tiles are numbered so that those of unused token
blocks come last and are never visited; a block of tokens belongs to one expert, which the producer
looks up.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, memref, vector

from kernels.hopper import device, ptx
from kernels.hopper.spmm24_problem import FP8_DTYPES

TILE_K = 64  # contracted elements of 16 bits in a stage; twice as many of 8 bits
TOKENS = 128  # rows of a token tile
PART = 128  # an expert's neurons come in multiples
ACC = plgpu.Layout._WGMMA_ACC_32BIT
SCALAR = plgpu.Layout.WG_SPLAT(())
REF = plgpu.RefType()
# Dynamic shared memory of a Hopper SM that one block may use, less room for barriers and padding.
SMEM_BYTES = 227 * 1024 - 2048
REGISTERS = 232  # a compute thread; a producer thread keeps 40


@dataclasses.dataclass(frozen=True)
class GroupedConfig:
    """Schedule of a grouped kernel.

    stages: pipeline stages; None for as many as fit.
    width: tiles along the weights' dimension visited before the next block of tokens (L2 locality).
    """

    stages: int | None = None
    width: int = 8


@dataclasses.dataclass(frozen=True)
class SparseTile:
    """A block's tile: A (block_m, k), packed 2:4, times B, and its ring of stages.

    dense: A is not packed, but of 16 bits as B is; metadata is then neither loaded nor looked at,
    and stages are half as deep, so that as many fit.

    b_layout: "nk" or "kn", the order of B in memory. wg_m: rows of 64 in a warpgroup's part.
    tile_n: columns, the same for every warpgroup. spare: barriers of one arrival behind the ring's.
    b_dtype: B's type where it may be another one than A's; of 8 bits both, and B is "nk".
    """

    warpgroups: int
    wg_m: int
    tile_n: int
    b_layout: str
    stages: int
    dtype: str
    spare: int = 0
    b_dtype: str | None = None
    dense: bool = False

    @property
    def itemsize(self) -> int:
        """Bytes of an element of A or B."""
        return jnp.dtype(self.dtype).itemsize

    @property
    def b_row(self) -> int:
        """Bytes of a row of B in a stage, "nk", or of 64 columns, and of their swizzle."""
        return 64 if self.dense else 128

    @property
    def tile_k(self) -> int:
        """Contracted elements in a stage: a row of B, 64 bytes of A."""
        return self.b_row // self.itemsize

    @property
    def mma_k(self) -> int:
        """Contracted elements of one instruction: 64 bytes of B, or 32 if A is dense, 32 of A."""
        return (32 if self.dense else 64) // self.itemsize

    @property
    def in_flight(self) -> int:
        """Groups of MMAs left running at the end of a step: for 8 bits none (`Spmm24Config`)."""
        return 0 if self.itemsize == 1 else 1

    @property
    def k_tiles(self) -> int:
        """Words of metadata that a stage has for a thread and 64 rows."""
        return 0 if self.dense else self.tile_k // 64

    @property
    def words(self) -> int:
        """Words that stand for a stage's metadata in a thread; one, of nothing, if A is dense."""
        return max(self.wg_m * self.k_tiles, 1)

    @property
    def block_m(self) -> int:
        return 64 * self.wg_m * self.warpgroups

    @property
    def b_panels(self) -> tuple[int, int, int]:
        """Shape of B in a stage: panels of rows of `b_row` bytes in memory, swizzled."""
        if self.b_layout == "nk":
            return (1, self.tile_n, self.tile_k)
        return (self.tile_n // 64, TILE_K, 64)

    @property
    def stage_bytes(self) -> int:
        metadata = self.block_m // 64 * self.k_tiles * 512
        return self.block_m * TILE_K + self.tile_n * self.b_row + metadata

    def scratch(self) -> dict[str, Any]:
        """Allocations of the ring, for `pl.run_scoped`."""
        dtype, b_dtype = jnp.dtype(self.dtype), jnp.dtype(self.b_dtype or self.dtype)
        ring = {
            "a_s": plgpu.SMEM((self.stages, self.block_m, TILE_K // self.itemsize), dtype),
            "b_s": plgpu.SMEM((self.stages, *self.b_panels), b_dtype),
        }
        if not self.dense:
            metadata = (self.stages, self.block_m // 64, self.k_tiles, 128)
            ring["meta_s"] = plgpu.SMEM(metadata, jnp.int32)
        return ring | {"bars": plgpu.SMEM((2 * self.stages + self.spare, 2), jnp.int32)}


def fitting_stages(stage_bytes: int, other_bytes: int, config: GroupedConfig) -> int:
    """Stages asked for, or as many as fit beside `other_bytes` of shared memory, at most 8."""
    most = min((SMEM_BYTES - other_bytes) // stage_bytes, 8)
    stages = most if config.stages is None else config.stages
    if not 2 <= stages <= most or config.width < 1:
        raise NotImplementedError(f"{config}: between 2 and {most} stages fit, width is positive")
    return stages


def with_stages(t: SparseTile, other_bytes: int, config: GroupedConfig) -> SparseTile:
    """The tile with its number of stages, beside `other_bytes` of shared memory."""
    stages = fitting_stages(t.stage_bytes, other_bytes, config)
    return dataclasses.replace(t, stages=stages)


def check_shapes(v: int, live: int, width: int, dtype: Any) -> None:
    """Raises NotImplementedError for what no grouped kernel serves."""
    if v % TOKENS or live % PART or width % TILE_K:
        raise NotImplementedError(
            f"{v=} and {live=} must be multiples of {TOKENS}, {width=} of {TILE_K}"
        )
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        raise NotImplementedError(f"dtype={jnp.dtype(dtype).name} is not bfloat16 or float16")
    device.require_hopper()


def check_shapes_fp8(v: int, live: int, width: int) -> None:
    """`check_shapes` for operands of 8 bits, which are rounded from bfloat16."""
    check_shapes(v, live, width, jnp.bfloat16)
    if width % (2 * TILE_K):
        raise NotImplementedError(f"{width=} must be a multiple of {2 * TILE_K} in 8 bits")


def ptx_name(dtype: Any) -> str:
    return {"bfloat16": "bf16", "float16": "f16", **FP8_DTYPES}[jnp.dtype(dtype).name]


def index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)


def scalar(array) -> ir.Value:
    """The MLIR value behind a scalar passed to an inline function."""
    return array.registers.item()


def add(x: ir.Value, y: ir.Value | int) -> ir.Value:
    return arith.addi(x, ptx.const32(y) if isinstance(y, int) else y)


def mul(x: ir.Value, y: int) -> ir.Value:
    return arith.muli(x, ptx.const32(y))


def window(start: ir.Value, size: int) -> utils.DynamicSlice:
    return utils.DynamicSlice(index(start), size)


def barrier_address(bars: ir.Value, number: ir.Value) -> ir.Value:
    return add(ptx.shared_address(bars), mul(number, 8))


def barrier_ref(bars: ir.Value, number: ir.Value) -> utils.BarrierRef:
    return utils.BarrierRef(utils.memref_ptr(bars), number, None, 1)


def uniform(value: ir.Value) -> ir.Value:
    """Broadcasts lane 0's value, so that the compiler knows it is the same in the whole warp."""
    return ptx.asm(ptx.i32_type(), [value], "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r")


def is_leader() -> ir.Value:
    """True on the first thread of every warpgroup."""
    return ptx.is_leader(ptx.WARPGROUP)


def warp_and_lane() -> tuple[ir.Value, ir.Value]:
    """The thread's warp in its warpgroup, and its lane."""
    thread = ptx.thread_in_warpgroup()
    return arith.divui(thread, ptx.const32(32)), arith.remui(thread, ptx.const32(32))


def swizzled(base: ir.Value, row: ir.Value, chunk: ir.Value) -> ir.Value:
    """Address of the 16-byte chunk of a row of 128 bytes in TMA's 128-byte swizzle."""
    mixed = arith.xori(chunk, arith.andi(row, ptx.const32(7)))
    return add(base, add(mul(row, 128), mul(mixed, 16)))


def accumulators(acc) -> list[list[ir.Value]]:
    """The thread's accumulators as wgmma numbers them, a list for each 64 rows."""
    return [list(acc.registers[i : i + 1].flat) for i in range(acc.registers.shape[0])]


def from_accumulators(regs: list[list[ir.Value]], shape: tuple[int, int]):
    layout = fragmented_array.WGMMA_LAYOUT_ACC_32BIT
    registers = np.array([r for row in regs for r in row], dtype=object)
    registers = registers.reshape(layout.registers_shape(shape))
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=None)


def strided(count: int):
    """Layout of an array that is `count` scalars of each thread."""
    return plgpu.Layout.WG_STRIDED((ptx.WARPGROUP * count,), vec_size=1)


def strided_type(count: int, dtype: Any):
    return plgpu.ShapeDtypeStruct((ptx.WARPGROUP * count,), dtype, layout=strided(count))


def to_array(values: list[ir.Value], *, signed: bool | None):
    """An array of the thread's scalars; signed: None for floating point."""
    vec = ir.VectorType.get((1,), values[0].type)
    registers = np.array([vector.broadcast(vec, v) for v in values], dtype=object)
    layout = mgpu.WGStridedFragLayout((ptx.WARPGROUP * len(values),), vec_size=1)
    return mgpu.FragmentedArray(_registers=registers, _layout=layout, _is_signed=signed)


def to_scalars(array) -> list[ir.Value]:
    return [vector.extract(r, [], [0]) for r in array.registers.flat]


def init_barriers(stages: int, warpgroups: int, spare: int = 0):
    """Barriers 0 .. stages-1: a stage is full; stages .. 2 stages-1: empty; then spare ones."""

    @plgpu.inline_mgpu(arg_types=(REF,))
    def init(ctx, bars):
        del ctx
        with utils.when(arith.cmpi(arith.CmpIPredicate.eq, utils.thread_idx(), ptx.const32(0))):
            for i in range(2 * stages + spare):
                # One arrival a warp on the empty ones: a warp that passed its own wait says nothing
                # about the others' reads of the stage.
                arrivals = 4 * warpgroups if stages <= i < 2 * stages else 1
                ptx.mbarrier_init(barrier_address(bars, ptx.const32(i)), arrivals)
            ptx.mbarrier_init_fence()
        gpu.barrier()

    return init


def next_stage(stages: int, slot, parity):
    wrap = slot == stages - 1
    return jnp.where(wrap, 0, slot + 1), jnp.where(wrap, parity ^ 1, parity)


def release(stages: int, bars: ir.Value, slot: ir.Value) -> None:
    """Says, once a warp, that a stage may be overwritten."""
    with utils.when(ptx.is_leader(ptx.WARP)):
        ptx.mbarrier_arrive(barrier_address(bars, add(slot, stages)))


def begin_fill(stages: int, stage_bytes: int, bars, slot, parity) -> utils.BarrierRef:
    """Waits until a stage is empty and announces its bytes; returns the barrier for its copies."""
    ptx.mbarrier_wait(barrier_address(bars, add(slot, stages)), parity)
    ptx.mbarrier_expect(barrier_address(bars, slot), stage_bytes)
    return barrier_ref(bars, slot)


def tile_order(tile, major_tiles, minor_tiles: int, width: int):
    """(major, minor) of a tile: bands of `width` minor tiles, majors up and down in turn."""
    while minor_tiles % width:
        width -= 1
    band, rest = lax.div(tile, major_tiles * width), lax.rem(tile, major_tiles * width)
    major = lax.div(rest, width)
    major = jnp.where(band & 1 == 1, major_tiles - 1 - major, major)
    return major, band * width + lax.rem(rest, width)


def check_shards(experts: int, shards: int) -> None:
    """Raises NotImplementedError for shards that no grouped kernel serves."""
    if shards > 1 and experts**shards > 64:
        raise NotImplementedError(f"{experts=} of {shards=} make more than 64 combinations")


def used_tiles(offsets_g):
    """Token tiles that belong to an expert."""
    return lax.div(offsets_g[offsets_g.shape[0] - 1], jnp.int32(TOKENS))


def own_tiles(tiles, blocks: int):
    """How many of the tiles block, block + blocks, .. there are for this block."""
    return lax.div(tiles - lax.axis_index("block") + (blocks - 1), jnp.int32(blocks))


def _fill(t: SparseTile):
    """Fills one stage: waits until it is empty, then starts the TMA copies (one thread)."""

    @plgpu.inline_mgpu(arg_types=(*(REF,) * 7, *(SCALAR,) * 6))
    def fill(ctx, a_g, meta_g, b_g, a_s, meta_s, b_s, bars, slot, parity, m0, n0, k0, b_k0):
        slot, parity, m0, n0, k0, b_k0 = map(scalar, (slot, parity, m0, n0, k0, b_k0))
        with utils.when(is_leader()):
            full = begin_fill(t.stages, t.stage_bytes, bars, slot, parity)
            copy = functools.partial(ctx.async_copy, barrier=full, arrive=False, predicate=None)
            a_k0 = k0 if t.dense else arith.shrui(k0, ptx.const32(1))
            copy(
                src_ref=a_g,
                dst_ref=a_s,
                gmem_slice=(window(m0, t.block_m), window(a_k0, TILE_K // t.itemsize)),
                swizzle=TILE_K,
            )
            if not t.dense:
                m_tile, k_tile = (arith.shrui(v, ptx.const32(6)) for v in (m0, k0))
                copy(
                    src_ref=meta_g,
                    dst_ref=meta_s,
                    gmem_slice=(
                        window(m_tile, t.block_m // 64),
                        window(k_tile, t.k_tiles),
                        slice(None),
                    ),
                )
            for i in range(t.b_panels[0]):
                panel = utils.memref_slice(b_s, i)
                if t.b_layout == "nk":
                    place = (window(n0, t.tile_n), window(k0, t.tile_k))
                else:
                    place = (window(add(k0, b_k0), TILE_K), window(add(n0, 64 * i), 64))
                copy(src_ref=b_g, dst_ref=panel, gmem_slice=place, swizzle=t.b_row)

    return fill


def _acc_type(t: SparseTile):
    return plgpu.ShapeDtypeStruct((64 * t.wg_m, t.tile_n), jnp.float32, layout=ACC)


def _step(t: SparseTile, *, first: bool):
    """Multiplies one stage, acc (+)= A_stage @ B_stage, and releases what is read no longer."""
    shape = (64 * t.wg_m, t.tile_n)
    refs, scalars = (REF,) * 4, (SCALAR,) * 3
    result = (_acc_type(t), strided_type(t.words, jnp.int32))
    # Instructions that a word of metadata, one for 64 x 64 elements and thread, serves. With two,
    # half of the threads hold the first one's words: the selector says which.
    sharers = 64 // t.mma_k

    def multiply(acc, a, b, metas, i, step):
        if t.dense:
            return ptx.wgmma(acc, a, b, n=t.tile_n, dtype=ptx_name(t.dtype), transposed=False)
        return ptx.wgmma_sparse(
            acc,
            a,
            b,
            metas[i * t.k_tiles + step // sharers],
            n=t.tile_n,
            selector=step % sharers,
            dtype=ptx_name(t.dtype),
            b_dtype=None if t.b_dtype is None else ptx_name(t.b_dtype),
            b_transposed=t.b_layout == "kn",
        )

    def body(regs, old_metas, a_s, meta_s, b_s, bars, slot, parity, previous):
        slot, parity, previous = map(scalar, (slot, parity, previous))
        warpgroup = uniform(arith.divui(utils.thread_idx(), ptx.const32(ptx.WARPGROUP)))
        a_address = add(ptx.shared_address(a_s), mul(warpgroup, 64 * t.wg_m * TILE_K))
        a_desc = ptx.smem_descriptor(
            a_address, leading_bytes=0, stride_bytes=8 * TILE_K, swizzle=TILE_K
        )
        b_desc = ptx.smem_descriptor(
            ptx.shared_address(b_s),
            leading_bytes=0 if t.b_layout == "nk" else TILE_K * 128,
            stride_bytes=8 * t.b_row,
            swizzle=t.b_row,
        )
        meta_row = mul(warpgroup, t.wg_m)
        lane = index(ptx.thread_in_warpgroup())
        ptx.mbarrier_wait(barrier_address(bars, slot), parity)
        metas = [
            memref.load(meta_s, [index(add(meta_row, i)), utils.c(j, ir.IndexType.get()), lane])
            for i in range(t.wg_m)
            for j in range(t.k_tiles)
        ]
        if t.dense:
            metas = [ptx.const32(0)]
        ptx.wgmma_fence()
        new: list[list[ir.Value]] = []
        for i in range(t.wg_m):
            acc = None if regs is None else list(regs[i])
            for step in range(t.tile_k // t.mma_k):
                b_step = t.mma_k * t.itemsize if t.b_layout == "nk" else 32 * 128
                a = ptx.advance(a_desc, i * 64 * TILE_K + step * 32)
                acc = multiply(acc, a, ptx.advance(b_desc, step * b_step), metas, i, step)
            assert acc is not None
            new.append(acc)
        ptx.wgmma_commit()
        ptx.wgmma_wait(t.in_flight)
        if t.in_flight == 0:
            release(t.stages, bars, slot)
            ptx.keep(metas)
        elif not first:
            release(t.stages, bars, previous)
            # An MMA in flight still reads its metadata registers, which the compiler does not know.
            # Using them after the wait keeps it from loading the next words into them.
            ptx.keep(to_scalars(old_metas))
        return from_accumulators(new, shape), to_array(metas, signed=True)

    if first:

        @plgpu.inline_mgpu(arg_types=(*refs, *scalars), return_type=result)
        def start(ctx, *args):
            del ctx
            return body(None, None, *args)

        return start

    arg_types = (ACC, strided(t.words), *refs, *scalars)

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=result)
    def step(ctx, acc, metas, *args):
        del ctx
        return body(accumulators(acc), metas, *args)

    return step


def _finish(t: SparseTile):
    """Waits for the last MMA of a tile and releases its stage."""
    arg_types = (ACC, strided(t.words), REF, SCALAR)

    @plgpu.inline_mgpu(arg_types=arg_types, return_type=_acc_type(t))
    def finish(ctx, acc, metas, bars, previous):
        del ctx
        ptx.wgmma_wait(0)
        ptx.keep(to_scalars(metas))
        regs = [ptx.pin(row) for row in accumulators(acc)]
        if t.in_flight:
            release(t.stages, bars, scalar(previous))
        return from_accumulators(regs, (64 * t.wg_m, t.tile_n))

    return finish


@dataclasses.dataclass(frozen=True)
class Loop:
    """The main loop of a block over its tiles: operands, ring, and how many steps a tile takes."""

    tile: SparseTile
    k_steps: int
    operands: tuple
    ring: dict[str, Any]

    def _stage(self, slot) -> tuple:
        metadata = "a_s" if self.tile.dense else "meta_s"  # which nothing reads
        return tuple(self.ring[name].at[slot] for name in ("a_s", metadata, "b_s"))

    def produce(self, tiles, origin: Callable) -> None:
        """Runs the producer; `origin(i)` is (m0, n0, B's offset in k) of the block's i-th tile.

        The offset may be a function of k, of the first element of a step.
        """
        fill, stages, bars = _fill(self.tile), self.tile.stages, self.ring["bars"]

        def tile(i, state):
            m0, n0, b_k0 = origin(i)

            def step(k, state):
                slot, parity = state
                stage = self._stage(slot)
                k0 = k * self.tile.tile_k
                offset = b_k0(k0) if callable(b_k0) else b_k0
                fill(*self.operands, *stage, bars, slot, parity, m0, n0, k0, offset)
                return next_stage(stages, slot, parity)

            return lax.fori_loop(0, self.k_steps, step, state)

        # The first lap's stages have never been full: waiting for the phase before passes.
        lax.fori_loop(0, tiles, tile, (jnp.int32(0), jnp.int32(1)))

    def consume(
        self, tiles, place: Callable, write: Callable, prefetch: Callable | None = None
    ) -> None:
        """Runs a compute warpgroup: `write(i, acc, *place(i))` for the block's i-th tile.

        `place(i)` is evaluated ahead of the steps, so that its latency is hidden;
        `prefetch(*place(i))` is called a few steps into the tile, while there are steps.
        """
        stages, bars = self.tile.stages, self.ring["bars"]
        first_step, next_step = _step(self.tile, first=True), _step(self.tile, first=False)
        finish = _finish(self.tile)

        def tile(i, state):
            slot, parity = state
            where = place(i)
            acc, metas = first_step(*self._stage(slot), bars, slot, parity, slot)
            carry = (acc, metas, *next_stage(stages, slot, parity), slot)

            def step(carry):
                acc, metas, slot, parity, previous = carry
                acc, metas = next_step(acc, metas, *self._stage(slot), bars, slot, parity, previous)
                return (acc, metas, *next_stage(stages, slot, parity), slot)

            # Two steps an iteration, so that the metadata of consecutive steps sit in different
            # registers without moves between them.
            pairs, odd = divmod(self.k_steps - 1, 2)
            if prefetch is not None and pairs == 0:
                prefetch(*where)

            def two_steps(j, carry):
                if prefetch is not None:
                    pl.when(j == min(2, pairs - 1))(lambda: prefetch(*where))
                return step(step(carry))

            carry = lax.fori_loop(0, pairs, two_steps, carry)
            if odd:
                carry = step(carry)
            acc, metas, slot, parity, previous = carry
            write(i, finish(acc, metas, bars, previous), *where)
            return slot, parity

        lax.fori_loop(0, tiles, tile, (jnp.int32(0), jnp.int32(0)))

    def run(
        self,
        wg: Any,
        tiles: Callable[[], Any],
        origin: Callable,
        place: Callable,
        write: Callable,
        *,
        prefetch: Callable | None = None,
        fill: Callable[[], None] | None = None,
    ) -> None:
        """Divides the block: its last warpgroup loads operands, the others multiply and write.

        Args as for `produce` and `consume`, but for tiles, which both kinds compute for themselves.
        wg: number of the warpgroup. fill: what those that multiply do after their last tile.
        """

        @pl.when(wg == self.tile.warpgroups)
        def _producer():
            plgpu.set_max_registers(40, action="decrease")
            self.produce(tiles(), origin)

        @pl.when(wg < self.tile.warpgroups)
        def _consumer():
            plgpu.set_max_registers(REGISTERS, action="increase")
            self.consume(tiles(), place, write, prefetch)
            if fill is not None:
                fill()
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def fill_rows(ref, first_row, rows: int, row_bytes: int, word: int, threads: int, thread0) -> None:
    """Sets rows first_row .. rows of a matrix in global memory to a 32-bit word.

    Called by `threads` threads in all, of which this warpgroup's first one is number `thread0`.
    """

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR))
    def store(ctx, ref, unit):
        del ctx
        base = llvm.ptrtoint(ptx.i64_type(), utils.memref_ptr(ref))
        unit = add(scalar(unit), ptx.thread_in_warpgroup())
        with utils.when(arith.cmpi(arith.CmpIPredicate.ult, unit, ptx.const32(units))):
            wide = arith.muli(arith.extui(ptx.i64_type(), unit), ptx.const64(16))
            asm = "st.global.v4.b32 [$0], {$1, $1, $1, $1};"
            ptx.asm(None, [arith.addi(base, wide), ptx.const32(word)], asm, "l,r")

    row_units = row_bytes // 16
    units = rows * row_units
    start = first_row * row_units + thread0
    trips = lax.div(jnp.int32(units) - start + (threads - 1), jnp.int32(threads))
    lax.fori_loop(0, jnp.maximum(trips, 0), lambda i, _: (store(ref, start + i * threads), 0)[1], 0)


def fill_unused(outs: list[tuple[Any, int, int]], used, blocks: int, warpgroups: int) -> None:
    """Fills what belongs to token rows from `used` on; for every compute warpgroup to call.

    outs: arrays in global memory, each with the 32-bit word to fill it with and the token rows that
    an entry of its leading axis stands for.
    """
    threads = blocks * warpgroups * ptx.WARPGROUP
    warpgroup = lax.axis_index("block") * warpgroups + lax.axis_index("wg")
    for ref, word, tokens in outs:
        row_bytes = math.prod(ref.shape[1:]) * jnp.dtype(ref.dtype).itemsize
        first = lax.div(used, jnp.int32(tokens))
        fill_rows(ref, first, ref.shape[0], row_bytes, word, threads, warpgroup * ptx.WARPGROUP)


def kernel(body: Callable, out_type: Any, blocks: int, warpgroups: int, name: str):
    """A persistent kernel of so many blocks, each of compute warpgroups and a producer."""
    return plgpu.kernel(
        body,
        out_type=out_type,
        grid=(blocks,),
        grid_names=("block",),
        num_threads=warpgroups + 1,
        thread_name="wg",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
