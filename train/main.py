"""The command line: `python -m train.main --config NAME`, typed overrides, `--dry-run`,
`--resume`."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from train.config import Config
from train.version_check import require_jax


@dataclass(frozen=True)
class Arguments(Config):
    """Trains a Llama through dense and sparse phases. Every field of the named configuration can
    be overridden."""

    config: str = "tiny"
    """Name of the configuration to start from: a module in configs/."""
    resume: bool = False
    """Continue the newest run of this name from its last good checkpoint."""
    dry_run: bool = False
    """Print parameters, FLOPs, memory, phases and kernels, and start nothing. Needs no GPU."""
    plot: Path | None = None
    """With --dry-run: write a picture of the components' share of FLOPs over model sizes to this
    PNG file."""


def parse(argv: list[str]) -> Arguments:
    """The command line as a configuration and what to do with it.

    Raises:
      ValueError: unknown configuration name, or a field out of range.
      SystemExit: help, or an argument that does not exist or has the wrong type (code 2).
    """
    name = Arguments.config
    for i, argument in enumerate(argv):
        if argument == "--config" and i + 1 < len(argv):
            name = argv[i + 1]
        elif argument.startswith("--config="):
            name = argument.removeprefix("--config=")
    # By name, not by import: configurations are users of this package.
    base = importlib.import_module("configs").get(name)
    fields = {f.name: getattr(base, f.name) for f in dataclasses.fields(base)}
    default = Arguments(**fields, config=name)
    return tyro.cli(Arguments, args=argv, default=default, prog="python -m train.main")


def config_of(arguments: Arguments) -> Config:
    """The run that a command line describes, without what is not the run's."""
    return Config(**{f.name: getattr(arguments, f.name) for f in dataclasses.fields(Config)})


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the process's exit code (2 for a refused configuration)."""
    console = Console()
    try:
        require_jax()
        arguments = parse(sys.argv[1:] if argv is None else argv)
        return run(config_of(arguments), arguments, console)
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(config: Config, arguments: Arguments, console: Console) -> int:
    """Does what the arguments ask for; returns the exit code."""
    if arguments.dry_run:
        from train.dry_run import dry_run

        dry_run(config, console=console, plot=arguments.plot)
        return 0
    if arguments.plot:
        raise ValueError(f"--plot {arguments.plot} goes with --dry-run")
    from train.checkpoint import CheckpointError
    from train.determinism import make_deterministic
    from train.distributed import initialize
    from train.loop import NonFiniteError, RescuedError, train
    from train.runtime import keep_compiled, reserve_memory

    if config.deterministic:
        make_deterministic(config.output)
    reserve_memory()
    initialize()
    keep_compiled(config.data.cache)
    try:
        train(config, resume=arguments.resume, console=console)
    except (NonFiniteError, RescuedError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
