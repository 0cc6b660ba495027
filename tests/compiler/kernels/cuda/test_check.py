"""What the machine code of a kernel must and must not have."""

from collections import Counter
from dataclasses import replace

import pytest

from sage_compiler.errors import KernelUnavailableError
from sage_compiler.kernels.cuda import ptx, toolchain
from sage_compiler.kernels.cuda.arch import ARCHS, PORTABLE
from sage_compiler.kernels.cuda.binary import Binary, Resources
from sage_compiler.kernels.cuda.check import (
    Row,
    check,
    is_default,
    problems,
    problems_of_order,
    problems_of_ptx,
    required,
    spill_budget,
    table,
)
from sage_compiler.kernels.cuda.sass import Disassembler
from sage_compiler.kernels.cuda.spec import (
    HEAD_DIMS,
    AttendSpec,
    HopperAttendSpec,
    KernelSpec,
    KeySpec,
    QuerySpec,
    QueryTile,
    StatisticsSpec,
    ValueSpec,
)
from sage_compiler.kernels.cuda.variants import (
    all_specs,
    cache_variant,
    checked_specs,
    variant,
    wgmma_specs,
)
from sage_compiler.precision import Accumulator, Format
from tests.compiler.kernels.cuda.toy import TOY, FakeCompiler, listed

LEAN = Resources(registers=200, spill_stores=0, spill_loads=0, stack=0, static_shared=0)
S8_E4M3 = variant("sm_89", "float16", 128, "int8_fp8").attend
S4_E4M3 = replace(S8_E4M3, qk=Format.INT4)
S8_HALF = replace(S8_E4M3, arch="sm_80", pv=Format.FP16)
PLUS_PLUS = replace(S8_E4M3, accumulator=Accumulator.FP16)
QUANTIZE = variant("sm_89", "float16", 128, "int8_fp8").specs()[0]
STATISTICS = StatisticsSpec("sm_89", "float16", 64, 64)

WGMMA = variant("sm_90a", "float16", 128, "int8_fp8").attend
SPLIT = QueryTile(split=True)
MERGE = variant("sm_90a", "float16", 128, "int8_fp8", tile=SPLIT).merge

COPIES = Counter({"LDGSTS.E.BYPASS.128": 8, "LDSM.16.M88.4": 8})
CODE: list[tuple[KernelSpec, Counter[str]]] = [
    (S8_E4M3, COPIES + Counter({"IMMA.16832.S8.S8": 32, "QMMA.16832.F32.E4M3.E4M3": 32})),
    (S4_E4M3, COPIES + Counter({"IMMA.16864.S4.S4": 32, "QMMA.16832.F32.E4M3.E4M3": 32})),
    (PLUS_PLUS, COPIES + Counter({"IMMA.16832.S8.S8": 32, "QMMA.16832.F16.E4M3.E4M3": 32})),
    (S8_HALF, COPIES + Counter({"IMMA.16832.S8.S8": 32, "HMMA.16816.F32": 32})),
    (
        WGMMA,
        Counter(
            {
                "IGMMA.64x128x32.S8.S8": 8,
                "QGMMA.64x128x32.F32.E4M3.E4M3": 8,
                "UBLKCP.S.G": 7,
                "USETMAXREG.TRY_ALLOC.CTAPOOL": 2,
                "ACQBULK": 2,
            }
        ),
    ),
    (QUANTIZE, Counter({"STG.E.EF.128": 2})),
    (STATISTICS, Counter({"LDG.E.128": 3})),
]
IDS = [spec.symbol for spec, _ in CODE]


@pytest.mark.parametrize(("spec", "opcodes"), CODE, ids=IDS)
def test_the_right_code_is_right(spec: KernelSpec, opcodes: Counter[str]) -> None:
    assert problems(spec, opcodes, LEAN) == ()


@pytest.mark.parametrize(("spec", "opcodes"), CODE, ids=IDS)
def test_every_opcode_is_required(spec: KernelSpec, opcodes: Counter[str]) -> None:
    for name in opcodes:
        rest = Counter({other: times for other, times in opcodes.items() if other != name})
        found = problems(spec, rest, LEAN)
        assert len(found) == (0 if spec is STATISTICS else 1)
        assert all("which it must have" in problem for problem in found)


RETURNS = Counter({"RET.REL.NODEC": 1})


@pytest.mark.parametrize("opcode", ["BPT.TRAP", "CALL.REL.NOINC", "CALL.ABS.NOINC"])
@pytest.mark.parametrize(("spec", "opcodes"), CODE, ids=IDS)
def test_traps_and_calls_are_forbidden(
    spec: KernelSpec, opcodes: Counter[str], opcode: str
) -> None:
    (problem,) = problems(spec, opcodes + RETURNS + Counter({opcode: 2}), LEAN)
    assert "2 times, which it must not have" in problem


def test_a_call_that_never_returns_is_a_jump() -> None:
    spec, opcodes = CODE[0]
    assert problems(spec, opcodes + Counter({"CALL.REL.NOINC": 1}), LEAN) == ()


def test_products_in_half_are_forbidden_where_e4m3_is_meant() -> None:
    spec, opcodes = CODE[0]
    emulated = opcodes + Counter({"HMMA.16816.F32": 64})
    assert problems(spec, emulated, LEAN) == ("HMMA 64 times, which it must not have",)
    del emulated["QMMA.16832.F32.E4M3.E4M3"]
    assert len(problems(spec, emulated, LEAN)) == 2


def test_products_of_warpgroups_may_neither_be_serialized_nor_spill() -> None:
    (opcodes,) = (code for spec, code in CODE if spec is WGMMA)
    serialized = "ptxas info    : (C7510) Potential Performance Loss: wgmma is serialized"
    assert problems(WGMMA, opcodes, LEAN, f"odd\n{serialized}") == (serialized,)
    spilled = problems(WGMMA, opcodes + Counter({"LDL.64": 2, "STL": 1}), LEAN)
    assert spilled == tuple(
        f"{name}, which it must not have" for name in ("LDL 2 times", "STL 1 times")
    )


def test_no_head_dim_may_spill_beside_products_of_warpgroups() -> None:
    (opcodes,) = (code for spec, code in CODE if spec is WGMMA)
    few = QueryTile(packed_heads=True)
    for head_dim in (128, 192, 256):
        spec = cache_variant(
            "sm_90a", "float16", head_dim, "int8_fp8", masked=True, softcap=True, tile=few
        ).attend
        assert problems(spec, opcodes, LEAN) == ()
        assert problems(spec, opcodes + Counter({"LDL.64": 2}), LEAN)
        assert problems(spec, opcodes, replace(LEAN, spill_stores=4))


def test_every_kind_by_wgmma_is_looked_at() -> None:
    """Those that have everything in every check, the others with ``--further``."""
    kinds = list(wgmma_specs("sm_90a", HEAD_DIMS))
    assert len(set(kinds)) == len(kinds) == 408
    packed, further = set(all_specs("sm_90a")), set(all_specs("sm_90a", further=True))
    assert set(kinds) <= packed | further
    always = {
        spec for spec in set(checked_specs("sm_90a")) - packed if isinstance(spec, HopperAttendSpec)
    }
    assert len(always) == 12 and always <= set(kinds)
    assert {spec.head_dim for spec in always} == {128, 192, 256}
    assert all(spec.window and spec.masked and spec.softcap for spec in always)
    assert not list(wgmma_specs("sm_89", HEAD_DIMS))


WAITING: list[tuple[KernelSpec | None, tuple[str, ...]]] = [
    (WGMMA, ("ACQBULK",)),
    (variant("sm_90a", "float16", 128, "int8_fp8").quantize, ("PREEXIT",)),
    (variant("sm_120a", "float16", 64, "int8_fp8").attend, ("ACQBULK",)),
    (variant("sm_120a", "float16", 64, "int8_fp8", tile=SPLIT).attend, ("ACQBULK", "PREEXIT")),
    (variant("sm_100a", "float16", 64, "int8_fp16", tile=SPLIT).merge, ("ACQBULK",)),
    (variant("sm_90a", "float16", 64, "int8_fp8", varlen=True).key, ("ACQBULK", "PREEXIT")),
    (cache_variant("sm_90a", "float16", 64, "int8_fp8").append, ("ACQBULK",)),
    (cache_variant("sm_90a", "float16", 64, "int8_fp8").key_mean, ("PREEXIT",)),
    (cache_variant("sm_90a", "float16", 64, "int8_fp8").query, ("PREEXIT",)),
]


@pytest.mark.parametrize(("spec", "expected"), WAITING)
def test_who_waits_and_lets_others_begin(spec: KernelSpec, expected: tuple[str, ...]) -> None:
    both = {"ACQBULK", "PREEXIT"}
    assert both & {*required(spec)} == {*expected}
    older = replace(spec, arch="sm_89")
    assert not both & {*required(older)}
    found = problems(older, Counter({"ACQBULK": 1, "PREEXIT": 2}), LEAN)
    unwanted = ("ACQBULK 1 times", "PREEXIT 2 times")
    assert {f"{each}, which it must not have" for each in unwanted} <= {*found}


@pytest.mark.parametrize(
    ("early", "right"),
    [
        ("LDG.E.CONSTANT", True),
        ("LDG.E.128.CONSTANT", True),
        ("LDS.128", True),
        ("LDC.64", True),
        ("LDG.E", False),
        ("STG.E.64", False),
        ("LDGSTS.E.BYPASS.128", False),
        ("ATOMG.E.ADD.STRONG.GPU", False),
        ("UBLKCP.S.G", False),
    ],
)
def test_nothing_is_done_before_waiting(early: str, right: bool) -> None:
    assert MERGE is not None
    late = listed("MOV", "ACQBULK", early, "EXIT")
    assert [*problems_of_order(MERGE, late)] == []
    found = [*problems_of_order(MERGE, listed("MOV", early, early, "ACQBULK", "EXIT"))]
    assert found == ([] if right else [f"{early} 2 times before ACQBULK"])
    assert [*problems_of_order(STATISTICS, late)] == []


def test_the_accumulator_is_looked_at() -> None:
    assert problems(S8_E4M3, CODE[2][1], LEAN) == ("no QMMA.16832.F32, which it must have",)
    assert problems(PLUS_PLUS, CODE[0][1], LEAN) == ("no QMMA.16832.F16, which it must have",)


def test_the_format_of_qk_is_looked_at() -> None:
    assert problems(S4_E4M3, CODE[0][1], LEAN) == ("no IMMA.16864.S4, which it must have",)


@pytest.mark.parametrize(
    ("spec", "spills", "fits"),
    [
        (S8_E4M3, 0, True),
        (S8_E4M3, 4, False),
        (S4_E4M3, 64, True),
        (S4_E4M3, 65, False),
        (PLUS_PLUS, 64, True),
        (replace(S8_E4M3, head_dim=256, stages=1), 512, True),
        (replace(S8_E4M3, head_dim=256, stages=1), 705, False),
    ],
)
def test_spills_have_a_budget(spec: AttendSpec, spills: int, fits: bool) -> None:
    (opcodes,) = (code for known, code in CODE if required(known) == required(spec))
    found = problems(spec, opcodes, replace(LEAN, spill_stores=spills))
    assert (found == ()) == fits, found
    assert spill_budget(spec) in (0, 64, 512)


def test_shared_memory_has_a_limit() -> None:
    free = ARCHS["sm_89"].shared_bytes - S8_E4M3.shared_bytes
    assert problems(S8_E4M3, CODE[0][1], replace(LEAN, static_shared=free)) == ()
    (problem,) = problems(S8_E4M3, CODE[0][1], replace(LEAN, static_shared=free + 1))
    assert "bytes of shared memory; sm_89 has" in problem


def test_what_the_default_recipe_uses_is_default() -> None:
    assert is_default(S8_E4M3) and is_default(STATISTICS)
    assert is_default(S8_HALF)
    assert not is_default(S4_E4M3) and not is_default(PLUS_PLUS)
    assert not is_default(replace(S8_HALF, arch="sm_89"))
    assert is_default(QuerySpec("sm_89", "float16", 64, Format.INT8))
    assert not is_default(KeySpec("sm_89", "float16", 64, Format.INT4))
    assert is_default(ValueSpec("sm_89", "float16", 64, Format.FP8))
    assert not is_default(ValueSpec("sm_89", "float16", 64, Format.FP16))
    assert not is_default(ValueSpec("sm_89", "float16", 64, Format.FP8, Accumulator.FP16))
    with pytest.raises(TypeError, match="ToySpec"):
        is_default(TOY)


def test_rows_are_of_all_that_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = {spec.symbol: opcodes for spec, opcodes in CODE}

    class Compiler(FakeCompiler):
        def compile(self, source: str, arch: str) -> Binary:
            binary = super().compile(source, arch)
            return replace(binary, resources=replace(LEAN, spill_stores=8), warnings="odd")

    def listing(self: Disassembler, image: bytes) -> str:
        (symbol,) = (symbol for symbol in codes if f"({symbol}," in image.decode())
        return listed(*codes[symbol].elements())

    monkeypatch.setattr(Disassembler, "listing", listing)
    specs = [S8_HALF, S4_E4M3, STATISTICS]
    rows = list(check(specs, Compiler(broken=STATISTICS.symbol), Disassembler(()), jobs=1))
    assert [bool(row.problems) for row in rows] == [True, False, True]
    assert rows[1].opcodes == {"IMMA.16864.S4": 32, "QMMA.16832": 32, "LDGSTS": 8, "LDSM": 8}
    assert rows[2].resources is None and "it is broken" in rows[2].problems[0]

    lines = table(rows).splitlines()
    assert lines[0].split() == [
        "arch",
        "variant",
        "registers",
        "spills",
        "shared",
        "opcodes",
        "verdict",
    ]
    assert lines[1].startswith("sm_80") and lines[1].endswith("FAILED") and " 8/0 " in lines[1]
    assert lines[2].endswith("ok") and "IMMA.16864.S4:32 QMMA.16832:32" in lines[2]
    assert lines[3].endswith("FAILED")
    assert f"{S8_HALF.symbol}: 8 bytes of spills or stack; at most 0" in lines
    assert f"{S4_E4M3.symbol}: odd" in lines

    data = rows[0].to_dict()
    assert (data["registers"], data["spill_stores"], data["arch"]) == (200, 8, "sm_80")
    assert rows[2].to_dict()["registers"] is None


# --- PTX

PTX = """\
.version 9.0
.target sm_80
.address_size 64
.extern .shared .align 128 .b8 shared[];
.visible .entry sage_attend(.param .align 8 .b8 sage_attend_param_0[216])
.maxntid 128
{
\t.reg .pred %p<2>;
\tld.param.u64 %rd1, [sage_attend_param_0+8];
\t// begin inline asm
\tcp.async.cg.shared.global.L2::128B [%r1], [%rd1], 16, %r2;

\t// end inline asm
$L__BB0_2:
\tldmatrix.sync.aligned.x4.m8n8.shared.b16 {%r3, %r4, %r5, %r6}, [%r1];
\tmma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r3}, {%r4}, {%r5}, {%r6};
\t@%p1 bra $L__BB0_2;
\tmma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%f3}, {%r4}, {%r5}, {%f6};
\t{ setp.ne.b32 p, %r1, 0; @p st.global.u32 [%rd1], %r3; }
\tret;
}
"""
OF_PTX = variant(PORTABLE.name, "float16", 128, "int8_fp16").attend


def problems_in(text: str) -> list[str]:
    return [*problems(OF_PTX, ptx.count(text), LEAN), *problems_of_ptx(OF_PTX, text)]


def test_ptx_is_counted() -> None:
    assert ptx.count(PTX) == {
        "ld.param.u64": 1,
        "cp.async.cg.shared.global.L2::128B": 1,
        "ldmatrix.sync.aligned.x4.m8n8.shared.b16": 1,
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32": 1,
        "bra": 1,
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32": 1,
        "setp.ne.b32": 1,
        "st.global.u32": 1,
        "ret": 1,
    }
    assert ptx.target(PTX) == "sm_80" and ptx.target("") == ""
    assert ptx.local_bytes(PTX) == 0


def test_ptx_as_it_must_be_has_no_problem() -> None:
    assert problems_in(PTX) == []
    for name in ptx.count(PTX):
        found = problems_in(PTX.replace(name, "mov.u32"))
        told = name.startswith(("cp", "ldm", "mma"))
        assert len(found) == told and all("which it must have" in each for each in found), name


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("ret;", "trap;", "trap 1 times, which it must not have"),
        ("ret;", "@%p1 trap; ret;", "trap 1 times, which it must not have"),
        ("ret;", "{ call.uni (r), vprintf, (a, b);\n}", "call 1 times, which it must not have"),
        (".target sm_80", ".target sm_90a", "it is for sm_90a, and must be for sm_80"),
        (".target sm_80", "", "it is for no target, and must be for sm_80"),
        (
            "\t.reg .pred",
            "\t.local .align 16 .b8 __local_depot0[48];\n\t.reg .pred",
            "48 bytes of variables in local memory; at most 0",
        ),
    ],
)
def test_what_is_wrong_with_ptx_is_said(old: str, new: str, said: str) -> None:
    assert problems_in(PTX.replace(old, new)) == [said]


def test_ptx_of_a_real_kernel() -> None:
    """Of a pack; in machine code it is the kernel of sm_80 that is looked at there."""
    try:
        compiler = toolchain.find("nvrtc")
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    packed = all_specs(PORTABLE.name)
    assert OF_PTX in packed
    assert {replace(spec, arch="sm_80") for spec in packed} <= set(all_specs("sm_80"))
    (row,) = check([OF_PTX], compiler, Disassembler(()), jobs=1)
    assert row.problems == () and row.opcodes["mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"]


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*ARCHS, PORTABLE.name])
def test_what_a_pack_has_is_as_it_must_be_and_spills_nothing(arch: str) -> None:
    found = list(check(all_specs(arch), toolchain.find("nvrtc"), Disassembler.find(), jobs=2))
    assert [row.symbol for row in found if row.problems] == []
    for row in found:
        assert row.resources is not None
        assert (row.resources.spill_stores, row.resources.spill_loads) == (0, 0), row.symbol


def test_code_that_cannot_be_read_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    def listing(self: Disassembler, image: bytes) -> str:
        raise KernelUnavailableError("nvdisasm finds no code")

    monkeypatch.setattr(Disassembler, "listing", listing)
    (row,) = check([S8_HALF], FakeCompiler(), Disassembler(()), jobs=1)
    assert isinstance(row, Row) and row.problems == ("nvdisasm finds no code",)
