"""Differentiable sparse products."""
