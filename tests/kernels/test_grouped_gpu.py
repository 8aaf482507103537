"""The grouped kernels of each backend against the definitions, on the same 16-bit inputs."""

import importlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference, reference_grouped, registry

pytestmark = pytest.mark.gpu

BACKENDS = ("hopper", "triton")
TIE = 1e-5  # relative; closer magnitudes may be ranked either way
FROBENIUS = 5e-3
SIZES = [
    # tokens of each expert, D, h
    ([300, 0, 129, 700], 192, 256),
    ([128, 1], 64, 128),
    ([0, 0, 1000], 512, 384),
    ([2000, 2100], 1024, 512),
    # As many experts as M = 64 has.
    ([130, 0, 300, 1, 0, 128, 77, 5, 600, 0, 0, 129, 2, 64, 256, 31], 256, 256),
    # Enough for large tiles.
    ([5000, 100, 0, 6000], 1024, 2048),
]
CASES = [
    *((backend, *sizes, 128) for backend in BACKENDS for sizes in SIZES),
    # What only one of them serves.
    ("triton", [70, 0, 129, 300], 320, 192, 64),
]


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def load(backend: registry.Backend) -> Any:
    """The backend's module. Skips the test where the device cannot run it."""
    if backend not in registry.available_backends():
        pytest.skip(f"{backend} does not run on {jax.devices()[0].device_kind}")
    return importlib.import_module(f"kernels.{backend}.grouped24")


def layout(counts: list[int], v: int, unused: int = 2) -> tuple[jax.Array, jax.Array, int]:
    """offsets, block_expert and T_pad for so many tokens of each expert, and unused blocks."""
    blocks = [-(-c // v) for c in counts]
    experts = [e for e, n in enumerate(blocks) for _ in range(n)] + [len(counts) - 1] * unused
    offsets = np.concatenate([[0], np.cumsum(blocks)]) * v
    return jnp.asarray(offsets, jnp.int32), jnp.asarray(experts, jnp.int32), len(experts) * v


def distance(actual: jax.Array, expected: jax.Array) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / max(np.linalg.norm(expected), 1e-30))


def same(a: jax.Array, b: jax.Array) -> bool:
    return np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


class Problem:
    """Inputs of a case, in both orders of the weights' rows."""

    def __init__(self, backend: registry.Backend, counts: list[int], width: int, live: int, v: int):
        self.backend, self.functions = backend, load(backend)
        self.experts, self.live, self.width = len(counts), live, width
        self.offsets, self.block_expert, self.rows = layout(counts, v)
        self.used = int(self.offsets[-1])
        self.layout = (self.offsets, self.block_expert)
        self.w = draw(0, self.experts * live, width) * width**-0.5
        options = {"num_experts": self.experts, "m": 4 * self.experts, "scale": 1.5}
        self.reference = reference_grouped.pack_weight24(self.w, **options)
        self.packed = self.functions.pack_weight24(self.w, **options)
        unused = jnp.arange(self.rows)[:, None] >= self.used
        # What lies in unused rows must not matter.
        self.x, self.dy = (
            jnp.where(unused, jnp.nan, draw(seed, self.rows, width)).astype(jnp.bfloat16)
            for seed in (1, 2)
        )

    def by_expert(self, x: jax.Array, contract: str) -> np.ndarray:
        """Used rows of x (T_pad, k) times their expert's dense weight, in float32."""
        dense = self.reference[2].astype(jnp.float32)
        out = []
        for e in range(self.experts):
            own = x[int(self.offsets[e]) : int(self.offsets[e + 1])].astype(jnp.float32)
            product = jnp.einsum(contract, own, dense[e], precision="highest")
            out.append(np.asarray(product))
        return np.concatenate(out)


@pytest.fixture(
    scope="module", params=CASES, ids=lambda c: f"{c[0]}-D{c[2]}-h{c[3]}-E{len(c[1])}-V{c[4]}"
)
def problem(request):
    return Problem(*request.param)


def test_pack(problem):
    values, metadata, dense = problem.packed
    assert same(dense, problem.reference[2])
    unpacked = reference.unpack24(values, metadata).reshape(dense.shape)
    assert same(unpacked, dense[:, problem.functions.row_order(problem.live)])


def test_up(problem):
    y2, values, metadata = problem.functions.up24(*problem.packed[:2], problem.x, *problem.layout)
    assert same(reference.unpack24(values, metadata), y2)
    assert not np.asarray(y2[problem.used :], np.float32).any()

    full = np.maximum(problem.by_expert(problem.x, "td,hd->th"), 0) ** 2
    positions = np.stack(reference._unpack_metadata(metadata), axis=-1)[: problem.used]
    kept = np.zeros((problem.used, problem.live // 4, 4), bool)
    np.put_along_axis(kept, positions, True, axis=-1)
    groups = full.reshape(kept.shape)
    smallest = np.where(kept, groups, np.inf).min(-1)
    largest = np.where(kept, -np.inf, groups).max(-1)
    scale = TIE * np.sqrt(np.mean(full**2))
    assert (largest <= smallest * (1 + TIE) + scale).all()
    assert distance(y2[: problem.used], np.where(kept, groups, 0).reshape(full.shape)) < FROBENIUS


def test_up_linear(problem):
    y = problem.functions.up24_linear(*problem.packed[:2], problem.x, *problem.layout)
    assert y.dtype == problem.x.dtype
    assert distance(y[: problem.used], problem.by_expert(problem.x, "td,hd->th")) < FROBENIUS
    assert not np.asarray(y[problem.used :], np.float32).any()


def test_packing_of_what_is_dense(problem):
    """`pack24`, which the gated form packs with, makes what `down24` takes."""
    y2, _, _ = problem.functions.up24(*problem.packed[:2], problem.x, *problem.layout)
    values, metadata = registry.pack24(
        y2, axis=1, mode="magnitude", dtype=y2.dtype, backend=problem.backend
    )
    assert same(reference.unpack24(values, metadata), y2)
    out = problem.functions.down24(values, metadata, problem.packed[2], *problem.layout)
    assert distance(out[: problem.used], problem.by_expert(y2, "th,hd->td")) < FROBENIUS


def test_ties_keep_the_lower_index(problem):
    # Equal weights make the four neurons of a group equal.
    w = jnp.repeat(problem.w[::4], 4, axis=0)
    packed = problem.functions.pack_weight24(
        w, num_experts=problem.experts, m=4 * problem.experts, scale=None
    )
    _, _, metadata = problem.functions.up24(*packed[:2], problem.x, *problem.layout)
    assert (np.asarray(metadata) == 0x44444444).all()


def test_down(problem):
    _, values, metadata = problem.functions.up24(*problem.packed[:2], problem.x, *problem.layout)
    dense = problem.packed[2]
    out = problem.functions.down24(values, metadata, dense, *problem.layout)
    y = reference.unpack24(values, metadata)
    assert distance(out[: problem.used], problem.by_expert(y, "th,hd->td")) < FROBENIUS
    assert not np.asarray(out[problem.used :], np.float32).any()


def test_down_by_token(problem):
    _, values, metadata = problem.functions.up24(*problem.packed[:2], problem.x, *problem.layout)
    operands = (values, metadata, problem.packed[2], *problem.layout)
    tokens = problem.used - 3
    permutation = np.full(problem.rows, tokens, np.int32)
    shuffled = np.random.default_rng(3).permutation(problem.used)
    permutation[: problem.used] = np.minimum(shuffled, tokens)
    out = problem.functions.down24(*operands, permutation=jnp.asarray(permutation), tokens=tokens)
    by_row = np.asarray(problem.functions.down24(*operands), np.float32)
    expected = np.zeros((tokens, problem.width), np.float32)
    kept = permutation < tokens
    expected[permutation[kept]] = by_row[kept]
    assert np.array_equal(np.asarray(out, np.float32), expected)


def test_up_backward(problem):
    y2, _, metadata = problem.functions.up24(*problem.packed[:2], problem.x, *problem.layout)
    dy1, values = problem.functions.up24_backward(
        *problem.packed[:2], problem.dy, y2, metadata, *problem.layout
    )
    assert same(reference.unpack24(values, metadata), dy1)
    assert not np.asarray(dy1[problem.used :], np.float32).any()
    root = np.sqrt(np.asarray(y2, np.float32)[: problem.used])
    expected = 2 * root * problem.by_expert(problem.dy, "td,hd->th")
    assert distance(dy1[: problem.used], expected) < FROBENIUS


def test_weight_gradient(problem):
    y2, _, _ = problem.functions.up24(*problem.packed[:2], problem.x, *problem.layout)
    out = problem.functions.weight_gradient(
        y2, problem.dy, problem.offsets, num_experts=problem.experts
    )
    expected = reference_grouped.weight_gradient(
        y2, problem.dy, problem.offsets, num_experts=problem.experts
    )
    assert distance(out, expected) < 1e-4
    for e in range(problem.experts):
        if int(problem.offsets[e]) == int(problem.offsets[e + 1]):
            assert not np.asarray(reference_grouped.expert_major(out, problem.experts)[e]).any()


@pytest.mark.parametrize("share", [0.0, 0.05, 0.6])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weight_gradient_along_tokens(problem, share, dtype):
    functions = problem.functions
    if not hasattr(functions, "weight_gradient24"):
        pytest.skip("the backend has no such function")
    y2, _, _ = functions.up24(*problem.packed[:2], problem.x, *problem.layout)
    # Of either sign, as dY1 is, and with ties.
    sign = jnp.where(draw(4, *y2.shape) < 0, -1, 1)
    y = (sign * y2.astype(jnp.float32)).at[:, ::7].set(jnp.round(draw(5, *y2.shape))[:, ::7])
    unused = jnp.arange(problem.rows)[:, None] >= problem.used
    y = jnp.where(unused, jnp.nan, y).astype(dtype)
    counts = reference_grouped.nonzeros(y, problem.offsets, 128)
    densest = reference_grouped.densest_neurons(counts, round(share * problem.live))
    operands = (y, problem.dy.astype(dtype), problem.offsets, densest)
    run = jax.jit(lambda *a: functions.weight_gradient24(*a, num_experts=problem.experts))
    out = run(*operands)
    expected = reference_grouped.weight_gradient24(*operands, num_experts=problem.experts)
    assert distance(out, expected) < 1e-4
    for _ in range(5):
        poison = jax.block_until_ready(jnp.full(out.shape, 77, out.dtype))
        del poison
        assert same(run(*operands), out)


def everything(problem, x, dy):
    packed = problem.functions.pack_weight24(
        problem.w, num_experts=problem.experts, m=4 * problem.experts, scale=1.5
    )
    y2, values, metadata = problem.functions.up24(*packed[:2], x, *problem.layout)
    y3 = problem.functions.down24(values, metadata, packed[2], *problem.layout)
    dy1, dy1_values = problem.functions.up24_backward(
        *packed[:2], dy, y2, metadata, *problem.layout
    )
    dx = problem.functions.down24(dy1_values, metadata, packed[2], *problem.layout)
    gradients = [
        problem.functions.weight_gradient(*pair, problem.offsets, num_experts=problem.experts)
        for pair in ((y2, dy), (dy1, x))
    ]
    y = problem.functions.up24_linear(*packed[:2], x, *problem.layout)
    return *packed, y, y2, values, metadata, y3, dy1, dy1_values, dx, *gradients


def test_repeatable(problem):
    run = jax.jit(lambda x, dy: everything(problem, x, dy))
    first = run(problem.x, problem.dy)
    # Memory that results are written to next holds garbage meanwhile.
    for _ in range(5):
        poison = [jnp.full(a.shape, 77, a.dtype) for a in first]
        jax.block_until_ready(poison)
        del poison
        for a, b in zip(first, run(problem.x, problem.dy), strict=True):
            assert same(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_float16(backend):
    p = Problem(backend, [300, 129], 128, 256, 128)
    grouped24 = p.functions
    options = {"num_experts": 2, "m": 8, "scale": 1.5, "dtype": jnp.float16}
    values, metadata, dense = grouped24.pack_weight24(p.w, **options)
    x = p.x.astype(jnp.float16)
    y2, y2_values, y2_metadata = grouped24.up24(values, metadata, x, *p.layout)
    assert same(reference.unpack24(y2_values, y2_metadata), y2)
    y = grouped24.up24_linear(values, metadata, x, *p.layout)
    w = reference_grouped.pack_weight24(p.w, **options)
    assert distance(y, reference_grouped.up24_linear(*w[:2], x, *p.layout)) < FROBENIUS
    y3 = grouped24.down24(y2_values, y2_metadata, dense, *p.layout)
    expected = reference_grouped.down24(y2_values, y2_metadata, dense, *p.layout)
    assert distance(y3, expected) < FROBENIUS
    dy1, _ = grouped24.up24_backward(
        values, metadata, p.dy.astype(jnp.float16), y2, y2_metadata, *p.layout
    )
    expected, _ = reference_grouped.up24_backward(
        *w[:2], p.dy.astype(jnp.float16), y2, y2_metadata, *p.layout
    )
    assert distance(dy1, expected) < FROBENIUS
