"""The neuron-level router: clusters of neurons, experts of tokens, and the plan that joins them."""

from sparsejax.routing.clustering import Clusters, balanced_assignment, cluster_neurons
from sparsejax.routing.neurons import from_expert_major, interleave, permute_ffn, to_expert_major
from sparsejax.routing.tokens import (
    TokenPlan,
    assign_tokens,
    fit_bias,
    plan_tokens,
    token_scores,
    update_bias,
)

__all__ = [
    "Clusters",
    "TokenPlan",
    "assign_tokens",
    "balanced_assignment",
    "cluster_neurons",
    "fit_bias",
    "from_expert_major",
    "interleave",
    "permute_ffn",
    "plan_tokens",
    "to_expert_major",
    "token_scores",
    "update_bias",
]
