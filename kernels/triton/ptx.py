"""Inline PTX for Pallas Triton kernels: one array element per thread.

Pallas exports `elementwise_inline_asm`, but two things a tensor-core kernel needs are missing
there: the address of a ref, and an assembly block with side effects (a store, a warp shuffle).
`inline_ptx` lowers to the same Triton operation with both.

All arrays are one-dimensional with one element for each thread of the program, so Triton's layout
is the identity: element i lives in thread i and a block runs once in each thread. Wider arrays
would leave the mapping to Triton's layout passes.

Each operation below has a `jax.numpy` twin, taken with `emulate=True`: inline PTX has no CPU rule,
so this is how indexing, packing and epilogues run in Pallas's interpreter.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src import core as jax_core
from jax._src import state
from jax._src.lib.mlir import ir
from jax._src.lib.triton import dialect as tt_dialect
from jax._src.pallas.triton import lowering as triton_lowering
from jax._src.state import indexing

_CONSTRAINT = {"int32": "r", "uint32": "r", "float32": "f"}

inline_ptx_p = jax_core.Primitive("inline_ptx")
inline_ptx_p.multiple_results = True


def inline_ptx(
    asm: str, refs: Sequence[Any], args: Sequence[jax.Array], *, out: Sequence[Any]
) -> list[jax.Array]:
    """Runs `asm` once in each thread.

    Operands are numbered results first, then the refs as 64-bit addresses, then the arrays.

    Args:
      asm: PTX. Blocks keep their order and are never removed or merged.
      refs: refs into global memory, passed as the address of their first element.
      args: (threads,) int32, uint32 or float32 arrays, at least one.
      out: result dtypes, at least one.

    Returns:
      (threads,) arrays, one for each entry of `out`.
    """
    return inline_ptx_p.bind(
        *refs, *args, asm=asm, num_refs=len(refs), out=tuple(jnp.dtype(d).name for d in out)
    )


@inline_ptx_p.def_effectful_abstract_eval
def _inline_ptx_abstract_eval(*avals, asm, num_refs, out):
    del asm
    shape = avals[num_refs].shape
    if any(a.shape != shape for a in avals[num_refs:]) or len(shape) != 1:
        raise ValueError(
            f"one element a thread expected, got {[a.shape for a in avals[num_refs:]]}"
        )
    results = [jax_core.ShapedArray(shape, jnp.dtype(d)) for d in out]
    return results, {state.WriteEffect(i) for i in range(num_refs)}


@triton_lowering.register_lowering(inline_ptx_p)
def _inline_ptx_lowering(ctx, *args, asm, num_refs, out):
    shape = ctx.avals_in[num_refs].shape
    int64 = ir.IntegerType.get_signless(64)
    operands, constraints = [], [f"={_CONSTRAINT[d]}" for d in out]
    for ptr, aval, info in zip(args[:num_refs], ctx.avals_in, ctx.block_infos, strict=False):
        first = indexing.NDIndexer((0,) * len(aval.shape), tuple(aval.shape), ())
        ptr = triton_lowering._compute_pointers_from_indices(ptr, info, first)
        address = tt_dialect.ptr_to_int(int64, ptr)
        operands.append(tt_dialect.splat(ir.RankedTensorType.get(shape, int64), address))
        constraints.append("l")
    for value, aval in zip(args[num_refs:], ctx.avals_in[num_refs:], strict=True):
        operands.append(triton_lowering._ensure_ir_value(value, aval))
        constraints.append(_CONSTRAINT[aval.dtype.name])
    results = [
        ir.RankedTensorType.get(shape, triton_lowering._dtype_to_ir_type(jnp.dtype(d))) for d in out
    ]
    return list(
        _as_sequence(
            tt_dialect.elementwise_inline_asm(
                results,
                asm,
                constraints=",".join(constraints),
                pure=False,
                packed_element=1,
                args=operands,
            )
        )
    )


def _as_sequence(results: Any) -> Sequence[Any]:
    # The bindings return a bare value for a single result, an operation or a list otherwise.
    if isinstance(results, ir.Value):
        return [results]
    return getattr(results, "results", results)


def _block(*lines: str) -> str:
    return "{\n" + "\n".join(lines) + "\n}"


def _address(ref_shape, itemsize: int, ref: str, row: str, col: str) -> list[str]:
    """`addr` = ref + (row * columns + col) * itemsize, in 64 bits."""
    return [
        ".reg .b64 addr;",
        f"mad.wide.s32 addr, {row}, {ref_shape[1] * itemsize}, {ref};",
        f"mad.wide.s32 addr, {col}, {itemsize}, addr;",
    ]


def load_words(
    ref, row: jax.Array, col: jax.Array, valid: jax.Array, *, emulate: bool
) -> list[jax.Array]:
    """The 16 bytes at (row, col) of a two-dimensional ref, as four uint32 words.

    Args:
      col: a multiple of 16 bytes, as the row pitch must be.
      valid: (threads,) int32; a thread where it is zero gets zeros and reads nothing.
    """
    itemsize = jnp.dtype(ref.dtype).itemsize
    if emulate:
        cols = col[:, None] + jnp.arange(16 // itemsize)
        read = ref[...].at[row[:, None], cols].get(mode="fill", fill_value=0)
        elements = jnp.where(valid[:, None] != 0, read, jnp.zeros((), ref.dtype))
        words = lax.bitcast_convert_type(elements.reshape(-1, 4, 4 // itemsize), jnp.uint32)
        return [words.reshape(-1, 4)[:, i] for i in range(4)]
    asm = _block(
        ".reg .pred on;",
        "setp.ne.s32 on, $7, 0;",
        *_address(ref.shape, itemsize, "$4", "$5", "$6"),
        *(f"mov.b32 ${i}, 0;" for i in range(4)),
        "@on ld.global.v4.b32 {$0, $1, $2, $3}, [addr];",
    )
    return inline_ptx(asm, [ref], [row, col, valid], out=["uint32"] * 4)


def store_words(
    ref, row: jax.Array, col: jax.Array, words: Sequence[jax.Array], valid: Any, *, emulate: bool
) -> None:
    """Stores one, two or four uint32 words at (row, col) of a two-dimensional ref.

    Args:
      valid: (threads,) int32; zero switches a thread's store off.
    """
    itemsize = jnp.dtype(ref.dtype).itemsize
    if emulate:
        elements = lax.bitcast_convert_type(jnp.stack(words, axis=1), ref.dtype)
        elements = elements.reshape(row.size, -1)
        # The interpreter has no masked scatter: switched-off threads write out of bounds.
        rows = jnp.where(valid != 0, row, ref.shape[0])[:, None]
        cols = col[:, None] + jnp.arange(elements.shape[1])
        ref[...] = ref[...].at[rows, cols].set(elements, mode="drop")
        return
    count = len(words)
    operands = ", ".join(f"${5 + i}" for i in range(count))
    vector = f".v{count}" if count > 1 else ""
    asm = _block(
        ".reg .pred on;",
        "mov.b32 $0, 0;",
        "setp.ne.s32 on, $4, 0;",
        *_address(ref.shape, itemsize, "$1", "$2", "$3"),
        f"@on st.global{vector}.b32 [addr], "
        + ("{" + operands + "};" if count > 1 else operands + ";"),
    )
    inline_ptx(asm, [ref], [row, col, valid, *words], out=["uint32"])


def pack_pair(low: jax.Array, high: jax.Array, dtype, *, emulate: bool) -> jax.Array:
    """Rounds two float32 arrays to bf16 or fp16, and packs them in a uint32 word."""
    if emulate:
        pair = jnp.stack([low, high], axis=1).astype(dtype)
        return lax.bitcast_convert_type(pair, jnp.uint32)
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(dtype).name]
    (word,) = inline_ptx(f"cvt.rn.{kind}.f32 $0, $2, $1;", [], [low, high], out=["uint32"])
    return word


def transpose_quad(words: Sequence[jax.Array], *, emulate: bool) -> list[jax.Array]:
    """Transposes four words across four neighbouring threads: j of thread t to t of j."""
    if emulate:
        stacked = jnp.stack(words, axis=-1).reshape(-1, 4, 4)
        turned = jnp.swapaxes(stacked, 1, 2).reshape(-1, 4)
        return [turned[:, i] for i in range(4)]

    def swap(mask: int, a: str, b: str, x: str, y: str) -> list[str]:
        return [
            f"and.b32 s, lane, {mask};",
            "setp.ne.b32 p, s, 0;",
            f"selp.b32 s, {a}, {b}, p;",
            f"shfl.sync.bfly.b32 s, s, {mask}, 31, -1;",
            f"selp.b32 {x}, s, {a}, p;",
            f"selp.b32 {y}, {b}, s, p;",
        ]

    asm = _block(
        ".reg .pred p;",
        ".reg .b32 s, lane, w<4>;",
        "mov.u32 lane, %laneid;",
        *swap(1, "$4", "$5", "w0", "w1"),
        *swap(1, "$6", "$7", "w2", "w3"),
        *swap(2, "w0", "w2", "$0", "$2"),
        *swap(2, "w1", "w3", "$1", "$3"),
    )
    return inline_ptx(asm, [], list(words), out=["uint32"] * 4)


def transpose_tile(word: jax.Array, *, emulate: bool) -> jax.Array:
    """Transposes an 8 x 8 tile of 16-bit elements held by a warp in tensor-core fragment order.

    Thread 4 q + t holds row q, columns 2 t and 2 t + 1, before and after.
    """
    if emulate:
        halves = jnp.stack([word & 0xFFFF, word >> 16], axis=-1).reshape(-1, 8, 8)
        turned = jnp.swapaxes(halves, 1, 2).reshape(-1, 2)
        return turned[:, 0] | (turned[:, 1] << 16)
    asm = "movmatrix.sync.aligned.m8n8.trans.b16 $0, $1;"
    (out,) = inline_ptx(asm, [], [word], out=["uint32"])
    return out
