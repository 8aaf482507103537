"""Y2 from 8-bit tokens and packed weights: `kernels.hopper.grouped_up` with factors of tokens.

Y2 leaves twice: in bfloat16 for the weight gradient and the backward pass, and packed in e4m3 for
the product that follows.
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
from jaxlib.mlir.dialects import llvm

from kernels import reference_grouped_fp8 as reference
from kernels.groups24 import CHOOSE_SCALED
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_neurons as neurons
from kernels.hopper import grouped_neurons_fp8 as neurons_fp8
from kernels.hopper import ptx
from kernels.hopper.grouped_up import EMPTY, choice_nibble, store_metadata

_SLOTS = 2  # staging buffers, of 32 tokens, of a warpgroup


def _choose(x: list[ir.Value], factor: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The kept pair of a group and the selectors that spread it, as `CHOOSE_SCALED` says."""
    i32 = ptx.i32_type()
    struct = llvm.StructType.get_literal([i32, i32])
    text = CHOOSE_SCALED.replace("DTYPE", "bf16")
    # With side effects, to stay in its place: all choices at once would delay the first stores.
    out = ptx.asm(struct, [*x, factor], text, "=&r,=&r,f,f,f,f,f")
    return llvm.extractvalue(i32, out, [0]), llvm.extractvalue(i32, out, [1])


def _put(sixteen: int):
    """Chooses for 16 tokens and stages the outcome: dense, packed and metadata."""

    @plgpu.inline_mgpu(arg_types=(common.ACC, *(common.REF,) * 4))
    def put(ctx, acc, dense_s, packed_s, meta_s, factors_s):
        del ctx
        place = neurons.Place()
        groups = neurons.groups(acc, sixteen)
        factors = neurons_fp8.factors_of(place, factors_s, sixteen)
        zero = ptx.const32(0)
        slot, half = sixteen // 2 % _SLOTS, sixteen % 2 * 16
        dense = slot * 2 * neurons.PANEL + half * neurons.ROW
        staged = common.add(ptx.shared_address(dense_s), dense)
        packed = slot * neurons_fp8.PANEL + half * neurons_fp8.ROW
        packed = common.add(ptx.shared_address(packed_s), packed)
        for j in range(2):
            own = []
            for n in range(2):
                pair, code = _choose(groups[n][j], factors[n][j][0])
                words = neurons.spread(pair, code, zero)
                neurons_fp8.store(
                    *(place, n, j, words, pair, factors[n][j][1], "e4m3"),
                    *(staged, packed, neurons.PANEL),
                )
                own.append(choice_nibble(code))
            words = neurons_fp8.metadata_words(own, place.q, 4)
            # The eight lanes that made the words all store them, to one address.
            address = neurons_fp8.metadata_address(place, meta_s, sixteen, j)
            asm = "st.shared.v2.b32 [$0], {$1, $2};"
            ptx.asm(None, [address, *words], asm, "r,r,r,~{memory}")

    return put


def _send(chunk: int):
    """Stores a staged chunk, and with the last one the metadata, to global memory."""

    @plgpu.inline_mgpu(arg_types=(*(common.REF,) * 6, common.SCALAR, common.SCALAR))
    def send(ctx, dense_s, packed_s, meta_s, y_g, values_g, meta_g, token0, neuron0):
        token0, neuron0 = map(common.scalar, (token0, neuron0))
        ptx.fence_async_shared()
        utils.warpgroup_barrier()
        slot = utils.memref_slice(dense_s, chunk % _SLOTS)
        panels = [utils.memref_slice(slot, i) for i in range(2)]
        packed = utils.memref_slice(packed_s, chunk % _SLOTS)
        if chunk == neurons.CHUNKS - 1:
            store_metadata(ctx, meta_s, meta_g, token0, neuron0)
        token = common.add(token0, chunk * neurons.CHUNK)
        neurons_fp8.store_chunk(ctx, panels, packed, y_g, values_g, token, neuron0)

    return send


def up24_fp8(
    values: jax.Array,
    metadata: jax.Array,
    x_p: jax.Array,
    factors: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    config: common.GroupedConfig | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`kernels.reference_grouped_fp8.up24_fp8` for this backend's `pack_weight24_fp8`.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_up24_fp8`
    does.
    """
    arguments = (values, metadata, x_p, factors, offsets, block_expert)
    check_up24_fp8(*arguments, config=config)
    config = config or common.GroupedConfig()
    _, v, live = reference.up_dims(*arguments)
    rows, width = x_p.shape
    t = _tile(live, values.dtype, x_p.dtype, config)
    blocks = neurons.blocks_of(t, rows, live)

    def body(
        values_g, metadata_g, x_g, factors_g, offsets_g, expert_g, y_g, y_values_g, y_meta_g
    ):  # fmt: skip
        @functools.partial(
            pl.run_scoped,
            **t.scratch(),
            dense_s=plgpu.SMEM((t.warpgroups, _SLOTS, 2, neurons.CHUNK, 64), jnp.bfloat16),
            packed_s=plgpu.SMEM((t.warpgroups, _SLOTS, neurons.CHUNK, 64), reference.ACTIVATION),
            y_meta_s=plgpu.SMEM((t.warpgroups, 2, 2, 128), jnp.int32),
            factors_s=plgpu.SMEM((t.warpgroups, common.TOKENS, 2), jnp.float32),
            collective_axes="wg",
        )
        def _scope(dense_s, packed_s, y_meta_s, factors_s, **ring):
            wg = lax.axis_index("wg")
            plan = neurons.plan_of(t, live, blocks, config, v, offsets_g, expert_g)
            loop = common.Loop(t, width // t.tile_k, (values_g, metadata_g, x_g), ring)
            common.init_barriers(t.stages, t.warpgroups)(ring["bars"])

            def place(i):
                token0, neuron0 = plan.part(i)
                own = neurons_fp8.load_factors(factors_g, token0)
                return token0, neuron0 + wg * common.PART, own

            def write(i, acc, token0, neuron0, own):
                del i
                stages = (dense_s.at[wg], packed_s.at[wg], y_meta_s.at[wg])
                neurons_fp8.share_factors(own, factors_s.at[wg])
                for chunk in range(neurons.CHUNKS):
                    neurons.await_slot(0 if chunk == 0 else _SLOTS - 1)()
                    for sixteen in (2 * chunk, 2 * chunk + 1):
                        _put(sixteen)(acc, *stages, factors_s.at[wg])
                    _send(chunk)(*stages, y_g, y_values_g, y_meta_g, token0, neuron0)

            def fill():
                outs = [(y_g, 0, 1), (y_values_g, 0, 1), (y_meta_g, EMPTY, 64)]
                common.fill_unused(outs, plan.used * common.TOKENS, blocks, t.warpgroups)

            loop.run(wg, plan.own_tiles, plan.origin, place, write, fill=fill)

    call = common.kernel(
        body,
        (
            jax.ShapeDtypeStruct((rows, live), jnp.bfloat16),
            jax.ShapeDtypeStruct((rows, live // 2), reference.ACTIVATION),
            jax.ShapeDtypeStruct((rows // 64, live // 64, 128), jnp.int32),
        ),
        blocks,
        t.warpgroups,
        "up24_fp8_hopper",
    )
    y2, y2_values, y2_metadata = call(*arguments)
    return y2, y2_values, y2_metadata


def _tile(
    live: int, dtype: Any, x_dtype: Any, config: common.GroupedConfig
) -> common.SparseTile:  # fmt: skip
    staging = _SLOTS * (2 * neurons.PANEL + neurons_fp8.PANEL) + neurons.META_BYTES
    other = staging + neurons_fp8.FACTOR_BYTES
    return neurons.neuron_tile(live, dtype, other, config, b_dtype=x_dtype)


def check_up24_fp8(
    values: jax.Array,
    metadata: jax.Array,
    x_p: jax.Array,
    factors: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    _, v, live = reference.up_dims(values, metadata, x_p, factors, offsets, block_expert)
    common.check_shapes_fp8(v, live, x_p.shape[1])
    _tile(live, values.dtype, x_p.dtype, config or common.GroupedConfig())
