"""Which backend serves a call.

A backend is a module for each op, `kernels.<backend>.<op>`, with the function `<op>` and
`check_<op>` of the same arguments, which raises NotImplementedError where it does not serve them.
`kernels.reference` holds every op, but `kernels.reference_fp8` those of 8-bit floats and
`kernels.reference_norm` those of normalisation. Modules are
imported when a call needs them, so that a machine without a GPU never loads the GPU compilers.

`backend=None` takes the fastest backend whose check passes; passing over one is reported once for
each op and shape. A named backend is strict: its refusal reaches the caller.

Everything is decided while JAX traces, from the compute capability of the device that JAX would
use. `assume_capability` decides for another one, to lower for a GPU on a machine without one:

    with assume_capability((9, 0)):
        jax.jit(f).trace(x).lower(lowering_platforms=("cuda",))
"""

import functools
import importlib
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.custom_batching
import jax.numpy as jnp
import numpy as np
from jax import Array

Backend = Literal["hopper", "triton", "reference"]
Capability = tuple[int, int]

BACKENDS: tuple[Backend, ...] = get_args(Backend)

# Where the reference is defined of ops that are not in `kernels.reference`.
_REFERENCE_MODULES = {
    "pack24_fp8": "kernels.reference_fp8",
    "spmm24_fp8": "kernels.reference_fp8",
    "rms_norm": "kernels.reference_norm",
    "rms_norm_backward": "kernels.reference_norm",
}

# Modules of the backends that are not named after their op.
_MODULES = {"rms_norm_backward": "rms_norm"}

# Ops bound by memory alone: one backend serves them as well as another could.
_BACKENDS_OF: dict[str, tuple[Backend, ...]] = {
    "rms_norm": ("triton", "reference"),
    "rms_norm_backward": ("triton", "reference"),
}

assume_capability = jax.make_user_context(None)
"""Context manager: decide as if the device had this compute capability, such as (9, 0).

Part of the key of `jax.jit`'s cache, so a function traced under it is traced again outside.
"""


class FallbackWarning(UserWarning):
    """A faster backend refused a call, and a slower one serves it."""


_reported: set[tuple] = set()


def default_device() -> Any:
    """The device that JAX would use."""
    device = jax.config.jax_default_device  # type: ignore[attr-defined]
    if device is None:
        return jax.devices()[0]
    return jax.devices(device)[0] if isinstance(device, str) else device


def target_capability() -> Capability | None:
    """Compute capability (major, minor) that calls are decided for; None if it is no CUDA GPU."""
    assumed = assume_capability.value
    if assumed is not None:
        return assumed
    device = default_device()
    if device.platform != "gpu":
        return None
    major, dot, minor = str(getattr(device, "compute_capability", "")).partition(".")
    # ROCm reports names such as gfx90a here.
    return (int(major), int(minor)) if dot and major.isdigit() and minor.isdigit() else None


def refusal(backend: Backend, capability: Capability | None) -> str | None:
    """Why a backend cannot run on a device; None if it can. ValueError: no such backend."""
    found = "; the device is no NVIDIA GPU" if capability is None else f", not {capability}"
    if backend not in BACKENDS:
        raise ValueError(f"{backend=} must be one of {BACKENDS}")
    if backend == "hopper" and (capability is None or capability[0] != 9):
        # wgmma exists on sm_90a only: later architectures dropped it.
        return f"{backend=} needs compute capability 9.0{found}"
    if backend == "triton" and (capability is None or capability < (8, 0)):
        return f"{backend=} needs compute capability 8.0 or later{found}"
    return None


def available_backends() -> tuple[Backend, ...]:
    """Backends that the device can run, the fastest first."""
    capability = target_capability()
    return tuple(b for b in BACKENDS if refusal(b, capability) is None)


def load(op: str, backend: Backend) -> tuple[Callable, Callable]:
    """The function `op` of a backend and its check.

    Raises:
      NotImplementedError: the backend has no such op, or cannot be imported here.
    """
    name = f"kernels.{backend}.{_MODULES.get(op, op)}"
    if backend == "reference":
        name = _REFERENCE_MODULES.get(op, "kernels.reference")
    try:
        module = importlib.import_module(name)
        return getattr(module, op), getattr(module, f"check_{op}")
    except (ImportError, AttributeError) as error:
        raise NotImplementedError(f"{backend=} has no {op=} here: {error}") from error


def _signature(args: tuple, kwargs: dict) -> tuple:
    """Shapes, dtypes and options of a call, to report each kind of fallback once."""

    def describe(value: Any) -> Any:
        # dtypes have a shape as well.
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            return (tuple(value.shape), str(value.dtype))
        return str(value)

    return (*map(describe, args), *((name, describe(v)) for name, v in sorted(kwargs.items())))


def select(op: str, *args, backend: Backend | None = None, **kwargs) -> tuple[Backend, Callable]:
    """The backend that serves a call of `op` with these arguments, and its function.

    Args:
      op: name of the op, such as "spmm24".
      *args: the op's own arguments.
      backend: a name (strict), or None for the fastest that serves the call.
      **kwargs: the op's own keyword arguments.

    Raises:
      ValueError: an argument is not allowed, or a `config` is given without a named backend
        (every backend has its own type of configuration).
      NotImplementedError: the named backend does not serve this device, op or shape.
    """
    if backend is not None:
        refused = refusal(backend, target_capability())
        if refused is not None:
            raise NotImplementedError(refused)
        function, check = load(op, backend)
        check(*args, **kwargs)
        return backend, function

    if kwargs.get("config") is not None:
        raise ValueError(f"config={kwargs['config']} needs a named backend, not {backend=}")
    refusals: list[str] = []
    for candidate in available_backends():
        if candidate not in _BACKENDS_OF.get(op, BACKENDS):
            continue
        try:
            function, check = load(op, candidate)
            check(*args, **kwargs)
        except NotImplementedError as error:
            refusals.append(f"{candidate}: {error}")
            continue
        if refusals:
            key = (op, candidate, _signature(args, kwargs))
            if key not in _reported:
                _reported.add(key)
                warnings.warn(
                    f"{op} runs on the slower backend {candidate!r} ({'; '.join(refusals)})",
                    FallbackWarning,
                    stacklevel=3,
                )
        return candidate, function
    raise NotImplementedError(f"no backend serves {op=}: {'; '.join(refusals)}")


@functools.cache
def traced_once(function: Callable, static: tuple[str, ...]) -> Callable:
    """`function` with one trace for calls of equal shapes and options; `static` names its options.

    A model of many layers then lowers and compiles a kernel once. The device that is traced for is
    part of the key of `jax.jit`'s cache.
    """
    return jax.jit(function, static_argnames=static)


def call(op: str, *args, backend: Backend | None = None, **kwargs) -> Any:
    """Runs `op` on the backend that `select` picks, traced once (`traced_once`)."""
    # Scales may come as numbers or as numpy's arrays: data all the same, not options.
    data = (float, np.ndarray, np.generic)
    to_array = lambda v: jnp.asarray(v, jnp.float32) if isinstance(v, data) else v
    kwargs = {key: to_array(value) for key, value in kwargs.items()}
    name, function = select(op, *args, backend=backend, **kwargs)
    arrays = {key: value for key, value in kwargs.items() if isinstance(value, Array)}
    options = {key: value for key, value in kwargs.items() if key not in arrays}
    function = traced_once(function, tuple(sorted(options)))
    if name != "hopper":
        return function(*args, **kwargs)

    # Mosaic GPU kernels have no batching rule that lowers: `jax.vmap` runs one after the other.
    @jax.custom_batching.sequential_vmap
    def one(args, arrays):
        return function(*args, **arrays, **options)

    return one(args, arrays)


def pack24(x, *, backend: Backend | None = None, **kwargs) -> tuple[Array, Array]:
    """`kernels.reference.pack24` on the fastest backend that serves the call."""
    return call("pack24", x, backend=backend, **kwargs)


def spmm24(values, metadata, b, *, backend: Backend | None = None, **kwargs) -> Array:
    """`kernels.reference.spmm24` on the fastest backend that serves the call."""
    return call("spmm24", values, metadata, b, backend=backend, **kwargs)


def pack24_fp8(x, *, backend: Backend | None = None, **kwargs) -> tuple[Array, Array, Array]:
    """`kernels.reference_fp8.pack24_fp8` on the fastest backend that serves the call."""
    return call("pack24_fp8", x, backend=backend, **kwargs)


def spmm24_fp8(values, metadata, b, *, backend: Backend | None = None, **kwargs) -> Array:
    """`kernels.reference_fp8.spmm24_fp8` on the fastest backend that serves the call."""
    return call("spmm24_fp8", values, metadata, b, backend=backend, **kwargs)


def rms_norm(x, scale, *, eps: float, backend: Backend | None = None) -> tuple[Array, Array]:
    """`kernels.reference_norm.rms_norm` on the fastest backend that serves the call."""
    _, function = select("rms_norm", x, scale, eps=eps, backend=backend)
    return traced_once(function, ("eps",))(x, scale, eps=eps)


def rms_norm_backward(
    y, rstd, scale, g, passed=None, *, backend: Backend | None = None
) -> tuple[Array, Array]:
    """`kernels.reference_norm.rms_norm_backward` on the fastest backend that serves the call."""
    return call("rms_norm_backward", y, rstd, scale, g, passed, backend=backend)
