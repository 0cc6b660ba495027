"""The choice of recipes against all possible ones, on problems small enough to try them all."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from math import hypot, inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sage_compiler.calibration.choose import (
    WORTH,
    Option,
    choose,
    is_exact,
    seconds,
    total_error,
    worthwhile,
)
from sage_compiler.precision import EXACT

Layers = Mapping[str, Sequence[Option]]

# Few values, so that there are ties; and what squares cannot hold.
SECONDS = st.sampled_from([0.5, 1.0, 1.005, 2.0]) | st.floats(1e-6, 10.0)
ERRORS = st.sampled_from([0.0, 0.1, 0.2, 1e-200, 1e200, inf]) | st.floats(1e-4, 1.0)
BOUNDS = st.sampled_from([0.0, 0.1, 0.2, inf]) | st.floats(1e-4, 3.0)


@st.composite
def ladders(draw: st.DrawFn) -> list[Option]:
    quantized = draw(st.lists(st.tuples(SECONDS, ERRORS), max_size=3))
    options = [Option(f"recipe{at}", *each) for at, each in enumerate(quantized)]
    return [Option(EXACT, draw(SECONDS), 0.0), *options]


LAYERS = st.lists(ladders(), max_size=4).map(
    lambda all_options: {f"layer{at}": options for at, options in enumerate(all_options)}
)


def within(options: Sequence[Option], bound: float) -> bool:
    return hypot(*(option.error for option in options)) <= bound


def optimum(layers: Layers, bound: float) -> float:
    """The least time within the bound, of the options worth their error."""
    every = itertools.product(*(worthwhile(options) for options in layers.values()))
    return min(seconds(options) for options in every if within(options, bound))


@given(LAYERS, BOUNDS)
def test_the_bound_holds_and_every_layer_has_one_of_its_options(
    layers: dict[str, list[Option]], bound: float
) -> None:
    chosen = choose(layers, bound)
    assert chosen.keys() == layers.keys()
    assert all(chosen[layer] in options for layer, options in layers.items())
    assert within(list(chosen.values()), bound)


@given(LAYERS, BOUNDS)
def test_time_is_within_one_promotion_of_the_optimum(
    layers: dict[str, list[Option]], bound: float
) -> None:
    promotions = [
        better.seconds - quick.seconds
        for options in layers.values()
        for quick, better in itertools.combinations(worthwhile(options), 2)
    ]
    least = optimum(layers, bound)
    taken = seconds(choose(layers, bound).values())
    assert least * (1 - 1e-12) <= taken <= least + max(promotions, default=0.0) + 1e-9


@given(LAYERS, BOUNDS)
def test_no_single_step_back_is_left(layers: dict[str, list[Option]], bound: float) -> None:
    """No layer could be quicker by itself within the bound."""
    chosen = choose(layers, bound)
    for layer, options in layers.items():
        ladder = worthwhile(options)
        place = ladder.index(chosen[layer])
        for quicker in ladder[:place][-1:]:
            assert not within([*({**chosen, layer: quicker}).values()], bound)


@given(LAYERS)
def test_with_no_bound_all_are_quickest_and_with_none_allowed_without_error(
    layers: dict[str, list[Option]],
) -> None:
    for layer, option in choose(layers, inf).items():
        assert option == worthwhile(layers[layer])[0]
    assert all(option.error == 0 for option in choose(layers, 0.0).values())


@given(LAYERS, BOUNDS)
def test_the_choice_is_repeatable(layers: dict[str, list[Option]], bound: float) -> None:
    assert choose(layers, bound) == choose(layers, bound)


def test_the_worst_layer_is_promoted_first() -> None:
    layers = {
        name: [Option(EXACT, 3.0, 0.0), Option("quick", 1.0, error)]
        for name, error in (("good", 0.1), ("bad", 0.9), ("fair", 0.3))
    }
    chosen = choose(layers, 0.4)
    assert {name: option.recipe for name, option in chosen.items()} == {
        "good": "quick",
        "bad": EXACT,
        "fair": "quick",
    }


def test_of_two_promotions_that_suffice_the_cheaper_one_is_taken() -> None:
    layers = {
        "dear": [Option(EXACT, 11.0, 0.0), Option("quick", 1.0, 1.0)],
        "cheap": [Option(EXACT, 1.1, 0.0), Option("quick", 1.0, 0.95)],
    }
    chosen = choose(layers, 1.0)
    assert chosen["dear"].recipe == "quick" and chosen["cheap"].recipe == EXACT


def test_what_a_later_promotion_made_superfluous_is_taken_back() -> None:
    """The small error is cheapest to remove for what it is; the large one must go anyway."""
    layers = {
        "small": [Option(EXACT, 1.1, 0.0), Option("quick", 1.0, 0.3)],
        "large": [Option(EXACT, 3.0, 0.0), Option("quick", 1.0, 1.0)],
    }
    chosen = choose(layers, 0.5)
    assert chosen["small"].recipe == "quick" and chosen["large"].recipe == EXACT


def test_where_nothing_is_exact_the_least_error_is_chosen() -> None:
    options = [Option("quick", 1.0, 0.5), Option("better", 2.0, 0.2)]
    assert choose({"layer": options}, 0.1)["layer"].recipe == "better"


def test_an_infinite_error_is_the_first_to_go() -> None:
    layers = {
        "broken": [Option(EXACT, 9.0, 0.0), Option("quick", 1.0, inf)],
        "sound": [Option(EXACT, 2.0, 0.0), Option("quick", 1.0, 0.1)],
    }
    chosen = choose(layers, 0.1)
    assert chosen["broken"].recipe == EXACT and chosen["sound"].recipe == "quick"


# --- worthwhile


@given(ladders())
def test_worthwhile_options_are_quicker_the_less_exact_they_are(options: list[Option]) -> None:
    kept = worthwhile(options)
    assert set(kept) <= set(options)
    assert kept[-1].error == 0  # never without the most exact
    for quick, better in itertools.pairwise(kept):
        assert quick.error > better.error
        assert quick.seconds < better.seconds * WORTH
    for option in options:  # what is left out is not worth its error
        assert any(
            each.error <= option.error and each.seconds * WORTH <= option.seconds for each in kept
        )


@pytest.mark.parametrize(("seconds_of_quick", "kept"), [(0.98, True), (0.995, False)])
def test_accuracy_is_not_given_up_for_less_than_a_percent(
    seconds_of_quick: float, kept: bool
) -> None:
    options = [Option(EXACT, 1.0, 0.0), Option("quick", seconds_of_quick, 0.01)]
    assert (worthwhile(options)[0].recipe == "quick") is kept


def test_errors_add_up_as_independent_ones_do() -> None:
    options = [Option("a", 1.0, 3.0), Option("b", 1.0, 4.0)]
    assert total_error(options) == 5.0
    assert total_error([]) == 0.0
    assert is_exact([Option(EXACT, 1.0, 0.0)]) and not is_exact(options)
