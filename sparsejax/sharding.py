"""The routed feed-forward network on a mesh of devices, under `jax.shard_map`.

Tokens are spread over the batch axes, neurons over the tensor axis, and the width of every stored
matrix over the shard axis (fully sharded parameters). Inside one device:

* its own tokens are routed, laid out and multiplied; nothing about them leaves the device,
* its own neurons only: outputs and input gradients are summed over the tensor axis,
* whole rows of the thresholded weights, gathered over the shard axis for as long as one pass of one
  layer needs them (`_gather` is the only place that decides what moves),
* weight gradients leave by one reduce-scatter over the shard axis and a sum over the other batch
  axes.

The neurons form G = max(S, t) groups of consecutive rows, S the shards that are clustered and
routed each on its own (`Sparsity.shards`), t the devices of the tensor axis. Within a group the
order is `interleave`'s. With S = 1 all devices of the tensor axis share one choice of expert, and
each holds its part of every expert's neurons, so the function does not depend on t; with S a
multiple of t each device has the clusters of its own neurons.

The derivative rule stands outside of `shard_map`: inside, weights that are replicated over an axis
would have to prove that their gradients are. What forward saves for backward keeps its place: it
travels as one array with an axis over all devices.

Axes must be Auto, and `jax.set_mesh` says which mesh is meant; without one, or with a single
device, everything here computes the same function locally.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from kernels import registry
from sparsejax import stored_once
from sparsejax.ops import routed_ffn_fp8, routed_ffn_grouped
from sparsejax.ops.packed_ffn import PackedFFN, PackedMatrix, PackedMatrix8
from sparsejax.ops.routed_ffn import _check_weights, _pack, _path, _serving
from sparsejax.remat import keep
from sparsejax.routing import (
    assign_tokens,
    cluster_neurons,
    combine,
    counts_by_shard,
    fit_bias,
    interleave,
    plan_tokens,
    routed_neurons,
    token_scores,
)
from sparsejax.spec import GROUP, Precision, Sparsity


@dataclass(frozen=True)
class MeshAxes:
    """Which axes of the mesh do what. Hashable, so that it can be static."""

    batch: tuple[str, ...] = ("data", "fsdp")
    """Tokens (their leading axis) are spread over these."""

    shard: str = "fsdp"
    """The width of stored matrices is spread over this one; it is one of `batch`."""

    tensor: str = "tensor"
    """Neurons are spread over this one."""

    @property
    def names(self) -> tuple[str, ...]:
        """All axes, in the order in which saved activations are stacked."""
        return (*self.batch, self.tensor)


def current_mesh(axes: MeshAxes | None) -> AbstractMesh | None:
    """The mesh that `jax.set_mesh` chose; None where there is none, or only one device.

    Raises:
      ValueError: it lacks one of the axes.
    """
    if axes is None:
        return None
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    missing = [name for name in axes.names if name not in mesh.shape]
    if missing:
        raise ValueError(f"the mesh's axes {mesh.axis_names} must include {missing}")
    return mesh


def constrain(x: Array, spec: P, axes: MeshAxes | None = MeshAxes()) -> Array:
    """`x`, placed by `spec`; as it is where there is no mesh."""
    return x if current_mesh(axes) is None else jax.lax.with_sharding_constraint(x, spec)


def row_major(x: Array) -> Array:
    """`x`, in memory with its last axis contiguous; inside of `shard_map`.

    XLA runs a collective along an axis on arrays in which that axis is the slowest, and gives
    that order to whatever elementwise work stands before and behind it: residual streams with
    tokens contiguous, so that a row is gathered number by number, and optimiser updates that read
    gradients across. This ends it, at the price of one copy where the collective is.
    """
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def weight_spec(axes: MeshAxes | None) -> P:
    """How an FFN matrix (H, D) is stored."""
    return P() if axes is None else P(axes.tensor, axes.shard)


def gathered(w: Array, dtype: DTypeLike, stored: P, axes: MeshAxes | None) -> Array:
    """A stored matrix as a product reads it: rounded first, then gathered over the shard axis.

    The order matters: the gather moves `dtype`, not float32. Its gradient is scattered in `dtype`
    as well, straight to where the parameter lives.

    Args:
      w: a master weight. dtype: of the product's operands. stored: how `w` is placed.
      axes: the mesh's axes.
    """
    if axes is None or current_mesh(axes) is None:
        return w.astype(dtype)
    return _gathered(w, jnp.dtype(dtype), stored, axes)


def _gather_rounded(w: Array, dtype: jnp.dtype, stored: P, axes: MeshAxes) -> Array:
    whole = P(*(None if name == axes.shard else name for name in stored))
    rounded = jax.lax.with_sharding_constraint(w.astype(dtype), stored)
    # Without the barrier the two placements are merged, and the gather may come first.
    return jax.lax.with_sharding_constraint(jax.lax.optimization_barrier(rounded), whole)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(w: Array, dtype: jnp.dtype, stored: P, axes: MeshAxes) -> Array:
    return _gather_rounded(w, dtype, stored, axes)


def _gathered_fwd(w, dtype, stored, axes):
    # Plain operations, not the rule within itself, so that checkpoint policies can tell them.
    return _gather_rounded(w, dtype, stored, axes), jnp.zeros((0,), w.dtype)


def _gathered_bwd(dtype, stored, axes, like, g):
    mesh = current_mesh(axes)
    part = jax.lax.with_sharding_constraint(g, stored)
    # As the parameter and its moments lie, whatever axis it was scattered along.
    part = jax.shard_map(row_major, mesh=mesh, in_specs=stored, out_specs=stored, check_vma=False)(
        part
    )
    return (part.astype(like.dtype),)


_gathered.defvjp(_gathered_fwd, _gathered_bwd)


COMBINATIONS = 16
"""Combinations of experts by which tokens are laid out at most, where a kernel takes several shards
at once. Each is padded to whole blocks of V tokens, half a block on average."""


@dataclass(frozen=True)
class _Layout:
    """Sizes of a network on the mesh; `mesh` None is one device. Hashable: static everywhere.

    hidden: H of one group of neurons.
    together: groups that one call of the kernels serves, of `local_groups`.
    """

    mesh: AbstractMesh | None
    axes: MeshAxes
    sparsity: Sparsity
    hidden: int = 0
    together: int = 1

    def size(self, *names: str) -> int:
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in names)

    @property
    def tensor(self) -> int:
        return self.size(self.axes.tensor)

    @property
    def own_clusters(self) -> bool:
        """Whether a device routes among its own neurons alone."""
        return self.sparsity.num_shards % self.tensor == 0

    @property
    def groups(self) -> int:
        """Groups of neurons in all (G)."""
        return max(self.sparsity.num_shards, self.tensor)

    @property
    def packs_gathered(self) -> bool:
        """Whether rows are packed on every device after they were gathered."""
        return self.sparsity.gather == "rows" and self.size(self.axes.shard) > 1

    def stored_every(self, packed_by: registry.Backend | None, precision: Precision) -> int:
        """`PackedFFN.shared_every` as weights are stored and gathered."""
        if precision == "fp8":
            return 0
        once = routed_ffn_grouped.reads_once(packed_by, self.sparsity, self.hidden)
        if self.size(self.axes.shard) > 1:
            once = once or stored_once.serves(self.sparsity, self.hidden)
        return self.sparsity.shared_every if once else 0

    @property
    def local_groups(self) -> int:
        """Groups of neurons on one device."""
        return self.groups // self.tensor

    @property
    def calls(self) -> int:
        """Calls of the kernels on one device."""
        return self.local_groups // self.together

    @property
    def router_spec(self) -> P:
        """Centres, biases and counts (S E, ...)."""
        return P(self.axes.tensor) if self.own_clusters else P()

    @property
    def weight_spec(self) -> P:
        """Matrices (H, D), values (H, D / 2)."""
        return weight_spec(self.axes)

    def packed_specs(
        self, packed_by: registry.Backend | None, gated: bool, precision: Precision, padding: int
    ) -> PackedFFN:
        tensor, shard = self.axes.tensor, self.axes.shard
        shared_every = self.stored_every(packed_by, precision)
        dense = P(tensor, shard) if shared_every else P(tensor, None, shard)
        matrix: Any = PackedMatrix(dense)  # type: ignore[arg-type]
        packed: Any = {"values": P(tensor, shard)}
        if self.sparsity.weights:
            packed["metadata"] = P(tensor, shard, None)
        if precision == "fp8":
            of_groups: Any = {"scale": P(tensor), "norm": P(tensor)}
            matrix = PackedMatrix8(P(tensor, shard, None), **packed, **of_groups)  # type: ignore[arg-type]
        elif packed_by is not None and not self.packs_gathered:
            matrix = matrix._replace(**packed)
        gate = matrix if gated else None
        return PackedFFN(matrix, matrix, gate, packed_by, precision, padding, shared_every)

    def specs_of(self, packed: PackedFFN) -> PackedFFN:
        """`packed_specs` of these weights."""
        gated = packed.wg is not None
        return self.packed_specs(packed.kernels, gated, packed.precision, packed.padding)

    def spmd(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """`function` on every device; itself where there is one."""
        if self.mesh is None:
            return function
        # Kernels carry no types of varying axes, hence no check.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )

    def psum(self, x: Any, *names: str) -> Any:
        return x if self.mesh is None or self.size(*names) == 1 else jax.lax.psum(x, names)

    def all_gather(self, x: Array, name: str, axis: int) -> Array:
        if self.mesh is None or self.size(name) == 1:
            return x
        return jax.lax.all_gather(x, name, axis=axis, tiled=True)

    def scatter_gradient(self, dw: Array, dtype: DTypeLike, dimension: int = 1) -> Array:
        """Partial gradient of this device's tokens, such as (H, D), to the whole sum's part that it
        stores, spread along `dimension`.

        What moves between devices is rounded to `dtype`, as a dense layer's gradient is.
        """
        if self.size(*self.axes.batch) == 1:
            return dw
        dw = dw.astype(dtype)
        if (size := self.size(self.axes.shard)) > 1:
            # Split by device along a new leading axis, which XLA's scatter would make of any other.
            shape = (*dw.shape[:dimension], size, -1, *dw.shape[dimension + 1 :])
            parts = row_major(jnp.moveaxis(dw.reshape(shape), dimension, 0))
            dw = row_major(jax.lax.psum_scatter(parts, self.axes.shard))
        return self.psum(dw, *(name for name in self.axes.batch if name != self.axes.shard))

    def from_first(self, tree: Any, *names: str) -> Any:
        """What the first device along `names` computed, on all of them.

        They computed the same; but what decides where rows live must be equal to the last bit, and
        nothing promises that of the same program on two devices.
        """
        names = tuple(name for name in names if self.size(name) > 1)
        if not names:
            return tree
        first = jax.lax.axis_index(names) == 0
        return jax.lax.psum(jax.tree.map(lambda a: jnp.where(first, a, 0), tree), names)


def _layout(sparsity: Sparsity, axes: MeshAxes | None, width: int, hidden: int) -> _Layout:
    layout = _Layout(current_mesh(axes), axes or MeshAxes(), sparsity)
    shards, tensor = sparsity.num_shards, layout.tensor
    if shards != 1 and not layout.own_clusters:
        raise ValueError(
            f"sparsity.{shards=} must be 1 or a multiple of the {tensor} devices of axis "
            f"{layout.axes.tensor!r}"
        )
    block = sparsity.block * layout.groups
    if hidden % block:
        raise ValueError(
            f"{hidden=} must be a multiple of {block}: {layout.groups} groups of neurons in blocks "
            f"of {block // layout.groups}"
        )
    columns = GROUP * layout.size(layout.axes.shard)
    if width % columns:
        raise ValueError(
            f"{width=} must be a multiple of {columns}: groups of {GROUP} on each of "
            f"{columns // GROUP} devices of axis {layout.axes.shard!r}"
        )
    return dataclasses.replace(layout, hidden=hidden // layout.groups)


def pack_ffn(
    w1: Array,
    w2: Array,
    wg: Array | None,
    betas: Array | None,
    sparsity: Sparsity,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    precision: Precision = "compute",
    axes: MeshAxes | None = MeshAxes(),
) -> PackedFFN:
    """`ops.pack_ffn` where the weights live: every device packs the part that it stores.

    2:4 groups and tiles of metadata lie within a device's columns, so that packed parts joined
    along the width are the packed whole, and nothing moves. Of 8-bit weights the scale and the norm
    of a group of neurons are agreed on over the shard axis (`routed_ffn_fp8`).

    Args:
      w1, w2: (H, D) and wg: (H, D) or None, as parameters are placed: P(tensor, shard).
      betas: (3,) float32.
      sparsity: what is sparse.
      dtype: of the packed weights.
      precision: as of `ops.pack_ffn`; 8-bit weights are gathered packed only (`Sparsity.gather`).
      axes: the mesh's axes.

    Returns:
      `PackedFFN` of G groups: dense (G E, h, D), values (G E h, D / 2), metadata; or in 8 bits
      columns (G E, D, h), values, metadata, scale (G,) and norm (G,). h is H / (G E), and more
      where neurons are shared (`Sparsity.live_neurons` of H / G), unless kernels take those once or
      the shard axis has several devices: then dense is (H, D), values (H, D / 2), as `stored_once`
      has them.

    Raises:
      ValueError: sizes that the mesh does not divide, or another precision.
      NotImplementedError: the named backend does not serve a device's part.
    """
    width, hidden = _check_weights(w1, w2, wg, sparsity)
    layout = _layout(sparsity, axes, width, hidden)
    if precision not in get_args(Precision):
        raise ValueError(f"{precision=} must be one of {get_args(Precision)}")
    shard, gated = layout.size(layout.axes.shard), wg is not None
    rows = layout.hidden
    sizes = routed_ffn_grouped.Sizes(
        width=width, hidden=rows, dtype=jnp.dtype(dtype), columns=width // shard
    )
    kernels = _kernels_of_8_bits(layout, sizes, gated) if precision == "fp8" else None
    if kernels is None:
        precision = "compute"
        kernels = routed_ffn_grouped.choose(sparsity, sizes, gated=gated)

    def pack(w1: Array, w2: Array, wg: Array | None, betas: Array | None) -> PackedFFN:
        if precision == "fp8":
            assert kernels is not None
            assert betas is not None
            axis = layout.axes.shard if shard > 1 else None
            part = routed_ffn_fp8.pack_network(w1, w2, betas, sparsity, kernels=kernels, axis=axis)
            of_group = lambda w: w._replace(scale=w.scale[None], norm=w.norm[None])
            return dataclasses.replace(part, w1=of_group(part.w1), w2=of_group(part.w2))
        part = _pack(w1, w2, wg, betas, sparsity, dtype=dtype, kernels=kernels)
        part = _rows_alone(part) if layout.packs_gathered else part
        every = layout.stored_every(kernels, precision)
        if part.shared_every == every:
            return part
        return part.changed(lambda w: stored_once.once(w, sparsity, rows), shared_every=every)

    def local(w1: Array, w2: Array, wg: Array | None, betas: Array | None) -> PackedFFN:
        parts = []
        for g in range(layout.local_groups):
            part = jax.tree.map(lambda w, g=g: w[g * rows : (g + 1) * rows], (w1, w2, wg))
            one, two, gate = part
            parts.append(pack(one, two, gate, betas))
        return parts[0] if len(parts) == 1 else jax.tree.map(lambda *a: jnp.concatenate(a), *parts)

    spec = layout.weight_spec
    of_16_bits = None if precision == "fp8" else kernels
    padding = routed_ffn_grouped.padding_of(of_16_bits, sparsity.live_neurons(rows))
    out = layout.packed_specs(kernels, gated, precision, padding)
    return layout.spmd(local, (spec, spec, spec, P()), out)(w1, w2, wg, betas)


def _kernels_of_8_bits(
    layout: _Layout, sizes: routed_ffn_grouped.Sizes, gated: bool
) -> registry.Backend | None:
    """The backend that packs and multiplies in 8 bits; None, with a warning, where none does.

    Raises:
      NotImplementedError: a named backend is strict.
    """
    sparsity = layout.sparsity
    if not layout.packs_gathered:
        return routed_ffn_fp8.choose(sparsity, sizes, gated=gated)
    # Rows of 8 bits would be as many bytes as what is packed in 16, and would be packed again.
    refusal = f"gather={sparsity.gather!r} moves rows of 16 bits; weights in 8 move packed"
    if sparsity.backend is not None:
        raise NotImplementedError(f"backend={sparsity.backend!r}: {refusal}")
    routed_ffn_fp8.report([refusal], sparsity, sizes, gated)
    return None


def _rows_alone(packed: PackedFFN) -> PackedFFN:
    return packed.changed(lambda w: PackedMatrix(w.dense))


def _gather(packed: PackedFFN, layout: _Layout, reader: registry.Backend | None) -> PackedFFN:
    """Whole rows of the packed weights on every device of the shard axis, for these kernels.

    What moves is what was packed once for the optimiser step, thresholded and rounded: 2:4 values
    and metadata for the products that read them, and bf16 rows (8-bit columns) for the others; or
    such rows alone, packed here (`Sparsity.gather`). Weights that are not 2:4 are rows in both, in
    another order. Shared neurons move once. XLA drops what a pass does not read.
    """
    kernels, sparsity = packed.kernels, layout.sparsity
    reads_once = routed_ffn_grouped.reads_once(reader, sparsity, layout.hidden)
    repeats = packed.shared_every > 0 and not reads_once

    def whole(matrix: Any) -> Any:
        if isinstance(matrix, PackedMatrix8):
            parts = {
                name: layout.all_gather(getattr(matrix, name), layout.axes.shard, 1)
                for name in ("columns", "values", "metadata")
            }
            return matrix._replace(**parts)
        dense = layout.all_gather(matrix.dense, layout.axes.shard, matrix.dense.ndim - 1)
        rest = (
            None if a is None else layout.all_gather(a, layout.axes.shard, 1)
            for a in (matrix.values, matrix.metadata)
        )
        matrix = PackedMatrix(dense, *rest)
        if repeats:
            matrix = stored_once.for_each_expert(matrix, sparsity, layout.hidden)
        if kernels is not None and layout.packs_gathered:
            packed = routed_ffn_grouped.pack_rows(matrix.dense, sparsity, kernels=kernels)
            return PackedMatrix(matrix.dense, *packed)
        return matrix

    return packed.changed(whole, shared_every=0 if repeats else packed.shared_every)


def _group(packed: PackedFFN, g: int, groups: int) -> PackedFFN:
    """The weights of one of so many groups of neurons of this device."""

    def rows(a: Array) -> Array:
        size = a.shape[0] // groups
        return a[g * size : (g + 1) * size]

    part = packed if groups == 1 else jax.tree.map(rows, packed)
    if part.precision != "fp8":
        return part
    alone = lambda w: w._replace(scale=w.scale.reshape(()), norm=w.norm.reshape(()))
    return dataclasses.replace(part, w1=alone(part.w1), w2=alone(part.w2))


def routed_ffn(
    x: Array,
    w1: Array,
    w2: Array,
    wg: Array | None,
    packed: PackedFFN,
    centers: Array,
    bias: Array,
    sparsity: Sparsity,
    *,
    axes: MeshAxes | None = MeshAxes(),
) -> tuple[Array, Array]:
    """Routes each device's tokens and runs `ops.routed_ffn` on them, group by group of neurons.

    Y3 is the sum over the groups. Saved for the backward pass: what `ops.routed_ffn` saves, for
    this device's tokens and neurons; the packed weights as they are stored, not gathered.

    Args:
      x: (B, ..., D), the dtype of `packed` (bfloat16 of one in 8 bits); the leading axis over the
        batch axes.
      w1, w2: (H, D). wg: (H, D) or None. They receive gradients, in their own dtype; what is summed
        over devices is rounded to x's dtype first, as in a dense layer.
      packed: `pack_ffn` of these weights.
      centers: (S E, D) float32. bias: (S E,) float32.
      sparsity: what is sparse; static.
      axes: the mesh's axes.

    Returns:
      y like x, and counts (N, S E) int32: tokens of each expert on each of the N devices of the
      batch axes; not summed, so that all layers share one reduction.

    Raises:
      ValueError: sizes that do not fit each other or the mesh.
      NotImplementedError: the named backend does not serve this device, shape or option.
    """
    experts = sparsity.num_shards * sparsity.num_experts
    width = w1.shape[-1]
    if centers.shape != (experts, width) or bias.shape != (experts,):
        raise ValueError(f"{centers.shape=} and {bias.shape=} must be of {experts=}, {width=}")
    return apply_routed(x, w1, w2, wg, packed, (centers, bias), sparsity, axes=axes)


def apply_routed(
    x: Array,
    w1: Array,
    w2: Array,
    wg: Array | None,
    packed: PackedFFN,
    router: tuple[Array, Array] | Array,
    sparsity: Sparsity,
    *,
    axes: MeshAxes | None = MeshAxes(),
) -> tuple[Array, Array]:
    """`routed_ffn`, with experts that each device chooses, or that are chosen.

    Args:
      router: centers and bias to choose by, or the expert (...,) int32 of each row of x, placed as
        the rows are (`Sparsity.shards` 1, no tensor axis).
      x, w1, w2, wg, packed, sparsity, axes: as for `routed_ffn`, which says what is returned and
        raised.
    """
    width, hidden = _check_weights(w1, w2, wg, sparsity)
    layout = _layout(sparsity, axes, width, hidden)
    devices = layout.size(*layout.axes.batch)
    if x.ndim < 2 or x.shape[-1] != width:
        raise ValueError(f"{x.shape=} must end in {width=}")
    if x.shape[0] % devices:
        raise ValueError(f"{x.shape=}: the leading axis must be a multiple of {devices=}")
    if packed.dtype != x.dtype:
        raise ValueError(f"packed dtype={packed.dtype} must be {x.dtype=}")
    if not isinstance(router, tuple) and (router.shape != x.shape[:-1] or layout.groups != 1):
        raise ValueError(f"{router.shape=} must be {x.shape[:-1]}, and {layout.groups=} 1")
    sizes = routed_ffn_grouped.Sizes(
        width=width,
        hidden=layout.hidden,
        dtype=x.dtype,
        tokens=math.prod(x.shape[:-1]) // devices,
    )
    kernels, packed = _serving(packed, sparsity, sizes, gated=wg is not None)
    if kernels is not None and packed.precision != "fp8":
        together = _together(layout, kernels, sizes, gated=wg is not None)
        layout = dataclasses.replace(layout, together=together)
    return _routed_ffn(x, w1, w2, wg, packed, router, kernels, layout)


def _together(
    layout: _Layout, kernels: registry.Backend, sizes: routed_ffn_grouped.Sizes, *, gated: bool
) -> int:
    """Groups of neurons that one call of the kernels can serve, and that are worth it.

    Their tokens are then gathered and stored once, for a little more padding: at most an eighth of
    the tokens, and `COMBINATIONS`.
    """
    sparsity, groups = layout.sparsity, layout.local_groups
    if sparsity.num_experts == 1 or not layout.own_clusters:
        return 1
    for together in range(groups, 1, -1):
        combinations = sparsity.num_experts**together
        padding = combinations * sparsity.v // 2
        if groups % together or combinations > COMBINATIONS or 8 * padding > (sizes.tokens or 0):
            continue
        try:
            of_all = sizes._replace(shards=together)
            routed_ffn_grouped.check(kernels, sparsity, of_all, gated=gated)
        except NotImplementedError:
            continue
        return together
    return 1


@partial(jax.custom_vjp, nondiff_argnums=(6, 7))
def _routed_ffn(x, w1, w2, wg, packed, router, kernels, layout):
    return _routed_ffn_fwd(x, w1, w2, wg, packed, router, kernels, layout)[0]


def _routed_ffn_fwd(x, w1, w2, wg, packed, router, kernels, layout):
    sparsity, path = layout.sparsity, _path(kernels, packed)
    experts, chooses = sparsity.num_experts, isinstance(router, tuple)

    def local(x, packed, router):
        tokens = x.reshape(-1, x.shape[-1])
        packed = _gather(packed, layout, kernels)
        y, saved, counts, together = 0, [], [], layout.together

        def choice(g):
            if not chooses:
                return router.reshape(-1)
            own = slice(g * experts, (g + 1) * experts)
            centers, bias = (a[own] for a in router)
            return assign_tokens(tokens, centers, bias, sparsity.metric)

        for call in range(layout.calls):
            if experts == 1:
                plan, count = None, jnp.full((1,), tokens.shape[0], jnp.int32)
            else:
                chosen = [choice(g) for g in range(call * together, (call + 1) * together)]
                spread = sparsity.spread_tokens
                combined = combine(chosen, experts)
                plan = plan_tokens(combined, experts**together, sparsity.v, spread=spread)
                count = counts_by_shard(plan.counts, experts, together)
            part = _group(packed, call, layout.calls)
            out, kept = path.forward(tokens, part, plan, sparsity, kernels)
            y = y + out
            saved.append((kept, plan))
            counts.append(count)
        y = layout.psum(y, layout.axes.tensor).reshape(x.shape)
        # One more axis in front, over all devices: what a device saved stays where it is.
        return y, jnp.concatenate(counts)[None], jax.tree.map(lambda a: a[None], saved)

    batch = P(layout.axes.batch)
    function = layout.spmd(
        local,
        (
            batch,
            layout.specs_of(packed),
            layout.router_spec if chooses else batch,
        ),
        (batch, P(layout.axes.batch, *layout.router_spec), P(layout.axes.names)),
    )
    y, counts, saved = function(x, packed, router)
    saved = keep(saved)
    # Of the master weights only the dtypes matter; arrays of no elements carry them.
    dtypes = tuple(None if w is None else jnp.zeros((0,), w.dtype) for w in (w1, w2, wg))
    return (y, counts), (packed, saved, dtypes)


def _routed_ffn_bwd(kernels, layout, residuals, cotangents):
    packed, saved, dtypes = residuals
    sparsity, path = layout.sparsity, _path(kernels, packed)

    def local(dy, packed, saved):
        shape = dy.shape
        dy = dy.reshape(-1, shape[-1])
        packed = _gather(packed, layout, kernels)
        dx, parts = 0, []
        for call, (kept, plan) in enumerate(jax.tree.map(lambda a: a[0], saved)):
            part = _group(packed, call, layout.calls)
            own, dw = path.backward(dy, kept, part, plan, sparsity, kernels)
            dx = dx + own
            parts.append(dw)
        dw = jax.tree.map(lambda *rows: jnp.concatenate(rows), *map(list, parts))

        dw = [
            None if d is None else layout.scatter_gradient(d, dy.dtype).astype(like.dtype)
            for d, like in zip(dw, dtypes, strict=True)
        ]
        return layout.psum(dx, layout.axes.tensor).reshape(shape), dw

    batch, spec = P(layout.axes.batch), layout.weight_spec
    gated = dtypes[2] is not None
    function = layout.spmd(
        local,
        (
            batch,
            layout.specs_of(packed),
            P(layout.axes.names),
        ),
        (batch, [spec, spec, spec if gated else None]),
    )
    dx, dw = function(cotangents[0], packed, saved)
    return dx, *dw, None, None


_routed_ffn.defvjp(_routed_ffn_fwd, _routed_ffn_bwd)


def cluster(
    w1: Array,
    centers: Array | None,
    sparsity: Sparsity,
    *,
    axes: MeshAxes | None = MeshAxes(),
) -> tuple[Array, Array, Array]:
    """Clusters the neurons, shard by shard; the same on every device to the last bit.

    W1 of one layer is gathered where it is clustered: rare, and small beside a step.

    Args:
      w1: (H, D). centers: (S E, D) to start from, or None.
      sparsity: with routing. axes: the mesh's axes.

    Returns:
      permutation (H,) int32 (new row j is old row permutation[j], within its shard; shared neurons
      stay), centers (S E, D) float32, and the share of neurons that changed place, scalar float32.
    """
    layout = _layout(sparsity, axes, w1.shape[1], w1.shape[0])
    axes, experts, shards = layout.axes, sparsity.num_experts, sparsity.num_shards
    hidden = w1.shape[0] // shards
    own, routed = layout.own_clusters, routed_neurons(hidden, sparsity)

    def one(w1: Array, centers: Array | None) -> tuple[Array, Array, Array]:
        clusters = cluster_neurons(
            w1[routed] if sparsity.shares else w1,
            experts,
            metric=sparsity.metric,
            iterations=sparsity.kmeans_iterations,
            init_centers=centers,
        )
        place = jnp.arange(routed.size, dtype=jnp.int32)
        moved = clusters.assignment != place % sparsity.m // GROUP
        churn = jnp.sum(moved, dtype=jnp.float32)
        permutation = interleave(clusters.assignment, sparsity.m)
        if sparsity.shares:
            everyone = jnp.arange(hidden, dtype=jnp.int32)
            permutation = everyone.at[routed].set(jnp.asarray(routed)[permutation])
        return permutation, clusters.centers, churn

    def local(w1: Array, centers: Array | None) -> tuple[Array, Array, Array]:
        w1 = layout.all_gather(w1, axes.shard, 1)
        if not own:
            w1 = layout.all_gather(w1, axes.tensor, 0)
        rows = w1.reshape(-1, hidden, w1.shape[1])
        start = None if centers is None else centers.reshape(-1, experts, w1.shape[1])
        permutation, new, churn = jax.vmap(one, in_axes=(0, None if start is None else 0))(
            rows, start
        )
        permutation += hidden * jnp.arange(rows.shape[0], dtype=jnp.int32)[:, None]
        churn = jnp.sum(churn) / (hidden * shards)
        if own and layout.tensor > 1:
            permutation += w1.shape[0] * jax.lax.axis_index(axes.tensor).astype(jnp.int32)
            churn = layout.psum(churn, axes.tensor)
        result = permutation.reshape(-1), new.reshape(-1, w1.shape[1]), churn
        return layout.from_first(result, *(axes.batch if own else axes.names))

    spec = layout.router_spec
    return layout.spmd(local, (layout.weight_spec, spec), (spec, spec, P()))(w1, centers)


def reroute(
    x: Array,
    previous: tuple[Array, Array] | None,
    centers: Array,
    bias: Array,
    sparsity: Sparsity,
    *,
    hidden: int,
    fit: bool,
    axes: MeshAxes | None = MeshAxes(),
) -> tuple[Array, Array]:
    """Biases for new centres, and how many tokens the change sends elsewhere.

    Scores of all tokens are gathered for a fit (E numbers a token; rare), so that it does not
    depend on the mesh; the biases are the same on every device to the last bit.

    Args:
      x: (B, ..., D), inputs of the network; the leading axis over the batch axes.
      previous: (centers, bias) before the change, or None.
      centers: (S E, D) float32. bias: (S E,) float32.
      sparsity: with routing. hidden: H.
      fit: whether the biases are fitted to these tokens (`sparsejax.routing.fit_bias`).
      axes: the mesh's axes.

    Returns:
      biases (S E,) float32, and the share of tokens (and shards) whose expert is another than under
      `previous`, scalar float32, zero without.
    """
    width = x.shape[-1]
    layout = _layout(sparsity, axes, width, hidden)
    axes, experts, own_clusters = layout.axes, sparsity.num_experts, layout.own_clusters

    def local(x: Array, previous: Any, centers: Array, bias: Array) -> tuple[Array, Array]:
        tokens = x.reshape(-1, width)
        biases, moved = [], jnp.float32(0)
        clusterings = centers.shape[0] // experts
        for g in range(clusterings):
            own = slice(g * experts, (g + 1) * experts)
            scores, new = token_scores(tokens, centers[own], sparsity.metric), bias[own]
            if fit:
                everywhere = scores
                for name in axes.batch:
                    everywhere = layout.all_gather(everywhere, name, 0)
                new = fit_bias(everywhere, new)
            biases.append(new)
            if previous is not None:
                was = assign_tokens(tokens, previous[0][own], previous[1][own], sparsity.metric)
                now = jnp.argmax(scores + new, axis=1)
                moved += jnp.mean(now != was, dtype=jnp.float32) / clusterings
        names = (*axes.batch, axes.tensor) if own_clusters else axes.batch
        churn = layout.psum(moved, *names) / layout.size(*names)
        same = axes.batch if own_clusters else axes.names
        return layout.from_first(jnp.concatenate(biases), *same), churn

    spec = layout.router_spec
    before = None if previous is None else (spec, spec)
    function = layout.spmd(local, (P(axes.batch), before, spec, spec), (spec, P()))
    return function(x, previous, centers, bias)


def permute_rows(
    w: Array,
    permutation: Array,
    sparsity: Sparsity,
    *,
    axes: MeshAxes | None = MeshAxes(),
) -> Array:
    """w[permutation] for an FFN matrix (H, D), or a moment of one, where its rows live.

    A permutation that `cluster` made. Rows move between devices only if the clusters span them.
    """
    layout = _layout(sparsity, axes, w.shape[1], w.shape[0])
    axes = layout.axes
    if layout.mesh is None:
        return jnp.take(w, permutation, axis=0)

    def local(w: Array, permutation: Array) -> Array:
        if layout.own_clusters:
            first = w.shape[0] * jax.lax.axis_index(axes.tensor)
            return jnp.take(w, permutation - first, axis=0)
        return jnp.take(layout.all_gather(w, axes.tensor, 0), permutation, axis=0)

    rows = P(axes.tensor)
    return layout.spmd(local, (layout.weight_spec, rows), layout.weight_spec)(w, permutation)
