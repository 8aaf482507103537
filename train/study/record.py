"""One JSON file a run: everything the report needs, and what the run was made with."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from train import metrics
from train.config import Config
from train.study.definition import Run, run_key

Status = Literal["finished", "non_finite", "failed"]
Record = dict[str, Any]

FORMAT = 1

# Leaves of a configuration that say where and how conveniently it runs, not what it computes.
_IRRELEVANT = (
    "name",
    "output",
    "checkpoint.",
    "log.tensorboard",
    "log.wandb",
    "profile.",
    "data.workers",
    "data.threads",
    "data.read_ahead",
    "data.cache",
)

# Leaves that do nothing in a run without a sparse step.
_SPARSE_ONLY = ("sparsity.", "schedule.warmup_steps", "optimizer.rewarm_steps")

# But for those that even the loads of a mixture's experts in all phases.
_MIXTURE = ("sparsity.bias_rate",)

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")


@dataclass(frozen=True)
class Folders:
    """Where a study keeps what.

    Attributes:
      output: results and report: small, and all that a report is drawn from.
      scratch: run folders, logs and compiled programs: large, of no use afterwards.
    """

    output: Path
    scratch: Path

    def result(self, run: Run) -> Path:
        """The run's JSON file."""
        return self.output / "results" / result_name(run.label, run.seed)

    def log(self, run: Run) -> Path:
        """What the run printed."""
        return self.scratch / "logs" / f"{run.key}.txt"

    @property
    def runs(self) -> Path:
        """Folder of the runs' own folders."""
        return self.scratch / "runs"

    @property
    def compiled(self) -> Path:
        """Compiled programs, shared by all runs."""
        return self.scratch / "compiled"


def result_name(label: str, seed: int) -> str:
    """Name of the JSON file of a label's run."""
    return f"{run_key(label, seed)}.json"


def leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of every leaf of a configuration's dictionary."""
    for name, value in config.items():
        path = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from leaves(value, f"{path}.")
        else:
            yield path, value


def decisive(config: Mapping[str, Any]) -> dict[str, Any]:
    """The leaves that decide the result, by dotted name; a dense run has no sparsity to decide."""
    sparse_steps = round(config["schedule"]["sparse_fraction"] * config["steps"])
    idle = _IRRELEVANT if sparse_steps else _IRRELEVANT + _SPARSE_ONLY
    always = _MIXTURE if config["model"].get("experts") else ()
    return {
        name: value for name, value in leaves(config) if name in always or not name.startswith(idle)
    }


def config_hash(config: Config) -> str:
    """16 hexadecimal digits that name what the configuration computes."""
    found = json.dumps(decisive(dataclasses.asdict(config)), sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:16]


def differences(record: Mapping[str, Any], config: Config) -> list[str]:
    """What the configuration of a record computes otherwise than this one, as "name: then, now".

    A field that did not exist when the run was made counts as its present default, so that a new
    switch of the trainer does not make old results worthless. Nor does stating of the model what
    was left open: None then is what the record's `model` says it became.
    """
    then, now = decisive(record["config"]), decisive(dataclasses.asdict(config))
    became = {f"model.{name}": value for name, value in (record.get("model") or {}).items()}
    left_open = [name for name in then if then[name] is None and now.get(name) is not None]
    then |= {name: became.get(name) for name in left_open}
    defaults = dict(leaves(dataclasses.asdict(Config())))
    pairs = {name: (then.get(name, defaults[name]), value) for name, value in now.items()}
    pairs |= {name: (then[name], None) for name in sorted(then.keys() - now.keys())}
    return [f"{name}: {old}, now {new}" for name, (old, new) in pairs.items() if old != new]


def changes(record: Mapping[str, Any], run: Run) -> list[str]:
    """What makes a result that of another run than this one: as `differences`, and the label, since
    labels that differ in punctuation share a file."""
    label = record["label"]
    other = [] if label == run.label else [f"label: {label}, now {run.label}"]
    return other + differences(record, run.config)


def read(path: Path) -> Record | None:
    """A result file's content; None if there is none.

    Raises:
      ValueError: it is not a result of this format.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path} is not a study's result of format {FORMAT}")
    return record


def read_all(output: Path) -> list[Record]:
    """All results of a study's folder, by file name.

    Raises:
      ValueError: as `read`.
    """
    found = (read(path) for path in sorted((output / "results").glob("*.json")))
    return [record for record in found if record is not None]


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file, whole or not at all; NaN and infinity become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(strict(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    new.replace(path)


def strict(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [strict(item) for item in value]
    return value


def failure(run: Run, study: str, error: str, seconds: float) -> Record:
    """The record of a run that left none."""
    return {
        "format": FORMAT,
        "study": study,
        "label": run.label,
        "seed": run.seed,
        "factors": dict(run.factors),
        "status": "failed",
        "error": error,
        "hash": config_hash(run.config),
        "config": dataclasses.asdict(run.config),
        "wall_seconds": seconds,
        "tokens": run.tokens,
    }


def trained(folder: Path) -> dict[str, Any]:
    """What a run's log says: curves, held-out losses, speeds.

    Args:
      folder: the run's folder; one without a log gives empty curves.

    Returns:
      `curve` (columns step, loss, grad_norm, phase of the log lines), `evaluations` (columns step
      and each view's loss), `final` and `best` held-out losses by view (best with its step),
      `final_batches` (the final dense loss of each held-out batch),
      `phases` (tokens/s and the like, as the run's summary), `loop_seconds` (training loop without
      evaluation and checkpoints), `steps_done`, and `expert_load` (largest ratio of the busiest
      expert to the mean over the sparse phase's second half, None where nothing is routed), and
      `token_churn` (mean over layers, by refresh).
    """
    path = folder / metrics.FILE_NAME
    records = metrics.read(path) if path.exists() else []
    lines = [r for r in records if r["kind"] == "train"]
    evaluations = [r for r in records if r["kind"] == "eval"]
    summary = next((r for r in records if r["kind"] == "summary"), None)
    views = sorted({key for r in evaluations for key in r if key.startswith("loss_")})
    best = {}
    for view in views:
        known = [r for r in evaluations if r.get(view) is not None]
        if known:
            at = min(known, key=lambda r: r[view])
            best[view] = {"loss": at[view], "step": at["step"]}
    loads = [r["expert_load_max"] for r in lines if r.get("expert_load_max") is not None]
    last = evaluations[-1] if evaluations else {}
    column = lambda rows, key: [r.get(key) for r in rows]
    return {
        "curve": {key: column(lines, key) for key in ("step", "loss", "grad_norm", "phase")},
        "evaluations": {key: column(evaluations, key) for key in ("step", *views)},
        "final": {view: last[view] for view in views if last.get(view) is not None},
        "final_batches": last.get("batches_dense"),
        "best": best,
        "phases": {} if summary is None else summary["phases"],
        "loop_seconds": None if summary is None else summary["elapsed"] - summary["paused"],
        "steps_done": lines[-1]["step"] if lines else 0,
        "token_churn": [r["token_churn_mean"] for r in records if "token_churn_mean" in r],
        "expert_load": max(loads[len(loads) // 2 :], default=None),
    }


@functools.cache  # the code that runs is what was imported at the start
def versions() -> dict[str, str]:
    """Python, the packages that decide a result, and the commit where the code is a clone."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        found[package] = importlib.metadata.version(package)
    root = Path(__file__).parent
    try:
        command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12")
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        found["commit"] = done.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return found
