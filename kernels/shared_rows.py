"""Neurons that all experts have: once as parameters, for each expert in the grouped products.

Of H neurons in blocks of M = 4 E, the last block of every `every` is shared: N = H / (every M)
blocks of it. An expert has h = 4 N (every - 1) + N M neurons in the products, first its groups of
four of the routed blocks, then all shared ones. Routed blocks come in the order of their place
among `every` and then of the N, so that neighbours in an expert are a fixed distance apart among
the parameters.

Packed weights have such neurons once as well, where they are read so: first the 4 N (every - 1)
rows of each expert's own, expert after expert, then the N M of all (`row`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from kernels.reference import GROUP


class SharedRows(NamedTuple):
    """Sizes of a network with shared neurons.

    Attributes:
      experts: E. every: blocks of which the last is shared, at least 2.
      superblocks: N, of so many blocks each.
    """

    experts: int
    every: int
    superblocks: int

    @property
    def m(self) -> int:
        """Neurons in a block."""
        return GROUP * self.experts

    @property
    def routed(self) -> int:
        """Of an expert's neurons, those that it shares with no other."""
        return GROUP * self.superblocks * (self.every - 1)

    @property
    def shared(self) -> int:
        """Those that all experts have."""
        return self.superblocks * self.m

    @property
    def live(self) -> int:
        """h."""
        return self.routed + self.shared

    @property
    def hidden(self) -> int:
        """H."""
        return self.superblocks * self.every * self.m


def of_hidden(hidden: int, experts: int, every: int) -> SharedRows:
    """The sizes of H neurons. ValueError unless they are whole blocks."""
    found = SharedRows(experts, every, hidden // (every * GROUP * experts))
    if every < 2 or not found.superblocks or found.hidden != hidden:
        raise ValueError(f"{hidden=} must be a multiple of {every=} (at least 2) times {found.m}")
    return found


def of_live(live: int, experts: int, every: int) -> SharedRows:
    """The sizes of an expert of h neurons. ValueError unless they are what blocks make."""
    found = SharedRows(experts, every, live // (GROUP * (every - 1 + experts)))
    if every < 2 or not found.superblocks or found.live != live:
        raise ValueError(f"{live=} cannot be an expert's of {experts=} with {every=}")
    return found


def row(sizes: SharedRows, expert: Array, neuron: Array) -> Array:
    """The row of an expert's neuron in packed weights that have shared ones once.

    Args:
      expert: 0..E-1, int32. neuron: of the expert, 0..h-1, int32.
    """
    # The rows of all follow on the last expert's own.
    owner = jnp.where(neuron < sizes.routed, expert, jnp.int32(sizes.experts - 1))
    return owner * sizes.routed + neuron


def once(a: Array, experts: int, own: int) -> Array:
    """Rows (E r, ...) of all experts without what only repeats: each one's first `own`, then the
    rest of the first's, which is the same for all."""
    by_expert = a.reshape(experts, -1, *a.shape[1:])
    alone = by_expert[:, :own].reshape(-1, *by_expert.shape[2:])
    return jnp.concatenate([alone, by_expert[0, own:]])


def for_each_expert(a: Array, experts: int, own: int, groups: int = 1) -> Array:
    """The inverse of `once`, of so many groups one after the other."""
    parts, rest = a.reshape(groups, -1, *a.shape[1:]), a.shape[1:]
    alone = parts[:, : experts * own].reshape(groups, experts, own, *rest)
    shared = parts[:, None, experts * own :]
    shared = jnp.broadcast_to(shared, (groups, experts, *shared.shape[2:]))
    return jnp.concatenate([alone, shared], axis=2).reshape(-1, *rest)


def repeat(w: Array, axis: int, experts: int, every: int) -> Array:
    """(.., H, ..) to (.., E h, ..), neurons interleaved by expert: shared ones E times.

    Args:
      w: neurons along `axis`. experts: E. every: blocks of which the last is shared.
    """
    axis %= w.ndim
    rows = of_hidden(w.shape[axis], experts, every)
    before, after = w.shape[:axis], w.shape[axis + 1 :]
    index = (slice(None),) * (axis + 1)
    blocks = w.reshape(*before, rows.superblocks, every, rows.m, *after)
    routed = jnp.swapaxes(blocks[(*index, slice(-1))], axis, axis + 1)
    shared = blocks[(*index, -1)].reshape(*before, rows.shared // GROUP, 1, GROUP, *after)
    repeated = jnp.broadcast_to(shared, (*shared.shape[: axis + 1], experts, GROUP, *after))
    flat = (*before, -1, *after)
    return jnp.concatenate([routed.reshape(flat), repeated.reshape(flat)], axis)


def add_up(dw: Array, experts: int, every: int) -> Array:
    """The transpose of `repeat`: (E h, D), neurons in front, to (H, D)."""
    rows, width = of_live(dw.shape[0] // experts, experts, every), dw.shape[1]
    first = experts * rows.routed
    routed = dw[:first].reshape(every - 1, rows.superblocks, rows.m, width)
    shared = jnp.sum(dw[first:].reshape(-1, experts, GROUP, width), axis=1)
    shared = shared.reshape(rows.superblocks, 1, rows.m, width)
    whole = jnp.concatenate([jnp.swapaxes(routed, 0, 1), shared], axis=1)
    return whole.reshape(rows.hidden, width)
