"""From a sweep's results to what comparisons start from: `python -m train.study.tuned`."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
import typing
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from train.config import Config
from train.study.definition import Settings, Tuned
from train.study.record import FORMAT, Record, read, write


def choose(records: Iterable[Record], *, swept: bool = False) -> tuple[Tuned, list[str]]:
    """The best batch, learning rates and initial scales of a sweep.

    A form's loss at a batch is that at its best rate, for the average seed (`mean_by_rate`). The
    batch is that of the lowest loss, averaged over the forms, among those at which all of them were
    swept. The rate is the vertex of the parabola in log(rate) through the best rate and its two
    neighbours; the best rate itself at an end of the sweep, or beside a rate that diverged. The
    scale of the initialisation is the best of those that were swept at one rate and batch.

    Args:
      records: results with the factors `ffn`, `learning_rate` and `batch_size`, and `init_scale`
        where it is not the study's own; others are passed over.
      swept: take the best rate that was swept, to the last digit, instead of a vertex: its runs can
        then be those of another study.

    Returns:
      The choice, and remarks on what makes it doubtful.

    Raises:
      ValueError: there are no such results.
    """
    found: dict[tuple[int, str], dict[float, dict[int, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    exact: dict[tuple[str, float], float] = {}
    scaled: dict[str, dict[tuple[int, float], dict[float, list[float]]]] = defaultdict(dict)
    for record in records:
        factors = dict(record["factors"])
        scale = factors.pop("init_scale", None)
        if factors.keys() != {"ffn", "learning_rate", "batch_size"}:
            continue
        loss = record["final"].get("loss_dense") if record["status"] == "finished" else None
        loss = math.inf if loss is None else loss
        batch, ffn, rate = (factors[k] for k in ("batch_size", "ffn", "learning_rate"))
        if scale is None:
            found[batch, ffn][rate][record["seed"]] = loss
            # A factor may be rounded.
            exact[ffn, rate] = record["config"]["optimizer"]["learning_rate"] if swept else rate
        else:
            scaled[ffn].setdefault((batch, rate), defaultdict(list))[scale].append(loss)
    means = {place: mean_by_rate(points) for place, points in found.items()}
    forms = dict.fromkeys(ffn for _, ffn in means)
    lowest = {
        batch: float(np.mean([min(means[batch, ffn].values()) for ffn in forms]))
        for batch in dict.fromkeys(batch for batch, _ in means)
        if all((batch, ffn) in means for ffn in forms)
    }
    if not lowest or not math.isfinite(min(lowest.values())):
        raise ValueError("no batch at which every form of the FFN has a finished run of the sweep")
    batch = min(lowest, key=lowest.__getitem__)
    rates, remarks = {}, []
    for ffn in forms:
        points = means[batch, ffn]
        lowest_at = min(points, key=points.__getitem__)
        vertex = best_rate(list(points), list(points.values()))
        rates[ffn] = exact[ffn, lowest_at] if swept else vertex
        if lowest_at in (min(points), max(points)):
            remarks.append(f"{ffn}: the best rate, {rates[ffn]:g}, is at an end of the sweep")
        seeds = {len(by_seed) for by_seed in found[batch, ffn].values()}
        if len(seeds) > 1:
            remarks.append(f"{ffn}: rates have {min(seeds)} to {max(seeds)} seeds")
    scales = {}
    for ffn, places in scaled.items():
        for (size, rate), by_scale in places.items():
            own = means.get((size, ffn), {}).get(rate, math.inf)
            best = min(by_scale, key=lambda scale: float(np.mean(by_scale[scale])))
            if float(np.mean(by_scale[best])) < own:
                scales[ffn] = best
    return Tuned(batch, rates, scales), remarks


def mean_by_rate(points: Mapping[float, Mapping[int, float]]) -> dict[float, float]:
    """Losses by rate, ascending, for the average seed.

    The least-squares fit of a term for the rate plus one for the seed: the mean over seeds where
    all rates have the same ones. Where they do not, a rate is not the best for the luck of the one
    seed that it was run with.

    Args:
      points: by rate, by seed, the loss; infinite where a run diverged, and so is its rate's then.
    """
    means = {rate: math.inf for rate in sorted(points)}
    fitted = [rate for rate in means if all(map(math.isfinite, points[rate].values()))]
    seeds = sorted({seed for rate in fitted for seed in points[rate]})
    runs = [(rate, seed, loss) for rate in fitted for seed, loss in points[rate].items()]
    if not runs:
        return means
    design = np.zeros((len(runs), len(fitted) + len(seeds)))
    for row, (rate, seed, _) in zip(design, runs, strict=True):
        row[fitted.index(rate)] = row[len(fitted) + seeds.index(seed)] = 1
    terms = np.linalg.lstsq(design, np.array([loss for *_, loss in runs]), rcond=None)[0]
    average = np.mean(terms[len(fitted) :])
    return means | {rate: float(term + average) for rate, term in zip(fitted, terms, strict=False)}


def best_rate(rates: Sequence[float], losses: Sequence[float]) -> float:
    """Where the loss is lowest, to two digits.

    Args:
      rates: ascending.
      losses: one for each; infinite where a run diverged.
    """
    i = int(np.argmin(losses))
    if not 0 < i < len(rates) - 1 or not np.isfinite(losses[i - 1 : i + 2]).all():
        return rates[i]
    curve = np.polyfit(np.log(rates[i - 1 : i + 2]), losses[i - 1 : i + 2], 2)
    if curve[0] <= 0:
        return rates[i]
    return float(f"{np.exp(-curve[1] / (2 * curve[0])):.2g}")


def read_tuned(path: Path) -> Tuned:
    """Reads what `main` wrote.

    Raises:
      OSError: it cannot be read.
      ValueError: it is not such a file.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        batch, rates = found["batch_size"], found["learning_rate"]
        scales, settings = found.get("init_scale", {}), found.get("settings", {})
        floats = [*rates.values(), *scales.values()]
        good = isinstance(batch, int) and all(isinstance(v, float) for v in floats)
        forms = found.get("form_settings", {})
        for own in (settings, *forms.values()):
            _check_settings(own, path)
        if unknown := forms.keys() - rates.keys():
            raise ValueError(f"{path} has settings of {min(unknown)!r} but no learning rate for it")
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, TypeError):
        good = False
    if not good:
        raise ValueError(f"{path} is no file of python -m train.study.tuned")
    return Tuned(batch, rates, scales, settings, forms)


def _plain(settings: Settings) -> dict[str, dict[str, Any]]:
    return {section: dict(fields) for section, fields in settings.items()}


def _check_settings(settings: Settings, path: Path) -> None:
    """Refuses sections and fields that no configuration has, and values of other types."""
    sections = typing.get_type_hints(Config)
    for section, fields in settings.items():
        known = sections.get(section)
        if not dataclasses.is_dataclass(known):
            raise ValueError(f"{path} has settings that do not fit: no section '{section}'")
        hints = typing.get_type_hints(known)
        for name, value in fields.items():
            if name not in hints or not _fits(value, hints[name]):
                what = f"'{section}' takes no '{name}' of {value!r}"
                raise ValueError(f"{path} has settings that do not fit: {what}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value that was read from JSON is of a field's type."""
    if typing.get_origin(hint) is typing.Literal:
        return value in typing.get_args(hint)
    if parts := typing.get_args(hint):
        return any(_fits(value, part) for part in parts)
    return type(value) is hint or (hint is float and type(value) is int)


@dataclass(frozen=True)
class Arguments:
    """Chooses batch and learning rates from the results of a sweep."""

    sweep: tyro.conf.Positional[Path]
    """Exported results of the sweep."""
    output: tyro.conf.Positional[Path]
    """Where the choice is written, for --tuned."""
    scales: Path | None = None
    """An earlier choice, with whose initial scales and settings the runs of this sweep were made:
    they are kept."""
    swept: bool = False
    """Take the best rate that was swept, not the vertex of a parabola: for --reuse of its runs."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the process's exit code."""
    arguments = tyro.cli(Arguments, args=argv, prog="python -m train.study.tuned")
    try:
        content: Mapping[str, Any] | None = read(arguments.sweep)
        if content is None:
            raise ValueError(f"{arguments.sweep} does not exist")
        tuned, remarks = choose(content.get("runs", ()), swept=arguments.swept)
        if arguments.scales is not None:
            kept = read_tuned(arguments.scales)
            forms = {k: v for k, v in kept.form_settings.items() if k in tuned.learning_rate}
            tuned = dataclasses.replace(
                kept,
                batch_size=tuned.batch_size,
                learning_rate=tuned.learning_rate,
                form_settings=forms,
            )
        write(
            arguments.output,
            {
                "format": FORMAT,
                "batch_size": tuned.batch_size,
                "learning_rate": dict(tuned.learning_rate),
                "init_scale": dict(tuned.init_scale),
                "settings": _plain(tuned.settings),
                "form_settings": {k: _plain(v) for k, v in tuned.form_settings.items()},
                "remarks": remarks,
            },
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rates = ", ".join(f"{ffn} {rate:g}" for ffn, rate in tuned.learning_rate.items())
    print(f"batch {tuned.batch_size}; learning rates: {rates}")
    for ffn, scale in tuned.init_scale.items():
        print(f"{ffn}: blocks initialised at {scale:g} of the usual scale")
    for form, settings in (("", tuned.settings), *tuned.form_settings.items()):
        for section, fields in settings.items():
            what = ", ".join(f"{k} {v}" for k, v in fields.items())
            print(f"{form} {section}: {what}".lstrip())
    for remark in remarks:
        print(f"note: {remark}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
