"""Differentiable sparse products."""

from sparsejax.ops.matmul24 import matmul24
from sparsejax.ops.packed_ffn import PackedFFN, PackedMatrix, PackedMatrix8
from sparsejax.ops.routed_ffn import pack_ffn, routed_ffn
from sparsejax.ops.spmm24 import spmm24, spmm24_fp8

__all__ = [
    "PackedFFN",
    "PackedMatrix",
    "PackedMatrix8",
    "matmul24",
    "pack_ffn",
    "routed_ffn",
    "spmm24",
    "spmm24_fp8",
]
