"""The same state with its layers in a list, or stacked along a leading axis.

Steps run fastest with layers unrolled, from a list. Programs that run rarely are better off with a
stack: they scan it and compile one layer instead of all of them, which would take minutes. Here a
state moves from one form to the other, array by array, so that at no time much of it exists twice.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from train.config import Config
from train.tree import names

Tree = TypeVar("Tree")
Key = tuple[str | int, ...]


def stacked_config(config: Config) -> Config:
    """The same run with its layers stacked."""
    return dataclasses.replace(config, model=dataclasses.replace(config.model, scan_layers=True))


def _without_layer(path: tuple[Any, ...]) -> tuple[Key, int | None]:
    """The key of a leaf in a stack, and its layer if it is one of a list."""
    keys = names(path)
    if "blocks" in keys:
        at = keys.index("blocks") + 1
        if at < len(keys) and isinstance(keys[at], int):
            return (*keys[:at], *keys[at + 1 :]), int(keys[at])
    return keys, None


def _arranged(tree: Any) -> dict[tuple[Key, int | None], Any]:
    return {_without_layer(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def stacked(state: Tree, like: Tree) -> Tree:
    """A state with its layers stacked, of one that has them in a list, which is given away.

    Args:
      state: any tree in which layers stand in a list under `blocks`; their arrays are deleted.
      like: the result's shapes, dtypes and shardings.
    """
    given = _arranged(state)

    def make(path: tuple[Any, ...], want: jax.ShapeDtypeStruct) -> jax.Array:
        key, _ = _without_layer(path)
        if (key, None) in given:
            return given[key, None]
        stack = _empty(want)()
        for i in range(want.shape[0]):
            layer = given[key, i]
            stack = _put(want, _abstract(layer))(stack, layer, np.int32(i))
            layer.delete()
        return stack

    return jax.tree_util.tree_map_with_path(make, like)


def unstacked(state: Tree, like: Tree) -> Tree:
    """The opposite of `stacked`, of a state that is given away.

    Args:
      state: any tree in which layers are stacked under `blocks`; those arrays are deleted.
      like: the result's shapes, dtypes and shardings.
    """
    given = _arranged(state)
    wanted = _layers(like)
    found: dict[tuple[Key, int | None], jax.Array] = {}
    # The largest first: what is freed on the way has room for those that follow.
    for key in sorted(wanted, key=lambda key: -given[key, None].size):
        stack = given[key, None]
        for i, want in enumerate(wanted[key]):
            found[key, i] = _take(_abstract(stack), want)(stack, np.int32(i))
        stack.delete()

    def make(path: tuple[Any, ...], _: Any) -> jax.Array:
        key, layer = _without_layer(path)
        return given[key, None] if layer is None else found[key, layer]

    return jax.tree_util.tree_map_with_path(make, like)


def compile_moves(as_list: Any, as_stack: Any) -> None:
    """Compiles what `stacked` and `unstacked` run for these states, so that neither waits for it.

    Args:
      as_list, as_stack: shapes, dtypes and shardings of the two forms.
    """
    stacks = _arranged(as_stack)
    for key, layers in _layers(as_list).items():
        stack, layer = stacks[key, None], layers[0]
        _empty(stack), _put(stack, layer), _take(stack, layer)


def _layers(tree: Any) -> dict[Key, list[Any]]:
    """The leaves of all layers by their key, in order."""
    found: dict[Key, dict[int, Any]] = {}
    for (key, layer), leaf in _arranged(tree).items():
        if layer is not None:
            found.setdefault(key, {})[layer] = leaf
    return {key: [leaves[i] for i in range(len(leaves))] for key, leaves in found.items()}


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


# Compiled once for each shape and placement; the layer's number is data.
_INDEX = jax.ShapeDtypeStruct((), jnp.int32)


@functools.cache
def _empty(stack: jax.ShapeDtypeStruct) -> Callable[[], jax.Array]:
    make = lambda: jnp.zeros(stack.shape, stack.dtype)
    return jax.jit(make, out_shardings=stack.sharding).lower().compile()


@functools.cache
def _put(stack: jax.ShapeDtypeStruct, layer: jax.ShapeDtypeStruct) -> Callable[..., jax.Array]:
    put = lambda stack, layer, i: jax.lax.dynamic_update_index_in_dim(stack, layer, i, 0)
    jitted = jax.jit(put, donate_argnums=0, out_shardings=stack.sharding)
    return jitted.lower(stack, layer, _INDEX).compile()


@functools.cache
def _take(stack: jax.ShapeDtypeStruct, layer: jax.ShapeDtypeStruct) -> Callable[..., jax.Array]:
    take = lambda stack, i: jax.lax.dynamic_index_in_dim(stack, i, 0, keepdims=False)
    return jax.jit(take, out_shardings=layer.sharding).lower(stack, _INDEX).compile()
