"""Pallas Triton backend, for NVIDIA GPUs from compute capability 8.0."""
