"""Shared test settings: GPU tests are skipped without a GPU, hypothesis is deterministic."""

import collections
import gc
import os
import shutil
import tempfile
from importlib import metadata
from typing import Any

# Several test processes share a GPU; none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Most of the suite's time is compilation for the CPU of programs that run once. XLA's older code
# generation takes half of the newer one's time; versions that no longer have it ignore the option.
# An unknown flag would end the process: the second one is for versions that are known to have it.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "")
    + " --xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"
    + " --xla_cpu_parallel_codegen_split_count=1"
    * metadata.version("jaxlib").startswith(("0.10.", "0.11."))
)

import jax
import pytest
from hypothesis import settings

from tests import mlir_contexts

settings.register_profile("sparsejax", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("sparsejax")


def pytest_configure(config: pytest.Config) -> None:
    mlir_contexts.reuse()
    if jax.default_backend() != "cpu":
        return
    options: dict[str, Any] = {"jax_disable_most_optimizations": True}
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = tempfile.mkdtemp(prefix="sparsejax-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
        options |= {
            "jax_compilation_cache_dir": folder,
            # To write a program that compiles faster takes longer than to compile it again.
            "jax_persistent_cache_min_compile_time_secs": 0.2,
            "jax_persistent_cache_min_entry_size_bytes": -1,
        }
    # For all processes of the session: workers, and the trainers that tests start.
    for name, value in options.items():
        os.environ[name.upper()] = str(value)
        jax.config.update(name, value)


def pytest_collection_finish() -> None:
    # Tracing makes objects by the million, of which few are garbage in cycles: at the default
    # settings a tenth of the suite's time goes to looking through them and through all modules.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    slow = collections.Counter(item.path for item in items if "slow" in item.keywords)
    items.sort(key=lambda item: -slow[item.path])
    if jax.default_backend() == "gpu":
        return
    skip = pytest.mark.skip(reason="needs an NVIDIA GPU")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
