"""What should move when a sparse layer's weights are gathered: masters, rows or packed weights.

    python -m benchmarks.gathers --config llama7b --out gathers.json         # on several GPUs
    python -m benchmarks.gathers --config tiny --out gathers.json --smoke    # anywhere, no claim

W1 and W2 of one feed-forward network are stored by columns on all devices (`--mesh.fsdp`). A
forward pass reads W1 packed 2:4 (values and metadata) and W2 as rows, a backward pass the other way
round. Contenders, each both passes:

    masters        float32 masters, thresholded and packed after the gather
    rows           thresholded bf16 rows, packed after the gather (`--sparsity.gather rows`)
    packed         values and metadata of the one matrix, rows of the other (the default)
    values alone   values and metadata of both; no rows, so the products could not run: the least
                   that is left for a kernel that restores rows

Each is timed by itself and beside matrix products that do not depend on it (a layer's attention
projections), in turns. `added` is what it adds to their time: communication that is hidden still
takes bandwidth and multiprocessors from them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import configs
from benchmarks.command_line import make_bare_parser, require_gpu
from benchmarks.environment import environment
from benchmarks.timing import Sampling, Timed, interleaved, jax_timed
from sparsejax.ops import routed_ffn_grouped
from sparsejax.spec import Sparsity
from train.config import Config, MeshConfig
from train.mesh import make_mesh
from train.runtime import keep_compiled, reserve_memory

Row = dict[str, Any]

BYTES = {"masters": 16.0, "rows": 8.0, "packed": 6.25, "values alone": 4.5}
"""Bytes a weight of both matrices that both passes gather, by what moves."""

COLUMNS = P(None, "fsdp")


@dataclasses.dataclass(frozen=True)
class Problem:
    """Sizes of one network on the mesh.

    Attributes:
      width, hidden: D and H.
      tokens: of a device, of the products beside.
      sparsity: what is sparse.
      kernels: backend that packs.
      dtype: of the products.
    """

    width: int
    hidden: int
    tokens: int
    sparsity: Sparsity
    kernels: Any
    dtype: Any


def _weights(problem: Problem, mesh: Mesh) -> dict[str, jax.Array]:
    """Everything that a contender may gather of both matrices, by name, where it is stored.

    Weights are Gaussian, packed on each device as `sparsejax.sharding.pack_ffn` does.
    """
    rng = np.random.default_rng(0)
    place = NamedSharding(mesh, COLUMNS)
    shape = problem.hidden, problem.width
    std = problem.width**-0.5
    found: dict[str, jax.Array] = {}
    for name in ("w1", "w2"):
        w = jax.device_put(rng.normal(scale=std, size=shape).astype(np.float32), place)
        pack = jax.shard_map(
            functools.partial(_pack, problem),
            mesh=mesh,
            in_specs=COLUMNS,
            out_specs=(COLUMNS, P(None, "fsdp", None), COLUMNS),
            check_vma=False,
        )
        values, metadata, rows = jax.jit(pack)(w)
        found |= {name: w, f"{name} values": values, f"{name} metadata": metadata}
        found[f"{name} rows"] = rows
    return found


def _pack(problem: Problem, w: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Values, metadata and rows (H, D) of a master, or of a part of its columns."""
    values, metadata, dense = routed_ffn_grouped.pack_weight(
        w, jnp.float32(1), problem.sparsity, dtype=problem.dtype, kernels=problem.kernels
    )
    assert metadata is not None  # weights are 2:4 here
    return values, metadata, dense.reshape(w.shape)


def _pack_rows(problem: Problem, rows: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    dense = rows.reshape(problem.sparsity.num_experts, -1, problem.width)
    return routed_ffn_grouped.pack_rows(dense, problem.sparsity, kernels=problem.kernels)


def _whole(part: jax.Array) -> jax.Array:
    return jax.lax.all_gather(part, "fsdp", axis=1, tiled=True)


def _passes(problem: Problem, what: str, own: dict[str, jax.Array]) -> list[Any]:
    """What both passes read, gathered: W1 packed and W2 as rows, then W2 packed and W1 as rows."""
    found: list[Any] = []
    for packed, rows in (("w1", "w2"), ("w2", "w1")):
        if what == "masters":
            found += [_pack(problem, _whole(own[packed]))[:2], _pack(problem, _whole(own[rows]))[2]]
        elif what == "rows":
            found.append(_pack_rows(problem, _whole(own[f"{packed} rows"])))
            found.append(_whole(own[f"{rows} rows"]))
        else:
            found += [_whole(own[f"{packed} values"]), _whole(own[f"{packed} metadata"])]
            if what == "packed":
                found.append(_whole(own[f"{rows} rows"]))
            else:
                found += [_whole(own[f"{rows} values"]), _whole(own[f"{rows} metadata"])]
        # A pass does not begin before the one before it has what it reads.
        own, found = jax.lax.optimization_barrier((own, found))
    return found


def _programs(
    problem: Problem, mesh: Mesh, weights: dict[str, jax.Array]
) -> dict[str, Callable[[], Any]]:
    """Compiled contenders by name; "products" are those that run beside the others."""
    specs = {name: P(None, "fsdp", *(None,) * (a.ndim - 2)) for name, a in weights.items()}
    rng = np.random.default_rng(1)
    tokens = problem.tokens * mesh.size

    def array(rows: int, place: P) -> jax.Array:
        numbers = rng.normal(size=(rows, problem.width)).astype(np.float32)
        return jax.device_put(jnp.asarray(numbers, problem.dtype), NamedSharding(mesh, place))

    x, projections = array(tokens, P("fsdp")), [array(problem.width, P()) for _ in range(4)]

    def products(x: jax.Array, projections: list[jax.Array]) -> list[jax.Array]:
        return [x @ w for w in projections]

    def compiled(function: Callable[..., Any], in_specs: Any, out_specs: Any, *arguments: Any):
        spread = jax.shard_map(
            function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )
        # A profile or a graph of launches is of no use here; both would change what is timed.
        options: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": ""} if _on_gpu() else {}
        program = jax.jit(spread).lower(*arguments).compile(compiler_options=options)
        return functools.partial(program, *arguments)

    found = {"products": compiled(products, (P("fsdp"), P()), P("fsdp"), x, projections)}
    for what in BYTES:
        gather = functools.partial(_passes, problem, what)
        both = lambda own, x, projections, gather=gather: (
            gather(own),
            products(x, projections),
        )
        found[what] = compiled(gather, (specs,), P(), weights)
        place = (specs, P("fsdp"), P())
        found[f"products and {what}"] = compiled(
            both, place, (P(), P("fsdp")), weights, x, projections
        )
    return found


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _timed(run: Callable[[], Any]) -> Timed:
    return jax_timed(run)


def measure(problem: Problem, mesh: Mesh, sampling: Sampling) -> list[Row]:
    """Times all contenders.

    Returns:
      Rows of what moves: bytes that a device sends, milliseconds alone and beside products, and
      what it adds to these.
    """
    with jax.set_mesh(mesh):
        programs = _programs(problem, mesh, _weights(problem, mesh))
    times = interleaved({name: _timed(run) for name, run in programs.items()}, sampling)
    products = 1e3 * times["products"].median
    devices = mesh.size
    rows = []
    for what, each in BYTES.items():
        alone = times[what].as_row()
        beside = times[f"products and {what}"].as_row()
        # In a ring each device sends all parts but one.
        sent = each * problem.width * problem.hidden * (devices - 1) / devices
        rows.append(
            {
                "moves": what,
                "bytes_sent": sent,
                "bytes_per_second": 1e3 * sent / alone["ms"],
                "alone": alone,
                "beside": beside,
                "products_ms": products,
                "added_ms": beside["ms"] - products,
            }
        )
    return rows


def problem_of(config: Config, kernels: Any, *, tokens: int, dtype: Any) -> Problem:
    """The feed-forward network of a configuration, its neurons all routed: shared ones move once
    (`sparsejax.stored_once`), so that the bytes are the same.

    Raises:
      ValueError: it is gated.
    """
    if config.model.gated:
        raise ValueError(f"--config {config.name}: gathers W1 and W2, and no gated network's Wg")
    hidden = config.model.ffn_hidden
    sparsity = dataclasses.replace(config.sparsity, shared_every=0)
    return Problem(config.model.width, hidden, tokens, sparsity, kernels, dtype)


def _table(result: Row) -> None:
    sizes = f"D {result['width']:,}, H {result['hidden']:,}, {result['devices']} devices"
    note = ": a smoke test, its times say nothing about speed" if result["smoke"] else ""
    title = f"Gathering W1 and W2, both passes, {sizes}{note}"
    view = Table(title=title, title_justify="left")
    view.add_column("moves")
    for heading in ("MB sent", "ms alone", "GB/s", "ms beside products", "products ms", "added ms"):
        view.add_column(heading, justify="right")
    for row in result["rows"]:
        view.add_row(
            row["moves"],
            f"{row['bytes_sent'] / 1e6:,.0f}",
            f"{row['alone']['ms']:.3f}",
            f"{row['bytes_per_second'] / 1e9:.0f}",
            f"{row['beside']['ms']:.3f}",
            f"{row['products_ms']:.3f}",
            f"{row['added_ms']:.3f}",
        )
    Console(width=120).print(view)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = make_bare_parser(
        "gathers", __doc__ or "", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="llama7b", help="a module in configs/")
    parser.add_argument("--tokens", type=int, default=8192, help="of a device, of the products")
    parser.add_argument("--rounds", type=int, default=5, help="samples of each contender")
    parser.add_argument("--round-ms", type=float, default=30.0, help="time of a sample")
    options = parser.parse_args(sys.argv[1:] if arguments is None else arguments)
    reserve_memory()
    on_gpu = require_gpu(parser, options)
    keep_compiled()
    dtype = jnp.dtype("bfloat16" if on_gpu else "float32")
    try:
        config = configs.get(options.config)
        if options.rounds < 1 or options.round_ms <= 0 or options.tokens < 1:
            raise ValueError("--rounds, --round-ms and --tokens must be positive")
        if options.smoke:
            small = dataclasses.replace(config.model, width=64 * jax.device_count(), hidden=256)
            sparsity = dataclasses.replace(config.sparsity, m=16)
            config = dataclasses.replace(config, model=small, sparsity=sparsity)
        sizes = routed_ffn_grouped.Sizes(config.model.width, config.model.ffn_hidden, dtype)
        kernels: Any = "reference"
        if on_gpu:
            kernels = routed_ffn_grouped.choose(config.sparsity, sizes, gated=config.model.gated)
        if kernels is None:
            raise ValueError(f"--config {options.config}: no kernels serve it here")
        tokens = 64 if options.smoke else options.tokens
        problem = problem_of(config, kernels, tokens=tokens, dtype=dtype)
        mesh = make_mesh(MeshConfig(data=1, fsdp=jax.device_count()), jax.device_count())
    except ValueError as error:
        parser.error(str(error))
    sampling = Sampling(options.rounds, options.round_ms / 1e3)
    if options.smoke:
        sampling = Sampling(rounds=2, round_seconds=1e-3)
    result = {
        "benchmark": "gathers",
        "smoke": options.smoke,
        **environment(),
        "config": options.config,
        "devices": mesh.size,
        "width": problem.width,
        "hidden": problem.hidden,
        "m": config.sparsity.m,
        "tokens": problem.tokens,
        "kernels": kernels,
        "rows": measure(problem, mesh, sampling),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    _table(result)


if __name__ == "__main__":
    main()
