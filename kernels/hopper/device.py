"""Facts about the device that a Hopper kernel is traced for."""

from __future__ import annotations

import jax
import jaxlib

from kernels import registry

# What an H100 SXM has; used only when no device tells (lowering on a machine without a GPU).
_DEFAULT_CORES = 132


def _abstract_device():
    return jax.sharding.get_abstract_mesh().abstract_device


def kind() -> str:
    """The device's name, such as "NVIDIA H100 80GB HBM3"."""
    abstract = _abstract_device()
    if abstract is not None:
        return abstract.device_kind
    return registry.default_device().device_kind


def num_cores() -> int:
    """Streaming multiprocessors of the device."""
    abstract = _abstract_device()
    if abstract is not None and abstract.num_cores:
        return abstract.num_cores
    return getattr(registry.default_device(), "core_count", None) or _DEFAULT_CORES


def linked() -> bool:
    """Whether ptxas assembles a kernel as a part of a program to be linked.

    jaxlib's wheels do that with Mosaic GPU kernels from 0.12 on, by nvJitLink. ptxas then ignores
    setmaxnreg (its remark C7504), so that every thread keeps an equal share of a multiprocessor's
    registers, and waits after every wgmma of a kernel that calls a function (C7509), as a division
    of two 16-bit variables is.
    """
    return tuple(int(part) for part in jaxlib.__version__.split(".")[:2]) >= (0, 12)


def require_hopper() -> None:
    """Raises NotImplementedError unless the target is a GPU of compute capability 9.0.

    The target is the default device, or what `kernels.registry.assume_capability` or an abstract
    mesh of GPUs says, so that kernels can be lowered on a machine without a GPU.
    """
    abstract = _abstract_device()
    if abstract is not None and abstract.platform == "gpu":
        return
    capability = registry.target_capability()
    if capability != (9, 0):
        raise NotImplementedError(f"{capability=} is not Hopper's (9, 0)")
