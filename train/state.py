"""What a step changes: parameters, routing state, optimiser state, step and random key."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from sparsejax.nn.routed_ffn import RoutingState
from train.config import Config
from train.layers import stacked_config, unstacked
from train.mesh import state_shardings
from train.model import Llama


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """The whole state of training; one pytree, one checkpoint.

    Attributes:
      step: int32 scalar, optimiser steps done.
      params: the model's float32 parameters (nnx.State).
      routing: cluster centres, biases and thresholding scales (nnx.State); not trained.
      opt_state: AdamW's moments and counters.
      key: raw uint32 random key data, folded with the step where randomness is needed.
    """

    step: jax.Array
    params: Any
    routing: Any
    opt_state: Any
    key: jax.Array


def build_model(config: Config, key: jax.Array) -> Llama:
    """The model of a resolved configuration, initialised from `key`."""
    sparsity = config.sparsity if config.sparse_steps else None
    return Llama(config.model, sparsity, rngs=nnx.Rngs(params=key))


def model_graph(config: Config) -> nnx.GraphDef:
    """The model's static structure; with parameters and routing state it makes a model again."""
    abstract = nnx.eval_shape(lambda: build_model(config, jax.random.key(0)))
    return nnx.split(abstract, nnx.Param, RoutingState)[0]


def create_state(
    config: Config, optimizer: optax.GradientTransformation, seed: jax.typing.ArrayLike
) -> TrainState:
    """A new state from a seed (uint32); traceable, places nothing by itself."""
    root = jax.random.key(seed)
    model = build_model(config, jax.random.fold_in(root, 0))
    _, params, routing = nnx.split(model, nnx.Param, RoutingState)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        routing=routing,
        opt_state=optimizer.init(params),
        key=jax.random.key_data(jax.random.fold_in(root, 1)),
    )


def abstract_state(
    config: Config, optimizer: optax.GradientTransformation, mesh: Mesh
) -> TrainState:
    """Shapes, dtypes and shardings of the state, nothing allocated: the template of a restore."""
    shapes = jax.eval_shape(lambda: create_state(config, optimizer, np.uint32(0)))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


def init_state(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """A new state, created where it will live: no device ever holds much more than its shard."""
    like = abstract_state(config, optimizer, mesh)
    if not config.model.scan_layers:
        # The same numbers, from a program of one layer instead of all of them.
        return unstacked(init_state(stacked_config(config), optimizer, mesh), like)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like)
    # The seed is an argument, so that runs of all seeds share the program.
    create = jax.jit(lambda seed: create_state(config, optimizer, seed), out_shardings=shardings)
    return create(np.uint32(config.seed))
