"""What registers the warpgroups of a kernel have by setmaxnreg, and what their code uses."""

import pytest

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import toolchain
from sage_compiler.kernels.cuda.binary import Resources
from sage_compiler.kernels.cuda.check import check, problems, problems_of_roles
from sage_compiler.kernels.cuda.loops import parse
from sage_compiler.kernels.cuda.render import render
from sage_compiler.kernels.cuda.roles import Role, roles
from sage_compiler.kernels.cuda.sass import Disassembler, count
from sage_compiler.kernels.cuda.spec import QueryTile
from sage_compiler.kernels.cuda.variants import cache_variant, variant
from tests.compiler.kernels.cuda.toy import FakeCompiler

LAUNCHED = Resources(registers=168, spill_stores=0, spill_loads=0, stack=0, static_shared=0)
WGMMA = variant("sm_90a", "bfloat16", 64, "int8_fp8").attend

# Before the roles it may use what a launch gives; the producer's code is behind that of consumers.
LISTING = """\
        /*0000*/                   MOV R160, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8 ;
        /*0030*/              @!P0 BRA `(.L_x_1) ;
        /*0040*/                   {code} ;
        /*0050*/               @P1 BRA `(.L_x_3) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   USETMAXREG.DEALLOC.CTAPOOL 0x28 ;
        /*0080*/                   LDS R22, [R3+UR200] ;
        /*0090*/                   EXIT ;
.L_x_3:
        /*00a0*/                   STG.E.64 desc[UR46][R2.64], R30 ;
        /*00b0*/                   EXIT ;
"""


def listing(code: str = "NOP") -> str:
    return LISTING.replace("{code}", code)


@pytest.mark.parametrize(
    ("code", "used"),
    [
        ("FADD R5, R97, R6", 98),
        ("LDG.E.64 R90, desc[UR28][R100.64]", 101),
        ("FADD R5, RZ, UR97", 31),  # uniform registers are others
        ("IGMMA.64x64x32.S8.S8 R200, gdesc[UR12], RZ, !UPT", 232),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R100, R24, gdesc[UR12], R100, gsb0", 164),
        ("QGMMA.64x16x32.F32.E4M3.E4M3 R24, R228, gdesc[UR12], RZ, !UPT", 232),
    ],
)
def test_what_code_uses(code: str, used: int) -> None:
    taking, giving = roles(parse(listing(code)))
    assert taking == Role(takes=True, registers=232, used=used)
    assert giving == Role(takes=False, registers=40, used=23)


def test_what_fits_is_right() -> None:
    assert list(problems_of_roles(WGMMA, listing(), LAUNCHED)) == []
    other = variant("sm_89", "float16", 64, "int8_fp8").attend
    assert list(problems_of_roles(other, "", LAUNCHED)) == []


@pytest.mark.parametrize(
    ("old", "new", "found"),
    [
        ("NOP", "FADD R5, R232, R6", "code uses 233 registers where setmaxnreg leaves 232"),
        ("R22,", "R40,", "code uses 41 registers where setmaxnreg leaves 40"),
        ("0xe8", "0xf0", "asks for 520 registers in all; a launch gives 504"),
        ("0x28", "0x38", "asks for 520 registers in all; a launch gives 504"),
        ("DEALLOC.CTAPOOL", "TRY_ALLOC.CTAPOOL UP0,", "leaves warpgroups [] registers"),
        (
            "USETMAXREG.DEALLOC.CTAPOOL 0x28",
            "NOP",
            "leaves warpgroups [] registers and gives [232]",
        ),
        ("CTAPOOL 0x28", "CTAPOOL UR4", "DEALLOC.CTAPOOL UR4 names no number of registers"),
        ("`(.L_x_3)", "`(.L_x_4)", "names no place in this kernel"),
    ],
)
def test_what_does_not_fit_is_found(old: str, new: str, found: str) -> None:
    (problem,) = problems_of_roles(WGMMA, listing().replace(old, new), LAUNCHED)
    assert found in problem


FULL = cache_variant(
    "sm_90a",
    "bfloat16",
    256,
    "int8_fp8",
    window=True,
    masked=True,
    softcap=True,
    tile=QueryTile(packed_heads=True, split=True),
).attend


def test_a_kernel_that_has_everything() -> None:
    """What its consumers have is needed: with a step less there would be too little."""
    try:
        compiler, disassembler = toolchain.find("nvrtc"), Disassembler.find()
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    binary = compiler.compile(render(FULL), "sm_90a")
    code = disassembler.listing(binary.image)
    assert problems(FULL, count(code), binary.resources, binary.warnings) == ()
    assert list(problems_of_roles(FULL, code, binary.resources)) == []
    assert "CTAPOOL UP0, 0xe8" in code and "CTAPOOL 0x28" in code
    smaller = code.replace("CTAPOOL UP0, 0xe8", "CTAPOOL UP0, 0xe0")
    (problem,) = problems_of_roles(FULL, smaller, binary.resources)
    assert "where setmaxnreg leaves 224" in problem


def test_a_check_looks_at_roles(monkeypatch: pytest.MonkeyPatch) -> None:
    code = listing().replace("0xe8", "0xf0")
    monkeypatch.setattr(Disassembler, "listing", lambda self, image: code)
    (row,) = check([WGMMA], FakeCompiler(), Disassembler(()), jobs=1)
    assert any("asks for 520 registers" in problem for problem in row.problems)
