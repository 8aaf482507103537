"""One run on many processes: who takes part, and what they must decide together.

A process knows its place from its environment, the first of these that is there:

* plain: `JAX_COORDINATOR_ADDRESS` (host:port of process 0), `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`;
* Kubernetes: the same, with `JOB_COMPLETION_INDEX` of an indexed Job as the process's number;
* Slurm: what `srun` sets for a step of several tasks. The coordinator is the step's first node, the
  port follows from the job's number.

With none of them, or for one process, nothing is initialised. One process drives all GPUs that it
sees; give each its own where a node runs several (`srun --gpus-per-task`, or
`JAX_LOCAL_DEVICE_IDS`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import numpy as np
from jax.experimental import multihost_utils

HEARTBEAT_SECONDS = 60
"""Silence after which a process counts as dead, and the others end."""

SHUTDOWN_SECONDS = 60
"""How long a process that ends waits for the others to end."""

_PORTS = range(61440, 65536)
_PLAIN = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


@dataclass(frozen=True)
class Place:
    """A process's place in the job.

    Attributes:
      coordinator: host:port at which process 0 listens.
      count: processes in all.
      index: this one, from 0.
    """

    coordinator: str
    count: int
    index: int


def find_place(environment: Mapping[str, str]) -> Place | None:
    """Reads a process's place from its environment; None for a job of one process.

    Raises:
      ValueError: variables that are incomplete or make no sense, in one line.
    """
    if any(name in environment for name in _PLAIN[:2]):
        names = list(_PLAIN)
        if "JAX_PROCESS_ID" not in environment and "JOB_COMPLETION_INDEX" in environment:
            names[2] = "JOB_COMPLETION_INDEX"
        missing = [name for name in names if name not in environment]
        if missing:
            given = [name for name in names if name in environment]
            raise ValueError(f"{', '.join(given)} set, but not {', '.join(missing)}")
        coordinator = environment[names[0]]
        if not re.fullmatch(r".+:\d+", coordinator):
            raise ValueError(f"{names[0]}={coordinator!r} must be host:port")
        count, index = (_number(environment, name) for name in names[1:])
        return _checked(coordinator, count, index, names)
    if _number(environment, "SLURM_STEP_NUM_TASKS", "1") > 1:
        names = ["SLURM_STEP_NODELIST", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_JOB_ID"]
        missing = [name for name in names if name not in environment]
        if missing:
            raise ValueError(f"a Slurm step of several tasks without {', '.join(missing)}")
        count, index, job = (_number(environment, name) for name in names[1:])
        host = first_host(environment[names[0]])
        return _checked(f"{host}:{_PORTS[job % len(_PORTS)]}", count, index, names)
    return None


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list such as `a[001-003,007],b2`.

    Raises:
      ValueError: it is no such list.
    """
    match = re.match(r"([^\[\],\s]+)(?:\[(\d+)[^\]]*\]([^\[\],\s]*))?(?:,|$)", nodes)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST={nodes!r} is not a list of nodes")
    prefix, number, suffix = match.groups()
    return prefix + (number or "") + (suffix or "")


def _number(environment: Mapping[str, str], name: str, default: str | None = None) -> int:
    text = environment.get(name, default)
    if text is None or not re.fullmatch(r"\d{1,12}", text):
        raise ValueError(f"{name}={text!r} must be a number")
    return int(text)


def _checked(coordinator: str, count: int, index: int, names: list[str]) -> Place | None:
    if not 0 <= index < count:
        raise ValueError(f"{names[2]}={index} must be below {names[1]}={count}")
    return Place(coordinator, count, index) if count > 1 else None


def initialize(environment: Mapping[str, str] = os.environ) -> Place | None:
    """Joins the job that the environment describes; must come before any use of a device.

    Returns:
      This process's place; None for a job of one process.

    Raises:
      ValueError: as `find_place`.
      RuntimeError: the other processes did not come within five minutes.
    """
    place = find_place(environment)
    if place is not None:
        jax.distributed.initialize(
            place.coordinator,
            place.count,
            place.index,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    return place


def any_process(flag: bool) -> bool:
    """Whether the flag is up on any process: the same answer on all. All must call it.

    Waits for the devices, so call it where the host waits for them anyway.
    """
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.int32(flag))))
