"""What a tile of keys costs, from machine code: of listings, and of a real kernel."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from sage_compiler import cli, rates
from sage_compiler.commands import kernels_compiling, kernels_cost
from sage_compiler.costs import Attend, Class, Cost, Turn, classify, costs, minimum, of_listing
from sage_compiler.errors import InvalidOptionError, KernelUnavailableError
from sage_compiler.kernels.cuda import toolchain
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.loops import CodeError, Instruction
from sage_compiler.kernels.cuda.sass import Disassembler
from sage_compiler.kernels.cuda.spec import HEAD_DIMS, AttendSpec, HopperAttendSpec
from sage_compiler.kernels.cuda.variants import packed_caches, variant, variants
from sage_compiler.precision import Accumulator, Format
from tests.compiler.kernels.cuda.test_loops import LISTING
from tests.packaging.layout import ROOT

DOCUMENT = ROOT / "docs" / "cuda-costs.md"


def attend(
    arch: str, recipe: str, head_dim: int, half: bool = False, masked: bool = False
) -> Attend:
    accumulator = Accumulator.FP16 if half else Accumulator.FP32
    return variant(arch, "bfloat16", head_dim, recipe, accumulator, masked=masked).attend


# Both products in the cheapest formats that there are, so that all else shows the most.
ADA = attend("sm_89", "int4_fp8", 128)
HOPPER = attend("sm_90a", "int8_fp8", 128)
MASKED = attend("sm_89", "int8_fp8", 128, masked=True)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("IMMA.16832.S8.S8 R80, R116.ROW, R40.COL, R76", Class.TENSOR),
        ("MUFU.EX2 R162, R162", Class.EXP2),
        ("MUFU.RCP R162, R162", Class.FLOAT),
        ("F2FP.SATFINITE.E4M3.F32.PACK_AB_MERGE_C R89, R168, R173, RZ", Class.CONVERSION),
        ("HADD2.F32 R4, -RZ, R5.H0_H0", Class.CONVERSION),
        ("HADD2 R4, R3, R5", Class.FLOAT),
        ("FFMA R101, R99.reuse, R101, R90", Class.FLOAT),
        ("FSETP.GT.AND P0, PT, R3, RZ, PT", Class.FLOAT),
        ("IMAD.MOV.U32 R76, RZ, RZ, R48", Class.MOVE),
        ("HFMA2.MMA R5, -RZ, RZ, 2, 0", Class.MOVE),
        ("HFMA2.MMA R5, R3, R4, R5", Class.FLOAT),
        ("IMAD R60, R45, 0x40, R44", Class.INTEGER),
        ("IMAD.SHL.U32 R44, R154, 0x20, RZ", Class.INTEGER),
        ("UIADD3 UR4, UR4, 0x1, URZ", Class.INTEGER),
        ("UMOV UR5, URZ", Class.MOVE),
        ("LDSM.16.M88.4 R92, [R104+UR5]", Class.MEMORY),
        ("ULDC.64 UR4, c[0x0][0x118]", Class.MEMORY),
        ("SHFL.BFLY PT, R2, R3, 0x1, 0x1f", Class.MEMORY),
        ("BSSY.RECONVERGENT B0, `(.L_x_5)", Class.CONTROL),
        ("QGMMA.64x128x32.F32.E4M3.E4M3 R88, R84, gdesc[UR4], !UPT", Class.TENSOR),
        ("SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R3+URZ], R2", Class.CONTROL),
        ("WARPGROUP.DEPBAR.LE gsb0, 0x1", Class.CONTROL),
        ("USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0", Class.CONTROL),
        ("UBLKCP.S.G [UR8], [UR4], UR10", Class.MEMORY),
    ],
)
def test_instructions_have_classes(text: str, kind: Class) -> None:
    opcode, _, operands = text.partition(" ")
    assert classify(Instruction(0, "", opcode, operands, None)) is kind
    assert classify(Instruction(0, "!UPT", opcode, operands, None)) is Class.CONTROL


def test_an_unknown_instruction_is_said() -> None:
    with pytest.raises(CodeError, match=r"WOBBLE\.X is of no class"):
        classify(Instruction(0, "", "WOBBLE.X", "", None))
    with pytest.raises(CodeError, match=f"{ADA.symbol}: WOBBLE is of no class"):
        of_listing(Turn(ADA), LISTING.replace("LDS RZ", "WOBBLE RZ").replace("@!PT", "    "), 0)


@pytest.mark.parametrize(
    ("spec", "tensor", "exp2", "conversion", "floats", "memory"),
    [
        # Two bands of 16 rows: 16 * 64 * 64 / (16 * 8 * 32) products, and as many of P V.
        (attend("sm_89", "int8_fp8", 64), 64, 68, 32, 320, 4 + 8 + 8 + 1 + 5 + 8),
        (attend("sm_89", "int8_fp16", 64), 96, 68, 32, 320, 4 + 8 + 16 + 1 + 7 + 8),
        (attend("sm_89", "int4_fp8", 128), 48, 34, 16, 224, 2 + 8 + 16 + 9 + 5 + 4),
        (attend("sm_89", "int4_fp8", 128, half=True), 48, 34, 80, 224, 2 + 8 + 16 + 9 + 5 + 4),
        (attend("sm_80", "int8_fp16", 128), 96, 34, 16, 192, 4 + 16 + 32 + 1 + 7 + 4),
        # Q in registers; V is not read beyond 192 of its 256 channels, and not copied.
        (attend("sm_89", "int8_fp8", 192), 96, 34, 16, 224, 24 + 24 + 1 + 8 + 4),
        # A score with a mask is scaled first, where nothing else does that.
        (attend("sm_89", "int8_fp8", 128, masked=True), 64, 34, 16, 224, 4 + 16 + 16 + 1 + 5 + 4),
        # 64 x 128 x 32 each; 64 scores of a thread, integers that become floats.
        (HOPPER, 8, 66, 64 + 32, 3 * 64 + 64, 2 + 4),
        (attend("sm_90a", "int8_fp8", 64), 6, 66, 64 + 32, 3 * 64 + 32, 2 + 4),
        (attend("sm_90a", "int8_fp8", 256), 10, 34, 32 + 16, 3 * 32 + 128, 1 + 4),
        (attend("sm_90a", "int8_fp8", 128, masked=True), 6, 34, 32 + 16, 4 * 32 + 64, 1 + 4),
    ],
    ids=lambda each: each.symbol if isinstance(each, AttendSpec | HopperAttendSpec) else "",
)
def test_the_least(
    spec: Attend, tensor: int, exp2: int, conversion: int, floats: int, memory: int
) -> None:
    found = minimum(spec)
    assert found[Class.TENSOR] == tensor
    assert found[Class.EXP2] == exp2
    assert found[Class.CONVERSION] == conversion
    assert found[Class.FLOAT] == floats
    assert found[Class.MEMORY] == memory
    assert not found[Class.INTEGER] + found[Class.MOVE] + found[Class.CONTROL]


def test_the_least_where_a_mask_is_read() -> None:
    """Of 32 scores of a thread half a load each, a conversion, a multiplication and a sum."""
    shown, read = minimum(MASKED), minimum(MASKED, reads_mask=True)
    more = {kind: read[kind] - shown[kind] for kind in Class if read[kind] != shown[kind]}
    assert more == {Class.MEMORY: 16, Class.CONVERSION: 32, Class.FLOAT: 64}


def test_clocks_are_those_of_the_ceilings() -> None:
    """The numbers by hand are those of docs/cuda-kernels.md, "Ceilings"."""
    plus_plus = attend("sm_89", "int8_fp8", 128, half=True)
    counts = dict.fromkeys(Class, 0) | {Class.TENSOR: 64, Class.EXP2: 32, Class.CONVERSION: 16}
    names = {"LDSM": 32, "IMMA": 32, "QMMA": 32, "LDS": 1, "FADD": 90, "FFMA": 100, "FMUL": 2}
    names |= {"FMNMX": 38, "FSEL": 9}

    def cost(spec: Attend, keys: int = 64, softmax: int | None = 300) -> Cost:
        return Cost(spec, counts, names, minimum(spec), keys, softmax, registers=0)

    found = cost(plus_plus).clocks
    assert found.tensor == pytest.approx(2048, rel=1e-3)
    assert found.issue == 8 * (64 + 32 + 16) / 4
    assert found.exp2 == 512
    assert found.floats == 8 * 32 * 192 / 128
    assert found.half_rate == 8 * 32 * (16 + 38) / 64
    assert found.shared == 8 * (32 * 4 + 1)
    assert found.softmax == 8 * 300 / 4
    assert found.bound == found.tensor and found.in_step == found.tensor + 600
    short = replace(found, softmax=200.0)
    assert short.in_step == found.tensor + 512  # of exp2
    full = cost(replace(plus_plus, accumulator=Accumulator.FP32))
    assert full.clocks.tensor == pytest.approx(3072, rel=1e-3)
    for arch, recipe, clocks in (("sm_89", "int4_fp8", 512 + 2048), ("sm_80", "int8_fp16", 1536)):
        assert cost(attend(arch, recipe, 128)).clocks.tensor == pytest.approx(clocks, rel=1e-3)
    # A turn of two tiles takes twice what a tile does; wgmma has the full rate.
    hopper = cost(HOPPER, keys=128, softmax=None).clocks
    assert hopper.tensor == pytest.approx(512, rel=1e-3)
    assert (hopper.issue, hopper.exp2, hopper.floats) == (112, 256, 192)
    assert hopper.shared is None and hopper.in_step is None and hopper.bound == hopper.tensor
    # INT4 takes whole steps of 64 channels.
    narrow = cost(attend("sm_80", "int4_fp16", 32)).clocks.tensor
    assert narrow == pytest.approx(128 * 64 * (64 / 4096 + 32 / 1024), rel=1e-3)


def test_rates_are_per_clock() -> None:
    ada = rates.per_clock("sm_89")
    assert ada.products[Format.INT8] == pytest.approx(1024, rel=1e-3)
    assert ada.products[Format.FP8] == pytest.approx(512, rel=1e-3)
    assert (ada.floats, ada.exp2) == (128, 16)
    assert rates.per_clock("sm_80").floats == 64
    assert rates.per_clock("sm_90").products[Format.FP16] == pytest.approx(0.62 * 2048, rel=1e-2)
    assert rates.per_clock("sm_90", wgmma=True).products[Format.INT8] == pytest.approx(
        4096, rel=1e-3
    )
    with pytest.raises(InvalidOptionError, match="its times are measured"):
        rates.per_clock("cpu")


@pytest.fixture(scope="module")
def real() -> tuple[Cost, str]:
    """The cost of a real kernel, and the compiler that made it."""
    try:
        compiler, disassembler = toolchain.find("nvrtc"), Disassembler.find()
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    (found,) = costs([Turn(ADA)], compiler, disassembler, jobs=1)
    return found, compiler.identity


@pytest.fixture(scope="module")
def by_wgmma() -> tuple[Cost, str]:
    """The same of a kernel of wgmma."""
    try:
        compiler, disassembler = toolchain.find("nvrtc"), Disassembler.find()
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    (found,) = costs([Turn(HOPPER)], compiler, disassembler, jobs=1)
    return found, compiler.identity


@pytest.fixture(scope="module")
def with_mask() -> list[tuple[Cost, str]]:
    """The same of a kernel with a mask: of a tile that is shown whole, and of one that is read."""
    try:
        compiler, disassembler = toolchain.find("nvrtc"), Disassembler.find()
    except KernelUnavailableError as error:
        pytest.skip(str(error))
    turns = kernels_cost.turns([MASKED])
    found = costs(turns, compiler, disassembler, jobs=1)
    return [(cost, compiler.identity) for cost in found]


@pytest.fixture
def mask_shown(with_mask: list[tuple[Cost, str]]) -> tuple[Cost, str]:
    return with_mask[0]


@pytest.fixture
def mask_read(with_mask: list[tuple[Cost, str]]) -> tuple[Cost, str]:
    return with_mask[1]


def test_a_tile_of_which_a_mask_is_read(
    mask_shown: tuple[Cost, str], mask_read: tuple[Cost, str]
) -> None:
    (shown, _), (read, _) = mask_shown, mask_read
    assert (shown.reads_mask, read.reads_mask) == (False, True)
    assert (shown.names["LDG"], read.names["LDG"]) == (1, 1 + 16)
    for kind in (Class.TENSOR, Class.EXP2, Class.CONVERSION):
        assert (shown.counts[kind], read.counts[kind]) == (shown.minimum[kind], read.minimum[kind])
    # What the mask shows of a tile is loaded besides; and nothing is divided in a turn.
    assert shown.counts[Class.MEMORY] == shown.minimum[Class.MEMORY] + 1
    assert read.names["HADD2"] == 32 and "I2F" not in shown.names
    # A score that its element hides, or not: of no more than a comparison each.
    assert read.counts[Class.FLOAT] - shown.counts[Class.FLOAT] == 32 * 3
    assert sum(read.counts.values()) < 1.5 * sum(shown.counts.values())


def test_the_loop_of_a_real_kernel_is_found(real: tuple[Cost, str]) -> None:
    found, _ = real
    # Of a turn of the loop, no more and no less: each product, exp2, operand and copy of a tile
    # once, one barrier, one jump back. What a tile at the diagonal masks is not among them.
    for kind in (Class.TENSOR, Class.EXP2, Class.CONVERSION, Class.MEMORY):
        assert found.counts[kind] == found.minimum[kind], kind
    expected = {
        "IMMA": 16, "QMMA": 32, "MUFU": 34, "F2FP": 16, "LDSM": 26, "LDS": 9, "LDGSTS": 5,
        "SHFL": 4, "BAR": 1, "LDGDEPBAR": 1, "DEPBAR": 1,
    }  # fmt: skip
    got = {name: found.names.get(name, 0) for name in expected}
    # ptxas puts dummies beside LDGSTS and commits.
    assert got.pop("LDS") >= expected.pop("LDS")
    assert got.pop("LDGDEPBAR") >= expected.pop("LDGDEPBAR")
    assert got == expected
    assert 0 < found.counts[Class.FLOAT] - found.minimum[Class.FLOAT] < 64
    # Half of the turn and more is between the products, the exp2 nearly all.
    assert found.minimum[Class.EXP2] < found.softmax < sum(found.counts.values()) / 2
    assert sum(found.counts.values()) == sum(found.names.values()) < 2 * sum(found.minimum.values())


def test_the_loop_of_a_kernel_of_wgmma_is_found(by_wgmma: tuple[Cost, str]) -> None:
    found, _ = by_wgmma
    assert found.keys % HOPPER.keys == 0
    for kind in (Class.TENSOR, Class.EXP2, Class.CONVERSION):
        assert found.counts[kind] == found.minimum[kind], kind
    steps = found.keys // HOPPER.keys
    expected = {"IGMMA": 4, "QGMMA": 4, "I2FP": 64, "F2FP": 32, "LDS": 2, "UBLKCP": 0, "LDL": 0}
    assert {name: found.names.get(name, 0) for name in expected} == {
        name: steps * times for name, times in expected.items()
    }
    assert 0 < found.counts[Class.FLOAT] - found.minimum[Class.FLOAT] < 64 * steps
    assert sum(found.counts.values()) < 1.5 * sum(found.minimum.values())


@pytest.mark.parametrize("kernel", ["real", "by_wgmma", "mask_shown", "mask_read"])
def test_the_document_has_what_the_tool_finds(kernel: str, request: pytest.FixtureRequest) -> None:
    found, compiler = request.getfixturevalue(kernel)
    text = DOCUMENT.read_text(encoding="utf-8")
    if f"Compiled by {compiler}." not in text:
        pytest.skip(f"{DOCUMENT.name} is of another compiler than {compiler}")
    for table in (kernels_cost.instructions, kernels_cost.clocks):
        row = table([found])[1]
        assert f"| {' | '.join(row)} |\n" in text, (
            f"{DOCUMENT.name} has other costs than the templates now have: `make costs` writes it"
        )


def test_a_turn_has_whole_steps() -> None:
    with pytest.raises(CodeError, match=r"has 1 products of Q K\^T; 16 are those of 64 keys"):
        of_listing(Turn(ADA), LISTING, registers=99)


def test_every_default_kernel_has_a_row() -> None:
    """What a pack has and what `auto` means, at every head_dim; the loop does not see the dtype."""
    for arch, offered in ARCHS.items():
        packed = [each.attend for each in (*variants(arch), *packed_caches(arch))]
        wanted = {replace(attend, dtype="bfloat16") for attend in packed}
        for head_dim, masked in itertools.product(HEAD_DIMS, (False, True)):
            wanted.add(attend(arch, offered.recipes[0], head_dim, masked=masked))
        found = kernels_cost.attend_specs(arch)
        assert wanted <= set(found) and len(set(found)) == len(found)


def test_the_document_has_every_kernel() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    begin, end = text.index("<!-- sagec"), text.index("<!-- end")
    rows = [line for line in text[begin:end].splitlines() if line.startswith("| sm_")]
    specs = [spec for arch in ARCHS for spec in kernels_cost.attend_specs(arch)]
    fakes = [
        Cost(turn.spec, dict.fromkeys(Class, 1), {}, {}, 64, 0, 0, turn.reads_mask)
        for turn in kernels_cost.turns(specs)
    ]
    wanted = [tuple(row[:2]) for row in kernels_cost.clocks(fakes)[1:]]
    assert len(set(wanted)) == len(wanted)
    named = [tuple(row.strip("| ").split(" | ")[:2]) for row in rows]
    assert named == wanted * 2  # two tables


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kernel has the same ten instructions, in which there is no exp2."""

    class Compiler:
        identity = "fake 1.0"

    def of(turns: list[Turn], *_: object) -> list[Cost]:
        counts = dict.fromkeys(Class, 1) | {Class.EXP2: 0, Class.CONTROL: 4}
        return [
            Cost(turn.spec, counts, {"IMMA": 1}, minimum(turn.spec), 64, 0, 99, turn.reads_mask)
            for turn in turns
        ]

    monkeypatch.setattr(kernels_compiling, "find", lambda *names: Compiler())
    monkeypatch.setattr(Disassembler, "find", lambda: Disassembler(()))
    monkeypatch.setattr(kernels_cost, "costs", of)


@pytest.mark.usefixtures("fakes")
def test_the_command_prints_both_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["kernels", "cost", "--arch", "sm_120a"]) == 0
    lines = capsys.readouterr().out.splitlines()
    first, second = lines[: lines.index("")], lines[lines.index("") + 1 :]
    turns = kernels_cost.turns(kernels_cost.attend_specs("sm_120a"))
    assert len(first) == len(second) == 1 + len(turns)
    assert first[0].split() == ["arch", "kernel", "registers", "keys", *Class, "all"]
    row = next(line for line in first if "int8_fp8 128 " in line)
    assert "1 (64)" in row and "0 (34)" in row and row.endswith("10 (352)")
    assert all(line.startswith("sm_120a") for line in second[1:])
    assert cli.main(["kernels", "cost", "--arch", "sm_120a", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert len(data) == len(first) - 1
    assert data[0]["instructions"]["tensor"] == 1 and data[0]["registers"] == 99
    assert data[0]["opcodes"]["IMMA"] == 1
    assert data[0]["softmax"] == 0 and data[0]["keys"] == 64
    assert data[0]["clocks"]["bound"] >= data[0]["clocks"]["tensor"] > 0


@pytest.mark.usefixtures("fakes")
def test_the_command_writes_a_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = tmp_path / "costs.md"
    document.write_text("Before.\n<!-- sagec kernels cost -->\nold\n<!-- end -->\nAfter.\n")
    command = ["kernels", "cost", "--arch", "sm_90a", "--write", str(document)]
    assert cli.main(command) == 0
    once = document.read_text()
    assert once.startswith("Before.\n<!-- sagec") and once.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in once and "Compiled by fake 1.0." in once
    assert "| sm_90a | int8_fp16 64 | 99 | 64 | 1 (96) |" in once
    assert cli.main(command) == 0
    assert document.read_text() == once
    document.write_text("no place")
    assert cli.main(command) == 1
    assert "has no place for the tables" in capsys.readouterr().err
    assert document.read_text() == "no place"
    assert cli.main([*command[:-1], str(tmp_path / "none.md")]) == 1
    assert "cannot read" in capsys.readouterr().err
