"""The routed network with 8-bit products: its accuracy, its scales, and when it is taken."""

import warnings
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from kernels import registry
from sparsejax import fp8, sharding
from sparsejax.nn import RoutedFFN
from sparsejax.ops import pack_ffn, routed_ffn, routed_ffn_fp8, routed_ffn_grouped
from sparsejax.prune import select24, soft_threshold, soft_threshold_beta
from sparsejax.routing import from_expert_major, plan_tokens
from sparsejax.spec import Sparsity

D, H, T, V = 128, 512, 150, 64
SPARSITY = Sparsity(m=8, v=V)
EXPERT = np.minimum(np.arange(T) // 90, 1).astype(np.int32)
SIZES = routed_ffn_grouped.Sizes(2048, 8192, jnp.dtype(jnp.bfloat16))


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(0)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)
    w1, w2 = normal(H, D) * D**-0.5, normal(H, D) * H**-0.5
    # Tokens of very different sizes.
    x = normal(T, D) * 2.0 ** jnp.asarray(rng.integers(-4, 4, (T, 1)), jnp.float32)
    betas = jnp.stack([soft_threshold_beta(w1), soft_threshold_beta(w2), jnp.float32(1)])
    plan = plan_tokens(jnp.asarray(EXPERT), 2, V)
    return x.astype(jnp.bfloat16), normal(T, D).astype(jnp.bfloat16), w1, w2, betas, plan


@partial(jax.jit, static_argnames=("sparsity", "precision"))
def run(x, dy, w1, w2, betas, plan, *, sparsity=SPARSITY, precision="fp8"):
    packed = pack_ffn(w1, w2, None, betas, sparsity, precision=precision)
    y, vjp = jax.vjp(lambda *a: routed_ffn(*a, None, packed, plan, sparsity), x, w1, w2)
    return y, *vjp(dy)


def distance(a, b):
    a, b = (np.asarray(v).astype(np.float64) for v in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_like_the_network_of_16_bits(data):
    exact, rounded = run(*data, precision="compute"), run(*data)
    assert [a.dtype for a in rounded] == [a.dtype for a in exact]
    # Tokens differ in size: relative to each, and for dx and y all of them.
    for a, b in zip(rounded[:2], exact[:2], strict=True):
        ratios = [distance(p, q) for p, q in zip(a, b, strict=True)]
        assert 0.01 < np.median(ratios) < 0.13
        # A token in which a choice of two of four fell the other way differs more.
        assert max(ratios) < 0.5
    for a, b in zip(rounded[2:], exact[2:], strict=True):
        assert 0.01 < distance(a, b) < 0.13


def test_forward_against_its_rounded_operands(data):
    """What remains is the rounding of Y2: the choice of two of four is made of the same numbers."""
    x, _, w1, w2, betas, plan = data
    packed = pack_ffn(w1, w2, None, betas, SPARSITY, precision="fp8")
    x8 = np.asarray(fp8.dequantize(fp8.quantize(x, fp8.FORWARD)), np.float64)
    w = [np.asarray(m.columns.astype(jnp.float32) * m.scale) for m in (packed.w1, packed.w2)]
    expected = np.zeros((T, D))
    for t in range(T):
        y1 = x8[t] @ w[0][EXPERT[t]]
        y2 = np.maximum(y1, 0) ** 2
        y2 = np.where(np.asarray(select24(jnp.asarray(y2, jnp.float32))), y2, 0)
        expected[t] = w[1][EXPERT[t]] @ y2
    y = routed_ffn(x, w1, w2, None, packed, plan, SPARSITY)
    errors = [distance(a, b) for a, b in zip(y, expected, strict=True)]
    assert 0.005 < np.median(errors) < 0.04
    for m, weight, beta in zip((packed.w1, packed.w2), (w1, w2), betas, strict=False):
        dense = from_expert_major((m.columns.astype(jnp.float32) * m.scale).swapaxes(1, 2), 0)
        assert distance(dense, beta * soft_threshold(weight)) < 0.03


def test_what_saturates_is_counted(data):
    x, dy, w1, w2, betas, plan = data
    packed = pack_ffn(w1, w2, None, betas, SPARSITY, precision="fp8")
    found = routed_ffn_fp8.saturated(x, dy, packed, plan, SPARSITY)
    assert not any(int(n) for n in found)
    # Of 512 features every other block of 64 is sampled: the second one is not.
    wide = jnp.concatenate([w1] * 4, axis=1)
    outlier = wide.at[3, 70].set(1e4)
    packed = pack_ffn(outlier, wide, None, betas, SPARSITY, precision="fp8")
    x = jnp.concatenate([x] * 4, axis=1).at[0].set(0).at[0, 70].set(1)
    found = routed_ffn_fp8.saturated(x, x, packed, plan, SPARSITY)
    assert (int(found.w1), int(found.w2)) == (1, 0)
    assert int(routed_ffn_fp8.saturated_weights(packed)) == 1
    # The first token is all of that feature, and the neuron's norm was not reckoned with.
    assert int(found.y2) == 1
    exact = pack_ffn(w1, w2, None, betas, SPARSITY)
    with pytest.raises(ValueError, match="precision='compute'"):
        routed_ffn_fp8.saturated(x, dy, exact, plan, SPARSITY)
    with pytest.raises(ValueError, match="precision='compute'"):
        routed_ffn_fp8.saturated_weights(exact)


def test_scale_and_norm_of_a_weight(data):
    _, _, w1, _, betas, _ = data
    packed = pack_ffn(w1, w1, None, betas, SPARSITY, precision="fp8")
    w = np.asarray(w1)
    scale = float(packed.w1.scale)
    assert np.log2(scale) == round(np.log2(scale))
    # Room for eight times the largest, at most 16 times; two blocks of features are all sampled.
    assert 448 * scale / 16 < float(betas[0]) * np.abs(w).max() <= 448 * scale / 8
    norms = np.linalg.norm(w, axis=1)
    kept = np.linalg.norm(betas[0] * soft_threshold(w1), axis=1)
    # Of all neurons together surely, and of the longest one nearly, with as few features as here.
    assert np.linalg.norm(kept) < np.linalg.norm(norms)
    assert kept.max() < 1.3 * norms.max()
    assert float(packed.w1.norm) == pytest.approx(norms.max(), rel=1e-5)
    outlier = pack_ffn(w1.at[7].multiply(1000), w1, None, betas, SPARSITY, precision="fp8")
    squares = np.sort(norms**2)
    mean = (squares.sum() + (1e6 - 1) * norms[7] ** 2) / H
    assert float(outlier.w1.norm) == pytest.approx(4 * mean**0.5, rel=1e-4)


def test_what_is_not_finite_stays_visible_in_its_token(data):
    x, dy, *rest = data
    y, dx, *_ = run(x.at[4, 2].set(jnp.inf), dy, *rest)
    assert np.isnan(np.asarray(y[4], np.float32)).any()
    others = np.arange(T) != 4
    assert np.isfinite(np.asarray(y, np.float32)[others]).all()
    _, dx, *_ = run(x, dy.at[9, 0].set(jnp.nan), *rest)
    assert np.isnan(np.asarray(dx[9], np.float32)).any()
    assert np.isfinite(np.asarray(dx, np.float32)[np.arange(T) != 9]).all()


@pytest.mark.parametrize("routing", [True, False])
def test_gradients_along_tokens(data, routing):
    sparsity = replace(SPARSITY, weight_gradient="tokens24", routing=routing)
    x, dy, w1, w2, betas, _ = data
    plan = plan_tokens(jnp.asarray(EXPERT), 2, V, spread=True) if routing else None
    exact, rounded = (
        run(x, dy, w1, w2, betas, plan, sparsity=sparsity, precision=p) for p in ("compute", "fp8")
    )
    for a, b in zip(rounded, exact, strict=True):
        assert distance(a, b) < 0.2


def test_one_expert(data):
    sparsity = Sparsity(routing=False, v=V)
    x, dy, w1, w2, betas, _ = data
    exact, rounded = (
        run(x, dy, w1, w2, betas, None, sparsity=sparsity, precision=p) for p in ("compute", "fp8")
    )
    assert all(0.01 < distance(a, b) < 0.15 for a, b in zip(rounded, exact, strict=True))


@pytest.mark.parametrize(
    ("changes", "sizes", "reason"),
    [
        ({}, {"width": 2112}, "width=2112"),
        ({"v": 64}, {}, "v=64"),
        ({}, {"dtype": jnp.dtype(jnp.float16)}, "not float16"),
        ({"activations": False}, {}, "activations=False"),
    ],
)
def test_falls_back_visibly(changes, sizes, reason, monkeypatch):
    sparsity = Sparsity(**{"v": 128, **changes})
    sizes = SIZES._replace(**sizes)
    monkeypatch.setattr(routed_ffn_grouped, "_reported", set())
    with registry.assume_capability((9, 0)):
        with pytest.raises(NotImplementedError, match=reason):
            routed_ffn_fp8.choose(replace(sparsity, backend="hopper"), sizes, gated=False)
        with pytest.warns(registry.FallbackWarning, match=f"not in 8 bits.*{reason}"):
            assert routed_ffn_fp8.choose(sparsity, sizes, gated=False) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert routed_ffn_fp8.choose(sparsity, sizes, gated=False) is None


def test_backends():
    sparsity = Sparsity(v=128)
    with registry.assume_capability((9, 0)):
        assert routed_ffn_fp8.choose(sparsity, SIZES, gated=False) == "hopper"
        with pytest.raises(NotImplementedError, match="triton"):
            routed_ffn_fp8.choose(replace(sparsity, backend="triton"), SIZES, gated=False)
    # Without a GPU, the definition.
    assert routed_ffn_fp8.choose(sparsity, SIZES, gated=False) == "reference"


@pytest.mark.parametrize("remat", [False, True])
def test_lowers_for_cuda(remat):
    sparsity = Sparsity(m=16, v=128)
    shape = lambda *s, dtype=jnp.float32: jax.ShapeDtypeStruct(s, dtype)
    x = shape(1000, 256, dtype=jnp.bfloat16)
    w, betas = shape(2048, 256), shape(3)

    def step(x, dy, w1, w2, betas, expert):
        plan = plan_tokens(expert, 4, 128)
        packed = pack_ffn(w1, w2, None, betas, sparsity, precision="fp8")
        network = lambda *a: routed_ffn(*a, None, packed, plan, sparsity)
        y, vjp = jax.vjp(jax.checkpoint(network) if remat else network, x, w1, w2)
        return y, vjp(dy)

    with registry.assume_capability((9, 0)):
        traced = jax.jit(step).trace(x, x, w, w, betas, shape(1000, dtype=jnp.int32))
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_module_takes_its_precision():
    def module(precision):
        return RoutedFFN(
            D, H, sparsity=SPARSITY, dtype=jnp.bfloat16, precision=precision, rngs=nnx.Rngs(0)
        )

    packed = module("fp8").pack()
    assert packed.precision == "fp8"
    assert packed.kernels == "reference"
    y, stats = module("fp8")(jnp.ones((2, V, D)), packed)
    assert y.shape == (2, V, D)
    assert stats is not None
    assert module("compute").pack().precision == "compute"


def test_shards_of_one_device():
    """The sum of two networks, each of its own neurons, scales and clusters."""
    sparsity = replace(SPARSITY, shards=2)
    module = RoutedFFN(
        D, H, sparsity=sparsity, dtype=jnp.bfloat16, precision="fp8", rngs=nnx.Rngs(0)
    )
    module.centers[...] = jax.random.normal(jax.random.key(0), (4, D))
    x = jax.random.normal(jax.random.key(1), (2, V, D), jnp.bfloat16)
    packed = module.pack()
    assert packed.w1.scale.shape == packed.w2.norm.shape == (2,)
    y, _ = module(x, packed)
    parts, flat = [], x.reshape(-1, D)
    for s, expert in enumerate(module.route(x)):
        w1, w2 = (w[...][s * H // 2 : (s + 1) * H // 2] for w in (module.w1, module.w2))
        alone = pack_ffn(w1, w2, None, module.beta[...], SPARSITY, precision="fp8")
        plan = plan_tokens(expert, 2, V)
        parts.append(routed_ffn(flat, w1, w2, None, alone, plan, SPARSITY))
    np.testing.assert_array_equal(y.reshape(-1, D), sum(parts))
    with pytest.raises(ValueError, match=r"packed.w1.scale.shape=\(2,\) must be one scale"):
        routed_ffn_fp8.saturated(flat, flat, packed, plan, SPARSITY)


@pytest.mark.parametrize(
    ("shape", "changes", "reason"),
    [
        # A device's 32 columns are too few to pack.
        ((1, 4, 1), {}, "packs multiples of 64 columns of the width, not the 32 of a device"),
        ((1, 2, 1), {"gather": "rows"}, "gather='rows' moves rows of 16 bits"),
    ],
)
def test_what_a_mesh_refuses(shape, changes, reason, monkeypatch):
    monkeypatch.setattr(routed_ffn_grouped, "_reported", set())
    mesh = AbstractMesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    sparsity = replace(SPARSITY, **changes)
    array = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)

    def pack(sparsity):
        pack = partial(sharding.pack_ffn, sparsity=sparsity, precision="fp8")
        return jax.eval_shape(pack, array(H, D), array(H, D), None, array(3))

    with jax.sharding.use_abstract_mesh(mesh):
        with pytest.warns(registry.FallbackWarning, match=f"not in 8 bits: .*{reason}"):
            assert pack(sparsity).precision == "compute"
        with pytest.raises(NotImplementedError, match=reason) as error:
            pack(replace(sparsity, backend="reference"))
        assert "\n" not in error.value.args[0]


def test_refuses_a_precision(data):
    _, _, w1, w2, betas, _ = data
    for pack in (pack_ffn, partial(sharding.pack_ffn, axes=None)):
        with pytest.raises(ValueError, match=r"^precision='int8'"):
            pack(w1, w2, None, betas, SPARSITY, precision="int8")
