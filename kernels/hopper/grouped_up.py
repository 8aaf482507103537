"""Tokens times packed weights on sparse tensor cores: Y2 in one kernel, or the product as it is.

`up24` adds relu^2, two of four and packing; `up24_linear` rounds and stores, for gated networks.
What bounds both is the main loop's shared-memory bandwidth; the epilogue of `up24`, about 40
instructions for each four neurons of a token, comes on top.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

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
_LINEAR_PANELS = 2  # of 64 neurons, in a staging buffer of `up24_linear`
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


def _put_linear(sixteen: int, dtype: str):
    """Rounds and stages 16 tokens."""

    @plgpu.inline_mgpu(arg_types=(common.ACC, common.REF))
    def put(ctx, acc, out_s):
        del ctx
        place = neurons.Place()
        groups = neurons.groups(acc, sixteen)
        slot = sixteen // 2 % _SLOTS * _LINEAR_PANELS * neurons.PANEL
        slot += sixteen % 2 * 16 * neurons.ROW
        staged = common.add(ptx.shared_address(out_s), slot)
        for j in range(2):
            for n in range(2):
                x = groups[n][j]
                words = [ptx.pack_pair(x[i], x[i + 1], dtype) for i in (0, 2)]
                neurons.store_dense(place, n, j, words, staged, neurons.PANEL)

    return put


def _send_linear(chunk: int):
    """Stores a staged chunk to global memory."""

    @plgpu.inline_mgpu(arg_types=(*(common.REF,) * 2, common.SCALAR, common.SCALAR))
    def send(ctx, out_s, y_g, token0, neuron0):
        token0, neuron0 = map(common.scalar, (token0, neuron0))
        ptx.fence_async_shared()
        utils.warpgroup_barrier()
        slot = utils.memref_slice(out_s, chunk % _SLOTS)
        panels = [utils.memref_slice(slot, i) for i in range(_LINEAR_PANELS)]
        token = common.add(token0, chunk * neurons.CHUNK)
        neurons.store_panels(ctx, panels, y_g, token, neuron0, arrive=True)

    return send


class _Epilogue(NamedTuple):
    """What becomes of a part's accumulators.

    Attributes:
      name: of the kernel.
      outs: shapes of the results.
      fills: of each of them, the 32-bit word that unused rows hold, and the tokens of an entry.
      scratch: staging buffers, with an axis over the compute warpgroups in front.
      write: called with accumulators, the warpgroup's buffers, the results in global memory, and
        the part's first token and neuron.
    """

    name: str
    outs: Sequence[jax.ShapeDtypeStruct]
    fills: Sequence[tuple[int, int]]
    scratch: dict[str, Any]
    write: Callable[..., None]


def _choice(rows: int, live: int, dtype: Any, t: common.SparseTile) -> _Epilogue:
    """relu^2, two of four, packing."""

    def write(acc, staged, outs, token0, neuron0):
        stage, stage_meta = staged["out_s"], staged["y_meta_s"]
        for chunk in range(neurons.CHUNKS):
            neurons.await_slot(0 if chunk == 0 else _SLOTS - 1)()
            for sixteen in (2 * chunk, 2 * chunk + 1):
                _put(sixteen, common.ptx_name(dtype))(acc, stage, stage_meta)
            _send(chunk)(stage, stage_meta, *outs, token0, neuron0)

    return _Epilogue(
        "up24_hopper",
        (
            jax.ShapeDtypeStruct((rows, live), dtype),
            jax.ShapeDtypeStruct((rows, live // 2), dtype),
            jax.ShapeDtypeStruct((rows // 64, live // 64, 128), jnp.int32),
        ),
        ((0, 1), (0, 1), (EMPTY, 64)),
        {
            "out_s": plgpu.SMEM((t.warpgroups, _SLOTS, 3, neurons.CHUNK, 64), dtype),
            "y_meta_s": plgpu.SMEM((t.warpgroups, 2, 2, 128), jnp.int32),
        },
        write,
    )


def _rounding(rows: int, live: int, dtype: Any, t: common.SparseTile) -> _Epilogue:
    """The product as it is."""

    def write(acc, staged, outs, token0, neuron0):
        for chunk in range(neurons.CHUNKS):
            # Also of the part before: with two slots, all but the latest chunk must have left.
            neurons.await_slot(_SLOTS - 1)()
            for sixteen in (2 * chunk, 2 * chunk + 1):
                _put_linear(sixteen, common.ptx_name(dtype))(acc, staged["out_s"])
            _send_linear(chunk)(staged["out_s"], *outs, token0, neuron0)

    staging = (t.warpgroups, _SLOTS, _LINEAR_PANELS, neurons.CHUNK, 64)
    return _Epilogue(
        "up24_linear_hopper",
        (jax.ShapeDtypeStruct((rows, live), dtype),),
        ((0, 1),),
        {"out_s": plgpu.SMEM(staging, dtype)},
        write,
    )


def up24(
    values: jax.Array,
    metadata: jax.Array | None,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
    config: common.GroupedConfig | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`kernels.reference_grouped.up24` for weights packed by this backend's `pack_weight24`.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_up24` does.
    """
    arguments = (values, metadata, x_p, offsets, block_expert)
    check_up24(*arguments, shards=shards, shared_every=shared_every, config=config)
    config = config or common.GroupedConfig()
    y2, y2_values, y2_metadata = _run(
        arguments, _tile, _choice, config, shards=shards, shared_every=shared_every
    )
    return y2, y2_values, y2_metadata


def up24_linear(
    values: jax.Array,
    metadata: jax.Array | None,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
    config: common.GroupedConfig | None = None,
) -> jax.Array:
    """`kernels.reference_grouped.up24_linear` for weights packed by this backend's `pack_weight24`.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_up24` does, or
    where the stages of a configuration do not fit.
    """
    arguments = (values, metadata, x_p, offsets, block_expert)
    check_up24(*arguments, shards=shards, shared_every=shared_every)
    config = config or common.GroupedConfig()
    (y,) = _run(
        arguments, _linear_tile, _rounding, config, shards=shards, shared_every=shared_every
    )
    return y


def _run(
    arguments: tuple[Any, ...],
    tile: Callable[..., common.SparseTile],
    epilogue: Callable[..., _Epilogue],
    config: common.GroupedConfig,
    *,
    shards: int,
    shared_every: int,
) -> Sequence[jax.Array]:
    experts, v, live = reference_grouped.up_dims(
        *arguments, shards=shards, shared_every=shared_every
    )
    sizes = neurons.sizes_of(live, experts, shards=shards, shared_every=shared_every)
    values, metadata, x_p, *_ = arguments
    rows, width = x_p.shape
    t = tile(neurons.tiled(live, shards, sizes), values.dtype, config, metadata is None)
    blocks = neurons.blocks_of(t, rows, live)
    e = epilogue(rows, live, x_p.dtype, t)

    def body(values_g, *refs_g):
        metadata_g, x_g, offsets_g, expert_g, *outs_g = (values_g, *refs_g) if t.dense else refs_g

        @functools.partial(pl.run_scoped, **t.scratch(), **e.scratch, collective_axes="wg")
        def _scope(**refs):
            wg = lax.axis_index("wg")
            ring = {name: refs[name] for name in t.scratch()}
            layout = offsets_g, expert_g, experts, shards, sizes
            plan = neurons.plan_of(t, live, blocks, config, v, *layout)
            loop = common.Loop(t, width // t.tile_k, (values_g, metadata_g, x_g), ring)
            common.init_barriers(t.stages, t.warpgroups)(ring["bars"])

            def place(i):
                token0, neuron0 = plan.part(i)
                return token0, neuron0 + wg * common.PART

            def write(i, acc, token0, neuron0):
                del i
                staged = {name: refs[name].at[wg] for name in e.scratch}
                e.write(acc, staged, outs_g, token0, neuron0)

            def fill():
                outs = [(out, *fill) for out, fill in zip(outs_g, e.fills, strict=True)]
                common.fill_unused(outs, plan.used * common.TOKENS, blocks, t.warpgroups)

            loop.run(wg, plan.own_tiles, plan.origin, place, write, fill=fill)

    given = [a for a in arguments if a is not None]
    return common.kernel(body, tuple(e.outs), blocks, t.warpgroups, e.name)(*given)


def _tile(
    live: int, dtype: Any, config: common.GroupedConfig, dense: bool = False
) -> common.SparseTile:
    staging = _SLOTS * 3 * neurons.PANEL + neurons.META_BYTES
    return neurons.neuron_tile(live, dtype, staging, config, dense=dense)


def _linear_tile(
    live: int, dtype: Any, config: common.GroupedConfig, dense: bool
) -> common.SparseTile:
    staging = _SLOTS * _LINEAR_PANELS * neurons.PANEL
    return neurons.neuron_tile(live, dtype, staging, config, dense=dense)


def check_up24(
    values: jax.Array,
    metadata: jax.Array | None,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Of `up24_linear` as well, but for a configuration, whose stages fit more easily there. Arguments
    that contradict one another raise ValueError.
    """
    arguments = (values, metadata, x_p, offsets, block_expert)
    experts, v, live = reference_grouped.up_dims(
        *arguments, shards=shards, shared_every=shared_every
    )
    common.check_shapes(v, live // shards, x_p.shape[1], values.dtype)
    common.check_shards(experts, shards)
    of_tile = neurons.tiled(
        live, shards, neurons.sizes_of(live, experts, shards=shards, shared_every=shared_every)
    )
    _tile(of_tile, values.dtype, config or common.GroupedConfig(), metadata is None)
