"""matmul24 against float64 references, in every setting and under JAX's transformations."""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sparsejax
from kernels import registry
from sparsejax import formats, ops, prune
from sparsejax.ops import matmul24, spmm24

K, N, T = 64, 72, 40
BETA = 1.5


def arrays(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (T, K)).astype(dtype)
    w = jax.random.normal(keys[1], (K, N))
    dy = jax.random.normal(keys[2], (T, N)).astype(dtype)
    return x, w, dy


def sparse_weight(w, axis, dtype) -> np.ndarray:
    """beta S(w) in float64 from the definition, rounded to the compute dtype."""
    moved = np.moveaxis(np.asarray(w, np.float64), axis, -1)
    groups = moved.reshape(moved.shape[0], -1, 4)
    t = np.sort(np.abs(groups), axis=-1)[..., 1:2]
    s = np.sign(groups) * np.maximum(np.abs(groups) - t, 0)
    s = np.moveaxis(s.reshape(moved.shape), -1, axis)
    return np.asarray(jnp.asarray(np.float32(BETA) * s, jnp.float32).astype(dtype), np.float64)


def float64(x) -> np.ndarray:
    return np.asarray(x, np.float64)


def relative_error(got, expected) -> float:
    return float(np.linalg.norm(float64(got) - expected) / np.linalg.norm(expected))


@pytest.mark.core
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(jnp.float32, 1e-6), (jnp.bfloat16, 5e-3), (jnp.float16, 1e-3)]
)
def test_value_and_gradients(axis, dtype, tolerance):
    x, w, dy = arrays(dtype)
    reference = sparse_weight(w, axis, dtype)
    y, vjp = jax.vjp(lambda x, w: matmul24(x, w, axis=axis, beta=BETA, dtype=dtype), x, w)
    dx, dw = vjp(dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, x.dtype, w.dtype)
    assert relative_error(y, float64(x) @ reference) < tolerance
    assert relative_error(dx, float64(dy) @ reference.T) < tolerance
    # Straight through: neither the mask nor beta. float32 out of exact 16-bit products.
    assert relative_error(dw, float64(x).T @ float64(dy)) < 1e-6


@pytest.mark.parametrize("axis", [0, 1])
def test_gradient_dtypes_are_those_of_the_inputs(axis):
    x, w, _ = arrays()
    w = w.astype(jnp.bfloat16)
    y, vjp = jax.vjp(lambda x, w: matmul24(x, w, axis=axis), x, w)
    dx, dw = vjp(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32, jnp.bfloat16)


@pytest.mark.parametrize("axis", [0, 1])
def test_packed_weight_gives_the_same(axis):
    x, w, dy = arrays(jnp.bfloat16)
    packed = formats.pack(w, axis=axis, mode="soft_threshold", scale=BETA)
    y, vjp = jax.vjp(lambda x, w: matmul24(x, w, axis=axis, beta=BETA), x, w)
    # With a packed weight the master weight's values do not matter, only its gradient's place.
    y2, vjp2 = jax.vjp(lambda x, w: matmul24(x, w, axis=axis, packed=packed), x, jnp.zeros_like(w))
    np.testing.assert_array_equal(y, y2)
    for a, b in zip(vjp(dy), vjp2(dy), strict=True):
        np.testing.assert_array_equal(a, b)
    # Alone, it serves for inference, with a gradient for x.
    y3, vjp3 = jax.vjp(lambda x: matmul24(x, packed), x)
    np.testing.assert_array_equal(y, y3)
    np.testing.assert_array_equal(vjp(dy)[0], vjp3(dy)[0])


@pytest.mark.parametrize("axis", [0, 1])
def test_gradient_into_a_packed_weight_and_beta_is_zero(axis):
    x, w, _ = arrays()
    packed = formats.pack(w, axis=axis, mode="soft_threshold", dtype=jnp.float32)

    def loss(packed):
        return jnp.sum(matmul24(x, w, axis=axis, packed=packed, dtype=jnp.float32) ** 2)

    grads = jax.grad(loss, allow_int=True)(packed)
    assert not np.asarray(grads.values).any()
    dbeta = jax.grad(lambda beta: jnp.sum(matmul24(x, w, axis=axis, beta=beta) ** 2))(1.5)
    assert dbeta == 0


@pytest.mark.parametrize(("axis", "sampled", "tokens"), [(0, "dy", T), (1, "x", T), (1, "dy", 37)])
def test_sampled_weight_gradient(axis, sampled, tokens):
    x, w, dy = (a[:tokens] if a.shape[0] == T else a for a in arrays())

    def gradients(key):
        def f(x, w):
            return matmul24(
                x, w, axis=axis, dtype=jnp.float32, weight_gradient="mvue24", sampled=sampled,
                key=key,
            )  # fmt: skip

        return jax.vjp(f, x, w)[1](dy)

    dx, dw = jax.jit(gradients)(jax.random.key(1))
    # One draw is x^T dy with the sampled operand in place of the operand, exactly.
    padded = jnp.pad(dy if sampled == "dy" else x, ((0, -tokens % 4), (0, 0)))
    sample = prune.mvue24(padded, jax.random.key(1), axis=0)[:tokens]
    a, b = (x, sample) if sampled == "dy" else (sample, dy)
    assert relative_error(dw, float64(a).T @ float64(b)) < 1e-6
    # Draws differ, their mean is the exact gradient, and dx has nothing to do with it.
    draws = 200
    _, many = jax.jit(jax.vmap(gradients))(jax.random.split(jax.random.key(2), draws))
    exact = float64(x).T @ float64(dy)
    single = relative_error(dw, exact)
    assert 0.2 < single < 2
    assert relative_error(many.mean(0), exact) < 1.5 * single / np.sqrt(draws)
    dense = jax.vjp(lambda x: matmul24(x, w, axis=axis, dtype=jnp.float32), x)[1](dy)[0]
    np.testing.assert_allclose(dx, dense, rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_products_that_use_the_sparse_kernel(axis, monkeypatch):
    """The table of the docstring: which of the three products reach spmm24."""
    x, w, dy = arrays()
    shapes = []
    original = registry.spmm24

    def record(values, metadata, b, **kwargs):
        shapes.append((2 * values.shape[1], b.shape))
        return original(values, metadata, b, **kwargs)

    monkeypatch.setattr(registry, "spmm24", record)
    _, vjp = jax.vjp(lambda x, w: matmul24(x, w, axis=axis, dtype=jnp.float32), x, w)
    forward = list(shapes)
    vjp(dy)
    backward = shapes[len(forward) :]
    if axis == 0:
        assert (forward, backward) == ([(64, (T, 64))], [])
    else:
        assert (forward, backward) == ([], [(128, (T, 128))])
    shapes.clear()
    _, vjp = jax.vjp(
        lambda w: matmul24(
            x, w, axis=axis, dtype=jnp.float32, weight_gradient="mvue24", key=jax.random.key(0)
        ),
        w,
    )
    shapes.clear()
    vjp(dy)
    assert shapes[-1] == (64, (64, K))


@pytest.mark.core
def test_jit_vmap_remat_and_scan_agree():
    x, w, _ = arrays()
    xs = jnp.stack([x, 2 * x])
    ws = jnp.stack([w[:, :K], w[:, 8 : 8 + K]])

    def layer(x, w):
        return matmul24(x, w, beta=BETA, dtype=jnp.float32) / 8

    def loss(f):
        return lambda x, w: jnp.sum(jnp.cos(f(x, w)))

    def compare(got, expected):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5),
                     got, expected)  # fmt: skip

    value_and_grad = lambda f: jax.value_and_grad(loss(f), argnums=(0, 1))
    plain = value_and_grad(layer)(x, w)
    compare(jax.jit(value_and_grad(layer))(x, w), plain)
    compare(jax.jit(value_and_grad(jax.checkpoint(layer)))(x, w), plain)

    # Over both arguments, and leading axes of x alone.
    both = jax.jit(jax.vmap(value_and_grad(layer)))(xs, ws)
    each = [value_and_grad(layer)(x, w) for x, w in zip(xs, ws, strict=True)]
    compare(both, jax.tree.map(lambda *a: jnp.stack(a), *each))
    np.testing.assert_allclose(layer(xs, w), jnp.stack([layer(x, w) for x in xs]), rtol=1e-5)

    def scanned(x, ws):
        return jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x, ws)[0]

    def unrolled(x, ws):
        return layer(layer(x, ws[0]), ws[1])

    compare(jax.jit(value_and_grad(scanned))(x, ws), value_and_grad(unrolled)(x, ws))

    # A stack of packed weights goes through scan as one pytree.
    packed = jax.vmap(
        lambda w: formats.pack(w, axis=0, mode="soft_threshold", scale=BETA, dtype=jnp.float32)
    )(ws)

    def scanned_packed(x, ws):
        def body(x, layer):
            w, p = layer
            return matmul24(x, w, packed=p, dtype=jnp.float32) / 8, None

        return jax.lax.scan(body, x, (ws, packed))[0]

    compare(jax.jit(value_and_grad(scanned_packed))(x, ws), value_and_grad(unrolled)(x, ws))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("b_layout", ["nk", "kn"])
@pytest.mark.parametrize("out_layout", ["mn", "nm"])
def test_spmm24_pads_any_shape(axis, b_layout, out_layout):
    w = jax.random.normal(jax.random.key(3), (68, 70) if axis == 0 else (70, 68))
    a = formats.pack(w, axis=axis, mode="magnitude")
    b = jax.random.normal(jax.random.key(4), (68, 3), jnp.bfloat16)
    dense = float64(a.unpack())
    expected = (dense.T if axis == 0 else dense) @ float64(b)
    out = spmm24(
        a,
        b.T if b_layout == "nk" else b,
        b_layout=b_layout,
        out_layout=out_layout,
        out_dtype=jnp.float32,
    )
    expected = expected if out_layout == "mn" else expected.T
    assert out.shape == expected.shape
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_spmm24_epilogue_and_dtype():
    a = formats.pack(np.ones((4, 8), np.float32), axis=1, mode="magnitude")
    out = spmm24(a, jnp.ones((8, 2), jnp.bfloat16), scale=-0.5)
    np.testing.assert_array_equal(out, np.full((4, 2), -2.0))
    assert out.dtype == jnp.bfloat16
    out = spmm24(a, jnp.ones((8, 2), jnp.bfloat16), scale=0.75, epilogue="relu2")
    np.testing.assert_array_equal(out, np.full((4, 2), 9.0))


W = np.ones((8, 8), np.float32)
X = np.ones((4, 8), np.float32)
PACKED = formats.pack(W, axis=0, mode="soft_threshold")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.ones((4, 6), np.float32)}, r"x.shape=\(4, 6\)"),
        ({"x": np.ones((0, 8), np.float32)}, "not empty"),
        ({"x": np.ones((4, 8), np.int32)}, "x.dtype=int32"),
        ({"w": np.ones((8, 8, 8), np.float32)}, "two axes"),
        ({"w": np.ones((8, 6), np.float32), "axis": 1}, "multiple of 4"),
        ({"w": np.ones((8, 8), np.int32)}, "w.dtype=int32"),
        ({"axis": 2}, "axis=2"),
        ({"dtype": jnp.int8}, "dtype=int8"),
        ({"weight_gradient": "sparse"}, "weight_gradient='sparse'"),
        ({"weight_gradient": "mvue24"}, "needs a key"),
        ({"sampled": "y"}, "sampled='y'"),
        ({"packed": PACKED, "beta": 2.0}, "beta must be None"),
        ({"packed": PACKED.T}, "packed shape"),
        ({"packed": PACKED, "dtype": jnp.float16}, "packed shape"),
        ({"w": PACKED, "packed": PACKED}, "packed must be None"),
        ({"beta": np.ones(3)}, r"\(3,\)"),
        ({"backend": "cutlass"}, "backend='cutlass'"),
    ],
)
def test_refuses(arguments, message):
    call = {"x": X, "w": W, **arguments}
    with pytest.raises(ValueError, match=message):
        matmul24(call.pop("x"), call.pop("w"), **call)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="describes a machine without a GPU")
def test_named_backend_is_strict_without_its_device():
    with pytest.raises(NotImplementedError, match="needs compute capability 9"):
        matmul24(X, W, backend="hopper")


@pytest.mark.core
@pytest.mark.parametrize(("backend", "capability"), [("hopper", (9, 0)), ("triton", (8, 0))])
def test_lowers_for_a_gpu_on_any_machine(backend, capability):
    """Tracing picks the backend of the assumed device, in all three products and both packings."""

    def step(x, w1, w2, dy):
        def layers(x, w1, w2):
            return matmul24(matmul24(x, w1, axis=0), w2, axis=1)

        y, vjp = jax.vjp(layers, x, w1, w2)
        return y, vjp(dy)

    gpu = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=gpu)
    arguments = (
        jax.ShapeDtypeStruct((100, 128), jnp.bfloat16),
        jax.ShapeDtypeStruct((128, 64), jnp.float32),
        jax.ShapeDtypeStruct((64, 192), jnp.float32),
        jax.ShapeDtypeStruct((100, 192), jnp.bfloat16),
    )
    with (
        registry.assume_capability(capability),
        jax.sharding.use_abstract_mesh(mesh),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("error", registry.FallbackWarning)
        text = jax.jit(step).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
        # And under vmap over everything.
        stacked = (jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in arguments)
        jax.jit(jax.vmap(step)).trace(*stacked).lower(lowering_platforms=("cuda",))
    target = {"hopper": r"custom_call @mosaic_gpu", "triton": r"custom_call @[\w$.]*triton"}
    # Two packings, one forward product (axis 0), one input gradient (axis 1).
    assert len(re.findall(target[backend], text)) == 4


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(("t", "k", "n"), [(1024, 512, 768), (1000, 260, 132)])
def test_backends_on_a_gpu(backend, axis, t, k, n):
    """Strict backends against float64, at tile sizes and at odd ones, under jit and scan."""
    if backend not in registry.available_backends():
        pytest.skip(f"{backend} does not run on {jax.devices()[0].device_kind}")
    keys = jax.random.split(jax.random.key(5), 3)
    x = jax.random.normal(keys[0], (t, k), jnp.bfloat16)
    w = jax.random.normal(keys[1], (k, n))
    dy = jax.random.normal(keys[2], (t, n), jnp.bfloat16)

    @jax.jit
    def step(x, w, dy):
        y, vjp = jax.vjp(
            jax.checkpoint(lambda x, w: matmul24(x, w, axis=axis, beta=BETA, backend=backend)), x, w
        )
        return y, *vjp(dy)

    y, dx, dw = step(x, w, dy)
    reference = sparse_weight(w, axis, jnp.bfloat16)
    assert relative_error(y, float64(x) @ reference) < 5e-3
    assert relative_error(dx, float64(dy) @ reference.T) < 5e-3
    assert relative_error(dw, float64(x).T @ float64(dy)) < 5e-3
    # Repeated runs agree to the bit.
    for a, b in zip(step(x, w, dy), (y, dx, dw), strict=True):
        np.testing.assert_array_equal(a, b)
    # A stack of weights in scan, and in vmap.
    ws = jnp.stack([w, -w])
    _, scanned = jax.jit(lambda ws: jax.lax.scan(lambda c, w: (c, step(x, w, dy)[:2]), None, ws))(
        ws
    )
    mapped = jax.jit(jax.vmap(lambda w: step(x, w, dy)[:2]))(ws)
    for many in (scanned, mapped):
        # XLA may choose another dense product here.
        assert relative_error(many[0], float64(jnp.stack([y, -y]))) < 5e-3
        assert relative_error(many[1], float64(jnp.stack([dx, -dx]))) < 5e-3


@pytest.mark.gpu
@pytest.mark.parametrize("sampled", ["dy", "x"])
def test_sampled_weight_gradient_on_a_gpu(sampled):
    keys = jax.random.split(jax.random.key(6), 4)
    x = jax.random.normal(keys[0], (1000, 256), jnp.bfloat16)
    w = jax.random.normal(keys[1], (256, 192))
    dy = jax.random.normal(keys[2], (1000, 192), jnp.bfloat16)

    def weight_gradient(backend):
        def f(w):
            return matmul24(
                x, w, weight_gradient="mvue24", sampled=sampled, key=keys[3], backend=backend
            )

        return jax.jit(lambda w: jax.vjp(f, w)[1](dy)[0])(w)

    fast = weight_gradient(registry.available_backends()[0])
    assert relative_error(fast, float64(weight_gradient("reference"))) < 1e-4


def test_what_is_not_packed_is_refused():
    w, x = np.ones((8, 4), np.float32), jnp.ones((3, 8), jnp.bfloat16)
    with pytest.raises(ValueError, match=r"a must be a Sparse24 \(sparsejax.pack\), not ndarray"):
        spmm24(w, x.T)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"packed must be a Sparse24 .*, not ndarray"):
        matmul24(x, w, packed=w)  # type: ignore[arg-type]


def test_spmm24_refuses_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match="k=8"):
        spmm24(PACKED, jnp.ones((6, 3), jnp.bfloat16))
    with pytest.raises(ValueError, match="b_layout='km'"):
        spmm24(PACKED, jnp.ones((8, 3), jnp.bfloat16), b_layout="km")  # type: ignore[arg-type]


def test_public_names_resolve():
    for name in sparsejax.__all__:
        assert getattr(sparsejax, name) is not None
        assert name in dir(sparsejax)
    assert sparsejax.matmul24 is ops.matmul24
    with pytest.raises(AttributeError, match="no_such_name"):
        sparsejax.no_such_name  # noqa: B018
