"""Static facts of one `hopper` spmm24 call, and small builders that its parts share."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from kernels.hopper import ptx
from kernels.hopper.spmm24_config import Spmm24Config

DTYPES = {"bfloat16": "bf16", "float16": "f16"}
ACC = plgpu.Layout._WGMMA_ACC_32BIT
SCALAR = plgpu.Layout.WG_SPLAT(())


@dataclasses.dataclass(frozen=True)
class Problem:
    """Static facts of one call, shared by the builders below."""

    m: int
    n: int
    k: int
    dtype: str
    b_layout: str
    out_layout: str
    out_dtype: Any
    relu2: bool
    scaled: bool
    cores: int
    config: Spmm24Config

    @property
    def m_tiles(self) -> int:
        """Tiles of a cluster (one or two blocks) along m."""
        return -(-self.m // self.config.cluster_m)

    @property
    def n_tiles(self) -> int:
        return -(-self.n // self.config.cluster_n)

    @property
    def tiles(self) -> int:
        return self.m_tiles * self.n_tiles

    @property
    def blocks(self) -> int:
        """Clusters of the persistent grid."""
        return min(self.cores // self.config.cluster_size, self.tiles)

    @property
    def out_itemsize(self) -> int:
        return jnp.dtype(self.out_dtype).itemsize

    @property
    def out_panels(self) -> int:
        return self.out_itemsize // 2

    @property
    def out_swizzle_elems(self) -> int:
        return 128 // self.out_itemsize

    @property
    def a_swizzle(self) -> int:
        return self.config.tile_k  # bytes: tile_k/2 stored elements of two bytes

    @property
    def b_panel(self) -> tuple[int, int, int]:
        """Shape of B's stage: panels of 64 (128-byte, swizzled) columns."""
        c = self.config
        if self.b_layout == "nk":
            return (c.tile_k // 64, c.block_n, 64)
        return (c.block_n // 64, c.tile_k, 64)

    @property
    def stage_bytes(self) -> int:
        c = self.config
        return (
            c.block_m * c.tile_k
            + c.block_n * c.tile_k * 2
            + (c.block_m // 64) * (c.tile_k // 64) * 512
        )


def as_index(value: ir.Value) -> ir.Value:
    return arith.index_cast(ir.IndexType.get(), value)


def scalar_value(scalar) -> ir.Value:
    """The MLIR value behind a scalar passed to an inline function."""
    return scalar.registers.item()


def barrier_address(bars: ir.Value, index: ir.Value) -> ir.Value:
    return arith.addi(ptx.shared_address(bars), arith.muli(index, ptx.const32(8)))


def add_const(index: ir.Value, base: int) -> ir.Value:
    return arith.addi(index, ptx.const32(base))


def to_lists(acc) -> list[list[ir.Value]]:
    """The thread's accumulators as wgmma numbers them, a list for each 64 rows."""
    return [list(acc.registers[i : i + 1].flat) for i in range(acc.registers.shape[0])]
