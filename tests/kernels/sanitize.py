"""Small runs of the GPU kernels, to watch with NVIDIA's checkers:

    compute-sanitizer --tool memcheck python -m tests.kernels.sanitize hopper
    compute-sanitizer --tool racecheck python -m tests.kernels.sanitize triton

A second argument takes one family: products (with packing), grouped, or fp8 (hopper only). Operands
are made with numpy, so that the kernels are nearly all that runs on the device.
"""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np

RNG = np.random.default_rng(0)


def on_device(*shape: int, dtype=jnp.bfloat16) -> jax.Array:
    return jax.device_put(RNG.standard_normal(shape, np.float32).astype(dtype))


def finite(*arrays: jax.Array) -> None:
    assert all(np.isfinite(np.asarray(a, np.float32)).all() for a in arrays)


def products(backend: str) -> None:
    pack24 = importlib.import_module(f"kernels.{backend}.pack24").pack24
    module = importlib.import_module(f"kernels.{backend}.spmm24")
    configs = [None]
    if backend == "hopper":
        wide = module.Spmm24Config(wg_m=2, tile_n=192, epi_n=192, out_slots=1)
        configs = [wide, module.Spmm24Config(cluster="m")]
    x, y = on_device(320, 320, dtype=np.float32), on_device(320, 392)
    for axis in (0, 1):
        values, metadata = pack24(x, axis=axis, mode="soft_threshold")
        for out_layout in ("mn", "nm"):
            for config in configs:
                layouts = {"b_layout": "kn", "out_layout": out_layout}
                finite(module.spmm24(values, metadata, y, **layouts, config=config))
    # Packed by nobody: positions that no 2:4 matrix has.
    words = RNG.integers(-(2**31), 2**31, metadata.shape).astype(np.int32)
    finite(module.spmm24(values, jax.device_put(words), y, b_layout="kn"))


def grouped(backend: str) -> None:
    """Two experts, one token block each and an unused one."""
    functions = importlib.import_module(f"kernels.{backend}.grouped24")
    experts, live, width, v = 2, 128, 192, 128
    w = on_device(experts * live, width, dtype=np.float32)
    values, metadata, dense = functions.pack_weight24(w, num_experts=2, m=8, scale=1.5)
    offsets = jax.device_put(np.array([0, v, 2 * v], np.int32))
    layout = offsets, jax.device_put(np.array([0, 1, 1], np.int32))
    x, dy = on_device(3 * v, width), on_device(3 * v, width)
    order = np.concatenate([np.arange(2 * v), np.full(v, 2 * v)]).astype(np.int32)
    permutation = jax.device_put(order)
    y = functions.up24_linear(values, metadata, x, *layout)
    y2, y2_values, y2_metadata = functions.up24(values, metadata, x, *layout)
    y3 = functions.down24(y2_values, y2_metadata, dense, *layout)
    by_token = functions.down24(
        y2_values, y2_metadata, dense, *layout, permutation=permutation, tokens=2 * v
    )
    dy1, dy1_values = functions.up24_backward(values, metadata, dy, y2, y2_metadata, *layout)
    dw = functions.weight_gradient(y2, dy, offsets, num_experts=2)
    finite(dense, y, y2, y3, by_token, dy1, dy1_values, dw)
    if hasattr(functions, "weight_gradient24"):
        densest = jax.device_put(np.array([[3, 100], [0, 127]], np.int32))
        finite(functions.weight_gradient24(y2, dy, offsets, densest, num_experts=2))


def fp8(backend: str) -> None:
    if backend != "hopper":
        print("fp8: hopper only")
        return
    pack24_fp8 = importlib.import_module("kernels.hopper.pack24_fp8").pack24_fp8
    spmm24_fp8 = importlib.import_module("kernels.hopper.spmm24_fp8").spmm24_fp8
    x, y = on_device(320, 320, dtype=np.float32), on_device(392, 320, dtype=jnp.float8_e4m3fn)
    rows, columns = jax.device_put((np.ones(320, np.float32), np.ones(392, np.float32)))
    for axis in (0, 1):
        values, metadata, _ = pack24_fp8(x, axis=axis, mode="soft_threshold", scale=rows)
        for out_layout, b_scale in (("mn", columns), ("nm", None)):
            options = {"a_scale": rows, "b_scale": b_scale, "out_layout": out_layout}
            finite(spmm24_fp8(values, metadata, y, **options))


def main(backend: str, *families: str) -> None:
    known = {"products": products, "grouped": grouped, "fp8": fp8}
    for family in families or known:
        known[family](backend)
        print(family, "done")


if __name__ == "__main__":
    main(*sys.argv[1:])
