"""One run of a study, from its configuration to its result file."""

from __future__ import annotations

import dataclasses
import functools
import gc
import io
import os
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import jax
import jax.numpy as jnp
from rich.console import Console

from train import accounting
from train.config import Config, resolve
from train.data.config import DataConfig
from train.data.pipeline import open_data
from train.loop import NonFiniteError, train
from train.programs import Shared
from train.run_folder import CHECKPOINTS
from train.study.definition import Run
from train.study.record import (
    FORMAT,
    Folders,
    Record,
    Status,
    config_hash,
    trained,
    versions,
    write,
)

LineListener = Callable[[str], None] | None

# Runs of one process share what they compile: a study's runs differ mostly in seed and schedule.
_SHARED: Shared = {}


def execute(
    run: Run, study: str, folders: Folders, line: LineListener = None, *, jobs: int = 1
) -> Record | None:
    """Trains from the first step to the last and writes the result file.

    Args:
      run: what to train.
      study: name of the study.
      folders: where results and run folders go; what an earlier attempt left there is deleted.
      line: called with every line that the run prints; None for nobody.
      jobs: runs that share the device, for the record: speeds are not what they would be alone.

    Returns:
      The result, also of a run that failed; None if a signal stopped it: nothing was written and
      it has to start again.
    """
    config = dataclasses.replace(run.config, name=run.key, output=str(folders.runs))
    use_compiled(folders.compiled)
    folder = folders.runs / run.key
    shutil.rmtree(folder, ignore_errors=True)
    folders.result(run).unlink(missing_ok=True)
    log = folders.log(run)
    log.parent.mkdir(parents=True, exist_ok=True)
    status: Status = "finished"
    error = None
    began, began_date = time.monotonic(), time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with log.open("w", encoding="utf-8") as file:
        console = Console(file=_Lines(file, line), width=140, force_terminal=False)
        try:
            if not train(config, console=console, shared=_SHARED).finished:
                return None
        except NonFiniteError as problem:
            status, error = "non_finite", str(problem)
        except Exception as problem:
            # One run of many: whatever it died of is reported, and the others go on.
            status, error = "failed", f"{type(problem).__name__}: {problem}"
            file.write(traceback.format_exc())
    seconds = time.monotonic() - began
    gc.collect()  # the run's arrays leave the device before the next run's arrive
    record = {
        "format": FORMAT,
        "study": study,
        "label": run.label,
        "seed": run.seed,
        "factors": dict(run.factors),
        "status": status,
        "error": error,
        "hash": config_hash(run.config),
        "config": dataclasses.asdict(run.config),
        "began": began_date,
        "wall_seconds": seconds,
        "versions": versions(),
        "device": _device(),
        "jobs": jobs,
        "tokens": run.tokens,
        "data": None,
        "model": None,
        **trained(folder),
    }
    if status != "failed":
        record |= _facts(run.config)
        record["data"]["epochs"] = run.tokens / record["data"]["tokens_an_epoch"]
    write(folders.result(run), record)
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # of a study that keeps them
    return record


def use_compiled(folder: Path) -> None:
    """Keeps compiled programs in `folder`, for runs that differ in nothing but their seed and for
    the next process; JAX keeps its autotuning results with them. JAX_COMPILATION_CACHE_DIR, where
    set, wins."""
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    jax.config.update("jax_compilation_cache_dir", str(folder.absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def device_answers() -> bool:
    """Whether the device still computes: a failed kernel can leave it unusable for the process."""
    try:
        return float(jax.block_until_ready(jnp.arange(4.0).sum())) == 6.0
    except Exception:
        return False


def _facts(config: Config) -> dict[str, Any]:
    data = _data(config.data, config.sequence_length)
    resolved = resolve(config, tokenizer_vocab_size=data["vocab_size"])
    parameters = accounting.parameters(resolved)
    windows = min(config.log.eval_windows or sys.maxsize, data["validation_windows"])
    return {
        "data": {
            **data,
            "evaluated_windows": windows,
            "evaluated_tokens": windows * config.sequence_length,
        },
        "model": {
            **dataclasses.asdict(resolved.model),
            "parameters": parameters.total,
            "body_parameters": parameters.body,
        },
    }


@functools.cache
def _data(data: DataConfig, sequence_length: int) -> dict[str, Any]:
    with open_data(data, sequence_length=sequence_length, global_batch=1, seed=0) as opened:
        return {
            "fingerprint": opened.fingerprint,
            "vocab_size": opened.vocab_size,
            "tokens_an_epoch": opened.train_windows * sequence_length,
            "validation_windows": opened.validation_windows,
        }


def _device() -> dict[str, Any]:
    chip = jax.devices()[0]
    return {"platform": chip.platform, "kind": chip.device_kind, "count": jax.device_count()}


class _Lines(io.StringIO):
    """A text file that tells somebody about each whole line written to it."""

    def __init__(self, file: TextIO, line: LineListener) -> None:
        super().__init__()
        self._file, self._line, self._rest = file, line, ""

    def write(self, text: str) -> int:
        self._file.write(text)
        self._file.flush()
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if self._line is not None and line.strip():
                self._line(line.strip())
        return len(text)

    def flush(self) -> None:
        self._file.flush()
