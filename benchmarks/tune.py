"""Searches the `hopper` kernels' configurations on this device and writes the tuned table.

    python -m benchmarks.tune [--write] [--op spmm24|spmm24_fp8|pack24] [--rounds 5] [--only TEXT]

Every candidate is compared with a float32 reference over the whole output before it is timed, and
candidates are timed in turns together with XLA's dense product of the same operands.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from benchmarks.copies import measure_copy
from benchmarks.failures import Failures
from benchmarks.timing import Sampling, Timed, interleaved, jax_timed
from kernels import reference, reference_fp8, registry
from kernels.hopper import pack24 as packing
from kernels.hopper import spmm24 as products
from kernels.hopper.spmm24_fp8 import spmm24_fp8
from kernels.tuning import tables
from sparsejax import fp8
from train.compiler import CUBLAS

MAX_ERROR = 5e-3
MAX_ERROR_IN_8_BITS = 1e-2  # tensor cores add these with fewer bits


@dataclasses.dataclass(frozen=True)
class Problem:
    """A product with A (m, k) sparse, in one orientation, in 16 or in 8 bits."""

    m: int
    n: int
    k: int
    b: Literal["nk", "kn"]
    out: Literal["mn", "nm"]
    in_8_bits: bool = False

    @property
    def op(self) -> str:
        return "spmm24_fp8" if self.in_8_bits else "spmm24"

    @property
    def key(self) -> str:
        if self.in_8_bits:
            return tables.key(m=self.m, n=self.n, k=self.k, out=self.out)
        return tables.key(m=self.m, n=self.n, k=self.k, b=self.b, out=self.out)


def problems(tokens: int = 16384) -> list[Problem]:
    """The products of feed-forward networks of 1B and 7B models, and a cube."""
    found = []
    outs: tuple[Literal["nm", "mn"], ...] = ("nm", "mn")
    for width, hidden in ((2048, 8192), (4096, 16384)):
        found += [Problem(hidden, tokens, width, "nk", out) for out in outs]
        found += [Problem(width, tokens, hidden, "nk", out) for out in outs]
        found += [Problem(tokens, width, hidden, "kn", "mn")]
        found += [Problem(hidden, width, tokens, "kn", "mn")]
    found += [Problem(8192, 8192, 8192, "nk", out) for out in outs]
    return list(dict.fromkeys(found))


def problems_in_8_bits() -> list[Problem]:
    """The same, where the contraction of both operands is contiguous, as it must be."""
    found = [dataclasses.replace(p, b="nk", in_8_bits=True) for p in problems()]
    return list(dict.fromkeys(found))


def candidates_in_8_bits() -> list[products.Spmm24Config]:
    """Tiles of 16 bits, of as many bytes; more output buffers, as a tile takes half as long."""
    make = functools.partial(products.Spmm24Config, tile_k=128, in_flight=0)
    wide = functools.partial(make, wg_m=2, tile_n=192)
    found = [
        wide(epi_n=192, out_slots=1, order="n"),
        wide(epi_n=64, out_slots=2, order="n"),
        wide(epi_n=64, out_slots=3, order="n"),
        wide(epi_n=192, out_slots=1, order="m", width=16),
        make(order="m", width=16),
        make(order="n"),
        make(order="m", width=16, tile_k=256, stages=2),
        wide(tile_n=128, stages=4, out_slots=2, order="n"),
    ]
    return [c for c in found if c.problem(2, itemsize=1) is None]


def candidates(problem: Problem) -> list[products.Spmm24Config]:
    """Tiles that can be best, with the tile orders that keep most of both operands in L2.

    Others were slower on every problem tried on an H100: 256 x 128 and smaller tiles, clusters,
    three stages (see `kernels.hopper.spmm24`).
    """
    if problem.in_8_bits:
        return candidates_in_8_bits()
    make = products.Spmm24Config
    wide = functools.partial(make, wg_m=2, tile_n=192, epi_n=192, out_slots=1)
    found = [
        wide(order="n", width=8),
        wide(order="n", width=8, in_flight=0),
        wide(order="m", width=8),
        wide(order="m", width=16),
        make(order="m", width=16),
        make(order="n", width=8),
        make(order="m", width=16, in_flight=0),
    ]
    return [c for c in found if c.problem(2) is None]


def _compile_all(calls: dict[Any, Callable[[], Any]]) -> dict[Any, Any]:
    """Compiles in threads; a candidate that does not compile is reported and left out."""

    def attempt(build: Callable[[], Any]) -> Any:
        try:
            return build()
        except Exception as error:
            return error

    with ThreadPoolExecutor(16) as pool:
        built = dict(zip(calls, pool.map(attempt, calls.values()), strict=True))
    for name, result in built.items():
        if isinstance(result, Exception):
            print(f"  does not compile: {name}: {str(result)[:200]}")
    return {name: r for name, r in built.items() if not isinstance(r, Exception)}


def _dense(problem: Problem, a: Array, b: Array, one: Array) -> Array:
    """XLA's dense product; of 8-bit operands cuBLASLt's, whose scales are `one`."""
    contracted = 1 if problem.b == "nk" else 0
    operands, contract = (a, b), (1, contracted)
    if problem.out == "nm":
        operands, contract = operands[::-1], contract[::-1]
    if problem.in_8_bits:
        left, right = (fp8.Quantized(x, one) for x in operands)
        return fp8.dot(left, right, contract=contract, out_dtype=jnp.bfloat16)
    return lax.dot_general(*operands, (((contract[0],), (contract[1],)), ((), ())))


@functools.partial(jax.jit, static_argnums=0, compiler_options=CUBLAS)
def _error(problem: Problem, pruned: Array, b: Array, out: Array) -> Array:
    """Relative Frobenius error; operands have 16 bits at most, so their products are exact."""
    contracted = 1 if problem.b == "nk" else 0
    dims = (((1,), (contracted,)), ((), ()))
    wide = lambda x: x.astype(jnp.bfloat16)
    expected = lax.dot_general(wide(pruned), wide(b), dims, preferred_element_type=jnp.float32)
    expected = expected.T if problem.out == "nm" else expected
    return jnp.linalg.norm(out.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


def _operands(problem: Problem) -> tuple[Array, Array, Array, Array, Array]:
    """A before pruning, and pruned; B; values and metadata."""
    key_a, key_b = jax.random.split(jax.random.key(0))
    b_shape = (problem.n, problem.k) if problem.b == "nk" else (problem.k, problem.n)
    a = jax.random.normal(key_a, (problem.m, problem.k), jnp.bfloat16)
    b = jax.random.normal(key_b, b_shape, jnp.bfloat16)
    if not problem.in_8_bits:
        values, metadata = reference.pack24(a, axis=1, mode="magnitude")
        return a, reference.unpack24(values, metadata), b, values, metadata
    values, metadata, _ = reference_fp8.pack24_fp8(a, axis=1, mode="magnitude")
    a, b = (reference_fp8.round_fp8(x, values.dtype) for x in (a, b))
    return a, reference_fp8.unpack24_fp8(values, metadata), b, values, metadata


def tune_product(problem: Problem, sampling: Sampling) -> tuple[dict[str, Any], float] | None:
    """The fastest correct configuration of one problem, and its speed relative to XLA dense."""
    a, pruned, b, values, metadata = _operands(problem)

    def build(config: products.Spmm24Config) -> Any:
        call = functools.partial(
            products.spmm24, b_layout=problem.b, out_layout=problem.out, config=config
        )
        if problem.in_8_bits:
            call = functools.partial(spmm24_fp8, out_layout=problem.out, config=config)
            scales = jnp.ones(problem.m), jnp.ones(problem.n)
            call = functools.partial(call, a_scale=scales[0], b_scale=scales[1])
        return jax.jit(call).lower(values, metadata, b).compile()

    compiled = _compile_all({c: functools.partial(build, c) for c in candidates(problem)})
    lowered = jax.jit(functools.partial(_dense, problem)).lower(a, b, jnp.float32(1))
    dense = lowered.compile(compiler_options=CUBLAS)
    calls: dict[str, Timed] = {"dense": jax_timed(dense, a, b, jnp.float32(1))}
    by_name = {}
    for config, call in compiled.items():
        error = float(_error(problem, pruned, b, call(values, metadata, b)))
        if not error < (MAX_ERROR_IN_8_BITS if problem.in_8_bits else MAX_ERROR):
            print(f"  WRONG, {error=:.1e}: {config}")
            continue
        calls[str(config)] = jax_timed(call, values, metadata, b)
        by_name[str(config)] = config
    if not by_name:
        return None
    samples = interleaved(calls, sampling)
    baseline = samples["dense"].median
    flops = 2.0 * problem.m * problem.n * problem.k
    ranked = sorted(by_name, key=lambda name: samples[name].median)
    print(f"{problem}: dense {1e3 * baseline:.3f} ms, {flops / baseline / 1e12:.0f} TFLOP/s")
    for name in ranked[:3] + ranked[-1:]:
        t = samples[name].median
        changed = _changed(by_name[name])
        print(f"  {1e3 * t:.3f} ms, {baseline / t:.3f}x, {flops / t / 1e12:.0f} TFLOP/s {changed}")
    best = by_name[ranked[0]]
    return _changed(best), baseline / samples[ranked[0]].median


def _changed(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from their defaults."""
    default = type(config)()
    fields = dataclasses.asdict(config)
    return {name: v for name, v in fields.items() if v != getattr(default, name)}


def tune_packing(sampling: Sampling) -> dict[str, dict[str, Any]]:
    """The faster block order of pack24 for each axis and input dtype."""
    tuned, failures = {}, Failures()
    copied = measure_copy(sampling, failures).bytes_per_second
    for failure in failures:
        print(f"  {failure}")
    for dtype, axis in itertools.product((jnp.float32, jnp.bfloat16), (1, 0)):
        x = jax.random.normal(jax.random.key(0), (16384, 8192), dtype)
        expected = reference.pack24(x, axis=axis, mode="soft_threshold")
        calls: dict[str, Timed] = {}
        found = {}
        for k_first in (True, False):
            config = packing.Pack24Config(k_first=k_first)
            call = functools.partial(
                packing.pack24, axis=axis, mode="soft_threshold", config=config
            )
            compiled = jax.jit(call).lower(x).compile()
            got = compiled(x)
            equal = all(bool((g == e).all()) for g, e in zip(got, expected, strict=True))
            if not equal:
                print(f"  WRONG: {axis=} {config}")
                continue
            calls[str(config)] = jax_timed(compiled, x)
            found[str(config)] = config
        if not found:
            continue
        samples = interleaved(calls, sampling)
        moved = x.nbytes + sum(e.nbytes for e in expected)
        for name in found:
            rate = moved / samples[name].median
            # Which is faster is known without a copy too.
            share = f", {rate / copied:.0%} of a copy's {copied / 1e12:.2f}" if copied else ""
            print(f"pack24 {axis=} {x.dtype.name} {name}: {rate / 1e12:.2f} TB/s{share}")
        best = min(found, key=lambda name: samples[name].median)
        key = tables.key(axis=axis, dtype=x.dtype.name)
        tuned[key] = dataclasses.asdict(found[best])
    return tuned


def geometric_mean(values: Iterable[float]) -> float:
    """Of positive numbers."""
    return float(jnp.exp(jnp.mean(jnp.log(jnp.asarray(list(values))))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table of this device")
    ops = ("spmm24", "spmm24_fp8", "pack24")
    parser.add_argument("--op", choices=ops, action="append")
    parser.add_argument("--only", default="", help="substring of the keys of problems to tune")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=0.01)
    args = parser.parse_args()
    refused = registry.refusal("hopper", registry.target_capability())
    if refused is not None:
        parser.error(refused)
    sampling = Sampling(args.rounds, args.round_seconds)
    kind = jax.devices()[0].device_kind
    chosen = args.op or ops
    for op, found in (("spmm24", problems()), ("spmm24_fp8", problems_in_8_bits())):
        if op not in chosen:
            continue
        speedups = []
        for problem in found:
            if args.only not in problem.key:
                continue
            best = tune_product(problem, sampling)
            if best is not None:
                fields, speedup = best
                speedups.append(speedup)
                if args.write:
                    tables.save("hopper", kind, problem.op, {problem.key: fields})
        if speedups:
            mean = geometric_mean(speedups)
            print(f"{op}: geometric mean {mean:.3f}x, least {min(speedups):.3f}x of XLA dense")
    if "pack24" in chosen:
        tuned = tune_packing(sampling)
        if args.write:
            tables.save("hopper", kind, "pack24", tuned)
    if args.write:
        print(tables.path("hopper", kind))


if __name__ == "__main__":
    main()
