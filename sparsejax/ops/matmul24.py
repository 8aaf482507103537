"""x @ W with a soft-thresholded 2:4 weight, differentiable, each product where it is fastest."""

import dataclasses
import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from kernels import reference, registry
from sparsejax import fp8
from sparsejax.formats import Sparse24, pack, require_sparse24
from sparsejax.ops import matmul24_fp8
from sparsejax.ops.spmm24 import spmm24
from sparsejax.prune import mvue24
from sparsejax.remat import keep
from sparsejax.spec import WeightGradient

SampledOperand = Literal["dy", "x"]
Precision = Literal["fp8"]

PROBE_SIZE = 4
"""Of a `probe`: overflowed and underflowed elements of x, then of dy."""


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static part of a call: hashable, so that it can be an argument of a custom_vjp."""

    weight_gradient: WeightGradient
    sampled: SampledOperand
    backend: registry.Backend | None
    w_dtype: jnp.dtype | None  # None: no gradient for the weight
    fp8: bool = False


def _dot(a: Array, b: Array, contract: tuple[int, int], out_dtype: DTypeLike) -> Array:
    """Dense product; float32 accumulation is the tensor cores' own for 16-bit operands."""
    return lax.dot_general(
        a,
        b,
        dimension_numbers=(((contract[0],), (contract[1],)), ((), ())),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=out_dtype,
    )


def _sampled_weight_gradient(x: Array, dy: Array, key: Array, options: _Options) -> Array:
    """x^T dy with one operand made 2:4 along the tokens, unbiased; (k, n) float32."""
    tokens = x.shape[0]
    sampled, other = (dy, x) if options.sampled == "dy" else (x, dy)
    sampled = jnp.pad(sampled, ((0, -tokens % reference.GROUP), (0, 0)))
    other = jnp.pad(other, ((0, -tokens % reference.GROUP), (0, 0)))
    operand = pack(
        # Packing a matrix that is 2:4 already by magnitude keeps it as it is.
        mvue24(sampled, key, axis=0),
        axis=0,
        mode="magnitude",
        dtype=x.dtype,
        backend=options.backend,
    )
    # A = dy^T gives (n, k), written transposed; A = x^T gives (k, n) as it is.
    out_layout: Literal["mn", "nm"] = "nm" if options.sampled == "dy" else "mn"
    return spmm24(
        operand,
        other,
        b_layout="kn",
        out_layout=out_layout,
        out_dtype=jnp.float32,
        backend=options.backend,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul24(
    options: _Options,
    x: Array,
    w: Array | None,
    packed: Sparse24,
    key: Array | None,
    probe: Array | None,
):
    del w, key, probe
    if options.fp8:
        return matmul24_fp8.forward(x, packed, options.backend)
    if packed.axis == 0:
        return spmm24(packed, x, b_layout="nk", out_layout="nm", backend=options.backend)
    return _dot(x, packed.unpack(), (1, 0), x.dtype)


def _matmul24_fwd(options, x, w, packed, key, probe):
    return keep(_matmul24(options, x, w, packed, key, probe)), (x, packed, key, probe)


def _matmul24_bwd(options: _Options, residuals, dy: Array):
    x, packed, key, probe = residuals
    if options.fp8:
        dx = matmul24_fp8.input_gradient(dy, packed, options.backend)
    elif packed.axis == 1:
        dx = spmm24(packed, dy, b_layout="nk", out_layout="nm", backend=options.backend)
    else:
        dx = _dot(dy, packed.unpack(), (1, 1), x.dtype)
    dw = None
    if options.w_dtype is not None:
        if options.weight_gradient == "dense":
            dw = _dot(x, dy, (0, 0), jnp.float32)
        else:
            dw = _sampled_weight_gradient(x, dy, key, options)
        dw = dw.astype(options.w_dtype)
    found = None if probe is None else matmul24_fp8.losses(x, dy, packed)
    # None is a zero cotangent: the gradient passes the packed weight by, straight to w.
    return dx, dw, None, None, found


_matmul24.defvjp(_matmul24_fwd, _matmul24_bwd)


def matmul24(
    x: ArrayLike,
    w: ArrayLike | Sparse24,
    *,
    axis: Literal[0, 1] = 0,
    beta: ArrayLike | None = None,
    packed: Sparse24 | None = None,
    weight_gradient: WeightGradient = "dense",
    sampled: SampledOperand = "dy",
    key: Array | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    precision: Precision | None = None,
    probe: Array | None = None,
    backend: registry.Backend | None = None,
) -> Array:
    """x @ (beta S(w)), S the soft threshold to 2:4 along `axis` of w (arXiv 2409.09099).

    A product runs on sparse tensor cores if the operand that is 2:4 is so along the axis that the
    product contracts. With x (T, k), w (k, n) and W = beta S(w), so:

    | product        | contracts | axis=0                | axis=1                |
    | -------------- | --------- | --------------------- | --------------------- |
    | y = x W        | k         | sparse                | dense, W thresholded  |
    | dx = dy W^T    | n         | dense, W thresholded  | sparse                |
    | dw = x^T dy    | T         | by `weight_gradient`  | by `weight_gradient`  |

    dx is exact: the derivative of the product as computed, with the same rounded W. dw goes
    straight through to the dense w, without threshold and beta:
    "dense" is x^T dy; "mvue24" makes one operand 2:4 along the tokens, without bias
    (`sparsejax.prune.mvue24`), and multiplies it on sparse tensor cores.

    x and w are rounded to `dtype`, products accumulate in float32, results are rounded once.

    With precision="fp8" the operands of y and dx are 8-bit floats, W and x float8_e4m3fn, dy
    float8_e5m2, scaled as `sparsejax.fp8` says; dw stays in 16 bits (`sparsejax.ops.matmul24_fp8`
    says why). Rounding has no derivative: gradients pass it straight through.

    Works under jit, vmap over leading axes of x, remat and scan; reverse-mode derivatives only.

    Args:
      x: (..., k), floating point.
      w: (k, n) master weight, floating point; or a `Sparse24` of that shape, which fixes axis and
        dtype and gets no gradient (for inference).
      axis: the axis of w that groups of four run along; its size must be a multiple of 4.
      beta: scalar scale, not differentiated; None for 1. Give it to `pack` if you pass `packed`.
      packed: beta S(w) packed before, by `pack(w, axis=axis, mode="soft_threshold", scale=beta)`
        (with dtype=jnp.float8_e4m3fn for "fp8"): once per optimiser step instead of once per
        call. The values then come from it alone, and w only receives the gradient. None packs w
        here.
      weight_gradient: "dense" or "mvue24".
      sampled: what "mvue24" samples: "dy" or "x".
      key: PRNG key, needed by "mvue24" and only used in the backward pass.
      dtype: of the computation and of the result: bfloat16 or float16 (float32 on the reference
        backend only).
      precision: None, or "fp8" for 8-bit operands, with dtype bfloat16. A `Sparse24` of 8-bit
        floats implies it.
      probe: with "fp8", float32 zeros (4,) that the value does not depend on. Its *gradient* is
        what rounding lost: elements that overflowed and that underflowed to zero, of x, then of dy.
        That is how a count leaves a backward pass; it costs another look at x and dy.
      backend: a kernel backend (strict), or None for the fastest.

    Returns:
      (..., n) in `dtype`. Gradients have the dtypes of x and w.

    Raises:
      ValueError: an argument is not allowed, or shapes and dtypes do not fit.
      NotImplementedError: the named backend does not serve this device, shape or dtype.
    """
    x = jnp.asarray(x)
    reference.require_one_of("axis", axis, (0, 1))
    reference.require_one_of("weight_gradient", weight_gradient, get_args(WeightGradient))
    reference.require_one_of("sampled", sampled, get_args(SampledOperand))
    if precision is not None:
        reference.require_one_of("precision", precision, get_args(Precision))
    in_8_bits = precision == "fp8"
    if isinstance(w, Sparse24):
        if packed is not None:
            raise ValueError("packed must be None where w is a Sparse24 already")
        packed, axis, master = w, w.axis, None
        in_8_bits = in_8_bits or fp8.is_fp8(w.dtype)
        dtype = dtype if in_8_bits else w.dtype
    else:
        master = jnp.asarray(w)
        reference.require_float("w.dtype", master.dtype)
    dtype = jnp.dtype(dtype)
    reference.require_float("x.dtype", x.dtype)
    reference.require_float("dtype", dtype)
    if in_8_bits and dtype != jnp.bfloat16:
        raise ValueError(f"dtype={dtype.name} must be bfloat16 with precision='fp8'")
    if probe is not None and (not in_8_bits or jnp.shape(probe) != (PROBE_SIZE,)):
        raise ValueError(f"{jnp.shape(probe)=} must be ({PROBE_SIZE},), with precision='fp8' only")
    stored = fp8.FORWARD if in_8_bits else dtype

    if packed is not None:
        require_sparse24("packed", packed)
    shape = packed.shape if master is None and packed is not None else jnp.shape(w)
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"w.shape={shape} must have two axes, neither of them empty")
    if shape[axis] % reference.GROUP:
        raise ValueError(f"w.shape={shape} must have a multiple of 4 along {axis=}")
    if x.ndim < 1 or x.shape[-1] != shape[0] or 0 in x.shape:
        raise ValueError(f"{x.shape=} must be (..., {shape[0]}) and not empty, for w.shape={shape}")
    if weight_gradient == "mvue24" and key is None and master is not None:
        raise ValueError("weight_gradient='mvue24' needs a key")
    if packed is None:
        assert master is not None
        packed = pack(
            lax.stop_gradient(master),
            axis=axis,
            mode="soft_threshold",
            scale=None if beta is None else lax.stop_gradient(beta),
            dtype=stored,
            backend=backend,
        )
    elif beta is not None:
        raise ValueError("beta must be None where the weight is packed already, with its scale")
    found = (packed.shape, packed.axis, packed.dtype)
    if found != (tuple(shape), axis, stored):
        raise ValueError(
            f"packed shape, axis and dtype {found} must be {(shape, axis, stored.name)}"
        )

    w_dtype = None if master is None else master.dtype
    options = _Options(weight_gradient, sampled, backend, w_dtype, in_8_bits)
    # Rounding x outside the custom_vjp gives dx the dtype of x by the rule for conversions.
    rows = x.reshape(-1, shape[0]).astype(dtype)
    y = _matmul24(options, rows, master, packed, key, probe)
    return y.reshape(*x.shape[:-1], shape[1])
