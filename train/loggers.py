"""Where numbers go besides the console and the JSONL file: TensorBoard and Weights & Biases.

A sink gets the finite numbers of a record. Its package is optional: `require_packages` says what is
missing before a run starts. A sink that is not wanted is no sink, so the logger has no special
cases.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.config import Config, LogConfig

WANDB_ID = "wandb_id"
"""File of a run's folder with its name at Weights & Biases: a resumed run goes on there."""

_PACKAGES = {
    "tensorboard": ("tensorboardX", "tensorboardX>=2.6"),
    "wandb": ("wandb", "wandb>=0.19"),
}


class Sink(Protocol):
    """Takes numbers by name and step."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Records the numbers of a step; steps never decrease within a process."""

    def close(self, *, failed: bool) -> None:
        """Flushes. `failed` says that the run ended in an error."""


def require_packages(log: LogConfig) -> None:
    """Refuses loggers whose package is not installed.

    Raises:
      ValueError: one line with the command that installs it.
    """
    for field, (module, requirement) in _PACKAGES.items():
        if getattr(log, field) and importlib.util.find_spec(module) is None:
            raise ValueError(
                f"log.{field}=True needs {module}, which is not installed; run: "
                f'pip install "{requirement}"'
            )


def open_sinks(config: Config, folder: Path, start_step: int) -> list[Sink]:
    """The sinks that a run asks for; none by default.

    Args:
      config: the resolved run.
      folder: the run's folder.
      start_step: optimiser steps already done.

    Raises:
      ValueError: as `require_packages`, or Weights & Biases refuses to start.
    """
    require_packages(config.log)
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(TensorBoard(folder, start_step))
    if config.log.wandb:
        sinks.append(WeightsAndBiases(config, folder))
    return sinks


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: Path, start_step: int):
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(os.fspath(folder), purge_step=start_step or None)

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run at Weights & Biases, or below the run's folder with WANDB_MODE=offline.

    A resumed run continues the same one. Steps that were logged before a kill and are run again are
    dropped there; they have the same values.
    """

    def __init__(self, config: Config, folder: Path):
        import wandb

        name = folder / WANDB_ID
        if not name.exists():
            name.write_text(secrets.token_hex(4), encoding="utf-8")
        try:
            self._run: Any = wandb.init(
                project=config.log.wandb_project,
                entity=config.log.wandb_entity,
                name=folder.name,
                id=name.read_text(encoding="utf-8"),
                resume="allow",
                dir=os.fspath(folder),
                config=dataclasses.asdict(config),
            )
        except wandb.Error as error:
            # No network, no key, no such project: a run that would go unrecorded does not start.
            reason = " ".join(str(error).split())
            raise ValueError(
                f"log.wandb=True: {reason} (`wandb login`, or WANDB_MODE=offline)"
            ) from error

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))
