"""Linear layers with a 2:4 weight as a transformer's attention has them, on one device or a mesh.

What `sparsejax.ops.matmul24` computes, for weights that are packed once per optimiser step: the
products that 2:4 cannot serve read the same thresholded weight dense, from memory. Groups of four
run along the width D of the model, which is the axis that a mesh shards: every device packs what it
stores, and parts joined along D are the packed whole.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from kernels.reference import TILE
from sparsejax.formats import Sparse24, pack
from sparsejax.ops.matmul24 import _dot
from sparsejax.ops.spmm24 import spmm24
from sparsejax.remat import keep
from sparsejax.sharding import MeshAxes, _Layout, current_mesh
from sparsejax.spec import GROUP, Sparsity

Axis = Literal[0, 1]


class PackedProjection(NamedTuple):
    """beta S(w), from `pack_projection`."""

    values: Array
    """(m, D / 2), packed along D; m, the other axis of w, padded to a multiple of 64."""
    metadata: Array
    """(m / 64, D / 64, 128) int32."""
    dense: Array
    """Of w's shape: the same, not packed."""


def _layout(w: Array, axis: Axis, sparsity: Sparsity, axes: MeshAxes | None) -> _Layout:
    layout = _Layout(current_mesh(axes), axes or MeshAxes(), sparsity)
    if axis not in (0, 1):
        raise ValueError(f"{axis=} must be 0 or 1")
    if w.ndim != 2:
        raise ValueError(f"{w.shape=} must have two axes")
    if layout.tensor > 1:
        raise ValueError(
            f"2:4 projections are not spread over the {layout.tensor} devices of axis "
            f"{layout.axes.tensor!r}: it must have one"
        )
    shards = layout.size(layout.axes.shard)
    columns = GROUP if shards == 1 else TILE * shards
    if w.shape[axis] % columns:
        raise ValueError(
            f"{w.shape=} must have a multiple of {columns} along {axis=}: packed parts on "
            f"{shards} devices"
        )
    return layout


def _weight_spec(axis: Axis, layout: _Layout) -> P:
    shard = layout.axes.shard
    return P(shard, None) if axis == 0 else P(None, shard)


def _packed_specs(axis: Axis, layout: _Layout) -> Any:
    shard = layout.axes.shard
    return PackedProjection(P(None, shard), P(None, shard, None), _weight_spec(axis, layout))  # type: ignore[arg-type]


def pack_projection(
    w: Array,
    beta: Array,
    sparsity: Sparsity,
    *,
    axis: Axis,
    dtype: DTypeLike = jnp.bfloat16,
    axes: MeshAxes | None = None,
) -> PackedProjection:
    """Thresholds, scales and packs a weight: once for each optimiser step, not differentiated.

    Args:
      w: (k, n) master weight; on a mesh spread over the shard axis along `axis`.
      beta: float32 scalar (`sparsejax.prune.soft_threshold_beta`).
      sparsity: the backend: a name is strict, None takes the fastest.
      axis: of w that groups of four run along, D.
      dtype: of the packed weight: the compute dtype.
      axes: what the axes of the mesh mean; None for one device.

    Raises:
      ValueError: sizes that do not fit, or a mesh with a tensor axis.
      NotImplementedError: the named backend does not serve this device, shape or dtype.
    """
    layout = _layout(w, axis, sparsity, axes)

    def local(w: Array, beta: Array) -> PackedProjection:
        packed = pack(
            w,
            axis=axis,
            mode="soft_threshold",
            scale=beta,
            dtype=dtype,
            backend=sparsity.backend,
        )
        return PackedProjection(packed.values, packed.metadata, packed.unpack())

    specs = (_weight_spec(axis, layout), P())
    function = layout.spmd(local, specs, _packed_specs(axis, layout))
    return function(jax.lax.stop_gradient(w), jax.lax.stop_gradient(beta))


def projection24(
    x: Array,
    w: Array,
    packed: PackedProjection,
    sparsity: Sparsity,
    *,
    axis: Axis,
    axes: MeshAxes | None = None,
) -> Array:
    """x @ (beta S(w)), and its gradients: that of x exact, that of w straight through.

    | product        | axis=0                | axis=1                |
    | -------------- | --------------------- | --------------------- |
    | y = x W        | sparse                | dense, W thresholded  |
    | dx = dy W^T    | dense, W thresholded  | sparse                |
    | dw = x^T dy    | dense                 | dense                 |

    Products accumulate in float32 and are rounded once, to x's dtype; dw is float32 on one device,
    and what is summed over devices is rounded to x's dtype first.

    Args:
      x: (..., k), the dtype of `packed`; on a mesh the leading axis is spread over the batch axes.
      w: (k, n): it receives the gradient, in its own dtype; its values come from `packed`.
      packed: `pack_projection` of w.
      sparsity: the backend, as for `pack_projection`. axis, axes: as there.

    Returns:
      (..., n) in x's dtype.

    Raises:
      ValueError: sizes or dtypes that do not fit, or a mesh with a tensor axis.
      NotImplementedError: the named backend does not serve this device, shape or dtype.
    """
    layout = _layout(w, axis, sparsity, axes)
    if x.ndim < 2 or x.shape[-1] != w.shape[0]:
        raise ValueError(f"{x.shape=} must be (..., {w.shape[0]}) for {w.shape=}")
    if packed.dense.shape != w.shape or packed.dense.dtype != x.dtype:
        found = (packed.dense.shape, packed.dense.dtype.name)
        raise ValueError(f"packed {found} must be {(w.shape, x.dtype.name)}")
    devices = layout.size(*layout.axes.batch)
    if x.shape[0] % devices:
        raise ValueError(f"{x.shape=}: the leading axis must be a multiple of {devices=}")
    return _projection24(x, w, packed, axis, layout)


def _sparse_product(x: Array, packed: PackedProjection, axis: Axis, layout: _Layout) -> Array:
    """(T, D) times the packed matrix, contracting D, whole on this device."""
    whole = [layout.all_gather(a, layout.axes.shard, 1) for a in (packed.values, packed.metadata)]
    size = packed.dense.shape[1 - axis]
    shape = (x.shape[1], size) if axis == 0 else (size, x.shape[1])
    a = Sparse24(whole[0], whole[1], shape, axis)
    return spmm24(a, x, b_layout="nk", out_layout="nm", backend=layout.sparsity.backend)


def _dense_product(
    x: Array, packed: PackedProjection, contract: int, axis: Axis, layout: _Layout
) -> Array:
    return _dot(x, layout.all_gather(packed.dense, layout.axes.shard, axis), (1, contract), x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _projection24(x: Array, w: Array, packed: PackedProjection, axis: Axis, layout: _Layout):
    del w

    def local(x: Array, packed: PackedProjection) -> Array:
        rows = x.reshape(-1, x.shape[-1])
        if axis == 0:
            y = _sparse_product(rows, packed, axis, layout)
        else:
            y = _dense_product(rows, packed, 0, axis, layout)
        return y.reshape(*x.shape[:-1], -1)

    batch = P(layout.axes.batch)
    return layout.spmd(local, (batch, _packed_specs(axis, layout)), batch)(x, packed)


def _forward(x, w, packed, axis, layout):
    # Of the master weight only the dtype matters; an array of no elements carries it.
    like = jnp.zeros((0,), w.dtype)
    return keep(_projection24(x, w, packed, axis, layout)), (x, packed, like)


def _backward(axis, layout, residuals, dy):
    x, packed, like = residuals

    def local(dy: Array, x: Array, packed: PackedProjection) -> tuple[Array, Array]:
        rows, dy = (a.reshape(math.prod(a.shape[:-1]), a.shape[-1]) for a in (x, dy))
        if axis == 1:
            dx = _sparse_product(dy, packed, axis, layout)
        else:
            dx = _dense_product(dy, packed, 1, axis, layout)
        dw = layout.scatter_gradient(_dot(rows, dy, (0, 0), jnp.float32), x.dtype, axis)
        return dx.reshape(x.shape), dw.astype(like.dtype)

    batch = P(layout.axes.batch)
    in_specs = (batch, batch, _packed_specs(axis, layout))
    function = layout.spmd(local, in_specs, (batch, _weight_spec(axis, layout)))
    # None: no gradient into the packed weight; it goes straight through.
    return *function(dy, x, packed), None


_projection24.defvjp(_forward, _backward)
