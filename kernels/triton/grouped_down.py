"""2:4 activations times the weights of each token's expert, on sparse tensor cores (mma.sp)."""

from __future__ import annotations

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp

from kernels import reference_grouped
from kernels.combinations import expert_number
from kernels.triton import grouped_common as common
from kernels.triton import mainloop, output, shared_memory
from kernels.triton.spmm24 import Spmm24Config, tile_order


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
    config: Spmm24Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`kernels.reference_grouped.down24`.

    config: tiling, as of `spmm24` with tokens for m, columns for n; None takes the
      tuned table, else a heuristic.
    interpret: run in Pallas's interpreter, with jax.numpy in place of the inline PTX.

    Raises ValueError for shapes that do not fit and NotImplementedError where `check_down24` does.
    """
    arguments = (y_values, y_metadata, w, offsets, block_expert)
    experts, _ = reference_grouped.down_dims(*arguments, permutation, tokens, shards=shards)
    if not interpret:
        check_down24(
            *arguments, permutation=permutation, tokens=tokens, shards=shards, config=config
        )
    rows, shape = y_values.shape[0], (y_values.shape[0], w.shape[2])
    sizes = experts, shards * w.shape[1], w.shape[2]
    config = common.sparse_config("down24", config, shape, rows, *sizes)
    return _down24(
        y_values,
        y_metadata,
        w.reshape(-1, w.shape[2]),
        offsets,
        permutation,
        experts=experts,
        shards=shards,
        tokens=tokens,
        config=config,
        interpret=interpret,
    )


def _down24(
    values, metadata, w, offsets, permutation, *, experts, shards, tokens, config, interpret
):
    rows, of_shard = values.shape[0], 2 * values.shape[1] // shards
    tile, combinations, width = config.tile, offsets.shape[0] - 1, w.shape[1]
    token_tiles = common.num_parts(rows, combinations, tile.block_m)
    column_tiles = pl.cdiv(width, tile.block_n)

    def kernel(values_ref, metadata_ref, w_ref, offsets_ref, *rest):
        *permutation_ref, out_ref = rest
        token_tile, column_tile = tile_order(
            pl.program_id(0), token_tiles, column_tiles, config.group_m
        )
        column0 = column_tile * tile.block_n
        part = common.part(offsets_ref, token_tile, tile.block_m, rows)
        shared_memory.reserve(values_ref, out_ref, tile, emulate=interpret)

        def to_token(row: jax.Array, valid: jax.Array) -> tuple[jax.Array, jax.Array]:
            token = plt.load(permutation_ref[0].at[jnp.minimum(row, rows - 1)])
            return token, valid & (token < tokens).astype(jnp.int32)

        @pl.when(part.expert < combinations)
        def _multiply():
            numbers = [
                expert_number(part.expert, jnp.int32(s), experts, shards) for s in range(shards)
            ]
            acc = mainloop.accumulate(
                values_ref,
                metadata_ref,
                w_ref,
                part.first,
                column0,
                tile,
                b_layout="kn",
                b_rows=[number * of_shard for number in numbers],
                aligned=False,
                emulate=interpret,
            )
            output.store_tile(
                out_ref,
                acc,
                output.place(part.first, column0, tile),
                tile,
                limits=(part.end, width),
                target=to_token if permutation_ref else None,
                emulate=interpret,
            )

        # In the order of tokens there are no unused rows.
        if not permutation_ref:

            @pl.when(part.expert == combinations)
            def _clear():
                block = common.Block(
                    out_ref, part.first, column0, tile.block_m, tile.block_n, part.end
                )
                common.fill(block, 0, tile.threads, emulate=interpret)

    operands = (values, metadata, w, offsets, *([] if permutation is None else [permutation]))
    return common.call(
        kernel,
        operands,
        jax.ShapeDtypeStruct((rows if tokens is None else tokens, width), w.dtype),
        token_tiles * column_tiles,
        tile,
        "down24",
        interpret,
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
    config: Spmm24Config | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    del config
    arguments = (y_values, y_metadata, w, offsets, block_expert)
    _, v = reference_grouped.down_dims(*arguments, permutation, tokens, shards=shards)
    common.check("down24", v, w.shape[1], w.shape[2], w.dtype)
