"""Packed sparse arrays as pytrees."""

import dataclasses
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from kernels import reference, reference_fp8, registry
from kernels.reference import Mode
from sparsejax import fp8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sparse24:
    """A matrix that is 2:4 along one axis, packed for sparse tensor cores.

    `values` and `metadata` are the pytree's leaves; the rest is static. As the sparse operand of a
    product the matrix is A (m, k) with k = shape[axis] the contracted axis and m the other one,
    both padded with zeros to multiples of 64. A leading axis on both leaves makes a stack of
    matrices, for `jax.vmap` and `jax.lax.scan`.
    """

    values: Array
    """The kept elements: (m, k/2)."""

    metadata: Array
    """Their positions: (m/64, k/64, 128) int32. `kernels.reference` has the order of the bits, and
    `kernels.reference_fp8` that of 8-bit floats."""

    shape: tuple[int, int] = dataclasses.field(metadata={"static": True})
    """Of the dense matrix, without padding."""

    axis: Literal[0, 1] = dataclasses.field(metadata={"static": True})
    """The axis that groups of four run along."""

    scale: Array | None = None
    """What to multiply the values by, for 8-bit floats: float32, a scalar or one for each row of
    the sparse operand, (m,) without padding. None is 1."""

    @property
    def dtype(self) -> jnp.dtype:
        """dtype of the values."""
        return self.values.dtype

    @property
    def ndim(self) -> int:
        return 2

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata: padding aside, 9/16 of a dense 16-bit matrix, or 5/8 of a
        dense 8-bit one."""
        return self.values.nbytes + self.metadata.nbytes

    @property
    def m(self) -> int:
        """Rows of the sparse operand, without padding."""
        return self.shape[1 - self.axis]

    @property
    def k(self) -> int:
        """Contracted size of the sparse operand, without padding."""
        return self.shape[self.axis]

    @property
    def T(self) -> "Sparse24":
        """The transposed matrix: the same arrays, read with the axes exchanged."""
        return dataclasses.replace(
            self, shape=(self.shape[1], self.shape[0]), axis=0 if self.axis == 1 else 1
        )

    def unpack(self) -> Array:
        """The dense matrix, of this shape and dtype; exact. Of 8-bit floats float32, scaled.

        Raises:
          ValueError: the arrays do not fit the shape.
        """
        in_8_bits = fp8.is_fp8(self.dtype)
        packing = reference_fp8 if in_8_bits else reference
        packing.require_packed(self.values, self.metadata)
        found = (self.values.shape[0], 2 * self.values.shape[1])
        expected = (reference.padded(self.m), reference.padded(self.k))
        if found != expected:
            raise ValueError(f"packed (m, k)={found} must be {expected} for shape={self.shape}")
        if in_8_bits:
            a = reference_fp8.unpack24_fp8(self.values, self.metadata).astype(jnp.float32)
        else:
            a = reference.unpack24(self.values, self.metadata)
        a = a[: self.m, : self.k]
        if self.scale is not None:
            a = a * self.scale.reshape(-1, 1)
        return a.T if self.axis == 0 else a


def require_sparse24(name: str, value: object) -> None:
    """Refuses what is not packed.

    Raises:
      ValueError: one line with the argument's name and what it is.
    """
    if not isinstance(value, Sparse24):
        raise ValueError(f"{name} must be a Sparse24 (sparsejax.pack), not {type(value).__name__}")


def pack(
    x: ArrayLike,
    *,
    axis: Literal[0, 1],
    mode: Mode,
    scale: ArrayLike | None = None,
    dtype: DTypeLike = jnp.bfloat16,
    scaling: fp8.Scaling = "row",
    backend: registry.Backend | None = None,
) -> Sparse24:
    """Makes a matrix 2:4 along `axis` and packs it, in one pass over memory on a GPU.

    `unpack` gives x back exactly if x is 2:4 along `axis`, `mode` is "magnitude", `scale` is None
    and `dtype` holds x's values; -0.0 may come back as 0.0.

    Two elements of each group are kept, ties to the lower index. NaN outranks every number, so up
    to two NaNs in a group are kept, never dropped in favour of a number; infinities are kept as the
    largest numbers. A soft threshold of a group with three infinities is inf - inf, NaN.

    Args:
      x: (rows, cols), float32, bfloat16 or float16; any size, padded inside.
      axis: 0 or 1, the axis that groups of four run along: the one that products contract.
      mode: "magnitude" or "value" keep the two largest in that order; "soft_threshold" also
        subtracts the third-largest magnitude (`sparsejax.prune.soft_threshold`).
      scale: None or float32 scalar, multiplied in before the values are rounded.
      dtype: of the packed values, bfloat16 or float16 (float32 on the reference backend only), or
        an 8-bit float: then the values are scaled to its range by the largest magnitudes of x (one
        more pass over x), and the result keeps their `scale`.
      scaling: of 8-bit floats: one scale for each "row" of the sparse operand, or for the "tensor".
      backend: a kernel backend (strict), or None for the fastest.

    Raises:
      ValueError: an argument is not allowed.
      NotImplementedError: the named backend does not serve this device or shape.
    """
    x = jnp.asarray(x)
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"{x.shape=} must have two axes, neither of them empty")
    reference.require_float("x.dtype", x.dtype)
    if not fp8.is_fp8(dtype):
        reference.require_float("dtype", dtype)
    reference.require_one_of("scaling", scaling, get_args(fp8.Scaling))
    reference.require_one_of("axis", axis, (0, 1))
    reference.require_one_of("mode", mode, reference.MODES)
    if scale is not None and jnp.shape(scale) != ():
        raise ValueError(f"{jnp.shape(scale)=} must be that of a scalar")
    if fp8.is_fp8(dtype):
        largest = jnp.max(jnp.abs(x), axis=axis if scaling == "row" else None)
        largest = largest.astype(jnp.float32)
        if scale is not None:
            largest = jnp.abs(jnp.asarray(scale, jnp.float32)) * largest
        kept_scale = fp8.scale_for(largest, dtype)
        inverse = (1.0 if scale is None else jnp.asarray(scale, jnp.float32)) / kept_scale
        # What saturates with a scale of the present tensor is infinite, and has a scale of NaN.
        values, metadata, _ = registry.pack24_fp8(
            x, axis=axis, mode=mode, scale=inverse, dtype=dtype, backend=backend
        )
        return Sparse24(values, metadata, (x.shape[0], x.shape[1]), axis, kept_scale)
    values, metadata = registry.pack24(
        x, axis=axis, mode=mode, scale=scale, dtype=dtype, backend=backend
    )
    return Sparse24(values, metadata, (x.shape[0], x.shape[1]), axis)
