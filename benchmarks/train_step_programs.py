"""Compiled train steps that take turns on one state."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

import train.main
from sparsejax.nn.routed_ffn import RoutingState
from sparsejax.schedule import Event, Phase
from train import accounting, hardware
from train.compiler import compile_program
from train.config import Config, MeshConfig, resolve
from train.data.pipeline import Data, open_data
from train.flip import lower_cluster_event
from train.mesh import BATCH_SPEC, check_mesh, make_mesh, put_batch, state_shardings
from train.optimizer import make_optimizer
from train.state import TrainState, abstract_state, build_model, init_state, model_graph
from train.step import make_train_step

Batch = dict[str, jax.Array]

XLA = "--xla"
BATCH = "--batch-per-device"
"""Sequences of a step on each device that has a part of the batch, instead of --batch-size."""


def split(arguments: Sequence[str], option: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Arguments without an option and its values, and those values."""
    others: list[str] = []
    values: list[str] = []
    expected = False
    for argument in arguments:
        if expected:
            values.append(argument)
        elif argument != option:
            others.append(argument)
        expected = argument == option and not expected
    return tuple(others), tuple(values)


@dataclasses.dataclass(frozen=True)
class Spec:
    """A step to compile.

    Attributes:
      phase: dense or sparse.
      overrides: arguments of the trainer's command line, `--xla NAME=VALUE` for an option of the
        compiler, and `--batch-per-device N`.
    """

    phase: Phase
    overrides: tuple[str, ...] = ()

    @staticmethod
    def parse(phase: Phase, text: str) -> Spec:
        """From one string, split as a shell would."""
        return Spec(phase, tuple(shlex.split(text)))

    @property
    def name(self) -> str:
        """For tables."""
        return shlex.join(self.overrides) or "as configured"

    @property
    def compiler_options(self) -> dict[str, str | bool]:
        """What `--xla` names, over the trainer's own options; later ones win.

        Raises:
          ValueError: not of the form NAME=VALUE.
        """
        # A profile cannot tell the kernels of a CUDA graph apart, and steps of hundreds of
        # milliseconds have no launch overhead to hide.
        options: dict[str, str | bool] = {"xla_gpu_enable_command_buffer": ""}
        for text in split(self.overrides, XLA)[1]:
            name, equals, value = text.partition("=")
            if not equals:
                raise ValueError(f"{XLA} {text} must be NAME=VALUE")
            options[name] = {"true": True, "false": False}.get(value, value)
        return options

    @property
    def arguments(self) -> tuple[str, ...]:
        """All but those of the compiler."""
        return split(self.overrides, XLA)[0]


def _short(config: Config, warmup: int) -> Config:
    """The run with an optimiser that moves within `warmup` steps.

    The first steps of a long warm-up would leave the state where it was initialised. The rate is in
    inverse proportion to the width, as updates of hidden matrices call for (arXiv 2203.03466).
    """
    o = config.optimizer
    return dataclasses.replace(
        config,
        optimizer=dataclasses.replace(
            o,
            learning_rate=min(o.learning_rate, 0.6 / config.model.width),
            warmup_steps=min(max(warmup // 4, 1), config.steps),
            rewarm_steps=0,
        ),
    )


@dataclasses.dataclass
class Program:
    """A compiled step.

    Attributes:
      spec: what was asked for.
      config: the resolved run whose step this is.
      mesh: of the devices that run it.
      step: compiled; donates its state.
      compile_seconds: tracing and compiling, beside other programs if several are compiled at once.
      memory: bytes by the compiler's own analysis; `total` is what the step needs at its peak.
    """

    spec: Spec
    config: Config
    mesh: Mesh
    step: Callable[..., Any]
    hlo: Callable[[], str]
    compile_seconds: float
    memory: dict[str, int]

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.config.tokens_per_step

    def mfu(self, seconds: float) -> float | None:
        """Model FLOPs utilisation of a step (docs/accounting.md); None on an unknown chip."""
        chip = hardware.chip(self.mesh.devices.flat[0].device_kind)
        if chip is None:
            return None
        flops = accounting.dense_flops(self.config).total
        return accounting.mfu(flops, seconds, chip.bf16_flops * self.mesh.size)


class Out(Exception):
    """A step does not fit into the device's memory."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error of JAX says that memory ran out."""
    return "RESOURCE_EXHAUSTED" in str(error) or "out of memory" in str(error).lower()


def mesh_of(config: MeshConfig, devices: int) -> MeshConfig:
    """The mesh that a run's is on some of its devices: fsdp as far as they go, data for the rest.

    Raises:
      ValueError: the number of devices does not fit the axes.
    """
    if devices == 1:
        # The configurations of large models name a mesh of several devices.
        return MeshConfig()
    fsdp = min(config.fsdp, max(devices // config.tensor, 1))
    if devices % (fsdp * config.tensor):
        raise ValueError(
            f"{devices=} must be a multiple of mesh.fsdp={fsdp} times mesh.tensor={config.tensor}"
        )
    return dataclasses.replace(config, data=-1, fsdp=fsdp)


class Session:
    """One state, the batches, and the steps that use them.

    Dense steps are compiled for a state without routing, sparse ones for that of their M, so that
    they share parameters and moments, which are far too large to have twice. `routing` is None
    before the first flip.
    """

    def __init__(
        self, name: str, arguments: Sequence[str], warmup: int, devices: int | None = None
    ):
        """Opens data and mesh.

        Args:
          name: of a configuration.
          arguments: the trainer's command line, for all steps.
          warmup: steps of training before anything is timed.
          devices: how many, from the first; None for all. Fewer make their own mesh (`mesh_of`).

        Raises:
          ValueError: an argument is refused, or the mesh does not fit.
        """
        self._name, self._warmup, self._devices = name, warmup, devices
        self._arguments, options = split(arguments, XLA)
        # For all steps; those of one step come later and win.
        self._xla = tuple(word for option in options for word in (XLA, option))
        self._stack = contextlib.ExitStack()
        self._batches: dict[int, Iterator[Any]] = {}
        self._opened: dict[int, Data] = {}
        self._compiling: dict[Any, Future] = {}
        self.state: TrainState | None = None
        self.routing: Any = None
        self._routing_config: Config | None = None
        base = self._parse(())
        used = jax.devices()[:devices]
        # A step's own batch is checked with its step.
        self.mesh: Mesh = make_mesh(base.mesh, base.mesh.fsdp * len(used), used)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _parse(self, arguments: Sequence[str]) -> Config:
        words, rows = split((*self._arguments, *arguments), BATCH)
        parsed = train.main.parse(["--config", self._name, *words])
        config = _short(train.main.config_of(parsed), self._warmup)
        count = jax.device_count() if self._devices is None else self._devices
        if count < jax.device_count() or count == 1:
            config = dataclasses.replace(config, mesh=mesh_of(config.mesh, count))
        if rows:
            if not rows[-1].isdigit() or rows[-1] == "0":
                raise ValueError(f"{BATCH} {rows[-1]} must be a positive number")
            parts = count // config.mesh.tensor
            config = dataclasses.replace(config, batch_size=int(rows[-1]) * parts)
        return config

    def _data(self, config: Config) -> Data:
        rows = config.batch_size
        if rows not in self._opened:
            data = open_data(
                config.data,
                sequence_length=config.sequence_length,
                global_batch=rows,
                seed=config.data_seed,
            )
            self._opened[rows] = self._stack.enter_context(data)
        return self._opened[rows]

    def config(self, spec: Spec) -> Config:
        """The resolved run of a step.

        Raises:
          ValueError: it cannot run.
        """
        config = self._parse(spec.arguments)
        if spec.phase == "dense":
            schedule = dataclasses.replace(config.schedule, sparse_fraction=0.0)
            config = dataclasses.replace(config, schedule=schedule)
        elif not config.sparse_steps:
            raise ValueError(
                f"schedule.sparse_fraction={config.schedule.sparse_fraction}: this run has no "
                "sparse step"
            )
        config = resolve(config, tokenizer_vocab_size=self._data(config).vocab_size)
        check_mesh(config, self.mesh)
        rows, devices = config.batch_size // config.micro_batches, self.batch_devices
        if rows % devices:
            raise ValueError(
                f"batch_size={config.batch_size} / micro_batches={config.micro_batches} must be a "
                f"multiple of data times fsdp = {devices} devices"
            )
        return config

    @property
    def batch_devices(self) -> int:
        """Devices among which a batch is spread."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def describe_data(self, config: Config) -> str:
        """One line for a report."""
        return self._data(config).describe()

    def batches(self, config: Config, count: int) -> list[Batch]:
        """The next batches, on the device."""
        rows = config.batch_size
        if rows not in self._batches:
            self._batches[rows] = iter(self._data(config).train_batches(0))
        return [put_batch(self.mesh, next(self._batches[rows])) for _ in range(count)]

    def jobs(self, specs: Sequence[Spec], events: Sequence[tuple[Spec, Event]] = ()) -> list[Job]:
        """What `compile_together` takes, so that `compile`, `flip` and `refresh` find it done.

        Args:
          specs: steps. events: clusterings for sparse steps' runs.
        """
        found: list[Job] = []
        for spec in specs:
            found.append((self._compiling, spec, functools.partial(self._lower, spec)))
        for spec, event in events:
            config = self.config(spec)
            lower = functools.partial(self._lower_event, config, event)
            found.append((self._compiling, (config, event), lower))
        return found

    def _finish(self, key: Any, lower: Callable[[], Callable[[], Any]]) -> Any:
        """What `compile_together` made of it, or else made now."""
        if key in self._compiling:
            return self._compiling.pop(key).result()
        return lower()()

    def compile(self, spec: Spec) -> Program:
        """Compiles a step."""
        return self._finish(spec, functools.partial(self._lower, spec))

    def _lower(self, spec: Spec) -> Callable[[], Program]:
        """Traces a step; the result compiles it."""
        config = self.config(spec)
        whole = dataclasses.replace(spec, overrides=(*self._xla, *spec.overrides))
        began = time.perf_counter()
        optimizer = make_optimizer(config)
        state = abstract_state(config, optimizer, self.mesh)
        shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
        function = make_train_step(config, model_graph(config), optimizer, spec.phase)
        jitted = jax.jit(function, donate_argnums=0, out_shardings=(shardings, shardings.step))
        with jax.set_mesh(self.mesh):
            lowered = jitted.lower(state, self._abstract_batch(config))

        def finish() -> Program:
            compiled = compile_program(lowered, self.mesh.size, whole.compiler_options)
            seconds = time.perf_counter() - began
            text = lambda: compiled.as_text() or ""
            return Program(spec, config, self.mesh, compiled, text, seconds, _memory(compiled))

        return finish

    def _abstract_batch(self, config: Config) -> dict[str, jax.ShapeDtypeStruct]:
        sharding = NamedSharding(self.mesh, BATCH_SPEC)
        shape = config.batch_size, config.sequence_length
        array = jax.ShapeDtypeStruct(shape, jnp.int32, sharding=sharding)
        return {"inputs": array, "targets": array}

    def _lower_event(self, config: Config, event: Event) -> Callable[[], Any]:
        state = abstract_state(config, make_optimizer(config), self.mesh)
        with jax.set_mesh(self.mesh):
            return lower_cluster_event(config, event, state, self._abstract_batch(config))

    def start(self, config: Config) -> None:
        """A new state; the old one is dropped first."""
        self.drop()
        dense = dataclasses.replace(
            config, schedule=dataclasses.replace(config.schedule, sparse_fraction=0.0)
        )
        with jax.set_mesh(self.mesh):
            self.state = init_state(dense, make_optimizer(dense), self.mesh)
        self._no_routing = self.state.routing

    def drop(self) -> None:
        """Frees the state."""
        self.state, self.routing, self._routing_config = None, None, None
        gc.collect()

    def flip(self, config: Config) -> float:
        """Clusters the neurons for a sparse phase of this run; returns seconds without
        compiling."""
        routing = _new_routing(config, self.mesh)
        seconds = self._cluster(config, routing, "begin")
        self._routing_config = config
        return seconds

    def refresh(self, config: Config) -> float:
        """Clusters again, from the present centres; returns seconds without compiling."""
        assert self._routing_config is not None
        return self._cluster(config, self.routing, "refresh")

    def _cluster(self, config: Config, routing: Any, event: Event) -> float:
        assert self.state is not None
        state = dataclasses.replace(self.state, routing=routing)
        self.state = None
        (batch,) = self.batches(config, 1)
        lower = functools.partial(self._lower_event, config, event)
        compiled = self._finish((config, event), lower)
        jax.block_until_ready(state)
        began = time.perf_counter()
        state, _ = jax.block_until_ready(compiled(state, batch))
        seconds = time.perf_counter() - began
        self._keep(state)
        return seconds

    def _keep(self, state: TrainState) -> None:
        self.routing = state.routing
        self.state = dataclasses.replace(state, routing=self._no_routing)

    def steps(self, program: Program, batches: Sequence[Batch]) -> tuple[float, list[float]]:
        """Runs a step for each batch, without waiting between them.

        Returns:
          Seconds of one step, and the losses.

        Raises:
          Out: memory ran out; the state is gone.
          FloatingPointError: a loss is no number.
        """
        assert self.state is not None
        sparse = program.spec.phase == "sparse"
        state = dataclasses.replace(self.state, routing=self.routing) if sparse else self.state
        jax.block_until_ready((state, batches))
        losses = []
        # Nobody else holds the state while its buffers are donated from step to step.
        self.state = None
        try:
            began = time.perf_counter()
            for batch in batches:
                state, metrics = program.step(state, batch)
                losses.append(metrics["loss"])
            jax.block_until_ready(state)
            seconds = (time.perf_counter() - began) / len(batches)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            del state
            self.drop()
            raise Out(str(error).splitlines()[0]) from None
        if sparse:
            self._keep(state)
        else:
            self.state = state
        found = [float(loss) for loss in losses]
        if not all(map(math.isfinite, found)):
            raise FloatingPointError(f"losses {found} of {program.spec.name}")
        return seconds, found


def _new_routing(config: Config, mesh: Mesh) -> Any:
    """Routing state as a new run has it."""

    def make() -> Any:
        return nnx.split(build_model(config, jax.random.key(0)), nnx.Param, RoutingState)[2]

    shapes = jax.eval_shape(make)
    with jax.set_mesh(mesh):
        return jax.jit(make, out_shardings=state_shardings(mesh, shapes))()


Job = tuple[dict[Any, Future], Any, Callable[[], Callable[[], Any]]]
"""Where a result belongs, under which key, and what traces; that returns what compiles."""


def compile_together(jobs: Sequence[Job]) -> None:
    """Compiles programs, the first one alone and then the others at the same time; waits for them.

    The first times its matrix products on a device that nobody else uses; the others, whose
    products are mostly the same, find the results. Tracing takes turns; XLA's compiler, which takes
    most of the time, leaves Python to the others. What fails says so when it is asked for.
    """
    with ThreadPoolExecutor(max_workers=len(jobs) or 1) as pool:
        ready: list[tuple[dict[Any, Future], Any, Callable[[], Any]]] = []
        for i, (place, key, lower) in enumerate(jobs):
            try:
                finish = lower()
            except Exception as error:
                finish = functools.partial(_raise, error)
            if i == 0:
                place[key] = first = pool.submit(finish)
            else:
                ready.append((place, key, finish))
        if jobs:
            wait([first])
        for place, key, finish in ready:
            place[key] = pool.submit(finish)


def _raise(error: Exception) -> Any:
    raise error


def _memory(compiled: Any) -> dict[str, int]:
    analysis = compiled.memory_analysis()
    arguments, outputs, aliased, temporaries = (
        int(getattr(analysis, f"{name}_size_in_bytes"))
        for name in ("argument", "output", "alias", "temp")
    )
    return {
        "arguments": arguments,
        "outputs": outputs,
        "aliased": aliased,
        "temporaries": temporaries,
        "total": arguments + outputs - aliased + temporaries,
    }
