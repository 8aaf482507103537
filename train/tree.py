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
    tree: Any,
    functions: Mapping[str, Callable[[jax.Array, Any], jax.Array]],
    per_layer: Any,
    *,
    in_place: bool = False,
) -> Any:
    """Applies functions[name](leaf, per_layer), layer by layer, to the named leaves of every FFN.

    Args:
      tree: any tree in which layers stand under `blocks`, either stacked or as a list.
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
        if len(keys) < 2 or keys[-2] != "ffn" or name not in functions:
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
