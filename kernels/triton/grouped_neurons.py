"""Packed weights times tokens: which neurons a thread has, and what it does with four of them.

The sparse operand is the weight, so accumulators are (neurons, tokens). A thread of lane 4 q + t
holds rows q and q + 8 of two neighbouring fragments of 16 rows: `row_order` puts the four neurons
of a group there, so that choosing two of four and packing stay in the thread. Results go out along
neurons, where neighbouring groups belong to neighbouring q: lanes that differ in q exchange words,
until each has 16 bytes of one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.groups24 import CHOOSE, SCALE, WIDENINGS
from kernels.triton import mainloop, output, ptx
from kernels.triton.grouped_common import Columns, Part
from kernels.triton.mainloop import Tile
from kernels.triton.pack24 import from_word, select

_PTX_NAMES = {"bfloat16": "bf16", "float16": "f16"}
_ACROSS = (4, 8)  # lanes that differ in the low bits of q


class Group(NamedTuple):
    """Four neurons of a token in a thread: (threads,) uint32.

    Attributes:
      pair: the two kept ones, in order.
      low, high: neurons 0 and 1, and 2 and 3, zeros where not kept.
    """

    pair: jax.Array
    low: jax.Array
    high: jax.Array


def row_order(h: int) -> np.ndarray:
    """(h,) int: the expert-local neuron in each row of an expert's packed weight.

    Row 16 a + 8 b + q of every 32 is neuron 4 q + 2 a + b of them.
    """
    p = np.arange(h)
    return p // 32 * 32 + 4 * (p % 8) + 2 * (p // 16 % 2) + p // 8 % 2


def accumulators(acc: Sequence[jax.Array], tile: Tile, f: int, j: int, c: int) -> list[jax.Array]:
    """The four neurons of the thread's group in 32 rows f, of token 2 t + c of 8 columns j."""
    return [
        acc[4 * ((2 * f + a) * tile.frags_n + j) + 2 * b + c] for a in range(2) for b in range(2)
    ]


def choose(x: Sequence[jax.Array], dtype: Any, *, emulate: bool) -> tuple[Group, jax.Array]:
    """The two largest of relu(x)^2 of each group, and the nibble of their positions (uint32).

    x: four float32 arrays (threads,). Ties go to the lower index. Where fewer than two are
    positive, others complete the pair, as zeros.
    """
    if emulate:
        squares = [jnp.square(jnp.where(e <= 0.0, 0.0, e)) for e in x]
        first, second, nibble = select(squares, "value", jnp.float32)
        pair = ptx.pack_pair(first, second, dtype, emulate=True)
        zeros = jnp.zeros_like(first)
        dense = [
            jnp.where((nibble & 3) == i, first, jnp.where((nibble >> 2) == i, second, zeros))
            for i in range(4)
        ]
        low, high = (ptx.pack_pair(dense[i], dense[i + 1], dtype, emulate=True) for i in (0, 2))
        return Group(pair, low, high), nibble
    text = CHOOSE.replace("DTYPE", _PTX_NAMES[jnp.dtype(dtype).name])
    pair, code = ptx.inline_ptx(text, [], list(x), out=["uint32"] * 2)
    asm = "{ .reg .b32 upper;\nprmt.b32 $0, $2, 0, $3;\nshr.u32 upper, $3, 16;\n"
    asm += "prmt.b32 $1, $2, 0, upper; }"
    low, high = ptx.inline_ptx(asm, [], [pair, code], out=["uint32"] * 2)
    return Group(pair, low, high), (code & 3) | ((code >> 26) & 12)


def scale(
    x: Sequence[jax.Array],
    y: Sequence[jax.Array],
    nibble: jax.Array,
    dtype: Any,
    *,
    emulate: bool,
) -> Group:
    """2 sqrt(y) x of each group, on the support of y.

    x: four float32 arrays (threads,). y: two words of four neurons in `dtype`. nibble: (threads,)
    uint32, which of them are kept.
    """
    if emulate:
        dense = [e for word in y for e in from_word(word, dtype)]
        dense = [2.0 * jnp.sqrt(d) * e for d, e in zip(dense, x, strict=True)]
        at = [i.astype(jnp.int32) for i in (nibble & 3, nibble >> 2)]
        kept = [lax.select_n(i, *dense) for i in at]
        words = (kept, dense[:2], dense[2:])
        return Group(*(ptx.pack_pair(a, b, dtype, emulate=True) for a, b in words))
    name = _PTX_NAMES[jnp.dtype(dtype).name]
    text = SCALE.replace("WIDEN", WIDENINGS[name]).replace("DTYPE", name)
    low, high, pair = ptx.inline_ptx(text, [], [*y, *x, nibble], out=["uint32"] * 3)
    return Group(pair, low, high)


class Neurons:
    """A program's results: tokens in rows, neurons in columns.

    Args:
      columns: the tile's neurons. token0: scalar, its first token.
      end: scalar, the token behind the last one to be stored.
    """

    def __init__(self, columns: Columns, token0, end, tile: Tile, *, emulate: bool):
        place = output.place(columns.first, token0, tile)
        self.neuron, self.token, self.q, self.t = place
        self.end, self.neuron_end, self.tile, self.emulate = end, columns.end, tile, emulate

    def valid(self, token, neuron) -> jax.Array:
        return ((token < self.end) & (neuron < self.neuron_end)).astype(jnp.int32)

    def load(self, ref, f: int, j: int, c: int) -> list[jax.Array]:
        """Two words: the thread's group, as `accumulators` numbers them, of a dense (T_pad, h)."""
        token = self.token + (8 * j + 2 * self.t + c)
        neuron = self.neuron + (32 * f + 4 * self.q)
        valid = self.valid(token, neuron)
        return ptx.load_words(ref, token, neuron, valid, count=2, emulate=self.emulate)

    def _metadata(self, f, sixteen: int, c) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row, column and validity of the word of 32 neurons f, tokens 16 sixteen + 2 t + c + 8 n.

        Metadata is taken as (T_pad / 64, 2 h). The word holds groups 4 (q // 4) on.
        """
        token, neuron = self.token + 16 * sixteen, self.neuron + 32 * f
        # Neither is negative: shifts are divisions.
        word = ((token & 63) >> 4) * 32 + ((neuron & 63) >> 4) + 4 * (2 * self.t + c) + self.q // 4
        return token >> 6, (neuron >> 6) * 128 + word, self.valid(token, neuron)

    def load_nibbles(self, ref, f: int, sixteen: int, c: int) -> list[jax.Array]:
        """Positions kept by the thread's groups of tokens 16 sixteen + 2 t + c and 8 further on."""
        row, col, valid = self._metadata(f, sixteen, c)
        (word,) = ptx.load_words(ref, row, col, valid, count=1, emulate=self.emulate)
        word = word >> self._nibble
        return [word & 15, (word >> 16) & 15]

    @property
    def _nibble(self) -> jax.Array:
        """Bits of a word below the thread's own."""
        return (self.q % 4 * 4).astype(jnp.uint32)

    def store_nibbles(self, ref, nibbles: Sequence, f: int, sixteen: int) -> None:
        """Stores the positions of 64 neurons, 32 f on, and 16 tokens.

        nibbles: [h][n][c], of neurons 32 (f + h) on and tokens 16 sixteen + 8 n + 2 t + c.
        """
        words = [
            (nibbles[h][0][c] | (nibbles[h][1][c] << 16)) << self._nibble
            for h in range(2)
            for c in range(2)
        ]
        # Lane r = q % 4 collects h = r // 2, c = r % 2.
        words = ptx.transpose_quad(words, _ACROSS, emulate=self.emulate)
        word = words[0] | words[1] | words[2] | words[3]
        r = self.q % 4
        row, col, valid = self._metadata(f + r // 2, sixteen, r % 2)
        ptx.store_words(ref, row, col, [word], valid, emulate=self.emulate)

    def store_dense(self, ref, groups: Sequence, f: int, sixteen: int) -> None:
        """Stores groups of 32 neurons f and 16 tokens.

        groups: [n][c], words of neurons 0 and 1 and of 2 and 3, tokens 16 sixteen + 8 n + 2 t + c.
        """
        token = self.token + 16 * sixteen
        neuron = self.neuron + 32 * f
        for n, halves in enumerate(groups):
            # Lanes of even q take token 2 t, of odd q token 2 t + 1, of their two groups.
            low, high = (
                ptx.transpose_pair(p, _ACROSS[0], emulate=self.emulate)
                for p in zip(*halves, strict=True)
            )
            row = token + (8 * n + 2 * self.t + self.q % 2)
            col = neuron + self.q // 2 * 8
            words = [low[0], high[0], low[1], high[1]]
            ptx.store_words(ref, row, col, words, self.valid(row, col), emulate=self.emulate)

    def store(self, dense_ref, packed_ref, groups: Sequence, f: int, sixteen: int) -> None:
        """Stores groups of 32 neurons f and 16 tokens, dense and packed.

        groups: [n][c], `Group`s of tokens 16 sixteen + 8 n + 2 t + c.
        """
        self.store_dense(dense_ref, [[(g.low, g.high) for g in row] for row in groups], f, sixteen)
        token = self.token + 16 * sixteen
        neuron = self.neuron + 32 * f
        # Lane r = q % 4 takes token 8 (r // 2) + 2 t + r % 2, of four groups.
        pairs = [group.pair for row in groups for group in row]
        words = ptx.transpose_quad(pairs, _ACROSS, emulate=self.emulate)
        row = token + (self.q % 4 // 2 * 8 + 2 * self.t + self.q % 2)
        col = neuron + self.q // 4 * 16
        valid = self.valid(row, col)
        ptx.store_words(packed_ref, row, col >> 1, words, valid, emulate=self.emulate)


def multiply(
    values_ref,
    metadata_ref,
    tokens_ref,
    part: Part,
    columns: Columns,
    tile: Tile,
    *,
    emulate: bool,
) -> tuple[list[jax.Array], Neurons]:
    """Packed weights of a part's experts, from a neuron on, times its tokens; and what is where.

    Returns:
      the thread's accumulators, and its place among the results.
    """
    acc = mainloop.accumulate(
        values_ref,
        metadata_ref,
        tokens_ref,
        columns.row(part.expert),
        part.first,
        tile,
        b_layout="nk",
        aligned=False,
        emulate=emulate,
    )
    return acc, Neurons(columns, part.first, part.end, tile, emulate=emulate)


def check_tile(config: Any) -> None:
    """Raises ValueError unless a warp's neurons are whole tiles of metadata."""
    if config.frags_m % 4:
        raise ValueError(f"{config=}: frags_m must be a multiple of 4")
