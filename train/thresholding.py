"""The 2:4 matrices of a sparse phase as dense ones: beta S(w) (arXiv 2409.09099)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.prune import soft_threshold
from sparsejax.spec import Sparsity
from train.model import sparse_weights
from train.tree import LeafFunction, block_leaf, map_block_leaves


def thresholded(params: Any, routing: Any, sparsity: Sparsity, *, in_place: bool = False) -> Any:
    """Parameters with beta S(w) in place of every matrix w that a sparse step takes as 2:4.

    Args:
      params: parameters of all blocks, stacked or in a list.
      routing: their routing state, which has the scales beta.
      sparsity: says which matrices, of which layers.
      in_place: for parameters that are given away, see `map_block_leaves`.
    """
    for part, axes in sparse_weights(sparsity).items():
        beta = block_leaf(routing, part, "beta")
        functions = {name: _threshold(i, axis) for i, (name, axis) in enumerate(axes.items())}
        per_layer = beta, layers_that_are_sparse(beta.shape[0], sparsity)
        params = map_block_leaves(params, part, functions, per_layer, in_place=in_place)
    return params


def layers_that_are_sparse(layers: int, sparsity: Sparsity) -> jax.Array:
    """(L,) bool: all but the first `Sparsity.dense_layers`."""
    return jnp.arange(layers) >= sparsity.dense_layers


def _threshold(i: int, axis: int) -> LeafFunction:
    def threshold(w: jax.Array, of_layer: tuple[jax.Array, jax.Array]) -> jax.Array:
        beta, sparse = of_layer
        return jnp.where(sparse, beta[i] * soft_threshold(w, axis), w)

    return threshold
