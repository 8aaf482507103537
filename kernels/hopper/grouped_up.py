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
from jaxlib.mlir.dialects import arith

from kernels import reference_grouped
from kernels.hopper import device, ptx
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_neurons as neurons

_SLOTS = 2  # staging buffers, of 32 tokens, of a warpgroup
_EMPTY = 0x44444444  # metadata of zeros: elements 0 and 1 of every group

# How four neurons are made of their kept pair: for `prmt` on (pair, 0), the selector of neurons 0
# and 1 in the low half, of 2 and 3 in the high half. Which zero byte is taken is free, and chosen
# such that bits 0-1 are the lower and bits 28-29 the higher kept index.
_KEEP_01, _KEEP_23 = 0x5444_3210, 0x3210_4446
_LOWER_0, _LOWER_1 = 0x4410, 0x1045
_HIGHER_2, _HIGHER_3 = 0x6432_0000, 0x3244_0000


def choose_pair(x: list[jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The two largest of relu(x)^2 in groups of four, ties to the lower index.

    x: the groups' elements 0..3, four float32 arrays of one shape. Returns the kept pair in the
    order of their indices, squared, and the int32 selector described above. relu^2 does not change
    the order, so the choice is made before squaring. A NaN among the four stays.
    """
    x = [jnp.maximum(v, 0.0) for v in x]
    second, fourth = x[1] > x[0], x[3] > x[2]  # the larger of each pair of neighbours
    high_a, low_a = jnp.maximum(x[0], x[1]), jnp.minimum(x[0], x[1])
    high_b, low_b = jnp.maximum(x[2], x[3]), jnp.minimum(x[2], x[3])
    both_a = low_a >= high_b  # a tie goes to the first pair, which has the lower indices
    both_b = low_b > high_a
    pick = lambda of_a, of_b, mixed: jnp.where(both_a, of_a, jnp.where(both_b, of_b, mixed))
    low, high = pick(x[0], x[2], high_a), pick(x[1], x[3], high_b)
    lower = jnp.where(second, jnp.int32(_LOWER_1), jnp.int32(_LOWER_0))
    higher = jnp.where(fourth, jnp.int32(_HIGHER_3), jnp.int32(_HIGHER_2))
    code = pick(jnp.int32(_KEEP_01), jnp.int32(_KEEP_23), lower | higher)
    return low * low, high * high, code


def _or_bits(value: ir.Value, mask: int, shift: int) -> ir.Value:
    moved = arith.shrui(value, ptx.const32(shift)) if shift else value
    return arith.andi(moved, ptx.const32(mask))


def _put(i: int, dtype: str):
    """Stages what `choose_pair` made of `split_groups(i)`: dense, packed and metadata."""
    arg_types = (common.REF, common.REF, neurons.FOUR, neurons.FOUR, neurons.FOUR)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def put(ctx, out_s, meta_s, lows, highs, codes):
        del ctx
        place = neurons.Place()
        lows, highs, codes = map(common.to_scalars, (lows, highs, codes))
        zero = ptx.const32(0)
        staged = common.add(ptx.shared_address(out_s), i // 2 % _SLOTS * 3 * neurons.PANEL)
        packed_at = common.add(staged, 2 * neurons.PANEL)
        for j in range(2):
            nibbles = []
            for n in range(2):
                low, high, code = (v[2 * n + j] for v in (lows, highs, codes))
                pair = ptx.pack_pair(low, high, dtype)
                row = i % 2 * 2 + n
                neurons.store_pair(
                    place, row, j, pair, code, zero, staged, packed_at, neurons.PANEL
                )
                nibbles.append(arith.ori(_or_bits(code, 3, 0), _or_bits(code, 12, 26)))
            word = arith.ori(nibbles[0], arith.shli(nibbles[1], ptx.const32(16)))
            word = neurons.join_lanes(arith.shli(word, place.nibble), (4, 8))
            # The four lanes that made the word all store it, to one address.
            address = common.add(ptx.shared_address(meta_s), place.metadata(j))
            asm = f"st.shared.b32 [$0+{neurons.metadata_offset(i)}], $1;"
            ptx.asm(None, [address, word], asm, "r,r,~{memory}")

    return put


def _store_metadata(ctx, meta_s, meta_g, token0, neuron0) -> None:
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
            _store_metadata(ctx, meta_s, meta_g, token0, neuron0)
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
    blocks = min(device.num_cores(), rows // common.TOKENS * (live // t.block_m))

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
            plan = neurons.Plan(
                t, live, blocks, config.width, offsets_g, expert_g, v // common.TOKENS
            )
            loop = common.Loop(t, width // common.TILE_K, (values_g, metadata_g, x_g), ring)
            common.init_barriers(t.stages, t.warpgroups)(ring["bars"])

            def write(i, acc):
                token0, neuron0 = plan.part(i)
                neuron0 = neuron0 + wg * common.PART
                stage, stage_meta = out_s.at[wg], y_meta_s.at[wg]
                for chunk in range(neurons.CHUNKS):
                    neurons.await_slot(0 if chunk == 0 else _SLOTS - 1)()
                    for half in range(2):
                        sixteen = 2 * chunk + half
                        kept = choose_pair(neurons.split_groups(sixteen)(acc))
                        _put(sixteen, common.ptx_name(x_p.dtype))(stage, stage_meta, *kept)
                    _send(chunk)(stage, stage_meta, y_g, y_values_g, y_meta_g, token0, neuron0)

            @pl.when(wg == t.warpgroups)
            def _producer():
                plgpu.set_max_registers(40, action="decrease")
                loop.produce(plan.own_tiles, plan.origin)

            @pl.when(wg < t.warpgroups)
            def _consumer():
                plgpu.set_max_registers(common.REGISTERS, action="increase")
                loop.consume(plan.own_tiles, write)
                common.fill_unused(
                    [(y_g, 0, 1), (y_values_g, 0, 1), (y_meta_g, _EMPTY, 64)],
                    plan.used * common.TOKENS,
                    blocks,
                    t.warpgroups,
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

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
