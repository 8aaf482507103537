"""Products in 8-bit floats against rounding by ml_dtypes and products in float64."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from sparsejax.nn import RoutedFFN
from sparsejax.ops.dot_fp8 import dot_fp8
from train.compiler import CUBLAS
from train.config import ModelConfig
from train.model import SwiGLU

FORWARD = np.dtype(ml_dtypes.float8_e4m3fn)
GRADIENT = np.dtype(ml_dtypes.float8_e5m2)


def rounded(x, dtype):
    """x on the grid of an 8-bit type with the least power of two as scale, float64."""
    x = np.asarray(x, np.float64)
    scale = 2.0 ** np.ceil(np.log2(np.abs(x).max() / float(ml_dtypes.finfo(dtype).max)))
    return (x / scale).astype(np.float32).astype(dtype).astype(np.float64) * scale


def problem(dtype, magnitude=1.0):
    rng = np.random.default_rng(0)
    x, dy = (
        jnp.asarray(rng.normal(size=shape) * magnitude, dtype) for shape in ((48, 32), (48, 64))
    )
    return x, jnp.asarray(rng.normal(size=(64, 32)) * 0.02, dtype), dy


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 8e-3)])
@pytest.mark.parametrize("magnitude", [1.0, 1e-9, 3e5])
def test_product_and_gradients(axis, dtype, tolerance, magnitude):
    x, w, dy = problem(dtype, magnitude)
    y, vjp = jax.vjp(lambda x, w: dot_fp8(x, w, axis=axis), x, w if axis == 1 else w.T)
    dx, dw = vjp(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (x.dtype,) * 3
    q, p, g = rounded(x, FORWARD), rounded(w, FORWARD), rounded(dy, GRADIENT)
    exact = q @ p.T, g @ p, g.T @ q if axis == 1 else q.T @ g
    for got, want in zip((y, dx, dw), exact, strict=True):
        error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
        assert error < tolerance
    # And the rounding is there: the product of the operands themselves is another.
    unrounded = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    assert np.abs(exact[0] - unrounded).max() > 1e-3 * np.abs(unrounded).max()


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_stays_visible(bad):
    x, w, dy = problem("float32")
    y, vjp = jax.vjp(lambda x, w: dot_fp8(x, w, axis=1), x.at[3, 2].set(bad), w)
    assert np.isnan(y).any()
    assert np.isnan(vjp(dy)[1]).any()
    _, vjp = jax.vjp(lambda x, w: dot_fp8(x, w, axis=1), x, w)
    assert all(np.isnan(d).any() for d in vjp(dy.at[3, 2].set(bad)))


def test_zeros():
    x, w, dy = (jnp.zeros_like(a) for a in problem("bfloat16"))
    y, vjp = jax.vjp(lambda x, w: dot_fp8(x, w, axis=1), x, w)
    assert not any(np.any(a) for a in (y, *vjp(dy)))


def network(ffn):
    """(function of parameters and x, parameters) of a feed-forward network of width 32."""
    rngs = nnx.Rngs(0)
    if ffn == "swiglu":
        config = ModelConfig(width=32, hidden=64, ffn="swiglu", ffn_precision="fp8")
        module = SwiGLU(config, rngs=rngs)
    else:
        gated = ffn == "relu2_gated"
        module = RoutedFFN(32, 64, gated=gated, dtype=jnp.float32, precision="fp8", rngs=rngs)
    graph, params = nnx.split(module)
    return (lambda params, x: nnx.merge(graph, params)(x)[0]), params


def products(jaxpr):
    """Dtypes of the values that both operands of each product come from, scales aside."""
    made = {out: eqn for eqn in jaxpr.eqns for out in eqn.outvars}
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            scaled = [made[operand] for operand in eqn.invars]
            assert [s.primitive.name for s in scaled] == ["mul", "mul"]
            yield tuple(made[s.invars[0]].invars[0].aval.dtype.name for s in scaled)
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from products(inner)


@pytest.mark.parametrize(("ffn", "count"), [("relu2", 2), ("relu2_gated", 3), ("swiglu", 3)])
def test_every_product_of_a_network_has_8_bit_operands(ffn, count):
    function, params = network(ffn)
    loss = lambda params, x: jnp.sum(function(params, x) ** 2)
    jaxpr = jax.make_jaxpr(jax.grad(loss, argnums=(0, 1)))(params, jnp.ones((2, 16, 32))).jaxpr
    found = list(products(jaxpr))
    assert len(found) == 3 * count
    assert found[:count] == [("float8_e4m3fn",) * 2] * count
    for pair in found[count:]:
        assert sorted(pair) == ["float8_e4m3fn", "float8_e5m2"]


@pytest.mark.parametrize("ffn", ["relu2", "relu2_gated", "swiglu"])
def test_gradients_of_a_network_are_near_those_of_exact_products(ffn):
    function, params = network(ffn)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(64, 32)), jnp.float32)
    g = jnp.asarray(np.random.default_rng(2).normal(size=(64, 32)), jnp.float32)
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda w: jnp.asarray(rng.normal(size=w.shape) * 0.2, w.dtype), params)

    def exact(params, x):
        w = {path[0].key: leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
        if ffn == "swiglu":
            return (jax.nn.silu(x @ w["wg"].T) * (x @ w["w1"].T)) @ w["w2"]
        y = jax.nn.relu(x @ w["w1"].T) ** 2
        return (y if ffn == "relu2" else y * (x @ w["wg"].T)) @ w["w2"]

    outputs = [jax.vjp(f, params, x) for f in (function, exact)]
    results = [jax.tree.leaves((y, vjp(g))) for y, vjp in outputs]
    for got, want in zip(*results, strict=True):
        error = jnp.linalg.norm(got - want) / jnp.linalg.norm(want)
        assert 1e-3 < error < 0.15, error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, w: dot_fp8(x, w, axis=2), "axis=2 must be 0 or 1"),
        (lambda x, w: dot_fp8(x, w, axis=0), r"x.shape=\(48, 32\) and w.shape=\(64, 32\)"),
        (lambda x, w: dot_fp8(x, w.astype("bfloat16"), axis=1), "must both be bfloat16 or float32"),
    ],
)
def test_refusals(call, message):
    x, w, _ = problem("float32")
    with pytest.raises(ValueError, match=message):
        call(x, w)


@pytest.mark.gpu
@pytest.mark.parametrize("scan", [False, True])
def test_six_calls_of_cublaslt(scan):
    """The compiled network multiplies in 8 bits, unrolled and scanned, transposes included."""
    module = lambda: RoutedFFN(256, 1024, precision="fp8", rngs=nnx.Rngs(0))
    graph, params = nnx.split(module())
    apply = lambda params, x: nnx.merge(graph, params)(x)[0]

    def loss(params, x):
        if scan:
            layers = jax.tree.map(lambda w: jnp.stack([w, w]), params)
            x = jax.lax.scan(lambda x, p: (apply(p, x), None), x, layers)[0]
        else:
            x = apply(params, x)
        return jnp.sum(x.astype(jnp.float32) ** 2)

    x = jax.random.normal(jax.random.key(0), (512, 256), jnp.bfloat16)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, x)
    text = lowered.compile(compiler_options=CUBLAS).as_text()
    assert text.count("__cublas$lt$matmul$f8") == 6
    assert text.count('custom_call_target="__cublas$lt$matmul"') == 0


@pytest.mark.gpu
def test_the_device_multiplies_as_defined():
    x, w, dy = problem("bfloat16")

    def everything(x, w, dy):
        y, vjp = jax.vjp(lambda x, w: dot_fp8(x, w, axis=1), x, w)
        return y, *vjp(dy)

    results = jax.jit(everything).lower(x, w, dy).compile(compiler_options=CUBLAS)(x, w, dy)
    q, p, g = rounded(x, FORWARD), rounded(w, FORWARD), rounded(dy, GRADIENT)
    for got, want in zip(results, (q @ p.T, g @ p, g.T @ q), strict=True):
        error = np.abs(np.asarray(got, np.float64) - want).max() / np.abs(want).max()
        assert error < 1e-2
