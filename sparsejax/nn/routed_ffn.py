"""The feed-forward module of the recipe: dense or routed with the same parameters."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from sparsejax import sharding
from sparsejax.ops.dense import product
from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.ops.relu2 import relu2, relu2_of_kept
from sparsejax.ops.routed_ffn import pack_ffn, routed_ffn
from sparsejax.prune import select24, soft_threshold_beta
from sparsejax.routing import (
    assign_tokens,
    permute_ffn,
    plan_tokens,
    repeat_shared,
    to_expert_major,
)
from sparsejax.sharding import MeshAxes
from sparsejax.spec import Precision, Sparsity


class RoutingState(nnx.Variable):
    """State that no optimiser sees and every checkpoint holds: centres, bias, beta."""


class RoutingStats(NamedTuple):
    """What a routed call reports; leading axes (layers) may be stacked in front."""

    counts: Array
    """(..., S E) int32: tokens of each expert, S the shards of `Sparsity.shards`. On a mesh
    (..., N, S E): on each of the N devices that share the batch; their sum is the load."""

    @property
    def imbalance(self) -> Array:
        """(...) float32: load of the fullest expert over the mean load; 1 is even."""
        load = self.counts.astype(jnp.float32)
        return jnp.max(load, axis=-1) / jnp.maximum(jnp.mean(load, axis=-1), 1.0)


class RoutingUpdate(NamedTuple):
    """What the start of the sparse phase, or a refresh, changes; see `RoutedFFN.begin_sparse`."""

    centers: Array
    """(S E, D) float32."""
    beta: Array
    """(3,) float32: scales of w1, w2, wg."""
    permutation: Array
    """(H,) int32: new neuron j is old neuron permutation[j]; for parameters and their moments."""
    churn: Array
    """Scalar float32: the share of neurons that changed expert (or, at first, place)."""


class ActivationCapture(NamedTuple):
    """How much of the dense activations the sparse network sees."""

    routed: Array
    """Scalar float32: share of sum |Y2| on the neurons of the tokens' experts."""
    kept: Array
    """Scalar float32: share that is left when two of four of those are kept."""


class RoutedFFN(nnx.Module):
    """relu(x W1)^2 [* (x Wg)] times W2, dense or in V:N:M form.

    The call chooses: with packed weights it is the sparse network, without them the dense one, so a
    change of phase changes no structure. Parameters: w1, w2 and, gated, wg, all (H, D): row n is
    neuron n, so w1 and wg are the transposes of W1 and Wg.
    With a `Sparsity`, `RoutingState` variables whatever the phase: centers (S E, D), bias (S E,)
    and beta (3,), all float32. On a mesh (`axes`, and `jax.set_mesh`) the network runs as
    `sparsejax.sharding` describes. Nothing here mutates the module but `apply_update`, so that it
    composes with plain jax.jit, value_and_grad, checkpoint and scan over nnx.split state.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        gated: bool = False,
        sparsity: Sparsity | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        precision: Precision = "compute",
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer | None = None,
        out_init: Initializer | None = None,
        axes: MeshAxes | None = None,
        rngs: nnx.Rngs,
    ):
        """Initialises parameters and routing state.

        Args:
          width: D. hidden: H.
          gated: adds Wg.
          sparsity: what is sparse in the sparse phase; None for a network that stays dense.
          dtype: of the products' operands. param_dtype: of the master weights.
          precision: "fp8" rounds the operands of products to 8 bits: all of the dense network
            (`sparsejax.ops.dense`), and of the sparse one those with a 2:4 operand, where kernels
            serve it (`sparsejax.ops.routed_ffn_fp8`); on a mesh its weights are gathered in 8 bits.
          kernel_init: of W1 and Wg (D, H); out_init: of W2 (H, D); LeCun normal where None. Called
            with (fan-in, fan-out) shapes.
          axes: what the axes of the mesh mean; None where tokens and weights are not sharded by us.
          rngs: stream `params`.

        Raises:
          ValueError: sizes that do not fit each other or the sparsity.
        """
        if width < 1 or hidden < 1:
            raise ValueError(f"{width=} and {hidden=} must be positive")
        if sparsity is not None:
            sparsity.validate(width=width, hidden=hidden)
        self.width = width
        self.hidden = hidden
        self.gated = gated
        self.sparsity = sparsity
        self.dtype = jnp.dtype(dtype)
        self.precision: Precision = precision
        self.axes = axes
        kernel_init = kernel_init or nnx.initializers.lecun_normal()
        out_init = out_init or nnx.initializers.lecun_normal()
        self.w1 = nnx.Param(kernel_init(rngs.params(), (width, hidden), param_dtype).T)
        self.w2 = nnx.Param(out_init(rngs.params(), (hidden, width), param_dtype))
        self.wg = (
            nnx.Param(kernel_init(rngs.params(), (width, hidden), param_dtype).T) if gated else None
        )
        if sparsity is not None:
            experts = sparsity.num_shards * sparsity.num_experts
            self.centers = RoutingState(jnp.zeros((experts, width), jnp.float32))
            self.bias = RoutingState(jnp.zeros((experts,), jnp.float32))
            self.beta = RoutingState(jnp.ones((3,), jnp.float32))

    def _sparsity(self) -> Sparsity:
        if self.sparsity is None:
            raise ValueError("sparsity=None: this feed-forward network has no sparse form")
        return self.sparsity

    def _local(self) -> bool:
        """Whether one device and one clustering are all there is."""
        return sharding.current_mesh(self.axes) is None and self._sparsity().num_shards == 1

    def _weights(self) -> tuple[Array, Array, Array | None]:
        return self.w1[...], self.w2[...], None if self.wg is None else self.wg[...]

    def _flat(self, x: Array) -> Array:
        if x.ndim < 2 or x.shape[-1] != self.width:
            raise ValueError(f"{x.shape=} must end in width={self.width}")
        return x.reshape(-1, self.width).astype(self.dtype)

    def pack(self) -> PackedFFN | None:
        """The sparse weights of these parameters: once for each optimiser step, not differentiated.

        Scaled by `beta`, which `begin_sparse` gives; neurons in the order that it gives. None if
        nothing of this network is sparse: its steps are dense ones then, at their speed.
        """
        sparsity = self._sparsity()
        if not sparsity.ffn:
            return None
        weights = jax.lax.stop_gradient(self._weights())
        if not self._local():
            return sharding.pack_ffn(
                *weights,
                self.beta[...],
                sparsity,
                dtype=self.dtype,
                precision=self.precision,
                axes=self.axes,
            )
        return pack_ffn(
            *weights, self.beta[...], sparsity, dtype=self.dtype, precision=self.precision
        )

    def route(self, x: Array) -> Array:
        """(..., D) to the expert of each token, T the product of the leading axes: (T,) int32, or
        with S > 1 shards (S, T), in 0..E-1 each."""
        sparsity, x = self._sparsity(), self._flat(x)
        experts, shards = sparsity.num_experts, sparsity.num_shards
        if experts == 1:
            return jnp.zeros((x.shape[0],), jnp.int32)
        rows = (slice(s * experts, (s + 1) * experts) for s in range(shards))
        chosen = [
            assign_tokens(x, self.centers[...][own], self.bias[...][own], sparsity.metric)
            for own in rows
        ]
        return chosen[0] if shards == 1 else jnp.stack(chosen)

    def __call__(
        self, x: Array, packed: PackedFFN | None = None
    ) -> tuple[Array, RoutingStats | None]:
        """(..., D) to (..., D) in the compute dtype; where it is sparse, the experts' load as well.

        Args:
          x: (..., D), any floating dtype; the leading axes are tokens.
          packed: `pack()` of these parameters for the sparse network, None for the dense one.

        Returns:
          (y, None) dense, (y, `RoutingStats`) sparse.
        """
        shape = x.shape
        w1, w2, wg = self._weights()
        if packed is not None and not self._local():
            self._flat(x)
            y, counts = sharding.routed_ffn(
                x.astype(self.dtype),
                *(w1, w2, wg),
                packed,
                self.centers[...],
                self.bias[...],
                self._sparsity(),
                axes=self.axes,
            )
            alone = sharding.current_mesh(self.axes) is None
            return y, RoutingStats(counts[0] if alone else counts)
        x = self._flat(x)
        if packed is None:
            weight = lambda w: sharding.gathered(
                w, self.dtype, sharding.weight_spec(self.axes), self.axes
            )
            dot = product(self.precision)
            activation = relu2 if self.precision == "compute" else relu2_of_kept
            y2 = activation(dot(x, weight(w1), axis=1))
            y2 = y2 if wg is None else y2 * dot(x, weight(wg), axis=1)
            return dot(y2, weight(w2), axis=0).reshape(shape), None
        sparsity = self._sparsity()
        if sparsity.num_experts == 1:
            plan, counts = None, jnp.full((1,), x.shape[0], jnp.int32)
        else:
            plan = plan_tokens(
                self.route(x), sparsity.num_experts, sparsity.v, spread=sparsity.spread_tokens
            )
            counts = plan.counts
        y = routed_ffn(x, w1, w2, wg, packed, plan, sparsity)
        return y.reshape(shape), RoutingStats(counts)

    def begin_sparse(self) -> RoutingUpdate:
        """Clusters the neurons and sets beta: what the first sparse step needs.

        A pure function of the parameters; `apply_update` (and the same permutation on the moments
        of the optimiser) puts it into effect.
        """
        return self._update(None, self._beta())

    def _beta(self) -> Array:
        w1, w2, wg = self._weights()
        if not self._sparsity().weights:
            return jnp.ones((3,), jnp.float32)
        gate = 1.0 if wg is None else soft_threshold_beta(wg, 1)
        return jnp.stack([soft_threshold_beta(w1, 1), soft_threshold_beta(w2, 1), gate])

    def refresh(self) -> RoutingUpdate:
        """Clusters again, from the centres as they are, so that experts keep their identity.

        beta stays as it is, frozen for the sparse phase, unless `Sparsity.reestimate_beta`.
        """
        beta = self._beta() if self._sparsity().reestimate_beta else self.beta[...]
        return self._update(self.centers[...], beta)

    def _update(self, centers: Array | None, beta: Array) -> RoutingUpdate:
        sparsity, w1 = self._sparsity(), self.w1[...]
        if not sparsity.routing:
            identity = jnp.arange(self.hidden, dtype=jnp.int32)
            return RoutingUpdate(self.centers[...], beta, identity, jnp.float32(0))
        permutation, centers, churn = sharding.cluster(w1, centers, sparsity, axes=self.axes)
        return RoutingUpdate(centers, beta, permutation, churn)

    def apply_update(self, update: RoutingUpdate) -> None:
        """Puts an update into effect on this module, in place: state and order of the neurons."""
        self._sparsity()
        w1, w2, wg = permute_ffn(*self._weights()[:2], update.permutation, self._weights()[2])
        self.w1[...], self.w2[...] = w1, w2
        if self.wg is not None:
            self.wg[...] = wg
        self.centers[...] = update.centers
        self.beta[...] = update.beta

    def clustering(self) -> tuple[Array, Array]:
        """What `reroute` takes as `previous`: centers and bias."""
        return self.centers[...], self.bias[...]

    def reroute(
        self, x: Array, previous: tuple[Array, Array] | None = None, *, fit: bool = True
    ) -> tuple[Array, Array]:
        """The experts' biases for the present centres, and what a change of centres moved.

        Changes nothing; with routing only.

        Args:
          x: (..., D), inputs of this network; the leading axes are tokens.
          previous: (centers, bias) before the last update, or None.
          fit: fit the biases to these tokens, so that their loads are even; False keeps them.

        Returns:
          biases (S E,) float32, and the share of tokens that meet another expert than under
          `previous`, scalar float32, zero without.
        """
        self._flat(x)
        return sharding.reroute(
            x.astype(self.dtype),
            previous,
            self.centers[...],
            self.bias[...],
            self._sparsity(),
            hidden=self.hidden,
            fit=fit,
            axes=self.axes,
        )

    def activation_capture(self, x: Array) -> ActivationCapture:
        """The share of the dense activations that routing and 2:4 leave. For evaluation: O(T H).

        Args:
          x: (..., D).
        """
        sparsity, x = self._sparsity(), self._flat(x)
        w1, _, wg = self._weights()

        def project(w: Array) -> Array:
            return jnp.dot(x, w.astype(self.dtype).T, preferred_element_type=jnp.float32)

        y2 = jnp.square(jax.nn.relu(project(w1)))
        y2 = y2 if wg is None else jnp.abs(y2 * project(wg))
        # Shard by shard: (S, T, H / S) and its tokens' experts (S, T).
        y2 = jnp.moveaxis(y2.reshape(x.shape[0], sparsity.num_shards, -1), 1, 0)
        expert = self.route(x).reshape(sparsity.num_shards, -1)
        own = jnp.arange(sparsity.num_experts)[:, None, None, None] == expert[..., None]
        live = to_expert_major(repeat_shared(y2, 2, sparsity), 2, sparsity.num_experts)
        routed = jnp.where(own, live, 0.0)
        kept = jnp.where(select24(routed), routed, 0.0) if sparsity.activations else routed
        total = jnp.sum(y2)
        total = jnp.where(total > 0, total, 1.0)
        return ActivationCapture(jnp.sum(routed) / total, jnp.sum(kept) / total)
