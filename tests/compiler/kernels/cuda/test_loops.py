"""The main loop of a kernel in its machine code, and the way through it."""

import random
from collections.abc import Iterator

import pytest

from sage_compiler.kernels.cuda.loops import (
    CodeError,
    Instruction,
    Mark,
    is_product,
    parse,
    steady_path,
)

LISTING = """\
\t.headerflags\t@"EF_CUDA_SM89"
.text.sage_attend:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0020*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0030*/               @P1 BRA `(.L_x_3) ;
        /*0040*/                   LDGSTS.E.BYPASS.128 [R59], [R44.64] ;
.L_x_3:
        /*0050*/                   IMMA.16832.S8.S8 R80, R116.ROW, R40.COL, R76 ;
        /*0060*/              @!P6 BRA `(.L_x_4) ;
        /*0070*/                   FSEL R4, R4, -INF , P0 ;
        /*0080*/                   FSEL R5, R5, -INF , P0 ;
.L_x_4:
        /*0090*/                   BRA.DIV UR4, `(.L_x_5) ;
        /*00a0*/                   SHFL.BFLY PT, R2, R3, 0x1, 0x1f ;
.L_x_6:
        /*00b0*/              @!PT LDS RZ, [RZ] ;
        /*00c0*/               @P1 CALL.REL.NOINC `(.L_x_2) ;
        /*00d0*/                   BRA `(.L_x_1) ;
.L_x_2:
        /*00e0*/                   EXIT ;
.L_x_5:
        /*00f0*/                   WARPSYNC.COLLECTIVE R2, `(.L_x_7) ;
.L_x_7:
        /*0100*/                   SHFL.BFLY PT, R2, R3, 0x1, 0x1f ;
        /*0110*/                   BRA `(.L_x_6) ;
.L_x_8:
        /*0120*/                   BRA `(.L_x_8);
        /*0130*/                   NOP;
"""


def is_work(instruction: Instruction) -> bool:
    return is_product(instruction) or instruction.name == "LDGSTS"


def opcodes(instructions: list[Instruction]) -> list[str]:
    return [each.opcode for each in instructions]


def test_instructions_are_read() -> None:
    found = parse(LISTING)
    assert [each.address for each in found] == list(range(0, 0x140, 16))
    assert found[1] == Instruction(0x10, "P0", "BRA", "`(.L_x_2)", 0xE0)
    assert found[5] == Instruction(
        0x50, "", "IMMA.16832.S8.S8", "R80, R116.ROW, R40.COL, R76", None
    )
    assert found[11].predicate == "!PT"
    assert [each.name for each in found if each.target is None and each.name == "WARPSYNC"]


def test_the_steady_path_goes_around_what_is_special() -> None:
    # The mask (FSEL) and the divergent shuffle are left out, the copy is not.
    assert opcodes(steady_path(parse(LISTING), is_work)) == [
        "BAR.SYNC.DEFER_BLOCKING", "BRA", "LDGSTS.E.BYPASS.128", "IMMA.16832.S8.S8", "BRA",
        "BRA.DIV", "SHFL.BFLY", "LDS", "CALL.REL.NOINC", "BRA",
    ]  # fmt: skip


def is_hiding(instruction: Instruction) -> bool:
    return instruction.name == "FSEL"


def test_a_special_path_is_found_by_its_marks() -> None:
    code = parse(LISTING)
    steady = steady_path(code, is_work)
    masked = steady_path(code, is_work, [Mark(is_hiding, 2)])
    assert [each for each in masked if each not in steady] == [
        each for each in code if is_hiding(each)
    ]
    assert [each for each in masked if not is_hiding(each)] == steady
    assert steady_path(code, is_work, [Mark(is_hiding, 0)]) == steady
    with pytest.raises(CodeError, match="no turn of the main loop is the one that is asked for"):
        steady_path(code, is_work, [Mark(is_hiding, 1)])


def test_targets_may_be_addresses() -> None:
    # As cuobjdump has them.
    listing = LISTING
    for label, address in (("1", 0x20), ("2", 0xE0), ("3", 0x50), ("4", 0x90), ("5", 0xF0)):
        listing = listing.replace(f"`(.L_x_{label})", hex(address))
    listing = listing.replace("`(.L_x_6)", "0xb0").replace("`(.L_x_8)", "0x120")
    assert steady_path(parse(listing), is_work) == [
        Instruction(
            each.address,
            each.predicate,
            each.opcode,
            each.operands if each.target is None else mine.operands,
            each.target,
        )
        for each, mine in zip(
            steady_path(parse(LISTING), is_work), steady_path(parse(listing), is_work), strict=True
        )
    ]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("IMMA.16832.S8.S8 R80", "IADD3 R80", "no tensor products"),
        ("BRA `(.L_x_1) ;", "EXIT ;", "products are in no loop"),
        ("@P0 BRA `(.L_x_2)", "@P0 BRA `(.L_x_4)", "is entered at 2 places"),
        ("BRA `(.L_x_6)", "BRA `(.L_x_9)", "names no place in this kernel"),
        ("BRA `(.L_x_6)", "BRA 0x8888", "jumps to where no instruction is"),
        ("/*0130*/", "/*0000*/", "more than one kernel"),
    ],
)
def test_code_of_another_form_is_refused(old: str, new: str, said: str) -> None:
    assert old in LISTING
    with pytest.raises(CodeError, match=said):
        steady_path(parse(LISTING.replace(old, new)), is_work)


def test_products_before_the_loop_are_none_of_it() -> None:
    begun = LISTING.replace("MOV R1, c", "IMMA R1, c")
    assert steady_path(parse(begun), is_work) == steady_path(parse(LISTING), is_work)


def test_a_loop_around_the_main_loop_is_left_out() -> None:
    again = LISTING.replace("EXIT ;", "BRA `(.L_x_0) ;")
    again = again.replace("        /*0000*/", ".L_x_0:\n        /*0000*/")
    again = again.replace("MOV R1, c", "IMMA R1, c")  # and it has a product of its own
    assert steady_path(parse(again), is_work) == steady_path(parse(LISTING), is_work)


def test_a_loop_that_waits_is_gone_through_once() -> None:
    waiting = LISTING.replace("@!PT LDS RZ, [RZ]", " @P3 BRA `(.L_x_4)")
    path, usual = (steady_path(parse(text), is_work) for text in (waiting, LISTING))
    assert [each.address for each in path] == [each.address for each in usual]
    working = waiting.replace("SHFL.BFLY PT, R2, R3, 0x1, 0x1f ;\n.L_x_6", "LDGSTS [R2] ;\n.L_x_6")
    assert working != waiting
    with pytest.raises(CodeError, match="another one inside, with work in it"):
        steady_path(parse(working), is_work)


def test_of_two_loops_the_one_with_more_products_is_the_main_one() -> None:
    first = ["/*0000*/ HMMA R1 ;", "/*0010*/ @P0 BRA 0x0 ;"]
    second = ["/*0020*/ IMMA R1 ;", "/*0030*/ IMMA R2 ;", "/*0040*/ @P0 BRA 0x20 ;"]
    code = parse("\n".join([*first, *second, "/*0050*/ EXIT ;"]))
    assert opcodes(steady_path(code, is_work)) == ["IMMA", "IMMA", "BRA"]


def test_products_are_those_of_tensor_cores() -> None:
    def of(opcode: str) -> Instruction:
        return Instruction(0, "", opcode, "", None)

    for opcode in ("IMMA.16832.S8.S8", "HMMA.1688.F32.TF32", "QMMA.16832.F32", "IGMMA.64x8x32"):
        assert is_product(of(opcode))
    for opcode in ("FFMA", "IMAD.MOV.U32", "HFMA2.MMA", "F2FP.F16"):
        assert not is_product(of(opcode))


def ways(code: list[Instruction], entry: int) -> Iterator[list[int]]:
    """All turns from the entry of a loop back to it, by trying each; none waits for anything."""
    at = {each.address: position for position, each in enumerate(code)}
    waiting = [[entry]]
    while waiting:
        way = waiting.pop()
        last = code[way[-1]]
        following = set() if last.name == "EXIT" else {way[-1] + 1}
        if last.target is not None:
            following = {at[last.target]} | (following if last.predicate else set())
        for position in following:
            if position == entry:
                yield way
            elif position < len(code) and position not in way:
                waiting.append([*way, position])


def test_random_loops_have_the_path_that_trying_all_finds() -> None:
    different = waited = special = 0
    for seed in range(300):
        draw = random.Random(seed)
        length = draw.randrange(4, 14)
        product = draw.randrange(1, length)
        # Two instructions each, of which nothing but the first one leads to the second.
        waits = {at for at in range(1, length - 1) if draw.random() < 0.15}
        waits = {at for at in waits if at - 1 not in waits and product not in (at, at + 1)}
        code = [Instruction(0, "", "MOV", "", None)]
        for position in range(1, length):
            target = None
            name = draw.choice(["FADD", "LDGSTS", "IADD3"])
            if position == product:
                name = "IMMA"
            elif position in waits:
                name = "SYNCS"
            elif position - 1 in waits:
                name, target = "BRA", 16 * (position - 1)
            elif draw.random() < 0.4:
                # Only forwards, and not over the product, which all turns pass.
                least, most = position + 1, product if position < product else length
                to = draw.randint(least, most)
                name, target = "BRA", 16 * (to + (to - 1 in waits))
            code.append(Instruction(16 * position, "P0" if target else "", name, "", target))
        code.append(Instruction(16 * length, "", "BRA", "", 16))
        code.append(Instruction(16 * length + 16, "", "EXIT", "", None))
        turns = list(ways(code, 1))
        best = max((sum(is_work(code[at]) for at in way), -len(way)) for way in turns)
        path = steady_path(code, is_work)
        assert (sum(map(is_work, path)), -len(path)) == best
        assert [each.address // 16 for each in path] in turns
        # With so many additions of one kind, and of another, as one of the turns has.
        chosen = draw.choice(turns)
        marks = [
            Mark(
                lambda each, name=name: each.name == name,
                sum(code[at].name == name for at in chosen),
            )
            for name in ("FADD", "IADD3")
        ]
        alike = [
            way
            for way in turns
            if all(sum(mark.is_it(code[at]) for at in way) == mark.times for mark in marks)
        ]
        marked = steady_path(code, is_work, marks)
        assert [each.address // 16 for each in marked] in alike
        assert (sum(map(is_work, marked)), -len(marked)) == max(
            (sum(is_work(code[at]) for at in way), -len(way)) for way in alike
        )
        special += marked != path
        different += len(turns) > 1
        waited += any(each.name == "SYNCS" for each in path)
    assert different > 100 and waited > 100 and special > 50
