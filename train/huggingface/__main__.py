"""`python -m train.huggingface export ...` and `... import ...`."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from train.huggingface.export import Dtype, Weights, export_run
from train.huggingface.imports import import_model
from train.run_folder import CONFIG_FILE
from train.trained import load_run
from train.version_check import require_jax


@dataclass(frozen=True)
class Export:
    """Writes a run's model as a folder that transformers loads."""

    run: Path
    """The run's folder, such as runs/tiny."""
    output: Path
    """Folder to write. It appears when it is complete."""
    weights: Weights = "dense"
    """The parameters, or the soft-thresholded 2:4 weights of the sparse phase, zeros included."""
    dtype: Dtype = "bfloat16"
    """Type of the tensors."""
    step: int | None = None
    """Step of the checkpoint; the newest if not given."""
    shard_bytes: int = 5_000_000_000
    """Most bytes of tensors in one file."""


@dataclass(frozen=True)
class Import:
    """Reads a folder of transformers (Llama or Arcee, safetensors) into a new run."""

    model: Path
    """Folder with config.json, *.safetensors and tokenizer.json."""
    output: Path
    """The new run's folder, such as runs/llama."""
    tokenizer: str | None = None
    """Another tokenizer.json, or "bytes" for the built-in one."""


def flags(folder: Path) -> list[str]:
    """Arguments with which the trainer starts from an imported run: its model, its tokenizer."""
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    names = ("width", "num_layers", "num_heads", "num_kv_heads", "ffn", "hidden", "vocab_size")
    found = ["--init-from", str(folder)]
    for name in (*names, "rope_theta", "norm_eps"):
        found += [f"--model.{name.replace('_', '-')}", str(config["model"][name])]
    if config["data"]["tokenizer"] is not None:
        found += ["--data.tokenizer", config["data"]["tokenizer"]]
    if config["model"]["ffn"] == "swiglu":
        found += ["--schedule.sparse-fraction", "0"]  # it has no sparse phase
    return found


def run(arguments: Export | Import) -> None:
    """Does one command and says what came of it.

    Raises:
      ValueError, OSError: one line naming what is wrong.
    """
    if isinstance(arguments, Import):
        folder = import_model(arguments.model, arguments.output, tokenizer=arguments.tokenizer)
        print(f'{folder}: try python -m train.generate --run {folder} --prompt "..."')
        print(f"to train it on: python -m train.main {shlex.join(flags(folder))} --data.source ...")
        return
    import jax

    trained = load_run(arguments.run, step=arguments.step, device=jax.devices("cpu")[0])
    folder = export_run(
        trained,
        arguments.output,
        weights=arguments.weights,
        dtype=arguments.dtype,
        shard_bytes=arguments.shard_bytes,
    )
    print(f"{folder}: step {trained.step}, {arguments.weights} weights, {arguments.dtype}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after a one-line error."""
    try:
        require_jax()
        run(
            tyro.cli(
                Annotated[Export, tyro.conf.subcommand("export")]
                | Annotated[Import, tyro.conf.subcommand("import")],
                args=argv,
                prog="python -m train.huggingface",
                description="Models to and from the files that transformers reads.",
            )
        )
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
