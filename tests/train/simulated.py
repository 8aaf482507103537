"""Runs scripts on simulated CPU devices: their number is fixed when a process starts."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[2]

# As the tests themselves.
_PREPARE = "from tests import mlir_contexts; mlir_contexts.reuse()\n"
# Code that runs for milliseconds needs no optimiser.
_FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def environment(devices: int, **extra: str) -> dict[str, str]:
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(
            (
                os.environ.get("XLA_FLAGS", ""),
                f"--xla_force_host_platform_device_count={devices}",
                _FLAGS,
            )
        ),
        "PYTHONPATH": str(ROOT),
        **extra,
    }


def run_script(script: str, *args: object, devices: int) -> str:
    """Standard output of a script; fails with its errors if it does."""
    result = subprocess.run(
        [sys.executable, "-c", _PREPARE + textwrap.dedent(script), *map(str, args)],
        cwd=ROOT,
        env=environment(devices),
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout
