"""One call for each of many items, in several processes."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def each(function: Callable[[Item], Result], items: Sequence[Item], jobs: int) -> Iterator[Result]:
    """The results in the order of the items, each as soon as it and those before it are there.

    Threads would not do: NVRTC compiles one program at a time in a process.

    Args:
        function: as the items and the results, it can be pickled.
        jobs: processes; with one, the calls run in this one.
    """
    if jobs == 1 or len(items) < 2:
        yield from map(function, items)
        return
    # Not forked: torch has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(jobs, len(items)), context) as pool:
        try:
            yield from pool.map(function, items)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
