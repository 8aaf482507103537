"""Dense products in 8-bit floats that train: what a GPU of sm_89 or later does at twice the rate.

Forward operands are e4m3, gradients e5m2 (arXiv 2209.05433), with one scale for each tensor, made
from the tensor itself (`sparsejax.fp8`).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from sparsejax import fp8
from sparsejax.remat import keep


def _rounded(x: Array, dtype: DTypeLike) -> fp8.Quantized:
    scale = fp8.scale_for(jnp.max(jnp.abs(x)), dtype)
    # Not `fp8.quantize`: nothing saturates, and the compiler's own conversion, one instruction,
    # rounds once from bfloat16. It matters, because this reads and writes whole activations.
    return fp8.Quantized((x.astype(jnp.float32) * (1 / scale)).astype(dtype), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _dot_fp8(x: Array, w: Array, axis: int) -> Array:
    return _dot_fp8_fwd(x, w, axis)[0]


def _dot_fp8_fwd(x: Array, w: Array, axis: int) -> tuple[Array, Any]:
    q, p = _rounded(x, fp8.FORWARD), _rounded(w, fp8.FORWARD)
    return keep(fp8.dot(q, p, contract=(1, axis), out_dtype=x.dtype)), (q, p)


def _dot_fp8_bwd(axis: int, saved: Any, dy: Array) -> tuple[Array, Array]:
    q, p = saved
    g = _rounded(dy, fp8.GRADIENT)
    # Exact sums for gradients alone, as is usual.
    dot = functools.partial(fp8.dot, out_dtype=dy.dtype, precision=lax.Precision.HIGHEST)
    dw = dot(g, q, contract=(0, 0)) if axis == 1 else dot(q, g, contract=(0, 0))
    return dot(g, p, contract=(1, 1 - axis)), dw


_dot_fp8.defvjp(_dot_fp8_fwd, _dot_fp8_bwd)


def dot_fp8(x: Array, w: Array, *, axis: Literal[0, 1]) -> Array:
    """x @ w, or x @ w.T, and both gradients, of operands rounded to 8 bits.

    Rounded operands wait for the backward pass instead of x and w. A token's result depends,
    through the scale, on the largest magnitude among all tokens.

    Args:
      x: (T, k), bfloat16 or float32: the type that results are rounded to.
      w: (k, n) for `axis` 0, (n, k) for 1, like x; its gradient has its shape.
      axis: of w that is contracted.

    Returns:
      (T, n) in x's dtype.

    Raises:
      ValueError: shapes or dtypes that do not fit.
    """
    if axis not in (0, 1):
        raise ValueError(f"{axis=} must be 0 or 1")
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[axis]:
        raise ValueError(f"{x.shape=} and {w.shape=} must share the axis that {axis=} contracts")
    if x.dtype != w.dtype or x.dtype.name not in ("bfloat16", "float32"):
        raise ValueError(f"{x.dtype=} and {w.dtype=} must both be bfloat16 or float32")
    return _dot_fp8(x, w, axis)
