"""First layers that stay dense in the sparse phase: what they compute, keep and cost."""

import dataclasses
import io

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import configs
from sparsejax.prune import soft_threshold
from tests.train.test_model import SPARSITY, make, stacked_like, tokens
from tests.train.test_step import CONFIG, Rig, batch
from train import accounting
from train.config import resolve, validate
from train.dry_run import dry_run
from train.flip import make_cluster_event, make_flip_step

FIRST = dataclasses.replace(SPARSITY, dense_layers=2, attention_projections=True)


@pytest.fixture(name="models", scope="module")
def _models():
    """Three layers in a list, and stacked."""
    unrolled = make(sparsity=FIRST, scan_layers=False)
    return unrolled, stacked_like(unrolled, make(seed=1, sparsity=FIRST))


def test_the_first_layers_are_those_of_the_dense_model(models):
    unrolled, scanned = models
    packed = unrolled.pack()
    assert packed[:2] == [None, None]
    x = unrolled.embedding[...][tokens()]
    for block, weights in zip(unrolled.blocks, packed, strict=True):
        x, stats = block(x, weights)
    want = unrolled.norm(x)
    for model in (unrolled, scanned):
        got, routed = jax.jit(lambda m, ids: m(ids, m.pack()))(model, tokens())
        np.testing.assert_allclose(got, want, atol=1e-5)
        chex.assert_trees_all_equal(routed.counts, stats.counts[None])
    dense = unrolled(tokens())[0]
    assert float(jnp.max(jnp.abs(dense - want))) > 1e-2


def test_gradients_of_a_list_and_a_stack_agree(models):
    def gradient(model):
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        packed = model.pack()
        loss = lambda p: jnp.sum(nnx.merge(graph, p, rest)(tokens(), packed)[0] ** 2)
        return jax.jit(jax.grad(loss))(params)

    unrolled, scanned = map(gradient, models)
    layers = [unrolled["blocks"][i] for i in range(3)]
    stack = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    chex.assert_trees_all_close(stack, scanned["blocks"], rtol=1e-4, atol=1e-4)


def test_text_is_written_in_that_view_too(models):
    ids = tokens(length=6)
    for model in models:
        packed = model.pack()
        want = model(ids, packed)[0]
        hidden, cache = jax.jit(model.prefill)(ids[:, :5], packed)
        np.testing.assert_allclose(hidden, want[:, :5], atol=1e-5)
        cache = jax.tree.map(lambda a: jnp.pad(a, [(0, 0)] * 2 + [(0, 1)] + [(0, 0)] * 2), cache)
        x, _ = jax.jit(model.decode)(ids[:, 5], cache, jnp.full((2,), 5), packed)
        np.testing.assert_allclose(x, want[:, 5], atol=1e-5)


def rig(scan_layers=False, **changes):
    sparsity = dataclasses.replace(CONFIG.sparsity, dense_layers=1, attention_projections=True)
    model = dataclasses.replace(CONFIG.model, scan_layers=scan_layers, compute_dtype="bfloat16")
    return Rig(sparsity=sparsity, model=model, **changes)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_a_phase_of_training(scan_layers):
    own = rig(scan_layers)
    begin = jax.jit(make_cluster_event(own.config, own.graph, "begin"))
    state, moved = begin(own.state, batch(3))
    assert moved["neuron_churn"].shape == (2,)
    step, losses = own.step("sparse"), []
    for _ in range(20):
        state, metrics = step(state, batch(3))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    # Of the layer that is sparse: its loads are reported, and its biases move.
    assert metrics["expert_load"].shape == (1, 2)
    assert int(np.asarray(metrics["expert_load"]).sum()) == 64
    routers = state.routing["blocks"], begin(own.state, batch(3))[0].routing["blocks"]
    bias = [
        tree["ffn"]["bias"][...] if scan_layers else [tree[i]["ffn"]["bias"][...] for i in (0, 1)]
        for tree in routers
    ]
    np.testing.assert_allclose(bias[0][0], bias[1][0], atol=1e-7)
    assert float(np.abs(bias[0][1] - bias[1][1]).max()) > 1e-4


def test_matrices_of_dense_layers_are_rounded_once(monkeypatch):
    own = rig()
    lowered = lambda: own._step("sparse").lower(own.state, batch()).as_text()
    # What is rounded before the loss is not rounded where a product reads it.
    text = lowered()
    monkeypatch.setattr("train.step._rounded_once", lambda config, params, phase: params)
    assert text != lowered()


def test_a_dense_end_leaves_the_weights_of_dense_layers():
    own = rig()
    state = own.cluster(True)(own.state)
    for option in ("threshold_dense", "rescale_dense"):
        schedule = dataclasses.replace(CONFIG.schedule, **{option: True})
        scaled = jax.tree.map(lambda w: 4 * w**3, state.params)
        before = dataclasses.replace(state, params=scaled)
        flip = make_flip_step(dataclasses.replace(own.config, schedule=schedule), "dense")
        after = jax.jit(flip)(before)
        blocks = before.params["blocks"], after.params["blocks"]
        chex.assert_trees_all_equal(blocks[0][0], blocks[1][0])
        for part, name in (("ffn", "w1"), ("ffn", "w2"), ("attention", "q")):
            old, new = (b[1][part][name][...] for b in blocks)
            assert float(jnp.max(jnp.abs(old - new))) > 1e-3, (option, name)
        beta = before.routing["blocks"][1]["ffn"]["beta"][...]
        if option == "threshold_dense":
            want = beta[0] * soft_threshold(blocks[0][1]["ffn"]["w1"][...], 1)
            np.testing.assert_allclose(blocks[1][1]["ffn"]["w1"][...], want, rtol=1e-6)


def test_flops_and_memory_lie_between_those_of_dense_and_sparse_steps():
    of = lambda layers: dataclasses.replace(
        own.config, sparsity=dataclasses.replace(own.config.sparsity, dense_layers=layers)
    )
    own = rig()
    dense, sparse = accounting.dense_flops(own.config), accounting.sparse_flops(of(0))
    for part in ("ffn", "projections"):
        d, s, half = (getattr(f, part) for f in (dense, sparse, accounting.sparse_flops(of(1))))
        assert d > half > s
        assert half == pytest.approx((d + s) / 2, rel=1e-6)
    assert 2 * accounting.sparse_flops(of(1)).router == sparse.router
    for part in ("weight_copies", "activations"):
        none, *some = (
            getattr(memory, part)
            for memory in (
                accounting.memory(own.config),
                *(accounting.memory(of(layers), sparse=True) for layers in (1, 0)),
            )
        )
        assert some[0] == pytest.approx((none + some[1]) / 2, rel=0.05), part
    full = dataclasses.replace(of(1), model=dataclasses.replace(own.config.model, remat="full"))
    between = accounting.recomputed_flops(full, sparse=True)
    none = dataclasses.replace(of(0), model=full.model)
    whole = accounting.recomputed_flops(none, sparse=True)
    assert accounting.recomputed_flops(full) > between > whole


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dense_layers": -1}, "dense_layers=-1 must not be negative"),
        ({"dense_layers": 2}, "dense_layers=2 leaves none of model.num_layers=2 sparse"),
    ],
)
def test_what_is_refused(changes, message):
    config = dataclasses.replace(CONFIG, sparsity=dataclasses.replace(CONFIG.sparsity, **changes))
    with pytest.raises(ValueError, match=message) as caught:
        validate(config)
    assert "\n" not in str(caught.value)


def test_the_dry_run_says_so():
    console = Console(width=120, file=io.StringIO())
    config = configs.get("tiny")
    sparsity = dataclasses.replace(config.sparsity, dense_layers=1)
    dry_run(dataclasses.replace(config, sparsity=sparsity), console=console)
    text = " ".join(console.file.getvalue().split())
    assert "the first layer dense" in text
    assert "of all layers, with the first layer, dense." in text


def test_a_mixture_is_sparse_in_all_of_its_layers():
    model = dataclasses.replace(CONFIG.model, experts=2, hidden=None)
    sparsity = dataclasses.replace(CONFIG.sparsity, dense_layers=1)
    config = dataclasses.replace(CONFIG, model=model, sparsity=sparsity)
    with pytest.raises(ValueError, match=r"dense_layers=1 must be 0 with model.experts=2"):
        resolve(config, tokenizer_vocab_size=50)
