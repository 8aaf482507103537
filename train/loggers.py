"""Where numbers go besides the console and the JSONL file: TensorBoard and Weights & Biases.

A sink gets the finite numbers of a record. Its package is optional. Without TensorBoard's,
`require_packages` refuses before a run starts; without Weights & Biases', the run goes on with a
warning: `metrics.jsonl` has every number anyway. A sink that is not there is no sink, so the logger
has no special cases.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from train.config import Config, LogConfig

WANDB_ID = "wandb_id"
"""File of a run's folder with its name at Weights & Biases: a resumed run goes on there."""

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Takes numbers by name and step."""

    def write(self, scalars: Mapping[str, float], step: int) -> None:
        """Records the numbers of a step; steps never decrease within a process."""

    def close(self, *, failed: bool) -> None:
        """Flushes. `failed` says that the run ended in an error."""


def require_packages(chosen: LogConfig) -> None:
    """Refuses TensorBoard where its package is not installed.

    Raises:
      ValueError: one line with the command that installs it.
    """
    if chosen.tensorboard and not _installed("tensorboardX"):
        raise ValueError(
            "log.tensorboard=True needs tensorboardX, which is not installed; run: "
            'pip install "tensorboardX>=2.6"'
        )


def _installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def open_sinks(config: Config, folder: Path, start_step: int) -> list[Sink]:
    """The sinks that a run asks for; none by default.

    Weights & Biases without its package is none either, and a warning: a configuration that many
    machines share need not know which of them have it.

    Args:
      config: the resolved run.
      folder: the run's folder.
      start_step: optimiser steps already done.

    Raises:
      ValueError: as `require_packages`, or Weights & Biases is there and refuses to start.
    """
    require_packages(config.log)
    sinks: list[Sink] = []
    if config.log.tensorboard:
        sinks.append(TensorBoard(folder, start_step))
    if config.log.wandb and _installed("wandb"):
        sinks.append(WeightsAndBiases(config, folder))
    elif config.log.wandb:
        log.warning(
            "log.wandb=True needs wandb, which is not installed: going on without it, all numbers "
            'are in metrics.jsonl (pip install "wandb>=0.19")'
        )
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
