"""Bit-exact runs on a GPU: flags that must be set before the first device is used."""

from __future__ import annotations

import os

FLAGS = (
    # Scatter, reductions and cuDNN's attention backward in a fixed order, or an error if there is
    # none.
    "--xla_gpu_exclude_nondeterministic_ops=true",
    # Timing picks different matmul algorithms on different days, and they round differently.
    "--xla_gpu_autotune_level=0",
)


def make_deterministic() -> None:
    """Adds XLA's deterministic settings to XLA_FLAGS; the user's own flags come last and win."""
    os.environ["XLA_FLAGS"] = " ".join((*FLAGS, os.environ.get("XLA_FLAGS", "")))
