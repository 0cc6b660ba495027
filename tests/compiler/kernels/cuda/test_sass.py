"""Counting the opcodes of machine code."""

from collections import Counter
from pathlib import Path

import pytest

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import headers, toolchain
from sage_compiler.kernels.cuda.sass import Disassembler, before, count, occurrences
from tests.compiler.kernels.cuda.toy import TOY, source

NVDISASM = """\
\t.headerflags\t@"EF_CUDA_TEXMODE_UNIFIED EF_CUDA_64BIT_ADDRESS EF_CUDA_SM89"
sage_toy:
.text.sage_toy:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
.L_x_1:
        /*0010*/               @P0 EXIT ;
        /*1ab0*/                   IMMA.16832.S8.S8 R80, R116.ROW, R40.COL, R76 ;
        /*1ac0*/                   IMMA.16832.S8.S8 R84, R116.reuse.ROW, R30.COL, R76 ;
        /*6360*/              @!P1 CALL.REL.NOINC `(.L_x_9) ;
        /*6370*/              @UP0 UIADD3 UR4, UR4, 0x1, URZ ;
        /*16360*/             @!UPT UMOV UR5, URZ ;
        /*16370*/                  NOP;
"""
CUOBJDUMP = """\
\t\tFunction : sage_toy
        /*0000*/                   MOV R1, c[0x0][0x28] ;        /* 0x00000a0000017a02 */
                                                                 /* 0x000fe20000000f00 */
        /*0010*/              @!P0 BPT.TRAP 0x1 ;                /* 0x000000010000795c */
        /*0020*/                   BRA 0x20;                     /* 0xfffffff000007947 */
        /*0030*/                   NOP;                          /* 0x0000000000007918 */
"""


def test_opcodes_are_counted_in_both_formats() -> None:
    assert count(NVDISASM) == Counter(
        {
            "IMAD.MOV.U32": 1,
            "EXIT": 1,
            "IMMA.16832.S8.S8": 2,
            "CALL.REL.NOINC": 1,
            "UIADD3": 1,
            "UMOV": 1,
        }
    )
    assert count(CUOBJDUMP) == Counter({"MOV": 1, "BPT.TRAP": 1, "BRA": 1})


def test_what_comes_before_an_opcode() -> None:
    assert before(NVDISASM, "IMMA.16832.S8") == Counter({"IMAD.MOV.U32": 1, "EXIT": 1})
    assert before(NVDISASM, "IMMA.168") == count(NVDISASM)
    assert before(CUOBJDUMP, "MOV") == Counter()


def test_an_opcode_is_asked_for_with_whatever_modifiers() -> None:
    opcodes = Counter({"HMMA.16816.F32": 2, "HMMA.16816.F32.BF16": 3, "HMMA.1688.F32": 5})
    assert occurrences(opcodes, "HMMA") == 10
    assert occurrences(opcodes, "HMMA.16816.F32") == 5
    assert occurrences(opcodes, "HMMA.16816.F") == 0
    assert occurrences(opcodes, "HMM") == 0


def test_no_disassembler_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(headers, "tool", lambda name: None)
    with pytest.raises(KernelUnavailableError, match="pip install nvidia-cuda-nvdisasm"):
        Disassembler.find()


@pytest.mark.parametrize("name", ["nvdisasm", "cuobjdump"])
def test_a_real_kernel_is_disassembled(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = headers.tool(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    monkeypatch.setattr(headers, "tool", lambda wanted: path if wanted == name else None)
    disassembler = Disassembler.find()
    with pytest.raises(KernelUnavailableError, match=f"{name} finds no code"):
        disassembler.listing(b"no cubin")
    try:
        compiler = toolchain.find()
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    opcodes = count(disassembler.listing(compiler.compile(source(TOY), TOY.arch).image))
    assert occurrences(opcodes, "STG") == 1
    assert occurrences(opcodes, "EXIT") >= 1
    assert "NOP" not in opcodes


def test_the_tool_of_a_toolkit_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "nvdisasm"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert Disassembler.find().command[0] == str(program)
