"""Shared test settings: GPU tests are skipped without a GPU, hypothesis is deterministic."""

import os
import shutil
import tempfile

# Several test processes share a GPU; none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Most of the suite's time is compilation for the CPU of programs that run once. XLA's older code
# generation takes half of the newer one's time; versions that no longer have it ignore the option.
QUICK = (
    "--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters "
    "--xla_cpu_parallel_codegen_split_count=1"
)
if QUICK not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}"

# Compiled programs of one session, for all of its processes. Set before JAX is imported.
CACHE = "JAX_COMPILATION_CACHE_DIR"
OWNED = CACHE not in os.environ
if OWNED:
    os.environ[CACHE] = tempfile.mkdtemp(prefix="sparsejax-tests-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import jax
import pytest
from hypothesis import settings

settings.register_profile("sparsejax", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("sparsejax")


def pytest_configure() -> None:
    if jax.default_backend() == "cpu":
        # Runs of the trainer in processes of their own are optimised as a user's are.
        jax.config.update("jax_disable_most_optimizations", True)


def pytest_unconfigure() -> None:
    # The workers' variables come from the process that starts them.
    if OWNED:
        shutil.rmtree(os.environ[CACHE], ignore_errors=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
