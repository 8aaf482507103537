"""RMSNorm and its backward pass, each one pass over memory (Pallas Triton)."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
from jax import lax

from kernels.reference_norm import inverse_gain, require_norm, require_norm_backward
from kernels.triton import device

# A row is held in registers, which the threads of a program would run out of.
LARGEST_WIDTH = 8192


@dataclasses.dataclass(frozen=True)
class RmsNormConfig:
    """Tiling of both passes.

    Attributes:
      programs: at most so many, each with consecutive rows. Backward, each writes a row of partial
        sums.
      elements: of a row for each thread, a power of two; fewer in rows too short for a warp.
    """

    programs: int
    elements: int = 8

    def __post_init__(self):
        if self.programs < 1 or self.elements < 1 or self.elements & (self.elements - 1):
            raise ValueError(f"{self}: programs must be positive, elements a power of two")

    def warps(self, width: int) -> int:
        """Warps of a program."""
        return min(max(pl.next_power_of_2(width) // (32 * self.elements), 1), 32)


# As many as an H100 can have at the same time with rows of 2,048: 8 and 4 on a multiprocessor.
_FORWARD = RmsNormConfig(programs=1024)
_BACKWARD = RmsNormConfig(programs=512)


def _check(op: str, x) -> None:
    device.require_capability(op, 8.0)
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise NotImplementedError(f"triton {op} takes float32 or bfloat16, not {x.dtype=}")
    if x.shape[-1] > LARGEST_WIDTH:
        raise NotImplementedError(
            f"triton {op} takes rows of up to {LARGEST_WIDTH}, not {x.shape=}"
        )
    if x.size >= 2**31:
        raise NotImplementedError(f"triton {op} counts in 32 bits, not {x.shape=}")


def check_rms_norm(x, scale, *, eps: float, config: RmsNormConfig | None = None) -> None:
    """Raises NotImplementedError where `rms_norm` does not serve this device, shape or dtype."""
    del scale, eps, config
    _check("rms_norm", x)


def check_rms_norm_backward(
    y, rstd, scale, g, passed=None, *, config: RmsNormConfig | None = None
) -> None:
    """Raises NotImplementedError where `rms_norm_backward` does not serve this device, shape or
    dtype."""
    del rstd, scale, g, passed, config
    _check("rms_norm_backward", y)


def rms_norm(
    x: jax.Array,
    scale: jax.Array,
    *,
    eps: float,
    config: RmsNormConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.reference_norm.rms_norm`.

    Args:
      x, scale, eps: see there.
      config: tiling; None takes the default.
      interpret: run in Pallas's interpreter.

    Raises:
      ValueError: on malformed arguments.
      NotImplementedError: where `check_rms_norm` does.
    """
    require_norm(x, scale)
    if not interpret:
        check_rms_norm(x, scale, eps=eps)
    return _forward(x, scale, eps=eps, config=config or _FORWARD, interpret=interpret)


def rms_norm_backward(
    y: jax.Array,
    rstd: jax.Array,
    scale: jax.Array,
    g: jax.Array,
    passed: jax.Array | None = None,
    *,
    config: RmsNormConfig | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """As `kernels.reference_norm.rms_norm_backward`. Sums are always taken in the same order: equal
    calls give equal bits.

    Args:
      y, rstd, scale, g, passed: see there.
      config: tiling; None takes the default.
      interpret: run in Pallas's interpreter.

    Raises:
      ValueError: on malformed arguments.
      NotImplementedError: where `check_rms_norm_backward` does.
    """
    require_norm_backward(y, rstd, scale, g, passed)
    if not interpret:
        check_rms_norm_backward(y, rstd, scale, g, passed)
    return _backward(y, rstd, scale, g, passed, config=config or _BACKWARD, interpret=interpret)


class _Rows:
    """Whole rows of width D in a block of a power of two."""

    def __init__(self, width: int):
        block = pl.next_power_of_2(width)
        self.shape = (block,)
        self.col = lax.broadcasted_iota(jnp.int32, self.shape, 0)
        self.inside = None if block == width else self.col < width

    def load(self, ref, *row, other: float = 0.0) -> jax.Array:
        """Of an array whose last axis is D, as float32; `other` past its end."""
        fill = None if self.inside is None else other
        value = plt.load(ref.at[(*row, self.col)], mask=self.inside, other=fill)
        return value.astype(jnp.float32)

    def store(self, ref, row, value) -> None:
        plt.store(ref.at[row, self.col], value.astype(ref.dtype), mask=self.inside)


def _share(rows: int, config: RmsNormConfig) -> tuple[int, int]:
    """Rows of a program, and programs."""
    share = math.ceil(rows / config.programs)
    return share, math.ceil(rows / share)


def _bounds(share: int, rows: int):
    first = pl.program_id(0) * share
    return first, jnp.minimum(first + share, rows)


@functools.partial(jax.jit, static_argnames=("eps", "config", "interpret"))
def _forward(x, scale, *, eps, config, interpret):
    rows, width = x.shape
    share, programs = _share(rows, config)

    def kernel(x_ref, scale_ref, y_ref, rstd_ref):
        a = _Rows(width)
        gain = a.load(scale_ref)

        def body(row, carry):
            value = a.load(x_ref, row)
            rstd = lax.rsqrt(jnp.sum(value * value) / width + eps)
            a.store(y_ref, row, value * rstd * gain)
            plt.store(rstd_ref.at[row], rstd)
            return carry

        first, last = _bounds(share, rows)
        lax.fori_loop(first, last, body, jnp.int32(0))

    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=(
            jax.ShapeDtypeStruct((rows, width), x.dtype),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=config.warps(width), num_stages=1),
        interpret=interpret,
        name="rms_norm",
    )(x, scale)


@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def _backward(y, rstd, scale, g, passed, *, config, interpret):
    rows, width = y.shape
    share, programs = _share(rows, config)

    def kernel(y_ref, rstd_ref, scale_ref, g_ref, *rest):
        *passed_ref, dx_ref, partial_ref = rest
        a = _Rows(width)
        gain = a.load(scale_ref, other=1.0)
        inverse = inverse_gain(gain)

        def body(row, total):
            value, h = a.load(y_ref, row), a.load(g_ref, row)
            added = [a.load(ref, row) for ref in passed_ref]
            product = h * value
            mean = jnp.sum(product) / width
            dx = plt.load(rstd_ref.at[row]) * (h * gain - value * inverse * mean)
            for other in added:
                dx += other
            a.store(dx_ref, row, dx)
            return total + product

        first, last = _bounds(share, rows)
        total = lax.fori_loop(first, last, body, jnp.zeros(a.shape, jnp.float32))
        a.store(partial_ref, pl.program_id(0), total * inverse)

    return pl.pallas_call(
        kernel,
        grid=(programs,),
        out_shape=(
            jax.ShapeDtypeStruct((rows, width), y.dtype),
            jax.ShapeDtypeStruct((programs, width), jnp.float32),
        ),
        compiler_params=plt.CompilerParams(num_warps=config.warps(width), num_stages=1),
        interpret=interpret,
        name="rms_norm_backward",
    )(y, rstd, scale, g, *([] if passed is None else [passed]))
