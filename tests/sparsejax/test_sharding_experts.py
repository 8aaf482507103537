"""A mixture of experts on meshes against the same mixture on one device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from sparsejax.nn import MoEFFN
from sparsejax.ops.grouped_dot import grouped_dot_gradients
from sparsejax.sharding import MeshAxes
from sparsejax.spec import Sparsity
from tests.train.simulated import run_script

# Clustering, fits, both phases and their gradients, on one device and on each mesh.
COMPARE = """
    import jax, jax.numpy as jnp, numpy as np
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from sparsejax.nn import MoEFFN
    from sparsejax.sharding import MeshAxes
    from sparsejax.spec import Sparsity
    from train.tree import names

    def everything(graph, params, rest, x, dy):
        moe = nnx.merge(graph, params, rest)
        previous, update = moe.clustering(), moe.refresh()
        moe.apply_update(update)
        biases, churn = moe.reroute(x, previous)
        for name, bias in biases.items():
            getattr(moe, name)[...] = bias
        graph, params, rest = nnx.split(moe, nnx.Param, ...)
        same = {"biases": biases, "beta": update.beta, "churn": churn}
        if moe.clusters > 1:
            same["update"] = update
        found = {"same": same}
        for phase, packed in (("dense", None), ("sparse", moe.pack())):
            f = lambda params, x: nnx.merge(graph, params, rest)(x, packed)
            y, vjp, stats = jax.vjp(f, params, x, has_aux=True)
            found[phase] = {"y": y, "gradients": vjp(dy), "counts": stats.counts}
        return found

    run = jax.jit(everything, static_argnums=0)

    def on_mesh(shape, graph, params, rest, x, dy):
        mesh = jax.make_mesh((*shape, 1), ("data", "fsdp", "tensor"),
                             axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            put = lambda spec, a: jax.device_put(a, NamedSharding(mesh, spec))
            stored = lambda path, a: put(
                P() if names(path)[-1] == "router" else P("tensor", "fsdp"), a)
            rows = P(("data", "fsdp"))
            found = run(graph, jax.tree_util.tree_map_with_path(stored, params),
                        jax.tree.map(lambda a: put(P(), a), rest), put(rows, x), put(rows, dy))
        for leaf in jax.tree.leaves(found["same"]):
            copies = [np.asarray(s.data) for s in leaf.addressable_shards]
            assert all(c.shape == leaf.shape and (c == copies[0]).all() for c in copies)
        for phase in ("dense", "sparse"):
            for name in ("w1", "w2"):
                gradient = found[phase]["gradients"][0][name][...]
                assert gradient.addressable_shards[0].data.size * shape[1] == gradient.size
            assert len(found[phase]["counts"]) == shape[0] * shape[1]
            found[phase]["counts"] = found[phase]["counts"].sum(0)
        return found

    def check(clusters, meshes):
        sparsity = Sparsity(m=16 * clusters, v=4, kmeans_iterations=3, reestimate_beta=True)
        moe = MoEFFN(16, 128 if clusters == 1 else 2048, num_experts=4, sparsity=sparsity,
                     dtype=jnp.float32, axes=MeshAxes(), rngs=nnx.Rngs(params=0))
        if clusters > 1:
            moe.centers[...] = jax.random.normal(jax.random.key(2), moe.centers.shape)
        parts = nnx.split(moe, nnx.Param, ...)
        data = [jax.random.normal(key, (8, 6, 16)) for key in jax.random.split(jax.random.key(1))]
        one = jax.tree_util.tree_leaves_with_path(run(*parts, *data))
        for shape in meshes:
            many = jax.tree.leaves(on_mesh(shape, *parts, *data))
            for (path, a), b in zip(one, many, strict=True):
                scale = np.abs(np.asarray(a, np.float64)).max()
                name = f"{shape} {jax.tree_util.keystr(path)}"
                assert scale > 0 or "churn" in name, name
                tolerance = 5e-6 * scale if a.dtype == np.float32 else 0
                np.testing.assert_allclose(b, a, rtol=0, atol=tolerance, err_msg=name)
            print("ok", clusters, shape)

    check(1, [(2, 1), (2, 2)])
    check(2, [(1, 2)])
"""


@pytest.mark.slow
@pytest.mark.processes
def test_on_a_mesh_it_is_the_same_mixture():
    """Loads and permutations are equal, numbers to rounding; biases and centres are the same on all
    devices to the last bit."""
    assert run_script(COMPARE, devices=4).count("ok ") == 3


def mixture(width=16) -> tuple:
    moe = MoEFFN(width, 128, num_experts=4, sparsity=Sparsity(m=16, v=4), axes=MeshAxes(),
                 rngs=nnx.Rngs(params=0))  # fmt: skip
    return nnx.split(moe)


@pytest.mark.parametrize(
    ("mesh", "width", "rows", "message"),
    [
        ((1, 1, 2), 16, 8, "experts are not spread over the 2 devices of axis 'tensor'"),
        ((3, 1, 1), 16, 8, "rows=16 of the leading axis must be a multiple of devices=3"),
        ((1, 3, 1), 16, 9, "width=16 must be a multiple of the 3 devices of axis 'fsdp'"),
        ((1, 8, 1), 16, 8, "width=16 must be a multiple of 32: groups of 4 on each of 8"),
    ],
)
def test_refusals_name_the_value(mesh, width, rows, message):
    graph, state = mixture(width)
    abstract = AbstractMesh(mesh, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    x = jax.ShapeDtypeStruct((rows, 2, width), jnp.float32)

    def both(state, x):
        moe = nnx.merge(graph, state)
        return moe(x)[0] + moe(x, moe.pack())[0]

    with (
        jax.sharding.use_abstract_mesh(abstract),
        pytest.raises(ValueError, match=r"^[^\n]*" + re.escape(message)),
    ):
        jax.eval_shape(both, state, x)


@pytest.mark.core
def test_gradients_of_a_grouped_product():
    keys = jax.random.split(jax.random.key(0), 3)
    x, w = jax.random.normal(keys[0], (40, 8)), jax.random.normal(keys[1], (4, 8, 12))
    dy, sizes = jax.random.normal(keys[2], (40, 12)), jnp.asarray([10, 0, 25, 5], jnp.int32)
    dx, dw = jax.jit(grouped_dot_gradients)(x, w, sizes, dy)
    for g, rows in enumerate(np.split(np.arange(40), np.cumsum(sizes)[:-1])):
        np.testing.assert_allclose(dx[rows], dy[rows] @ w[g].T, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(dw[g], x[rows].T @ dy[rows], rtol=1e-4, atol=1e-5)
