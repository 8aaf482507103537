"""What rows of the routed network keep and how they are differentiated, whoever multiplies them."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels import reference_grouped
from sparsejax.prune import select24
from sparsejax.spec import GROUP
from sparsejax.vnm import kept_pairs, spread_pairs


class Rows(NamedTuple):
    """What the backward pass needs of the activations of some rows.

    Two-matrix form: Y2 (rows, h), which holds relu(X W1) as its root and the support as its
    non-zeros. Gated form: relu(X W1) and X Wg, which with 2:4 are the kept halves (rows, h / 2).
    """

    live: Array
    gate: Array | None = None
    positions: Array | None = None
    """(rows, h / 4) uint8, i0 | i1 << 2: where the kept halves belong."""


class Differentiated(NamedTuple):
    """Operands of the backward products, (rows, h) in the compute dtype."""

    y2: Array
    dy1: Array
    dgate: Array | None

    def thinned(self, dense: Array, spread: bool = False) -> Differentiated:
        """For the weight gradients, `two_of_four_tokens` of each; `dense`, `spread` as there."""
        thin = lambda a: two_of_four_tokens(a, dense, spread)
        return jax.tree.map(thin, self)


def activate(
    y1: Array, gate: Array | None, *, activations: bool, dtype: DTypeLike
) -> tuple[Array, Rows]:
    """Y2 of the accumulators X W1, and X Wg: (rows, h) float32, of four neurons in a row two.

    Returns:
      Y2 in `dtype`, and what is kept of it.
    """
    r = jnp.maximum(y1, 0.0)
    y2 = r * r if gate is None else r * r * gate
    # Chosen on the float32 accumulators: rounding first would change the choice.
    keep = select24(y2, -1, "magnitude") if activations else None
    y2 = (y2 if keep is None else jnp.where(keep, y2, 0.0)).astype(dtype)
    if gate is None:
        return y2, Rows(y2)
    if keep is None:
        return y2, Rows(r.astype(dtype), gate.astype(dtype))
    return y2, Rows(*kept_pairs(keep, r.astype(dtype), gate.astype(dtype)))


def differentiate(dy2: Array, rows: Rows) -> Differentiated:
    """Y2 again, and the gradients of what was multiplied to make it.

    The support needs no mask of its own: it is where relu(X W1) was saved and is positive. The
    derivative is zero elsewhere, because of relu or because the element was not kept.

    Args:
      dy2: (rows, h) float32 accumulators.
      rows: from `activate`.
    """
    dtype = rows.live.dtype
    if rows.gate is None:
        y2 = rows.live
        dy1 = 2.0 * jnp.sqrt(y2.astype(jnp.float32)) * dy2
        return Differentiated(y2, dy1.astype(dtype), None)
    r, gate = rows.live, rows.gate
    if rows.positions is not None:
        r, gate = (spread_pairs(half, rows.positions) for half in (r, gate))
    r, gate = r.astype(jnp.float32), gate.astype(jnp.float32)
    y2, dy1, dgate = r * r * gate, 2.0 * r * gate * dy2, r * r * dy2
    return Differentiated(y2.astype(dtype), dy1.astype(dtype), dgate.astype(dtype))


def nonzeros(rows: Rows) -> Array:
    """(rows, h) bool: where Y2 is not zero, or, gated, where its relu is not."""
    live = rows.live
    return (live if rows.positions is None else spread_pairs(live, rows.positions)) > 0


def densest(counts: Array, number: int) -> Array:
    """(E, h) bool: so many neurons of each expert, with most non-zeros, ties to the lower index.

    Args:
      counts: (E, h) non-zeros of each neuron. number: at most h.
    """
    chosen = reference_grouped.densest_neurons(counts.astype(jnp.int32), number)
    expert = jnp.arange(counts.shape[0])[:, None]
    return jnp.zeros(counts.shape, bool).at[expert, chosen].set(True)


def apart(tokens: int, rows: int) -> Array:
    """(rows,) int32: the token that a row holds so that four in a row are far apart in a text.

    Of T tokens, those of rows 4 r .. 4 r + 3 are r, r + n, r + 2 n, r + 3 n, with n = ceil(T / 4);
    T where there is none.
    """
    quarter = -(-tokens // GROUP)
    row = jnp.arange(rows, dtype=jnp.int32)
    token = row % GROUP * quarter + row // GROUP
    return jnp.where((row < GROUP * quarter) & (token < tokens), token, tokens)


def two_of_four_tokens(a: Array, dense: Array, spread: bool = False) -> Array:
    """`a` with two of each four tokens, by magnitude, in the columns that are not dense.

    Four rows that follow each other make a group. Where they are tokens as they came, `spread`
    makes the groups of `apart`, with ties to the lower token: neighbours in a text are alike, and
    would be dropped or kept together. Rows of a plan are spread already (`plan_tokens`).

    Args:
      a: (n, h) of one expert, n a multiple of 4 once padded with zeros.
      dense: (h,) bool.
    """
    rows, live = a.shape
    padded = jnp.pad(a, ((0, -rows % GROUP), (0, 0)))
    axis, shape = (0, (GROUP, -1, live)) if spread else (1, (-1, GROUP, live))
    keep = select24(padded.reshape(shape), axis, "magnitude").reshape(padded.shape)
    return jnp.where(keep[:rows] | dense, a, jnp.zeros((), a.dtype))
