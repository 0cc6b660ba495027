"""What a compiler makes of a source, and what it says of it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Resources:
    """What a kernel takes, as ptxas reports it; bytes are per thread, except ``static_shared``.

    Attributes:
        registers: of a thread.
        spill_stores, spill_loads: bytes of registers that are kept in local memory.
        stack: bytes of its stack frame.
        static_shared: shared memory of a block besides the dynamic one.
    """

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int
    static_shared: int


@dataclass(frozen=True, slots=True)
class Binary:
    """One compiled kernel.

    Attributes:
        image: what the driver loads: a cubin, or PTX.
        warnings: of the compiler, in its words; "" when there are none.
    """

    image: bytes
    resources: Resources
    warnings: str


_FRAME: Final = re.compile(
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
)
_USED: Final = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
# What ptxas says of serialized products of wgmma is a warning, though it calls it "info".
_REPORT: Final = re.compile(r"^ptxas( info)? *[:.](?! *\(C75)|^ +\d+ bytes stack frame")


def read_log(log: str) -> tuple[Resources, str]:
    """What ``ptxas -v`` reports of the one kernel of a source, and the other lines of the log.

    What functions take that it calls is added.

    Raises:
        ValueError: the log has no such report, or several.
    """
    used = _USED.findall(log)
    frames = [tuple(map(int, found)) for found in _FRAME.findall(log)]
    if len(used) != 1 or not frames:
        raise ValueError(f"ptxas reports {len(used)} kernels; one was compiled:\n{log}")
    registers, shared = used[0]
    stack, stores, loads = map(sum, zip(*frames, strict=True))
    rest = [line for line in log.splitlines() if line.strip() and not _REPORT.match(line)]
    return Resources(int(registers), stores, loads, stack, int(shared or 0)), "\n".join(rest)
