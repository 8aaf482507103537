"""2:4-sparse times dense products of 8-bit floats on Hopper (``wgmma.sp`` with K = 64).

The kernel is that of `kernels.hopper.spmm24`; what differs follows from the types. An instruction
contracts 64 elements instead of 32, and so takes the same bytes of both operands; every thread
hands it metadata of its own, where 16-bit instructions take turns in pairs (the layout is in
`kernels.reference_fp8`); and both operands must have the contracted dimension contiguous in shared
memory, so B is (n, k). Scales of rows and columns are applied to the accumulators in the epilogue.

What bounds it is what bounds the 16-bit kernel: bytes of B from shared memory, and power. The
tensor cores add products of 8-bit floats with fewer bits than float32 has (14 or so after the
point, as for dense products of these types on this chip), which no schedule of this kernel changes.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels import reference_fp8
from kernels.hopper import device
from kernels.hopper.spmm24 import OutLayout, launch
from kernels.hopper.spmm24_config import Spmm24Config, choose_fp8_config
from kernels.hopper.spmm24_problem import DTYPES, FP8_DTYPES, Problem

__all__ = ["Spmm24Config", "check_spmm24_fp8", "spmm24_fp8"]


def spmm24_fp8(
    values: jax.Array,
    metadata: jax.Array,
    b: jax.Array,
    *,
    a_scale: jax.Array | None = None,
    b_scale: jax.Array | None = None,
    out_layout: OutLayout = "mn",
    epilogue: str | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Spmm24Config | None = None,
) -> jax.Array:
    """`kernels.reference_fp8.spmm24_fp8`.

    config: None takes the device's tuned entry for this shape, else a heuristic.

    Raises ValueError for inconsistent arguments and NotImplementedError where `check_spmm24_fp8`
    does.
    """
    options: dict[str, Any] = {"out_layout": out_layout, "epilogue": epilogue}
    options |= {"a_scale": a_scale, "b_scale": b_scale, "out_dtype": out_dtype}
    check_spmm24_fp8(values, metadata, b, **options, config=config)
    m, k = values.shape[0], 2 * values.shape[1]
    n = b.shape[0]
    if config is None:
        config = choose_fp8_config(m, n, k, out_layout, out_dtype)
    scalar, of_m, of_n = _sort_scales(a_scale, b_scale)
    p = Problem(
        m=m,
        n=n,
        k=k,
        dtype=FP8_DTYPES[values.dtype.name],
        b_layout="nk",
        out_layout=out_layout,
        out_dtype=jnp.dtype(out_dtype),
        relu2=epilogue == "relu2",
        scaled=scalar is not None,
        cores=device.num_cores(),
        config=config,
        b_dtype=FP8_DTYPES[b.dtype.name],
        m_scaled=of_m is not None,
        n_scaled=of_n is not None,
    )
    scales = [s for s in (scalar, of_m, of_n) if s is not None]
    return launch(p, [values, metadata, b, *scales])


def _sort_scales(a_scale: jax.Array | None, b_scale: jax.Array | None):
    """Scales of the whole product (1,), of rows (m,) and of columns (n,), as few as will do."""
    given = [None if s is None else jnp.asarray(s, jnp.float32) for s in (a_scale, b_scale)]
    vectors = [s if s is not None and s.ndim else None for s in given]
    factor = None
    for s in given:
        if s is not None and not s.ndim:
            factor = s if factor is None else factor * s
    if factor is None:
        return None, *vectors
    for i, vector in enumerate(vectors):
        if vector is not None:
            vectors[i] = vector * factor
            return None, *vectors
    return factor.reshape(1), None, None


def check_spmm24_fp8(
    values: jax.Array,
    metadata: jax.Array,
    b: jax.Array,
    *,
    a_scale: jax.Array | None = None,
    b_scale: jax.Array | None = None,
    out_layout: OutLayout = "mn",
    epilogue: str | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Spmm24Config | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    m, n, k = reference_fp8.product_dims(
        values, metadata, b, a_scale=a_scale, b_scale=b_scale, out_layout=out_layout,
        epilogue=epilogue,
    )  # fmt: skip
    if jnp.dtype(out_dtype).name not in (*DTYPES, "float32"):
        raise NotImplementedError(f"{out_dtype=} is not bfloat16, float16 or float32")
    if n % 8 or not min(m, n, k):
        raise NotImplementedError(f"{n=} must be a multiple of 8, and {m=}, {n=}, {k=} positive")
    device.require_hopper()
    if config is not None:
        problem = config.problem(jnp.dtype(out_dtype).itemsize, itemsize=1)
        if problem is not None:
            raise NotImplementedError(f"{config}: {problem}")
