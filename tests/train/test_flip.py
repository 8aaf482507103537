"""Clusterings with a batch at hand, and what may happen when the phase changes."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sparsejax.prune import soft_threshold, soft_threshold_beta
from tests.train.test_step import CONFIG, Rig, batch
from train.config import Config, OptimizerConfig, ScheduleConfig, flips
from train.data.config import DataConfig
from train.flip import make_cluster_event, make_flip_step
from train.optimizer import phase_schedule, reset_moments
from train.step import make_eval_step
from train.tree import map_ffn_leaves

SPARSITY = dataclasses.replace(CONFIG.sparsity, refresh_every=4)


@pytest.fixture(name="trained", scope="module")
def _trained():
    """A rig in its sparse phase, with moments."""
    rig = Rig(sparsity=SPARSITY)
    dense = rig.step("dense")
    for seed in range(3):
        rig.state, _ = dense(rig.state, batch(seed))
    return rig


def event(rig, name, **changes):
    config = dataclasses.replace(rig.config, **changes)
    return jax.jit(make_cluster_event(config, rig.graph, name))


def ffn(tree):
    return tree["blocks"]["ffn"]


@pytest.fixture(name="begun", scope="module")
def _begun(trained):
    """State at the start of the sparse phase, and what the clustering reports."""
    return event(trained, "begin")(trained.state, batch(3))


def test_the_first_sparse_step_has_even_loads(trained, begun):
    state, moved = begun
    assert moved.keys() == {"neuron_churn"}
    assert moved["neuron_churn"].shape == (2,)
    step = trained.step("sparse")
    load = lambda state: np.asarray(step(state, batch(3))[1]["expert_load"])
    assert (np.abs(load(state) - 32) <= 1).all()  # 64 tokens, 2 experts, in every layer
    zeros = map_ffn_leaves(state.routing, {"bias": lambda b, _: 0 * b}, jnp.zeros(2))
    assert np.abs(load(dataclasses.replace(state, routing=zeros)) - 32).max() > 4


def test_a_refresh_says_which_tokens_it_moves(trained, begun):
    state, _ = begun
    refresh = event(trained, "refresh")
    # The weights and the tokens have not changed, so nothing moves.
    _, moved = refresh(state, batch(3))
    assert moved.keys() == {"neuron_churn", "token_churn"}
    np.testing.assert_array_equal(moved["neuron_churn"], 0.0)
    np.testing.assert_array_equal(moved["token_churn"], 0.0)
    # Other tokens: the same clusters, other biases.
    fresh, moved = refresh(state, batch(4))
    np.testing.assert_array_equal(moved["neuron_churn"], 0.0)
    assert (np.asarray(moved["token_churn"]) > 0).any()
    assert (ffn(fresh.routing)["bias"][...] != ffn(state.routing)["bias"][...]).any()
    # Other weights: neurons move as well.
    keys = jax.random.split(jax.random.key(0), len(jax.tree.leaves(state.params)))
    keys = jax.tree.unflatten(jax.tree.structure(state.params), keys)
    noise = lambda w, key: w + 0.05 * jax.random.normal(key, w.shape)
    other = dataclasses.replace(state, params=jax.tree.map(noise, state.params, keys))
    fresh, moved = refresh(other, batch(3))
    assert (np.asarray(moved["neuron_churn"]) > 0).all()
    assert (np.asarray(moved["neuron_churn"]) < 1).all()
    chex.assert_trees_all_equal(ffn(fresh.routing)["beta"], ffn(state.routing)["beta"])


def test_layers_in_a_list_and_the_first_micro_batch():
    model = dataclasses.replace(CONFIG.model, scan_layers=False, num_layers=1)
    rig = Rig(sparsity=SPARSITY, model=model, micro_batches=2)
    state, _ = event(rig, "begin")(rig.state, batch(3))
    # The train step takes rows 0 and 2 first.
    other = {name: a.at[1::2].set(batch(4)[name][1::2]) for name, a in batch(3).items()}
    refresh = event(rig, "refresh")
    same, moved = refresh(state, other)
    np.testing.assert_array_equal(moved["token_churn"], [0.0])
    chex.assert_trees_all_close(same.routing, state.routing, atol=1e-6)
    _, moved = refresh(state, jax.tree.map(lambda a: a[::-1], other))
    assert 0 < float(moved["token_churn"][0]) < 1


def test_flips_are_named_by_the_phase_that_begins():
    assert flips("none") == ()
    assert flips("sparse") == ("sparse",)
    assert flips("dense") == ("dense",)
    assert flips("both") == ("sparse", "dense")


def test_nothing_happens_unless_asked_for():
    assert make_flip_step(CONFIG, "sparse") is None
    assert make_flip_step(CONFIG, "dense") is None
    reset = dataclasses.replace(CONFIG, optimizer=OptimizerConfig(reset_moments="dense"))
    assert make_flip_step(reset, "sparse") is None
    assert make_flip_step(reset, "dense") is not None
    rescale = dataclasses.replace(CONFIG, schedule=ScheduleConfig(rescale_dense=True))
    assert make_flip_step(rescale, "sparse") is None


def test_reset_moments_start_adam_over_and_not_the_schedule(trained):
    config = dataclasses.replace(trained.config, optimizer=OptimizerConfig(reset_moments="both"))
    state = jax.jit(make_flip_step(config, "sparse"))(trained.state)
    chex.assert_trees_all_equal(state.params, trained.state.params)
    adam = state.opt_state[0]
    assert isinstance(adam, optax.ScaleByAdamState)
    assert int(adam.count) == 0
    assert all((np.asarray(m) == 0).all() for m in jax.tree.leaves((adam.mu, adam.nu)))
    # What is left of the optimiser's state is the schedule's count of three steps.
    rest = jax.tree.leaves(state.opt_state[1:])
    assert [int(leaf) for leaf in rest] == [3]
    # Adam's first step moves everything by the learning rate, whatever the gradient.
    after, metrics = trained.step("dense")(state, batch(7))
    table = lambda s: np.asarray(s.params["embedding"][...])  # does not decay
    moved = np.abs(table(after) - table(state))
    used = np.unique(np.asarray(batch(7)["inputs"]))
    np.testing.assert_allclose(np.median(moved[used]), float(metrics["learning_rate"]), rtol=1e-3)
    assert jax.tree.structure(reset_moments(state.opt_state)) == jax.tree.structure(state.opt_state)


def test_rescaling_goes_on_at_the_sparse_scale(trained, begun):
    state, _ = begun
    schedule = dataclasses.replace(CONFIG.schedule, rescale_dense=True)
    flip = jax.jit(make_flip_step(dataclasses.replace(trained.config, schedule=schedule), "dense"))
    # Straight after beta was estimated it fits, and nothing changes.
    chex.assert_trees_all_close(flip(state).params, state.params, rtol=1e-6)
    cube = lambda w: 4 * w**3
    blocks = jax.tree.map(cube, ffn(state.params))
    changed = jax.tree.map(lambda w: w, state.params)
    changed["blocks"]["ffn"] = blocks
    state = dataclasses.replace(state, params=changed)
    after = flip(state)
    beta = np.asarray(ffn(state.routing)["beta"][...])
    for i, name in enumerate(("w1", "w2")):
        for layer in range(2):
            w = np.asarray(ffn(state.params)[name][...][layer])
            factor = beta[layer, i] / float(soft_threshold_beta(jnp.asarray(w), 1))
            assert abs(factor - 1) > 0.05
            got = ffn(after.params)[name][...][layer]
            np.testing.assert_allclose(got, factor * w, rtol=1e-5)
            fitting = ffn(after.routing)["beta"][...][layer, i]
            np.testing.assert_allclose(fitting, beta[layer, i] / factor, rtol=1e-5)
    chex.assert_trees_all_equal(after.params["head"], state.params["head"])
    chex.assert_trees_all_equal(ffn(after.routing)["centers"], ffn(state.routing)["centers"])
    # The sparse view is the function that it was, the dense one is not.
    masked = batch(7) | {"mask": jnp.ones((4, 16))}
    for view, same in (("sparse", True), ("dense", False)):
        loss = jax.jit(make_eval_step(trained.config, trained.graph, view))
        (now, _), (before, _) = loss(after, masked), loss(state, masked)
        assert (abs(float(now / before) - 1) < 1e-6) == same


def test_the_dense_end_begins_with_thresholded_weights(trained, begun):
    state, _ = begun
    schedule = dataclasses.replace(CONFIG.schedule, threshold_dense=True)
    config = dataclasses.replace(trained.config, schedule=schedule)
    flip = jax.jit(make_flip_step(config, "dense"))
    after = flip(state)
    beta = np.asarray(ffn(state.routing)["beta"][...])
    for i, name in enumerate(("w1", "w2")):
        for layer in range(2):
            w, got = (ffn(s.params)[name][...][layer] for s in (state, after))
            np.testing.assert_allclose(got, beta[layer, i] * soft_threshold(w, 1), rtol=1e-6)
    np.testing.assert_array_equal(ffn(after.routing)["beta"][...], np.ones_like(beta))
    chex.assert_trees_all_equal(after.params["head"], state.params["head"])
    chex.assert_trees_all_equal(after.opt_state, state.opt_state)
    # The sparse view is the function that it was; a second time changes nothing.
    masked = batch(7) | {"mask": jnp.ones((4, 16))}
    loss = jax.jit(make_eval_step(trained.config, trained.graph, "sparse"))
    assert abs(float(loss(after, masked)[0] / loss(state, masked)[0]) - 1) < 1e-5
    chex.assert_trees_all_close(flip(after).params, after.params)


def test_scales_are_refreshed_without_clusters_too():
    config = dataclasses.replace(CONFIG, sparsity=dataclasses.replace(SPARSITY, routing=False))
    assert phase_schedule(config).refresh_every == 0
    sparsity = dataclasses.replace(config.sparsity, reestimate_beta=True)
    assert phase_schedule(dataclasses.replace(config, sparsity=sparsity)).refresh_every == 4


def test_a_seed_for_the_data_alone():
    assert Config(seed=3).data_seed == 3
    assert Config(seed=3, data=DataConfig(seed=0)).data_seed == 0
