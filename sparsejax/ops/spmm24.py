"""Products of a packed 2:4 matrix with a dense one, without derivatives."""

from typing import Literal

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from kernels import reference, reference_fp8, registry
from sparsejax import fp8
from sparsejax.formats import Sparse24, require_sparse24

# Every GPU backend moves 16-byte chunks of the dense operand and of the result.
_N_MULTIPLE = 8


def spmm24(
    a: Sparse24,
    b: ArrayLike,
    *,
    b_layout: Literal["nk", "kn"] = "kn",
    out_layout: Literal["mn", "nm"] = "mn",
    scale: ArrayLike | None = None,
    epilogue: Literal["relu2"] | None = None,
    out_dtype: DTypeLike | None = None,
    backend: registry.Backend | None = None,
) -> Array:
    """epilogue(scale * A @ B) on sparse tensor cores, A (m, k) the packed matrix as an operand.

    A contracts its 2:4 axis: it is the packed matrix itself for axis 1, its transpose for axis 0.
    Accumulated in float32. Any m, n and k: operands are padded and the result is cut to size.
    Not differentiable on the GPU backends; `matmul24` is.

    Args:
      a: the sparse operand.
      b: (k, n) for b_layout "kn", (n, k) for "nk" (contraction contiguous); a's dtype.
      b_layout: axes of `b`.
      out_layout: axes of the result, (m, n) or (n, m).
      scale: None or a float32 scalar, applied to the accumulator.
      epilogue: None, or "relu2" for max(y, 0)^2.
      out_dtype: of the result; None for a's dtype.
      backend: a kernel backend (strict), or None for the fastest.

    Returns:
      (m, n) or (n, m) in `out_dtype`.

    Raises:
      ValueError: an argument is not allowed, or the shapes do not fit.
      NotImplementedError: the named backend does not serve this device, shape or dtype.
    """
    require_sparse24("a", a)
    b = jnp.asarray(b)
    if fp8.is_fp8(a.dtype):
        raise ValueError(f"a.dtype={a.dtype.name} is for spmm24_fp8")
    reference.require_one_of("b_layout", b_layout, reference.B_LAYOUTS)
    reference.require_one_of("out_layout", out_layout, reference.OUT_LAYOUTS)
    contracted = b_layout.index("k")
    if b.ndim != 2 or b.shape[contracted] != a.k:
        raise ValueError(f"{b.shape=} in {b_layout=} must have k={a.k} along the contraction")
    n = b.shape[1 - contracted]
    pads = [(0, reference.padded(n, _N_MULTIPLE) - n)] * 2
    pads[contracted] = (0, reference.padded(a.k) - a.k)
    if any(after for _, after in pads):
        b = jnp.pad(b, pads)
    out = registry.spmm24(
        a.values,
        a.metadata,
        b,
        b_layout=b_layout,
        out_layout=out_layout,
        scale=scale,
        epilogue=epilogue,
        out_dtype=jnp.dtype(a.dtype if out_dtype is None else out_dtype),
        backend=backend,
    )
    rows, cols = (a.m, n) if out_layout == "mn" else (n, a.m)
    return out[:rows, :cols]


def spmm24_fp8(
    a: Sparse24,
    b: fp8.Quantized,
    *,
    out_layout: Literal["mn", "nm"] = "mn",
    epilogue: Literal["relu2"] | None = None,
    out_dtype: DTypeLike = jnp.bfloat16,
    backend: registry.Backend | None = None,
) -> Array:
    """epilogue(A @ B^T) of 8-bit floats on sparse tensor cores, A (m, k) and b (n, k) with scales.

    Both operands have the contracted axis last, the only order that tensor cores take for these
    types. The scales, of tensors or of rows, are applied to the float32 accumulators. Any m, n and
    k. Not differentiable on the GPU backends; `matmul24` is.

    Args:
      a: the sparse operand, packed as float8_e4m3fn or float8_e5m2.
      b: (n, k), either of the two types (`sparsejax.fp8.quantize`).
      out_layout: axes of the result, (m, n) or (n, m).
      epilogue: None, or "relu2" for max(y, 0)^2.
      out_dtype: of the result.
      backend: a kernel backend (strict), or None for the fastest.

    Returns:
      (m, n) or (n, m) in `out_dtype`.

    Raises:
      ValueError: an argument is not allowed, or the shapes do not fit.
      NotImplementedError: the named backend does not serve this device, shape or dtype.
    """
    require_sparse24("a", a)
    if not isinstance(b, fp8.Quantized):
        raise ValueError(f"b must be a fp8.Quantized (fp8.quantize), not {type(b).__name__}")
    reference_fp8.require_fp8("a.dtype", a.dtype)
    reference.require_one_of("out_layout", out_layout, reference.OUT_LAYOUTS)
    values = b.values
    if values.ndim != 2 or values.shape[1] != a.k:
        raise ValueError(f"b.values.shape={values.shape} must be (n, k={a.k})")
    n = values.shape[0]
    reference_fp8.require_scale("a.scale", a.scale, a.m)
    reference_fp8.require_scale("b.scale", b.scale, n)
    pads = [(0, reference.padded(n, _N_MULTIPLE) - n), (0, reference.padded(a.k) - a.k)]
    if any(after for _, after in pads):
        values = jnp.pad(values, pads)
    out = registry.spmm24_fp8(
        a.values,
        a.metadata,
        values,
        a_scale=_padded_scale(a.scale, a.values.shape[0]),
        b_scale=_padded_scale(b.scale, values.shape[0]),
        out_layout=out_layout,
        epilogue=epilogue,
        out_dtype=jnp.dtype(out_dtype),
        backend=backend,
    )
    rows, cols = (a.m, n) if out_layout == "mn" else (n, a.m)
    return out[:rows, :cols]


def _padded_scale(scale: Array | None, rows: int) -> Array | None:
    if scale is None or not scale.ndim or scale.shape[0] == rows:
        return scale
    return jnp.pad(scale, (0, rows - scale.shape[0]))
