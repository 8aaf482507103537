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
        # Not abstract, whatever its base class looks like to a type checker.
        indexer: Any = indexing.NDIndexer
        first = indexer((0,) * len(aval.shape), tuple(aval.shape), ())
        found: Any = triton_lowering._compute_pointers_from_indices(ptr, info, first)
        # JAX 0.12 returns a mask of bounds too; kernels here keep within them by themselves.
        ptr = found[0] if isinstance(found, tuple) else found
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


def _vector(first: int, count: int) -> tuple[str, str]:
    """Suffix and operand of a load or store of one, two or four words."""
    operands = ", ".join(f"${first + i}" for i in range(count))
    return (f".v{count}", "{" + operands + "}") if count > 1 else ("", operands)


def load_words(
    ref, row: jax.Array, col: jax.Array, valid: jax.Array, *, count: int = 4, emulate: bool
) -> list[jax.Array]:
    """The words at (row, col) of a two-dimensional ref that nothing writes, as uint32.

    Args:
      col: a multiple of `count` words, as the row pitch must be.
      valid: (threads,) int32; a thread where it is zero gets zeros and reads nothing.
      count: words, one, two or four.
    """
    itemsize = jnp.dtype(ref.dtype).itemsize
    if emulate:
        cols = col[:, None] + jnp.arange(4 * count // itemsize)
        read = ref[...].at[row[:, None], cols].get(mode="fill", fill_value=0)
        elements = jnp.where(valid[:, None] != 0, read, jnp.zeros((), ref.dtype))
        split = elements.reshape(-1, count, 4 // itemsize)
        words = lax.bitcast_convert_type(split, jnp.uint32).reshape(-1, count)
        return [words[:, i] for i in range(count)]
    suffix, target = _vector(0, count)
    base, at_row, at_col, on = (f"${count + i}" for i in range(4))
    asm = _block(
        ".reg .pred on;",
        f"setp.ne.s32 on, {on}, 0;",
        *_address(ref.shape, itemsize, base, at_row, at_col),
        *(f"mov.b32 ${i}, 0;" for i in range(count)),
        f"@on ld.global.nc{suffix}.b32 {target}, [addr];",
    )
    return inline_ptx(asm, [ref], [row, col, valid], out=["uint32"] * count)


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
    suffix, operands = _vector(5, len(words))
    asm = _block(
        ".reg .pred on;",
        "mov.b32 $0, 0;",
        "setp.ne.s32 on, $4, 0;",
        *_address(ref.shape, itemsize, "$1", "$2", "$3"),
        f"@on st.global{suffix}.b32 [addr], {operands};",
    )
    inline_ptx(asm, [ref], [row, col, valid, *words], out=["uint32"])


def prefetch(ref, row: jax.Array, col: jax.Array, valid: jax.Array) -> None:
    """Starts bringing the cache lines at (row, col) of a two-dimensional ref to the L2 cache."""
    asm = _block(
        ".reg .pred on;",
        "mov.b32 $0, 0;",
        "setp.ne.s32 on, $4, 0;",
        *_address(ref.shape, jnp.dtype(ref.dtype).itemsize, "$1", "$2", "$3"),
        "@on prefetch.global.L2 [addr];",
    )
    inline_ptx(asm, [ref], [row, col, valid], out=["uint32"])


def pack_pair(low: jax.Array, high: jax.Array, dtype, *, emulate: bool) -> jax.Array:
    """Rounds two float32 arrays to bf16 or fp16, and packs them in a uint32 word."""
    if emulate:
        pair = jnp.stack([low, high], axis=1).astype(dtype)
        return lax.bitcast_convert_type(pair, jnp.uint32)
    kind = {"bfloat16": "bf16x2", "float16": "f16x2"}[jnp.dtype(dtype).name]
    (word,) = inline_ptx(f"cvt.rn.{kind}.f32 $0, $2, $1;", [], [low, high], out=["uint32"])
    return word


def _swap(lanes: int, a: str, b: str, x: str, y: str) -> list[str]:
    """x, y = a 2 x 2 transpose of a and b across threads whose numbers differ by `lanes`."""
    return [
        f"and.b32 s, lane, {lanes};",
        "setp.ne.b32 p, s, 0;",
        f"selp.b32 s, {a}, {b}, p;",
        f"shfl.sync.bfly.b32 s, s, {lanes}, 31, -1;",
        f"selp.b32 {x}, s, {a}, p;",
        f"selp.b32 {y}, {b}, s, p;",
    ]


_SWAP_REGISTERS = (".reg .pred p;", ".reg .b32 s, lane, w<4>;", "mov.u32 lane, %laneid;")


def transpose_pair(
    words: Sequence[jax.Array], lanes: int, *, emulate: bool
) -> tuple[jax.Array, jax.Array]:
    """Transposes two words across two threads: j of the i-th thread to i of the j-th.

    Args:
      words: two (threads,) uint32.
      lanes: what the numbers of the two threads differ by, a power of two below 32.
    """
    a, b = words
    if emulate:
        split = [w.reshape(-1, 2, lanes) for w in (a, b)]
        x, y = (jnp.stack([w[:, i] for w in split], axis=1).reshape(a.shape) for i in range(2))
        return x, y
    asm = _block(*_SWAP_REGISTERS, *_swap(lanes, "$2", "$3", "$0", "$1"))
    x, y = inline_ptx(asm, [], [a, b], out=["uint32"] * 2)
    return x, y


def transpose_quad(
    words: Sequence[jax.Array], lanes: tuple[int, int] = (1, 2), *, emulate: bool
) -> list[jax.Array]:
    """Transposes four words across four threads: j of the i-th thread to i of the j-th.

    Args:
      words: four (threads,) uint32.
      lanes: the i-th thread's number is the first one's plus lanes[0] (i % 2) + lanes[1] (i // 2).
    """
    a, b, c, d = words
    if emulate:
        (a, b), (c, d) = (transpose_pair(p, lanes[0], emulate=True) for p in ((a, b), (c, d)))
        (a, c), (b, d) = (transpose_pair(p, lanes[1], emulate=True) for p in ((a, c), (b, d)))
        return [a, b, c, d]
    asm = _block(
        *_SWAP_REGISTERS,
        *_swap(lanes[0], "$4", "$5", "w0", "w1"),
        *_swap(lanes[0], "$6", "$7", "w2", "w3"),
        *_swap(lanes[1], "w0", "w2", "$0", "$2"),
        *_swap(lanes[1], "w1", "w3", "$1", "$3"),
    )
    return inline_ptx(asm, [], [a, b, c, d], out=["uint32"] * 4)


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
