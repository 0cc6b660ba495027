"""How much of K and V the L2 cache has lost when the quantizers read it for the second time.

A model of quantize.cuh, which blocks of it run when, and of the cache; docs/cuda-costs.md says what
in it is known of a GPU and what is not. Nothing was measured. A test holds it against the kernels
as a CPU executes them, one block at a time, which count what such a cache has not.
"""

from __future__ import annotations

import functools
import random
from collections import OrderedDict
from collections.abc import Iterator
from typing import Final, NamedTuple

_BLOCKS_OF_STEP: Final = 4  # of 64 keys, that a block which takes statistics loads at once
_MOST_BLOCKS: Final = 4096  # of a unit that are followed; of longer ones, neighbours are one


class Units(NamedTuple):
    """The units of quantize.cuh, K or V of a head each; the tensors take turns.

    Attributes:
        chunks, slices: the tasks of a unit's statistics: chunks of tokens, slices of channels.
        blocks: its tasks that convert, of 64 keys each.
        loaded: bytes of such a block, by tensor.
        streamed: bytes that are stored of it, by tensor.
        ahead: tasks of statistics before the first conversion, beside those of its unit.
        number: of units.
    """

    chunks: int
    slices: int
    blocks: int
    loaded: tuple[int, ...]
    streamed: tuple[int, ...]
    ahead: int
    number: int

    @property
    def statistics(self) -> int:
        """Tasks of statistics of a unit."""
        return self.chunks * self.slices


class Task(NamedTuple):
    """One task: of a conversion ``which`` is the block, of statistics chunk * slices + slice."""

    unit: int
    is_statistics: bool
    which: int


def tasks(units: Units) -> Iterator[Task]:
    """In the order of tickets."""
    begun = 0
    for unit in range(units.number):
        wanted = min(units.number * units.statistics, (unit + 1) * units.statistics + units.ahead)
        for task in range(begun, wanted):
            yield Task(task // units.statistics, True, task % units.statistics)
        begun = wanted
        for block in reversed(range(units.blocks)):
            yield Task(unit, False, block)


@functools.cache
def missed(units: Units, cache: int, running: int, *, streaming: bool = True) -> float:
    """How much of K and V is not in the cache any more when it is read for the second time, from 0
    to 1.

    As many blocks as can run take their tasks in the order of tickets. A block which takes
    statistics loads 256 keys in a step; one that converts loads its keys in one, waits for the
    statistics of its unit, and stores in another. Whose step is next is chance, but for blocks that
    wait. Of more units than show a steady state those in the middle count.

    Args:
        cache: bytes; 0 is none.
        running: blocks at the same time.
        streaming: whether what is stored streaming leaves the cache first, as its hint says; else
            it takes room like anything that is read.
    """
    scale = -(-units.blocks // _MOST_BLOCKS)
    running = max(1, running // scale)
    of_unit = units.statistics + units.blocks
    followed = units._replace(
        blocks=-(-units.blocks // scale),
        loaded=tuple(scale * each for each in units.loaded),
        streamed=tuple(scale * each for each in units.streamed),
        number=min(
            units.number, 6 + units.ahead // units.statistics + 2 * (running * scale // of_unit)
        ),
    )
    edge = 0 if followed.number == units.number else 2
    counted = range(edge, followed.number - edge)
    run = _Run(followed, counted, _Cache(cache), running, streaming)
    return run.lost / max(1, run.second)


class _Cache:
    """The least recently used leaves first, and before all others what was streamed."""

    def __init__(self, size: int) -> None:
        self.room = size
        self.kept: OrderedDict[tuple[int, int, int], int] = OrderedDict()
        self.streamed: OrderedDict[tuple[int, int, int], int] = OrderedDict()

    def touch(self, what: tuple[int, int, int], size: int, *, streaming: bool = False) -> bool:
        """Whether it was there."""
        found = self.kept.pop(what, 0)
        (self.streamed if streaming else self.kept)[what] = size
        self.room += found - size
        while self.room < 0:
            self.room += (self.streamed or self.kept).popitem(last=False)[1]
        return found > 0


class _Block:
    """One that runs, and how many steps it has taken."""

    def __init__(self, task: Task) -> None:
        self.task, self.steps = task, 0


class _Run:
    """The launch.

    Attributes:
        second, lost: parts that were read again, and those of them that were not in the cache.
    """

    def __init__(
        self, units: Units, counted: range, cache: _Cache, running: int, streaming: bool
    ) -> None:
        self.units, self.counted = units, counted
        self.cache, self.streaming = cache, streaming
        self.second = self.lost = 0
        self.seen: set[tuple[int, int, int]] = set()
        self.missing = [units.statistics] * units.number  # tasks of statistics, by unit
        self.waiting: list[list[_Block]] = [[] for _ in range(units.number)]
        dice = random.Random(0)
        ready: list[_Block] = []
        left = running  # blocks that could run besides
        for task in tasks(units):
            ready.append(_Block(task))
            left -= 1
            while left == 0:
                left += self._step(ready, dice)
        while ready:
            self._step(ready, dice)

    def _step(self, ready: list[_Block], dice: random.Random) -> bool:
        """Of one of those that are ready; whether it is done then."""
        chosen = dice.randrange(len(ready))
        ready[chosen], ready[-1] = ready[-1], ready[chosen]
        block = ready[-1]
        unit = block.task.unit
        block.steps += 1
        if block.task.is_statistics:
            if self._read_for_statistics(block):
                return False
            ready.pop()
            self.missing[unit] -= 1
            if self.missing[unit] == 0:
                ready += self.waiting[unit]
            return True
        if block.steps == 1:
            for piece in range(self.units.slices):
                self._read(unit, block.task.which, piece)
            if self.missing[unit] > 0:
                self.waiting[unit].append(ready.pop())
            return False
        size = self.units.streamed[unit % len(self.units.streamed)]
        self.cache.touch((unit, block.task.which, -1), size, streaming=self.streaming)
        ready.pop()
        return True

    def _read_for_statistics(self, block: _Block) -> bool:
        """Whether there is more to read."""
        chunk, piece = divmod(block.task.which, self.units.slices)
        first = chunk * self.units.blocks // self.units.chunks
        end = (chunk + 1) * self.units.blocks // self.units.chunks
        done = min(end, first + block.steps * _BLOCKS_OF_STEP)
        for read in range(first + (block.steps - 1) * _BLOCKS_OF_STEP, done):
            self._read(block.task.unit, read, piece)
        return done < end

    def _read(self, unit: int, block: int, piece: int) -> None:
        what = (unit, block, piece)
        size = self.units.loaded[unit % len(self.units.loaded)] // self.units.slices
        hit = self.cache.touch(what, size)
        if what in self.seen and unit in self.counted:
            self.second += 1
            self.lost += not hit
        self.seen.add(what)
