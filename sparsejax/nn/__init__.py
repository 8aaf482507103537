"""Flax NNX modules."""

from sparsejax.nn.linear24 import Linear24
from sparsejax.nn.moe_ffn import MoEFFN
from sparsejax.nn.routed_ffn import RoutedFFN

__all__ = ["Linear24", "MoEFFN", "RoutedFFN"]
