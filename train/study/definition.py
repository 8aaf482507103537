"""What a study is: runs with labels and seeds, what they are compared with, and what is swept."""

from __future__ import annotations

import fnmatch
import importlib
import pkgutil
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from sparsejax.spec import Backend
from train.config import Config, validate
from train.data.config import DataConfig
from train.study.equal_time import Speedups

PACKAGE = "configs.studies"

Factor = float | int | str


def run_key(label: str, seed: int) -> str:
    """Name of the files of a label's run."""
    return f"{re.sub(r'[^A-Za-z0-9.+-]+', '_', label)}-seed{seed}"


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
      label: the group; runs of one label differ in their seed only.
      seed: seeds initialisation and data order; runs of different labels with one seed are a pair.
      config: the whole configuration, with this seed.
      factors: what this label sets, by name, for sweeps.
    """

    label: str
    seed: int
    config: Config
    factors: Mapping[str, Factor] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """Name of the run's files."""
        return run_key(self.label, self.seed)

    @property
    def tokens(self) -> int:
        """Tokens the whole run trains on."""
        return self.config.steps * self.config.tokens_per_step


@dataclass(frozen=True)
class Axis:
    """A factor that is swept: final loss is drawn against it, a line for each setting of the
    other factors.

    Attributes:
      factor: its name in `Run.factors`.
      log: whether it is drawn on a logarithmic axis.
    """

    factor: str
    log: bool = False


@dataclass(frozen=True)
class Study:
    """Runs and how to read them.

    Attributes:
      name: names the folder of the results.
      question: one sentence, the heading of the report.
      runs: in the order in which they are run.
      baseline: label that the others are compared with, paired by seed; None compares nothing.
      axes: what is swept.

    Raises:
      ValueError: no runs, two runs of one name, or a baseline or factor that no run has.
    """

    name: str
    question: str
    runs: tuple[Run, ...]
    baseline: str | None = None
    axes: tuple[Axis, ...] = ()

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError(f"study {self.name!r} has no runs")
        counts = Counter(run.key for run in self.runs)
        if twice := sorted(key for key, count in counts.items() if count > 1):
            raise ValueError(f"study {self.name!r} has several runs named {', '.join(twice)}")
        if self.baseline is not None and self.baseline not in self.labels:
            raise ValueError(
                f"baseline={self.baseline!r} of study {self.name!r} is none of its labels: "
                f"{', '.join(self.labels)}"
            )
        for axis in self.axes:
            if not any(axis.factor in run.factors for run in self.runs):
                raise ValueError(f"no run of study {self.name!r} has the factor {axis.factor!r}")
        for run in self.runs:
            if run.config.seed != run.seed:
                raise ValueError(f"run {run.key} has config.seed={run.config.seed}")

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels, in the order of their first run."""
        return tuple(dict.fromkeys(run.label for run in self.runs))

    def validate(self) -> None:
        """Refuses a study with a configuration that cannot run, before the first one starts.

        Raises:
          ValueError: one line that names the run and the offending values.
        """
        for run in self.runs:
            try:
                validate(run.config)
            except ValueError as error:
                raise ValueError(f"run {run.key}: {error}") from None


Settings = Mapping[str, Mapping[str, Any]]
"""Fields by section of the configuration: {"optimizer": {"learning_rate": 1e-3}}."""


@dataclass(frozen=True)
class Tuned:
    """What a sweep found best (`train.study.tuned`).

    Attributes:
      batch_size: sequences a step, one for all forms, so that comparisons take the same steps.
      learning_rate: peak rate by form of the FFN.
      init_scale: of the layers within the blocks, by form; the study's own where it has none.
      settings: of all forms, fields by section of the configuration, such as {"optimizer": {"b2":
        0.99}}: what the sweep held fixed, in the place of the study's own.
      form_settings: by form, likewise, over `settings`: learning rates of parts that suit one form
        and not another.
    """

    batch_size: int
    learning_rate: Mapping[str, float]
    init_scale: Mapping[str, float] = field(default_factory=dict)
    settings: Settings = field(default_factory=dict)
    form_settings: Mapping[str, Settings] = field(default_factory=dict)


@dataclass(frozen=True)
class Options:
    """What the command line may change about a study.

    Attributes:
      base: configuration the study varies; None is the study's own choice.
      backend: kernels of the sparse phases; None is the configuration's own choice.
      data: training and validation text of all runs.
      seeds: replace the study's own; empty keeps them.
      speedups: of a sparse step over a dense one, where measured.
      tuned: what a sweep found, in the place of the studies' own settings; None keeps those.
    """

    base: str | None = None
    backend: Backend | None = None
    data: DataConfig = field(default_factory=DataConfig)
    seeds: tuple[int, ...] = ()
    speedups: Speedups = field(default_factory=Speedups)
    tuned: Tuned | None = None


def matching(patterns: Sequence[str], labels: Sequence[str], option: str) -> set[str]:
    """The labels that are, or match, one of the patterns (`fnmatch`).

    Args:
      patterns: labels, or patterns of them. labels: to look in.
      option: what the patterns were given by, for the error.

    Raises:
      ValueError: a pattern matches no label.
    """
    wanted: set[str] = set()
    for pattern in patterns:
        found = {pattern} & {*labels} or set(fnmatch.filter(labels, pattern))
        if not found:
            raise ValueError(f"{option} {pattern!r} matches no label: {', '.join(labels)}")
        wanted |= found
    return wanted


def names() -> list[str]:
    """The studies that `get` knows."""
    modules = pkgutil.iter_modules(_package().__path__)
    return sorted(module.name for module in modules if not module.name.startswith("_"))


def summary(name: str) -> str:
    """First line of a study's description."""
    return (_module(name).__doc__ or "").strip().partition("\n")[0]


def get(name: str, options: Options | None = None) -> Study:
    """The study of a name: what `study(options)` in configs/studies/NAME.py returns.

    Raises:
      ValueError: if there is none of that name (lists the known ones), or its options do not fit.
    """
    study = _module(name).study(options or Options())
    if study.name != name:
        raise ValueError(f"configs/studies/{name}.py returns a study named {study.name!r}")
    return study


def _package() -> ModuleType:
    # By name, not by import: studies are users of this package.
    return importlib.import_module(PACKAGE)


def _module(name: str) -> ModuleType:
    if name not in names():
        raise ValueError(f"study {name!r} is unknown; known: {', '.join(names())}")
    return importlib.import_module(f"{PACKAGE}.{name}")
