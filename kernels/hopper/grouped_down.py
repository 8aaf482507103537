"""2:4 activations times the weights of each block's expert, on sparse tensor cores.

A block's tile is 128 tokens by 256 columns; each of two warpgroups takes 64 tokens.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from kernels import reference_grouped, shared_rows
from kernels.combinations import expert_number
from kernels.hopper import device, ptx
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_neurons as neurons

_SLOTS = 2  # staging buffers, of 64 x 64 elements, of a warpgroup
_SLOT_BYTES = 64 * 64 * 2
_COLUMNS = 256  # of a tile


SCALES = common.strided(2)


@plgpu.inline_mgpu(
    arg_types=(common.REF, common.SCALAR), return_type=common.strided_type(2, jnp.float32)
)
def load_scales(ctx, scale_g, row0):
    """The scales (T_pad,) of the thread's two rows of 64."""
    del ctx
    warp, lane = common.warp_and_lane()
    row = common.add(common.mul(warp, 16), arith.shrui(lane, ptx.const32(2)))
    row = common.add(row, common.scalar(row0))
    base = ptx.global_address(scale_g)
    address = lambda b: ptx.offset_address(base, common.add(row, 8 * b), 4)
    return common.to_array([ptx.load_global_f32(address(b), 1)[0] for b in range(2)], signed=None)


def _stage(
    regs: list[ir.Value], scales: list[ir.Value], chunk: int, slot: ir.Value, dtype: str
) -> None:
    """Writes 64 columns of a warpgroup's 64 rows, scaled if asked, to shared memory, swizzled."""
    warp, lane = common.warp_and_lane()
    matrix = arith.divui(lane, ptx.const32(8))
    row = common.add(common.mul(warp, 16), common.mul(arith.andi(matrix, ptx.const32(1)), 8))
    row = common.add(row, arith.remui(lane, ptx.const32(8)))
    values = [vector.extract(r, [], [0]) for r in regs[32 * chunk : 32 * chunk + 32]]
    if scales:
        values = [arith.mulf(value, scales[i // 2 % 2]) for i, value in enumerate(values)]
    words = _words(values, dtype)
    for j in range(0, 8, 2):
        col8 = common.add(arith.shrui(matrix, ptx.const32(1)), j)
        address = common.swizzled(ptx.shared_address(slot), row, col8)
        ptx.stmatrix_x4(address, words[2 * j : 2 * j + 4], transpose=False)


def _write(dtype: str, scaled: bool):
    """Stores a warpgroup's 64 rows, 64 columns at a time; columns beyond the edge are dropped."""
    scale_types = (SCALES,) if scaled else ()

    @plgpu.inline_mgpu(
        arg_types=(common.ACC, common.REF, common.REF, *(common.SCALAR,) * 2, *scale_types)
    )
    def write(ctx, acc, out_s, out_g, row0, col0, *of_rows):
        row0, col0 = map(common.scalar, (row0, col0))
        scales = [scale for array in of_rows for scale in common.to_scalars(array)]
        (regs,) = common.accumulators(acc)
        for chunk in range(_COLUMNS // 64):
            slot = utils.memref_slice(out_s, chunk % _SLOTS)
            ptx.bulk_wait_read(_SLOTS - 1)
            utils.warpgroup_barrier()
            _stage(regs, scales, chunk, slot, dtype)
            ptx.fence_async_shared()
            utils.warpgroup_barrier()
            place = (common.window(row0, 64), common.window(common.add(col0, 64 * chunk), 64))
            ctx.async_copy(
                src_ref=slot,
                dst_ref=out_g,
                gmem_slice=place,
                swizzle=128,
                predicate=common.is_leader(),
                arrive=True,
            )

    return write


def _scatter(dtype: str, tokens: int, width: int, scaled: bool):
    """As `_write`, but each row goes to its token's; eight threads store 128 bytes of a row."""
    refs = (common.REF,) * 3
    scale_types = (SCALES,) if scaled else ()

    @plgpu.inline_mgpu(arg_types=(common.ACC, *refs, *(common.SCALAR,) * 2, *scale_types))
    def scatter(ctx, acc, out_s, permutation_g, out_g, row0, col0, *of_rows):
        del ctx
        row0, col0 = map(common.scalar, (row0, col0))
        scales = [scale for array in of_rows for scale in common.to_scalars(array)]
        (regs,) = common.accumulators(acc)
        i32 = ptx.i32_type()
        four = llvm.StructType.get_literal([i32] * 4)
        thread = ptx.thread_in_warpgroup()
        eighth, first = arith.remui(thread, ptx.const32(8)), arith.divui(thread, ptx.const32(8))
        rows = [common.add(first, 16 * i) for i in range(4)]
        wide = lambda v, size: arith.muli(arith.extui(ptx.i64_type(), v), ptx.const64(size))
        base = lambda ref: llvm.ptrtoint(ptx.i64_type(), utils.memref_ptr(ref))
        token_of = []
        for row in rows:
            address = arith.addi(base(permutation_g), wide(common.add(row0, row), 4))
            token_of.append(ptx.asm(i32, [address], "ld.global.b32 $0, [$1];", "=r,l"))
        less = lambda a, b: arith.cmpi(arith.CmpIPredicate.ult, a, ptx.const32(b))
        for chunk in range(_COLUMNS // 64):
            slot = utils.memref_slice(out_s, chunk % _SLOTS)
            _stage(regs, scales, chunk, slot, dtype)
            # One barrier is enough: who arrives here has read the slot that is written next.
            utils.warpgroup_barrier()
            column = common.add(common.add(col0, 64 * chunk), common.mul(eighth, 8))
            for row, token in zip(rows, token_of, strict=True):
                address = common.swizzled(ptx.shared_address(slot), row, eighth)
                asm = "ld.shared.v4.b32 {$0, $1, $2, $3}, [$4];"
                loaded = ptx.asm(four, [address], asm, "=r,=r,=r,=r,r,~{memory}")
                words = [llvm.extractvalue(i32, loaded, [i]) for i in range(4)]
                with utils.when(arith.andi(less(token, tokens), less(column, width))):
                    target = arith.addi(wide(token, 2 * width), wide(column, 2))
                    target = arith.addi(base(out_g), target)
                    asm = "st.global.v4.b32 [$0], {$1, $2, $3, $4};"
                    ptx.asm(None, [target, *words], asm, "l,r,r,r,r")

    return scatter


def _words(values: list[ir.Value], dtype: str) -> list[ir.Value]:
    pairs = zip(values[::2], values[1::2], strict=True)
    return [ptx.pack_pair(low, high, dtype) for low, high in pairs]


def tile(dtype: Any, config: common.GroupedConfig, w_dtype: Any = None) -> common.SparseTile:
    """The tile for activations of a type, and, of 8 bits, weights of another one."""
    t = common.SparseTile(
        warpgroups=2,
        wg_m=1,
        tile_n=_COLUMNS,
        b_layout="kn" if w_dtype is None else "nk",
        stages=0,
        dtype=jnp.dtype(dtype).name,
        b_dtype=None if w_dtype is None else jnp.dtype(w_dtype).name,
    )
    return common.with_stages(t, 2 * _SLOTS * _SLOT_BYTES, config)


def launch(
    t: common.SparseTile,
    config: common.GroupedConfig,
    operands: tuple[jax.Array, jax.Array, jax.Array],
    scale: jax.Array | None,
    layout: tuple[jax.Array, jax.Array],
    *,
    v: int,
    width: int,
    permutation: jax.Array | None,
    tokens: int | None,
    out_dtype: Any,
    name: str,
    experts: int = 1,
    shards: int = 1,
    sizes: shared_rows.SharedRows | None = None,
) -> jax.Array:
    """scale (Y W_e) for a tile, in the rows' order or the tokens'.

    operands: values and metadata of Y (T_pad, h), and W, (E h, D) or, "nk", (E D, h). scale:
    (T_pad,) or None. layout: offsets and block_expert. experts: E, which matters where there are
    several shards, and then W is (S E h / S, D). sizes: of a shard of neurons with shared ones that
    W has once, (S H, D).
    """
    rows, live = operands[0].shape[0], 2 * operands[0].shape[1]
    column_tiles = pl.cdiv(width, _COLUMNS)
    blocks = min(device.num_cores(), rows // common.TOKENS * column_tiles)
    scaled = scale is not None

    def body(values_g, metadata_g, w_g, offsets_g, expert_g, *rest):
        *given, out_g = rest
        scale_g = given.pop(0) if scaled else None
        permutation_g = given.pop(0) if tokens is not None else None

        @functools.partial(
            pl.run_scoped,
            **t.scratch(),
            out_s=plgpu.SMEM((2, _SLOTS, 64, 64), out_dtype),
            collective_axes="wg",
        )
        def _scope(out_s, **ring):
            wg = lax.axis_index("wg")
            loop = common.Loop(t, live // t.tile_k, (values_g, metadata_g, w_g), ring)
            common.init_barriers(t.stages, t.warpgroups)(ring["bars"])
            used = common.used_tiles(offsets_g)
            tiles = common.own_tiles(used * column_tiles, blocks)

            def part(i):
                tile = lax.axis_index("block") + i * blocks
                return common.tile_order(tile, used, column_tiles, config.width)

            def origin(i):
                block, column = part(i)
                expert = expert_g[lax.div(block, jnp.int32(v // common.TOKENS))]
                token0, column0 = block * common.TOKENS, column * _COLUMNS
                if shards > 1 or sizes is not None:
                    of_shard = live // shards

                    def offset(k0):
                        shard = jnp.int32(0) if shards == 1 else lax.div(k0, jnp.int32(of_shard))
                        number = expert_number(expert, shard, experts, shards)
                        if sizes is None:
                            return (number - shard) * of_shard
                        own, k = number - shard * experts, k0 - shard * of_shard
                        return shared_rows.row(sizes, own, k) + shard * sizes.hidden - k0

                    return token0, column0, offset
                if t.b_layout == "kn":
                    return token0, column0, expert * live
                # A last tile may reach into the next expert's rows: what it makes of them has no
                # place in the result.
                return token0, expert * width + column0, jnp.int32(0)

            def place(i):
                block, column = part(i)
                row0 = block * common.TOKENS + wg * 64
                scales = (load_scales(scale_g, row0),) if scaled else ()
                return row0, column * _COLUMNS, *scales

            def write(i, acc, *place):
                del i
                dtype = common.ptx_name(out_dtype)
                if tokens is None:
                    _write(dtype, scaled)(acc, out_s.at[wg], out_g, *place)
                else:
                    scatter = _scatter(dtype, tokens, width, scaled)
                    scatter(acc, out_s.at[wg], permutation_g, out_g, *place)

            def fill():
                if tokens is None:
                    outs = [(out_g, 0, 1)]
                    common.fill_unused(outs, used * common.TOKENS, blocks, t.warpgroups)

            loop.run(wg, lambda: tiles, origin, place, write, fill=fill)

    out_rows = rows if tokens is None else tokens
    out_type = jax.ShapeDtypeStruct((out_rows, width), out_dtype)
    call = common.kernel(body, out_type, blocks, t.warpgroups, name)
    return call(*operands, *layout, *(a for a in (scale, permutation) if a is not None))


def down24(
    y_values: jax.Array,
    y_metadata: jax.Array,
    w: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    permutation: jax.Array | None = None,
    tokens: int | None = None,
    shards: int = 1,
    shared_every: int = 0,
    config: common.GroupedConfig | None = None,
) -> jax.Array:
    """`kernels.reference_grouped.down24`.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_down24` does.
    """
    arguments = (y_values, y_metadata, w, offsets, block_expert)
    check_down24(
        *arguments,
        permutation=permutation,
        tokens=tokens,
        shards=shards,
        shared_every=shared_every,
        config=config,
    )
    config = config or common.GroupedConfig()
    experts, v = reference_grouped.down_dims(
        *arguments, permutation, tokens, shards=shards, shared_every=shared_every
    )
    width = w.shape[-1]
    return launch(
        tile(w.dtype, config),
        config,
        (y_values, y_metadata, w.reshape(-1, width)),
        None,
        (offsets, block_expert),
        v=v,
        width=width,
        permutation=permutation,
        tokens=tokens,
        out_dtype=w.dtype,
        name="down24_hopper",
        experts=experts,
        shards=shards,
        sizes=neurons.sizes_of(
            2 * y_values.shape[1], experts, shards=shards, shared_every=shared_every
        ),
    )


def check_down24(
    y_values: jax.Array,
    y_metadata: jax.Array,
    w: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    permutation: jax.Array | None = None,
    tokens: int | None = None,
    shards: int = 1,
    shared_every: int = 0,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    arguments = (y_values, y_metadata, w, offsets, block_expert)
    experts, v = reference_grouped.down_dims(
        *arguments, permutation, tokens, shards=shards, shared_every=shared_every
    )
    live = 2 * y_values.shape[1]
    common.check_shapes(v, live // shards, w.shape[-1], w.dtype)
    common.check_shards(experts, shards)
    neurons.sizes_of(live, experts, shards=shards, shared_every=shared_every)
    tile(w.dtype, config or common.GroupedConfig())
