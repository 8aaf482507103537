"""What the grouped kernels share: which tokens a program multiplies, and what is left to zero.

A tile of tokens never crosses from one expert to the next, but the last one of an expert may hang
over its end: what it computes there is not stored. Tiles are numbered expert by expert, and behind
them come those of the unused rows, which are set to zero. Where a token meets an expert in each of
several shards, combinations of experts take the place of experts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
from jax import lax

from kernels.combinations import expert_number
from kernels.triton import device, ptx
from kernels.triton.mainloop import Tile
from kernels.triton.spmm24 import Spmm24Config, check_config, heuristic_config
from kernels.tuning import tables

NEURONS = 64  # an expert's neurons come in multiples


class Part(NamedTuple):
    """Tokens of a program, scalars.

    Attributes:
      expert: whose they are; E for rows that no expert has, and E + 1 for no rows at all.
      first: the first row, a multiple of 64.
      end: the row behind the last one of the expert.
    """

    expert: jax.Array
    first: jax.Array
    end: jax.Array


def num_parts(rows: int, num_experts: int, size: int) -> int:
    """Tiles of `size` tokens that are enough for every distribution of `rows`."""
    return math.ceil(rows / size) + num_experts


def part(offsets_ref, index: jax.Array, size: int, rows: int) -> Part:
    """The `index`-th tile of `size` tokens; `rows` are T_pad."""
    experts = offsets_ref.shape[0] - 1
    # All loads at once, not one after the other.
    bounds = [*(offsets_ref[e] for e in range(experts + 1)), jnp.int32(rows)]
    before = zero = jnp.int32(0)
    found = Part(jnp.int32(experts + 1), zero, zero)
    for e, (start, stop) in enumerate(itertools.pairwise(bounds)):
        tiles = lax.div(stop - start + (size - 1), jnp.int32(size))
        here = (index >= before) & (index < before + tiles)
        own = Part(jnp.int32(e), start + (index - before) * size, stop)
        found = Part(*(jnp.where(here, a, b) for a, b in zip(own, found, strict=True)))
        before = before + tiles
    return found


@dataclasses.dataclass(frozen=True)
class Shards:
    """The live neurons of a product of tokens and packed weights, in tiles.

    experts, shards: E and S. live: neurons that a token meets, in all shards. size: of a tile.
    """

    experts: int
    shards: int
    live: int
    size: int

    @property
    def of_shard(self) -> int:
        """Live neurons of one shard."""
        return self.live // self.shards

    @property
    def tiles_of_shard(self) -> int:
        """Tiles of a shard's neurons; none crosses from one shard to the next."""
        return math.ceil(self.of_shard / self.size)

    @property
    def tiles(self) -> int:
        """Tiles of all of them."""
        return self.shards * self.tiles_of_shard

    def columns(self, tile: jax.Array) -> Columns:
        """The neurons of a tile."""
        if self.shards == 1:
            return Columns(self, tile, jnp.int32(0), tile * self.size, self.live)
        shard, within = (f(tile, jnp.int32(self.tiles_of_shard)) for f in (lax.div, lax.rem))
        first = shard * self.of_shard + within * self.size
        return Columns(self, tile, shard, first, (shard + 1) * self.of_shard)


class Columns(NamedTuple):
    """Neurons of a program.

    Attributes:
      plan: of which they are a tile. tile: its number, a scalar. shard: theirs, a scalar.
      first: scalar, the first one of a token's live neurons. end: scalar, behind the shard's last.
    """

    plan: Shards
    tile: jax.Array
    shard: jax.Array
    first: jax.Array
    end: jax.Array | int

    def column(self, columns: int) -> jax.Array:
        """The first one's column of a matrix with so many columns for a tile of neurons."""
        if self.plan.shards == 1:
            return self.tile * columns
        return lax.div(self.first * columns, jnp.int32(self.plan.size))

    def row(self, combination: jax.Array) -> jax.Array:
        """The first one's row among the packed weights of all experts."""
        number = expert_number(combination, self.shard, self.plan.experts, self.plan.shards)
        # Of the shard's own neurons; with one shard these are all.
        first = (
            self.first if self.plan.shards == 1 else self.first - self.shard * self.plan.of_shard
        )
        return number * self.plan.of_shard + first


class Block(NamedTuple):
    """Part of a matrix in global memory.

    Attributes:
      ref: two-dimensional.
      row, col: scalars, the first row and column.
      rows, cols: how many; cols in multiples of what a thread takes.
      row_end: scalar, the row of `ref` behind the last one that counts. Columns of `ref` end where
        they end.
    """

    ref: Any
    row: jax.Array
    col: jax.Array
    rows: int
    cols: int
    row_end: jax.Array

    def chunks(self, size: int, threads: int) -> Iterator[tuple[jax.Array, jax.Array, jax.Array]]:
        """Row, column and validity of the threads' chunks of `size` bytes, round by round."""
        step = size // jnp.dtype(self.ref.dtype).itemsize
        thread = lax.broadcasted_iota(jnp.int32, (threads,), 0)
        for i in range(math.ceil(self.rows * self.cols / step / threads)):
            chunk = i * threads + thread
            within = chunk // (self.cols // step)
            row, col = self.row + within, self.col + chunk % (self.cols // step) * step
            valid = (within < self.rows) & (row < self.row_end) & (col < self.ref.shape[1])
            yield row, col, valid.astype(jnp.int32)


def fill(block: Block, word: int, threads: int, *, emulate: bool) -> None:
    """Sets a block to a 32-bit word."""
    words = [jnp.full((threads,), word, jnp.uint32)] * 4
    for row, col, valid in block.chunks(16, threads):
        ptx.store_words(block.ref, row, col, words, valid, emulate=emulate)


def prefetch(block: Block, threads: int, *, emulate: bool) -> None:
    """Starts bringing a block to the L2 cache."""
    if not emulate:
        for row, col, valid in block.chunks(128, threads):
            ptx.prefetch(block.ref, row, col, valid)


def call(kernel, operands, out_shape, grid: int, tile: Tile, name: str, interpret: bool):
    """A Pallas call of a kernel around the main loop, for so many programs, two at least."""
    return pl.pallas_call(
        kernel,
        grid=(grid,),
        out_shape=out_shape,
        compiler_params=plt.CompilerParams(num_warps=tile.warps_m * tile.warps_n, num_stages=1),
        interpret=interpret,
        name=name,
    )(*operands)


def check(op: str, v: int, live: int, width: int, dtype: Any) -> None:
    """Raises NotImplementedError for what no grouped kernel serves."""
    device.require_capability(op, 8.0)
    if v % 64 or live % NEURONS or width % 64:
        raise NotImplementedError(
            f"triton {op} needs {v=}, {live=} and {width=} to be multiples of 64"
        )
    if jnp.dtype(dtype).name not in ("bfloat16", "float16"):
        raise NotImplementedError(
            f"triton {op} takes bfloat16 or float16, not dtype={jnp.dtype(dtype).name}"
        )


def tuned(op: str, rows: int, num_experts: int, live: int, width: int) -> dict[str, Any] | None:
    """The fields of the device's tuned table for a grouped kernel and its sizes, or None."""
    return tables.lookup("triton", op, device.kind(), facts(rows, num_experts, live, width))


def facts(rows: int, num_experts: int, live: int, width: int) -> str:
    """The key of a grouped kernel's sizes in tuned tables: T_pad, E, h and D."""
    return tables.key(t=rows, e=num_experts, h=live, d=width)


def sparse_config(
    op: str,
    config: Spmm24Config | None,
    shape: tuple[int, int],
    rows: int,
    num_experts: int,
    live: int,
    width: int,
) -> Spmm24Config:
    """The given tiling, checked, or the tuned one, or one for a product of this shape (m, n)."""
    if config is None:
        found = tuned(op, rows, num_experts, live, width)
        config = heuristic_config(*shape) if found is None else Spmm24Config(**found)
    check_config(config)
    return config
