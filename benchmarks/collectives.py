"""Bytes that a training step moves between devices, read from the partitioned program.

    python -m benchmarks.collectives --config llama7b --devices 64 --fsdp 64 --out FILE.json

Compiles the dense and the sparse step of one micro-batch for simulated CPU devices, takes the
program as XLA's partitioner leaves it (the same code for every backend), finds every collective
and how often its loop runs, and adds up what each device sends, by kind and mesh axis. Beside it
stand the time that the step's products take at an assumed speed and the time that the bytes take at
assumed bandwidths. It is an analysis of a program, not a measurement: nothing is sent, and a GPU's
compiler may still combine, split or move collectives.

What is counted: a ring's traffic for each device. A gather or scatter of n bytes among g devices
sends n (g - 1) / g, an all-reduce twice that. An all-reduce whose result is only sliced is counted
as the reduce-scatter that XLA makes of it on a GPU. The sparse step is laid out for kernels
(`--packed`: 2:4 values and metadata beside bf16 rows; `--fp8`: beside columns, all in 8 bits) or
for jax.numpy (bf16 rows alone).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute")

_BYTES = {"pred": 1, "s8": 1, "u8": 1, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "s16": 2,
          "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8}  # fmt: skip
_SHAPE = re.compile(r"\b([a-z]+\w*)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s*(ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")
_CALLS = re.compile(r"(?:to_apply|calls|body|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)")

# Assumptions, all for one H100 of an 8-GPU node with a 400 Gbit/s network card for each GPU.
PEAK_FLOPS = 989e12
DENSE_MFU = 0.52
SPARSE_SPEEDUP = 1.33
"""Of a whole step; what this project aims at for llama7b, not a measurement."""
NODE = 8
NODE_BANDWIDTH = 350e9
"""Bytes/s that a GPU sends in a ring within a node."""
CARD_BANDWIDTH = 40e9
"""Bytes/s of one card. A ring among whole nodes uses all eight of them."""


@dataclass(frozen=True)
class Collective:
    """One collective of the program.

    Attributes:
      kind: one of KINDS.
      axes: the mesh axes it runs over, such as "fsdp" or "data+fsdp".
      group: devices that take part together.
      neighbours: how many of them are in one node of NODE devices.
      size: bytes of the whole operand of one group's member (gathered or before scattering).
      times: how often a step runs it.
      source: the operation it came from.
    """

    kind: str
    axes: str
    group: int
    neighbours: int
    size: int
    times: int
    source: str

    @property
    def sent(self) -> float:
        """Bytes that each device sends in a step, in a ring."""
        if self.kind == "collective-permute":
            return float(self.size * self.times)
        rounds = 2 if self.kind == "all-reduce" else 1
        return rounds * self.size * (self.group - 1) / self.group * self.times


def _size(text: str) -> int:
    total = 0
    for dtype, dimensions in _SHAPE.findall(text):
        if dtype in _BYTES:
            total += _BYTES[dtype] * math.prod(int(n) for n in dimensions.split(",") if n)
    return total


def replica_group(text: str) -> list[int]:
    """The first replica group of a collective, in any of the ways in which HLO writes it:
    `{{0,1},{2,3}}`, `[2,2]<=[4]T(..)`, or `mesh['a'=2,'b'=2] {'b'}`.

    Raises:
      ValueError: the text has none.
    """
    import numpy as np

    def iota(shape: str, order: str | None) -> np.ndarray:
        sizes = [int(n) for n in shape.split(",")]
        ids = np.arange(math.prod(sizes)).reshape(sizes)
        return (ids.transpose([int(n) for n in order.split(",")]) if order else ids).reshape(-1)

    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return [int(n) for n in match[1].split(",")]
    pattern = r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if match := re.search(pattern, text):
        size = int(match[1].split(",")[-1])
        return [int(n) for n in iota(match[2], match[3])[:size]]
    pattern = (
        r"replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? "
        r"\{([^}]*)\}"
    )
    if match := re.search(pattern, text):
        sizes = {k: int(n) for k, n in re.findall(r"'([^']+)'=(\d+)", match[1])}
        shape = match[2] or ",".join(map(str, sizes.values()))
        ids = iota(shape, match[3]).reshape(list(sizes.values()))
        index: list[Any] = [0] * len(sizes)
        for name, _, parts, size_ in re.findall(r"'([^']+)'(:\((\d+)\)(\d+))?", match[4]):
            place = list(sizes).index(name)
            if not parts:
                index[place] = slice(None)
                continue
            # A part of an axis: the middle factor of (before, size, after).
            after = sizes[name] // (int(parts) * int(size_))
            index[place] = slice(0, int(size_) * after, after)
        return [int(n) for n in ids[tuple(index)].reshape(-1)]
    raise ValueError(f"no replica groups in {text!r}")


def _axes(group: list[int], mesh: dict[str, int]) -> str:
    """Names of the axes along which the devices of a group differ."""
    coordinates = []
    for device in group:
        place = {}
        for name in reversed(mesh):
            device, place[name] = divmod(device, mesh[name])
        coordinates.append(place)
    varying = [name for name in mesh if len({place[name] for place in coordinates}) > 1]
    return "+".join(varying) or "none"


def _computations(text: str) -> Iterator[tuple[str, list[str], bool]]:
    name: str | None = None
    lines: list[str] = []
    entry = False
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name, lines, entry = match[1], [], line.startswith("ENTRY")
        elif line.startswith("}") and name is not None:
            yield name, lines, entry
            name = None
        elif name is not None:
            lines.append(line)


def _trips(condition: list[str]) -> int:
    """How often a loop runs: what its condition compares the counter with."""
    constants = [int(n) for n in re.findall(r" constant\((\d+)\)", "\n".join(condition))]
    return constants[0] if len(constants) == 1 else 0


def _operands(arguments: str) -> list[str]:
    """Names of the operands; what stands behind them names computations."""
    return re.findall(r"%([\w.\-]+)", arguments.split("),")[0])


def _run_counts(bodies: dict[str, list[str]], entry: str) -> Counter[str]:
    """How often each computation runs in a step; 0 inside loops of unknown length."""
    times: Counter[str] = Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in bodies[name]:
            match = _INSTRUCTION.match(line)
            if match is None:
                continue
            inner = count
            if condition := re.search(r"condition=%?([\w.\-]+)", line):
                inner = count * _trips(bodies[condition[1]])
            for called in _CALLS.findall(line):
                for callee in called.replace("%", "").split(", "):
                    if callee in bodies:
                        visit(callee, inner)

    visit(entry, 1)
    return times


def _group_of(kind: str, line: str) -> list[int]:
    if kind != "collective-permute":
        return replica_group(line)
    pairs = re.findall(r"\{(\d+),(\d+)\}", line)
    return [int(n) for n in next((pair for pair in pairs if pair[0] != pair[1]), ("0", "0"))]


def collectives(text: str, mesh: dict[str, int]) -> list[Collective]:
    """All collectives of a partitioned program whose results are used.

    Args:
      text: HLO of the module.
      mesh: sizes of the axes, in the order of the devices.

    Raises:
      ValueError: a loop with collectives does not say how often it runs.
    """
    bodies, entry = {}, ""
    for name, lines, is_entry in _computations(text):
        bodies[name] = lines
        entry = name if is_entry else entry
    times = _run_counts(bodies, entry)
    found = []
    for name, lines in bodies.items():
        parsed = [match for line in lines if (match := _INSTRUCTION.match(line))]
        users: dict[str, set[str]] = defaultdict(set)
        for match in parsed:
            for operand in _operands(match[5]):
                users[operand].add(match[4])
        for match in parsed:
            kind, line = match[4].removesuffix("-start"), match[0]
            if kind not in KINDS or not (match[1] or users[match[2]]):
                continue
            group = _group_of(kind, line)
            if len(group) == 1 or group[0] == group[-1]:
                continue
            if not times[name]:
                raise ValueError(f"{kind} in {name}, which runs an unknown number of times")
            size = _size(match[3]) * (len(group) if kind == "reduce-scatter" else 1)
            if kind == "all-reduce" and not match[1] and users[match[2]] == {"dynamic-slice"}:
                kind = "reduce-scatter"
            source = re.search(r'op_name="([^"]*)"', line)
            found.append(
                Collective(
                    kind,
                    _axes(group, mesh),
                    len(group),
                    sum(device // NODE == group[0] // NODE for device in group),
                    size,
                    times[name],
                    source[1] if source else "",
                )
            )
    return found


def bandwidth(collective: Collective) -> float:
    """Bytes/s that a device of this group sends, as assumed."""
    if collective.group == collective.neighbours:
        return NODE_BANDWIDTH
    return min(CARD_BANDWIDTH * collective.neighbours, NODE_BANDWIDTH)


def partitioned(config: Any, phase: str, devices: int, *, packed: bool) -> tuple[str, dict]:
    """HLO of one micro-batch's step after partitioning, and the mesh's sizes.

    Needs `_simulate` before the first use of JAX, and changes settings of the process.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding

    from sparsejax.ops import routed_ffn_grouped
    from train.mesh import BATCH_SPEC, check_mesh, make_mesh
    from train.optimizer import make_optimizer
    from train.state import abstract_state, model_graph
    from train.step import make_train_step

    if packed:
        # Kernels that run on a CPU, in the place of a GPU's: the same packed layouts.
        routed_ffn_grouped.choose = lambda *_, **__: "reference"  # type: ignore[assignment]
        routed_ffn_grouped.recheck = lambda found, *_, **__: found  # type: ignore[assignment]
    # A program from the cache is not partitioned again, and leaves no text.
    jax.config.update("jax_enable_compilation_cache", False)
    mesh = make_mesh(config.mesh, config.batch_size)
    check_mesh(config, mesh)
    optimizer = make_optimizer(config)
    with jax.set_mesh(mesh):
        state = abstract_state(config, optimizer, mesh)
        placed = jax.tree.map(lambda leaf: leaf.sharding, state)
        ids = jax.ShapeDtypeStruct(
            (config.batch_size, config.sequence_length),
            jnp.int32,
            sharding=NamedSharding(mesh, BATCH_SPEC),
        )
        step = make_train_step(config, model_graph(config), optimizer, phase)  # type: ignore[arg-type]
        lowered = jax.jit(step, out_shardings=(placed, placed.step), donate_argnums=0).lower(
            state, {"inputs": ids, "targets": ids}
        )
        with tempfile.TemporaryDirectory() as folder:
            options: dict[str, str | bool] = {
                "xla_dump_to": folder,
                "xla_dump_hlo_pass_re": "spmd-partitioning",
                "xla_dump_hlo_as_text": True,
            }
            lowered.compile(compiler_options=options)
            [file] = Path(folder).glob("*after_spmd-partitioning*")
            return file.read_text(), dict(mesh.shape)


def one_micro_batch(base: Any, devices: int, rows: int, **mesh: int) -> Any:
    """A configuration whose step is one micro-batch of `rows` sequences on each batch device."""
    from train.config import MeshConfig, resolve

    model = dataclasses.replace(base.model, compute_dtype="bfloat16", attention="xla")
    batch = rows * devices // mesh.get("tensor", 1)
    return resolve(
        dataclasses.replace(
            base, batch_size=batch, micro_batches=1, mesh=MeshConfig(**mesh), model=model
        ),
        tokenizer_vocab_size=1,
    )


def analyse(config: Any, devices: int, *, packed: bool) -> dict[str, Any]:
    """Bytes and times of a micro-batch, dense and sparse."""
    from train import accounting

    flops = accounting.dense_flops(config).total
    dense_seconds = flops / devices / (PEAK_FLOPS * DENSE_MFU)
    seconds = {"dense": dense_seconds, "sparse": dense_seconds / SPARSE_SPEEDUP}
    result: dict[str, Any] = {}
    for phase in ("dense", "sparse"):
        text, mesh = partitioned(config, phase, devices, packed=packed and phase == "sparse")
        totals: dict[str, dict[str, float]] = {}
        for c in collectives(text, mesh):
            row = totals.setdefault(f"{c.kind} {c.axes}", {"bytes": 0.0, "seconds": 0.0, "runs": 0})
            row["bytes"] += c.sent
            row["seconds"] += c.sent / bandwidth(c)
            row["runs"] += c.times
        result[phase] = {
            "collectives": dict(sorted(totals.items(), key=lambda item: -item[1]["bytes"])),
            "bytes": sum(row["bytes"] for row in totals.values()),
            "communication_seconds": sum(row["seconds"] for row in totals.values()),
            "compute_seconds": seconds[phase],
        }
    return result


def _simulate(devices: int) -> None:
    flags = (
        f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"
    os.environ["JAX_PLATFORMS"] = "cpu"


def _print(name: str, result: dict[str, Any]) -> None:
    print(name)
    for phase, found in result.items():
        busy, wait = found["compute_seconds"], found["communication_seconds"]
        print(
            f"  {phase}: a device sends {found['bytes'] / 1e9:.2f} GB, {wait * 1e3:.0f} ms at the "
            f"assumed bandwidths, beside {busy * 1e3:.0f} ms of products: {wait / busy:.0%}"
        )
        for kind, row in found["collectives"].items():
            if row["bytes"] >= 1e6:
                print(
                    f"    {kind:28s} {row['bytes'] / 1e9:8.3f} GB {row['seconds'] * 1e3:7.1f} ms "
                    f"{row['runs']:6.0f} runs"
                )


def main(argv: list[str] | None = None) -> int:
    """The command line; 2 for arguments that do not fit each other."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0] if __doc__ else None,
        epilog="Other options are the trainer's (--sparsity.m 16).",
    )
    parser.add_argument("--config", default="llama7b", help="name in configs/")
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--fsdp", type=int, default=64)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--rows", type=int, default=4, help="sequences of a device's micro-batch")
    parser.add_argument("--packed", action="store_true", help="lay weights out for kernels")
    parser.add_argument("--fp8", action="store_true", help="the FFN's products in 8 bits")
    parser.add_argument("--out", type=Path)
    arguments, rest = parser.parse_known_args(argv)
    _simulate(arguments.devices)
    import train.main

    try:
        config = one_micro_batch(
            train.main.config_of(train.main.parse(["--config", arguments.config, *rest])),
            arguments.devices,
            arguments.rows,
            fsdp=arguments.fsdp,
            tensor=arguments.tensor,
        )
        if arguments.fp8:
            model = dataclasses.replace(config.model, ffn_precision="fp8")
            config = dataclasses.replace(config, model=model)
        with contextlib.redirect_stdout(sys.stderr):
            result = analyse(config, arguments.devices, packed=arguments.packed)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    mesh = f"fsdp {arguments.fsdp}, tensor {arguments.tensor}, {arguments.rows} sequences a device"
    _print(f"{arguments.config}, {arguments.devices} devices, {mesh}", result)
    if arguments.out:
        record = {key: value for key, value in vars(arguments).items() if key != "out"}
        record["trainer"] = rest
        assumed = {
            "peak_flops": PEAK_FLOPS,
            "dense_mfu": DENSE_MFU,
            "sparse_speedup": SPARSE_SPEEDUP,
            "node_bandwidth": NODE_BANDWIDTH,
            "card_bandwidth": CARD_BANDWIDTH,
        }
        text = json.dumps({"arguments": record, "assumed": assumed, **result}, indent=1)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
