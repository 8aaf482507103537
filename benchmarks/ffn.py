"""The routed 2:4 feed-forward network against dense and routed-only ones: forward, and with it
backward, from routing to the summed output.

    python -m benchmarks.ffn --out ffn.json            # on a GPU: json, png and a table
    python -m benchmarks.ffn --out ffn.json --fp8      # and dense and routed 8-bit networks
    python -m benchmarks.ffn --out ffn.json --smoke    # anywhere: tiny shapes, no claim of speed

Everything that a step adds is in the sparse times: choosing experts, the plan, permuting tokens,
thresholding and packing both weights, gradients in the masters' layout. Rivals, in the same run and
in turns: XLA's dense squared ReLU (what "speed-up" refers to), a dense SwiGLU of equal parameters,
and the same routing without 2:4, by jax.lax.ragged_dot and by one batched product that knows the
largest load beforehand. Operands come from a briefly trained network. Outputs and gradients are
checked against float32 before they are timed.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import ffn_contenders as networks
from benchmarks import ffn_report, ffn_stages
from benchmarks.capture import CaptureConfig, FfnTensors, capture
from benchmarks.command_line import contenders, make_parser
from benchmarks.environment import environment
from benchmarks.failures import Failures
from benchmarks.ffn_problem import errors, gated, operand_shapes, preparation, tensor_shapes
from benchmarks.timing import Sampling, interleaved, jax_timed
from kernels import registry
from sparsejax.ops import routed_ffn_fp8
from sparsejax.spec import Precision, RoutedWeightGradient, Sparsity
from train.compiler import CUBLAS

TOLERANCE = {True: 5e-3, False: 2e-2}
"""Relative Frobenius error of 2:4 contenders, and of those that XLA rounds where it likes."""

TOLERANCE_ALONG_TOKENS = 2e-2
"""Of those that keep two of four along tokens: they choose among rounded values, and a near-tie
that falls the other way moves a whole element."""

TOLERANCE_8_BITS = 0.25
"""Of those in 8 bits, against operands in 16: it finds what is wrong, not what is inexact."""

IN_8_BITS = " fp8"
"""Behind the name of a contender."""

PASSES = {"forward": False, "forward+backward": True}


@dataclasses.dataclass(frozen=True)
class Model:
    """Sizes of a feed-forward network, and how its tensors are captured."""

    name: str
    capture: CaptureConfig


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run."""

    models: tuple[Model, ...]
    blocks: tuple[int, ...]
    """Values of M."""
    v: int
    backends: tuple[registry.Backend, ...]
    sampling: Sampling
    seconds: float
    """After which no further rival without 2:4 is compiled, and no further breakdown made."""
    weight_gradient: RoutedWeightGradient = "dense"
    """Of the 2:4 networks: activations in the weight-gradient products."""
    dense_neurons: float = 0.05
    fp8: bool = False
    """Whether networks with 8-bit products are timed too."""
    smoke: bool = False

    @property
    def sparse(self) -> dict[str, tuple[registry.Backend, Precision]]:
        """Backend and precision of each 2:4 contender."""
        found: dict[str, tuple[registry.Backend, Precision]] = {
            name: (name, "compute") for name in self.backends
        }
        for name in self.backends if self.fp8 else ():
            try:
                routed_ffn_fp8.module(name)
            except NotImplementedError:
                continue
            found[name + IN_8_BITS] = name, "fp8"
        return found


def full_models(steps: int) -> tuple[Model, ...]:
    """llama1b and llama7b with 16,384 tokens."""
    tokens = 16_384
    return (
        Model("llama1b", CaptureConfig(2048, 8192, 16, tokens, steps=steps)),
        Model(
            "llama7b",
            CaptureConfig(4096, 16_384, 32, tokens, sequences_per_step=4, steps=steps),
        ),
    )


def smoke_models() -> tuple[Model, ...]:
    """A network that a CPU multiplies in no time."""
    tiny = CaptureConfig(64, 512, 2, 256, sequence=32, sequences_per_step=2, steps=3)
    return (Model("tiny", tiny),)


class _Clock:
    """Seconds of each part of the run; says on stderr how far it is."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._start = self._last = time.perf_counter()

    @property
    def total(self) -> float:
        return time.perf_counter() - self._start

    def lap(self, part: str, what: str = "") -> None:
        now = time.perf_counter()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self._last
        self._last = now
        print(f"[{now - self._start:5.0f} s] {part} {what}".rstrip(), file=sys.stderr, flush=True)


def _sparsity(settings: Settings, m: int, backend: registry.Backend | None = None) -> Sparsity:
    return Sparsity(
        m=m,
        v=settings.v,
        backend=backend,
        weight_gradient=settings.weight_gradient,
        dense_neurons=settings.dense_neurons,
    )


class _Kernels:
    """Sparse networks and their stages; they compile in threads, while the models train."""

    def __init__(self, settings: Settings) -> None:
        pool = concurrent.futures.ThreadPoolExecutor(max_workers=8)
        self._jobs: dict[tuple, concurrent.futures.Future] = {}
        self.stages: dict[tuple, ffn_stages.Stages] = {}
        for model in settings.models:
            c = model.capture
            for m in settings.blocks:
                shapes = operand_shapes(c.width, c.hidden, c.tokens, m // 4)
                sparsity = _sparsity(settings, m)
                tensors = tensor_shapes(c.width, c.hidden, c.tokens)
                self._jobs[model.name, m, "prepare"] = pool.submit(
                    self._compile, preparation(sparsity), tensors
                )
                outputs = shapes.x, shapes.x, shapes.w1, shapes.w2
                for is_sparse in (True, False) if settings.smoke else (True,):
                    options = {"sparsity": sparsity, "sparse": is_sparse}
                    self._jobs[model.name, m, "errors", is_sparse] = pool.submit(
                        self._compile, errors, shapes, outputs, **options
                    )
                for contender, (backend, precision) in settings.sparse.items():
                    sparsity = _sparsity(settings, m, backend)
                    key = (model.name, m, contender)
                    for name, backward in PASSES.items():
                        network = networks.sparse(sparsity, backward, precision)
                        self._jobs[*key, name] = pool.submit(_compile, network, shapes)
                    self._jobs[*key, "stages"] = pool.submit(
                        self._stages, key, sparsity, precision, shapes
                    )
        pool.shutdown(wait=False)

    @staticmethod
    def _compile(jitted: Any, *shapes: Any, **options: Any) -> Any:
        return jitted.lower(*shapes, **options).compile()

    def _stages(self, key: tuple, sparsity: Sparsity, precision: Precision, shapes: Any) -> Any:
        assert sparsity.backend is not None
        kind = ffn_stages.Stages8 if precision == "fp8" else ffn_stages.Stages
        self.stages[key] = kind(sparsity, sparsity.backend)
        return self.stages[key].compile(shapes)

    def get(self, *key: Any) -> Any:
        """The compiled function, or its error."""
        return self._jobs[key].result()


@dataclasses.dataclass
class _Contender:
    """A compiled network and what it was given."""

    name: str
    m: int | None
    passes: str
    call: Callable[..., Any]
    operands: Any

    @property
    def key(self) -> str:
        return f"{self.name}|{self.m}|{self.passes}"


def _compile(network: Callable[..., Any], operands: Any) -> Any:
    return jax.jit(network).lower(operands).compile()


def _compile_in_8_bits(network: Callable[..., Any], operands: Any) -> Any:
    return jax.jit(network).lower(operands).compile(compiler_options=CUBLAS)


def _check(
    contender: _Contender, errors_of: Any, limit: float, failures: Failures, what: str
) -> dict[str, float]:
    numbers = errors_of(contender.operands, contender.call(contender.operands))
    found = dict(zip(("y", "dx", "dw1", "dw2"), map(float, numbers), strict=True))
    # Written so that a NaN fails.
    wrong = {k: v for k, v in found.items() if not v < limit}
    if wrong:
        failures.append(f"{what}: relative errors {wrong} exceed {limit}")
    return found


def _model(
    model: Model,
    tensors: FfnTensors,
    settings: Settings,
    kernels: _Kernels,
    clock: _Clock,
    failures: Failures,
    result: dict[str, Any],
) -> None:
    """Adds one model's rows to the result."""
    contenders: list[_Contender] = []
    rows: list[dict[str, Any]] = []

    def add(name: str, m: int | None, passes: str, make: Callable[[], Any], operands: Any) -> None:
        what = f"{model.name} {name}, M={m}, {passes}"
        call, note = failures.attempt(what, make)
        if note is not None:
            rows.append({"model": model.name, "contender": name, "m": m, "passes": passes,
                         "note": note})  # fmt: skip
            return
        contender = _Contender(name, m, passes, call, operands)
        is_sparse = name in settings.sparse
        limit = TOLERANCE[is_sparse]
        if is_sparse and settings.weight_gradient == "tokens24":
            limit = TOLERANCE_ALONG_TOKENS
        if name.endswith(IN_8_BITS):
            limit = TOLERANCE_8_BITS
        # Rivals are checked where nothing is timed.
        if m is not None and PASSES[passes] and (is_sparse or settings.smoke):

            def check() -> dict[str, float]:
                own = kernels.get(model.name, m, "errors", is_sparse)
                return _check(contender, own, limit, failures, what)

            found, note = failures.attempt(what, check)
            if note is not None:
                return
            errors_of[contender.key] = found
        contenders.append(contender)

    errors_of: dict[str, dict[str, float]] = {}
    prepared = {}
    loads_of: dict[int, list[int]] = {}
    for m in settings.blocks:
        prepared[m], counts, used = kernels.get(model.name, m, "prepare")(tensors)
        loads_of[m] = [int(n) for n in counts]
        imbalance = max(loads_of[m]) / (sum(loads_of[m]) / len(loads_of[m]))
        result["loads"].append(
            {"model": model.name, "m": m, "loads": loads_of[m], "imbalance": imbalance,
             "rows_used": int(used)}
        )  # fmt: skip
    gated_operands = gated(tensors)
    clock.lap("prepare operands", model.name)

    first = prepared[settings.blocks[0]]
    for passes, backward in PASSES.items():
        make = functools.partial(_compile, networks.relu2(backward), first)
        add("dense relu2", None, passes, make, first)
        if settings.fp8:
            make = functools.partial(_compile_in_8_bits, networks.relu2_fp8(backward), first)
            add("dense relu2 fp8", None, passes, make, first)
        make = functools.partial(_compile, networks.swiglu(backward), gated_operands)
        add("dense swiglu", None, passes, make, gated_operands)
    clock.lap("compile dense", model.name)
    for m, name in ((m, b) for m in settings.blocks for b in settings.sparse):
        for passes in PASSES:
            make = functools.partial(kernels.get, model.name, m, name, passes)
            add(name, m, passes, make, prepared[m])
        clock.lap("check", f"{model.name}, M={m}, {name}")
    for m in settings.blocks:
        sparsity = _sparsity(settings, m)
        capacity = -(-max(loads_of[m]) // 128) * 128
        rivals = {
            "ragged_dot": functools.partial(networks.ragged, sparsity),
            "batched": functools.partial(networks.batched, sparsity, capacity),
        }
        for (name, rival), (passes, backward) in (
            (r, p) for r in rivals.items() for p in PASSES.items()
        ):
            if clock.total > settings.seconds:
                rows.append({"model": model.name, "contender": name, "m": m, "passes": passes,
                             "note": f"not timed: {settings.seconds} s were over"})  # fmt: skip
                continue
            make = functools.partial(_compile, rival(backward=backward), prepared[m])
            add(name, m, passes, make, prepared[m])
        clock.lap("compile rivals", f"{model.name}, M={m}")

    calls = {c.key: jax_timed(c.call, c.operands) for c in contenders}
    samples = interleaved(calls, settings.sampling)
    c = model.capture
    product = 2.0 * c.tokens * c.width * c.hidden
    dense = {
        x.passes: samples[x.key].median for x in contenders if x.name == "dense relu2"
    }  # fmt: skip
    for x in contenders:
        taken = samples[x.key]
        row: dict[str, Any] = {"model": model.name, "contender": x.name, "m": x.m}
        row |= {"passes": x.passes}
        row |= taken.as_row()
        if x.passes in dense:
            row["speedup_over_dense"] = dense[x.passes] / taken.median
        # Of the dense squared ReLU's products, whatever is executed.
        row["effective_tflops"] = (6 if PASSES[x.passes] else 2) * product / taken.median / 1e12
        if x.key in errors_of:
            row["relative_errors"] = errors_of[x.key]
        rows.append(row)
    clock.lap("time", model.name)
    result["networks"] += rows

    short = dataclasses.replace(settings.sampling, rounds=min(3, settings.sampling.rounds))
    for m, backend in ((m, b) for m in settings.blocks for b in settings.sparse):
        if clock.total > settings.seconds:
            result["notes"].append(f"no breakdown of {model.name}, M={m}, {backend}: out of time")
            continue

        def breakdown(m=m, backend=backend):
            compiled = kernels.get(model.name, m, backend, "stages")
            stages = kernels.stages[model.name, m, backend]
            executed = product / (m // 4)
            return ffn_stages.measure(stages, compiled, prepared[m], short, executed)

        found, note = failures.attempt(f"{model.name} stages, M={m}, {backend}", breakdown)
        common = {"model": model.name, "m": m, "contender": backend}
        result["stages"] += [{**common, **row} for row in found or [{"note": note}]]
    clock.lap("time stages", model.name)


def run(settings: Settings, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measures everything.

    Args:
      settings: what.
      save: called with the result so far whenever a model is done, so that a run that is cut short
        leaves what it had.

    Returns:
      What the result file holds.
    """
    clock, failures = _Clock(), Failures()
    kernels = _Kernels(settings)
    result: dict[str, Any] = {
        "benchmark": "ffn",
        "complete": False,
        "smoke": settings.smoke,
        **environment(),
        "settings": dataclasses.asdict(settings),
        "capture": {},
        "loads": [],
        "networks": [],
        "stages": [],
        "notes": [],
        "failures": failures,
        "seconds": clock.seconds,
    }
    for model in settings.models:
        tensors, result["capture"][model.name] = capture(model.capture)
        clock.lap("capture", model.name)
        measure = functools.partial(
            _model, model, tensors, settings, kernels, clock, failures, result
        )
        failures.attempt(model.name, measure)
        save(result)
    result["summary"] = ffn_report.summary(result)
    result["complete"] = True
    save(result)
    return result


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser(
        "ffn", "Times routed 2:4 feed-forward networks on the default JAX device.", steps=200
    )
    parser.add_argument("--models", nargs="+", choices=("llama1b", "llama7b"), help="default: both")
    parser.add_argument("--blocks", nargs="+", type=int, default=[8, 16, 32], help="values of M")
    parser.add_argument(
        "--seconds", type=float, default=110.0, help="after which only 2:4 networks are timed"
    )
    parser.add_argument(
        "--weight-gradient",
        choices=("dense", "tokens24"),
        default="dense",
        help="activations in the 2:4 networks' weight gradients: dense, or 2:4 along tokens",
    )
    parser.add_argument(
        "--dense-neurons", type=float, default=0.05, help="share that tokens24 leaves dense"
    )
    parser.add_argument(
        "--fp8", action="store_true", help="time dense and routed networks of 8-bit products too"
    )
    options = parser.parse_args(arguments)
    backends, sampling = contenders(parser, options)
    if not 0 <= options.dense_neurons <= 1:
        parser.error(f"--dense-neurons {options.dense_neurons} must be between 0 and 1")
    if not set(options.blocks) <= {8, 16, 32}:
        parser.error(f"--blocks {options.blocks} must be of 8, 16, 32")
    models = smoke_models() if options.smoke else full_models(options.steps)
    if options.models and not options.smoke:
        models = tuple(m for m in models if m.name in options.models)
    settings = Settings(
        models=models,
        blocks=tuple(dict.fromkeys(options.blocks)),
        v=64 if options.smoke else 128,
        backends=backends,
        sampling=sampling,
        seconds=options.seconds,
        weight_gradient=options.weight_gradient,
        dense_neurons=options.dense_neurons,
        fp8=options.fp8,
        smoke=options.smoke,
    )
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def save(result: dict[str, Any]) -> None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    result = run(settings, save)
    ffn_report.plot(result, options.plot or options.out.with_suffix(".png"))
    ffn_report.table(result)
    if result["failures"]:
        sys.exit("\n".join(["failed:", *result["failures"]]))


if __name__ == "__main__":
    main()
