"""Dense products of tokens and weights, in the precision that is asked for."""

from __future__ import annotations

from typing import Literal, Protocol

from jax import Array

from sparsejax.ops.dot_fp8 import dot_fp8
from sparsejax.spec import Precision


class Product(Protocol):
    """x (T, k) @ w (k, n) for axis 0, x @ w.T with w (n, k) for axis 1."""

    def __call__(self, x: Array, w: Array, *, axis: Literal[0, 1]) -> Array: ...


def _dot(x: Array, w: Array, *, axis: Literal[0, 1]) -> Array:
    return x @ (w if axis == 0 else w.T)


def product(precision: Precision) -> Product:
    """Differentiable product: of operands as they are ("compute"), or rounded to "fp8".

    Raises:
      ValueError: another precision.
    """
    if precision not in ("compute", "fp8"):
        raise ValueError(f"{precision=} must be 'compute' or 'fp8'")
    return dot_fp8 if precision == "fp8" else _dot
