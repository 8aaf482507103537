"""The token embedding where its table lives: rows travel, the table does not."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from sparsejax.sharding import current_mesh, row_major
from train.mesh import FFN_AXES, SPECS


def embed(table: jax.Array, tokens: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Rows of the embedding: (V, D) float32 and (B, S) int32 to (B, S, D) in `dtype`.

    On a mesh every device looks up its columns, and its rows of the vocabulary, for the tokens of
    all devices along fsdp; an all-to-all gives each device whole rows for its own tokens. That
    moves T D numbers instead of V D for a gathered table, and the gradient is summed where it is
    stored.
    """
    mesh = current_mesh(FFN_AXES)
    if mesh is None:
        return table[tokens].astype(dtype)
    like = (table.shape, jnp.dtype(table.dtype))
    return _embed(table, tokens, jnp.dtype(dtype), mesh, like)


def _own_rows(table_rows: int, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Row numbers in this device's part of the table for all tokens along fsdp, and which are
    there."""
    tokens = jax.lax.all_gather(tokens, FFN_AXES.shard, axis=0, tiled=True)
    rows = tokens - table_rows * jax.lax.axis_index(FFN_AXES.tensor)
    here = (rows >= 0) & (rows < table_rows)
    return jnp.where(here, rows, 0), here[..., None]


def _swap(x: jax.Array, split: int, join: int) -> jax.Array:
    return jax.lax.all_to_all(x, FFN_AXES.shard, split_axis=split, concat_axis=join, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _embed(
    table: jax.Array,
    tokens: jax.Array,
    dtype: jnp.dtype,
    mesh: AbstractMesh,
    like: tuple[tuple[int, ...], jnp.dtype],
) -> jax.Array:
    del like

    def local(table, tokens):
        rows, here = _own_rows(table.shape[0], tokens)
        found = jnp.where(here, table[rows].astype(dtype), 0)
        return row_major(jax.lax.psum(_swap(found, 0, 2), FFN_AXES.tensor))

    batch = P(FFN_AXES.batch)
    return jax.shard_map(
        local, mesh=mesh, in_specs=(SPECS["embedding"], batch), out_specs=batch, check_vma=False
    )(table, tokens)


def _embed_fwd(table, tokens, dtype, mesh, like):
    return _embed(table, tokens, dtype, mesh, like), tokens


def _embed_bwd(dtype, mesh, like, tokens, g):
    (vocabulary, width), table_dtype = like
    tensor, shard = (mesh.shape[axis] for axis in (FFN_AXES.tensor, FFN_AXES.shard))
    part = (vocabulary // tensor, width // shard)

    def local(tokens, g):
        rows, here = _own_rows(part[0], tokens)
        g = jnp.where(here, _swap(row_major(g), 2, 0).astype(table_dtype), 0)
        total = jnp.zeros(part, table_dtype).at[rows].add(g)
        return jax.lax.psum(total, tuple(a for a in FFN_AXES.batch if a != FFN_AXES.shard))

    batch = P(FFN_AXES.batch)
    grad = jax.shard_map(
        local, mesh=mesh, in_specs=(batch, batch), out_specs=SPECS["embedding"], check_vma=False
    )(tokens, g)
    return grad, None


_embed.defvjp(_embed_fwd, _embed_bwd)
