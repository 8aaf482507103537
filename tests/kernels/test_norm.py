"""RMSNorm's kernels on a CPU: the reference and the interpreted kernels against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from kernels import reference_norm, registry
from kernels.triton import rms_norm as triton
from tests.kernels import norm_oracle

pytestmark = pytest.mark.core

SHAPES = [(1, 1), (37, 96), (14, 128)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kernel", [False, True])
def test_both_passes_against_float64(dtype, kernel):
    for seed, (rows, width) in enumerate(SHAPES):
        p = norm_oracle.problem(np.random.default_rng(seed), rows, width, dtype)
        forward, backward = reference_norm.rms_norm, reference_norm.rms_norm_backward
        options = {}
        if kernel:
            forward, backward = triton.rms_norm, triton.rms_norm_backward
            # Seven programs: the last one has fewer rows than the others.
            options = {"config": triton.RmsNormConfig(programs=7), "interpret": True}
        y, rstd = forward(p.x, p.scale, eps=p.eps, **options)
        norm_oracle.assert_forward(p, y, rstd)
        for passed in (None, p.passed):
            dx, partial = backward(y, rstd, p.scale, p.g, passed, **options)
            norm_oracle.assert_backward(p, passed is not None, dx, partial)


@pytest.mark.parametrize("kernel", [False, True])
def test_a_gain_of_zero_has_no_gradient_and_spoils_no_other(kernel):
    p = norm_oracle.problem(np.random.default_rng(0), 16, 64, "float32")
    scale = p.scale.at[5].set(0.0).at[9].set(1e-40)
    module = triton if kernel else reference_norm
    options = {"interpret": True} if kernel else {}
    y, rstd = module.rms_norm(p.x, scale, eps=p.eps, **options)
    dx, partial = module.rms_norm_backward(y, rstd, scale, p.g, **options)
    total = np.asarray(partial).sum(0)
    assert np.isfinite(dx).all()
    assert np.isfinite(total).all()
    assert total[5] == total[9] == 0
    exact_dx, exact = norm_oracle.backward(p._replace(scale=scale), False)
    others = np.delete(np.arange(64), [5, 9])
    np.testing.assert_allclose(total[others], exact[others], rtol=1e-4, atol=1e-4)
    size = np.abs(exact_dx).max(axis=1, keepdims=True)
    assert np.max(np.abs(dx - exact_dx)[:, others] / size) < 1e-4


@pytest.mark.parametrize(("rows", "width"), [(32768, 2048), (100, 96)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_passes_lower_for_cuda(rows, width, dtype):
    def both(x, scale):
        y, rstd = registry.rms_norm(x, scale, eps=1e-5, backend="triton")
        return registry.rms_norm_backward(y, rstd, scale, x, x, backend="triton")

    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh), registry.assume_capability((9, 0)):
        shapes = (jax.ShapeDtypeStruct((rows, width), dtype), jax.ShapeDtypeStruct((width,), "f4"))
        text = jax.jit(both).trace(*shapes).lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("__gpu$xla.gpu.triton") == 2


def test_refusals():
    x, scale = jnp.ones((8, 64)), jnp.ones((64,))
    rstd = jnp.ones((8,))
    for module in (reference_norm, triton):
        with pytest.raises(ValueError, match="two-dimensional"):
            module.rms_norm(x[0], scale, eps=1e-5)
        with pytest.raises(ValueError, match=r"scale.shape=\(32,\)"):
            module.rms_norm(x, scale[:32], eps=1e-5)
        with pytest.raises(ValueError, match=r"x\.dtype"):
            module.rms_norm(x.astype(jnp.int32), scale, eps=1e-5)
        with pytest.raises(ValueError, match=r"rstd.shape=\(4,\)"):
            module.rms_norm_backward(x, rstd[:4], scale, x)
        with pytest.raises(ValueError, match=r"g of shape \(4, 64\)"):
            module.rms_norm_backward(x, rstd, scale, x[:4])
        with pytest.raises(ValueError, match="passed of shape"):
            module.rms_norm_backward(x, rstd, scale, x, x.astype(jnp.bfloat16))
    with pytest.raises(NotImplementedError, match=r"8\.0"):
        triton.rms_norm(x, scale, eps=1e-5)
    with pytest.raises(ValueError, match="power of two"):
        triton.RmsNormConfig(programs=4, elements=3)
    device = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    with jax.sharding.use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        wide = jax.ShapeDtypeStruct((8, 8200), jnp.float32)
        with pytest.raises(NotImplementedError, match="8192"):
            triton.check_rms_norm(wide, None, eps=1e-5)
        half = jax.ShapeDtypeStruct((8, 64), jnp.float16)
        with pytest.raises(NotImplementedError, match="float16"):
            triton.check_rms_norm(half, None, eps=1e-5)
        many = jax.ShapeDtypeStruct((2**20, 2048), jnp.bfloat16)
        with pytest.raises(NotImplementedError, match="32 bits"):
            triton.check_rms_norm_backward(many, None, None, None)
