"""2:4 products and packing against dense products, cuSPARSELt and the chip's bounds.

    python -m benchmarks.gemm --out gemm.json            # on a GPU: json, png and a table
    python -m benchmarks.gemm --out gemm.json --smoke    # anywhere: tiny shapes, no claim of speed

Every product runs in bf16 and in 8-bit floats, dense (as XLA calls cuBLASLt) and sparse. Times are
medians of interleaved rounds, so that clock and temperature drifts meet every contender alike, on
tensors of a briefly trained model and on Gaussian noise. Every sparse result is checked against
float32 before it is timed. Rates count the FLOPs of the dense product.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import fp8_contenders, report
from benchmarks.capture import CaptureConfig, FfnTensors, capture
from benchmarks.command_line import contenders, make_parser
from benchmarks.contenders import compile_dense, compile_sparse, measure_product
from benchmarks.copies import measure_copy
from benchmarks.cusparselt import CuSparseLt, unavailable
from benchmarks.environment import environment
from benchmarks.failures import Failures
from benchmarks.packing import compile_packing, measure_packing, packings
from benchmarks.products import Shape, build, cube_shape, gaussian, shapes
from benchmarks.timing import Sampling
from kernels import registry


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
    fp8: bool = True
    """Whether every product is measured in 8-bit floats as well."""
    require_tuned: bool = False
    smoke: bool = False


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


class _Clock:
    """Seconds that each part of the run took; says on stderr how far it is."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    def lap(self, part: str, what: str = "") -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
        print(f"[{now - self._start:5.0f} s] {part} {what}".rstrip(), file=sys.stderr, flush=True)


class _Compiled:
    """Kernels by what they compute; they compile in threads, with errors kept until asked for."""

    def __init__(self, backends: tuple[registry.Backend, ...], failures: Failures) -> None:
        self._backends = backends
        self._failures = failures
        self._pool = concurrent.futures.ThreadPoolExecutor(max_workers=6)
        self._jobs: dict[tuple[Any, str], concurrent.futures.Future] = {}

    def submit(self, item: Any, compile_item: Callable[[Any, registry.Backend], Any]) -> None:
        for backend in self._backends:
            self._jobs[item, backend] = self._pool.submit(compile_item, item, backend)

    def wait(self) -> None:
        self._pool.shutdown(wait=True)

    def of(self, item: Any) -> tuple[dict[str, Any], dict[str, str]]:
        """Compiled functions by backend, and reasons of those that have none."""
        found: dict[str, Any] = {}
        refusals: dict[str, str] = {}
        for backend in self._backends:
            job = self._jobs[item, backend]
            what = f"compiling {item.name}, {backend}"
            function, note = self._failures.attempt(what, job.result)
            if note is None:
                found[backend] = function
            else:
                refusals[backend] = note
        return found, refusals


def model_shapes(model: Model) -> list[Shape]:
    """All products of a model."""
    c = model.capture
    found = shapes(model.name, c.width, c.hidden, c.tokens)
    return found if model.cube is None else [*found, cube_shape(model.name, model.cube)]


def run(settings: Settings, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures everything.

    Args:
      settings: what.
      save: called with the result so far whenever there is more of it, so that a run that is cut
        short leaves what it had.

    Returns:
      What the result file holds.
    """
    clock, failures = _Clock(), Failures()
    all_packings = [
        p for m in settings.models for p in packings(m.name, m.capture, in_8_bits=settings.fp8)
    ]

    # Kernels compile on the host while the models train; dense products compile later, on a quiet
    # device, because their compiler times candidates.
    compiled = _Compiled(settings.backends, failures)
    for model in settings.models:
        for shape in model_shapes(model):
            compiled.submit(shape, compile_sparse)
            if settings.fp8:
                compiled.submit(fp8_contenders.Fp8Shape(shape), fp8_contenders.compile_sparse)
    for packing in all_packings:
        compiled.submit(packing, compile_packing)
    captured, reports = {}, {}
    for model in settings.models:
        captured[model.name], reports[model.name] = capture(model.capture)
        clock.lap("capture", model.name)
    compiled.wait()
    clock.lap("compile kernels")

    library_note = unavailable() if settings.torch else "not asked for"
    library = CuSparseLt() if library_note is None else None
    clock.lap("load cusparselt")

    rows: list[dict[str, Any]] = []
    packing_rows: list[dict[str, Any]] = []
    result: dict[str, Any] = {
        "benchmark": "gemm",
        "complete": False,
        "smoke": settings.smoke,
        **environment(),
        "settings": dataclasses.asdict(settings),
        "cusparselt": library_note or "used",
        "capture": reports,
        "products": rows,
        "packing": packing_rows,
        "failures": failures,
        "seconds": clock.seconds,
    }
    for model in settings.models:
        c = model.capture
        # Popped: the captured tensors of a model go once it is done.
        sets: dict[str, FfnTensors] = {
            "training": captured.pop(model.name),
            "gaussian": gaussian(c.width, c.hidden, c.tokens),
        }
        for shape in model_shapes(model):
            kernels, refusals = compiled.of(shape)
            dense = dense_fp8 = None
            for data, tensors in sets.items():
                product = build(shape, tensors)
                dense = dense or compile_dense(product)
                clock.lap("prepare operands", f"{shape.name}, {data}")
                checked = None
                if settings.fp8:
                    operands = fp8_contenders.build(product)
                    dense_fp8 = dense_fp8 or fp8_contenders.compile_dense(operands)
                    checked = fp8_contenders.check(
                        product, operands, *compiled.of(fp8_contenders.Fp8Shape(shape)),
                        dense_fp8, failures, f"{shape.name}, {data} data",
                    )  # fmt: skip
                    clock.lap("prepare 8-bit operands", f"{shape.name}, {data}")
                measure = functools.partial(
                    measure_product, product, data, kernels, refusals, dense, library,
                    settings.sampling, failures, settings.require_tuned, checked,
                )  # fmt: skip
                found, _ = failures.attempt(f"{shape.name}, {data} data", measure)
                rows += found or []
                clock.lap("time products", f"{shape.name}, {data}")
        del sets
        save(result)

    copy = measure_copy(settings.sampling, failures)
    result |= {"copy": copy.rows, "copy_bytes_per_second": copy.bytes_per_second}
    clock.lap("time copy")
    for packing in all_packings:
        measure = functools.partial(
            measure_packing, packing, *compiled.of(packing), copy.bytes_per_second,
            settings.sampling, failures,
        )  # fmt: skip
        found, _ = failures.attempt(packing.name, measure)
        packing_rows += found or []
        clock.lap("time packing", packing.name)
    result["summary"] = report.summary(rows, packing_rows)
    result["unsteady"] = report.unsteady([*rows, *copy.rows, *packing_rows])
    result["complete"] = True
    save(result)
    return result


def save_json(result: dict[str, Any], file: pathlib.Path) -> None:
    """Writes a result file."""
    file.write_text(json.dumps(result, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(
        "gemm", "Times 2:4 products and packing on the default JAX device.", steps=250
    )
    parser.add_argument("--no-torch", action="store_true", help="leave cuSPARSELt out")
    parser.add_argument("--no-fp8", action="store_true", help="leave 8-bit floats out")
    parser.add_argument("--require-tuned", action="store_true", help="fail on a tuned-table miss")
    options = parser.parse_args(arguments)
    backends, sampling = contenders(parser, options)
    settings = Settings(
        models=smoke_models() if options.smoke else full_models(options.steps),
        backends=backends,
        sampling=sampling,
        torch=jax.default_backend() == "gpu" and not options.no_torch,
        fp8=not options.no_fp8,
        require_tuned=options.require_tuned,
        smoke=options.smoke,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)
    result = run(settings, lambda r: save_json(r, options.out))
    report.plot(result, options.plot or options.out.with_suffix(".png"))
    report.table(result)
    if result["failures"]:
        sys.exit("\n".join(["failed:", *result["failures"]]))


if __name__ == "__main__":
    main()
