"""PTX, as counts of its instructions: what a driver compiles for a GPU that is not known here."""

from __future__ import annotations

import re
from collections import Counter
from typing import Final

# "@%p1 mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%r1, ...": a predicate or none, the opcode;
# several may be on a line, as inline assembly has them.
_INSTRUCTION: Final = re.compile(
    r"(?:^|[;{}])[ \t]*(?:@!?%?\w+[ \t]+)?([a-z]\w*(?:[.:]+\w+)*)(?=[ \t;])", re.MULTILINE
)
_TARGET: Final = re.compile(r"^\.target[ \t]+(\w+)", re.MULTILINE)
_LOCAL: Final = re.compile(r"\.local\s+\.align\s+\d+\s+\.b8\s+\w+\[(\d+)\]")


def count(text: str) -> Counter[str]:
    """How often each instruction is there, with all of its modifiers."""
    return Counter(_INSTRUCTION.findall(text))


def target(text: str) -> str:
    """The least GPU that it is for, ``sm_80``; "" where it names none."""
    found = _TARGET.search(text)
    return found[1] if found else ""


def local_bytes(text: str) -> int:
    """Bytes of a thread's local memory that variables take, registers aside."""
    return sum(map(int, _LOCAL.findall(text)))
