"""Compiles kernels for a GPU that this machine need not have.

    pip install "jax[cuda13]" nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    JAX_PLATFORMS=cpu python -m benchmarks.compile_for A100 --out compiled.json
    JAX_PLATFORMS=cpu python -m benchmarks.compile_for H100 --backend hopper --out compiled.json

XLA's compiler takes a description of the device instead of the device. What it refuses (more shared
memory than there is), and what the assembler made (registers, spills, sparse tensor core
instructions), is known that way; nothing is run, so neither speed nor results are. The sizes are
those of a step of llama1b and llama7b with 16,384 tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

from benchmarks import device_code
from benchmarks.environment import versions
from kernels.registry import Backend, assume_capability, refusal
from kernels.shared_rows import of_hidden
from sparsejax.spec import Sparsity

Shape = jax.ShapeDtypeStruct

TOKENS, V, M, SHARED_EVERY = 16_384, 128, 16, 4
MODELS = {"llama1b": (2048, 8192), "llama7b": (4096, 16384)}
"""D and H."""
MMAS = ("HMMA.SP", "HMMA", "HGMMA.SP", "HGMMA", "UTCHMMA")
"""Tensor core instructions: sparse and dense of any chip, the same of Hopper, of Blackwell."""
FUNCTIONS: dict[Backend, str] = {"triton": "{}", "hopper": "{}_hopper_mosaic_gpu_kernel"}
"""What a kernel is called on the device."""


@dataclasses.dataclass(frozen=True)
class Target:
    """A GPU as XLA's compiler wants it described.

    Attributes:
      kind: JAX's name for it.
      capability: compute capability.
      cores: streaming multiprocessors.
      shared_bytes: of a multiprocessor.
      block_bytes: shared memory that one block may have.
    """

    kind: str
    capability: tuple[int, int]
    cores: int
    shared_bytes: int
    block_bytes: int

    def text(self) -> str:
        """Its description, a GpuTargetConfigProto."""
        major, minor = self.capability
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_bytes}
  shared_memory_per_block_optin: {self.block_bytes}
  core_count: {self.cores} fpus_per_core: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  memory_bandwidth: 2000000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.5
  device_memory_size: 84942979072
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability {major}.{minor}"
  device_address_bits: 64 name: "{self.kind}"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{self.kind}"
"""


TARGETS = {
    "A100": Target("NVIDIA A100-SXM4-80GB", (8, 0), 108, 167_936, 166_912),
    "A10": Target("NVIDIA A10", (8, 6), 72, 102_400, 101_376),
    "L40": Target("NVIDIA L40", (8, 9), 142, 102_400, 101_376),
    "H100": Target("NVIDIA H100 80GB HBM3", (9, 0), 132, 233_472, 232_448),
    "B200": Target("NVIDIA B200", (10, 0), 148, 233_472, 232_448),
    "RTX6000": Target("NVIDIA RTX PRO 6000", (12, 0), 188, 102_400, 101_376),
}


def problems(
    width: int, hidden: int, backend: Backend = "triton"
) -> Iterator[tuple[str, str, Callable, tuple[Shape, ...]]]:
    """A kernel's name, what it is given in words, itself, and shapes to compile it for."""
    # Only when asked for: machines without GPUs may lack what one of them imports.
    spmm24, pack24, grouped24 = (
        importlib.import_module(f"kernels.{backend}.{op}")
        for op in ("spmm24", "pack24", "grouped24")
    )
    bf16, f32, i32 = jnp.bfloat16, jnp.float32, jnp.int32
    metadata = lambda m, k: Shape((m // 64, k // 64, 128), i32)
    for m, n, k in ((hidden // 2, TOKENS, width), (TOKENS, width, hidden)):
        product = lambda *a: spmm24.spmm24(*a, b_layout="nk")
        shapes = Shape((m, k // 2), bf16), metadata(m, k), Shape((n, k), bf16)
        yield "spmm24", f"{m} x {n} x {k}", product, shapes
    for axis in (0, 1):
        for mode, shape in (
            ("soft_threshold", Shape((width, hidden), f32)),
            ("magnitude", Shape((TOKENS, hidden), bf16)),
        ):
            packed = lambda x, a=axis, mode=mode: pack24.pack24(x, axis=a, mode=mode, dtype=bf16)
            yield "pack24", f"{mode}, axis {axis}", packed, (shape,)
    experts = Sparsity(m=M).num_experts
    live, rows = hidden // experts, TOKENS + experts * V
    blocks = Shape((experts + 1,), i32), Shape((rows // V,), i32)
    weight = Shape((hidden, width // 2), bf16), metadata(hidden, width)
    x, y = Shape((rows, width), bf16), Shape((rows, live), bf16)
    half, kept = Shape((rows, live // 2), bf16), metadata(rows, live)
    pack = lambda w: grouped24.pack_weight24(w, num_experts=experts, m=M, scale=1.0, dtype=bf16)
    gradient = lambda y, x, offsets: grouped24.weight_gradient(y, x, offsets, num_experts=experts)
    dense = Shape((experts, live, width), bf16)
    yield "pack_weight24", f"M {M}", pack, (Shape((hidden, width), f32),)
    if backend == "hopper":  # On Triton they are packed without a kernel.
        for number, note in ((0, ""), (SHARED_EVERY, f", 1 in {SHARED_EVERY} shared")):
            in_order = lambda w, number=number: grouped24.pack_weight24(
                w, num_experts=experts, m=M, scale=None, threshold=False, shared_every=number
            )
            problem = f"M {M}{note}, weights not 2:4"
            yield "pack_weight24", problem, in_order, (Shape((hidden, width), f32),)
    yield "up24", f"M {M}", grouped24.up24, (*weight, x, *blocks)
    yield "up24_linear", f"M {M}", grouped24.up24_linear, (*weight, x, *blocks)
    yield "down24", f"M {M}", grouped24.down24, (half, kept, dense, *blocks)
    yield "up24_backward", f"M {M}", grouped24.up24_backward, (*weight, x, y, kept, *blocks)
    yield "weight_gradient", f"M {M}", gradient, (y, x, blocks[0])
    sizes = of_hidden(hidden, experts, SHARED_EVERY)
    if grouped24.SHARED_ONCE and grouped24.serves_shared(sizes):
        shared, y_shared = f"M {M}, 1 in {SHARED_EVERY} shared", Shape((rows, sizes.live), bf16)
        once = {"num_experts": experts, "shared_every": SHARED_EVERY}
        pack = lambda w: grouped24.pack_weight24(w, m=M, scale=1.0, dtype=bf16, **once)
        gradient = lambda y, x, offsets: grouped24.weight_gradient(y, x, offsets, **once)
        yield "pack_weight24", shared, pack, (Shape((hidden, width), f32),)
        yield "weight_gradient", shared, gradient, (y_shared, x, blocks[0])
        of_y = Shape((rows, sizes.live // 2), bf16), metadata(rows, sizes.live)
        operands: tuple[tuple[str, tuple[Shape, ...]], ...] = (
            ("up24", (*weight, x, *blocks)),
            ("up24_linear", (*weight, x, *blocks)),
            ("down24", (*of_y, Shape((hidden, width), bf16), *blocks)),
            ("up24_backward", (*weight, x, y_shared, of_y[1], *blocks)),
        )
        for name, arguments in operands:
            every = {"shared_every": SHARED_EVERY}
            product = lambda *a, name=name, every=every: getattr(grouped24, name)(*a, **every)
            yield name, shared, product, arguments
            if name != "down24":
                # Weights in the place of values; no metadata.
                whole = lambda w, *a, product=product: product(w, None, *a)
                rest = Shape((hidden, width), bf16), *arguments[2:]
                yield name, f"{shared}, weights not 2:4", whole, rest
    if grouped24.DENSE_WEIGHTS:
        as_they_are, given = f"M {M}, weights not 2:4", Shape((hidden, width), bf16)
        for name, rest in (
            ("up24", (x, *blocks)),
            ("up24_linear", (x, *blocks)),
            ("up24_backward", (x, y, kept, *blocks)),
        ):
            product = lambda w, *a, name=name: getattr(grouped24, name)(w, None, *a)
            yield name, as_they_are, product, (given, *rest)


class Compiler:
    """Compiles for a target."""

    def __init__(self, target: Target):
        """Starts XLA's compiler for NVIDIA GPUs.

        Raises:
          RuntimeError: it is not installed, or does not take such a device.
        """
        # The driver and the libraries of a GPU are not needed to compile.
        os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
        self.capability = target.capability
        devices = topologies.get_topology_desc(
            "", platform="cuda", target_config=target.text(), topology="1x1x1"
        ).devices
        self.mesh = Mesh(np.array(devices).reshape(1), ("x",), axis_types=(AxisType.Auto,))

    def __call__(self, function: Callable, *shapes: Shape) -> Any:
        """The compiled function of arguments of these shapes."""
        everywhere = NamedSharding(self.mesh, P())
        placed = [Shape(s.shape, s.dtype, sharding=everywhere) for s in shapes]
        options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
        with jax.set_mesh(self.mesh), assume_capability(self.capability):
            return jax.jit(function).trace(*placed).lower().compile(compiler_options=options)


def run(target: Target, backend: Backend = "triton") -> list[dict[str, Any]]:
    """Compiles every kernel of a backend; a row for each."""
    compiler, seen, rows = Compiler(target), set[bytes](), []
    for model, (width, hidden) in MODELS.items():
        for name, problem, function, shapes in problems(width, hidden, backend):
            row: dict[str, Any] = {"model": model, "kernel": name, "problem": problem}
            rows.append(row)
            try:
                executable = compiler(function, *shapes)
            except Exception as error:  # whatever XLA says is the result
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                continue
            code = device_code.compiled(FUNCTIONS[backend].format(name), seen)
            del executable  # its code must be in memory until here
            if code is not None:
                row |= {"registers": code.registers, "stack_bytes": code.stack_bytes}
                row["instructions"] = {mma: n for mma in MMAS if (n := code.count(mma))}
    return rows


def table(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints a line for each kernel."""
    view = Table(title=f"Compiled for {result['target']}; nothing was run", title_justify="left")
    for heading in ("model", "kernel", "problem", "registers", "spilled", "tensor core", "error"):
        view.add_column(heading)
    for row in result["rows"]:
        spilled = row.get("stack_bytes")
        view.add_row(
            row["model"],
            row["kernel"],
            row["problem"],
            str(row.get("registers", "-")),
            "-" if spilled is None else f"{spilled} bytes",
            ", ".join(f"{name} x {n}" for name, n in row.get("instructions", {}).items()),
            row.get("error", ""),
        )
    (console or Console(width=140)).print(view)


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_for",
        description="Compiles kernels for a GPU that need not be here.",
    )
    parser.add_argument("target", choices=TARGETS, help="the GPU")
    parser.add_argument("--backend", choices=FUNCTIONS, default="triton", help="whose kernels")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="result file, .json")
    options = parser.parse_args(arguments)
    if device_code.cuobjdump() is None:
        parser.error("cuobjdump is missing: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    target = TARGETS[options.target]
    if reason := refusal(options.backend, target.capability):
        parser.error(reason)
    try:
        rows = run(target, options.backend)
    except RuntimeError as error:
        parser.error(f'{str(error).splitlines()[0]}: pip install "jax[cuda13]"')
    result = {
        "benchmark": "compile_for",
        "target": target.kind,
        "capability": target.capability,
        "backend": options.backend,
        "versions": versions(),
        "rows": rows,
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    table(result)
    failed = [row for row in rows if "error" in row]
    if failed:
        sys.exit(f"{len(failed)} of {len(rows)} do not compile for {target.kind}")


if __name__ == "__main__":
    main()
