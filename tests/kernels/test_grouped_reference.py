"""The definitions of the grouped products against plain numpy, neuron by neuron."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import reference, reference_grouped
from tests.kernels import oracle

pytestmark = pytest.mark.core

M, EXPERTS, LIVE, WIDTH, V = 8, 2, 64, 64, 64
HIDDEN = EXPERTS * LIVE


def layout(counts: list[int], v: int = V) -> tuple[jax.Array, jax.Array, int]:
    """offsets, block_expert and T_pad of blocks for so many tokens of each expert, one unused."""
    blocks = [-(-c // v) for c in counts]
    experts = [e for e, n in enumerate(blocks) for _ in range(n)] + [len(counts) - 1]
    offsets = np.concatenate([[0], np.cumsum(blocks)]) * v
    return jnp.asarray(offsets, jnp.int32), jnp.asarray(experts, jnp.int32), len(experts) * v


def neuron(e: int, local: int) -> int:
    """Row of the parameters that holds an expert's neuron."""
    return local // 4 * M + 4 * e + local % 4


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture(scope="module")
def weight():
    w = draw(0, HIDDEN, WIDTH)
    pruned, _ = oracle.prune(w, "soft_threshold")
    local = np.stack([[1.5 * pruned[neuron(e, n)] for n in range(LIVE)] for e in range(EXPERTS)])
    packed = reference_grouped.pack_weight24(
        jnp.asarray(w), num_experts=EXPERTS, m=M, scale=1.5, dtype=jnp.float32
    )
    return local, packed


def test_pack_weight(weight):
    local, (values, metadata, dense) = weight
    np.testing.assert_allclose(dense, local, rtol=1e-6)
    unpacked = reference.unpack24(values, metadata)
    np.testing.assert_array_equal(unpacked, np.asarray(dense).reshape(HIDDEN, WIDTH))


def test_pack_weight_without_threshold():
    w = draw(1, HIDDEN, WIDTH)
    values, metadata, dense = reference_grouped.pack_weight24(
        jnp.asarray(w), num_experts=EXPERTS, m=M, scale=2.0, threshold=False, dtype=jnp.float32
    )
    assert metadata is None
    np.testing.assert_array_equal(values, np.asarray(dense).reshape(HIDDEN, WIDTH))
    for e in range(EXPERTS):
        for n in range(LIVE):
            np.testing.assert_array_equal(dense[e, n], 2 * w[neuron(e, n)])


@pytest.mark.parametrize("counts", [[70, 50], [0, 128], [129, 0]])
def test_products(weight, counts):
    local, (values, metadata, dense) = weight
    offsets, block_expert, rows = layout(counts)
    used = int(offsets[-1])
    expert = np.repeat(np.asarray(block_expert), V)
    x, dy = draw(2, rows, WIDTH), draw(3, rows, WIDTH)
    x[used:], dy[used:] = np.nan, np.nan

    y2, y2_values, y2_metadata = reference_grouped.up24(
        values, metadata, jnp.asarray(x), offsets, block_expert
    )
    full = np.stack([np.maximum(local[expert[t]] @ x[t], 0) ** 2 for t in range(used)])
    expected, _ = oracle.prune(full, "value")
    np.testing.assert_allclose(y2[:used], expected, rtol=2e-4, atol=1e-4)
    np.testing.assert_array_equal(reference.unpack24(y2_values, y2_metadata), y2)

    y = reference_grouped.up24_linear(values, metadata, jnp.asarray(x), offsets, block_expert)
    expected = np.stack([local[expert[t]] @ x[t] for t in range(used)])
    np.testing.assert_allclose(y[:used], expected, rtol=2e-4, atol=1e-4)

    y3 = reference_grouped.down24(y2_values, y2_metadata, dense, offsets, block_expert)
    expected = np.stack([np.asarray(y2[t]) @ local[expert[t]] for t in range(used)])
    np.testing.assert_allclose(y3[:used], expected, rtol=1e-3, atol=1e-3)

    tokens = sum(counts)
    row_of = np.concatenate([int(o) + np.arange(c) for o, c in zip(offsets, counts, strict=False)])
    token = np.random.default_rng(4).permutation(tokens)
    permutation = np.full(rows, tokens, np.int32)
    permutation[row_of] = token
    by_token = reference_grouped.down24(
        y2_values,
        y2_metadata,
        dense,
        offsets,
        block_expert,
        permutation=jnp.asarray(permutation),
        tokens=tokens,
    )
    for row, t in zip(row_of, token, strict=True):
        np.testing.assert_array_equal(by_token[t], y3[row])

    dy1, dy1_values = reference_grouped.up24_backward(
        values, metadata, jnp.asarray(dy), y2, y2_metadata, offsets, block_expert
    )
    dy2 = np.stack([local[expert[t]] @ dy[t] for t in range(used)])
    expected = 2 * np.sqrt(np.asarray(y2[:used])) * dy2
    np.testing.assert_allclose(dy1[:used], expected, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(reference.unpack24(dy1_values, y2_metadata), dy1)

    dw = reference_grouped.weight_gradient(y2, jnp.asarray(dy), offsets, num_experts=EXPERTS)
    for e in range(EXPERTS):
        own = slice(int(offsets[e]), int(offsets[e + 1]))
        expected = np.asarray(y2)[own].T @ dy[own]
        neuron = np.arange(y2.shape[1])
        rows = neuron // 4 * (4 * EXPERTS) + 4 * e + neuron % 4
        np.testing.assert_allclose(np.asarray(dw)[rows], expected, rtol=1e-3, atol=1e-3)

    for out in (y, y2, y2_values, y3, dy1, dy1_values):
        assert not np.asarray(out)[used:].any()


def test_bad_arguments(weight):
    _, (values, metadata, dense) = weight
    offsets, block_expert, rows = layout([64, 64])
    x = jnp.zeros((rows, WIDTH), jnp.float32)
    with pytest.raises(ValueError, match="m=12"):
        reference_grouped.pack_weight24(jnp.zeros((96, 64)), num_experts=2, m=12, scale=None)
    with pytest.raises(ValueError, match=r"^x\.shape"):
        reference_grouped.up24(values, metadata, x[:, :32], offsets, block_expert)
    half = x.astype(jnp.bfloat16)
    with pytest.raises(ValueError, match=r"^x\.dtype"):
        reference_grouped.up24_linear(values, metadata, half, offsets, block_expert)
    with pytest.raises(ValueError, match="int32"):
        reference_grouped.up24(values, metadata, x, offsets.astype(float), block_expert)
    with pytest.raises(ValueError, match="rows"):
        reference_grouped.up24(values, metadata, x[:-1], offsets, block_expert)
    with pytest.raises(ValueError, match=r"^w\.shape"):
        reference_grouped.down24(values, metadata, dense[:1], offsets, block_expert[:2])
    with pytest.raises(ValueError, match="both or neither"):
        reference_grouped.down24(values, metadata, dense, offsets, block_expert[:2], tokens=3)
    with pytest.raises(ValueError, match=r"^y2\.shape"):
        reference_grouped.up24_backward(
            values, metadata, x, x[:, :32], metadata, offsets, block_expert
        )
    with pytest.raises(ValueError, match=r"^offsets\.shape"):
        reference_grouped.weight_gradient(x, x, offsets, num_experts=3)


def two_of_four(column: np.ndarray) -> np.ndarray:
    """A neuron's rows with two of each four in a row kept, by a stable sort."""
    out = np.zeros_like(column)
    for first in range(0, column.size, 4):
        best = sorted(range(first, first + 4), key=lambda t: -abs(column[t]))[:2]
        out[best] = column[best]
    return out


@pytest.mark.parametrize("number", [0, 5, LIVE])
@pytest.mark.parametrize("counts", [[70, 50], [0, 128]])
def test_weight_gradient_along_tokens(counts, number):
    offsets, _, rows = layout(counts)
    used = int(offsets[-1])
    y, g = draw(5, rows, LIVE), draw(6, rows, WIDTH)
    y[draw(7, rows, LIVE) < 0.5] = 0
    # Small integers: ties, and densities that differ.
    y[:, :8] = np.round(y[:, :8])
    y[used:], g[used:] = np.nan, np.nan
    found = reference_grouped.nonzeros(jnp.asarray(y), offsets, V)
    densest = reference_grouped.densest_neurons(found, number)
    assert densest.shape == (EXPERTS, number)
    out = reference_grouped.weight_gradient24(
        jnp.asarray(y), jnp.asarray(g), offsets, densest, num_experts=EXPERTS
    )
    for e in range(EXPERTS):
        own = slice(int(offsets[e]), int(offsets[e + 1]))
        nonzero = (y[own] != 0).sum(axis=0)
        np.testing.assert_array_equal(found[e], nonzero)
        whole = sorted(range(LIVE), key=lambda n: -nonzero[n])[:number]
        assert sorted(whole) == sorted(np.asarray(densest[e]).tolist())
        for n in range(LIVE):
            column = y[own, n].astype(np.float64)
            a = column if n in whole else two_of_four(column)
            expected = a @ g[own].astype(np.float64)
            np.testing.assert_allclose(out[neuron(e, n)], expected, rtol=1e-4, atol=1e-4)


def test_bad_arguments_along_tokens():
    offsets, _, rows = layout([64, 64])
    y, densest = jnp.zeros((rows, LIVE)), jnp.zeros((EXPERTS, 3), jnp.int32)
    call = lambda y, densest: reference_grouped.weight_gradient24(
        y, y, offsets, densest, num_experts=EXPERTS
    )
    with pytest.raises(ValueError, match="multiple of 4"):
        call(y[:-1], densest)
    with pytest.raises(ValueError, match=r"^densest\.shape"):
        call(y, densest[:1])
    with pytest.raises(ValueError, match="int32"):
        call(y, densest.astype(float))
    with pytest.raises(ValueError, match="number=65"):
        reference_grouped.densest_neurons(jnp.zeros((EXPERTS, LIVE), jnp.int32), 65)
    with pytest.raises(ValueError, match="block=7"):
        reference_grouped.nonzeros(y, offsets, 7)
