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
FP8_DTYPES = {"float8_e4m3fn": "e4m3", "float8_e5m2": "e5m2"}
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
    b_dtype: str | None = None
    """B's type where it may be another one than A's: 8-bit types only."""
    m_scaled: bool = False
    """Whether every row of A B has a scale of its own."""
    n_scaled: bool = False
    """Whether every column of A B has a scale of its own."""

    @property
    def itemsize(self) -> int:
        """Bytes of an element of A or B."""
        return 1 if self.dtype in FP8_DTYPES.values() else 2

    @property
    def mma_k(self) -> int:
        """Contracted elements of one instruction: 64 bytes of B, 32 of A."""
        return 64 // self.itemsize

    @property
    def b_panel_elems(self) -> int:
        """Elements of a panel's row, 128 bytes."""
        return 128 // self.itemsize

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
        """Bytes of a row of A's stage, half of its tile_k elements."""
        return self.config.tile_k * self.itemsize // 2

    @property
    def b_panel(self) -> tuple[int, int, int]:
        """Shape of B's stage: panels of 128-byte, swizzled rows."""
        c = self.config
        width = self.b_panel_elems
        if self.b_layout == "nk":
            return (c.tile_k // width, c.block_n, width)
        return (c.block_n // width, c.tile_k, width)

    @property
    def stage_bytes(self) -> int:
        c = self.config
        return (
            c.block_m * self.a_swizzle
            + c.block_n * c.tile_k * self.itemsize
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
