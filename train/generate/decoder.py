"""Decoding with static shapes: one compiled program reads the prompts, one makes the next tokens.

Prompts are padded on the right to a power of two, and batches likewise, so that a few programs
serve everything. A position of the cache is a position of the sequence; what padding left behind a
prompt is overwritten before any token may look at it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from train.attention import KeyValues
from train.generate.sampling import GREEDY, Sampling, sample
from train.model import Llama
from train.trained import TrainedRun, View, for_inference

CHUNK = 16
"""Tokens of each sequence between two looks of the host, which knows when to stop."""


class Generation(NamedTuple):
    """Where a batch of sequences stands between two chunks of tokens."""

    logits: jax.Array
    """(B, V) float32, of the next token."""
    cache: KeyValues
    """(L, B, C, K, d)."""
    position: jax.Array
    """(B,) int32: where the next token will stand."""
    keys: jax.Array
    """(B,) random keys."""


def bucket(size: int, smallest: int = 1) -> int:
    """The power of two, `smallest` at least, that `size` is padded to."""
    return max(smallest, 1 << max(size - 1, 0).bit_length())


class Decoder:
    """Continues sequences of tokens with a trained model; compiles once for each bucket."""

    def __init__(self, run: TrainedRun, *, view: View = "dense"):
        """Casts, and packs for the sparse view, once.

        Args:
          run: the model.
          view: the dense weights, or the routed 2:4 network.

        Raises:
          ValueError: a view that this run does not have.
        """
        self.config = run.config
        self.eos_id = run.tokenizer.eos_id
        graph, *self._weights = for_inference(run, view)
        vocabulary = run.tokenizer.vocab_size

        def logits(model: Llama, hidden: jax.Array) -> jax.Array:
            product = jnp.dot(hidden, model.head[...], preferred_element_type=jnp.float32)
            # The vocabulary is padded; no text has these ids.
            return jnp.where(jnp.arange(product.shape[-1]) < vocabulary, product, -jnp.inf)

        @partial(jax.jit, static_argnames="capacity")
        def prefill(state, packed, tokens, lengths, keys, *, capacity: int) -> Generation:
            model = nnx.merge(graph, state)
            hidden, cache = model.prefill(tokens, packed)
            last = hidden[jnp.arange(tokens.shape[0]), lengths - 1]
            room = [(0, 0), (0, 0), (0, capacity - tokens.shape[1]), (0, 0), (0, 0)]
            cache = jax.tree.map(lambda a: jnp.pad(a, room), cache)
            return Generation(logits(model, last), cache, lengths, keys)

        @partial(jax.jit, static_argnames="sampling", donate_argnames="generation")
        def advance(state, packed, generation, *, sampling: Sampling):
            model = nnx.merge(graph, state)

            def step(g: Generation, _):
                keys = jax.vmap(jax.random.fold_in)(g.keys, g.position)
                token = sample(g.logits, sampling, keys)
                hidden, cache = model.decode(token, g.cache, g.position, packed)
                return Generation(logits(model, hidden), cache, g.position + 1, g.keys), token

            generation, tokens = jax.lax.scan(step, generation, length=CHUNK)
            return generation, tokens.T

        self._prefill, self._advance = prefill, advance

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
        stop: Callable[[int, list[int]], bool] | None = None,
    ) -> list[list[int]]:
        """The continuation of each prompt: up to `max_tokens` ids, without the end of the document.

        Args:
          prompts: ids, one at least in each.
          max_tokens: most ids of a continuation.
          sampling: how tokens are drawn.
          seed: of the draws. A continuation is a function of its prompt, its place among the
            prompts, the seed and the sampling.
          stop: stop(row, ids so far) ends a row early; asked after each chunk of 16 tokens.

        Raises:
          ValueError: a prompt without ids, or more tokens than the model was trained for.
        """
        done: list[list[int]] = []
        chunks = self.stream(prompts, max_tokens=max_tokens, sampling=sampling, seed=seed)
        for done, finished in chunks:
            if stop is not None:
                for row, ids in enumerate(done):
                    finished[row] = finished[row] or stop(row, ids)
            if all(finished):
                break
        return done

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int,
        sampling: Sampling = GREEDY,
        seed: int = 0,
    ) -> Iterator[tuple[list[list[int]], list[bool]]]:
        """As a call, chunk by chunk: (ids so far, whether each row has ended).

        The caller may end a row by setting its entry.
        """
        self._check(prompts, max_tokens)
        rows = bucket(len(prompts))
        lengths = np.ones(rows, np.int32)
        lengths[: len(prompts)] = [len(prompt) for prompt in prompts]
        tokens = np.zeros((rows, bucket(max(map(len, prompts)), 16)), np.int32)
        for row, prompt in enumerate(prompts):
            tokens[row, : len(prompt)] = prompt
        capacity = tokens.shape[1] + -(-max_tokens // CHUNK) * CHUNK
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(rows))
        state = self._prefill(*self._weights, tokens, lengths, keys, capacity=capacity)

        done: list[list[int]] = [[] for _ in prompts]
        finished = [False] * len(prompts)
        while not all(finished):
            state, made = self._advance(*self._weights, state, sampling=sampling)
            for row, ids in enumerate(np.asarray(made)[: len(prompts)].tolist()):
                if finished[row]:
                    continue
                ended = self.eos_id in ids
                done[row] += ids[: ids.index(self.eos_id)] if ended else ids
                finished[row] = ended or len(done[row]) >= max_tokens
                done[row] = done[row][:max_tokens]
            yield done, finished

    def _check(self, prompts: Sequence[Sequence[int]], max_tokens: int) -> None:
        if max_tokens < 1:
            raise ValueError(f"{max_tokens=} must be at least 1")
        if not prompts:
            raise ValueError(f"{prompts=} must hold a prompt at least")
        shortest, longest = (f(len(prompt) for prompt in prompts) for f in (min, max))
        if not shortest:
            raise ValueError("a prompt without tokens cannot be continued")
        if longest + max_tokens > self.config.sequence_length:
            raise ValueError(
                f"a prompt of {longest} tokens and {max_tokens=} exceed the "
                f"{self.config.sequence_length} positions that the model was trained on"
            )
