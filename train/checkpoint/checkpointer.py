"""Asynchronous, atomic, verified checkpoints of a whole training state."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import os
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from train.checkpoint import manifest, tree
from train.checkpoint.compare import refuse_other_config
from train.checkpoint.entries import CONFIG, STAGING, Entry, entries_of, folder_name, parse
from train.checkpoint.errors import CheckpointError, reason
from train.checkpoint.processes import on_process_zero

log = logging.getLogger(__name__)

FORMAT = 1
_ARRAYS, _LAYOUT, _HOST, _VERSIONS = "arrays", "layout.json", "host.json", "versions.json"
_DISTRIBUTIONS = {
    "jax": "jax",
    "flax": "flax",
    "orbax": "orbax-checkpoint",
    "sparsejax": "sparsejax",
}


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held.

    Attributes:
      step: optimiser steps done when it was saved.
      state: the pytree, with the template's structure, dtypes and shardings.
      host: the JSON dict saved with it.
    """

    step: int
    state: Any
    host: dict[str, Any]


class Checkpointer:
    """Saves and restores the training state in a folder, one sub-folder a checkpoint.

    A save stages everything in a hidden folder, writes a manifest with the size and checksum of
    every file, makes all of it durable, and only then gives the folder its final name and deletes
    what `keep` no longer wants. Killed at any moment, it leaves the checkpoints before it intact.

    Every process of a run makes the same calls; the folder is one that all of them see. Processes
    write their own shards; process 0 writes the rest. Nothing is ever unpickled. Use it as a
    context manager, or call `close`, so that the last save finishes before the program does.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int, config: Mapping[str, Any]):
        """Touches no file; the folder is made by the first save.

        Args:
          folder: of this run only.
          keep: good checkpoints that stay; older ones are deleted.
          config: the run's configuration, nested dicts of JSON values (`dataclasses.asdict`).

        Raises:
          ValueError: if keep < 1 or config is not JSON.
          CheckpointError: if `folder` is a file.
        """
        if keep < 1:
            raise ValueError(f"{keep=} must be at least 1")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._config_text = _to_json("config", config)
        self._config = json.loads(self._config_text)
        if self.folder.exists() and not self.folder.is_dir():
            raise CheckpointError(f"cannot keep checkpoints in {self.folder}: it is a file")
        _quieten_orbax()
        self._orbax = ocp.AsyncCheckpointer(
            ocp.PyTreeCheckpointHandler(),
            # A folder that cannot be made is an error at once, not a time-out of the writers.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
        )
        self._staged = self.folder / STAGING
        self._thread: threading.Thread | None = None
        self._error: CheckpointError | None = None
        # The step last saved or restored: saving it again would change nothing.
        self._current: int | None = None
        self._damaged: set[Path] = set()

    def save(self, step: int, state: Any, host: Mapping[str, Any], *, force: bool = False) -> bool:
        """Starts saving; returns once the arrays are copied, so that they may be donated.

        Args:
          step: optimiser steps done.
          state: any pytree of JAX arrays (of any sharding), random keys and numbers.
          host: JSON values to keep with it, such as the position in the data.
          force: save even if the state of this step is what was last saved or restored.

        Returns:
          False if there was nothing to do: this step was the last saved or restored.

        Raises:
          ValueError: if step < 0, host is not JSON, or a leaf of state is no array or number.
          CheckpointError: if this save cannot start, or the one before it failed.
        """
        if step < 0:
            raise ValueError(f"{step=} must not be negative")
        arrays, layout = tree.to_arrays(tree.named_leaves(state)[0])
        if not arrays:
            raise ValueError("state has no elements")
        documents = {
            _HOST: _to_json("host", host),
            CONFIG: self._config_text,
            _LAYOUT: _to_json("layout", layout),
            _VERSIONS: _to_json("versions", _versions()),
        }
        self.wait()
        if step == self._current and not force:
            return False
        try:
            on_process_zero(self._empty_staging)
            self._orbax.save(
                self._staged / folder_name(step) / _ARRAYS, args=ocp.args.PyTreeSave(arrays)
            )
        except Exception as error:
            raise self._failed(step, error) from error
        self._current = step
        self._thread = threading.Thread(
            target=self._finish, args=(step, documents), name="checkpoint"
        )
        self._thread.start()
        return True

    def restore(
        self, template: Any, *, step: int | None = None, partial: bool = False
    ) -> Restored | None:
        """The newest good checkpoint; damaged ones are passed over with a warning.

        Args:
          template: a pytree like the saved one with jax.ShapeDtypeStruct leaves; their shardings
            say where the arrays will live, which may be on another mesh than they came from.
          step: restore this step and no other.
          partial: the template may lack some of the saved leaves (to read parameters without the
            optimiser's state, say).

        Returns:
          None if nothing was ever saved in full.

        Raises:
          ValueError: if the checkpoint is of another configuration or of another form than the
            template, there is none of `step`, or there are checkpoints but all are damaged.
          CheckpointError: if the files cannot be read.
        """
        self.wait()
        leaves, structure = tree.named_leaves(template)
        name = on_process_zero(lambda: self._choose(step))
        if name is None:
            return None
        folder = self.folder / name
        try:
            layout = json.loads((folder / _LAYOUT).read_text(encoding="utf-8"))
            host = json.loads((folder / _HOST).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"cannot read {folder}: {reason(error)}") from error
        tree.check_layout(layout, leaves, partial=partial)
        items, args = tree.restore_args(leaves)
        arrays = {}
        try:
            if items:
                arrays = self._orbax.restore(
                    folder / _ARRAYS,
                    args=ocp.args.PyTreeRestore(items, restore_args=args, partial_restore=partial),
                )
        except Exception as error:
            raise CheckpointError(f"cannot restore {folder}: {reason(error)}") from error
        state = jax.tree.unflatten(structure, tree.from_arrays(leaves, arrays))
        found = parse(folder)
        assert found is not None
        self._current = found.step
        return Restored(found.step, state, host)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, None if there is none.

        Looks at the files' sizes only, which is quick; `restore` looks at their contents too.

        Raises:
          CheckpointError: as `wait`, or if the folder cannot be read.
        """
        self.wait()
        return on_process_zero(
            lambda: next((entry.step for entry in self._complete(entries_of(self.folder))), None)
        )

    def wait(self) -> None:
        """Blocks until the save under way is durable.

        Raises:
          CheckpointError: if it failed; the checkpoints before it are intact. Raised once.
        """
        if self._thread is None:
            return
        error = self._join()
        if jax.process_count() > 1:
            failures = multihost_utils.process_allgather(np.int32(error is not None))
            if error is None and failures.any():
                self._current = None
                error = CheckpointError(
                    f"cannot save a checkpoint in {self.folder}: process "
                    f"{int(failures.argmax())} failed"
                )
        if error is not None:
            raise error

    def close(self) -> None:
        """Waits as `wait` does, then releases what orbax holds."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
            return
        # Other processes may be elsewhere by now: finish alone. And the error under way is the one
        # to show, which a failed save must not hide.
        failure = self._join()
        if failure is not None:
            log.warning("%s", failure)
        self._orbax.close()

    def _join(self) -> CheckpointError | None:
        """Waits for this process's part of the save under way; its error, if it failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        return error

    def _empty_staging(self) -> None:
        """Removes what a killed save or deletion left behind, and makes the folder."""
        shutil.rmtree(self._staged, ignore_errors=True)
        try:
            self._staged.mkdir(parents=True)
        except OSError as error:
            raise CheckpointError(reason(error)) from error

    def _finish(self, step: int, documents: dict[str, str]) -> None:
        """The rest of a save, in its own thread."""
        try:
            # Returns when every process has written its shards.
            self._orbax.wait_until_finished()
            if jax.process_index() == 0:
                self._publish(step, documents)
        except BaseException as error:
            self._error = self._failed(step, error)

    def _publish(self, step: int, documents: dict[str, str]) -> None:
        staged = self._staged / folder_name(step)
        for name, text in documents.items():
            (staged / name).write_text(text, encoding="utf-8")
        manifest.write(staged)
        attempts = [entry.attempt for entry in entries_of(self.folder) if entry.step == step]
        final = self.folder / folder_name(step, max(attempts, default=-1) + 1)
        staged.rename(final)
        manifest.sync_folder(self.folder)
        try:
            self._prune(final)
        except OSError as error:
            log.warning("cannot delete an old checkpoint: %s", reason(error))

    def _prune(self, newest: Path) -> None:
        """Deletes what is older than the checkpoint just saved, but for `keep` good steps."""
        entries = entries_of(self.folder)
        kept: dict[int, Path] = {}
        for entry in self._complete(entries):
            if len(kept) < self.keep:
                kept.setdefault(entry.step, entry.path)
        last = parse(newest)
        assert last is not None
        for entry in entries:
            if entry < last and entry.path not in kept.values():
                # Out of sight first: a deletion cut short must not look like damage.
                doomed = self._staged / f"deleted-{entry.path.name}"
                entry.path.rename(doomed)
                shutil.rmtree(doomed)
        shutil.rmtree(self._staged)

    def _choose(self, step: int | None) -> str | None:
        """Name of the folder to restore: the newest that is whole, if its config is ours."""
        entries = entries_of(self.folder)
        if step is not None:
            steps = sorted({entry.step for entry in entries})
            entries = [entry for entry in entries if entry.step == step]
            if not entries:
                raise ValueError(f"no checkpoint of {step=} in {self.folder}; there are {steps}")
        for entry in entries:
            found = manifest.problem(entry.path)
            if not found:
                text = (entry.path / CONFIG).read_text(encoding="utf-8")
                refuse_other_config(json.loads(text), self._config)
                return entry.path.name
            self._damaged.add(entry.path)
            log.warning("skipping damaged checkpoint %s: %s", entry.path, found)
        if entries:
            which = f"all checkpoints ({len(entries)})" if step is None else f"that of {step=}"
            raise ValueError(f"no good checkpoint in {self.folder}: {which} damaged")
        if self._staged.is_dir():
            log.warning("the first save in %s was cut short: nothing to restore", self.folder)
        return None

    def _complete(self, entries: list[Entry]) -> list[Entry]:
        """The entries not known to be damaged, after a quick look."""
        return [
            entry
            for entry in entries
            if entry.path not in self._damaged and not manifest.problem(entry.path, sizes_only=True)
        ]

    def _failed(self, step: int, error: BaseException) -> CheckpointError:
        """Cleans up after a save that failed and says so in one line."""
        self._current = None
        if jax.process_index() == 0:
            # Frees the space, which may be what was lacking.
            shutil.rmtree(self._staged, ignore_errors=True)
        return CheckpointError(
            f"cannot save the checkpoint of step {step} in {self.folder}: {reason(error)}"
        )


def _to_json(name: str, value: Any) -> str:
    try:
        return json.dumps(value, indent=1)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be stored as JSON: {reason(error)}") from error


def _versions() -> dict[str, Any]:
    versions: dict[str, Any] = {"format": FORMAT}
    for name, distribution in _DISTRIBUTIONS.items():
        try:
            versions[name] = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _not_from_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in Path(record.pathname).parts


def _quieten_orbax() -> None:
    """Drops orbax's own log lines: what matters of them reaches the caller as an error."""
    # Adding the same filter twice does nothing.
    logging.getLogger("absl").addFilter(_not_from_orbax)
