"""How the programs of a run are compiled: with the options of XLA that a fast run wants."""

from __future__ import annotations

import functools
import os
import warnings

import jax
import jax.numpy as jnp

Options = dict[str, str | bool]

CUBLAS: Options = {"xla_gpu_enable_triton_gemm": False}
"""Dense products by cuBLAS and cuBLASLt. Left to choose, XLA takes its own Triton products of 8-bit
floats, which are half as fast, multiply small ones in 16 bits, and take half a minute to tune."""

AHEAD: Options = {"xla_gpu_memory_limit_slop_factor": "150"}
"""Collectives start ahead although XLA expects little room: it plans with 80% of a GPU's memory,
while a run takes nearly all of it (docs/scaling.md)."""

NO_GRAPHS: Options = {"xla_gpu_enable_command_buffer": ""}
"""No CUDA graphs on several GPUs: all steps that were measured on them ran without
(docs/scaling.md), and steps of hundreds of milliseconds have no launches to hide. The trainer runs
there with them too; which is faster has not been measured."""


def compile_program(
    lowered: jax.stages.Lowered, devices: int, more: Options | None = None
) -> jax.stages.Compiled:
    """Compiles a step, an evaluation, a clustering or a flip: whatever may hold a product.

    Args:
      lowered: the traced program.
      devices: of its mesh.
      more: options over those of `program_options`.
    """
    return lowered.compile(compiler_options=program_options(devices) | (more or {}))


def program_options(devices: int) -> Options:
    """What the trainer's programs are compiled with; nothing but on a GPU.

    An option that is named in XLA_FLAGS is left to those, one that this version of XLA does not
    know is left out, with a warning.

    Args:
      devices: GPUs of the mesh.
    """
    if jax.default_backend() != "gpu":
        return {}
    wanted = CUBLAS | (AHEAD | NO_GRAPHS if devices > 1 else {})
    named = os.environ.get("XLA_FLAGS", "")
    return {k: v for k, v in wanted.items() if f"--{k}" not in named and _known(k, v)}


@functools.cache
def _known(name: str, value: str | bool) -> bool:
    """Whether XLA takes the option; it refuses to compile with one that it does not know."""
    try:
        jax.jit(lambda x: x + 1).lower(jnp.zeros(1)).compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError as error:
        warnings.warn(f"compiling without {name}={value}: {error}", stacklevel=3)
        return False
    return True
