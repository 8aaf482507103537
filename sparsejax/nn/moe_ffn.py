"""A mixture of experts, each a feed-forward network of its own: dense or sparse, by the call.

An expert of a mixture and an expert of `RoutedFFN` differ in who chooses: there neurons of one
network are clustered and a token meets the nearest cluster; here a learned router weighs the
experts and a token meets k of them. What is computed for a row and its expert is the same, and so
are the kernels: the neurons of all experts are stored as one network of H neurons in the order that
`sparsejax.routing.interleave` makes, expert e in the columns 4 e to 4 e + 3 of every block of
M = 4 E, and k T rows are routed instead of T.
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

from sparsejax.nn.routed_ffn import RoutingState, RoutingStats, RoutingUpdate
from sparsejax.ops.grouped_dot import GroupedBackend, group_rows, grouped_dot
from sparsejax.ops.packed_ffn import PackedFFN
from sparsejax.ops.relu2 import relu2
from sparsejax.ops.routed_ffn import pack_ffn, routed_ffn
from sparsejax.prune import soft_threshold_beta
from sparsejax.routing import fit_bias, from_expert_major, plan_tokens, to_expert_major
from sparsejax.spec import GROUP, Sparsity


class TopK(NamedTuple):
    """Which experts a token meets, and how much each counts."""

    experts: Array
    """(T, k) int32, the best one first."""
    gates: Array
    """(T, k) float32, positive, adding up to one."""


class MoEFFN(nnx.Module):
    """sum_j gate_j relu(x W1_j)^2 W2_j over the k experts that a token chooses; none is dropped.

    Scores are sigmoid(x R), R the router; the k experts of the highest score plus bias are chosen,
    and weighed by their scores alone, scaled to add up to one. The bias evens loads without an
    auxiliary loss (arXiv 2408.15664; `sparsejax.routing.update_bias`): no gradient reaches it.

    With packed weights the experts are sparse, without them dense; both route alike, so a change of
    phase changes no structure. Parameters: router (E, D); w1, w2 (H, D), H = E h, row n is neuron n
    in interleaved order. State: bias (E,) and beta (3,) float32. On one device.
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
        rngs: nnx.Rngs,
    ):
        """Initialises parameters and routing state.

        Args:
          width: D. hidden: H, of all experts together.
          num_experts: E. experts_per_token: k.
          sparsity: what is sparse in the sparse phase: routing must be on, with M = 4 E. None for a
            mixture that stays dense.
          dtype: of the products' operands. param_dtype: of the master weights.
          kernel_init: of the router (D, E) and of an expert's W1 (D, h); out_init: of its W2
            (h, D); LeCun normal where None. Called with (fan-in, fan-out) shapes.
          grouped_backend: of the dense experts' products, as for `grouped_dot`; `sparsity.backend`
            is that of the sparse ones.
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
            validate_sparsity(sparsity, width=width, hidden=hidden, num_experts=num_experts)
        self.width = width
        self.hidden = hidden
        self.num_experts = num_experts
        self.experts_per_token = experts_per_token
        self.sparsity = sparsity
        self.dtype = jnp.dtype(dtype)
        self.grouped_backend = grouped_backend
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

    @property
    def centers(self) -> nnx.Param:
        """The router, in the place of `RoutedFFN`'s cluster centres: (E, D)."""
        return self.router

    def _sparsity(self) -> Sparsity:
        if self.sparsity is None:
            raise ValueError("sparsity=None: these experts have no sparse form")
        return self.sparsity

    def _scores(self, x: Array) -> Array:
        router = self.router[...].astype(self.dtype)
        products = jnp.einsum("td,ed->te", x, router, preferred_element_type=jnp.float32)
        return jax.nn.sigmoid(products)

    def route(self, x: Array) -> TopK:
        """(..., D) to the experts of each token, T the product of the leading axes."""
        return self._choose(self._scores(self._flat(x)))

    def _choose(self, scores: Array) -> TopK:
        preferred = jax.lax.stop_gradient(scores + self.bias[...])
        experts = jax.lax.top_k(preferred, self.experts_per_token)[1].astype(jnp.int32)
        gates = jnp.take_along_axis(scores, experts, axis=1)
        return TopK(experts, gates / jnp.maximum(jnp.sum(gates, axis=1, keepdims=True), 1e-9))

    def _flat(self, x: Array) -> Array:
        if x.ndim < 2 or x.shape[-1] != self.width:
            raise ValueError(f"{x.shape=} must end in width={self.width}")
        return x.reshape(-1, self.width).astype(self.dtype)

    def pack(self) -> PackedFFN:
        """The sparse weights of these parameters: once for each optimiser step, not differentiated.

        Scaled by `beta`, which `begin_sparse` gives.
        """
        w1, w2, beta = jax.lax.stop_gradient((self.w1[...], self.w2[...], self.beta[...]))
        return pack_ffn(w1, w2, None, beta, self._sparsity(), dtype=self.dtype)

    def __call__(self, x: Array, packed: PackedFFN | None = None) -> tuple[Array, RoutingStats]:
        """(..., D) to (..., D) in the compute dtype, and the experts' loads (k T in all).

        Args:
          x: (..., D), any floating dtype; the leading axes are tokens.
          packed: `pack()` of these parameters for sparse experts, None for dense ones.
        """
        rows, k = self._flat(x), self.experts_per_token
        chosen = self._choose(self._scores(rows))
        expert = chosen.experts.reshape(-1)
        if packed is None:
            y, counts = self._dense(rows, expert)
        else:
            sparsity = self._sparsity()
            if self.num_experts == 1:
                plan, counts = None, jnp.full((1,), rows.shape[0], jnp.int32)
            else:
                plan = plan_tokens(
                    expert, self.num_experts, sparsity.v, spread=sparsity.spread_tokens
                )
                counts = plan.counts
            repeated = jnp.repeat(rows, k, axis=0)
            y = routed_ffn(repeated, self.w1[...], self.w2[...], None, packed, plan, sparsity)
        y = y.reshape(-1, k, self.width)
        y = jnp.einsum("tk,tkd->td", chosen.gates, y, preferred_element_type=jnp.float32)
        return y.astype(self.dtype).reshape(x.shape), RoutingStats(counts)

    def _dense(self, rows: Array, expert: Array) -> tuple[Array, Array]:
        """Dense experts: (k T, D), each row through its expert, and the experts' loads."""
        order, inverse, counts = group_rows(expert, self.num_experts)
        by_expert = lambda w: to_expert_major(w.astype(self.dtype), 0, self.num_experts)
        x = rows[order // self.experts_per_token]
        product = functools.partial(grouped_dot, sizes=counts, backend=self.grouped_backend)
        y2 = relu2(product(x, by_expert(self.w1[...]).swapaxes(1, 2)))
        return product(y2, by_expert(self.w2[...]))[inverse], counts

    def begin_sparse(self) -> RoutingUpdate:
        """Sets beta: what the first sparse step needs. Experts are what they are: no neuron moves.

        The interface of `RoutedFFN.begin_sparse`.
        """
        beta = jnp.ones((3,), jnp.float32)
        if self._sparsity().weights:
            w1, w2 = (soft_threshold_beta(w[...], 1) for w in (self.w1, self.w2))
            beta = jnp.stack([w1, w2, jnp.float32(1)])
        return self._update(beta)

    def refresh(self) -> RoutingUpdate:
        """As `begin_sparse`, but beta stays as it is, unless `Sparsity.reestimate_beta`."""
        if self._sparsity().reestimate_beta:
            return self.begin_sparse()
        return self._update(self.beta[...])

    def _update(self, beta: Array) -> RoutingUpdate:
        identity = jnp.arange(self.hidden, dtype=jnp.int32)
        return RoutingUpdate(self.router[...], beta, identity, jnp.float32(0))

    def reroute(
        self, x: Array, previous: tuple[Array, Array] | None = None, *, fit: bool = True
    ) -> tuple[Array, Array]:
        """The biases that go on, and zero: learned experts do not move at a refresh.

        The interface of `RoutedFFN.reroute`. Loads are even already where the dense phase before
        evened them; `fit` starts them even where there was none (for a token's first choice).
        """
        del previous
        bias = self.bias[...]
        if fit:
            scores = jax.lax.stop_gradient(self._scores(self._flat(x)))
            bias = jnp.where(jnp.any(bias != 0), bias, fit_bias(scores, bias))
        return bias, jnp.float32(0)


def validate_sparsity(sparsity: Sparsity, *, width: int, hidden: int, num_experts: int) -> None:
    """Refuses a sparsity that a mixture cannot have.

    Raises:
      ValueError: one line that names the value.
    """
    sparsity.validate(width=width, hidden=hidden)
    if not sparsity.routing or sparsity.m != GROUP * num_experts or sparsity.num_shards != 1:
        raise ValueError(
            f"routing={sparsity.routing}, m={sparsity.m}, shards={sparsity.num_shards} must be "
            f"True, {GROUP * num_experts} and 1 for {num_experts} experts"
        )
