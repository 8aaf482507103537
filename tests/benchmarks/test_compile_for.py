"""Compiling for a GPU that is not here: what needs neither the GPU nor its compiler."""

import mmap
import os
import resource

import jax
import pytest

from benchmarks import compile_for, device_code
from kernels.registry import assume_capability

DUMP = """
Fatbin elf code:
Resource usage:
 Function __cuda_sm70_shflsync_bfly:
  REG:24 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:368
 Function up24:
  REG:249 STACK:16 SHARED:1024 LOCAL:0 CONSTANT[0]:400
        code for sm_80
                Function : __cuda_sm70_shflsync_bfly
        /*0000*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
                Function : up24
        /*0000*/  HMMA.SP.16832.F32.BF16 R4, R8, R12, R4, R2, 0x0 ;
        /*0010*/  HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/  HMMA.SP.16832.F32.BF16 R4, R8, R12, R4, R2, 0x1 ;
"""


def test_what_cuobjdump_says():
    code = device_code.parse(DUMP, "up24")
    assert (code.name, code.registers, code.stack_bytes) == ("up24", 249, 16)
    assert code.static_shared_bytes == 1024
    assert (code.count("HMMA.SP"), code.count("HMMA"), code.count("HGMMA")) == (2, 1, 0)
    # The assembler's helpers are none of it.
    assert code.sass.splitlines()[0] == "up24"
    assert device_code.parse(DUMP, "up24_linear") is None
    assert device_code.parse("cuobjdump fatal: no device code", "up24") is None


def binary_and_header():
    """A header of a device binary without sections, then what a name may be in."""
    header = bytearray(64)
    header[:5] = b"\x7fELF\x02"
    header[18:20] = (190).to_bytes(2, "little")
    header[40:48] = (96).to_bytes(8, "little")  # where sections would begin
    return bytes(header) + b".text.up24".ljust(32, b"\0"), header


@pytest.mark.skipif(not os.path.exists("/proc/self/pagemap"), reason="reads Linux's page tables")
def test_memory_that_is_only_reserved_is_not_read():
    size = 1 << 36
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
    try:
        reserved = mmap.mmap(-1, size, flags=flags)
    except OSError as error:
        pytest.skip(f"64 GiB cannot be reserved: {error}")
    with reserved:
        binary, _ = binary_and_header()
        reserved[size // 2 : size // 2 + len(binary)] = binary
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # Its page, and nothing of what was never touched.
        assert binary in list(device_code.machine_code(b"up24"))
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 8 << 20


def test_device_binaries_are_found_among_other_bytes():
    binary, header = binary_and_header()
    header[18] = 62  # a program of the host
    content = b"\x7fELF" + binary + bytes(header) + b".text.up24" + binary + b"\x7fELF\x02"
    assert list(device_code.binaries(content, b"up24")) == [binary, binary]
    assert list(device_code.binaries(content, b"down24")) == []


@pytest.mark.parametrize(
    ("name", "backend"), [("A100", "triton"), ("L40", "triton"), ("H100", "hopper")]
)
def test_every_problem_traces(name, backend):
    target = compile_for.TARGETS[name]
    with assume_capability(target.capability):
        for _, _, function, shapes in compile_for.problems(2048, 8192, backend):
            jax.eval_shape(function, *shapes)
    assert f'name: "{target.kind}"' in target.text()


def test_refusals_are_one_line(capsys, monkeypatch, tmp_path):
    def main(*arguments):
        with pytest.raises(SystemExit) as raised:
            compile_for.main([*arguments, "--out", str(tmp_path / "out.json")])
        assert raised.value.code == 2
        return capsys.readouterr().err.splitlines()[-1]

    assert "invalid choice: 'V100'" in main("V100")
    monkeypatch.setattr(device_code, "cuobjdump", lambda: "/bin/cuobjdump")
    assert "backend='hopper' needs compute capability 9.0, not (8, 0)" in main(
        "A100", "--backend", "hopper"
    )
    monkeypatch.setattr(device_code, "cuobjdump", lambda: None)
    assert "cuobjdump is missing: pip install" in main("A100")
