"""The grouped kernels of Triton without a GPU: lowering, interpreter, tiles, exchange of words."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import reference, reference_grouped
from kernels.triton import grouped24, grouped_common, grouped_neurons, ptx
from kernels.triton.spmm24 import Spmm24Config
from tests.kernels.ptx_words import floats, interpret
from tests.kernels.test_grouped import LLAMA1B, MANY, SMALL, result_shapes
from tests.kernels.test_grouped import arguments as all_arguments
from tests.kernels.test_grouped_reference import layout
from tests.kernels.test_triton import an_h100

TINY = Spmm24Config(
    warps_m=1, warps_n=2, frags_m=4, frags_n=4, block_k=64, stages=3, group_m=2
)  # 64 x 64


def arguments(*sizes, **options) -> dict[str, tuple]:
    """Of the functions that this backend has: its weight gradients are dense."""
    calls = all_arguments(*sizes, **options)
    del calls["weight_gradient24"]
    return calls


def lower(name: str, args: tuple, options: dict) -> tuple[str, tuple]:
    """The lowered text of a function, and the shapes of its results."""
    function = getattr(grouped24, name)
    with an_h100():
        traced = jax.jit(lambda *a: function(*a, **options)).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text, tuple(o.shape for o in jax.tree.leaves(traced.out_info))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param(LLAMA1B[1], marks=pytest.mark.core),
        SMALL[1],
        pytest.param(SMALL[2], marks=pytest.mark.core),
        *MANY,
        (64, 512, 300, 32, 64),
    ],
    ids=str,
)
def test_lowers_for_cuda(sizes):
    for name, call in arguments(*sizes).items():
        text, shapes = lower(name, *call)
        assert "__gpu$xla.gpu.triton" in text
        assert shapes == result_shapes(name, *sizes)


@pytest.mark.core
def test_lowers_in_float16_and_with_a_configuration():
    for name, (args, options) in arguments(128, 512, 256, 8, dtype=jnp.float16).items():
        if name == "weight_gradient":
            options = options | {"config": grouped24.GradientConfig(stages=2)}
        elif name != "pack_weight24":
            options = options | {"config": TINY}
        assert "__gpu$xla.gpu.triton" in lower(name, args, options)[0]


@pytest.mark.core
def test_lowers_with_results_by_token():
    args, _ = arguments(192, 512, 300, 8)["down24"]
    permutation = jax.ShapeDtypeStruct((args[0].shape[0],), jnp.int32)
    with an_h100():
        traced = jax.jit(
            lambda permutation, *a: grouped24.down24(*a, permutation=permutation, tokens=300)
        ).trace(permutation, *args)
        assert "xla.gpu.triton" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert traced.out_info.shape == (300, 192)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 512, 300, 8, 96), "v=96"),
        ((64, 512, 300, 8, 128, jnp.float32), "float32"),
    ],
)
def test_refusals(sizes, message):
    args, _ = arguments(*sizes)["down24"]
    with an_h100(), pytest.raises(NotImplementedError, match=message):
        # A row of metadata is 64 tokens, whatever V.
        grouped24.check_down24(*args)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="a GPU serves these")
def test_refuses_a_cpu():
    for name, (args, options) in arguments(64, 512, 300, 8).items():
        with pytest.raises(NotImplementedError, match="compute capability"):
            # One check for `up24` and `up24_linear`.
            getattr(grouped24, f"check_{name.removesuffix('_linear')}")(*args, **options)


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("up24", Spmm24Config(frags_m=2), "multiple of 4"),
        ("up24_linear", Spmm24Config(frags_m=2), "multiple of 4"),
        ("up24_backward", Spmm24Config(frags_m=2), "multiple of 4"),
        ("down24", Spmm24Config(stages=2), "stages"),
        ("weight_gradient", grouped24.GradientConfig(block_k=128), "block_k"),
        ("weight_gradient", grouped24.GradientConfig(block_m=96), "powers of two"),
    ],
)
def test_refuses_configurations(name, config, message):
    args, options = arguments(64, 512, 300, 8)[name]
    with an_h100(), pytest.raises(ValueError, match=message):
        lower(name, args, options | {"config": config})


def test_row_order():
    order = grouped24.row_order(192)
    assert sorted(order) == list(range(192))
    # A thread's rows q and q + 8 of two fragments of 16 are one group of four neurons.
    for first in range(0, 192, 32):
        for q in range(8):
            rows = [first + 16 * a + 8 * b + q for a in range(2) for b in range(2)]
            assert list(order[rows]) == list(range(first + 4 * q, first + 4 * q + 4))


@functools.partial(jax.jit, static_argnames=("size", "rows"))
def parts(offsets, size: int, rows: int):
    count = grouped_common.num_parts(rows, offsets.shape[0] - 1, size)
    find = lambda i: grouped_common.part(offsets, i, size, rows)
    # One more than there are.
    return jax.vmap(find)(jnp.arange(count + 1, dtype=jnp.int32))


@given(st.lists(st.integers(0, 5), min_size=4, max_size=4), st.sampled_from([64, 128, 256]))
def test_every_row_once(blocks, size):
    """Blocks of 64 of four experts and the unused rest, of always 20 blocks to compile once."""
    offsets, rows = np.concatenate([[0], np.cumsum(blocks)]) * 64, 20 * 64
    expected = np.full(rows, 4)
    for e in range(4):
        expected[offsets[e] : offsets[e + 1]] = e
    found = np.full(rows, -1)
    expert, first, end = (np.asarray(a) for a in parts(jnp.asarray(offsets, jnp.int32), size, rows))
    for e, start, stop in zip(expert, first, end, strict=True):
        if e > 4:
            continue
        assert start < stop
        own = slice(start, min(start + size, stop))
        assert (found[own] == -1).all()
        found[own] = e
    np.testing.assert_array_equal(found, expected)
    assert expert[-1] == 5


def run_ptx(asm: str, refs, args, *, out):
    """`ptx.inline_ptx` in numpy."""
    assert not refs
    inputs = {f"${len(out) + i}": np.asarray(a).view(np.uint32) for i, a in enumerate(args)}
    registers = interpret(asm, inputs)
    return [jnp.asarray(registers[f"${i}"].view(np.dtype(d))) for i, d in enumerate(out)]


@pytest.fixture
def on_numpy(monkeypatch):
    monkeypatch.setattr(ptx, "inline_ptx", run_ptx)


def some_words(count: int) -> list[jax.Array]:
    drawn = np.random.default_rng(0).integers(0, 2**32, (count, 64), dtype=np.uint32)
    return [jnp.asarray(w) for w in drawn]


@pytest.mark.parametrize("lanes", [1, 4, 16])
def test_exchange_between_two_threads(on_numpy, lanes):
    a, b = some_words(2)
    x, y = ptx.transpose_pair((a, b), lanes, emulate=False)
    thread = np.arange(64)
    first, second = thread & ~lanes, thread | lanes
    mine = np.where(thread & lanes, b[first], a[first])
    np.testing.assert_array_equal(x, mine)
    np.testing.assert_array_equal(y, np.where(thread & lanes, b[second], a[second]))
    for actual, twin in zip((x, y), ptx.transpose_pair((a, b), lanes, emulate=True), strict=True):
        np.testing.assert_array_equal(actual, twin)


@pytest.mark.parametrize("lanes", [(1, 2), (4, 8)])
def test_exchange_between_four_threads(on_numpy, lanes):
    given = some_words(4)
    out = ptx.transpose_quad(given, lanes, emulate=False)
    stacked = np.stack(given)
    thread = np.arange(64)
    own = (thread & lanes[0] != 0) + 2 * (thread & lanes[1] != 0)
    base = thread & ~(lanes[0] | lanes[1])
    for i, actual in enumerate(out):
        source = base + lanes[0] * (i % 2) + lanes[1] * (i // 2)
        np.testing.assert_array_equal(actual, stacked[own, source])
    for actual, twin in zip(out, ptx.transpose_quad(given, lanes, emulate=True), strict=True):
        np.testing.assert_array_equal(actual, twin)


def elements(group: grouped_neurons.Group) -> np.ndarray:
    """(4, threads) float32: the dense neurons."""
    halves = [
        floats(half)
        for word in map(np.asarray, (group.low, group.high))
        for half in (word << np.uint32(16), word & np.uint32(0xFFFF0000))
    ]
    return np.stack(halves)


def kept(group: grouped_neurons.Group, nibble) -> np.ndarray:
    """(4, threads) float32: the pair at its positions."""
    pair, nibble = np.asarray(group.pair), np.asarray(nibble)
    out = np.zeros((4, pair.size), np.float32)
    for position, half in ((nibble & 3, pair << np.uint32(16)), (nibble >> 2, pair)):
        np.put_along_axis(out, position[None], floats(half & np.uint32(0xFFFF0000))[None], axis=0)
    return out


def test_a_group_on_the_gpu_and_in_the_interpreter(on_numpy):
    few = np.array([-2.0, 0.0, 0.5, 0.5, 3.0], np.float32)
    ties = np.stack(np.meshgrid(few, few, few, few), 0).reshape(4, -1)
    drawn = np.random.default_rng(1).standard_normal((4, 500)).astype(np.float32)
    x = [jnp.asarray(e) for e in np.concatenate([ties, drawn], axis=1)]
    (gpu, nibble), (twin, twin_nibble) = (
        grouped_neurons.choose(x, jnp.bfloat16, emulate=emulate) for emulate in (False, True)
    )
    np.testing.assert_array_equal(elements(gpu), elements(twin))
    np.testing.assert_array_equal(elements(gpu), kept(gpu, nibble))
    np.testing.assert_array_equal(elements(twin), kept(twin, twin_nibble))
    dy = [jnp.asarray(e) for e in np.random.default_rng(2).standard_normal((4, x[0].size))]
    dy = [e.astype(jnp.float32) for e in dy]
    arguments = (dy, (gpu.low, gpu.high), nibble, jnp.bfloat16)
    gpu, twin = (grouped_neurons.scale(*arguments, emulate=emulate) for emulate in (False, True))
    for a, b in zip(gpu, twin, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(elements(gpu), kept(gpu, nibble))


def draw(seed: int, *shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32)


def distance(actual, expected) -> float:
    actual, expected = (np.asarray(x, np.float64) for x in (actual, expected))
    return float(np.linalg.norm(actual - expected) / np.linalg.norm(expected))


def same(a, b) -> bool:
    return np.array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.slow
def test_interpreted():
    """All against the definitions; a tile that hangs over an expert's end, an empty expert."""
    counts, width, live = [70, 0, 130], 64, 64
    experts = len(counts)
    *tokens, rows = layout(counts)
    used = int(tokens[0][-1])
    w = draw(0, experts * live, width) * width**-0.5
    options = {"num_experts": experts, "m": 4 * experts, "scale": 1.5}
    values, metadata, dense = grouped24.pack_weight24(w, **options, interpret=True)
    definition = reference_grouped.pack_weight24(w, **options)
    assert same(dense, definition[2])
    unpacked = reference.unpack24(values, metadata).reshape(dense.shape)
    assert same(unpacked, dense[:, grouped24.row_order(live)])

    unused = jnp.arange(rows)[:, None] >= used
    x, dy = (
        jnp.where(unused, jnp.nan, draw(seed, rows, width)).astype(jnp.bfloat16) for seed in (1, 2)
    )
    # Two tiles of 64 neurons, of which the expert has one; tiles of 128 tokens, blocks of 64.
    config = Spmm24Config(warps_m=2, warps_n=4, frags_m=4, frags_n=4, block_k=32, stages=3)
    run = {"config": config, "interpret": True}
    y2, y2_values, y2_metadata = grouped24.up24(values, metadata, x, *tokens, **run)
    expected, *_ = reference_grouped.up24(*definition[:2], x, *tokens)
    # Near-ties could differ; this seed has none.
    assert distance(y2, expected) < 1e-3
    assert same(reference.unpack24(y2_values, y2_metadata), y2)
    assert (np.asarray(y2_metadata)[used // 64 :] == 0x44444444).all()

    y = grouped24.up24_linear(values, metadata, x, *tokens, **run)
    expected = reference_grouped.up24_linear(*definition[:2], x, *tokens)
    assert y.dtype == expected.dtype
    assert distance(y, expected) < 1e-3

    y3 = grouped24.down24(y2_values, y2_metadata, dense, *tokens, **run)
    assert distance(y3, reference_grouped.down24(y2_values, y2_metadata, dense, *tokens)) < 1e-3
    dy1, dy1_values = grouped24.up24_backward(
        values, metadata, dy, y2, y2_metadata, *tokens, **run
    )  # fmt: skip
    expected, _ = reference_grouped.up24_backward(*definition[:2], dy, y2, y2_metadata, *tokens)
    assert distance(dy1, expected) < 1e-3
    assert same(reference.unpack24(dy1_values, y2_metadata), dy1)
    for out in (y, y2, y2_values, y3, dy1, dy1_values):
        assert not np.asarray(out, np.float32)[used:].any()

    dw = grouped24.weight_gradient(y2, dy, tokens[0], num_experts=experts, interpret=True)
    expected = reference_grouped.weight_gradient(y2, dy, tokens[0], num_experts=experts)
    assert distance(dw, expected) < 1e-5
    assert not np.asarray(reference_grouped.expert_major(dw, experts)[1]).any()

    permutation = np.full(rows, used - 3, np.int32)
    shuffled = np.random.default_rng(3).permutation(used)
    permutation[:used] = np.minimum(shuffled, used - 3)
    by_token = grouped24.down24(
        y2_values,
        y2_metadata,
        dense,
        *tokens,
        permutation=jnp.asarray(permutation),
        tokens=used - 3,
        **run,
    )
    kept = permutation < used - 3
    assert same(by_token[permutation[kept]], y3[kept])
