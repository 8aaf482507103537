"""Steps and clustering: what changes, what must not, what is the same however computed."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparsejax.spec import Sparsity
from train.config import (
    Config,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    ScheduleConfig,
    resolve,
)
from train.mesh import make_mesh
from train.optimizer import decay_mask, learning_rate_schedule, make_optimizer
from train.state import init_state, model_graph
from train.step import make_cluster_step, make_eval_step, make_train_step
from train.tree import map_ffn_leaves, names

CONFIG = resolve(
    Config(
        steps=20,
        batch_size=4,
        sequence_length=16,
        model=ModelConfig(width=32, num_layers=2, num_heads=2, compute_dtype="float32"),
        sparsity=Sparsity(m=8, v=8, bias_rate=0.01),
        schedule=ScheduleConfig(warmup_steps=2, sparse_fraction=0.5),
        optimizer=OptimizerConfig(warmup_steps=2),
    ),
    tokenizer_vocab_size=50,
)


class Rig:
    """Everything a step needs, for one configuration."""

    def __init__(self, **changes):
        self.config = dataclasses.replace(CONFIG, **changes)
        self.optimizer = make_optimizer(self.config)
        self.graph = model_graph(self.config)
        self.mesh = make_mesh(MeshConfig(), self.config.batch_size)
        self.state = init_state(self.config, self.optimizer, self.mesh)
        # Functions that the tests of a rig share: each is traced once.
        self.step, self.cluster = functools.cache(self._step), functools.cache(self._cluster)
        self.dense = jax.jit(self._dense)

    def _step(self, phase):
        return jax.jit(make_train_step(self.config, self.graph, self.optimizer, phase))

    def _cluster(self, begin):
        return jax.jit(make_cluster_step(self.config, self.graph, begin=begin))

    def _dense(self, state, ids):
        return nnx.merge(self.graph, state.params, state.routing)(ids)[0]


def batch(seed=0):
    ids = np.random.default_rng(seed).integers(0, 50, (4, 17)).astype(np.int32)
    return {"inputs": jnp.asarray(ids[:, :-1]), "targets": jnp.asarray(ids[:, 1:])}


@pytest.fixture(name="trained", scope="module")
def _trained():
    """A rig whose optimiser has non-zero moments."""
    rig = Rig()
    step = rig.step("dense")
    for seed in range(3):
        rig.state, _ = step(rig.state, batch(seed))
    return rig


@pytest.mark.core
def test_permuting_neurons_leaves_the_dense_function_alone(trained):
    state = trained.cluster(True)(trained.state)
    ids = batch(9)["inputs"]
    before, after = trained.dense(trained.state, ids), trained.dense(state, ids)
    # The same sum in another order: equal but for rounding.
    np.testing.assert_allclose(after, before, atol=2e-5)
    moved = lambda s: np.asarray(s.params["blocks"]["ffn"]["w1"][...])
    assert not np.array_equal(moved(state), moved(trained.state))
    # A permutation of whole neurons: the same rows, bit for bit.
    for old, new in zip(moved(trained.state), moved(state), strict=True):
        order = lambda w: w[np.lexsort(w.T)]
        np.testing.assert_array_equal(order(old), order(new))


@pytest.mark.core
def test_permuting_neurons_leaves_the_next_dense_step_alone(trained):
    """Moments move with their parameters: the next step lands in the same place, permuted."""
    step = trained.step("dense")
    plain, _ = step(trained.state, batch(5))
    clustered = trained.cluster(True)(trained.state)
    permuted, _ = step(clustered, batch(5))
    ids = batch(9)["inputs"]
    # Adam divides by roots of tiny moments, so rounding shows more than in the function itself.
    np.testing.assert_allclose(
        trained.dense(permuted, ids), trained.dense(plain, ids), atol=2e-3, rtol=1e-3
    )
    wrong = dataclasses.replace(clustered, opt_state=trained.state.opt_state)
    wrong, _ = step(wrong, batch(5))
    difference = np.abs(trained.dense(wrong, ids) - trained.dense(plain, ids)).max()
    assert difference > 2e-2, "the test cannot see a moment left behind"


def test_sparse_steps_train_and_even_out_the_load(trained):
    state = trained.cluster(True)(trained.state)
    step = trained.step("sparse")
    losses = []
    for _ in range(30):
        state, metrics = step(state, batch(3))
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0] - 0.5
    assert metrics["expert_load"].shape == (2, 2)
    assert (np.asarray(metrics["expert_load"]).sum(-1) == 64).all()
    bias = state.routing["blocks"]["ffn"]["bias"][...]
    assert np.abs(np.asarray(bias)).max() > 0
    chex.assert_trees_all_equal(
        state.routing["blocks"]["ffn"]["beta"][...],
        trained.cluster(True)(trained.state).routing["blocks"]["ffn"]["beta"][...],
    )


def test_projections_may_be_all_that_is_sparse():
    nothing = Sparsity(weights=False, routing=False, activations=False)
    sparsity = dataclasses.replace(nothing, attention_projections=True)
    steps = {}
    for rig in (Rig(sparsity=nothing), Rig(sparsity=sparsity)):
        state = rig.cluster(True)(rig.state)
        packed = nnx.merge(rig.graph, state.params, state.routing).pack()
        assert packed.ffn is None
        for phase in ("dense", "sparse"):
            steps[rig, phase], metrics = rig.step(phase)(state, batch(3))
            assert "expert_load" not in metrics
    plain, dense_again, dense, sparse = (step.params for step in steps.values())
    chex.assert_trees_all_equal(plain, dense_again, dense)
    # Adam's first step is of one size: it is the signs that differ.
    moved = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), dense, sparse)
    assert all(jax.tree.leaves(moved["blocks"]["attention"]))


def test_an_ffn_in_8_bits_trains_like_one_of_exact_products(trained):
    rounded = Rig(model=dataclasses.replace(CONFIG.model, ffn_precision="fp8"))
    losses = []
    for rig in (trained, rounded):
        state, step = trained.state, rig.step("dense")
        state, first = step(state, batch(3))
        for _ in range(9):
            state, last = step(state, batch(3))
        losses.append((float(first["loss"]), float(last["loss"])))
    exact, fp8 = losses
    assert 0 < abs(fp8[0] - exact[0]) < 0.05
    assert exact[1] < exact[0] - 0.5
    assert abs(fp8[1] - exact[1]) < 0.1
    # A sparse step is the same whatever dense ones do.
    state = trained.cluster(True)(trained.state)
    one, two = (rig.step("sparse")(state, batch(3))[0].params for rig in (trained, rounded))
    chex.assert_trees_all_equal(one, two)


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_matrices_rounded_once_give_the_gradients_of_those_rounded_where_they_are_read(
    phase, monkeypatch
):
    model = dataclasses.replace(CONFIG.model, compute_dtype="bfloat16", remat="dots")
    rig = Rig(model=model, micro_batches=2, optimizer=OptimizerConfig(warmup_steps=2))
    # The CPU's compiler would leave out roundings that a float32 result follows.
    options = {"xla_allow_excess_precision": False}

    def run():
        step = jax.jit(make_train_step(rig.config, rig.graph, rig.optimizer, phase))
        lowered = step.lower(rig.state, batch())
        return lowered.compile(compiler_options=options)(rig.state, batch())

    once, metrics = run()
    seen = []
    as_they_are = lambda _, params, phase: seen.append(phase) or params
    monkeypatch.setattr("train.step._rounded_once", as_they_are)
    each, expected = run()
    assert seen == [phase]
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=1e-6)
    # Adam's first moment is a tenth of the gradient.
    got, want = (s.opt_state[0].mu for s in (once, each))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    chex.assert_trees_all_close(got, want, rtol=1e-6, atol=1e-7)


def test_refresh_keeps_beta_and_bias(trained):
    state = trained.cluster(True)(trained.state)
    state, _ = trained.step("sparse")(state, batch(1))
    fresh = trained.cluster(False)(state)
    before, after = (s.routing["blocks"]["ffn"] for s in (state, fresh))
    chex.assert_trees_all_equal(before["beta"][...], after["beta"][...])
    chex.assert_trees_all_equal(before["bias"][...], after["bias"][...])
    ids = batch(9)["inputs"]
    np.testing.assert_allclose(trained.dense(fresh, ids), trained.dense(state, ids), atol=2e-5)


def test_scanned_and_unrolled_layers_cluster_alike():
    """The same neurons end up in the same places whichever way the layers are stored."""
    scanned = Rig()
    unrolled = Rig(model=dataclasses.replace(CONFIG.model, scan_layers=False))
    stacked = {names(p): a for p, a in jax.tree_util.tree_leaves_with_path(scanned.state.params)}

    def of_layer(path, _):
        keys = names(path)
        if keys[0] != "blocks":
            return stacked[keys]
        return stacked[("blocks", *keys[2:])][keys[1]]

    params = jax.tree_util.tree_map_with_path(of_layer, unrolled.state.params)
    state = dataclasses.replace(unrolled.state, params=params)
    one = scanned.cluster(True)(scanned.state).params["blocks"]["ffn"]
    two = unrolled.cluster(True)(state).params["blocks"]
    for i in range(2):
        for name in ("w1", "w2"):
            chex.assert_trees_all_equal(one[name][...][i], two[i]["ffn"][name][...])


def test_micro_batches_average_to_the_whole_batch():
    whole, parts = Rig(), Rig(micro_batches=2)
    one, m1 = whole.step("dense")(whole.state, batch())
    two, m2 = parts.step("dense")(parts.state, batch())
    np.testing.assert_allclose(m1["loss"], m2["loss"], rtol=1e-5)
    np.testing.assert_allclose(m1["grad_norm"], m2["grad_norm"], rtol=1e-4)
    chex.assert_trees_all_close(one.params, two.params, atol=2e-4)


def test_clipping_bounds_the_step():
    one_layer = dataclasses.replace(CONFIG.model, num_layers=1)
    clip = lambda norm: dataclasses.replace(CONFIG.optimizer, clip_norm=norm)
    free, clipped = (Rig(model=one_layer, optimizer=clip(norm)) for norm in (0.0, 1e-3))
    (one, m1), (two, m2) = (r.step("dense")(r.state, batch()) for r in (free, clipped))
    np.testing.assert_allclose(m1["grad_norm"], m2["grad_norm"], rtol=1e-6)
    first = lambda s: np.asarray(s.opt_state[0].mu["head"][...])
    np.testing.assert_allclose(first(two), first(one) * 1e-3 / float(m1["grad_norm"]), rtol=1e-4)


@pytest.mark.parametrize(
    ("rates", "model"),
    [
        ({"attention": 0.5}, {}),
        ({"attention": 2.0, "ffn": 0.25}, {"qk_norm": True}),
        ({"embedding": 2.0, "head": 0.5, "ffn": 0.25}, {}),
    ],
)
def test_parts_of_a_model_may_have_rates_of_their_own(rates, model):
    """Adam's update does not depend on the rate: each matrix moves so many times as far."""
    model = dataclasses.replace(CONFIG.model, num_layers=1, **model)
    optimizer = dataclasses.replace(CONFIG.optimizer, weight_decay=0.1)
    own = dataclasses.replace(optimizer, **{f"{part}_rate": rate for part, rate in rates.items()})
    plain, parts = (Rig(model=model, optimizer=o) for o in (optimizer, own))

    def moves(rig):
        new = rig.step("dense")(rig.state, batch())[0]
        return jax.tree.map(lambda a, b: a - b, new.params, rig.state.params)

    found: dict[str, float] = {}
    for (path, moved), (_, expected) in zip(
        *(jax.tree_util.tree_leaves_with_path(moves(rig)) for rig in (parts, plain)), strict=True
    ):
        ratio = np.linalg.norm(moved) / np.linalg.norm(expected)
        found["/".join(map(str, names(path)))] = round(float(ratio), 3)
    for name, ratio in found.items():
        part = name if "/" not in name else name.split("/")[-2]
        assert ratio == pytest.approx(rates.get(part, 1.0), abs=2e-3), name
    assert {"blocks/attention/out", "blocks/ffn/w2", "head", "embedding", "norm/scale"} <= set(
        found
    )


def test_learning_rate_moves_from_the_first_step_and_ends_low():
    schedule = learning_rate_schedule(CONFIG)
    o = CONFIG.optimizer
    np.testing.assert_allclose(float(schedule(0)), o.learning_rate / 2, rtol=1e-6)
    np.testing.assert_allclose(float(schedule(1)), o.learning_rate, rtol=1e-6)
    np.testing.assert_allclose(float(schedule(19)), o.learning_rate * o.final_fraction, rtol=1e-5)


def test_learning_rates_that_fall_in_a_line():
    o = dataclasses.replace(CONFIG.optimizer, learning_rate=1.0, final_fraction=0.1)
    rates = lambda **changes: [
        float(schedule(step))
        for schedule in [
            learning_rate_schedule(
                dataclasses.replace(CONFIG, optimizer=dataclasses.replace(o, **changes))
            )
        ]
        for step in range(CONFIG.steps)
    ]
    # The rate of a step is that of its end: 2 steps of warm-up, 18 of decay.
    line = [0.5, 1.0, *(1 - 0.9 * np.arange(1, 19) / 18)]
    np.testing.assert_allclose(rates(decay="linear"), line, rtol=1e-5)
    wsd = [0.5, *[1.0] * 15, *(1 - 0.9 * np.arange(1, 5) / 4)]
    np.testing.assert_allclose(rates(decay="wsd", decay_fraction=0.2), wsd, rtol=1e-5)
    # A decay longer than what the warm-up leaves begins after the warm-up.
    np.testing.assert_allclose(rates(decay="wsd", decay_fraction=1.0), line, rtol=1e-5)
    none = rates(decay="linear", warmup_steps=0, final_fraction=0.0)
    np.testing.assert_allclose(none, 1 - np.arange(1, 21) / 20, atol=1e-6)


def test_only_matrices_decay(trained):
    mask = decay_mask(trained.state.params)
    decayed = {
        str(names(path)[-1]) for path, yes in jax.tree_util.tree_leaves_with_path(mask) if yes
    }
    assert decayed == {"q", "k", "v", "out", "w1", "w2", "head"}


def test_evaluation_is_the_masked_mean(trained):
    step = jax.jit(make_eval_step(trained.config, trained.graph, "dense"))
    b = batch(4)
    mask = jnp.ones((4, 16), jnp.float32).at[2:].set(0.0)
    nats, count = step(trained.state, b | {"mask": mask})
    half = jax.tree.map(lambda a: a[:2], b)
    want, _ = step(trained.state, half | {"mask": mask[:2]})
    assert count == 32
    np.testing.assert_allclose(nats, want, rtol=1e-5)


def test_map_ffn_leaves_touches_named_leaves_of_ffns_only():
    tree = {"blocks": {"ffn": {"w1": jnp.ones((2, 3)), "w2": jnp.ones((2, 3))}, "w1": jnp.ones(2)}}
    out = map_ffn_leaves(tree, {"w1": lambda w, s: w * s}, jnp.array([2.0, 3.0]))
    np.testing.assert_array_equal(out["blocks"]["ffn"]["w1"], [[2.0] * 3, [3.0] * 3])
    np.testing.assert_array_equal(out["blocks"]["ffn"]["w2"], np.ones((2, 3)))
    np.testing.assert_array_equal(out["blocks"]["w1"], np.ones(2))
