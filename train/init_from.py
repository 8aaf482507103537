"""A new run that starts from the parameters of another one, or of an imported model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from train.checkpoint import Checkpointer, read_config
from train.config import Config
from train.data.source import choose_tokenizer
from train.data.tokenizer import Tokenizer, load_tokenizer
from train.mesh import state_shardings
from train.run_folder import CHECKPOINTS
from train.state import TrainState
from train.trained import TOKENIZER_FILE, abstract_parameters, config_from_dict
from train.tree import names

FREE = (
    "init_scale",
    "output_scale",
    "embedding_scale",
    "head_scale",
    "scan_layers",
    "remat",
    "norm",
    "attention",
    "compute_dtype",
    "loss_chunk",
    "logits",
    "ffn_precision",
)
"""Fields of the model that decide how it is initialised, stored and computed, not which function
it is."""


def check_init_from(config: Config) -> None:
    """Refuses an `init_from` whose model is not that of this run, before anything starts.

    Args:
      config: the resolved run.

    Raises:
      ValueError: no such run or checkpoint, or a model that differs; one line.
    """
    if config.init_from is None:
        return
    theirs, ours = dataclasses.asdict(_source(config).model), dataclasses.asdict(config.model)
    different = [
        f"model.{name} is {theirs[name]} there, {ours[name]} here"
        for name in ours
        if name not in FREE and theirs[name] != ours[name]
    ]
    if different:
        raise ValueError(f"init_from={config.init_from!r} has another model: {different[0]}")


def with_parameters_from(config: Config, state: TrainState, mesh: Mesh) -> tuple[TrainState, int]:
    """A new state with the parameters of `config.init_from`; everything else as it is, but for the
    biases by which the tokens of a mixture choose their experts.

    Args:
      config: the resolved run, with an `init_from` that `check_init_from` passes.
      state: new; its parameters are deleted first, to make room.
      mesh: where the parameters will live.

    Returns:
      The state, and the step of the checkpoint that was read.

    Raises:
      ValueError: no good checkpoint.
      CheckpointError: it cannot be read.
    """
    folder = _checkpoints(config)
    shapes = _taken(config, **abstract_parameters(_source(config)))
    template = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )
    own = _taken(config, state.params, state.routing)
    like = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), own)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, own)
    jax.tree.map(lambda a: a.delete(), state.params)
    with Checkpointer(folder, keep=1, config=read_config(folder)) as checkpointer:
        restored = checkpointer.restore(template, partial=True)
    if restored is None:
        raise ValueError(f"no checkpoint in {folder}")
    arrange = lambda found: {part: _arranged(found[part], like[part]) for part in like}
    taken = jax.jit(arrange, out_shardings=shardings)(restored.state)
    routing = state.routing
    if "routing" in taken:
        routing = nnx.merge_state(routing, taken["routing"])
    return dataclasses.replace(state, params=taken["params"], routing=routing), restored.step


def _taken(config: Config, params: Any, routing: Any) -> dict[str, Any]:
    """What a run takes from its source, of what a state has.

    The biases by which tokens choose their experts are part of the function of a mixture, in dense
    phases too. Clusters of neurons, and what belongs to them, are made anew.
    """
    if not config.model.experts:
        return {"params": params}
    biases = nnx.filter_state(routing, lambda path, _: path[-2:] == ("ffn", "bias"))
    return {"params": params, "routing": biases}


def other_tokenizer(config: Config, tokenizer: Tokenizer) -> bool:
    """Whether the parameters are known to have been trained on the ids of another tokenizer."""
    folder, source = Path(str(config.init_from)), _source(config)
    own = folder / TOKENIZER_FILE
    try:
        theirs = (
            load_tokenizer(own, source.data.end_of_document)
            if own.is_file()
            else choose_tokenizer(source.data)
        )
    except (ValueError, OSError):
        return False  # its data are not here
    return theirs.fingerprint != tokenizer.fingerprint


def _checkpoints(config: Config) -> Path:
    folder = Path(str(config.init_from)) / CHECKPOINTS
    if not folder.is_dir():
        raise ValueError(
            f"init_from={config.init_from!r} is no run's folder: there is no {CHECKPOINTS}/ in it"
        )
    return folder


def _source(config: Config) -> Config:
    return config_from_dict(Config, read_config(_checkpoints(config)))


def _arranged(params: Any, like: Any) -> Any:
    """Parameters in the tree of `like`, whichever of the two has its layers stacked."""
    found = {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}

    def leaf(path: tuple[Any, ...], wanted: jax.ShapeDtypeStruct) -> jax.Array:
        keys = names(path)
        if keys in found:
            return found[keys]
        if isinstance(keys[1], int):
            return found[(keys[0], *keys[2:])][keys[1]]
        layers = wanted.shape[0]
        return jnp.stack([found[(keys[0], i, *keys[1:])] for i in range(layers)])

    return jax.tree_util.tree_map_with_path(leaf, like)
