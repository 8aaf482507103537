"""Runs on disk without training: random weights in a real checkpoint."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.spec import Sparsity
from train.checkpoint import Checkpointer
from train.config import Config, ModelConfig, ScheduleConfig, resolve
from train.run_folder import CHECKPOINTS, write_config
from train.trained import abstract_parameters

MODEL = ModelConfig(width=32, num_layers=2, num_heads=4, num_kv_heads=2, hidden=64)


def random_parameters(config, seed=0):
    """Parameters and routing state with nothing left at its initial value: gains differ from 1."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        if "scale" in name or "beta" in name:
            return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), leaf.dtype)
        if "bias" in name:
            return jnp.zeros(leaf.shape, leaf.dtype)
        return jnp.asarray(rng.normal(size=leaf.shape) * config.model.width**-0.5, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, abstract_parameters(config))


def write_run(folder, *, step=0, sparse=False, seed=0, changes=None, **model):
    """A run's folder with a checkpoint of random weights; returns its resolved configuration."""
    config = Config(
        name=folder.name,
        output=str(folder.parent),
        steps=20,
        batch_size=2,
        sequence_length=64,
        model=dataclasses.replace(MODEL, **model),
        sparsity=Sparsity(m=8, v=4),
        schedule=ScheduleConfig(warmup_steps=4, sparse_fraction=0.5 if sparse else 0.0),
    )
    config = dataclasses.replace(config, **(changes or {}))
    config = resolve(config, tokenizer_vocab_size=257)
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    record = dataclasses.asdict(config)
    with Checkpointer(folder / CHECKPOINTS, keep=3, config=record) as checkpointer:
        state = {"step": jnp.int32(step), **random_parameters(config, seed)}
        checkpointer.save(step, state, {})
    return config


def full_logits(run, ids, packed=None):
    """(B, S) ids to (B, S, V) float32 logits, one forward pass over everything."""
    hidden, _ = run.model(jnp.asarray(ids, jnp.int32), packed)
    return jnp.dot(
        hidden, run.model.head[...].astype(hidden.dtype), preferred_element_type="float32"
    )
