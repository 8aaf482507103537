"""The device mesh and where every array lives on it."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from train.config import MeshConfig
from train.tree import names

AXES = ("data", "fsdp", "tensor")

# By parameter name; letters: v vocabulary, d width, n heads, h neurons.
SPECS = {
    "embedding": P("tensor", "fsdp"),  # emb_vd
    "head": P("fsdp", "tensor"),  # head_dv
    "q": P("fsdp", "tensor"),  # q_dn
    "k": P("fsdp", "tensor"),
    "v": P("fsdp", "tensor"),
    "out": P("tensor", "fsdp"),  # out_nd
    "w1": P("tensor", "fsdp"),  # ffw_hd
    "wg": P("tensor", "fsdp"),
    "w2": P("tensor", "fsdp"),
}
BATCH_SPEC = P(("data", "fsdp"), None)


def make_mesh(config: MeshConfig, batch_size: int) -> Mesh:
    """A mesh over all devices with axes data, fsdp and tensor.

    Raises:
      ValueError: if the axes do not multiply to the number of devices, or do not divide the batch.
    """
    count = jax.device_count()
    rest = config.fsdp * config.tensor
    if count % rest:
        raise ValueError(
            f"mesh.fsdp={config.fsdp} times mesh.tensor={config.tensor} must divide the {count} "
            "devices"
        )
    data = count // rest if config.data == -1 else config.data
    if data < 1 or data * rest != count:
        raise ValueError(
            f"mesh.data={config.data} mesh.fsdp={config.fsdp} mesh.tensor={config.tensor} must "
            f"multiply to the {count} devices"
        )
    if batch_size % (data * config.fsdp):
        raise ValueError(
            f"{batch_size=} must be a multiple of data times fsdp = {data * config.fsdp} devices"
        )
    # Auto axes: XLA shards what no specification names, and kernels stay free to use shard_map.
    return jax.make_mesh((data, config.fsdp, config.tensor), AXES, axis_types=(AxisType.Auto,) * 3)


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """Shardings for any tree that mirrors the model, by the leaf's name; the rest is replicated.

    A dimension that its axis does not divide stays whole.
    """

    def sharding(path, leaf):
        spec = next((SPECS[k] for k in reversed(names(path)) if k in SPECS), None)
        if spec is None or leaf.ndim < 2:
            return NamedSharding(mesh, P())
        axes = (None,) * (leaf.ndim - 2) + tuple(spec)
        fits = [
            a if a and n % mesh.shape[a] == 0 else None
            for a, n in zip(axes, leaf.shape, strict=True)
        ]
        return NamedSharding(mesh, P(*fits))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the devices."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
