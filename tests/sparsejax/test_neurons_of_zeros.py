"""Experts of any number of neurons on kernels that take multiples: zeros behind their own."""

from dataclasses import replace
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest

from kernels import registry
from sparsejax.ops import routed_ffn_grouped
from sparsejax.ops.routed_ffn import _pack
from sparsejax.spec import Sparsity
from tests.kernels.test_triton import an_h100
from tests.sparsejax import test_routed_ffn_gated as gated_network
from tests.sparsejax import test_routed_ffn_grouped as network
from tests.sparsejax import test_shards_together as shards_together
from tests.sparsejax.test_routed_ffn import assert_close
from tests.sparsejax.test_routed_ffn_grouped import BETAS, D, T, V, experts_of, make_plan


def values_and_gradients(sparsity, hidden, gated, *, tokens=T, width=D, dtype=jnp.float32):
    """A function of the kernels."""
    module = gated_network if gated else network
    rng = np.random.default_rng(hidden)
    shapes = [(tokens, width)] * 2 + [(hidden, width)] * (3 if gated else 2)
    data = [rng.normal(size=s).astype(np.float32) for s in shapes]
    plan = make_plan(experts_of("skewed", sparsity.num_experts, tokens), sparsity)
    return partial(module.value_and_gradients, *data, plan, sparsity=sparsity, dtype=dtype)


@pytest.mark.parametrize(
    ("sparsity", "hidden", "padding", "gated"),
    [
        (Sparsity(m=16, v=V), 480, 8, False),
        (Sparsity(m=16, v=V), 480, 8, True),
        (Sparsity(m=16, v=V, shared_every=4), 576, 4, True),
        (Sparsity(m=32, v=V, shared_every=4), 1280, 8, False),
        (Sparsity(m=16, v=V, weights=False), 480, 8, True),
        (Sparsity(m=16, v=V, weight_gradient="tokens24"), 480, 8, False),
        (Sparsity(routing=False, v=V), 60, 4, True),
    ],
)
def test_zeros_change_nothing(sparsity, hidden, padding, gated):
    run = values_and_gradients(sparsity, hidden, gated)
    live = sparsity.live_neurons(hidden)
    assert routed_ffn_grouped.padding_of("reference", live) == padding
    got, expected = run(kernels="reference"), run(kernels=None)
    assert_close(got, [None if a is None else np.asarray(a, np.float64) for a in expected], 1e-5)


def test_packed_weights_say_how_many():
    sparsity = Sparsity(m=16, v=V)
    w1, w2 = (np.random.default_rng(i).normal(size=(480, D)).astype(np.float32) for i in (1, 2))
    pack = partial(_pack, w1, w2, w1 + w2, jnp.array(BETAS), sparsity, dtype=jnp.bfloat16)
    packed, alone = pack(kernels="reference"), pack(kernels=None)
    assert (packed.padding, alone.padding) == (8, 0)
    assert packed.w1.dense.shape == (4, 128, D)
    assert not np.asarray(packed.w1.dense[:, 120:]).any()
    stripped = packed.without_padding()
    assert stripped.kernels is None
    for name in ("w1", "w2", "wg"):
        found, expected = (getattr(p, name) for p in (stripped, alone))
        np.testing.assert_array_equal(found.dense, expected.dense)
        assert found.values is None
    assert alone.without_padding() is alone


@pytest.mark.parametrize("gated", [False, True])
def test_tokens_that_kernels_refuse_meet_no_zeros(monkeypatch, gated):
    """The path in jax.numpy takes over, with weights that kernels' zeros had been packed with."""
    run = values_and_gradients(Sparsity(m=16, v=V), 480, gated, tokens=T + 1)
    expected = run(kernels=None)
    monkeypatch.setattr(routed_ffn_grouped, "recheck", lambda *_, **__: None)
    for a, b in zip(run(kernels="reference"), expected, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("gated", [False, True])
def test_shards_in_one_call(monkeypatch, gated):
    sparsity = Sparsity(m=8, v=V, shards=2)
    x, dy, *weights, centers, bias = shards_together.problem(8, 2, 1024)
    w1, w2 = (w[:240] for w in weights)
    found = []
    for kernels in ("reference", None):
        monkeypatch.setattr(routed_ffn_grouped, "choose", lambda *_, k=kernels, **__: k)
        monkeypatch.setattr(routed_ffn_grouped, "recheck", lambda *_, k=kernels, **__: k)
        found.append(shards_together.run(sparsity, x, dy, w1, w2, centers, bias, gated=gated))
    layout = routed_ffn_grouped.Sizes(D, 120, jnp.dtype(jnp.float32), 1024, shards=2)
    routed_ffn_grouped.check("reference", sparsity, layout, gated=gated)
    np.testing.assert_array_equal(found[0][1], found[1][1])
    for a, b in zip(*found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize(
    ("sparsity", "hidden", "width", "hopper", "triton"),
    [
        # The recipe in Llama 2 7B's size, and in `small`'s and `medium`'s.
        (Sparsity(m=32, v=128, shared_every=4), 11_008, 4096, 56, 56),
        (Sparsity(m=32, v=128, shared_every=4), 2048, 512, 64, 0),
        (Sparsity(m=32, v=128, shared_every=4), 3072, 768, 96, 32),
        (Sparsity(m=32, v=128, shared_every=4), 8192, 2048, 0, 0),
        # Too many zeros for one of the two.
        (Sparsity(m=16, v=128), 768, 2048, None, 0),
        (Sparsity(m=16, v=128), 736, 2048, None, 8),
    ],
)
def test_what_kernels_serve(sparsity, hidden, width, hopper, triton):
    sizes = routed_ffn_grouped.Sizes(width, hidden, jnp.dtype(jnp.bfloat16))
    live = sparsity.live_neurons(hidden)
    with registry.assume_capability((9, 0)), an_h100():
        for backend, padding in (("hopper", hopper), ("triton", triton)):
            named = replace(sparsity, backend=backend)
            if padding is None:
                with pytest.raises(NotImplementedError, match=f"not {live=}: hidden="):
                    routed_ffn_grouped.choose(named, sizes, gated=False)
                continue
            assert routed_ffn_grouped.choose(named, sizes, gated=False) == backend
            assert routed_ffn_grouped.padding_of(backend, live) == padding


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["hopper", "triton"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    ("sparsity", "hidden"),
    [
        (Sparsity(m=32, v=128, shared_every=4), 2176),
        (Sparsity(m=16, v=128), 1920),
        (Sparsity(m=16, v=128, weights=False), 1920),
    ],
)
def test_backends_on_a_gpu(backend, sparsity, hidden, gated):
    sizes = routed_ffn_grouped.Sizes(256, hidden, jnp.dtype(jnp.bfloat16), 1000)
    try:
        routed_ffn_grouped.check(backend, sparsity, sizes, gated=gated)
    except NotImplementedError as error:
        pytest.skip(str(error))
    assert routed_ffn_grouped.padding_of(backend, sparsity.live_neurons(hidden)) > 0
    run = values_and_gradients(sparsity, hidden, gated, tokens=1000, width=256, dtype=jnp.bfloat16)
    expected = [None if a is None else np.asarray(a, np.float64) for a in run(kernels=None)]
    # Y1 and Yg are rounded before the gated form's choice: a few near-ties fall the other way.
    assert_close(run(kernels=backend), expected, 2e-2 if gated else 5e-3)
