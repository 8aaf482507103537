"""2:4-sparse times dense products on sparse tensor cores, through Pallas Triton."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.triton as plt
import jax.numpy as jnp

from kernels.triton import device, mainloop, output, shared_memory
from kernels.tuning import tables


@dataclasses.dataclass(frozen=True)
class Spmm24Config:
    """Tiling of `spmm24`.

    Attributes:
      warps_m, warps_n: warps of a program along m and n.
      frags_m: 16-row fragments of a warp's tile.
      frags_n: 8-column fragments of a warp's tile.
      block_k: K step of a shared-memory stage, 32 or 64.
      stages: shared-memory stages, at least 3.
      group_m: programs that run near each other in time share this many tiles along m, so that
        their operands stay in L2.
    """

    warps_m: int = 4
    warps_n: int = 2
    frags_m: int = 4
    frags_n: int = 8
    block_k: int = 64
    stages: int = 5
    group_m: int = 16

    @property
    def tile(self) -> mainloop.Tile:
        return mainloop.Tile(
            self.warps_m, self.warps_n, self.frags_m, self.frags_n, self.block_k, self.stages
        )


def _shape(values, b, b_layout: str) -> tuple[int, int, int]:
    n = b.shape[0] if b_layout == "nk" else b.shape[1]
    return values.shape[0], n, 2 * values.shape[1]


def _check_arguments(values, metadata, b, *, b_layout, out_layout, scale, epilogue) -> None:
    if b_layout not in ("nk", "kn"):
        raise ValueError(f"{b_layout=} must be 'nk' or 'kn'")
    if out_layout not in ("mn", "nm"):
        raise ValueError(f"{out_layout=} must be 'mn' or 'nm'")
    if epilogue not in (None, "relu2"):
        raise ValueError(f"{epilogue=} must be None or 'relu2'")
    if values.ndim != 2 or b.ndim != 2:
        raise ValueError(f"{values.shape=} and {b.shape=} must be two-dimensional")
    m, _, k = _shape(values, b, b_layout)
    if m == 0 or m % 64 or k == 0 or k % 64:
        raise ValueError(f"{m=} and {k=} of the sparse operand must be multiples of 64")
    if metadata.shape != (m // 64, k // 64, 128) or metadata.dtype != jnp.int32:
        raise ValueError(
            f"{metadata.shape=} {metadata.dtype=} must be int32 {(m // 64, k // 64, 128)}"
        )
    if b.shape[b_layout.index("k")] != k:
        raise ValueError(f"{b.shape=} with {b_layout=} must have {k=}")
    if b.dtype != values.dtype:
        raise ValueError(f"{values.dtype=} and {b.dtype=} must be equal")
    if scale is not None and jnp.shape(scale) != ():
        raise ValueError(f"scale must be a scalar, not of shape {jnp.shape(scale)}")


def check_config(config: Spmm24Config) -> None:
    """Raises ValueError unless the main loop can run with this tiling."""
    tile = config.tile
    if config.frags_m not in (2, 4, 8) or config.frags_n not in (4, 8, 16):
        raise ValueError(f"{config=}: frags_m must be 2, 4 or 8 and frags_n 4, 8 or 16")
    if config.block_k not in (32, 64) or config.stages < 3 or config.group_m < 1:
        raise ValueError(
            f"{config=}: block_k must be 32 or 64, stages at least 3, group_m positive"
        )
    if tile.block_m % 64 or tile.block_n % 64 or tile.threads & (tile.threads - 1):
        raise ValueError(
            f"{config=}: {tile.block_m=} and {tile.block_n=} must be multiples of 64, "
            f"{tile.threads=} a power of two"
        )
    if tile.a_bytes // 16 % tile.threads or tile.b_bytes // 16 % tile.threads:
        raise ValueError(f"{config=}: {tile.threads=} must divide the 16-byte chunks of both tiles")
    if tile.ring_bytes > shared_memory.LARGEST:
        raise ValueError(f"{config=}: {tile.ring_bytes=} must not exceed {shared_memory.LARGEST}")


def check_spmm24(
    values,
    metadata,
    b,
    *,
    b_layout: str,
    out_layout: str = "mn",
    scale=None,
    epilogue: str | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Spmm24Config | None = None,
) -> None:
    """Raises NotImplementedError where `spmm24` does not serve this device, shape or dtype."""
    del metadata, out_layout, scale, epilogue, config
    device.require_capability("spmm24", 8.0)
    if values.dtype not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"triton spmm24 takes bfloat16 or float16, not {values.dtype=}")
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise NotImplementedError(
            f"triton spmm24 writes bfloat16, float16 or float32, not {out_dtype=}"
        )
    n = _shape(values, b, b_layout)[1]
    if n == 0 or n % 8:
        raise NotImplementedError(f"triton spmm24 needs {n=} to be a multiple of 8")


def default_config(m: int, n: int, k: int, b_layout: str, out_layout: str) -> Spmm24Config:
    """The tuned tiling of a product on this device, else a heuristic."""
    facts = tables.key(m=m, n=n, k=k, b=b_layout, out=out_layout)
    tuned = tables.lookup("triton", "spmm24", device.kind(), facts)
    if tuned is not None:
        return Spmm24Config(**tuned)
    return heuristic_config(m, n)


def heuristic_config(m: int, n: int) -> Spmm24Config:
    """A tiling for so many rows and columns of results."""
    # Large tiles read least from L2; with few of them, small ones keep every multiprocessor busy.
    if math.ceil(m / 256) * math.ceil(n / 128) < 96:
        return Spmm24Config(warps_m=2, warps_n=2, frags_n=4, stages=4)
    return Spmm24Config(stages=3 if device.small_shared_memory() else 5)


@functools.partial(
    jax.jit,
    static_argnames=(
        "b_layout", "out_layout", "epilogue", "out_dtype", "config", "interpret"
    ),
)  # fmt: skip
def _spmm24(
    values, metadata, b, scale, *, b_layout, out_layout, epilogue, out_dtype, config, interpret
):
    m, n, _ = _shape(values, b, b_layout)
    tile = config.tile
    grid_m, grid_n = math.ceil(m / tile.block_m), math.ceil(n / tile.block_n)

    def kernel(values_ref, metadata_ref, b_ref, *rest):
        *scale_ref, out_ref = rest
        tile_m, tile_n = tile_order(pl.program_id(0), grid_m, grid_n, config.group_m)
        m0, n0 = tile_m * tile.block_m, tile_n * tile.block_n
        shared_memory.reserve(values_ref, out_ref, tile, emulate=interpret)
        acc = mainloop.accumulate(
            values_ref, metadata_ref, b_ref, m0, n0, tile, b_layout=b_layout, emulate=interpret
        )
        if scale_ref:
            factor = scale_ref[0][0]
            acc = [x * factor for x in acc]
        if epilogue == "relu2":
            # Not jnp.maximum: Triton's drops NaN.
            acc = [jnp.square(jnp.where(x <= 0.0, 0.0, x)) for x in acc]
        output.store_tile(
            out_ref,
            acc,
            output.place(m0, n0, tile),
            tile,
            out_layout=out_layout,
            limits=out_ref.shape,
            emulate=interpret,
        )

    return pl.pallas_call(
        kernel,
        # At least two programs, for `reserve`. One past the last tile stores nothing.
        grid=(max(2, grid_m * grid_n),),
        out_shape=jax.ShapeDtypeStruct((m, n) if out_layout == "mn" else (n, m), out_dtype),
        compiler_params=plt.CompilerParams(num_warps=config.warps_m * config.warps_n, num_stages=1),
        interpret=interpret,
        name="spmm24",
    )(values, metadata, b, *([] if scale is None else [jnp.asarray(scale, jnp.float32).reshape(1)]))


def tile_order(program, grid_m: int, grid_n: int, group_m: int):
    """A program's tile (m, n): groups of `group_m` rows of tiles, column by column in a group."""
    group_size = group_m * grid_n
    first = program // group_size * group_m
    rows = jnp.minimum(grid_m - first, group_m)
    within = program % group_size
    return first + within % rows, within // rows


def spmm24(
    values: jax.Array,
    metadata: jax.Array,
    b: jax.Array,
    *,
    b_layout: str,
    out_layout: str = "mn",
    scale: jax.Array | None = None,
    epilogue: str | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Spmm24Config | None = None,
    interpret: bool = False,
) -> jax.Array:
    """2:4-sparse times dense: `epilogue(scale * (A @ B))` on sparse tensor cores (mma.sp).

    Args:
      values: (m, k // 2) bf16 or fp16, the kept elements of A row by row; m and k multiples of 64.
      metadata: (m // 64, k // 64, 128) int32, positions of the kept elements in hardware order.
      b: (n, k) for b_layout "nk", (k, n) for "kn"; n a multiple of 8; dtype of `values`.
      b_layout: "nk" or "kn".
      out_layout: "mn" or "nm"; the latter writes the transpose.
      scale: None or a float32 scalar, applied to the float32 accumulator.
      epilogue: None, or "relu2" for max(x, 0)^2.
      out_dtype: bfloat16, float16 or float32.
      config: tiling; None takes the tuned table, else a heuristic.
      interpret: run in Pallas's interpreter, with jax.numpy in place of the inline PTX.

    Returns:
      (m, n) or (n, m) of `out_dtype`. Accumulation is float32, and runs repeat bit by bit.

    Raises:
      ValueError: on malformed arguments.
      NotImplementedError: where `check_spmm24` does.
    """
    _check_arguments(
        values,
        metadata,
        b,
        b_layout=b_layout,
        out_layout=out_layout,
        scale=scale,
        epilogue=epilogue,
    )
    if not interpret:
        check_spmm24(values, metadata, b, b_layout=b_layout, out_dtype=out_dtype)
    if config is None:
        config = default_config(*_shape(values, b, b_layout), b_layout, out_layout)
    check_config(config)
    return _spmm24(
        values,
        metadata,
        b,
        scale,
        b_layout=b_layout,
        out_layout=out_layout,
        epilogue=epilogue,
        out_dtype=jnp.dtype(out_dtype),
        config=config,
        interpret=interpret,
    )
