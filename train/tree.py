"""Finding parameters by name in any tree that mirrors the model: gradients, Adam's moments, ..."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax


def names(path: tuple[Any, ...]) -> tuple[str | int, ...]:
    """The keys of a path as strings and integers, without the `.value` of an NNX variable."""
    keys: list[str | int] = []
    for key in path:
        attribute = next(a for a in ("key", "idx", "name") if hasattr(key, a))
        keys.append(getattr(key, attribute))
    return tuple(keys[:-1] if keys and keys[-1] == "value" else keys)


def map_ffn_leaves(
    tree: Any, functions: Mapping[str, Callable[[jax.Array, Any], jax.Array]], per_layer: Any
) -> Any:
    """Applies functions[name](leaf, per_layer), layer by layer, to the named leaves of every FFN.

    Args:
      tree: any tree in which layers stand under `blocks`, either stacked or as a list.
      functions: by the leaf's name, such as "w1".
      per_layer: an array or tree of arrays with a leading axis over the layers.

    Returns:
      `tree` with those leaves replaced; every other leaf as it is.
    """

    def visit(path, leaf):
        keys = names(path)
        name = str(keys[-1]) if keys else ""
        if len(keys) < 2 or keys[-2] != "ffn" or name not in functions:
            return leaf
        function = functions[name]
        layer = keys[keys.index("blocks") + 1]
        if isinstance(layer, int):
            return function(leaf, jax.tree.map(lambda a: a[layer], per_layer))
        return jax.vmap(function)(leaf, per_layer)

    return jax.tree_util.tree_map_with_path(visit, tree)
