"""The training loop: phases, clustering, logs, evaluation, checkpoints, and a clean end whatever
happens."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from rich.console import Console

from sparsejax.schedule import Phase, PhaseSchedule
from train import accounting, hardware
from train.checkpoint import Checkpointer, CheckpointError
from train.checkpoint.processes import on_process_zero
from train.config import Config, resolve, validate
from train.data.pipeline import Data, open_data
from train.distributed import any_process
from train.evaluate import evaluate
from train.init_from import check_init_from, other_tokenizer, with_parameters_from
from train.loggers import open_sinks, require_packages
from train.mesh import BATCH_SPEC, check_mesh, data_share, make_mesh, put_batch
from train.metrics import RunLogger
from train.optimizer import learning_rate_schedule, make_optimizer, phase_schedule
from train.plots import loss_plot
from train.profiling import Profiler, parse_steps
from train.programs import Programs, Shared, compile_programs
from train.run_folder import CHECKPOINTS, disown, new_folder, resumable_folder, write_config
from train.run_lock import alone_in
from train.signals import StopRequest
from train.state import TrainState, abstract_state, init_state


class NonFiniteError(RuntimeError):
    """The loss or the gradient's norm stopped being a number."""


class RescuedError(RuntimeError):
    """Data or log failed in the middle of a run; the steps done were saved."""


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
      folder: the run's folder.
      step: optimiser steps done.
      finished: False when a signal stopped the run early, with its state saved.
      losses: the last held-out losses, by view.
    """

    folder: Path
    step: int
    finished: bool
    losses: dict[str, float]


def train(
    config: Config,
    *,
    resume: bool = False,
    console: Console | None = None,
    shared: Shared | None = None,
) -> Result:
    """Trains from the first step, or from the newest good checkpoint, to the last.

    Args:
      config: the run, resolved or not.
      resume: continue the newest run of this name and output folder.
      console: where to print.
      shared: compiled programs of earlier runs of this process, to take from and to add to.

    Returns:
      How the run ended.

    Raises:
      ValueError: bad configuration, data or checkpoint, or another process trains this run; before
        anything starts.
      NonFiniteError: the loss or gradient stopped being finite; the last good checkpoint stays.
      RescuedError: data could not be read, or the log not written, after the first step.
    """
    main = jax.process_index() == 0
    console = (console or Console()) if main else Console(quiet=True)
    require_packages(config.log)
    validate(config)
    mesh = make_mesh(config.mesh, config.batch_size // config.micro_batches)
    share, shares = data_share(mesh)
    with open_data(
        config.data,
        sequence_length=config.sequence_length,
        global_batch=config.batch_size,
        seed=config.data_seed,
        process_index=share,
        process_count=shares,
    ) as data:
        config = resolve(config, tokenizer_vocab_size=data.vocab_size)
        check_mesh(config, mesh)
        if not resume:
            check_init_from(config)
        find = resumable_folder if resume else new_folder
        with contextlib.ExitStack() as held:
            claim = lambda: str(held.enter_context(alone_in(find(config))))
            folder = Path(on_process_zero(claim))
            checkpointer = Checkpointer(
                folder / CHECKPOINTS,
                keep=config.checkpoint.keep,
                config=dataclasses.asdict(config),
            )
            with StopRequest() as stop, checkpointer, jax.set_mesh(mesh):
                run = _Run(config, folder, data, mesh, checkpointer, stop, console, shared)
                return run.run(resume)


class _Run:
    """One run of the loop and what its parts share."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        data: Data,
        mesh: Mesh,
        checkpointer: Checkpointer,
        stop: StopRequest,
        console: Console,
        shared: Shared | None,
    ):
        self.shared = shared
        self.config = config
        self.folder = folder
        self.data = data
        self.mesh = mesh
        self.checkpointer = checkpointer
        self.stop = stop
        self.console = console
        self.phases: PhaseSchedule = phase_schedule(config)
        self.losses: dict[str, float] = {}
        self.saved: int | None = None

    def run(self, resume: bool) -> Result:
        """The whole run, from restoring to the summary."""
        main = jax.process_index() == 0
        try:
            state, start = self._start(resume)
            self._header(start)
            if start == self.config.steps:
                self.console.print("  finished already: nothing to do", highlight=False)
                return Result(self.folder, start, True, self.losses)
            programs = self._compile(state)
            sinks = open_sinks(self.config, self.folder, start) if main else ()
        except (ValueError, NotImplementedError, OSError):
            if main and not resume:
                disown(self.folder)
            raise
        self.logger = RunLogger(
            self.folder,
            total_steps=self.config.steps,
            start_step=start,
            tokens_per_step=self.config.tokens_per_step,
            flops_per_step=accounting.dense_flops(self.config).total,
            peak_flops=self._peak_flops(),
            sinks=sinks,
            console=self.console,
            active=main,
        )
        self.profiler = Profiler(
            parse_steps(self.config.profile.steps if main else None, steps=self.config.steps),
            self.folder / "profile",
            pause=self.logger.pause,
            say=self.console.print,
        )
        with self.logger, self.profiler:
            state, step = self._steps(programs, state, start)
            finished = step == self.config.steps
            if self.config.checkpoint.final or not finished:
                self._save(step, state)
            self.checkpointer.wait()
            if finished:
                with self._rescued(step, state, []):
                    self.logger.summary({"folder": str(self.folder)})
                    if main:
                        loss_plot(self.logger.path, self.folder / "loss.png")
            else:
                self.console.print(
                    f"stopped by a signal after step {step}; everything is saved, "
                    "continue with --resume"
                )
        return Result(self.folder, step, finished, self.losses)

    def _start(self, resume: bool) -> tuple[TrainState, int]:
        """A new state at step 0, or the newest good checkpoint's."""
        optimizer = make_optimizer(self.config)
        if not resume:
            if jax.process_index() == 0:
                write_config(self.folder, self.config)
            return self._new_state(optimizer), 0
        restored = self.checkpointer.restore(abstract_state(self.config, optimizer, self.mesh))
        if restored is None:
            # Killed before its first checkpoint: whoever restarts it must not have to know.
            warning = (
                f"[yellow]no complete checkpoint in {self.folder}: starting at step 0[/yellow]"
            )
            self.console.print(warning, highlight=False)
            check_init_from(self.config)
            if jax.process_index() == 0:
                write_config(self.folder, self.config)  # perhaps it was killed before that
            return self._new_state(optimizer), 0
        if restored.host["data"] != self.data.fingerprint:
            raise ValueError(
                f"the checkpoint in {self.folder} was trained on other data: fingerprint "
                f"{restored.host['data']}, now {self.data.fingerprint}"
            )
        self.saved = restored.step
        return restored.state, restored.step

    def _new_state(self, optimizer: optax.GradientTransformation) -> TrainState:
        state = init_state(self.config, optimizer, self.mesh)
        if self.config.init_from is not None:
            state, step = with_parameters_from(self.config, state, self.mesh)
            source = self.config.init_from
            self.console.print(f"parameters of {source}, step {step}", highlight=False)
            if other_tokenizer(self.config, self.data.tokenizer):
                warning = f"[yellow]{source} was trained with another tokenizer[/yellow]"
                self.console.print(warning, highlight=False)
        return state

    def _header(self, start: int) -> None:
        config, device = self.config, jax.devices()[0]
        counts = accounting.parameters(config)
        plan = ", ".join(
            f"{span.phase} {span.start}-{span.stop - 1}" for span in self.phases.spans(config.steps)
        )
        shape = " x ".join(f"{name} {size}" for name, size in self.mesh.shape.items() if size > 1)
        print_ = self.console.print
        print_(f"[bold]{config.name}[/bold] in {self.folder}", highlight=False)
        print_(
            f"  {counts.total:,} parameters, {config.tokens_per_step:,} tokens a step, on "
            f"{jax.device_count()} x {device.device_kind}"
            + (f" ({shape})" if shape else "")
            + (f" of {jax.process_count()} processes" if jax.process_count() > 1 else ""),
            highlight=False,
        )
        print_(
            f"  phases: {plan}" + (f"; continuing at step {start}" if start else ""),
            highlight=False,
        )
        print_(f"  data: {self.data.describe()}", highlight=False)

    def _compile(self, state: TrainState) -> Programs:
        sharding = NamedSharding(self.mesh, BATCH_SPEC)
        shape = (self.config.batch_size, self.config.sequence_length)
        array = lambda dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        batch = {"inputs": array(jnp.int32), "targets": array(jnp.int32)}
        masked = batch | {"mask": array(jnp.float32)}
        began = time.monotonic()
        with self.console.status("compiling") as status:
            programs = compile_programs(
                self.config,
                state,
                batch,
                masked,
                lambda name: status.update(f"compiling: {name}"),
                self.shared,
            )
        self.console.print(f"  compiled in {time.monotonic() - began:.0f} s", highlight=False)
        return programs

    def _peak_flops(self) -> float | None:
        chip = hardware.chip(jax.devices()[0].device_kind)
        return None if chip is None else chip.bf16_flops * jax.device_count()

    def _steps(self, programs: Programs, state: TrainState, start: int) -> tuple[TrainState, int]:
        """Steps `start` to the end or the first signal; returns the state and the steps done."""
        config, log = self.config, self.config.log
        unread: list[tuple[int, Phase, dict[str, jax.Array]]] = []
        batches: Iterator[dict[str, np.ndarray]] = iter(())
        schedule = learning_rate_schedule(config)
        rates = np.asarray(jax.vmap(schedule)(jnp.arange(config.steps)), np.float32)
        if start < config.steps:
            batches = self.data.train_batches(start)
        for step in range(start, config.steps):
            # Before the clustering: a state saved because the data failed has not seen it.
            with self._rescued(step, state, unread):
                batch = put_batch(self.mesh, next(batches))
            state, moved = self._between(programs, state, step, batch)
            phase = self.phases(step)
            state, metrics = self.profiler.run(
                step, programs.train[phase], state, batch, rates[step]
            )
            done = step + 1
            unread.append((done, phase, metrics))
            saving = config.checkpoint.every and done % config.checkpoint.every == 0
            evaluating = log.eval_every and done % log.eval_every == 0
            last = done == config.steps
            flip = not last and self.phases(done) != phase
            reporting = done % log.every == 0 or saving or evaluating or last or flip
            stopping = self._stopping(reporting)
            with self._rescued(done, state, unread):
                if moved:
                    self.logger.clusters(step, _on_host(moved))
                if reporting or stopping:
                    self._report(unread)
                if (evaluating or last) and self.data.validation_windows:
                    with self._paused(state):
                        self._evaluate(programs, state, done)
            if stopping:
                return state, done
            if saving:
                with self._paused(state):
                    self._save(done, state)
        return state, config.steps

    def _between(
        self, programs: Programs, state: TrainState, step: int, batch: Mapping[str, jax.Array]
    ) -> tuple[TrainState, Mapping[str, jax.Array]]:
        """What happens before a step, and what a clustering reports, empty where there is none."""
        event, flip = self.phases.event(step), self.phases.flip(step)
        moved: Mapping[str, jax.Array] = {}
        if event is None and flip not in programs.flip:
            return state, moved
        with self._paused(state):
            if event is not None:
                state, moved = programs.cluster[event](state, batch)
            if flip in programs.flip:
                state = programs.flip[flip](state)
            jax.block_until_ready(state)
        return state, moved

    def _stopping(self, reporting: bool) -> bool:
        """Whether to stop after this step: the same on every process.

        One process can stop after any step. Several ask each other where they wait for the device
        anyway, and a signal to one of them stops all there.
        """
        if jax.process_count() == 1:
            return self.stop.requested
        return reporting and any_process(self.stop.requested)

    @contextlib.contextmanager
    def _paused(self, state: TrainState) -> Iterator[None]:
        """Leaves what happens inside out of the measured speed."""
        jax.block_until_ready(state)
        with self.logger.pause():
            yield

    @contextlib.contextmanager
    def _rescued(
        self, step: int, state: TrainState, unread: list[tuple[int, Phase, dict[str, jax.Array]]]
    ) -> Iterator[None]:
        """Saves the steps done when reading data, or writing log or picture, fails, and says so."""
        try:
            yield
        except (ValueError, OSError) as error:
            # A save needs all processes, and the others do not know of this one's trouble.
            if step and jax.process_count() == 1:
                self._require_finite(unread)
                self._save(step, state)
                self.checkpointer.wait()
                raise RescuedError(
                    f"{error}; step {step} is saved, continue with --resume"
                ) from error
            raise

    def _report(self, unread: list[tuple[int, Phase, dict[str, jax.Array]]]) -> None:
        """Logs the newest of the unread steps, after checking all of them."""
        self._require_finite(unread)
        step, phase, metrics = unread[-1]
        self.logger.log(step, phase, _on_host(metrics))
        unread.clear()

    def _require_finite(self, unread: list[tuple[int, Phase, dict[str, jax.Array]]]) -> None:
        for step, _, metrics in unread:
            for name in ("loss", "grad_norm"):
                value = float(metrics[name])
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"{name} is {value} at step {step} of {self.config.steps}; last good "
                        f"checkpoint: {self._last_good()}, in {self.folder}"
                    )

    def _last_good(self) -> str:
        """The newest checkpoint that is there, in words: a save under way may fail yet."""
        try:
            self.checkpointer.wait()
        except CheckpointError as error:
            self.console.print(str(error), style="yellow", markup=False, highlight=False)
        step = self.checkpointer.latest_step()
        return "none" if step is None else f"step {step}"

    def _evaluate(self, programs: Programs, state: TrainState, step: int) -> None:
        views = dict(programs.evaluate)
        if step <= self.phases.warmup_steps:
            views.pop("sparse", None)  # there are no clusters and no scales yet
        windows = self.config.log.eval_windows or None
        batches = self.data.validation_batches(windows, self.config.batch_size)
        self.losses, parts = evaluate(views, state, batches, self.mesh)
        by_batch = {f"batches_{view.removeprefix('loss_')}": part for view, part in parts.items()}
        self.logger.eval(step, {**self.losses, **by_batch})

    def _save(self, step: int, state: TrainState) -> None:
        if step == self.saved:
            return
        self.checkpointer.save(step, state, {"data": self.data.fingerprint})
        self.saved = step


def _on_host(metrics: Mapping[str, jax.Array]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in metrics.items()}
