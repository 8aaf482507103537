"""Contenders in 8 bits of one product: our kernels, and XLA's dense product through cuBLASLt.

The operands are those of the 16-bit contenders, rounded: weights, activations and the layer's input
to float8_e4m3fn, gradients to float8_e5m2. The sparse product has a scale for each row of both
operands in its epilogue; the dense one has one for each tensor, which cuBLASLt applies. Both take
operands whose contracted axis is the last one, as the tensor cores want them. Rounding, like
pruning, is not timed here (`benchmarks.packing` times it).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.compiler import CUBLAS
from benchmarks.failures import Failures
from benchmarks.products import Product, Shape, row_indices
from benchmarks.timing import Timed, jax_timed
from kernels import registry
from sparsejax import fp8
from sparsejax.formats import Sparse24, pack

DENSE = "xla dense fp8"

# Tensor cores add products of 8-bit floats in accumulators of fewer bits than float32 has: sums of
# thousands of activations, all positive, lose some 2%.
TOLERANCE = 3e-2


@dataclasses.dataclass(frozen=True)
class Fp8Shape:
    """A product's shape: what a kernel of 8-bit operands is compiled for."""

    shape: Shape

    @property
    def name(self) -> str:
        return f"{self.shape.name} fp8"

    @property
    def b_dtype(self) -> jnp.dtype:
        """Along tokens, B is a gradient."""
        return fp8.GRADIENT if self.shape.kind == "tokens" else fp8.FORWARD


@dataclasses.dataclass(frozen=True, eq=False)
class Operands:
    """Of one product, rounded."""

    sparse: Sparse24
    b: fp8.Quantized
    dense: tuple[fp8.Quantized, fp8.Quantized]


def _contracted_last(x: Array, contracted: int) -> Array:
    return x if contracted == 1 else x.T


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _rounded(x: Array, contracted: int, dtype: Any, scaling: fp8.Scaling) -> fp8.Quantized:
    return fp8.quantize(_contracted_last(x, contracted), dtype, scaling=scaling)


def build(product: Product) -> Operands:
    """Rounds the operands of a product."""
    shape = Fp8Shape(product.shape)
    # 2:4 already: packing by magnitude keeps what it keeps.
    sparse = pack(
        product.sparse.unpack(),
        axis=product.sparse.axis,
        mode="magnitude",
        dtype=fp8.FORWARD,
        backend="reference",
    )
    b = _rounded(product.b, product.shape.b_layout.index("k"), shape.b_dtype, "row")
    left, right = product.dense_operands
    dense = (
        _rounded(left, product.dense_contract[0], fp8.FORWARD, "tensor"),
        _rounded(right, product.dense_contract[1], shape.b_dtype, "tensor"),
    )
    return jax.block_until_ready(Operands(sparse, b, dense))


jax.tree_util.register_dataclass(Operands, ["sparse", "b", "dense"], [])


def trace_sparse(item: Fp8Shape, backend: registry.Backend):
    """The backend's kernel, traced; takes values, metadata, b and the scales of their rows.

    Raises:
      NotImplementedError: the backend does not serve this device or shape.
    """
    m, n, k = item.shape.m, item.shape.n, item.shape.k
    arguments = (
        jax.ShapeDtypeStruct((m, k // 2), fp8.FORWARD),
        jax.ShapeDtypeStruct((m // 64, k // 64, 128), jnp.int32),
        jax.ShapeDtypeStruct((n, k), item.b_dtype),
    )
    scales = [jax.ShapeDtypeStruct((size,), jnp.float32) for size in (m, n)]
    options = {"out_layout": item.shape.out_layout}
    _, function = registry.select(
        "spmm24_fp8", *arguments, a_scale=scales[0], b_scale=scales[1], backend=backend, **options
    )

    def multiply(values, metadata, b, a_scale, b_scale):
        return function(values, metadata, b, a_scale=a_scale, b_scale=b_scale, **options)

    return jax.jit(multiply).trace(*arguments, *scales)


def compile_sparse(item: Fp8Shape, backend: registry.Backend):
    """`trace_sparse`, compiled."""
    return trace_sparse(item, backend).lower().compile()


def compile_dense(operands: Operands):
    """XLA's dense product, compiled to a call of cuBLASLt where a GPU has one."""
    multiply = functools.partial(fp8.dot, contract=(1, 1), out_dtype=jnp.bfloat16)
    return jax.jit(multiply).lower(*operands.dense).compile(compiler_options=CUBLAS)


def implementation(dense: Any) -> str:
    """What a compiled dense product runs: "cublaslt fp8", or something else of XLA's."""
    return "cublaslt fp8" if "__cublas$lt$matmul$f8" in dense.as_text() else "xla's own kernel"


@functools.partial(jax.jit, static_argnums=0, compiler_options=CUBLAS)
def _relative_error(shape: Shape, a: Array, b: fp8.Quantized, out: Array) -> Array:
    """Frobenius error of some rows of a result, against float32 products of rounded operands."""
    rows = row_indices(shape)
    expected = jax.lax.dot_general(
        a[rows],
        fp8.dequantize(b),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    out = out.T if shape.out_layout == "nm" else out
    difference = out[rows].astype(jnp.float32) - expected
    return jnp.linalg.norm(difference) / jnp.linalg.norm(expected)


@dataclasses.dataclass
class Checked:
    """Contenders that give a result, with their errors, and why the others do not."""

    calls: dict[str, Timed] = dataclasses.field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)


def check(
    product: Product,
    operands: Operands,
    kernels: dict[str, Any],
    refusals: dict[str, str],
    dense: Any,
    failures: Failures,
    what: str,
) -> Checked:
    """Runs every contender once; wrong results are failures, and are timed all the same."""
    found = Checked(notes={f"{name} fp8": note for name, note in refusals.items()})
    sparse, b = operands.sparse, operands.b
    arguments = (sparse.values, sparse.metadata, b.values, sparse.scale, b.scale)
    a = jax.jit(lambda s: s.unpack().T if s.axis == 0 else s.unpack())(sparse)
    # The dense product of X W has W second: its rows are the sparse operand's.
    first, second = operands.dense
    if product.shape.out_layout == "nm":
        first, second = second, first
    contenders = {
        f"{name} fp8": (jax_timed(kernel, *arguments), a, b) for name, kernel in kernels.items()
    }
    contenders[DENSE] = (
        jax_timed(dense, *operands.dense), fp8.dequantize(first), second,
    )  # fmt: skip
    for name, (call, left, right) in contenders.items():
        measure = functools.partial(_error_of, product, call, left, right)
        error, note = failures.attempt(f"{what}, {name}", measure)
        if note is not None:
            found.notes[name] = note
            continue
        found.calls[name] = call
        found.facts[name] = {"relative_error": error}
        # A NaN compares false with everything: it must fail too.
        if not error <= TOLERANCE:
            failures.append(f"{what}, {name}: relative error {error:.1e} exceeds {TOLERANCE}")
    if DENSE in found.facts:
        found.facts[DENSE]["implementation"] = implementation(dense)
    return found


def _error_of(product: Product, call: Timed, a: Array, b: fp8.Quantized) -> float:
    return float(_relative_error(product.shape, a, b, call.run()))
