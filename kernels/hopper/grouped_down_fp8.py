"""8-bit 2:4 activations times the weights of each block's expert: `kernels.hopper.grouped_down`.

The weights come as columns, (E, D, h), because 8-bit operands must have the contracted axis
contiguous; scales of tokens are applied to the accumulators.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels import reference_grouped_fp8 as reference
from kernels.hopper import grouped_common as common
from kernels.hopper.grouped_down import launch, tile


def down24_fp8(
    y_values: jax.Array,
    y_metadata: jax.Array,
    columns: jax.Array,
    scale: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    permutation: jax.Array | None = None,
    tokens: int | None = None,
    config: common.GroupedConfig | None = None,
) -> jax.Array:
    """`kernels.reference_grouped_fp8.down24_fp8`.

    Without `permutation`, unused rows are zero. Raises ValueError for shapes that do not fit and
    NotImplementedError where `check_down24_fp8` does.
    """
    arguments = (y_values, y_metadata, columns, scale, offsets, block_expert)
    options = {"permutation": permutation, "tokens": tokens}
    check_down24_fp8(*arguments, **options, config=config)  # type: ignore[arg-type]
    config = config or common.GroupedConfig()
    _, v = reference.down_dims(*arguments, permutation, tokens)
    experts, width, live = columns.shape
    return launch(
        tile(y_values.dtype, config, columns.dtype),
        config,
        (y_values, y_metadata, columns.reshape(experts * width, live)),
        scale,
        (offsets, block_expert),
        v=v,
        width=width,
        permutation=permutation,
        tokens=tokens,
        out_dtype=jnp.dtype(jnp.bfloat16),
        name="down24_fp8_hopper",
    )


def check_down24_fp8(
    y_values: jax.Array,
    y_metadata: jax.Array,
    columns: jax.Array,
    scale: jax.Array,
    offsets: jax.Array,
    block_expert: jax.Array,
    *,
    permutation: jax.Array | None = None,
    tokens: int | None = None,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    arguments = (y_values, y_metadata, columns, scale, offsets, block_expert)
    _, v = reference.down_dims(*arguments, permutation, tokens)
    _, width, live = columns.shape
    common.check_shapes_fp8(v, live, width)
    tile(y_values.dtype, config or common.GroupedConfig(), columns.dtype)
