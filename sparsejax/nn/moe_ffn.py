"""A mixture of experts, each a feed-forward network of its own: dense or sparse, by the call.

An expert of a mixture and an expert of `RoutedFFN` differ in who chooses: there neurons of one
network are clustered and a token meets the nearest cluster; here a learned router weighs the
experts and a token meets k of them. What is computed for a row and its expert is the same, and so
are the kernels: the neurons of all experts are stored as one network of H neurons in the order that
`sparsejax.routing.interleave` makes, expert e in the columns 4 e to 4 e + 3 of every block of
M = 4 E, and k T rows are routed instead of T.

Neurons of a large expert can be routed further: clustered, as `RoutedFFN`'s are, into S clusters, a
token meeting one cluster of each of its k experts (`sparsejax.routing.within_experts`).
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.nn.initializers import Initializer
from jax.typing import DTypeLike

from sparsejax import sharding, sharding_experts
from sparsejax.nn.routed_ffn import RoutingState, RoutingStats, RoutingUpdate
from sparsejax.ops.grouped_dot import GroupedBackend, group_rows, grouped_dot
from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.ops.relu2 import relu2
from sparsejax.ops.routed_ffn import pack_ffn, routed_ffn
from sparsejax.prune import soft_threshold_beta
from sparsejax.routing import (
    choose_groups,
    fit_bias,
    fit_within_experts,
    from_expert_major,
    permute_ffn,
    plan_tokens,
    to_expert_major,
    token_scores,
)
from sparsejax.sharding import MeshAxes
from sparsejax.spec import GROUP, Sparsity


class TopK(NamedTuple):
    """Which experts a token meets, and how much each counts."""

    experts: Array
    """(T, k) int32, the best one first."""
    gates: Array
    """(T, k) float32, positive, adding up to one; of a single one of several experts its score."""


class MoEFFN(nnx.Module):
    """sum_j gate_j relu(x W1_j)^2 W2_j over the k experts that a token chooses; none is dropped.

    Scores are sigmoid(x R), R the router; the k experts of the highest score plus bias are chosen,
    and weighed by their scores alone, scaled to add up to one (but for k = 1 of several experts:
    constant gates would leave the router without a gradient). The bias evens loads without an
    auxiliary loss (arXiv 2408.15664; `sparsejax.routing.update_bias`): no gradient reaches it.

    With packed weights the experts are sparse, without them dense; both route alike, so a change of
    phase changes no structure. Parameters: router (E, D); w1, w2 (H, D), H = E h, row n is neuron n
    in interleaved order. State: bias (E,) and beta (3,) float32, and with S > 1 clusters in each
    expert, met by sparse steps only, centers (E S, D) and cluster_bias (E S,). On a mesh (`axes`,
    and `jax.set_mesh`) it runs as `sparsejax.sharding_experts` describes.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        *,
        num_experts: int,
        experts_per_token: int = 2,
        sparsity: Sparsity | None = None,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer | None = None,
        out_init: Initializer | None = None,
        grouped_backend: GroupedBackend | None = None,
        axes: MeshAxes | None = None,
        rngs: nnx.Rngs,
    ):
        """Initialises parameters and routing state.

        Args:
          width: D. hidden: H, of all experts together.
          num_experts: E. experts_per_token: k.
          sparsity: what is sparse in the sparse phase: routing must be on, with M = 4 E S: S = 1
            leaves experts whole, a larger power of two routes neurons further, S clusters of
            256 neurons at least in each expert. None for a mixture that stays dense.
          dtype: of the products' operands. param_dtype: of the master weights.
          kernel_init: of the router (D, E) and of an expert's W1 (D, h); out_init: of its W2
            (h, D); LeCun normal where None. Called with (fan-in, fan-out) shapes.
          grouped_backend: of the dense experts' products, as for `grouped_dot`; `sparsity.backend`
            is that of the sparse ones.
          axes: what the axes of the mesh mean, whose tensor axis must be 1; None where tokens and
            weights are not sharded by us.
          rngs: stream `params`.

        Raises:
          ValueError: sizes that do not fit each other or the sparsity.
        """
        if width < 1 or num_experts < 1 or hidden < 1 or hidden % (GROUP * num_experts):
            raise ValueError(
                f"{width=} and {num_experts=} must be positive, {hidden=} a multiple of "
                f"{GROUP} num_experts"
            )
        if not 1 <= experts_per_token <= num_experts:
            raise ValueError(f"{experts_per_token=} must be 1 to {num_experts=}")
        if sparsity is not None:
            sparsity.validate(width=width, hidden=hidden)
            sparsity.validate_experts(hidden=hidden, num_experts=num_experts)
        self.width = width
        self.hidden = hidden
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.clusters = 1 if sparsity is None else sparsity.num_experts // num_experts
        self.sparsity = sparsity
        self.dtype = jnp.dtype(dtype)
        self.grouped_backend = grouped_backend
        self.axes = axes
        kernel_init = kernel_init or nnx.initializers.lecun_normal()
        out_init = out_init or nnx.initializers.lecun_normal()
        live = hidden // num_experts

        def experts(init: Initializer, transposed: bool) -> Array:
            shape = (width, live) if transposed else (live, width)
            keys = jax.random.split(rngs.params(), num_experts)
            found = jax.vmap(lambda key: init(key, shape, param_dtype))(keys)
            return from_expert_major(found.swapaxes(1, 2) if transposed else found, 0)

        self.router = nnx.Param(kernel_init(rngs.params(), (width, num_experts), param_dtype).T)
        self.w1 = nnx.Param(experts(kernel_init, True))
        self.w2 = nnx.Param(experts(out_init, False))
        self.bias = RoutingState(jnp.zeros((num_experts,), jnp.float32))
        self.beta = RoutingState(jnp.ones((3,), jnp.float32))
        if self.clusters > 1:
            groups = num_experts * self.clusters
            self.centers = RoutingState(jnp.zeros((groups, width), jnp.float32))
            self.cluster_bias = RoutingState(jnp.zeros((groups,), jnp.float32))

    def _sparsity(self) -> Sparsity:
        if self.sparsity is None:
            raise ValueError("sparsity=None: these experts have no sparse form")
        return self.sparsity

    def _local(self) -> bool:
        """Whether one device is all there is."""
        return sharding.current_mesh(self.axes) is None

    def _scores(self, x: Array) -> Array:
        router = self.router[...].astype(self.dtype)
        products = jnp.einsum("td,ed->te", x, router, preferred_element_type=jnp.float32)
        return jax.nn.sigmoid(products)

    def route(self, x: Array) -> TopK:
        """(..., D) to the experts of each token, T the product of the leading axes."""
        return self._choose(self._scores(self._flat(x)), self.bias[...])

    def _choose(self, scores: Array, bias: Array) -> TopK:
        preferred = jax.lax.stop_gradient(scores + bias)
        best = lambda preferred: jax.lax.top_k(preferred, self.experts_per_token)[1]
        experts = sharding_experts.by_device(best, (preferred,), axes=self.axes).astype(jnp.int32)
        gates = jnp.take_along_axis(scores, experts, axis=1)
        if self.experts_per_token == 1 < self.num_experts:
            return TopK(experts, gates)
        return TopK(experts, gates / jnp.maximum(jnp.sum(gates, axis=1, keepdims=True), 1e-9))

    def _cluster_scores(self, x: Array, centers: Array) -> Array:
        x, centers = jax.lax.stop_gradient((x, centers))
        return token_scores(x, centers, self._sparsity().metric)

    def _groups(self, x: Array, experts: Array) -> Array:
        """The group of neurons (expert, or one of its clusters) of each row: (k T,) int32."""
        if self.clusters > 1:
            scores = self._cluster_scores(x, self.centers[...])
            bias = jax.lax.stop_gradient(self.cluster_bias[...])
            experts = self._choose_groups(scores, bias, experts)
        return experts.reshape(-1)

    def _choose_groups(self, scores: Array, bias: Array, experts: Array) -> Array:
        choose = lambda scores, experts, bias: choose_groups(
            scores, bias, experts, self.num_experts
        )
        return sharding_experts.by_device(choose, (scores, experts), bias, axes=self.axes)

    def _flat(self, x: Array) -> Array:
        if x.ndim < 2 or x.shape[-1] != self.width:
            raise ValueError(f"{x.shape=} must end in width={self.width}")
        return x.reshape(-1, self.width).astype(self.dtype)

    def pack(self) -> PackedFFN:
        """The sparse weights of these parameters: once for each optimiser step, not differentiated.

        Scaled by `beta`, which `begin_sparse` gives.
        """
        w1, w2, beta = jax.lax.stop_gradient((self.w1[...], self.w2[...], self.beta[...]))
        if self._local():
            return pack_ffn(w1, w2, None, beta, self._sparsity(), dtype=self.dtype)
        return sharding_experts.pack_experts(
            w1, w2, beta, self._sparsity(), dtype=self.dtype, axes=self.axes
        )

    def __call__(self, x: Array, packed: PackedFFN | None = None) -> tuple[Array, RoutingStats]:
        """(..., D) to (..., D) in the compute dtype, and the loads, k T in all: of the E experts,
        or where it is sparse of the E S groups, cluster s of expert e being group s E + e. On a
        mesh (N, ..), those of each of the N devices that share the batch.

        Args:
          x: (..., D), any floating dtype; the leading axes are tokens.
          packed: `pack()` of these parameters for sparse experts, None for dense ones.
        """
        rows, k = self._flat(x), self.experts_per_token
        chosen = self._choose(self._scores(rows), self.bias[...])
        if packed is None:
            y, counts = self._dense(rows, chosen.experts)
        else:
            y, counts = self._sparse(rows, chosen.experts, packed)
        y = y.reshape(-1, k, self.width)
        y = jnp.einsum("tk,tkd->td", chosen.gates, y, preferred_element_type=jnp.float32)
        return y.astype(self.dtype).reshape(x.shape), RoutingStats(counts)

    def _sparse(self, rows: Array, experts: Array, packed: PackedFFN) -> tuple[Array, Array]:
        """Sparse experts: (k T, D), each row through its group, and the groups' loads."""
        sparsity, w1, w2 = self._sparsity(), self.w1[...], self.w2[...]
        if not self._local():
            return sharding_experts.sparse_experts(
                jnp.repeat(rows, self.experts_per_token, axis=0),
                self._groups(rows, experts),
                w1,
                w2,
                packed,
                sparsity,
                axes=self.axes,
            )
        if sparsity.num_experts == 1:
            plan, counts = None, jnp.full((1,), rows.shape[0], jnp.int32)
        else:
            plan = plan_tokens(
                self._groups(rows, experts),
                sparsity.num_experts,
                sparsity.v,
                spread=sparsity.spread_tokens,
            )
            counts = plan.counts
        repeated = jnp.repeat(rows, self.experts_per_token, axis=0)
        return routed_ffn(repeated, w1, w2, None, packed, plan, sparsity), counts

    def _dense(self, rows: Array, experts: Array) -> tuple[Array, Array]:
        """Dense experts: k T rows of D, each through its expert, and the experts' loads."""
        if not self._local():
            return sharding_experts.dense_experts(
                rows,
                experts,
                self.w1[...],
                self.w2[...],
                self.num_experts,
                backend=self.grouped_backend,
                axes=self.axes,
            )
        order, inverse, counts = group_rows(experts.reshape(-1), self.num_experts)
        by_expert = lambda w: to_expert_major(w.astype(self.dtype), 0, self.num_experts)
        x = rows[order // self.experts_per_token]
        product = functools.partial(grouped_dot, sizes=counts, backend=self.grouped_backend)
        y2 = relu2(product(x, by_expert(self.w1[...]).swapaxes(1, 2)))
        return product(y2, by_expert(self.w2[...]))[inverse], counts

    def begin_sparse(self) -> RoutingUpdate:
        """Sets beta and, with S > 1, clusters each expert's neurons: what the first sparse step
        needs. Experts are what they are: no neuron leaves its own.

        The interface of `RoutedFFN.begin_sparse`.
        """
        return self._update(None, self._beta())

    def _beta(self) -> Array:
        if not self._sparsity().weights:
            return jnp.ones((3,), jnp.float32)
        w1, w2 = (soft_threshold_beta(w[...], 1) for w in (self.w1, self.w2))
        return jnp.stack([w1, w2, jnp.float32(1)])

    def refresh(self) -> RoutingUpdate:
        """As `begin_sparse`, from the centres as they are; beta stays as it is, unless
        `Sparsity.reestimate_beta`."""
        beta = self._beta() if self._sparsity().reestimate_beta else self.beta[...]
        return self._update(self.centers[...] if self.clusters > 1 else None, beta)

    def _update(self, centers: Array | None, beta: Array) -> RoutingUpdate:
        if self.clusters == 1:
            identity = jnp.arange(self.hidden, dtype=jnp.int32)
            return RoutingUpdate(self.router[...], beta, identity, jnp.float32(0))
        permutation, centers, churn = sharding_experts.cluster(
            self.w1[...],
            centers,
            self.num_experts,
            self.clusters,
            self._sparsity(),
            axes=self.axes,
        )
        return RoutingUpdate(centers, beta, permutation, churn)

    def apply_update(self, update: RoutingUpdate) -> None:
        """Puts an update into effect on this module, in place, as `RoutedFFN.apply_update`."""
        self.beta[...] = update.beta
        if self.clusters > 1:
            self.w1[...], self.w2[...], _ = permute_ffn(
                self.w1[...], self.w2[...], update.permutation
            )
            self.centers[...] = update.centers

    def clustering(self) -> tuple[Array, Array] | None:
        """What `reroute` takes as `previous`: centers and cluster_bias, or None where S is 1."""
        return (self.centers[...], self.cluster_bias[...]) if self.clusters > 1 else None

    def reroute(
        self, x: Array, previous: tuple[Array, Array] | None = None, *, fit: bool = True
    ) -> tuple[dict[str, Array], Array]:
        """The biases that go on, by the names of their variables, and what a refresh moved.

        As `RoutedFFN.reroute`. Experts' loads are even already where the dense phase before evened
        them; `fit` starts them even where there was none (for a token's first choice), and those of
        the clusters within each expert in any case.

        Returns:
          bias (E,) and, with S > 1, cluster_bias (E S,), float32; and the share of rows, each a
          token and one of its experts, that meet another cluster than under `previous`, scalar
          float32, zero without.
        """
        x, bias, moved = self._flat(x), self.bias[...], jnp.float32(0)
        scores = jax.lax.stop_gradient(self._scores(x))
        if fit:
            fitted = sharding_experts.everywhere(fit_bias, (scores,), bias, axes=self.axes)
            bias = jnp.where(jnp.any(bias != 0), bias, fitted)
        if self.clusters == 1:
            return {"bias": bias}, moved
        experts = self._choose(scores, bias).experts
        scores, own = self._cluster_scores(x, self.centers[...]), self.cluster_bias[...]
        if fit:
            fit_clusters = lambda scores, experts, own: fit_within_experts(
                scores, own, experts, self.num_experts
            )
            own = sharding_experts.everywhere(fit_clusters, (scores, experts), own, axes=self.axes)
        if previous is not None:
            centers, before = previous
            was = self._choose_groups(self._cluster_scores(x, centers), before, experts)
            now = self._choose_groups(scores, own, experts)
            moved = jnp.mean(now != was, dtype=jnp.float32)
        return {"bias": bias, "cluster_bias": own}, moved
