"""Runs by name: one module a run, each with a function `config()` that returns a
`train.config.Config`. Studies, which are many runs, are in `configs/studies/`."""

import importlib
import pkgutil

from train.config import Config


def names() -> list[str]:
    """The runs that `get` knows."""
    # Runs are called with hyphens, modules cannot be.
    found = (module.name for module in pkgutil.iter_modules(__path__) if not module.ispkg)
    return sorted(name.replace("_", "-") for name in found)


def get(name: str) -> Config:
    """The configuration of a run.

    Raises:
      ValueError: if there is none of that name; lists the known ones.
    """
    if name not in names():
        raise ValueError(f"config {name!r} is unknown; known: {', '.join(names())}")
    return importlib.import_module(f"configs.{name.replace('-', '_')}").config()
