"""Peak rates of the chips that a run may meet: what MFU and rooflines are measured against."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """One GPU.

    Attributes:
      name: the product.
      bf16_flops: dense bf16 tensor-core peak with float32 accumulation, FLOP/s. 2:4 sparsity
        doubles it.
      bandwidth: peak of the device memory, bytes/s.
      source: the vendor's document that states them.
    """

    name: str
    bf16_flops: float
    bandwidth: float
    source: str


# Data sheets print the peak with 2:4 sparsity where an asterisk says so: the entries are half of
# that.
_A100 = "NVIDIA A100 Tensor Core GPU data sheet, 2021"
_H100 = "NVIDIA H100 Tensor Core GPU data sheet, 2023, and architecture white paper, table 2"
_H200 = "NVIDIA H200 Tensor Core GPU data sheet, 2024"
_BLACKWELL = "NVIDIA Blackwell architecture technical brief, table of system specifications, 2024"
_BLACKWELL_ULTRA = "NVIDIA HGX B300 and GB300 NVL72 data sheets, 2025"
_ADA = "NVIDIA Ada GPU architecture white paper, appendix A, 2022"
_GA102 = "NVIDIA Ampere GA102 GPU architecture white paper, appendix A, 2020"
_RTX_BLACKWELL = "NVIDIA RTX Blackwell GPU architecture white paper, appendix, 2025"

# (words that the device kind must hold, product, TFLOP/s, GB/s, source); the first match counts, so
# the rows of a product run from the particular to the general.
_TABLE: tuple[tuple[str, str, float, float, str], ...] = (
    ("gb300", "GB300", 2500, 8000, _BLACKWELL_ULTRA),
    ("b300", "B300", 2250, 8000, _BLACKWELL_ULTRA),
    ("gb200", "GB200", 2500, 8000, _BLACKWELL),
    ("b200", "B200", 2250, 8000, _BLACKWELL),
    ("gh200 144g", "GH200 144 GB", 989.4, 4900, "NVIDIA GH200 Grace Hopper data sheet, 2023"),
    ("gh200", "GH200", 989.4, 4000, "NVIDIA GH200 Grace Hopper data sheet, 2023"),
    ("h200 nvl", "H200 NVL", 835.5, 4800, _H200),
    ("h200", "H200", 989.4, 4800, _H200),
    ("h100 pcie", "H100 PCIe", 756.5, 2000, _H100),
    ("h100 nvl", "H100 NVL", 835.5, 3900, _H100),
    ("h100", "H100 SXM", 989.4, 3350, _H100),
    ("h800", "H800 SXM", 989.4, 3350, "NVIDIA H800 Tensor Core GPU data sheet, 2023"),
    ("h20", "H20", 148, 4000, "NVIDIA H20 product brief, 2023"),
    ("a100 sxm4 80gb", "A100 SXM 80 GB", 312, 2039, _A100),
    ("a100 80gb pcie", "A100 PCIe 80 GB", 312, 1935, _A100),
    ("a100", "A100 40 GB", 312, 1555, _A100),
    ("a800 sxm4 80gb", "A800 SXM 80 GB", 312, 2039, _A100),
    ("a800", "A800", 312, 1935, _A100),
    ("a30", "A30", 165, 933, "NVIDIA A30 Tensor Core GPU data sheet, 2021"),
    ("a10", "A10", 125, 600, "NVIDIA A10 Tensor Core GPU data sheet, 2021"),
    ("a40", "A40", 149.7, 696, "NVIDIA A40 data sheet, 2021"),
    ("a6000", "RTX A6000", 154.8, 768, _GA102),
    ("l40s", "L40S", 362.05, 864, "NVIDIA L40S data sheet, 2023"),
    ("l40", "L40", 181.05, 864, "NVIDIA L40 data sheet, 2022"),
    ("l4", "L4", 121, 300, "NVIDIA L4 Tensor Core GPU data sheet, 2023"),
    ("rtx 6000 ada", "RTX 6000 Ada", 364.2, 960, "NVIDIA RTX 6000 Ada data sheet, 2022"),
    (
        "rtx pro 6000 blackwell workstation",
        "RTX PRO 6000 Blackwell",
        503.8,
        1792,
        "NVIDIA RTX Blackwell PRO GPU architecture white paper, 2025",
    ),
    ("rtx 5090", "GeForce RTX 5090", 209.5, 1792, _RTX_BLACKWELL),
    ("rtx 5080", "GeForce RTX 5080", 112.6, 960, _RTX_BLACKWELL),
    ("rtx 4090", "GeForce RTX 4090", 165.2, 1008, _ADA),
    ("rtx 4080", "GeForce RTX 4080", 97.5, 716.8, _ADA),
    ("rtx 3090 ti", "GeForce RTX 3090 Ti", 80, 1008, _GA102),
    ("rtx 3090", "GeForce RTX 3090", 71, 936.2, _GA102),
)

# The same number with one of these words is another chip, or a slice of one.
_VARIANTS = frozenset({"ti", "super", "d", "laptop", "mobile", "max", "mig"})


def chip(device_kind: str) -> Chip | None:
    """Returns the chip that a JAX device calls itself, or None where its peak is not known.

    Whole words are compared, in any order and case: "NVIDIA H100 80GB HBM3" is the SXM part,
    "NVIDIA H100 PCIe" the slower card, and "NVIDIA A10G" is not an A10. A MIG slice is not known.

    Args:
      device_kind: `jax.Device.device_kind`.
    """
    words = set(re.findall(r"[a-z0-9]+", device_kind.lower()))
    for pattern, name, teraflops, gigabytes, source in _TABLE:
        wanted = set(pattern.split())
        if wanted <= words and not (words - wanted) & _VARIANTS:
            return Chip(name, teraflops * 1e12, gigabytes * 1e9, source)
    return None
