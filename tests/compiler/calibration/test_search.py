"""The search for a policy within a bound, where the error of every policy is known."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from math import hypot, inf
from typing import Any, Final

import pytest

from sage_compiler.calibration import search
from sage_compiler.calibration.budget import OutputBound
from sage_compiler.calibration.choose import Option, seconds
from sage_compiler.calibration.search import MOST_ROUNDS, _Range
from sage_compiler.precision import EXACT

MOST: Final = 3 * MOST_ROUNDS
Choices = Mapping[int, dict[str, Option]]


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
        searched, rounds = _Range(self.options, self.allowed), 0
        while not searched.done:
            rounds += 1
            assert rounds <= MOST
            searched.learn(self.error(searched.choice), rounds)
        return searched, rounds

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


def test_ranges_that_share_an_input_are_verified_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each range is judged by an error that all of them make."""
    for seed in range(20):
        ranges = {at: Problem(2 * seed + at, noise=0.5) for at in range(2)}
        runs: list[Choices] = []

        class Model:
            def __init__(self, *_: Any) -> None: ...

            def weighed(self, at: int, layer: str, options: list[Option]) -> list[Option]:
                return options

            def run(self, choice: Choices, open_ranges: Any, number: int) -> dict[int, float]:
                runs.append(dict(choice))  # noqa: B023 - used in this iteration only
                return dict.fromkeys(open_ranges, joint(choice))

        def joint(choice: Choices) -> float:
            return hypot(*(ranges[at].error(each) for at, each in choice.items()))  # noqa: B023

        monkeypatch.setattr(search, "_Model", Model)
        bound = OutputBound("joint", ranges[0].allowed, lambda actual, expected: 0.0)
        given: Any = None
        found = search.search(
            given,
            given,
            given,
            {at: problem.options for at, problem in ranges.items()},
            {0: (0, 1)},
            bound,
            1.0,
            lambda items, what, total: items,
        )
        assert found.worst == joint(found.choice) and found.rounds == len(runs)
        assert found.holds and found.worst <= bound.limit  # exact would hold, if nothing else did
        assert runs[-1] == found.choice


OPTIONS: Final = {
    name: [Option(EXACT, 1.0, 0.0), Option("quick", 0.5, error)]
    for name, error in (("worse", 0.2), ("better", 0.1))
}


def test_one_infinite_error_does_not_give_up_every_layer() -> None:
    one, rounds = _Range(OPTIONS, allowed=10.0), 0
    while not one.done:
        rounds += 1
        one.learn(inf if one.choice["worse"].recipe == "quick" else 0.1, rounds)
    assert one.best is not None
    assert {layer: option.recipe for layer, option in one.best.choice.items()} == {
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
    one = _Range(options, allowed)
    for rounds in range(1, MOST):
        if not one.done:
            one.learn(error, rounds)
    assert one.done and one.best is not None
    assert one.best.worst == error
    assert one.best.choice["layer"].recipe == EXACT
