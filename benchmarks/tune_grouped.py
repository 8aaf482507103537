"""Searches the tiles of the `triton` backend's grouped kernels and writes the tuned table.

    python -m benchmarks.tune_grouped [--write] [--models llama1b] [--blocks 16] [--only up24]

Operands are Gaussian, 16,384 tokens with V = 128, routed about evenly. What a candidate computes is
compared with the default's result before it is timed; candidates are timed in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.ffn_problem import Operands
from benchmarks.ffn_stages import Stages, by_token
from benchmarks.timing import Sampling, interleaved, jax_timed
from kernels import registry
from kernels.triton import grouped24, grouped_common
from kernels.triton.grouped24 import GradientConfig
from kernels.triton.spmm24 import Spmm24Config
from kernels.tuning import tables
from sparsejax.spec import Sparsity

TOKENS, V = 16_384, 128
SIZES = {"llama1b": (2048, 8192), "llama7b": (4096, 16_384)}
"""Width and neurons of each model."""
MAX_ERROR = 1e-3

SPARSE = [
    Spmm24Config(),
    *(Spmm24Config(group_m=group) for group in (4, 8, 32)),
    Spmm24Config(stages=4),
    Spmm24Config(block_k=32, stages=9),
    Spmm24Config(warps_m=2, warps_n=4, stages=4),
    Spmm24Config(warps_m=2, warps_n=4, stages=4, group_m=32),
    Spmm24Config(warps_m=2, warps_n=4, frags_m=8, frags_n=4),
    Spmm24Config(warps_m=2, warps_n=2, stages=4),
    Spmm24Config(warps_m=2, warps_n=2, stages=4, group_m=32),
]
DENSE = [
    *(GradientConfig(stages=stages) for stages in (3, 4)),
    *(GradientConfig(stages=4, group_m=group) for group in (4, 16)),
    GradientConfig(block_m=256, block_n=128, stages=4),
    GradientConfig(block_m=128, block_n=128, stages=4),
    GradientConfig(block_m=128, block_n=128, warps=4, stages=3),
    GradientConfig(block_k=32, stages=6),
]


def operands(width: int, hidden: int, num_experts: int) -> Operands:
    """Gaussian ones, weights of unit gain."""
    keys = jax.random.split(jax.random.key(0), 5)
    shapes = (
        (TOKENS, width),
        (TOKENS, width),
        (hidden, width),
        (hidden, width),
        (num_experts, width),
    )
    x, dy, w1, w2, centers = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    return Operands(
        x=x.astype(jnp.bfloat16),
        dy=dy.astype(jnp.bfloat16),
        w1=w1 * width**-0.5,
        w2=w2 * hidden**-0.5,
        betas=jnp.full((3,), 1.5),
        centers=centers,
        bias=jnp.zeros((num_experts,)),
    )


def calls(num_experts: int, arguments: dict[str, tuple]) -> dict[str, tuple[Callable, tuple]]:
    """Each kernel as a function of a configuration and its arguments, which come with it."""

    def gradient(config, *args):
        return grouped24.weight_gradient(*args, num_experts=num_experts, config=config)

    return {
        "up24": (lambda config, *a: grouped24.up24(*a, config=config), arguments["up"]),
        "down24": (
            lambda config, *a: by_token(grouped24.down24, *a, config=config),
            arguments["down"],
        ),
        "up24_backward": (
            lambda config, *a: grouped24.up24_backward(*a, config=config),
            arguments["up_backward"],
        ),
        "weight_gradient": (gradient, arguments["weight_gradient"]),
    }


def _error(got: Any, expected: Any) -> float:
    """The largest relative Frobenius error of the floating-point results."""
    errors = [
        float(jnp.linalg.norm((a - b).astype(jnp.float32)) / jnp.linalg.norm(b.astype(jnp.float32)))
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
        if jnp.issubdtype(b.dtype, jnp.floating)
    ]
    return float(np.max(errors))  # NaN if one is.


def tune(
    function: Callable, arguments: tuple, candidates: list, flops: float, sampling: Sampling
) -> Any:
    """The fastest correct configuration; prints all of them."""

    def build(config: Any) -> Any:
        try:
            return jax.jit(lambda *a: function(config, *a)).lower(*arguments).compile()
        except Exception as error:
            return error

    with ThreadPoolExecutor(8) as pool:
        built = dict(zip(candidates, pool.map(build, candidates), strict=True))
    expected, timed = None, {}
    for config, call in built.items():
        if isinstance(call, Exception):
            print(f"  does not compile: {config}: {str(call)[:200]}")
            continue
        got = call(*arguments)
        expected = got if expected is None else expected
        if not _error(got, expected) < MAX_ERROR:
            print(f"  WRONG: {config}")
            continue
        timed[config] = jax_timed(call, *arguments)
    samples = interleaved(timed, sampling)
    ranked = sorted(timed, key=lambda config: samples[config].median)
    for config in ranked:
        seconds = samples[config].median
        print(f"  {1e3 * seconds:.3f} ms, {flops / seconds / 1e12:.0f} TFLOP/s {_changed(config)}")
    return ranked[0]


def _changed(config: Any) -> dict[str, Any]:
    """The fields of a configuration that differ from their defaults."""
    default = dataclasses.asdict(type(config)())
    return {k: v for k, v in dataclasses.asdict(config).items() if v != default[k]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write the table of this device")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=["llama1b"])
    parser.add_argument("--blocks", nargs="+", type=int, default=[16], help="values of M")
    parser.add_argument("--only", default="", help="substring of the names of kernels to tune")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--round-seconds", type=float, default=0.01)
    args = parser.parse_args()
    refused = registry.refusal("triton", registry.target_capability())
    if refused is not None:
        parser.error(refused)
    sampling = Sampling(args.rounds, args.round_seconds)
    kind = jax.devices()[0].device_kind
    for name, m in ((name, m) for name in args.models for m in args.blocks):
        width, hidden = SIZES[name]
        sparsity = Sparsity(m=m, v=V, backend="triton")
        experts = sparsity.num_experts
        arguments = Stages(sparsity, "triton").arguments(operands(width, hidden, experts))
        live, rows = hidden // experts, arguments["up"][2].shape[0]
        flops = 2.0 * TOKENS * width * live
        for op, (function, own) in calls(experts, arguments).items():
            if args.only not in op:
                continue
            print(f"{name}, M={m}, {op}")
            candidates = DENSE if op == "weight_gradient" else SPARSE
            best = tune(function, own, candidates, flops, sampling)
            if args.write:
                key = grouped_common.facts(rows, experts, live, width)
                tables.save("triton", kind, op, {key: _changed(best)})
    if args.write:
        print(tables.path("triton", kind))


if __name__ == "__main__":
    main()
