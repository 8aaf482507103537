"""The 2:4 main loop for sm_80: cp.async into shared memory, ldmatrix into registers, mma.sp.

The loop is one block of PTX, because its parts share state that Triton has no value for: a ring of
shared-memory stages, asynchronous copies in flight, and fragments whose layout the instruction
dictates. Everything around it (the grid, the epilogue, the stores) is ordinary Pallas.

Fragments of `mma.sp.m16n8k32` for a thread q = lane // 4, t = lane % 4 (PTX ISA, "Matrix
fragments for sparse mma.m16n8k32 with .f16 and .bf16 types"): A is the 16 x 16 tile of kept values,
B holds k = 8 i + 2 t and the next one of column q in register i, and the accumulators are rows q
and q + 8, columns 2 t and 2 t + 1. `ldmatrix` delivers both from row-major memory, and transposes B
when its columns are contiguous, so that neither operand needs a layout of its own.

What shaped it, on an H100 at m 8192, n 16384, k 2048 (effective TFLOP/s):
* fragments loaded straight from global memory, packed in their own order beforehand: 350;
* this ring with a barrier for all warps after each stage: 460 with stages of k 32, 560 of k 64.
  Without the copies, or without the barrier, the same loop ran at 710 and 600: warps that meet at a
  barrier all copy at once, and the tensor cores wait;
* the ring below, where a pair of mbarriers for each stage lets warps run a stage apart, and copies
  are spread between products: 590 to 618 in three runs. All copies at once cost 2%, and waiting
  with try_wait, which suspends the warp, instead of test_wait 3%.
Products alone, from registers, with this epilogue, run at 730 (k 2048) to 840 (k 8192).

An A that is not packed goes through the same ring, in stages of k 32 and as two products of k 16
(`mma.m16n8k16`), whose fragments `ldmatrix` delivers from the same addresses. The two halves of a
step's A take the registers of the kept values of a step and the next one, so that the next A is
loaded behind the products and not beside them.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from kernels.triton import ptx

# The most that a kernel may declare statically. A ring that does not fit is placed in the dynamic
# shared memory behind the static part, and the caller sees that the launch provides it.
STATIC_SHARED_BYTES = 48 * 1024
_BARRIER_BYTES = 1024  # The barriers, and alignment of the ring for the swizzle.

# B fragments in flight ahead of the products that use them.
_AHEAD = 2


@dataclasses.dataclass(frozen=True)
class Tile:
    """Work of one program: `warps_m * warps_n` warps, each with `16 frags_m` x `8 frags_n` outputs.

    Attributes:
      block_k: K step of one shared-memory stage, 32 or 64.
      stages: shared-memory stages, at least 3: one being read, one that slower warps may still
        read, and at least one in flight.
      dense: whether A is not packed; block_k is 32 then.
    """

    warps_m: int
    warps_n: int
    frags_m: int
    frags_n: int
    block_k: int
    stages: int
    dense: bool = False

    def of_dense(self) -> Tile:
        """The same outputs of an A that is not packed; no stage is larger than one of k 64."""
        return dataclasses.replace(self, block_k=32, dense=True)

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
    def a_row(self) -> int:
        """Bytes of a row of one stage of kept values, or of A as it is."""
        return self.block_k * (2 if self.dense else 1)

    @property
    def a_bytes(self) -> int:
        """Bytes of one stage of A."""
        return self.block_m * self.a_row

    @property
    def b_bytes(self) -> int:
        """Bytes of one stage of B."""
        return self.block_n * self.block_k * 2

    @property
    def ring_bytes(self) -> int:
        return self.stages * (self.a_bytes + self.b_bytes)

    @property
    def dynamic_bytes(self) -> int:
        """Dynamic shared memory that the launch must provide."""
        return self.ring_bytes if self.ring_bytes + _BARRIER_BYTES > STATIC_SHARED_BYTES else 0


def accumulate(
    values_ref,
    metadata_ref,
    b_ref,
    m0: jax.Array,
    n0: jax.Array,
    tile: Tile,
    *,
    b_layout: str,
    b_rows: Sequence[jax.Array] = (),
    aligned: bool = True,
    emulate: bool,
) -> list[jax.Array]:
    """One output tile: float32 accumulators of every thread, in fragment order.

    Args:
      values_ref: (m, k // 2) bf16 or fp16, row-major; (m, k) if `tile.dense`.
      metadata_ref: (m // 64, k // 64, 128) int32; None if `tile.dense`.
      b_ref: (n, k) for "nk", (k, n) for "kn".
      m0, n0: scalars, the tile's first row and column, m0 a multiple of 64 and n0 of 8. Rows and
        columns past the edge are clamped: what they accumulate is meaningless and must not be
        stored.
      b_rows: for "kn": scalars, the rows of `b_ref` where equal parts of k begin, if that has more
        rows than k; the parts are whole stages.
      aligned: whether m0 and n0 are multiples of the tile's sizes, which saves clamping.

    Returns:
      4 * frags_m * frags_n arrays (threads,); accumulator 4 * (i * frags_n + j) + c is row
      16 i + 8 (c // 2) + q, column 8 j + 2 t + c % 2 of the warp's tile.
    """
    if emulate:
        return _emulate(values_ref, metadata_ref, b_ref, m0, n0, tile, b_layout, b_rows)
    m, k = values_ref.shape[0], values_ref.shape[1] * (1 if tile.dense else 2)
    n = b_ref.shape[0] if b_layout == "nk" else b_ref.shape[1]
    kind = {"bfloat16": "bf16", "float16": "f16"}[jnp.dtype(values_ref.dtype).name]
    writer = _Writer(tile, m, n, k, b_layout, kind, aligned=aligned, parts=len(b_rows))
    asm = writer.write()
    origin = [m0, n0, *b_rows]
    starts = [jnp.full((tile.threads,), x, jnp.int32) for x in origin]
    count = 4 * tile.frags_m * tile.frags_n
    # Where there is no metadata its argument stands for nothing.
    refs = [values_ref, values_ref if metadata_ref is None else metadata_ref, b_ref]
    return ptx.inline_ptx(asm, refs, starts, out=["float32"] * count)


class _Writer:
    """Writes the PTX of one tile. Registers are named for what they hold; x to z are scratch."""

    def __init__(
        self,
        tile: Tile,
        m: int,
        n: int,
        k: int,
        b_layout: str,
        kind: str,
        *,
        aligned: bool = True,
        parts: int = 0,
    ):
        self.tile, self.m, self.n, self.k, self.b_layout, self.kind = tile, m, n, k, b_layout, kind
        # Whether a tile may hang over the edge.
        self.ragged_m = not aligned or m % tile.block_m != 0
        self.ragged_n = not aligned or n % tile.block_n != 0
        self.count = 4 * tile.frags_m * tile.frags_n
        args = [f"${self.count + i}" for i in range(5 + parts)]
        self.a_arg, self.metadata_arg, self.b_arg, self.m0_arg, self.n0_arg = args[:5]
        self.b_row_args = args[5:]
        self.stage_bytes = tile.a_bytes + tile.b_bytes
        # Shared tiles are rows of 16-byte chunks.
        self.a_chunks = tile.a_row // 16
        b_rows = tile.block_n if b_layout == "nk" else tile.block_k
        self.b_chunks = tile.b_bytes // 16 // b_rows
        self.a_copies = tile.a_bytes // 16 // tile.threads
        self.b_copies = tile.b_bytes // 16 // tile.threads
        # A warp's metadata lies in one or several 64-row tiles.
        self.metadata_tiles = max(1, tile.frags_m // 4)
        if tile.dense and tile.block_k != 32:
            raise ValueError(f"{tile=}: stages of an A that is not packed must have block_k=32")
        self.steps = k // tile.block_k
        # Where k is in parts of B that lie apart, B's addresses jump after each part.
        self.parts = max(parts, 1)
        if self.steps % self.parts:
            raise ValueError(f"{k=} must be {parts=} of whole stages of {tile.block_k}")
        self.part_steps = self.steps // self.parts
        # Copies run this many stages ahead. One stage stays free of copies and products, so that
        # the fastest warp may overwrite it while the slowest is one stage behind.
        self.distance = tile.stages - 2
        self.labels = 0
        self.lines: list[str] = []

    def emit(self, *lines: str) -> None:
        self.lines.extend(lines)

    def write(self) -> str:
        self._declare()
        self._copy_addresses()
        self._metadata_addresses()
        self._fragment_addresses()
        self._prologue()
        self._loop()
        self.emit("cp.async.wait_all;")
        self.emit(*(f"mov.f32 ${i}, acc{i};" for i in range(self.count)))
        return "{\n" + "\n".join(self.lines) + "\n}"

    def _declare(self) -> None:
        tile = self.tile
        static = _BARRIER_BYTES + (0 if tile.dynamic_bytes else tile.ring_bytes)
        self.emit(
            f".shared .align {_BARRIER_BYTES} .b8 shared24[{static}];",
            f".reg .f32 acc<{self.count}>;",
            f".reg .b32 a<{8 * tile.frags_m}>, b<{4 * tile.frags_n}>;",
            f".reg .b32 meta<{tile.frags_m}>, next_meta<{tile.frags_m}>;",
            f".reg .b32 a_dst<{self.a_copies}>, b_dst<{self.b_copies}>, a_src<2>, b_src<8>;",
            f".reg .b64 a_ptr<{self.a_copies}>, b_ptr<{self.b_copies}>;",
            f".reg .b64 meta_ptr<{self.metadata_tiles}>;",
            *([f".reg .b64 jump<{self.parts}>;"] if self.parts > 1 else []),
            ".reg .b32 tid, lane, warp, wm, wn, row, col, ring, x, y, z;",
            ".reg .b32 read, read_bar, read_parity, write, write_bar, write_parity;",
            ".reg .b32 to_copy, to_read, to_do, at;",
            ".reg .pred p, more, copying, leader;",
            "mov.u32 tid, %tid.x;",
            "and.b32 lane, tid, 31;",
            "setp.eq.u32 leader, lane, 0;",
            "shr.u32 warp, tid, 5;",
            f"div.u32 wm, warp, {tile.warps_n};",
            f"rem.u32 wn, warp, {tile.warps_n};",
            "mov.u32 ring, shared24;",
            f"add.u32 ring, ring, {_BARRIER_BYTES};",
        )
        if tile.dynamic_bytes:
            # Stop rather than write past the end.
            self.emit(
                "mov.u32 x, %dynamic_smem_size;",
                f"setp.lt.u32 p, x, {tile.dynamic_bytes};",
                "@p trap;",
            )

    def _swizzle(self, row: str, chunk: str, chunks: int, out: str) -> None:
        """Byte offset of a chunk; 8 consecutive rows of one column of chunks cover all banks."""
        if chunks >= 8:
            self.emit(f"and.b32 {out}, {row}, 7;")
        else:
            # The banks span 128 bytes, several rows: rotate once for each 128 bytes.
            self.emit(
                f"shr.u32 {out}, {row}, {(8 // chunks).bit_length() - 1};",
                f"and.b32 {out}, {out}, {chunks - 1};",
            )
        self.emit(
            f"xor.b32 {out}, {out}, {chunk};",
            f"mad.lo.u32 {out}, {row}, {chunks}, {out};",
            f"shl.b32 {out}, {out}, 4;",
        )

    def _copy_addresses(self) -> None:
        """Where each thread copies from and to: consecutive threads along a row."""
        tile, n, k = self.tile, self.n, self.k

        def chunks(name: str, number: int, width: int, base: int, source: Callable) -> None:
            for i in range(number):
                self.emit(
                    f"add.u32 x, tid, {i * tile.threads};",
                    f"div.u32 row, x, {width};",
                    f"rem.u32 col, x, {width};",
                )
                self._swizzle("row", "col", width, "y")
                self.emit(f"add.u32 y, y, {base};", f"add.u32 {name}_dst{i}, y, ring;")
                source(f"{name}_ptr{i}")

        def along_k(arg: str, origin: str, size: int, ragged: bool, pitch: int) -> Callable:
            def source(out: str) -> None:
                self.emit(f"add.s32 y, {origin}, row;")
                if ragged:
                    self.emit(f"min.s32 y, y, {size - 1};")
                self.emit(f"mad.wide.s32 {out}, y, {pitch}, {arg};")
                self.emit(f"mad.wide.s32 {out}, col, 16, {out};")

            return source

        def along_n(out: str) -> None:
            self.emit("shl.b32 y, col, 3;", f"add.s32 y, y, {self.n0_arg};")
            if self.ragged_n:
                self.emit(f"min.s32 y, y, {n - 8};")
            if self.b_row_args:
                self.emit(f"add.s32 row, row, {self.b_row_args[0]};")
            self.emit(f"mad.wide.s32 {out}, row, {2 * n}, {self.b_arg};")
            self.emit(f"mad.wide.s32 {out}, y, 2, {out};")

        a_pitch = 2 * k if tile.dense else k
        rows_of_a = along_k(self.a_arg, self.m0_arg, self.m, self.ragged_m, a_pitch)
        rows_of_b = along_k(self.b_arg, self.n0_arg, n, self.ragged_n, 2 * k)
        chunks("a", self.a_copies, self.a_chunks, 0, rows_of_a)
        source = rows_of_b if self.b_layout == "nk" else along_n
        chunks("b", self.b_copies, self.b_chunks, tile.a_bytes, source)
        for i, (before, after) in enumerate(itertools.pairwise(self.b_row_args), 1):
            self.emit(
                f"sub.s32 x, {after}, {before};",
                f"sub.s32 x, x, {k // self.parts};",
                f"mad.wide.s32 jump{i}, x, {2 * n}, 0;",
            )

    def _metadata_addresses(self) -> None:
        """Metadata goes straight to registers: a thread's word feeds 16 rows of two k32 steps."""
        if self.tile.dense:
            return
        self.emit(f"mad.lo.u32 x, wm, {16 * self.tile.frags_m}, {self.m0_arg};")
        for g in range(self.metadata_tiles):
            self.emit(f"add.u32 y, x, {64 * g};", "shr.u32 z, y, 6;")
            if self.ragged_m:
                self.emit(f"min.u32 z, z, {self.m // 64 - 1};")
            self.emit(
                f"mad.wide.u32 meta_ptr{g}, z, {self.k // 64 * 512}, {self.metadata_arg};",
                "and.b32 y, y, 48;",
                "shl.b32 y, y, 1;",
                "add.u32 y, y, lane;",
                f"mad.wide.u32 meta_ptr{g}, y, 4, meta_ptr{g};",
            )

    def _fragment_addresses(self) -> None:
        """Where lanes read fragments: ldmatrix takes row l % 8 of matrix l // 8 from lane l.

        The swizzle is an exclusive or, so a chunk further along is one too, and a row further down
        is an addition.
        """
        tile = self.tile
        self.emit(
            "and.b32 row, lane, 15;",
            f"mad.lo.u32 row, wm, {16 * tile.frags_m}, row;",
            "shr.u32 col, lane, 4;",
        )
        self._swizzle("row", "col", self.a_chunks, "y")
        self.emit("add.u32 a_src0, y, ring;", "xor.b32 y, y, 32;", "add.u32 a_src1, y, ring;")
        if self.b_layout == "nk":
            self.emit(
                "and.b32 row, lane, 7;",
                f"mad.lo.u32 row, wn, {8 * tile.frags_n}, row;",
                "shr.u32 col, lane, 3;",
            )
            self._swizzle("row", "col", self.b_chunks, "y")
            offsets = ["xor.b32 z, y, 0;", "xor.b32 z, y, 64;"]
        else:
            self.emit(f"mul.lo.u32 col, wn, {tile.frags_n};")
            self._swizzle("lane", "col", self.b_chunks, "y")
            offsets = [f"xor.b32 z, y, {16 * j};" for j in range(min(tile.frags_n, 8))]
        for i, offset in enumerate(offsets):
            self.emit(offset, f"add.u32 z, z, {tile.a_bytes};", f"add.u32 b_src{i}, z, ring;")

    def _copies(self, guard: str) -> list[list[str]]:
        """This thread's copies of one stage, each with the step to the next stage."""
        b_step = 2 * self.tile.block_k * (1 if self.b_layout == "nk" else self.n)
        return [
            [
                f"add.u32 x, {name}_dst{i}, write;",
                f"{guard}cp.async.cg.shared.global.L2::128B [x], [{name}_ptr{i}], 16;",
                f"add.s64 {name}_ptr{i}, {name}_ptr{i}, {step};",
            ]
            for name, number, step in (
                ("a", self.a_copies, self.tile.a_row),
                ("b", self.b_copies, b_step),
            )
            for i in range(number)
        ]

    def _jump(self, part: int, guard: str) -> None:
        """Moves B's addresses from the end of a part of k to the start of this one."""
        for i in range(self.b_copies):
            self.emit(f"{guard}add.s64 b_ptr{i}, b_ptr{i}, jump{part};")

    def _commit(self, guard: str) -> None:
        """Makes the arrival of this thread's copies complete the stage's first barrier."""
        self.emit(f"{guard}cp.async.mbarrier.arrive.noinc.shared.b64 [write_bar];")
        self._advance("write")

    def _advance(self, which: str) -> None:
        self.emit(
            f"add.u32 {which}, {which}, {self.stage_bytes};",
            f"add.u32 {which}_bar, {which}_bar, 16;",
            f"setp.eq.u32 p, {which}, {self.tile.ring_bytes};",
            f"selp.u32 {which}, 0, {which}, p;",
            f"@p sub.u32 {which}_bar, {which}_bar, {16 * self.tile.stages};",
            f"@p xor.b32 {which}_parity, {which}_parity, 1;",
        )

    def _wait(self, which: str, offset: int) -> None:
        self.labels += 1
        self.emit(
            f"WAIT{self.labels}:",
            f"mbarrier.test_wait.parity.shared.b64 p, [{which}_bar + {offset}], {which}_parity;",
            f"@!p bra WAIT{self.labels};",
        )

    def _load_metadata(self, into: str, guard: str) -> None:
        if self.tile.dense:
            return
        for i in range(self.tile.frags_m):
            address = f"[meta_ptr{i // 4} + {i % 4 * 128}]"
            self.emit(f"{guard}ld.global.nc.b32 {into}{i}, {address};")
        for g in range(self.metadata_tiles):
            self.emit(f"add.s64 meta_ptr{g}, meta_ptr{g}, 512;")

    def _load_a(self, buffer: int, half: int) -> None:
        frags = self.tile.frags_m
        self.emit(f"add.u32 at, a_src{half}, read;")
        for i in range(frags):
            registers = _registers("a", 4 * (buffer * frags + i))
            offset = i * 16 * 16 * self.a_chunks
            self.emit(f"ldmatrix.sync.aligned.m8n8.x4.shared.b16 {registers}, [at + {offset}];")

    def _load_b(self, j: int, half: int) -> None:
        pitch = 16 * self.b_chunks
        if self.b_layout == "nk":
            source, offset, transposed = half, j * 8 * pitch, ""
        else:
            source, offset, transposed = j % 8, half * 32 * pitch + 128 * (j // 8), ".trans"
        self.emit(
            f"add.u32 at, b_src{source}, read;",
            f"ldmatrix.sync.aligned.m8n8.x4{transposed}.shared.b16 "
            f"{_registers('b', 4 * j)}, [at + {offset}];",
        )

    def _prologue(self) -> None:
        tile = self.tile
        self.emit(*(f"mov.f32 acc{i}, 0f00000000;" for i in range(self.count)))
        # Two barriers a stage: its copies have landed (every thread arrives), and its fragments
        # are in registers (every warp does). Waiting for an odd phase of a fresh barrier succeeds,
        # so the first copies into each stage wait for nobody.
        for which, parity in (("read", 0), ("write", 1)):
            self.emit(
                f"mov.u32 {which}, 0;",
                f"mov.u32 {which}_bar, shared24;",
                f"mov.u32 {which}_parity, {parity};",
            )
        self.emit("setp.eq.u32 p, tid, 0;")
        for s in range(tile.stages):
            landed, released = 16 * s, 16 * s + 8
            self.emit(
                f"@p mbarrier.init.shared.b64 [read_bar + {landed}], {tile.threads};",
                f"@p mbarrier.init.shared.b64 [read_bar + {released}], {tile.threads // 32};",
            )
        self.emit("bar.sync 0;")
        for copied in range(1, min(self.distance, self.steps) + 1):
            for copy in self._copies(""):
                self.emit(*copy)
            self._commit("")
            if copied % self.part_steps == 0 and copied < self.steps:
                self._jump(copied // self.part_steps, "")
        self.emit(
            f"mov.s32 to_copy, {self.steps - self.distance};",
            f"mov.u32 to_read, {self.steps};",
            f"mov.u32 to_do, {self.k // 64};",
        )
        self._load_metadata("meta", "")
        self._wait("read", 0)
        self._load_a(0, 0)
        if tile.dense:
            self._load_a(1, 1)
        for j in range(_AHEAD):
            self._load_b(j, 0)

    def _loop(self) -> None:
        """Two k32 steps, which share a word of metadata, in each round."""
        words = 0 if self.tile.dense else self.tile.frags_m
        block_k = self.tile.block_k
        self.emit("ROUND:", "setp.gt.s32 more, to_do, 1;")
        self._load_metadata("next_meta", "@more ")
        if block_k == 64:
            self._step(0, half=0, following=1, opens=True, closes=False)
            self._step(1, half=1, following=0, opens=False, closes=True)
        else:
            self._step(0, half=0, following=0, opens=True, closes=True)
            self._step(1, half=0, following=0, opens=True, closes=True)
        self.emit(
            *(f"mov.b32 meta{i}, next_meta{i};" for i in range(words)),
            "sub.u32 to_do, to_do, 1;",
            "setp.ne.u32 p, to_do, 0;",
            "@p bra ROUND;",
        )

    def _step(self, step: int, *, half: int, following: int, opens: bool, closes: bool) -> None:
        """Products of one k32 step, while the fragments of the next one are fetched.

        Args:
          step: 0 or 1, the half of the metadata word.
          half, following: this step's and the next step's half of their stages.
          opens, closes: whether the step is the first, the last of its stage.
        """
        frags_n = self.tile.frags_n
        if opens:
            self.emit("setp.gt.s32 copying, to_copy, 0;", "sub.s32 to_copy, to_copy, 1;")
            self._wait("write", 8)
            self.copies = self._copies("@copying ")
        turns = frags_n - _AHEAD if closes else frags_n
        later = 0 if closes else frags_n - _AHEAD  # Turns left in the stage's second step.
        for j in range(frags_n):
            if j + _AHEAD < frags_n:
                self._load_b(j + _AHEAD, half)
            if j < turns:
                for _ in range(-(-len(self.copies) // (turns - j + later))):
                    self.emit(*self.copies.pop(0))
            if j == frags_n - _AHEAD:
                if closes:
                    self._next_stage()
                if not self.tile.dense:
                    self._load_a(1 - step, following)
            if j + _AHEAD >= frags_n:
                self._load_b(j + _AHEAD - frags_n, following)
            for i in range(self.tile.frags_m):
                self._multiply(step, i, j)
        if self.tile.dense:
            for half in range(2):
                self._load_a(half, half)

    def _multiply(self, step: int, i: int, j: int) -> None:
        """Products of a k32 step of 16 rows i and 8 columns j."""
        frags_m, types = self.tile.frags_m, f"f32.{self.kind}.{self.kind}.f32"
        acc = _registers("acc", 4 * (i * self.tile.frags_n + j))
        if self.tile.dense:
            for half in range(2):
                a = _registers("a", 4 * (half * frags_m + i))
                b = _registers("b", 4 * j + 2 * half, 2)
                self.emit(f"mma.sync.aligned.m16n8k16.row.col.{types} {acc}, {a}, {b}, {acc};")
            return
        a, b = _registers("a", 4 * (step * frags_m + i)), _registers("b", 4 * j)
        self.emit(
            "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col."
            f"{types} {acc}, {a}, {b}, {acc}, meta{i}, 0x{step};"
        )

    def _next_stage(self) -> None:
        """All fragments of this stage are in registers: release it, and wait for the next one."""
        self._commit("@copying ")
        for part in range(self.distance // self.part_steps + 1, self.parts):
            # What remains to be copied says which stage was the last one.
            self.emit(f"setp.eq.s32 p, to_copy, {self.steps - part * self.part_steps};")
            self._jump(part, "@p ")
        self.emit("@leader mbarrier.arrive.shared.b64 _, [read_bar + 8];")
        self._advance("read")
        self.emit("sub.u32 to_read, to_read, 1;", "setp.eq.u32 p, to_read, 0;")
        label = f"LAST{self.labels}"
        self.emit(f"@p bra {label};")
        self._wait("read", 0)
        self.emit(f"{label}:")


def _registers(name: str, first: int, number: int = 4) -> str:
    return "{" + ", ".join(f"{name}{first + i}" for i in range(number)) + "}"


def _emulate(values_ref, metadata_ref, b_ref, m0, n0, tile: Tile, b_layout: str, b_rows):
    m, columns = values_ref.shape
    n = b_ref.shape[0] if b_layout == "nk" else b_ref.shape[1]
    rows = jnp.minimum(m0 + jnp.arange(tile.block_m), m - 1)
    cols = jnp.minimum(n0 + jnp.arange(tile.block_n), n - 1)
    if tile.dense:
        a = values_ref[...].astype(jnp.float32)[rows]
    else:
        a = _decompress(values_ref[...], metadata_ref[...])[rows]
    b = b_ref[...].astype(jnp.float32)
    b = b[cols].T if b_layout == "nk" else b[:, cols]
    if b_rows:
        size = columns * (1 if tile.dense else 2) // len(b_rows)
        b = jnp.concatenate([lax.dynamic_slice_in_dim(b, row, size) for row in b_rows])
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
