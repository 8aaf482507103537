"""One answer for all processes of a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from train.checkpoint.errors import CheckpointError


def on_process_zero(function: Callable[[], Any]) -> Any:
    """Runs `function` on process 0 and gives its JSON value, or its error, to all processes."""
    if jax.process_count() == 1:
        return function()
    answer: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            answer = {"value": function()}
        except OSError as error:
            # Whatever it is, the others are waiting to hear of it.
            answer = {"failed": str(error)}
        except ValueError as error:
            answer = {"refused": str(error)}
    text = np.frombuffer(json.dumps(answer).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(text.size)))
    padded = np.zeros(size, np.uint8)
    padded[: text.size] = text[:size]
    received = np.asarray(multihost_utils.broadcast_one_to_all(padded))
    answer = json.loads(received.astype(np.uint8).tobytes().decode())
    if "failed" in answer:
        raise CheckpointError(answer["failed"])
    if "refused" in answer:
        raise ValueError(answer["refused"])
    return answer["value"]
