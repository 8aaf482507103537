"""Shared test settings: GPU tests are skipped without a GPU, hypothesis is deterministic."""

import jax
import pytest
from hypothesis import settings

settings.register_profile("sparsejax", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("sparsejax")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
