"""The routed feed-forward op against float64 numpy, one token at a time."""

import importlib
import itertools
import math
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array

from kernels import registry
from sparsejax.ops import routed_ffn_blocks, routed_ffn_masked
from sparsejax.ops.routed_ffn import pack_ffn, routed_ffn
from sparsejax.routing import TokenPlan, plan_tokens
from sparsejax.spec import Sparsity

# The package has the function under this name.
ops = importlib.import_module("sparsejax.ops.routed_ffn")

D, H, T, V = 16, 64, 37, 8


def oracle_threshold(w: np.ndarray) -> np.ndarray:
    """Soft threshold along axis 1, group by group."""
    out = np.zeros_like(w)
    for r in range(w.shape[0]):
        for g in range(0, w.shape[1], 4):
            group = w[r, g : g + 4]
            t = np.sort(np.abs(group))[1]
            out[r, g : g + 4] = np.sign(group) * np.maximum(np.abs(group) - t, 0)
    return out


def oracle_ffn(x, dy, w1, w2, wg, expert, sparsity: Sparsity):
    """Value and gradients; weights are those that multiply. Masks, no packing, no layout."""
    tokens, hidden = x.shape[0], w1.shape[0]
    a = x @ w1.T
    r = np.maximum(a, 0)
    gate = np.ones_like(a) if wg is None else x @ wg.T
    y2 = r * r * gate
    mask = np.ones((tokens, hidden), bool)
    if sparsity.routing:
        mask = np.arange(hidden) % sparsity.m // 4 == expert[:, None]
    if sparsity.activations:
        # Live neurons of an expert are four in a row in every block of M.
        for t, g in itertools.product(range(tokens), range(0, hidden, 4)):
            if mask[t, g]:
                keep = sorted(range(4), key=lambda i: -abs(y2[t, g + i]))[:2]
                for i in range(4):
                    mask[t, g + i] = i in keep
    y2 = np.where(mask, y2, 0)
    dy2 = np.where(mask, dy @ w2.T, 0)
    da = dy2 * gate * 2 * r
    dgate = dy2 * r * r
    dx = da @ w1
    if wg is not None:
        dx = dx + dgate @ wg
    if sparsity.weight_gradient == "tokens24":
        thin = oracle_tokens24(y2, expert, sparsity)
        own = [thin(a) for a in (da, y2, dgate)]
    else:
        own = [da, y2, dgate]
    gradients = [dx, own[0].T @ x, own[1].T @ dy, None if wg is None else own[2].T @ x]
    return y2 @ w2, gradients


def oracle_tokens24(y2, expert, sparsity: Sparsity):
    """What a weight gradient sees of an operand (T, H): two of four tokens of a block of rows."""
    tokens, hidden = y2.shape
    experts = sparsity.num_experts
    planned = experts > 1
    v = sparsity.v if planned else -(-tokens // 4) * 4
    owner = np.arange(hidden) % sparsity.m // 4 if sparsity.routing else np.zeros(hidden, int)

    def thin(a):
        out = np.zeros_like(a)
        for e in range(experts):
            mine = [t for t in range(tokens) if not sparsity.routing or expert[t] == e]
            neurons = np.flatnonzero(owner == e)
            counts = [-np.count_nonzero(y2[mine, n]) for n in neurons]
            number = math.ceil(sparsity.dense_neurons * len(neurons) - 1e-6)
            dense = neurons[np.argsort(counts, kind="stable")[:number]]
            for start, n in itertools.product(range(0, len(mine), v), neurons):
                block = mine[start : start + v]
                for r in range(v // 4):
                    # Of a plan's rows four that follow each other, of tokens as they came four that
                    # are far apart.
                    places = range(4 * r, 4 * r + 4) if planned else range(r, v, v // 4)
                    group = [block[i] for i in places if i < len(block)]
                    kept = sorted(group, key=lambda t: -abs(a[t, n]))[:2]
                    for t in group if n in dense else kept:
                        out[t, n] = a[t, n]
        return out

    return thin


def problem(gated: bool, seed: int = 0, integers: bool = False) -> list[Any]:
    rng = np.random.default_rng(seed)
    shapes = ((T, D), (T, D), (H, D), (H, D), (H, D))
    if integers:
        arrays = [rng.integers(-2, 3, s).astype(np.float64) for s in shapes]
    else:
        arrays = [rng.normal(size=s) for s in shapes]
    return [a.astype(np.float32) for a in arrays[: 5 if gated else 4]] + [None] * (not gated)


def float64(arrays) -> list[Any]:
    return [None if a is None else np.asarray(a).astype(np.float64) for a in arrays]


EXPERTS = {
    "even": lambda e: np.arange(T) % e,
    "skewed": lambda e: np.minimum(np.random.default_rng(1).geometric(0.7, T) - 1, e - 1),
    "all_to_last": lambda e: np.full(T, e - 1),
}


@partial(jax.jit, static_argnames=("sparsity", "dtype"))
def value_and_gradients(x, dy, w1, w2, wg, betas, plan, sparsity, dtype=jnp.float32):
    x, dy = x.astype(dtype), dy.astype(dtype)
    packed = pack_ffn(w1, w2, wg, betas, sparsity, dtype=dtype)
    y, vjp = jax.vjp(
        partial(routed_ffn, packed=packed, plan=plan, sparsity=sparsity), x, w1, w2, wg
    )
    return y, vjp(dy)


def plan_for(expert: np.ndarray, sparsity: Sparsity) -> TokenPlan | None:
    if sparsity.num_experts == 1:
        return None
    return plan_tokens(jnp.array(expert, jnp.int32), sparsity.num_experts, sparsity.v)


def run(problem, expert, sparsity, betas, dtype=jnp.float32):
    x, dy, w1, w2, wg = problem
    plan = plan_for(expert, sparsity)
    y, gradients = value_and_gradients(x, dy, w1, w2, wg, betas, plan, sparsity, dtype)
    return [y, *gradients]


def reference(problem, expert, sparsity, betas):
    x, dy, w1, w2, wg = float64(problem)
    if sparsity.weights:
        w1 = float(betas[0]) * oracle_threshold(w1)
        w2 = float(betas[1]) * oracle_threshold(w2)
        wg = None if wg is None else float(betas[2]) * oracle_threshold(wg)
    y, gradients = oracle_ffn(x, dy, w1, w2, wg, expert, sparsity)
    return [y, *gradients]


def assert_close(got, want, tolerance):
    for name, g, w in zip(("y", "dx", "dw1", "dw2", "dwg"), got, want, strict=True):
        assert (g is None) == (w is None), name
        if w is not None:
            error = np.linalg.norm(np.asarray(g).astype(np.float64) - w) / np.linalg.norm(w)
            assert error < tolerance, (name, error)


BETAS = np.array([1.5, 1.25, 1.75], np.float32)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=3)))
def test_every_combination_matches_the_oracle(gated, switches):
    weights, routing, activations = switches
    sparsity = Sparsity(weights=weights, routing=routing, activations=activations, m=16, v=V)
    data = problem(gated)
    expert = EXPERTS["skewed"](4)
    got = run(data, expert, sparsity, BETAS)
    assert_close(got, reference(data, expert, sparsity, BETAS), 1e-5)
    assert got[0].dtype == jnp.float32


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(
    "switches",
    [{}, {"activations": False, "dense_neurons": 0.3}, {"routing": False, "dense_neurons": 0.0}],
)
def test_weight_gradients_of_two_of_four_tokens(gated, switches):
    sparsity = Sparsity(m=8, v=V, weight_gradient="tokens24", **switches)
    data = problem(gated, seed=5)
    expert = EXPERTS["skewed"](2)
    got = run(data, expert, sparsity, BETAS)
    assert_close(got, reference(data, expert, sparsity, BETAS), 1e-5)
    exact = run(data, expert, replace(sparsity, weight_gradient="dense"), BETAS)
    for i, (a, b) in enumerate(zip(got, exact, strict=True)):
        if b is not None:
            error = np.linalg.norm(a - b) / np.linalg.norm(b)
            assert error == 0 if i < 2 else 0.01 < error < 0.7


@pytest.mark.parametrize("weight_gradient", ["dense", "tokens24"])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("distribution", ["skewed", "all_to_last"])
def test_masked_dense_products_are_the_same_function(
    gated, distribution, weight_gradient, monkeypatch
):
    """What runs on a GPU without kernels for the call."""
    sparsity = Sparsity(m=16, v=V, activations=gated, weight_gradient=weight_gradient)
    data = problem(gated, seed=6)
    expert = EXPERTS[distribution](4)
    monkeypatch.setattr(ops, "_path", lambda *_: routed_ffn_masked)
    # Traced anew, not taken from the cache of the other path.
    monkeypatch.setitem(globals(), "value_and_gradients", value_and_gradients.__wrapped__)
    got = run(data, expert, sparsity, BETAS)
    assert_close(got, reference(data, expert, sparsity, BETAS), 1e-5)
    idle = ~np.isin(np.arange(H) % 16 // 4, expert)
    assert not np.asarray(got[2])[idle].any()


def test_the_path_follows_the_device():
    _, _, w1, w2, wg = problem(gated=False)
    packed = pack_ffn(w1, w2, wg, jnp.array(BETAS), Sparsity(m=16, v=V))
    assert ops._path(None, packed) is routed_ffn_blocks
    with registry.assume_capability((8, 0)):
        assert ops._path(None, packed) is routed_ffn_masked


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("m", [8, 16, 32, 64])
@pytest.mark.parametrize("distribution", EXPERTS)
def test_any_distribution_of_tokens(gated, m, distribution):
    """Skewed and empty experts, T no multiple of V."""
    sparsity = Sparsity(m=m, v=V)
    data = problem(gated, seed=m)
    expert = EXPERTS[distribution](m // 4)
    got = run(data, expert, sparsity, BETAS)
    assert_close(got, reference(data, expert, sparsity, BETAS), 1e-5)
    # Neurons of experts without tokens get exactly no gradient.
    idle = ~np.isin(np.arange(H) % m // 4, expert)
    assert idle.any() == (distribution == "all_to_last") or distribution == "skewed"
    assert not np.asarray(got[2])[idle].any()
    assert not np.asarray(got[3])[idle].any()


@pytest.mark.parametrize("gated", [False, True])
def test_ties_are_exact(gated):
    """Small integers: every product is exact, so that ties and zeros are as in the oracle."""
    sparsity = Sparsity(weights=False, m=16, v=V)
    data = problem(gated, integers=True)
    expert = EXPERTS["even"](4)
    got = run(data, expert, sparsity, None)
    for g, w in zip(got, reference(data, expert, sparsity, None), strict=True):
        if w is not None:
            np.testing.assert_array_equal(g, w)


@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16(gated):
    """Same bfloat16 inputs and packed weights: within the rounding of Y2 and its gradient."""
    sparsity = Sparsity(m=16, v=V)
    x, dy, w1, w2, wg = problem(gated)
    expert = EXPERTS["skewed"](4)
    x, dy = (np.asarray(jnp.array(a, jnp.bfloat16).astype(jnp.float32)) for a in (x, dy))
    got = run((x, dy, w1, w2, wg), expert, sparsity, BETAS, jnp.bfloat16)
    assert got[0].dtype == jnp.bfloat16
    assert got[1].dtype == jnp.bfloat16
    assert got[2].dtype == jnp.float32

    def multiplied(w, i):
        if w is None:
            return None
        packed = jnp.array(np.float32(BETAS[i]) * oracle_threshold(w), jnp.bfloat16)
        return np.asarray(packed.astype(jnp.float32)).astype(np.float64)

    weights = multiplied(w1, 0), multiplied(w2, 1), multiplied(wg, 2)
    y, gradients = oracle_ffn(x.astype(float), dy.astype(float), *weights, expert, sparsity)
    assert_close(got, [y, *gradients], 5e-3)


def test_choice_is_made_before_rounding():
    """Four activations that bfloat16 cannot tell apart: the two that are larger in float32 win."""
    x = jnp.zeros((1, D), jnp.bfloat16).at[0, :2].set(jnp.array([1.0, 2.0**-10], jnp.bfloat16))
    w1 = jnp.zeros((H, D)).at[:4, 0].set(1.0).at[2:4, 1].set(1.0)
    w2 = jnp.eye(H, D)
    sparsity = Sparsity(weights=False, routing=False)
    packed = pack_ffn(w1, w2, None, None, sparsity)
    y = routed_ffn(x, w1, w2, None, packed, None, sparsity)
    np.testing.assert_array_equal(y[0, :4], [0, 0, 1, 1])


@pytest.mark.parametrize("gated", [False, True])
def test_one_expert_and_nothing_sparse_is_the_dense_network(gated):
    x, dy, w1, w2, wg = problem(gated)
    sparsity = Sparsity(weights=False, activations=False, m=4, v=V)

    def dense(x, w1, w2, wg):
        r = jax.nn.relu(x @ w1.T)
        return (r * r if wg is None else r * r * (x @ wg.T)) @ w2

    y, vjp = jax.vjp(dense, x, w1, w2, wg)
    got = run((x, dy, w1, w2, wg), np.zeros(T), sparsity, None)
    assert_close(got, float64((y, *vjp(dy))), 1e-6)


def test_one_expert_with_and_without_routing_agree():
    data = problem(False)
    routed = run(data, np.zeros(T), Sparsity(m=4, v=V), BETAS)
    unrouted = run(data, np.zeros(T), Sparsity(routing=False, v=V), BETAS)
    for a, b in zip(routed, unrouted, strict=True):
        if a is not None:
            np.testing.assert_array_equal(a, b)


def test_gradients_are_those_of_finite_differences():
    """The oracle itself, and with it the op: smooth case, no selection and no threshold."""
    sparsity = Sparsity(weights=False, activations=False, m=16, v=V)
    data = float64(problem(True))
    expert = EXPERTS["even"](4)
    x, dy, *weights = data

    def oracle(x, w1, w2, wg):
        return oracle_ffn(x, dy, w1, w2, wg, expert, sparsity)

    _, gradients = oracle(x, *weights)
    rng = np.random.default_rng(0)
    inputs = [x, *weights]
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=inputs[i].shape)
        sides = []
        for sign in (1, -1):
            moved = list(inputs)
            moved[i] = inputs[i] + sign * 1e-5 * direction
            sides.append(np.sum(dy * oracle(*moved)[0]))
        numeric = (sides[0] - sides[1]) / 2e-5
        np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_what_is_saved_for_the_backward_pass(gated):
    """x once, T_pad h numbers, the plan and the packed weights; nothing of T x H or T_pad x D."""
    sparsity = Sparsity(m=16, v=V)
    x, _, w1, w2, wg = problem(gated)
    plan = plan_for(EXPERTS["even"](4), sparsity)
    assert plan is not None
    packed = pack_ffn(w1, w2, wg, jnp.array(BETAS), sparsity, dtype=jnp.float32)
    _, vjp = jax.vjp(
        partial(routed_ffn, packed=packed, plan=plan, sparsity=sparsity), x, w1, w2, wg
    )
    sizes = sorted(a.size for a in jax.tree.leaves(vjp) if jnp.issubdtype(a.dtype, jnp.floating))
    live = plan.permutation.size * H // 4
    activations = [live // 2, live // 2] if gated else [live]
    weights = [w.size for w in jax.tree.leaves(packed)]
    masters = [0] * (3 if gated else 2)
    assert sizes == sorted([T * D, *activations, *weights, *masters])


def test_repeatable_under_jit_remat_and_donation():
    sparsity = Sparsity(m=16, v=V)
    x, dy, w1, w2, _ = problem(False)
    plan = plan_for(EXPERTS["skewed"](4), sparsity)
    first = run((x, dy, w1, w2, None), EXPERTS["skewed"](4), sparsity, BETAS)
    again = run((x, dy, w1, w2, None), EXPERTS["skewed"](4), sparsity, BETAS)

    def step(weights: tuple[Array, Array], remat: bool):
        packed = pack_ffn(*weights, None, jnp.array(BETAS), sparsity, dtype=jnp.float32)

        def f(x, w1, w2):
            return routed_ffn(x, w1, w2, None, packed, plan, sparsity)

        y, vjp = jax.vjp(jax.checkpoint(f) if remat else f, x, *weights)
        return y, *vjp(dy)

    step_jit = jax.jit(step, static_argnums=1, donate_argnums=0)
    plain = step_jit((jnp.array(w1), jnp.array(w2)), False)
    remat = step_jit((jnp.array(w1), jnp.array(w2)), True)
    for a, b, c, d in zip(first[:4], again[:4], plain, remat, strict=True):
        np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(a, d)


def test_packed_layout():
    sparsity = Sparsity(m=16)
    _, _, w1, w2, wg = problem(True)
    packed = pack_ffn(w1, w2, wg, jnp.array(BETAS), sparsity)
    assert packed.w1.dense.dtype == jnp.bfloat16
    for e in range(4):
        own = np.arange(H) % 16 // 4 == e
        want = BETAS[1] * oracle_threshold(w2)[own]
        np.testing.assert_array_equal(packed.w2.dense[e], jnp.array(want, jnp.bfloat16))
        want = BETAS[2] * oracle_threshold(wg)[own]
        np.testing.assert_array_equal(packed.wg.dense[e], jnp.array(want, jnp.bfloat16))
    groups = np.asarray(packed.w1.dense).reshape(4, H // 4, D // 4, 4)
    assert (np.sum(groups != 0, axis=-1) <= 2).all()


def test_bad_arguments():
    sparsity = Sparsity(m=16, v=V)
    x, _, w1, w2, wg = problem(True)
    betas = jnp.array(BETAS)
    packed = pack_ffn(w1, w2, None, betas, sparsity, dtype=jnp.float32)
    plan = plan_for(EXPERTS["even"](4), sparsity)

    def call(x=x, w1=w1, w2=w2, wg=None, packed=packed, plan=plan, sparsity=sparsity):
        return routed_ffn(x, w1, w2, wg, packed, plan, sparsity)

    call()
    for message, arguments in {
        "x.shape": {"x": x[:, :8]},
        "w2.shape": {"w2": w2[:8]},
        "both have a gate": {"wg": wg},
        "packed dtype": {"packed": jax.tree.map(lambda w: w.astype(jnp.bfloat16), packed)},
        "must hold 4 experts": {"packed": jax.tree.map(lambda w: w[:2], packed)},
        "plan is needed": {"plan": None},
        "permutation.shape": {"sparsity": replace(sparsity, v=2 * V)},
        "tokens24'?": {"sparsity": replace(sparsity, weight_gradient="mvue24")},
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**arguments)
    with pytest.raises(ValueError, match="betas"):
        pack_ffn(w1, w2, None, None, sparsity)
    with pytest.raises(NotImplementedError, match="hopper"):
        pack_ffn(w1, w2, None, betas, replace(sparsity, backend="hopper"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"m": 12}, "m=12"),
        ({"n": 1}, "n=1"),
        ({"v": 0}, "v=0"),
        ({"v": 48}, "tokens=128"),
        ({"metric": "dot"}, "metric='dot'"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"weight_gradient": "tokens24", "v": 2}, "v=2 must be a multiple of 4"),
        ({"dense_neurons": 1.5}, "dense_neurons=1.5"),
        ({"dense_neurons": float("nan")}, "dense_neurons=nan"),
        ({"weight_gradient": "none"}, "weight_gradient='none'"),
        ({"refresh_every": -1}, "refresh_every=-1"),
        ({"kmeans_iterations": 0}, "kmeans_iterations=0"),
        ({"bias_rate": float("nan")}, "bias_rate=nan"),
        ({"m": 32}, "hidden=48"),
        ({"width": 18}, "width=18"),
    ],
)
def test_sparsity_refuses_what_cannot_work(changes, message):
    sizes = {"width": changes.pop("width", 16), "hidden": 48, "tokens": 128}
    Sparsity().validate(**{**sizes, "width": 16})
    with pytest.raises(ValueError, match=message) as caught:
        Sparsity(**changes).validate(**sizes)
    assert "\n" not in str(caught.value)


def test_sparsity_counts():
    assert Sparsity(m=32).num_experts == 8
    assert Sparsity(m=32).live_neurons(128) == 16
    assert Sparsity(m=32).density == 2 / 32
    assert Sparsity(routing=False).num_experts == 1
    assert Sparsity(routing=False).density == 0.5
    assert Sparsity(activations=False, m=8).density == 0.5
    assert Sparsity(m=16).densest(2048) == 103
    assert Sparsity(m=16, dense_neurons=0.1).densest(300) == 30
    assert Sparsity(m=4, dense_neurons=0).densest(1024) == 0
