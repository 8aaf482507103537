"""What `auto` means on the device at hand; asked while tracing, never while configuring."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from train.config import ModelConfig


def compute_dtype(config: ModelConfig) -> jnp.dtype:
    """The type of activations and matrix products: bf16 where tensor cores are, float32 on a
    CPU."""
    if config.compute_dtype == "auto":
        return jnp.dtype("bfloat16" if jax.default_backend() == "gpu" else "float32")
    return jnp.dtype(config.compute_dtype)


def attention_implementation(
    requested: Literal["auto", "cudnn", "xla"], dtype: jnp.dtype, head_dim: int
) -> Literal["cudnn", "xla"]:
    """The attention kernel: what was asked for, or cuDNN where it runs (a GPU, 16 bits, d <=
    128).

    Raises:
      ValueError: cuDNN was asked for where there is no GPU, which JAX would end in a traceback.
    """
    device = jax.default_backend()
    if requested == "cudnn" and device != "gpu":
        raise ValueError(f"model.attention=cudnn needs a GPU; the default device is {device!r}")
    if requested != "auto":
        return requested
    cudnn = device == "gpu" and dtype.itemsize == 2 and head_dim % 8 == 0
    return "cudnn" if cudnn and head_dim <= 128 else "xla"


def norm_implementation(requested: Literal["auto", "kernel", "xla"]) -> Literal["kernel", "xla"]:
    """What computes norms: what was asked for, or the kernels where a GPU runs them."""
    if requested != "auto":
        return requested
    return "kernel" if jax.default_backend() == "gpu" else "xla"
