"""A study's results as one small file, to commit, to draw reports from and to go on from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.study.definition import Study
from train.study.record import (
    FORMAT,
    Record,
    differences,
    read,
    read_all,
    result_name,
    strict,
    write,
)

HEADER = "study.json"

_DIGITS = 6
"""Significant digits of the numbers in curves; final losses are kept as they are."""


def export(output: Path, file: Path) -> None:
    """Writes the results and header in a study's folder into one JSON file, a line a run.

    Args:
      output: the folder.
      file: whole or not at all.

    Raises:
      ValueError: the folder holds no study.
      OSError: the file cannot be written.
    """
    header = read(output / HEADER)
    if header is None:
        raise ValueError(f"{output} holds no study: there is no {HEADER} in it")
    line = lambda value: json.dumps(strict(value), allow_nan=False, separators=(",", ":"))
    runs = ",\n".join(line(_shortened(record)) for record in read_all(output))
    text = f'{{"format": {FORMAT},\n"study": {line(header)},\n"runs": [\n{runs}\n]}}\n'
    file.parent.mkdir(parents=True, exist_ok=True)
    new = file.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(file)


def unpack(file: Path, output: Path) -> int:
    """Puts the results of an exported file into a study's folder, where it has none of its own, or
    has failed.

    Args:
      file: as `export` writes it; nothing happens if there is none.
      output: the folder.

    Returns:
      How many results were put there.

    Raises:
      ValueError: the file is no export, or that of another study, or two labels would share a file.
    """
    content = read(file)
    if content is None:
        return 0
    header, runs = content.get("study"), content.get("runs")
    if not (isinstance(header, Mapping) and isinstance(runs, list)):
        raise ValueError(f"{file} is no exported study")
    here = read(output / HEADER)
    if here is None:
        write(output / HEADER, header)
    elif here["name"] != header["name"]:
        raise ValueError(f"{file} is of study {header['name']!r}, {output} of {here['name']!r}")
    count = 0
    for record in runs:
        path = output / "results" / result_name(record["label"], record["seed"])
        there = read(path)
        if there is not None and there["label"] != record["label"]:
            labels = f"{there['label']!r} in {output} and {record['label']!r} in {file}"
            raise ValueError(f"labels {labels} have one file name, {path.name}")
        if there is None or (there["status"] == "failed" and record["status"] != "failed"):
            write(path, record)
            count += 1
    return count


def reuse(file: Path, study: Study, output: Path) -> int:
    """Gives the runs of a study the results that another study, or another label, has of the same
    configuration and seed, where they have none, or have failed.

    Args:
      file: as `export` writes it.
      study: the runs.
      output: the study's folder.

    Returns:
      How many results were put there.

    Raises:
      ValueError: the file is no export.
    """
    content = read(file)
    if content is None or not isinstance(content.get("runs"), list):
        raise ValueError(f"{file} is no exported study")
    finished = [r for r in content["runs"] if r["status"] == "finished"]
    count = 0
    for run in study.runs:
        path = output / "results" / result_name(run.label, run.seed)
        if (there := read(path)) is not None and there["status"] != "failed":
            continue
        same = (r for r in finished if r["seed"] == run.seed and not differences(r, run.config))
        record = next(same, None)
        if record is not None:
            own = {"study": study.name, "label": run.label, "factors": dict(run.factors)}
            write(path, {**record, **own, "made_for": f"{record['study']}: {record['label']}"})
            count += 1
    return count


def _shortened(record: Record) -> Record:
    return {
        key: _rounded(value) if key in ("curve", "evaluations") else value
        for key, value in record.items()
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
