"""8-bit floats above the kernels: scales, losses, packed arrays, matmul24 in 8 bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparsejax import formats, fp8, ops
from sparsejax.ops import matmul24
from sparsejax.prune import soft_threshold

K, N, T = 64, 72, 40
BETA = 1.5
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2


def float64(x) -> np.ndarray:
    return np.asarray(jnp.asarray(x).astype(jnp.float32), np.float64)


def relative_error(got, expected) -> float:
    return float(np.linalg.norm(float64(got) - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize(("dtype", "top"), [(E4M3, 448.0), (E5M2, 57344.0)])
def test_scales_are_the_least_powers_of_two_that_fit(dtype, top):
    rng = np.random.default_rng(0)
    largest = (rng.random(1000) * 2.0 ** rng.integers(-60, 60, 1000)).astype(np.float32)
    largest[:4] = top, 2 * top, np.nextafter(np.float32(top), np.float32(1e9)), top / 4
    scale = np.asarray(fp8.scale_for(largest, dtype), np.float64)
    assert (np.frexp(scale)[0] == 0.5).all()
    assert (largest / scale <= top * (1 + 1e-6)).all()
    assert (largest / scale > 0.49 * top).all()
    np.testing.assert_array_equal(scale[:4], [1, 2, 2, 0.25])
    special = np.asarray(fp8.scale_for(np.float32([0, np.inf, np.nan, 1e-37]), dtype))
    assert special[0] == 1
    assert np.isnan(special[1:3]).all()
    assert special[3] == 2.0**-126


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize(("dtype", "error"), [(E4M3, 2.0**-4), (E5M2, 2.0**-3)])
def test_quantize(scaling, dtype, error):
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((32, 64)) * 10.0 ** rng.integers(-3, 3, (32, 1))).astype(np.float32)
    q = fp8.quantize(x, dtype, scaling=scaling)
    assert (q.values.dtype, q.scale.shape) == (dtype, (32,) if scaling == "row" else ())
    found = float64(fp8.dequantize(q))
    least = float(jnp.finfo(dtype).smallest_normal) * float64(q.scale).reshape(-1, 1)
    np.testing.assert_array_less(
        np.abs(found - x), np.maximum(error * np.abs(x), error * least) + 1e-30
    )
    if scaling == "row":
        # Small rows keep their bits beside large ones.
        assert (np.linalg.norm(found - x, axis=1) < error * np.linalg.norm(x, axis=1)).all()


def test_losses_are_counted():
    x = jnp.asarray([[1.0, 1e-9, 0.0, -2.0], [jnp.inf, 1.0, 2.0, 3.0]])
    lost = fp8.losses(x, fp8.quantize(x, E4M3))
    assert (float(lost.overflowed), float(lost.underflowed)) == (1, 1)
    lost = fp8.losses(x[:1], fp8.quantize(x[:1], E4M3, scale=1e-3))
    assert (float(lost.overflowed), float(lost.underflowed)) == (2, 1)
    q = fp8.quantize(x, E4M3)
    # An infinity is no large number: it makes its row NaN.
    assert np.isnan(float64(fp8.dequantize(q))[1]).all()
    assert np.isfinite(float64(fp8.dequantize(q))[0]).all()


@pytest.mark.parametrize("scaling", ["row", "tensor"])
@pytest.mark.parametrize("axis", [0, 1])
def test_packed_array(axis, scaling):
    w = jax.random.normal(jax.random.key(0), (K, N)) * jnp.exp(jnp.arange(N) / 10)
    packed = formats.pack(
        w, axis=axis, mode="soft_threshold", scale=BETA, dtype=E4M3, scaling=scaling
    )
    assert packed.dtype == E4M3
    assert packed.scale.shape == ((packed.m,) if scaling == "row" else ())
    dense = float64(packed.unpack())
    exact = BETA * float64(soft_threshold(w, axis))
    assert dense.shape == (K, N)
    assert not dense[exact == 0].any()
    limit = 2.0**-4 * np.abs(exact) + 2.0**-10 * np.max(np.abs(exact)) * 2.0
    assert (np.abs(dense - exact) <= limit).all()
    np.testing.assert_array_equal(float64(packed.T.unpack()), dense.T)
    # 8 bits for half of the elements and 2 for the place of each: 5/8 of a dense 8-bit matrix.
    padded = 64 * 128
    assert packed.nbytes == padded * 5 // 8
    leaves, tree = jax.tree.flatten(packed)
    assert len(leaves) == 3
    assert jax.tree.unflatten(tree, leaves).shape == (K, N)


@pytest.mark.parametrize("out_layout", ["mn", "nm"])
@pytest.mark.parametrize("scaling", ["row", "tensor"])
def test_product_of_any_size(out_layout, scaling):
    keys = jax.random.split(jax.random.key(0))
    a = formats.pack(
        jax.random.normal(keys[0], (50, 100)), axis=1, mode="magnitude", dtype=E5M2, scaling=scaling
    )
    b = fp8.quantize(jax.random.normal(keys[1], (37, 100)), E4M3, scaling=scaling)
    got = ops.spmm24_fp8(a, b, out_layout=out_layout, out_dtype=jnp.float32)
    expected = float64(a.unpack()) @ float64(fp8.dequantize(b)).T
    expected = expected if out_layout == "mn" else expected.T
    np.testing.assert_allclose(float64(got), expected, rtol=1e-5, atol=1e-4)


def arrays():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (T, K), jnp.bfloat16) * jnp.exp(jnp.arange(T) / 8)[:, None]
    w = jax.random.normal(keys[1], (K, N))
    dy = jax.random.normal(keys[2], (T, N), jnp.bfloat16)
    return x.astype(jnp.bfloat16), w, dy


@pytest.mark.core
@pytest.mark.parametrize("axis", [0, 1])
def test_matmul24_in_8_bits(axis):
    x, w, dy = arrays()

    @jax.jit
    def products(x, w, dy):
        call = lambda x, w: matmul24(x, w, axis=axis, beta=BETA, precision="fp8")
        y, vjp = jax.vjp(call, x, w)
        return y, *vjp(dy)

    y, dx, dw = products(x, w, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.bfloat16, jnp.float32)
    # Exactly the products of rounded operands, but for the rounding of the results.
    packed = formats.pack(w, axis=axis, mode="soft_threshold", scale=BETA, dtype=E4M3)
    weight = float64(packed.unpack())
    row = float64(packed.scale)
    rounded = lambda a, dtype, scaling: float64(
        fp8.dequantize(fp8.quantize(jnp.asarray(a, jnp.float32), dtype, scaling=scaling))
    )
    if axis == 0:
        expected_y = rounded(x, E4M3, "row") @ weight
        expected_dx = rounded(float64(dy) * row, E5M2, "tensor") @ (weight / row).T
    else:
        expected_y = rounded(float64(x) * row, E4M3, "tensor") @ (weight / row[:, None])
        expected_dx = rounded(dy, E5M2, "row") @ weight.T
    assert relative_error(y, expected_y) < 4e-3
    assert relative_error(dx, expected_dx) < 4e-3
    # And near those of 16 bits, which rules out a wrong scale.
    dense = BETA * float64(soft_threshold(w, axis))
    assert relative_error(y, float64(x) @ dense) < 0.08
    assert relative_error(dx, float64(dy) @ dense.T) < 0.12
    assert relative_error(dw, float64(x).T @ float64(dy)) < 1e-6


@pytest.mark.parametrize("axis", [0, 1])
def test_packed_weight_gives_the_same(axis):
    x, w, dy = arrays()
    packed = formats.pack(w, axis=axis, mode="soft_threshold", scale=BETA, dtype=E4M3)
    y, vjp = jax.vjp(lambda x: matmul24(x, w, axis=axis, beta=BETA, precision="fp8"), x)
    y2, vjp2 = jax.vjp(lambda x: matmul24(x, w, axis=axis, packed=packed, precision="fp8"), x)
    y3, vjp3 = jax.vjp(lambda x: matmul24(x, packed), x)
    for other, other_vjp in ((y2, vjp2), (y3, vjp3)):
        np.testing.assert_array_equal(y, other)
        np.testing.assert_array_equal(vjp(dy)[0], other_vjp(dy)[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_losses_come_as_the_gradient_of_a_probe(axis):
    x, w, dy = arrays()
    x = x.at[0, 0].set(1e-30).at[0, 1].set(1.0)
    dy = dy.at[1, 1].set(1e-30)

    @jax.jit
    def counts(x, w, dy, probe):
        call = lambda probe: matmul24(x, w, axis=axis, precision="fp8", probe=probe)
        y, vjp = jax.vjp(call, probe)
        return y, vjp(dy)[0]

    y, found = counts(x, w, dy, jnp.zeros(4))
    assert found[0] == found[2] == 0
    assert found[1] >= 1
    assert found[3] >= 1
    np.testing.assert_array_equal(y, matmul24(x, w, axis=axis, precision="fp8"))
    infinite = counts(x.at[3, 3].set(jnp.inf), w, dy.at[2, 2].set(-jnp.inf), jnp.zeros(4))[1]
    assert infinite[0] >= 1
    assert infinite[2] >= 1


@pytest.mark.core
@pytest.mark.parametrize("axis", [0, 1])
def test_under_transformations(axis):
    x, w, dy = arrays()

    def gradients(x, dy):
        call = jax.checkpoint(lambda x, w: matmul24(x, w, axis=axis, precision="fp8"))
        return jax.vjp(call, x, w)[1](dy)

    dx, dw = jax.jit(gradients)(x, dy)
    many_dx, many_dw = jax.jit(jax.vmap(gradients))(jnp.stack([x, 2 * x]), jnp.stack([dy, dy]))
    np.testing.assert_array_equal(many_dx[0], dx)
    np.testing.assert_allclose(many_dw[0], dw, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("weight_gradient", ["dense", "mvue24"])
def test_weight_gradient_is_that_of_16_bits(weight_gradient):
    x, w, dy = arrays()
    options = {"weight_gradient": weight_gradient, "key": jax.random.key(1)}
    found = [
        jax.vjp(lambda w, p=p: matmul24(x, w, precision=p, **options), w)[1](dy)[0]
        for p in ("fp8", None)
    ]
    np.testing.assert_array_equal(*found)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"precision": "int8"}, "precision='int8'"),
        ({"precision": "fp8", "dtype": jnp.float16}, "dtype=float16"),
        ({"probe": jnp.zeros(4)}, "precision='fp8'"),
        ({"precision": "fp8", "probe": jnp.zeros(3)}, "(3,)"),
    ],
)
def test_matmul24_names_the_wrong_argument(options, named):
    x, w, _ = arrays()
    with pytest.raises(ValueError, match=re.escape(named)):
        matmul24(x, w, **options)


def test_other_wrong_arguments():
    x, w, _ = arrays()
    packed = formats.pack(w, axis=0, mode="soft_threshold")
    with pytest.raises(ValueError, match="bfloat16"):
        matmul24(x, w, packed=packed, precision="fp8")
    in_8_bits = formats.pack(w, axis=0, mode="soft_threshold", dtype=E4M3)
    with pytest.raises(ValueError, match="float8_e4m3fn"):
        matmul24(x, w, packed=in_8_bits)
    with pytest.raises(ValueError, match="spmm24_fp8"):
        ops.spmm24(in_8_bits, x, b_layout="nk")
    with pytest.raises(ValueError, match=r"a\.dtype=bfloat16"):
        ops.spmm24_fp8(packed, fp8.quantize(x, E4M3))
    with pytest.raises(ValueError, match="a must be a Sparse24"):
        ops.spmm24_fp8(w, fp8.quantize(x, E4M3))
    with pytest.raises(ValueError, match=r"b must be a fp8\.Quantized .*, not ndarray"):
        ops.spmm24_fp8(in_8_bits, np.asarray(x))
    three = fp8.quantize(x, E4M3)._replace(scale=jnp.ones(3))
    with pytest.raises(ValueError, match=re.escape("b.scale has shape (3,)")):
        ops.spmm24_fp8(in_8_bits, three)
    with pytest.raises(ValueError, match="scaling='column'"):
        fp8.quantize(x, E4M3, scaling="column")
    with pytest.raises(ValueError, match="scaling='column'"):
        formats.pack(w, axis=0, mode="value", dtype=E4M3, scaling="column")
    with pytest.raises(ValueError, match="dtype=float32"):
        fp8.quantize(x, jnp.float32)
    with pytest.raises(ValueError, match="must be a scalar"):
        fp8.dot(
            fp8.quantize(x, E4M3), fp8.quantize(x, E4M3), contract=(1, 1), out_dtype=jnp.float32
        )
