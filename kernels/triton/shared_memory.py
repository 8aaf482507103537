"""Dynamic shared memory for the ring of the main loop."""

from __future__ import annotations

import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
from jax import lax

from kernels.triton.mainloop import Tile

# Depth and width of products of 64 rows, by their bytes.
_SHAPES = ((128, 64), (256, 64), (128, 256), (256, 128), (512, 64), (256, 256), (512, 128))


def _bytes(depth: int, width: int) -> int:
    return 2 * depth * (64 + width)


LARGEST = _bytes(*_SHAPES[-1])
"""Bytes that `reserve` can provide."""


def reserve(operand_ref, out_ref, tile: Tile, *, emulate: bool) -> None:
    """Makes the launch provide the dynamic shared memory that a tile's ring needs, if any.

    Pallas Triton has no parameter for it: Triton adds up what the operations it sees need, and a
    product of two matrices needs both of them in shared memory. This one is in a branch that is
    never taken, and it leaves no code behind: the compiler knows that program ids are not negative.

    The grid must have two programs at least: the id of a lone one is the constant 0, and the branch
    would be gone too early.

    Args:
      operand_ref: any two-dimensional ref of a 16-bit type.
      out_ref: any two-dimensional ref of a result.
      tile: of the main loop.
      emulate: the interpreter needs none.
    """
    if not tile.dynamic_bytes or emulate:
        return
    depth, width = next(shape for shape in _SHAPES if _bytes(*shape) >= tile.dynamic_bytes)

    @pl.when(pl.program_id(0) < 0)
    def _never():
        def operand(rows: int, cols: int):
            row = lax.broadcasted_iota(jnp.int32, (rows, cols), 0)
            return plt.load(operand_ref.at[row, lax.broadcasted_iota(jnp.int32, (rows, cols), 1)])

        product = plt.dot(operand(64, depth), operand(depth, width))
        out_ref[0, 0] = jnp.sum(product).astype(out_ref.dtype)
