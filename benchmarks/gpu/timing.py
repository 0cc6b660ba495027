"""Times from a device's events: candidates in turn, in one process, in rounds.

Every other round goes backwards, so that none always runs after the same one, and a clock that
drops drops for all.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Final

from benchmarks.gpu.device import Device

_SAMPLE_MILLISECONDS: Final = 8.0  # at least, so that the clock and the first launch do not count
_LEAST_ROUNDS: Final = 7
_MOST_ROUNDS: Final = 51


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Attributes:
        call: with the number of a set of inputs.
        context: what surrounds the calls; not timed.
    """

    call: Callable[[int], object]
    context: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


def sample(device: Device, candidate: Candidate, sets: Iterator[int], calls: int) -> float:
    """Milliseconds per call.

    One call before the clock starts keeps the device busy while Python prepares the next.
    """
    with candidate.context():
        candidate.call(next(sets))
        work = partial(_repeat, candidate.call, sets, calls)
        return device.milliseconds(work) / calls


def _repeat(call: Callable[[int], object], sets: Iterator[int], calls: int) -> None:
    for number in itertools.islice(sets, calls):
        call(number)


def interleave(
    device: Device, candidates: Mapping[str, Candidate], sets: int, seconds: float
) -> dict[str, list[float]]:
    """The milliseconds per call of each candidate in each round."""
    rotation = {name: itertools.cycle(range(sets)) for name in candidates}
    calls, one_round = {}, 0.0
    for name, candidate in candidates.items():
        sample(device, candidate, rotation[name], 2)  # warm-up
        look = sample(device, candidate, rotation[name], 2)
        calls[name] = max(1, round(_SAMPLE_MILLISECONDS / look))
        one_round += look * (calls[name] + 1) / 1e3
    rounds = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, round(seconds / one_round)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order:
                found = sample(device, candidates[name], rotation[name], calls[name])
                samples[name].append(found)
            order.reverse()
    finally:
        if was_enabled:
            gc.enable()
    return samples
