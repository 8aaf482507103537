"""Products of several shards at once: definition, order of tokens, Triton's kernels interpreted,
and what Hopper's kernels index.

A token meets one expert in each shard; tokens of one combination of experts lie together.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import combinations as combinations_of
from kernels import reference, reference_grouped
from kernels.hopper import grouped24, grouped_dw
from kernels.registry import assume_capability
from kernels.triton import grouped24 as triton
from kernels.triton.spmm24 import Spmm24Config
from sparsejax.routing import combine, counts_by_shard, plan_tokens
from tests.kernels.test_grouped_reference import layout
from tests.kernels.test_triton import an_h100

V, WIDTH, OF_SHARD = 64, 64, 64


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


class Problem:
    """Weights of S shards, shard by shard and all together, and tokens with an expert in each."""

    def __init__(self, experts: int, shards: int, tokens: int = 300):
        self.experts, self.shards = experts, shards
        options = {"num_experts": experts, "m": 4 * experts, "scale": 1.5, "dtype": jnp.float32}
        self.single = [
            reference_grouped.pack_weight24(draw(s, experts * OF_SHARD, WIDTH), **options)
            for s in range(shards)
        ]
        self.packed = [jnp.concatenate(parts) for parts in zip(*self.single, strict=True)]
        rng = np.random.default_rng(experts)
        self.chosen = rng.integers(0, experts, (shards, tokens)).astype(np.int32)
        self.chosen[0] = 0  # an expert without tokens, and combinations
        self.plan = plan_tokens(combine(list(self.chosen), experts), experts**shards, V)
        self.layout = self.plan.offsets, self.plan.block_expert
        self.tokens = tokens
        self.x, self.dy = (self.rows(draw(seed, tokens, WIDTH)) for seed in (11, 12))

    def rows(self, x: jax.Array) -> jax.Array:
        """Tokens in the order of the plan, NaN behind the last row in use."""
        x = x.at[self.plan.permutation].get(mode="fill", fill_value=0)
        used = jnp.arange(x.shape[0])[:, None] < self.plan.offsets[-1]
        return jnp.where(used, x, jnp.nan)

    def by_token(self, rows: jax.Array) -> jax.Array:
        return rows[self.plan.inverse]

    def alone(self, s: int):
        """One shard's plan of the same tokens, and `rows` and `by_token` for it."""
        plan = plan_tokens(jnp.asarray(self.chosen[s]), self.experts, V)
        to_rows = lambda x: x.at[plan.permutation].get(mode="fill", fill_value=0)
        return plan, to_rows, lambda rows: rows[plan.inverse]


@pytest.fixture(scope="module", params=[(2, 3), (4, 2), (2, 4), (3, 1)], ids=str)
def problem(request):
    return Problem(*request.param)


def test_products_are_those_of_the_shards_one_by_one(problem):
    kwargs = {"shards": problem.shards}
    packed, layout = problem.packed, problem.layout
    y2, values, metadata = reference_grouped.up24(*packed[:2], problem.x, *layout, **kwargs)
    linear = reference_grouped.up24_linear(*packed[:2], problem.x, *layout, **kwargs)
    down = reference_grouped.down24(values, metadata, packed[2], *layout, **kwargs)
    dy1, dy1_values = reference_grouped.up24_backward(
        *packed[:2], problem.dy, y2, metadata, *layout, **kwargs
    )
    gradient = reference_grouped.weight_gradient(
        dy1, problem.x, layout[0], num_experts=problem.experts, **kwargs
    )
    used = int(layout[0][-1])
    assert all(not np.asarray(a[used:]).any() for a in (y2, linear, down, dy1, dy1_values))

    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max())
    total = 0
    for s in range(problem.shards):
        plan, to_rows, by_token = problem.alone(s)
        own = slice(s * OF_SHARD, (s + 1) * OF_SHARD)
        x, dy = (to_rows(problem.by_token(a)) for a in (problem.x, problem.dy))
        weights, at = problem.single[s], (plan.offsets, plan.block_expert)
        y2_s, values_s, metadata_s = reference_grouped.up24(*weights[:2], x, *at)
        close(problem.by_token(y2[:, own]), by_token(y2_s))
        y_s = reference_grouped.up24_linear(*weights[:2], x, *at)
        close(problem.by_token(linear[:, own]), by_token(y_s))
        dy1_s, _ = reference_grouped.up24_backward(*weights[:2], dy, y2_s, metadata_s, *at)
        close(problem.by_token(dy1[:, own]), by_token(dy1_s))
        total += by_token(reference_grouped.down24(values_s, metadata_s, weights[2], *at))
        expected = reference_grouped.weight_gradient(
            dy1_s, x, plan.offsets, num_experts=problem.experts
        )
        rows = problem.experts * OF_SHARD
        close(gradient[s * rows : (s + 1) * rows], expected)
    close(problem.by_token(down), total)


def test_counts_of_shards_come_from_those_of_combinations(problem):
    counts = counts_by_shard(problem.plan.counts, problem.experts, problem.shards)
    each = [np.bincount(c, minlength=problem.experts) for c in problem.chosen]
    np.testing.assert_array_equal(counts, np.concatenate(each))


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_combinations_and_back(experts, shards, data):
    chosen = data.draw(st.lists(st.integers(0, experts - 1), min_size=shards, max_size=shards))
    (combination,) = combine([jnp.array([e], jnp.int32) for e in chosen], experts)
    assert 0 <= int(combination) < experts**shards
    found = [int(reference_grouped.expert_in(s, combination, experts)) for s in range(shards)]
    assert found == chosen
    numbers = reference_grouped.weight_rows(combination, experts, shards)
    assert [int(n) for n in numbers] == [s * experts + e for s, e in enumerate(chosen)]
    assert reference_grouped.experts_of(experts**shards, shards) == experts


@pytest.mark.parametrize(
    ("combinations", "shards", "message"),
    [(4, 0, "shards=0"), (6, 2, "combinations=6"), (2, 2, "combinations=2")],
)
def test_refuses_what_is_no_power(combinations, shards, message):
    with pytest.raises(ValueError, match=message):
        reference_grouped.experts_of(combinations, shards)


@pytest.mark.parametrize(("experts", "shards"), [(2, 4), (4, 2), (2, 1), (4, 3)])
def test_kernels_find_experts_and_their_runs(experts, shards):
    """What the kernels compute from scalars, against the definition."""
    combinations = experts**shards
    blocks = np.random.default_rng(0).integers(0, 3, combinations)
    offsets = jnp.asarray(np.concatenate([[0], np.cumsum(blocks)]) * grouped_dw.STEP, jnp.int32)
    covered = []
    for shard, expert in itertools.product(range(shards), range(experts)):
        own = combinations_of.power(jnp.int32(shard), experts, shards)
        runs = grouped_dw._Runs(jnp.int32(expert), own, experts, offsets)
        bounds = [runs.bounds(jnp.int32(j)) for j in range(experts ** (shards - 1))]
        found = {c for c in range(combinations)
                 if int(reference_grouped.expert_in(shard, c, experts)) == expert}  # fmt: skip
        assert {tuple(map(int, b)) for b in bounds} == {
            (int(offsets[c]), int(offsets[c + 1])) for c in found
        }
        covered.append(sum(int(b[1] - b[0]) for b in bounds))
    assert sum(covered) == shards * int(offsets[-1])
    for c, shard in itertools.product(range(combinations), range(shards)):
        number = combinations_of.expert_number(jnp.int32(c), jnp.int32(shard), experts, shards)
        assert int(number) == int(reference_grouped.weight_rows(c, experts, shards)[shard])


@pytest.mark.slow
@pytest.mark.parametrize(
    "warps_m",
    [
        pytest.param(1, id="tile-fits", marks=pytest.mark.processes),
        pytest.param(2, id="hangs-over"),
    ],
)
def test_triton_interpreted(warps_m):
    """Tiles of 64 and 128 neurons, of which a shard has 64; a combination without tokens."""
    experts, shards, counts = 2, 2, [70, 0, 64, 130]
    offsets, combination, rows = layout(counts)
    at, used = (offsets, combination), int(offsets[-1])
    options = {"num_experts": experts, "m": 4 * experts, "scale": 1.5}
    weights = [draw(s, experts * OF_SHARD, WIDTH) * WIDTH**-0.5 for s in range(shards)]
    pack = lambda one: [jnp.concatenate(p) for p in zip(*map(one, weights), strict=True)]
    packed = pack(lambda w: triton.pack_weight24(w, **options, interpret=True))
    definition = pack(lambda w: reference_grouped.pack_weight24(w, **options))
    unused = jnp.arange(rows)[:, None] >= used
    x, dy = (
        jnp.where(unused, jnp.nan, draw(seed, rows, WIDTH)).astype(jnp.bfloat16)
        for seed in (11, 12)
    )
    config = Spmm24Config(
        warps_m=warps_m, warps_n=4, frags_m=4, frags_n=4, block_k=32, stages=3, group_m=2
    )
    run = {"shards": shards, "config": config, "interpret": True}

    def close(actual, expected, tolerance=1e-3):
        actual, expected = (np.asarray(a, np.float64) for a in (actual, expected))
        assert np.linalg.norm(actual - expected) < tolerance * np.linalg.norm(expected)

    y2, values, metadata = triton.up24(*packed[:2], x, *at, **run)
    expected, *_ = reference_grouped.up24(*definition[:2], x, *at, shards=shards)
    close(y2, expected)
    np.testing.assert_array_equal(reference.unpack24(values, metadata), y2)
    assert (np.asarray(metadata)[used // 64 :] == 0x44444444).all()
    linear = triton.up24_linear(*packed[:2], x, *at, **run)
    close(linear, reference_grouped.up24_linear(*definition[:2], x, *at, shards=shards))
    down = triton.down24(values, metadata, packed[2], *at, **run)
    close(down, reference_grouped.down24(values, metadata, packed[2], *at, shards=shards))
    backward = (dy, y2, metadata, *at)
    dy1, dy1_values = triton.up24_backward(*packed[:2], *backward, **run)
    close(dy1, reference_grouped.up24_backward(*definition[:2], *backward, shards=shards)[0])
    np.testing.assert_array_equal(reference.unpack24(dy1_values, metadata), dy1)
    for out in (y2, values, linear, down, dy1, dy1_values):
        assert not np.asarray(out, np.float32)[used:].any()
    gradient = {"num_experts": experts, "shards": shards}
    dw = triton.weight_gradient(dy1, x, offsets, **gradient, interpret=True)
    close(dw, reference_grouped.weight_gradient(dy1, x, offsets, **gradient), 1e-5)


def shapes(width: int, hidden: int, tokens: int, m: int, shards: int, v: int = 128):
    """Arguments of the products, as shapes, and the shapes of their results."""
    experts = m // 4
    live, combinations = hidden // experts, experts**shards
    rows = -(-(tokens + combinations * (v - 1)) // v) * v
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    metadata = lambda m, k: array(m // 64, k // 64, 128, dtype=jnp.int32)
    layout = array(combinations + 1, dtype=jnp.int32), array(rows // v, dtype=jnp.int32)
    packed = array(hidden, width // 2), metadata(hidden, width)
    x, y, kept = array(rows, width), array(rows, live), metadata(rows, live)
    half, dense = array(rows, live // 2), array(shards * experts, live // shards, width)
    down = half, kept, dense, *layout
    outcome = (rows, live), (rows, live // 2)
    return {
        "up24": ((*packed, x, *layout), {}, (*outcome, kept.shape)),
        "up24_linear": ((*packed, x, *layout), {}, outcome[:1]),
        "down24": (down, {}, ((rows, width),)),
        "up24_backward": ((*packed, x, y, kept, *layout), {}, outcome),
        "weight_gradient": ((y, x, layout[0]), {"num_experts": experts}, ((hidden, width),)),
    }


@pytest.mark.core
@pytest.mark.parametrize(
    ("backend", "call"), [(grouped24, "mosaic_gpu"), (triton, "xla.gpu.triton")], ids=["h", "t"]
)
@pytest.mark.parametrize(
    "sizes", [(2048, 8192, 16384, 8, 4), (512, 2048, 8192, 16, 2), (64, 768, 300, 8, 3)], ids=str
)
def test_lowers_for_cuda(sizes, backend, call):
    for name, (args, options, expected) in shapes(*sizes).items():
        function, options = getattr(backend, name), options | {"shards": sizes[4]}
        with an_h100():
            trace = jax.jit(lambda *a, f=function, o=options: f(*a, **o)).trace(*args)
            assert call in trace.lower(lowering_platforms=("cuda",)).as_text()
        assert tuple(o.shape for o in jax.tree.leaves(trace.out_info)) == expected


@pytest.mark.parametrize(
    ("sizes", "message"),
    [((64, 512, 300, 8, 4), "live=64 "), ((64, 4096, 300, 32, 4), "combinations")],
)
def test_hopper_refuses(sizes, message):
    for name in ("up24", "down24", "up24_backward", "weight_gradient"):
        args, options, _ = shapes(*sizes)[name]
        check = getattr(grouped24, f"check_{name}")
        with assume_capability((9, 0)), pytest.raises(NotImplementedError, match=message):
            check(*args, **options, shards=sizes[4])
