"""Random command lines, configurations and packed arrays: only our own errors, no stray reads."""

import contextlib
import dataclasses
import io
import math
import os
import typing

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import configs
from kernels import reference, registry
from sparsejax import Sparse24
from sparsejax.vnm import VNM
from train import main
from train.config import Config, resolve


def fields(kind, prefix=""):
    """(dotted name, type) of every leaf of a configuration."""
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from fields(hint, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hint


# FUZZ=10 looks ten times as long.
EXAMPLES = 50 * int(os.environ.get("FUZZ", "1"))

FIELDS = dict(fields(Config))
NUMBERS = st.one_of(
    st.integers(-3, 9),
    st.sampled_from([0, 1, 2, 4, 16, 64, 100, 128, 1 << 31, 1 << 63, 10**30, -(1 << 63)]),
)
FLOATS = st.one_of(
    st.floats(0, 1),
    st.sampled_from([0.0, -0.0, -1.0, 2.0, 1e-45, 1e38, 1e308, math.inf, -math.inf, math.nan]),
)
WORDS = st.sampled_from(["", "auto", "none", "None", "swiglu", "relu2_gated", "1:2", "9:3", "x y"])


def values(hint):
    """Texts for a field, mostly of its type."""
    options = typing.get_args(hint) or (hint,)
    kinds = []
    for option in options:
        if option is int:
            kinds.append(NUMBERS)
        elif option is float:
            kinds.append(FLOATS)
        elif option is bool:
            kinds.append(st.sampled_from(["True", "False", "yes"]))
        elif isinstance(option, str):
            kinds.append(st.just(option))
    return st.one_of(*kinds, WORDS, st.text(max_size=5)).map(str)


OVERRIDES = st.lists(
    st.sampled_from(sorted(FIELDS)).flatmap(
        lambda name: values(FIELDS[name]).map(lambda value: f"--{name}={value}")
    ),
    max_size=5,
)
NAMES = st.one_of(
    st.sampled_from(configs.names()),
    st.sampled_from(["", "..", "tiny.config", "x" * 50, "studies"]),
)


def one_line(error):
    """The text of an error that a user sees: not empty, and no more than a line."""
    assert str(error)
    assert "\n" not in str(error)


def consistent(config):
    """What is accepted makes sense."""
    assert 1 <= config.steps < 2**31
    assert 0 <= config.seed < 2**32
    assert config.model.width % config.model.num_heads == 0
    for name, hint in FIELDS.items():
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if hint is float:
            assert math.isfinite(value), name


@settings(max_examples=EXAMPLES)
@given(name=NAMES, overrides=OVERRIDES)
def test_command_lines(name, overrides):
    """A command line parses and resolves, or is refused in the way that is promised."""
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            arguments = main.parse([f"--config={name}", *overrides])
            config = resolve(main.config_of(arguments), tokenizer_vocab_size=257)
        except ValueError as error:
            return one_line(error)
        except SystemExit as error:
            assert error.code in (0, 2)  # noqa: PT017
            return None
    return consistent(config)


def replaced(config, name, value):
    head, _, rest = name.partition(".")
    if rest:
        value = replaced(getattr(config, head), rest, value)
    return dataclasses.replace(config, **{head: value})


@settings(max_examples=4 * EXAMPLES)
@given(data=st.data())
def test_configurations_from_python(data):
    """Numbers that no command line was in the way of."""
    config = configs.get(data.draw(st.sampled_from(configs.names())))
    numeric = sorted(name for name, hint in FIELDS.items() if hint in (int, float))
    changes = st.lists(
        st.sampled_from(numeric).flatmap(
            lambda name: st.tuples(st.just(name), NUMBERS if FIELDS[name] is int else FLOATS)
        ),
        min_size=1,
        max_size=3,
    )
    try:
        for name, value in data.draw(changes):
            config = replaced(config, name, value)
        config = resolve(config, tokenizer_vocab_size=257)
    except ValueError as error:
        return one_line(error)
    return consistent(config)


def garbage(data, tiles_m, tiles_k, layout="rows"):
    """Packed arrays of the right shapes; every bit of the metadata is arbitrary."""
    m, k = 64 * tiles_m, 64 * tiles_k
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values = rng.integers(1, 1000, (m, k // 2)).astype(np.float32)
    metadata = rng.integers(-(2**31), 2**31, (tiles_m, tiles_k, 128)).astype(np.int32)
    return values, metadata


SIZES = st.tuples(st.integers(1, 2), st.integers(1, 2))


@given(data=st.data(), sizes=SIZES)
def test_garbage_metadata_moves_values_within_their_group_and_nowhere_else(data, sizes):
    values, metadata = garbage(data, *sizes)
    dense = np.asarray(
        Sparse24(jnp.asarray(values), jnp.asarray(metadata), dense_shape(values), 1).unpack()
    )
    groups, pairs = dense.reshape(-1, 4), values.reshape(-1, 2)
    # Two bits can name no place outside the group: each element is one of its pair, or zero.
    inside = (groups[:, :, None] == pairs[:, None, :]).any(-1) | (groups == 0)
    assert inside.all()
    assert ((groups != 0).sum(-1) <= 2).all()
    # No group is empty, and the first of the pair wins a place that both claim.
    assert ((groups == pairs[:, :1]).sum(-1) >= 1).all()


def dense_shape(values):
    return values.shape[0], 2 * values.shape[1]


@settings(max_examples=10)
@given(data=st.data(), sizes=SIZES)
def test_products_with_garbage_metadata_are_those_of_what_it_unpacks_to(data, sizes):
    values, metadata = garbage(data, *sizes)
    dense = np.asarray(reference.unpack24(jnp.asarray(values), jnp.asarray(metadata)), np.float64)
    b = np.random.default_rng(1).integers(-3, 4, (8, dense.shape[1])).astype(np.float32)
    out = reference.spmm24(
        jnp.asarray(values), jnp.asarray(metadata), b, b_layout="nk", out_dtype=jnp.float32
    )
    np.testing.assert_array_equal(np.asarray(out), dense @ b.T)


@pytest.mark.parametrize(
    "backend",
    ["reference", *(pytest.param(b, marks=pytest.mark.gpu) for b in ("triton", "hopper"))],
)
def test_no_metadata_lets_a_product_read_beyond_its_operands(backend):
    """What a pair is multiplied with comes from its own four of b, whatever the metadata say: that
    bounds each result. Memory around the operands holds NaN."""
    m, n, k = 512, 512, 1024
    rng = np.random.default_rng(0)
    values = jnp.asarray(rng.uniform(0.5, 1, (m, k // 2)), jnp.bfloat16)
    b = jnp.asarray(rng.uniform(-1, 1, (n, k)), jnp.bfloat16)
    poison = [jnp.full(shape, jnp.nan, jnp.bfloat16) for shape in ((m, k), (n, k), (m, n))]
    pairs = np.asarray(values, np.float64).reshape(m, k // 4, 2).sum(-1)
    largest = np.abs(np.asarray(b, np.float64)).reshape(n, k // 4, 4).max(-1)
    # Sums of both signs are far below it. What it excludes is NaN, and numbers from elsewhere.
    bound = 1.01 * pairs @ largest.T
    for bits in ("random", 0, -1):
        shape = (m // 64, k // 64, 128)
        words = rng.integers(-(2**31), 2**31, shape) if bits == "random" else np.full(shape, bits)
        metadata = jnp.asarray(words.astype(np.int32))
        out = registry.spmm24(
            values, metadata, b, b_layout="nk", out_dtype=jnp.float32, backend=backend
        )
        assert (np.abs(np.asarray(out, np.float64)) <= bound).all()
    del poison
    right, positions = reference.pack24(b, axis=1, mode="magnitude")
    out = registry.spmm24(right, positions, b, b_layout="nk", backend=backend)
    want = np.asarray(reference.unpack24(right, positions), np.float64) @ np.asarray(b, float).T
    error = np.linalg.norm(np.asarray(out, np.float64) - want) / np.linalg.norm(want)
    assert error < 0.01  # nothing was broken on the way


@settings(max_examples=40)
@given(
    rows=st.integers(0, 3).map(lambda n: 32 * n),
    half=st.integers(0, 3).map(lambda n: 16 * n),
    meta=st.lists(st.integers(0, 3) | st.just(128), min_size=0, max_size=4).map(tuple),
    rank=st.integers(1, 4),
    dtype=st.sampled_from([np.int32, np.uint32, np.int16, np.float32]),
    kind=st.sampled_from([np.float32, np.int32, np.float64, np.uint8]),
)
def test_wrong_shapes_and_dtypes_are_refused(rows, half, meta, rank, dtype, kind):
    shape = (rows, half, 32, 8)[:rank]
    values, metadata = np.zeros(shape, kind), np.zeros(meta, dtype)
    right = (
        rank == 2
        and rows % 64 == half % 32 == 0
        and meta == (rows // 64, half // 32, 128)
        and dtype is np.int32
        and kind is np.float32
    )
    packed = Sparse24(values, metadata, (rows, 2 * half), 1)
    if right and rows and half:
        assert packed.unpack().shape == (rows, 2 * half)
    elif not right:
        with pytest.raises(ValueError, match=r"^[^\n]+$"):
            packed.unpack()


@given(data=st.data())
def test_garbage_in_a_vnm_matrix_stays_in_its_block(data):
    v, m, rows, blocks = 2, 8, 4, 3
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    values = rng.integers(1, 1000, (rows, 2 * blocks)).astype(np.float32)
    positions = rng.integers(0, 256, (rows, blocks)).astype(np.uint8)
    columns = rng.integers(0, 256, (rows // v, blocks, 4)).astype(np.uint8)
    packed = VNM(*map(jnp.asarray, (values, positions, columns)), (rows, m * blocks), v, m)
    dense = np.asarray(packed.unpack()).reshape(rows, blocks, m)
    pairs = values.reshape(rows, blocks, 1, 2)
    assert ((dense[..., None] == pairs).any(-1) | (dense == 0)).all()
