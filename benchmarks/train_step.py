"""The trainer's dense and sparse step against each other, in turns, on one state and real tokens.

    python -m benchmarks.train_step --config llama1b --out step.json      # on a GPU
    python -m benchmarks.train_step --config tiny --out step.json --smoke # anywhere, no claim

Options that are not listed are the trainer's (`python -m train.main --help`), for all steps:
`--model.num-layers 12`, `--sparsity.m 32`, `--data.source DIR`; `--batch-per-device N` for the
batch; and `--xla NAME=VALUE` for an option of the compiler. A step of its own takes a string of
them:

    --dense "..." --dense "..."    candidates for the dense step; the fastest by tokens/s is taken
    --sparse "..." --sparse "..."  candidates for the sparse step, likewise
    --row-dense "..."              a further dense row beside the fastest, on top of its settings
    --row-sparse "..."             a further sparse row; `--m 8 32` is short for two of them

`--tune` stops after the candidates; with `--depths 2 4` it compiles them with so many layers only
and extrapolates to the configuration's number, which says what to try and is no result.

All GPUs of the machine take part: `--mesh.fsdp 2`, or `--mesh.fsdp 1` for data parallelism alone.
`--scaling 1 2` measures the same steps on the first one and two GPUs too, `--baseline FILE.json`
compares with another run; docs/scaling.md says what to read from them.

What is measured: rounds in which every contender runs a few steps, without waiting in between, on
one state that was trained for `--warmup-steps` and then flipped; packing, routing and the optimiser
are in the steps. docs/training_speed.md says how to read the result.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import pathlib
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax

from benchmarks import train_step_breakdown, train_step_report, train_step_scaling
from benchmarks.command_line import make_bare_parser, require_gpu
from benchmarks.environment import environment
from benchmarks.failures import Failures
from benchmarks.train_step_programs import (
    BATCH,
    Job,
    Out,
    Program,
    Session,
    Spec,
    compile_together,
)
from sparsejax.schedule import Event
from train.runtime import keep_compiled, reserve_memory

Row = dict[str, Any]


def _both(*candidates: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same candidates for both steps."""
    common = "--micro-batches 1 --model.no-scan-layers --model.logits compute"
    whole = tuple(f"{common} {own}" for own in candidates)
    return whole, whole


CANDIDATES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "llama1b": _both(
        "--batch-per-device 8 --model.loss-chunk 4096 --model.remat none",
        "--batch-per-device 8 --model.loss-chunk 4096 --model.remat dots",
    ),
    "llama7b": _both(
        "--batch-per-device 2 --model.loss-chunk 4096 --model.remat none",
        "--batch-per-device 4 --model.loss-chunk 4096 --model.remat dots",
    ),
}
"""Of the dense and the sparse step of a configuration on a device of 80 GB, where none are given.
The configurations themselves are for whole runs, whose steps take tens of seconds on one device."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is run.

    Attributes:
      config: name of a configuration. arguments: the trainer's, for all steps.
      dense, sparse: candidates.
      rows: further contenders, on top of the fastest candidate of their phase.
      warmup: steps of training. settle: sparse steps between a flip and the rounds.
      rounds: samples of each contender. round_steps: steps of a sample.
      candidate_steps: timed steps of a candidate.
      first: take the first candidate that runs, not the fastest.
      depths: layers to compile candidates with; empty for the real number.
      tune: stop after the candidates.
      breakdown: whether steps are profiled. trace: folder that keeps the profiles.
      refresh: whether a refresh of the clusters is timed.
      scaling: numbers of devices, less than all, on which the same steps are measured as well.
      baseline: result file of another run to compare with.
    """

    config: str
    arguments: tuple[str, ...]
    dense: tuple[Spec, ...]
    sparse: tuple[Spec, ...]
    rows: tuple[Spec, ...] = ()
    warmup: int = 40
    settle: int = 4
    rounds: int = 10
    round_steps: int = 4
    candidate_steps: int = 6
    first: bool = False
    depths: tuple[int, ...] = ()
    tune: bool = False
    breakdown: bool = True
    trace: pathlib.Path | None = None
    refresh: bool = True
    scaling: tuple[int, ...] = ()
    baseline: pathlib.Path | None = None
    smoke: bool = False


class _Clock:
    def __init__(self) -> None:
        self._start = time.perf_counter()

    def say(self, what: str) -> None:
        seconds = time.perf_counter() - self._start
        print(f"[{seconds:5.0f} s] {what}", file=sys.stderr, flush=True)


def _extended(spec: Spec, *overrides: str) -> Spec:
    # Later arguments win.
    return dataclasses.replace(spec, overrides=(*spec.overrides, *overrides))


def _label(spec: Spec, program: Program) -> str:
    """Name of a sparse row's group, and its label for studies."""
    others = " ".join(spec.overrides).replace(f"--sparsity.m {program.config.sparsity.m}", "")
    return f"M={program.config.sparsity.m} {others.strip()}".strip()


class _Run:
    """One run of the benchmark and what its parts share."""

    def __init__(self, settings: Settings, session: Session, save: Callable[[Row], None]):
        self.settings, self.session, self._save = settings, session, save
        self.clock, self.failures = _Clock(), Failures()
        self._smaller: dict[int, _Run] = {}
        self.result: Row = {
            "benchmark": "train_step",
            "complete": False,
            "smoke": settings.smoke,
            **environment(),
            "mesh": dict(session.mesh.shape),
            "devices": session.mesh.size,
            "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
            "candidates": [],
            "training": {},
            "groups": [],
            "failures": self.failures,
        }

    def save(self) -> None:
        """Leaves what there is so far, for a run that is cut short."""
        self._save(self.result)

    def run(self) -> Row:
        """All of it."""
        settings = self.settings
        for spec in (*settings.dense, *settings.sparse, *settings.rows):
            # What cannot be parsed is refused before anything takes time.
            _ = self.session.config(spec), spec.compiler_options
        if settings.baseline is not None:
            train_step_scaling.read_baseline(settings.baseline)
        self.compile(self.jobs())
        return self.measured()

    def measured(self) -> Row:
        """What follows once everything is compiled."""
        settings = self.settings
        dense = self._best(settings.dense)
        sparse = self._best(settings.sparse)
        if not settings.tune and dense is not None:
            self._measure(dense, sparse)
            self._scale(dense, sparse)
        if not settings.depths and dense is None:
            self.failures.append("no candidate for the dense step ran")
        self.result["complete"] = not self.failures
        self.save()
        return self.result

    def compile(self, jobs: list[Job]) -> None:
        """Compiles at once; each result waits where it is needed."""
        compile_together(jobs)
        self.clock.say(f"compiled {len(jobs)} programs")

    def jobs(self) -> list[Job]:
        """All that is sure to be compiled."""
        settings = self.settings
        if settings.depths:
            return []
        specs = list(dict.fromkeys((*settings.dense, *settings.sparse)))
        events: list[tuple[Spec, Event]] = []
        if not settings.tune and len(settings.sparse) == 1:
            events.append((settings.sparse[0], "begin"))
            if settings.refresh:
                events.append((settings.sparse[0], "refresh"))
        jobs = self.session.jobs(specs, events)
        if len(settings.dense) == 1 and len(settings.sparse) < 2:
            # The same steps run on fewer devices, whichever is faster.
            for devices in settings.scaling:
                make = functools.partial(self._fewer, devices, settings.dense, settings.sparse)
                run, _ = self.failures.attempt(f"{devices} devices", make)
                if run is not None:
                    self._smaller[devices] = run
                    jobs += run.jobs()
        return jobs

    # Candidates.

    def _best(self, specs: tuple[Spec, ...]) -> Program | None:
        """The fastest candidate; a single one is not timed here."""
        settings = self.settings
        best: tuple[float, Program] | None = None
        timed = settings.tune or len(specs) > 1
        for spec in specs:
            if settings.first and best is not None:
                break
            row: Row = {"phase": spec.phase, "settings": spec.name}
            self.result["candidates"].append(row)
            if settings.depths:
                guess = functools.partial(self._extrapolate, spec, row)
                _, note = self.failures.attempt(spec.name, guess)
            else:
                attempt = functools.partial(self._candidate, spec, row, timed)
                program, note = self.failures.attempt(spec.name, attempt)
                rate = row.get("tokens_per_second", 0.0)
                if program is not None and (best is None or rate > best[0]):
                    best = rate, program
            if note is not None:
                row["note"] = note
            self.clock.say(f"{spec.phase} candidate {spec.name}: {train_step_report.brief(row)}")
            self.save()
        self.session.drop()
        return None if best is None else best[1]

    def _candidate(self, spec: Spec, row: Row, timed: bool) -> Program | None:
        program = self.session.compile(spec)
        row |= _describe(program)
        limit = self._memory("bytes_limit", min)
        if limit is not None and program.memory["total"] > limit:
            row["note"] = f"needs {program.memory['total']} of {limit} bytes"
            return None
        if timed:
            try:
                seconds = self._quick(program)
            except Out as error:
                row["note"] = f"out of memory: {error}"
                return None
            row |= _speed(program, seconds)
        return program

    def _quick(self, program: Program) -> float:
        """Seconds of a step, by a few of them from a new state."""
        session, config = self.session, program.config
        session.start(config)
        if program.spec.phase == "sparse":
            session.flip(config)
        session.steps(program, session.batches(config, 2))
        half = max(self.settings.candidate_steps // 2, 1)
        return statistics.median(
            session.steps(program, session.batches(config, half))[0] for _ in range(2)
        )

    def _extrapolate(self, spec: Spec, row: Row) -> None:
        """Times few layers, and fits a line through seconds against layers."""
        depths, seconds = self.settings.depths, []
        row["depths"] = []
        for depth in depths:
            shallow: Row = {"layers": depth}
            row["depths"].append(shallow)
            small = _extended(spec, "--model.num-layers", str(depth))
            program = self._candidate(small, shallow, timed=True)
            if program is None:
                row["note"] = shallow["note"]
                return
            seconds.append(shallow["seconds"])
            whole = dataclasses.replace(program, config=self.session.config(spec))
        slope, start = statistics.linear_regression(depths, seconds)
        row |= _speed(whole, start + slope * whole.config.model.num_layers)
        row |= {"extrapolated": True, "seconds_per_layer": slope, "seconds_without_layers": start}

    # The measurement.

    def _measure(self, dense: Program, sparse: Program | None) -> None:
        session, settings = self.session, self.settings
        session.start(dense.config)
        losses: list[float] = []
        for _ in range(0, settings.warmup, 10):
            count = min(10, settings.warmup - len(losses))
            losses += session.steps(dense, session.batches(dense.config, count))[1]
        self.result["training"] = {
            "steps": len(losses),
            "tokens": len(losses) * dense.tokens,
            "first_loss": losses[0],
            "last_loss": losses[-1],
            "data": session.describe_data(dense.config),
        }
        self.clock.say(f"trained {len(losses)} steps, loss {losses[0]:.3f} to {losses[-1]:.3f}")

        further = [spec for spec in settings.rows if spec.phase == "dense"]
        programs = [dense, *self._compile(dense.spec, further)]
        if len(programs) > 1 or sparse is None:
            self._attempt_group("dense", programs)
        if sparse is None:
            return
        self.result["run"] = self._whole_run(sparse.spec)
        self._attempt_group(f"M={sparse.config.sparsity.m}", [dense, sparse])
        for spec in settings.rows:
            if spec.phase == "sparse":
                for program in self._compile(sparse.spec, [spec]):
                    self._attempt_group(_label(spec, program), [dense, program])

    def _whole_run(self, spec: Spec) -> Row:
        """The configuration's schedule; batches of the benchmark's steps may be others."""
        config = self.session.config(dataclasses.replace(spec, overrides=()))
        every = config.sparsity.refresh_every if config.sparsity.routing else 0
        return {
            "steps": config.steps,
            "sparse_steps": config.sparse_steps,
            "refreshes": (config.sparse_steps - 1) // every if every else 0,
            "tokens_per_step": config.tokens_per_step,
        }

    def _compile(self, base: Spec, further: list[Spec]) -> list[Program]:
        programs = []
        for spec in further:
            own = _extended(base, *spec.overrides)
            compile_own = functools.partial(self.session.compile, own)
            program, _ = self.failures.attempt(f"{spec.phase} {own.name}", compile_own)
            if program is not None:
                self.clock.say(f"compiled {spec.phase} {own.name}")
                programs.append(program)
        return programs

    def _attempt_group(self, name: str, programs: list[Program]) -> None:
        group: Row = {"name": name, "rows": []}
        self.result["groups"].append(group)
        try:
            self.failures.attempt(f"group {name}", lambda: self._group(group, programs))
        finally:
            if self.session.state is None:
                # Lost with a failed step; the next group starts from a new one.
                self.failures.append(f"group {name}: the state was lost, the next is untrained")
                self.session.start(programs[0].config)
        self.save()

    def _group(self, group: Row, programs: list[Program]) -> None:
        """Takes turns among contenders that share a state."""
        session, settings = self.session, self.settings
        sparse = next((p for p in programs if p.spec.phase == "sparse"), None)
        if sparse is not None:
            group["clustering"] = {"begin_seconds": session.flip(sparse.config)}
            session.steps(sparse, session.batches(sparse.config, settings.settle))
        rows = [{"phase": p.spec.phase, "settings": p.spec.name, **_describe(p)} for p in programs]
        samples: list[list[float]] = [[] for _ in programs]
        losses: list[list[float]] = [[] for _ in programs]
        for program, row in zip(programs, rows, strict=True):
            before = self._memory("bytes_in_use")
            session.steps(program, session.batches(program.config, 2))
            peak = self._memory("peak_bytes_in_use")
            row["memory"] |= {"in_use_before": before, "peak_of_process": peak}
        for r in range(settings.rounds):
            order = list(range(len(programs)))
            for i in order[r % len(order) :] + order[: r % len(order)]:
                batches = session.batches(programs[i].config, settings.round_steps)
                seconds, found = session.steps(programs[i], batches)
                samples[i].append(seconds)
                losses[i] += found
        for i, (program, row) in enumerate(zip(programs, rows, strict=True)):
            row |= _speed(program, statistics.median(samples[i]))
            row["rounds_seconds"] = samples[i]
            row["timed_steps"] = settings.rounds * settings.round_steps
            row["last_loss"] = losses[i][-1]
        group["rows"] = rows
        for row in rows:
            row["speedup"] = row["tokens_per_second"] / rows[0]["tokens_per_second"]
            self.clock.say(
                f"{group['name']}, {row['phase']} {row['settings']}: {train_step_report.brief(row)}"
            )
        self.save()
        if sparse is not None and settings.refresh:
            group["clustering"]["refresh_seconds"] = session.refresh(sparse.config)
        if settings.breakdown:
            for i, (program, row) in enumerate(zip(programs, rows, strict=True)):
                row["breakdown"] = self._profile(f"{group['name']}-{i}", program)
        train_step_report.derive(self.result)

    def _memory(self, name: str, choose: Callable[..., int] = max) -> int | None:
        """A figure of the allocators of this run's devices; None where they have none."""
        devices = [d for d in self.session.mesh.devices.flat if d in jax.local_devices()]
        found = [(device.memory_stats() or {}).get(name) for device in devices]
        known = [value for value in found if value is not None]
        return choose(known) if known else None

    # Other numbers of devices.

    def _scale(self, dense: Program, sparse: Program | None) -> None:
        """The same steps on fewer devices, then how they compare."""
        settings = self.settings
        self.session.drop()
        runs: list[Row] = []
        self.result["scaling"] = runs
        for devices in settings.scaling:
            self.clock.say(f"the same steps on {devices} of the devices")
            specs = (dense.spec,), () if sparse is None else (sparse.spec,)
            measure = functools.partial(self._on_fewer, devices, *specs, runs)
            self.failures.attempt(f"{devices} devices", measure)
        if settings.baseline is not None:
            runs += train_step_scaling.read_baseline(settings.baseline)
        train_step_scaling.derive(self.result)

    def _fewer(self, devices: int, dense: tuple[Spec, ...], sparse: tuple[Spec, ...]) -> _Run:
        """A run of nothing but these steps on the first devices."""
        settings = dataclasses.replace(
            self.settings, dense=dense, sparse=sparse, rows=(), tune=False, breakdown=False,
            refresh=False, scaling=(), baseline=None,
        )  # fmt: skip
        session = Session(settings.config, settings.arguments, settings.warmup, devices)
        run = _Run(settings, session, lambda _: None)
        run.clock = self.clock
        return run

    def _on_fewer(
        self, devices: int, dense: tuple[Spec, ...], sparse: tuple[Spec, ...], runs: list[Row]
    ) -> None:
        run = self._smaller.pop(devices, None)
        if run is None:
            run = self._fewer(devices, dense, sparse)
            run.compile(run.jobs())
        with run.session:
            found = run.measured()
        self.failures.extend(f"{devices} devices: {failure}" for failure in run.failures)
        runs.append({"devices": devices, "mesh": found["mesh"], "groups": found["groups"]})
        self.save()

    def _profile(self, name: str, program: Program) -> Row:
        session, steps = self.session, 2
        batches = session.batches(program.config, steps)
        seconds: list[float] = []
        folder = None if self.settings.trace is None else self.settings.trace / name
        found = train_step_breakdown.measure(
            lambda: seconds.append(session.steps(program, batches)[0]),
            program.hlo(),
            steps,
            folder,
        )
        return {"seconds_while_profiled": seconds[0], **found}


def _describe(program: Program) -> Row:
    config = program.config
    return {
        "layers": config.model.num_layers,
        "devices": program.mesh.size,
        "m": config.sparsity.m if program.spec.phase == "sparse" else None,
        "backend": config.sparsity.backend if program.spec.phase == "sparse" else None,
        "batch_size": config.batch_size,
        "micro_batches": config.micro_batches,
        "sequence_length": config.sequence_length,
        "remat": config.model.remat,
        "scan_layers": config.model.scan_layers,
        "tokens": program.tokens,
        "compile_seconds": program.compile_seconds,
        "memory": dict(program.memory),
    }


def _speed(program: Program, seconds: float) -> Row:
    rate = program.tokens / seconds
    return {
        "seconds": seconds,
        "tokens_per_second": rate,
        "tokens_per_second_per_device": rate / program.mesh.size,
        "mfu": program.mfu(seconds),
    }


def run(settings: Settings, save: Callable[[Row], None]) -> Row:
    """Measures everything.

    Args:
      settings: what.
      save: called with the result so far, now and then.

    Returns:
      What the result file holds.
    """
    with Session(settings.config, settings.arguments, settings.warmup) as session:
        return _Run(settings, session, save).run()


def parse(arguments: list[str]) -> tuple[argparse.ArgumentParser, argparse.Namespace, list[str]]:
    """The command line: parser, options, and the rest, which is the trainer's."""
    parser = make_bare_parser(
        "train_step",
        __doc__ or "",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", required=True, help="a module in configs/")
    add("--dense", action="append", metavar="OVERRIDES", help="candidate for the dense step")
    add("--sparse", action="append", metavar="OVERRIDES", help="candidate for the sparse step")
    add("--row-dense", action="append", default=[], metavar="OVERRIDES", help="further dense row")
    add("--row-sparse", action="append", default=[], metavar="OVERRIDES", help="and sparse row")
    add("--m", nargs="+", type=int, default=[], help="values of M for further sparse rows")
    add("--no-sparse", action="store_true", help="dense steps alone")
    add("--warmup-steps", type=int, default=40, help="steps of training before the flip")
    add("--settle-steps", type=int, default=4, help="sparse steps after a flip, untimed")
    add("--rounds", type=int, default=10, help="samples of each contender")
    add("--round-steps", type=int, default=4, help="steps of a sample")
    add("--candidate-steps", type=int, default=6, help="timed steps of each candidate")
    add("--first", action="store_true", help="take the first candidate that runs, in this order")
    add("--tune", action="store_true", help="stop after the candidates")
    add("--depths", nargs="+", type=int, default=[], help="with --tune: extrapolate from so many "
        "layers")  # fmt: skip
    add("--no-breakdown", action="store_true", help="do not profile")
    add("--no-refresh", action="store_true", help="do not time a refresh of the clusters")
    add("--trace", type=pathlib.Path, help="folder that keeps the profiles")
    add("--scaling", nargs="+", type=int, default=[], metavar="DEVICES", help="measure the same "
        "steps, chosen on all devices, on so many of them too")  # fmt: skip
    add("--baseline", type=pathlib.Path, help="result file of a run on fewer devices")
    options, rest = parser.parse_known_args(_joined(arguments))
    return parser, options, rest


_OVERRIDES = ("--dense", "--sparse", "--row-dense", "--row-sparse")


def _joined(arguments: list[str]) -> list[str]:
    """Arguments with `--dense=...` for `--dense ...`: argparse takes a value that looks like one
    option, such as "--sparsity.attention-projections", for an option."""
    joined: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        value = next(rest, None) if argument in _OVERRIDES else None
        joined.append(argument if value is None else f"{argument}={value}")
    return joined


def settings_of(options: argparse.Namespace, rest: list[str]) -> Settings:
    """What the command line asks for.

    Raises:
      ValueError: an option is out of range.
    """
    for name in ("warmup_steps", "settle_steps", "rounds", "round_steps", "candidate_steps"):
        if getattr(options, name) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} {getattr(options, name)} must be positive"
            )
    if options.depths and (not options.tune or len(set(options.depths)) < 2):
        raise ValueError(f"--depths {options.depths} must be two or more, with --tune")
    for count in options.scaling:
        if not 1 <= count < jax.device_count():
            raise ValueError(
                f"--scaling {count} must be at least 1 and less than the {jax.device_count()} "
                "devices"
            )
    dense, sparse = CANDIDATES.get(options.config, (("",), ("",)))
    dense = tuple(options.dense or dense)
    sparse = () if options.no_sparse else tuple(options.sparse or sparse)
    rows = [Spec.parse("dense", text) for text in options.row_dense]
    rows += [Spec("sparse", ("--sparsity.m", str(m))) for m in options.m]
    rows += [Spec.parse("sparse", text) for text in options.row_sparse]
    if options.no_sparse and any(spec.phase == "sparse" for spec in rows):
        raise ValueError("--no-sparse takes no sparse rows")
    for text in (*dense, *sparse) if options.scaling else ():
        if BATCH not in (*rest, *shlex.split(text)):
            raise ValueError(f"--scaling needs {BATCH} in every candidate, not {text!r}")
    return Settings(
        config=options.config,
        arguments=tuple(rest),
        dense=tuple(Spec.parse("dense", text) for text in dense),
        sparse=tuple(Spec.parse("sparse", text) for text in sparse),
        rows=tuple(rows),
        warmup=options.warmup_steps,
        settle=options.settle_steps,
        rounds=options.rounds,
        round_steps=options.round_steps,
        candidate_steps=options.candidate_steps,
        first=options.first,
        depths=tuple(options.depths),
        tune=options.tune,
        breakdown=not options.no_breakdown,
        trace=options.trace,
        refresh=not options.no_refresh,
        scaling=tuple(sorted(set(options.scaling))),
        baseline=options.baseline,
        smoke=options.smoke,
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser, options, rest = parse(sys.argv[1:] if arguments is None else arguments)
    reserve_memory()
    require_gpu(parser, options)
    keep_compiled()
    options.out.parent.mkdir(parents=True, exist_ok=True)

    def save(result: Row) -> None:
        options.out.write_text(json.dumps(result, indent=1) + "\n")

    try:
        result = run(settings_of(options, rest), save)
    except ValueError as error:
        parser.error(str(error))
    train_step_report.plot(result, options.plot or options.out.with_suffix(".png"))
    train_step_report.table(result)
    if result["failures"]:
        sys.exit("\n".join(["failed:", *result["failures"]]))


if __name__ == "__main__":
    main()
