"""Runs straight-line PTX in numpy: each register is an array of 32-bit words, one a thread."""

import re
from collections.abc import Callable

import ml_dtypes
import numpy as np


def floats(bits: np.ndarray) -> np.ndarray:
    return np.asarray(bits, np.uint32).view(np.float32)


def words(values: np.ndarray) -> np.ndarray:
    return np.asarray(values, np.float32).view(np.uint32)


def prmt(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(a)
    for i in range(4):
        index = selector >> np.uint32(4 * i) & np.uint32(7)
        byte = both >> (np.uint64(8) * index.astype(np.uint64)) & np.uint64(255)
        out |= byte.astype(np.uint32) << np.uint32(8 * i)
    return out


def pack(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    low, high = (
        v.astype(ml_dtypes.bfloat16).view(np.uint16).astype(np.uint32) for v in (low, high)
    )
    return low | high << np.uint32(16)


def clamp(x: np.ndarray) -> np.ndarray:
    return np.where(x <= 0, np.float32(0), x)


def narrow(high: np.ndarray, low: np.ndarray, dtype: type) -> np.ndarray:
    """Two float32 to 8 bits, saturating, as one 16-bit word."""
    largest = np.float32(ml_dtypes.finfo(dtype).max)

    def one(bits: np.ndarray) -> np.ndarray:
        x = floats(bits)
        x = np.where(np.isnan(x), x, np.clip(x, -largest, largest))
        return x.astype(dtype).view(np.uint8).astype(np.uint32)

    return one(low) | one(high) << np.uint32(8)


def shuffle(a: np.ndarray, mask: np.ndarray, clamp: np.ndarray, members: np.ndarray) -> np.ndarray:
    assert (clamp == 31).all()
    assert (members == 0xFFFFFFFF).all()
    return a[np.arange(a.size) ^ mask]


OPERATIONS: dict[str, Callable[..., np.ndarray]] = {
    "setp.gt.u32": lambda a, b: a > b,
    "setp.gt.f32": lambda a, b: floats(a) > floats(b),
    "setp.ge.f32": lambda a, b: floats(a) >= floats(b),
    "setp.ne.b32": lambda a, b: a != b,
    "selp.b32": lambda a, b, p: np.where(p, a, b),
    "max.NaN.f32": lambda a, b: words(np.maximum(floats(a), floats(b))),
    "min.NaN.f32": lambda a, b: words(np.minimum(floats(a), floats(b))),
    "abs.f32": lambda a: a & np.uint32(0x7FFFFFFF),
    "mul.f32": lambda a, b: words(floats(a) * floats(b)),
    "add.f32": lambda a, b: words(floats(a) + floats(b)),
    "sqrt.approx.ftz.f32": lambda a: words(np.sqrt(floats(a))),
    "cvt.rn.bf16x2.f32": lambda high, low: pack(floats(low), floats(high)),
    "cvt.rn.relu.bf16x2.f32": lambda high, low: pack(clamp(floats(low)), clamp(floats(high))),
    "cvt.rn.satfinite.e4m3x2.f32": lambda h, l: narrow(h, l, ml_dtypes.float8_e4m3fn),
    "cvt.rn.satfinite.e5m2x2.f32": lambda h, l: narrow(h, l, ml_dtypes.float8_e5m2),
    "cvt.u32.u16": lambda a: a & np.uint32(0xFFFF),
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "add.s32": lambda a, b: a + b,
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mad.lo.s32": lambda a, b, c: a * b + c,
    "prmt.b32": prmt,
    "shfl.sync.bfly.b32": shuffle,
}


def interpret(text: str, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Runs straight-line PTX on arrays of 32-bit words; every register must be written first."""
    size = next(iter(inputs.values())).size
    registers = {"%laneid": np.arange(size, dtype=np.uint32) % 32} | inputs

    def value(operand: str) -> np.ndarray:
        if re.fullmatch(r"-?(0x[0-9a-f]+|[0-9]+)", operand):
            return np.full(size, int(operand, 0) & 0xFFFFFFFF, np.uint32)
        return registers[operand]

    for line in re.sub(r"[{}]|\.reg [^;]*;", "", text).split(";"):
        if not line.strip():
            continue
        match = re.fullmatch(r"\s*(@\w+)?\s*(\S+) (.*)", line)
        assert match is not None, line
        guard, opcode, rest = match.groups()
        target, *operands = (o.strip() for o in rest.split(","))
        result = OPERATIONS[opcode](*map(value, operands))
        if guard:
            result = np.where(registers[guard[1:]], result, registers[target])
        registers[target] = result
    return registers
