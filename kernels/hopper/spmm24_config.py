"""Tiling and schedule of the `hopper` spmm24: the configuration, and how one is chosen."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp

from kernels.hopper import device
from kernels.tuning import tables

# What a block may use of an SM's shared memory, less the barriers, which Mosaic GPU pads to 1 KiB,
# and less another KiB because its kernels also hold a little static shared memory.
_SMEM_BYTES = 227 * 1024 - 2048
# A compute thread's registers, by compute warpgroups; the producer's take the rest. Three are for
# tiles of up to 192 columns: ptxas needs an instruction to fit in the 128 registers that each of
# 512 threads starts with.
REGISTERS = {1: 240, 2: 232, 3: 160}
_SM_REGISTERS = 65_536


def registers(warpgroups: int) -> int:
    """Registers that a compute thread has, of a block with so many compute warpgroups. Larger tiles
    run, and keep accumulators in memory."""
    if not device.linked():
        return REGISTERS[warpgroups]
    share = _SM_REGISTERS // (128 * (warpgroups + 1)) // 8 * 8
    return min(share, REGISTERS[warpgroups])


@dataclasses.dataclass(frozen=True)
class Spmm24Config:
    """Tiling and schedule of the `hopper` spmm24.

    warpgroups: compute warpgroups in a block.
    split: the output dimension, "m" or "n", along which they share a block's tile.
    wg_m: rows of 64 in one warpgroup's part.
    tile_n: columns of one warpgroup's part, a multiple of 64 up to 256.
    tile_k: contracted elements a pipeline stage holds, 64 or 128 (8-bit types: 128 or 256).
    stages: pipeline stages.
    in_flight: MMA groups left running when a stage's predecessor is released, 0 or 1.
    out_slots: output buffers, of 64 rows by epi_n columns, of each warpgroup.
    epi_n: columns of an output buffer, a multiple of 64 that divides tile_n.
    order: output dimension that varies fastest in the tile order, "m" or "n".
    width: tiles of that dimension visited before the other one advances (L2 locality).
    cluster: None, or the output dimension along which two neighbouring blocks form a cluster and
        share, by TMA multicast, the operand that does not depend on that dimension.
    """

    warpgroups: int = 2
    split: str = "m"
    wg_m: int = 1
    tile_n: int = 256
    tile_k: int = 64
    stages: int = 4
    in_flight: int = 1
    out_slots: int = 2
    epi_n: int = 64
    order: str = "m"
    width: int = 8
    cluster: str | None = None

    @property
    def block_m(self) -> int:
        return 64 * self.wg_m * (self.warpgroups if self.split == "m" else 1)

    @property
    def block_n(self) -> int:
        return self.tile_n * (self.warpgroups if self.split == "n" else 1)

    def smem_bytes(self, out_itemsize: int, itemsize: int = 2) -> int:
        """Shared memory of the stages and the output buffers; itemsize: of the operands."""
        stage = (self.block_m * self.tile_k // 2 + self.block_n * self.tile_k) * itemsize
        stage += (self.block_m // 64) * (self.tile_k // 64) * 512
        slots = self.warpgroups * self.out_slots
        return self.stages * stage + slots * 64 * self.epi_n * out_itemsize

    @property
    def cluster_size(self) -> int:
        return 1 if self.cluster is None else 2

    @property
    def cluster_m(self) -> int:
        return self.block_m * (2 if self.cluster == "m" else 1)

    @property
    def cluster_n(self) -> int:
        return self.block_n * (2 if self.cluster == "n" else 1)

    def fits(self, registers: int) -> bool:
        """Whether so many registers hold a thread's accumulators, and what it multiplies with."""
        return self.wg_m * self.tile_n // 2 + 40 <= registers

    def problem(self, out_itemsize: int, itemsize: int = 2) -> str | None:
        """Why this configuration cannot run, or None; itemsize: of the operands."""
        if self.warpgroups not in REGISTERS or self.split not in ("m", "n"):
            return f"{self.warpgroups=} {self.split=}"
        if self.tile_n % 64 or not 64 <= self.tile_n <= 256:
            return f"{self.tile_n=} {self.tile_k=}"
        if self.tile_k * itemsize not in (128, 256):
            return f"{self.tile_n=} {self.tile_k=}"
        if self.block_m > 256 or self.block_n > 256:
            return f"{self.block_m=} {self.block_n=} exceed a TMA box of 256"
        if not self.fits(REGISTERS[self.warpgroups]):
            return f"{self.wg_m=} {self.tile_n=} need more registers than a thread has"
        if self.in_flight not in (0, 1) or self.stages < 2 or self.out_slots < 1:
            return f"{self.in_flight=} {self.stages=} {self.out_slots=}"
        if itemsize == 1 and self.in_flight:
            # ptxas (13.0 to 13.5) then lets every MMA wait for the one before (its remark C7513):
            # with a word of metadata for every MMA, registers of consecutive groups differ.
            return f"{self.in_flight=} must be 0 for 8-bit types"
        if self.epi_n % 64 or self.epi_n < 64 or self.tile_n % self.epi_n:
            return f"{self.epi_n=} is no multiple of 64 that divides {self.tile_n=}"
        if self.cluster not in (None, "m", "n"):
            return f"{self.cluster=}"
        if self.order not in ("m", "n") or self.width < 1:
            return f"{self.order=} {self.width=}"
        if self.smem_bytes(out_itemsize, itemsize) > _SMEM_BYTES:
            return f"{self.smem_bytes(out_itemsize, itemsize)=} exceeds {_SMEM_BYTES}"
        return None


# Candidates of `heuristic` and their cost on an H100 in cycles: of a pipeline step of 64 along k,
# and of a tile's start and epilogue (from hardware counters; the small tiles are estimates).
_COSTS = {
    Spmm24Config(wg_m=2, tile_n=192, epi_n=192, out_slots=1, order="n", width=8): (954, 3800),
    Spmm24Config(wg_m=1, tile_n=256, order="m", width=16): (717, 1500),
    Spmm24Config(wg_m=1, tile_n=128, stages=5, order="m", width=16): (420, 1500),
    Spmm24Config(wg_m=1, tile_n=64, stages=6, order="m", width=16): (260, 1500),
}


def choose_config(
    m: int, n: int, k: int, b_layout: str, out_layout: str, out_dtype: Any
) -> Spmm24Config:
    """The tuned configuration of this device and shape, or the one for a similar shape."""
    key = tables.key(m=m, n=n, k=k, b=b_layout, out=out_layout)
    return _tuned_or_heuristic("spmm24", key, m, n, k, jnp.dtype(out_dtype).itemsize, 2)


def choose_fp8_config(m: int, n: int, k: int, out_layout: str, out_dtype: Any) -> Spmm24Config:
    """`choose_config` for operands of 8-bit types."""
    key = tables.key(m=m, n=n, k=k, out=out_layout)
    return _tuned_or_heuristic("spmm24_fp8", key, m, n, k, jnp.dtype(out_dtype).itemsize, 1)


def _tuned_or_heuristic(
    op: str, key: str, m: int, n: int, k: int, out_itemsize: int, itemsize: int
) -> Spmm24Config:
    entry = tables.lookup("hopper", op, device.kind(), key)
    if entry is not None:
        config = Spmm24Config(**entry)
        fits = config.fits(registers(config.warpgroups))
        if fits and config.problem(out_itemsize, itemsize) is None:
            return config
    return heuristic(m, n, k, out_itemsize, itemsize)


def heuristic(m: int, n: int, k: int, out_itemsize: int, itemsize: int = 2) -> Spmm24Config:
    """The cheapest candidate for a shape that was not tuned, by waves of tiles over the device."""
    cores = device.num_cores()

    def cost(config: Spmm24Config) -> float:
        step, tile = _COSTS[config]
        tiles = -(-m // config.block_m) * -(-n // config.block_n)
        # A step takes 128 bytes of a row of B, whatever their type: the same operands' bytes, and
        # tensor cores are as much faster as the elements are smaller.
        return -(-tiles // cores) * (-(-k * itemsize // 128) * step + tile)

    best = min((c for c in _COSTS if c.fits(registers(c.warpgroups))), key=cost)
    if itemsize == 1:
        best = dataclasses.replace(best, tile_k=128, in_flight=0)
    # float32 output takes twice the shared memory.
    narrow = dataclasses.replace(best, epi_n=64, out_slots=1)
    shallow = dataclasses.replace(narrow, stages=best.stages - 1)
    return next(c for c in (best, narrow, shallow) if c.problem(out_itemsize, itemsize) is None)
