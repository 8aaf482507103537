"""Log-probabilities of given tokens, in programs of few shapes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.generate.decoder import bucket
from train.trained import TrainedRun, View, for_inference

SMALLEST = 32
"""Positions of the shortest bucket."""

Scorer = Callable[[np.ndarray, np.ndarray], tuple[jax.Array, jax.Array]]


def make_scorer(run: TrainedRun, *, view: View) -> Scorer:
    """score(tokens (B, S), targets (B, S)) to (log-probability, whether it is the likeliest token).

    Position s of both (B, S) results is about targets[:, s], given tokens[:, : s + 1]. float32,
    over the whole padded vocabulary, as in training.
    """
    graph, *weights = for_inference(run, view)
    chunk = run.config.model.loss_chunk

    @jax.jit
    def score(state, packed, tokens, targets):
        model = nnx.merge(graph, state)
        hidden = model(tokens, packed)[0]

        def one(pair):
            x, target = pair
            logits = jnp.dot(x, model.head[...], preferred_element_type=jnp.float32)
            own = logits[target]
            return own - jax.nn.logsumexp(logits), own >= jnp.max(logits)

        flat = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
        # In parts, so that the logits of large vocabularies fit.
        results = jax.lax.map(one, flat, batch_size=min(chunk, targets.size))
        return jax.tree.map(lambda a: a.reshape(targets.shape), results)

    return lambda tokens, targets: score(*weights, tokens, targets)


def score_continuations(
    score: Scorer,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    batch_size: int,
    max_length: int,
) -> Iterator[tuple[int, float, bool]]:
    """(index, summed log-probability in nats, whether greedy decoding gives it) of each pair.

    Longest first, padded on the right to powers of two and to `batch_size` rows: one compiled
    program for each power of two.

    Args:
      score: of `make_scorer`.
      pairs: (context, continuation) ids; a context has one id at least. What does not fit is cut
        from the left of the context.
      batch_size: rows of a batch.
      max_length: positions of the model.

    Raises:
      ValueError: an empty context, or a continuation that is longer than the model's positions.
    """
    for context, continuation in pairs:
        if not context:
            raise ValueError("a continuation needs a context of one token at least")
        if len(continuation) > max_length:
            raise ValueError(
                f"a continuation of {len(continuation)} tokens is longer than {max_length=}"
            )
    length = lambda i: min(len(pairs[i][0]) + len(pairs[i][1]) - 1, max_length)
    order = sorted(range(len(pairs)), key=length, reverse=True)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        size = min(bucket(max(1, length(chosen[0])), SMALLEST), max_length)
        tokens = np.zeros((batch_size, size), np.int32)
        targets = np.zeros((batch_size, size), np.int32)
        for row, i in enumerate(chosen):
            ids = (pairs[i][0] + pairs[i][1])[-(max_length + 1) :]
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, : len(ids) - 1] = ids[1:]
        logs, greedy = jax.device_get(score(tokens, targets))
        for row, i in enumerate(chosen):
            own = slice(length(i) - len(pairs[i][1]), length(i))
            total = float(np.sum(logs[row, own], dtype=np.float64))
            yield i, total, bool(np.all(greedy[row, own]))
