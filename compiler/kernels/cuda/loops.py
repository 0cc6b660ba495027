"""The loop of a kernel in its machine code, and the way through it that most turns take."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True, slots=True)
class Mark:
    """What tells a way through a loop from the others.

    Attributes:
        is_it: which instructions.
        times: how many of them the way has, no more and no less.
    """

    is_it: Callable[[Instruction], bool]
    times: int


def steady_path(
    instructions: Sequence[Instruction],
    is_work: Callable[[Instruction], bool],
    marks: Sequence[Mark] = (),
) -> list[Instruction]:
    """What one turn of a kernel's main loop executes where nothing is special.

    The main loop is the innermost one that has the most tensor products; there may be some before
    and behind it, as where a loop is entered in its middle. Of all ways through it that do the
    most work, the steady one is the shortest: it goes around what only some turns need, and once
    through loops that only wait.

    Args:
        is_work: what every turn does that is not special: products, and what feeds them.
        marks: by which a special turn is asked for; without them, the steady one.

    Returns:
        The instructions, from the loop's first on, in the order of execution. One whose predicate
        is false is among them: it takes its slot all the same.

    Raises:
        CodeError: the products are in no loop, or it has two entries, or work in a loop inside,
            or no way through it has the marks.
    """
    graph = Graph(instructions)
    products = {at for at, each in enumerate(instructions) if is_product(each)}
    if not products:
        raise CodeError("the kernel has no tensor products")
    body, entry = _main_loop(graph, products)
    work = {at for at in body if is_work(instructions[at])}
    _open_loops(graph, body, entry, work)

    # Backwards: from each instruction to the end of the turn, the most work, then the fewest steps;
    # of the ways with each count of the marks, and what follows on them.
    ends_with = (0,) * len(marks)
    best: dict[int, dict[_Counts, _Way]] = {}
    for at in reversed(graph.order(body, entry)):
        own = tuple(int(mark.is_it(instructions[at])) for mark in marks)
        ways: list[tuple[_Counts, _Way, int | None]] = []
        if entry in graph.after[at]:
            ways.append((ends_with, _Way(0, 0, None), None))
        for further in graph.after[at]:
            if further == entry:
                continue
            ways += [(left, onwards, further) for left, onwards in best.get(further, {}).items()]
        found: dict[_Counts, _Way] = {}
        for left, onwards, way in ways:
            counts = tuple(map(sum, zip(own, left, strict=True)))
            if any(count > mark.times for count, mark in zip(counts, marks, strict=True)):
                continue
            following = None if way is None else (way, left)
            longer = _Way(onwards.work + (at in work), onwards.steps + 1, following)
            known = found.get(counts)
            if known is None or longer.is_better_than(known):
                found[counts] = longer
        best[at] = found  # none of an instruction from which every way leaves the loop
    wanted = tuple(mark.times for mark in marks)
    if wanted not in best[entry]:
        raise CodeError("no turn of the main loop is the one that is asked for")
    path, step = [entry], best[entry][wanted].following
    while step is not None:
        path.append(step[0])
        step = best[step[0]][step[1]].following
    return [instructions[at] for at in path]


_Counts = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Way:
    """A way from an instruction to the end of the turn.

    Attributes:
        work, steps: how much it has of both.
        following: the next instruction, and the counts of the marks from there on; None at the end.
    """

    work: int
    steps: int
    following: tuple[int, _Counts] | None

    def is_better_than(self, other: _Way) -> bool:
        """Whether it has more work, or as much in fewer steps."""
        return (self.work, -self.steps) > (other.work, -other.steps)


def _main_loop(graph: Graph, products: set[int]) -> tuple[set[int], int]:
    """The instructions of the innermost loop with the most products, and its first one."""
    places = set(range(len(graph.after)))
    found: tuple[set[int], int] | None = None
    while True:
        loops = [loop for loop in graph.loops(places) if loop & products]
        if not loops:
            break
        body = max(loops, key=lambda loop: len(loop & products))
        found = body, graph.entry(body)
        places = body - {found[1]}  # without the way back to it, which makes the loop
    if found is None:
        raise CodeError("the tensor products are in no loop")
    return found


def _open_loops(graph: Graph, body: set[int], entry: int, work: set[int]) -> None:
    """Take the ways back out of the loops within a loop, so that each is gone through once."""
    for loop in graph.loops(body - {entry}):
        if loop & work:
            raise CodeError("the main loop has another one inside, with work in it")
        first = graph.entry(loop)
        for at in loop & set(graph.before[first]):
            graph.after[at] = tuple(way for way in graph.after[at] if way != first)
            graph.before[first].remove(at)
        _open_loops(graph, loop, first, work)


def is_product(instruction: Instruction) -> bool:
    """Whether tensor cores execute it: HMMA, IMMA, QMMA and others."""
    return re.fullmatch("[A-Z]G?MMA", instruction.name) is not None


class Graph:
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

    def loops(self, places: set[int]) -> list[set[int]]:
        """Those among some places that are in no greater one, by Kosaraju's algorithm."""
        # What is done with first is reached from what is done with last, or in a loop with it.
        done: list[int] = []
        seen = set[int]()
        for start in places:
            self._walk(start, self.after, places, seen, done)
        found = []
        left = set(places)
        for start in reversed(done):
            loop: list[int] = []
            self._walk(start, self.before, left, set(), loop)
            left.difference_update(loop)
            if len(loop) > 1 or start in self.after[start]:
                found.append(set(loop))
        return found

    def reached(self, start: int) -> set[int]:
        """What an instruction leads to, itself included."""
        seen = set[int]()
        self._walk(start, self.after, set(range(len(self.after))), seen, [])
        return seen

    def entry(self, loop: set[int]) -> int:
        """Where a loop is entered.

        Raises:
            CodeError: at several places.
        """
        entries = [at for at in loop if not at or any(b not in loop for b in self.before[at])]
        if len(entries) != 1:
            raise CodeError(f"a loop is entered at {len(entries)} places")
        return entries[0]

    def order(self, body: set[int], entry: int) -> list[int]:
        """The instructions of a loop so that none comes before what leads to it in one turn."""
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
        assert len(order) == len(body), "a loop inside is still closed"
        return order

    @staticmethod
    def _walk(
        start: int, ways: Sequence[Sequence[int]], places: set[int], seen: set[int], done: list[int]
    ) -> None:
        """Add to ``done`` what ``start`` leads to and was not seen, each behind what it leads to.

        Only among ``places``; depth first.
        """
        waiting = [(start, iter(ways[start]))] if start in places and start not in seen else []
        seen.add(start)
        while waiting:
            at, further = waiting[-1]
            for way in further:
                if way in places and way not in seen:
                    seen.add(way)
                    waiting.append((way, iter(ways[way])))
                    break
            else:
                done.append(at)
                waiting.pop()
