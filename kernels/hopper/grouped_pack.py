"""Weights for the grouped products: threshold, scale, pack, split by expert, in one pass (Hopper).

Weights that are not 2:4 are scaled and put in both orders by the same pass: jax.numpy's gathers of
them take six times as long as memory does. (Those of 16 bits do take the gathers: weights that were
packed once and gathered whole, `Sparsity.gather`.)

Memory-bound. Half a warp reads 64 consecutive elements of a neuron, a group of four a thread, and
a thread does the same groups of the two neurons whose metadata share words. A warp does 8 such
pairs of neurons, which makes one line of 128 bytes of metadata.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.typing import ArrayLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels import reference_grouped
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_neurons as neurons
from kernels.hopper import ptx
from kernels.hopper.pack24 import pack_group
from kernels.shared_rows import GROUP, SharedRows, of_hidden

_ROUNDS = 4  # pairs of neurons that a half-warp does
_GROUPS = 2 * _ROUNDS  # of a thread
_ARRAY = common.strided(_GROUPS)
_WEIGHTS = 64  # elements along D that a block does


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Static facts of one call."""

    experts: int
    live: int
    width: int
    dtype: str
    shared: SharedRows | None = None

    @property
    def rows(self) -> int:
        """Of the results: shared neurons are there once."""
        return self.experts * self.live if self.shared is None else self.shared.hidden

    @property
    def blocks(self) -> int:
        return self.rows // 64 * (self.width // _WEIGHTS)


class _Place:
    """Where the thread's groups lie: round i is of group 8 warp + q(i) of a part of 128 neurons."""

    def __init__(self, p: _Problem, row_tile: ir.Value, k_tile: ir.Value):
        self.p, self.row_tile, self.k_tile = p, row_tile, k_tile
        self.warp, self.lane = common.warp_and_lane()
        self.upper = arith.shrui(self.lane, ptx.const32(4))
        self.lane16 = arith.andi(self.lane, ptx.const32(15))
        self.column = common.add(common.mul(k_tile, _WEIGHTS), common.mul(self.lane16, 4))
        number = arith.shrui(row_tile, ptx.const32(1))
        self.half = arith.andi(row_tile, ptx.const32(1))
        own = p.live if p.shared is None else p.shared.routed
        parts = ptx.const32(own // common.PART)
        self.expert, self.part = arith.divui(number, parts), arith.remui(number, parts)
        if p.shared is not None:
            # What follows on all experts' own are the shared neurons, whoever's they are taken as.
            first = p.experts * own // common.PART
            is_own = arith.cmpi(arith.CmpIPredicate.ult, number, ptx.const32(first))
            behind = common.add(number, own // common.PART - first)
            self.part = arith.select(is_own, self.part, behind)
        self.first_row = common.mul(number, common.PART)

    def q(self, i: int) -> ir.Value:
        return common.add(self.upper, 2 * i)

    def group(self, i: int) -> ir.Value:
        """The expert-local group of four neurons."""
        within = common.add(common.mul(self.warp, 8), self.q(i))
        return common.add(common.mul(self.part, common.PART // 4), within)

    def source(self, i: int, b: int) -> ir.Value:
        """First element of the group in the weight, for neuron 2 half + b of its four."""
        own = common.mul(self.expert, GROUP)
        if self.p.shared is None:
            row = common.add(common.mul(self.group(i), GROUP * self.p.experts), own)
        else:
            row = self._row_of(self.p.shared, self.group(i), own)
        row = common.add(common.add(row, common.mul(self.half, 2)), b)
        return self._element(row, self.p.width, self.column)

    @staticmethod
    def _row_of(sizes: SharedRows, group: ir.Value, own: ir.Value) -> ir.Value:
        """First row of an expert's group, as `kernels.shared_rows.repeat` orders them.

        own: the expert's place in a routed block.
        """
        split = lambda a, n: (arith.divui(a, ptx.const32(n)), arith.remui(a, ptx.const32(n)))
        block = lambda superblock, place: common.add(
            common.mul(superblock, sizes.every * sizes.m), place
        )
        place, superblock = split(group, sizes.superblocks)
        routed = block(superblock, common.add(common.mul(place, sizes.m), own))
        first = sizes.routed // GROUP
        superblock, within = split(common.add(group, -first), sizes.experts)
        place = common.add(common.mul(within, GROUP), (sizes.every - 1) * sizes.m)
        shared = block(superblock, place)
        is_routed = arith.cmpi(arith.CmpIPredicate.ult, group, ptx.const32(first))
        return arith.select(is_routed, routed, shared)

    def dense(self, i: int, b: int) -> ir.Value:
        within = common.add(common.mul(self.warp, 8), self.q(i))
        row = common.add(self.first_row, common.mul(within, 4))
        row = common.add(common.add(row, common.mul(self.half, 2)), b)
        return self._element(row, self.p.width, self.column)

    def packed(self, i: int, b: int) -> ir.Value:
        half = arith.shrui(self.column, ptx.const32(1))
        return self._element(self._packed_row(i, b), self.p.width // 2, half)

    def whole(self, i: int, b: int) -> ir.Value:
        """As `packed`, of a weight that is not 2:4."""
        return self._element(self._packed_row(i, b), self.p.width, self.column)

    def _packed_row(self, i: int, b: int) -> ir.Value:
        row = common.add(common.mul(self.row_tile, 64), common.mul(self.warp, 16))
        return common.add(common.add(row, self.q(i)), 8 * b)

    def metadata(self) -> ir.Value:
        """The word of round lane % 4 and the thread's 16 elements along D."""
        tile = common.add(common.mul(self.row_tile, self.p.width // 64), self.k_tile)
        q = common.add(self.upper, common.mul(arith.andi(self.lane, ptx.const32(3)), 2))
        word = common.add(common.mul(q, 4), arith.shrui(self.lane16, ptx.const32(2)))
        return common.add(common.add(common.mul(tile, 128), common.mul(self.warp, 32)), word)

    @staticmethod
    def _element(row: ir.Value, width: int, column: ir.Value) -> ir.Value:
        return common.add(common.mul(row, width), column)


def _address(ref: ir.Value, element: ir.Value, itemsize: int) -> ir.Value:
    base = llvm.ptrtoint(ptx.i64_type(), utils.memref_ptr(ref))
    wide = arith.extui(ptx.i64_type(), element)
    return arith.addi(base, arith.muli(wide, ptx.const64(itemsize)))


def _load(p: _Problem):
    """The thread's groups, round by round, two neurons each: four arrays (elements)."""
    array = common.strided_type(_GROUPS, jnp.float32)

    @plgpu.inline_mgpu(
        arg_types=(common.REF, common.SCALAR, common.SCALAR), return_type=[array] * 4
    )
    def load(ctx, w_g, row_tile, k_tile):
        del ctx
        place = _Place(p, common.scalar(row_tile), common.scalar(k_tile))
        f32 = ir.F32Type.get()
        struct = llvm.StructType.get_literal([f32] * 4)
        groups = []
        for i in range(_ROUNDS):
            for b in range(2):
                asm = "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];"
                address = _address(w_g, place.source(i, b), 4)
                groups.append(ptx.asm(struct, [address], asm, "=f,=f,=f,=f,l"))
        return [
            common.to_array([llvm.extractvalue(f32, g, [e]) for g in groups], signed=None)
            for e in range(4)
        ]

    return load


def _store(p: _Problem):
    """Writes values, metadata and dense rows of the thread's groups."""
    arg_types = (*(common.REF,) * 3, *(common.SCALAR,) * 2, *(_ARRAY,) * 3)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def store(ctx, values_g, meta_g, dense_g, row_tile, k_tile, lows, highs, nibbles):
        del ctx
        place = _Place(p, common.scalar(row_tile), common.scalar(k_tile))
        lows, highs, nibbles = map(common.to_scalars, (lows, highs, nibbles))
        zero, lane4 = ptx.const32(0), arith.andi(place.lane, ptx.const32(3))
        own = zero
        for i in range(_ROUNDS):
            word = zero
            for b in range(2):
                low, high, nibble = (v[2 * i + b] for v in (lows, highs, nibbles))
                pair = ptx.pack_pair(low, high, p.dtype)
                address = _address(values_g, place.packed(i, b), 2)
                ptx.asm(None, [address, pair], "st.global.b32 [$0], $1;", "l,r")
                code = neurons.spread_code(nibble)
                words = neurons.spread(pair, code, zero)
                address = _address(dense_g, place.dense(i, b), 2)
                ptx.asm(None, [address, *words], "st.global.v2.b32 [$0], {$1, $2};", "l,r,r")
                word = arith.ori(word, arith.shli(nibble, ptx.const32(16 * b)))
            word = neurons.join_lanes(arith.shli(word, common.mul(lane4, 4)), (1, 2))
            mine = arith.cmpi(arith.CmpIPredicate.eq, lane4, ptx.const32(i))
            own = arith.select(mine, word, own)
        address = _address(meta_g, place.metadata(), 4)
        ptx.asm(None, [address, own], "st.global.b32 [$0], $1;", "l,r")

    return store


def _store_whole(p: _Problem):
    """Writes the thread's groups in the order of `row_order` and by expert."""

    @plgpu.inline_mgpu(arg_types=(*(common.REF,) * 2, *(common.SCALAR,) * 2, *(_ARRAY,) * 4))
    def store(ctx, values_g, dense_g, row_tile, k_tile, *elements):
        del ctx
        place = _Place(p, common.scalar(row_tile), common.scalar(k_tile))
        columns = [common.to_scalars(e) for e in elements]
        for i in range(_ROUNDS):
            for b in range(2):
                four = [column[2 * i + b] for column in columns]
                words = [ptx.pack_pair(four[j], four[j + 1], p.dtype) for j in (0, 2)]
                for out, at in ((values_g, place.whole(i, b)), (dense_g, place.dense(i, b))):
                    text = "st.global.v2.b32 [$0], {$1, $2};"
                    ptx.asm(None, [_address(out, at, 2), *words], text, "l,r,r")

    return store


def pack_weight24(
    w: jax.Array,
    *,
    num_experts: int,
    m: int,
    scale: ArrayLike | None,
    threshold: bool = True,
    dtype: Any = jnp.bfloat16,
    shared_every: int = 0,
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """`kernels.reference_grouped.pack_weight24`; rows of an expert in the order of `row_order`.

    Raises ValueError for shapes that do not fit and NotImplementedError where
    `check_pack_weight24` does.
    """
    options: dict[str, Any] = {"num_experts": num_experts, "m": m, "scale": scale, "dtype": dtype}
    options["shared_every"] = shared_every
    check_pack_weight24(w, threshold=threshold, **options)
    live, width = reference_grouped.weight_dims(w, num_experts, m, scale, shared_every)
    if not threshold and w.dtype != jnp.float32:
        del options["m"]
        return reference_grouped.pack_whole(w, neurons.row_order, **options)
    shared = of_hidden(w.shape[0], num_experts, shared_every) if shared_every else None
    p = _Problem(num_experts, live, width, common.ptx_name(dtype), shared)
    hidden = p.rows

    def body(w_g, *rest):
        scale_g, *outputs = rest if scale is not None else (None, *rest)
        factor = scale_g[0] if scale_g is not None else None
        index, k_tiles = lax.axis_index("block"), width // _WEIGHTS
        place = (lax.div(index, k_tiles), lax.rem(index, k_tiles))
        elements = list(_load(p)(w_g, *place))
        if threshold:
            packed = pack_group(elements, "soft_threshold", factor)
            _store(p)(*outputs, *place, *packed)
        else:
            scaled = elements if factor is None else [e * factor for e in elements]
            _store_whole(p)(*outputs, *place, *scaled)

    rows = jax.ShapeDtypeStruct((hidden, width), dtype)
    words = jax.ShapeDtypeStruct((hidden // 64, width // 64, 128), jnp.int32)
    half = jax.ShapeDtypeStruct((hidden, width // 2), dtype)
    call = plgpu.kernel(
        body,
        out_type=(half, words, rows) if threshold else (rows, rows),
        grid=(p.blocks,),
        grid_names=("block",),
        kernel_name="pack_weight24_hopper",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    scales = [] if scale is None else [jnp.asarray(scale, jnp.float32).reshape(1)]
    values, *metadata, dense = call(w, *scales)
    if shared is None:
        dense = dense.reshape(num_experts, live, width)
    return values, metadata[0] if metadata else None, dense


def check_pack_weight24(
    w: jax.Array,
    *,
    num_experts: int,
    m: int,
    scale: ArrayLike | None,
    threshold: bool = True,
    dtype: Any = jnp.bfloat16,
    shared_every: int = 0,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that are never allowed raise ValueError.
    """
    live, width = reference_grouped.weight_dims(w, num_experts, m, scale, shared_every)
    common.check_shapes(common.TOKENS, live, width, dtype)
    neurons.sizes_of(live, num_experts, shards=1, shared_every=shared_every)
    if threshold and w.dtype != jnp.float32:
        raise NotImplementedError(f"{w.dtype=} is not float32")
    if w.size >= 1 << 31:
        raise NotImplementedError(f"{w.shape=} has 2^31 elements or more")
