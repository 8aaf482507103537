"""Looks up tuned kernel configurations by backend, operation, device and problem.

A table is a file ``<backend>_<device>.json`` beside this module:
``{"device_kind": ..., "entries": {op: {key: {field: value, ...}}}}``, where the inner dictionary
holds the fields of the kernel's frozen configuration dataclass.
"""

from __future__ import annotations

import functools
import json
import pathlib
import re
from typing import Any

FOLDER = pathlib.Path(__file__).parent


def key(**facts: Any) -> str:
    """A table key from named facts, in the order given: ``key(m=64, b="nk") == "m64-bnk"``."""
    return "-".join(f"{name}{value}" for name, value in facts.items())


def path(backend: str, device_kind: str) -> pathlib.Path:
    """The file of one backend and device, whether or not it exists."""
    slug = re.sub(r"[^a-z0-9]+", "_", device_kind.lower()).strip("_")
    return FOLDER / f"{backend}_{slug}.json"


@functools.cache
def _load(file: pathlib.Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def entries(backend: str, op: str, device_kind: str) -> dict[str, dict[str, Any]]:
    """All tuned entries of one operation: key to configuration fields."""
    return _load(path(backend, device_kind)).get("entries", {}).get(op, {})


def lookup(backend: str, op: str, device_kind: str, key: str) -> dict[str, Any] | None:
    """The configuration fields tuned for `key`, or None."""
    return entries(backend, op, device_kind).get(key)


def save(backend: str, device_kind: str, op: str, tuned: dict[str, dict[str, Any]]) -> pathlib.Path:
    """Merges tuned entries into the device's table and returns its path."""
    file = path(backend, device_kind)
    table = json.loads(file.read_text()) if file.exists() else {}
    table["device_kind"] = device_kind
    merged = table.setdefault("entries", {}).setdefault(op, {})
    merged.update(tuned)
    table["entries"][op] = dict(sorted(merged.items()))
    file.write_text(json.dumps(table, indent=1) + "\n")
    _load.cache_clear()
    return file
