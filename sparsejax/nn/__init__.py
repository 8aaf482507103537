"""Flax NNX modules."""

from sparsejax.nn.routed_ffn import RoutedFFN

__all__ = ["RoutedFFN"]
