"""The device that a kernel would be compiled for."""

from __future__ import annotations

import jax

from kernels import registry


def require_capability(op: str, minimum: float) -> None:
    """Raises NotImplementedError unless the target is an NVIDIA GPU of this compute capability."""
    capability = compute_capability()
    if capability is not None and capability < minimum:
        raise NotImplementedError(
            f"triton {op} needs an NVIDIA GPU of compute capability {minimum}, not {capability}"
        )


def kind() -> str:
    """The target device's name, such as "NVIDIA H100 80GB HBM3"."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    return registry.default_device().device_kind if abstract is None else abstract.device_kind


def compute_capability() -> float | None:
    """Of the GPU that `registry.assume_capability` names, or else JAX compiles for; 0 for anything
    else, None for an abstract GPU."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    unnamed = registry.assume_capability.value is None
    if unnamed and abstract is not None and abstract.platform == "gpu":
        return None
    capability = registry.target_capability()
    return 0.0 if capability is None else float(f"{capability[0]}.{capability[1]}")


def small_shared_memory() -> bool:
    """Whether a program may have 99 KiB of shared memory only, not 163 or more."""
    capability = compute_capability()
    return capability in (8.6, 8.9) or (capability is not None and capability >= 12.0)
