"""Tokens times packed weights on sparse tensor cores (mma.sp): Y2, or the product as it is.

`up24` adds relu^2, the choice of two of four and packing, an epilogue in registers on the float32
accumulators; `up24_linear` rounds and stores, for gated networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from kernels import reference_grouped
from kernels.triton import grouped_common as common
from kernels.triton import grouped_neurons as neurons
from kernels.triton import ptx, shared_memory
from kernels.triton.spmm24 import Spmm24Config, tile_order

_EMPTY = 0x44444444  # metadata of zeros: elements 0 and 1 of every group


def up24(
    values: jax.Array,
    metadata: jax.Array | None,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    shards: int = 1,
    config: Spmm24Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`kernels.reference_grouped.up24` for weights packed by this backend's `pack_weight24`.

    config: tiling, as of `spmm24` with neurons for m, tokens for n; None takes the
      tuned table, else a heuristic.
    interpret: run in Pallas's interpreter, with jax.numpy in place of the inline PTX.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_up24` does.
    """
    arguments = (values, metadata, x_p, offsets, block_expert)
    if not interpret:
        check_up24(*arguments, shards=shards, config=config)
    y2, y2_values, y2_metadata = _up24("up24", arguments, shards, config, interpret)
    _, _, live = reference_grouped.up_dims(*arguments, shards=shards)
    return y2, y2_values, y2_metadata.reshape(-1, live // 64, 128)


def up24_linear(
    values: jax.Array,
    metadata: jax.Array | None,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    shards: int = 1,
    config: Spmm24Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`kernels.reference_grouped.up24_linear` for weights packed by this backend's `pack_weight24`.

    config, interpret: as for `up24`, whose table of tilings it shares.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_up24` does.
    """
    arguments = (values, metadata, x_p, offsets, block_expert)
    if not interpret:
        check_up24(*arguments, shards=shards, config=config)
    (y,) = _up24("up24_linear", arguments, shards, config, interpret)
    return y


def _up24(name: str, arguments: tuple[Any, ...], shards: int, config, interpret: bool):
    """Results of `up24`, the metadata as (T_pad / 64, 2 h), or the one of `up24_linear`."""
    experts, _, live = reference_grouped.up_dims(*arguments, shards=shards)
    values, metadata, x, offsets, _ = arguments
    operands = [a for a in (values, metadata, x, offsets) if a is not None]
    rows, width = x.shape
    shape = experts * live, rows // experts
    config = common.sparse_config("up24", config, shape, rows, experts, live, width)
    neurons.check_tile(config)
    tile = config.tile.of_dense() if metadata is None else config.tile
    plan = common.Shards(experts, shards, live, tile.block_m)
    combinations, neuron_tiles = experts**shards, plan.tiles
    token_tiles = common.num_parts(rows, combinations, tile.block_n)
    write: Callable[..., None] = _write_chosen if name == "up24" else _write_all
    # Of each result: its shape, the word of unused rows, and the tokens of a row.
    outs = [
        (jax.ShapeDtypeStruct((rows, live), x.dtype), 0, 1),
        (jax.ShapeDtypeStruct((rows, live // 2), x.dtype), 0, 1),
        (jax.ShapeDtypeStruct((rows // 64, 2 * live), jnp.int32), _EMPTY, 64),
    ][: 3 if name == "up24" else 1]

    def kernel(values_ref, *refs):
        metadata_ref, x_ref, offsets_ref, *out_refs = (None, *refs) if tile.dense else refs
        neuron_tile, token_tile = tile_order(
            pl.program_id(0), neuron_tiles, token_tiles, config.group_m
        )
        columns = plan.columns(neuron_tile)
        part = common.part(offsets_ref, token_tile, tile.block_n, rows)
        shared_memory.reserve(values_ref, out_refs[0], tile, emulate=interpret)

        @pl.when(part.expert < combinations)
        def _multiply():
            acc, at = neurons.multiply(
                values_ref, metadata_ref, x_ref, part, columns, tile, emulate=interpret
            )
            write(at, acc, *out_refs)

        @pl.when(part.expert == combinations)
        def _clear():
            for ref, (out, word, by) in zip(out_refs, outs, strict=True):
                cols = tile.block_m * out.shape[1] // live
                row, end = (lax.div(v, jnp.int32(by)) for v in (part.first, part.end))
                block = common.Block(ref, row, columns.column(cols), tile.block_n // by, cols, end)
                common.fill(block, word, tile.threads, emulate=interpret)

    return common.call(
        kernel,
        operands,
        tuple(out for out, *_ in outs),
        neuron_tiles * token_tiles,
        tile,
        name,
        interpret,
    )


def _write_chosen(at: neurons.Neurons, acc, y_ref, y_values_ref, y_metadata_ref) -> None:
    """Chooses and stores a program's neurons and tokens."""
    for sixteen in range(at.tile.frags_n // 2):
        for f in range(0, at.tile.frags_m // 2, 2):
            nibbles = [_choose(at, acc, f + h, sixteen, y_ref, y_values_ref) for h in range(2)]
            at.store_nibbles(y_metadata_ref, nibbles, f, sixteen)


def _write_all(at: neurons.Neurons, acc, y_ref) -> None:
    """Rounds and stores a program's neurons and tokens."""

    def words(f: int, j: int, c: int) -> list[jax.Array]:
        x = neurons.accumulators(acc, at.tile, f, j, c)
        pair = lambda i: ptx.pack_pair(x[i], x[i + 1], y_ref.dtype, emulate=at.emulate)
        return [pair(0), pair(2)]

    for sixteen in range(at.tile.frags_n // 2):
        for f in range(at.tile.frags_m // 2):
            groups = [[words(f, 2 * sixteen + n, c) for c in range(2)] for n in range(2)]
            at.store_dense(y_ref, groups, f, sixteen)


def _choose(at: neurons.Neurons, acc, f: int, sixteen: int, y_ref, y_values_ref) -> list:
    """Chooses in 32 neurons f of 16 tokens and stores them; [n][c], positions that were kept."""
    chosen = [
        [
            neurons.choose(
                neurons.accumulators(acc, at.tile, f, 2 * sixteen + n, c),
                y_ref.dtype,
                emulate=at.emulate,
            )
            for c in range(2)
        ]
        for n in range(2)
    ]
    at.store(y_ref, y_values_ref, [[group for group, _ in row] for row in chosen], f, sixteen)
    return [[nibble for _, nibble in row] for row in chosen]


def check_up24(
    values: jax.Array,
    metadata: jax.Array | None,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    shards: int = 1,
    config: Spmm24Config | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Of `up24_linear` as well. Arguments that contradict one another raise ValueError.
    """
    del config
    arguments = (values, metadata, x_p, offsets, block_expert)
    _, v, live = reference_grouped.up_dims(*arguments, shards=shards)
    common.check("up24", v, live // shards, x_p.shape[1], values.dtype)
