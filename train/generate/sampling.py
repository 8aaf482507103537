"""Which token comes next, given the logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; hashable, so that a program can be compiled for it.

    First the temperature, then `top_k`, then `top_p` on what is left, as `transformers` does.

    Raises:
      ValueError: one line naming a value out of range.
    """

    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Draw from this many most likely tokens only; 0 for all."""
    top_p: float = 1.0
    """Draw from the fewest most likely tokens that together have this probability; 1 for all."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"temperature={self.temperature} must be finite and not negative")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k} must not be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be in (0, 1]")


GREEDY = Sampling()


def filtered_logits(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """(V,) float32 logits at the temperature (above 0), minus infinity where no token is drawn."""
    # Smaller ones draw the same, but for quotients that become infinite.
    logits = logits / max(sampling.temperature, 1e-30)
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest = jax.lax.top_k(logits, sampling.top_k)[0][-1]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    if sampling.top_p < 1:
        order = jnp.argsort(logits, descending=True)
        p = jax.nn.softmax(logits[order])
        # What comes before a token, without it: so the most likely one always stays.
        keep = jnp.cumsum(p) - p < sampling.top_p
        logits = jnp.where(jnp.zeros_like(keep).at[order].set(keep), logits, -jnp.inf)
    return logits


def sample(logits: jax.Array, sampling: Sampling, keys: jax.Array) -> jax.Array:
    """One token for each row.

    Args:
      logits: (B, V) float32.
      sampling: how.
      keys: (B,) random keys, one a row, so that a row does not depend on its neighbours.

    Returns:
      (B,) int32. Among equally likely tokens, greedy sampling takes the lowest id.
    """
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def draw(row: jax.Array, key: jax.Array) -> jax.Array:
        return jax.random.categorical(key, filtered_logits(row, sampling))

    return jax.vmap(draw)(logits, keys).astype(jnp.int32)
