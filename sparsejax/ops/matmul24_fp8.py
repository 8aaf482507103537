"""The products of `matmul24` in 8 bits: y = x W and dx = dy W^T, W packed in e4m3.

The sparse product takes a scale for each token and one for each row of the packed weight, both in
its epilogue. In the other, dense one the packed weight's scales lie along the contraction: they
move into the dense operand before it is rounded, exactly, because they are powers of two.

dw = x^T dy stays in 16 bits. It contracts the tokens, along which neither operand lies in memory,
and tensor cores take 8-bit operands with the contraction contiguous only: both would have to be
rounded a second time, transposed, with scales that no token has.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from kernels import reference_fp8, registry
from sparsejax import fp8
from sparsejax.formats import Sparse24
from sparsejax.ops.spmm24 import spmm24_fp8


def forward(x: Array, packed: Sparse24, backend: registry.Backend | None) -> Array:
    """y = x W, (T, n) in x's dtype; x (T, k)."""
    return _product(x, packed, packed.axis == 0, fp8.FORWARD, backend)


def input_gradient(dy: Array, packed: Sparse24, backend: registry.Backend | None) -> Array:
    """dx = dy W^T, (T, k) in dy's dtype; dy (T, n)."""
    return _product(dy, packed, packed.axis == 1, fp8.GRADIENT, backend)


def _product(
    operand: Array,
    packed: Sparse24,
    sparse: bool,
    dtype: DTypeLike,
    backend: registry.Backend | None,
) -> Array:
    """operand A^T (sparse) or operand A (dense) for the packed matrix A (m, k)."""
    if sparse:
        b = fp8.quantize(operand, dtype, scaling="row")
        return spmm24_fp8(packed, b, out_layout="nm", out_dtype=operand.dtype, backend=backend)
    a = reference_fp8.unpack24_fp8(packed.values, packed.metadata)[: packed.m, : packed.k]
    dense = fp8.quantize(_rescaled(operand, packed), dtype, scaling="tensor")
    weight = fp8.Quantized(a, jnp.float32(1))
    return fp8.dot(dense, weight, contract=(1, 0), out_dtype=operand.dtype)


def _rescaled(operand: Array, packed: Sparse24) -> Array:
    if packed.scale is None:
        return operand
    return operand.astype(jnp.float32) * packed.scale


def losses(x: Array, dy: Array, packed: Sparse24) -> Array:
    """What rounding x and dy lost: overflowed and underflowed of x, then of dy; (4,) float32."""
    found: list[Array] = []
    for operand, sparse, dtype in (
        (x, packed.axis == 0, fp8.FORWARD),
        (dy, packed.axis == 1, fp8.GRADIENT),
    ):
        rounded = operand if sparse else _rescaled(operand, packed)
        scaling: fp8.Scaling = "row" if sparse else "tensor"
        found += fp8.losses(rounded, fp8.quantize(rounded, dtype, scaling=scaling))
    return jnp.stack(found)
