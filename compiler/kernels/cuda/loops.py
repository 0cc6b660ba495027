"""The loop of a kernel in its machine code, and the way through it that most turns take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from sage_compiler.errors import SageError

# What nvdisasm and cuobjdump print: labels, which only the first has, and instructions.
_LINE: Final = re.compile(
    r"^(?P<label>\.L\w+):"
    r"|^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<predicate>!?U?P\w+)\s+)?"
    r"(?P<opcode>[A-Z][A-Z0-9_.a-z]*)(?P<operands>[^;]*)",
    re.MULTILINE,
)
_TARGET: Final = re.compile(r"`\((\.L\w+)\)|(0x[0-9a-f]+)\s*$")

# With a false predicate they go on. ptxas leaves some loops by a CALL that does not return.
_JUMPS: Final = ("BRA", "CALL", "JMP")
_ENDS: Final = ("EXIT", "RET")


class CodeError(SageError, ValueError):
    """Machine code has not the form that it is read by."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction.

    Attributes:
        address: in bytes from the begin of the kernel.
        predicate: the register that decides whether it does anything, "!P0"; "" without one.
        opcode: with all modifiers, ``IMAD.MOV.U32``.
        operands: as they are printed.
        target: where it may jump to; None where it only goes on.
    """

    address: int
    predicate: str
    opcode: str
    operands: str
    target: int | None

    @property
    def name(self) -> str:
        """The opcode without modifiers."""
        return self.opcode.partition(".")[0]


def parse(listing: str) -> list[Instruction]:
    """The instructions of a listing with one kernel, in the order of their addresses.

    Raises:
        CodeError: a jump to nowhere, or addresses that do not ascend.
    """
    found, labels, waiting = [], dict[str, int](), list[str]()
    for line in _LINE.finditer(listing):
        if line["label"]:
            waiting.append(line["label"])
            continue
        address = int(line["address"], 16)
        labels |= dict.fromkeys(waiting, address)
        waiting.clear()
        found.append((address, line["predicate"] or "", line["opcode"], line["operands"].strip()))
    instructions = [Instruction(*each, target=_target(each[2], each[3], labels)) for each in found]
    addresses = [each.address for each in instructions]
    if addresses != sorted(set(addresses)):
        raise CodeError("the listing has more than one kernel")
    known = set(addresses)
    for each in instructions:
        if each.target is not None and each.target not in known:
            raise CodeError(f"{each.opcode} {each.operands} jumps to where no instruction is")
    return instructions


def _target(opcode: str, operands: str, labels: dict[str, int]) -> int | None:
    if opcode.partition(".")[0] not in _JUMPS:
        return None
    found = _TARGET.search(operands)
    if found is None or (found[1] and found[1] not in labels):
        raise CodeError(f"{opcode} {operands} names no place in this kernel")
    return labels[found[1]] if found[1] else int(found[2], 16)


def steady_path(
    instructions: Sequence[Instruction], is_work: Callable[[Instruction], bool]
) -> list[Instruction]:
    """What one turn of a kernel's main loop executes where nothing is special.

    The loop is the one with all of the kernel's tensor products. Of all ways through it that do
    the most work, the steady one is the shortest: it goes around what only some turns need.

    Args:
        is_work: what every turn does that is not special: products, and what feeds them.

    Returns:
        The instructions, from the loop's first on, in the order of execution. One whose predicate
        is false is among them: it takes its slot all the same.

    Raises:
        CodeError: no loop has all products, or it has two entries, or a loop inside.
    """
    graph = _Graph(instructions)
    products = [at for at, each in enumerate(instructions) if is_product(each)]
    if not products:
        raise CodeError("the kernel has no tensor products")
    body = graph.reached(products[:1], graph.after) & graph.reached(products[:1], graph.before)
    outside = [at for at in products if at not in body]
    if outside:
        raise CodeError(f"{len(outside)} of {len(products)} tensor products are in no loop of all")
    entries = [at for at in body if any(each not in body for each in graph.before[at])]
    if len(entries) != 1:
        raise CodeError(f"the main loop is entered at {len(entries)} places")
    if not any(entries[0] in graph.after[at] for at in body):
        raise CodeError("the tensor products are in no loop")
    order = graph.order(body, entries[0])

    # Backwards: from each instruction to the end of the turn, the most work, then the fewest steps.
    best: dict[int, tuple[int, int]] = {}
    following: dict[int, int] = {}
    for at in reversed(order):
        ways = [each for each in graph.after[at] if each in best and each != entries[0]]
        done, left = is_work(instructions[at]), (0, 0)
        if entries[0] not in graph.after[at]:
            if not ways:
                continue  # it leaves the loop
            following[at] = max(ways, key=best.__getitem__)
            left = best[following[at]]
        best[at] = (left[0] + done, left[1] - 1)
    path = [entries[0]]
    while path[-1] in following:
        path.append(following[path[-1]])
    return [instructions[at] for at in path]


def is_product(instruction: Instruction) -> bool:
    """Whether tensor cores execute it: HMMA, IMMA, QMMA and others."""
    return re.fullmatch("[A-Z]G?MMA", instruction.name) is not None


class _Graph:
    """Which instruction may follow which, by their positions."""

    def __init__(self, instructions: Sequence[Instruction]) -> None:
        at = {each.address: position for position, each in enumerate(instructions)}
        self.after: list[tuple[int, ...]] = []
        self.before: list[list[int]] = [[] for _ in instructions]
        for position, each in enumerate(instructions):
            goes_on = each.target is None or each.predicate or each.opcode.startswith("BRA.")
            ends = each.name in _ENDS and not each.predicate
            ways = {position + 1} if goes_on and not ends else set[int]()
            if each.target is not None:
                ways.add(at[each.target])
            self.after.append(tuple(way for way in sorted(ways) if way < len(instructions)))
            for way in self.after[-1]:
                self.before[way].append(position)

    def reached(self, start: Iterable[int], ways: Sequence[Iterable[int]]) -> set[int]:
        """All that ``start`` leads to, itself included."""
        found, waiting = set(start), list(start)
        while waiting:
            for way in ways[waiting.pop()]:
                if way not in found:
                    found.add(way)
                    waiting.append(way)
        return found

    def order(self, body: set[int], entry: int) -> list[int]:
        """The instructions of a loop so that none comes before what leads to it in one turn.

        Raises:
            CodeError: there is a loop inside.
        """
        missing = {at: sum(each in body for each in self.before[at]) for at in body}
        missing[entry] = 0
        ready, order = [entry], []
        while ready:
            order.append(ready.pop())
            for way in self.after[order[-1]]:
                if way in body and way != entry:
                    missing[way] -= 1
                    if not missing[way]:
                        ready.append(way)
        if len(order) != len(body):
            raise CodeError("the main loop has another one inside")
        return order
