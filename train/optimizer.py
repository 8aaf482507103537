"""AdamW, its learning rate, and which parameters decay."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax.schedule import PhaseSchedule, rewarm_at_flips
from train.config import Config, OptimizerConfig, flips
from train.tree import names

NOT_DECAYED = {"embedding", "scale"}


def phase_schedule(config: Config) -> PhaseSchedule:
    """The run's phases."""
    # Without routing there are no clusters to refresh, but perhaps scales.
    refreshes = config.sparsity.routing or config.sparsity.reestimate_beta
    return PhaseSchedule(
        warmup_steps=config.schedule.warmup_steps,
        sparse_steps=config.sparse_steps,
        refresh_every=config.sparsity.refresh_every if refreshes else 0,
    )


def learning_rate_schedule(config: Config) -> optax.Schedule:
    """Linear warm-up, decay to final_fraction of the peak, optional re-warming at changes of
    phase."""
    o = config.optimizer
    schedule = _warmup_cosine(config) if o.decay == "cosine" else _warmup_linear(config)
    # The optimiser counts from zero; its first step should already move.
    return rewarm_at_flips(
        lambda step: schedule(step + 1), phase_schedule(config), o.rewarm_steps, flips(o.rewarm_at)
    )


def _warmup_cosine(config: Config) -> optax.Schedule:
    o = config.optimizer
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if o.warmup_steps else o.learning_rate,
        peak_value=o.learning_rate,
        warmup_steps=o.warmup_steps,
        decay_steps=max(config.steps, o.warmup_steps + 1),
        end_value=o.final_fraction * o.learning_rate,
    )


def _warmup_linear(config: Config) -> optax.Schedule:
    """With decay=wsd constant up to the last decay_fraction of the steps."""
    o = config.optimizer
    begin = o.warmup_steps
    if o.decay == "wsd":
        begin = max(begin, config.steps - round(o.decay_fraction * config.steps))
    warmup = optax.linear_schedule(0.0, o.learning_rate, max(o.warmup_steps, 1))
    stable = optax.constant_schedule(o.learning_rate)
    end = o.final_fraction * o.learning_rate
    decay = optax.linear_schedule(o.learning_rate, end, max(config.steps - begin, 1))
    return optax.join_schedules([warmup, stable, decay], [o.warmup_steps, begin])


def decay_mask(params: Any) -> Any:
    """True for the parameters that decay: matrices, but neither embedding nor gains."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: names(path)[-1] not in NOT_DECAYED, params
    )


def make_optimizer(config: Config) -> optax.GradientTransformationExtraArgs:
    """AdamW with decoupled weight decay; gradients are clipped in the train step, where their
    norm is known.

    `update` takes a `learning_rate`, so that one compiled step serves all schedules; without it,
    the configuration's schedule and the state's own count say what it is. The state is that of
    `optax.adamw`.
    """
    o = config.optimizer
    return optax.chain(
        optax.scale_by_adam(b1=o.b1, b2=o.b2, eps=o.eps),
        optax.add_decayed_weights(o.weight_decay, decay_mask),
        _scale_by_rate(learning_rate_schedule(config), partial(relative_rate, o)),
    )


def relative_rate(optimizer: OptimizerConfig, path: tuple[Any, ...]) -> float:
    """What multiplies the learning rate of a parameter, by its path in the model: that of matrices
    in a block's attention or FFN, of the embedding and of the head may be another; norms have the
    schedule's."""
    parts = {
        "attention": optimizer.attention_rate,
        "ffn": optimizer.ffn_rate,
        "embedding": optimizer.embedding_rate,
        "head": optimizer.head_rate,
    }
    return next((parts[str(key)] for key in names(path)[-2:] if str(key) in parts), 1.0)


def _scale_by_rate(
    schedule: optax.Schedule, relative: Callable[[tuple[Any, ...]], float]
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_learning_rate`, whose rate the caller may know better; multiplied by what
    `relative` says for a parameter's path."""
    scheduled = optax.scale_by_schedule(schedule)

    def update(
        updates: Any,
        state: optax.ScaleByScheduleState,
        params: Any = None,
        *,
        learning_rate: jax.typing.ArrayLike | None = None,
        **_: Any,
    ) -> tuple[Any, optax.ScaleByScheduleState]:
        rate = schedule(state.count) if learning_rate is None else learning_rate

        def scale(path: tuple[Any, ...], u: jax.Array) -> jax.Array:
            return -jnp.asarray(relative(path) * rate, u.dtype) * u

        scaled = jax.tree_util.tree_map_with_path(scale, updates)
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(scheduled.init, update)


def reset_moments(opt_state: Any) -> Any:
    """AdamW's state with moments of zero and their count of steps started over; the schedule's own
    count goes on."""
    adam = lambda node: isinstance(node, optax.ScaleByAdamState)
    zeros = lambda node: jax.tree.map(jnp.zeros_like, node) if adam(node) else node
    return jax.tree.map(zeros, opt_state, is_leaf=adam)
