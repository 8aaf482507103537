"""RMSNorm and its gradients in float64, from its input, and random arguments."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np


class Problem(NamedTuple):
    """Arrays as a kernel takes them, and eps."""

    x: jnp.ndarray
    scale: jnp.ndarray
    g: jnp.ndarray
    passed: jnp.ndarray
    eps: float


def problem(rng: np.random.Generator, rows: int, width: int, dtype) -> Problem:
    """Rows of very different sizes, gains of both signs."""
    size = np.exp2(rng.integers(-6, 7, (rows, 1)))
    draw = lambda factor=1.0: jnp.asarray(rng.standard_normal((rows, width)) * factor, dtype)
    scale = rng.uniform(0.3, 2.0, width) * rng.choice([-1, 1], width)
    return Problem(draw(size), jnp.asarray(scale, jnp.float32), draw(), draw(1 / size), 1e-5)


def forward(p: Problem) -> tuple[np.ndarray, np.ndarray]:
    """y and 1 / rms of each row."""
    x = np.float64(p.x)
    rstd = 1 / np.sqrt(np.mean(x * x, axis=1) + p.eps)
    return x * rstd[:, None] * np.float64(p.scale), rstd


def backward(p: Problem, passed: bool) -> tuple[np.ndarray, np.ndarray]:
    """dx and dscale; the derivative of x_i / sqrt(mean(x^2) + eps) written out."""
    x, g, scale = np.float64(p.x), np.float64(p.g), np.float64(p.scale)
    rstd = forward(p)[1][:, None]
    h = g * scale
    dx = rstd * h - x * rstd**3 * np.mean(x * h, axis=1, keepdims=True)
    return dx + (np.float64(p.passed) if passed else 0), np.sum(g * x * rstd, axis=0)


def assert_forward(p: Problem, y, rstd) -> None:
    exact, exact_rstd = forward(p)
    assert y.dtype == p.x.dtype
    assert rstd.dtype == jnp.float32
    unit = float(jnp.finfo(y.dtype).eps)
    np.testing.assert_allclose(np.float64(y), exact, rtol=max(unit, 1e-5))
    np.testing.assert_allclose(np.float64(rstd), exact_rstd, rtol=1e-5)


def assert_backward(p: Problem, passed: bool, dx, partial) -> None:
    """Against the exact gradients: y, of which they are made, is rounded once, and so is dx."""
    exact, exact_scale = backward(p, passed)
    rows, width = p.x.shape
    assert dx.dtype == p.x.dtype
    assert dx.shape == p.x.shape
    assert partial.dtype == jnp.float32
    assert partial.shape[1:] == (width,)
    unit = max(float(jnp.finfo(dx.dtype).eps), 1e-5)
    # Each row has a size of its own: that of its largest term, which others may cancel.
    size = np.abs(forward(p)[1][:, None] * np.float64(p.g) * np.float64(p.scale))
    size = np.maximum(np.abs(exact), size).max(axis=1, keepdims=True)
    assert np.max(np.abs(np.float64(dx) - exact) / size) < 2 * unit
    total = np.sum(np.float64(partial), axis=0)
    error = np.abs(total - exact_scale).max()
    assert error < 4 * unit * np.sqrt(rows)
