"""Weight gradients of each expert: a dense product over the expert's tokens.

Triton's own product: mma.sync on any chip since sm_80, and wgmma on Hopper, so a figure measured
there does not carry over to other chips. With the environment variable DISABLE_MMA_V3=1, Triton
takes mma.sync on Hopper as well.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp
from jax import lax

from kernels import reference_grouped
from kernels.combinations import power, with_expert
from kernels.triton import device
from kernels.triton import grouped_common as common
from kernels.triton.spmm24 import tile_order


@dataclasses.dataclass(frozen=True)
class GradientConfig:
    """Tiling of `weight_gradient`.

    Attributes:
      block_m, block_n: neurons and columns of a program, powers of two; a larger one than divides
        the matrix is halved until it does.
      block_k: tokens of a step, 16, 32 or 64.
      warps: of a program.
      stages: steps in flight.
      group_m: programs that run near each other in time share this many tiles along neurons.
    """

    block_m: int = 128
    block_n: int = 256
    block_k: int = 64
    warps: int = 8
    stages: int = 3
    group_m: int = 8


def _default_config() -> GradientConfig:
    if device.small_shared_memory():
        return GradientConfig(block_n=128)
    capability = device.compute_capability()
    # 48 KiB a stage; these have room for one more.
    return GradientConfig(stages=4 if capability in (9.0, 10.0, 10.3) else 3)


def _check_config(config: GradientConfig) -> None:
    sizes = (config.block_m, config.block_n, config.block_k, config.warps)
    if any(size < 1 or size & (size - 1) for size in sizes):
        raise ValueError(f"{config=}: blocks and warps must be powers of two")
    if config.block_k not in (16, 32, 64) or config.stages < 1 or config.group_m < 1:
        raise ValueError(
            f"{config=}: block_k must be 16, 32 or 64, stages and group_m positive"
        )  # fmt: skip


def _dividing(block: int, size: int) -> int:
    while size % block:
        block //= 2
    return block


def weight_gradient(
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    *,
    num_experts: int,
    shards: int = 1,
    config: GradientConfig | None = None,
    interpret: bool = False,
) -> jax.Array:
    """`kernels.reference_grouped.weight_gradient`.

    `offsets` must be multiples of 64, as V is. config: tiling; None takes the tuned table, else
    a heuristic. interpret: run in Pallas's interpreter.

    Raises ValueError for shapes that do not fit and NotImplementedError where
    `check_weight_gradient` does.
    """
    live, width = reference_grouped.gradient_dims(y, g, offsets, num_experts, shards=shards)
    if not interpret:
        check_weight_gradient(y, g, offsets, num_experts=num_experts, shards=shards, config=config)
    if config is None:
        found = common.tuned("weight_gradient", y.shape[0], num_experts, live, width)
        config = _default_config() if found is None else GradientConfig(**found)
    _check_config(config)
    return _weight_gradient(
        y, g, offsets, experts=num_experts, shards=shards, config=config, interpret=interpret
    )


def _weight_gradient(y, g, offsets, *, experts, shards, config, interpret):
    of_shard, width = y.shape[1] // shards, g.shape[1]
    block_m, block_n = _dividing(config.block_m, of_shard), _dividing(config.block_n, width)
    block_k = config.block_k
    tiles_m, tiles_n = of_shard // block_m, width // block_n
    runs = experts ** (shards - 1)

    def kernel(y_ref, g_ref, offsets_ref, out_ref):
        program, tiles = pl.program_id(0), jnp.int32(tiles_m * tiles_n)
        number = lax.div(program, tiles)
        tile_m, tile_n = tile_order(lax.rem(program, tiles), tiles_m, tiles_n, config.group_m)
        neuron = tile_m * block_m + jnp.arange(block_m)
        expert = number
        if shards > 1:
            shard, expert = (f(number, jnp.int32(experts)) for f in (lax.div, lax.rem))
            neuron += shard * of_shard
        column = tile_n * block_n + jnp.arange(block_n)

        def products(combination, acc):
            """Adds those of the rows of a combination."""
            first, end = offsets_ref[combination], offsets_ref[combination + 1]

            def step(i, acc):
                token = first + i * block_k + jnp.arange(block_k)
                a = plt.load(y_ref.at[token[:, None], neuron[None, :]])
                b = plt.load(g_ref.at[token[:, None], column[None, :]])
                return acc + plt.dot(a, b, trans_a=True)

            return lax.fori_loop(0, lax.div(end - first, jnp.int32(block_k)), step, acc)

        acc = jnp.zeros((block_m, block_n), jnp.float32)
        if shards == 1:
            acc = products(expert, acc)
        else:
            # The combinations with this expert: what the others are is number j.
            of_shard_power = power(shard, experts, shards)

            def run(j, acc):
                return products(with_expert(j, expert, of_shard_power, experts), acc)

            acc = lax.fori_loop(0, runs, run, acc)
        # Where the parameters have the neurons, interleaved with other experts'.
        row = (neuron >> 2) * (4 * experts) + 4 * expert + (neuron & 3)
        plt.store(out_ref.at[row[:, None], column[None, :]], acc)

    return pl.pallas_call(
        kernel,
        grid=(shards * experts * tiles_m * tiles_n,),
        out_shape=jax.ShapeDtypeStruct((experts * y.shape[1], width), jnp.float32),
        compiler_params=plt.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        interpret=interpret,
        name="weight_gradient",
    )(y, g, offsets)


def check_weight_gradient(
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    *,
    num_experts: int,
    shards: int = 1,
    config: GradientConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    del config
    live, width = reference_grouped.gradient_dims(y, g, offsets, num_experts, shards=shards)
    common.check("weight_gradient", 64, live // shards, width, y.dtype)
