"""The compiled programs of a run, shared by runs that differ in nothing that is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.schedule import Event, Phase
from train.compiler import compile_program
from train.config import CheckpointConfig, Config, LogConfig, ProfileConfig
from train.data.config import DataConfig
from train.flip import lower_cluster_event, make_flip_step
from train.optimizer import make_optimizer, phase_schedule
from train.state import TrainState, model_graph
from train.step import make_eval_step, make_train_step

Shared = dict[Any, Callable]
"""Programs by what they were compiled from. One dictionary for the runs of a process whose devices
and JAX settings stay the same; it grows by a few programs for each model and sparsity."""


@dataclass(frozen=True)
class Programs:
    """Everything the loop runs on the device, compiled before the first step.

    Attributes:
      train: the train step of each phase: (state, batch, learning rate) to (state, metrics).
      evaluate: the evaluation step of each view.
      cluster: what groups the neurons before a step, by event.
      flip: what else a phase begins with; phases that begin with nothing else are left out.
    """

    train: dict[Phase, Callable]
    evaluate: dict[Phase, Callable]
    cluster: dict[Event, Callable]
    flip: dict[Phase, Callable]


def compiled_from(config: Config) -> Config:
    """What of a resolved configuration its programs depend on, as a key: the rest is set to one
    value. Learning rates are an argument of the steps; when phases begin is the host's business."""
    return dataclasses.replace(
        config,
        name="",
        output="",
        seed=0,
        steps=1,
        init_from=None,
        # Without a sparse step the model has no routing state.
        schedule=dataclasses.replace(
            config.schedule, warmup_steps=0, sparse_fraction=float(config.sparse_steps > 0)
        ),
        optimizer=dataclasses.replace(
            config.optimizer,
            learning_rate=0.0,
            warmup_steps=0,
            decay="cosine",
            decay_fraction=0.0,
            final_fraction=0.0,
            rewarm_steps=0,
            rewarm_at="both",
        ),
        sparsity=dataclasses.replace(config.sparsity, refresh_every=0),
        data=DataConfig(),
        checkpoint=CheckpointConfig(),
        log=LogConfig(),
        profile=ProfileConfig(),
    )


def step_compiled_from(config: Config) -> Config:
    """As `compiled_from`, for steps and evaluations: what else happens at changes of phase and at
    clusterings is not in them."""
    config = compiled_from(config)
    return dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, rescale_dense=False, threshold_dense=False),
        optimizer=dataclasses.replace(config.optimizer, reset_moments="none"),
        sparsity=dataclasses.replace(
            config.sparsity, fit_bias=True, reestimate_beta=False, kmeans_iterations=1
        ),
    )


def compile_programs(
    config: Config,
    state: TrainState,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    masked: Mapping[str, jax.ShapeDtypeStruct],
    report: Callable[[str], None],
    shared: Shared | None = None,
) -> Programs:
    """Compiles the steps of all phases, so that errors show before training and flips do not stall.

    Args:
      config: the resolved run.
      state: the state, or its shapes and shardings.
      batch: shapes and shardings of a training batch.
      masked: an evaluation batch, likewise.
      report: told what is being compiled.
      shared: programs of earlier runs of this process, to take from and to add to.
    """
    optimizer, graph, phases = make_optimizer(config), model_graph(config), phase_schedule(config)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    everywhere: Any = shardings.step  # every process reads the metrics
    shared = {} if shared is None else shared

    def once(name: str, depends_on: Config, make: Callable[[], Callable]) -> Callable:
        key = name, depends_on, everywhere.mesh
        if key not in shared:
            report(name)
            shared[key] = make()
        return shared[key]

    of_step, of_rest = step_compiled_from(config), compiled_from(config)

    def compiled(function: Callable, *arguments: Any, **options: Any) -> Callable:
        lowered = jax.jit(function, **options).lower(*arguments)
        return compile_program(lowered, everywhere.mesh.size)

    def step(phase: Phase) -> Callable:
        def make() -> Callable:
            function = make_train_step(config, graph, optimizer, phase)
            rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=everywhere)
            out = (shardings, everywhere)
            return compiled(function, state, batch, rate, donate_argnums=0, out_shardings=out)

        return once(f"{phase} step", of_step, make)

    def cluster(event: Event) -> Callable:
        name = "clustering" if event == "begin" else "cluster refresh"
        return once(name, of_rest, lambda: lower_cluster_event(config, event, state, batch)())

    def flip(phase: Phase, function: Callable) -> Callable:
        options = {"donate_argnums": 0, "out_shardings": shardings}
        make = lambda: compiled(function, state, **options)
        return once(f"flip to {phase}", of_rest, make)

    def view(phase: Phase) -> Callable:
        function = make_eval_step(config, graph, phase)
        options = {"out_shardings": everywhere}
        make = lambda: compiled(function, state, masked, **options)
        return once(f"{phase} evaluation", of_step, make)

    sparse = phases.sparse_steps > 0
    wanted: dict[Phase, None] = dict.fromkeys(span.phase for span in phases.spans(config.steps))
    programs = Programs({phase: step(phase) for phase in wanted}, {"dense": view("dense")}, {}, {})
    if sparse:
        programs.evaluate["sparse"] = view("sparse")
        programs.cluster["begin"] = cluster("begin")
    if sparse and phases.refresh_every:
        programs.cluster["refresh"] = cluster("refresh")
    for phase in wanted:
        if sparse and (function := make_flip_step(config, phase)) is not None:
            programs.flip[phase] = flip(phase, function)
    return programs
