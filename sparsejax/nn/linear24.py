"""A linear layer whose weight is dense or 2:4, by the call."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from kernels.registry import Backend
from sparsejax import fp8
from sparsejax.formats import Sparse24, pack
from sparsejax.ops.matmul24 import Precision, SampledOperand, matmul24
from sparsejax.prune import soft_threshold_beta
from sparsejax.spec import GROUP, WeightGradient


class Beta(nnx.Variable):
    """Scale of a soft-thresholded weight: no optimiser sees it, every checkpoint holds it."""


class Linear24(nnx.Module):
    """y = x W + b with W dense, or beta S(W), 2:4 along `axis`.

    Parameters: kernel (in_features, out_features) and, with `use_bias`, bias (out_features,), both
    dense. State: beta, a float32 scalar `Beta`, whatever the phase, so that a change of phase
    changes no structure. Only `update_beta` mutates the module.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        axis: Literal[0, 1] = 0,
        use_bias: bool = False,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer | None = None,
        bias_init: Initializer | None = None,
        weight_gradient: WeightGradient = "dense",
        sampled: SampledOperand = "dy",
        precision: Precision | None = None,
        backend: Backend | None = None,
        rngs: nnx.Rngs,
    ):
        """Initialises the parameters, and beta from the kernel.

        Args:
          in_features: k. out_features: n.
          axis: of the kernel, that groups of four run along: 0 makes the forward product sparse, 1
            the input gradient (see `matmul24`).
          use_bias: adds a bias.
          dtype: of the products' operands and of the result. param_dtype: of the parameters.
          kernel_init: LeCun normal where None. bias_init: zeros where None.
          weight_gradient, sampled, precision, backend: as in `matmul24`, of the sparse call.
          rngs: stream `params`.

        Raises:
          ValueError: sizes that are not positive, or not a multiple of 4 along `axis`.
        """
        if in_features < 1 or out_features < 1:
            raise ValueError(f"{in_features=} and {out_features=} must be positive")
        if axis not in (0, 1):
            raise ValueError(f"{axis=} must be 0 or 1")
        shape = (in_features, out_features)
        if shape[axis] % GROUP:
            raise ValueError(f"kernel {shape=} must have a multiple of {GROUP} along {axis=}")
        self.in_features = in_features
        self.out_features = out_features
        self.axis = axis
        self.dtype = jnp.dtype(dtype)
        self.weight_gradient = weight_gradient
        self.sampled = sampled
        self.precision = precision
        self.backend = backend
        kernel_init = kernel_init or nnx.initializers.lecun_normal()
        bias_init = bias_init or nnx.initializers.zeros_init()
        self.kernel = nnx.Param(kernel_init(rngs.params(), shape, param_dtype))
        self.bias = (
            nnx.Param(bias_init(rngs.params(), (out_features,), param_dtype)) if use_bias else None
        )
        self.beta = Beta(soft_threshold_beta(self.kernel[...], axis))

    def update_beta(self) -> None:
        """Sets beta from the kernel as it is now: when a sparse phase begins, then leave it."""
        self.beta[...] = soft_threshold_beta(self.kernel[...], self.axis)

    def pack(self) -> Sparse24:
        """beta S(kernel), packed: once per optimiser step, for all calls with `packed=`."""
        return pack(
            self.kernel[...],
            axis=self.axis,
            mode="soft_threshold",
            scale=self.beta[...],
            dtype=fp8.FORWARD if self.precision == "fp8" else self.dtype,
            backend=self.backend,
        )

    def __call__(
        self,
        x: Array,
        *,
        sparse: bool,
        packed: Sparse24 | None = None,
        key: Array | None = None,
    ) -> Array:
        """Applies the layer.

        Args:
          x: (..., in_features), floating point.
          sparse: whether the weight is beta S(kernel) or the dense kernel; static.
          packed: the result of `pack` for this kernel, with `sparse` only; None packs here.
          key: PRNG key for weight_gradient="mvue24", with `sparse` only.

        Returns:
          (..., out_features) in the layer's dtype.

        Raises:
          ValueError: shapes that do not fit, or `packed` without `sparse`.
        """
        if x.ndim < 1 or x.shape[-1] != self.in_features:
            raise ValueError(f"{x.shape=} must end in in_features={self.in_features}")
        if sparse:
            y = matmul24(
                x,
                self.kernel[...],
                axis=self.axis,
                beta=None if packed is not None else self.beta[...],
                packed=packed,
                weight_gradient=self.weight_gradient,
                sampled=self.sampled,
                key=key,
                dtype=self.dtype,
                precision=self.precision,
                backend=self.backend,
            )
        else:
            if packed is not None:
                raise ValueError(f"{sparse=} takes no packed weight")
            y = x.astype(self.dtype) @ self.kernel[...].astype(self.dtype)
        return y if self.bias is None else y + self.bias[...].astype(self.dtype)
