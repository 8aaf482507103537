"""Contenders of one product: our kernels, the dense product, cuSPARSELt; checked, then timed."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import devices, fp8_contenders
from benchmarks.cusparselt import CuSparseLt
from benchmarks.failures import Failures
from benchmarks.products import Product, Shape, reference_rows, relative_error
from benchmarks.timing import Sampling, Timed, interleaved, jax_timed
from kernels import registry
from kernels.tuning import tables

TOLERANCE = 5e-3


def dense_product(a: Array, b: Array, *, contract: tuple[int, int]) -> Array:
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())))


def trace_sparse(shape: Shape, backend: registry.Backend):
    """The backend's kernel, traced for a shape; takes values, metadata and b.

    Raises:
      NotImplementedError: the backend does not serve this device or shape.
    """
    m, n, k = shape.m, shape.n, shape.k
    arguments = (
        jax.ShapeDtypeStruct((m, k // 2), jnp.bfloat16),
        jax.ShapeDtypeStruct((m // 64, k // 64, 128), jnp.int32),
        jax.ShapeDtypeStruct((n, k) if shape.b_layout == "nk" else (k, n), jnp.bfloat16),
    )
    layouts = {"b_layout": shape.b_layout, "out_layout": shape.out_layout}
    _, function = registry.select("spmm24", *arguments, backend=backend, **layouts)
    return jax.jit(functools.partial(function, **layouts)).trace(*arguments)


def compile_sparse(shape: Shape, backend: registry.Backend):
    """`trace_sparse`, compiled."""
    return trace_sparse(shape, backend).lower().compile()


def compile_dense(product: Product):
    """XLA's dense product of the operands before pruning, compiled."""
    multiply = functools.partial(dense_product, contract=product.dense_contract)
    return jax.jit(multiply).lower(*product.dense_operands).compile()


def _checked(
    product: Product,
    kernels: dict[str, Any],
    library: CuSparseLt | None,
    failures: Failures,
    what: str,
) -> tuple[dict[str, Timed], dict[str, float], dict[str, str]]:
    """Sparse contenders that give a result, their errors, and why the others do not."""
    expected = reference_rows(product)
    operands = (product.sparse.values, product.sparse.metadata, product.b)
    candidates = {name: (jax_timed(k, *operands), None) for name, k in kernels.items()}
    notes: dict[str, str] = {}
    if library is not None:
        found, note = failures.attempt(f"{what}, cusparselt", lambda: library.calls(product))
        if note is not None:
            notes["cusparselt"] = note
        for transposed, call in (found or {}).items():
            candidates["cusparselt" + (" transposed" if transposed else "")] = (call, transposed)

    calls: dict[str, Timed] = {}
    errors: dict[str, float] = {}

    def check(call: Timed, transposed: bool | None) -> float:
        out = call.run()
        if transposed is not None:
            out = CuSparseLt.result(product, out, transposed)
        return relative_error(product, expected, out)

    for name, (call, transposed) in candidates.items():
        error, note = failures.attempt(
            f"{what}, {name}", functools.partial(check, call, transposed)
        )
        if note is not None:
            notes[name] = note
            continue
        calls[name], errors[name] = call, error
        # A NaN compares false with everything: it must fail too.
        if not error <= TOLERANCE:
            failures.append(f"{what}, {name}: relative error {error:.1e} exceeds {TOLERANCE}")
    return calls, errors, notes


def measure_product(
    product: Product,
    data: str,
    kernels: dict[str, Any],
    refusals: dict[str, str],
    dense,
    library: CuSparseLt | None,
    sampling: Sampling,
    failures: Failures,
    require_tuned: bool = False,
    in_8_bits: fp8_contenders.Checked | None = None,
) -> list[dict[str, Any]]:
    """Rows of one product: one for each contender, refused ones with the reason."""
    shape = product.shape
    what = f"{shape.name}, {data} data"
    calls, errors, notes = _checked(product, kernels, library, failures, what)
    calls = {"xla dense": jax_timed(dense, *product.dense_operands), **calls}
    if in_8_bits is not None:
        calls |= in_8_bits.calls
        notes |= in_8_bits.notes
    samples = interleaved(calls, sampling)
    kind = jax.devices()[0].device_kind
    bounds_of = lambda name: devices.spmm_bounds(
        kind, shape.m, shape.n, shape.k, itemsize=1 if name.endswith("fp8") else 2
    )
    common = {**dataclasses.asdict(shape), "data": data}
    rows = []
    for name, taken in samples.items():
        row = {**common, "contender": name, **taken.as_row()}
        row["effective_tflops"] = shape.flops / taken.median / 1e12
        row["speedup_over_dense"] = samples["xla dense"].median / taken.median
        row["relative_error"] = errors.get(name)
        if in_8_bits is not None:
            row |= in_8_bits.facts.get(name, {})
            if fp8_contenders.DENSE in samples:
                dense_fp8 = samples[fp8_contenders.DENSE].median
                row["speedup_over_dense_fp8"] = dense_fp8 / taken.median
        bound = bounds_of(name).sparse
        if not name.startswith("xla dense") and bound is not None:
            row["share_of_bound"] = bound / taken.median
        if name == "hopper fp8":
            key = tables.key(m=shape.m, n=shape.n, k=shape.k, out=shape.out_layout)
            row["tuned"] = tables.lookup("hopper", "spmm24_fp8", kind, key) is not None
        if name in registry.BACKENDS and name != "reference":
            key = tables.key(
                m=shape.m, n=shape.n, k=shape.k, b=shape.b_layout, out=shape.out_layout
            )
            row["tuned"] = tables.lookup(name, "spmm24", kind, key) is not None
            if require_tuned and not row["tuned"]:
                failures.append(f"{what}, {name}: no entry {key} in the tuned table")
        if library is not None and name.startswith("cusparselt"):
            row["algorithm"] = library.algorithm(shape, name.endswith("transposed"))
        rows.append(row)
    notes = {**refusals, **notes}
    rows += [{**common, "contender": name, "note": note} for name, note in notes.items()]
    for row in rows:
        bounds = dataclasses.asdict(bounds_of(row["contender"]))
        row["bounds_ms"] = {k: None if v is None else 1e3 * v for k, v in bounds.items()}
    return rows
