"""The registers of warpgroups with different roles, in machine code: what each has and uses.

By setmaxnreg a warpgroup gives registers back, or waits until it can have more.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from sage_compiler.kernels.cuda.loops import CodeError, Graph, Instruction

SET_REGISTERS: Final = "USETMAXREG"
_TAKES: Final = f"{SET_REGISTERS}.TRY_ALLOC"

_COUNT: Final = re.compile(r"0x([0-9a-f]+)\s*$")
_REGISTER: Final = re.compile(r"(?<![A-Z])R(\d+)")
_SHAPE: Final = re.compile(r"[IQ]GMMA\.64x(\d+)x32\b")
_WORDS_OF_A: Final = 4  # 64 rows of 32 bytes, in the registers of 128 threads


@dataclass(frozen=True, slots=True)
class Role:
    """What follows on a setmaxnreg.

    Attributes:
        takes: whether registers are added, not given back.
        registers: what a thread has from then on.
        used: what it needs: one more than the number of the last that its code names.
    """

    takes: bool
    registers: int
    used: int


def roles(instructions: Sequence[Instruction]) -> Iterator[Role]:
    """The roles of a kernel's threads, in the order of its code.

    Raises:
        CodeError: a setmaxnreg does not say how many registers.
    """
    graph = Graph(instructions)
    for at, each in enumerate(instructions):
        if each.name != SET_REGISTERS:
            continue
        count = _COUNT.search(each.operands)
        if count is None:
            raise CodeError(f"{each.opcode} {each.operands} names no number of registers")
        reached = (instructions[place] for place in graph.reached(at))
        used = max(map(_registers, reached))
        yield Role(each.opcode.startswith(_TAKES), int(count[1], 16), used)


def _registers(instruction: Instruction) -> int:
    """One more than the number of the last register that it names.

    Pairs and fours count as their first: they are aligned, and what a role has is a multiple of
    eight, so that they are beyond it as a whole or not at all. Operands of wgmma are longer.
    """
    shape = _SHAPE.match(instruction.opcode)
    last = 0
    for position, operand in enumerate(instruction.operands.split(",")):
        words = 1
        if shape:  # 64 N accumulators of 32 bits in 128 threads, and maybe A
            words = _WORDS_OF_A if position == 1 else int(shape[1]) // 2
        for number in _REGISTER.findall(operand):
            last = max(last, int(number) + words)
    return last
