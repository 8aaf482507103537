"""Names of the parts of a step: profiles and compiled programs show operations under them."""

EMBEDDING = "embedding"
NORM = "norm"
PROJECTIONS = "projections"
"""Matrix products of the attention with weights."""
ROPE = "rope"
ATTENTION = "attention"
"""Scores, softmax and weighted values."""
FFN = "ffn"
"""The feed-forward network with everything that its sparsity adds: packing, routing, permuting."""
HEAD = "head"
"""Head and cross-entropy."""
OPTIMIZER = "optimizer"

ALL = (EMBEDDING, NORM, PROJECTIONS, ROPE, ATTENTION, FFN, HEAD, OPTIMIZER)
