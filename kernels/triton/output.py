"""Accumulators of the main loop to a matrix in global memory, 16 bytes a thread."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kernels.triton import ptx
from kernels.triton.mainloop import Tile


class Place(NamedTuple):
    """Where a thread's accumulators lie, all (threads,) int32 (see `mainloop.accumulate`).

    Attributes:
      row, col: first row and column of the warp's tile.
      q, t: lane // 4 and lane % 4: the thread's place in an 8 x 8 tile is row q, columns 2 t and
        2 t + 1.
    """

    row: jax.Array
    col: jax.Array
    q: jax.Array
    t: jax.Array


def place(m0, n0, tile: Tile) -> Place:
    """The threads' places in the tile at row m0, column n0."""
    thread = lax.broadcasted_iota(jnp.int32, (tile.threads,), 0)
    warp = thread // 32
    return Place(
        row=m0 + warp // tile.warps_n * (16 * tile.frags_m),
        col=n0 + warp % tile.warps_n * (8 * tile.frags_n),
        q=thread % 32 // 4,
        t=thread % 4,
    )


def store_tile(
    out_ref,
    acc: Sequence[jax.Array],
    at: Place,
    tile: Tile,
    *,
    out_layout: str = "mn",
    limits: tuple[Any, Any],
    target: Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None,
    emulate: bool,
) -> None:
    """Rounds and stores a tile.

    Args:
      out_ref: (m, n) for out_layout "mn", (n, m) for "nm"; bfloat16, float16 or float32.
      acc: of `mainloop.accumulate`.
      limits: rows and columns of `out_ref` from which on nothing is stored; columns in multiples of
        16 bytes.
      target: where rows go: (row, valid) to (row of out_ref, valid), all (threads,) int32; None
        leaves them where they are.
    """
    store = _store_32 if jnp.dtype(out_ref.dtype).itemsize == 4 else _store_16
    for major, minor, words in store(out_ref.dtype, acc, at, tile, out_layout, emulate):
        valid = ((major < limits[0]) & (minor < limits[1])).astype(jnp.int32)
        if target is not None:
            major, valid = target(major, valid)
        ptx.store_words(out_ref, major, minor, words, valid, emulate=emulate)


def _store_16(dtype, acc, at: Place, tile: Tile, out_layout: str, emulate: bool):
    """Yields row, column and four words of each store."""
    fn = tile.frags_n
    # One word for each 8 x 8 tile: this thread's two elements, row q, columns 2 t and 2 t + 1.
    words = [
        [
            ptx.pack_pair(
                acc[4 * (i * fn + j) + 2 * half],
                acc[4 * (i * fn + j) + 2 * half + 1],
                dtype,
                emulate=emulate,
            )
            for j in range(fn)
        ]
        for i in range(tile.frags_m)
        for half in range(2)
    ]
    major0, minor0 = at.row, at.col
    if out_layout == "nm":
        columns = [[row[j] for row in words] for j in range(fn)]
        words = [[ptx.transpose_tile(w, emulate=emulate) for w in column] for column in columns]
        major0, minor0 = at.col, at.row
    # Four neighbouring tiles at a time: then a thread holds a whole row of one of them, 16 bytes.
    for i, row in enumerate(words):
        for j in range(0, len(row), 4):
            vector = ptx.transpose_quad(row[j : j + 4], emulate=emulate)
            yield major0 + (8 * i + at.q), minor0 + (8 * j + 8 * at.t), vector


def _store_32(dtype, acc, at: Place, tile: Tile, out_layout: str, emulate: bool):
    """As `_store_16`, for float32: two neighbouring tiles make four words of a thread."""
    del dtype
    fn = tile.frags_n
    acc = [lax.bitcast_convert_type(a, jnp.uint32) for a in acc]
    for i in range(tile.frags_m):
        for half in range(2):
            row = at.row + (16 * i + 8 * half)
            for j in range(0, fn, 2):
                first, second = (acc[4 * (i * fn + j + h) + 2 * half :][:2] for h in range(2))
                if out_layout == "mn":
                    # Lanes with even t take the first tile: columns 2 t to 2 t + 3 of it.
                    pairs = [
                        ptx.transpose_pair(p, 1, emulate=emulate)
                        for p in zip(first, second, strict=True)
                    ]
                    odd = at.t % 2
                    column = at.col + (8 * j + 2 * at.t + 6 * odd)
                    yield row + at.q, column, [p[own] for own in range(2) for p in pairs]
                else:
                    # Lane r = q % 4 takes column 2 t + r % 2 of tile r // 2, rows 4 (q // 4) on.
                    vector = ptx.transpose_quad([*first, *second], (4, 8), emulate=emulate)
                    r = at.q % 4
                    column = at.col + (8 * j + 8 * (r // 2) + 2 * at.t + r % 2)
                    yield column, row + 4 * (at.q // 4), vector
