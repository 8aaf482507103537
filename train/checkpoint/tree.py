"""From a pytree to named arrays and back, whatever its containers are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

Layout = dict[str, dict[str, Any]]
"""Shape and dtype of every leaf by its name, as JSON."""


def named_leaves(tree: Any) -> tuple[dict[str, Any], Any]:
    """The leaves of a pytree by dotted path (`params.blocks.ffn.w1.value`), and its structure.

    Raises:
      ValueError: if there is no leaf, or two have the same name.
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in paths}
    if not leaves:
        raise ValueError("state has no arrays")
    if len(leaves) != len(paths):
        raise ValueError("two leaves of state have the same name: do not use '.' in keys")
    return leaves, structure


def to_arrays(leaves: dict[str, Any]) -> tuple[dict[str, jax.Array], Layout]:
    """Leaves as what is stored, and their layout: raw data for random keys, arrays for scalars.

    Arrays without elements are in the layout only.

    Raises:
      ValueError: if a leaf is no array or number, or JAX cannot hold its values.
    """
    arrays, layout = {}, {}
    for name, leaf in leaves.items():
        try:
            array = leaf if isinstance(leaf, jax.Array) else jnp.array(leaf)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"{name}={leaf!r} cannot be stored as an array") from error
        if isinstance(leaf, np.ndarray | np.generic) and array.dtype != leaf.dtype:
            raise ValueError(f"{name} is {leaf.dtype}, which JAX would narrow to {array.dtype}")
        layout[name] = _describe(array)
        if array.size:
            arrays[name] = jax.random.key_data(array) if _is_key(array) else array
    return arrays, layout


def check_layout(saved: Layout, template: dict[str, Any], *, partial: bool) -> None:
    """Refuses a template that is not of the saved form.

    Raises:
      ValueError: one line that names the first leaf that differs.
    """
    wanted = {name: _describe(leaf) for name, leaf in template.items()}
    for name, layout in wanted.items():
        if name not in saved:
            raise ValueError(f"the checkpoint has no {name}")
        if saved[name] != layout:
            raise ValueError(
                f"{name} is {_show(saved[name])} in the checkpoint, {_show(layout)} now"
            )
    surplus = [] if partial else [name for name in saved if name not in wanted]
    if surplus:
        raise ValueError(f"the checkpoint's {surplus[0]} has no place in the state")


def restore_args(template: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Orbax's item and restore arguments for a template, which say where every array will live."""
    items, args = {}, {}
    for name, leaf in template.items():
        abstract = _abstract(leaf)
        if not abstract.size:
            continue
        sharding = _sharding(leaf)
        if _is_key(abstract):
            abstract = jax.eval_shape(jax.random.key_data, abstract)
            # The data has one dimension more than the keys; a key is never split.
            if isinstance(sharding, jax.sharding.NamedSharding):
                spec = (*sharding.spec, *[None] * (abstract.ndim - 1 - len(sharding.spec)), None)
                sharding = sharding.update(spec=jax.sharding.PartitionSpec(*spec))
        items[name] = jax.ShapeDtypeStruct(abstract.shape, abstract.dtype, sharding=sharding)
        args[name] = ocp.ArrayRestoreArgs(
            sharding=sharding, global_shape=abstract.shape, dtype=abstract.dtype
        )
    return items, args


def from_arrays(template: dict[str, Any], arrays: dict[str, jax.Array]) -> list[Any]:
    """The stored arrays as leaves of the template's kinds, in the template's order."""
    return [_leaf(leaf, arrays.get(name)) for name, leaf in template.items()]


def _leaf(template: Any, array: jax.Array | None) -> Any:
    abstract = _abstract(template)
    if array is None:
        empty = jnp.zeros(abstract.shape, np.uint32 if _is_key(abstract) else abstract.dtype)
        array = jax.device_put(empty, _sharding(template))
    if _is_key(abstract):
        return jax.random.wrap_key_data(array, impl=_key_implementation(abstract))
    if isinstance(template, bool | int | float | complex):
        return type(template)(array.item())
    return array


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.eval_shape(lambda: jnp.asarray(leaf))


def _sharding(leaf: Any) -> jax.sharding.Sharding:
    sharding = getattr(leaf, "sharding", None)
    return sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


def _describe(leaf: Any) -> dict[str, Any]:
    abstract = _abstract(leaf)
    return {"shape": list(abstract.shape), "dtype": str(abstract.dtype)}


def _show(layout: dict[str, Any]) -> str:
    return f"{layout['dtype']}{layout['shape']}"


def _is_key(leaf: Any) -> bool:
    return jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _key_implementation(abstract: jax.ShapeDtypeStruct) -> Any:
    # JAX tells the implementation of an array of keys only, which a tracer of that dtype is.
    found: list[Any] = []
    jax.eval_shape(lambda keys: found.append(jax.random.key_impl(keys)), abstract)
    return found[0]
