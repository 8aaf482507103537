"""Options of XLA's compiler that several benchmarks need."""

from __future__ import annotations

CUBLAS: dict[str, str | bool] = {"xla_gpu_enable_triton_gemm": False}
"""Dense products by cuBLAS and cuBLASLt. Left to choose, XLA takes its own Triton products of 8-bit
floats, which are half as fast, multiply small ones in 16 bits, and take half a minute to tune."""
