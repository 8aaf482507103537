"""What happens between two steps: clusterings with the batch at hand, and changes of phase."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.prune import soft_threshold_beta
from sparsejax.schedule import Event, Phase
from sparsejax.spec import Sparsity
from train.compiler import compile_program
from train.config import Config, flips
from train.layers import compile_moves, stacked, stacked_config, unstacked
from train.model import sparse_weights
from train.optimizer import make_optimizer, reset_moments
from train.state import TrainState, abstract_state, model_graph
from train.step import Batch, Metrics, clustered
from train.thresholding import layers_that_are_sparse, thresholded
from train.tree import LeafFunction, block_leaf, has_leaf, map_block_leaves, map_ffn_leaves

EventFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
FlipFunction = Callable[[TrainState], TrainState]


def make_cluster_event(config: Config, graph: nnx.GraphDef, event: Event) -> EventFunction:
    """Clusters the neurons and sets the routing biases: (state, batch) to (state, what moved).

    The batch is that of the step to come; the first of its micro-batches goes through the sparse
    network once, forward, for the biases (`sparsity.fit_bias`) and to see which tokens move.

    Args:
      config: the run.
      graph: the model's structure.
      event: the start of the sparse phase, or a refresh.

    Returns:
      A function whose metrics are `neuron_churn`, (L,) float32, the share of neurons that changed
      expert (at the start: place), and, with routing, at a refresh `token_churn`, (L,) float32, the
      share of tokens that the new clusters and biases send to another expert.
    """
    sparsity, begin = config.sparsity, event == "begin"

    def routers(model: Any) -> Any:
        found = model.map_ffn(lambda ffn: ffn.clustering())
        if config.model.scan_layers:
            return found
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    def cluster(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        before = None if begin else routers(nnx.merge(graph, state.params, state.routing))
        state, plan = clustered(config, graph, state, begin=begin)
        metrics = {"neuron_churn": plan.churn}
        if sparsity.num_experts == 1 or (begin and not sparsity.fit_bias):
            return state, metrics
        # The rows of the first micro-batch, as the train step takes them.
        ids = batch["inputs"]
        ids = ids.reshape(-1, config.micro_batches, ids.shape[-1])[:, 0]
        model = nnx.merge(graph, state.params, state.routing)
        biases, churn = model.reroute(ids, model.pack(), before, fit=sparsity.fit_bias)
        new = {name: lambda _, found, name=name: found[name] for name in biases}
        routing = map_ffn_leaves(state.routing, new, biases)
        if not begin:
            metrics["token_churn"] = churn
        return dataclasses.replace(state, routing=routing), metrics

    return cluster


def lower_cluster_event(
    config: Config, event: Event, state: TrainState, batch: Mapping[str, Any]
) -> Callable[[], EventFunction]:
    """Traces `make_cluster_event` for a state that is given away.

    Layers in a list are stacked for it, and taken apart again.

    Args:
      config: the run.
      event: the start of the sparse phase, or a refresh.
      state: the state, or its shapes and shardings.
      batch: likewise a batch.

    Returns:
      What compiles it: (state, batch) to (state, what moved).
    """
    like = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state
    )
    one_stack = stacked_config(config)
    placed: Any = state.step.sharding
    arguments = abstract_state(one_stack, make_optimizer(one_stack), placed.mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, arguments)
    function = make_cluster_event(one_stack, model_graph(one_stack), event)
    jitted = jax.jit(function, donate_argnums=0, out_shardings=(shardings, shardings.step))
    lowered = jitted.lower(arguments, batch)

    def compile_event() -> EventFunction:
        program: Any = compile_program(lowered, placed.mesh.size)
        if config.model.scan_layers:
            return program
        compile_moves(like, arguments)

        def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
            state, moved = program(stacked(state, arguments), batch)
            return unstacked(state, like), moved

        return run

    return compile_event


def make_flip_step(config: Config, phase: Phase) -> FlipFunction | None:
    """What a phase that follows another one begins with, besides clustering: state to state.

    Returns:
      The function, or None where the configuration leaves everything as it is.
    """
    reset = phase in flips(config.optimizer.reset_moments)
    rescale = phase == "dense" and config.schedule.rescale_dense
    threshold = phase == "dense" and config.schedule.threshold_dense
    if not (reset or rescale or threshold):
        return None

    def flip(state: TrainState) -> TrainState:
        if rescale:
            state = _rescaled(state, config.sparsity)
        if threshold:
            state = _thresholded(state, config.sparsity)
        if reset:
            state = dataclasses.replace(state, opt_state=reset_moments(state.opt_state))
        return state

    return flip


def _rescaled(state: TrainState, sparsity: Sparsity) -> TrainState:
    """The state whose dense network continues the scale of the sparse one.

    b' S(w) stands for w if b' is estimated from w as it is now; the sparse phase used b S(w), with
    the scale b of its start, which then stands for (b / b') w. The scale of that is b', with which
    the sparse view stays what it was: b' S((b / b') w) = b S(w).
    """
    params, routing = state.params, state.routing
    for part, axes in sparse_weights(sparsity).items():
        beta = block_leaf(routing, part, "beta")
        estimate = {name: _estimate(axis) for name, axis in axes.items()}
        found = map_block_leaves(params, part, estimate, beta)
        fitting = beta
        for i, name in enumerate(axes):
            if has_leaf(params, part, name):
                fitting = fitting.at[:, i].set(block_leaf(found, part, name))
        scale = {name: _scale(i) for i, name in enumerate(axes)}
        sparse = layers_that_are_sparse(beta.shape[0], sparsity)
        factors = jnp.where(sparse[:, None], beta / fitting, 1.0)
        params = map_block_leaves(params, part, scale, factors)
        routing = map_block_leaves(routing, part, {"beta": lambda _, new: new}, fitting)
    return dataclasses.replace(state, params=params, routing=routing)


def _thresholded(state: TrainState, sparsity: Sparsity) -> TrainState:
    """The state whose 2:4 matrices are what the sparse phase multiplied with, b S(w).

    The third largest of four is zero then, so that with b = 1 the sparse view stays what it was.
    """
    routing = state.routing
    params = thresholded(state.params, routing, sparsity, in_place=True)
    for part in sparse_weights(sparsity):
        ones = {"beta": lambda b, _: jnp.ones_like(b)}
        routing = map_block_leaves(routing, part, ones, block_leaf(routing, part, "beta"))
    return dataclasses.replace(state, params=params, routing=routing)


def _estimate(axis: int) -> LeafFunction:
    return lambda w, _: soft_threshold_beta(w, axis)


def _scale(i: int) -> LeafFunction:
    return lambda w, factors: w * factors[i]
