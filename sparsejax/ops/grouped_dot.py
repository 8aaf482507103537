"""Products of rows with the matrix of their group: what a mixture of dense experts is made of."""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax

from kernels import reference, registry

GroupedBackend = Literal["xla", "pallas"]

# Tiles of JAX's own Hopper kernels: 128 x 128 of the result, 64 along the contraction, four stages.
_TILES: dict[str, int] = {
    "block_m": 128,
    "block_n": 128,
    "block_k": 64,
    "max_concurrent_steps": 4,
    "grid_block_n": 8,
}


def grouped_dot(
    x: Array, w: Array, sizes: Array, *, backend: GroupedBackend | None = None
) -> Array:
    """Rows of x times the matrix of their group: y[r] = x[r] @ w[g], differentiable.

    On GPUs XLA multiplies every row with every group's matrix, G times the work, and adds what its
    masks leave ("xla", `jax.lax.ragged_dot`). "pallas" are the Hopper kernels that JAX ships
    (`jax.experimental.pallas.ops.gpu.ragged_dot_mgpu` and its transposed form), which multiply each
    row once.

    Args:
      x: (R, K), the rows of a group together, groups in order.
      w: (G, K, N), x's dtype.
      sizes: (G,) int32: rows of each group. They add up to R.
      backend: None takes "pallas" for 16-bit operands whose K and N are multiples of 128, on a
        Hopper GPU, and "xla" elsewhere.

    Returns:
      (R, N) in x's dtype, accumulated in float32.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    if _backend(x, w, sizes, backend) == "xla":
        return _xla_dot(x, w, sizes)
    return _pallas_dot(x, w, sizes)


def grouped_dot_gradients(
    x: Array, w: Array, sizes: Array, dy: Array, *, backend: GroupedBackend | None = None
) -> tuple[Array, Array]:
    """What `grouped_dot` hands back for dy: for derivative rules that have what they need at hand.

    Args:
      x, w, sizes, backend: as for `grouped_dot`. dy: (R, N), x's dtype.

    Returns:
      dx (R, K) and dw (G, K, N), in x's dtype.

    Raises:
      ValueError: as `grouped_dot`.
    """
    if _backend(x, w, sizes, backend) == "xla":
        # Linear in each: the product itself is not read, and dropped.
        return jax.vjp(lambda x, w: _xla_dot(x, w, sizes), x, w)[1](dy)
    return _backward((x, w, sizes), dy)[:2]


def _backend(x: Array, w: Array, sizes: Array, named: GroupedBackend | None) -> GroupedBackend:
    if x.ndim != 2 or w.ndim != 3 or sizes.shape != w.shape[:1] or x.shape[1] != w.shape[1]:
        raise ValueError(f"{x.shape=}, {w.shape=}, {sizes.shape=} must be (R, K), (G, K, N), (G,)")
    if x.dtype != w.dtype or sizes.dtype != jnp.int32:
        raise ValueError(f"{x.dtype=} must be {w.dtype=}, and {sizes.dtype=} int32")
    if named is None:
        served = not (w.shape[1] % 128 or w.shape[2] % 128) and x.dtype.itemsize == 2
        hopper = registry.target_capability() == (9, 0)
        return "pallas" if served and hopper else "xla"
    reference.require_one_of("backend", named, get_args(GroupedBackend))
    return named


def _xla_dot(x: Array, w: Array, sizes: Array) -> Array:
    return lax.ragged_dot(x, w, sizes, preferred_element_type=jnp.float32).astype(x.dtype)


def _kernels() -> tuple[Any, Any]:
    # Imported when wanted: a machine without a GPU need not load the GPU compilers.
    from jax.experimental.pallas.ops.gpu import ragged_dot_mgpu, transposed_ragged_dot_mgpu

    return ragged_dot_mgpu.ragged_dot, transposed_ragged_dot_mgpu.transposed_ragged_dot


@jax.custom_vjp
def _pallas_dot(x: Array, w: Array, sizes: Array) -> Array:
    return _kernels()[0](x, w, group_sizes=sizes, **_TILES)


def _forward(x: Array, w: Array, sizes: Array):
    return _pallas_dot(x, w, sizes), (x, w, sizes)


def _backward(residuals: tuple[Array, Array, Array], dy: Array):
    x, w, sizes = residuals
    ragged_dot, transposed_ragged_dot = _kernels()
    dx = ragged_dot(dy, w, group_sizes=sizes, transpose_rhs=True, **_TILES)
    dw = transposed_ragged_dot(x, dy, group_sizes=sizes, **_TILES)
    return dx, dw, None


_pallas_dot.defvjp(_forward, _backward)


@functools.partial(jax.jit, static_argnames="num_groups")
def group_rows(group: Array, num_groups: int) -> tuple[Array, Array, Array]:
    """Sorts rows by their group, in their order within a group.

    Args:
      group: (R,) int32 in 0..G-1.
      num_groups: G.

    Returns:
      order (R,) int32, the row that stands at a place; its inverse; and sizes (G,) int32.
    """
    order = jnp.argsort(group, stable=True).astype(jnp.int32)
    places = jnp.arange(group.shape[0], dtype=jnp.int32)
    inverse = jnp.zeros_like(places).at[order].set(places, unique_indices=True)
    sizes = jnp.sum(group == jnp.arange(num_groups, dtype=group.dtype)[:, None], axis=1)
    return order, inverse, sizes.astype(jnp.int32)
