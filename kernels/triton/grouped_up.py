"""Y2 on sparse tensor cores (mma.sp): tokens times packed weights, relu^2, two of four, packing.

Choice and packing are an epilogue in registers, on the float32 accumulators.
"""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from kernels import reference_grouped
from kernels.triton import grouped_common as common
from kernels.triton import grouped_neurons as neurons
from kernels.triton import shared_memory
from kernels.triton.spmm24 import Spmm24Config, tile_order

_EMPTY = 0x44444444  # metadata of zeros: elements 0 and 1 of every group


def up24(
    values: jax.Array,
    metadata: jax.Array,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    config: Spmm24Config | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`kernels.reference_grouped.up24` for weights packed by this backend's `pack_weight24`.

    config: tiling, as of `spmm24` with neurons for m, tokens for n; None takes the
      tuned table, else a heuristic.
    interpret: run in Pallas's interpreter, with jax.numpy in place of the inline PTX.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_up24` does.
    """
    experts, _, live = reference_grouped.up_dims(values, metadata, x_p, offsets, block_expert)
    if not interpret:
        check_up24(values, metadata, x_p, offsets, block_expert, config=config)
    rows, width = x_p.shape
    shape = experts * live, rows // experts
    config = common.sparse_config("up24", config, shape, rows, experts, live, width)
    neurons.check_tile(config)
    return _up24(values, metadata, x_p, offsets, live=live, config=config, interpret=interpret)


def _up24(values, metadata, x, offsets, *, live, config, interpret):
    rows, tile, experts = x.shape[0], config.tile, offsets.shape[0] - 1
    neuron_tiles = pl.cdiv(live, tile.block_m)
    token_tiles = common.num_parts(rows, experts, tile.block_n)

    def kernel(values_ref, metadata_ref, x_ref, offsets_ref, y_ref, y_values_ref, y_metadata_ref):
        neuron_tile, token_tile = tile_order(
            pl.program_id(0), neuron_tiles, token_tiles, config.group_m
        )
        neuron0 = neuron_tile * tile.block_m
        part = common.part(offsets_ref, token_tile, tile.block_n, rows)
        shared_memory.reserve(values_ref, y_ref, tile, emulate=interpret)

        @pl.when(part.expert < experts)
        def _multiply():
            acc, at = neurons.multiply(
                values_ref, metadata_ref, x_ref, part, neuron0, live, tile, emulate=interpret
            )
            for sixteen in range(tile.frags_n // 2):
                for f in range(0, tile.frags_m // 2, 2):
                    nibbles = [
                        _choose(at, acc, f + h, sixteen, y_ref, y_values_ref) for h in range(2)
                    ]
                    at.store_nibbles(y_metadata_ref, nibbles, f, sixteen)

        @pl.when(part.expert == experts)
        def _clear():
            # A row of metadata is 64 tokens.
            for ref, word, by, cols in (
                (y_ref, 0, 1, tile.block_m),
                (y_values_ref, 0, 1, tile.block_m // 2),
                (y_metadata_ref, _EMPTY, 64, tile.block_m * 2),
            ):
                row, end = (lax.div(v, jnp.int32(by)) for v in (part.first, part.end))
                block = common.Block(ref, row, neuron_tile * cols, tile.block_n // by, cols, end)
                common.fill(block, word, tile.threads, emulate=interpret)

    y2, y2_values, y2_metadata = common.call(
        kernel,
        (values, metadata, x, offsets),
        (
            jax.ShapeDtypeStruct((rows, live), x.dtype),
            jax.ShapeDtypeStruct((rows, live // 2), x.dtype),
            jax.ShapeDtypeStruct((rows // 64, 2 * live), jnp.int32),
        ),
        neuron_tiles * token_tiles,
        tile,
        "up24",
        interpret,
    )
    return y2, y2_values, y2_metadata.reshape(rows // 64, live // 64, 128)


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
    metadata: jax.Array,
    x_p: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    config: Spmm24Config | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    del config
    _, v, live = reference_grouped.up_dims(values, metadata, x_p, offsets, block_expert)
    common.check("up24", v, live, x_p.shape[1], values.dtype)
