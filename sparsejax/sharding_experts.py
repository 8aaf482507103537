"""A mixture of experts on a mesh of devices: what `sparsejax.sharding` is to the routed network.

Tokens are spread over the batch axes and stay where they are; every device has all experts, the
width of their matrices spread over the shard axis. Sparse experts are the routed network's own
rule, told which expert each row meets (`sharding.apply_routed`). Here is the rest: dense experts,
choices that are made device by device, and fits and clusterings that must come out the same
everywhere. Experts are not spread over the tensor axis, nor over any other.

Without a mesh, or with a single device, everything here computes the same function locally.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from sparsejax.ops.grouped_dot import (
    GroupedBackend,
    group_rows,
    grouped_dot,
    grouped_dot_gradients,
)
from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.ops.relu2 import relu2
from sparsejax.remat import keep
from sparsejax.routing import cluster_within_experts, from_expert_major, to_expert_major
from sparsejax.sharding import MeshAxes, _Layout, apply_routed, current_mesh, pack_ffn
from sparsejax.spec import Sparsity


def _layout(axes: MeshAxes | None, rows: int | None = None, width: int | None = None) -> _Layout:
    """Raises ValueError for a mesh that does not divide the rows or the width, or has a tensor
    axis."""
    layout = _Layout(current_mesh(axes), axes or MeshAxes(), Sparsity())
    if layout.tensor > 1:
        raise ValueError(
            f"experts are not spread over the {layout.tensor} devices of axis "
            f"{layout.axes.tensor!r}, which must be 1"
        )
    devices, shards = layout.size(*layout.axes.batch), layout.size(layout.axes.shard)
    if rows is not None and rows % devices:
        raise ValueError(f"{rows=} of the leading axis must be a multiple of {devices=}")
    if width is not None and width % shards:
        raise ValueError(
            f"{width=} must be a multiple of the {shards} devices of axis {layout.axes.shard!r}"
        )
    return layout


def by_device(
    function: Callable, of_tokens: tuple[Array, ...], *state: Array, axes: MeshAxes | None
) -> Any:
    """function(*of_tokens, *state) of each device's own rows; not differentiated.

    For choices among a row's own numbers, which XLA need not find out to be just that.

    Args:
      function: gives arrays with as many rows as it gets.
      of_tokens: (T, ...), the rows over the batch axes. state: equal on all devices.
      axes: the mesh's axes.

    Raises:
      ValueError: rows that the mesh does not divide, or a tensor axis.
    """
    layout = _layout(axes, of_tokens[0].shape[0])
    batch = P(layout.axes.batch)
    arguments = jax.lax.stop_gradient((*of_tokens, *state))
    specs = (batch,) * len(of_tokens) + (P(),) * len(state)
    return layout.spmd(function, specs, batch)(*arguments)


def everywhere(
    function: Callable, of_tokens: tuple[Array, ...], *state: Array, axes: MeshAxes | None
) -> Any:
    """function(*of_tokens, *state) of the rows of all devices, the same on each to the last bit.

    Rows are gathered: for what is rare and has few numbers a row. The first device's result is
    taken by all.

    Args:
      function: what to compute.
      of_tokens: (T, ...), the rows over the batch axes. state: equal on all devices.
      axes: the mesh's axes.

    Raises:
      ValueError: rows that the mesh does not divide, or a tensor axis.
    """
    layout = _layout(axes, of_tokens[0].shape[0])
    names = layout.axes.batch

    def local(of_tokens: tuple[Array, ...], state: tuple[Array, ...]) -> Any:
        # The last axis first: rows lie as the mesh counts its devices.
        for name in reversed(names):
            of_tokens = tuple(layout.all_gather(rows, name, 0) for rows in of_tokens)
        return layout.from_first(function(*of_tokens, *state), *names)

    return layout.spmd(local, (P(names), P()), P())(of_tokens, state)


def cluster(
    w1: Array,
    centers: Array | None,
    num_experts: int,
    clusters: int,
    sparsity: Sparsity,
    *,
    axes: MeshAxes | None,
) -> tuple[Array, Array, Array]:
    """`cluster_within_experts` of a W1 whose width is spread over the shard axis.

    W1 of one layer is gathered where it is clustered; the result is the same on every device to the
    last bit. No neuron leaves its expert.

    Args:
      w1: (H, D). centers: (E S, D) to start from, or None.
      num_experts: E. clusters: S.
      sparsity: metric and iterations.
      axes: the mesh's axes.

    Returns:
      As `cluster_within_experts`: permutation (H,), centers (E S, D), share of neurons moved.

    Raises:
      ValueError: sizes that the mesh does not divide, or a tensor axis.
    """
    layout = _layout(axes, width=w1.shape[1])

    def local(w1: Array, centers: Array | None) -> tuple[Array, Array, Array]:
        found = cluster_within_experts(
            layout.all_gather(w1, layout.axes.shard, 1),
            num_experts,
            clusters,
            metric=sparsity.metric,
            iterations=sparsity.kmeans_iterations,
            init_centers=centers,
        )
        return layout.from_first(found, *layout.axes.batch)

    return layout.spmd(local, (layout.weight_spec, P()), P())(w1, centers)


def pack_experts(
    w1: Array,
    w2: Array,
    betas: Array,
    sparsity: Sparsity,
    *,
    dtype: DTypeLike,
    axes: MeshAxes | None,
) -> PackedFFN:
    """`sharding.pack_ffn` of experts' matrices: every device packs the part that it stores.

    Raises:
      ValueError: sizes that the mesh does not divide, or a tensor axis.
      NotImplementedError: the named backend does not serve a device's part.
    """
    _layout(axes)
    return pack_ffn(w1, w2, None, betas, sparsity, dtype=dtype, axes=axes)


def sparse_experts(
    rows: Array,
    groups: Array,
    w1: Array,
    w2: Array,
    packed: PackedFFN,
    sparsity: Sparsity,
    *,
    axes: MeshAxes | None,
) -> tuple[Array, Array]:
    """Each row through its group of neurons, in V:N:M form, every device for its own rows.

    Args:
      rows: (R, D), over the batch axes; a token stands as often as it has experts.
      groups: (R,) int32 in 0..M/4-1, placed as the rows.
      w1, w2: (H, D), which receive gradients.
      packed: `pack_experts` of them.
      sparsity: what is sparse; static.
      axes: the mesh's axes.

    Returns:
      (R, D), and counts (N, M / 4) int32 of each of the N devices of the batch axes, not summed.

    Raises:
      ValueError: sizes that do not fit each other or the mesh, or a tensor axis.
      NotImplementedError: the named backend does not serve this device, shape or option.
    """
    _layout(axes, rows.shape[0])
    y, counts = apply_routed(rows, w1, w2, None, packed, groups, sparsity, axes=axes)
    # The gates' gradients read it: kept, or it would take another gather to make it again.
    return keep(y), counts


def dense_experts(
    x: Array,
    experts: Array,
    w1: Array,
    w2: Array,
    num_experts: int,
    *,
    backend: GroupedBackend | None = None,
    axes: MeshAxes | None,
) -> tuple[Array, Array]:
    """relu(x W1_e)^2 W2_e of each of a token's k experts, every device for its own tokens.

    Matrices are rounded to x's dtype and gathered over the shard axis, in the forward and again in
    the backward pass; their gradients are scattered in that dtype. Saved for the backward pass: x,
    k T rows of Y2, and where the rows of each expert are.

    Args:
      x: (T, D), over the batch axes, in the dtype of the products.
      experts: (T, k) int32, placed as x.
      w1, w2: (H, D) of E experts in interleaved order, floating point.
      num_experts: E.
      backend: as for `grouped_dot`.
      axes: the mesh's axes.

    Returns:
      (T, k, D) in x's dtype, and counts (N, E) int32: rows of each expert on each of the N devices
      of the batch axes; not summed, so that all layers share one reduction.

    Raises:
      ValueError: sizes that the mesh does not divide, or a tensor axis.
    """
    layout = _layout(axes, x.shape[0], w1.shape[1])
    return _dense_experts(x, experts, w1, w2, num_experts, backend, layout)


def _gathered(w: Array, x: Array, num_experts: int, layout: _Layout) -> Array:
    """(H, D / shards), of a device, to (E, h, D) in x's dtype."""
    own = to_expert_major(w.astype(x.dtype), 0, num_experts)
    if layout.size(layout.axes.shard) == 1:
        return own
    # Whole parts in front, which XLA gathers as they lie; along the width it would turn them.
    parts = jax.lax.all_gather(own, layout.axes.shard)
    return jnp.moveaxis(parts, 0, 2).reshape(*own.shape[:2], -1)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _dense_experts(x, experts, w1, w2, num_experts, backend, layout):
    return _dense_experts_fwd(x, experts, w1, w2, num_experts, backend, layout)[0]


def _dense_experts_fwd(x, experts, w1, w2, num_experts, backend, layout):
    def local(x, experts, w1, w2):
        each = experts.shape[1]
        one, two = (_gathered(w, x, num_experts, layout) for w in (w1, w2))
        order, inverse, counts = group_rows(experts.reshape(-1), num_experts)
        product = partial(grouped_dot, sizes=counts, backend=backend)
        y2 = relu2(product(x[order // each], one.swapaxes(1, 2)))
        y = product(y2, two)[inverse].reshape(-1, each, x.shape[1])
        # One more axis in front, over all devices: what a device saved stays where it is.
        saved = jax.tree.map(lambda a: a[None], (y2, order, inverse, counts))
        return y, counts[None], saved

    batch, spec = P(layout.axes.batch), layout.weight_spec
    function = layout.spmd(local, (batch, batch, spec, spec), (batch, batch, batch))
    y, counts, saved = function(x, experts, w1, w2)
    # As in `sparse_experts`.
    return (keep(y), counts), (x, w1, w2, keep(saved))


def _dense_experts_bwd(num_experts, backend, layout, residuals, cotangents):
    def local(dy, x, w1, w2, saved):
        y2, order, inverse, counts = jax.tree.map(lambda a: a[0], saved)
        tokens, each, width = dy.shape
        one, two = (_gathered(w, x, num_experts, layout) for w in (w1, w2))
        gradients = partial(grouped_dot_gradients, sizes=counts, backend=backend)
        dy2, dw2 = gradients(y2, two, dy=dy.reshape(-1, width)[order])
        # As the rule of `relu2`, from its result alone.
        slope = 2 * jnp.sqrt(y2.astype(jnp.promote_types(y2.dtype, jnp.float32)))
        dy1 = (slope * dy2).astype(y2.dtype)
        dx, dw1 = gradients(x[order // each], one.swapaxes(1, 2), dy=dy1)
        dx = dx[inverse].reshape(tokens, each, width)
        dx = jnp.sum(dx, axis=1, dtype=jnp.promote_types(x.dtype, jnp.float32)).astype(x.dtype)

        def stored(dw, w):
            part = layout.scatter_gradient(from_expert_major(dw, 0), x.dtype)
            return part.astype(w.dtype)

        return dx, stored(dw1.swapaxes(1, 2), w1), stored(dw2, w2)

    batch, spec = P(layout.axes.batch), layout.weight_spec
    function = layout.spmd(local, (batch, batch, spec, spec, batch), (batch, spec, spec))
    x, w1, w2, saved = residuals
    dx, dw1, dw2 = function(cotangents[0], x, w1, w2, saved)
    return dx, None, dw1, dw2


_dense_experts.defvjp(_dense_experts_fwd, _dense_experts_bwd)
