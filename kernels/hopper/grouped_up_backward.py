"""dY1 on sparse tensor cores: gradients times packed weights, times 2 sqrt(Y2), packed like Y2.

While a tile is multiplied, its part of Y2 and of the metadata arrive in shared memory; the epilogue
replaces Y2 there by dY1, thread by thread, from where it leaves.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels import reference_grouped
from kernels.groups24 import SCALE, WIDENINGS
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_neurons as neurons
from kernels.hopper import ptx

_SLOTS = 2  # staging buffers for packed results, of 32 tokens, of a warpgroup
_PANEL = common.TOKENS * neurons.ROW  # of a part's dense staging: 64 neurons
_BYTES = 2 * _PANEL + neurons.META_BYTES  # of a part's Y2 and metadata


def prefetch_part(t: common.SparseTile):
    """Starts loading the part's Y2 and metadata, once all it last staged has left."""

    @plgpu.inline_mgpu(arg_types=(*(common.REF,) * 5, *(common.SCALAR,) * 2))
    def prefetch(ctx, y2_g, meta_g, dense_s, meta_s, bars, token0, neuron0):
        token0, neuron0 = map(common.scalar, (token0, neuron0))
        with utils.when(common.is_leader()):
            number = common.add(_warpgroup(), 2 * t.stages)
            ptx.bulk_wait_read(0)
            ptx.mbarrier_expect(common.barrier_address(bars, number), _BYTES)
            copy = functools.partial(
                ctx.async_copy,
                barrier=common.barrier_ref(bars, number),
                arrive=False,
                predicate=None,
            )
            rows = common.window(token0, common.TOKENS)
            for i in range(2):
                copy(
                    src_ref=y2_g,
                    dst_ref=utils.memref_slice(dense_s, i),
                    gmem_slice=(rows, common.window(common.add(neuron0, 64 * i), 64)),
                    swizzle=neurons.ROW,
                )
            tiles = [arith.shrui(v, ptx.const32(6)) for v in (token0, neuron0)]
            copy(
                src_ref=meta_g,
                dst_ref=meta_s,
                gmem_slice=(*(common.window(v, 2) for v in tiles), slice(None)),
            )

    return prefetch


def _warpgroup() -> ir.Value:
    return arith.divui(utils.thread_idx(), ptx.const32(ptx.WARPGROUP))


def await_part(t: common.SparseTile):
    """Waits for what `prefetch_part` started."""

    @plgpu.inline_mgpu(arg_types=(common.REF, common.SCALAR))
    def wait(ctx, bars, parity):
        del ctx
        number = common.add(_warpgroup(), 2 * t.stages)
        ptx.mbarrier_wait(common.barrier_address(bars, number), common.scalar(parity))

    return wait


def _scale(dense: list[ir.Value], x: list[ir.Value], nibble: ir.Value, dtype: str):
    """Two words of dY1 of a group and the word of its kept pair, as `SCALE` says."""
    i32 = ptx.i32_type()
    struct = llvm.StructType.get_literal([i32] * 3)
    text = SCALE.replace("WIDEN", WIDENINGS[dtype]).replace("DTYPE", dtype)
    constraints = "=&r,=&r,=&r,r,r,f,f,f,f,r"
    # With side effects, to stay in its place: all at once would delay the first stores.
    out = ptx.asm(struct, [*dense, *x, nibble], text, constraints)
    first, second, pair = (llvm.extractvalue(i32, out, [i]) for i in range(3))
    return [first, second], pair


def _put(sixteen: int, dtype: str):
    """Turns the staged Y2 of 16 tokens into dY1, and stages it packed as well."""

    @plgpu.inline_mgpu(arg_types=(common.ACC, *(common.REF,) * 3))
    def put(ctx, acc, dense_s, packed_s, meta_s):
        del ctx
        place = neurons.Place()
        groups = neurons.groups(acc, sixteen)
        i32 = ptx.i32_type()
        two = llvm.StructType.get_literal([i32, i32])
        staged = common.add(ptx.shared_address(dense_s), sixteen * 16 * neurons.ROW)
        slot = sixteen // 2 % _SLOTS * neurons.PANEL + sixteen % 2 * 16 * neurons.ROW
        packed = common.add(ptx.shared_address(packed_s), slot)
        for j in range(2):
            address = common.add(ptx.shared_address(meta_s), place.metadata(j))
            asm = f"ld.shared.b32 $0, [$1+{neurons.metadata_offset(sixteen)}];"
            word = ptx.asm(i32, [address], asm, "=r,r,~{memory}")
            word = arith.shrui(word, place.nibble)
            for n in range(2):
                nibble = arith.shrui(word, ptx.const32(16 * n))
                nibble = arith.andi(nibble, ptx.const32(15))
                address = common.add(staged, place.dense(j, _PANEL))
                asm = f"ld.shared.v2.b32 {{$0, $1}}, [$2+{n * 8 * neurons.ROW}];"
                loaded = ptx.asm(two, [address], asm, "=r,=r,r,~{memory}")
                dense = [llvm.extractvalue(i32, loaded, [i]) for i in range(2)]
                words, pair = _scale(dense, groups[n][j], nibble, dtype)
                neurons.store(place, n, j, words, pair, staged, packed, _PANEL)

    return put


def send_part(chunk: int, store_chunk: Callable = neurons.store_chunk):
    """Stores a staged chunk to global memory."""

    @plgpu.inline_mgpu(arg_types=(*(common.REF,) * 4, *(common.SCALAR,) * 2))
    def send(ctx, dense_s, packed_s, dy_g, values_g, token0, neuron0):
        token0, neuron0 = map(common.scalar, (token0, neuron0))
        ptx.fence_async_shared()
        utils.warpgroup_barrier()
        rows = utils.ds(chunk * neurons.CHUNK, neurons.CHUNK)
        panels = [utils.memref_slice(dense_s, (i, rows)) for i in range(2)]
        packed = utils.memref_slice(packed_s, chunk % _SLOTS)
        token = common.add(token0, chunk * neurons.CHUNK)
        store_chunk(ctx, panels, packed, dy_g, values_g, token, neuron0)

    return send


def up24_backward(
    values: jax.Array,
    metadata: jax.Array | None,
    dy_p: jax.Array,
    y2: jax.Array,
    y2_metadata: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
    config: common.GroupedConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.reference_grouped.up24_backward` for this backend's `pack_weight24`.

    Raises ValueError for shapes that do not fit and NotImplementedError where
    `check_up24_backward` does.
    """
    arguments = (values, metadata, dy_p, y2, y2_metadata, offsets, block_expert)
    check_up24_backward(*arguments, shards=shards, shared_every=shared_every, config=config)
    config = config or common.GroupedConfig()
    experts, v, live = reference_grouped.backward_dims(
        *arguments, shards=shards, shared_every=shared_every
    )
    sizes = neurons.sizes_of(live, experts, shards=shards, shared_every=shared_every)
    rows, width = dy_p.shape
    t = _tile(neurons.tiled(live, shards, sizes), values.dtype, config, metadata is None)
    blocks = neurons.blocks_of(t, rows, live)

    def body(values_g, *refs_g):
        metadata_g, dy_g, y2_g, y2_meta_g, offsets_g, expert_g, out_g, out_values_g = (
            (values_g, *refs_g) if t.dense else refs_g
        )

        @functools.partial(
            pl.run_scoped,
            **t.scratch(),
            dense_s=plgpu.SMEM((t.warpgroups, 2, common.TOKENS, 64), dy_p.dtype),
            packed_s=plgpu.SMEM((t.warpgroups, _SLOTS, neurons.CHUNK, 64), dy_p.dtype),
            y2_meta_s=plgpu.SMEM((t.warpgroups, 2, 2, 128), jnp.int32),
            collective_axes="wg",
        )
        def _scope(dense_s, packed_s, y2_meta_s, **ring):
            wg = lax.axis_index("wg")
            layout = offsets_g, expert_g, experts, shards, sizes
            plan = neurons.plan_of(t, live, blocks, config, v, *layout)
            loop = common.Loop(t, width // t.tile_k, (values_g, metadata_g, dy_g), ring)
            bars = ring["bars"]
            common.init_barriers(t.stages, t.warpgroups, t.spare)(bars)
            staged = lambda: (dense_s.at[wg], packed_s.at[wg])

            def place(i):
                token0, neuron0 = plan.part(i)
                return token0, neuron0 + wg * common.PART

            def prefetch(*place):
                prefetch_part(t)(y2_g, y2_meta_g, dense_s.at[wg], y2_meta_s.at[wg], bars, *place)

            def write(i, acc, *place):
                await_part(t)(bars, i & 1)
                for chunk in range(neurons.CHUNKS):
                    if chunk >= _SLOTS:
                        neurons.await_slot(_SLOTS - 1)()
                    for sixteen in (2 * chunk, 2 * chunk + 1):
                        put = _put(sixteen, common.ptx_name(dy_p.dtype))
                        put(acc, *staged(), y2_meta_s.at[wg])
                    send_part(chunk)(*staged(), out_g, out_values_g, *place)

            def fill():
                outs = [(out_g, 0, 1), (out_values_g, 0, 1)]
                common.fill_unused(outs, plan.used * common.TOKENS, blocks, t.warpgroups)

            own = plan.own_tiles
            loop.run(wg, own, plan.origin, place, write, prefetch=prefetch, fill=fill)

    call = common.kernel(
        body,
        (
            jax.ShapeDtypeStruct((rows, live), dy_p.dtype),
            jax.ShapeDtypeStruct((rows, live // 2), dy_p.dtype),
        ),
        blocks,
        t.warpgroups,
        "up24_backward_hopper",
    )
    dy1, dy1_values = call(*(a for a in arguments if a is not None))
    return dy1, dy1_values


def _tile(live: int, dtype: Any, config: common.GroupedConfig, dense: bool) -> common.SparseTile:
    staging = _BYTES + _SLOTS * neurons.PANEL
    return neurons.neuron_tile(live, dtype, staging, config, barriers=True, dense=dense)


def check_up24_backward(
    values: jax.Array,
    metadata: jax.Array | None,
    dy_p: jax.Array,
    y2: jax.Array,
    y2_metadata: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    arguments = (values, metadata, dy_p, y2, y2_metadata, offsets, block_expert)
    experts, v, live = reference_grouped.backward_dims(
        *arguments, shards=shards, shared_every=shared_every
    )
    common.check_shapes(v, live // shards, dy_p.shape[1], values.dtype)
    common.check_shards(experts, shards)
    of_tile = neurons.tiled(
        live, shards, neurons.sizes_of(live, experts, shards=shards, shared_every=shared_every)
    )
    _tile(of_tile, values.dtype, config or common.GroupedConfig(), metadata is None)
