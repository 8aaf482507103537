"""The gated routed 2:4 feed-forward network against dense gated ones of the same size.

    python -m benchmarks.ffn_gated --out ffn_gated.json            # on a GPU: json and a table
    python -m benchmarks.ffn_gated --out ffn_gated.json --smoke    # anywhere, no claim of speed

relu(X W1)^2 * (X Wg) times W2, forward, and with it backward. Sparse times hold what a step adds:
routing, the plan, permuting tokens, packing the three weights. Rivals, in the same run and in
turns: XLA's dense network of the same form and size, and a dense SwiGLU of that size. Operands are
those of `benchmarks.ffn`, a briefly trained squared ReLU network: W1 and W2 its first neurons, Wg
the W1 of its last ones. What a sparse network computes is compared with the same one in dense
products; those choose two of four among accumulators, so that near-ties differ.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from rich.console import Console
from rich.table import Table

from benchmarks import ffn_contenders as networks
from benchmarks.capture import CaptureConfig, FfnTensors, capture
from benchmarks.command_line import contenders, make_parser
from benchmarks.environment import environment
from benchmarks.failures import Failures
from benchmarks.ffn import PASSES, full_models, smoke_models
from benchmarks.ffn_problem import Operands, gated, preparation
from benchmarks.timing import Sampling, interleaved, jax_timed
from kernels import registry
from sparsejax.prune import soft_threshold_beta
from sparsejax.spec import Sparsity

TOLERANCE = 5e-2
"""Relative Frobenius error of outputs and gradients, near-ties included."""

RESULTS = ("y", "dx", "dw1", "dw2", "dwg")


def neurons(width: int, m: int, smoke: bool) -> int:
    """H: 8 D / 3, in such multiples that an expert's neurons are one of 128 (smoke: of 64)."""
    step = (64 if smoke else 128) * (m // 4)
    return max(1, round(8 * width / 3 / step)) * step


def prepare(t: FfnTensors, hidden: int, sparsity: Sparsity) -> tuple[Operands, Array]:
    """Operands of the routed network, and its Wg (H, D)."""
    part = t._replace(w1=t.w1[:, :hidden], w2=t.w2[:hidden], y2=t.y2[:, :hidden])
    operands, *_ = preparation(sparsity)(part)
    wg = gated(t, hidden).wg
    betas = operands.betas.at[2].set(soft_threshold_beta(wg))
    return operands._replace(betas=betas), wg


@jax.jit
def errors(got: tuple[Array, ...], want: tuple[Array, ...]) -> Array:
    """Relative Frobenius distances, (n,) float32."""
    pairs = [[a.astype(jnp.float32) for a in pair] for pair in zip(got, want, strict=True)]
    return jnp.stack([jnp.linalg.norm(a - b) / jnp.linalg.norm(b) for a, b in pairs])


def _compile(network: networks.Network, operands: Any) -> Any:
    return jax.jit(network).lower(operands).compile()


def _each(
    t: FfnTensors, hidden: int, m: int, v: int, backends: tuple[registry.Backend, ...]
) -> Iterator[tuple[str, str, Callable[[], tuple[Any, Any]]]]:
    """Name, passes, and what makes the compiled network and its operands."""
    sparsity = Sparsity(m=m, v=v)
    dense, routed = gated(t, hidden), prepare(t, hidden, sparsity)

    def make(network: networks.Network, operands: Any) -> tuple[Any, Any]:
        return _compile(network, operands), operands

    for passes, backward in PASSES.items():
        own = functools.partial(make, networks.relu2_gated(backward), dense)
        yield "dense relu2_gated", passes, own
        yield "dense swiglu", passes, functools.partial(make, networks.swiglu(backward), dense)
        for backend in backends:
            named = dataclasses.replace(sparsity, backend=backend)
            network = networks.sparse_gated(named, backward)
            yield f"sparse, {backend}", passes, functools.partial(make, network, routed)


def measure(
    t: FfnTensors,
    hidden: int,
    m: int,
    v: int,
    backends: tuple[registry.Backend, ...],
    sampling: Sampling,
    failures: Failures,
) -> list[dict[str, Any]]:
    """Rows of one size: contender, passes, times, errors.

    Errors are measured once for each backend, on the results of forward and backward, the output
    among them: None in the rows of the forward pass alone.
    """
    rows: list[dict[str, Any]] = []
    built: dict[tuple[str, str], tuple[Any, Any]] = {}
    for name, passes, make in _each(t, hidden, m, v, backends):
        found, note = failures.attempt(f"{name}, {passes}", make)
        if note is None:
            built[name, passes] = found
        else:
            rows.append({"contender": name, "passes": passes, "note": note})
    found_errors: dict[str, dict[str, float]] = {}
    expected = None
    for name in (f"sparse, {backend}" for backend in backends):
        if (name, "forward+backward") not in built:
            continue
        call, operands = built[name, "forward+backward"]
        if expected is None:
            plain = networks.sparse_gated(Sparsity(m=m, v=v, backend="reference"), True)
            expected = _compile(plain, operands)(operands)
        numbers = dict(zip(RESULTS, map(float, errors(call(operands), expected)), strict=True))
        found_errors[name] = numbers
        # Written so that a NaN fails.
        wrong = {k: e for k, e in numbers.items() if not e < TOLERANCE}
        if wrong:
            failures.append(f"{name}: relative errors {wrong} exceed {TOLERANCE}")
    del expected
    calls = {key: jax_timed(call, operands) for key, (call, operands) in built.items()}
    samples = interleaved({"|".join(key): call for key, call in calls.items()}, sampling)
    product = 2.0 * t.x.shape[0] * t.x.shape[1] * hidden
    for name, passes in built:
        taken = samples[f"{name}|{passes}"]
        row = {"contender": name, "passes": passes, **taken.as_row()}
        # Of the dense network's products, whatever is executed.
        row["effective_tflops"] = (9 if PASSES[passes] else 3) * product / taken.median / 1e12
        if name.startswith("sparse"):
            row["speedup"] = {
                rival: samples[f"{rival}|{passes}"].median / taken.median
                for rival, p in built
                if p == passes and rival.startswith("dense")
            }
            row["relative_errors"] = found_errors[name] if PASSES[passes] else None
        rows.append(row)
    return rows


def table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints times and speed-ups."""
    view = Table(title=f"Gated FFN on {result['device']['kind']}", title_justify="left")
    for heading in ("model", "M", "contender", *PASSES, "over dense relu2_gated"):
        view.add_column(heading)
    for size in result["sizes"]:
        by = {(r["contender"], r["passes"]): r for r in size["rows"]}
        for name in dict.fromkeys(r["contender"] for r in size["rows"]):
            rows = [by.get((name, p), {}) for p in PASSES]
            ratios = [r.get("speedup", {}).get("dense relu2_gated") for r in rows]
            view.add_row(
                f"{size['model']}, D {size['width']:,}, H {size['hidden']:,}",
                str(size["m"]),
                name,
                *(f"{r['ms']:.3f} ms" if "ms" in r else "-" for r in rows),
                ", ".join("" if x is None else f"{x:.2f}x" for x in ratios).strip(", "),
            )
    console = console or Console(width=160)
    console.print(view)
    for size in result["sizes"]:
        for row in size["rows"]:
            if "note" in row:
                console.print(f"{size['model']}, M={size['m']}, {row['contender']}: {row['note']}")


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser("ffn_gated", "Times gated FFNs, dense and sparse.", steps=300)
    parser.add_argument("--blocks", nargs="+", type=int, default=[16], help="values of M")
    parser.add_argument("--models", nargs="+", default=["llama1b"], choices=["llama1b", "llama7b"])
    options = parser.parse_args(arguments)
    backends, sampling = contenders(parser, options)
    if not set(options.blocks) <= {8, 16, 32}:
        parser.error(f"--blocks {options.blocks} must be of 8, 16, 32")
    models = smoke_models() if options.smoke else full_models(options.steps)
    failures = Failures()
    result: dict[str, Any] = {
        "benchmark": "ffn_gated",
        "smoke": options.smoke,
        **environment(),
        "sampling": dataclasses.asdict(sampling),
        "sizes": [],
        "failures": failures,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for model in models:
        if not options.smoke and model.name not in options.models:
            continue
        config: CaptureConfig = model.capture
        tensors, report = capture(config)
        for m in dict.fromkeys(options.blocks):
            hidden = neurons(config.width, m, options.smoke)
            v = 64 if options.smoke else 128
            rows = measure(tensors, hidden, m, v, backends, sampling, failures)
            result["sizes"].append(
                {"model": model.name, "tokens": config.tokens, "width": config.width}
                | {"hidden": hidden, "m": m, "capture": report, "rows": rows}
            )
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    table(result)
    if failures:
        sys.exit("\n".join(["failed:", *failures]))


if __name__ == "__main__":
    main()
