"""Where the time of a step goes: device operations of a profile, summed by the model's parts.

The trainer names its parts (`train.scopes`), and XLA keeps the names in the metadata of the
compiled program's instructions. A profile holds, for each kernel that ran, the instruction it came
from: kernels of Pallas, cuDNN and cuBLAS too. A fusion counts where its own metadata says, which is
that of its root. Communication between devices runs beside the rest and is in no part: it is summed
apart (`train_step_overlap`), and so is how long it ran beside each part, whose kernels it slows.
Seconds are means over devices.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks.train_step_overlap import Event, beside, kind_of_kernel, kind_of_opcode, overlap
from train import scopes

REST = "rest"

# Instructions that run others: those are in the profile themselves.
_CONTROL = frozenset({"while", "conditional", "call"})

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = .*?\s([\w\-]+)\(")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_CALLS = re.compile(r"calls=%?([\w.\-]+)")
_WORDS = re.compile(r"[/()]+")
_NUMBER = re.compile(r"(?:[._ ]\d+)+$")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a compiled program.

    Attributes:
      scope: part of the model; None where no name is known.
      op_name: the traced operation, for people.
      control: whether it only runs other instructions.
      collective: kind of communication that it is, starts or runs; None for computation.
    """

    scope: str | None
    op_name: str
    control: bool
    collective: str | None = None


def scope_of(op_name: str) -> str | None:
    """The innermost part of the model in a name such as jit(step)/transpose(jvp(ffn))/dot."""
    found = [word for word in _WORDS.split(op_name) if word in scopes.ALL]
    return found[-1] if found else None


def instructions(hlo: str) -> dict[str, Instruction]:
    """The instructions of a compiled program by name.

    Args:
      hlo: `jax.stages.Compiled.as_text()`.
    """
    found: dict[str, Instruction] = {}
    called: dict[str, str] = {}
    inside: dict[str, Counter[str]] = {}
    talks: dict[str, str] = {}
    computation = ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line):
            computation = match[1]
        elif match := _INSTRUCTION.match(line):
            name, opcode = match[1], match[2]
            op = _OP_NAME.search(line)
            scope, kind = scope_of(op[1]) if op else None, kind_of_opcode(opcode)
            found[name] = Instruction(scope, op[1] if op else "", opcode in _CONTROL, kind)
            if scope is not None:
                inside.setdefault(computation, Counter())[scope] += 1
            if kind is not None:
                talks[computation] = kind
            if calls := _CALLS.search(line):
                called[name] = calls[1]
    for name, body in called.items():
        # A fusion of several results has a tuple for a root, and no name: most of its body decides.
        if found[name].scope is None and body in inside:
            scope = inside[body].most_common(1)[0][0]
            found[name] = dataclasses.replace(found[name], scope=scope)
        # What runs a collective apart from the rest is a computation of its own.
        if body in talks:
            found[name] = dataclasses.replace(found[name], collective=talks[body])
    return found


def family(kernel: str) -> str:
    """A kernel's name without its arguments and the numbers by which XLA tells equal ones apart:
    loop_add_fusion of loop_add_fusion_12."""
    return _NUMBER.sub("", kernel.split("(")[0])


@dataclass(frozen=True)
class _Run:
    """One run of a kernel on a device: `start` and `end` in seconds."""

    device: str
    kernel: str
    operation: str | None
    start: float
    end: float


def _device_events(profile: Any) -> list[_Run]:
    """Everything that ran on a device; on a CPU, whose operations are host events, those."""
    on_gpu = [plane for plane in profile.planes if plane.name.startswith("/device:GPU")]
    planes = on_gpu or [plane for plane in profile.planes if plane.name.startswith("/host:CPU")]
    events = []
    with warnings.catch_warnings():
        # The bindings' own types lack a __module__; nothing that a caller could change.
        warnings.simplefilter("ignore", DeprecationWarning)
        for plane in planes:
            for line in plane.lines:
                if on_gpu and not line.name.startswith("Stream"):
                    continue
                for event in line.events:
                    stats = dict(event.stats)
                    operation = stats.get("hlo_op")
                    if not on_gpu and operation is None:
                        continue
                    device = plane.name if on_gpu else str(stats.get("device_ordinal", 0))
                    start = event.start_ns * 1e-9
                    end = start + event.duration_ns * 1e-9
                    events.append(_Run(device, event.name, operation, start, end))
    return events


def summarise(profile: Any, hlo: str, steps: int, *, kernels: int = 40) -> dict[str, Any]:
    """Seconds of a step by part of the model.

    Args:
      profile: `jax.profiler.ProfileData` of `steps` steps.
      hlo: text of the compiled step.
      steps: how many were profiled.
      kernels: how many instructions, and how many kinds of kernel, to list, the longest first.

    Returns:
      parts: seconds of a step by part; those of no part are in "rest". No collective is in them.
      busy: their sum. unknown: seconds of kernels that no instruction was found for.
      collectives: what `train_step_overlap.overlap` says.
      beside: seconds of a step by part in which a collective ran beside it; they are in parts.
      kernels: rows of instruction, part, op_name, kernel, calls and seconds of a step.
      by_kernel: rows of part, kernel (its `family`), collective, calls and seconds of a step: what
        every layer runs once is one row.
    """
    known = instructions(hlo)
    parts: dict[str, float] = {}
    rows: dict[str, dict[str, Any]] = {}
    families: dict[tuple[str, str, str | None], dict[str, Any]] = {}
    ran: list[Event] = []
    unknown = 0.0
    runs = _device_events(profile)
    each = steps * max(len({run.device for run in runs}), 1)
    for run in runs:
        # XLA names its own kernels after the instruction, with underscores.
        name = run.operation or run.kernel
        instruction = known.get(name) or known.get(name.split(",")[-1].strip())
        seconds = (run.end - run.start) / each
        if instruction is None:
            unknown += seconds
            instruction = Instruction(None, "", False)
        if instruction.control:
            continue
        talk = instruction.collective or kind_of_kernel(run.kernel)
        part = instruction.scope or REST
        ran.append(Event(run.device, run.start, run.end, talk, part))
        if talk is None:
            parts[part] = parts.get(part, 0.0) + seconds
        row = rows.setdefault(
            name,
            {"instruction": name, "part": part, "op_name": instruction.op_name[-160:],
             "kernel": run.kernel[:120], "collective": talk, "calls": 0, "seconds": 0.0},
        )  # fmt: skip
        kind = family(run.kernel)[:120]
        alike = families.setdefault(
            (part, kind, talk),
            {"part": part, "kernel": kind, "collective": talk, "calls": 0, "seconds": 0.0},
        )
        for sums in (row, alike):
            sums["calls"] += 1 / each
            sums["seconds"] += seconds
    longest = lambda rows: sorted(rows.values(), key=lambda row: -row["seconds"])[:kernels]
    return {
        "parts": {part: parts.get(part, 0.0) for part in (*scopes.ALL, REST)},
        "busy": sum(parts.values()),
        "unknown": unknown,
        "collectives": overlap(ran, steps),
        "beside": beside(ran, steps),
        "kernels": longest(rows),
        "by_kernel": longest(families),
    }


def measure(
    run: Callable[[], Any], hlo: str, steps: int, keep: pathlib.Path | None = None
) -> dict[str, Any]:
    """Profiles `run` and sums up.

    Args:
      run: executes `steps` steps and waits for them.
      hlo: text of the compiled step.
      steps: how many.
      keep: folder for the profile itself; None throws it away.

    Returns:
      As `summarise`.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as temporary:
        folder = keep or pathlib.Path(temporary)
        jax.profiler.start_trace(str(folder), profiler_options=options)
        try:
            run()
        finally:
            jax.profiler.stop_trace()
        files = sorted(folder.rglob("*.xplane.pb"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise RuntimeError(f"the profiler left no .xplane.pb in {folder}")
        return summarise(jax.profiler.ProfileData.from_file(str(files[-1])), hlo, steps)
