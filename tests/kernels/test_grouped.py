"""The grouped kernels of Hopper without a GPU: lowering, refusals, order of tiles, arithmetic."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels import groups24, reference
from kernels.hopper import grouped24, grouped_common, grouped_dw24
from kernels.registry import assume_capability
from tests.kernels.ptx_words import floats, interpret, pack, prmt, words

pytestmark = pytest.mark.core

# D, H, T, M, V
LLAMA1B = [(2048, 8192, 16384, m, 128) for m in (8, 16, 32)]
SMALL = [(64, 1024, 300, 32, 128), (192, 768, 1000, 8, 256), (320, 128, 128, 4, 128)]
MANY = [(64, 8192, 300, 128, 128)]  # 32 experts


def arguments(
    d: int, hidden: int, tokens: int, m: int, v: int = 128, dtype: Any = jnp.bfloat16
) -> dict[str, tuple[tuple, dict]]:
    """Arguments of the functions, as shapes."""
    experts = m // 4
    live, rows = hidden // experts, -(-(tokens + experts * (v - 1)) // v) * v

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype)

    def metadata(rows, columns):
        return array(rows // 64, columns // 64, 128, dtype=jnp.int32)

    layout = array(experts + 1, dtype=jnp.int32), array(rows // v, dtype=jnp.int32)
    packed = array(hidden, d // 2), metadata(hidden, d)
    y_metadata, x, y = metadata(rows, live), array(rows, d), array(rows, live)
    weight = array(hidden, d, dtype=jnp.float32)
    return {
        "up24": ((*packed, x, *layout), {}),
        "up24_linear": ((*packed, x, *layout), {}),
        "down24": ((array(rows, live // 2), y_metadata, array(experts, live, d), *layout), {}),
        "up24_backward": ((*packed, x, y, y_metadata, *layout), {}),
        "weight_gradient": ((y, x, layout[0]), {"num_experts": experts}),
        "weight_gradient24": (
            (y, x, layout[0], array(experts, live // 20, dtype=jnp.int32)),
            {"num_experts": experts},
        ),
        "pack_weight24": (
            (weight,),
            {"num_experts": experts, "m": m, "scale": 1.5, "dtype": dtype},
        ),
    }


def result_shapes(name: str, d: int, hidden: int, tokens: int, m: int, v: int) -> tuple:
    """Shapes of a function's results for `arguments` of these sizes."""
    experts = m // 4
    live, rows = hidden // experts, -(-(tokens + experts * (v - 1)) // v) * v
    y, packed = (rows, live), (rows, live // 2)
    return {
        "up24": (y, packed, (rows // 64, live // 64, 128)),
        "up24_linear": (y,),
        "down24": ((rows, d),),
        "up24_backward": (y, packed),
        "weight_gradient": ((hidden, d),),
        "weight_gradient24": ((hidden, d),),
        "pack_weight24": ((hidden, d // 2), (hidden // 64, d // 64, 128), (experts, live, d)),
    }[name]


def lower(name: str, args: tuple, options: dict) -> tuple[str, tuple]:
    """The lowered text of a function, and the shapes of its results."""
    function = getattr(grouped24, name)
    with assume_capability((9, 0)):
        traced = jax.jit(lambda *a: function(*a, **options)).trace(*args)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    return text, tuple(o.shape for o in jax.tree.leaves(traced.out_info))


@pytest.mark.parametrize("sizes", LLAMA1B + SMALL + MANY, ids=str)
def test_lowers_for_cuda(sizes):
    for name, call in arguments(*sizes).items():
        text, shapes = lower(name, *call)
        assert "mosaic_gpu" in text
        assert shapes == result_shapes(name, *sizes)


def test_lowers_with_results_by_token():
    args, _ = arguments(192, 512, 300, 8)["down24"]
    rows = args[0].shape[0]
    permutation = jax.ShapeDtypeStruct((rows,), jnp.int32)
    with assume_capability((9, 0)):
        traced = jax.jit(
            lambda permutation, *a: grouped24.down24(*a, permutation=permutation, tokens=300)
        ).trace(permutation, *args)
        assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert traced.out_info.shape == (300, 192)


def test_lowers_in_float16_and_with_a_configuration():
    config = grouped24.GroupedConfig(stages=3, width=2)
    for name, (args, options) in arguments(128, 512, 256, 8, dtype=jnp.float16).items():
        if name != "pack_weight24":
            options = options | {"config": config}
        assert "mosaic_gpu" in lower(name, args, options)[0]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((64, 512, 300, 8, 64), "v=64"),
        ((64, 128, 300, 8, 128), "live=64"),
        ((64, 512, 300, 8, 128, jnp.float32), "float32"),
    ],
)
def test_refusals(sizes, message):
    args, _ = arguments(*sizes)["up24"]
    for name in ("up24", "up24_linear"):
        with pytest.raises(NotImplementedError, match=message):
            lower(name, args, {})


def test_refuses_other_devices():
    for name, (args, options) in arguments(64, 512, 300, 8).items():
        check = getattr(grouped24, f"check_{name.removesuffix('_linear')}")  # one for both
        with assume_capability((9, 0)):
            check(*args, **options)
        with assume_capability((8, 0)), pytest.raises(NotImplementedError, match="9"):
            check(*args, **options)


@pytest.mark.parametrize("config", [{"stages": 9}, {"stages": 1}, {"width": 0}])
def test_refuses_configurations(config):
    args, _ = arguments(64, 512, 300, 8)["up24"]
    options = {"config": grouped24.GroupedConfig(**config)}
    with assume_capability((9, 0)), pytest.raises(NotImplementedError, match="stages fit"):
        grouped24.check_up24(*args, **options)
    for name in ("up24", "up24_linear"):
        with pytest.raises(NotImplementedError, match="stages fit"):
            lower(name, args, options)


def test_shapes_that_contradict_one_another():
    (values, metadata, _, *layout), _ = arguments(64, 512, 300, 8)["down24"]
    other = jax.ShapeDtypeStruct((2, 128, 64), jnp.bfloat16)
    with assume_capability((9, 0)), pytest.raises(ValueError, match=r"^w\.shape"):
        grouped24.check_down24(values, metadata, other, *layout)


def test_row_order():
    order = grouped24.row_order(384)
    assert sorted(order) == list(range(384))
    # A thread's four accumulator rows are one group of four neurons.
    for part in range(3):
        for warp in range(4):
            for q in range(8):
                rows = [64 * a + 16 * warp + 8 * b + q for a in range(2) for b in range(2)]
                neurons = order[[128 * part + row for row in rows]]
                first = 128 * part + 4 * (8 * warp + q)
                assert list(neurons) == list(range(first, first + 4))


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 20))
def test_every_tile_once(major, minor, width):
    # One shape for all, so that JAX compiles once.
    tiles = jnp.arange(1600, dtype=jnp.int32)
    order = grouped_common.tile_order(tiles, jnp.int32(major), minor, width)
    order = [np.asarray(o)[: major * minor] for o in order]
    assert len(set(zip(*(o.tolist() for o in order), strict=True))) == major * minor
    assert order[0].max() == major - 1
    assert order[1].max() == minor - 1


@given(st.integers(1, 20), st.integers(0, 50), st.integers(1, 60))
def test_every_sparse_tile_once(blocks, dense_tiles, tiles):
    blocks = min(blocks, dense_tiles + tiles)
    done = []
    for block in range(blocks):
        count, tile = grouped_dw24.sparse_tiles(jnp.int32(block), blocks, dense_tiles, tiles)
        done += [int(tile(jnp.int32(i))) for i in range(int(count))]
    assert sorted(done) == list(range(tiles))


def test_blocks_with_a_dense_tile_do_two_sparse_ones_less():
    counts = [int(grouped_dw24.sparse_tiles(jnp.int32(b), 12, 4, 76)[0]) for b in range(12)]
    assert counts == [5] * 4 + [7] * 8


def test_columns_of_the_experts():
    rng = np.random.default_rng(0)
    y = rng.standard_normal((5 * 128, 8)).astype(np.float32)
    offsets = jnp.array([0, 256, 256, 512], jnp.int32)
    neurons = np.array([[1, 3, 8], [0, 2, 4], [7, 6, 5]], np.int32)
    out = grouped_dw24._gather(jnp.asarray(y), offsets, jnp.asarray(neurons))
    np.testing.assert_array_equal(out[:256, :2], y[:256, [1, 3]])
    assert not np.asarray(out[:256, 2]).any()
    np.testing.assert_array_equal(out[256:512], y[256:512, [7, 6, 5]])


def halves(word: np.ndarray) -> np.ndarray:
    """(2, n) float32 from words of two bfloat16."""
    return np.stack([floats(word << np.uint32(16)), floats(word & np.uint32(0xFFFF0000))])


def groups() -> np.ndarray:
    """(4, n) float32: random, and every combination of a few values, so with all ties."""
    few = np.array([-2.0, -0.5, -0.0, 0.0, 0.5, 1.0, 3.0], np.float32)
    every = np.stack(np.meshgrid(few, few, few, few), 0).reshape(4, -1)
    drawn = np.random.default_rng(0).standard_normal((4, 500)).astype(np.float32)
    return np.concatenate([every, drawn], axis=1)


def test_choice_of_two_of_four():
    x = groups()
    text = groups24.CHOOSE.replace("DTYPE", "bf16")
    out = interpret(text, {f"${2 + i}": words(x[i]) for i in range(4)})
    pair, code = out["$0"], out["$1"]
    lower, higher = code & np.uint32(3), code >> np.uint32(28) & np.uint32(3)
    assert (lower < higher).all()

    squares = np.maximum(x, 0) ** 2
    for i in range(x.shape[1]):
        # Positive ones by a stable sort: ties to the lower index.
        best = sorted(range(4), key=lambda r: -squares[r, i])[:2]
        kept = {int(lower[i]), int(higher[i])}
        assert {r for r in best if squares[r, i] > 0} <= kept
    columns = np.arange(x.shape[1])
    expected = np.stack([squares[lower, columns], squares[higher, columns]])
    rounded = expected.astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(halves(pair), rounded)

    zero = np.zeros_like(pair)
    spread = [halves(prmt(pair, zero, s)) for s in (code, code >> np.uint32(16))]
    dense = np.zeros_like(x)
    dense[lower, columns], dense[higher, columns] = rounded
    np.testing.assert_array_equal(np.concatenate(spread), dense)


def test_choice_keeps_a_nan():
    x = np.tile(np.array([[1.0], [2.0], [3.0], [4.0]], np.float32), 4)
    np.fill_diagonal(x, np.nan)
    out = interpret(
        groups24.CHOOSE.replace("DTYPE", "bf16"), {f"${2 + i}": words(x[i]) for i in range(4)}
    )
    assert np.isnan(halves(out["$0"])).any(axis=0).all()


@pytest.mark.parametrize("swapped", [False, True])
def test_choice_of_two_of_four_rows(swapped):
    x = groups()
    x[:, -4:] = np.diag([np.nan] * 4) + np.array([[1], [2], [-3], [np.inf]], np.float32)
    x = x.astype(ml_dtypes.bfloat16).astype(np.float32)
    words_of = [pack(x[0], x[1]), pack(x[2], x[3])]
    order = grouped_dw24.SWAPPED if swapped else grouped_dw24.IN_ORDER
    inputs = {"$2": words_of[swapped], "$3": words_of[not swapped]}
    inputs |= {f"${4 + i}": np.full(x.shape[1], c, np.uint32) for i, c in enumerate(order)}
    out = interpret(grouped_dw24.CHOOSE, inputs)

    expected = np.asarray(reference.select24(x, axis=0, by="magnitude"))
    columns = np.arange(x.shape[1])
    lower, higher = (out["$1"] >> np.uint32(s) & np.uint32(3) for s in (28, 30))
    assert (lower < higher).all()
    kept = np.zeros_like(expected)
    kept[lower, columns] = kept[higher, columns] = True
    np.testing.assert_array_equal(kept, expected)
    pair = np.stack([x[lower, columns], x[higher, columns]])
    np.testing.assert_array_equal(halves(out["$0"]), pair)


def test_gradient_of_the_squared_relu():
    rng = np.random.default_rng(1)
    pairs = np.array([(i, j) for i in range(4) for j in range(i + 1, 4)])
    lower, higher = np.repeat(pairs, 50, axis=0).T
    columns = np.arange(lower.size)
    y = np.zeros((4, lower.size), np.float32)
    y[lower, columns], y[higher, columns] = rng.exponential(size=(2, lower.size)) * (
        rng.random((2, lower.size)) < 0.7
    )
    y = y.astype(ml_dtypes.bfloat16).astype(np.float32)
    x = rng.standard_normal(y.shape).astype(np.float32)

    text = groups24.SCALE.replace("WIDEN", groups24.WIDENINGS["bf16"])
    inputs = {"$3": pack(y[0], y[1]), "$4": pack(y[2], y[3])}
    inputs |= {f"${5 + i}": words(x[i]) for i in range(4)}
    inputs["$9"] = (lower | higher << 2).astype(np.uint32)
    out = interpret(text.replace("DTYPE", "bf16"), inputs)

    expected = (2 * np.sqrt(y) * x).astype(ml_dtypes.bfloat16).astype(np.float32)
    dense = np.concatenate([halves(out["$0"]), halves(out["$1"])])
    np.testing.assert_array_equal(dense, expected)
    kept = np.stack([expected[lower, columns], expected[higher, columns]])
    np.testing.assert_array_equal(halves(out["$2"]), kept)
