"""What a trained model has to say: `python -m train.generate --run runs/tiny --prompt "..."`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from train.generate.decoder import Decoder
from train.generate.sampling import Sampling
from train.trained import View, load_run
from train.version_check import require_jax


@dataclass(frozen=True)
class Arguments:
    """Continues a prompt with a trained model."""

    run: Path
    """The run's folder, such as runs/tiny."""
    prompt: str = ""
    """Text to continue; empty begins a document."""
    max_tokens: int = 100
    """Tokens to add at most; the end of a document comes earlier."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int = 0
    """Draw from this many most likely tokens only; 0 for all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens that together have this probability."""
    seed: int = 0
    """Seed of the draws: the same text every time."""
    samples: int = 1
    """Continuations to make, all different unless temperature is 0."""
    view: View = "dense"
    """Weights to use: dense, or the routed 2:4 network of the sparse phase."""
    step: int | None = None
    """Step of the checkpoint; the newest if not given."""


def generate(arguments: Arguments) -> None:
    """Prints the prompt and what follows it, as it is made if there is one sample.

    Raises:
      ValueError, OSError: one line naming what is wrong.
    """
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    if arguments.samples < 1:
        raise ValueError(f"samples={arguments.samples} must be at least 1")
    run = load_run(arguments.run, step=arguments.step)
    decoder = Decoder(run, view=arguments.view)
    prompts = [run.encode(arguments.prompt)] * arguments.samples
    chunks = decoder.stream(
        prompts, max_tokens=arguments.max_tokens, sampling=sampling, seed=arguments.seed
    )
    texts, shown = [""] * arguments.samples, 0
    for done, finished in chunks:
        texts = [arguments.prompt + run.tokenizer.decode(ids) for ids in done]
        # The last character of a chunk may lack bytes that are still to come.
        whole = texts[0] if finished[0] else texts[0].rstrip("\N{REPLACEMENT CHARACTER}")
        if arguments.samples == 1:
            print(whole[shown:], end="", flush=True)
            shown = max(shown, len(whole))
    if arguments.samples == 1:
        print()
        return
    for number, text in enumerate(texts, 1):
        print(f"--- {number}\n{text}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after a one-line error."""
    try:
        require_jax()
        generate(tyro.cli(Arguments, args=argv, prog="python -m train.generate"))
    except (ValueError, NotImplementedError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print()
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
