"""The arguments that every benchmark takes, and what follows from them."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

import jax

from benchmarks.timing import Sampling
from kernels import registry


def make_parser(name: str, description: str, *, steps: int) -> argparse.ArgumentParser:
    """A parser with the common arguments.

    Args:
      name: of the module in `benchmarks`.
      description: one line for --help.
      steps: default of the training before tensors are captured.
    """
    parser = make_bare_parser(name, description)
    parser.add_argument(
        "--backends", nargs="+", choices=registry.BACKENDS, help="default: by device"
    )
    parser.add_argument("--rounds", type=int, default=7, help="samples of each contender")
    parser.add_argument("--round-ms", type=float, default=30.0, help="time of a sample")
    parser.add_argument(
        "--settle-ms", type=float, default=60.0, help="time a contender runs before a sample"
    )
    parser.add_argument("--steps", type=int, default=steps, help="of the training before capture")
    return parser


def make_bare_parser(name: str, description: str, **options: Any) -> argparse.ArgumentParser:
    """A parser with --out, --plot and --smoke alone.

    Args:
      name: of the module in `benchmarks`.
      description: for --help.
      options: of `argparse.ArgumentParser`.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}", description=description, **options
    )
    parser.add_argument("--out", required=True, type=pathlib.Path, help="result file, .json")
    parser.add_argument("--plot", type=pathlib.Path, help="plot file; default: next to --out, .png")
    parser.add_argument(
        "--smoke", action="store_true", help="tiny shapes: does it run, not how fast"
    )
    return parser


def require_gpu(parser: argparse.ArgumentParser, options: argparse.Namespace) -> bool:
    """Whether there is a GPU.

    Raises:
      SystemExit: --out is no .json file, or there is no GPU and --smoke was not given.
    """
    if options.out.suffix != ".json":
        parser.error(f"--out {options.out} must end in .json")
    on_gpu = jax.default_backend() == "gpu"
    if not on_gpu and not options.smoke:
        parser.error(
            f"the default device is {jax.devices()[0].device_kind!r}, no GPU: only --smoke runs"
        )
    return on_gpu


def contenders(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[tuple[registry.Backend, ...], Sampling]:
    """Checks the common arguments; returns the backends to measure and how to sample them.

    Raises:
      SystemExit: an argument is not allowed, or there is no GPU and --smoke was not given.
    """
    if options.rounds < 1 or options.round_ms <= 0 or options.steps < 1:
        parser.error("--rounds, --round-ms and --steps must be positive")
    on_gpu = require_gpu(parser, options)
    backends = options.backends
    if backends is None:
        # The reference is no contender on a GPU: it is there to be right, as a dense product.
        backends = [b for b in registry.available_backends() if b != "reference" or not on_gpu]
    if options.smoke:
        return tuple(backends), Sampling(rounds=2, round_seconds=1e-3)
    return tuple(backends), Sampling(
        options.rounds, options.round_ms / 1e3, options.settle_ms / 1e3
    )
