"""Training a mixture of experts on several simulated devices: losses, checkpoints, programs."""

import json

import numpy as np
import pytest

from tests.train.simulated import run_script

# All phases with clusters within experts and fitted biases: on one device, on two, and on one from
# a checkpoint that two wrote in the sparse phase. Adam's epsilon is large: otherwise rounding
# decides where gradients are next to nothing, and sooner or later which two of four are kept.
RUNS = """
    import json, sys
    import jax, numpy as np
    from jax.sharding import AxisType, Mesh
    from sparsejax.spec import Sparsity
    from train.checkpoint import Checkpointer
    from train.config import Config, MeshConfig, ModelConfig, OptimizerConfig, ScheduleConfig
    from train.config import resolve
    from train.flip import make_cluster_event
    from train.mesh import AXES, check_mesh, put_batch
    from train.optimizer import make_optimizer
    from train.state import abstract_state, init_state, model_graph
    from train.step import make_train_step

    STEPS, SAVED = 7, 3
    config = resolve(
        Config(
            steps=STEPS, batch_size=4, sequence_length=16,
            model=ModelConfig(width=32, num_layers=2, num_heads=4, loss_chunk=16, experts=4,
                              hidden=2048, norm="xla", compute_dtype="float32"),
            sparsity=Sparsity(m=32, v=8, bias_rate=0.01, kmeans_iterations=3),
            schedule=ScheduleConfig(warmup_steps=2, sparse_fraction=0.5),
            optimizer=OptimizerConfig(warmup_steps=2, eps=1e-5),
            mesh=MeshConfig(fsdp=2),
        ),
        tokenizer_vocab_size=50,
    )
    optimizer, graph = make_optimizer(config), model_graph(config)

    class Run:
        def __init__(self, data, fsdp):
            devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp, 1)
            self.mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
            check_mesh(config, self.mesh)
            with jax.set_mesh(self.mesh):
                self.like = abstract_state(config, optimizer, self.mesh)
                placed = jax.tree.map(lambda leaf: leaf.sharding, self.like)
                out = {"out_shardings": (placed, placed.step)}
                self.step = {p: jax.jit(make_train_step(config, graph, optimizer, p), **out)
                             for p in ("dense", "sparse")}
                self.begin = jax.jit(make_cluster_event(config, graph, "begin"), **out)

        def train(self, folder, *, resume=False):
            log = []
            with (jax.set_mesh(self.mesh),
                  Checkpointer(folder, keep=1, config={}) as checkpointer):
                first = SAVED if resume else 0
                state = (checkpointer.restore(self.like).state if resume
                         else init_state(config, optimizer, self.mesh))
                for i in range(first, STEPS):
                    ids = np.random.default_rng(i).integers(0, 50, (4, 17)).astype(np.int32)
                    batch = put_batch(
                        self.mesh, {"inputs": ids[:, :-1], "targets": ids[:, 1:]})
                    moved = None
                    if i in (2, 4):
                        # A second one in the middle of the phase: moments move with their rows.
                        state, moved = self.begin(state, batch)
                        moved = np.asarray(moved["neuron_churn"]).tolist()
                    phase = "sparse" if 2 <= i < 6 else "dense"
                    state, metrics = self.step[phase](state, batch)
                    log.append([float(metrics["loss"]), float(metrics["grad_norm"]),
                                np.asarray(metrics["expert_load"]).tolist(), moved])
                    if i + 1 == SAVED and not resume:
                        checkpointer.save(SAVED, state, {})
            for leaf in jax.tree.leaves(state.routing):
                copies = [np.asarray(s.data) for s in leaf.addressable_shards]
                assert all(c.shape == leaf.shape and (c == copies[0]).all() for c in copies)
            w1 = state.params["blocks"]["ffn"]["w1"][...]
            fsdp = self.mesh.shape["fsdp"]
            assert w1.addressable_shards[0].data.size * fsdp == w1.size
            return log

    one, two = Run(1, 1), Run(1, 2)
    print(json.dumps([one.train(sys.argv[1]), two.train(sys.argv[2]),
                      one.train(sys.argv[2], resume=True)]))
"""


@pytest.mark.slow
def test_one_and_two_devices_and_a_checkpoint_between_them(tmp_path):
    reference, spread, resumed = json.loads(
        run_script(RUNS, tmp_path / "one", tmp_path / "two", devices=2)
    )
    assert (len(reference), len(spread), len(resumed)) == (7, 7, 4)
    for run in (spread, resumed):
        for step, (one, many) in enumerate(zip(reference[-len(run) :], run, strict=True)):
            message = f"{len(run)} steps, step {step}"
            np.testing.assert_allclose(many[0], one[0], rtol=2e-6, err_msg=message)
            np.testing.assert_allclose(many[1], one[1], rtol=2e-5, err_msg=message)
            assert many[2] == one[2], message
            assert (many[3] is None) == (one[3] is None)
            if one[3] is not None:
                np.testing.assert_allclose(many[3], one[3], atol=1e-6, err_msg=message)
    assert np.min(reference[2][3]) > 0.2
    # 64 tokens, two experts each: of 4 experts, then of 8 clusters.
    assert [len(step[2][0]) for step in reference] == [4, 4, 8, 8, 8, 8, 4]
    assert all(sum(layer) == 2 * 64 for step in reference for layer in step[2])


COLLECTIVES = """
    import dataclasses, json
    import configs
    from benchmarks.collectives import collectives, one_micro_batch, partitioned
    from sparsejax.spec import Sparsity

    base = configs.get("moe-tiny")
    model = dataclasses.replace(
        base.model, width=256, num_heads=4, num_layers=2, vocab_size=384, experts=4, hidden=1024,
        remat="dots")
    base = dataclasses.replace(base, sequence_length=128, model=model, sparsity=Sparsity(m=16))
    config = one_micro_batch(base, 2, 1, fsdp=2)
    text, mesh = partitioned(config, "dense", 2, packed=False)
    sent = {}
    for c in collectives(text, mesh):
        sent[c.kind] = sent.get(c.kind, 0) + c.sent
    print(json.dumps(sent))
"""


@pytest.mark.slow
def test_what_a_dense_step_moves():
    """Byte for byte: experts' matrices in bf16, once for each pass; of tokens, nothing but what the
    embedding moves. (Sparse experts are gathered as the routed network is.)"""
    sent = json.loads(run_script(COLLECTIVES, devices=2))
    d, h, v, layers, tokens = 256, 1024, 384, 2, 128
    weights = layers * (4 * d * d + 2 * h * d)
    rest = 2 * d * v + 2 * 4 * (2 * tokens)
    assert sent["all-gather"] == 1 / 2 * (2 * 2 * weights + rest)
    assert sent["reduce-scatter"] == 1 / 2 * 2 * (weights + d * v)
    assert sent["all-to-all"] == 1 / 2 * 2 * 2 * tokens * d
    # Routers' gradients, norms, counts.
    assert sent["all-reduce"] < 40_000


GPU = """
    import types
    from unittest import mock
    import jax, jax.numpy as jnp
    from jax.sharding import NamedSharding
    from kernels import registry
    from sparsejax.spec import Sparsity
    from train.config import Config, MeshConfig, ModelConfig, ScheduleConfig, resolve
    from train.mesh import BATCH_SPEC, make_mesh
    from train.optimizer import make_optimizer
    from train.state import abstract_state, model_graph
    from train.step import make_train_step

    config = resolve(
        Config(
            steps=40, batch_size=4, sequence_length=256, mesh=MeshConfig(data=2, fsdp=2),
            model=ModelConfig(width=256, num_layers=2, num_heads=2, hidden=2048, remat="dots",
                              experts=4, compute_dtype="bfloat16", attention="xla"),
            sparsity=Sparsity(m=32, v=128, backend="hopper"),
            schedule=ScheduleConfig(warmup_steps=2, sparse_fraction=0.5),
        ),
        tokenizer_vocab_size=50,
    )
    mesh, optimizer = make_mesh(config.mesh, 4), make_optimizer(config)
    with jax.set_mesh(mesh), registry.assume_capability((9, 0)):
        state = abstract_state(config, optimizer, mesh)
        ids = jax.ShapeDtypeStruct((4, 256), jnp.int32, sharding=NamedSharding(mesh, BATCH_SPEC))
        # JAX's kernels ask the device that is there, a CPU, how many multiprocessors it has.
        h100 = types.SimpleNamespace(core_count=132)
        for phase in ("dense", "sparse"):
            step = make_train_step(config, model_graph(config), optimizer, phase)
            with mock.patch("jax.devices", lambda: [h100]):
                traced = jax.jit(step).trace(state, {"inputs": ids, "targets": ids})
            text = traced.lower(lowering_platforms=("cuda",)).as_text()
            print(phase, *(text.count(word) for word in (
                "mosaic_gpu", "all_gather", "reduce_scatter", "ragged_dot")))
"""


def test_steps_of_both_phases_lower_for_gpus_with_the_kernels_inside():
    """Lowered, not run: JAX's grouped kernels in the dense step, ours in the sparse one."""
    lines = run_script(GPU, devices=4).splitlines()[-2:]
    dense, sparse = ([int(n) for n in line.split()[1:]] for line in lines)
    # Norms have kernels of their own.
    assert dense[0] >= 6
    assert sparse[0] > 5
    for found in (dense, sparse):
        assert found[1] >= 4
        assert found[2] >= 2
        assert found[3] == 0
