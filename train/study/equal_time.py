"""Runs of equal wall-clock: what a faster sparse step is worth in tokens.

With a share p of sparse steps, each s times as fast as a dense one, a run of N tokens takes the
time of N (1 - p + p / s) dense tokens, so the whole run is 1 / (1 - p + p / s) times as fast.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from train.config import Config

KEY = "sparse_step_speedup"
SUFFIX = ", equal time"
"""Ends the label of a recipe whose run was stretched to the baseline's time."""


@dataclass(frozen=True)
class Speedups:
    """How many times as fast as a dense step a sparse one is.

    Attributes:
      default: for every label without its own; None where nothing was measured.
      by_label: measured for one recipe each; None for one whose speed is neither known nor that
        of the recipe that its label begins with.

    Raises:
      ValueError: a speed-up that is not a positive number.
    """

    default: float | None = None
    by_label: Mapping[str, float | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in (("speedup", self.default), *self.by_label.items()):
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name}={value} must be a positive number")

    def of(self, label: str) -> float | None:
        """The sparse step's speed-up in runs of this label, or of the recipe that the label names
        before a comma, or of that without its share of sparse steps ("M16 70%, equal time": "M16
        70%", then "M16"), or the default; None where unknown."""
        recipe = label.partition(",")[0]
        kind = " ".join(word for word in recipe.split() if not word.endswith("%"))
        known = (name for name in (label, recipe, kind) if name in self.by_label)
        return next((self.by_label[name] for name in known), self.default)

    def required(self, label: str) -> float:
        """As `of`.

        Raises:
          ValueError: unknown; says how to give it.
        """
        value = self.of(label)
        if value is None:
            raise ValueError(
                f"the speed of a sparse step of {label!r} is needed: give --speedup S "
                "(sparse over dense) or --speedup-from FILE.json"
            )
        return value

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self.default is not None or bool(self.by_label)


def read_speedups(path: str | os.PathLike[str]) -> Speedups:
    """Reads measured speed-ups.

    Args:
      path: a JSON object: `sparse_step_speedup` is either a number for all labels or an object
        from label to number, or null where unknown, in which "default" serves the other labels. Of
        a result of
        `benchmarks.train_step`, whose entries are called "M=16", that becomes the label "M16";
        its default is the first entry's and serves no other recipe.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not such an object.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from None
    value = found.get(KEY) if isinstance(found, dict) else None
    values = value if isinstance(value, dict) else {"default": value}
    numbers: dict[str, float | None] = {}
    for label, number in values.items():
        if isinstance(number, int | float) and not isinstance(number, bool):
            numbers[str(label)] = float(number)
        elif number is None and value is not None:
            numbers[str(label)] = None
    if len(numbers) < len(values) or not any(numbers.values()):
        raise ValueError(f"{os.fspath(path)} has no number, or object of numbers, under {KEY!r}")
    default = numbers.pop("default", None)
    if found.get("benchmark") == "train_step" and numbers:
        return Speedups(None, {name.replace("=", ""): s for name, s in numbers.items()})
    return Speedups(default, numbers)


def whole_run_speedup(sparse_share: float, speedup: float) -> float:
    """1 / (1 - p + p / s): how many times as fast as a dense run of as many tokens.

    Args:
      sparse_share: p, share of the steps that are sparse, 0 to 1.
      speedup: s, a dense step's time over a sparse step's.

    Raises:
      ValueError: out of range.
    """
    if not 0 <= sparse_share <= 1:
        raise ValueError(f"{sparse_share=} must be in [0, 1]")
    if not speedup > 0:
        raise ValueError(f"{speedup=} must be positive")
    return 1 / (1 - sparse_share + sparse_share / speedup)


def dense_tokens(config: Config, speedup: float) -> float:
    """Tokens that dense steps get through in the time this run takes.

    Args:
      config: the run; its model's dense step must cost what that of the run compared with costs.
      speedup: s, a dense step's time over a sparse step's.
    """
    share = config.sparse_steps / config.steps
    return config.steps * config.tokens_per_step / whole_run_speedup(share, speedup)


def scale_steps(config: Config, factor: float) -> Config:
    """The same run, `factor` times as long, with its whole schedule.

    Steps, the learning rate's warm-up and re-warming, the dense warm-up and the cadence of
    evaluations scale; the cosine decay and the sparse phase follow, since they are shares of the
    steps. What is counted in steps by nature (clustering refresh, logging) stays.

    Raises:
      ValueError: a factor that leaves no step.
    """
    if not (math.isfinite(factor) and round(factor * config.steps) >= 1):
        raise ValueError(f"{factor=} of steps={config.steps} must leave at least one step")
    scaled = lambda steps: round(factor * steps)
    cadence = lambda steps: max(scaled(steps), 1) if steps else 0
    config = dataclasses.replace(config, steps=scaled(config.steps))
    # Both phases may round up; together they still have to fit.
    warmup = min(scaled(config.schedule.warmup_steps), config.steps - config.sparse_steps)
    return dataclasses.replace(
        config,
        schedule=dataclasses.replace(config.schedule, warmup_steps=warmup),
        optimizer=dataclasses.replace(
            config.optimizer,
            warmup_steps=scaled(config.optimizer.warmup_steps),
            rewarm_steps=scaled(config.optimizer.rewarm_steps),
        ),
        log=dataclasses.replace(config.log, eval_every=cadence(config.log.eval_every)),
    )


def equal_time(config: Config, reference: Config, speedup: float) -> Config:
    """`config` made longer or shorter, until it takes as long as `reference`.

    Both ways round make an equal wall-clock comparison: a sparse run that spends the time it saves
    on extra tokens, against a dense `reference`; or a dense run cut to what fits into the time of a
    sparse `reference`.

    Args:
      config: the run to scale.
      reference: the run whose time it gets.
      speedup: s, a dense step's time over a sparse step's, of whichever run is sparse.
    """
    factor = dense_tokens(reference, speedup) / dense_tokens(config, speedup)
    return scale_steps(config, factor)
