"""The speeds of sparse steps that studies read, drawn from results of `benchmarks.train_step`.

    python -m benchmarks.speedups benchmarks/results/studies/speedups.json  # --check: write nothing

Such a file says under "sources" where the speed of each label comes from: a result, relative to the
file, and the number of a group of rows in it, as "../../step_h200_llama1b.json#2"; or null, for a
label whose speed was not measured and is not another's either. What stands under
"sparse_step_speedup" is what follows from that (`train.study.equal_time.read_speedups` reads it).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from train.study.equal_time import KEY

SOURCES = "sources"


def speedup(result: dict[str, Any], group: int) -> float:
    """How many times as fast as the dense step beside it a group's sparse step is.

    Args:
      result: of `benchmarks.train_step`.
      group: its place among the groups of rows.

    Raises:
      ValueError: there is no such group, or it has no sparse step.
    """
    groups = result.get("groups", [])
    if not 0 <= group < len(groups):
        raise ValueError(f"there is no group {group}, only {len(groups)}")
    found = [row["speedup"] for row in groups[group]["rows"] if row["phase"] == "sparse"]
    if len(found) != 1:
        raise ValueError(f"group {group} has {len(found)} sparse steps, not one")
    return found[0]


def drawn(path: Path) -> dict[str, Any]:
    """The content of a file of speeds, with the numbers that its sources have.

    Raises:
      OSError: it, or a source, cannot be read.
      ValueError: it names no sources, or one that does not exist.
    """
    content = _read(path)
    sources = content.get(SOURCES) if isinstance(content, dict) else None
    if not isinstance(sources, dict):
        raise ValueError(f"{path} says nothing under {SOURCES!r}")
    speeds: dict[str, float | None] = {}
    for label, source in sources.items():
        speeds[label] = None
        if source is None:
            continue
        name, _, group = str(source).partition("#")
        if not group.isdigit():
            raise ValueError(f"{path}: {label!r}: {source!r} must end in # and a group's number")
        result = _read(path.parent / name)
        try:
            speeds[label] = speedup(result, int(group))
        except ValueError as error:
            raise ValueError(f"{path}: {label!r}: {name}: {error}") from None
    return content | {KEY: speeds}


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def main(arguments: list[str] | None = None) -> int:
    """The command line: 1 if a checked file is out of date, 2 for one that cannot be drawn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="the file of speeds, .json")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if it would change")
    options = parser.parse_args(arguments)
    try:
        content = drawn(options.file)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    text = json.dumps(content, indent=1) + "\n"
    if text == options.file.read_text(encoding="utf-8"):
        print(f"{options.file} is what its sources say")
        return 0
    if options.check:
        print(f"{options.file} is not what its sources say", file=sys.stderr)
        return 1
    options.file.write_text(text, encoding="utf-8")
    print(f"{options.file}: {len(content[KEY])} labels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
