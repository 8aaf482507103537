"""What a combination of experts says, for kernels: c = sum over s of e_s E^s, one expert a shard.

Scalars inside kernels, hence operations of `lax`; `kernels.reference_grouped` has the definition.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike


def power(shard: ArrayLike, experts: int, shards: int) -> Array:
    """E^shard, int32: what the expert of a shard counts for in a combination.

    Args:
      shard: 0..S-1, int32. experts: E. shards: S.
    """
    found = jnp.int32(1)
    for s in range(1, shards):
        found = jnp.where(shard == s, jnp.int32(experts**s), found)
    return found


def expert_number(combination: Array, shard: Array, experts: int, shards: int) -> Array:
    """Number, of all shards', of the expert that a combination has in a shard: s E + e_s, int32.

    Args:
      combination: 0..E^S-1, int32. shard: 0..S-1, int32. experts: E. shards: S.
    """
    if shards == 1:
        return combination
    digit = lax.rem(lax.div(combination, power(shard, experts, shards)), jnp.int32(experts))
    return shard * experts + digit


def with_expert(j: Array, expert: Array, power: Array, experts: int) -> Array:
    """The j-th combination that has an expert in a shard, int32.

    Args:
      j: 0..E^(S-1)-1, int32. expert: in the shard, 0..E-1, int32. power: E^shard. experts: E.
    """
    higher, lower = lax.div(j, power), lax.rem(j, power)
    return (higher * experts + expert) * power + lower
