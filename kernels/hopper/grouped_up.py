"""Y2 on sparse tensor cores: tokens times packed weights, relu^2, two of four and packing in one.

What bounds it is the main loop's shared-memory bandwidth; the epilogue, about 40 instructions for
each four neurons of a token, comes on top.
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
from jaxlib.mlir.dialects import arith, llvm

from kernels import reference_grouped
from kernels.groups24 import CHOOSE
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_neurons as neurons
from kernels.hopper import ptx

_SLOTS = 2  # staging buffers, of 32 tokens, of a warpgroup
EMPTY = 0x44444444  # metadata of zeros: elements 0 and 1 of every group


def _choose(x: list[ir.Value], dtype: str) -> tuple[ir.Value, ir.Value]:
    """The kept pair of a group and the selectors that spread it, as `CHOOSE` says."""
    i32 = ptx.i32_type()
    struct = llvm.StructType.get_literal([i32, i32])
    text = CHOOSE.replace("DTYPE", dtype)
    # With side effects, to stay in its place: all choices at once would delay the first stores.
    out = ptx.asm(struct, x, text, "=&r,=&r,f,f,f,f")
    return llvm.extractvalue(i32, out, [0]), llvm.extractvalue(i32, out, [1])


def _bits(value: ir.Value, mask: int, shift: int) -> ir.Value:
    moved = arith.shrui(value, ptx.const32(shift)) if shift else value
    return arith.andi(moved, ptx.const32(mask))


def choice_nibble(code: ir.Value) -> ir.Value:
    """The kept indices of `_choose`'s selectors, i0 | i1 << 2."""
    return arith.ori(_bits(code, 3, 0), _bits(code, 12, 26))


def _put(sixteen: int, dtype: str):
    """Chooses for 16 tokens and stages the outcome: dense, packed and metadata."""

    @plgpu.inline_mgpu(arg_types=(common.ACC, common.REF, common.REF))
    def put(ctx, acc, out_s, meta_s):
        del ctx
        place = neurons.Place()
        groups = neurons.groups(acc, sixteen)
        zero = ptx.const32(0)
        slot = sixteen // 2 % _SLOTS * 3 * neurons.PANEL + sixteen % 2 * 16 * neurons.ROW
        staged = common.add(ptx.shared_address(out_s), slot)
        packed = common.add(staged, 2 * neurons.PANEL)
        for j in range(2):
            nibbles = []
            for n in range(2):
                pair, code = _choose(groups[n][j], dtype)
                words = neurons.spread(pair, code, zero)
                neurons.store(place, n, j, words, pair, staged, packed, neurons.PANEL)
                nibbles.append(choice_nibble(code))
            word = arith.ori(nibbles[0], arith.shli(nibbles[1], ptx.const32(16)))
            word = neurons.join_lanes(arith.shli(word, place.nibble), (4, 8))
            # The four lanes that made the word all store it, to one address.
            address = common.add(ptx.shared_address(meta_s), place.metadata(j))
            asm = f"st.shared.b32 [$0+{neurons.metadata_offset(sixteen)}], $1;"
            ptx.asm(None, [address, word], asm, "r,r,~{memory}")

    return put


def store_metadata(ctx, meta_s, meta_g, token0, neuron0) -> None:
    """Starts the bulk store of a part's metadata."""
    rows, cols = (arith.shrui(v, ptx.const32(6)) for v in (token0, neuron0))
    ctx.async_copy(
        src_ref=meta_s,
        dst_ref=meta_g,
        gmem_slice=(common.window(rows, 2), common.window(cols, 2), slice(None)),
        predicate=common.is_leader(),
        arrive=False,
    )


def _send(chunk: int):
    """Stores a staged chunk, and with the last one the metadata, to global memory."""

    @plgpu.inline_mgpu(arg_types=(*(common.REF,) * 5, common.SCALAR, common.SCALAR))
    def send(ctx, out_s, meta_s, y_g, values_g, meta_g, token0, neuron0):
        token0, neuron0 = map(common.scalar, (token0, neuron0))
        ptx.fence_async_shared()
        utils.warpgroup_barrier()
        slot = utils.memref_slice(out_s, chunk % _SLOTS)
        panels = [utils.memref_slice(slot, i) for i in range(2)]
        packed = utils.memref_slice(slot, 2)
        if chunk == neurons.CHUNKS - 1:
            store_metadata(ctx, meta_s, meta_g, token0, neuron0)
        token = common.add(token0, chunk * neurons.CHUNK)
        neurons.store_chunk(ctx, panels, packed, y_g, values_g, token, neuron0)

    return send


def up24(
    values: jax.Array,
    metadata: jax.Array,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    config: common.GroupedConfig | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`kernels.reference_grouped.up24` for weights packed by this backend's `pack_weight24`.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_up24` does.
    """
    check_up24(values, metadata, x_p, offsets, block_expert, config=config)
    config = config or common.GroupedConfig()
    _, v, live = reference_grouped.up_dims(values, metadata, x_p, offsets, block_expert)
    rows, width = x_p.shape
    t = _tile(live, values.dtype, config)
    blocks = neurons.blocks_of(t, rows, live)

    def body(values_g, metadata_g, x_g, offsets_g, expert_g, y_g, y_values_g, y_meta_g):
        @functools.partial(
            pl.run_scoped,
            **t.scratch(),
            out_s=plgpu.SMEM((t.warpgroups, _SLOTS, 3, neurons.CHUNK, 64), x_p.dtype),
            y_meta_s=plgpu.SMEM((t.warpgroups, 2, 2, 128), jnp.int32),
            collective_axes="wg",
        )
        def _scope(out_s, y_meta_s, **ring):
            wg = lax.axis_index("wg")
            plan = neurons.plan_of(t, live, blocks, config, v, offsets_g, expert_g)
            loop = common.Loop(t, width // common.TILE_K, (values_g, metadata_g, x_g), ring)
            common.init_barriers(t.stages, t.warpgroups)(ring["bars"])

            def place(i):
                token0, neuron0 = plan.part(i)
                return token0, neuron0 + wg * common.PART

            def write(i, acc, token0, neuron0):
                del i
                stage, stage_meta = out_s.at[wg], y_meta_s.at[wg]
                for chunk in range(neurons.CHUNKS):
                    neurons.await_slot(0 if chunk == 0 else _SLOTS - 1)()
                    for sixteen in (2 * chunk, 2 * chunk + 1):
                        _put(sixteen, common.ptx_name(x_p.dtype))(acc, stage, stage_meta)
                    _send(chunk)(stage, stage_meta, y_g, y_values_g, y_meta_g, token0, neuron0)

            def fill():
                outs = [(y_g, 0, 1), (y_values_g, 0, 1), (y_meta_g, EMPTY, 64)]
                common.fill_unused(outs, plan.used * common.TOKENS, blocks, t.warpgroups)

            loop.run(wg, plan.own_tiles, plan.origin, place, write, fill=fill)

    call = common.kernel(
        body,
        (
            jax.ShapeDtypeStruct((rows, live), x_p.dtype),
            jax.ShapeDtypeStruct((rows, live // 2), x_p.dtype),
            jax.ShapeDtypeStruct((rows // 64, live // 64, 128), jnp.int32),
        ),
        blocks,
        t.warpgroups,
        "up24_hopper",
    )
    y2, y2_values, y2_metadata = call(values, metadata, x_p, offsets, block_expert)
    return y2, y2_values, y2_metadata


def _tile(live: int, dtype: Any, config: common.GroupedConfig) -> common.SparseTile:
    staging = _SLOTS * 3 * neurons.PANEL + neurons.META_BYTES
    return neurons.neuron_tile(live, dtype, staging, config)


def check_up24(
    values: jax.Array,
    metadata: jax.Array,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    _, v, live = reference_grouped.up_dims(values, metadata, x_p, offsets, block_expert)
    common.check_shapes(v, live, x_p.shape[1], values.dtype)
    _tile(live, values.dtype, config or common.GroupedConfig())
