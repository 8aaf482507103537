"""Root-mean-square normalisation, over the width of the model or of a head."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from kernels import registry
from sparsejax.remat import keep
from sparsejax.sharding import current_mesh
from train import scopes
from train.mesh import FFN_AXES


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation (arXiv 1910.07467) in float32, with a learned gain.

    With `by="kernel"` the kernels of `kernels.registry` compute it and its derivative. They keep
    the result, which a product after it keeps anyway, and not the input.
    """

    def __init__(self, width: int, eps: float, by: Literal["kernel", "xla"] = "xla"):
        self.eps = eps
        self.by = by
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., D) to an array like it."""
        return self.with_input(x)[1]

    def with_input(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x as it is, and normalised: a kernel adds the gradients of both on its way, where a sum
        of its own would read and write them once more."""
        with jax.named_scope(scopes.NORM):
            scale = self.scale[...]
            mesh = current_mesh(FFN_AXES)
            if self.by == "xla" or not _divides(mesh, x):
                y = x.astype(jnp.float32)
                y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
                return x, (y * scale).astype(x.dtype)
            return _norm(x, scale, _Options(self.eps, mesh))


def _divides(mesh: AbstractMesh | None, x: jax.Array) -> bool:
    """Whether each device of the mesh has rows of its own."""
    return mesh is None or x.shape[0] % math.prod(mesh.shape[a] for a in FFN_AXES.batch) == 0


@dataclasses.dataclass(frozen=True)
class _Options:
    """Static part of a call."""

    eps: float
    mesh: AbstractMesh | None

    def spread(self, function, in_specs, out_specs):
        """`function` on each device's rows, if there is a mesh."""
        if self.mesh is None:
            return function
        # Kernels carry no types of varying axes, hence no check.
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
        )


_ROWS = P(FFN_AXES.batch)


def _as_rows(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _norm(x: jax.Array, scale: jax.Array, options: _Options) -> tuple[jax.Array, jax.Array]:
    """x and its normalised rows."""
    return _norm_fwd(x, scale, options)[0]


def _norm_fwd(x, scale, options):
    def local(x, scale):
        y, rstd = registry.rms_norm(_as_rows(x), scale, eps=options.eps)
        return y.reshape(x.shape), rstd

    y, rstd = keep(options.spread(local, (_ROWS, P()), (_ROWS, _ROWS))(x, scale))
    return (x, y), (y, rstd, scale)


def _norm_bwd(options, saved, gradients):
    passed, g = gradients

    def local(y, rstd, scale, g, passed):
        rows = (_as_rows(a) for a in (g, passed))
        dx, partial = registry.rms_norm_backward(_as_rows(y), rstd, scale, *rows)
        return dx.reshape(y.shape), partial

    spread = options.spread(local, (_ROWS, _ROWS, P(), _ROWS, _ROWS), (_ROWS, _ROWS))
    dx, partial = spread(*saved, g, passed)
    return dx, jnp.sum(partial, axis=0)


_norm.defvjp(_norm_fwd, _norm_bwd)
