"""Pre-train language models faster with 2:4 and V:N:M sparsity, in JAX and Pallas."""

import importlib
from typing import Any

# Where each public name lives. Resolved on first use, so that `import sparsejax` loads no Flax for
# a user of the formats alone.
_PUBLIC = {
    "Linear24": "sparsejax.nn",
    "MoEFFN": "sparsejax.nn",
    "RoutedFFN": "sparsejax.nn",
    "Sparse24": "sparsejax.formats",
    "Sparsity": "sparsejax.spec",
    "matmul24": "sparsejax.ops",
    "mvue24": "sparsejax.prune",
    "pack": "sparsejax.formats",
    "routed_ffn": "sparsejax.ops",
    "soft_threshold": "sparsejax.prune",
    "soft_threshold_beta": "sparsejax.prune",
    "soft_threshold_ste": "sparsejax.prune",
    "spmm24": "sparsejax.ops",
    "top2_of_4": "sparsejax.prune",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_PUBLIC))
