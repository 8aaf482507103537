"""Says clearly when JAX is too old, instead of failing somewhere inside."""

from __future__ import annotations

import importlib.metadata
import re

OLDEST_JAX = (0, 10, 2)


def require_jax(version: str | None = None) -> None:
    """Refuses a JAX older than the oldest supported one.

    Args:
      version: what to judge; the installed version when None.

    Raises:
      ValueError: names the version found and the one needed.
    """
    version = importlib.metadata.version("jax") if version is None else version
    parts = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
    if parts < OLDEST_JAX:
        needed = ".".join(map(str, OLDEST_JAX))
        raise ValueError(
            f"JAX {version} is too old: sparsejax needs {needed} or newer (pip install -U jax)"
        )
