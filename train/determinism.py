"""Bit-exact runs on a GPU: settings that must be made before the first device is used."""

from __future__ import annotations

import os
from pathlib import Path

AUTOTUNE_FOLDER = ".autotune"


def make_deterministic(output: str | os.PathLike[str]) -> None:
    """Adds XLA's deterministic settings to XLA_FLAGS; the user's own flags come last and win.

    Scatters, reductions and cuDNN's attention backward run in a fixed order (or fail to compile),
    and the algorithms that autotuning chose are kept in output/.autotune, because timing chooses
    differently on another day and algorithms round differently.

    Args:
      output: the folder of the runs' folders.

    Raises:
      OSError: if the folder for autotuning results cannot be made.
    """
    folder = Path(output).absolute() / AUTOTUNE_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    flags = (
        "--xla_gpu_exclude_nondeterministic_ops=true",
        f"--xla_gpu_per_fusion_autotune_cache_dir={folder}",
    )
    os.environ["XLA_FLAGS"] = " ".join((*flags, os.environ.get("XLA_FLAGS", "")))
