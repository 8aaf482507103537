"""The harness's own command line with our model registered.

python -m train.lm_eval --model_args run=runs/tiny --tasks hellaswag,piqa
"""

from __future__ import annotations

import sys


def main(argv: list[str] | None = None) -> int:
    """Runs `lm_eval` with these arguments, and `--model sparsejax` unless they name a model.

    Returns:
      The exit code: 0, or 2 after a one-line error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        # The harness knows models that were imported, or (after 0.4.13) that an installed package
        # offers, which the trainer is not: so the process that runs it must have imported ours.
        from lm_eval.__main__ import cli_evaluate

        import train.lm_eval.model  # noqa: F401
    except ImportError as error:
        print(f'error: {error}; pip install -e ".[eval]"', file=sys.stderr)
        return 2
    asks = not arguments or arguments[0] in ("ls", "validate", "-h", "--help")
    if not asks and not any(a in ("-M", "--model") or a.startswith("--model=") for a in arguments):
        start = 1 if arguments[0] == "run" else 0
        arguments[start:start] = ["--model", "sparsejax"]
    sys.argv = ["lm_eval", *arguments]
    try:
        cli_evaluate()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
