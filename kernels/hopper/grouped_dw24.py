"""Weight gradients with the activations 2:4 along tokens, chosen on the way (``wgmma.sp``).

As `grouped_dw`, with the same stages in shared memory. But a compute warpgroup reads its 64 neurons
of a stage into registers, transposed (``ldmatrix``), keeps two of each four tokens, and multiplies
them from there, while the tensor cores work on the stage before. So 2:4 activations along tokens
exist nowhere in memory: packing them in a pass of their own would cost most of what it gains, as a
stage's neurons meet only D / 256 tiles.

A thread's registers of a sparse operand are whole groups of four: lane 4 q + c of a warp holds, for
its rows q and q + 8, groups c and 4 + c of the 8 groups of an instruction. The choice therefore
needs no exchange, only the metadata does: a transposition of four bytes among four lanes.

The densest neurons are gathered by XLA, multiplied by `grouped_dw`'s dense steps in the same
kernel, ahead of the sparse tiles, and scattered over the result.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

from kernels import reference_grouped
from kernels.hopper import device, ptx
from kernels.hopper import grouped_common as common
from kernels.hopper import grouped_dw as dense

# Two of four by magnitude, ties to the first, NaN above all: $2 and $3 hold two 16-bit floats each.
# $1 is ``prmt``'s selector for the kept pair ($0), and in its top four bits the metadata.
# Magnitudes are compared as integers: `a > ra` compares the high with the low half, as `ra` is `a`
# with its halves swapped, and then `a` and `b` have the larger one on top. $2 wins both places if
# its smaller one is above the larger one of $3, or equal where $9 is 0xffff and not 0; and $3
# likewise, by $10. $4 to $8 are the codes of `Codes`. The integer pipe is what bounds this:
# multiply-adds go elsewhere, selections cannot.
CHOOSE = """{
.reg .pred second, fourth, front, back;
.reg .b32 a, b, ra, rb, la, lb;
and.b32 a, $2, 0x7fff7fff;
and.b32 b, $3, 0x7fff7fff;
prmt.b32 ra, a, a, 0x1032;
prmt.b32 rb, b, b, 0x1032;
setp.gt.u32 second, a, ra;
setp.gt.u32 fourth, b, rb;
selp.b32 a, a, ra, second;
selp.b32 b, b, rb, fourth;
mad.lo.s32 la, a, 65536, $9;
mad.lo.s32 lb, b, 65536, $10;
setp.gt.u32 front, la, b;
setp.gt.u32 back, lb, a;
selp.b32 $1, $5, $4, second;
@fourth add.s32 $1, $1, $6;
@front mov.b32 $1, $7;
@back mov.b32 $1, $8;
prmt.b32 $0, $2, $3, $1;
}"""


class Codes(NamedTuple):
    """Operands $4 to $10 of `CHOOSE`."""

    mixed: int
    """Selector and metadata where both low halves are kept."""
    second: int
    """The same where the high half of $2 is kept."""
    fourth: int
    """What is added where the high half of $3 is kept."""
    front: int
    """Selector and metadata where both halves of $2 are kept."""
    back: int
    """The same of $3."""
    front_wins: int
    back_wins: int


IN_ORDER = Codes(0x80005410, 0x90005432, 0x40002200, 0x40003210, 0xE0007654, 0xFFFF, 0)
"""$2 holds elements 0 and 1 of the group, $3 elements 2 and 3."""
SWAPPED = Codes(0x80001054, 0xC0003254, 0x10000022, 0xE0003210, 0x40007654, 0, 0xFFFF)
"""$2 holds elements 2 and 3, $3 elements 0 and 1."""

_BLOCKS = dense.STEP // 16  # of 16 tokens, in a stage
_WORDS = 2 * _BLOCKS + 1  # registers of a stage's sparse operand: values, and a word of metadata


def metadata_word(codes: list[ir.Value]) -> ir.Value:
    """The thread's word of metadata for 64 tokens.

    codes: for each block of 16 tokens those of the thread's group of rows q and q + 8, with the
    metadata in the top four bits. The result is the word of rows q and q + 8 for the block whose
    number is the thread's place in its quad.
    """
    i32 = ptx.i32_type()
    shift_in = "shf.l.wrap.b32 $0, $1, $2, 4;"
    word = ptx.const32(0)
    for code in reversed(codes):
        word = ptx.asm(i32, [code, word], shift_in, "=r,r,r")
    # Byte b of lane c goes to byte c of lane b.
    lane = arith.remui(utils.thread_idx(), ptx.const32(4))
    for mask, keep_low, keep_high in ((1, 0x6240, 0x3715), (2, 0x5410, 0x3276)):
        other = ptx.shuffle_xor(word, mask)
        upper = arith.cmpi(
            arith.CmpIPredicate.ne, arith.andi(lane, ptx.const32(mask)), ptx.const32(0)
        )
        selector = arith.select(upper, ptx.const32(keep_high), ptx.const32(keep_low))
        word = _permute(word, other, selector)
    # Low four bits of each byte to the low half, high ones to the high half.
    middle = arith.xori(word, arith.shrui(word, ptx.const32(4)))
    middle = arith.andi(middle, ptx.const32(0x00F000F0))
    word = arith.xori(word, arith.xori(middle, arith.shli(middle, ptx.const32(4))))
    return _permute(word, word, ptx.const32(0x3120))


def _permute(low: ir.Value, high: ir.Value, selector: ir.Value) -> ir.Value:
    return ptx.asm(ptx.i32_type(), [low, high, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r")


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _choose(words: list[ir.Value], codes: list[ir.Value]) -> tuple[ir.Value, ir.Value]:
    i32 = ptx.i32_type()
    operands = [*words, *codes]
    constraints = ",".join(["=&r"] * 2 + ["r"] * len(operands))
    out = ptx.asm(llvm.StructType.get_literal([i32] * 2), operands, CHOOSE, constraints)
    return llvm.extractvalue(i32, out, [0]), llvm.extractvalue(i32, out, [1])


def _operand(panel: ir.Value) -> tuple[list[ir.Value], ir.Value]:
    """Values and metadata of a warp's 16 neurons in a panel of 64 tokens by 64 neurons.

    Rows of a matrix that ``ldmatrix`` reads at once must lie in different banks: swizzled lines of
    equal number modulo 8 do not. So the quad's upper two lanes get the halves of their groups in
    the opposite order, which their codes undo.
    """
    warp, lane = common.warp_and_lane()
    one, two = ptx.const32(1), ptx.const32(2)
    matrix, row = arith.shrui(lane, ptx.const32(3)), arith.andi(lane, ptx.const32(7))
    half = arith.xori(arith.andi(matrix, one), arith.shrui(row, two))
    token = common.mul(arith.shrui(row, one), 4)
    token = common.add(common.add(token, arith.andi(row, one)), common.mul(half, 2))
    chunk = common.add(common.mul(warp, 2), arith.shrui(matrix, one))
    address = common.swizzled(panel, token, chunk)

    swapped = arith.cmpi(arith.CmpIPredicate.ne, arith.andi(lane, two), ptx.const32(0))
    constants = [
        arith.select(swapped, ptx.const32(_signed(theirs)), ptx.const32(_signed(ours)))
        for ours, theirs in zip(IN_ORDER, SWAPPED, strict=True)
    ]
    values, codes = [], []
    for block in range(_BLOCKS):
        loaded = ptx.ldmatrix_x4(common.add(address, block * 16 * 128), transpose=True)
        for pair in (loaded[:2], loaded[2:]):
            value, code = _choose(pair, constants)
            values.append(value)
            codes.append(code)
    return values, metadata_word(codes)


def _step(stages: int, dtype: str):
    """Adds a stage's products, then releases the stage before, if there is one (it is >= 0).

    Returns the accumulators, and the registers that the MMAs in flight read.
    """
    words = common.strided_type(_WORDS, jnp.int32)

    @plgpu.inline_mgpu(
        arg_types=(
            common.ACC,
            common.strided(_WORDS),
            *(common.REF,) * 3,
            *(common.SCALAR,) * 3,
        ),
        return_type=(dense.acc_type(), words),
    )
    def step(ctx, acc, old, y_s, g_s, bars, slot, parity, previous):
        del ctx
        slot, parity, previous = map(common.scalar, (slot, parity, previous))
        (regs,) = common.accumulators(acc)
        warpgroup = common.uniform(arith.divui(utils.thread_idx(), ptx.const32(ptx.WARPGROUP)))
        panel = common.add(ptx.shared_address(y_s), common.mul(warpgroup, dense.PANEL_BYTES))
        b_desc = ptx.smem_descriptor(
            ptx.shared_address(g_s),
            leading_bytes=dense.PANEL_BYTES,
            stride_bytes=1024,
            swizzle=128,
        )
        ptx.mbarrier_wait(common.barrier_address(bars, slot), parity)
        values, metadata = _operand(panel)
        ptx.wgmma_fence()
        for k32 in range(dense.STEP // 32):
            regs = ptx.wgmma_sparse(
                regs,
                values[4 * k32 : 4 * k32 + 4],
                ptx.advance(b_desc, k32 * 32 * 128),
                metadata,
                n=dense.COLUMNS,
                selector=k32,
                dtype=dtype,
                b_transposed=True,
            )
        ptx.wgmma_commit()
        ptx.wgmma_wait(1)
        with utils.when(arith.cmpi(arith.CmpIPredicate.sge, previous, ptx.const32(0))):
            common.release(stages, bars, previous)
        # An MMA in flight still reads its operand's registers and its metadata. Using them after
        # the wait keeps the compiler from putting the next ones there.
        ptx.keep(common.to_scalars(old))
        new = common.to_array([*values, metadata], signed=True)
        return common.from_accumulators([regs], dense.SHAPE), new

    return step


@plgpu.inline_mgpu(arg_types=(common.strided(_WORDS),))
def _keep(ctx, words):
    del ctx
    ptx.keep(common.to_scalars(words))


def sparse_tiles(block, blocks: int, dense_tiles: int, tiles: int):
    """How many sparse tiles a block does, and a function that gives the i-th.

    Dense tile d is done by block d modulo `blocks`, first. A sparse tile takes about half as long,
    so blocks that have a dense tile more than the others leave out two rounds of sparse ones.
    """
    busy = dense_tiles % blocks
    free = blocks - busy if busy else 0
    zero = jnp.int32(0)
    rounds = lambda first: jnp.maximum(
        lax.div(tiles - first + (blocks - 1), jnp.int32(blocks)), zero
    )
    later = 2 * free + block
    if not busy:
        return rounds(block), lambda i: block + i * blocks
    is_busy = block < busy
    place = block - busy
    early = [jnp.where(is_busy | (place + r * free >= tiles), 0, 1) for r in range(2)]
    count = early[0] + early[1] + rounds(later)

    def tile(i):
        first = place + i * free
        return jnp.where(
            is_busy, later + i * blocks, jnp.where(i < 2, first, later + (i - 2) * blocks)
        )

    return count, tile


def _gather(y: jax.Array, offsets: jax.Array, neurons: jax.Array) -> jax.Array:
    """Columns of each row's expert: (T_pad, k) for neurons (E, k); zeros for a neuron too large."""
    rows, live = y.shape
    blocks = rows // common.TOKENS
    first = jnp.arange(blocks, dtype=jnp.int32)[:, None] * common.TOKENS
    expert = jnp.sum(first >= offsets[1:-1], axis=1, dtype=jnp.int32)
    # An index for every element: with one for each column XLA would gather column by column.
    shape = blocks, common.TOKENS, neurons.shape[1]
    columns = jnp.broadcast_to(neurons[expert][:, None, :], shape)
    split = y.reshape(blocks, common.TOKENS, live)
    out = jnp.take_along_axis(split, columns, axis=2, mode="fill", fill_value=0)
    return out.reshape(rows, neurons.shape[1])


def weight_gradient24(
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    densest: jax.Array,
    *,
    num_experts: int,
    config: common.GroupedConfig | None = None,
) -> jax.Array:
    """`kernels.reference_grouped.weight_gradient24`.

    `offsets` must be multiples of 128, as V is. Raises ValueError for shapes that do not fit and
    NotImplementedError where `check_weight_gradient24` does.
    """
    check_weight_gradient24(y, g, offsets, densest, num_experts=num_experts, config=config)
    live, number = y.shape[1], densest.shape[1]
    if not number:
        return _products(None, y, g, offsets, config=config)[0]
    whole = jnp.pad(densest, ((0, 0), (0, -number % dense.NEURONS)), constant_values=live)
    own = _gather(y, offsets, whole)
    dw, dw_own = _products(own, y, g, offsets, config=config)
    dw_own = reference_grouped.expert_major(dw_own, num_experts)[:, :number]
    first = 4 * jnp.arange(num_experts, dtype=jnp.int32)[:, None]
    row = densest // 4 * (4 * num_experts) + first + densest % 4
    return dw.at[row].set(dw_own, unique_indices=True, mode="promise_in_bounds")


def _products(
    own: jax.Array | None,
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    *,
    config: common.GroupedConfig | None,
) -> list[jax.Array]:
    """Products of y, 2:4 along tokens, and, dense, of own (T_pad, k), both interleaved."""
    config = config or common.GroupedConfig()
    live, width = y.shape[1], g.shape[1]
    num_experts = offsets.shape[0] - 1
    dtype = common.ptx_name(y.dtype)
    stages = dense.stages_of(config)
    columns = pl.cdiv(width, dense.COLUMNS)
    rows = live // dense.NEURONS
    own_rows = 0 if own is None else own.shape[1] // dense.NEURONS
    tiles, own_tiles = (num_experts * columns * r for r in (rows, own_rows))
    blocks = min(device.num_cores(), tiles + own_tiles)

    def body(*refs):
        sources, g_g, offsets_g, outs = refs[:n], refs[n], refs[n + 1], refs[n + 2 :]

        @functools.partial(pl.run_scoped, **dense.scratch(stages, y.dtype), collective_axes="wg")
        def _scope(y_s, g_s, out_s, bars):
            wg, block = lax.axis_index("wg"), lax.axis_index("block")
            ring = dense.Ring(stages, y_s, g_s, bars)
            common.init_barriers(stages, 2)(bars)
            fill, finish = dense.make_fill(stages), dense.make_finish(stages)
            dense_step, sparse_step = dense.make_step(stages, dtype), _step(stages, dtype)

            def part(tile, rows):
                return dense.part_of(tile, rows, columns, config.width, offsets_g)

            # The dense tiles, then the sparse ones: rows of tiles, this block's number of them, and
            # which.
            sparse_count, sparse_tile = sparse_tiles(block, blocks, own_tiles, tiles)
            lists = [(rows, sparse_count, sparse_tile)]
            if own_rows:
                count = common.own_tiles(jnp.int32(own_tiles), blocks)
                lists.insert(0, (own_rows, count, lambda i: block + i * blocks))

            def produce(y_g, rows, tile_of, i, state):
                return dense.produce(ring, fill, y_g, g_g, part(tile_of(i), rows), state)

            def dense_tile(steps, acc, state):
                return dense.multiply(ring, dense_step, finish, steps, acc, state)

            def sparse_tile_of(steps, acc, state):
                def one(carry):
                    acc, words, slot, parity, previous = carry
                    acc, words = sparse_step(acc, words, *ring.stage(slot), slot, parity, previous)
                    return acc, words, *ring.advance(slot, parity), slot

                zeros = jnp.zeros((_WORDS * ptx.WARPGROUP,), jnp.int32)
                words = plgpu.layout_cast(zeros, common.strided(_WORDS))
                # An expert's rows are whole blocks of 128, so steps are even. Two an iteration keep
                # the operands of consecutive steps in different registers without moves.
                acc, words, slot, parity, previous = lax.fori_loop(
                    0,
                    lax.div(steps, jnp.int32(2)),
                    lambda _, carry: one(one(carry)),
                    (acc, words, *state, jnp.int32(-1)),
                )
                acc = finish(acc, bars, previous)
                _keep(words)
                return acc, (slot, parity)

            def consume(out_g, compute, rows, tile_of, i, state):
                place = part(tile_of(i), rows)
                acc, state = compute(place.steps, dense.zeros(), state)
                dense.store(acc, out_s.at[wg], out_g, place, wg)
                return state

            @pl.when(wg == 2)
            def _producer():
                plgpu.set_max_registers(40, action="decrease")
                state = (jnp.int32(0), jnp.int32(1))
                for y_g, (rows, count, tile_of) in zip(sources, lists, strict=True):
                    tile = functools.partial(produce, y_g, rows, tile_of)
                    state = lax.fori_loop(0, count, tile, state)

            @pl.when(wg < 2)
            def _consumer():
                plgpu.set_max_registers(common.REGISTERS, action="increase")
                state = (jnp.int32(0), jnp.int32(0))
                computes = [dense_tile, sparse_tile_of][-n:]
                for out_g, compute, (rows, count, tile_of) in zip(
                    outs, computes, lists, strict=True
                ):
                    tile = functools.partial(consume, out_g, compute, rows, tile_of)
                    state = lax.fori_loop(0, count, tile, state)
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    operands = [y] if own is None else [own, y]
    n = len(operands)
    # (blocks of neurons, a block's neurons, D): one copy stores four neurons of many blocks.
    out_type = [
        jax.ShapeDtypeStruct((a.shape[1] // 4, 4 * num_experts, width), jnp.float32)
        for a in operands
    ]
    call: Any = common.kernel(body, out_type, blocks, 2, "weight_gradient24_hopper")
    outs = call(*operands, g, offsets)
    return [out.reshape(-1, width) for out in reversed(outs)]


def check_weight_gradient24(
    y: jax.Array,
    g: jax.Array,
    offsets: jax.Array,
    densest: jax.Array,
    *,
    num_experts: int,
    config: common.GroupedConfig | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    live, width = reference_grouped.gradient24_dims(y, g, offsets, densest, num_experts)
    if y.shape[0] % common.TOKENS:
        raise NotImplementedError(f"{y.shape=}: rows must be a multiple of {common.TOKENS}")
    common.check_shapes(common.TOKENS, live, width, y.dtype)
    dense.stages_of(config or common.GroupedConfig())
