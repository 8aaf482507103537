"""Finding parameters by name in any tree that mirrors the model: gradients, Adam's moments, ..."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def names(path: tuple[Any, ...]) -> tuple[str | int, ...]:
    """The keys of a path as strings and integers, without the `.value` of an NNX variable."""
    keys: list[str | int] = []
    for key in path:
        attribute = next(a for a in ("key", "idx", "name") if hasattr(key, a))
        keys.append(getattr(key, attribute))
    return tuple(keys[:-1] if keys and keys[-1] == "value" else keys)


LeafFunction = Callable[[jax.Array, Any], jax.Array]


def map_ffn_leaves(
    tree: Any,
    functions: Mapping[str, LeafFunction],
    per_layer: Any,
    *,
    in_place: bool = False,
) -> Any:
    """As `map_block_leaves`, for the leaves of every FFN."""
    return map_block_leaves(tree, "ffn", functions, per_layer, in_place=in_place)


def map_block_leaves(
    tree: Any,
    part: str,
    functions: Mapping[str, LeafFunction],
    per_layer: Any,
    *,
    in_place: bool = False,
) -> Any:
    """Applies functions[name](leaf, per_layer), layer by layer, to the named leaves of a part of
    every block.

    Args:
      tree: any tree in which layers stand under `blocks`, either stacked or as a list.
      part: such as "ffn".
      functions: by the leaf's name, such as "w1".
      per_layer: an array or tree of arrays with a leading axis over the layers.
      in_place: for results like their leaves: stacked layers one after another, each into its
        place, so that a donated leaf need not exist twice.

    Returns:
      `tree` with those leaves replaced; every other leaf as it is.
    """

    def visit(path, leaf):
        keys = names(path)
        name = str(keys[-1]) if keys else ""
        if len(keys) < 2 or keys[-2] != part or name not in functions:
            return leaf
        function = functions[name]
        layer = keys[keys.index("blocks") + 1]
        if isinstance(layer, int):
            return function(leaf, jax.tree.map(lambda a: a[layer], per_layer))
        return (_one_by_one if in_place else jax.vmap)(function)(leaf, per_layer)

    return jax.tree_util.tree_map_with_path(visit, tree)


def _one_by_one(function: Callable[[jax.Array, Any], jax.Array]) -> Callable[..., jax.Array]:
    """`jax.vmap` of a function whose result is like its first argument, as a loop."""

    def body(i: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        stack, per_layer = carry
        layer = jax.tree.map(lambda a: a[i], per_layer)
        return stack.at[i].set(function(stack[i], layer)), per_layer

    return lambda stack, rest: jax.lax.fori_loop(0, stack.shape[0], body, (stack, rest))[0]


def has_leaf(tree: Any, part: str, name: str) -> bool:
    """Whether a part of every block has a leaf of that name."""
    blocks = tree["blocks"]
    return name in (blocks[part] if part in blocks else blocks[0][part])


def block_leaf(tree: Any, part: str, name: str) -> jax.Array:
    """The named leaf of a part of every block, with a leading axis over the layers."""
    blocks = tree["blocks"]
    if part in blocks:
        return blocks[part][name][...]
    return jnp.stack([blocks[i][part][name][...] for i in range(len(blocks))])
