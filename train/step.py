"""One optimiser step, dense or sparse, and the clustering that a sparse phase begins with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from sparsejax.nn.routed_ffn import RoutingUpdate
from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.ops.routed_ffn_fp8 import saturated_weights
from sparsejax.routing import expert_counts, update_bias, update_within_experts
from sparsejax.schedule import Phase
from sparsejax.sharding import permute_rows
from train import scopes
from train.backend import compute_dtype
from train.config import Config
from train.loss import cross_entropy
from train.mesh import FFN_AXES
from train.optimizer import learning_rate_schedule
from train.state import TrainState
from train.tree import LeafFunction, map_block_leaves, map_ffn_leaves, names

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]
StepFunction = Callable[..., tuple[TrainState, Metrics]]


def _rounded_once(config: Config, params: Any, phase: Phase) -> Any:
    """Parameters with the matrices of dense products in the compute dtype.

    They would be rounded wherever a product reads them: in each micro-batch, and again in a
    rematerialised backward pass. Gradients are the same numbers: those of rounded matrices, which
    dense products make in the compute dtype. Sparse products make theirs in float32 and do not read
    these matrices at all.
    """
    parts = {"attention": ("q", "k", "v", "out"), "ffn": ("w1", "w2", "wg")}
    scope = {"attention": scopes.PROJECTIONS, "ffn": scopes.FFN}
    sparse = {"ffn"} if phase == "sparse" else set()
    if sparse and config.sparsity.attention_projections:
        sparse.add("attention")
    if config.model.experts:
        del parts["ffn"]
    # Those that stay dense, if layers have places: of a stack all are treated alike.
    dense_layers = range(config.sparsity.dense_layers)
    dtype = compute_dtype(config.model)

    def visit(path: Any, leaf: jax.Array) -> jax.Array:
        keys = names(path)
        part = str(keys[-2]) if len(keys) > 1 else ""
        if keys[-1] not in parts.get(part, ()):
            return leaf
        if part in sparse and keys[keys.index("blocks") + 1] not in dense_layers:
            return leaf
        with jax.named_scope(scope[part]):
            return leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(visit, params)


def _loss(graph: nnx.GraphDef, config: Config, params, routing, packed, batch: Batch):
    """Mean loss of a batch (weighted by batch["mask"] if there is one), and routing statistics."""
    model = nnx.merge(graph, params, routing)
    hidden, stats = model(batch["inputs"], packed)
    with jax.named_scope(scopes.HEAD):
        loss = cross_entropy(
            hidden.reshape(-1, hidden.shape[-1]),
            model.head[...],
            batch["targets"].reshape(-1),
            batch["mask"].reshape(-1) if "mask" in batch else None,
            chunk=config.model.loss_chunk,
            logits_dtype=jnp.float32 if config.model.logits == "float32" else hidden.dtype,
        )
    return loss, stats


def _accumulate(gradient: Callable[[Batch], Any], batch: Batch, parts: int) -> Any:
    """((mean loss, summed statistics), mean gradient) over `parts` micro-batches, one after
    another. Gradients are float32."""
    if parts == 1:
        return gradient(batch)
    # Every part takes one row of each run of `parts` rows, so that each device keeps its own rows.
    split = jax.tree.map(lambda a: a.reshape(-1, parts, *a.shape[1:]).swapaxes(0, 1), batch)
    first, rest = (jax.tree.map(lambda a, i=i: a[i], split) for i in (0, slice(1, None)))
    add = lambda total, part: (jax.tree.map(jnp.add, total, gradient(part)), None)
    ((loss, stats), grads), _ = jax.lax.scan(add, gradient(first), rest)
    return (loss / parts, stats), jax.tree.map(lambda g: g / parts, grads)


def _evening(config: Config, phase: Phase) -> dict[str, LeafFunction]:
    """What moves each bias of an FFN towards even loads: (bias, counts) to bias, by its name."""
    rate, experts = config.sparsity.bias_rate, config.model.experts
    if not experts:

        def shards(bias: jax.Array, counts: jax.Array) -> jax.Array:
            bias, counts = (a.reshape(config.sparsity.num_shards, -1) for a in (bias, counts))
            return update_bias(bias, counts, rate).reshape(-1)

        return {"bias": shards}
    mixture = {"bias": lambda bias, n: update_bias(bias, expert_counts(n, experts), rate)}
    if phase == "sparse":
        mixture["cluster_bias"] = lambda bias, n: update_within_experts(bias, n, experts, rate)
    return mixture


def make_train_step(
    config: Config,
    graph: nnx.GraphDef,
    optimizer: optax.GradientTransformationExtraArgs,
    phase: Phase,
) -> StepFunction:
    """The step of one phase: (state, batch) to (state, metrics); jit it and donate the state.

    A third argument is the learning rate, a float32 scalar: with it, runs of all schedules share
    the program. Without it the rate is that of the configuration's schedule at the state's step.

    In a sparse phase the 2:4 weights are thresholded and packed once, before the loss; gradients
    pass straight through to the dense masters, and the experts' biases move towards even loads.
    """
    schedule = learning_rate_schedule(config)

    def step(
        state: TrainState, batch: Batch, learning_rate: jax.Array | None = None
    ) -> tuple[TrainState, Metrics]:
        rate = schedule(state.step) if learning_rate is None else learning_rate
        packed = None
        if phase == "sparse":
            packed = nnx.merge(graph, state.params, state.routing).pack()

        rounded = _rounded_once(config, state.params, phase)

        def gradient(batch: Batch):
            loss = lambda params: _loss(graph, config, params, state.routing, packed, batch)
            value, grads = jax.value_and_grad(loss, has_aux=True)(rounded)
            return value, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, state.params)

        (loss, stats), grads = _accumulate(gradient, batch, config.micro_batches)
        with jax.named_scope(scopes.OPTIMIZER):
            norm = optax.tree.norm(grads)
            if config.optimizer.clip_norm:
                scale = jnp.minimum(1.0, config.optimizer.clip_norm / jnp.maximum(norm, 1e-12))
                grads = jax.tree.map(lambda g: g * scale, grads)
            updates, opt_state = optimizer.update(
                grads, state.opt_state, state.params, learning_rate=rate
            )
            params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
        }
        packed8 = [
            leaf
            for leaf in jax.tree.leaves(packed, is_leaf=lambda node: isinstance(node, PackedFFN))
            if isinstance(leaf, PackedFFN) and leaf.precision == "fp8"
        ]
        if packed8:
            metrics["saturated_weights"] = sum(map(saturated_weights, packed8))
        routing = state.routing
        # The experts of a mixture are chosen, and their loads evened, in dense phases too.
        if config.model.experts or (phase == "sparse" and config.sparsity.routing):
            metrics["expert_load"] = stats.counts
            missing = config.model.num_layers - stats.counts.shape[0]
            # Layers that stay dense have met no tokens, which leaves their biases as they are.
            counts = jnp.pad(stats.counts, [(missing, 0)] + [(0, 0)] * (stats.counts.ndim - 1))
            routing = map_ffn_leaves(routing, _evening(config, phase), counts)
        return (
            dataclasses.replace(
                state,
                step=state.step + 1,
                params=params,
                routing=routing,
                opt_state=opt_state,
            ),
            metrics,
        )

    return step


def make_cluster_step(
    config: Config, graph: nnx.GraphDef, *, begin: bool
) -> Callable[[TrainState], TrainState]:
    """Clusters every layer's neurons and interleaves the experts: state to state.

    The permutation moves the rows of all FFN matrices and of their optimiser state alike, so the
    dense function and the optimiser's trajectory stay what they were.

    Args:
      config: the run.
      graph: the model's structure.
      begin: True at the start of the sparse phase, when the thresholding scales beta are set too;
        False for a refresh, which starts from the present centres and keeps beta (unless
        sparsity.reestimate_beta).
    """

    return lambda state: clustered(config, graph, state, begin=begin)[0]


def clustered(
    config: Config, graph: nnx.GraphDef, state: TrainState, *, begin: bool
) -> tuple[TrainState, RoutingUpdate]:
    """The state after `make_cluster_step`, and what changed, with a leading axis over the
    layers."""
    model = nnx.merge(graph, state.params, state.routing)
    plan: Any = model.map_ffn(lambda ffn: ffn.begin_sparse() if begin else ffn.refresh())
    if not config.model.scan_layers:
        plan = jax.tree.map(lambda *leaves: jnp.stack(leaves), *plan)
    rows = lambda w, p: permute_rows(w, p.permutation, config.sparsity, axes=FFN_AXES)
    move = {"w1": rows, "wg": rows, "w2": rows}
    new = {"centers": lambda _, p: p.centers, "beta": lambda _, p: p.beta}
    state = dataclasses.replace(
        state,
        params=map_ffn_leaves(state.params, move, plan, in_place=True),
        opt_state=map_ffn_leaves(state.opt_state, move, plan, in_place=True),
        routing=map_ffn_leaves(state.routing, new, plan),
    )
    if config.sparsity.attention_projections and (begin or config.sparsity.reestimate_beta):
        betas: Any = model.map_blocks(lambda block: block.attention.betas())
        if not config.model.scan_layers:
            betas = jnp.stack(betas)
        scales = {"beta": lambda _, beta: beta}
        routing = map_block_leaves(state.routing, "attention", scales, betas)
        state = dataclasses.replace(state, routing=routing)
    return state, plan


def make_eval_step(
    config: Config, graph: nnx.GraphDef, phase: Phase
) -> Callable[[TrainState, Batch], tuple[jax.Array, jax.Array]]:
    """Held-out loss of one batch in the dense or the sparse view: (summed nats, tokens)."""

    def step(state: TrainState, batch: Batch) -> tuple[jax.Array, jax.Array]:
        packed = None
        if phase == "sparse":
            packed = nnx.merge(graph, state.params, state.routing).pack()
        loss, _ = _loss(graph, config, state.params, state.routing, packed, batch)
        tokens = jnp.sum(batch["mask"].astype(jnp.float32))
        return loss * tokens, tokens

    return step
