"""Communication in a profile: how long devices talk, and how much of that nothing hides.

A device runs collectives on streams of their own, so that products go on beside them. Time in which
it talks and computes is overlapped; time in which it only talks is exposed, and that alone makes a
step longer (besides the bandwidth and the multiprocessors that collectives take from products). A
collective starts where its device is ready and ends when all are: waiting for another device counts
as talking.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

Interval = tuple[float, float]

KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
"""Operations of XLA that move data between devices."""

# Names of NCCL's kernels, for events whose instruction is not known.
_KERNELS = (
    ("allgather", "all-gather"),
    ("reducescatter", "reduce-scatter"),
    ("allreduce", "all-reduce"),
    ("broadcast", "collective-broadcast"),
    ("sendrecv", "collective-permute"),
)
OTHER = "other"


@dataclass(frozen=True)
class Event:
    """Something that ran on a device.

    Attributes:
      device: which.
      start, end: seconds, of one clock for a device.
      collective: its kind, one of KINDS or OTHER; None for computation.
      part: of the model.
    """

    device: str
    start: float
    end: float
    collective: str | None
    part: str = ""


def kind_of_opcode(opcode: str) -> str | None:
    """The collective that an instruction is or starts."""
    base = opcode.removesuffix("-start").removesuffix("-done")
    return base if base in KINDS else None


def kind_of_kernel(kernel: str) -> str | None:
    """The collective that one of NCCL's kernels runs."""
    name = kernel.lower()
    if "nccl" not in name:
        return None
    name = name.replace("_", "")
    return next((kind for part, kind in _KERNELS if part in name), OTHER)


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time as disjoint intervals in order."""
    found: list[Interval] = []
    for start, end in sorted(intervals):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        elif end > start:
            found.append((start, end))
    return found


def total(intervals: Iterable[Interval]) -> float:
    """Length of disjoint intervals."""
    return sum(end - start for start, end in intervals)


def common(one: Sequence[Interval], other: Sequence[Interval]) -> float:
    """Length of what two lists of disjoint intervals in order share."""
    i = j = 0
    length = 0.0
    while i < len(one) and j < len(other):
        length += max(min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]), 0.0)
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return length


def overlap(events: Sequence[Event], steps: int) -> dict[str, Any]:
    """Seconds of communication of a step.

    Args:
      events: of all devices, of `steps` steps.
      steps: how many were profiled.

    Returns:
      devices: how many ran something.
      seconds: in which a device talks. exposed: in which it only talks; overlapped: the rest of it.
      idle: in which it does neither, from its first event to its last.
      kinds: rows of calls, seconds and exposed seconds of a step by kind of collective.
      Seconds are means over devices; most_exposed is that of the device with the most.
    """
    devices = sorted({event.device for event in events})
    rows: list[dict[str, float]] = []
    kinds: dict[str, dict[str, float]] = {}
    for device in devices:
        mine = [event for event in events if event.device == device]
        compute = union((e.start, e.end) for e in mine if e.collective is None)
        talk = union((e.start, e.end) for e in mine if e.collective is not None)
        busy = union([*compute, *talk])
        exposed = total(talk) - common(talk, compute)
        idle = busy[-1][1] - busy[0][0] - total(busy) if busy else 0.0
        rows.append({"seconds": total(talk), "exposed": exposed, "idle": idle})
        for kind in sorted({e.collective for e in mine if e.collective is not None}):
            own = [(e.start, e.end) for e in mine if e.collective == kind]
            spans = union(own)
            row = kinds.setdefault(kind, {"calls": 0.0, "seconds": 0.0, "exposed": 0.0})
            each = steps * len(devices)
            row["calls"] += len(own) / each
            row["seconds"] += total(spans) / each
            row["exposed"] += (total(spans) - common(spans, compute)) / each
    mean = lambda name: statistics.fmean(row[name] for row in rows) / steps if rows else 0.0
    seconds, exposed = mean("seconds"), mean("exposed")
    return {
        "devices": len(devices),
        "seconds": seconds,
        "exposed": exposed,
        "overlapped": seconds - exposed,
        "most_exposed": max((row["exposed"] for row in rows), default=0.0) / steps,
        "idle": mean("idle"),
        "kinds": kinds,
    }


def beside(events: Sequence[Event], steps: int) -> dict[str, float]:
    """Seconds of a step in which a device computes a part of the model and talks, by part.

    That is not time lost, but time in which a part shares bandwidth and multiprocessors.

    Args:
      events: of all devices, of `steps` steps.
      steps: how many were profiled.

    Returns:
      Means over devices; parts that never run beside a collective are left out.
    """
    devices = sorted({event.device for event in events})
    found: dict[str, float] = {}
    for device in devices:
        mine = [event for event in events if event.device == device]
        talk = union((e.start, e.end) for e in mine if e.collective is not None)
        for part in sorted({e.part for e in mine if e.collective is None}):
            own = union((e.start, e.end) for e in mine if e.collective is None and e.part == part)
            if shared := common(own, talk):
                found[part] = found.get(part, 0.0) + shared / (steps * len(devices))
    return found
