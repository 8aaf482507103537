"""Shared test settings: GPU tests are skipped without a GPU, hypothesis is deterministic."""

import os

# Several test processes share a GPU; none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import pytest
from hypothesis import settings

settings.register_profile("sparsejax", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("sparsejax")


def pytest_configure() -> None:
    if jax.default_backend() == "cpu":
        # Most of the suite's time is compilation of programs that run once. Runs of the trainer in
        # processes of their own compile as a user's do.
        jax.config.update("jax_disable_most_optimizations", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
