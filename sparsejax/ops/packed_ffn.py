"""Weights of a feed-forward network as the sparse products read them."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
from jax import Array

from kernels import registry


class PackedMatrix(NamedTuple):
    """One matrix of a feed-forward network as the sparse products read it."""

    dense: Array
    """(E, h, D): thresholded, scaled and rounded, split by expert; h = H / E live neurons."""
    values: Array | None = None
    """(H, D / 2): the same, packed 2:4 along D; rows by expert, within one as the kernels want."""
    metadata: Array | None = None
    """(H / 64, D / 64, 128) int32."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedFFN:
    """All matrices of a network, from `pack_ffn`.

    A pytree: stacked along a leading axis it is the weights of several layers.
    """

    w1: PackedMatrix
    w2: PackedMatrix
    wg: PackedMatrix | None = None
    kernels: registry.Backend | None = dataclasses.field(default=None, metadata={"static": True})
    """Backend that packed `values`; None where there are none and no kernel is called."""
