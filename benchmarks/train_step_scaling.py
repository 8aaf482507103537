"""How steps on all devices compare with the same steps on fewer of them."""

from __future__ import annotations

import json
import pathlib
from typing import Any

Row = dict[str, Any]

# What must be equal for a device to have the same work in both runs.
_SAME = ("layers", "sequence_length", "micro_batches", "m")


def read_baseline(file: pathlib.Path) -> list[Row]:
    """A result file as runs for `result["scaling"]`: its own, and those on fewer devices in it.

    Raises:
      ValueError: it cannot be read, or holds no timed steps.
    """
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--baseline {file} cannot be read: {error}") from None
    groups = result.get("groups", []) if isinstance(result, dict) else []
    if not any("tokens_per_second" in row for group in groups for row in group["rows"]):
        raise ValueError(f"--baseline {file} holds no timed steps")
    # Older files are of one device and do not say so.
    own = {"devices": result.get("devices", 1), "mesh": result.get("mesh"), "groups": groups}
    runs = [own, *result.get("scaling", [])]
    known = {"file": file.name, "config": result["settings"]["config"]}
    return [{name: run[name] for name in own} | known for run in runs]


def _per_device(row: Row, devices: int) -> tuple[float, float]:
    """Tokens/s, and tokens of a step, of one device."""
    return row["tokens_per_second"] / devices, row["tokens"] / devices


def _timed(groups: list[Row]) -> list[Row]:
    return [row for group in groups for row in group["rows"] if "tokens_per_second" in row]


def derive(result: Row) -> None:
    """Adds the weak-scaling efficiency of each phase's first row to the runs on fewer devices:
    tokens/s of a device in the whole run over tokens/s of a device in the smaller one.

    A run whose devices have other work gets a note instead.
    """
    mine = _timed(result["groups"])
    for run in result["scaling"]:
        run["efficiency"], run["notes"] = {}, []
        if run.get("config", result["settings"]["config"]) != result["settings"]["config"]:
            run["notes"].append(f"of another configuration, {run['config']}")
            continue
        for phase in ("dense", "sparse"):
            whole = next((row for row in mine if row["phase"] == phase), None)
            part = next((row for row in _timed(run["groups"]) if row["phase"] == phase), None)
            if whole is None or part is None:
                continue
            rate, tokens = _per_device(whole, result["devices"])
            small_rate, small_tokens = _per_device(part, run["devices"])
            other = [f"{name}={part[name]}" for name in _SAME if part[name] != whole[name]]
            if tokens != small_tokens:
                other.append(f"{small_tokens:,.0f} tokens a device")
            if other:
                run["notes"].append(f"{phase}: other work, {', '.join(other)}")
                continue
            run["efficiency"][phase] = rate / small_rate
