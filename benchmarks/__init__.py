"""Benchmarks, each `python -m benchmarks.NAME --out FILE.json`."""

import os

# JAX would take three quarters of the device memory at its start; a benchmark shares the device
# with PyTorch, whose libraries it compares with. Set before anything imports JAX.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
