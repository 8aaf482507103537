"""Packed weights times tokens: the layout of a part, and what both such kernels do with it.

The sparse operand is the weight, so accumulators are (neurons, tokens). A warpgroup's part is 128
neurons by 128 tokens, of which the thread of warp w and lane 4 q + c holds rows 16 w + q + 8 b of
both halves a of 64, and tokens 8 i + 2 c + j. `row_order` puts the four neurons of group 8 w + q
there, so that choosing two of four and packing stay in the thread. Only the nibbles of metadata
cross lanes: four groups, of lanes q = 4 p .. 4 p + 3, make a half-word; tokens t and t + 8 its low
and high half.

Results are staged in shared memory, 32 tokens at a time, and leave by TMA.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from kernels import shared_rows
from kernels.combinations import expert_number
from kernels.hopper import device, ptx
from kernels.hopper import grouped_common as common

PART = common.PART  # neurons of a warpgroup's part
CHUNK = 32  # tokens staged at a time
CHUNKS = common.TOKENS // CHUNK
ROW = 128  # bytes of a staged row: 64 elements
PANEL = CHUNK * ROW
META_BYTES = 2048  # of a part: 128 tokens by 32 groups, a nibble each


def row_order(h: int) -> np.ndarray:
    """(h,) int: the expert-local neuron in each row of an expert's packed weight.

    Row 64 a + 16 w + 8 b + q of every 128 is neuron 4 (8 w + q) + 2 a + b of them.
    """
    p = np.arange(h)
    a, w, b, q = p // 64 % 2, p // 16 % 4, p // 8 % 2, p % 8
    return p // PART * PART + 4 * (8 * w + q) + 2 * a + b


class Place:
    """Where a thread's results go in its warpgroup's staging buffers, in bytes."""

    def __init__(self):
        warp, lane = common.warp_and_lane()
        self.q = arith.shrui(lane, ptx.const32(2))
        self.warp = warp
        self.c2 = common.mul(arith.andi(lane, ptx.const32(3)), 2)
        self.odd = arith.andi(warp, ptx.const32(1))
        self.panel = arith.shrui(warp, ptx.const32(1))

    def dense(self, j: int, panel_bytes: int) -> ir.Value:
        """Of 8 bytes of token 2 c + j: two panels of 64 neurons, swizzled."""
        half = arith.shrui(self.q, ptx.const32(1))
        chunk = common.add(common.mul(self.odd, 4), half)
        within = common.mul(arith.andi(self.q, ptx.const32(1)), 8)
        start = common.add(common.mul(self.panel, panel_bytes), within)
        return common.swizzled(start, common.add(self.c2, j), chunk)

    def packed(self, j: int) -> ir.Value:
        """Of 4 bytes of token 2 c + j."""
        chunk = common.add(common.mul(self.warp, 2), arith.shrui(self.q, ptx.const32(2)))
        within = common.mul(arith.andi(self.q, ptx.const32(3)), 4)
        return common.swizzled(within, common.add(self.c2, j), chunk)

    def metadata(self, j: int) -> ir.Value:
        """Of the word of tokens 2 c + j and 2 c + j + 8: (token tile, neuron tile, word)."""
        word = common.add(common.mul(self.odd, 2), arith.shrui(self.q, ptx.const32(2)))
        word = common.add(word, common.mul(common.add(self.c2, j), 4))
        return common.add(common.mul(self.panel, 512), common.mul(word, 4))

    @property
    def nibble(self) -> ir.Value:
        """Bits that the thread's nibble lies above its half-word's first."""
        return common.mul(arith.andi(self.q, ptx.const32(3)), 4)


def metadata_offset(i: int) -> int:
    """Bytes before the words of tokens 16 i .. 16 i + 15 of a part."""
    return i // 4 * 1024 + i % 4 * 128


def permute(words: ir.Value, zero: ir.Value, selector: ir.Value) -> ir.Value:
    asm = "prmt.b32 $0, $1, $2, $3;"
    return llvm.inline_asm(ptx.i32_type(), [words, zero, selector], asm, "=r,r,r,r", asm_dialect=0)


def spread_code(nibble: ir.Value) -> ir.Value:
    """`prmt` selectors that spread a pair to four: of elements 0 and 1 low, 2 and 3 high half."""
    # A byte for each element: zeros (0x44), the pair's low (0x10) or its high (0x32) half.
    code = ptx.const32(0x4444_4444)
    lower = arith.andi(arith.shli(nibble, ptx.const32(3)), ptx.const32(24))
    higher = arith.andi(arith.shli(nibble, ptx.const32(1)), ptx.const32(24))
    for half, bit in ((0x10, lower), (0x32, higher)):
        code = arith.xori(code, arith.shli(ptx.const32(half ^ 0x44), bit))
    return code


def spread(pair: ir.Value, code: ir.Value, zero: ir.Value) -> list[ir.Value]:
    """The two words of four elements that a pair and its selectors make."""
    upper = arith.shrui(code, ptx.const32(16))
    return [permute(pair, zero, selector) for selector in (code, upper)]


def join_lanes(word: ir.Value, masks: tuple[int, ...]) -> ir.Value:
    """Bitwise or of the words of lanes that differ in the bits of `masks`."""
    for mask in masks:
        word = arith.ori(word, ptx.shuffle_xor(word, mask))
    return word


def groups(acc, sixteen: int) -> list[list[list[ir.Value]]]:
    """[n][j]: the four neurons of the thread's group, of token 16 sixteen + 8 n + 2 c + j."""
    regs = common.accumulators(acc)

    def group(n: int, j: int) -> list[ir.Value]:
        first = 4 * (2 * sixteen + n) + j
        return [vector.extract(regs[r // 2][first + 2 * (r % 2)], [], [0]) for r in range(4)]

    return [[group(n, j) for j in range(2)] for n in range(2)]


def store_dense(
    place: Place, n: int, j: int, words: list[ir.Value], staged: ir.Value, dense_panel: int
) -> None:
    """Stages two words, a dense group, for token 8 n + 2 c + j after those of the address."""
    address = common.add(staged, place.dense(j, dense_panel))
    asm = f"st.shared.v2.b32 [$0+{n * 8 * ROW}], {{$1, $2}};"
    ptx.asm(None, [address, *words], asm, "r,r,r,~{memory}")


def store(
    place: Place,
    n: int,
    j: int,
    words: list[ir.Value],
    pair: ir.Value,
    staged: ir.Value,
    packed: ir.Value,
    dense_panel: int,
) -> None:
    """Stages a group, dense and packed, for token 8 n + 2 c + j after those of the addresses."""
    store_dense(place, n, j, words, staged, dense_panel)
    address = common.add(packed, place.packed(j))
    asm = f"st.shared.b32 [$0+{n * 8 * ROW}], $1;"
    ptx.asm(None, [address, pair], asm, "r,r,~{memory}")


def await_slot(outstanding: int):
    """Waits until all but so many of the warpgroup's bulk stores have read their source."""

    @plgpu.inline_mgpu()
    def wait(ctx):
        del ctx
        ptx.bulk_wait_read(outstanding)
        utils.warpgroup_barrier()

    return wait


def store_panels(ctx, panels, dense_g, token, neuron0, *, arrive: bool) -> None:
    """Starts the bulk stores of the dense panels of 32 tokens of a part.

    arrive: whether they end a group of bulk stores, as `await_slot` counts them.
    """
    rows = common.window(token, CHUNK)
    for i, panel in enumerate(panels):
        ctx.async_copy(
            src_ref=panel,
            dst_ref=dense_g,
            gmem_slice=(rows, common.window(common.add(neuron0, 64 * i), 64)),
            swizzle=ROW,
            predicate=common.is_leader(),
            arrive=arrive and i == len(panels) - 1,
        )


def store_chunk(ctx, panels, packed, dense_g, packed_g, token, neuron0) -> None:
    """Starts the bulk stores of 32 tokens of a part: two dense panels and the packed one."""
    store_panels(ctx, panels, dense_g, token, neuron0, arrive=False)
    ctx.async_copy(
        src_ref=packed,
        dst_ref=packed_g,
        gmem_slice=(
            common.window(token, CHUNK),
            common.window(arith.shrui(neuron0, ptx.const32(1)), 64),
        ),
        swizzle=ROW,
        predicate=common.is_leader(),
        arrive=True,
    )


@dataclasses.dataclass(frozen=True)
class Plan:
    """The tiles of a product of weights and tokens, inside a kernel.

    Weights are (S E h / S, D), or with `sizes` (S H, D).

    used: token tiles in use. expert_g: experts of blocks of tokens, in global memory; per_expert:
    token tiles in a block. experts, shards: E and S. sizes: of neurons that the weights have once
    for all experts, if there are any; a tile has none of both kinds.
    """

    tile: common.SparseTile
    live: int
    blocks: int
    width: int
    used: Any
    expert_g: Any
    per_expert: int
    experts: int
    shards: int
    sizes: shared_rows.SharedRows | None = None

    def own_tiles(self):
        """Number of the block's tiles."""
        return common.own_tiles(self.used * (self.live // self.tile.block_m), self.blocks)

    def part(self, i):
        """First token and first neuron of the block's i-th tile."""
        tile = lax.axis_index("block") + i * self.blocks
        minor = self.live // self.tile.block_m
        block, m_tile = common.tile_order(tile, self.used, minor, self.width)
        return block * common.TOKENS, m_tile * self.tile.block_m

    def origin(self, i):
        """Of the operands of the i-th tile, for `Loop.produce`."""
        token0, neuron0 = self.part(i)
        expert = self.expert_g[lax.div(token0, jnp.int32(common.TOKENS * self.per_expert))]
        shard, of_shard = jnp.int32(0), self.live // self.shards
        if self.shards > 1:
            shard, neuron0 = (f(neuron0, jnp.int32(of_shard)) for f in (lax.div, lax.rem))
            expert = expert_number(expert, shard, self.experts, self.shards)
        if self.sizes is None:
            row = expert * of_shard + neuron0
        else:
            row = shared_rows.row(self.sizes, expert - shard * self.experts, neuron0)
            row += shard * self.sizes.hidden
        return row, token0, jnp.int32(0)


def plan_of(
    t: common.SparseTile,
    live: int,
    blocks: int,
    config: common.GroupedConfig,
    v: int,
    offsets_g: Any,
    expert_g: Any,
    experts: int = 1,
    shards: int = 1,
    sizes: shared_rows.SharedRows | None = None,
) -> Plan:
    """The plan of a kernel's block; v: tokens of a block that belong to one expert.

    experts: E, which matters where there are several shards. sizes: as of `Plan`.
    """
    used = common.used_tiles(offsets_g)
    per_expert = v // common.TOKENS
    return Plan(t, live, blocks, config.width, used, expert_g, per_expert, experts, shards, sizes)


def sizes_of(
    live: int, experts: int, *, shards: int, shared_every: int
) -> shared_rows.SharedRows | None:
    """Sizes of a shard of neurons with shared ones; None without. live: h, of all shards.

    Raises NotImplementedError if an expert's own neurons are not whole parts.
    """
    if not shared_every:
        return None
    sizes = shared_rows.of_live(live // shards, experts, shared_every)
    if sizes.routed % PART:
        found = f"an expert's own {sizes.routed} neurons are no multiple of {PART}"
        raise NotImplementedError(f"{shared_every=} is not served: {found}")
    return sizes


def tiled(live: int, shards: int, sizes: shared_rows.SharedRows | None) -> int:
    """A number of neurons that tiles must divide, so that each lies in one run of rows.

    live: h, of all shards. sizes: as of `Plan`.
    """
    return math.gcd(live // shards, 0 if sizes is None else sizes.routed)


def blocks_of(t: common.SparseTile, rows: int, live: int) -> int:
    """Blocks of the grid: persistent ones, no more than there are tiles."""
    return min(device.num_cores(), rows // common.TOKENS * (live // t.block_m))


def neuron_tile(
    live: int,
    dtype: Any,
    other_bytes: int,
    config: common.GroupedConfig,
    *,
    barriers: bool = False,
    b_dtype: Any = None,
    dense: bool = False,
) -> common.SparseTile:
    """The tile for h live neurons of a shard, with `other_bytes` of shared memory for each
    warpgroup.

    barriers: whether each warpgroup also has a barrier of its own. b_dtype: of the tokens, where it
    may be another one than `dtype`. dense: whether the weights are not packed.
    """
    warpgroups = 2 if live % (2 * PART) == 0 else 1
    t = common.SparseTile(
        warpgroups=warpgroups,
        wg_m=PART // 64,
        tile_n=common.TOKENS,
        b_layout="nk",
        stages=0,
        dtype=jnp.dtype(dtype).name,
        spare=warpgroups if barriers else 0,
        b_dtype=None if b_dtype is None else jnp.dtype(b_dtype).name,
        dense=dense,
    )
    return common.with_stages(t, warpgroups * other_bytes, config)
