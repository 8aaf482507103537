"""MLIR contexts that a thread uses several times, as JAX itself does from 0.11 on.

JAX 0.10 makes one for each program it lowers. That takes longer than to lower a small program: a
tenth of the suite's processor time.
"""

import threading
from typing import Any

from jax._src.interpreters import mlir

USES = 10  # What a context interns is freed with it; JAX uses one about as often.


def reuse() -> None:
    """For this process; nothing where JAX does it."""
    if hasattr(mlir, "_create_ir_context") or not hasattr(mlir, "make_ir_context"):
        return
    make, own = mlir.make_ir_context, threading.local()

    def make_ir_context() -> Any:
        context, uses = getattr(own, "context", (None, USES))
        if uses == USES:
            context, uses = make(), 0
        own.context = context, uses + 1
        return context

    mlir.make_ir_context = make_ir_context
