"""How evenly the blocks of Hopper's persistent grid share the work: a model, nothing is timed.

    python -m benchmarks.deal

The imbalance of a deal is the busiest block's time over the mean. A task of 128 queries takes a
unit of time for each 128 keys that it sees, and one besides; tasks are in the order of
hopper_deal.cuh. They are dealt out beforehand, in turns or back and forth, or by a counter, where a
block takes the next task when it is done with one.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.measure import Table
from sage_compiler.kernels.cuda.arch import ARCHS
from sage_compiler.kernels.cuda.sizes import Sizes
from sage_compiler.kernels.cuda.variants import variant

ARCH: Final = ARCHS["sm_90a"]
HEAD_DIM: Final = 128
_BLOCK: Final = 128  # queries of a task, and keys of a step


@dataclass(frozen=True, slots=True)
class Work:
    """An attention; with ``padded``, to keys of random lengths, one for each of the batch."""

    batch: int
    heads: int
    length: int
    causal: bool = False
    padded: bool = False

    def __str__(self) -> str:
        words = f"{self.batch} x {self.heads}, {self.length}" + " causal" * self.causal
        return words + ", padded to random lengths" * self.padded


WORK: Final = (
    Work(4, 32, 16384, causal=True),
    Work(1, 32, 4096, causal=True),
    Work(1, 40, 8192, causal=True),
    Work(8, 32, 2048, causal=True),
    Work(1, 32, 4096),
    Work(8, 32, 2048, causal=True, padded=True),
    Work(16, 12, 512, padded=True),
)


def tasks(work: Work) -> list[int]:
    """The time of each, in their order: the last query blocks of a group of heads come first."""
    attend = variant(ARCH.name, "bfloat16", HEAD_DIM, "int8_fp8").attend
    sizes = Sizes.of(work.batch, work.heads, work.heads, work.length, work.length)
    at_once, heads = sizes.heads_at_once(attend), work.batch * work.heads
    dice = random.Random(0)
    seen = [dice.randint(1, work.length) if work.padded else work.length for _ in range(work.batch)]
    found = []
    for first in range(0, heads, at_once):
        for end in range(work.length, 0, -_BLOCK):
            for head in range(first, min(first + at_once, heads)):
                length = seen[head // work.heads]
                keys = min(length, end) if work.causal else length
                found.append(1 + -(-keys // _BLOCK))
    return found


def in_turns(times: Sequence[int], blocks: int) -> list[int]:
    """What each block has to do where the first task is the first block's, and so on."""
    return [sum(times[block::blocks]) for block in range(blocks)]


def back_and_forth(times: Sequence[int], blocks: int) -> list[int]:
    """The same where every other round begins with the last block."""
    found = [0] * blocks
    for number, time in enumerate(times):
        lap, block = divmod(number, blocks)
        found[block if lap % 2 == 0 else -1 - block] += time
    return found


def by_counter(times: Sequence[int], blocks: int) -> list[int]:
    """The same where whoever is done takes the next task."""
    ends = [0] * blocks
    for time in times:
        heapq.heapreplace(ends, ends[0] + time)
    return ends


DEALS: Final[Mapping[str, Callable[[Sequence[int], int], list[int]]]] = {
    "in_turns": in_turns,
    "back_and_forth": back_and_forth,
    "counter": by_counter,
}


def imbalance(work: Work, deal: str) -> float:
    """The busiest block's time over the mean, of a grid on the architecture's usual board."""
    times = tasks(work)
    busy = DEALS[deal](times, min(len(times), ARCH.multiprocessors))
    return max(busy) * len(busy) / sum(busy)


def main() -> None:
    print(f"{ARCH.name}, {ARCH.multiprocessors} multiprocessors, head_dim {HEAD_DIM}: a model")
    table = Table(attention=44, **dict.fromkeys(DEALS, 0))
    for work in WORK:
        table.print_row(str(work), *(f"{imbalance(work, deal):.2f}" for deal in DEALS))


if __name__ == "__main__":
    main()
