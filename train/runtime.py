"""Settings of JAX that a fast run wants, made before the first device is used."""

from __future__ import annotations

import os

import jax

from train.data.cache import cache_folder

MEMORY_FRACTION = "0.94"
"""Of a GPU's memory, taken at the start; JAX's own default leaves a quarter unused."""


def reserve_memory(processes: int = 1) -> None:
    """Lets JAX take most of a GPU's memory. XLA_PYTHON_CLIENT_MEM_FRACTION, where set, wins.

    Args:
      processes: those that share the GPU, each with its own part; set before they start.
    """
    fraction = MEMORY_FRACTION
    if processes > 1:
        # Each has a context and kernels of its own beside what JAX reserves.
        fraction = f"{(float(MEMORY_FRACTION) - 0.01 * processes) / processes:.3f}"
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", fraction)


def keep_compiled(cache: str | None = None) -> None:
    """Keeps compiled programs, and what autotuning found, between runs on a GPU.

    JAX_COMPILATION_CACHE_DIR, where set, wins. Starts the default backend. On a CPU nothing is
    kept: programs compiled there are bound to the machine that made them.

    Args:
      cache: `data.cache` of the configuration; None for $XDG_CACHE_HOME/sparsejax.

    Raises:
      ValueError: the folder cannot be written.
    """
    chosen = getattr(jax.config, "jax_compilation_cache_dir")  # noqa: B009 - not known to mypy
    if chosen is None and jax.default_backend() == "gpu":
        folder = cache_folder(cache) / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
