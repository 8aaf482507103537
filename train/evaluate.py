"""Held-out loss in the dense and the sparse view of the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from sparsejax.schedule import Phase
from train.mesh import put_batch
from train.state import TrainState


def evaluate(
    views: Mapping[Phase, Callable],
    state: TrainState,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Mean held-out loss in nats a token, for each view.

    Args:
      views: compiled evaluation steps by view, "dense" and perhaps "sparse".
      state: the state whose weights are looked at.
      batches: batches with `inputs`, `targets` and `mask`, each (B, S).
      mesh: where the batches go.

    Returns:
      {"loss_dense": ..., "loss_sparse": ...} for the views asked for, and the mean of each batch
      likewise: how much they differ says how well the held-out text is large enough.
    """
    totals: dict[Phase, list[tuple[jax.Array, jax.Array]]] = {view: [] for view in views}
    for batch in batches:
        on_device = put_batch(mesh, batch)
        for view, step in views.items():
            totals[view].append(step(state, on_device))
    losses, parts = {}, {}
    for view, sums in totals.items():
        # Summed on the host in float64, in order: the same on every run.
        pairs = [(float(nats), float(tokens)) for nats, tokens in sums]
        nats, tokens = (sum(pair[i] for pair in pairs) for i in (0, 1))
        losses[f"loss_{view}"] = nats / tokens
        parts[f"loss_{view}"] = [nats / tokens for nats, tokens in pairs]
    return losses, parts
