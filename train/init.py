"""Initialisation of the linear layers."""

from collections.abc import Callable

import jax


def linear_init(scale: float) -> Callable[..., jax.Array]:
    """Truncated normal (at two standard deviations) of standard deviation scale / sqrt(fan_in);
    (fan_in, fan_out)."""
    return jax.nn.initializers.variance_scaling(scale**2, "fan_in", "truncated_normal")
