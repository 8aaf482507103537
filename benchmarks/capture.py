"""Tensors of a feed-forward network as training produces them, at the width that is timed.

Dense products run faster on training data than on Gaussian noise, because zeros save power and with
it clock rate; a comparison on noise alone would flatter sparse kernels. So a small language model
with feed-forward layers of the full width is trained for a few hundred steps, here, before timing:
two pre-norm transformer blocks with squared ReLU on the bytes of the Python standard library's
source, which is on every machine. The tensors of its last block on held-out text are what is timed.

What that is and is not: activation sparsity, magnitudes and correlations are those that training
gives at this width early on. They are not those of a deep model after billions of tokens, which is
sparser still; the share of active neurons is reported next to the times.
"""

from __future__ import annotations

import functools
import pathlib
import sysconfig
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

_VOCABULARY = 256
_LEAST_TEXT = 200_000


@dataclass(frozen=True)
class CaptureConfig:
    """The model and its short training.

    Attributes:
      width, hidden: D and H of the feed-forward networks.
      heads: of the attention.
      tokens: T, tokens to capture; a multiple of `sequence`.
      layers: blocks; the last one is captured.
      sequence: bytes of a sequence.
      sequences_per_step: batch of the training.
      steps: of AdamW.
    """

    width: int
    hidden: int
    heads: int
    tokens: int
    layers: int = 2
    sequence: int = 1024
    sequences_per_step: int = 8
    steps: int = 300

    @property
    def learning_rate(self) -> float:
        # In inverse proportion to the width, as updates of hidden matrices call for
        # (arXiv 2203.03466).
        return 0.6 / self.width


class FfnTensors(NamedTuple):
    """Of one feed-forward network Y3 = relu(X W1)^2 W2, T tokens, in training."""

    x: Array
    """(T, D) bfloat16: normalised input."""
    w1: Array
    """(D, H) float32."""
    w2: Array
    """(H, D) float32."""
    y2: Array
    """(T, H) bfloat16: relu(X W1)^2."""
    dy3: Array
    """(T, D) bfloat16: gradient of the loss by Y3."""


def standard_library_text() -> np.ndarray:
    """Source of the standard library's top-level modules, as bytes (uint8).

    Raises:
      RuntimeError: this Python comes without its source.
    """
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    text = b"\n".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    if len(text) < _LEAST_TEXT:
        raise RuntimeError(f"only {len(text)} bytes of standard library source in {folder}")
    return np.frombuffer(text, np.uint8)


def _init(key: Array, config: CaptureConfig) -> dict[str, Any]:
    keys = iter(jax.random.split(key, 3 + 4 * config.layers))

    def matrix(rows: int, cols: int, scale: float = 1.0) -> Array:
        draw = jax.random.truncated_normal(next(keys), -3.0, 3.0, (rows, cols))
        return scale * rows**-0.5 * draw

    d, h = config.width, config.hidden
    out_scale = (2 * config.layers) ** -0.5
    return {
        "embedding": matrix(_VOCABULARY, d),
        "position": matrix(config.sequence, d),
        "head": matrix(d, _VOCABULARY),
        "blocks": [
            {
                "qkv": matrix(d, 3 * d),
                "out": matrix(d, d, out_scale),
                "w1": matrix(d, h),
                "w2": matrix(h, d, out_scale),
            }
            for _ in range(config.layers)
        ],
    }


def _norm(x: Array) -> Array:
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + 1e-6)
    return y.astype(jnp.bfloat16)


def _loss(
    params: dict[str, Any], tokens: Array, offset: Array | None, heads: int
) -> tuple[Array, tuple[Array, Array]]:
    """Mean next-byte loss, and (X, Y2) of the last block.

    offset: added to the last block's Y3, so that its gradient is that of Y3.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    batch, sequence = inputs.shape
    x = (params["embedding"][inputs] + params["position"]).astype(jnp.bfloat16)
    for i, block in enumerate(params["blocks"]):
        weights = jax.tree.map(lambda w: w.astype(jnp.bfloat16), block)
        qkv = (_norm(x) @ weights["qkv"]).reshape(batch, sequence, 3, heads, -1)
        mixed = jax.nn.dot_product_attention(*(qkv[:, :, j] for j in range(3)), is_causal=True)
        x = x + mixed.reshape(x.shape) @ weights["out"]
        normed = _norm(x)
        y2 = jnp.square(jax.nn.relu(normed @ weights["w1"]))
        y3 = y2 @ weights["w2"]
        if offset is not None and i == len(params["blocks"]) - 1:
            y3 = y3 + offset
        x = x + y3
    logits = (_norm(x) @ params["head"].astype(jnp.bfloat16)).astype(jnp.float32)
    loss = jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, targets))
    return loss, (normed, y2)


def _batch(rng: np.random.Generator, text: np.ndarray, count: int, length: int) -> np.ndarray:
    starts = rng.integers(0, len(text) - length - 1, count)
    return text[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def capture(config: CaptureConfig, seed: int = 0) -> tuple[FfnTensors, dict[str, Any]]:
    """Trains the model and captures its last feed-forward network.

    Args:
      config: sizes and steps.
      seed: of parameters and batches.

    Returns:
      The tensors, and a report: losses, share of active neurons, text.

    Raises:
      ValueError: tokens are not whole sequences, or heads do not divide the width.
    """
    if config.tokens % config.sequence:
        raise ValueError(f"{config.tokens=} must be a multiple of {config.sequence=}")
    if config.width % config.heads:
        raise ValueError(f"{config.width=} must be a multiple of {config.heads=}")
    text = standard_library_text()
    train, held_out = np.split(text, [int(0.95 * len(text))])
    rng = np.random.default_rng(seed)
    loss_function = functools.partial(_loss, heads=config.heads)
    optimiser = optax.adamw(
        optax.warmup_constant_schedule(0.0, config.learning_rate, max(1, config.steps // 10)),
        b2=0.95,
        weight_decay=0.03,
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, tokens):
        (loss, _), grads = jax.value_and_grad(loss_function, has_aux=True)(params, tokens, None)
        updates, state = optimiser.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    params = jax.jit(functools.partial(_init, config=config))(jax.random.key(seed))
    state = optimiser.init(params)
    losses = []
    for _ in range(config.steps):
        tokens = _batch(rng, train, config.sequences_per_step, config.sequence)
        params, state, loss = step(params, state, tokens)
        losses.append(loss)
    del state

    @jax.jit
    def probe(params, tokens, offset):
        def of_offset(offset):
            return loss_function(params, tokens, offset)

        return jax.value_and_grad(of_offset, has_aux=True)(offset)

    tokens = _batch(rng, held_out, config.tokens // config.sequence, config.sequence)
    offset = jnp.zeros((*tokens[:, 1:].shape, config.width), jnp.bfloat16)
    (loss, (x, y2)), dy3 = probe(params, tokens, offset)
    last = params["blocks"][-1]
    tensors = FfnTensors(
        x.reshape(-1, config.width),
        last["w1"],
        last["w2"],
        y2.reshape(-1, config.hidden),
        dy3.reshape(-1, config.width),
    )
    report = {
        "text": f"standard library source, {len(text)} bytes",
        "steps": config.steps,
        "tokens_per_step": config.sequences_per_step * config.sequence,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "held_out_loss": float(loss),
        "active_share": float(jnp.mean(tensors.y2 > 0)),
    }
    return tensors, report
