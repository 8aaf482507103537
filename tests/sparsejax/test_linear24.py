"""Linear24: dense and sparse calls, state that no optimiser sees, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from sparsejax.nn import Linear24
from sparsejax.nn.linear24 import Beta
from sparsejax.ops import matmul24
from sparsejax.prune import soft_threshold, soft_threshold_beta

pytestmark = pytest.mark.core


def layer(**kwargs) -> Linear24:
    return Linear24(16, 24, rngs=nnx.Rngs(0), **{"dtype": jnp.float32, **kwargs})


X = jax.random.normal(jax.random.key(0), (2, 6, 16))


@pytest.mark.parametrize("axis", [0, 1])
def test_dense_and_sparse_calls(axis):
    module = layer(axis=axis, use_bias=True, bias_init=nnx.initializers.ones_init())
    kernel = module.kernel[...]
    dense = module(X, sparse=False)
    np.testing.assert_allclose(dense, X @ kernel + 1, rtol=1e-5, atol=1e-5)
    beta = soft_threshold_beta(kernel, axis)
    sparse = module(X, sparse=True)
    expected = X @ (beta * soft_threshold(kernel, axis)) + 1
    np.testing.assert_allclose(sparse, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(module(X, sparse=True, packed=module.pack()), sparse)
    assert dense.shape == sparse.shape == (2, 6, 24)


def test_dtypes():
    module = layer(dtype=jnp.bfloat16)
    assert module.kernel[...].dtype == jnp.float32
    assert module(X, sparse=False).dtype == module(X, sparse=True).dtype == jnp.bfloat16


def test_beta_is_state_and_no_parameter():
    module = layer()
    assert isinstance(module.beta, Beta)
    parameters = nnx.state(module, nnx.Param)
    assert len(jax.tree.leaves(parameters)) == 1
    before = float(module.beta[...])
    module.kernel[...] = jnp.ones((16, 24)).at[::4].set(3.0)
    assert float(module.beta[...]) == before
    module.update_beta()
    # S is 2 where w is 3, zero elsewhere: 3 * 2 / 2^2.
    assert float(module.beta[...]) == 1.5


def test_trains_through_a_change_of_phase():
    """One structure for both phases, plain JAX transformations, beta left alone."""
    module = layer()
    graph, params, state = nnx.split(module, nnx.Param, ...)
    target = jax.random.normal(jax.random.key(1), (2, 6, 24))
    optimiser = optax.sgd(0.05)
    optimiser_state = optimiser.init(params)

    @jax.jit
    def packed_once(params, state):
        return nnx.merge(graph, params, state).pack()

    def step(params, optimiser_state, *, sparse):
        packed = packed_once(params, state) if sparse else None

        def loss(params):
            y = nnx.merge(graph, params, state)(X, sparse=sparse, packed=packed)
            return jnp.mean((y - target) ** 2)

        value, grads = jax.value_and_grad(loss)(params)
        updates, optimiser_state = optimiser.update(grads, optimiser_state)
        return value, optax.apply_updates(params, updates), optimiser_state

    step = jax.jit(step, static_argnames="sparse")
    for sparse in (True, False):
        losses = []
        for _ in range(15):
            value, params, optimiser_state = step(params, optimiser_state, sparse=sparse)
            losses.append(float(value))
        assert losses[-1] < 0.95 * losses[0]
    assert len(jax.tree.leaves(state)) == 1


def test_sampled_weight_gradient_reaches_the_kernel():
    module = layer(weight_gradient="mvue24", sampled="x")
    graph, params, state = nnx.split(module, nnx.Param, ...)
    key = jax.random.key(3)

    def loss(params):
        return jnp.sum(nnx.merge(graph, params, state)(X, sparse=True, key=key) ** 2)

    def expected(kernel):
        y = matmul24(
            X, kernel, beta=module.beta[...], weight_gradient="mvue24", sampled="x", key=key,
            dtype=jnp.float32,
        )  # fmt: skip
        return jnp.sum(y**2)

    grads = jax.grad(loss)(params)
    np.testing.assert_array_equal(grads["kernel"][...], jax.grad(expected)(module.kernel[...]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"in_features": 0}, "in_features=0"),
        ({"in_features": 18}, r"\(18, 24\)"),
        ({"axis": 1, "out_features": 6}, r"\(16, 6\)"),
        ({"axis": -1}, "axis=-1"),
    ],
)
def test_refuses(arguments, message):
    call = {"in_features": 16, "out_features": 24, **arguments}
    with pytest.raises(ValueError, match=message):
        Linear24(call.pop("in_features"), call.pop("out_features"), rngs=nnx.Rngs(0), **call)


def test_call_refuses():
    module = layer()
    with pytest.raises(ValueError, match="in_features=16"):
        module(jnp.ones((3, 8)), sparse=True)
    with pytest.raises(ValueError, match="no packed weight"):
        module(X, sparse=False, packed=module.pack())


def test_in_8_bits():
    layer = Linear24(64, 32, precision="fp8", rngs=nnx.Rngs(params=0))
    x = jax.random.normal(jax.random.key(1), (8, 64), jnp.bfloat16)
    packed = layer.pack()
    assert packed.dtype == jnp.float8_e4m3fn
    y = layer(x, sparse=True)
    np.testing.assert_array_equal(y, layer(x, sparse=True, packed=packed))
    plain = Linear24(64, 32, rngs=nnx.Rngs(params=0))(x, sparse=True).astype(jnp.float32)
    error = jnp.linalg.norm(y.astype(jnp.float32) - plain) / jnp.linalg.norm(plain)
    assert 1e-3 < float(error) < 0.08
