"""Training a mixture of experts on several simulated devices: losses, checkpoints, programs."""

import json

import numpy as np
import pytest

from tests.train.simulated import run_script

# All phases with clusters within experts and fitted biases: on one device, on two, and on one from
# a checkpoint that two wrote in the sparse phase. Adam's epsilon is large: otherwise rounding
# decides where gradients are next to nothing, and sooner or later which two of four are kept.
RUNS = """
    import json, math, re, sys
    import jax, jax.numpy as jnp, numpy as np
    from jax.sharding import AxisType, Mesh, NamedSharding
    from sparsejax.spec import Sparsity
    from train.checkpoint import Checkpointer
    from train.config import Config, MeshConfig, ModelConfig, OptimizerConfig, ScheduleConfig
    from train.config import resolve
    from train.flip import make_cluster_event
    from train.mesh import AXES, BATCH_SPEC, check_mesh, put_batch
    from train.optimizer import make_optimizer
    from train.state import abstract_state, init_state, model_graph
    from train.step import make_train_step

    STEPS, SAVED = 7, 3
    config = resolve(
        Config(
            steps=STEPS, batch_size=4, sequence_length=16,
            model=ModelConfig(width=32, num_layers=1, num_heads=4, loss_chunk=16, experts=4,
                              hidden=2048, norm="xla", scan_layers=False, compute_dtype="float32"),
            sparsity=Sparsity(m=32, v=8, bias_rate=0.01, kmeans_iterations=3),
            schedule=ScheduleConfig(warmup_steps=2, sparse_fraction=0.5),
            optimizer=OptimizerConfig(warmup_steps=2, eps=1e-5),
            mesh=MeshConfig(fsdp=2),
        ),
        tokenizer_vocab_size=50,
    )
    optimizer, graph = make_optimizer(config), model_graph(config)

    def gathered(text):
        # Numbers that a program's all-gathers of floats make.
        found = re.findall(r" = (.*?) all-gather(?:-start)?\\(", text)
        shapes = re.findall(r"f32\\[([0-9,]+)\\]", " ".join(found))
        return sum(math.prod(map(int, shape.split(","))) for shape in shapes)

    class Run:
        def __init__(self, data, fsdp):
            devices = np.array(jax.devices()[: data * fsdp]).reshape(data, fsdp, 1)
            self.mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * 3)
            check_mesh(config, self.mesh)
            with jax.set_mesh(self.mesh):
                self.like = abstract_state(config, optimizer, self.mesh)
                placed = jax.tree.map(lambda leaf: leaf.sharding, self.like)
                out = {"out_shardings": (placed, placed.step)}
                ids = jax.ShapeDtypeStruct(
                    (4, 16), jnp.int32, sharding=NamedSharding(self.mesh, BATCH_SPEC))
                batch = {"inputs": ids, "targets": ids}
                program = lambda f: jax.jit(f, **out).lower(self.like, batch).compile()
                self.step = {p: program(make_train_step(config, graph, optimizer, p))
                             for p in ("dense", "sparse")}
                self.begin = program(make_cluster_event(config, graph, "begin"))

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
            w1 = state.params["blocks"][0]["ffn"]["w1"][...]
            fsdp = self.mesh.shape["fsdp"]
            assert w1.addressable_shards[0].data.size * fsdp == w1.size
            return log

    one, two = Run(1, 1), Run(1, 2)
    print(json.dumps([one.train(sys.argv[1]), two.train(sys.argv[2]),
                      one.train(sys.argv[2], resume=True),
                      [gathered(two.step[p].as_text()) for p in ("dense", "sparse")]]))
"""


@pytest.mark.processes
def test_one_and_two_devices_and_a_checkpoint_between_them(tmp_path):
    reference, spread, resumed, gathered = json.loads(
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
    # Each pass gathers the layer's weights (on a CPU XLA takes barriers away, and may merge the
    # experts' two gathers); of tokens nothing is gathered.
    d, h, v = 32, 2048, 128
    weights = 2 * (4 * d * d + 2 * h * d) + d * v
    assert set(gathered) <= {weights, weights - 2 * h * d}
    # 64 tokens, two experts each: of 4 experts, then of 8 clusters.
    assert [len(step[2][0]) for step in reference] == [4, 4, 8, 8, 8, 8, 4]
    assert all(sum(layer) == 2 * 64 for step in reference for layer in step[2])


GPU = """
    import json, re, types
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
            types_of = lambda pattern: sorted(set(re.findall(pattern, text, re.DOTALL)))
            print(json.dumps({
                "kernels": text.count("mosaic_gpu"),
                "ragged_dot": text.count("ragged_dot"),
                "gathered": types_of(r"all_gather[^\\n]*-> tensor<[0-9x]*x(\\w+)>"),
                "scattered": types_of(r"reduce_scatter.*?\\^bb0\\(%\\w+: tensor<(\\w+)>"),
            }))
"""


def test_steps_of_both_phases_lower_for_gpus_with_the_kernels_inside():
    """Lowered, not run: JAX's grouped kernels in the dense step, ours in the sparse one; what moves
    between devices is in bf16, or packed."""
    dense, sparse = map(json.loads, run_script(GPU, devices=4).splitlines()[-2:])
    for found in (dense, sparse):
        assert found["kernels"] > 5
        assert found["ragged_dot"] == 0
        assert found["scattered"] == ["bf16"]
    # Token ids, for the embedding; metadata.
    assert dense["gathered"] == sparse["gathered"] == ["bf16", "i32"]
