"""RMSNorm's kernels on a GPU: numbers, repeatability, and the backend that serves them."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import registry
from kernels.triton import rms_norm as triton
from tests.kernels import norm_oracle

pytestmark = pytest.mark.gpu


def fresh_rng() -> np.random.Generator:
    """New numbers in each run: the kernels must be right on any input."""
    seed = np.random.SeedSequence().entropy
    print(f"{seed=}")
    return np.random.default_rng(seed)


def run(p: norm_oracle.Problem, passed: bool, config=None):
    y, rstd = triton.rms_norm(p.x, p.scale, eps=p.eps, config=config)
    extra = p.passed if passed else None
    return y, rstd, *triton.rms_norm_backward(y, rstd, p.scale, p.g, extra, config=config)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("rows", "width"),
    [(1, 1), (3, 8), (37, 96), (511, 128), (513, 640), (1025, 2048), (4096, 2048), (700, 4096),
     (130, 5000), (77, 8192)],
)  # fmt: skip
def test_both_passes_against_float64(rows, width, dtype):
    p = norm_oracle.problem(fresh_rng(), rows, width, dtype)
    for passed in (False, True):
        # Leaves NaN in the memory that the next arrays of this size are likely to get.
        jnp.full((rows, width), jnp.nan, dtype).block_until_ready().delete()
        y, rstd, dx, partial = run(p, passed)
        norm_oracle.assert_forward(p, y, rstd)
        norm_oracle.assert_backward(p, passed, dx, partial)


@pytest.mark.parametrize("elements", [4, 8, 16, 32])
@pytest.mark.parametrize("programs", [1, 100, 2000])
def test_any_tiling(elements, programs):
    p = norm_oracle.problem(fresh_rng(), 999, 2048, "bfloat16")
    y, rstd, dx, partial = run(p, True, triton.RmsNormConfig(programs, elements))
    norm_oracle.assert_forward(p, y, rstd)
    norm_oracle.assert_backward(p, True, dx, partial)


def test_equal_calls_give_equal_bits():
    p = norm_oracle.problem(fresh_rng(), 32768, 2048, "bfloat16")
    first = run(p, True)
    for _ in range(5):
        for a, b in zip(first, run(p, True), strict=True):
            assert np.array_equal(np.asarray(a).view(np.uint8), np.asarray(b).view(np.uint8))


def test_the_kernels_serve_without_a_warning():
    p = norm_oracle.problem(fresh_rng(), 128, 2048, "bfloat16")
    with warnings.catch_warnings():
        warnings.simplefilter("error", registry.FallbackWarning)
        text = (
            jax.jit(lambda x, scale: registry.rms_norm(x, scale, eps=1e-5))
            .lower(p.x, p.scale)
            .as_text()
        )
    assert "__gpu$xla.gpu.triton" in text
