"""Training on many simulated devices: the same losses on every mesh, refusals, restores."""

import dataclasses
import json
import re
import types
from collections import Counter

import numpy as np
import pytest

from sparsejax.spec import Sparsity
from tests.train.simulated import run_script
from train.config import Config, ModelConfig, ScheduleConfig, resolve
from train.mesh import check_mesh

# Runs so many steps of all three phases with a refresh, the FFN in this precision, on each mesh
# given as JSON [[data, fsdp, tensor, shards], ...] and prints losses, gradient norms and loads;
# with one shard in two micro-batches, and the first of the two layers dense.
RUNS = """
    import dataclasses, json, sys
    import jax, numpy as np
    from jax.sharding import AxisType, Mesh
    from sparsejax.spec import Sparsity
    from train.config import Config, ModelConfig, OptimizerConfig, ScheduleConfig, resolve
    from train.mesh import AXES, put_batch
    from train.optimizer import make_optimizer
    from train.state import init_state, model_graph
    from train.step import make_cluster_step, make_train_step

    meshes, precision, steps = json.loads(sys.argv[1]), sys.argv[2], int(sys.argv[3])

    def run(data, fsdp, tensor, shards):
        config = resolve(
            Config(
                steps=7, batch_size=8, sequence_length=16, micro_batches=3 - shards,
                model=ModelConfig(
                    width=32, num_layers=2, num_heads=4, loss_chunk=16,
                    ffn_precision=precision,
                    norm="xla" if shards == 1 else "kernel",
                ),
                sparsity=Sparsity(
                    m=8, v=8, bias_rate=0.01, kmeans_iterations=3, shards=shards,
                    dense_layers=shards % 2,
                ),
                schedule=ScheduleConfig(warmup_steps=2, sparse_fraction=0.5),
                optimizer=OptimizerConfig(warmup_steps=2),
            ),
            tokenizer_vocab_size=50,
        )
        size = data * fsdp * tensor
        devices = np.array(jax.devices()[:size]).reshape(data, fsdp, tensor)
        mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
        optimizer, log = make_optimizer(config), []
        with jax.set_mesh(mesh):
            graph, state = model_graph(config), init_state(config, optimizer, mesh)
            placed = jax.tree.map(lambda leaf: leaf.sharding, state)
            step = {
                phase: jax.jit(make_train_step(config, graph, optimizer, phase),
                               out_shardings=(placed, placed.step))
                for phase in ("dense", "sparse")
            }
            begin = jax.jit(make_cluster_step(config, graph, begin=True), out_shardings=placed)
            for i in range(steps):
                ids = np.random.default_rng(i).integers(0, 50, (8, 17)).astype(np.int32)
                batch = put_batch(mesh, {"inputs": ids[:, :-1], "targets": ids[:, 1:]})
                # A second clustering in the middle of the phase: the permutation is not trivial.
                state = begin(state) if i in (2, 4) else state
                state, metrics = step["sparse" if 2 <= i < 6 else "dense"](state, batch)
                log.append([float(metrics["loss"]), float(metrics["grad_norm"])])
                load = metrics.get("expert_load")
                log[-1].append(None if load is None else np.asarray(load).tolist())
            w1 = state.params["blocks"]["ffn"]["w1"][...]
            assert w1.addressable_shards[0].data.size * fsdp * tensor == w1.size
            routing = jax.tree.leaves(state.routing)
            for leaf in routing:
                copies = [np.asarray(s.data) for s in leaf.addressable_shards]
                assert all(c.shape == leaf.shape and (c == copies[0]).all() for c in copies)
        return log

    print(json.dumps([run(*mesh) for mesh in meshes]))
"""


def compare(meshes, precision="compute", steps=7):
    """All meshes like the first, which is one device."""
    output = run_script(RUNS, json.dumps(meshes), precision, steps, devices=8)
    reference, *others = json.loads(output)
    for mesh, log in zip(meshes[1:], others, strict=True):
        for step, (one, many) in enumerate(zip(reference, log, strict=True)):
            message = f"mesh {mesh}, step {step}"
            np.testing.assert_allclose(many[0], one[0], rtol=2e-5, err_msg=message)
            np.testing.assert_allclose(many[1], one[1], rtol=2e-3, err_msg=message)
            assert many[2] == one[2], message
    return reference


@pytest.mark.slow
@pytest.mark.processes
def test_one_two_and_eight_devices_with_clusters_of_each_tensor_shard():
    """Two shards, clustered on one device or on two along tensor: the same function."""
    compare([[1, 1, 1, 2], [1, 2, 1, 2], [2, 2, 2, 2]])


@pytest.mark.slow
def test_one_and_four_devices_with_one_clustering():
    """Clusters over all neurons do not depend on tensor either."""
    compare([[1, 1, 1, 1], [1, 2, 2, 1]])


@pytest.mark.slow
@pytest.mark.processes
def test_one_and_four_devices_in_8_bits():
    """Until sparse steps have changed the weights: rounding to 8 bits turns the last bit of a sum,
    which depends on the mesh, into a sixteenth of a value now and then."""
    compare([[1, 1, 1, 1], [1, 2, 2, 1]], "fp8", steps=3)


# The command line, in a process in which nothing may fall back.
STRICT = """
    import sys, warnings
    from kernels.registry import FallbackWarning
    from train.main import main

    warnings.simplefilter("error", FallbackWarning)
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.processes
def test_tiny_trains_in_8_bits_on_two_devices(tmp_path):
    run_script(
        STRICT,
        *("--config", "tiny", "--output", tmp_path, "--steps", 4, "--batch-size", 2),
        *("--sequence-length", 64, "--mesh.fsdp", 2, "--model.ffn-precision", "fp8"),
        *("--model.compute-dtype", "bfloat16", "--model.attention", "xla"),
        *("--model.num-layers", 1, "--model.hidden", 256, "--sparsity.m", 8, "--sparsity.v", 64),
        *("--sparsity.kmeans-iterations", 1, "--sparsity.no-fit-bias"),
        *("--schedule.warmup-steps", 1, "--schedule.sparse-fraction", 0.5),
        *("--optimizer.warmup-steps", 1, "--log.every", 1, "--log.eval-every", 0),
        *("--log.eval-windows", 2, "--checkpoint.every", 0, "--checkpoint.no-final"),
        devices=2,
    )
    lines = (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["kind"] == "train"]
    assert [r["phase"] for r in steps] == ["dense", "sparse", "sparse", "dense"]
    assert [r.get("saturated_weights") for r in steps] == [None, 0, 0, None]
    assert steps[-1]["loss"] < steps[0]["loss"] - 1


# One training step's worth of 2:4 attention projections, on one device and on four.
PROJECTIONS = """
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding
    from sparsejax.spec import Sparsity
    from train.attention import WIDTH_AXIS, Attention
    from train.config import ModelConfig
    from train.mesh import ACT_BTD, AXES, state_shardings
    from flax import nnx

    sparsity = Sparsity(attention_projections=True)
    config = ModelConfig(width=128, num_heads=4, num_kv_heads=2, attention="xla")
    graph, params, state = nnx.split(
        Attention(config, sparsity, rngs=nnx.Rngs(0)), nnx.Param, ...)
    x, dy = (jnp.asarray(np.random.default_rng(i).normal(size=(4, 8, 128)), jnp.float32)
             for i in range(2))

    def step(params, x):
        betas = nnx.merge(graph, params, state).betas()
        own = jax.tree.map(lambda _: betas, state)
        packed = nnx.merge(graph, params, own).pack()
        return jax.value_and_grad(
            lambda p, x: jnp.sum(dy * nnx.merge(graph, p, own)(x, packed)), argnums=(0, 1)
        )(params, x)

    def run(*shape):
        devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
        mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, state_shardings(mesh, params))
            rows = jax.device_put(x, NamedSharding(mesh, ACT_BTD))
            return jax.jit(step)(placed, rows)

    one, four = run(1, 1, 1), run(2, 2, 1)
    q = four[1][0]["q"][...]
    assert q.addressable_shards[0].data.shape == (64, 128), q.sharding
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True):
        np.testing.assert_allclose(np.asarray(b), np.asarray(a), rtol=1e-4, atol=1e-4)
    print("gradients", len(jax.tree.leaves(one)))
    try:
        run(1, 2, 2)
    except ValueError as error:
        print("refused:", error)
"""


@pytest.mark.slow
def test_one_and_four_devices_with_packed_attention_projections():
    out = run_script(PROJECTIONS, devices=4)
    assert "gradients 6" in out
    assert "refused: 2:4 projections are not spread over the 2 devices of axis 'tensor'" in out


def resolved(**changes) -> Config:
    base = Config(
        steps=40,
        batch_size=8,
        sequence_length=16,
        model=ModelConfig(width=32, num_layers=2, num_heads=4),
        sparsity=Sparsity(m=8, v=8),
        schedule=ScheduleConfig(warmup_steps=2, sparse_fraction=0.5),
    )
    return resolve(dataclasses.replace(base, **changes), tokenizer_vocab_size=50)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ((1, 1, 8), {}, "model.num_heads=4 must be a multiple of mesh.tensor=8"),
        ((1, 1, 4), {"model": {"num_kv_heads": 2}}, "model.num_kv_heads=2 must be a multiple"),
        ((1, 1, 4), {"model": {"hidden": 120}, "sparsity": {"shards": 1}}, "a multiple of 32"),
        ((1, 1, 4), {"model": {"hidden": 130}, "schedule": None}, "model.hidden=130 must be a"),
        ((1, 1, 4), {"model": {"vocab_size": 130}}, "model.vocab_size=130 must be a multiple"),
        ((1, 3, 1), {}, "model.width=32 must be a multiple of mesh.fsdp=3"),
        ((1, 16, 1), {}, "model.width=32 must be a multiple of 4 times mesh.fsdp=16"),
        ((1, 1, 4), {"sparsity": {"shards": 2}}, "sparsity.shards=2 must be 1 or a multiple"),
        ((2, 1, 1), {"sparsity": {"v": 128}}, "the 64 tokens of one device and micro-batch"),
        ((8, 1, 1), {"sparsity": {"v": 32}}, "the 16 tokens of one device and micro-batch"),
        (
            (1, 2, 1),
            {"sparsity": {"attention_projections": True}},
            "model.width=32 must be a multiple of 64 times mesh.fsdp=2",
        ),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, changes, message):
    changes = dict(changes)
    for name, fields in changes.items():
        default = {
            "model": ModelConfig(width=32, num_layers=2, num_heads=4),
            "sparsity": Sparsity(m=8, v=8),
            "schedule": ScheduleConfig(),
        }[name]
        changes[name] = dataclasses.replace(default, **(fields or {}))
    shape = dict(zip(("data", "fsdp", "tensor"), mesh, strict=True))
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error:
        check_mesh(resolved(**changes), types.SimpleNamespace(shape=shape))
    assert message in str(error.value)


def test_a_mesh_that_fits_is_taken():
    check_mesh(resolved(), types.SimpleNamespace(shape={"data": 2, "fsdp": 4, "tensor": 1}))


def test_shards_follow_the_tensor_axis_unless_told():
    mesh = dataclasses.replace(Config().mesh, tensor=4)
    assert resolved(mesh=mesh).sparsity.shards == 4
    assert resolved(mesh=mesh, sparsity=Sparsity(m=8, v=8, shards=1)).sparsity.shards == 1
    assert resolved().sparsity.shards == 1
    # A run without a sparse phase is the same on every mesh.
    assert resolved(mesh=mesh, schedule=ScheduleConfig()).sparsity.shards == 1


GPU = """
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding
    from kernels import registry
    from sparsejax.spec import Sparsity
    from train.config import Config, MeshConfig, ModelConfig, ScheduleConfig, resolve
    from train.mesh import BATCH_SPEC, make_mesh
    from train.optimizer import make_optimizer
    from train.state import abstract_state, model_graph
    from train.step import make_train_step

    def lowered(width, precision, hidden=2048, **sparsity):
        config = resolve(
            Config(
                steps=40, batch_size=4, sequence_length=256, mesh=MeshConfig(fsdp=2, tensor=2),
                model=ModelConfig(width=width, num_layers=2, num_heads=4, hidden=hidden,
                                  remat="dots", compute_dtype="bfloat16", attention="xla",
                                  ffn_precision=precision),
                sparsity=Sparsity(m=16, v=128, backend="hopper", **sparsity),
                schedule=ScheduleConfig(warmup_steps=2, sparse_fraction=0.5),
            ),
            tokenizer_vocab_size=50,
        )
        mesh, optimizer = make_mesh(config.mesh, 4), make_optimizer(config)
        with jax.set_mesh(mesh), registry.assume_capability((9, 0)):
            state = abstract_state(config, optimizer, mesh)
            ids = jax.ShapeDtypeStruct(
                (4, 256), jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
            step = make_train_step(config, model_graph(config), optimizer, "sparse")
            traced = jax.jit(step).trace(state, {"inputs": ids, "targets": ids})
            print(traced.lower(lowering_platforms=("cuda",)).as_text())

    lowered(512, "compute")
    print("===== then")
    lowered(512, "compute", 4096, shared_every=4)
    print("===== then")
    # Products want multiples of 256 columns; a device packs 128 of them.
    lowered(256, "fp8")
"""


def test_a_sharded_sparse_step_lowers_for_gpus_with_the_kernels_inside():
    """Lowered, not run: each layer's kernels and gathers are in the program."""
    steps = run_script(GPU, devices=4).split("===== then")
    for text in steps:
        assert text.count("mosaic_gpu") > 5
        assert "all_gather" in text
        assert "reduce_scatter" in text
    exact, shared, in_8_bits = (
        Counter(re.findall(r"\"stablehlo.all_gather\".*-> tensor<\w+x(\w+)>", s)) for s in steps
    )
    assert exact == shared
    assert exact["bf16"] == in_8_bits["f8E4M3FN"] > 0
    assert set(in_8_bits) == {"f8E4M3FN", "i32"}  # nothing of 16 bits is gathered


COLLECTIVES = """
    import dataclasses, json
    import configs
    from benchmarks.collectives import collectives, one_micro_batch, partitioned
    from sparsejax.spec import Sparsity

    base = configs.get("tiny")
    model = dataclasses.replace(
        base.model, width=256, num_heads=4, num_layers=3, vocab_size=384)
    base = dataclasses.replace(
        base, sequence_length=128, model=model,
        sparsity=Sparsity(m=8, v=64, attention_projections=True))
    config = one_micro_batch(base, 4, 1, fsdp=4)
    shared = dataclasses.replace(base.sparsity, shared_every=4)
    shared = dataclasses.replace(config, sparsity=shared)
    for phase, config in (("dense", config), ("sparse", config), ("sparse", shared)):
        text, mesh = partitioned(config, phase, 4, packed=phase == "sparse")
        sent = {}
        for c in collectives(text, mesh):
            sent[c.kind] = sent.get(c.kind, 0) + c.sent
        print("sent", json.dumps(sent))
"""


@pytest.mark.slow
@pytest.mark.processes
def test_what_a_step_moves():
    """Byte for byte: weights in bf16, once for each pass; packed ones in the sparse step. Without
    rematerialisation too, where gathered weights must not be kept for the backward pass."""
    out = run_script(COLLECTIVES, devices=4)
    sent = [json.loads(line[5:]) for line in out.splitlines() if line[:4] == "sent"]
    dense, sparse, shared = sent
    d, h, v, layers, tokens = 256, 1024, 384, 3, 128
    attention, ffn = layers * 4 * d * d, layers * 2 * h * d
    # Both passes gather the layers' weights; the head's loss has its gradient in one. Token ids
    # of four devices are gathered for the embedding and its gradient.
    rest = 2 * d * v + 2 * 4 * (4 * tokens)
    assert dense["all-gather"] == 3 / 4 * (2 * 2 * (attention + ffn) + rest)
    # A packed weight is 9/8 bytes, and is read in one of two passes.
    assert sparse["all-gather"] == 3 / 4 * (25 / 8 * (attention + ffn) + rest)
    # Neurons that all experts have are sent once.
    assert shared["all-gather"] == sparse["all-gather"]
    gradients = 3 / 4 * 2 * (attention + ffn + d * v)
    assert dense["reduce-scatter"] == sparse["reduce-scatter"] == gradients
    # Rows of the embedding, there and back.
    assert dense["all-to-all"] == sparse["all-to-all"] == 3 / 4 * 2 * 2 * tokens * d
    # What is left is small: norms, counts, sums.
    assert sparse["all-reduce"] < 0.01 * sparse["all-gather"] + 50_000


# Every collective of the two phases' steps with the operations right before and behind it, traced
# for a mesh of 2 x 2 x 2.
ORDERS = """
    import json
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, Mesh
    from sparsejax.spec import Sparsity
    from train.config import Config, ModelConfig, ScheduleConfig, resolve
    from train.mesh import AXES
    from train.optimizer import make_optimizer
    from train.state import abstract_state, model_graph
    from train.step import make_train_step

    def jaxprs(value):
        for leaf in jax.tree.leaves(value, is_leaf=lambda v: hasattr(v, "eqns")):
            leaf = getattr(leaf, "jaxpr", leaf)
            if hasattr(leaf, "eqns"):
                yield leaf

    def pinned(eqn):
        return eqn.primitive.name == "layout_constraint" and list(
            eqn.params["layout"].major_to_minor) == list(range(eqn.invars[0].aval.ndim))

    def visit(jaxpr, found):
        made = {id(v): eqn for eqn in jaxpr.eqns for v in eqn.outvars}
        used = {id(v): eqn for eqn in jaxpr.eqns for v in eqn.invars}
        for eqn in jaxpr.eqns:
            name = eqn.primitive.name
            if name == "reduce_scatter":
                found["scattered"].append(eqn.params["scatter_dimension"])
            if name == "all_to_all":
                behind = used.get(id(eqn.outvars[0]))
                while behind is not None and behind.primitive.name.startswith(("psum", "reshape")):
                    behind = used.get(id(behind.outvars[0]))
                before = made.get(id(eqn.invars[0]))
                found["swapped"].append([
                    eqn.params["split_axis"] == 0 or (before is not None and pinned(before)),
                    eqn.params["concat_axis"] == 0 or (behind is not None and pinned(behind)),
                ])
            found["pinned"] += pinned(eqn)
            for inner in jaxprs(list(eqn.params.values())):
                visit(inner, found)
        return found

    config = resolve(
        Config(
            steps=80, batch_size=8, sequence_length=16,
            model=ModelConfig(width=32, num_layers=1, num_heads=4, loss_chunk=16),
            sparsity=Sparsity(m=8, v=8), schedule=ScheduleConfig(sparse_fraction=0.5),
        ),
        tokenizer_vocab_size=50,
    )
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), AXES, axis_types=(AxisType.Auto,) * 3)
    ids = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    results = {}
    with jax.set_mesh(mesh):
        optimizer = make_optimizer(config)
        state = abstract_state(config, optimizer, mesh)
        for phase in ("dense", "sparse"):
            step = make_train_step(config, model_graph(config), optimizer, phase)
            traced = jax.jit(step).trace(state, {"inputs": ids, "targets": ids})
            results[phase] = visit(
                traced.jaxpr.jaxpr, {"scattered": [], "swapped": [], "pinned": 0})
    print(json.dumps(results))
"""


def test_collectives_do_not_turn_what_stands_beside_them():
    """Activations and gradients lie row by row, whatever axis a collective works along."""
    found = json.loads(run_script(ORDERS, devices=8))
    for phase, step in found.items():
        # Rows of the embedding there, their gradients back.
        assert step["swapped"] == [[True, True]] * 2, phase
        assert set(step["scattered"]) == {0}, phase
    # The two of the embedding, and each matrix that is gathered: six of a dense layer.
    assert found["dense"]["pinned"] == 2 + 6
    # Four projections; before and behind the scatters of two matrices.
    assert found["sparse"]["pinned"] == 2 + 4 + 2 * 2
