"""V:N:M sparsity: in every V x M block four columns live, and each row keeps two of those four.

The format of Venom (arXiv 2310.02065) with N = 2: V rows share the column choice, so a block's live
columns, gathered, form a matrix that is 2:4 and that sparse tensor cores can read. M = 8, 16 and 32
keep 1/4, 1/8 and 1/16 of the elements.
"""

from __future__ import annotations

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from sparsejax.prune import select24
from sparsejax.spec import GROUP


def kept_pairs(keep: Array, *arrays: Array) -> tuple[Array, ...]:
    """The two kept elements of each four of every array, and their positions.

    Args:
      keep: (..., K) bool, two True in each four of the last axis (`select24`).
      arrays: (..., K).

    Returns:
      For each array (..., K / 2), the kept elements in increasing index; last, (..., K / 4) uint8,
      i0 | i1 << 2.
    """
    groups = (*keep.shape[:-1], keep.shape[-1] // GROUP, GROUP)
    order = jnp.argsort(~keep.reshape(groups), axis=-1, stable=True)[..., :2]
    pairs = (
        jnp.take_along_axis(a.reshape(groups), order, axis=-1).reshape(*a.shape[:-1], -1)
        for a in arrays
    )
    return *pairs, (order[..., 0] | order[..., 1] << 2).astype(jnp.uint8)


def spread_pairs(pairs: Array, positions: Array) -> Array:
    """Inverse of `kept_pairs` for one array: (..., K) with zeros between. Exact."""
    place = jnp.arange(GROUP, dtype=jnp.uint8)
    pairs = pairs.reshape(*positions.shape, 2)
    zero = jnp.zeros((), pairs.dtype)
    spread = jnp.where((positions >> 2)[..., None] == place, pairs[..., 1:], zero)
    spread = jnp.where((positions & 3)[..., None] == place, pairs[..., :1], spread)
    return spread.reshape(*positions.shape[:-1], -1)


def _check(shape: tuple[int, ...], v: int, m: int) -> tuple[int, int]:
    """Number of row blocks and of column blocks."""
    if len(shape) != 2:
        raise ValueError(f"{shape=} must be that of a matrix")
    rows, cols = shape
    if m < GROUP or m % GROUP or m > 256:
        raise ValueError(f"{m=} must be a multiple of {GROUP} up to 256")
    if v < 1 or rows < 1 or rows % v:
        raise ValueError(f"{rows=} must be a positive multiple of {v=}, at least 1")
    if cols < 1 or cols % m:
        raise ValueError(f"{cols=} must be a positive multiple of {m=}")
    return rows // v, cols // m


def _check_columns(columns: Array, shape: tuple[int, ...], v: int, m: int) -> None:
    row_blocks, col_blocks = _check(shape, v, m)
    allowed = ((row_blocks, col_blocks, GROUP), (row_blocks, 1, GROUP))
    if columns.shape not in allowed:
        raise ValueError(f"{columns.shape=} must be one of {allowed}")


@partial(jax.jit, static_argnames=("v", "m"))
def choose_columns(x: Array, *, v: int, m: int) -> Array:
    """The four columns of each V x M block with the largest sum of magnitudes.

    Args:
      x: (R, C) floating point, R a multiple of v, C of m; sums in float32, ties to the lower index.

    Returns:
      (R / V, C / M, 4) uint8, increasing in the last axis.
    """
    row_blocks, col_blocks = _check(x.shape, v, m)
    mass = jnp.sum(jnp.abs(x.astype(jnp.float32)).reshape(row_blocks, v, col_blocks, m), axis=1)
    # A block with a NaN keeps it in sight.
    mass = jnp.where(jnp.isnan(mass), jnp.inf, mass)
    largest = jnp.argsort(-mass, axis=-1, stable=True)[..., :GROUP]
    return jnp.sort(largest, axis=-1).astype(jnp.uint8)


@partial(jax.jit, static_argnames="m")
def expert_columns(block_expert: Array, m: int) -> Array:
    """The column choice of routed rows: the same in every block of M, 4 e to 4 e + 3.

    Args:
      block_expert: (R / V,) integers in 0..M/4-1, as in `TokenPlan`.

    Returns:
      (R / V, 1, 4) uint8; the middle axis stands for all column blocks.
    """
    if block_expert.ndim != 1:
        raise ValueError(f"block_expert of shape {block_expert.shape} must be a vector")
    if m < GROUP or m % GROUP or m > 256:
        raise ValueError(f"{m=} must be a multiple of {GROUP} up to 256")
    first = (GROUP * block_expert)[:, None, None]
    return (first + jnp.arange(GROUP)).astype(jnp.uint8)


@partial(jax.jit, static_argnames=("v", "m"))
def gather_columns(x: Array, columns: Array, *, v: int, m: int) -> Array:
    """The live columns alone: (R, C) to (R, 4 C / M), groups of four from one block of M."""
    _check_columns(columns, x.shape, v, m)
    row_blocks, col_blocks = _check(x.shape, v, m)
    blocks = x.reshape(row_blocks, v, col_blocks, m)
    index = jnp.broadcast_to(columns, (row_blocks, col_blocks, GROUP)).astype(jnp.int32)
    live = jnp.take_along_axis(blocks, index[:, None], axis=-1)
    return live.reshape(x.shape[0], col_blocks * GROUP)


@partial(jax.jit, static_argnames=("v", "m"))
def scatter_columns(live: Array, columns: Array, *, v: int, m: int) -> Array:
    """Inverse of `gather_columns`: (R, 4 C / M) to (R, C) with zeros in the other columns."""
    shape = (live.shape[0], live.shape[1] // GROUP * m)
    _check_columns(columns, shape, v, m)
    row_blocks, col_blocks = _check(shape, v, m)
    index = jnp.broadcast_to(columns, (row_blocks, col_blocks, GROUP)).astype(jnp.int32)
    groups = live.reshape(row_blocks, v, col_blocks, GROUP)
    blocks = jnp.zeros((row_blocks, v, col_blocks, m), live.dtype)
    blocks = jnp.put_along_axis(
        blocks, jnp.broadcast_to(index[:, None], groups.shape), groups, axis=-1, inplace=False
    )
    return blocks.reshape(shape)


@partial(jax.jit, static_argnames=("v", "m"))
def vnm_mask(x: Array, *, v: int, m: int, columns: Array | None = None) -> Array:
    """The elements that V:N:M keeps: (R, C) bool, two in every row of every block of M.

    Args:
      x: (R, C) floating point. columns: as in `pack_vnm`.
    """
    if columns is None:
        columns = choose_columns(x, v=v, m=m)
    keep = select24(gather_columns(x, columns, v=v, m=m))
    return scatter_columns(keep, columns, v=v, m=m)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class VNM:
    """A matrix (R, C) in V:2:M form; made by `pack_vnm`. Arrays are leaves, sizes are static."""

    values: Array
    """(R, 2 C / M): the kept elements of a row, block by block, in increasing index."""
    positions: Array
    """(R, C / M) uint8: which two of the four live columns, i0 | i1 << 2 in the low four bits."""
    columns: Array
    """(R / V, C / M, 4) uint8, increasing: the live columns of each block; (R / V, 1, 4) where the
    choice is the same in every block of M, as it is for a token's expert."""
    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    """Of the dense matrix."""
    v: int = dataclasses.field(metadata={"static": True})
    """Rows that share a column choice."""
    m: int = dataclasses.field(metadata={"static": True})
    """Columns in a block."""

    @property
    def dtype(self) -> jnp.dtype:
        return self.values.dtype

    def live(self) -> Array:
        """The live columns as a dense (R, 4 C / M) matrix, which is 2:4 along its rows."""
        return spread_pairs(self.values, self.positions)

    def unpack(self) -> Array:
        """The dense (R, C) matrix; exact."""
        return _unpack(self)


@partial(jax.jit, static_argnames=("v", "m", "dtype"))
def pack_vnm(
    x: Array,
    *,
    v: int,
    m: int,
    columns: Array | None = None,
    dtype: DTypeLike | None = None,
) -> VNM:
    """Prunes to V:2:M and packs.

    Two of the four live columns by magnitude, on float32 values, ties to the lower index. A matrix
    that is V:2:M already comes back exactly from `unpack`.

    Args:
      x: (R, C) floating point, R a multiple of v, C of m.
      v: rows that share a column choice. m: columns in a block, a multiple of 4.
      columns: (R / V, C / M, 4) or (R / V, 1, 4) integers, increasing in the last axis, to use
        instead of `choose_columns` (values are not checked under jit).
      dtype: of the values; x's where None.

    Raises:
      ValueError: sizes that do not fit.
    """
    if columns is None:
        columns = choose_columns(x, v=v, m=m)
    live = gather_columns(x, columns, v=v, m=m)
    values, positions = kept_pairs(select24(live), live.astype(dtype or x.dtype))
    return VNM(values, positions, columns.astype(jnp.uint8), (x.shape[0], x.shape[1]), v, m)


@jax.jit
def _unpack(x: VNM) -> Array:
    return scatter_columns(x.live(), x.columns, v=x.v, m=x.m)
