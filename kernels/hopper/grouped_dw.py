"""Weight gradients of each expert: a dense product over the expert's tokens (``wgmma``).

Both operands are read as they lie, tokens along rows, so both are transposed by the MMA. A block's
tile is 128 neurons by 256 columns; each of two warpgroups takes 64 neurons. The number of steps of
a tile is its expert's number of tokens, read from the offsets; with several shards they lie in as
many runs as there are combinations with that expert. Results are stored where the parameters have
those neurons, interleaved with other experts'.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, vector

from kernels import reference_grouped
from kernels.combinations import power, with_expert
from kernels.hopper import device, ptx
from kernels.hopper import grouped_common as common

NEURONS = 128  # of a tile
COLUMNS = 256
STEP = 64  # tokens in a stage
PANEL_BYTES = STEP * 128  # 64 tokens of 64 elements
_STAGE_BYTES = (NEURONS + COLUMNS) // 64 * PANEL_BYTES
SLOTS = 2  # staging buffers, of 64 x 32 float32, of a warpgroup
_SLOT_BYTES = 64 * 128
SHAPE = (64, COLUMNS)


def make_fill(stages: int):
    """Fills one stage with 64 tokens of Y and G, once it is empty (one thread)."""

    @plgpu.inline_mgpu(arg_types=(*(common.REF,) * 5, *(common.SCALAR,) * 5))
    def fill(ctx, y_g, g_g, y_s, g_s, bars, slot, parity, token, neuron0, column0):
        slot, parity, token, *starts = map(common.scalar, (slot, parity, token, neuron0, column0))
        with utils.when(common.is_leader()):
            full = common.begin_fill(stages, _STAGE_BYTES, bars, slot, parity)
            for source, target, start, size in zip(
                (y_g, g_g), (y_s, g_s), starts, (NEURONS, COLUMNS), strict=True
            ):
                for i in range(size // 64):
                    columns = common.window(common.add(start, 64 * i), 64)
                    ctx.async_copy(
                        src_ref=source,
                        dst_ref=utils.memref_slice(target, i),
                        gmem_slice=(common.window(token, STEP), columns),
                        swizzle=128,
                        barrier=full,
                        arrive=False,
                        predicate=None,
                    )

    return fill


def acc_type():
    return plgpu.ShapeDtypeStruct(SHAPE, jnp.float32, layout=common.ACC)


def make_step(stages: int, dtype: str):
    """Adds a stage's products, then releases the stage before, if there is one (it is >= 0)."""

    @plgpu.inline_mgpu(
        arg_types=(common.ACC, *(common.REF,) * 3, *(common.SCALAR,) * 3), return_type=acc_type()
    )
    def step(ctx, acc, y_s, g_s, bars, slot, parity, previous):
        del ctx
        slot, parity, previous = map(common.scalar, (slot, parity, previous))
        (regs,) = common.accumulators(acc)
        warpgroup = arith.divui(utils.thread_idx(), ptx.const32(ptx.WARPGROUP))
        panel = common.mul(common.uniform(warpgroup), PANEL_BYTES)
        a_desc, b_desc = (
            ptx.smem_descriptor(address, leading_bytes=PANEL_BYTES, stride_bytes=1024, swizzle=128)
            for address in (common.add(ptx.shared_address(y_s), panel), ptx.shared_address(g_s))
        )
        ptx.mbarrier_wait(common.barrier_address(bars, slot), parity)
        ptx.wgmma_fence()
        for k16 in range(STEP // 16):
            a, b = (ptx.advance(d, k16 * 16 * 128) for d in (a_desc, b_desc))
            regs = ptx.wgmma(regs, a, b, n=COLUMNS, dtype=dtype, transposed=True)
        ptx.wgmma_commit()
        ptx.wgmma_wait(1)
        with utils.when(arith.cmpi(arith.CmpIPredicate.sge, previous, ptx.const32(0))):
            common.release(stages, bars, previous)
        return common.from_accumulators([regs], SHAPE)

    return step


def make_finish(stages: int):
    """Waits for the last MMA of a tile and releases its stage, if there was one."""

    @plgpu.inline_mgpu(arg_types=(common.ACC, common.REF, common.SCALAR), return_type=acc_type())
    def finish(ctx, acc, bars, previous):
        del ctx
        previous = common.scalar(previous)
        ptx.wgmma_wait(0)
        regs = [ptx.pin(row) for row in common.accumulators(acc)]
        with utils.when(arith.cmpi(arith.CmpIPredicate.sge, previous, ptx.const32(0))):
            common.release(stages, bars, previous)
        return common.from_accumulators(regs, SHAPE)

    return finish


def staged(acc: Any, out_s: ir.Value) -> Iterator[tuple[int, ir.Value]]:
    """Stages a warpgroup's 64 rows, 32 columns at a time: each chunk's first column and its buffer,
    (16, 4, 32) float32, swizzled, from which bulk copies are started before the next."""
    (regs,) = common.accumulators(acc)
    warp, lane = common.warp_and_lane()
    row = common.add(common.mul(warp, 16), arith.shrui(lane, ptx.const32(2)))
    quad = arith.andi(lane, ptx.const32(3))
    within = common.mul(arith.andi(quad, ptx.const32(1)), 8)
    for chunk in range(COLUMNS // 32):
        slot = utils.memref_slice(out_s, chunk % SLOTS)
        base = common.add(ptx.shared_address(slot), within)
        ptx.bulk_wait_read(SLOTS - 1)
        utils.warpgroup_barrier()
        for j in range(4):
            sixteen = common.add(arith.shrui(quad, ptx.const32(1)), 2 * j)
            for half in range(2):
                first = 16 * chunk + 4 * j + 2 * half
                pair = [vector.extract(r, [], [0]) for r in regs[first : first + 2]]
                address = common.swizzled(base, common.add(row, 8 * half), sixteen)
                ptx.store_shared_f32(address, pair)
        ptx.fence_async_shared()
        utils.warpgroup_barrier()
        yield 32 * chunk, slot


@plgpu.inline_mgpu(arg_types=(common.ACC, common.REF, common.REF, *(common.SCALAR,) * 3))
def _write(ctx, acc, out_s, out_g, block0, within0, col0):
    """Stores a warpgroup's 64 rows, 32 columns at a time; columns beyond the edge are dropped.

    The rows are 16 groups of four neurons of one expert, each in a block of neurons of its own.
    """
    block0, within0, col0 = map(common.scalar, (block0, within0, col0))
    for column, slot in staged(acc, out_s):
        columns = common.window(common.add(col0, column), 32)
        ctx.async_copy(
            src_ref=slot,
            dst_ref=out_g,
            gmem_slice=(common.window(block0, 16), common.window(within0, 4), columns),
            swizzle=128,
            predicate=common.is_leader(),
            arrive=True,
        )


class Part(NamedTuple):
    """A tile: scalars."""

    expert: jax.Array
    neuron0: jax.Array
    column0: jax.Array
    token0: jax.Array
    steps: jax.Array


def _place_of(tile, rows: int, columns: int, width: int) -> tuple:
    """Expert, row and column of the tile of a number; `rows` by `columns` tiles are an expert's."""
    e, rest = (f(tile, jnp.int32(rows * columns)) for f in (lax.div, lax.rem))
    return e, *common.tile_order(rest, jnp.int32(rows), columns, width)


def part_of(tile, rows: int, columns: int, width: int, offsets_g) -> Part:
    """The tile of a number, expert by expert; `rows` by `columns` tiles are an expert's."""
    e, row, column = _place_of(tile, rows, columns, width)
    token0, end = offsets_g[e], offsets_g[e + 1]
    steps = lax.div(end - token0, jnp.int32(STEP))
    return Part(e, row * NEURONS, column * COLUMNS, token0, steps)


class _Runs(NamedTuple):
    """Where the rows lie of an expert of one shard of several: scalars, but for the offsets.

    Each run is of a combination; power: E^shard. experts: E.
    """

    expert: jax.Array
    power: jax.Array
    experts: int
    offsets_g: Any

    def bounds(self, j):
        """First row and end of the j-th run."""
        combination = with_expert(j, self.expert, self.power, self.experts)
        return self.offsets_g[combination], self.offsets_g[combination + 1]


def _steps(bounds) -> jax.Array:
    first, end = bounds
    return lax.div(end - first, jnp.int32(STEP))


class Ring(NamedTuple):
    """The stages in shared memory, and their barriers."""

    stages: int
    y_s: Any
    g_s: Any
    bars: Any

    def stage(self, slot) -> tuple:
        return self.y_s.at[slot], self.g_s.at[slot], self.bars

    def advance(self, slot, parity) -> tuple:
        return common.next_stage(self.stages, slot, parity)


def scratch(stages: int, dtype: Any) -> dict[str, Any]:
    """Allocations of a block, for `pl.run_scoped`."""
    return {
        "y_s": plgpu.SMEM((stages, NEURONS // 64, STEP, 64), dtype),
        "g_s": plgpu.SMEM((stages, COLUMNS // 64, STEP, 64), dtype),
        "out_s": plgpu.SMEM((2, SLOTS, 16, 4, 32), jnp.float32),
        "bars": plgpu.SMEM((2 * stages, 2), jnp.int32),
    }


def zeros() -> jax.Array:
    """A warpgroup's accumulators before the first step."""
    return plgpu.layout_cast(jnp.zeros(SHAPE, jnp.float32), common.ACC)


def produce(ring: Ring, fill, y_g, g_g, part: Part, state):
    """Fills the stages of a tile; the ring's slot and parity before and after."""

    def one(k, state):
        slot, parity = state
        token = part.token0 + k * STEP
        fill(y_g, g_g, *ring.stage(slot), slot, parity, token, part.neuron0, part.column0)
        return ring.advance(slot, parity)

    return lax.fori_loop(0, part.steps, one, state)


def multiply(ring: Ring, step, finish, steps, acc, state):
    """Adds up the dense products of a tile's stages, and the ring's slot and parity behind them."""

    def one(_, carry):
        acc, slot, parity, previous = carry
        acc = step(acc, *ring.stage(slot), slot, parity, previous)
        return acc, *ring.advance(slot, parity), slot

    carry = (acc, *state, jnp.int32(-1))
    acc, slot, parity, previous = lax.fori_loop(0, steps, one, carry)
    return finish(acc, ring.bars, previous), (slot, parity)


def run_tiles(wg, own, produce: Callable, consume: Callable) -> None:
    """A block's own tiles: their number to `produce` for the loading warpgroup and to `consume` for
    the others, with the ring's slot and parity, which both return as they are behind the tile."""

    @pl.when(wg == 2)
    def _producer():
        plgpu.set_max_registers(40, action="decrease")
        lax.fori_loop(0, own, produce, (jnp.int32(0), jnp.int32(1)))

    @pl.when(wg < 2)
    def _consumer():
        plgpu.set_max_registers(common.REGISTERS, action="increase")
        lax.fori_loop(0, own, consume, (jnp.int32(0), jnp.int32(0)))
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def store(acc, out_s, out_g, part: Part, wg) -> None:
    """Stores a warpgroup's part of a tile, by way of its staging buffers."""
    block0 = lax.div(part.neuron0 + wg * 64, jnp.int32(4))
    _write(acc, out_s, out_g, block0, part.expert * 4, part.column0)


def weight_gradient(
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    *,
    num_experts: int,
    shards: int = 1,
    config: common.GroupedConfig | None = None,
) -> jax.Array:
    """`kernels.reference_grouped.weight_gradient`, without `shared_every`.

    `offsets` must be multiples of 128, as V is. Raises ValueError for shapes that do not fit and
    NotImplementedError where `check_weight_gradient` does.
    """
    check_weight_gradient(y, g, offsets, num_experts=num_experts, shards=shards, config=config)
    config = config or common.GroupedConfig()
    live, width = reference_grouped.gradient_dims(y, g, offsets, num_experts, shards=shards)
    dtype = common.ptx_name(y.dtype)
    stages = stages_of(config)
    of_shard = live // shards
    rows, columns = of_shard // NEURONS, pl.cdiv(width, COLUMNS)
    tiles = shards * num_experts * rows * columns
    runs = num_experts ** (shards - 1)
    blocks = min(device.num_cores(), tiles)

    def body(y_g, g_g, offsets_g, out_g):
        @functools.partial(pl.run_scoped, **scratch(stages, y.dtype), collective_axes="wg")
        def _scope(y_s, g_s, out_s, bars):
            wg = lax.axis_index("wg")
            own = common.own_tiles(jnp.int32(tiles), blocks)
            ring = Ring(stages, y_s, g_s, bars)
            common.init_barriers(stages, 2)(bars)
            fill, step, finish = make_fill(stages), make_step(stages, dtype), make_finish(stages)

            def part(i):
                tile = lax.axis_index("block") + i * blocks
                if shards == 1:
                    return part_of(tile, rows, columns, config.width, offsets_g)
                number, row, column = _place_of(tile, rows, columns, config.width)
                shard, expert = (f(number, jnp.int32(num_experts)) for f in (lax.div, lax.rem))
                neuron0, zero = shard * of_shard + row * NEURONS, jnp.int32(0)
                own = runs_of(shard, expert)
                count = lambda j, steps: steps + _steps(own.bounds(j))
                steps = lax.fori_loop(0, runs, count, zero)
                return Part(expert, neuron0, column * COLUMNS, zero, steps)

            def runs_of(shard, expert):
                return _Runs(expert, power(shard, num_experts, shards), num_experts, offsets_g)

            def produce_part(part, state):
                if shards == 1:
                    return produce(ring, fill, y_g, g_g, part, state)
                own = runs_of(lax.div(part.neuron0, jnp.int32(of_shard)), part.expert)

                def run(j, state):
                    bounds = own.bounds(j)
                    run = part._replace(token0=bounds[0], steps=_steps(bounds))
                    return produce(ring, fill, y_g, g_g, run, state)

                return lax.fori_loop(0, runs, run, state)

            def produced(i, state):
                return produce_part(part(i), state)

            def consumed(i, state):
                place = part(i)
                acc, state = multiply(ring, step, finish, place.steps, zeros(), state)
                store(acc, out_s.at[wg], out_g, place, wg)
                return state

            run_tiles(wg, own, produced, consumed)

    # (blocks of neurons, a block's neurons, D): one copy stores four neurons of many blocks.
    out_type = jax.ShapeDtypeStruct((live // 4, 4 * num_experts, width), jnp.float32)
    call = common.kernel(body, out_type, blocks, 2, "weight_gradient_hopper")
    return call(y, g, offsets).reshape(num_experts * live, width)


def stages_of(config: common.GroupedConfig) -> int:
    return common.fitting_stages(_STAGE_BYTES, 2 * SLOTS * _SLOT_BYTES, config)


def check_weight_gradient(
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    *,
    num_experts: int,
    shards: int = 1,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    live, width = reference_grouped.gradient_dims(y, g, offsets, num_experts, shards=shards)
    common.check_shapes(common.TOKENS, live // shards, width, y.dtype)
    common.check_shards(num_experts, shards)
    stages_of(config or common.GroupedConfig())
