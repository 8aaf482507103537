"""Threshold-and-pack kernels against the chip's copy bandwidth."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import devices
from benchmarks.capture import CaptureConfig
from benchmarks.failures import Failures
from benchmarks.timing import Samples, Sampling, interleaved, jax_timed
from kernels import reference, reference_fp8, registry
from sparsejax import fp8


@dataclasses.dataclass(frozen=True)
class Packing:
    """One call of pack24 to time."""

    name: str
    rows: int
    cols: int
    dtype: str
    axis: int
    mode: reference.Mode
    out_dtype: str = "bfloat16"

    @property
    def in_8_bits(self) -> bool:
        """Whether values are scaled, with one factor a row, and rounded to 8 bits."""
        return fp8.is_fp8(self.out_dtype)

    @property
    def m(self) -> int:
        """Rows of the packed matrix."""
        return self.cols if self.axis == 0 else self.rows

    @property
    def bytes(self) -> int:
        """Moved by one call: the input read once, the packed matrix written once."""
        read = self.rows * self.cols * jnp.dtype(self.dtype).itemsize
        itemsize = jnp.dtype(self.out_dtype).itemsize
        return read + devices.packed_bytes(self.m, self.rows * self.cols // self.m, itemsize)

    @property
    def copies(self) -> int:
        """Inputs of one execution: enough work to hide its launch, and more than a cache holds."""
        return min(8, max(2, math.ceil(1e9 / self.bytes)))


def packings(model: str, capture: CaptureConfig, *, in_8_bits: bool = False) -> list[Packing]:
    """Weights once an optimiser step (float32), activations (bfloat16), along both axes."""
    d, h, t = capture.width, capture.hidden, capture.tokens
    found = [
        Packing(f"{model} W1", d, h, "float32", 0, "soft_threshold"),
        Packing(f"{model} W2", h, d, "float32", 1, "soft_threshold"),
        Packing(f"{model} Y2", t, h, "bfloat16", 1, "value"),
        Packing(f"{model} Y2 tokens", t, h, "bfloat16", 0, "magnitude"),
    ]
    if in_8_bits:
        # One of each input type and axis: a weight and the activations.
        found += [
            dataclasses.replace(p, name=f"{p.name} fp8", out_dtype=fp8.FORWARD.name)
            for p in (found[0], found[2])
        ]
    return found


def trace_packing(packing: Packing, backend: registry.Backend):
    """`copies` calls of the backend's pack24 in one function; takes a list and a scale.

    Raises:
      NotImplementedError: the backend does not serve this device or shape.
    """
    x = jax.ShapeDtypeStruct((packing.rows, packing.cols), packing.dtype)
    scale = jax.ShapeDtypeStruct((packing.m,) if packing.in_8_bits else (), jnp.float32)
    options = _options(packing)
    op = "pack24_fp8" if packing.in_8_bits else "pack24"
    _, function = registry.select(op, x, scale=scale, backend=backend, **options)
    # One jitted function, so that the calls share one lowering.
    pack_one = jax.jit(lambda x, scale: function(x, scale=scale, **options))

    def pack_all(inputs, scale):
        return [pack_one(x, scale) for x in inputs]

    return jax.jit(pack_all).trace([x] * packing.copies, scale)


def _options(packing: Packing) -> dict[str, Any]:
    return {"axis": packing.axis, "mode": packing.mode, "dtype": jnp.dtype(packing.out_dtype)}


def compile_packing(packing: Packing, backend: registry.Backend):
    """`trace_packing`, compiled."""
    return trace_packing(packing, backend).lower().compile()


def measure_packing(
    packing: Packing,
    compiled: dict[str, Any],
    refusals: dict[str, str],
    copy_bandwidth: float | None,
    sampling: Sampling,
    failures: Failures,
) -> list[dict[str, Any]]:
    """Rows of one packing: one for each backend. Without a copy to compare with, rates alone."""
    draw = jax.jit(lambda key: jax.random.normal(key, (packing.rows, packing.cols), packing.dtype))
    inputs = [draw(key) for key in jax.random.split(jax.random.key(2), packing.copies)]
    pack: Any = reference.pack24
    scale = jnp.float32(1.484)
    if packing.in_8_bits:
        pack = reference_fp8.pack24_fp8
        scale = 1.484 * jnp.exp2(jnp.arange(packing.m) % 8)
    expected = jax.jit(functools.partial(pack, **_options(packing)))(inputs[-1], scale=scale)
    calls = {}
    for backend, call in compiled.items():
        out, note = failures.attempt(
            f"{packing.name}, {backend}", functools.partial(call, inputs, scale)
        )
        if note is not None:
            refusals = {**refusals, backend: note}
            continue
        wrong = sum(int(jnp.sum(a != b)) for a, b in zip(out[-1], expected, strict=True))
        if wrong:
            failures.append(f"{packing.name}, {backend}: {wrong} words differ from the reference")
        del out
        calls[backend] = jax_timed(call, inputs, scale)
    common = dataclasses.asdict(packing)
    rows = [{**common, "contender": name, "note": note} for name, note in refusals.items()]
    if not calls:
        return rows
    samples = interleaved(calls, sampling)
    for name, taken in samples.items():
        one = Samples(tuple(s / packing.copies for s in taken.seconds))
        rate = packing.bytes / one.median
        row = {**common, "contender": name, **one.as_row()}
        row["bytes_per_second"] = rate
        row["share_of_copy"] = None if copy_bandwidth is None else rate / copy_bandwidth
        rows.append(row)
    return rows
