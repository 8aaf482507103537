"""The grouped kernels of 8-bit floats against their definitions, on the same 8-bit inputs."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference_fp8, reference_grouped_fp8, registry
from sparsejax.ops import pack_ffn, routed_ffn
from sparsejax.prune import soft_threshold_beta
from sparsejax.routing import plan_tokens
from sparsejax.spec import Sparsity
from tests.kernels.test_grouped_gpu import distance, draw, layout, same

pytestmark = pytest.mark.gpu

E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
# Tensor cores add 8-bit products with about 14 bits: squares that differ by less may be ranked
# either way.
TIE = 1e-2
FROBENIUS = 1e-2
CASES = [
    # tokens of each expert, D, h
    ([300, 0, 129, 700], 256, 256),
    ([128, 1], 512, 128),
    ([0, 0, 1000], 512, 384),
    ([2000, 2100], 1024, 512),
    # Enough for large tiles.
    ([5000, 100, 0, 6000], 1024, 2048),
]


class Problem:
    """Inputs of a case."""

    def __init__(self, counts: list[int], width: int, live: int):
        if "hopper" not in registry.available_backends():
            pytest.skip(f"hopper does not run on {jax.devices()[0].device_kind}")
        self.functions = importlib.import_module("kernels.hopper.grouped24_fp8")
        self.experts, self.live, self.width = len(counts), live, width
        self.offsets, self.block_expert, self.rows = layout(counts, 128)
        self.used = int(self.offsets[-1])
        self.layout = (self.offsets, self.block_expert)
        self.w = draw(0, self.experts * live, width) * width**-0.5
        options = {"num_experts": self.experts, "m": 4 * self.experts, "scale": jnp.float32(64)}
        self.reference = reference_grouped_fp8.pack_weight24_fp8(self.w, **options)
        self.packed = self.functions.pack_weight24_fp8(self.w, **options)
        unused = jnp.arange(self.rows)[:, None] >= self.used
        # What lies in unused rows must not matter.
        self.x, self.dy = (
            jnp.where(unused, jnp.nan, 8 * draw(seed, self.rows, width)).astype(dtype)
            for seed, dtype in ((1, E4M3), (2, E5M2))
        )
        exponents = jax.random.randint(jax.random.key(3), (self.rows, 2), -3, 3)
        # Y2 near 1, and dY1 near it.
        factors = 2.0**exponents * jnp.array([2.0**-18, 4.0])
        self.factors = jnp.where(unused, jnp.nan, factors.astype(jnp.float32))
        self.scale = self.factors[:, 1]

    def up(self):
        return self.functions.up24_fp8(*self.packed[:2], self.x, self.factors, *self.layout)

    def backward(self, y2, metadata):
        factors = self.factors * jnp.array([2.0**9, 1.0])
        arguments = (self.dy, factors, y2, metadata, *self.layout)
        ours = self.functions.up24_backward_fp8(*self.packed[:2], *arguments)
        return ours, reference_grouped_fp8.up24_backward_fp8(*self.reference[:2], *arguments)


@pytest.fixture(
    scope="module", params=CASES, ids=lambda c: f"D{c[1]}-h{c[2]}-E{len(c[0])}"
)  # fmt: skip
def problem(request):
    return Problem(*request.param)


def unpack(values, metadata):
    return reference_fp8.unpack24_fp8(values, metadata)


def test_pack(problem):
    values, metadata, columns = problem.packed
    assert same(columns, problem.reference[2])
    unpacked = unpack(values, metadata).reshape(problem.experts, problem.live, -1)
    order = problem.functions.row_order(problem.live)
    assert same(unpacked, columns.swapaxes(1, 2)[:, order])


def test_columns_are_packed_apart_where_they_live(problem):
    """Devices of a mesh pack what they store: multiples of 64, though products want 256."""
    m, scale = 4 * problem.experts, jnp.float32(64)
    pack = lambda w: problem.functions.pack_weight24_fp8(
        w, num_experts=problem.experts, m=m, scale=scale
    )
    parts = [pack(problem.w[:, :64]), pack(problem.w[:, 64:])]
    for whole, *joined in zip(problem.packed, *parts, strict=True):
        assert same(jnp.concatenate(joined, axis=1), whole)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("tokens", "width"), [(700, 256), (1000, 2048), (130, 8192)])
def test_stack(dtype, tokens, width):
    p = Problem([128], 256, 128)
    x = draw(4, tokens, width) * 2.0 ** jnp.round(8 * draw(5, tokens, 1))
    x = x.at[3].set(0).at[5, 7].set(jnp.inf).at[6, 0].set(jnp.nan).astype(jnp.bfloat16)
    rows = -(-tokens // 128) * 128 + 128
    shuffled = np.random.default_rng(6).permutation(rows)
    order = jnp.asarray(np.minimum(shuffled, tokens), jnp.int32)
    ours = p.functions.stack_fp8(x, order, dtype=dtype)
    expected = reference_grouped_fp8.stack_fp8(x, order, dtype=dtype)
    for a, b in zip(ours[:3], expected[:3], strict=True):
        np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))
    np.testing.assert_allclose(ours[3], expected[3], rtol=1e-5)


def test_up(problem):
    y2, values, metadata = problem.up()
    assert not np.asarray(y2[problem.used :], np.float32).any()
    packed = np.asarray(unpack(values, metadata), np.float32)
    assert not packed[problem.used :].any()
    # The packed values are the dense ones, rounded once more.
    factors = np.asarray(problem.factors)[: problem.used]
    dense = np.asarray(y2[: problem.used], np.float32)
    again = reference_fp8.round_fp8(dense * factors[:, 1:], E4M3)
    np.testing.assert_array_equal(packed[: problem.used], np.asarray(again, np.float32))

    full = []
    w = np.asarray(problem.reference[2], np.float32)
    for e in range(problem.experts):
        own = slice(int(problem.offsets[e]), int(problem.offsets[e + 1]))
        full.append(np.asarray(problem.x[own], np.float32) @ w[e])
    full = np.maximum(np.concatenate(full), 0) ** 2 * factors[:, :1]
    positions = np.stack(reference_fp8.unpack_metadata(metadata), axis=-1)[: problem.used]
    kept = np.zeros((problem.used, problem.live // 4, 4), bool)
    np.put_along_axis(kept, positions, True, axis=-1)
    groups = full.reshape(kept.shape)
    smallest = np.where(kept, groups, np.inf).min(-1)
    largest = np.where(kept, -np.inf, groups).max(-1)
    slack = TIE * np.sqrt(np.mean(full**2, axis=1, keepdims=True))
    assert (largest <= smallest * (1 + TIE) + slack).all()
    # Squares: twice the error of what is squared.
    assert distance(dense, np.where(kept, groups, 0).reshape(full.shape)) < 2 * FROBENIUS


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("gradient", [False, True])
def test_down(problem, by_token, gradient):
    y2, values, metadata = problem.up()
    if gradient:
        (_, values), _ = problem.backward(y2, metadata)
        assert values.dtype == E5M2
    options = {}
    if by_token:
        tokens = problem.used - 3
        permutation = np.full(problem.rows, tokens, np.int32)
        shuffled = np.random.default_rng(3).permutation(problem.used)
        permutation[: problem.used] = np.minimum(shuffled, tokens)
        options = {"permutation": jnp.asarray(permutation), "tokens": tokens}
    arguments = (values, metadata, problem.packed[2], problem.scale, *problem.layout)
    out = problem.functions.down24_fp8(*arguments, **options)
    expected = reference_grouped_fp8.down24_fp8(*arguments, **options)
    assert distance(out, expected) < FROBENIUS
    if not by_token:
        assert not np.asarray(out[problem.used :], np.float32).any()


def test_up_backward(problem):
    y2, _, metadata = problem.up()
    (dy1, values), (expected, _) = problem.backward(y2, metadata)
    assert not np.asarray(dy1[problem.used :], np.float32).any()
    assert distance(dy1, expected) < FROBENIUS
    dense = np.asarray(dy1, np.float32)[: problem.used]
    factors = np.asarray(problem.factors)[: problem.used]
    again = reference_fp8.round_fp8(dense * factors[:, 1:], E5M2)
    packed = np.asarray(unpack(values, metadata), np.float32)[: problem.used]
    np.testing.assert_array_equal(packed, np.asarray(again, np.float32))


def test_repeatable(problem):
    def everything(x, dy):
        packed = problem.functions.pack_weight24_fp8(
            problem.w, num_experts=problem.experts, m=4 * problem.experts, scale=jnp.float32(64)
        )
        y2, values, metadata = problem.functions.up24_fp8(
            *packed[:2], x, problem.factors, *problem.layout
        )
        down = lambda v: problem.functions.down24_fp8(
            v, metadata, packed[2], problem.scale, *problem.layout
        )
        dy1, dy1_values = problem.functions.up24_backward_fp8(
            *packed[:2], dy, problem.factors, y2, metadata, *problem.layout
        )
        return *packed, y2, values, metadata, down(values), dy1, dy1_values, down(dy1_values)

    run = jax.jit(everything)
    first = run(problem.x, problem.dy)
    # Memory that results are written to next holds garbage meanwhile.
    for _ in range(5):
        poison = [jnp.full(a.shape, 77, a.dtype) for a in first]
        jax.block_until_ready(poison)
        del poison
        for a, b in zip(first, run(problem.x, problem.dy), strict=True):
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("option", ["dense", "tokens24"])
def test_network(option):
    """All of it against the definition's, on the same device."""
    Problem([128], 256, 128)  # skips where there is no such device
    d, hidden, tokens, experts = 512, 2048, 1500, 4
    x, dy = (draw(seed, tokens, d).astype(jnp.bfloat16) for seed in (1, 2))
    w1, w2 = draw(3, hidden, d) * d**-0.5, draw(4, hidden, d) * hidden**-0.5
    betas = jnp.stack([soft_threshold_beta(w1), soft_threshold_beta(w2), jnp.float32(1)])
    expert = jax.random.randint(jax.random.key(5), (tokens,), 0, experts)
    plan = plan_tokens(expert, experts, 128, spread=option == "tokens24")

    def run(backend, precision):
        sparsity = Sparsity(m=16, v=128, backend=backend, weight_gradient=option)

        @jax.jit
        def step(x, dy, w1, w2):
            packed = pack_ffn(w1, w2, None, betas, sparsity, precision=precision)
            assert packed.kernels == backend
            y, vjp = jax.vjp(lambda *a: routed_ffn(*a, None, packed, plan, sparsity), x, w1, w2)
            return y, *vjp(dy)

        return step(x, dy, w1, w2)

    ours, expected = run("hopper", "fp8"), run("reference", "fp8")
    exact = run("hopper", "compute")
    for a, b, c in zip(ours, expected, exact, strict=True):
        assert np.isfinite(np.asarray(a, np.float32)).all()
        # Sums of fewer bits turn some choices of two of four: much less than 8 bits themselves do.
        assert distance(a, b) < 0.05
        assert 0.01 < distance(a, c) < 0.2
