"""The optional package that reads and writes tensors."""

from __future__ import annotations

import importlib
from typing import Any


def safetensors_numpy() -> Any:
    """The module `safetensors.numpy`.

    Raises:
      ValueError: if the package is not installed; says how to get it.
    """
    try:
        return importlib.import_module("safetensors.numpy")
    except ImportError:
        raise ValueError('this needs safetensors: pip install -e ".[huggingface]"') from None
