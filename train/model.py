"""The Llama: embedding, pre-norm blocks, final norm, untied head.

Parameters are float32 masters; activations and matrix products use the compute dtype. A block's FFN
is `sparsejax.nn.RoutedFFN` (relu^2 forms), `MoEFFN` (a mixture of experts) or SwiGLU. Passing
packed FFN weights makes the FFNs sparse; passing none makes the same parameters a dense model,
which is how a phase of training flips.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from sparsejax.nn.moe_ffn import MoEFFN
from sparsejax.nn.routed_ffn import RoutedFFN, RoutingStats
from sparsejax.ops.dense import product
from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.remat import products
from sparsejax.spec import Precision, Sparsity
from train import scopes
from train.attention import WIDTH_AXIS, Attention, KeyValues, PackedAttention
from train.backend import compute_dtype, norm_implementation
from train.config import ModelConfig
from train.embedding import embed
from train.init import linear_init
from train.mesh import ACT_BTD, FFN_AXES, constrain, gathered, on_mesh
from train.norm import RMSNorm

# Routing statistics are a pytree that sparsejax defines; None in a dense phase.
Stats = Any


class PackedBlock(NamedTuple):
    """The weights of a block as a sparse step reads them; stacked, those of all layers."""

    ffn: PackedFFN | None
    attention: PackedAttention | None


def sparse_weights(sparsity: Sparsity) -> dict[str, dict[str, int]]:
    """The 2:4 matrices of a block: by its part, in the order of the part's scales `beta`, the axis
    that each is thresholded along."""
    parts: dict[str, dict[str, int]] = {}
    if sparsity.weights:
        parts["ffn"] = {"w1": 1, "w2": 1, "wg": 1}
    if sparsity.attention_projections:
        parts["attention"] = {name: int(axis) for name, axis in WIDTH_AXIS.items()}
    return parts


# Of one block or of all of them; None in a dense phase. Stacked: of those that are sparse; in a
# list: None for each that stays dense (`Sparsity.dense_layers`).
Packed = Any


class SwiGLU(nnx.Module):
    """silu(x Wg) * (x W1) W2 (arXiv 2002.05202), the dense baseline to catch."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        d, h = config.width, config.ffn_hidden
        init = linear_init(config.init_scale)
        out_init = linear_init(config.init_scale * config.residual_scale)
        # Neuron by neuron, (H, D), as in RoutedFFN.
        self.w1 = nnx.Param(init(rngs.params(), (d, h), jnp.float32).T)
        self.wg = nnx.Param(init(rngs.params(), (d, h), jnp.float32).T)
        self.w2 = nnx.Param(out_init(rngs.params(), (h, d), jnp.float32))
        self.precision: Precision = config.ffn_precision

    def __call__(self, x: jax.Array, packed: Packed = None) -> tuple[jax.Array, Stats]:
        del packed
        weight = lambda name: gathered(getattr(self, name)[...], x.dtype, name)
        dot, shape = product(self.precision), x.shape
        x = x.reshape(-1, shape[-1])
        y = jax.nn.silu(dot(x, weight("wg"), axis=1)) * dot(x, weight("w1"), axis=1)
        return dot(y, weight("w2"), axis=0).reshape(shape), None


class Block(nnx.Module):
    """x + attention(norm(x)), then + ffn(norm(x))."""

    def __init__(self, config: ModelConfig, sparsity: Sparsity | None, *, rngs: nnx.Rngs):
        norm = lambda: RMSNorm(config.width, config.norm_eps, norm_implementation(config.norm))
        self.norm_attention = norm()
        self.attention = Attention(config, sparsity, rngs=rngs)
        self.norm_ffn = norm()
        self.ffn: SwiGLU | RoutedFFN | MoEFFN
        if config.experts:
            self.ffn = MoEFFN(
                config.width,
                config.ffn_hidden,
                num_experts=config.experts,
                experts_per_token=config.experts_per_token,
                sparsity=sparsity,
                dtype=compute_dtype(config),
                kernel_init=linear_init(config.init_scale),
                out_init=linear_init(config.init_scale * config.residual_scale),
                axes=FFN_AXES,
                rngs=rngs,
            )
        elif config.ffn == "swiglu":
            self.ffn = SwiGLU(config, rngs=rngs)
        else:
            self.ffn = RoutedFFN(
                config.width,
                config.ffn_hidden,
                gated=config.ffn == "relu2_gated",
                sparsity=sparsity,
                dtype=compute_dtype(config),
                precision=config.ffn_precision,
                kernel_init=linear_init(config.init_scale),
                out_init=linear_init(config.init_scale * config.residual_scale),
                axes=FFN_AXES,
                rngs=rngs,
            )

    def pack(self) -> PackedBlock:
        """Thresholds and packs the weights: once per optimiser step of a sparse phase."""
        with jax.named_scope(scopes.PROJECTIONS):
            attention = self.attention.pack()
        with jax.named_scope(scopes.FFN):
            return PackedBlock(self.ffn.pack(), attention)

    def __call__(self, x: jax.Array, packed: Packed = None) -> tuple[jax.Array, Stats]:
        x = constrain(self._attend(x, packed), ACT_BTD)
        y, stats = self._feed_forward(x, packed)
        return constrain(y, ACT_BTD), stats

    def prefill(self, x: jax.Array, packed: Packed = None) -> tuple[jax.Array, KeyValues]:
        """As a call, with the attention's keys and values instead of statistics."""
        own = None if packed is None else packed.attention
        y, cache = self.attention.prefill(self.norm_attention(x), own)
        return self._feed_forward(x + y, packed)[0], cache

    def decode(
        self, x: jax.Array, packed: Packed, cache: KeyValues, position: jax.Array
    ) -> tuple[jax.Array, KeyValues]:
        """One more token of each sequence, (B, 1, D); see `Attention.decode`."""
        own = None if packed is None else packed.attention
        y, cache = self.attention.decode(self.norm_attention(x), own, cache, position)
        return self._feed_forward(x + y, packed)[0], cache

    def reroute(
        self, x: jax.Array, packed: Packed, previous: Any, fit: bool
    ) -> tuple[jax.Array, tuple[dict[str, jax.Array], jax.Array]]:
        """As a call under new centres, with its new biases in effect and returned by name."""
        x = constrain(self._attend(x, packed), ACT_BTD)
        found, churn = self.ffn.reroute(self.norm_ffn(x), previous, fit=fit)
        biases = found if isinstance(found, dict) else {"bias": found}
        for name, bias in biases.items():
            getattr(self.ffn, name)[...] = bias
        y, _ = self._feed_forward(x, packed)
        return constrain(y, ACT_BTD), (biases, churn)

    def _attend(self, x: jax.Array, packed: Packed) -> jax.Array:
        own = None if packed is None else packed.attention
        x, x_norm = self.norm_attention.with_input(x)
        return x + self.attention(x_norm, own)

    def _feed_forward(self, x: jax.Array, packed: Packed) -> tuple[jax.Array, Stats]:
        x, x_norm = self.norm_ffn.with_input(x)
        with jax.named_scope(scopes.FFN):
            y, stats = self.ffn(x_norm, None if packed is None else packed.ffn)
        return x + y, stats


REMAT_POLICIES = {
    "none": None,
    "dots": products,
    "full": jax.checkpoint_policies.nothing_saveable,
}

# What makes a gathered weight from a stored one, up to the product that reads it.
_GATHERING = {"sharding_constraint", "optimization_barrier", "convert_element_type", "transpose"}


def _all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps everything but weights gathered over fsdp: they are gathered again for the backward
    pass, or each device would hold the whole model."""
    return primitive.name not in _GATHERING


class Llama(nnx.Module):
    """Token ids (B, S) to final hidden states (B, S, D) in the compute dtype; see `train.loss` for
    the head's loss.

    With `scan_layers` every block parameter has a leading axis of num_layers and the blocks are
    scanned; otherwise `blocks` is a list. `sparsity` None builds a model that has no sparse phase.
    """

    def __init__(self, config: ModelConfig, sparsity: Sparsity | None, *, rngs: nnx.Rngs):
        if config.vocab_size is None:
            raise ValueError("vocab_size=None: resolve the configuration first")
        self.config = config
        self.dense_layers = 0 if sparsity is None else sparsity.dense_layers
        d, v = config.width, config.vocab_size
        std = d**-0.5 if config.embedding_scale is None else config.embedding_scale
        self.embedding = nnx.Param(
            jax.random.truncated_normal(rngs.params(), -2, 2, (v, d), jnp.float32) * std
        )
        self.head = nnx.Param(linear_init(config.head_scale)(rngs.params(), (d, v), jnp.float32))
        self.norm = RMSNorm(d, config.norm_eps, norm_implementation(config.norm))
        make = lambda key: Block(config, sparsity, rngs=nnx.Rngs(params=key))
        keys = jax.random.split(rngs.params(), config.num_layers)
        if config.scan_layers:
            graph, _ = nnx.split(nnx.eval_shape(lambda: make(jax.random.key(0))))
            self.blocks = nnx.merge(graph, jax.vmap(lambda key: nnx.state(make(key)))(keys))
        else:
            self.blocks = nnx.List([make(key) for key in keys])

    def __call__(self, tokens: jax.Array, packed: Packed = None) -> tuple[jax.Array, Stats]:
        """Hidden states (B, S, D) after the final norm, and the routing statistics of the layers
        that are routed, with a leading axis over them.

        Args:
          tokens: (B, S) int32 ids.
          packed: what `pack` returns, or None for the dense function.
        """
        config = self.config
        with jax.named_scope(scopes.EMBEDDING):
            x = embed(self.embedding[...], tokens, compute_dtype(config))

        def block(graph: Any, state: Any, x: jax.Array, packed: Packed):
            return nnx.merge(graph, state)(x, packed)

        apply: Any = block

        policy = REMAT_POLICIES[config.remat]
        if policy is None and on_mesh():
            policy = _all_but_gathered
        if policy is not None:
            apply = jax.checkpoint(
                block, policy=policy, static_argnums=0, prevent_cse=not config.scan_layers
            )
        if config.scan_layers:
            graph, state = nnx.split(self.blocks)
            for part in self._parts(packed, state):
                x, stats = jax.lax.scan(lambda x, s: apply(graph, s[1], x, s[0]), x, part)
        else:
            layers = []
            for i, layer_block in enumerate(self.blocks):
                x, layer = apply(*nnx.split(layer_block), x, None if packed is None else packed[i])
                layers.append(layer)
            if packed is not None:
                layers = layers[self.dense_layers :]
            stats = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        if stats is not None and stats.counts.ndim == 3:
            # Layers, devices, experts: one small sum over the devices for all layers.
            stats = RoutingStats(jnp.sum(stats.counts, axis=1))
        return self.norm(x), stats

    def prefill(self, tokens: jax.Array, packed: Packed = None) -> tuple[jax.Array, KeyValues]:
        """As a call, with every layer's keys and values, (L, B, S, K, d), instead of statistics."""
        x = self.embedding[...].astype(compute_dtype(self.config))[tokens]
        x, cache = self._scan(lambda block, x, packed: block.prefill(x, packed), x, packed)
        return self.norm(x), cache

    def decode(
        self, tokens: jax.Array, cache: KeyValues, position: jax.Array, packed: Packed = None
    ) -> tuple[jax.Array, KeyValues]:
        """Hidden states of one more token of each sequence, and the cache that holds it too.

        Args:
          tokens: (B,) int32 ids.
          cache: (L, B, C, K, d), of `prefill` (padded to C positions) or of the token before.
          position: (B,) int32 below C: where the tokens stand in their sequences.
          packed: what `pack` returns, or None for the dense function.

        Returns:
          (B, D) after the final norm, and the cache.
        """
        x = self.embedding[...].astype(compute_dtype(self.config))[tokens[:, None]]
        step = lambda block, x, packed, cache: block.decode(x, packed, cache, position)
        x, cache = self._scan(step, x, packed, cache)
        return self.norm(x)[:, 0], cache

    def reroute(
        self, tokens: jax.Array, packed: Packed, previous: Any, *, fit: bool
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Every layer's routing biases under its present centres, each layer seeing what the new
        biases of those before it make of the tokens, and how much the change moves.

        Args:
          tokens: (B, S) int32 ids.
          packed: what `pack` returns.
          previous: every FFN's `clustering()` before the change with a leading axis L, or None.
          fit: whether the biases are fitted to these tokens; False keeps them.

        Returns:
          biases (L, ...) float32 by the names of their variables, and the share of tokens that meet
          another expert than under `previous`, (L,) float32.
        """
        x = embed(self.embedding[...], tokens, compute_dtype(self.config))
        function = lambda block, *arguments: block.reroute(*arguments, fit)
        return self._scan(function, x, packed, previous)[1]

    def _scan(self, function: Any, x: jax.Array, packed: Packed, *rest: Any) -> tuple[Any, Any]:
        """x through function(block, x, packed, *rest) of every layer, and the second results with
        a leading axis L. `rest` has one too."""
        if self.config.scan_layers:
            graph, state = nnx.split(self.blocks)
            body = lambda x, s: function(nnx.merge(graph, s[1]), x, s[0], *s[2:])
            results = []
            for part in self._parts(packed, state, *rest):
                x, result = jax.lax.scan(body, x, part)
                results.append(result)
            return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *results)
        layers = []
        for i, block in enumerate(self.blocks):
            mine = jax.tree.map(lambda leaf, i=i: leaf[i], rest)
            x, layer = function(block, x, None if packed is None else packed[i], *mine)
            layers.append(layer)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)

    def _parts(self, packed: Packed, *stacked: Any) -> list[tuple[Any, ...]]:
        """What to scan one after another, packed weights first: the layers that stay dense have
        none, so that they are a scan of their own. `stacked` have a leading axis L."""
        first = self.dense_layers
        if packed is None or not first:
            return [(packed, *stacked)]
        cut = lambda part: jax.tree.map(lambda leaf: leaf[part], stacked)
        return [(None, *cut(slice(first))), (packed, *cut(slice(first, None)))]

    def map_blocks(self, function: Any, first: int = 0) -> Any:
        """Calls function(block) for every layer from the first one on; results stacked under
        scan_layers, else a list over the layers."""
        if not self.config.scan_layers:
            return [function(block) for block in list(self.blocks)[first:]]
        graph, state = nnx.split(self.blocks)
        state = jax.tree.map(lambda leaf: leaf[first:], state) if first else state
        # One layer at a time: packing needs little memory beyond its result.
        return jax.lax.map(lambda s: function(nnx.merge(graph, s)), state)

    def map_ffn(self, function: Any) -> Any:
        """As `map_blocks`, with every layer's FFN."""
        return self.map_blocks(lambda block: function(block.ffn))

    def pack(self) -> Packed:
        """Thresholds and packs the weights of every sparse layer: once per optimiser step of a
        sparse phase."""
        packed = self.map_blocks(lambda block: block.pack(), self.dense_layers)
        return packed if self.config.scan_layers else [None] * self.dense_layers + packed
