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
    import dataclasses, functools, math, re
    from collections import Counter
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec as P
    from kernels import reference_grouped
    from sparsejax import sharding, stored_once
    from sparsejax.ops import pack_ffn, routed_ffn, routed_ffn_fp8, routed_ffn_grouped
    from sparsejax.routing import assign_tokens, plan_tokens
    from sparsejax.spec import Sparsity

    BETAS = jnp.array([1.5, 1.4, 1.3])

    @functools.partial(jax.jit, static_argnums=(7, 8))
    def alone(x, dy, w1, w2, wg, centers, bias, sparsity, precision):
        # One group of neurons: the plain op.
        tokens, plan = x.reshape(-1, x.shape[-1]), None
        if sparsity.num_experts > 1:
            expert = assign_tokens(tokens, centers, bias)
            plan = plan_tokens(expert, sparsity.num_experts, sparsity.v)
        packed = pack_ffn(w1, w2, wg, BETAS, sparsity, dtype=x.dtype, precision=precision)
        op = lambda *network: routed_ffn(*network, packed, plan, sparsity)
        y, vjp = jax.vjp(op, tokens, w1, w2, wg)
        dx, *dw = vjp(dy.reshape(tokens.shape))
        return y.reshape(x.shape), dx.reshape(x.shape), dw, plan and plan.counts, packed

    def plain(x, dy, w1, w2, wg, centers, bias, sparsity, groups, precision):
        # The definition: the sum over groups of consecutive neurons.
        e, rows, parts = sparsity.num_experts, w1.shape[0] // groups, []
        one = dataclasses.replace(sparsity, shards=1, gather="packed")
        for g in range(groups):
            part = [None if w is None else w[g * rows : (g + 1) * rows] for w in (w1, w2, wg)]
            own = slice(0, e) if sparsity.num_shards == 1 else slice(g * e, (g + 1) * e)
            parts.append(alone(x, dy, *part, centers[own], bias[own], one, precision))
        y, dx, dw, counts, packed = zip(*parts)
        join = lambda *w: jnp.concatenate(w)
        return sum(y), (sum(dx), *jax.tree.map(join, *dw)), counts, packed

    def spread(x, dy, w1, w2, wg, centers, bias, sparsity, precision):
        packed = sharding.pack_ffn(
            w1, w2, wg, BETAS, sparsity, dtype=x.dtype, precision=precision)
        f = lambda x, w1, w2, wg: sharding.routed_ffn(
            x, w1, w2, wg, packed, centers, bias, sparsity)
        y, vjp, counts = jax.vjp(f, x, w1, w2, wg, has_aux=True)
        return y, vjp(dy), counts, packed

    @functools.partial(jax.jit, static_argnums=(2, 3))
    def reroute(x, state, sparsity, hidden):
        return sharding.reroute(x, state, *state, sparsity, hidden=hidden, fit=True)

    def run(mesh_shape, sparsity, b, s, d, h, gated, kernels=None, precision="compute"):
        mesh = jax.make_mesh(mesh_shape, ("data", "fsdp", "tensor"),
                             axis_types=(AxisType.Auto,) * 3,
                             devices=jax.devices()[: math.prod(mesh_shape)])
        rng = np.random.default_rng(d + h)
        array = lambda *shape: jnp.array(rng.normal(size=shape), jnp.float32)
        experts = sparsity.num_shards * sparsity.num_experts
        data = [array(b, s, d), array(b, s, d), array(h, d), array(h, d),
                array(h, d) if gated else None, array(experts, d), 0.1 * array(experts)]
        if precision == "fp8":
            data[:2] = [a.astype(jnp.bfloat16) for a in data[:2]]
        groups = max(sparsity.num_shards, mesh_shape[2])
        want = plain(*data, sparsity, groups, precision)
        if kernels:
            # Kernels that run on a CPU stand in for those of a GPU: the same layouts.
            routed_ffn_grouped.choose = lambda *args, **kwargs: kernels
            routed_ffn_grouped.recheck = lambda packed, *args, **kwargs: packed
        with jax.set_mesh(mesh):
            specs = [P(("data", "fsdp"))] * 2 + [P("tensor", "fsdp")] * 3 + [P()] * 2
            put = [None if a is None else jax.device_put(a, NamedSharding(mesh, p))
                   for a, p in zip(data, specs)]
            program = jax.jit(spread, static_argnums=(7, 8))
            program = program.lower(*put, sparsity, precision).compile()
        return mesh, data, put, want, program

    def check(mesh_shape, sparsity, *, d, h, gated, kernels=None, **sizes):
        mesh, data, put, want, program = run(
            mesh_shape, sparsity, d=d, h=h, gated=gated, kernels=kernels, **sizes)
        y, grads, counts, packed = program(*put)
        w1, experts = packed.w1, sparsity.num_shards * sparsity.num_experts
        alone = sparsity.gather == "rows" and mesh_shape[1] > 1
        assert (w1.values is None) == (kernels is None or alone)
        size = mesh_shape[1] * mesh_shape[2]
        # Shared neurons are stored once, where whole packed rows can be told apart.
        of_group = h // max(sparsity.num_shards, mesh_shape[2])
        zeros = packed.padding * sparsity.num_experts
        assert (zeros > 0) == (h in (240, 576))
        rows = h // of_group * (sparsity.rows_of_experts(of_group) + zeros)
        once = mesh_shape[1] > 1 and stored_once.serves(sparsity, of_group)
        # Everywhere, where kernels read them once.
        reads_once = kernels is not None and reference_grouped.SHARED_ONCE
        once |= reads_once and sparsity.shares and not zeros
        assert w1.dense.addressable_shards[0].data.size * size == (h if once else rows) * d
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
            alone = reroute(data[0], state, sparsity, h)
            with jax.set_mesh(mesh):
                bias, churn = reroute(put[0], (put[5], put[6]), sparsity, h)
            copies = [np.asarray(s.data) for s in bias.addressable_shards]
            assert all((c == np.asarray(bias)[s.index]).all()
                       for c, s in zip(copies, bias.addressable_shards))
            np.testing.assert_allclose(bias, alone[0], atol=1e-5)
            np.testing.assert_allclose(churn, alone[1], atol=1e-6)
            assert 0 < float(churn) < 1
        print("ok", mesh_shape, sparsity.num_shards, gated, kernels, once)

    def bits(a):
        return np.asarray(a).view(np.uint8)

    def distance(a, b):
        a, b = (np.asarray(v, np.float64) for v in (a, b))
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    def check_in_8_bits(mesh_shape, sparsity, **sizes):
        _, data, put, want, program = run(
            mesh_shape, sparsity, gated=False, precision="fp8", **sizes)
        y, grads, counts, packed = program(*put)
        # Of each matrix values and metadata in one pass, columns in the other, and no more; in 8
        # bits, of which a compiler for CPUs may make 16.
        moved = Counter()
        gathers = re.findall(r"= (\\w+)\\[([\\d,]+)\\]\\S* all-gather", program.as_text())
        for dtype, shape in gathers:
            moved[dtype] += math.prod(map(int, shape.split(",")))
        part = data[2].size // mesh_shape[2]
        assert moved.pop("s32") == 2 * part // 32
        assert moved.total() == 2 * part * 3 // 2 and "bf16" not in moved, moved
        assert packed.precision == "fp8" and packed.w1.columns.dtype.itemsize == 1
        size = mesh_shape[1] * mesh_shape[2]
        for name in ("w1", "w2"):
            whole, parts = getattr(packed, name), [getattr(p, name) for p in want[3]]
            # Scales are of the group, whoever holds its columns: all roundings are the same.
            for field in ("values", "columns", "metadata"):
                a = getattr(whole, field)
                assert a.addressable_shards[0].data.size * size == a.size
                expected = np.concatenate([np.asarray(getattr(p, field)) for p in parts])
                np.testing.assert_array_equal(bits(a), bits(expected))
            np.testing.assert_array_equal(whole.scale, [p.scale for p in parts])
            np.testing.assert_allclose(whole.norm, [p.norm for p in parts], rtol=1e-6)
            for a in (whole.scale, whole.norm):
                copies = [(s.index, np.asarray(s.data)) for s in a.addressable_shards]
                assert all((c == np.asarray(a)[i]).all() for i, c in copies)
        # So the same numbers are multiplied: what is left is the order of sums (a bfloat16 is
        # within 2^-9), and gradients of weights that are rounded to bfloat16 before they are
        # summed. The rounding to 8 bits itself is 20 times as much.
        for got, expected in zip((y, grads[0]), (want[0], want[1][0])):
            assert distance(got, expected) < 2e-4, distance(got, expected)
        for got, expected in zip(grads[1:3], want[1][1:3]):
            assert distance(got, expected) < 2**-8, distance(got, expected)
        n = sparsity.num_shards
        np.testing.assert_array_equal(counts.sum(0), np.concatenate(want[2][:n]))
        print("ok in 8 bits", mesh_shape, n)

    def check_sample(blocks, devices):
        w = np.random.default_rng(blocks).normal(size=(8, 64 * blocks)).astype(np.float32)
        # Block i's largest number is i + 10: it tells which blocks were looked at.
        w[0, ::64] = np.arange(blocks) + 10
        mesh = Mesh(np.array(jax.devices()[:devices]), ("fsdp",))
        sample = lambda w: jax.tree.map(lambda a: a[None], routed_ffn_fp8._sample(w, "fsdp"))
        sample = jax.shard_map(
            sample, mesh=mesh, in_specs=P(None, "fsdp"), out_specs=P("fsdp"), check_vma=False)
        largest, norm = (np.asarray(a) for a in jax.jit(sample)(w))
        alone = routed_ffn_fp8._sample(jnp.asarray(w))
        assert (largest == alone[0]).all() and alone[0] < blocks + 9
        assert (norm == norm[0]).all()
        np.testing.assert_allclose(norm[0], alone[1], rtol=1e-6)
        print("ok sample", blocks, devices)

    small = dict(b=8, s=6, d=32, h=64)
    large = dict(b=8, s=16, d=128, kernels="reference")
    shared = dict(m=8, v=64, shared_every=4)
"""

ESSENTIAL = """
    check_in_8_bits((1, 2, 2), Sparsity(m=8, v=64, shards=2), b=4, s=16, d=128, h=512)
    check((2, 2, 2), Sparsity(m=8, v=4, shards=2), gated=True, **small)
    check((1, 4, 2), Sparsity(m=8, v=4), gated=False, **small)
    check((2, 2, 2), Sparsity(m=8, v=64, shards=2), gated=False, h=512, **large)
    check((2, 2, 1), Sparsity(weights=False, **shared), gated=False, h=1024, **large)
    # Zeros behind the 60 neurons of an expert.
    check((2, 2, 2), Sparsity(m=8, v=64, shards=2), gated=True, h=240, **large)
"""

OTHERS = """
    check_in_8_bits((2, 2, 1), Sparsity(m=8, v=64), b=4, s=16, d=128, h=256)
    # Every second, fourth, sixth and eighth block: of 8, 2, 3 and 10 blocks on a device.
    for blocks, devices in ((16, 2), (16, 8), (24, 8), (40, 4)):
        check_sample(blocks, devices)
    check((4, 1, 2), Sparsity(m=8, v=4, shards=4), gated=False, **small)
    check((2, 2, 2), Sparsity(routing=False, activations=False), gated=False, **small)
    check((2, 2, 1), Sparsity(m=8, v=4, shared_every=4), gated=False, **small)
    check((2, 2, 2), Sparsity(m=8, v=64, shards=2, gather="rows"), gated=False, h=512, **large)
    check((2, 2, 2), Sparsity(m=8, v=64, shards=2), gated=True, h=512, **large)
    check((2, 1, 1), Sparsity(**shared), gated=False, h=1024, **large)
    check((2, 2, 1), Sparsity(**shared), gated=True, h=1024, **large)
    check((1, 2, 2), Sparsity(shards=4, **shared), gated=False, h=4096, **large)
    check((1, 2, 1), Sparsity(gather="rows", **shared), gated=False, h=1024, **large)
    # Zeros behind the 60 and 252 neurons of an expert.
    check((1, 2, 1), Sparsity(m=16, v=64, gather="rows"), gated=False, h=240, **large)
    check((2, 2, 1), Sparsity(m=16, v=64, shared_every=4), gated=False, h=576, **large)
    # Kernels that have a copy for each expert, made after the gather; sizes not traced before.
    reference_grouped.SHARED_ONCE = False
    check((2, 2, 1), Sparsity(**shared), gated=False, h=2048, **large)
    check((2, 1, 1), Sparsity(**shared), gated=False, h=2048, **large)
"""


@pytest.mark.slow
def test_on_a_mesh_it_is_the_plain_op():
    out = run_script(COMPARE + ESSENTIAL, devices=8)
    assert out.count("ok ") == 6
    assert out.count(" True\n") == 1


@pytest.mark.slow
@pytest.mark.processes
def test_on_a_mesh_it_is_the_plain_op_with_other_options():
    out = run_script(COMPARE + OTHERS, devices=8)
    assert out.count("ok ") == 18
    assert out.count(" True\n") == 5, out


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
