"""Roofline bounds: the least time that a product or a copy can take on a chip."""

from __future__ import annotations

import dataclasses

from train.hardware import Chip, chip

# Of Hopper chips, by the word in the product's name: dense bf16 FLOPs, and bytes read from shared
# memory, of one streaming multiprocessor in one cycle ("NVIDIA H100 Tensor Core GPU architecture",
# 2022). Their ratio gives the rate of shared memory at the clock for which the peak is stated.
_HOPPER = frozenset({"H100", "H200", "H800", "GH200"})
_FLOPS_PER_CYCLE = 4096
_SHARED_BYTES_PER_CYCLE = 128

# The largest sparse MMA with both operands in shared memory, m64 n256 k32 of 16-bit elements: the
# kept half of A, all of B.
_MMA = (64, 256, 32)
_MMA_BYTES = 64 * 16 * 2 + 256 * 32 * 2


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Least times in seconds; None where the chip's figure is not known.

    Attributes:
      dense: arithmetic of the dense product.
      arithmetic: arithmetic of the 2:4 product, half of it.
      shared_memory: operands of the sparse MMAs read from shared memory. wgmma only.
      memory: packed operand, dense operand and result, each once through device memory.
    """

    dense: float | None
    arithmetic: float | None
    shared_memory: float | None
    memory: float | None

    @property
    def sparse(self) -> float | None:
        """The largest of the bounds of the 2:4 product."""
        known = [b for b in (self.arithmetic, self.shared_memory, self.memory) if b is not None]
        return max(known) if known else None


def packed_bytes(m: int, k: int, itemsize: int = 2) -> int:
    """Bytes of a packed (m, k) matrix: half of the elements, and 2 bits for each of them."""
    return m * k // 2 * itemsize + m * k // 8


def spmm_bounds(device_kind: str, m: int, n: int, k: int, itemsize: int = 2) -> Bounds:
    """Bounds of a product A (m, k) times B (k, n), A 2:4 along k, with a result of 16 bits.

    Args:
      device_kind: `jax.Device.device_kind`.
      m, n, k: sizes.
      itemsize: bytes of the operands' elements: 2, or 1 for 8-bit floats, which Hopper chips
        multiply at twice the rate.
    """
    found: Chip | None = chip(device_kind)
    hopper = found is not None and bool(_HOPPER & set(found.name.split()))
    if found is None or (itemsize == 1 and not hopper):
        return Bounds(None, None, None, None)
    flops = 2.0 * m * n * k
    peak = found.bf16_flops * 2 / itemsize
    shared = None
    if hopper:
        rate = found.bf16_flops / _FLOPS_PER_CYCLE * _SHARED_BYTES_PER_CYCLE
        # An instruction takes the same bytes of both operands, and so contracts more elements.
        instructions = m * n * k / (_MMA[0] * _MMA[1] * _MMA[2] * 2 / itemsize)
        shared = instructions * _MMA_BYTES / rate
    moved = packed_bytes(m, k, itemsize) + itemsize * k * n + 2 * m * n
    return Bounds(
        dense=flops / peak,
        arithmetic=flops / (2 * peak),
        shared_memory=shared,
        memory=moved / found.bandwidth,
    )
