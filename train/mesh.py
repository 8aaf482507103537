"""The device mesh and where every array lives on it.

Letters of the specs: b batch, t positions, d width, n heads, h head dimension or neurons,
v vocabulary. Parameters and their moments are spread over fsdp and tensor, the batch over data and
fsdp; matrix products read weights gathered over fsdp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from kernels.reference import TILE
from sparsejax import sharding
from sparsejax.spec import GROUP
from train.config import Config, MeshConfig
from train.tree import names

AXES = ("data", "fsdp", "tensor")
FFN_AXES = sharding.MeshAxes(batch=("data", "fsdp"), shard="fsdp", tensor="tensor")

# By parameter name.
SPECS = {
    "embedding": P("tensor", "fsdp"),  # emb_vd
    "head": P("fsdp", "tensor"),  # head_dv
    "q": P("fsdp", "tensor"),  # q_dn
    "k": P("fsdp", "tensor"),
    "v": P("fsdp", "tensor"),
    "out": P("tensor", "fsdp"),  # out_nd
    "w1": sharding.weight_spec(FFN_AXES),  # ffw_hd
    "wg": sharding.weight_spec(FFN_AXES),
    "w2": sharding.weight_spec(FFN_AXES),
}
BATCH_SPEC = P(("data", "fsdp"), None)
ACT_BTD = P(("data", "fsdp"), None, None)
ACT_BTNH = P(("data", "fsdp"), None, "tensor", None)


def make_mesh(
    config: MeshConfig, batch_size: int, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh with axes data, fsdp and tensor.

    Devices of one process are neighbours along tensor first, then fsdp, then data: the axes that
    talk most have the fastest links.

    Args:
      config: sizes of the axes.
      batch_size: sequences of a micro-batch.
      devices: those to use; None for all of them.

    Raises:
      ValueError: if the axes do not multiply to the number of devices, or do not divide the batch.
    """
    count = jax.device_count() if devices is None else len(devices)
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
            f"{batch_size=} of a micro-batch must be a multiple of data times fsdp = "
            f"{data * config.fsdp} devices"
        )
    # Auto axes: XLA shards what no specification names, and kernels stay free to use shard_map.
    shape = (data, config.fsdp, config.tensor)
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def check_mesh(config: Config, mesh: Mesh) -> None:
    """Refuses what the mesh cannot hold, before anything is compiled.

    Args:
      config: the resolved run.
      mesh: from `make_mesh`.

    Raises:
      ValueError: one line that names the values.
    """
    model, sparsity = config.model, config.sparsity
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    if model.experts and tensor > 1:
        raise ValueError(f"model.experts={model.experts} needs mesh.tensor=1, not {tensor}")
    for name, value, axis, size in (
        ("model.num_heads", model.num_heads, "tensor", tensor),
        ("model.num_kv_heads", model.kv_heads, "tensor", tensor),
        ("model.hidden", model.ffn_hidden, "tensor", tensor),
        ("model.vocab_size", model.vocab_size, "tensor", tensor),
        ("model.width", model.width, "fsdp", fsdp),
    ):
        if value is None or value % size:
            raise ValueError(f"{name}={value} must be a multiple of mesh.{axis}={size}")
    if not config.sparse_steps:
        return
    shards = sparsity.num_shards
    if shards != 1 and shards % tensor:
        raise ValueError(f"sparsity.shards={shards} must be 1 or a multiple of mesh.{tensor=}")
    block, groups = sparsity.m if sparsity.routing else GROUP, max(shards, tensor)
    if model.ffn_hidden % (block * groups):
        raise ValueError(
            f"model.hidden={model.ffn_hidden} must be a multiple of {block * groups}: clusters in "
            f"blocks of {block} neurons on each of {groups} tensor shards"
        )
    if model.width % (GROUP * fsdp):
        raise ValueError(
            f"model.width={model.width} must be a multiple of {GROUP} times mesh.{fsdp=}: groups "
            "of four weights stay on one device"
        )
    if sparsity.attention_projections and fsdp > 1 and model.width % (TILE * fsdp):
        raise ValueError(
            f"model.width={model.width} must be a multiple of {TILE} times mesh.{fsdp=} with "
            "sparsity.attention_projections: packed parts on every device"
        )
    devices = mesh.shape["data"] * fsdp
    tokens = config.tokens_per_micro_batch // devices
    if sparsity.routing and tokens % sparsity.v:
        raise ValueError(
            f"the {tokens} tokens of one device and micro-batch (batch_size={config.batch_size} x "
            f"sequence_length={config.sequence_length} / micro_batches={config.micro_batches} / "
            f"{devices} devices) must be a multiple of sparsity.v={sparsity.v}"
        )


def on_mesh() -> bool:
    """Whether the program being traced is for several devices."""
    return sharding.current_mesh(FFN_AXES) is not None


def constrain(x: jax.Array, spec: P) -> jax.Array:
    """An activation, placed by `spec`; as it is on one device."""
    return sharding.constrain(x, spec, FFN_AXES)


def gathered(w: jax.Array, dtype: Any, name: str) -> jax.Array:
    """The parameter `name` as a matrix product reads it, in `dtype` and whole along fsdp."""
    return sharding.gathered(w, dtype, SPECS[name], FFN_AXES)


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


def data_share(mesh: Mesh) -> tuple[int, int]:
    """Which part of each batch this process reads: (index, count), for `open_data`.

    Processes along the tensor axis read the same rows, so this need not be the process's number.

    Raises:
      ValueError: this process's devices do not hold one run of rows, equally long everywhere.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    spread = NamedSharding(mesh, P(("data", "fsdp")))
    indices = spread.addressable_devices_indices_map((rows,)).values()
    mine = {index[0].start or 0 for index in indices if index is not None}
    first, count = min(mine), len(mine)
    if mine != set(range(first, first + count)) or rows % count or first % count:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: the devices of process {jax.process_index()} must hold "
            f"consecutive parts of the batch, not {sorted(mine)} of {rows}"
        )
    return first // count, rows // count


def put_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Puts this process's rows of a batch on the devices."""
    sharding = NamedSharding(mesh, BATCH_SPEC)
    return {k: jax.make_array_from_process_local_data(sharding, v) for k, v in batch.items()}
