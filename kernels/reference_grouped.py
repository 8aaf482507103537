"""The grouped products of the routed FFN in plain jax.numpy: definition, CPU path, tests' oracle.

H neurons in E experts of h = H / E. Parameters are (H, D), a row for each neuron, interleaved:
expert e owns rows n = b M + 4 e + r with M = 4 E, b a block of M neurons, r in 0..3; its l-th
neuron is n = (l // 4) M + 4 e + l % 4. Tokens are permuted so that those of one expert lie
together: (T_pad, D) in blocks of V rows, block i of expert `block_expert[i]`; expert e has rows
offsets[e]..offsets[e+1], and the rows from offsets[E] on are unused. Every function gives zeros in
unused rows and never reads them.

With S > 1 shards the neurons are S such sets one behind the other, of which a token meets one
expert each: h = H / E neurons still, shard by shard. Tokens that agree in all of them lie together:
`block_expert` and `offsets` then count combinations, c = sum over s of e_s E^s, of which there are
E^S, and the matrices by expert have S E of them, expert e of shard s being number s E + e.

Packed matrices (values, metadata) are those of `kernels.reference`. Every backend has
`pack_weight24`, `up24`, `up24_linear`, `down24`, `up24_backward` and `weight_gradient` with the
same arguments, and may have `weight_gradient24`, and shards and weights that are not 2:4 where it
says so (`SHARDS`, `DENSE_WEIGHTS`); all may take neurons that all experts have once
(`SHARED_ONCE`, `serves_shared`), as `kernels.shared_rows` has them; only the
order of the rows of packed weights, within an expert, is a backend's own. Weights that are not 2:4
are packed as whole rows in that order, "values" (H, D) without metadata.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike, DTypeLike

from kernels import reference, shared_rows

GROUP = reference.GROUP
TILE = reference.TILE
NEURONS = TILE
"""An expert's neurons come in multiples of this; every backend says so."""
SHARDS = True
"""Whether the products take more than one shard; every backend says so."""
DENSE_WEIGHTS = True
"""Whether `up24` and its likes take weights that are not 2:4; every backend says so."""
SHARED_ONCE = True
"""Whether the functions have `shared_every`; every backend says so."""


def serves_shared(sizes: shared_rows.SharedRows) -> bool:
    """Whether `shared_every` may be given for these sizes of a shard; every backend says so that
    has `SHARED_ONCE`."""
    # Or else the rows of several shards, one behind the other, share a tile of metadata.
    return sizes.hidden % TILE == 0


def experts_of(combinations: int, shards: int) -> int:
    """E of E^S combinations. ValueError if there is none."""
    if shards < 1:
        raise ValueError(f"{shards=} must be at least 1")
    experts = round(combinations ** (1 / shards))
    if experts**shards != combinations:
        raise ValueError(f"{combinations=} must be a power of {shards=}")
    return experts


def expert_in(shard: int, combination: Array, experts: int) -> Array:
    """The expert of a shard, 0..E-1, in a combination."""
    return combination // experts**shard % experts


def weight_rows(combination: Array, experts: int, shards: int) -> list[Array]:
    """Numbers, shard by shard, of the experts' matrices that a combination meets."""
    return [s * experts + expert_in(s, combination, experts) for s in range(shards)]


def weight_dims(
    w: Array, num_experts: int, m: int, scale: ArrayLike | None, shared_every: int = 0
) -> tuple[int, int]:
    """(h, D) of a weight (H, D). ValueError unless `pack_weight24`'s arguments fit."""
    if w.ndim != 2:
        raise ValueError(f"{w.shape=} must be (neurons, width)")
    if num_experts < 1 or m != GROUP * num_experts:
        raise ValueError(f"{m=} must be {GROUP} * {num_experts=}")
    hidden, width = w.shape
    if hidden % m or width % GROUP:
        raise ValueError(f"{w.shape=}: neurons must be a multiple of {m=}, width of {GROUP}")
    if scale is not None and jnp.size(scale) != 1:
        raise ValueError(f"{jnp.shape(scale)=} must be a scalar")
    if shared_every:
        return shared_rows.of_hidden(hidden, num_experts, shared_every).live, width
    return hidden // num_experts, width


def block_rows(rows: int, offsets: Array, block_expert: Array) -> tuple[int, int]:
    """(E, V) of a layout of `rows` tokens. ValueError unless its arrays fit."""
    if offsets.ndim != 1 or offsets.shape[0] < 2 or block_expert.ndim != 1:
        raise ValueError(
            f"{offsets.shape=}, {block_expert.shape=} must be (experts + 1,), (blocks,)"
        )
    if offsets.dtype != jnp.int32 or block_expert.dtype != jnp.int32:
        raise ValueError(f"{offsets.dtype=} and {block_expert.dtype=} must be int32")
    blocks = block_expert.shape[0]
    if not blocks or rows % blocks:
        raise ValueError(f"{rows=} must be a multiple of the number of {blocks=}")
    return offsets.shape[0] - 1, rows // blocks


def packed_dims(values: Array, metadata: Array | None) -> tuple[int, int]:
    """(m, k) of a packed matrix, or of one as it is. ValueError unless values and metadata fit."""
    if metadata is None:
        if values.ndim != 2:
            raise ValueError(f"{values.shape=} must be (rows, width)")
        return values.shape[0], values.shape[1]
    reference.require_packed(values, metadata)
    return values.shape[0], 2 * values.shape[1]


def up_dims(
    values: Array,
    metadata: Array | None,
    x: Array,
    offsets: Array,
    block_expert: Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
) -> tuple[int, int, int]:
    """(E, V, h) of a product of tokens with packed weights. ValueError unless arguments fit."""
    hidden, width = packed_dims(values, metadata)
    if x.ndim != 2 or x.shape[1] != width:
        raise ValueError(f"{x.shape=} must be (rows, {width})")
    if x.dtype != values.dtype:
        raise ValueError(f"{x.dtype=} must be {values.dtype=}")
    combinations, v = block_rows(x.shape[0], offsets, block_expert)
    experts = experts_of(combinations, shards)
    if shared_every:
        if hidden % shards:
            raise ValueError(f"{hidden=} must be a multiple of {shards=}")
        live = shared_rows.of_hidden(hidden // shards, experts, shared_every).live
        if live % TILE:
            raise ValueError(f"{live=} of {hidden=} and {shared_every=} must be whole {TILE}s")
        return experts, v, shards * live
    if hidden % (shards * experts * TILE):
        each = f"{experts=}" if shards == 1 else f"{experts=} of {shards=}"
        raise ValueError(f"{hidden=} must be a multiple of {TILE} for each of {each}")
    return experts, v, hidden // experts


def require_saved(y2: Array, y2_metadata: Array, shape: tuple[int, int], dtype: DTypeLike) -> None:
    """ValueError unless these are activations (rows, h) of this dtype, and their metadata."""
    if y2.shape != shape or y2.dtype != dtype:
        raise ValueError(f"{y2.shape=}, {y2.dtype=} must be {shape}, {jnp.dtype(dtype).name}")
    expected = (shape[0] // TILE, shape[1] // TILE, 128)
    if y2_metadata.shape != expected or y2_metadata.dtype != jnp.int32:
        raise ValueError(f"{y2_metadata.shape=}, {y2_metadata.dtype=} must be {expected}, int32")


def backward_dims(
    values: Array,
    metadata: Array | None,
    dy: Array,
    y2: Array,
    y2_metadata: Array,
    offsets: Array,
    block_expert: Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
) -> tuple[int, int, int]:
    """(E, V, h) of `up24_backward`. ValueError unless its arguments fit."""
    experts, v, live = up_dims(
        values, metadata, dy, offsets, block_expert, shards=shards, shared_every=shared_every
    )
    require_saved(y2, y2_metadata, (dy.shape[0], live), dy.dtype)
    return experts, v, live


def down_dims(
    y_values: Array,
    y_metadata: Array,
    w: Array,
    offsets: Array,
    block_expert: Array,
    permutation: Array | None,
    tokens: int | None,
    *,
    shards: int = 1,
    shared_every: int = 0,
) -> tuple[int, int]:
    """(E, V) of `down24`. ValueError unless its arguments fit."""
    rows, live = packed_dims(y_values, y_metadata)
    combinations, v = block_rows(rows, offsets, block_expert)
    experts = experts_of(combinations, shards)
    if live % shards:
        raise ValueError(f"{live=} must be a multiple of {shards=}")
    expected: tuple[int, ...] = (shards * experts, live // shards)
    if shared_every:
        expected = (shards * shared_rows.of_live(live // shards, experts, shared_every).hidden,)
    if w.ndim != len(expected) + 1 or w.shape[:-1] != expected:
        raise ValueError(f"{w.shape=} must be ({', '.join(map(str, expected))}, width)")
    if w.dtype != y_values.dtype:
        raise ValueError(f"{w.dtype=} must be {y_values.dtype=}")
    if (permutation is None) != (tokens is None):
        raise ValueError(f"permutation and {tokens=} must be given both or neither")
    if permutation is not None and (permutation.shape != (rows,) or permutation.dtype != jnp.int32):
        raise ValueError(f"{permutation.shape=}, {permutation.dtype=} must be {(rows,)}, int32")
    return experts, v


def gradient_dims(
    y: Array, g: Array, offsets: Array, num_experts: int, *, shards: int = 1
) -> tuple[int, int]:
    """(h, D) of `weight_gradient`. ValueError unless its arguments fit."""
    if y.ndim != 2 or g.ndim != 2 or y.shape[0] != g.shape[0]:
        raise ValueError(f"{y.shape=} and {g.shape=} must be matrices with equal rows")
    if y.dtype != g.dtype:
        raise ValueError(f"{y.dtype=} must be {g.dtype=}")
    if shards < 1 or y.shape[1] % shards:
        raise ValueError(f"{y.shape=}: neurons must be a multiple of {shards=}")
    if offsets.shape != (num_experts**shards + 1,) or offsets.dtype != jnp.int32:
        expected = (num_experts**shards + 1,)
        raise ValueError(f"{offsets.shape=}, {offsets.dtype=} must be {expected}, int32")
    return y.shape[1], g.shape[1]


def gradient24_dims(
    y: Array, g: Array, offsets: Array, densest: Array, num_experts: int
) -> tuple[int, int]:
    """(h, D) of `weight_gradient24`. ValueError unless its arguments fit."""
    live, width = gradient_dims(y, g, offsets, num_experts)
    if y.shape[0] % GROUP:
        raise ValueError(f"{y.shape=}: rows must be a multiple of {GROUP}")
    if densest.ndim != 2 or densest.shape[0] != num_experts or densest.shape[1] > live:
        raise ValueError(f"{densest.shape=} must be ({num_experts}, at most {live})")
    if densest.dtype != jnp.int32:
        raise ValueError(f"{densest.dtype=} must be int32")
    return live, width


def expert_major(w: Array, num_experts: int) -> Array:
    """(H, D), neurons interleaved, to (E, h, D)."""
    hidden, width = w.shape
    split = w.reshape(hidden // (GROUP * num_experts), num_experts, GROUP, width)
    return split.swapaxes(0, 1).reshape(num_experts, hidden // num_experts, width)


def interleaved(w: Array) -> Array:
    """(E, h, D) to (H, D), neurons interleaved."""
    experts, live, width = w.shape
    split = w.reshape(experts, live // GROUP, GROUP, width)
    return split.swapaxes(0, 1).reshape(experts * live, width)


def pack_weight24(
    w: Array,
    *,
    num_experts: int,
    m: int,
    scale: ArrayLike | None,
    threshold: bool = True,
    dtype: DTypeLike = jnp.bfloat16,
    shared_every: int = 0,
) -> tuple[Array, Array | None, Array]:
    """Soft-thresholds a weight 2:4 along D, scales and rounds it, packed and dense, by expert.

    Args:
      w: (H, D) floating point, neurons interleaved.
      num_experts: E. m: 4 E, neurons in a block.
      scale: None or a float32 scalar, multiplied in before rounding.
      threshold: False leaves the weight as it is, scaled and rounded.
      dtype: of the results, bfloat16 or float16 (float32 only here, for exact tests).
      shared_every: blocks of m neurons of which the last is every expert's; 0 for none.

    Returns:
      values (E h, D / 2) and metadata (E h / 64, D / 64, 128) int32 of the matrix with expert e's
      neurons in rows e h..(e + 1) h, here in their order; without a threshold values are the
      whole rows (E h, D) in that order, and metadata None. dense (E, h, D), the same numbers.
      With `shared_every` shared neurons are there once, in the last rows: values (H, ..), metadata
      (H / 64, ..) and dense (H, D), rows as of `kernels.shared_rows.row`.

    Raises:
      ValueError: an argument is not allowed.
    """
    w = jnp.asarray(w)
    live, width = weight_dims(w, num_experts, m, scale, shared_every)
    if not threshold:
        options = {"num_experts": num_experts, "shared_every": shared_every}
        return pack_whole(w, np.arange, scale=scale, dtype=dtype, **options)
    w = w.astype(jnp.float32)[neurons_by_expert(w.shape[0], num_experts, shared_every)]
    dense = _scaled(reference.soft_threshold(w), scale).astype(dtype)
    rows = w.shape[0] if shared_every else live
    if rows % TILE or width % TILE:
        raise ValueError(f"{rows=} and {width=} must be multiples of {TILE} to be packed")
    values, metadata = reference.pack24(
        w.reshape(-1, width), axis=1, mode="soft_threshold", scale=scale, dtype=dtype
    )
    return values, metadata, dense


def neurons_by_expert(hidden: int, num_experts: int, shared_every: int = 0) -> np.ndarray:
    """(E, h) int: each expert's neurons among the H. With shared ones (H,): all experts' own, then
    those (`kernels.shared_rows.row`)."""
    neurons = np.arange(hidden)
    if not shared_every:
        return neurons.reshape(-1, num_experts, GROUP).swapaxes(0, 1).reshape(num_experts, -1)
    sizes = shared_rows.of_hidden(hidden, num_experts, shared_every)
    blocks = neurons.reshape(sizes.superblocks, sizes.every, sizes.m)
    routed = blocks[:, :-1].swapaxes(0, 1).reshape(-1, num_experts, GROUP).swapaxes(0, 1)
    return np.concatenate([routed.reshape(-1), blocks[:, -1].reshape(-1)])


def pack_whole(
    w: Array,
    order: Callable[[int], np.ndarray],
    *,
    num_experts: int,
    scale: ArrayLike | None,
    dtype: DTypeLike,
    shared_every: int = 0,
) -> tuple[Array, None, Array]:
    """`pack_weight24` without a threshold, for a backend with a row order of its own.

    Args:
      w, num_experts, scale, dtype, shared_every: as for `pack_weight24`.
      order: from a number of rows to which of them a backend reads in each row's place.
    """
    # One gather each: on a GPU as slow as arrays turned, joined and cut, and shorter.
    w = jnp.asarray(w)
    rows = neurons_by_expert(w.shape[0], num_experts, shared_every)
    w = _scaled(w.astype(jnp.float32), scale).astype(dtype)
    take = lambda rows: w.at[rows].get(mode="promise_in_bounds")
    flat = rows.reshape(-1)
    return take(flat[order(flat.size)]), None, take(rows)


def _scaled(w: Array, scale: ArrayLike | None) -> Array:
    return w if scale is None else w * jnp.asarray(scale, jnp.float32)


def _product(a: Array, b: Array, contract: tuple[int, int]) -> Array:
    return lax.dot_general(
        a,
        b,
        (((contract[0],), (contract[1],)), ((), ())),
        # 16-bit products are exact; float32 operands are there for exact tests.
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _by_block(function: Callable, rows: tuple[Array, ...], offsets: Array, block_expert: Array):
    """function(expert, *its block of each of `rows`), block by block; zeros where unused."""
    blocks = block_expert.shape[0]
    v = rows[0].shape[0] // blocks
    start = jnp.arange(blocks, dtype=jnp.int32) * v

    def block(_, inputs):
        first, expert, *own = inputs
        used = first < offsets[-1]
        out = function(expert, *own)
        return None, jax.tree.map(lambda o: jnp.where(used, o, jnp.zeros_like(o)), out)

    split = [r.reshape(blocks, v, r.shape[1]) for r in rows]
    _, out = lax.scan(block, None, (start, block_expert, *split))
    return jax.tree.map(lambda o: o.reshape(blocks * v, o.shape[2]), out)


def _of_expert(
    values: Array, metadata: Array | None, experts: int, shards: int, shared_every: int
) -> Callable:
    """From a combination to its rows (h, D) of packed weights."""
    dense = values if metadata is None else reference.unpack24(values, metadata)
    return _rows_of(dense, experts, shards, shared_every)


def _rows_of(w: Array, experts: int, shards: int, shared_every: int) -> Callable:
    """From a combination to its rows (h, D) of weights, shard by shard and expert by expert."""
    if shared_every:
        own = shared_rows.of_hidden(w.shape[0] // shards, experts, shared_every).routed
        w = shared_rows.for_each_expert(w, experts, own, shards)
    w = w.reshape(shards * experts, -1, w.shape[-1])
    return lambda c: jnp.concatenate([w[g] for g in weight_rows(c, experts, shards)])


def _gather(dense: Array, metadata: Array) -> Array:
    """The values (m, k/2) of a dense (m, k) matrix at the positions of `metadata`."""
    m, k = dense.shape
    positions = jnp.stack(reference._unpack_metadata(metadata), axis=-1)
    groups = dense.reshape(m, k // GROUP, GROUP)
    return jnp.take_along_axis(groups, positions, axis=-1).reshape(m, k // 2)


def up24(
    values: Array,
    metadata: Array | None,
    x_p: Array,
    offsets: Array,
    block_expert: Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
    config: None = None,
) -> tuple[Array, Array, Array]:
    """Y2 = two of four of relu(x_p W_e^T)^2, dense and packed.

    Chosen on the float32 accumulators after relu^2, by value, ties to the lower index.

    Args:
      values, metadata: of `pack_weight24`.
      x_p: (T_pad, D), dtype of `values`.
      offsets: (E^S + 1,) int32. block_expert: (T_pad / V,) int32. shards: S.
      shared_every: blocks of neurons of which the last is every expert's; 0 for none.
      config: none for this backend.

    Returns:
      y2 (T_pad, h), and packed along h: y2_values (T_pad, h / 2) and y2_metadata
      (T_pad / 64, h / 64, 128) int32. In unused rows all values are zero.

    Raises:
      ValueError: an argument is not allowed, or the shapes do not fit.
    """
    del config
    experts, _, _ = up_dims(
        values, metadata, x_p, offsets, block_expert, shards=shards, shared_every=shared_every
    )
    w = _of_expert(values, metadata, experts, shards=shards, shared_every=shared_every)

    def block(expert, x):
        y = jnp.square(jax.nn.relu(_product(x, w(expert), (1, 1))))
        return jnp.where(reference.select24(y, by="value"), y, 0.0), y

    kept, full = _by_block(block, (x_p,), offsets, block_expert)
    y2_values, y2_metadata = reference.pack24(full, axis=1, mode="value", dtype=x_p.dtype)
    return kept.astype(x_p.dtype), y2_values, y2_metadata


def up24_linear(
    values: Array,
    metadata: Array | None,
    x_p: Array,
    offsets: Array,
    block_expert: Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
    config: None = None,
) -> Array:
    """x_p W_e^T, all of it: the products around a gate, where `up24` alone cannot choose.

    Args:
      values, metadata: of `pack_weight24`.
      x_p: (T_pad, D), dtype of `values`.
      offsets: (E^S + 1,) int32. block_expert: (T_pad / V,) int32. shards: S.
      shared_every: blocks of neurons of which the last is every expert's; 0 for none.
      config: none for this backend.

    Returns:
      (T_pad, h), dtype of `x_p`, rounded once from float32 accumulators.

    Raises:
      ValueError: the shapes do not fit.
    """
    del config
    experts, _, _ = up_dims(
        values, metadata, x_p, offsets, block_expert, shards=shards, shared_every=shared_every
    )
    w = _of_expert(values, metadata, experts, shards=shards, shared_every=shared_every)
    product = lambda expert, x: _product(x, w(expert), (1, 1)).astype(x.dtype)
    return _by_block(product, (x_p,), offsets, block_expert)


def by_token(out: Array, permutation: Array | None, tokens: int | None) -> Array:
    """Rows (T_pad, D) in the order of their tokens, (T, D); as they are without a permutation."""
    if permutation is None:
        return out
    return jnp.zeros((tokens, out.shape[1]), out.dtype).at[permutation].set(out, mode="drop")  # type: ignore[arg-type]


def down24(
    y_values: Array,
    y_metadata: Array,
    w: Array,
    offsets: Array,
    block_expert: Array,
    *,
    permutation: Array | None = None,
    tokens: int | None = None,
    shards: int = 1,
    shared_every: int = 0,
    config: None = None,
) -> Array:
    """Y W_e for 2:4 activations: Y3 = Y2 W2_e and dX = dY1 W1_e.

    Args:
      y_values, y_metadata: of Y (T_pad, h), packed along h.
      w: (S E, h / S, D), dtype of `y_values`; with `shared_every` (S H, D).
      offsets: (E^S + 1,) int32. block_expert: (T_pad / V,) int32. shards: S.
      shared_every: blocks of neurons of which the last is every expert's; 0 for none.
      permutation: None, or (T_pad,) int32: the token of each row, T or more for padding. Then the
        result is in the order of the tokens. Every token has a row.
      tokens: T, with `permutation`.
      config: none for this backend.

    Returns:
      (T_pad, D), or (T, D) with `permutation`, in the dtype of w.

    Raises:
      ValueError: the shapes do not fit.
    """
    del config
    layout = offsets, block_expert
    experts, _ = down_dims(
        y_values,
        y_metadata,
        w,
        *layout,
        permutation,
        tokens,
        shards=shards,
        shared_every=shared_every,
    )
    w = jnp.asarray(w)
    rows = _rows_of(w, experts, shards=shards, shared_every=shared_every)
    y = reference.unpack24(y_values, y_metadata)

    def block(expert, y):
        return _product(y, rows(expert), (1, 0)).astype(w.dtype)

    return by_token(_by_block(block, (y,), offsets, block_expert), permutation, tokens)


def up24_backward(
    values: Array,
    metadata: Array | None,
    dy_p: Array,
    y2: Array,
    y2_metadata: Array,
    offsets: Array,
    block_expert: Array,
    *,
    shards: int = 1,
    shared_every: int = 0,
    config: None = None,
) -> tuple[Array, Array]:
    """dY1 = 2 sqrt(Y2) (dy_p W_e^T) on the support of Y2, dense and packed.

    Args:
      values, metadata: of `pack_weight24`, of the second matrix of the network.
      dy_p: (T_pad, D), dtype of `values`.
      y2: (T_pad, h) and y2_metadata: of `up24`.
      offsets: (E^S + 1,) int32. block_expert: (T_pad / V,) int32. shards: S.
      shared_every: blocks of neurons of which the last is every expert's; 0 for none.
      config: none for this backend.

    Returns:
      dy1 (T_pad, h) and dy1_values (T_pad, h / 2), packed at the positions of y2_metadata.

    Raises:
      ValueError: the shapes do not fit.
    """
    del config
    arguments = (values, metadata, dy_p, y2, y2_metadata, offsets, block_expert)
    experts, _, _ = backward_dims(*arguments, shards=shards, shared_every=shared_every)
    w = _of_expert(values, metadata, experts, shards=shards, shared_every=shared_every)

    def block(expert, dy, y2):
        dy2 = _product(dy, w(expert), (1, 1))
        return (2.0 * jnp.sqrt(y2.astype(jnp.float32)) * dy2).astype(dy.dtype)

    dy1 = _by_block(block, (dy_p, y2), offsets, block_expert)
    return dy1, _gather(dy1, y2_metadata)


def weight_gradient(
    y: Array,
    g: Array,
    offsets: Array,
    *,
    num_experts: int,
    shards: int = 1,
    shared_every: int = 0,
    config: None = None,
) -> Array:
    """Y_e^T G_e for the rows of each expert: dW2_e = Y2^T dY3, dW1_e = dY1^T X, as the weights lie.

    Args:
      y: (T_pad, h). g: (T_pad, D), of one dtype.
      offsets: (E^S + 1,) int32. num_experts: E. shards: S.
      shared_every: blocks of neurons of which the last is every expert's; 0 for none.
      config: none for this backend.

    Returns:
      (H, D) float32, neurons interleaved, shard by shard; zeros for an expert without rows. With
      `shared_every` those of all experts are added up, where the parameters have them.

    Raises:
      ValueError: the shapes do not fit.
    """
    del config
    gradient_dims(y, g, offsets, num_experts, shards=shards)
    experts = jnp.arange(num_experts, dtype=jnp.int32)
    found = []
    for s, part in enumerate(jnp.split(jnp.asarray(y), shards, axis=1)):
        one = lambda _, e, s=s, part=part: (
            None,
            _gradient(_rows_with(e, s, part.shape[0], offsets, num_experts), part, g),
        )
        dw = interleaved(lax.scan(one, None, experts)[1])
        found.append(shared_rows.add_up(dw, num_experts, shared_every) if shared_every else dw)
    return jnp.concatenate(found)


def _rows_with(e: Array, shard: int, rows: int, offsets: Array, experts: int) -> Array:
    """(rows, 1) bool: the rows whose combination has expert e in this shard."""
    offsets = jnp.asarray(offsets)
    row = jnp.arange(rows, dtype=jnp.int32)[:, None]
    combination = jnp.arange(offsets.shape[0] - 1, dtype=jnp.int32)
    own = (row >= offsets[:-1]) & (row < offsets[1:])
    own &= expert_in(shard, combination, experts) == e
    return jnp.any(own, axis=1, keepdims=True)


def _gradient(own: Array, y: Array, g: Array) -> Array:
    """Y^T G for the rows `own`: (h, D) float32."""
    # Both are masked: an unused row may hold anything, NaN as well.
    return _product(jnp.where(own, y, 0), jnp.where(own, g, 0), (0, 0))


def nonzeros(y: Array, offsets: Array, block: int) -> Array:
    """How many rows of each expert are not zero, neuron by neuron.

    Args:
      y: (T_pad, h). offsets: (E + 1,) int32, multiples of `block`, which divides T_pad.

    Returns:
      (E, h) int32; unused rows are not counted.
    """
    rows, live = y.shape
    if block < 1 or rows % block:
        raise ValueError(f"{y.shape=}: rows must be a multiple of {block=}")
    counts = jnp.sum((y != 0).reshape(rows // block, block, live), axis=1, dtype=jnp.int32)
    first = jnp.arange(rows // block, dtype=jnp.int32) * block
    own = (first >= offsets[:-1, None]) & (first < offsets[1:, None])
    return jnp.sum(jnp.where(own[:, :, None], counts, 0), axis=1, dtype=jnp.int32)


def densest_neurons(counts: Array, number: int) -> Array:
    """The neurons of each expert with the largest counts, ties to the lower index.

    Args:
      counts: (E, h) int32, of `nonzeros`. number: how many, at most h.

    Returns:
      (E, number) int32, all different within an expert, the largest count first.
    """
    if counts.ndim != 2 or not 0 <= number <= counts.shape[1]:
        raise ValueError(f"{number=} must be at most the neurons of {counts.shape=}")
    return lax.top_k(counts, number)[1].astype(jnp.int32)


def weight_gradient24(
    y: Array,
    g: Array,
    offsets: Array,
    densest: Array,
    *,
    num_experts: int,
    config: None = None,
) -> Array:
    """`weight_gradient` with Y_e 2:4 along its rows, but for its densest neurons.

    Of four consecutive rows of an expert a neuron keeps the two of largest magnitude, ties to the
    lower row, NaN above every number; neurons in `densest` keep all (after arXiv 2503.16672).

    Args:
      y: (T_pad, h). g: (T_pad, D), of one dtype; T_pad a multiple of 4.
      offsets: (E + 1,) int32, multiples of 4.
      densest: (E, k) int32, expert-local neurons, all different, such as of `densest_neurons`.
      num_experts: E.
      config: none for this backend.

    Returns:
      (H, D) float32, neurons interleaved; zeros for an expert without rows.

    Raises:
      ValueError: the shapes do not fit.
    """
    del config
    live, _ = gradient24_dims(y, g, offsets, densest, num_experts)
    kept = jnp.where(reference.select24(y, axis=0, by="magnitude"), y, 0)

    def one(_, inputs):
        e, whole = inputs
        dense = jnp.zeros((live,), bool).at[whole].set(True)
        own = _rows_with(e, 0, y.shape[0], offsets, num_experts)
        return None, _gradient(own, jnp.where(dense, y, kept), g)

    _, dw = lax.scan(one, None, (jnp.arange(num_experts, dtype=jnp.int32), densest))
    return interleaved(dw)


def check_pack_weight24(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def check_up24(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def check_down24(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def check_up24_backward(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def check_weight_gradient(*args, **kwargs) -> None:
    """The reference serves every device and shape."""


def check_weight_gradient24(*args, **kwargs) -> None:
    """The reference serves every device and shape."""
