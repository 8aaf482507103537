"""Bandwidth of a copy on the device: what packing, one pass over memory, is compared with."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.failures import Failures
from benchmarks.timing import Samples, Sampling, Timed, interleaved, jax_timed
from train.hardware import chip

_BYTES = 1 << 29

LEAST_SHARE = 0.7
"""Of the memory's peak, below which a copy is no baseline: a sound one reaches 0.81 to 0.9."""


@dataclasses.dataclass(frozen=True)
class Copy:
    """What was measured.

    Attributes:
      bytes_per_second: read and written by the fastest form; None where that is no baseline.
      rows: every form with its samples, for the result file.
    """

    bytes_per_second: float | None
    rows: list[dict[str, Any]]


def refusal(bytes_per_second: float, device_kind: str) -> str | None:
    """Why a rate cannot be that of a copy on this device; None if it can, or if nobody knows.

    Args:
      bytes_per_second: read and written.
      device_kind: `jax.Device.device_kind`.
    """
    found = chip(device_kind)
    if found is None:
        return None
    share = bytes_per_second / found.bandwidth
    if LEAST_SHARE <= share <= 1:
        return None
    return (
        f"{bytes_per_second / 1e12:.2f} TB/s is {share:.0%} of the {found.bandwidth / 1e12:.2f} "
        f"TB/s of a {found.name}, must be {LEAST_SHARE:.0%} to 100%: no baseline"
    )


def forms(size: int) -> dict[str, Timed]:
    """Two ways to copy `size` bytes, compiled, with all operands on the device.

    Nothing but the launch is left to the host: a scalar sent with each execution, or a program
    looked up for it, would be timed too wherever the host is slow.
    """
    x = jax.random.normal(jax.random.key(3), (size // 4,))
    # A factor that the compiler does not know: the values must pass through the chip.
    factor = jnp.ones(())
    scale = jax.jit(lambda x, factor: x * factor).lower(x, factor).compile()
    copy = jax.jit(jnp.copy).lower(x).compile()
    jax.block_until_ready((x, factor))
    return {"multiply": jax_timed(scale, x, factor), "copy": jax_timed(copy, x)}


def judge(samples: dict[str, Samples], size: int, device_kind: str, failures: Failures) -> Copy:
    """The faster form as the baseline, unless no copy on this device can be that slow or fast."""
    moved = 2 * size
    rows = []
    for name, taken in samples.items():
        row = {"contender": name, "bytes": moved, **taken.as_row()}
        rows.append(row | {"bytes_per_second": moved / taken.median})
    rate = max(row["bytes_per_second"] for row in rows)
    reason = refusal(rate, device_kind)
    if reason is not None:
        failures.append(f"copy: {reason}")
        return Copy(None, [{**row, "note": reason} for row in rows])
    return Copy(rate, rows)


def measure_copy(sampling: Sampling, failures: Failures) -> Copy:
    """Copies far more than a cache holds, in turns; a rate that cannot be is a failure."""
    size = _BYTES if jax.default_backend() == "gpu" else 1 << 20
    samples = interleaved(forms(size), sampling)
    return judge(samples, size, jax.devices()[0].device_kind, failures)
