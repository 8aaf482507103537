"""dY1 from 8-bit gradients and packed weights: `kernels.hopper.grouped_up_backward` with factors.

dY1 leaves twice: in bfloat16 for the weight gradient, and packed in e5m2 for the product that
follows.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from kernels import reference_grouped_fp8 as reference
from kernels.groups24 import SCALE_SCALED, WIDENINGS
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_neurons as neurons
from kernels.hopper import grouped_neurons_fp8 as neurons_fp8
from kernels.hopper import ptx
from kernels.hopper.grouped_up_backward import await_part, prefetch_part, send_part

_SLOTS = 2  # staging buffers for packed results, of 32 tokens, of a warpgroup
_PANEL = common.TOKENS * neurons.ROW  # of a part's dense staging: 64 neurons


def _scale(dense: list[ir.Value], x: list[ir.Value], nibble: ir.Value, factor: ir.Value):
    """Two words of dY1 of a group and the word of its kept pair, as `SCALE_SCALED` says."""
    i32 = ptx.i32_type()
    struct = llvm.StructType.get_literal([i32] * 3)
    text = SCALE_SCALED.replace("WIDEN", WIDENINGS["bf16"]).replace("DTYPE", "bf16")
    constraints = "=&r,=&r,=&r,r,r,f,f,f,f,r,f"
    # With side effects, to stay in its place: all at once would delay the first stores.
    out = ptx.asm(struct, [*dense, *x, nibble, factor], text, constraints)
    first, second, pair = (llvm.extractvalue(i32, out, [i]) for i in range(3))
    return [first, second], pair


def _put(sixteen: int):
    """Turns the staged Y2 of 16 tokens into dY1, and stages it packed as well."""

    @plgpu.inline_mgpu(arg_types=(common.ACC, *(common.REF,) * 4))
    def put(ctx, acc, dense_s, packed_s, meta_s, factors_s):
        del ctx
        place = neurons.Place()
        groups = neurons.groups(acc, sixteen)
        factors = neurons_fp8.factors_of(place, factors_s, sixteen)
        i32 = ptx.i32_type()
        two = llvm.StructType.get_literal([i32, i32])
        load_two = lambda address, offset: [
            llvm.extractvalue(i32, loaded, [i])
            for loaded in [
                ptx.asm(
                    two,
                    [address],
                    f"ld.shared.v2.b32 {{$0, $1}}, [$2+{offset}];",
                    "=r,=r,r,~{memory}",
                )
            ]
            for i in range(2)
        ]
        staged = common.add(ptx.shared_address(dense_s), sixteen * 16 * neurons.ROW)
        slot, half = sixteen // 2 % _SLOTS, sixteen % 2 * 16
        packed = slot * neurons_fp8.PANEL + half * neurons_fp8.ROW
        packed = common.add(ptx.shared_address(packed_s), packed)
        for j in range(2):
            words = load_two(neurons_fp8.metadata_address(place, meta_s, sixteen, j), 0)
            own = neurons_fp8.nibbles(place, words)
            for n in range(2):
                address = common.add(staged, place.dense(j, _PANEL))
                dense = load_two(address, n * 8 * neurons.ROW)
                results, pair = _scale(dense, groups[n][j], own[n], factors[n][j][0])
                neurons_fp8.store(
                    *(place, n, j, results, pair, factors[n][j][1], "e5m2"),
                    *(staged, packed, _PANEL),
                )

    return put


def up24_backward_fp8(
    values: jax.Array,
    metadata: jax.Array,
    dy_p: jax.Array,
    factors: jax.Array,
    y2: jax.Array,
    y2_metadata: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    config: common.GroupedConfig | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.reference_grouped_fp8.up24_backward_fp8` for this backend's `pack_weight24_fp8`.

    Raises ValueError for shapes that do not fit and NotImplementedError where
    `check_up24_backward_fp8` does.
    """
    arguments = (values, metadata, dy_p, factors, y2, y2_metadata, offsets, block_expert)
    check_up24_backward_fp8(*arguments, config=config)
    config = config or common.GroupedConfig()
    _, v, live = reference.backward_dims(*arguments)
    rows, width = dy_p.shape
    t = _tile(live, values.dtype, dy_p.dtype, config)
    blocks = neurons.blocks_of(t, rows, live)

    def body(
        values_g, metadata_g, dy_g, factors_g, y2_g, y2_meta_g, offsets_g, expert_g, out_g,
        out_values_g,
    ):  # fmt: skip
        @functools.partial(
            pl.run_scoped,
            **t.scratch(),
            dense_s=plgpu.SMEM((t.warpgroups, 2, common.TOKENS, 64), jnp.bfloat16),
            packed_s=plgpu.SMEM((t.warpgroups, _SLOTS, neurons.CHUNK, 64), reference.GRADIENT),
            y2_meta_s=plgpu.SMEM((t.warpgroups, 2, 2, 128), jnp.int32),
            factors_s=plgpu.SMEM((t.warpgroups, common.TOKENS, 2), jnp.float32),
            collective_axes="wg",
        )
        def _scope(dense_s, packed_s, y2_meta_s, factors_s, **ring):
            wg = lax.axis_index("wg")
            plan = neurons.plan_of(t, live, blocks, config, v, offsets_g, expert_g)
            loop = common.Loop(t, width // t.tile_k, (values_g, metadata_g, dy_g), ring)
            bars = ring["bars"]
            common.init_barriers(t.stages, t.warpgroups, t.spare)(bars)
            staged = lambda: (dense_s.at[wg], packed_s.at[wg])

            def place(i):
                token0, neuron0 = plan.part(i)
                own = neurons_fp8.load_factors(factors_g, token0)
                return token0, neuron0 + wg * common.PART, own

            def prefetch(token0, neuron0, own):
                del own
                prefetch_part(t)(
                    y2_g, y2_meta_g, dense_s.at[wg], y2_meta_s.at[wg], bars, token0, neuron0
                )

            def write(i, acc, token0, neuron0, own):
                neurons_fp8.share_factors(own, factors_s.at[wg])
                await_part(t)(bars, i & 1)
                for chunk in range(neurons.CHUNKS):
                    if chunk >= _SLOTS:
                        neurons.await_slot(_SLOTS - 1)()
                    for sixteen in (2 * chunk, 2 * chunk + 1):
                        _put(sixteen)(acc, *staged(), y2_meta_s.at[wg], factors_s.at[wg])
                    send_part(chunk, neurons_fp8.store_chunk)(
                        *staged(), out_g, out_values_g, token0, neuron0
                    )

            def fill():
                outs = [(out_g, 0, 1), (out_values_g, 0, 1)]
                common.fill_unused(outs, plan.used * common.TOKENS, blocks, t.warpgroups)

            own = plan.own_tiles
            loop.run(wg, own, plan.origin, place, write, prefetch=prefetch, fill=fill)

    call = common.kernel(
        body,
        (
            jax.ShapeDtypeStruct((rows, live), jnp.bfloat16),
            jax.ShapeDtypeStruct((rows, live // 2), reference.GRADIENT),
        ),
        blocks,
        t.warpgroups,
        "up24_backward_fp8_hopper",
    )
    dy1, dy1_values = call(*arguments)
    return dy1, dy1_values


def _tile(
    live: int, dtype: Any, dy_dtype: Any, config: common.GroupedConfig
) -> common.SparseTile:  # fmt: skip
    dense = 2 * _PANEL + neurons.META_BYTES
    other = dense + _SLOTS * neurons_fp8.PANEL + neurons_fp8.FACTOR_BYTES
    return neurons.neuron_tile(live, dtype, other, config, barriers=True, b_dtype=dy_dtype)


def check_up24_backward_fp8(
    values: jax.Array,
    metadata: jax.Array,
    dy_p: jax.Array,
    factors: jax.Array,
    y2: jax.Array,
    y2_metadata: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    _, v, live = reference.backward_dims(
        values, metadata, dy_p, factors, y2, y2_metadata, offsets, block_expert
    )
    common.check_shapes_fp8(v, live, dy_p.shape[1])
    _tile(live, values.dtype, dy_p.dtype, config or common.GroupedConfig())
