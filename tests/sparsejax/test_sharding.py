"""The routed network on a mesh against the plain op, called for one group of neurons at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from sparsejax import sharding
from sparsejax.sharding import MeshAxes
from sparsejax.spec import Sparsity
from tests.train.simulated import run_script

COMPARE = """
    import dataclasses
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sparsejax import sharding
    from sparsejax.ops import pack_ffn, routed_ffn, routed_ffn_grouped
    from sparsejax.routing import assign_tokens, plan_tokens
    from sparsejax.spec import Sparsity

    BETAS = jnp.array([1.5, 1.4, 1.3])

    def plain(x, dy, w1, w2, wg, centers, bias, sparsity, groups):
        # The definition: the sum over groups of consecutive neurons, one plain op each.
        e, rows = sparsity.num_experts, w1.shape[0] // groups
        def total(x, w1, w2, wg):
            y, counts = 0, []
            tokens = x.reshape(-1, x.shape[-1])
            for g in range(groups):
                part = [None if w is None else w[g * rows : (g + 1) * rows] for w in (w1, w2, wg)]
                own = slice(0, e) if sparsity.num_shards == 1 else slice(g * e, (g + 1) * e)
                plan = None
                if e > 1:
                    plan = plan_tokens(
                        assign_tokens(tokens, centers[own], bias[own]), e, sparsity.v)
                    counts.append(plan.counts)
                one = dataclasses.replace(sparsity, shards=1)
                weights = pack_ffn(*part, BETAS, one, dtype=x.dtype)
                weights = jax.lax.stop_gradient(weights)
                y = y + routed_ffn(tokens, *part, weights, plan, one)
            return y.reshape(x.shape), counts
        y, vjp, counts = jax.vjp(total, x, w1, w2, wg, has_aux=True)
        return y, vjp(dy), counts

    def spread(x, dy, w1, w2, wg, centers, bias, sparsity):
        packed = sharding.pack_ffn(w1, w2, wg, BETAS, sparsity, dtype=x.dtype)
        f = lambda x, w1, w2, wg: sharding.routed_ffn(
            x, w1, w2, wg, packed, centers, bias, sparsity)
        y, vjp, counts = jax.vjp(f, x, w1, w2, wg, has_aux=True)
        return y, vjp(dy), counts, packed.w1

    def check(mesh_shape, sparsity, b, s, d, h, gated, kernels=None):
        mesh = jax.make_mesh(mesh_shape, ("data", "fsdp", "tensor"),
                             axis_types=(AxisType.Auto,) * 3)
        rng = np.random.default_rng(d + h)
        array = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)
        experts = sparsity.num_shards * sparsity.num_experts
        data = [array(b, s, d), array(b, s, d), array(h, d), array(h, d),
                array(h, d) if gated else None, array(experts, d), 0.1 * array(experts)]
        groups = max(sparsity.num_shards, mesh_shape[2])
        want = jax.jit(plain, static_argnums=(7, 8))(*data, sparsity, groups)
        if kernels:
            # Kernels that run on a CPU stand in for those of a GPU: the same layouts.
            routed_ffn_grouped.choose = lambda *args, **kwargs: kernels
            routed_ffn_grouped.recheck = lambda packed, *args, **kwargs: packed
        with jax.set_mesh(mesh):
            specs = [P(("data", "fsdp"))] * 2 + [P("tensor", "fsdp")] * 3 + [P()] * 2
            put = [None if a is None else jax.device_put(a, NamedSharding(mesh, p))
                   for a, p in zip(data, specs)]
            y, grads, counts, w1 = jax.jit(spread, static_argnums=7)(*put, sparsity)
        alone = sparsity.gather == "rows" and mesh_shape[1] > 1
        assert (w1.values is None) == (kernels is None or alone)
        size = mesh_shape[1] * mesh_shape[2]
        assert w1.dense.addressable_shards[0].data.size * size == h * d
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())
        close(y, want[0])
        assert (grads[3] is None) == (not gated)
        for got, expected in zip(grads, want[1]):
            if expected is not None:
                close(got, expected)
        stored = NamedSharding(mesh, P("tensor", "fsdp"))
        assert all(g.sharding.is_equivalent_to(stored, 2) for g in grads[1:3])
        assert counts.shape == (mesh_shape[0] * mesh_shape[1], experts)
        if sparsity.num_experts > 1:
            n = sparsity.num_shards
            np.testing.assert_array_equal(counts.sum(0), np.concatenate(want[2][:n]))
        if sparsity.num_experts > 1:
            # Biases are fitted to the tokens of all devices.
            state = data[5], data[6]
            reroute = lambda x, state: sharding.reroute(
                x, state, *state, sparsity, hidden=h, fit=True)
            alone = jax.jit(reroute)(data[0], state)
            with jax.set_mesh(mesh):
                bias, churn = jax.jit(reroute)(put[0], (put[5], put[6]))
            copies = [np.asarray(s.data) for s in bias.addressable_shards]
            assert all((c == np.asarray(bias)[s.index]).all()
                       for c, s in zip(copies, bias.addressable_shards))
            np.testing.assert_allclose(bias, alone[0], atol=1e-5)
            np.testing.assert_allclose(churn, alone[1], atol=1e-6)
            assert 0 < float(churn) < 1
        print("ok", mesh_shape, sparsity.num_shards, gated, kernels)

    small = dict(b=8, s=6, d=32, h=64)
    check((2, 2, 2), Sparsity(m=8, v=4, shards=2), gated=True, **small)
    check((1, 4, 2), Sparsity(m=8, v=4), gated=False, **small)
    check((4, 1, 2), Sparsity(m=8, v=4, shards=4), gated=False, **small)
    check((2, 2, 2), Sparsity(routing=False, activations=False), gated=False, **small)
    check((2, 2, 2), Sparsity(m=8, v=64, shards=2), b=8, s=16, d=128, h=512, gated=False,
          kernels="reference")
    check((2, 2, 2), Sparsity(m=8, v=64, shards=2, gather="rows"), b=8, s=16, d=128, h=512,
          gated=False, kernels="reference")
    check((2, 2, 2), Sparsity(m=8, v=64, shards=2), b=8, s=16, d=128, h=512, gated=True,
          kernels="reference")
"""


@pytest.mark.slow
def test_on_a_mesh_it_is_the_plain_op():
    out = run_script(COMPARE, devices=8)
    assert out.count("ok ") == 7


def network(width=16, hidden=64, shards=2):
    rng = np.random.default_rng(0)
    array = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)
    sparsity = Sparsity(m=8, v=4, shards=shards)
    return array(hidden, width), array(2, 5, width), array(2 * shards, width), sparsity


def test_clusters_of_a_shard_stay_within_it():
    w1, _, _, sparsity = network()
    permutation, centers, churn = sharding.cluster(w1, None, sparsity, axes=None)
    np.testing.assert_array_equal(np.sort(permutation[:32]), np.arange(32))
    np.testing.assert_array_equal(np.sort(permutation[32:]), np.arange(32, 64))
    assert centers.shape == (4, 16)
    assert 0 < float(churn) <= 1
    alone = dataclasses.replace(sparsity, shards=1)
    for s, half in enumerate((w1[:32], w1[32:])):
        own, own_centers, _ = sharding.cluster(half, None, alone, axes=None)
        np.testing.assert_array_equal(own + 32 * s, permutation[32 * s : 32 * s + 32])
        np.testing.assert_allclose(own_centers, centers[2 * s : 2 * s + 2], atol=1e-6)
    moved = sharding.permute_rows(w1, permutation, sparsity, axes=None)
    np.testing.assert_array_equal(moved, np.asarray(w1)[np.asarray(permutation)])
    # A refresh of what is in place already moves nothing.
    again, _, churn = sharding.cluster(moved, centers, sparsity, axes=None)
    assert float(churn) < 0.2
    assert len(set(np.asarray(again).tolist())) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden": 56}, "hidden=56 must be a positive multiple of m=8 times shards=2"),
        ({"width": 18}, "must be a positive multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    w1, *_, sparsity = network(**change)
    with pytest.raises(ValueError, match=message):
        sharding.pack_ffn(w1, w1, None, jnp.ones(3), sparsity, axes=None)


def test_wrong_arguments():
    w1, x, centers, sparsity = network()
    packed = sharding.pack_ffn(w1, w1, None, jnp.ones(3), sparsity, dtype=x.dtype, axes=None)
    call = lambda x, centers: sharding.routed_ffn(
        x, w1, w1, None, packed, centers, jnp.zeros(centers.shape[0]), sparsity, axes=None
    )
    with pytest.raises(ValueError, match="must end in width=16"):
        call(x[..., :8], centers)
    with pytest.raises(ValueError, match="must be of experts=4"):
        call(x, centers[:2])
    with pytest.raises(ValueError, match="packed dtype=float32 must be"):
        call(x.astype(jnp.bfloat16), centers)


def test_a_mesh_without_the_axes_is_refused():
    mesh = jax.sharding.AbstractMesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    with (
        jax.sharding.use_abstract_mesh(mesh),
        pytest.raises(ValueError, match="must include"),
    ):
        sharding.current_mesh(MeshAxes())
    assert sharding.current_mesh(None) is None
    assert sharding.current_mesh(MeshAxes()) is None
    x = jnp.ones((2, 4))
    assert sharding.constrain(x, P("data"), MeshAxes()) is x
