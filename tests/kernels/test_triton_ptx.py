"""Runs the PTX of the 2:4 main loop in numpy: every address, swizzle, barrier phase and fragment.

All threads of a program step together, which is one legal schedule: a wait that fails in it would
fail for ever. Accesses out of bounds are errors, and memory that nothing wrote holds NaN.
"""

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np
import pytest

from kernels.triton import mainloop
from tests.kernels.test_triton import sparse_operand

SHARED = 4096  # Address of shared memory; global arrays start at multiples of 1 << 32.


class Machine:
    def __init__(self, threads: int, arrays: list[np.ndarray], shared_bytes: int):
        self.threads = threads
        self.tid = np.arange(threads)
        self.memory = {i + 1: a.view(np.uint8).ravel() for i, a in enumerate(arrays)}
        self.shared = np.full(shared_bytes, 0xFF, np.uint8)
        self.barriers: dict[int, list[int]] = {}  # address: [expected, pending, phase]
        self.registers: dict[str, np.ndarray] = {
            "%tid.x": self.tid,
            "shared24": np.full(threads, SHARED),
            "%dynamic_smem_size": np.full(threads, shared_bytes),
        }

    def value(self, operand: str) -> np.ndarray:
        if re.fullmatch(r"-?\d+", operand):
            return np.full(self.threads, int(operand))
        return self.registers[operand]

    def address(self, operand: str) -> np.ndarray:
        base, _, offset = operand.strip("[]").partition(" + ")
        return self.value(base) + int(offset or 0)

    def read_global(self, address: np.ndarray, size: int) -> np.ndarray:
        """(threads, size) bytes."""
        out = np.empty((len(address), size), np.uint8)
        for array in np.unique(address >> 32):
            here = address >> 32 == array
            offset = address[here] & 0xFFFFFFFF
            memory = self.memory[int(array)]
            assert (offset % size == 0).all()
            assert (offset + size <= memory.size).all()
            out[here] = memory[offset[:, None] + np.arange(size)]
        return out

    def shared_index(self, address: np.ndarray) -> np.ndarray:
        offset = address - SHARED
        assert (offset % 16 == 0).all()
        assert (offset >= 1024).all(), "the barriers live there"
        assert (offset + 16 <= self.shared.size).all()
        return offset[:, None] + np.arange(16)

    def run(self, text: str) -> None:
        lines = [line for line in text.splitlines() if line not in "{}"]
        labels = {line[:-1]: i for i, line in enumerate(lines) if line.endswith(":")}
        at = 0
        while at < len(lines):
            line = lines[at]
            at += 1
            if line.endswith(":") or line.startswith("."):
                continue
            guard = np.ones(self.threads, bool)
            if line.startswith("@"):
                name, line = line[1:].split(" ", 1)
                guard = ~self.registers[name[1:]] if name[0] == "!" else self.registers[name]
            opcode, _, rest = line.rstrip(";").partition(" ")
            if opcode == "bra":
                assert guard.all() or not guard.any()
                # In step, a wait that fails once never ends.
                assert not (guard.any() and rest.startswith("WAIT")), "deadlock"
                at = labels[rest] if guard.any() else at
                continue
            operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", rest)
            self.step(opcode.split("."), operands, guard)

    def step(self, opcode: list[str], operands: list[str], guard: np.ndarray) -> None:
        simple: dict[str, Callable] = {
            "mov": lambda a: a,
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "div": np.floor_divide,
            "rem": np.remainder,
            "min": np.minimum,
            "and": np.bitwise_and,
            "xor": np.bitwise_xor,
            "shl": np.left_shift,
            "shr": np.right_shift,
            "mad": lambda a, b, c: a * b + c,
            "selp": lambda a, b, p: np.where(p, a, b),
        }
        name = opcode[0]
        if name in simple:
            if operands[-1].startswith("0f"):
                result = np.zeros(self.threads, np.float32)
            else:
                result = simple[name](*(self.value(x) for x in operands[1:]))
            old = self.registers.get(operands[0], np.zeros_like(result))
            self.registers[operands[0]] = np.where(guard, result, old)
        elif name == "setp":
            compare = {"eq": np.equal, "ne": np.not_equal, "gt": np.greater, "lt": np.less}
            a, b = (self.value(x) for x in operands[1:])
            self.registers[operands[0]] = compare[opcode[1]](a, b)
        elif name == "trap":
            assert not guard.any()
        elif name == "bar" or opcode[:3] == ["cp", "async", "wait_all"]:
            pass
        elif name == "ld":
            words = np.zeros(self.threads, np.int64)
            address = self.address(operands[1])
            words[guard] = self.read_global(address[guard], 4).view(np.uint32)[:, 0]
            self.registers[operands[0]] = words
        elif opcode[:3] == ["cp", "async", "cg"]:
            target, source = self.address(operands[0]), self.address(operands[1])
            index = self.shared_index(target[guard])
            assert len(np.unique(index)) == index.size, "two threads copy to one place"
            self.shared[index] = self.read_global(source[guard], 16)
        elif opcode[:3] == ["cp", "async", "mbarrier"]:
            self.arrive(self.address(operands[0])[guard])
        elif opcode[:2] == ["mbarrier", "init"]:
            [address] = self.address(operands[0])[guard]
            self.barriers[int(address)] = [int(operands[1]), int(operands[1]), 0]
        elif opcode[:2] == ["mbarrier", "arrive"]:
            self.arrive(self.address(operands[1])[guard])
        elif opcode[:2] == ["mbarrier", "test_wait"]:
            address, parity = self.address(operands[1]), self.value(operands[2])
            phases = np.array([self.barriers[int(a)][2] for a in address])
            self.registers[operands[0]] = (phases - 1) % 2 == parity
        elif name == "ldmatrix":
            self.ldmatrix(operands[0], self.address(operands[1]), "trans" in opcode)
        else:
            assert name == "mma", opcode
            (self.mma if opcode[1].startswith("sp") else self.dense_mma)(operands)

    def arrive(self, addresses: np.ndarray) -> None:
        for address in addresses:
            barrier = self.barriers[int(address)]
            barrier[1] -= 1
            if barrier[1] == 0:
                barrier[1] = barrier[0]
                barrier[2] += 1

    def ldmatrix(self, names: str, address: np.ndarray, transposed: bool) -> None:
        index = self.shared_index(address)
        # The eight rows of a matrix must lie in different banks.
        rows = address.reshape(-1, 4, 8) % 128
        assert all(len(np.unique(r)) == 8 for r in rows.reshape(-1, 8)), "bank conflict"
        matrices = self.shared[index].view(np.uint16).reshape(-1, 4, 8, 8)
        if transposed:
            matrices = matrices.swapaxes(2, 3)
        words = matrices.reshape(-1, 4, 32, 2).astype(np.int64)
        words = words[..., 0] | words[..., 1] << 16
        for i, name in enumerate(names.strip("{}").split(", ")):
            self.registers[name] = words[:, i].ravel()

    def fragment(self, names: str) -> np.ndarray:
        """(warps, q, t, register, 2) float32."""
        words = np.stack([self.registers[r] for r in names.strip("{}").split(", ")], axis=-1)
        halves = words.astype(np.uint32).view(ml_dtypes.bfloat16).astype(np.float32)
        return halves.reshape(-1, 8, 4, words.shape[-1], 2)

    def mma(self, operands: list[str]) -> None:
        acc, a, b, _, metadata, step = operands
        # Registers 0 to 3 of A: (row half, column half) = (0, 0), (1, 0), (0, 1), (1, 1).
        kept = self.fragment(a).reshape(-1, 8, 4, 2, 2, 2)
        kept = kept.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 8, 2)  # warp, row, group, 2
        words = self.registers[metadata].reshape(-1, 8, 4)[:, :, 2 * int(step, 16) :][:, :, :2]
        halves = np.stack([words & 0xFFFF, words >> 16], axis=1)  # warp, row half, q, k half
        nibbles = (halves[..., None] >> (4 * np.arange(4))) & 15
        nibbles = nibbles.reshape(-1, 16, 8)
        dense = np.zeros((*nibbles.shape, 4), np.float32)
        for i, position in enumerate((nibbles & 3, nibbles >> 2)):
            np.put_along_axis(dense, position[..., None], kept[..., i : i + 1], axis=-1)
        self.add_products(acc, dense.reshape(-1, 16, 32), b)

    def dense_mma(self, operands: list[str]) -> None:
        acc, a, b, _ = operands
        # (warp, q, t, column half, row half, 2) to (warp, row half, q, column half, t, 2).
        rows = self.fragment(a).reshape(-1, 8, 4, 2, 2, 2).transpose(0, 4, 1, 3, 2, 5)
        self.add_products(acc, rows.reshape(-1, 16, 16), b)

    def add_products(self, acc: str, rows: np.ndarray, b: str) -> None:
        """rows: (warps, 16, k)."""
        columns = self.fragment(b).transpose(0, 3, 2, 4, 1).reshape(-1, rows.shape[-1], 8)
        products = (rows @ columns).reshape(-1, 2, 8, 4, 2)
        out = products.transpose(0, 2, 3, 1, 4).reshape(self.threads, 4)
        for i, name in enumerate(acc.strip("{}").split(", ")):
            self.registers[name] = self.registers[name] + out[:, i]


def run_tile(tile, m: int, n: int, k: int, b_layout: str, arrays, starts, **options) -> np.ndarray:
    """The accumulators of one program, (block_m, block_n); starts: m0, n0 and perhaps B's row."""
    writer = mainloop._Writer(tile, m, n, k, b_layout, "bf16", **options)
    machine = Machine(tile.threads, list(arrays), 1024 + tile.ring_bytes)
    count = 4 * tile.frags_m * tile.frags_n
    for i, start in enumerate((1 << 32, 2 << 32, 3 << 32, *starts)):
        machine.registers[f"${count + i}"] = np.full(tile.threads, start)
    machine.run(writer.write())
    out = np.stack([machine.registers[f"${i}"] for i in range(count)])
    out = out.reshape(tile.frags_m, tile.frags_n, 2, 2, tile.warps_m, tile.warps_n, 8, 4)
    return out.transpose(4, 0, 2, 6, 5, 1, 7, 3).reshape(tile.block_m, tile.block_n)


@pytest.mark.parametrize("b_layout", ["nk", "kn"])
@pytest.mark.parametrize(
    "tile",
    [
        mainloop.Tile(4, 2, 4, 8, 64, 5),
        mainloop.Tile(2, 2, 4, 4, 64, 4),
        mainloop.Tile(2, 2, 2, 4, 32, 3),
        mainloop.Tile(1, 2, 8, 4, 32, 6),
        mainloop.Tile(4, 1, 2, 16, 64, 3),
    ],
    ids=str,
)
@pytest.mark.parametrize("k", [64, 576])
def test_the_program_of_the_last_tile(tile, b_layout, k):
    rng = np.random.default_rng(0)
    m, n = tile.block_m + 64, tile.block_n + 24  # The last tile hangs over both edges.
    values, metadata, dense = sparse_operand(rng, m, k)
    b = rng.standard_normal((n, k)).astype(ml_dtypes.bfloat16)
    stored = b if b_layout == "nk" else np.ascontiguousarray(b.T)
    starts = (tile.block_m, tile.block_n)
    out = run_tile(tile, m, n, k, b_layout, (values, metadata, stored), starts)
    expected = dense[tile.block_m :] @ b[tile.block_n :].astype(np.float32).T
    np.testing.assert_allclose(out[:64, :24], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("b_layout", ["nk", "kn"])
@pytest.mark.parametrize(
    "tile",
    [mainloop.Tile(4, 2, 4, 8, 64, 5), mainloop.Tile(2, 2, 4, 4, 32, 3)],
    ids=str,
)
@pytest.mark.parametrize("k", [64, 576])
def test_the_program_of_an_operand_that_is_not_packed(tile, b_layout, k):
    tile = tile.of_dense()
    rng = np.random.default_rng(0)
    m, n = tile.block_m + 64, tile.block_n + 24
    a, b = (rng.standard_normal((size, k)).astype(ml_dtypes.bfloat16) for size in (m, n))
    stored = b if b_layout == "nk" else np.ascontiguousarray(b.T)
    starts = (tile.block_m, tile.block_n)
    nothing = np.zeros(0, np.int32)
    out = run_tile(tile, m, n, k, b_layout, (a, nothing, stored), starts)
    a, b = (v.astype(np.float32) for v in (a, b))
    expected = a[tile.block_m :] @ b[tile.block_n :].T
    np.testing.assert_allclose(out[:64, :24], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("b_layout", ["nk", "kn"])
def test_a_tile_that_starts_anywhere(b_layout):
    """As the grouped products: tiles need not be aligned, and k may be a part of B's rows."""
    tile = mainloop.Tile(4, 2, 4, 8, 64, 5)
    rng = np.random.default_rng(0)
    m, n, k, m0, n0, row = 2 * tile.block_m, 2 * tile.block_n, 192, 320, 192, 128
    values, metadata, dense = sparse_operand(rng, m, k)
    b = rng.standard_normal((n, k)).astype(ml_dtypes.bfloat16)
    starts, stored = [m0, n0], b
    if b_layout == "kn":
        stored = np.full((row + k, n), np.nan, ml_dtypes.bfloat16)
        stored[row:] = b.T
        starts.append(row)
    options = {"aligned": False, "parts": int(b_layout == "kn")}
    out = run_tile(tile, m, n, k, b_layout, (values, metadata, stored), starts, **options)
    expected = dense[m0:] @ b[n0:].astype(np.float32).T
    rows, cols = expected.shape
    np.testing.assert_allclose(out[:rows, :cols], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("tile", "k"),
    [
        (mainloop.Tile(4, 2, 4, 8, 64, 5), 384),  # the first jumps before the loop
        (mainloop.Tile(2, 2, 4, 4, 64, 4), 768),
        (mainloop.Tile(2, 2, 2, 4, 32, 3), 192),
        (mainloop.Tile(1, 2, 8, 4, 32, 6), 384),
    ],
    ids=str,
)
@pytest.mark.parametrize("parts", [2, 3])
def test_parts_of_k_that_lie_apart(tile, k, parts):
    """As `down24` of several shards: each has rows of its own in B."""
    rng = np.random.default_rng(0)
    m, n, size = tile.block_m, tile.block_n, k // parts
    values, metadata, dense = sparse_operand(rng, m, k)
    b = rng.standard_normal((k, n)).astype(ml_dtypes.bfloat16)
    rows = [int(r) * size for r in rng.permutation(parts + 2)[:parts]]
    stored = np.full(((parts + 2) * size, n), np.nan, ml_dtypes.bfloat16)
    for i, row in enumerate(rows):
        stored[row : row + size] = b[i * size : (i + 1) * size]
    starts, options = [0, 0, *rows], {"aligned": False, "parts": parts}
    out = run_tile(tile, m, n, k, "kn", (values, metadata, stored), starts, **options)
    np.testing.assert_allclose(out, dense @ b.astype(np.float32), rtol=1e-4, atol=1e-4)


def test_parts_are_whole_stages():
    tile = mainloop.Tile(4, 2, 4, 8, 64, 5)
    with pytest.raises(ValueError, match="parts=2 of whole stages of 64"):
        mainloop._Writer(tile, 256, 256, 192, "kn", "bf16", parts=2)
