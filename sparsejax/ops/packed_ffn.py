"""Weights of a feed-forward network as the sparse products read them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels import registry
from sparsejax.spec import Precision


class PackedMatrix(NamedTuple):
    """One matrix of a feed-forward network as the sparse products read it."""

    dense: Array
    """(E, h, D): thresholded, scaled and rounded, split by expert; h = H / E live neurons, and with
    shared neurons, which are there once for each expert, more, as with `PackedFFN.padding` (then
    read E h for H below). (H, D) where those are there once (`kernels.shared_rows.row`)."""
    values: Array | None = None
    """(H, D / 2): the same, packed 2:4 along D; rows by expert, within one as the kernels want.
    (H, D), all of it, where weights are not 2:4. None where no kernels are called."""
    metadata: Array | None = None
    """(H / 64, D / 64, 128) int32; None where there is nothing packed."""


class PackedMatrix8(NamedTuple):
    """One matrix of a feed-forward network in 8-bit floats, e4m3: these numbers times `scale`."""

    columns: Array
    """(E, D, h): thresholded and rounded, split by expert, an expert's neurons contiguous."""
    values: Array
    """(H, D / 2): the same, packed 2:4 along D; rows by expert, within one as the kernels want."""
    metadata: Array
    """(H / 64, D / 64, 128) int32, as 8-bit instructions want them."""
    scale: Array
    """Scalar float32, a power of two; of `sharding.pack_ffn` (G,), one for each group of
    neurons."""
    norm: Array
    """Float32, like `scale`: what the neurons' norms are reckoned to be below
    (`routed_ffn_fp8`)."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedFFN:
    """All matrices of a network, from `pack_ffn`.

    A pytree: stacked along a leading axis it is the weights of several layers.
    """

    w1: Any
    """`PackedMatrix`, or `PackedMatrix8` where `precision` is "fp8"; w2 likewise."""
    w2: Any
    wg: PackedMatrix | None = None
    kernels: registry.Backend | None = dataclasses.field(default=None, metadata={"static": True})
    """Backend that packed `values`; None where there are none and no kernel is called."""
    precision: Precision = dataclasses.field(default="compute", metadata={"static": True})
    padding: int = dataclasses.field(default=0, metadata={"static": True})
    """Neurons of zeros behind each expert's, for kernels that take multiples of some number."""
    shared_every: int = dataclasses.field(default=0, metadata={"static": True})
    """Of how many blocks of neurons the last is every expert's, and is there once: `dense` is
    (H, D). 0 where such neurons are there once for each expert, or not at all."""

    @property
    def dtype(self) -> jnp.dtype:
        """Of the activations that these weights multiply."""
        return jnp.dtype(jnp.bfloat16 if self.precision == "fp8" else self.w1.dense.dtype)

    def changed(self, change: Callable[[Any], Any], **fields: Any) -> PackedFFN:
        """The same with every matrix changed, and other fields replaced."""
        gate = None if self.wg is None else change(self.wg)
        return dataclasses.replace(self, w1=change(self.w1), w2=change(self.w2), wg=gate, **fields)

    def without_padding(self) -> PackedFFN:
        """The same weights for the paths in jax.numpy, which take any number of neurons."""
        alone = lambda w: None if w is None else PackedMatrix(w.dense[:, : -self.padding])
        if not self.padding:
            return self
        return PackedFFN(alone(self.w1), alone(self.w2), alone(self.wg))
