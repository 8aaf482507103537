"""The sparse products of a feed-forward network, as operands to time: (m, n, k), A 2:4 along k."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.capture import FfnTensors
from sparsejax.formats import Sparse24, pack
from sparsejax.prune import mvue24, soft_threshold_beta

Kind = Literal["weights", "activations", "tokens", "cube"]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes and layouts of a product: what a kernel is compiled for."""

    model: str
    kind: Kind
    m: int
    n: int
    k: int
    b_layout: Literal["nk", "kn"]
    out_layout: Literal["mn", "nm"]

    @property
    def name(self) -> str:
        return f"{self.model} {self.kind}"

    @property
    def flops(self) -> float:
        """Of the dense product: what "effective" rates count."""
        return 2.0 * self.m * self.n * self.k


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
    """Operands of one product: the sparse one, and the dense one of dense training.

    Both multiply the same dense B. The dense product takes A before pruning, because that is what
    dense training multiplies.
    """

    shape: Shape
    sparse: Sparse24
    b: Array
    dense_operands: tuple[Array, Array]
    dense_contract: tuple[int, int]


def shapes(model: str, width: int, hidden: int, tokens: int) -> list[Shape]:
    """The three classes of products of one network: weights, activations, along tokens.

    weights: Y1 = X W1 with A = W1^T, written as (T, H); activations: Y3 = Y2 W2 with A = Y2; along
    tokens: dW2 = Y2^T dY3 with A = Y2^T.
    """
    return [
        Shape(model, "weights", hidden, tokens, width, "nk", "nm"),
        Shape(model, "activations", tokens, width, hidden, "kn", "mn"),
        Shape(model, "tokens", hidden, width, tokens, "kn", "mn"),
    ]


def cube_shape(model: str, side: int) -> Shape:
    """A product of square matrices, in the layouts of the weights class."""
    return Shape(model, "cube", side, side, side, "nk", "nm")


def gaussian(width: int, hidden: int, tokens: int, seed: int = 0) -> FfnTensors:
    """Independent standard normal tensors of a network's shapes."""
    keys = jax.random.split(jax.random.key(seed), 5)
    draw = jax.random.normal
    return FfnTensors(
        x=draw(keys[0], (tokens, width), jnp.bfloat16),
        w1=draw(keys[1], (width, hidden)),
        w2=draw(keys[2], (hidden, width)),
        y2=draw(keys[3], (tokens, hidden), jnp.bfloat16),
        dy3=draw(keys[4], (tokens, width), jnp.bfloat16),
    )


def _weights(shape: Shape, x: Array, w1: Array) -> Product:
    beta = jax.jit(soft_threshold_beta, static_argnums=1)(w1, 0)
    sparse = pack(w1, axis=0, mode="soft_threshold", scale=beta, backend="reference")
    return Product(shape, sparse, x, (x, w1.astype(jnp.bfloat16)), (1, 0))


def _activations(shape: Shape, t: FfnTensors) -> Product:
    sparse = pack(t.y2, axis=1, mode="magnitude", backend="reference")
    w2 = t.w2.astype(jnp.bfloat16)
    return Product(shape, sparse, w2, (t.y2, w2), (1, 0))


def _tokens(shape: Shape, t: FfnTensors) -> Product:
    sampled = jax.jit(mvue24, static_argnums=2)(t.y2, jax.random.key(1), 0)
    sparse = pack(sampled, axis=0, mode="magnitude", backend="reference")
    return Product(shape, sparse, t.dy3, (t.y2, t.dy3), (0, 0))


def _cube(shape: Shape, t: FfnTensors) -> Product:
    """Two halves of W1's neurons stacked along k, and two halves of the tokens beside each other.

    A product without meaning, of data with the statistics of the network's.
    """
    width, hidden = t.w1.shape
    w = t.w1.reshape(width, 2, hidden // 2).swapaxes(0, 1).reshape(2 * width, hidden // 2)
    x = t.x.reshape(2, -1, width).swapaxes(0, 1).reshape(-1, 2 * width)
    return _weights(shape, x, w)


def build(shape: Shape, tensors: FfnTensors) -> Product:
    """The product of a shape from a network's tensors. Pruning is not timed here.

    Raises:
      ValueError: the tensors do not give this shape.
    """
    make: dict[Kind, Callable[[], Product]] = {
        "weights": lambda: _weights(shape, tensors.x, tensors.w1),
        "activations": lambda: _activations(shape, tensors),
        "tokens": lambda: _tokens(shape, tensors),
        "cube": lambda: _cube(shape, tensors),
    }
    product = make[shape.kind]()
    jax.block_until_ready((product.sparse, product.b, product.dense_operands))
    n = product.b.shape[shape.b_layout.index("n")]
    if (product.sparse.m, n, product.sparse.k) != (shape.m, shape.n, shape.k):
        raise ValueError(f"tensors give {(product.sparse.m, n, product.sparse.k)}, not {shape=}")
    return product


def row_indices(shape: Shape) -> Array:
    """Rows of the result that are checked: the first and the last 128."""
    return jnp.r_[: min(128, shape.m), max(0, shape.m - 128) : shape.m]


def reference_rows(product: Product) -> Array:
    """The first and the last 128 rows of A B in float32: of 16-bit operands, products are exact."""
    a = product.sparse.unpack()
    a = a.T if product.sparse.axis == 0 else a
    contracted = product.shape.b_layout.index("k")
    return jax.lax.dot_general(
        a[row_indices(product.shape)],
        product.b,
        (((1,), (contracted,)), ((), ())),
        preferred_element_type=jnp.float32,
    )


def relative_error(product: Product, expected: Array, out: Array) -> float:
    """Frobenius error of those rows of a result, relative to `reference_rows`."""
    out = out.T if product.shape.out_layout == "nm" else out
    difference = out[row_indices(product.shape)].astype(jnp.float32) - expected
    return float(jnp.linalg.norm(difference) / jnp.linalg.norm(expected))
