"""Mixtures of experts in the trainer: phases, loads, counts, refusals."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import configs
from sparsejax.spec import Sparsity
from train import accounting
from train.config import Config, MeshConfig, ModelConfig, OptimizerConfig, ScheduleConfig, resolve
from train.flip import make_cluster_event
from train.huggingface.architecture import to_transformers
from train.mesh import check_mesh, make_mesh
from train.optimizer import make_optimizer
from train.state import init_state, model_graph
from train.step import make_train_step
from train.tree import block_leaf

MODEL = ModelConfig(
    width=32, num_layers=2, num_heads=2, compute_dtype="float32", experts=4, experts_per_token=2
)
BASE = Config(
    steps=20,
    batch_size=4,
    sequence_length=16,
    model=MODEL,
    sparsity=Sparsity(m=16, v=8, bias_rate=0.01),
    schedule=ScheduleConfig(warmup_steps=2, sparse_fraction=0.5),
    optimizer=OptimizerConfig(warmup_steps=2),
)
CONFIG = resolve(BASE, tokenizer_vocab_size=50)


def batch(seed=0):
    ids = np.random.default_rng(seed).integers(0, 50, (4, 17)).astype(np.int32)
    return {"inputs": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}


def ffn_state(state):
    return state.routing["blocks"]["ffn"]


@pytest.mark.core
def test_all_phases_train_the_same_state():
    """Dense, sparse, dense: one structure, losses that fall, loads that are evened throughout."""
    optimizer, graph = make_optimizer(CONFIG), model_graph(CONFIG)
    state = init_state(CONFIG, optimizer, make_mesh(MeshConfig(), CONFIG.batch_size))
    structure = jax.tree.structure(state)
    step = {p: jax.jit(make_train_step(CONFIG, graph, optimizer, p)) for p in ("dense", "sparse")}
    weights = lambda state: np.asarray(state.params["blocks"]["ffn"]["w1"][...])
    losses, biases = [], []
    for phase in ("dense", "sparse", "dense"):
        if phase == "sparse":
            before = weights(state)
            event = jax.jit(make_cluster_event(CONFIG, graph, "begin"))
            state, metrics = event(state, batch(3))
            # Experts are learned, not clustered: no neuron moves, but scales are set.
            np.testing.assert_array_equal(weights(state), before)
            assert not np.asarray(metrics["neuron_churn"]).any()
            assert (np.asarray(ffn_state(state)["beta"][...])[:, :2] > 1.1).all()
        for _ in range(15):
            state, metrics = step[phase](state, batch(3))
            losses.append(float(metrics["loss"]))
        assert metrics["expert_load"].shape == (2, 4)
        # 64 tokens, two experts each, none dropped.
        assert (np.asarray(metrics["expert_load"]).sum(-1) == 128).all()
        biases.append(np.asarray(ffn_state(state)["bias"][...]))
    assert jax.tree.structure(state) == structure
    assert losses[14] < losses[0] - 0.3
    assert losses[29] < losses[15]
    assert losses[-1] < losses[29]
    assert np.abs(biases[0]).max() > 0
    assert not np.array_equal(biases[0], biases[1])
    assert not np.array_equal(biases[1], biases[2])
    # The router learns.
    router = np.asarray(state.params["blocks"]["ffn"]["router"][...])
    fresh = init_state(CONFIG, optimizer, make_mesh(MeshConfig(), CONFIG.batch_size))
    assert not np.array_equal(router, np.asarray(fresh.params["blocks"]["ffn"]["router"][...]))


def test_experts_routed_further_in_all_phases():
    """Neurons and their moments move within experts, both levels of biases even their loads."""
    model = dataclasses.replace(MODEL, hidden=2048, scan_layers=False)
    sparsity = Sparsity(m=32, v=8, bias_rate=0.01)
    config = resolve(
        dataclasses.replace(BASE, model=model, sparsity=sparsity), tokenizer_vocab_size=50
    )
    optimizer, graph = make_optimizer(config), model_graph(config)
    state = init_state(config, optimizer, make_mesh(MeshConfig(), config.batch_size))
    structure = jax.tree.structure(state)
    step = {p: jax.jit(make_train_step(config, graph, optimizer, p)) for p in ("dense", "sparse")}
    leaf = lambda tree, name: np.asarray(block_leaf(tree, "ffn", name))
    moment = lambda state: leaf(optax.tree.get(state.opt_state, "mu"), "w2")

    for _ in range(3):
        state, metrics = step["dense"](state, batch(3))
    assert metrics["expert_load"].shape == (2, 4)
    assert not leaf(state.routing, "cluster_bias").any()
    assert np.abs(leaf(state.routing, "bias")).max() > 0
    before, mu = leaf(state.params, "w2"), moment(state)

    state, metrics = jax.jit(make_cluster_event(config, graph, "begin"))(state, batch(3))
    assert (np.asarray(metrics["neuron_churn"]) > 0.2).all()
    after, moved = leaf(state.params, "w2"), moment(state)
    expert = np.arange(2048) % 16 // 4
    for layer in range(2):
        row = {w.tobytes(): i for i, w in enumerate(before[layer])}
        old = np.asarray([row[w.tobytes()] for w in after[layer]])
        np.testing.assert_array_equal(np.sort(old), np.arange(2048))
        np.testing.assert_array_equal(expert[old], expert)
        np.testing.assert_array_equal(moved[layer], mu[layer][old])
    centers, fitted = leaf(state.routing, "centers"), leaf(state.routing, "cluster_bias")
    np.testing.assert_allclose(np.linalg.norm(centers, axis=-1), 1, rtol=1e-5)
    assert fitted.shape == (2, 8)
    assert np.abs(fitted).max() > 0

    losses = []
    for _ in range(10):
        state, metrics = step["sparse"](state, batch(3))
        losses.append(float(metrics["loss"]))
    load = np.asarray(metrics["expert_load"]).reshape(2, 2, 4)
    assert (load.sum((1, 2)) == 128).all()
    assert losses[-1] < losses[0]
    assert not np.array_equal(leaf(state.routing, "cluster_bias"), fitted)
    np.testing.assert_allclose(
        leaf(state.routing, "cluster_bias").reshape(2, 2, 4).sum(1), 0, atol=1e-6
    )

    own = leaf(state.routing, "bias")
    state, metrics = jax.jit(make_cluster_event(config, graph, "refresh"))(state, batch(3))
    np.testing.assert_array_equal(leaf(state.routing, "bias"), own)
    churn = np.asarray(metrics["token_churn"])
    assert churn.shape == (2,)
    assert ((churn >= 0) & (churn < 0.9)).all()
    kept = leaf(state.routing, "cluster_bias")
    state, _ = step["dense"](state, batch(3))
    np.testing.assert_array_equal(leaf(state.routing, "cluster_bias"), kept)
    assert jax.tree.structure(state) == structure


def test_a_run_without_a_sparse_phase_evens_loads_too():
    config = resolve(dataclasses.replace(BASE, schedule=ScheduleConfig()), tokenizer_vocab_size=50)
    optimizer, graph = make_optimizer(config), model_graph(config)
    state = init_state(config, optimizer, make_mesh(MeshConfig(), config.batch_size))
    state, metrics = jax.jit(make_train_step(config, graph, optimizer, "dense"))(state, batch())
    assert metrics["expert_load"].shape == (2, 4)
    assert np.abs(np.asarray(ffn_state(state)["bias"][...])).max() > 0


def test_counts_are_those_of_the_model():
    graph = model_graph(CONFIG)
    state = init_state(CONFIG, make_optimizer(CONFIG), make_mesh(MeshConfig(), 4))
    count = accounting.parameters(CONFIG)
    assert count.total == sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert count.router == 2 * 4 * 32
    assert nnx.merge(graph, state.params, state.routing).config.ffn_hidden == 8 * 32
    # Two of four experts with as many neurons each as make 4 D: the FLOPs of one network of 4 D.
    alone = resolve(
        dataclasses.replace(BASE, model=dataclasses.replace(MODEL, experts=0)),
        tokenizer_vocab_size=50,
    )
    dense, single = accounting.dense_flops(CONFIG), accounting.dense_flops(alone)
    assert dense.ffn == single.ffn
    assert dense.router == 6 * CONFIG.tokens_per_step * count.router
    # Four of six products halve.
    assert accounting.sparse_flops(CONFIG).ffn * 6 == dense.ffn * 4
    assert accounting.padded_tokens(CONFIG) >= 2 * CONFIG.tokens_per_step
    # Two clusters an expert: half of the neurons, and a similarity to each of eight centres.
    model, further = dataclasses.replace(MODEL, hidden=2048), Sparsity(m=32, v=8)
    larger = resolve(dataclasses.replace(BASE, model=model), tokenizer_vocab_size=50)
    parts = resolve(dataclasses.replace(larger, sparsity=further), tokenizer_vocab_size=50)
    whole, parts = accounting.sparse_flops(larger), accounting.sparse_flops(parts)
    assert 2 * parts.ffn == whole.ffn
    assert parts.router - whole.router == 2 * 2 * CONFIG.tokens_per_step * 8 * 32


def test_memory_and_traffic_on_a_mesh():
    config = resolve(configs.get("moe1b"), tokenizer_vocab_size=257)
    spread = dataclasses.replace(config, mesh=MeshConfig(fsdp=8))
    count, layers = accounting.parameters(config), config.model.num_layers
    layer = 2 * 2048 * 8 * 4096
    assert count.ffn == layers * layer
    one, eight = (accounting.memory(c, devices=n) for c, n in ((config, 1), (spread, 8)))
    # Every device has the routers and the norms.
    everywhere = 4 * (count.router + count.norms)
    assert eight.master_weights - everywhere == (one.master_weights - everywhere) // 8
    # Of experts one layer at a time in bf16, and its gradient, instead of all layers.
    assert one.weight_copies == 2 * (count.projections + count.ffn + count.head)
    assert eight.weight_copies == 2 * (count.projections + count.head) // 8 + 4 * layer
    # Twice there, once back; packed, a matrix is 9/8 bytes a weight in one of two passes.
    assert accounting.expert_traffic(spread) == 7 * count.ffn * (2 * 2 + 2) // 8
    assert accounting.expert_traffic(spread, sparse=True) == 7 * count.ffn * (25 / 8 + 2) / 8
    # Summed over data in a ring: there and back.
    assert accounting.expert_traffic(config, 2) == 2 * count.ffn
    assert accounting.expert_traffic(config, 1) == 0


@pytest.mark.parametrize("name", ["moe-tiny", "moe1b"])
def test_configurations(name):
    config = resolve(configs.get(name), tokenizer_vocab_size=257)
    assert config.name == name
    assert (config.model.experts, config.model.experts_per_token, config.sparsity.m) == (8, 2, 32)


@pytest.mark.parametrize(
    ("model", "changes", "message"),
    [
        ({"ffn": "swiglu"}, {}, "needs model.ffn=relu2"),
        ({"ffn_precision": "fp8"}, {}, "model.ffn_precision=compute, not relu2 and fp8"),
        ({"experts_per_token": 5}, {}, "model.experts_per_token=5 must be 1 to model.experts=4"),
        ({"hidden": 200}, {}, "model.hidden=200 must be a multiple of 4 model.experts=16"),
        ({"experts": -1}, {}, "model.experts=-1"),
        ({}, {"mesh": MeshConfig(tensor=2)}, "mesh.tensor=2 must be 1"),
        ({}, {"sparsity": Sparsity(m=8, v=8)}, "m=8, "),
        ({}, {"sparsity": Sparsity(m=16, v=8, routing=False)}, "routing=False"),
        ({}, {"sparsity": Sparsity(m=32, v=8)}, "m=32 makes 2 clusters of 32 neurons"),
        ({"hidden": 2048}, {"sparsity": Sparsity(m=64, v=8)}, "4 clusters of 128 neurons"),
    ],
)
def test_refusals_name_the_value(model, changes, message):
    config = dataclasses.replace(BASE, model=dataclasses.replace(MODEL, **model), **changes)
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve(config, tokenizer_vocab_size=50)


def test_other_refusals():
    mesh = lambda *shape: jax.sharding.AbstractMesh(shape, ("data", "fsdp", "tensor"))
    check_mesh(CONFIG, mesh(2, 2, 1))
    for shape, message in (
        ((1, 1, 2), r"^model\.experts=4 needs mesh\.tensor=1, not 2$"),
        ((1, 3, 1), r"^model\.width=32 must be a multiple of mesh\.fsdp=3$"),
        ((1, 16, 1), r"^model\.width=32 must be a multiple of 4 times mesh\.fsdp=16"),
        ((16, 1, 1), r"^the 4 tokens of one device and micro-batch .* multiple of sparsity\.v=8$"),
    ):
        with pytest.raises(ValueError, match=message):
            check_mesh(CONFIG, mesh(*shape))
    with pytest.raises(ValueError, match=r"model\.experts=4: Llama and Arcee have no experts"):
        to_transformers(CONFIG.model, positions=16, eos_id=0, bos_id=0, dtype="float32")
