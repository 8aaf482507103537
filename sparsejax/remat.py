"""What a rematerialised block keeps: results of matrix products, whichever kernel made them."""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from jax.ad_checkpoint import checkpoint_name

PRODUCT = "sparsejax_product"
"""Name of values that `keep` marks, for `jax.checkpoint_policies`."""

Tree = TypeVar("Tree")


def keep(tree: Tree) -> Tree:
    """Marks arrays that cost a matrix product to make again; `products` keeps them."""
    return jax.tree.map(lambda leaf: checkpoint_name(leaf, PRODUCT), tree)


def products(primitive: Any, *avals: Any, **params: Any) -> bool:
    """A policy for `jax.checkpoint`: keeps what `keep` marks, results of products without batch
    axes, and those of fused attention kernels. Everything elementwise is made again."""
    if primitive.name == "name":
        return params["name"] == PRODUCT
    if primitive.name.startswith("dot_product_attention_fwd"):
        return True
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *avals, **params)
