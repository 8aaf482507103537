"""2:4 products and packing against dense products, cuSPARSELt and the chip's bounds.

    python -m benchmarks.gemm --out gemm.json            # on a GPU: json, png and a table
    python -m benchmarks.gemm --out gemm.json --smoke    # anywhere: tiny shapes, no claim of speed

Times are medians of interleaved rounds, so that clock and temperature drifts meet every contender
alike, on tensors of a briefly trained model and on Gaussian noise. Every sparse result is checked
against float32 before it is timed. Rates count the FLOPs of the dense product.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks import devices, report
from benchmarks.capture import CaptureConfig, FfnTensors, capture
from benchmarks.cusparselt import CuSparseLt, unavailable
from benchmarks.environment import environment
from benchmarks.failures import Failures
from benchmarks.packing import compile_packing, measure_copy, measure_packing, packings
from benchmarks.products import (
    Product,
    Shape,
    build,
    cube_shape,
    gaussian,
    reference_rows,
    relative_error,
    shapes,
)
from benchmarks.timing import Sampling, interleaved, jax_timed
from kernels import registry
from kernels.tuning import tables

TOLERANCE = 5e-3


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a feed-forward network, and how its tensors are captured."""

    name: str
    capture: CaptureConfig
    cube: int | None = None
    """Side of the square product that is made of this model's tensors."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    models: tuple[Model, ...]
    backends: tuple[registry.Backend, ...]
    sampling: Sampling
    torch: bool
    require_tuned: bool = False


def full_models(steps: int) -> tuple[Model, ...]:
    """llama1b and llama7b with 16,384 tokens."""
    tokens = 16_384
    return (
        Model("llama1b", CaptureConfig(2048, 8192, 16, tokens, steps=steps)),
        Model(
            "llama7b",
            CaptureConfig(4096, 16_384, 32, tokens, sequences_per_step=4, steps=steps),
            cube=8192,
        ),
    )


def smoke_models() -> tuple[Model, ...]:
    """A network that a CPU multiplies in no time."""
    tiny = CaptureConfig(64, 256, 2, 256, sequence=32, sequences_per_step=2, steps=3)
    return (Model("tiny", tiny, cube=128),)


def _dense(a: Array, b: Array, *, contract: tuple[int, int]) -> Array:
    return jax.lax.dot_general(a, b, (((contract[0],), (contract[1],)), ((), ())))


def compile_sparse(shape: Shape, backend: registry.Backend):
    """The backend's kernel compiled for a shape; takes values, metadata, b."""
    m, n, k = shape.m, shape.n, shape.k
    arguments = (
        jax.ShapeDtypeStruct((m, k // 2), jnp.bfloat16),
        jax.ShapeDtypeStruct((m // 64, k // 64, 128), jnp.int32),
        jax.ShapeDtypeStruct((n, k) if shape.b_layout == "nk" else (k, n), jnp.bfloat16),
    )
    layouts = {"b_layout": shape.b_layout, "out_layout": shape.out_layout}
    _, function = registry.select("spmm24", *arguments, backend=backend, **layouts)
    return jax.jit(functools.partial(function, **layouts)).lower(*arguments).compile()


def measure_product(
    product: Product,
    data: str,
    kernels: dict[str, Any],
    refusals: dict[str, str],
    dense,
    library: CuSparseLt | None,
    settings: Settings,
    failures: Failures,
) -> list[dict[str, Any]]:
    """Rows of one product: one for each contender, refused ones with the reason."""
    shape = product.shape
    sparse = product.sparse
    what = f"{shape.name}, {data} data"
    calls = {"xla dense": jax_timed(dense, *product.dense_operands)}
    expected = reference_rows(product)
    errors: dict[str, float] = {}
    notes = dict(refusals)
    for backend, compiled in kernels.items():
        call = jax_timed(compiled, sparse.values, sparse.metadata, product.b)
        out, note = failures.attempt(f"{what}, {backend}", call.run)
        if note is not None:
            notes[backend] = note
            continue
        errors[backend] = relative_error(product, expected, out)
        calls[backend] = call
    if library is not None:
        found, note = failures.attempt(f"{what}, cusparselt", lambda: library.calls(product))
        if note is not None:
            notes["cusparselt"] = note
        for transposed, call in (found or {}).items():
            name = "cusparselt" + (" transposed" if transposed else "")
            out = library.result(product, call.run(), transposed)
            errors[name] = relative_error(product, expected, out)
            calls[name] = call
    for name, error in errors.items():
        # A NaN compares false with everything: it must fail too.
        if not error <= TOLERANCE:
            failures.append(f"{what}, {name}: relative error {error:.1e} exceeds {TOLERANCE}")

    samples = interleaved(calls, settings.sampling)
    kind = jax.devices()[0].device_kind
    bounds = devices.spmm_bounds(kind, shape.m, shape.n, shape.k)
    common = {**dataclasses.asdict(shape), "data": data}
    rows = []
    for name, taken in samples.items():
        row = {**common, "contender": name, **taken.as_row()}
        row["effective_tflops"] = shape.flops / taken.median / 1e12
        row["speedup_over_dense"] = samples["xla dense"].median / taken.median
        row["relative_error"] = errors.get(name)
        if name != "xla dense" and bounds.sparse is not None:
            row["share_of_bound"] = bounds.sparse / taken.median
        if name in registry.BACKENDS and name != "reference":
            key = tables.key(
                m=shape.m, n=shape.n, k=shape.k, b=shape.b_layout, out=shape.out_layout
            )
            row["tuned"] = tables.lookup(name, "spmm24", kind, key) is not None
            if settings.require_tuned and not row["tuned"]:
                failures.append(f"{what}, {name}: no entry {key} in the tuned table")
        if library is not None and name.startswith("cusparselt"):
            row["algorithm"] = library.algorithm(shape, name.endswith("transposed"))
        rows.append(row)
    rows += [{**common, "contender": name, "note": note} for name, note in notes.items()]
    for row in rows:
        row["bounds_ms"] = {
            k: None if v is None else 1e3 * v for k, v in dataclasses.asdict(bounds).items()
        }
    return rows


class _Clock:
    """Seconds that each part of the run took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now


def run(settings: Settings) -> dict[str, Any]:
    """Measures everything; returns what the result file holds."""
    clock, failures = _Clock(), Failures()
    all_shapes: dict[str, list[Shape]] = {}
    for model in settings.models:
        c = model.capture
        all_shapes[model.name] = shapes(model.name, c.width, c.hidden, c.tokens)
        if model.cube is not None:
            all_shapes[model.name].append(cube_shape(model.name, model.cube))

    all_packings = [p for m in settings.models for p in packings(m.name, m.capture)]

    # Kernels compile on the host while the models train; dense products compile later, on a quiet
    # device, because their compiler times candidates.
    jobs: dict[tuple, concurrent.futures.Future] = {}
    with concurrent.futures.ThreadPoolExecutor(max_workers=6) as pool:
        for backend in settings.backends:
            for shape in (s for group in all_shapes.values() for s in group):
                jobs[shape, backend] = pool.submit(compile_sparse, shape, backend)
            for packing in all_packings:
                jobs[packing, backend] = pool.submit(compile_packing, packing, backend)
        captured, reports = {}, {}
        for model in settings.models:
            captured[model.name], reports[model.name] = capture(model.capture)
        clock.lap("capture")
    clock.lap("compile kernels")

    def compiled(item: Any) -> tuple[dict[str, Any], dict[str, str]]:
        found: dict[str, Any] = {}
        refusals: dict[str, str] = {}
        for backend in settings.backends:
            job = jobs[item, backend]
            function, note = failures.attempt(f"compiling {item.name}, {backend}", job.result)
            if note is None:
                found[backend] = function
            else:
                refusals[backend] = note
        return found, refusals

    library_note = unavailable() if settings.torch else "not asked for"
    library = CuSparseLt() if library_note is None else None
    clock.lap("load cusparselt")

    rows = []
    for model in settings.models:
        c = model.capture
        # The captured tensors of a model go once it is done.
        sets: dict[str, FfnTensors] = {
            "training": captured.pop(model.name),
            "gaussian": gaussian(c.width, c.hidden, c.tokens),
        }
        for shape in all_shapes[model.name]:
            kernels, refusals = compiled(shape)
            dense = None
            for data, tensors in sets.items():
                product = build(shape, tensors)
                if dense is None:
                    multiply = functools.partial(_dense, contract=product.dense_contract)
                    dense = jax.jit(multiply).lower(*product.dense_operands).compile()
                clock.lap("prepare operands")
                rows += measure_product(
                    product, data, kernels, refusals, dense, library, settings, failures
                )
                clock.lap("time products")
        del sets

    copy_bandwidth = measure_copy(settings.sampling)
    packing_rows = []
    for packing in all_packings:
        packing_rows += measure_packing(
            packing, *compiled(packing), copy_bandwidth, settings.sampling, failures
        )
    clock.lap("time packing")
    return {
        "benchmark": "gemm",
        **environment(),
        "settings": dataclasses.asdict(settings),
        "cusparselt": library_note or "used",
        "capture": reports,
        "products": rows,
        "copy_bytes_per_second": copy_bandwidth,
        "packing": packing_rows,
        "summary": report.summary(rows, packing_rows),
        "failures": list(failures),
        "seconds": clock.seconds,
    }


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemm",
        description="Times 2:4 products and packing on the default JAX device.",
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="result file, .json")
    parser.add_argument("--plot", type=pathlib.Path, help="plot file; default: next to --out, .png")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes: does it run, not how fast"
    )
    parser.add_argument(
        "--backends", nargs="+", choices=registry.BACKENDS, help="default: by device"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each contender")
    parser.add_argument("--round-ms", type=float, default=40.0, help="time of a sample")
    parser.add_argument("--steps", type=int, default=300, help="of the training before capture")
    parser.add_argument("--no-torch", action="store_true", help="leave cuSPARSELt out")
    parser.add_argument("--require-tuned", action="store_true", help="fail on a tuned-table miss")
    options = parser.parse_args(arguments)
    if options.out.suffix != ".json":
        parser.error(f"--out {options.out} must end in .json")
    if options.rounds < 1 or options.round_ms <= 0 or options.steps < 1:
        parser.error("--rounds, --round-ms and --steps must be positive")
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not options.smoke:
        parser.error(
            f"the default device is {jax.devices()[0].device_kind!r}, no GPU: only --smoke runs"
        )

    backends = options.backends
    if backends is None:
        # The reference is no contender on a GPU, where it is a dense product and more.
        backends = [b for b in registry.available_backends() if b != "reference" or not on_gpu]
    sampling = Sampling(options.rounds, options.round_ms / 1e3)
    if options.smoke:
        sampling = Sampling(rounds=2, round_seconds=1e-3)
    settings = Settings(
        models=smoke_models() if options.smoke else full_models(options.steps),
        backends=tuple(backends),
        sampling=sampling,
        torch=on_gpu and not options.no_torch,
        require_tuned=options.require_tuned,
    )
    result = run(settings)
    result["smoke"] = options.smoke
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    report.plot(result, options.plot or options.out.with_suffix(".png"))
    report.table(result)
    if result["failures"]:
        sys.exit("\n".join(["failed:", *result["failures"]]))


if __name__ == "__main__":
    main()
