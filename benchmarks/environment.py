"""What a measurement was made on: device, driver and versions, for the result files."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy", "torch", "nvidia-cusparselt-cu13", "nvidia-cublas")

# What decides which instructions are compiled; see docs/performance.md.
_VARIABLES = ("XLA_FLAGS", "DISABLE_MMA_V3")


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide speed, where installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def device() -> dict[str, Any]:
    """The device that JAX uses by default, and its driver and power limit on an NVIDIA machine."""
    chip = jax.devices()[0]
    facts: dict[str, Any] = {"platform": chip.platform, "kind": chip.device_kind}
    if chip.platform == "gpu":
        facts["compute_capability"] = str(chip.compute_capability)
        query = _output(
            "nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"
        )
        if query is not None:
            driver, _, power = query.splitlines()[0].partition(", ")
            facts |= {"driver": driver, "power_limit": power}
    return facts


def environment() -> dict[str, Any]:
    """All of it, with the commit if the code runs from a clone ("-dirty": with changes to it)."""
    return {
        "device": device(),
        "versions": versions(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"),
    }
