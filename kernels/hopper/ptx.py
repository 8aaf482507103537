"""Small Hopper PTX helpers that Mosaic GPU does not offer, as MLIR builders.

Everything here runs while a Mosaic GPU kernel is traced (inside ``plgpu.inline_mgpu``) and emits
inline assembly: sparse warpgroup MMA, mbarrier operations with one arriving thread, and
``stmatrix``. Inline PTX is used, rather than the NVVM dialect, because the dialect's operation
names differ between the JAX versions that we support.
"""

from __future__ import annotations

from collections.abc import Sequence

from jax.experimental.mosaic.gpu import utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm

WARPGROUP = 128
WARP = 32

_8_BIT = ("e4m3", "e5m2")


def i32_type() -> ir.Type:
    return ir.IntegerType.get_signless(32)


def i64_type() -> ir.Type:
    return ir.IntegerType.get_signless(64)


def const32(value: int) -> ir.Value:
    return arith.constant(i32_type(), ir.IntegerAttr.get(i32_type(), value))


def const64(value: int) -> ir.Value:
    """An i64 constant; values with the top bit set are given as unsigned."""
    signed = value - (1 << 64) if value >> 63 else value
    return arith.constant(i64_type(), ir.IntegerAttr.get(i64_type(), signed))


def asm(result: ir.Type | None, args: Sequence[ir.Value], ptx: str, constraints: str):
    """Emits side-effecting inline PTX."""
    if result is None:
        result = ir.Type.parse("!llvm.void")
    return llvm.inline_asm(
        result, list(args), ptx, constraints, asm_dialect=0, has_side_effects=True
    )


def shared_address(ref: ir.Value) -> ir.Value:
    """The 32-bit shared-memory address of a shared-memory memref, its offset included."""
    return llvm.ptrtoint(i32_type(), utils.memref_ptr(ref))


def global_address(ref: ir.Value) -> ir.Value:
    """The 64-bit address of a global-memory memref, its offset included."""
    return llvm.ptrtoint(i64_type(), utils.memref_ptr(ref))


def offset_address(base: ir.Value, index: ir.Value, itemsize: int) -> ir.Value:
    """A 64-bit address plus an unsigned 32-bit count of elements, which may exceed it in bytes."""
    return arith.addi(base, arith.muli(arith.extui(i64_type(), index), const64(itemsize)))


def load_global_f32(address: ir.Value, num: int) -> list[ir.Value]:
    """Loads one or two consecutive float32 values that nothing writes while the kernel runs."""
    f32 = ir.F32Type.get()
    if num == 1:
        return [asm(f32, [address], "ld.global.nc.f32 $0, [$1];", "=f,l")]
    struct = llvm.StructType.get_literal([f32, f32])
    out = asm(struct, [address], "ld.global.nc.v2.f32 {$0, $1}, [$2];", "=f,=f,l")
    return [llvm.extractvalue(f32, out, [i]) for i in range(2)]


def thread_in_warpgroup() -> ir.Value:
    return arith.remui(utils.thread_idx(), const32(WARPGROUP))


def is_leader(group: int) -> ir.Value:
    """A predicate true on the first thread of every `group` consecutive threads."""
    rest = arith.remui(utils.thread_idx(), const32(group))
    return arith.cmpi(arith.CmpIPredicate.eq, rest, const32(0))


def mbarrier_init(address: ir.Value, arrivals: int) -> None:
    asm(None, [address], f"mbarrier.init.shared::cta.b64 [$0], {arrivals};", "r")


def mbarrier_init_fence() -> None:
    asm(None, [], "fence.mbarrier_init.release.cluster;", "")


def mbarrier_wait(address: ir.Value, parity: ir.Value) -> None:
    """Blocks the thread until the phase of the given parity has completed."""
    ptx = (
        "{ .reg .pred done;\n"
        "WAIT:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1, 10000000;\n"
        "@done bra DONE;\n"
        "bra WAIT;\n"
        "DONE: }"
    )
    asm(None, [address, parity], ptx, "r,r,~{memory}")


def mbarrier_arrive(address: ir.Value) -> None:
    asm(None, [address], "mbarrier.arrive.shared::cta.b64 _, [$0];", "r,~{memory}")


def mbarrier_arrive_cluster(address: ir.Value, rank: ir.Value) -> None:
    """Arrives on the barrier at the same address of the cluster's block `rank`.

    Without a cluster-wide release: that makes the compiler flush all memory (MEMBAR.ALL.GPU), which
    halved the speed of the kernel, and arrivals here only say that asynchronous reads are over.
    """
    ptx = (
        "{ .reg .b32 remote;\n"
        "mapa.shared::cluster.u32 remote, $0, $1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [remote]; }"
    )
    asm(None, [address, rank], ptx, "r,r,~{memory}")


def cluster_barrier() -> None:
    """Waits for every thread of the cluster."""
    asm(None, [], "barrier.cluster.arrive.release; barrier.cluster.wait.acquire;", "~{memory}")


def mbarrier_expect(address: ir.Value, num_bytes: int) -> None:
    """Arrives once and announces the bytes that bulk copies will deliver in this phase."""
    ptx = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {num_bytes};"
    asm(None, [address], ptx, "r,~{memory}")


def smem_descriptor(
    address: ir.Value, *, leading_bytes: int, stride_bytes: int, swizzle: int
) -> ir.Value:
    """The 64-bit matrix descriptor of a swizzled shared-memory operand (PTX ISA, wgmma)."""
    code = {128: 1, 64: 2, 32: 3}[swizzle]
    fixed = ((leading_bytes >> 4) << 16) | ((stride_bytes >> 4) << 32) | (code << 62)
    base = arith.shrui(arith.andi(address, const32(0x3FFFF)), const32(4))
    return arith.ori(arith.extui(i64_type(), base), const64(fixed))


def advance(descriptor: ir.Value, num_bytes: int) -> ir.Value:
    """Moves a matrix descriptor's start by a multiple of 16 bytes."""
    if num_bytes == 0:
        return descriptor
    return arith.addi(descriptor, const64(num_bytes >> 4))


def wgmma_fence() -> None:
    asm(None, [], "wgmma.fence.sync.aligned;", "~{memory}")


def wgmma_commit() -> None:
    asm(None, [], "wgmma.commit_group.sync.aligned;", "~{memory}")


def wgmma_wait(groups: int) -> None:
    asm(None, [], f"wgmma.wait_group.sync.aligned {groups};", "~{memory}")


def wgmma_sparse(
    acc: Sequence[ir.Value] | None,
    a: ir.Value | Sequence[ir.Value],
    b: ir.Value,
    metadata: ir.Value,
    *,
    n: int,
    selector: int,
    dtype: str,
    b_transposed: bool,
    b_dtype: str | None = None,
) -> list[ir.Value]:
    """One ``wgmma.mma_async.sp`` of shape m64 n`n` k32, or k64 of 8-bit types, into float32.

    B's type is A's unless `b_dtype` names another one; both must be 8-bit types then, whose
    operands have the contracted dimension contiguous (`b_transposed` is False). `acc` holds n/2
    one-element float32 vectors a thread; None starts from zero, which saves clearing the registers.
    `a` is a descriptor or the thread's four 32-bit operand registers.
    """
    vec = ir.VectorType.get((1,), ir.F32Type.get())
    num = n // 2
    outputs = "{" + ", ".join(f"${i}" for i in range(num)) + "}"
    constraints = ["=f"] * num
    operand = num
    args: list[ir.Value] = []
    if acc is not None:
        assert len(acc) == num, (len(acc), num)
        constraints += [str(i) for i in range(num)]
        args += list(acc)
        operand += num
    in_registers = not isinstance(a, ir.Value)
    a_regs = list(a) if in_registers else [a]
    names = [f"${operand + i}" for i in range(len(a_regs))]
    a_text = "{" + ", ".join(names) + "}" if in_registers else names[0]
    constraints += ["r" if in_registers else "l"] * len(a_regs)
    operand += len(a_regs)
    if dtype in _8_BIT:
        assert not b_transposed, dtype
        k, transposes = 64, ""
    else:
        k = 32
        transposes = f", {int(b_transposed)}" if in_registers else f", 0, {int(b_transposed)}"
    ptx = (
        "{ .reg .pred keep;\n"
        f"setp.ne.b32 keep, {int(acc is not None)}, 0;\n"
        f"wgmma.mma_async.sp.sync.aligned.m64n{n}k{k}.f32.{dtype}.{b_dtype or dtype} {outputs}, "
        f"{a_text}, ${operand}, ${operand + 1}, {selector}, keep, 1, 1{transposes}; }}"
    )
    constraints += ["l", "r"]
    struct = llvm.StructType.get_literal([vec] * num)
    out = asm(struct, [*args, *a_regs, b, metadata], ptx, ",".join(constraints))
    return [llvm.extractvalue(vec, out, [i]) for i in range(num)]


def wgmma(
    acc: Sequence[ir.Value] | None,
    a: ir.Value,
    b: ir.Value,
    *,
    n: int,
    dtype: str,
    transposed: bool,
) -> list[ir.Value]:
    """One dense ``wgmma.mma_async`` of shape m64 n`n` k16 into float32, operands by descriptor.

    `acc` as of `wgmma_sparse`. `transposed`: whether both operands have the contracted dimension as
    the slower one in memory.
    """
    vec = ir.VectorType.get((1,), ir.F32Type.get())
    num = n // 2
    outputs = "{" + ", ".join(f"${i}" for i in range(num)) + "}"
    given = [] if acc is None else list(acc)
    assert len(given) in (0, num), (len(given), num)
    first = num + len(given)
    order = int(transposed)
    keep = "1" if given else "keep"
    text = (
        f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{dtype}.{dtype} {outputs}, "
        f"${first}, ${first + 1}, {keep}, 1, 1, {order}, {order};"
    )
    if not given:
        text = f"{{ .reg .pred keep;\nsetp.ne.b32 keep, 0, 0;\n{text} }}"
    constraints = ",".join(["=f"] * num + [str(i) for i in range(len(given))] + ["l", "l"])
    struct = llvm.StructType.get_literal([vec] * num)
    out = asm(struct, [*given, a, b], text, constraints)
    return [llvm.extractvalue(vec, out, [i]) for i in range(num)]


def pin(values: Sequence[ir.Value]) -> list[ir.Value]:
    """Keeps LLVM from moving arithmetic on `values` above this point (an empty assembly)."""
    vec = values[0].type
    num = len(values)
    struct = llvm.StructType.get_literal([vec] * num)
    constraints = ",".join(["=f"] * num + [str(i) for i in range(num)])
    out = asm(struct, values, "", constraints)
    return [llvm.extractvalue(vec, out, [i]) for i in range(num)]


def keep(words: Sequence[ir.Value]) -> None:
    """Uses 32-bit values in an empty assembly, so that their registers stay theirs until here."""
    asm(None, words, "", ",".join(["r"] * len(words)))


def use(value: ir.Value) -> None:
    """Uses a float32 value in an instruction that is there for that alone: its load must happen.

    It compares the value with one NaN of many, and traps on it.
    """
    ptx = "{ .reg .pred never;\nsetp.eq.b32 never, $0, 0x7fdeadbf;\n@never trap; }"
    asm(None, [value], ptx, "f")


def pack_pair(low: ir.Value, high: ir.Value, dtype: str) -> ir.Value:
    """Rounds two float32 values to nearest even and packs them, `low` in the low half."""
    ptx = f"cvt.rn.{dtype}x2.f32 $0, $1, $2;"
    return llvm.inline_asm(
        i32_type(), [high, low], ptx, "=r,f,f", asm_dialect=0, has_side_effects=False
    )


def pack_four(values: Sequence[ir.Value], dtype: str) -> ir.Value:
    """Rounds four float32 values to an 8-bit type, saturating, and packs them, the first lowest."""
    cvt = f"cvt.rn.satfinite.{dtype}x2.f32"
    ptx = (
        "{ .reg .b16 low, high;\n"
        f"{cvt} low, $2, $1;\n"
        f"{cvt} high, $4, $3;\n"
        "mov.b32 $0, {low, high}; }"
    )
    return llvm.inline_asm(
        i32_type(), list(values), ptx, "=r,f,f,f,f", asm_dialect=0, has_side_effects=False
    )


def pack_two(low: ir.Value, high: ir.Value, dtype: str) -> ir.Value:
    """Rounds two float32 values to an 8-bit type, saturating: 16 bits, `low` lowest, then zeros."""
    ptx = (
        "{ .reg .b16 both;\n"
        f"cvt.rn.satfinite.{dtype}x2.f32 both, $2, $1;\n"
        "cvt.u32.u16 $0, both; }"
    )
    return llvm.inline_asm(
        i32_type(), [low, high], ptx, "=r,f,f", asm_dialect=0, has_side_effects=False
    )


def warp_sum(value: ir.Value) -> ir.Value:
    """The sum of a 32-bit integer over the warp."""
    return asm(i32_type(), [value], "redux.sync.add.s32 $0, $1, 0xffffffff;", "=r,r")


def shuffle_xor(value: ir.Value, mask: int) -> ir.Value:
    """The value of the lane whose number differs in the bits of `mask`."""
    ptx = f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, 0xffffffff;"
    return asm(i32_type(), [value], ptx, "=r,r")


def stmatrix_x4(address: ir.Value, words: Sequence[ir.Value], *, transpose: bool) -> None:
    """Stores four 8x8 matrices of 16-bit elements; lane l gives a row address of matrix l/8."""
    trans = ".trans" if transpose else ""
    ptx = f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [$0], {{$1, $2, $3, $4}};"
    asm(None, [address, *words], ptx, "r,r,r,r,r,~{memory}")


def ldmatrix_x4(address: ir.Value, *, transpose: bool) -> list[ir.Value]:
    """Loads four 8x8 matrices of 16-bit elements; lane l gives a row address of matrix l/8."""
    trans = ".trans" if transpose else ""
    ptx = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
    struct = llvm.StructType.get_literal([i32_type()] * 4)
    out = asm(struct, [address], ptx, "=r,=r,=r,=r,r,~{memory}")
    return [llvm.extractvalue(i32_type(), out, [i]) for i in range(4)]


def store_shared_f32(address: ir.Value, values: Sequence[ir.Value]) -> None:
    """Stores one or two consecutive float32 values to shared memory."""
    if len(values) == 1:
        asm(None, [address, values[0]], "st.shared.f32 [$0], $1;", "r,f,~{memory}")
    else:
        ptx = "st.shared.v2.f32 [$0], {$1, $2};"
        asm(None, [address, *values], ptx, "r,f,f,~{memory}")


def fence_async_shared() -> None:
    """Makes the thread's shared-memory writes visible to bulk copies and wgmma."""
    asm(None, [], "fence.proxy.async.shared::cta;", "~{memory}")


def bulk_wait_read(groups: int) -> None:
    """Waits until all but the latest `groups` bulk stores have read their source."""
    asm(None, [], f"cp.async.bulk.wait_group.read {groups};", "~{memory}")
