"""What is sparse: one record that the op, the module, the trainer and the command line share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

Metric = Literal["cosine", "l2"]
Backend = Literal["reference", "triton", "hopper"]
WeightGradient = Literal["dense", "mvue24"]
"""Of `Linear24`: the operands as they are, or one sampled 2:4 along tokens without bias."""

RoutedWeightGradient = Literal["dense", "tokens24"]
Gather = Literal["packed", "rows"]
Precision = Literal["compute", "fp8"]
"""Operands of products: of the compute dtype, or rounded to 8 bits."""

GROUP = 4
"""Elements of a 2:4 group, and live columns in a block of M."""

SMALLEST_CLUSTER = 256
"""Neurons that a cluster within an expert of a mixture must have: the two parts of 128, one a
warpgroup, of the Hopper kernels' tile. With fewer, half of it would be idle."""

_COLUMN_BLOCKS = (4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Sparsity:
    """Which parts of a feed-forward network are sparse in the sparse phase, and how.

    Hashable, so that it can be a static argument of ``jax.jit`` and of a ``custom_vjp``. The three
    switches of the network are independent, all eight combinations work; so is that of the
    attention around it.
    """

    weights: bool = True
    """2:4 weights: W1, Wg and the transpose of W2, soft-thresholded along the width."""

    routing: bool = True
    """Each token meets only the neurons of one expert: the column choice of V:N:M."""

    activations: bool = True
    """2:4 activations: of four live neurons in a row, a token keeps the two largest."""

    m: int = 16
    """Neurons in a block (M): a token's expert owns four of them, so there are M / 4 experts. With
    the E experts of a mixture, M = 4 E leaves each of them whole, and M = 4 E S makes S clusters of
    its neurons, of which a token meets one."""

    n: int = 2
    """Non-zeros that a token keeps in a block of M neurons (N)."""

    v: int = 64
    """Tokens that share a column choice (V): an expert's tokens are padded to a multiple of it."""

    shards: int | None = None
    """Parts of the neurons that are clustered and routed each on its own (S), a token choosing one
    expert in each. None is 1; the trainer takes one for each device of the tensor axis."""

    shared_every: int = 0
    """Of so many blocks of M neurons in a row every token meets all of the last one: neurons that
    are 2:4 and not routed, the shared experts of arXiv 2401.06066; 0 for none."""

    dense_layers: int = 0
    """First layers of a model that stay dense in its sparse phase, as the first layers of mixtures
    do (arXiv 2401.06066): a network alone knows nothing of it."""

    metric: Metric = "cosine"
    """How near a neuron (its column of W1), or a token, is to a cluster centre."""

    refresh_every: int = 500
    """Steps between two clusterings of the neurons within the sparse phase; 0 for never."""

    bias_rate: float = 0.001
    """Largest change a step of an expert's routing bias, in units of the score (a cosine)."""

    fit_bias: bool = True
    """Fit the routing biases on the batch at hand whenever the neurons are clustered, so that loads
    are even from the first step; False leaves it to bias_rate, over many steps."""

    reestimate_beta: bool = False
    """Set the scales of the 2:4 weights anew at each refresh; False freezes those of the start of
    the sparse phase."""

    attention_projections: bool = False
    """2:4 weights in the attention's projections too: query, key, value and output matrices,
    soft-thresholded along the width. Goes beyond arXiv 2602.06183."""

    kmeans_iterations: int = 10
    """Iterations of balanced k-means at the start of the sparse phase and at each refresh."""

    backend: Backend | None = None
    """Kernels to use; None takes the fastest that serves the device and the shapes."""

    weight_gradient: RoutedWeightGradient = "dense"
    """Activations in the weight-gradient products: as they are, or, tokens24, two of four tokens of
    an expert by magnitude, but for the densest of its neurons (arXiv 2503.16672)."""

    dense_neurons: float = 0.05
    """Share of an expert's neurons, those with most non-zeros, that tokens24 leaves dense."""

    gather: Gather = "packed"
    """What moves where parameters are fully sharded and kernels run: weights as each product reads
    them, packed or as rows; or the thresholded rows alone, which every device packs for each pass:
    more to move and to do, and less to hold. Weights in 8 bits move packed only."""

    @property
    def ffn(self) -> bool:
        """Whether anything of the feed-forward network is sparse; of the attention something may be
        in either case."""
        tokens24 = self.weight_gradient == "tokens24"
        return self.weights or self.routing or self.activations or tokens24

    @property
    def num_experts(self) -> int:
        """Experts that a token chooses from: M / 4, or 1 without routing."""
        return self.m // GROUP if self.routing else 1

    @property
    def num_shards(self) -> int:
        """S; 1 without routing."""
        return self.shards or 1 if self.routing else 1

    @property
    def block(self) -> int:
        """Neurons in a row that a network can be cut between."""
        return (self.m if self.routing else GROUP) * (self.shared_every if self.shares else 1)

    @property
    def shares(self) -> bool:
        """Whether some neurons meet every token although others are routed."""
        return self.shared_every > 0 and self.num_experts > 1

    def shared_neurons(self, hidden: int) -> int:
        """Neurons that every token meets, of those of a routed network; 0 without routing."""
        return hidden // self.shared_every if self.shares else 0

    def live_neurons(self, hidden: int) -> int:
        """Neurons that one token meets, h = 4 H / M (H without routing), and the shared ones."""
        shared = self.shared_neurons(hidden)
        return (hidden - shared) // self.num_experts + shared

    def rows_of_experts(self, hidden: int) -> int:
        """Rows of all experts, E h: shared neurons count once for each of them."""
        return self.num_experts * self.live_neurons(hidden)

    @property
    def spread_tokens(self) -> bool:
        """Whether an expert's tokens are laid out so that neighbours of a text lie apart."""
        return self.weight_gradient == "tokens24"

    def densest(self, live: int) -> int:
        """Of the neurons that a token meets, those that tokens24 leaves dense; never fewer than the
        share."""
        # Less what a product of a float may exceed the integer by.
        return math.ceil(self.dense_neurons * live - 1e-6)

    @property
    def density(self) -> float:
        """Share of a token's H activations that may be non-zero."""
        shared = 1 / self.shared_every if self.shares else 0.0
        live = (1 - shared) / self.num_experts + shared
        return (self.n / GROUP if self.activations else 1.0) * live

    def validate(self, *, width: int, hidden: int, tokens: int | None = None) -> None:
        """Refuses what cannot work, before anything is built.

        Args:
          width: model width D.
          hidden: neurons H of the feed-forward network.
          tokens: tokens T that one device routes together; None where not known yet.

        Raises:
          ValueError: one line that names the value.
        """
        if self.m not in _COLUMN_BLOCKS:
            raise ValueError(f"m={self.m} must be one of {_COLUMN_BLOCKS}")
        if self.n != 2:
            raise ValueError(f"n={self.n} must be 2: tensor cores know two of four only")
        if self.v < 1:
            raise ValueError(f"v={self.v} must be at least 1")
        for name, value, known in (
            ("metric", self.metric, get_args(Metric)),
            ("backend", self.backend, (None, *get_args(Backend))),
            ("weight_gradient", self.weight_gradient, get_args(RoutedWeightGradient)),
            ("gather", self.gather, get_args(Gather)),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} must be one of {known}")
        if not 0 <= self.dense_neurons <= 1:
            raise ValueError(f"dense_neurons={self.dense_neurons} must be between 0 and 1")
        if self.weight_gradient == "tokens24" and self.routing and self.v % GROUP:
            raise ValueError(f"v={self.v} must be a multiple of {GROUP} for tokens24")
        if self.refresh_every < 0:
            raise ValueError(f"refresh_every={self.refresh_every} must not be negative")
        if self.kmeans_iterations < 1:
            raise ValueError(f"kmeans_iterations={self.kmeans_iterations} must be at least 1")
        if not (math.isfinite(self.bias_rate) and self.bias_rate >= 0):
            raise ValueError(f"bias_rate={self.bias_rate} must be finite and not negative")
        if width < 1 or width % GROUP:
            raise ValueError(f"{width=} must be a positive multiple of {GROUP}")
        if self.shards is not None and self.shards < 1:
            raise ValueError(f"shards={self.shards} must be at least 1")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers={self.dense_layers} must not be negative")
        if self.shared_every < 0 or self.shared_every == 1:
            raise ValueError(
                f"shared_every={self.shared_every} must be 0 (none shared) or at least 2: with 1 "
                "nothing is left to route (routing=False)"
            )
        block = self.block
        if hidden < 1 or hidden % (block * self.num_shards):
            name = f"m={self.m}" if self.routing else f"group={GROUP}"
            name += f" times shared_every={self.shared_every}" if self.shares else ""
            name += f" times shards={self.num_shards}" if self.num_shards > 1 else ""
            raise ValueError(f"{hidden=} must be a positive multiple of {name}")
        if tokens is not None and self.routing and (tokens < 1 or tokens % self.v):
            raise ValueError(f"{tokens=} must be a positive multiple of v={self.v}")

    def validate_experts(self, *, hidden: int, num_experts: int) -> None:
        """Refuses what a mixture of experts cannot be routed by; besides `validate`.

        Args:
          hidden: neurons H of all experts together.
          num_experts: E of the mixture, each of M / (4 E) clusters.

        Raises:
          ValueError: one line that names the value.
        """
        whole = GROUP * num_experts
        # Zero and less are multiples as well, of which `validate` may not have heard yet.
        divides = self.m >= whole and self.m % whole == 0
        if not self.routing or not divides or self.num_shards != 1 or self.shares:
            raise ValueError(
                f"m={self.m}, routing={self.routing}, shards={self.num_shards}, shared_every="
                f"{self.shared_every} must be {whole} (times 2, 4, .. to route neurons further), "
                f"True, 1 and 0 for {num_experts} experts"
            )
        clusters, neurons = self.m // whole, self.live_neurons(hidden)
        if clusters > 1 and neurons < SMALLEST_CLUSTER:
            raise ValueError(
                f"m={self.m} makes {clusters} clusters of {neurons} neurons of each of "
                f"{num_experts} experts: a cluster needs {SMALLEST_CLUSTER}, m={whole} none"
            )
