"""Find the quickest policy whose output stays within a bound, by running it.

How much of a layer's error reaches the output is not known before: it is measured with one layer
quantized at a time. From these shares the error of a policy is predicted; the policy is run on all
inputs, and what it measures scales the prediction, until the bound holds with the margin, or
nothing is quantized. Ranges of timesteps are searched side by side: an input is in one of them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Final, Protocol, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

from sage_compiler.calibration.budget import OutputBound
from sage_compiler.calibration.choose import Option, choose, is_exact, seconds, total_error
from sage_compiler.calibration.inputs import Inputs, Item
from sage_compiler.calibration.measure import current_range
from sage_compiler.calibration.probe import Call, Watched
from sage_compiler.metrics import leaves
from sage_compiler.precision import EXACT

T = TypeVar("T")

MOST_ROUNDS: Final = 8  # after these, a bound that does not hold yet is approached in great steps
_LOOSEN: Final = 1.1  # what is this much below the bound may be worth another round
_TIGHTEN: Final = 0.9  # of what a measured error asks for
_KEEP_BYTES: Final = 1 << 28  # of exact outputs, to compare policies with
_UNKNOWN_BYTES: Final = _KEEP_BYTES + 1  # of what may hold tensors out of sight, such as a cache
_SMALL: Final = (bool, int, float, complex, str, type(None))


class Progress(Protocol):
    """Shows how far a loop over inputs is."""

    def __call__(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]: ...


class Outputs:
    """Exact outputs of the model: kept while they are small, computed again where not."""

    def __init__(self) -> None:
        self._kept: dict[int, Any] = {}
        self._bytes = 0

    def keep(self, item: Item, output: Any) -> None:
        """Keep an output that the model gave without any quantization."""
        size = sum(
            leaf.numel() * leaf.element_size() if isinstance(leaf, Tensor) else _UNKNOWN_BYTES
            for leaf in leaves(output)
            if not isinstance(leaf, _SMALL)
        )
        if self._bytes + size <= _KEEP_BYTES:
            self._bytes += size
            self._kept[item.number] = _own(output)

    def of(self, item: Item, watch: Watched) -> Any:
        """The exact output for an item."""
        if item.number not in self._kept:
            watch.attend = lambda call: call.run(EXACT)
            return _own(item.call(watch.run))
        return self._kept[item.number]


def _own(output: Any) -> Any:
    """An output with tensors of its own: a model may return a buffer that its next call changes."""
    return pytree.tree_map_only(Tensor, Tensor.clone, output)


@dataclass(slots=True)
class Found:
    """The outcome of a search.

    Attributes:
        choice: range of timesteps -> layer -> what it gets.
        worst: the greatest error of an output that was measured with it; None: it was not run.
        holds: whether that is within the bound and margin.
        rounds: how many policies were run on all inputs.
        interrupted: whether the user ended the search.
    """

    choice: dict[int, dict[str, Option]]
    worst: float | None = None
    holds: bool = False
    rounds: int = 0
    interrupted: bool = False


def search(
    watch: Watched,
    inputs: Inputs,
    outputs: Outputs,
    options: Mapping[int, Mapping[str, list[Option]]],
    ranges_of: Mapping[int, Collection[int]],
    bound: OutputBound,
    margin: float,
    progress: Progress,
) -> Found:
    """The quickest policy found that keeps ``bound`` with ``margin`` on all inputs.

    Args:
        options: by range of timesteps, layer by layer, with the layer's relative L1 as error.
        ranges_of: number of an input -> the ranges of timesteps that it is in: one, unless the
            model goes through steps by itself.
        margin: the part of the limit that the inputs may use up.
    """
    allowed = bound.limit * margin
    model = _Model(watch, inputs, outputs, ranges_of, bound, len(options), progress)
    found = Found({})
    ranges: dict[int, _Range] = {}
    try:
        trials = [
            (at, layer, candidates)
            for at, layers in options.items()
            for layer, candidates in layers.items()
        ]
        weighed: dict[int, dict[str, list[Option]]] = {at: {} for at in options}
        for at, layer, candidates in progress(trials, "layer by layer", len(trials)):
            weighed[at][layer] = model.weighed(at, layer, candidates)
        ranges = {at: _Range(layers, allowed) for at, layers in weighed.items()}
        while not all(each.done for each in ranges.values()):
            found.rounds += 1
            choice = {at: each.choice for at, each in ranges.items()}
            open_ranges = {at for at, each in ranges.items() if not each.done}
            worst = model.run(choice, open_ranges, found.rounds)
            for at in open_ranges:
                ranges[at].learn(worst[at], found.rounds)
        if any(len(each) > 1 for each in ranges_of.values()):
            _join(model, ranges, allowed, found)
    except KeyboardInterrupt:
        found.interrupted = True
    kept = {at: ranges[at].best for at in options if at in ranges}
    for at, layers in options.items():
        best = kept.get(at)
        # What was not found out before an interruption is not guessed.
        found.choice[at] = _exact(layers) if best is None else best.choice
    known = [best.worst for best in kept.values() if best is not None]
    if len(known) == len(options):
        found.worst = max(known)
        found.holds = found.worst <= allowed
    return found


def _join(model: _Model, ranges: Mapping[int, _Range], allowed: float, found: Found) -> None:
    """Verify ranges that share inputs together: each was judged beside choices others have left.

    Where the bound does not hold, the targets of all shrink until it does, or all is exact.
    """
    choice = {at: each.choice for at, each in ranges.items()}
    for each in ranges.values():
        each.best = None  # nothing is known of all of them together
    while True:
        found.rounds += 1
        worst = model.run(choice, choice.keys(), found.rounds)
        if max(worst.values()) <= allowed or all(
            is_exact(each.values()) for each in choice.values()
        ):
            break
        choice = {at: ranges[at].tighter(choice[at]) for at in choice}
    for at, error in worst.items():
        ranges[at].best = _Best(choice[at], error)


def _exact(layers: Mapping[str, list[Option]]) -> dict[str, Option]:
    return {
        layer: next(each for each in options if each.recipe == EXACT)
        for layer, options in layers.items()
    }


@dataclass(frozen=True, slots=True)
class _Best:
    choice: dict[str, Option]
    worst: float


class _Range:
    """The search within one range of timesteps: the choice to run next, and what is known."""

    def __init__(self, options: Mapping[str, list[Option]], allowed: float) -> None:
        self._options = options
        self._allowed = allowed
        self._target = allowed  # of the predicted error
        self._holds, self._fails = 0.0, inf  # targets that a run has decided
        self._tried: list[dict[str, Option]] = []
        self.best: _Best | None = None
        self.done = False
        self.choice = choose(options, allowed)

    def learn(self, worst: float, rounds: int) -> None:
        """Take in the greatest error of an output under ``choice``, and make the next one."""
        if self.done:
            return
        self._tried.append(self.choice)
        if worst <= self._allowed or is_exact(self.choice.values()):
            self.best = _Best(self.choice, worst)
            self._holds = self._target
            self._target *= self._allowed / worst if worst else inf
        else:
            self._fails = min(self._fails, total_error(self.choice.values()))
            step = _TIGHTEN if rounds < MOST_ROUNDS else 0.25
            self._target = self._fails * step * self._allowed / worst
        if self.best is None:
            if not self._move():  # it was predicted to be without error
                self.choice = _exact(self._options)
            return
        if not self._holds < self._target < self._fails:  # between what held and what did not
            self._target = (self._holds + self._fails) / 2
        wide = self.best.worst * _LOOSEN < self._allowed
        self.done = not wide or rounds >= MOST_ROUNDS or not self._move()
        if self.done:
            self.choice = self.best.choice

    def tighter(self, choice: dict[str, Option]) -> dict[str, Option]:
        """A choice with at most half of the predicted error of another; exact where that is 0."""
        predicted = total_error(choice.values())
        return choose(self._options, predicted / 2) if predicted else _exact(self._options)

    def _move(self) -> bool:
        """Take the choice for the target next; False where it is one that was run before."""
        following = choose(self._options, self._target)
        if following in self._tried:
            return False
        if self.best is not None and seconds(following.values()) >= seconds(
            self.best.choice.values()
        ):
            return False
        self.choice = following
        return True


class _Model:
    """The watched model, run with a choice of recipes."""

    def __init__(
        self,
        watch: Watched,
        inputs: Inputs,
        outputs: Outputs,
        ranges_of: Mapping[int, Collection[int]],
        bound: OutputBound,
        timestep_ranges: int,
        progress: Progress,
    ) -> None:
        self._watch = watch
        self._inputs = inputs
        self._outputs = outputs
        self._ranges_of = ranges_of
        self._bound = bound
        self._ranges = timestep_ranges
        self._progress = progress

    def _error(self, item: Item, choice: Mapping[int, Mapping[str, Option]]) -> float:
        """The error of the output for one input under a choice; what it leaves out is exact."""
        expected = self._outputs.of(item, self._watch)

        def attend(call: Call) -> Tensor:
            option = choice.get(current_range(self._ranges), {}).get(call.layer)
            return self._watch.compute(call, EXACT if option is None else option.recipe)

        self._watch.attend = attend
        return self._bound.measure(item.call(self._watch.run), expected)

    def run(
        self, choice: Mapping[int, Mapping[str, Option]], ranges: Collection[int], number: int
    ) -> dict[int, float]:
        """The greatest error in each of these ranges of timesteps, over all inputs in them."""
        worst = dict.fromkeys(ranges, 0.0)
        for item in self._progress(self._inputs, f"policy {number}", self._inputs.count):
            concerned = worst.keys() & self._ranges_of.get(item.number, ())
            if concerned:
                error = self._error(item, choice)
                worst |= {at: max(worst[at], error) for at in concerned}
        return worst

    def weighed(self, at: int, layer: str, options: Sequence[Option]) -> list[Option]:
        """A layer's options with what they add to the error of the output.

        What of the layer's error reaches the output shows when it is quantized alone, by its
        coarsest option, on one input; an option that breaks the output is left out.
        """
        usable = sorted(options, key=lambda each: each.error)
        share = 1.0
        item = self._first_items.get(at)
        while item is not None and (coarsest := usable[-1]).error > 0:
            error = self._error(item, {at: {layer: coarsest}})
            if error < inf and coarsest.error < inf:
                share = error / coarsest.error or 1.0
                break
            usable.pop()
        return [
            Option(each.recipe, each.seconds, each.error * share if each.error else 0.0)
            for each in usable
        ]

    @functools.cached_property
    def _first_items(self) -> dict[int, Item]:
        """The first input in each range of timesteps."""
        missing = {at for ranges in self._ranges_of.values() for at in ranges}
        first: dict[int, Item] = {}
        for item in self._inputs:
            for at in missing.intersection(self._ranges_of.get(item.number, ())):
                first[at] = item
                missing.discard(at)
            if not missing:
                break
        return first
