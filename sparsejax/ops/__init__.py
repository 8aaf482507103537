"""Differentiable sparse products."""

from sparsejax.ops.matmul24 import matmul24
from sparsejax.ops.routed_ffn import PackedFFN, pack_ffn, routed_ffn
from sparsejax.ops.spmm24 import spmm24

__all__ = ["PackedFFN", "matmul24", "pack_ffn", "routed_ffn", "spmm24"]
