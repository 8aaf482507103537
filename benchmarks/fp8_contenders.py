"""Contenders in 8 bits of one product: our kernels, and XLA's dense product through cuBLASLt.

The operands are those of the 16-bit contenders, rounded: weights, activations and the layer's input
to float8_e4m3fn, gradients to float8_e5m2. The sparse product has a scale for each row of both
operands in its epilogue; the dense one has one for each tensor, which cuBLASLt applies. Both take
operands whose contracted axis is the last one, as the tensor cores want them. Rounding, like
pruning, is not timed here (`benchmarks.packing` times it).

Results are compared with float32 products of the *rounded* operands, so that rounding them is no
part of an error. What is left is the tensor cores' accumulators: on Hopper sums of 8-bit products
keep some 14 bits ("DeepSeek-V3 technical report", 2024, section 3.5.2), the rest is cut off. That
loses 0.3% of Gaussian products and 5% of a sum of thousands of products of one sign, in cuBLASLt
as in any kernel, which is more than a wrong kernel might. Every contender must therefore pass two
limits: a sharp one on the same operands with all but a few elements of each row of A zeroed,
where accumulators have nothing to lose, and one that grows with the number of products on all.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.failures import Failures
from benchmarks.products import Product, Shape, row_indices
from benchmarks.timing import Timed, jax_timed
from kernels import registry
from sparsejax import fp8
from sparsejax.formats import Sparse24, pack
from train.compiler import CUBLAS

DENSE = "xla dense fp8"

_UNIT = 2.0**-13
"""Last place of an accumulator of 14 bits, relative to its leading one."""

_OUTPUT = 2.0**-8
"""Twice what rounding a result to bfloat16 changes at most."""

FEW = 64
"""Elements kept in each row of A for the sharp check."""

FEW_LIMIT = FEW * _UNIT + _OUTPUT
"""Each product loses less than one unit of the largest sum."""


def limit(products: float) -> float:
    """Relative error of sums of so many products, other than zeros, in Hopper's accumulators.

    A product loses half a unit on average, of a sum that is on average half of what it becomes. On
    products of one sign these losses add up; those of random signs mostly cancel.
    """
    return products * _UNIT / 4 + _OUTPUT


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


@jax.jit
def _packed(sparse: Sparse24) -> Sparse24:
    # 2:4 already: packing by magnitude keeps what it keeps.
    options: dict[str, Any] = {"mode": "magnitude", "dtype": fp8.FORWARD, "backend": "reference"}
    return pack(sparse.unpack(), axis=sparse.axis, **options)


def build(product: Product) -> Operands:
    """Rounds the operands of a product."""
    shape = Fp8Shape(product.shape)
    sparse = _packed(product.sparse)
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
def _error(shape: Shape, a: Array, b: fp8.Quantized, out: Array) -> tuple[Array, Array]:
    """Frobenius error of some rows of a result, against float32 products of rounded operands.

    Returns:
      The error, and how many products an element of those rows sums: elements of a row of A that
      are not zero.
    """
    rows = row_indices(shape)
    a = a[rows]
    expected = jax.lax.dot_general(
        a,
        fp8.dequantize(b),
        (((1,), (1,)), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
    )
    out = out.T if shape.out_layout == "nm" else out
    difference = out[rows].astype(jnp.float32) - expected
    products = jnp.count_nonzero(a) / a.shape[0]
    return jnp.linalg.norm(difference) / jnp.linalg.norm(expected), products


@jax.jit
def _unpacked(sparse: Sparse24) -> Array:
    """A, (m, k)."""
    return sparse.unpack().T if sparse.axis == 0 else sparse.unpack()


@jax.jit
def thinned(values: Array) -> Array:
    """Values of A, (m, k) or packed (m, k/2), with all but `FEW` columns zeroed.

    The columns left are spread over all, so that no step along k goes unchecked, and take turns
    between odd and even ones: of packed values those are the two that are kept of four.
    """
    columns = values.shape[1]
    if columns < 2 * FEW:
        return values
    i = jnp.arange(FEW)
    kept = jnp.zeros(columns, bool).at[i * columns // FEW + i % 2].set(True)
    return jnp.where(kept, values, jnp.zeros((), values.dtype))


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
    # The dense product of X W has W second: its rows are the sparse operand's.
    second_is_a = product.shape.out_layout == "nm"
    dense_a, dense_b = operands.dense[::-1] if second_is_a else operands.dense

    def sparse_calls(values: Array) -> tuple[dict[str, Timed], Array, fp8.Quantized]:
        sparse, b = dataclasses.replace(operands.sparse, values=values), operands.b
        arguments = (values, sparse.metadata, b.values, sparse.scale, b.scale)
        a = _unpacked(sparse)
        calls = {f"{name} fp8": jax_timed(kernel, *arguments) for name, kernel in kernels.items()}
        return calls, a, b

    def dense_calls(values: Array) -> tuple[dict[str, Timed], Array, fp8.Quantized]:
        a = dense_a._replace(values=values)
        both = (dense_b, a) if second_is_a else (a, dense_b)
        return {DENSE: jax_timed(dense, *both)}, fp8.dequantize(a), dense_b

    for calls_of, values in (
        (sparse_calls, operands.sparse.values), (dense_calls, dense_a.values),
    ):  # fmt: skip
        calls, a, b = calls_of(values)
        few_calls, few_a, _ = calls_of(thinned(values))
        for name, call in calls.items():
            measure = functools.partial(
                _errors, product.shape, (call, a), (few_calls[name], few_a), b
            )
            facts, note = failures.attempt(f"{what}, {name}", measure)
            if note is not None:
                found.notes[name] = note
                continue
            found.calls[name] = call
            found.facts[name] = facts
            failures += [f"{what}, {name}: {line}" for line in excesses(facts)]
    if DENSE in found.facts:
        found.facts[DENSE]["implementation"] = implementation(dense)
    return found


def _errors(
    shape: Shape, whole: tuple[Timed, Array], few: tuple[Timed, Array], b: fp8.Quantized
) -> dict[str, float]:
    call, a = whole
    error, products = _error(shape, a, b, call.run())
    call, a = few
    error_of_few, _ = _error(shape, a, b, call.run())
    return {
        "relative_error": float(error),
        "products_summed": float(products),
        "relative_error_of_few": float(error_of_few),
    }


def excesses(facts: dict[str, float]) -> list[str]:
    """What a contender's errors exceed, one line each.

    Args:
      facts: relative errors of the whole product and of that with few elements in each row of A,
        and how many products an element of the former sums.
    """
    most = limit(facts["products_summed"])
    found = []
    # A NaN compares false with everything: it must fail too.
    if not facts["relative_error"] <= most:
        found.append(
            f"relative error {facts['relative_error']:.1e} exceeds {most:.1e}, what accumulators "
            f"lose of {facts['products_summed']:.0f} products"
        )
    if not facts["relative_error_of_few"] <= FEW_LIMIT:
        found.append(
            f"relative error {facts['relative_error_of_few']:.1e} of {FEW} products exceeds "
            f"{FEW_LIMIT:.1e}"
        )
    return found
