"""The GPUs that runs side by side are spread over, found without starting JAX."""

from __future__ import annotations

import os
import subprocess

VISIBLE = "CUDA_VISIBLE_DEVICES"


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name: its own entries where it is set, else the numbers of
    nvidia-smi; nothing where there is no GPU, or JAX is told to use something else.

    A process that has started a device cannot give it to another one: the parent of the runs asks
    here instead.
    """
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and not {"cuda", "gpu"} & set(platforms.split(",")):
        return []
    if VISIBLE in os.environ:
        return [name.strip() for name in os.environ[VISIBLE].split(",") if name.strip()]
    try:
        command = ("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return done.stdout.split()
