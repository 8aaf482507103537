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
from jax import lax

from kernels.triton import device, mainloop, ptx
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


def _check_config(config: Spmm24Config) -> None:
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
    if tile.ring_bytes > _reserved_bytes(*_RESERVATIONS[-1]):
        raise ValueError(
            f"{config=}: {tile.ring_bytes=} must not exceed {_reserved_bytes(*_RESERVATIONS[-1])}"
        )


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
    if jnp.dtype(out_dtype) not in (jnp.bfloat16, jnp.float16):
        raise NotImplementedError(f"triton spmm24 writes bfloat16 or float16, not {out_dtype=}")
    n = _shape(values, b, b_layout)[1]
    if n == 0 or n % 8:
        raise NotImplementedError(f"triton spmm24 needs {n=} to be a multiple of 8")


def default_config(m: int, n: int, k: int, b_layout: str, out_layout: str) -> Spmm24Config:
    """The tuned tiling of a product on this device, else a heuristic."""
    facts = tables.key(m=m, n=n, k=k, b=b_layout, out=out_layout)
    tuned = tables.lookup("triton", "spmm24", device.kind(), facts)
    if tuned is not None:
        return Spmm24Config(**tuned)
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
        tile_m, tile_n = _grouped(pl.program_id(0), grid_m, grid_n, config.group_m)
        m0, n0 = tile_m * tile.block_m, tile_n * tile.block_n
        if tile.dynamic_bytes and not interpret:
            _reserve_dynamic_shared(values_ref, out_ref, tile.dynamic_bytes)
        acc = mainloop.accumulate(
            values_ref, metadata_ref, b_ref, m0, n0, tile, b_layout=b_layout, emulate=interpret
        )
        if scale_ref:
            factor = scale_ref[0][0]
            acc = [x * factor for x in acc]
        if epilogue == "relu2":
            # Not jnp.maximum: Triton's drops NaN.
            acc = [jnp.square(jnp.where(x <= 0.0, 0.0, x)) for x in acc]
        _store_tile(out_ref, acc, m0, n0, tile, out_layout, (m, n), emulate=interpret)

    return pl.pallas_call(
        kernel,
        # At least two programs: the id of a lone one is the constant 0, and the branch that
        # reserves shared memory would be gone too early. One past the last tile stores nothing.
        grid=(max(2, grid_m * grid_n),),
        out_shape=jax.ShapeDtypeStruct((m, n) if out_layout == "mn" else (n, m), out_dtype),
        compiler_params=plt.CompilerParams(num_warps=config.warps_m * config.warps_n, num_stages=1),
        interpret=interpret,
        name="spmm24",
    )(values, metadata, b, *([] if scale is None else [jnp.asarray(scale, jnp.float32).reshape(1)]))


def _reserve_dynamic_shared(values_ref, out_ref, size: int) -> None:
    """Makes the launch provide at least `size` bytes of dynamic shared memory.

    Pallas Triton has no parameter for it: Triton adds up what the operations it sees need, and a
    product of two matrices needs both of them in shared memory. This one is in a branch that is
    never taken, and it leaves no code behind: the compiler knows that program ids are not negative.
    """
    depth, width = next(shape for shape in _RESERVATIONS if _reserved_bytes(*shape) >= size)

    @pl.when(pl.program_id(0) < 0)
    def _never():
        def operand(rows: int, cols: int):
            row = lax.broadcasted_iota(jnp.int32, (rows, cols), 0)
            return plt.load(values_ref.at[row, lax.broadcasted_iota(jnp.int32, (rows, cols), 1)])

        product = plt.dot(operand(64, depth), operand(depth, width))
        out_ref[0, 0] = jnp.sum(product).astype(out_ref.dtype)


# Depth and width of products of 64 rows, by their bytes.
_RESERVATIONS = ((128, 64), (256, 64), (128, 256), (256, 128), (512, 64), (256, 256), (512, 128))


def _reserved_bytes(depth: int, width: int) -> int:
    return 2 * depth * (64 + width)


def _grouped(program, grid_m: int, grid_n: int, group_m: int):
    """Tile of a program: groups of `group_m` rows of tiles, column by column within a group."""
    group_size = group_m * grid_n
    first = program // group_size * group_m
    rows = jnp.minimum(grid_m - first, group_m)
    within = program % group_size
    return first + within % rows, within // rows


def _store_tile(out_ref, acc, m0, n0, tile: mainloop.Tile, out_layout, shape, *, emulate) -> None:
    m, n = shape
    fn = tile.frags_n
    thread = lax.broadcasted_iota(jnp.int32, (tile.threads,), 0)
    warp, q, t = thread // 32, thread % 32 // 4, thread % 4
    row0 = m0 + warp // tile.warps_n * (16 * tile.frags_m)
    col0 = n0 + warp % tile.warps_n * (8 * fn)
    # One word for each 8 x 8 tile: this thread's two elements, row q, columns 2 t and 2 t + 1.
    words = [
        [
            ptx.pack_pair(
                acc[4 * (i * fn + j) + 2 * half],
                acc[4 * (i * fn + j) + 2 * half + 1],
                out_ref.dtype,
                emulate=emulate,
            )
            for j in range(fn)
        ]
        for i in range(tile.frags_m)
        for half in range(2)
    ]
    major0, minor0, limits = row0, col0, (m, n)
    if out_layout == "nm":
        columns = [[row[j] for row in words] for j in range(fn)]
        words = [[ptx.transpose_tile(w, emulate=emulate) for w in column] for column in columns]
        major0, minor0, limits = col0, row0, (n, m)
    # Four neighbouring tiles at a time: then a thread holds a whole row of one of them, 16 bytes.
    for i, row in enumerate(words):
        for j in range(0, len(row), 4):
            vector = ptx.transpose_quad(row[j : j + 4], emulate=emulate)
            major = major0 + (8 * i + q)
            minor = minor0 + (8 * j + 8 * t)
            valid = ((major < limits[0]) & (minor < limits[1])).astype(jnp.int32)
            ptx.store_words(out_ref, major, minor, vector, valid, emulate=emulate)


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
      out_dtype: bfloat16 or float16.
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
    _check_config(config)
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
