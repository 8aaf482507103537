"""A mixture of experts with sparse experts against the same mixture with dense ones.

    python -m benchmarks.moe --out moe.json            # on a GPU: 8 experts, top-2, llama1b's width
    python -m benchmarks.moe --out moe.json --smoke    # anywhere: tiny shapes, no claim of speed
    python -m benchmarks.moe --out moe.json --clusters 2  # sparse experts also in two clusters each

Router, gates and permutation of tokens are the same in all of them and are timed with them, forward
and forward plus backward, in interleaved rounds. The dense experts' products are those of the
Hopper kernels that JAX ships ("dense, pallas") and of `jax.lax.ragged_dot` ("dense, xla"), which on
GPUs multiplies every row with every expert's weights. "sparse" meets whole experts, "sparse S=2"
routes further: a token meets one of two clusters of each of its experts' neurons. "one network" is
a dense FFN of as many FLOPs, for orientation. Weights are packed once an optimiser step: timed
apart. Operands are normal, inputs normalised, biases evened; experts at initialisation have half of
their activations at zero, trained ones more.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from rich.console import Console
from rich.table import Table

from benchmarks.command_line import contenders, make_parser
from benchmarks.environment import environment
from benchmarks.failures import Failures
from benchmarks.timing import Samples, Sampling, interleaved, jax_timed
from kernels import registry
from sparsejax.nn import MoEFFN, RoutedFFN
from sparsejax.routing import update_bias
from sparsejax.spec import Sparsity

PASSES = ("forward", "forward and backward")

# Kernels against the reference, in bf16: what two roundings of Y2 and other sums do.
TOLERANCE = 2e-2


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of one mixture; H is that of all experts together."""

    width: int = 2048
    hidden: int = 32_768
    tokens: int = 16_384
    experts: int = 8
    experts_per_token: int = 2
    v: int = 128

    @property
    def flops(self) -> float:
        """Of a forward pass with dense experts."""
        active = self.hidden // self.experts * self.experts_per_token
        return 4.0 * self.tokens * self.width * active


SMOKE = Sizes(64, 4096, 128, 4, 2, 32)
CLUSTERS = (2, 4)


def _module(sizes: Sizes, sparsity: Sparsity | None, **options: Any) -> MoEFFN:
    return MoEFFN(
        sizes.width,
        sizes.hidden,
        num_experts=sizes.experts,
        experts_per_token=sizes.experts_per_token,
        sparsity=sparsity,
        rngs=nnx.Rngs(params=0),
        **options,
    )


def evened(sizes: Sizes, x: Array, steps: int = 200) -> nnx.State:
    """A mixture's state whose biases even the loads of these tokens, with its scales set."""
    module = _module(sizes, Sparsity(m=4 * sizes.experts, v=sizes.v, backend="reference"))
    module.beta[...] = module.begin_sparse().beta
    graph = nnx.graphdef(module)

    @jax.jit
    def step(state: nnx.State, x: Array) -> Array:
        m = nnx.merge(graph, state)
        chosen = m.route(x).experts.reshape(-1)
        counts = jnp.zeros((sizes.experts,), jnp.int32).at[chosen].add(1)
        return update_bias(m.bias[...], counts, 0.01)

    for _ in range(steps):
        module.bias[...] = step(nnx.state(module), x)
    return nnx.state(module)


def clustered(sizes: Sizes, state: nnx.State, sparsity: Sparsity, x: Array) -> MoEFFN:
    """The same mixture with its neurons in clusters, whose loads are even for these tokens."""
    module = _module(sizes, sparsity)
    for name in ("router", "w1", "w2", "bias"):
        getattr(module, name)[...] = state[name][...]
    module.apply_update(nnx.jit(lambda m: m.begin_sparse())(module))
    biases, _ = nnx.jit(lambda m, x: m.reroute(x))(module, x)
    module.cluster_bias[...] = biases["cluster_bias"]
    return module


def sparse_name(backend: registry.Backend, clusters: int) -> str:
    """Of a contender."""
    return f"sparse, {backend}" if clusters == 1 else f"sparse S={clusters}, {backend}"


def _function(graph: nnx.GraphDef, passes: str) -> Callable:
    """(state, packed, x, dy) to the output, or to the gradients by the parameters and x."""

    def forward(state: nnx.State, packed: Any, x: Array, dy: Array) -> Array:
        del dy
        return nnx.merge(graph, state)(x, packed)[0]

    def both(state: nnx.State, packed: Any, x: Array, dy: Array) -> Any:
        structure, params, rest = nnx.split(nnx.merge(graph, state), nnx.Param, ...)
        apply = lambda params, x: nnx.merge(structure, params, rest)(x, packed)[0]
        return jax.vjp(apply, params, x)[1](dy)

    return forward if passes == PASSES[0] else both


def _compile(graph: nnx.GraphDef, passes: str, arguments: tuple) -> Any:
    return jax.jit(_function(graph, passes)).lower(*arguments).compile()


def candidates(
    sizes: Sizes,
    state: nnx.State,
    backends: tuple[registry.Backend, ...],
    x: Array | None = None,
    clusters: tuple[int, ...] = (1,),
) -> dict[str, tuple[nnx.GraphDef, nnx.State, Any]]:
    """Name to (graph, state, packed weights or None), of what can be built here.

    x: tokens (T, D) whose loads clusters even; needed for more than one in an expert.
    """
    found: dict[str, tuple[nnx.GraphDef, nnx.State, Any]] = {}
    for grouped in ("xla", "pallas"):
        if grouped == "pallas" and registry.target_capability() != (9, 0):
            continue
        module = _module(sizes, None, grouped_backend=grouped)
        found[f"dense, {grouped}"] = (nnx.graphdef(module), state, None)
    for backend, s in itertools.product(backends, clusters):
        sparsity = Sparsity(m=4 * sizes.experts * s, v=sizes.v, backend=backend)
        if s == 1:
            graph, own = nnx.graphdef(_module(sizes, sparsity)), state
        else:
            assert x is not None
            graph, own = nnx.split(clustered(sizes, state, sparsity, x))
        packed = jax.jit(lambda s, graph=graph: nnx.merge(graph, s).pack())(own)
        found[sparse_name(backend, s)] = (graph, own, packed)
    active = sizes.hidden // sizes.experts * sizes.experts_per_token
    single = RoutedFFN(sizes.width, active, rngs=nnx.Rngs(params=0))
    found["one network"] = (*nnx.split(single), None)
    return found


def run(
    sizes: Sizes,
    backends: tuple[registry.Backend, ...],
    sampling: Sampling,
    clusters: tuple[int, ...] = CLUSTERS,
) -> dict[str, Any]:
    """Measures every contender; what the result file holds."""
    failures = Failures()
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.normal(keys[0], (sizes.tokens, sizes.width))
    x = (x / jnp.sqrt(jnp.mean(x * x, axis=1, keepdims=True))).astype(jnp.bfloat16)
    dy = jax.random.normal(keys[1], x.shape, jnp.bfloat16) * 1e-3
    state = evened(sizes, x)
    rows: list[dict[str, Any]] = []
    times: dict[tuple[str, str], Samples] = {}
    built, notes = {}, {}
    for name, what in _each(sizes, state, backends, x, (1, *clusters)):
        found, note = failures.attempt(name, what)
        if note is None:
            built[name] = found
        else:
            notes[name] = note
    for passes in PASSES:
        calls, outputs = {}, {}
        for name, (graph, own, packed) in built.items():
            arguments = (own, packed, x, dy)
            build = functools.partial(_compile, graph, passes, arguments)
            call, note = failures.attempt(f"{name}, {passes}", build)
            if note is None:
                outputs[name], note = failures.attempt(
                    f"{name}, {passes}", functools.partial(call, *arguments)
                )
            if note is not None:
                notes[f"{name}, {passes}"] = note
                continue
            calls[name] = jax_timed(call, *arguments)
        _compare(outputs, failures, passes)
        del outputs
        for name, samples in interleaved(calls, sampling).items():
            times[name, passes] = samples
            factor = 1 if passes == PASSES[0] else 3
            rows.append(
                {"contender": name, "passes": passes, **samples.as_row()}
                | {"effective_tflops": factor * sizes.flops / samples.median / 1e12}
            )
    return {
        "benchmark": "moe",
        **environment(),
        "sizes": dataclasses.asdict(sizes),
        "rows": rows,
        "speedup": _speedups(times),
        "packing_ms": _packing(built, sampling),
        "notes": notes,
        "failures": failures,
    }


def _each(
    sizes: Sizes,
    state: nnx.State,
    backends: tuple[registry.Backend, ...],
    x: Array,
    clusters: tuple[int, ...],
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """One contender at a time, so that one that cannot be built does not end the run."""
    for backend, s in itertools.product(backends, clusters):
        yield (
            sparse_name(backend, s),
            functools.partial(_one, sizes, state, backend, x, s),
        )
    for name, found in candidates(sizes, state, ()).items():
        yield name, functools.partial(lambda found: found, found)


def _one(sizes: Sizes, state: nnx.State, backend: registry.Backend, x: Array, clusters: int) -> Any:
    found = candidates(sizes, state, (backend,), x, (clusters,))
    return found[sparse_name(backend, clusters)]


def _compare(outputs: dict[str, Any], failures: Failures, passes: str) -> None:
    """Dense contenders with one another, sparse ones with those of as many clusters."""
    kinds = dict.fromkeys(name.partition(",")[0] for name in outputs)
    for kind in kinds:
        mine = {name: out for name, out in outputs.items() if name.partition(",")[0] == kind}
        if len(mine) < 2:
            continue
        first, *others = mine
        for other in others:
            for a, b in zip(*(jax.tree.leaves(mine[n]) for n in (first, other)), strict=True):
                a, b = a.astype(jnp.float32), b.astype(jnp.float32)
                error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a))
                if not error <= TOLERANCE:
                    failures.append(f"{other} against {first}, {passes}: {error:.1e}")


def _packing(built: dict[str, Any], sampling: Sampling) -> dict[str, float]:
    calls = {}
    for name, (graph, state, packed) in built.items():
        if packed is not None:
            pack = jax.jit(lambda s, graph=graph: nnx.merge(graph, s).pack())
            calls[name] = jax_timed(pack.lower(state).compile(), state)
    return {n: 1e3 * s.median for n, s in interleaved(calls, sampling).items()} if calls else {}


def _speedups(times: dict[tuple[str, str], Samples]) -> dict[str, dict[str, float]]:
    """Of every sparse contender over every other one."""
    found: dict[str, dict[str, float]] = {}
    for (name, passes), taken in times.items():
        if name.startswith("sparse"):
            found[f"{name}, {passes}"] = {
                rival: other.median / taken.median
                for (rival, p), other in times.items()
                if p == passes and rival != name
            }
    return found


def table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints times and speed-ups."""
    s = result["sizes"]
    view = Table(
        title=f"{s['experts']} experts, top-{s['experts_per_token']}, D {s['width']:,}, "
        f"H {s['hidden']:,}, {s['tokens']:,} tokens on {result['device']['kind']}",
        title_justify="left",
    )
    for heading in ("contender", *PASSES):
        view.add_column(heading)
    by = {(r["contender"], r["passes"]): r for r in result["rows"]}
    for name in dict.fromkeys(r["contender"] for r in result["rows"]):
        cells = [by.get((name, p)) for p in PASSES]
        view.add_row(name, *("-" if c is None else f"{c['ms']:.3f} ms" for c in cells))
    console = console or Console(width=140)
    console.print(view)
    for name, over in result["speedup"].items():
        console.print(f"{name}: " + ", ".join(f"{v:.2f}x of {k}" for k, v in over.items()))


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_parser("moe", "Times mixtures of dense and of sparse experts.", steps=1)
    parser.add_argument(
        "--clusters",
        nargs="*",
        type=int,
        default=CLUSTERS,
        help="of an expert's neurons, a token meeting one; a row for each number, default 2 and 4",
    )
    options = parser.parse_args(arguments)
    backends, sampling = contenders(parser, options)
    sizes, clusters = SMOKE if options.smoke else Sizes(), tuple(options.clusters)
    for s in clusters:
        m = 4 * sizes.experts * s
        try:
            Sparsity(m=m).validate(width=sizes.width, hidden=sizes.hidden)
            Sparsity(m=m).validate_experts(hidden=sizes.hidden, num_experts=sizes.experts)
        except ValueError as error:
            parser.error(f"--clusters {s}: {error}")
        if s < 2:
            parser.error(f"--clusters {s}: whole experts are measured anyway, give 2 or more")
    result = run(sizes, backends, sampling, clusters)
    result["smoke"] = options.smoke
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    table(result)
    if result["failures"]:
        sys.exit("\n".join(["failed:", *result["failures"]]))


if __name__ == "__main__":
    main()
