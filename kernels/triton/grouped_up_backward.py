"""dY1 on sparse tensor cores (mma.sp): gradients times packed weights, times 2 sqrt(Y2), packed."""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl

from kernels import reference_grouped
from kernels.triton import grouped_common as common
from kernels.triton import grouped_neurons as neurons
from kernels.triton import shared_memory
from kernels.triton.spmm24 import Spmm24Config, tile_order

# Groups of Y2 in flight ahead of those that are multiplied: 32 neurons of 16 tokens of a warp.
_AHEAD = 2


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
    config: Spmm24Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`kernels.reference_grouped.up24_backward` for this backend's `pack_weight24`.

    config, interpret: as for `up24`.

    Raises ValueError for shapes that do not fit and NotImplementedError where
    `check_up24_backward` does.
    """
    arguments = (values, metadata, dy_p, y2, y2_metadata, offsets, block_expert)
    experts, _, live = reference_grouped.backward_dims(*arguments, shards=shards)
    if not interpret:
        check_up24_backward(*arguments, shards=shards, config=config)
    rows, width = dy_p.shape
    shape = experts * live, rows // experts
    config = common.sparse_config("up24_backward", config, shape, rows, experts, live, width)
    neurons.check_tile(config)
    plan = common.Shards(experts, shards, live, config.tile.block_m)
    return _up24_backward(*arguments[:-1], plan=plan, config=config, interpret=interpret)


def _up24_backward(values, metadata, dy, y2, y2_metadata, offsets, *, plan, config, interpret):
    rows, combinations = dy.shape[0], offsets.shape[0] - 1
    tile = config.tile.of_dense() if metadata is None else config.tile
    neuron_tiles, live = plan.tiles, plan.live
    token_tiles = common.num_parts(rows, combinations, tile.block_n)
    operands = values, metadata, dy, y2, y2_metadata.reshape(rows // 64, 2 * live), offsets

    def kernel(values_ref, *refs):
        metadata_ref, dy_ref, y2_ref, y2_metadata_ref, offsets_ref, *out_refs = (
            (None, *refs) if tile.dense else refs
        )
        out_ref, out_values_ref = out_refs
        neuron_tile, token_tile = tile_order(
            pl.program_id(0), neuron_tiles, token_tiles, config.group_m
        )
        columns = plan.columns(neuron_tile)
        part = common.part(offsets_ref, token_tile, tile.block_n, rows)
        shared_memory.reserve(values_ref, out_ref, tile, emulate=interpret)

        def rows_of(ref, cols: int) -> common.Block:
            col = columns.column(cols)
            return common.Block(ref, part.first, col, tile.block_n, cols, part.end)

        @pl.when(part.expert < combinations)
        def _multiply():
            # What the epilogue needs is read from memory meanwhile.
            common.prefetch(rows_of(y2_ref, tile.block_m), tile.threads, emulate=interpret)
            acc, at = neurons.multiply(
                values_ref, metadata_ref, dy_ref, part, columns, tile, emulate=interpret
            )
            places = [
                (f, sixteen)
                for sixteen in range(tile.frags_n // 2)
                for f in range(tile.frags_m // 2)
            ]
            # Loads run ahead of the stores before them.
            loaded = [_load(at, *place, y2_ref, y2_metadata_ref) for place in places[:_AHEAD]]
            for i, place in enumerate(places):
                groups = _scale(at, acc, *place, loaded.pop(0), y2_ref.dtype)
                if i + _AHEAD < len(places):
                    loaded.append(_load(at, *places[i + _AHEAD], y2_ref, y2_metadata_ref))
                at.store(out_ref, out_values_ref, groups, *place)

        @pl.when(part.expert == combinations)
        def _clear():
            for ref, cols in ((out_ref, tile.block_m), (out_values_ref, tile.block_m // 2)):
                common.fill(rows_of(ref, cols), 0, tile.threads, emulate=interpret)

    dy1, dy1_values = common.call(
        kernel,
        [a for a in operands if a is not None],
        (
            jax.ShapeDtypeStruct((rows, live), dy.dtype),
            jax.ShapeDtypeStruct((rows, live // 2), dy.dtype),
        ),
        neuron_tiles * token_tiles,
        tile,
        "up24_backward",
        interpret,
    )
    return dy1, dy1_values


def _load(at: neurons.Neurons, f: int, sixteen: int, y2_ref, y2_metadata_ref) -> tuple:
    """Y2 (two words) and kept positions of the groups of 32 neurons f and 16 tokens: [n][c]."""
    y2 = [[at.load(y2_ref, f, 2 * sixteen + n, c) for c in range(2)] for n in range(2)]
    nibbles = [at.load_nibbles(y2_metadata_ref, f, sixteen, c) for c in range(2)]
    return y2, [[nibbles[c][n] for c in range(2)] for n in range(2)]


def _scale(at: neurons.Neurons, acc, f: int, sixteen: int, loaded: tuple, dtype: Any) -> list:
    """dY1 of 32 neurons f and 16 tokens: [n][c], `Group`s."""
    y2, nibbles = loaded
    return [
        [
            neurons.scale(
                neurons.accumulators(acc, at.tile, f, 2 * sixteen + n, c),
                y2[n][c],
                nibbles[n][c],
                dtype,
                emulate=at.emulate,
            )
            for c in range(2)
        ]
        for n in range(2)
    ]


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
    config: Spmm24Config | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    del config
    arguments = (values, metadata, dy_p, y2, y2_metadata, offsets, block_expert)
    _, v, live = reference_grouped.backward_dims(*arguments, shards=shards)
    common.check("up24_backward", v, live // shards, dy_p.shape[1], values.dtype)
