"""The 2:4 main loop for sm_80: cp.async into shared memory, ldmatrix into registers, mma.sp.

The loop is one block of PTX, because its parts share state that Triton has no value for: a ring of
shared-memory stages, asynchronous copies in flight, and fragments whose layout the instruction
dictates. Everything around it (the grid, the epilogue, the stores) is ordinary Pallas.

Fragments of `mma.sp.m16n8k32` for a thread q = lane // 4, t = lane % 4 (PTX ISA, "Matrix
fragments for sparse mma.m16n8k32 with .f16 and .bf16 types"): A is the 16 x 16 tile of kept values,
B holds k = 8 i + 2 t and the next one of column q in register i, and the accumulators are rows q
and q + 8, columns 2 t and 2 t + 1. `ldmatrix` delivers both from row-major memory, and transposes B
when its columns are contiguous, so that neither operand needs a layout of its own.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from kernels.triton import ptx

# A kernel may declare this much shared memory statically; more would have to be asked for at the
# launch, which Pallas Triton does not offer.
STATIC_SHARED_BYTES = 48 * 1024


@dataclasses.dataclass(frozen=True)
class Tile:
    """Work of one program: `warps_m * warps_n` warps, each with `16 frags_m` x `8 frags_n` outputs.

    Attributes:
      block_k: K step of one shared-memory stage, 32 or 64.
      stages: shared-memory stages.
    """

    warps_m: int
    warps_n: int
    frags_m: int
    frags_n: int
    block_k: int
    stages: int

    @property
    def block_m(self) -> int:
        return self.warps_m * self.frags_m * 16

    @property
    def block_n(self) -> int:
        return self.warps_n * self.frags_n * 8

    @property
    def threads(self) -> int:
        return 32 * self.warps_m * self.warps_n

    @property
    def a_bytes(self) -> int:
        return self.block_m * self.block_k

    @property
    def b_bytes(self) -> int:
        return self.block_n * self.block_k * 2

    @property
    def shared_bytes(self) -> int:
        return self.stages * (self.a_bytes + self.b_bytes)


def accumulate(
    values_ref,
    metadata_ref,
    b_ref,
    m0: jax.Array,
    n0: jax.Array,
    tile: Tile,
    *,
    b_layout: str,
    emulate: bool,
) -> list[jax.Array]:
    """One output tile: float32 accumulators of every thread, in fragment order.

    Args:
      values_ref: (m, k // 2) bf16 or fp16, row-major.
      metadata_ref: (m // 64, k // 64, 128) int32.
      b_ref: (n, k) for "nk", (k, n) for "kn".
      m0, n0: scalars, the tile's first row and column. Rows and columns past the edge are clamped:
        what they accumulate is meaningless and must not be stored.

    Returns:
      4 * frags_m * frags_n arrays (threads,); accumulator 4 * (i * frags_n + j) + c is row
      16 i + 8 (c // 2) + q, column 8 j + 2 t + c % 2 of the warp's tile.
    """
    if emulate:
        return _emulate(values_ref, metadata_ref, b_ref, m0, n0, tile, b_layout)
    m, k_half = values_ref.shape
    n = b_ref.shape[0] if b_layout == "nk" else b_ref.shape[1]
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(values_ref.dtype).name]
    asm = _generate(tile, m=m, n=n, k=2 * k_half, b_layout=b_layout, kind=kind)
    starts = [jnp.full((tile.threads,), x, jnp.int32) for x in (m0, n0)]
    count = 4 * tile.frags_m * tile.frags_n
    return ptx.inline_ptx(asm, [values_ref, metadata_ref, b_ref], starts, out=["float32"] * count)


def _generate(tile: Tile, *, m: int, n: int, k: int, b_layout: str, kind: str) -> str:
    fm, fn, bk, stages = tile.frags_m, tile.frags_n, tile.block_k, tile.stages
    threads, stage_bytes = tile.threads, tile.a_bytes + tile.b_bytes
    count = 4 * fm * fn
    a_arg, meta_arg, b_arg, m0_arg, n0_arg = (f"${count + i}" for i in range(5))
    lines: list[str] = []
    emit = lines.append

    def swizzle(row: str, chunk: str, chunks: int, out: str) -> None:
        """Byte offset of a 16-byte chunk so that 8 rows of one column of chunks cover all banks."""
        if chunks >= 8:
            emit(f"and.b32 {out}, {row}, 7;")
        else:
            # Several rows share the 128 bytes that the banks span: rotate once per 128 bytes.
            emit(f"shr.u32 {out}, {row}, {(8 // chunks).bit_length() - 1};")
            emit(f"and.b32 {out}, {out}, {chunks - 1};")
        emit(f"xor.b32 {out}, {out}, {chunk};")
        emit(f"mad.lo.u32 {out}, {row}, {chunks}, {out};")
        emit(f"shl.b32 {out}, {out}, 4;")

    a_chunks = bk // 16
    b_rows, b_chunks = (tile.block_n, bk // 8) if b_layout == "nk" else (bk, tile.block_n // 8)
    a_copies = tile.block_m * a_chunks // threads
    b_copies = b_rows * b_chunks // threads
    b_pitch = 16 * b_chunks
    num_meta = max(1, fm // 4)
    subs = bk // 32

    emit(f".shared .align 128 .b8 ring24[{tile.shared_bytes}];")
    emit(f".reg .f32 acc<{count}>;")
    emit(f".reg .b32 a<{8 * fm}>, b<{4 * fn}>, meta<{fm}>, next_meta<{fm}>;")
    emit(f".reg .b32 a_dst<{a_copies}>, b_dst<{b_copies}>, a_src_s<2>, b_src_s<{max(subs, 8)}>;")
    emit(f".reg .b64 a_ptr<{a_copies}>, b_ptr<{b_copies}>, meta_ptr<{num_meta}>;")
    emit(
        ".reg .b32 tid, lane, warp, wm, wn, row, col, ring, x, y, z, read, write, left, at_a, at_b;"
    )
    emit(".reg .pred p, more;")
    emit("mov.u32 tid, %tid.x;")
    emit("and.b32 lane, tid, 31;")
    emit("shr.u32 warp, tid, 5;")
    emit(f"div.u32 wm, warp, {tile.warps_n};")
    emit(f"rem.u32 wn, warp, {tile.warps_n};")
    emit("mov.u32 ring, ring24;")

    # Where each thread copies from and to: 16 bytes at a time, consecutive threads along a row.
    def copies(name: str, number: int, chunks: int, base: int, arg: str, address) -> None:
        for i in range(number):
            emit(f"add.u32 x, tid, {i * threads};")
            emit(f"div.u32 row, x, {chunks};")
            emit(f"rem.u32 col, x, {chunks};")
            swizzle("row", "col", chunks, "y")
            emit(f"add.u32 {name}_dst{i}, y, ring;")
            if base:
                emit(f"add.u32 {name}_dst{i}, {name}_dst{i}, {base};")
            address(f"{name}_ptr{i}", arg)

    def clamped(origin: str, value: str, bound: int, ragged: bool, out: str) -> None:
        emit(f"add.s32 {out}, {origin}, {value};")
        if ragged:
            emit(f"min.s32 {out}, {out}, {bound};")

    def row_of_k(origin: str, bound: int, ragged: bool, pitch: int):
        def address(out: str, arg: str) -> None:
            clamped(origin, "row", bound, ragged, "y")
            emit(f"mad.wide.s32 {out}, y, {pitch}, {arg};")
            emit(f"mad.wide.s32 {out}, col, 16, {out};")

        return address

    def row_of_n(out: str, arg: str) -> None:
        emit("shl.b32 y, col, 3;")
        clamped(n0_arg, "y", n - 8, n % tile.block_n != 0, "y")
        emit(f"mad.wide.s32 {out}, row, {2 * n}, {arg};")
        emit(f"mad.wide.s32 {out}, y, 2, {out};")

    copies("a", a_copies, a_chunks, 0, a_arg, row_of_k(m0_arg, m - 1, m % tile.block_m != 0, k))
    if b_layout == "nk":
        address = row_of_k(n0_arg, n - 1, n % tile.block_n != 0, 2 * k)
        copies("b", b_copies, b_chunks, tile.a_bytes, b_arg, address)
        b_step = 2 * bk
    else:
        copies("b", b_copies, b_chunks, tile.a_bytes, b_arg, row_of_n)
        b_step = 2 * bk * n

    # Metadata goes straight to registers: one word a thread feeds 16 rows of two k32 steps.
    emit(f"mad.lo.u32 x, wm, {16 * fm}, {m0_arg};")
    for g in range(num_meta):
        emit(f"add.u32 y, x, {64 * g};")
        emit("shr.u32 z, y, 6;")
        if m % tile.block_m:
            emit(f"min.u32 z, z, {m // 64 - 1};")
        emit(f"mad.wide.u32 meta_ptr{g}, z, {k // 64 * 512}, {meta_arg};")
        emit("and.b32 y, y, 48;")
        emit("shl.b32 y, y, 1;")
        emit("add.u32 y, y, lane;")
        emit(f"mad.wide.u32 meta_ptr{g}, y, 4, meta_ptr{g};")

    # Where each lane reads fragments: ldmatrix takes row l % 8 of matrix l // 8 from lane l.
    emit("and.b32 row, lane, 15;")
    emit(f"mad.lo.u32 row, wm, {16 * fm}, row;")
    emit("shr.u32 col, lane, 4;")
    swizzle("row", "col", a_chunks, "y")
    emit("add.u32 a_src_s0, y, ring;")
    emit("xor.b32 y, y, 32;")
    emit("add.u32 a_src_s1, y, ring;")
    if b_layout == "nk":
        emit("and.b32 row, lane, 7;")
        emit(f"mad.lo.u32 row, wn, {8 * fn}, row;")
        emit("shr.u32 col, lane, 3;")
        swizzle("row", "col", b_chunks, "y")
        emit(f"add.u32 y, y, {tile.a_bytes};")
        for s in range(subs):
            emit(f"xor.b32 x, y, {64 * s};")
            emit(f"add.u32 b_src_s{s}, x, ring;")
    else:
        for j in range(min(fn, 8)):
            emit(f"mul.lo.u32 col, wn, {fn};")
            emit(f"add.u32 col, col, {j};")
            swizzle("lane", "col", b_chunks, "y")
            emit(f"add.u32 y, y, {tile.a_bytes};")
            emit(f"add.u32 b_src_s{j}, y, ring;")

    def copy_stage(first: bool) -> None:
        guard = "" if first else "@more "
        for name, number, step in (("a", a_copies, bk), ("b", b_copies, b_step)):
            for i in range(number):
                emit(f"add.u32 x, {name}_dst{i}, write;")
                emit(f"{guard}cp.async.cg.shared.global.L2::128B [x], [{name}_ptr{i}], 16;")
                emit(f"add.s64 {name}_ptr{i}, {name}_ptr{i}, {step};")
        emit("cp.async.commit_group;")

    def advance(which: str) -> None:
        emit(f"add.u32 {which}, {which}, {stage_bytes};")
        emit(f"setp.eq.u32 p, {which}, {stages * stage_bytes};")
        emit(f"selp.u32 {which}, 0, {which}, p;")

    def load_a(buffer: int, sub: int) -> None:
        emit(f"add.u32 at_a, a_src_s{sub}, read;")
        for i in range(fm):
            regs = ", ".join(f"a{(buffer * fm + i) * 4 + r}" for r in range(4))
            offset = i * 16 * 16 * a_chunks
            emit(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {{{regs}}}, [at_a + {offset}];")

    def load_b(j: int, sub: int) -> None:
        regs = ", ".join(f"b{j * 4 + r}" for r in range(4))
        if b_layout == "nk":
            emit(f"add.u32 at_b, b_src_s{sub}, read;")
            offset, trans = j * 8 * b_pitch, ""
        else:
            emit(f"add.u32 at_b, b_src_s{j % 8}, read;")
            offset, trans = sub * 32 * b_pitch + 128 * (j // 8), ".trans"
        emit(f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{{regs}}}, [at_b + {offset}];")

    def load_meta(into: str, guard: str) -> None:
        for i in range(fm):
            emit(f"{guard}ld.global.nc.b32 {into}{i}, [meta_ptr{i // 4} + {i % 4 * 128}];")
        for g in range(num_meta):
            emit(f"add.s64 meta_ptr{g}, meta_ptr{g}, 512;")

    # B fragments of the next step that are fetched while this step's last products run.
    ahead = min(2, fn)
    for i in range(count):
        emit(f"mov.f32 acc{i}, 0f00000000;")
    emit("mov.u32 read, 0;")
    emit("mov.u32 write, 0;")
    steps = k // bk
    for s in range(stages):
        if s < steps:
            copy_stage(True)
        else:
            emit("cp.async.commit_group;")
        advance("write")
    emit(f"mov.u32 left, {steps - stages};")  # Stages still to copy.
    load_meta("meta", "")
    emit(f"cp.async.wait_group {stages - 1};")
    emit("bar.sync 0;")
    load_a(0, 0)
    for j in range(ahead):
        load_b(j, 0)
    emit(f"mov.u32 y, {k // 64};")
    emit("LOOP24:")
    emit("setp.gt.s32 more, y, 1;")
    load_meta("next_meta", "@more ")
    for sub in range(2):
        last_of_stage = bk == 32 or sub == 1
        here = sub if bk == 64 else 0
        following = (sub + 1) % 2 if bk == 64 else 0
        for j in range(fn):
            if j + ahead < fn:
                load_b(j + ahead, here)
            if j == fn - ahead:
                if last_of_stage:
                    # All fragments of this stage are in registers: hand its memory back, and see
                    # that the next stage has landed for every thread.
                    emit(f"cp.async.wait_group {stages - 2};")
                    emit("bar.sync 0;")
                    emit("setp.gt.s32 more, left, 0;")
                    emit("sub.s32 left, left, 1;")
                    copy_stage(False)
                    advance("write")
                    advance("read")
                load_a(1 - sub, following)
            if j + ahead >= fn:
                load_b(j + ahead - fn, following)
            for i in range(fm):
                c = 4 * (i * fn + j)
                acc = ", ".join(f"acc{c + r}" for r in range(4))
                a = ", ".join(f"a{(sub * fm + i) * 4 + r}" for r in range(4))
                b = ", ".join(f"b{j * 4 + r}" for r in range(4))
                emit(
                    f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
                    f"{{{acc}}}, {{{a}}}, {{{b}}}, {{{acc}}}, meta{i}, 0x{sub};"
                )
    for i in range(fm):
        emit(f"mov.b32 meta{i}, next_meta{i};")
    emit("sub.s32 y, y, 1;")
    emit("setp.gt.s32 p, y, 0;")
    emit("@p bra LOOP24;")
    emit("cp.async.wait_group 0;")
    for i in range(count):
        emit(f"mov.f32 ${i}, acc{i};")
    return "{\n" + "\n".join(lines) + "\n}"


def _emulate(values_ref, metadata_ref, b_ref, m0, n0, tile: Tile, b_layout: str):
    m = values_ref.shape[0]
    n = b_ref.shape[0] if b_layout == "nk" else b_ref.shape[1]
    rows = jnp.minimum(m0 + jnp.arange(tile.block_m), m - 1)
    cols = jnp.minimum(n0 + jnp.arange(tile.block_n), n - 1)
    a = _decompress(values_ref[...], metadata_ref[...])[rows]
    b = b_ref[...].astype(jnp.float32)
    b = b[cols].T if b_layout == "nk" else b[:, cols]
    out = jnp.dot(a, b, precision=lax.Precision.HIGHEST)
    out = out.reshape(tile.warps_m, tile.frags_m, 2, 8, tile.warps_n, tile.frags_n, 4, 2)
    # (frag m, frag n, row half, pair) then (warp m, warp n, q, t).
    out = out.transpose(1, 5, 2, 7, 0, 4, 3, 6).reshape(-1, tile.threads)
    return [out[i] for i in range(out.shape[0])]


def _decompress(values: jax.Array, metadata: jax.Array) -> jax.Array:
    """(m, k // 2) kept values and their metadata to dense float32 (m, k)."""
    m, k = values.shape[0], 2 * values.shape[1]
    words = lax.bitcast_convert_type(metadata, jnp.uint32)
    words = words.reshape(m // 64, k // 64, 4, 8, 4)  # warp, q, chunk of 16
    halves = jnp.stack([words & 0xFFFF, words >> 16], axis=3)  # ..., warp, row half, q, chunk
    halves = halves.transpose(0, 2, 3, 4, 1, 5).reshape(m, k // 16, 1)
    nibbles = (halves >> (4 * jnp.arange(4, dtype=jnp.uint32))) & 0xF
    nibbles = nibbles.reshape(m, k // 4)
    pairs = values.astype(jnp.float32).reshape(m, k // 4, 2)
    position = jnp.arange(4, dtype=jnp.uint32)
    first = jnp.where(position == (nibbles & 3)[..., None], pairs[..., :1], 0.0)
    second = jnp.where(position == (nibbles >> 2)[..., None], pairs[..., 1:], 0.0)
    return (first + second).reshape(m, k)
