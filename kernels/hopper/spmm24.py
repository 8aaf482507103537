"""2:4-sparse times dense products on Hopper's sparse tensor cores (``wgmma.sp``).

One persistent, warp-specialised kernel: a producer warpgroup keeps a ring of shared-memory stages
filled by TMA, across output tiles, and the compute warpgroups issue sparse warpgroup MMAs, keep
one group of them in flight, and write their part of the tile through shared memory, transposed
there if asked.

What bounds it. An m64 nN k32 sparse MMA takes N/2 cycles of arithmetic and reads 64 N + 2048 bytes
of shared memory at 128 bytes a cycle: 144 cycles for N = 256, 112 for 192, 80 for 128, exactly what
a loop of nothing else takes on an H100. So B's reads alone fill shared memory, whatever the tile;
only L2 and TMA traffic falls with larger tiles. 256 x 192 (192 accumulators a thread) keeps shared
memory 96% busy; under sustained load the clock then falls to 1.4 GHz: power is the last bound.

Measured on an H100 and dropped, or kept only as options: a second MMA group in flight (within 2%
either way for 256 x 192 and 128 x 256 tiles, 5% faster for 256 x 128); A in registers (its loads
pass through the same 128 bytes a cycle: 5 to 10% slower in a model loop); three warpgroups of
64 x 256 (ptxas refuses an instruction of 128 accumulators when 512 threads start with 128 registers
each); multicast in clusters of two (equal or up to 8% slower: neighbours wait for each other);
three stages with twice the output buffers (2% slower).
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels.hopper import device
from kernels.hopper.grouped_common import tile_order
from kernels.hopper.spmm24_config import REGISTERS, Spmm24Config, choose_config
from kernels.hopper.spmm24_epilogue import touch_scales, write_tile
from kernels.hopper.spmm24_pipeline import (
    cluster_barrier,
    finish,
    init_barriers,
    mma_step,
    produce,
)
from kernels.hopper.spmm24_problem import DTYPES, FP8_DTYPES, Problem

__all__ = ["Spmm24Config", "check_spmm24", "spmm24"]

_JAX_DTYPES = {name: jnp.dtype(dtype) for dtype, name in (DTYPES | FP8_DTYPES).items()}

Layout = Literal["nk", "kn"]
OutLayout = Literal["mn", "nm"]


def tile_origin(p: Problem, linear: jax.Array, rank: jax.Array | int):
    """First row and column of the tile that a block of rank `rank` computes as `linear`-th.

    Tiles follow a snake through strips of `width` tiles, so that the blocks running at one time
    share few rows of A and columns of B.
    """
    c = p.config
    minor = 0 if c.order == "m" else 1
    tiles = (p.m_tiles, p.n_tiles)
    if device.linked():
        # planar_snake divides by the width of the last strip, a variable.
        width = min(c.width, tiles[minor])
        major_i, minor_i = tile_order(linear, tiles[1 - minor], tiles[minor], width)
        mi, ni = (minor_i, major_i) if minor == 0 else (major_i, minor_i)
    else:
        mi, ni = plgpu.planar_snake(linear, tiles, minor, c.width)
    m0, n0 = mi * c.cluster_m, ni * c.cluster_n
    if c.cluster == "m":
        m0 = m0 + rank * c.block_m
    elif c.cluster == "n":
        n0 = n0 + rank * c.block_n
    return m0, n0


def _kernel(p: Problem, a_g, meta_g, b_g, *rest):
    c = p.config
    *scales_g, out_g = rest
    scale_g = scales_g.pop(0) if p.scaled else None
    k_steps = pl.cdiv(p.k, c.tile_k)
    fill = produce(p)
    first_step, next_step = mma_step(p, first=True), mma_step(p, first=False)
    end, write = finish(p), write_tile(p)
    touch = touch_scales(p) if p.m_scaled or p.n_scaled else None
    a_dtype, b_dtype = (_JAX_DTYPES[name] for name in (p.dtype, p.b_dtype or p.dtype))

    @functools.partial(
        pl.run_scoped,
        a_s=plgpu.SMEM((c.stages, c.block_m, c.tile_k // 2), a_dtype),
        b_s=plgpu.SMEM((c.stages, *p.b_panel), b_dtype),
        out_s=plgpu.SMEM(
            (
                c.warpgroups,
                c.out_slots,
                c.epi_n // 64 * p.out_panels,
                64,
                p.out_swizzle_elems,
            ),
            p.out_dtype,
        ),
        meta_s=plgpu.SMEM((c.stages, c.block_m // 64, c.tile_k // 64, 128), jnp.int32),
        bars=plgpu.SMEM((2 * c.stages, 2), jnp.int32),
        collective_axes="wg",
    )
    def _scope(a_s, b_s, out_s, meta_s, bars):
        wg = lax.axis_index("wg")
        block = lax.axis_index("block")
        my_tiles = lax.div(p.tiles - block + (p.blocks - 1), p.blocks)
        init_barriers(p)(bars)

        rank = lax.axis_index("cluster") if c.cluster else 0

        def origin(t):
            return tile_origin(p, block + t * p.blocks, rank)

        def advance(slot, parity):
            wrap = slot == c.stages - 1
            return jnp.where(wrap, 0, slot + 1), jnp.where(wrap, parity ^ 1, parity)

        @pl.when(wg == c.warpgroups)
        def _producer():
            plgpu.set_max_registers(40 if c.warpgroups < 3 else 32, action="decrease")

            def tile(t, state):
                m0, n0 = origin(t)

                def step(i, state):
                    slot, parity = state
                    at = lambda ref: ref.at[slot]
                    fill(
                        a_g,
                        meta_g,
                        b_g,
                        at(a_s),
                        at(meta_s),
                        at(b_s),
                        bars,
                        slot,
                        parity,
                        m0,
                        n0,
                        i * c.tile_k,
                    )
                    return advance(slot, parity)

                return lax.fori_loop(0, k_steps, step, state)

            # The first lap's stages have never been full: waiting for the phase before passes.
            lax.fori_loop(0, my_tiles, tile, (jnp.int32(0), jnp.int32(1)))

        @pl.when(wg < c.warpgroups)
        def _consumer():
            plgpu.set_max_registers(REGISTERS[c.warpgroups], action="increase")
            scale = scale_g[0] if scale_g is not None else jnp.float32(1)

            def own_origin(t):
                m0, n0 = origin(t)
                if c.split == "m":
                    return m0 + wg * (64 * c.wg_m), n0
                return m0, n0 + wg * c.tile_n

            def tile(t, state):
                slot, parity = state
                at = lambda slot: (a_s.at[slot], meta_s.at[slot], b_s.at[slot], bars)
                early = [touch(*scales_g, *own_origin(t))] if touch is not None else []
                acc, metas = first_step(*at(slot), slot, parity, slot)
                carry = (acc, metas, *advance(slot, parity), slot)

                def step(carry):
                    acc, metas, slot, parity, previous = carry
                    acc, metas = next_step(acc, metas, *at(slot), slot, parity, previous)
                    return (acc, metas, *advance(slot, parity), slot)

                # Two steps an iteration, so that the metadata of consecutive steps sit in
                # different registers without moves between them.
                pairs, odd = divmod(k_steps - 1, 2)
                carry = lax.fori_loop(0, pairs, lambda _, carry: step(step(carry)), carry)
                if odd:
                    carry = step(carry)
                acc, metas, slot, parity, previous = carry
                acc = end(acc, metas, bars, previous)
                write(acc, out_s.at[wg], out_g, *own_origin(t), scale, *scales_g, *early)
                return slot, parity

            lax.fori_loop(0, my_tiles, tile, (jnp.int32(0), jnp.int32(0)))
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        if c.cluster is not None:
            # The other block's data and arrivals may still be on their way to this one's memory.
            cluster_barrier()()


def spmm24(
    values: jax.Array,
    metadata: jax.Array,
    b: jax.Array,
    *,
    b_layout: Layout,
    out_layout: OutLayout = "mn",
    scale: jax.Array | None = None,
    epilogue: str | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Spmm24Config | None = None,
) -> jax.Array:
    """A @ B for A (m, k) packed 2:4 along k, accumulated in float32 on sparse tensor cores.

    values (m, k/2) bfloat16 or float16 and metadata (m/64, k/64, 128) int32 as `pack24` writes
    them; b (n, k) for `b_layout` "nk", (k, n) for "kn", of the same dtype as values. Returns
    epilogue(scale * A @ B) rounded to `out_dtype`, as (m, n) or, for `out_layout` "nm", as (n, m).
    scale: None or a float32 scalar. epilogue: None or "relu2", max(x, 0)^2. config: None takes the
    device's tuned entry for this shape, else a heuristic.

    Raises ValueError for inconsistent arguments and NotImplementedError where `check_spmm24` does.
    """
    check_spmm24(
        values,
        metadata,
        b,
        b_layout=b_layout,
        out_layout=out_layout,
        scale=scale,
        epilogue=epilogue,
        out_dtype=out_dtype,
        config=config,
    )
    m, k = values.shape[0], 2 * values.shape[1]
    n = b.shape[0] if b_layout == "nk" else b.shape[1]
    if config is None:
        config = choose_config(m, n, k, b_layout, out_layout, out_dtype)
    p = Problem(
        m=m,
        n=n,
        k=k,
        dtype=DTYPES[values.dtype.name],
        b_layout=b_layout,
        out_layout=out_layout,
        out_dtype=jnp.dtype(out_dtype),
        relu2=epilogue == "relu2",
        scaled=scale is not None,
        cores=device.num_cores(),
        config=config,
    )
    operands = [values, metadata, b]
    if scale is not None:
        operands.append(jnp.asarray(scale, jnp.float32).reshape(1))
    return launch(p, operands)


def launch(p: Problem, operands: list[jax.Array]) -> jax.Array:
    """Runs the kernel of a problem: values, metadata, b, then the scales that it has."""
    config = p.config
    call = plgpu.kernel(
        functools.partial(_kernel, p),
        out_type=jax.ShapeDtypeStruct(
            (p.m, p.n) if p.out_layout == "mn" else (p.n, p.m), p.out_dtype
        ),
        grid=(p.blocks,),
        grid_names=("block",),
        cluster=(2,) if config.cluster else (),
        cluster_names=("cluster",) if config.cluster else (),
        num_threads=config.warpgroups + 1,
        thread_name="wg",
        kernel_name="spmm24_hopper" if p.itemsize == 2 else "spmm24_fp8_hopper",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane, unsafe_no_auto_barriers=True
        ),
    )
    return call(*operands)


def check_spmm24(
    values: jax.Array,
    metadata: jax.Array,
    b: jax.Array,
    *,
    b_layout: Layout,
    out_layout: OutLayout = "mn",
    scale: jax.Array | None = None,
    epilogue: str | None = None,
    out_dtype: Any = jnp.bfloat16,
    config: Spmm24Config | None = None,
) -> None:
    """Raises NotImplementedError if this device, shape or dtype is not served, else returns None.

    Arguments that contradict one another raise ValueError.
    """
    if b_layout not in ("nk", "kn"):
        raise ValueError(f"{b_layout=} must be 'nk' or 'kn'")
    if out_layout not in ("mn", "nm"):
        raise ValueError(f"{out_layout=} must be 'mn' or 'nm'")
    if epilogue not in (None, "relu2"):
        raise ValueError(f"{epilogue=} must be None or 'relu2'")
    if values.ndim != 2 or b.ndim != 2:
        raise ValueError(f"{values.shape=} and {b.shape=} must be matrices")
    m, k = values.shape[0], 2 * values.shape[1]
    n, b_k = b.shape if b_layout == "nk" else b.shape[::-1]
    if b_k != k:
        raise ValueError(f"{b.shape=} with {b_layout=} does not contract with {values.shape=}")
    if values.dtype != b.dtype:
        raise ValueError(f"{values.dtype=} differs from {b.dtype=}")
    if scale is not None and np.size(scale) != 1:
        raise ValueError(f"{np.shape(scale)=} must be a scalar")
    if values.dtype.name not in DTYPES:
        raise NotImplementedError(f"{values.dtype=} is not bfloat16 or float16")
    if jnp.dtype(out_dtype).name not in (*DTYPES, "float32"):
        raise NotImplementedError(f"{out_dtype=} is not bfloat16, float16 or float32")
    if m % 64 or k % 64 or n % 8 or not min(m, n, k):
        raise NotImplementedError(f"{m=} and {k=} must be multiples of 64, {n=} of 8")
    if metadata.shape != (m // 64, k // 64, 128) or metadata.dtype != jnp.int32:
        raise ValueError(f"{metadata.shape=} {metadata.dtype=} do not describe {values.shape=}")
    device.require_hopper()
    if config is not None:
        problem = config.problem(jnp.dtype(out_dtype).itemsize)
        if problem is not None:
            raise NotImplementedError(f"{config}: {problem}")
