"""Which fields of a configuration keep a run from going on from a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FREE_FIELDS = (
    "name",
    "output",
    "log",
    "checkpoint",
    "profile",
    "mesh",
    "data.workers",
    "data.threads",
    "data.read_ahead",
    "data.cache",
)
"""Fields, or groups of them, that change nothing of what is computed, only where and how."""


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One text for each field that differs and matters, such as `model.width: 128 in the
    checkpoint, 256 now`. Both are nested dicts of JSON values."""
    old, new = _flatten(saved), _flatten(now)
    fields = [*new, *(field for field in old if field not in new)]
    return [
        f"{field}: {_show(old, field)} in the checkpoint, {_show(new, field)} now"
        for field in fields
        if not _is_free(field) and not _same(old, new, field)
    ]


def refuse_other_config(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuses a checkpoint of another configuration.

    Raises:
      ValueError: one line naming up to five fields that differ.
    """
    found = differences(saved, now)
    if found:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        raise ValueError("the checkpoint is of another config: " + "; ".join(found[:5]) + more)


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat


def _same(old: dict[str, Any], new: dict[str, Any], field: str) -> bool:
    if field not in old or field not in new:
        return False
    a, b = old[field], new[field]
    if isinstance(a, int | float) and isinstance(b, int | float):
        # 1 and 1.0 are the same setting, 1 and true are not; NaN is itself.
        return isinstance(a, bool) == isinstance(b, bool) and (a == b or (a != a and b != b))
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _show(flat: dict[str, Any], field: str) -> str:
    return str(flat[field]) if field in flat else "absent"


def _is_free(field: str) -> bool:
    return any(field == free or field.startswith(free + ".") for free in FREE_FIELDS)
