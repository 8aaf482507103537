"""Neurons that all experts have, taken once: layouts, tiles of the weight gradient, lowering."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference_grouped, registry, shared_rows
from kernels.hopper import grouped24 as hopper
from kernels.hopper import grouped_dw_shared
from kernels.registry import assume_capability
from kernels.shared_rows import SharedRows
from sparsejax.ops import routed_ffn_grouped
from sparsejax.spec import Sparsity
from tests.kernels.test_grouped_dense_weights import draw, layout
from tests.kernels.test_triton import an_h100
from tests.sparsejax.test_shared_neurons import agrees_with_the_definition, kernels_called

E4 = SharedRows(experts=4, every=4, superblocks=32)


@given(experts=st.sampled_from([2, 4, 8]), every=st.integers(2, 5), count=st.integers(1, 4))
def test_sizes_follow_from_either_number(experts, every, count):
    sizes = SharedRows(experts, every, count)
    assert shared_rows.of_hidden(sizes.hidden, experts, every) == sizes
    assert shared_rows.of_live(sizes.live, experts, every) == sizes
    spec = Sparsity(m=sizes.m, shared_every=every)
    assert spec.live_neurons(sizes.hidden) == sizes.live
    assert spec.shared_neurons(sizes.hidden) == sizes.shared
    with pytest.raises(ValueError, match="must be a multiple of"):
        shared_rows.of_hidden(sizes.hidden + 4, experts, every)
    with pytest.raises(ValueError, match="cannot be an expert's"):
        shared_rows.of_live(sizes.live + 4, experts, every)


# Everything is compiled for each size that is drawn.
@settings(max_examples=8)
@given(experts=st.sampled_from([2, 4]), every=st.integers(2, 4), count=st.integers(1, 3))
def test_neighbours_of_an_expert_are_a_fixed_distance_apart(experts, every, count):
    """What `serves_shared` builds on: a place among `every`, then superblock after superblock."""
    sizes = SharedRows(experts, every, count)
    neuron = jnp.arange(sizes.hidden)[:, None]
    rows = np.asarray(shared_rows.repeat(neuron, 0, experts, every))[:, 0]
    for e in range(experts):
        groups = rows.reshape(-1, experts, 4)[:, e, 0]
        own = groups[: sizes.routed // 4].reshape(every - 1, count)
        superblock, place = np.arange(count) * every * sizes.m, np.arange(every - 1) * sizes.m
        np.testing.assert_array_equal(own, superblock + place[:, None] + 4 * e)
        shared = groups[sizes.routed // 4 :].reshape(count, experts)
        last = superblock[:, None] + (every - 1) * sizes.m + 4 * np.arange(experts)
        np.testing.assert_array_equal(shared, last)


def repeated(packed, sizes, shards=1):
    """Values, metadata and dense with shared neurons once, as they would be without."""
    again = lambda a, own: shared_rows.for_each_expert(a, sizes.experts, own, shards)
    values, metadata, dense = packed
    return (
        again(values, sizes.routed),
        None if metadata is None else again(metadata, sizes.routed // 64),
        again(dense, sizes.routed).reshape(shards * sizes.experts, sizes.live, -1),
    )


def equal(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("threshold", [True, False])
def test_packing_is_that_of_repeated_rows_without_what_repeats(threshold):
    sizes = SharedRows(experts=2, every=3, superblocks=16)
    w = draw(0, sizes.hidden, 64)
    options = {"num_experts": 2, "m": 8, "scale": 1.5, "threshold": threshold}
    found = reference_grouped.pack_weight24(w, shared_every=3, **options)
    assert found[2].shape == (sizes.hidden, 64)
    expected = reference_grouped.pack_weight24(shared_rows.repeat(w, 0, 2, 3), **options)
    equal(repeated(found, sizes), expected)


@settings(max_examples=8)
@given(experts=st.sampled_from([2, 4]), every=st.integers(2, 4), count=st.integers(1, 3))
def test_what_is_left_out_is_found_by_its_row(experts, every, count):
    sizes = SharedRows(experts, every, count)
    by_expert = reference_grouped.expert_major(
        shared_rows.repeat(jnp.arange(sizes.hidden)[:, None], 0, experts, every), experts
    )
    once = shared_rows.once(by_expert.reshape(-1, 1), experts, sizes.routed)
    assert once.shape == (sizes.hidden, 1)
    neurons = reference_grouped.neurons_by_expert(sizes.hidden, experts, every)
    np.testing.assert_array_equal(once[:, 0], neurons)
    apart = reference_grouped.expert_major(jnp.arange(sizes.hidden)[:, None], experts)[..., 0]
    np.testing.assert_array_equal(reference_grouped.neurons_by_expert(sizes.hidden, experts), apart)
    again = shared_rows.for_each_expert(once, experts, sizes.routed)
    np.testing.assert_array_equal(again.reshape(by_expert.shape), by_expert)
    expert, neuron = jnp.arange(experts)[:, None], jnp.arange(sizes.live)
    rows = shared_rows.row(sizes, expert, neuron)
    np.testing.assert_array_equal(once[rows], by_expert)


def products(functions, packed, experts, shards, **options):
    """What all products of one backend make of these weights: two matrices of a network."""
    combinations = experts**shards
    counts = np.random.default_rng(3).integers(0, 3, combinations) * 100 + 28
    places = layout(counts, 128)
    rows, options = 128 * places[1].shape[0], {"shards": shards, **options}
    dtype, width = packed[2].dtype, packed[2].shape[-1]
    x, dy = (draw(seed, rows, width).astype(dtype) for seed in (4, 5))
    y2, *kept = functions.up24(*packed[:2], x, *places, **options)
    linear = functions.up24_linear(*packed[:2], x, *places, **options)
    dy1, values = functions.up24_backward(*packed[:2], dy, y2, kept[1], *places, **options)
    down = functions.down24(*kept, packed[2], *places, **options)
    return y2, *kept, linear, dy1, values, down


def of_shards(functions, weights, **options):
    """All shards' packed weights, one behind the other."""
    parts = [functions.pack_weight24(w, **options) for w in weights]
    join = lambda own: None if own[0] is None else jnp.concatenate(own)
    return [join(own) for own in zip(*parts, strict=True)]


@pytest.mark.parametrize("threshold", [True, False])
@pytest.mark.parametrize("shards", [1, 2])
def test_products_are_those_of_repeated_rows(shards, threshold):
    sizes = SharedRows(experts=2, every=3, superblocks=16)
    weights = [draw(s, sizes.hidden, 64) for s in range(shards)]
    options = {"num_experts": 2, "m": 8, "scale": None, "threshold": threshold}
    once = of_shards(reference_grouped, weights, shared_every=3, dtype=jnp.float32, **options)
    found = products(reference_grouped, once, 2, shards, shared_every=3)
    # The same numbers are multiplied.
    equal(found, products(reference_grouped, repeated(once, sizes, shards), 2, shards))


def test_weights_that_do_not_fit_are_refused():
    sizes = SharedRows(experts=2, every=3, superblocks=16)
    packed = reference_grouped.pack_weight24(
        draw(0, sizes.hidden, 64), num_experts=2, m=8, scale=None, shared_every=3
    )
    with pytest.raises(ValueError, match=r"w.shape=\(2, 256, 64\) must be \(384, width\)"):
        products(reference_grouped, (*packed[:2], repeated(packed, sizes)[2]), 2, 1, shared_every=3)
    with pytest.raises(ValueError, match="hidden=384 must be a multiple of every=5"):
        products(reference_grouped, packed, 2, 1, shared_every=5)
    with pytest.raises(ValueError, match="hidden=384 must be a multiple of shards=5"):
        products(reference_grouped, packed, 1, 5, shared_every=3)


@pytest.mark.parametrize("shards", [1, 2])
def test_gradient_is_the_sum_of_all_experts(shards):
    sizes = SharedRows(experts=2, every=3, superblocks=8)
    offsets, _ = layout([70, 0, 50, 130][: 2**shards], 64)
    rows = int(offsets[-1])
    y, g = draw(1, rows, shards * sizes.live), draw(2, rows, 32)
    options = {"num_experts": 2, "shards": shards}
    found = reference_grouped.weight_gradient(y, g, offsets, shared_every=3, **options)
    parts = jnp.split(reference_grouped.weight_gradient(y, g, offsets, **options), shards)
    expected = jnp.concatenate([shared_rows.add_up(part, 2, 3) for part in parts])
    assert found.shape == (shards * sizes.hidden, 32)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "shards"),
    [(E4, 1), (E4, 2), (SharedRows(8, 4, 64), 1), (SharedRows(2, 2, 32), 3)],
    ids=str,
)
def test_tiles_of_the_hopper_kernel_cover_the_gradient_once(sizes, shards):
    """The kernel's own arithmetic, tile by tile, with the products made by numpy."""
    assert grouped_dw_shared.serves_shared(sizes)
    experts, width = sizes.experts, 320  # its last tile of columns is partly beyond the edge
    rng = np.random.default_rng(0)
    counts = rng.integers(0, 3, experts**shards) * 50
    offsets, _ = layout(counts, 64)
    rows = int(offsets[-1])
    y = np.asarray(draw(1, rows, shards * sizes.live))
    g = np.pad(np.asarray(draw(2, rows, width)), ((0, 0), (0, 512 - width)))
    tiles = grouped_dw_shared._Tiles(sizes, shards, -(-width // 256), 2)

    @jax.jit
    def of(number):
        tile = tiles.tile(number)
        runs = grouped_dw_shared._Runs(tile, experts, shards, offsets)
        bounds = jax.vmap(runs.bounds)(jnp.arange(experts ** (shards - 1), dtype=jnp.int32))
        places = [tiles.place(tile, jnp.int32(wg)) for wg in range(2)]
        return tile, runs.number, runs.steps(), bounds, places

    found = np.zeros((shards * sizes.superblocks, sizes.every * sizes.m, g.shape[1]))
    stored = np.zeros_like(found, np.int32)
    lengths = []
    for number in range(tiles.number):
        tile, runs, steps, (first, length), places = jax.tree.map(int_or_array, of(number))
        lengths.append(steps)
        assert steps == length[:runs].sum()
        each = zip(first[:runs], length[:runs], strict=True)
        own = np.concatenate([np.arange(64 * n) + f for f, n in each])
        neurons = tile.shard * sizes.live + tile.neuron0 + np.arange(128)
        columns = tile.column0 + np.arange(256)
        acc = y[own.astype(int)][:, neurons].T @ g[own.astype(int)][:, columns]
        box = (16 // experts, sizes.m) if tile.shared else (16, 4)
        for wg, (block, row, column) in enumerate(places):
            index = (slice(block, block + box[0]), slice(row, row + box[1]), columns)
            assert column == tile.column0
            found[index] += acc[64 * wg : 64 * wg + 64].reshape(*box, 256)
            stored[index] += 1
    assert (stored == 1).all()
    # The longest are first.
    assert min(lengths[: tiles.shared]) >= max(lengths[tiles.shared :])
    expected = reference_grouped.weight_gradient(
        y, g[:, :width], offsets, num_experts=experts, shards=shards, shared_every=sizes.every
    )
    found = found.reshape(-1, g.shape[1])[:, :width]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


def int_or_array(a):
    return int(a) if a.ndim == 0 else np.asarray(a)


def test_what_the_hopper_kernel_does_not_serve():
    assert not grouped_dw_shared.serves_shared(SharedRows(4, 4, 24))  # 24 superblocks
    assert not grouped_dw_shared.serves_shared(SharedRows(4, 4, 16))  # 192 routed neurons
    assert not grouped_dw_shared.serves_shared(SharedRows(32, 2, 32))  # a block of 128
    y, g = (jnp.ones((128, n), jnp.bfloat16) for n in (SharedRows(4, 5, 8).live, 64))
    offsets = jnp.array([0, 128, 128, 128, 128], jnp.int32)
    with assume_capability((9, 0)):
        hopper.check_weight_gradient(y, g, offsets, num_experts=4)
        with pytest.raises(NotImplementedError, match="shared_every=5 is not served"):
            hopper.check_weight_gradient(y, g, offsets, num_experts=4, shared_every=5)


def test_lowers_for_cuda():
    array = lambda *shape, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(shape, dtype)
    pack = lambda w: hopper.pack_weight24(w, num_experts=4, m=16, scale=1.0, shared_every=4)
    gradient = lambda y, g, o: hopper.weight_gradient(y, g, o, num_experts=4, shared_every=4)
    offsets = array(5, dtype=jnp.int32)
    up = lambda *a: hopper.up24(*a, shared_every=4)
    down = lambda *a: hopper.down24(*a, shared_every=4)
    back = lambda *a: hopper.up24_backward(*a, shared_every=4)
    words = lambda m, k: array(m // 64, k // 64, 128, dtype=jnp.int32)
    weight = array(E4.hidden, 96), words(E4.hidden, 192)
    kept = array(512, E4.live // 2), words(512, E4.live)
    x, y, places = array(512, 192), array(512, E4.live), (offsets, array(4, dtype=jnp.int32))
    with assume_capability((9, 0)), an_h100():
        for function, arguments, name in (
            (pack, (array(E4.hidden, 192, dtype=jnp.float32),), "pack_weight24_hopper"),
            (gradient, (array(512, E4.live), array(512, 192), offsets), "weight_gradient_hopper"),
            (up, (*weight, x, *places), "up24_hopper"),
            (down, (*kept, array(E4.hidden, 192), *places), "down24_hopper"),
            (back, (*weight, x, y, kept[1], *places), "up24_backward_hopper"),
        ):
            lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=("cuda",))
            assert name in lowered.as_text()


@pytest.mark.parametrize("changes", [{}, {"shards": 2}, {"weights": False}], ids=str)
def test_a_step_lowers_with_shared_neurons_once(changes):
    sparsity = replace(Sparsity(m=16, v=128, shared_every=4, backend="hopper"), **changes)
    assert kernels_called(sparsity, 2048 * sparsity.num_shards) == [1, 2, 1, 2]
    sizes = shared_rows.of_hidden(2048, 4, 4)
    assert routed_ffn_grouped.shared_once(hopper, sparsity, sizes.live) == {"shared_every": 4}
    # 16 superblocks: repeated, and added up afterwards.
    assert routed_ffn_grouped.shared_once(hopper, sparsity, sizes.live // 2) == {}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sizes", "shards"), [(E4, 1), (E4, 2), (SharedRows(8, 4, 64), 1)], ids=str
)
def test_on_a_gpu(sizes, shards):
    if "hopper" not in registry.available_backends():
        pytest.skip("needs Hopper")
    experts, width = sizes.experts, 320
    w = draw(0, sizes.hidden, width)
    options = {"num_experts": experts, "m": sizes.m, "scale": 1.5}
    found = hopper.pack_weight24(w, shared_every=sizes.every, **options)
    apart = hopper.pack_weight24(shared_rows.repeat(w, 0, experts, sizes.every), **options)
    equal(repeated(found, sizes), apart)
    counts = np.random.default_rng(0).integers(0, 400, experts**shards)
    offsets, _ = layout(counts, 128)
    rows = int(offsets[-1]) + 256
    used = jnp.arange(rows)[:, None] < offsets[-1]
    y = jnp.where(used, draw(1, rows, shards * sizes.live), jnp.nan).astype(jnp.bfloat16)
    g = jnp.where(used, draw(2, rows, width), jnp.nan).astype(jnp.bfloat16)
    how = {"num_experts": experts, "shards": shards, "shared_every": sizes.every}
    found = hopper.weight_gradient(y, g, offsets, **how)
    expected = reference_grouped.weight_gradient(y, g, offsets, **how)
    assert np.linalg.norm(found - expected) < 1e-4 * np.linalg.norm(expected)


@pytest.mark.gpu
@pytest.mark.parametrize("threshold", [True, False])
@pytest.mark.parametrize(
    ("sizes", "shards"),
    # Tiles of 128 neurons; of 256; and of 128 where 256 divide all of an expert's, but not its own.
    [(E4, 1), (E4, 2), (SharedRows(8, 4, 64), 1), (SharedRows(2, 3, 16), 2)],
    ids=str,
)
def test_products_on_a_gpu_are_those_of_repeated_rows(sizes, shards, threshold):
    if "hopper" not in registry.available_backends():
        pytest.skip("needs Hopper")
    experts, every = sizes.experts, sizes.every
    weights = [draw(s, sizes.hidden, 320) for s in range(shards)]
    options = {"num_experts": experts, "m": sizes.m, "scale": None, "threshold": threshold}
    once = of_shards(hopper, weights, shared_every=every, **options)
    found = products(hopper, once, experts, shards, shared_every=every)
    # The same instructions on the same numbers.
    equal(found, products(hopper, repeated(once, sizes, shards), experts, shards))


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"shards": 2}, {"weights": False}], ids=str)
def test_a_step_on_a_gpu(changes):
    sparsity = replace(Sparsity(m=16, v=128, shared_every=4, backend="hopper"), **changes)
    agrees_with_the_definition(sparsity, 192)
