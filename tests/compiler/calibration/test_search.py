"""The search for a policy within a bound, where the error of every policy is known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from math import hypot, inf
from typing import Final

import pytest

from sage_compiler.calibration.choose import Option, seconds
from sage_compiler.calibration.search import MOST_ROUNDS, _Range
from sage_compiler.precision import EXACT

MOST: Final = 3 * MOST_ROUNDS


class Problem:
    """Layers with recipes, and the error that a choice really has.

    Args:
        noise: how far predictions are off: the standard deviation of their logarithms.
    """

    def __init__(self, seed: int, noise: float) -> None:
        rng = random.Random(seed)
        self._true: dict[tuple[str, str], float] = {}
        self.options: dict[str, list[Option]] = {}
        for layer in map(str, range(rng.randint(3, 6))):
            error, time = rng.lognormvariate(-3, 1), rng.uniform(0.5, 2.0)
            off = rng.lognormvariate(0, noise)
            kinds = ((EXACT, 1.0, 0.0), ("int8", 0.5, error / 6), ("int4", 0.42, error))
            self.options[layer] = [Option(name, time * part, e * off) for name, part, e in kinds]
            self._true |= {(layer, name): e for name, _, e in kinds}
        self._factor = rng.lognormvariate(0, noise)
        quickest = {layer: options[-1] for layer, options in self.options.items()}
        self.allowed = self.error(quickest) * rng.choice((0.02, 0.1, 0.3, 0.6, 0.9, 0.99))

    def error(self, choice: Mapping[str, Option]) -> float:
        return self._factor * hypot(*(self._true[at, each.recipe] for at, each in choice.items()))

    def search(self) -> tuple[_Range, int]:
        search, rounds = _Range(self.options, self.allowed), 0
        while not search.done:
            rounds += 1
            assert rounds <= MOST
            search.learn(self.error(search.choice), rounds)
        return search, rounds

    def optimum(self) -> float:
        every = itertools.product(*self.options.values())
        choices = (dict(zip(self.options, options, strict=True)) for options in every)
        return min(seconds(c.values()) for c in choices if self.error(c) <= self.allowed)


# Time over the least possible: mean over 100 problems. Predictions that are right leave what the
# choice is from its optimum; those that are wrong are made up for by runs.
@pytest.mark.parametrize(("noise", "mean"), [(0.0, 1.005), (0.2, 1.01), (0.5, 1.03), (1.0, 1.08)])
def test_the_bound_holds_at_little_more_than_the_least_time(noise: float, mean: float) -> None:
    taken = []
    for seed in range(100):
        problem = Problem(seed, noise)
        best = problem.search()[0].best
        assert best is not None
        assert best.worst == problem.error(best.choice) <= problem.allowed
        taken.append(seconds(best.choice.values()) / problem.optimum())
    assert sum(taken) / len(taken) < mean


def test_few_policies_are_run() -> None:
    rounds = [Problem(seed, noise=0.2).search()[1] for seed in range(100)]
    assert sum(rounds) / len(rounds) < 2.5 and max(rounds) <= MOST_ROUNDS


OPTIONS: Final = {
    name: [Option(EXACT, 1.0, 0.0), Option("quick", 0.5, error)]
    for name, error in (("worse", 0.2), ("better", 0.1))
}


def test_one_infinite_error_does_not_give_up_every_layer() -> None:
    search, rounds = _Range(OPTIONS, allowed=10.0), 0
    while not search.done:
        rounds += 1
        search.learn(inf if search.choice["worse"].recipe == "quick" else 0.1, rounds)
    assert search.best is not None
    assert {layer: option.recipe for layer, option in search.best.choice.items()} == {
        "worse": EXACT,
        "better": "quick",
    }


@pytest.mark.parametrize("error", [0.5, inf])
@pytest.mark.parametrize("allowed", [0.0, 1e-300, 0.4])
@pytest.mark.parametrize("predicted", [0.0, 1e-320, 0.1, 1e200])
def test_what_cannot_be_reached_ends_in_nothing_quantized(
    error: float, allowed: float, predicted: float
) -> None:
    options = {"layer": [Option(EXACT, 1.0, 0.0), Option("quick", 0.5, predicted)]}
    search = _Range(options, allowed)
    for rounds in range(1, MOST):
        if not search.done:
            search.learn(error, rounds)
    assert search.done and search.best is not None
    assert search.best.worst == error
    assert search.best.choice["layer"].recipe == EXACT
