"""Weights for the grouped products: threshold, scale, pack, split by expert, in one pass.

A thread makes one word of metadata, 16 elements of two neurons, as in `pack24`; rows come from
where `row_order` and the interleaving of experts say.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from kernels import reference_grouped
from kernels.triton import grouped_common as common
from kernels.triton import grouped_neurons as neurons
from kernels.triton import ptx
from kernels.triton.pack24 import load_16, select

_THREADS = 128  # words of metadata of a 64 x 64 tile


def pack_weight24(
    w: jax.Array,
    *,
    num_experts: int,
    m: int,
    scale: ArrayLike | None,
    threshold: bool = True,
    dtype: Any = jnp.bfloat16,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """`kernels.reference_grouped.pack_weight24`; rows of an expert in the order of `row_order`.

    interpret: run in Pallas's interpreter, with jax.numpy in place of the inline PTX.

    Raises ValueError for shapes that do not fit and NotImplementedError where
    `check_pack_weight24` does.
    """
    options: dict[str, Any] = {"num_experts": num_experts, "m": m, "scale": scale, "dtype": dtype}
    live, width = reference_grouped.weight_dims(w, num_experts, m, scale)
    if not interpret:
        check_pack_weight24(w, threshold=threshold, **options)
    if not threshold:
        del options["m"]
        return reference_grouped.pack_whole(w, neurons.row_order, **options)
    scales = [] if scale is None else [jnp.asarray(scale, jnp.float32).reshape(1)]
    values, metadata, dense = _pack_weight24(
        w, *scales, live=live, dtype=jnp.dtype(dtype), interpret=interpret
    )
    return (
        values,
        metadata.reshape(w.shape[0] // 64, width // 64, 128),
        dense.reshape(num_experts, live, width),
    )


def _pack_weight24(w, *scales, live, dtype, interpret):
    hidden, width = w.shape
    experts, tiles_k = hidden // live, width // 64

    def kernel(w_ref, *rest):
        *scale_ref, values_ref, metadata_ref, dense_ref = rest
        tile_m = lax.div(pl.program_id(0), jnp.int32(tiles_k))
        tile_k = lax.rem(pl.program_id(0), jnp.int32(tiles_k))
        word = lax.broadcasted_iota(jnp.int32, (_THREADS,), 0)
        warp, q = word // 32, word % 32 // 4
        row, col = 64 * tile_m + 16 * warp + q, 64 * tile_k + word % 4 * 16
        # The neuron of the row, experts one after the other, by `row_order`, and where it comes
        # from: neurons of the row below (8 rows on) and of this one are neighbours.
        neuron = 64 * tile_m + 32 * (warp // 2) + 4 * q + 2 * (warp % 2)
        expert, local = lax.div(neuron, jnp.int32(live)), lax.rem(neuron, jnp.int32(live))
        source = (local >> 2) * (4 * experts) + 4 * expert + (local & 3)
        on = jnp.ones((_THREADS,), jnp.int32)
        loaded = [load_16(w_ref, source + half, col, 1, interpret) for half in range(2)]
        metadata = jnp.zeros((_THREADS,), jnp.uint32)
        for half, elements in enumerate(loaded):
            pairs, dense = [], []
            for g in range(4):
                first, second, nibble = select(
                    elements[4 * g : 4 * g + 4], "soft_threshold", w_ref.dtype
                )
                metadata |= nibble << (16 * half + 4 * g)
                if scale_ref:
                    first, second = first * scale_ref[0][0], second * scale_ref[0][0]
                pair = ptx.pack_pair(first, second, dtype, emulate=interpret)
                pairs.append(pair)
                dense += _spread(pair, nibble)
            for ref, at, at_col, words in (
                (values_ref, row + 8 * half, col // 2, pairs),
                (dense_ref, neuron + half, col, dense[:4]),
                (dense_ref, neuron + half, col + 8, dense[4:]),
            ):
                ptx.store_words(ref, at, at_col, words, on, emulate=interpret)
        metadata_row, at_col = jnp.full((_THREADS,), tile_m), 128 * tile_k + word
        ptx.store_words(metadata_ref, metadata_row, at_col, [metadata], on, emulate=interpret)

    return pl.pallas_call(
        kernel,
        grid=(hidden // 64 * tiles_k,),
        out_shape=(
            jax.ShapeDtypeStruct((hidden, width // 2), dtype),
            jax.ShapeDtypeStruct((hidden // 64, 2 * width), jnp.int32),
            jax.ShapeDtypeStruct((hidden, width), dtype),
        ),
        compiler_params=plt.CompilerParams(num_warps=_THREADS // 32, num_stages=1),
        interpret=interpret,
        name="pack_weight24",
    )(w, *scales)


def _spread(pair: jax.Array, nibble: jax.Array) -> list[jax.Array]:
    """The two words of four elements, of which the nibble's two are a pair and the others zero."""
    first, second, none = pair & 0xFFFF, pair >> 16, jnp.zeros_like(pair)
    elements = [
        jnp.where((nibble & 3) == i, first, jnp.where((nibble >> 2) == i, second, none))
        for i in range(4)
    ]
    return [elements[0] | (elements[1] << 16), elements[2] | (elements[3] << 16)]


def check_pack_weight24(
    w: jax.Array,
    *,
    num_experts: int,
    m: int,
    scale: ArrayLike | None,
    threshold: bool = True,
    dtype: Any = jnp.bfloat16,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that are never allowed raise ValueError.
    """
    del threshold
    live, width = reference_grouped.weight_dims(w, num_experts, m, scale)
    common.check("pack_weight24", 64, live, width, dtype)
    if w.dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise NotImplementedError(
            f"triton pack_weight24 takes float32, bfloat16 or float16, not {w.dtype=}"
        )
