"""Which recipe every layer gets: the least predicted time that a budget allows. Pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import hypot, inf
from typing import Final

from sage_compiler.precision import EXACT


@dataclass(frozen=True, slots=True)
class Option:
    """One recipe that a layer could get.

    Attributes:
        recipe: its name, or "exact".
        seconds: predicted time of the layer.
        error: what it adds to the error of the output; 0 for "exact".
    """

    recipe: str
    seconds: float
    error: float


WORTH: Final = 0.99  # accuracy is not given up for less than one percent of a layer's time


def worthwhile(options: Iterable[Option]) -> list[Option]:
    """Those that are quicker than all that are more exact; quickest first, each more exact."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda each: (each.error, each.seconds)):
        if not kept or option.seconds < kept[-1].seconds * WORTH:
            kept.append(option)
    return kept[::-1]


def total_error(options: Iterable[Option]) -> float:
    """The error of an output when layers err independently of each other."""
    return hypot(*(option.error for option in options))


def choose(layers: Mapping[str, Sequence[Option]], bound: float) -> dict[str, Option]:
    """The recipes of all layers with the least time whose total error is within ``bound``.

    The problem is a knapsack with a choice in each layer. The greedy way along the convex hull of
    each layer's options (Sinha and Zoltners, The Multiple-Choice Knapsack Problem, Operations
    Research 27(3), 1979) is at most one promotion away from the optimum: everybody starts with the
    quickest option, and the layer with the most squared error removed for each second added is
    promoted, until the bound holds. What a later promotion made superfluous is taken back.

    Args:
        layers: each with "exact" or another option without error, or no bound may be possible.
    """
    ladders = {layer: worthwhile(options) for layer, options in layers.items()}
    places = {layer: 0 for layer in layers}

    def is_beyond() -> bool:
        return total_error(ladders[layer][place] for layer, place in places.items()) > bound

    while is_beyond():
        steps = [
            (_gain(ladder[places[layer]], better), layer, place)
            for layer, ladder in ladders.items()
            for place, better in enumerate(ladder[places[layer] + 1 :], start=places[layer] + 1)
        ]
        if not steps:
            break
        _, layer, place = max(steps, key=lambda step: step[0])
        places[layer] = place

    for layer in sorted(
        layers, key=lambda each: _saving(ladders[each], places[each]), reverse=True
    ):
        while places[layer] > 0:
            places[layer] -= 1
            if is_beyond():
                places[layer] += 1
                break
    return {layer: ladders[layer][place] for layer, place in places.items()}


def _gain(option: Option, better: Option) -> float:
    """Squared error removed for each second added."""
    slower = better.seconds - option.seconds
    removed = (option.error - better.error) * (option.error + better.error)
    return inf if slower <= 0 or removed == inf else removed / slower


def _saving(ladder: Sequence[Option], place: int) -> float:
    return ladder[place].seconds - ladder[place - 1].seconds if place else 0.0


def seconds(options: Iterable[Option]) -> float:
    """The time of all layers together."""
    return sum(option.seconds for option in options)


def is_exact(options: Iterable[Option]) -> bool:
    """Whether nothing is quantized."""
    return all(option.recipe == EXACT for option in options)
