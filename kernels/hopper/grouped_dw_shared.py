"""Weight gradients where all experts have some neurons: those once, over all tokens (``wgmma``).

`kernels.hopper.grouped_dw` with tiles of two kinds. A tile of an expert's own neurons takes as many
steps as the expert has tokens, a tile of shared ones as there are tokens. The long tiles come
first, so that the short ones even out what blocks have done. Both are stored where the parameters
have those neurons: `kernels.shared_rows` orders an expert's so that a tile's lie a fixed distance
apart.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir.dialects import arith

from kernels.combinations import power, with_expert
from kernels.hopper import device, ptx
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_dw as dw
from kernels.shared_rows import GROUP, SharedRows, of_live

_GROUPS = 64 // GROUP  # of the neurons of a warpgroup's part of a tile


def serves_shared(sizes: SharedRows) -> bool:
    """Whether tiles of these sizes are stored by one copy, and none has neurons of both kinds."""
    aligned = sizes.superblocks % _GROUPS == 0 and _GROUPS % sizes.experts == 0
    return aligned and sizes.routed % dw.NEURONS == 0 and sizes.shared % dw.NEURONS == 0


class _Tile(NamedTuple):
    """A tile's scalars. shared: 1 or 0. Neurons and groups are those of its shard's experts."""

    shared: jax.Array
    shard: jax.Array
    expert: jax.Array
    neuron0: jax.Array
    column0: jax.Array


class _Tiles(NamedTuple):
    """All tiles: first the shared neurons' of each shard, then those of its experts."""

    sizes: SharedRows
    shards: int
    columns: int
    width: int

    @property
    def shared_rows(self) -> int:
        return self.sizes.shared // dw.NEURONS

    @property
    def routed_rows(self) -> int:
        return self.sizes.routed // dw.NEURONS

    @property
    def shared(self) -> int:
        return self.shards * self.shared_rows * self.columns

    @property
    def number(self) -> int:
        return self.shared + self.shards * self.sizes.experts * self.routed_rows * self.columns

    def tile(self, number) -> _Tile:
        """The tile of a number."""
        shared = number < self.shared
        within = jnp.where(shared, number, number - self.shared)
        rows = jnp.where(shared, jnp.int32(self.shared_rows), jnp.int32(self.routed_rows))
        of_matrix = rows * self.columns
        matrix, rest = lax.div(within, of_matrix), lax.rem(within, of_matrix)
        row, column = common.tile_order(rest, rows, self.columns, self.width)
        experts = jnp.int32(self.sizes.experts)
        shard = jnp.where(shared, matrix, lax.div(matrix, experts))
        expert = jnp.where(shared, 0, lax.rem(matrix, experts))
        neuron0 = row * dw.NEURONS + jnp.where(shared, jnp.int32(self.sizes.routed), 0)
        return _Tile(shared.astype(jnp.int32), shard, expert, neuron0, column * dw.COLUMNS)

    def place(self, tile: _Tile, wg) -> tuple:
        """Superblock, row in it and column at which a warpgroup's part of a tile is stored."""
        s = self.sizes
        group = lax.div(tile.neuron0 + wg * 64, jnp.int32(GROUP))
        own_block, own_place = (
            lax.rem(group, jnp.int32(s.superblocks)),
            lax.div(group, jnp.int32(s.superblocks)),
        )
        common_block = lax.div(group - s.routed // GROUP, jnp.int32(s.experts))
        shared = tile.shared == 1
        block = tile.shard * s.superblocks + jnp.where(shared, common_block, own_block)
        own_row = own_place * s.m + tile.expert * GROUP
        return block, jnp.where(shared, jnp.int32((s.every - 1) * s.m), own_row), tile.column0


class _Runs(NamedTuple):
    """Where the tokens of a tile lie: in one run all of them, or a run for each combination."""

    tile: _Tile
    experts: int
    shards: int
    offsets_g: Any

    @property
    def number(self):
        return jnp.where(self.tile.shared == 1, 1, jnp.int32(self.experts ** (self.shards - 1)))

    def bounds(self, j) -> tuple:
        """First row of the j-th run, and its steps."""
        weight = power(self.tile.shard, self.experts, self.shards)
        one = with_expert(j, self.tile.expert, weight, self.experts)
        shared = self.tile.shared == 1
        last = jnp.int32(self.experts**self.shards)
        first = self.offsets_g[jnp.where(shared, 0, one)]
        end = self.offsets_g[jnp.where(shared, last, one + 1)]
        return first, lax.div(end - first, jnp.int32(dw.STEP))

    def steps(self):
        """Of all runs."""
        count = lambda j, steps: steps + self.bounds(j)[1]
        return lax.fori_loop(0, self.number, count, jnp.int32(0))


def _make_write(experts: int):
    """Stores a warpgroup's 64 rows: of one expert, four in each of 16 blocks, or whole blocks."""
    arg_types = (common.ACC, common.REF, common.REF, *(common.SCALAR,) * 4)
    boxes = ((_GROUPS, GROUP), (_GROUPS // experts, GROUP * experts))

    @plgpu.inline_mgpu(arg_types=arg_types)
    def write(ctx, acc, out_s, out_g, shared, block0, row0, col0):
        shared, block0, row0, col0 = map(common.scalar, (shared, block0, row0, col0))
        for column, slot in dw.staged(acc, out_s):
            for kind, box in enumerate(boxes):
                mine = arith.cmpi(arith.CmpIPredicate.eq, shared, ptx.const32(kind))
                ctx.async_copy(
                    src_ref=utils.memref_reshape(slot, (*box, 32)),
                    dst_ref=out_g,
                    gmem_slice=(
                        common.window(block0, box[0]),
                        common.window(row0, box[1]),
                        common.window(common.add(col0, column), 32),
                    ),
                    swizzle=128,
                    predicate=arith.andi(common.is_leader(), mine),
                    arrive=kind == 1,  # one group of both, of which one copies
                )

    return write


def weight_gradient(
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    *,
    num_experts: int,
    shards: int = 1,
    shared_every: int = 0,
    config: common.GroupedConfig | None = None,
) -> jax.Array:
    """`kernels.reference_grouped.weight_gradient`.

    `offsets` must be multiples of 128, as V is. Raises ValueError for shapes that do not fit and
    NotImplementedError where `check_weight_gradient` does.
    """
    options: dict[str, Any] = {"num_experts": num_experts, "shards": shards, "config": config}
    if not shared_every:
        return dw.weight_gradient(y, g, offsets, **options)
    check_weight_gradient(y, g, offsets, shared_every=shared_every, **options)
    sizes = of_live(y.shape[1] // shards, num_experts, shared_every)
    return _weight_gradient(y, g, offsets, sizes, shards, config or common.GroupedConfig())


def check_weight_gradient(
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    *,
    num_experts: int,
    shards: int = 1,
    shared_every: int = 0,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    options: dict[str, Any] = {"num_experts": num_experts, "shards": shards, "config": config}
    dw.check_weight_gradient(y, g, offsets, **options)
    if shared_every:
        sizes = of_live(y.shape[1] // shards, num_experts, shared_every)
        if not serves_shared(sizes):
            raise NotImplementedError(f"{shared_every=} is not served for {sizes}")


def _weight_gradient(
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    sizes: SharedRows,
    shards: int,
    config: common.GroupedConfig,
) -> jax.Array:
    width, dtype = g.shape[1], common.ptx_name(y.dtype)
    stages = dw.stages_of(config)
    tiles = _Tiles(sizes, shards, pl.cdiv(width, dw.COLUMNS), config.width)
    blocks = min(device.num_cores(), tiles.number)

    def body(y_g, g_g, offsets_g, out_g):
        @functools.partial(pl.run_scoped, **dw.scratch(stages, y.dtype), collective_axes="wg")
        def _scope(y_s, g_s, out_s, bars):
            wg = lax.axis_index("wg")
            own = common.own_tiles(jnp.int32(tiles.number), blocks)
            ring = dw.Ring(stages, y_s, g_s, bars)
            common.init_barriers(stages, 2)(bars)
            fill, step, finish = (
                dw.make_fill(stages),
                dw.make_step(stages, dtype),
                dw.make_finish(stages),
            )
            write = _make_write(sizes.experts)
            tile_of = lambda i: tiles.tile(lax.axis_index("block") + i * blocks)
            runs_of = lambda tile: _Runs(tile, sizes.experts, shards, offsets_g)

            def produced(i, state):
                tile = tile_of(i)
                runs, neuron0 = runs_of(tile), tile.shard * sizes.live + tile.neuron0

                def run(j, state):
                    token0, steps = runs.bounds(j)
                    part = dw.Part(tile.expert, neuron0, tile.column0, token0, steps)
                    return dw.produce(ring, fill, y_g, g_g, part, state)

                return lax.fori_loop(0, runs.number, run, state)

            def consumed(i, state):
                tile = tile_of(i)
                steps = runs_of(tile).steps()
                acc, state = dw.multiply(ring, step, finish, steps, dw.zeros(), state)
                write(acc, out_s.at[wg], out_g, tile.shared, *tiles.place(tile, wg))
                return state

            dw.run_tiles(wg, own, produced, consumed)

    # (superblocks of all shards, a superblock's neurons, D)
    shape = (shards * sizes.superblocks, sizes.every * sizes.m, width)
    out_type = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = common.kernel(body, out_type, blocks, 2, "weight_gradient_hopper")
    return call(y, g, offsets).reshape(shards * sizes.hidden, width)
