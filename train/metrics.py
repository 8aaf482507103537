"""What a run reports: a console line an interval, the same as JSONL and to other sinks, a summary.

The logger never touches a device: values arrive as Python floats, so the caller has already waited
for the step whose values it hands over, and the clock between two calls of `log` is the time of the
steps between them.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from train.loggers import Sink

FILE_NAME = "metrics.jsonl"

Value = float | Sequence[Any]

_PHASE_STYLES = {"sparse": "magenta", "dense": "cyan"}


class RunLogger:
    """Reports one run to the console, to `folder/metrics.jsonl` and to further sinks.

    A resumed run continues the file: records of steps after `start_step` belong to a future that is
    about to be run again and are dropped at once; one of `start_step` itself is dropped when the
    same kind of record for it is written again, so no step appears twice whether the caller counts
    steps from 0 or from 1. A run that starts at step 0 starts an empty file.

    Rates (tokens/s, MFU) leave out the interval that ends with the first log line of a phase, since
    the phase's step is compiled in it, and whatever happens inside `pause()`.

    Args:
      folder: the run's folder; created when missing.
      total_steps: optimiser steps of the whole run.
      start_step: optimiser steps already done; 0 for a new run.
      tokens_per_step: tokens of a step over all devices.
      flops_per_step: FLOPs of a *dense* step over all devices
        (`train.accounting.dense_flops(config).total`). MFU counts them in every phase, so that
        phases compare by what they achieve, not by what they execute.
      peak_flops: dense bf16 peak of all devices together in FLOP/s; None where the chip is unknown:
        no MFU.
      sinks: get the numbers of every record but the summary (`train.loggers`); closed by `close`.
      console: where lines and tables are printed.
      active: False on every host but the first: measures, but prints and writes nothing.
      clock: seconds, monotonic.

    Raises:
      ValueError: a count is out of range.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        total_steps: int,
        start_step: int = 0,
        tokens_per_step: int,
        flops_per_step: float,
        peak_flops: float | None = None,
        sinks: Sequence[Sink] = (),
        console: Console | None = None,
        active: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if total_steps < 1:
            raise ValueError(f"{total_steps=} must be at least 1")
        if not 0 <= start_step <= total_steps:
            raise ValueError(f"{start_step=} must be between 0 and {total_steps=}")
        if tokens_per_step < 1:
            raise ValueError(f"{tokens_per_step=} must be at least 1")
        if peak_flops is not None and not peak_flops > 0:
            raise ValueError(f"{peak_flops=} must be positive or None")
        self.total_steps = total_steps
        self.start_step = start_step
        self.tokens_per_step = tokens_per_step
        self.flops_per_step = flops_per_step
        self.peak_flops = peak_flops
        self.path = Path(folder) / FILE_NAME
        self._console = console if console is not None else Console()
        self._active = active
        self._clock = clock
        self._sinks = list(sinks)
        self._stale: set[tuple[str, int]] = set()
        if active:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._stale = _truncate(self.path, start_step)

        self._began = clock()
        self._interval_began = self._began
        self._interval_step = start_step
        self._paused = 0.0  # seconds of this interval spent in pause()
        self._paused_total = 0.0
        self._pause_depth = 0
        self._last_phase: str | None = None
        self._pace_origin: tuple[float, int] | None = None
        self._measured: dict[str, tuple[int, float]] = {}  # phase -> (steps, seconds)
        self._last_step = start_step
        self._last_loss: float | None = None
        self._last_eval: dict[str, Value] = {}

    def __enter__(self) -> RunLogger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(failed=kind is not None)

    def log(self, step: int, phase: str, values: Mapping[str, Value]) -> dict[str, Any]:
        """Prints the line of an interval and appends its record.

        Args:
          step: the step whose values these are.
          phase: name of the phase the step belongs to, such as "dense" or "sparse".
          values: `loss`, `learning_rate` and `grad_norm` are printed. `expert_load`, one entry a
            layer, each either the tokens (or shares) of the layer's experts or already the ratio of
            its busiest expert to the average, is printed as the largest and the mean ratio over
            layers (1 is perfectly even). Anything else is only recorded.

        Returns:
          The record as written: the values, and `kind`, `step`, `phase`, `tokens` (seen so far),
          `elapsed` (seconds since this process began), `tokens_per_second`, `step_seconds`, `mfu`
          (None where unknown), `eta_seconds`.
        """
        now = self._clock()
        steps = step - self._interval_step
        seconds = now - self._interval_began - self._paused
        compiled = phase != self._last_phase
        rate: dict[str, float | None] = dict.fromkeys(("tokens_per_second", "step_seconds", "mfu"))
        if not compiled and steps > 0 and seconds > 0:
            rate["step_seconds"] = seconds / steps
            rate["tokens_per_second"] = self.tokens_per_step * steps / seconds
            if self.peak_flops is not None:
                rate["mfu"] = self.flops_per_step * steps / seconds / self.peak_flops
            past_steps, past_seconds = self._measured.get(phase, (0, 0.0))
            self._measured[phase] = (past_steps + steps, past_seconds + seconds)
        # Evaluations and checkpoints delay the end as well, so the pace behind the ETA is plain
        # wall-clock time.
        eta = None
        if self._pace_origin is None:
            self._pace_origin = (now, step)
        elif step > self._pace_origin[1]:
            origin_time, origin_step = self._pace_origin
            eta = (now - origin_time) / (step - origin_step) * max(self.total_steps - step, 0)

        record: dict[str, Any] = {"kind": "train", "step": step, "phase": phase}
        record |= {key: _plain(value) for key, value in values.items() if key != "expert_load"}
        if "expert_load" in values:
            ratios = load_ratios(values["expert_load"])
            record["expert_load"] = ratios
            record["expert_load_max"] = max(ratios, default=None)
            record["expert_load_mean"] = sum(ratios) / len(ratios) if ratios else None
        record |= {"tokens": step * self.tokens_per_step, "elapsed": now - self._began}
        record |= rate
        record["eta_seconds"] = eta
        self._write(record)
        self._print(self._line(record))
        self._scalars(record, "train")

        loss = values.get("loss")
        self._last_loss = float(loss) if isinstance(loss, int | float) else self._last_loss
        self._last_phase = phase
        self._last_step = step
        self._interval_step = step
        self._interval_began = now
        self._paused = 0.0
        return record

    def eval(self, step: int, values: Mapping[str, Value]) -> dict[str, Any]:
        """Prints and records held-out results of the weights at `step`.

        Args:
          step: as for `log`.
          values: every float is printed under its name. `loss_dense` and `loss_sparse`, the
            held-out loss of the dense and the sparse view of the same weights, are what the loss
            plot draws. Lists are only recorded.

        Returns:
          The record as written.
        """
        record: dict[str, Any] = {"kind": "eval", "step": step}
        record |= {key: _plain(value) for key, value in values.items()}
        record["elapsed"] = self._clock() - self._began
        self._write(record)
        line = Text.assemble((self._step(step), "bold"), "  ", (f"{'eval':<6}", "green"))
        for key, value in values.items():
            if isinstance(value, int | float):
                line.append(f"  {key.replace('_', ' ')} {value:.4f}")
        self._print(line)
        self._scalars(record, "eval")
        self._last_eval = {k: v for k, v in values.items() if isinstance(v, int | float)}
        return record

    def clusters(self, step: int, values: Mapping[str, Value]) -> dict[str, Any]:
        """Prints and records what a clustering of the neurons moved.

        Args:
          step: steps done before it.
          values: `neuron_churn`, and perhaps `token_churn`: for each layer the share of neurons, or
            of a batch's tokens, whose expert is another one than before.

        Returns:
          The record as written: the values, and the mean over layers of each.
        """
        record: dict[str, Any] = {"kind": "clusters", "step": step}
        record |= {key: _plain(value) for key, value in values.items()}
        line = Text.assemble((self._step(step), "bold"), "  ", ("clusters", "yellow"))
        for key in values:
            mean = record[f"{key}_mean"] = sum(record[key]) / len(record[key])
            line.append(f"  {key.replace('_', ' ')} {mean:.1%}")
        record["elapsed"] = self._clock() - self._began
        self._write(record)
        self._print(line)
        self._scalars(record, "clusters")
        return record

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Leaves the time inside out of the rates: evaluation, checkpoints, compilation.

        The device must be idle on entry and exit (`jax.block_until_ready`), or steps still running
        would be timed short. Pauses may nest.
        """
        self._pause_depth += 1
        began = self._clock()
        try:
            yield
        finally:
            self._pause_depth -= 1
            if self._pause_depth == 0:
                seconds = self._clock() - began
                self._paused += seconds
                self._paused_total += seconds

    def summary(self, values: Mapping[str, Value] | None = None) -> dict[str, Any]:
        """Prints the final table and appends it as a record.

        Args:
          values: further rows, name to number or text.

        Returns:
          The record: `step`, `tokens`, `elapsed`, `paused` (seconds), `loss` (last logged), `eval`
          (last held-out results), `phases` (for each: measured steps, seconds a step, tokens/s,
          MFU) and `values`.
        """
        elapsed = self._clock() - self._began
        phases: dict[str, dict[str, Any]] = {}
        for phase, (steps, seconds) in self._measured.items():
            phases[phase] = {
                "measured_steps": steps,
                "step_seconds": seconds / steps,
                "tokens_per_second": self.tokens_per_step * steps / seconds,
                "mfu": None
                if self.peak_flops is None
                else self.flops_per_step * steps / seconds / self.peak_flops,
            }
        record: dict[str, Any] = {
            "kind": "summary",
            "step": self._last_step,
            "tokens": self._last_step * self.tokens_per_step,
            "elapsed": elapsed,
            "paused": self._paused_total,
            "loss": self._last_loss,
            "eval": {key: _plain(value) for key, value in self._last_eval.items()},
            "phases": phases,
            "values": {key: _plain(value) for key, value in (values or {}).items()},
        }
        self._write(record)

        table = Table(title="Summary", title_justify="left", show_header=False)
        table.add_column()
        table.add_column(justify="right")
        table.add_row("steps", f"{self._last_step:,} of {self.total_steps:,}")
        table.add_row("tokens", f"{record['tokens']:,}")
        table.add_row("time of this process", duration(elapsed))
        table.add_row("  paused (evaluation, checkpoints)", duration(self._paused_total))
        if self._last_loss is not None:
            table.add_row("last training loss", f"{self._last_loss:.4f}")
        for key, value in self._last_eval.items():
            if isinstance(value, int | float):
                table.add_row(f"held-out {key.replace('_', ' ')}", f"{value:.4f}")
        for phase, speed in phases.items():
            text = f"{speed['tokens_per_second']:,.0f} tokens/s"
            text += f", {seconds_text(speed['step_seconds'])} a step"
            if speed["mfu"] is not None:
                text += f", MFU {speed['mfu']:.1%}"
            table.add_row(f"{phase} steps", text)
        for key, value in (values or {}).items():
            table.add_row(key, f"{value:,.4g}" if isinstance(value, float) else str(value))
        self._print(table)
        return record

    def close(self, *, failed: bool = False) -> None:
        """Closes the sinks. The JSONL file is complete after every call.

        Args:
          failed: whether the run ended in an error.
        """
        while self._sinks:
            self._sinks.pop().close(failed=failed)

    def _step(self, step: int) -> str:
        width = len(str(self.total_steps))
        return f"step {step:>{width}}/{self.total_steps}"

    def _line(self, record: Mapping[str, Any]) -> Text:
        phase = record["phase"]
        line = Text.assemble(
            (self._step(record["step"]), "bold"),
            "  ",
            (f"{phase:<6}", _PHASE_STYLES.get(phase, "")),
            ("  loss ", "dim"),
            (_number(record.get("loss"), ".4f", 7), "bold"),
            ("  lr ", "dim"),
            _number(record.get("learning_rate"), ".2e", 8),
            ("  grad ", "dim"),
            _number(record.get("grad_norm"), ".3f", 6),
            ("  tok/s ", "dim"),
            _rate(record["tokens_per_second"]),
        )
        if self.peak_flops is not None:
            line.append("  mfu ", "dim").append(_number(record["mfu"], ".1%", 5))
        eta = record["eta_seconds"]
        line.append("  eta ", "dim").append(f"{'-' if eta is None else duration(eta):>6}")
        # Last, because dense phases have none: lines of all phases stay aligned.
        if record.get("expert_load_max") is not None:
            load = f"{record['expert_load_max']:.2f}/{record['expert_load_mean']:.2f}"
            line.append("  load ", "dim").append(load)
        return line

    def _print(self, item: Text | Table) -> None:
        if self._active:
            # A long line is left for the terminal to fold: in a file it stays one line.
            self._console.print(item, soft_wrap=isinstance(item, Text))

    def _write(self, record: Mapping[str, Any]) -> None:
        if not self._active:
            return
        key = (record["kind"], record["step"])
        if key in self._stale:
            self._stale.remove(key)
            _rewrite(self.path, lambda old: (old["kind"], old["step"]) != key)
        line = json.dumps(_strict(record), allow_nan=False)
        # Opened anew for each record: at log intervals that costs nothing, and a killed run has
        # lost nothing.
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def _scalars(self, record: Mapping[str, Any], prefix: str) -> None:
        scalars = {
            f"{prefix}/{key}": value
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float) and math.isfinite(value)
        }
        if self._active:
            for sink in self._sinks:
                sink.write(scalars, record["step"])


def read(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Returns the records of a `metrics.jsonl`, oldest first, without a line cut off by a crash.

    Raises:
      FileNotFoundError: there is no such file.
    """
    records = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            record = json.loads(line)
            if isinstance(record, dict) and "kind" in record and "step" in record:
                records.append(record)
    return records


def load_ratios(expert_load: Value) -> list[float]:
    """Returns each layer's load of its busiest expert over the average load; 1 is perfectly even.

    Args:
      expert_load: one entry a layer: the tokens or shares of its experts, or the ratio itself.
    """
    if isinstance(expert_load, int | float):
        return [float(expert_load)]
    ratios = []
    for layer in expert_load:
        if isinstance(layer, int | float):
            ratios.append(float(layer))
        else:
            total = float(sum(layer))
            ratios.append(max(layer) * len(layer) / total if total else math.nan)
    return ratios


def duration(seconds: float) -> str:
    """Returns seconds as a person reads them: 42s, 3m05s, 2h07m, 3d04h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86_400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}h"


def seconds_text(seconds: float) -> str:
    """Returns a step's time with a fitting unit: 12.3 ms, 1.23 s."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _number(value: float | None, spec: str, width: int) -> str:
    return f"{'-' if value is None else format(value, spec):>{width}}"


def _rate(tokens_per_second: float | None) -> str:
    if tokens_per_second is None:
        return f"{'-':>6}"
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens_per_second >= scale:
            return f"{tokens_per_second / scale:>5.1f}{unit}"
    return f"{tokens_per_second:>6.3g}"


def _plain(value: Any) -> Any:
    """Numpy scalars and arrays become Python's own numbers and lists."""
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _truncate(path: Path, start_step: int) -> set[tuple[str, int]]:
    """Drops what a run resumed at `start_step` writes again; returns what it may (same step)."""
    if start_step == 0 or not path.exists():
        path.write_text("", encoding="utf-8")
        return set()
    _rewrite(path, lambda record: record["kind"] != "summary" and record["step"] <= start_step)
    kept = {(record["kind"], record["step"]) for record in read(path)}
    return {key for key in kept if key[1] == start_step}


def _rewrite(path: Path, keep: Callable[[dict[str, Any]], bool]) -> None:
    kept = "".join(json.dumps(record) + "\n" for record in read(path) if keep(record))
    new = path.with_suffix(".new")
    new.write_text(kept, encoding="utf-8")
    new.replace(path)  # atomic: a crash leaves the old file or the new one
