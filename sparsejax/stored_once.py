"""Packed weights of neurons that all experts have, as devices store and send them: once.

Kernels that take such neurons once (`SHARED_ONCE`) read what is gathered as it is. Other products
read them once for each expert, next to its own. Where weights are spread over devices that would be
stored, and gathered in every pass, E times: with M = 32 and one block in four shared 2.75 times the
rows of a network without. An expert has its own rows first and the shared ones last, in an order
that is the same for all experts, so that they can be left out and put back by whole rows.
"""

from __future__ import annotations

import functools

from kernels import shared_rows
from kernels.reference import TILE
from kernels.shared_rows import SharedRows, of_hidden
from sparsejax.ops.packed_ffn import PackedMatrix
from sparsejax.spec import Sparsity

ORDERED = 128
"""Rows within which a backend's packed weights have an order of its own."""


def serves(sparsity: Sparsity, hidden: int) -> bool:
    """Whether shared neurons of a group of `hidden` can be told apart by whole packed rows.

    Args:
      sparsity: what is shared.
      hidden: H of one group of neurons, a multiple of `sparsity.block`.
    """
    if not sparsity.shares:
        return False
    # Of all neurons too, or kernels may want more of zeros behind them (`PackedFFN.padding`).
    sizes = _sizes(sparsity, hidden)
    return sizes.routed % ORDERED == 0 and sizes.live % ORDERED == 0


def once(matrix: PackedMatrix, sparsity: Sparsity, hidden: int) -> PackedMatrix:
    """Of one group's packed weights, the rows of all experts' own neurons, then the shared ones.

    Args:
      matrix: dense (E, h, D), and values (E h, ...) and metadata (E h / 64, ...) or None.
      sparsity, hidden: as for `serves`.

    Returns:
      dense (H, D), values (H, ...) and metadata (H / 64, ...) or None.
    """
    sizes = _sizes(sparsity, hidden)

    rows = functools.partial(shared_rows.once, experts=sizes.experts)
    dense = matrix.dense.reshape(-1, matrix.dense.shape[-1])
    return _changed(matrix._replace(dense=dense), rows, sizes)


def for_each_expert(matrix: PackedMatrix, sparsity: Sparsity, hidden: int) -> PackedMatrix:
    """What `once` was given, of as many groups as there are one after the other.

    Args:
      matrix: dense (G H, D), values (G H, ...) and metadata (G H / 64, ...) or None.
      sparsity, hidden: as for `serves`.

    Returns:
      dense (G E, h, D), values (G E h, ...) and metadata (G E h / 64, ...) or None.
    """
    sizes = _sizes(sparsity, hidden)
    groups = matrix.dense.shape[0] // hidden
    rows = functools.partial(shared_rows.for_each_expert, experts=sizes.experts, groups=groups)
    whole = _changed(matrix, rows, sizes)
    return whole._replace(dense=whole.dense.reshape(-1, sizes.live, whole.dense.shape[-1]))


def _sizes(sparsity: Sparsity, hidden: int) -> SharedRows:
    return of_hidden(hidden, sparsity.num_experts, sparsity.shared_every)


def _changed(matrix: PackedMatrix, rows, sizes: SharedRows) -> PackedMatrix:
    values = None if matrix.values is None else rows(matrix.values, own=sizes.routed)
    metadata = None if matrix.metadata is None else rows(matrix.metadata, own=sizes.routed // TILE)
    return PackedMatrix(rows(matrix.dense, own=sizes.routed), values, metadata)
