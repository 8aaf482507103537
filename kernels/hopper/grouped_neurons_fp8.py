"""What products of packed weights and tokens do in their own way where operands have 8 bits.

Parts, accumulators and dense staging are those of `kernels.hopper.grouped_neurons`. Packed values
take half the bytes; every token has factors of its own; and metadata lie as 8-bit instructions want
them (`kernels.reference_fp8`): a word is 32 neurons of one token, which eight groups make, those of
a warp's lanes of equal c. All that depends on that layout is here, in `metadata_address`,
`metadata_words` and `nibbles`.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels.groups24 import NARROW
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_neurons as neurons
from kernels.hopper import ptx

ROW = 64  # bytes of a staged row of packed values
PANEL = neurons.CHUNK * ROW
FACTORS = common.strided(2)
FACTOR_BYTES = common.TOKENS * 8  # of a part's tokens, two float32 each


@plgpu.inline_mgpu(
    arg_types=(common.REF, common.SCALAR), return_type=common.strided_type(2, jnp.float32)
)
def load_factors(ctx, factors_g, token0):
    """The factors of one token of the part, for each thread."""
    del ctx
    token = common.add(common.scalar(token0), ptx.thread_in_warpgroup())
    address = ptx.offset_address(ptx.global_address(factors_g), token, 8)
    return common.to_array(ptx.load_global_f32(address, 2), signed=None)


@plgpu.inline_mgpu(arg_types=(FACTORS, common.REF))
def share_factors(ctx, factors, factors_s):
    """Lets all threads of the warpgroup read what `load_factors` gave each of them.

    The warpgroup must have passed a barrier since it last read them.
    """
    del ctx
    address = common.add(ptx.shared_address(factors_s), common.mul(ptx.thread_in_warpgroup(), 8))
    ptx.store_shared_f32(address, common.to_scalars(factors))
    utils.warpgroup_barrier()


def factors_of(place: neurons.Place, factors_s: ir.Value, sixteen: int):
    """[n][j]: both factors of token 16 sixteen + 8 n + 2 c + j."""
    f32 = ir.F32Type.get()
    four = llvm.StructType.get_literal([f32] * 4)
    address = common.add(ptx.shared_address(factors_s), common.mul(place.c2, 8))
    found = []
    for n in range(2):
        asm = f"ld.shared.v4.f32 {{$0, $1, $2, $3}}, [$4+{(16 * sixteen + 8 * n) * 8}];"
        loaded = ptx.asm(four, [address], asm, "=f,=f,=f,=f,r,~{memory}")
        values = [llvm.extractvalue(f32, loaded, [i]) for i in range(4)]
        found.append([values[:2], values[2:]])
    return found


def store(
    place: neurons.Place,
    n: int,
    j: int,
    words: list[ir.Value],
    pair: ir.Value,
    factor: ir.Value,
    dtype: str,
    staged: ir.Value,
    packed: ir.Value,
    dense_panel: int,
) -> None:
    """Stages a group, dense and, times `factor`, packed, for token 8 n + 2 c + j."""
    address = common.add(staged, place.dense(j, dense_panel))
    asm = f"st.shared.v2.b32 [$0+{n * 8 * neurons.ROW}], {{$1, $2}};"
    ptx.asm(None, [address, *words], asm, "r,r,r,~{memory}")
    text = NARROW.replace("DTYPE", dtype)
    both = ptx.asm(ptx.i32_type(), [pair, factor], text, "=r,r,f")
    # A row of 64 bytes, 16 for each warp, in TMA's 64-byte swizzle.
    token = common.add(place.c2, j)
    chunk = arith.xori(place.warp, arith.shrui(place.c2, ptx.const32(1)))
    address = common.add(common.mul(token, ROW), common.mul(chunk, 16))
    address = common.add(common.add(packed, address), common.mul(place.q, 2))
    asm = f"st.shared.b16 [$0+{n * 8 * ROW}], $1;"
    ptx.asm(None, [address, both], asm, "r,r,~{memory}")


def store_chunk(ctx, panels, packed, dense_g, packed_g, token, neuron0) -> None:
    """Starts the bulk stores of 32 tokens of a part: two dense panels and the packed one."""
    copy = functools.partial(ctx.async_copy, predicate=common.is_leader())
    rows = common.window(token, neurons.CHUNK)
    for i, panel in enumerate(panels):
        place = (rows, common.window(common.add(neuron0, 64 * i), 64))
        copy(
            src_ref=panel, dst_ref=dense_g, gmem_slice=place, swizzle=neurons.ROW, arrive=False
        )  # fmt: skip
    place = (rows, common.window(arith.shrui(neuron0, ptx.const32(1)), 64))
    copy(src_ref=packed, dst_ref=packed_g, gmem_slice=place, swizzle=ROW, arrive=True)


def metadata_address(place: neurons.Place, meta_s: ir.Value, sixteen: int, j: int) -> ir.Value:
    """Of the words of tokens 16 sixteen + 2 c + j and 8 more, which follow each other.

    The word of row 16 w + 8 r + q of a tile of 64 x 64 and elements 32 h .. is number
    32 w + 4 q + 2 h + r: here the row is the token, and h the thread's warp modulo 2.
    """
    word = common.add(common.mul(place.odd, 2), common.mul(common.add(place.c2, j), 4))
    start = common.add(common.mul(place.panel, 512), common.mul(word, 4))
    start = common.add(start, neurons.metadata_offset(sixteen))
    return common.add(ptx.shared_address(meta_s), start)


def metadata_words(own: list[ir.Value], number: ir.Value, stride: int) -> list[ir.Value]:
    """The words of two rows, of which the thread has a nibble each.

    number: the thread's among the eight that make a word, which lie `stride` lanes apart.
    """
    word = arith.ori(own[0], arith.shli(own[1], ptx.const32(16)))
    # Four nibbles of both rows, of numbers 0 .. 3 or 4 .. 7; then the other four.
    shift = common.mul(arith.andi(number, ptx.const32(3)), 4)
    word = neurons.join_lanes(arith.shli(word, shift), (stride, 2 * stride))
    other = ptx.shuffle_xor(word, 4 * stride)
    first = arith.cmpi(arith.CmpIPredicate.ult, number, ptx.const32(4))
    lower, upper = arith.select(first, word, other), arith.select(first, other, word)
    low16, high16 = ptx.const32(0xFFFF), ptx.const32(-0x10000)
    c16 = ptx.const32(16)
    return [
        arith.ori(arith.andi(lower, low16), arith.shli(upper, c16)),
        arith.ori(arith.shrui(lower, c16), arith.andi(upper, high16)),
    ]


def nibbles(place: neurons.Place, words: list[ir.Value]) -> list[ir.Value]:
    """The thread's own of the words at `metadata_address`."""
    shift = common.mul(place.q, 4)
    return [arith.andi(arith.shrui(w, shift), ptx.const32(15)) for w in words]
