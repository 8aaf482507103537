"""The neuron-level router: clusters of neurons, experts of tokens, and the plan that joins them."""

from sparsejax.routing.clustering import Clusters, balanced_assignment, cluster_neurons
from sparsejax.routing.neurons import (
    from_expert_major,
    interleave,
    permute_ffn,
    repeat_shared,
    routed_neurons,
    sum_shared,
    to_expert_major,
)
from sparsejax.routing.tokens import (
    TokenPlan,
    assign_tokens,
    combine,
    counts_by_shard,
    fit_bias,
    plan_tokens,
    token_scores,
    update_bias,
)
from sparsejax.routing.within_experts import (
    choose_groups,
    cluster_within_experts,
    expert_counts,
    fit_within_experts,
    update_within_experts,
)

__all__ = [
    "Clusters",
    "TokenPlan",
    "assign_tokens",
    "balanced_assignment",
    "choose_groups",
    "cluster_neurons",
    "cluster_within_experts",
    "combine",
    "counts_by_shard",
    "expert_counts",
    "fit_bias",
    "fit_within_experts",
    "from_expert_major",
    "interleave",
    "permute_ffn",
    "plan_tokens",
    "repeat_shared",
    "routed_neurons",
    "sum_shared",
    "to_expert_major",
    "token_scores",
    "update_bias",
    "update_within_experts",
]
