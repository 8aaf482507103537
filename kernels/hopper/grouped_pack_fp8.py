"""Weights for the grouped products of 8 bits: threshold, scale, round, pack and transpose at once.

Memory-bound. A block does 128 neurons of an expert by 64 elements along D, with threads that lie as
those of `kernels.hopper.grouped_pack`: half a warp reads 64 consecutive elements of a neuron, a
group of four a thread. A thread has all four neurons of a group of neurons, which are four
consecutive bytes of a column; columns pass through shared memory, so that they are written in
lines of 128 bytes.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.typing import ArrayLike
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels import reference_grouped_fp8 as reference
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_neurons as neurons
from kernels.hopper import grouped_neurons_fp8 as neurons_fp8
from kernels.hopper import ptx
from kernels.hopper.pack24 import pack_group

_ROUNDS = 4  # groups of neurons that a half-warp does
_GROUPS = 4 * _ROUNDS  # of elements, of a thread
_ARRAY = common.strided(_GROUPS)
_WEIGHTS = 64  # elements along D that a block does


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Static facts of one call."""

    experts: int
    live: int
    width: int

    @property
    def parts(self) -> int:
        """Of 128 neurons, in an expert."""
        return self.live // common.PART

    @property
    def blocks(self) -> int:
        return self.experts * self.parts * (self.width // _WEIGHTS)


class _Place:
    """Where the thread's groups lie: round i is of group 8 warp + q(i) of the part's 32."""

    def __init__(self, p: _Problem, part: ir.Value, k_tile: ir.Value):
        self.p, self.part, self.k_tile = p, part, k_tile
        self.warp, self.lane = common.warp_and_lane()
        self.upper = arith.shrui(self.lane, ptx.const32(4))
        self.lane16 = arith.andi(self.lane, ptx.const32(15))
        self.lane8 = arith.andi(self.lane, ptx.const32(7))
        self.column = common.add(common.mul(k_tile, _WEIGHTS), common.mul(self.lane16, 4))
        parts = ptx.const32(p.parts)
        self.expert, self.own_part = arith.divui(part, parts), arith.remui(part, parts)

    def group(self, i: int) -> ir.Value:
        """Within the part."""
        return common.add(common.add(common.mul(self.warp, 8), self.upper), 2 * i)

    def source(self, i: int, neuron: int) -> ir.Value:
        """First element in the weight, for one of the four neurons of a group."""
        group = common.add(common.mul(self.own_part, common.PART // 4), self.group(i))
        row = common.add(common.mul(group, 4 * self.p.experts), common.mul(self.expert, 4))
        return common.add(common.mul(common.add(row, neuron), self.p.width), self.column)

    def packed(self, i: int, neuron: int) -> ir.Value:
        """In the order of `row_order`: neuron 2 a + b of a group is in row 64 a + 8 b + .."""
        a, b = divmod(neuron, 2)
        row = common.add(common.mul(self.part, common.PART), common.mul(self.warp, 16))
        row = common.add(common.add(row, self.upper), 64 * a + 8 * b + 2 * i)
        half = arith.shrui(self.column, ptx.const32(1))
        return common.add(common.mul(row, self.p.width // 2), half)

    def metadata(self) -> ir.Value:
        """Of the thread's two words: half lane8 / 4 of the part's rows, round lane8 % 4."""
        tile = common.add(common.mul(self.part, 2), arith.shrui(self.lane8, ptx.const32(2)))
        tile = common.add(common.mul(tile, self.p.width // 64), self.k_tile)
        q = common.mul(arith.andi(self.lane8, ptx.const32(3)), 2)
        q = common.add(q, self.upper)
        half = common.mul(arith.shrui(self.lane16, ptx.const32(3)), 2)
        word = common.add(common.add(common.mul(self.warp, 32), common.mul(q, 4)), half)
        return common.add(common.mul(tile, 128), word)

    def staged(self, i: int, element: int) -> ir.Value:
        """Bytes before the word of a group in column 4 lane16 + element, in shared memory.

        Words of a column are mixed, so that the 32 of a warp lie in different banks.
        """
        column = common.add(common.mul(self.lane16, 4), element)
        word = arith.xori(self.group(i), common.mul(self.lane16, 2))
        return common.add(common.mul(column, common.PART), common.mul(word, 4))


def _load(p: _Problem):
    """The thread's groups, round by round, four neurons each: four arrays (elements)."""
    array = common.strided_type(_GROUPS, jnp.float32)

    @plgpu.inline_mgpu(
        arg_types=(common.REF, common.SCALAR, common.SCALAR), return_type=[array] * 4
    )
    def load(ctx, w_g, part, k_tile):
        del ctx
        place = _Place(p, common.scalar(part), common.scalar(k_tile))
        base = ptx.global_address(w_g)
        f32 = ir.F32Type.get()
        struct = llvm.StructType.get_literal([f32] * 4)
        groups = []
        for i in range(_ROUNDS):
            for neuron in range(4):
                address = ptx.offset_address(base, place.source(i, neuron), 4)
                asm = "ld.global.v4.f32 {$0, $1, $2, $3}, [$4];"
                groups.append(ptx.asm(struct, [address], asm, "=f,=f,=f,=f,l"))
        return [
            common.to_array([llvm.extractvalue(f32, g, [e]) for g in groups], signed=None)
            for e in range(4)
        ]

    return load


def _spread(pair: ir.Value, nibble: ir.Value) -> ir.Value:
    """The four bytes of a group, of its kept pair in the low two."""
    # A selector for each byte: the pair's first (0) or second (1), or a zero (2).
    four = lambda index: common.mul(index, 4)
    first = arith.shli(ptx.const32(0 ^ 2), four(arith.andi(nibble, ptx.const32(3))))
    second = arith.shli(ptx.const32(1 ^ 2), four(arith.shrui(nibble, ptx.const32(2))))
    selector = arith.xori(ptx.const32(0x2222), arith.xori(first, second))
    return neurons.permute(pair, ptx.const32(0), selector)


def _transpose(words: list[ir.Value]) -> list[ir.Value]:
    """Four words of four bytes: byte i of word j becomes byte j of word i."""
    permute = lambda a, b, code: neurons.permute(a, b, ptx.const32(code))
    pairs = [
        [permute(words[i], words[i + 1], code) for code in (0x5140, 0x7362)] for i in (0, 2)
    ]  # fmt: skip
    return [permute(pairs[0][h], pairs[1][h], code) for h in range(2) for code in (0x5410, 0x7632)]


def _store(p: _Problem):
    """Writes values, metadata and columns of the thread's groups."""
    arg_types = (*(common.REF,) * 4, *(common.SCALAR,) * 2, *(_ARRAY,) * 3)

    @plgpu.inline_mgpu(arg_types=arg_types)
    def store(ctx, values_g, meta_g, columns_g, columns_s, part, k_tile, lows, highs, nibbles):
        del ctx
        place = _Place(p, common.scalar(part), common.scalar(k_tile))
        lows, highs, nibbles = map(common.to_scalars, (lows, highs, nibbles))
        values, staged = ptx.global_address(values_g), ptx.shared_address(columns_s)
        own = [ptx.const32(0)] * 2
        for i in range(_ROUNDS):
            four = range(4 * i, 4 * i + 4)
            spread = []
            for neuron, at in enumerate(four):
                pair = ptx.pack_two(lows[at], highs[at], "e4m3")
                address = ptx.offset_address(values, place.packed(i, neuron), 1)
                ptx.asm(None, [address, pair], "st.global.b16 [$0], $1;", "l,r")
                spread.append(_spread(pair, nibbles[at]))
            for element, word in enumerate(_transpose(spread)):
                address = common.add(staged, place.staged(i, element))
                ptx.asm(None, [address, word], "st.shared.b32 [$0], $1;", "r,r,~{memory}")
            for a in range(2):
                pair = [nibbles[four[2 * a + b]] for b in range(2)]
                words = neurons_fp8.metadata_words(pair, place.lane8, 1)
                mine = arith.cmpi(
                    arith.CmpIPredicate.eq, place.lane8, ptx.const32(4 * a + i)
                )  # fmt: skip
                own = [arith.select(mine, w, o) for w, o in zip(words, own, strict=True)]
        address = ptx.offset_address(ptx.global_address(meta_g), place.metadata(), 4)
        ptx.asm(None, [address, *own], "st.global.v2.b32 [$0], {$1, $2};", "l,r,r")
        utils.warpgroup_barrier()
        _store_columns(p, place, columns_g, staged)

    return store


def _store_columns(p: _Problem, place: _Place, columns_g, staged: ir.Value) -> None:
    """Writes the staged columns, eight bytes a thread, sixteen threads a column."""
    i32 = ptx.i32_type()
    two = llvm.StructType.get_literal([i32, i32])
    thread = ptx.thread_in_warpgroup()
    chunk, first = arith.andi(thread, ptx.const32(15)), arith.shrui(thread, ptx.const32(4))
    base = ptx.global_address(columns_g)
    column0 = common.add(common.mul(place.expert, p.width), common.mul(place.k_tile, _WEIGHTS))
    neuron = common.add(common.mul(place.own_part, common.PART), common.mul(chunk, 8))
    for step in range(_WEIGHTS // 8):
        column = common.add(first, 8 * step)
        mixed = arith.xori(chunk, arith.shrui(column, ptx.const32(2)))
        address = common.add(common.mul(column, common.PART), common.mul(mixed, 8))
        address = common.add(staged, address)
        loaded = ptx.asm(
            two, [address], "ld.shared.v2.b32 {$0, $1}, [$2];", "=r,=r,r,~{memory}"
        )  # fmt: skip
        words = [llvm.extractvalue(i32, loaded, [i]) for i in range(2)]
        target = common.add(common.mul(common.add(column0, column), p.live), neuron)
        target = ptx.offset_address(base, target, 1)
        ptx.asm(None, [target, *words], "st.global.v2.b32 [$0], {$1, $2};", "l,r,r")


def pack_weight24_fp8(
    w: jax.Array, *, num_experts: int, m: int, scale: ArrayLike
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`kernels.reference_grouped_fp8.pack_weight24_fp8`; rows in the order of `row_order`.

    Raises ValueError for shapes that do not fit and NotImplementedError where
    `check_pack_weight24_fp8` does.
    """
    check_pack_weight24_fp8(w, num_experts=num_experts, m=m, scale=scale)
    live, width = reference.pack_dims(w, num_experts, m, scale)
    hidden = w.shape[0]
    p = _Problem(num_experts, live, width)

    def body(w_g, scale_g, values_g, meta_g, columns_g, columns_s):
        index, k_tiles = lax.axis_index("block"), width // _WEIGHTS
        place = (lax.div(index, k_tiles), lax.rem(index, k_tiles))
        elements = _load(p)(w_g, *place)
        packed = pack_group(list(elements), "soft_threshold", scale_g[0])
        _store(p)(values_g, meta_g, columns_g, columns_s, *place, *packed)

    call = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((hidden, width // 2), reference.WEIGHT),
            jax.ShapeDtypeStruct((hidden // 64, width // 64, 128), jnp.int32),
            jax.ShapeDtypeStruct((num_experts * width, live), reference.WEIGHT),
        ),
        scratch_types=[plgpu.SMEM((_WEIGHTS, common.PART // 4), jnp.int32)],
        grid=(p.blocks,),
        grid_names=("block",),
        kernel_name="pack_weight24_fp8_hopper",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    values, metadata, columns = call(w, jnp.asarray(scale, jnp.float32).reshape(1))
    return values, metadata, columns.reshape(num_experts, width, live)


def check_pack_weight24_fp8(
    w: jax.Array, *, num_experts: int, m: int, scale: ArrayLike
) -> None:  # fmt: skip
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that are never allowed raise ValueError.
    """
    live, width = reference.pack_dims(w, num_experts, m, scale)
    # Not `check_shapes_fp8`: that is for the products, and a device of a mesh packs its part.
    common.check_shapes(common.TOKENS, live, width, jnp.bfloat16)
    if w.dtype != jnp.float32:
        raise NotImplementedError(f"{w.dtype=} is not float32")
    if w.size >= 1 << 31:
        raise NotImplementedError(f"{w.shape=} has 2^31 elements or more")
