"""The machine code of kernels that this process has compiled, and what it uses of a GPU."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import numpy as np

_CUDA = 190
"""Machine of a device binary in an ELF's header."""
_LARGEST = 1 << 24
"""Bytes that no binary of one kernel reaches."""
_NOBITS = 8
"""Type of a section that takes no room in the file."""
_USAGE = re.compile(r"Function (\w+):\s*\n\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclasses.dataclass(frozen=True)
class Code:
    """A kernel as the assembler left it.

    Attributes:
      name: of its function.
      registers: of a thread.
      stack_bytes: of a thread's memory, which is what registers were spilled to.
      static_shared_bytes: of a block, beside what a launch adds.
      sass: its instructions as text.
    """

    name: str
    registers: int
    stack_bytes: int
    static_shared_bytes: int
    sass: str

    def count(self, instruction: str) -> int:
        """Instructions in the text whose name begins with this one; dense ones are not sparse."""
        return len(re.findall(rf"\b{re.escape(instruction)}\b(?!\.SP)", self.sass))


def cuobjdump() -> pathlib.Path | None:
    """The CUDA toolkit's reader of device binaries, on the path or from a wheel; None without."""
    if found := shutil.which("cuobjdump"):
        return pathlib.Path(found)
    for folder in sys.path:
        for file in sorted(pathlib.Path(folder).glob("nvidia/cu*/bin/cuobjdump")):
            return file
    return None


def machine_code(kernel: bytes) -> Iterator[bytes]:
    """What look like device binaries of a kernel in this process's memory, some of them remains.

    A serialised executable compresses them, so memory is where they can be read.

    Args:
      kernel: a part of its function's name.
    """
    with open("/proc/self/maps") as maps, open("/proc/self/mem", "rb", buffering=0) as memory:
        for line in maps:
            place, mode, _, device, *_ = line.split()
            if not mode.startswith("rw") or device != "00:00":
                continue
            for low, high in _resident(*(int(number, 16) for number in place.split("-"))):
                try:
                    memory.seek(low)
                    content = memory.read(high - low)
                except (OSError, ValueError, OverflowError):
                    continue
                yield from binaries(content, kernel)


def _resident(low: int, high: int) -> Iterator[tuple[int, int]]:
    """The parts of a range of addresses that have memory: XLA reserves far more than there is."""
    page = os.sysconf("SC_PAGESIZE")
    try:
        with open("/proc/self/pagemap", "rb", buffering=0) as pages:
            pages.seek(low // page * 8)
            entries = np.frombuffer(pages.read((high - low) // page * 8), np.uint64)
    except (OSError, OverflowError):
        return
    present = np.concatenate([[0], entries >> np.uint64(62) > 0, [0]]).astype(np.int8)
    edges = np.flatnonzero(np.diff(present))
    for first, last in edges.reshape(-1, 2).tolist():
        yield low + first * page, low + last * page


def binaries(content: bytes, kernel: bytes) -> Iterator[bytes]:
    """The device binaries among these bytes that name a kernel; whole, if their headers are."""
    for match in re.finditer(rb"\x7fELF\x02", content):
        start = match.start()
        if len(content) - start <= 64 or struct.unpack_from("<H", content, start + 18)[0] != _CUDA:
            continue
        size = _elf_size(content, start)
        if size > min(_LARGEST, len(content) - start):  # what something has written over
            continue
        elf = content[start : start + size]
        if kernel in elf:
            yield elf


def disassemble(elf: bytes, kernel: str) -> Code | None:
    """A kernel as a device binary holds it, beside helpers of the assembler's; None if the binary
    has no such function or is no whole one.

    Raises:
      FileNotFoundError: there is no cuobjdump.
    """
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump of the CUDA toolkit is not on the path")
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "kernel.cubin"
        file.write_bytes(elf)
        path = f"{tool.parent}{os.pathsep}{os.environ.get('PATH', '')}"  # nvdisasm lies beside it
        dump = subprocess.run(
            [tool, "-res-usage", "-sass", file],
            capture_output=True,
            text=True,
            env={**os.environ, "PATH": path},
        )
    return parse(dump.stdout, kernel) if dump.returncode == 0 else None


def parse(text: str, kernel: str) -> Code | None:
    """`Code` from what `cuobjdump -res-usage -sass` prints; None if it does not name the kernel."""
    found = next((usage for usage in _USAGE.finditer(text) if usage[1] == kernel), None)
    if found is None:
        return None
    registers, stack, shared, _ = map(int, found.groups()[1:])
    _, *functions = re.split(r"^\s*Function : ", text, flags=re.MULTILINE)
    sass = next((f for f in functions if f.split(None, 1)[0] == kernel), "")
    return Code(kernel, registers, stack, shared, sass)


def compiled(kernel: str, seen: set[bytes] | None = None) -> Code | None:
    """The code of a kernel that this process has compiled; None if none is found.

    Args:
      kernel: its function's name.
      seen: binaries to leave out; those looked at are added, so that the next call finds what was
        compiled since.
    """
    seen = set() if seen is None else seen
    for elf in machine_code(kernel.encode()):
        if elf in seen:
            continue
        seen.add(elf)
        code = disassemble(elf, kernel)
        if code is not None:
            return code
    return None


def _elf_size(content: bytes, start: int) -> int:
    segments, sections = struct.unpack_from("<QQ", content, start + 32)
    counts = struct.unpack_from("<4H", content, start + 54)
    segment_size, segment_count, section_size, section_count = counts
    size = max(sections + section_size * section_count, segments + segment_size * segment_count)
    for i in range(section_count):
        header = start + sections + i * section_size
        if header + section_size > len(content):
            break
        kind = struct.unpack_from("<I", content, header + 4)[0]
        offset, length = struct.unpack_from("<QQ", content, header + 24)
        if kind != _NOBITS:
            size = max(size, offset + length)
    return size
