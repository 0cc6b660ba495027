"""``sage.calibrate``: measure every recipe in every layer, on real inputs, and choose."""

from __future__ import annotations

import functools
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

from sage_compiler import rates, steps
from sage_compiler.calibration.budget import Budget, parse_budget
from sage_compiler.calibration.choose import WORTH, Option, worthwhile
from sage_compiler.calibration.inputs import Inputs
from sage_compiler.calibration.measure import Measurement, current_range
from sage_compiler.calibration.probe import Call, Watched, watched
from sage_compiler.calibration.search import Found, Outputs, search
from sage_compiler.calibration.subset import Subset
from sage_compiler.calibration.times import Times
from sage_compiler.errors import InvalidOptionError
from sage_compiler.machine import device_name
from sage_compiler.metrics import Errors
from sage_compiler.policy import MOST_RANGES, Calibration, EndToEnd, LayerPolicy, Policy
from sage_compiler.precision import EXACT, RECIPES

T = TypeVar("T")

DEFAULT_RANGES: Final = 4  # of the timesteps of a diffusion model
MARGIN: Final = 0.8  # inputs that were not measured may be somewhat worse
_TIMED_INPUTS: Final = 4  # at most, of the whole model; a quarter of all, so that it costs little


def calibrate(
    model: Callable[..., Any],
    inputs: Iterable[Any],
    *,
    budget: Mapping[str, Any],
    candidates: Sequence[str] | None = None,
    target: str | None = None,
    timestep_ranges: int | None = None,
    margin: float = MARGIN,
    heads: int | None = None,
    queries: int | None = None,
    progress: bool = True,
) -> Policy:
    """The recipe of every layer with the least predicted time that a budget allows.

    The model runs once on every input, exactly; on the way every candidate is tried in every
    attention that the backend would rewrite, and compared with exact attention. A bound on the
    output is then verified by running the policy, and the worst layers are promoted until it holds.
    Ctrl-C ends measuring and keeps what was measured. docs/calibration.md says more.

    Args:
        model: an nn.Module or a function, compiled already or not; its mode (``eval()``) is left.
        inputs: an iterable of calls: a tuple of positional arguments, a dict of keyword arguments,
            ``(args, kwargs)``, or one tensor. What can be iterated once only is kept in memory if a
            bound on the output needs it again. A diffusion model's ``sage.set_step(step, total)``
            is called while its inputs are drawn (in a generator, before ``yield``).
        budget: what may be lost; all of it holds. Of every layer in every call: ``cosine`` and
            ``head_cosine`` (least), ``rel_l1``, ``head_rel_l1`` and ``rmse`` (greatest). Of the
            model's output, for every input: ``output_rel_l1``, or ``output``: (metric, limit) with
            a function metric(actual, expected) -> number, the lower the better.
        candidates: recipes to try besides "exact"; None: those that make sense on the target.
        target: the device that the policy is for, "cpu" or an architecture such as "sm_89", present
            or not; None: the one that the model is on.
        timestep_ranges: into how many equal parts the steps of a diffusion model are divided, each
            with a recipe of its own; None: 4 where a step is set, else 1.
        margin: part of a bound on the output that the inputs may use up: others may be worse.
        heads, queries: measure about so many of each call, where recipes are emulated; None: all.
        progress: show a progress bar.

    Raises:
        InvalidOptionError: an argument that is not of these, no attention to calibrate, or no
            candidate that the target has a kernel for.
        InvalidAttentionError: timesteps are to be told apart, and no step was set.
        KeyboardInterrupt: before anything was measured.
    """
    parsed = parse_budget(budget)
    if isinstance(margin, bool) or not isinstance(margin, (int, float)) or not 0 < margin <= 1:
        raise InvalidOptionError(f"margin={margin!r}; it must be above 0, at most 1")
    run = _Run(
        Inputs(inputs, keep=_TIMED_INPUTS if parsed.output is None else None),
        parsed,
        candidates,
        target,
        timestep_ranges,
        Subset(heads, queries),
        progress,
    )
    position = steps.position()
    steps.set_step(None)  # of what ran before; the inputs set their own
    try:
        with watched(model) as watch, torch.no_grad():
            return run.policy(watch, margin)
    finally:
        steps.set_step(*(position or (None, None)))


class _Run:
    """One calibration, from the first input to the policy."""

    def __init__(
        self,
        inputs: Inputs,
        budget: Budget,
        candidates: Sequence[str] | None,
        target: str | None,
        timestep_ranges: int | None,
        subset: Subset,
        progress: bool,
    ) -> None:
        self._inputs = inputs
        self._budget = budget
        self._candidates = None if candidates is None else _parse_candidates(candidates)
        self._target = None if target is None else rates.parse_target(target)
        self._ranges = _parse_ranges(timestep_ranges)
        self._subset = subset
        self._show = progress
        self._times: Times
        self._measurement: Measurement | None = None
        self._outputs = Outputs()
        self._ranges_of: dict[int, frozenset[int]] = {}  # by input: the timesteps it is in
        self._count = 0
        self._interrupted = False
        self._offered: dict[str, set[str]] = {}  # layer -> recipes that gain enough in a range
        self._parts: dict[str, float] = {}

    def policy(self, watch: Watched, margin: float) -> Policy:
        """Measure, choose, verify."""
        start = time.perf_counter()
        self._measure(watch)
        self._times.recall()
        options = self._options()
        self._offered = {
            layer: {
                option.recipe for layers in options.values() for option in worthwhile(layers[layer])
            }
            for layer in self._measured.layers
        }
        measured = time.perf_counter()
        found: Found | None = None
        if self._budget.output is None:
            choice = {
                at: {layer: worthwhile(each)[0] for layer, each in layers.items()}
                for at, layers in options.items()
            }
        else:
            found = self._search(watch, options, margin)
            choice = found.choice
        searched = time.perf_counter()
        model_seconds = self._time_model(watch, choice) if self._times.here else {}
        self._parts |= {"measuring": measured - start, "searching": searched - measured}
        layers = {
            layer: self._layer(watch, layer, choice, found) for layer in self._measured.layers
        }
        return Policy(
            layers,
            target=self._times.target,
            timestep_ranges=self._ranges or 1,
            calibration=self._calibration(found, margin, model_seconds),
        )

    # --- measure ----------------------------------------------------------------------------

    def _measure(self, watch: Watched) -> None:
        """Run every input once.

        Raises:
            KeyboardInterrupt: before the first one was done.
        """
        try:
            for item in self._progress(self._inputs, "measuring", self._inputs.count):
                watch.attend = functools.partial(self._attend, watch, item.position is not None)
                output = item.call(watch.run)
                self._count += 1
                self._ranges_of[item.number] = self._measured.finish()
                if self._budget.output is not None:
                    if self._count == 1:  # what is wrong with a metric shows at once
                        self._budget.output.measure(output, output)
                    self._outputs.keep(item, output)
        except KeyboardInterrupt:
            if self._count == 0:
                raise
            self._interrupted = True
        if self._count == 0:
            raise InvalidOptionError("inputs is empty; calibration needs at least one input")
        self._measured.check()

    def _attend(self, watch: Watched, has_step: bool, call: Call) -> Tensor:
        if self._measurement is None:
            self._measurement = self._begin(call, watch, has_step)
        return self._measurement.attend(call)

    def _begin(self, call: Call, watch: Watched, has_step: bool) -> Measurement:
        """Settle, at the first attention, what depends on where the model is."""
        self._times = Times(self._target, call.query.device)
        watch.compute = self._times.compute
        if self._ranges is None:
            self._ranges = DEFAULT_RANGES if has_step else 1
        if self._candidates is None:
            self._candidates = rates.candidates(self._times.target)
        if self._times.here and str(self._subset):
            raise InvalidOptionError(
                f"{self._subset} only, for kernels that are here: they are timed on whole calls; "
                "leave heads and queries out"
            )
        return Measurement(self._candidates, self._times, self._subset, self._ranges)

    @property
    def _measured(self) -> Measurement:
        """What was measured.

        Raises:
            InvalidOptionError: the model has no attention that could be.
        """
        if self._measurement is None:
            raise InvalidOptionError(
                "no attention to calibrate was found; print(sage.explain(model, *args)) says why "
                "each one is kept"
            )
        return self._measurement

    def _progress(self, items: Iterable[T], what: str, total: int | None) -> Iterator[T]:
        from tqdm import tqdm

        bar = tqdm(items, desc=f"sage: {what}", total=total, leave=False, disable=not self._show)
        yield from bar

    # --- choose -----------------------------------------------------------------------------

    def _options(self) -> dict[int, dict[str, list[Option]]]:
        """By range of timesteps, layer by layer: exact, and the recipes within its limits."""
        options: dict[int, dict[str, list[Option]]] = {at: {} for at in range(self._ranges or 1)}
        for layer in self._measured.layers:
            seconds = self._times.of_layer(layer, self._count)
            for at, layers in options.items():
                errors = self._measured.errors.get((layer, at), {})
                refused = self._measured.refusals.get(layer, {})  # by some of its calls
                layers[layer] = [Option(EXACT, seconds[EXACT], 0.0)] + [
                    Option(recipe, seconds[recipe], found.mean_rel_l1)
                    for recipe, found in errors.items()
                    if recipe not in refused and found.beyond(self._budget.layers) is None
                ]
        return options

    def _search(
        self, watch: Watched, options: Mapping[int, Mapping[str, list[Option]]], margin: float
    ) -> Found:
        assert self._budget.output is not None
        if self._interrupted:  # no more runs: nothing is promised
            exact = {
                at: {layer: each[0] for layer, each in layers.items()}
                for at, layers in options.items()
            }
            return Found(exact, interrupted=True)
        found = search(
            watch,
            self._inputs,
            self._outputs,
            options,
            self._ranges_of,
            self._budget.output,
            margin,
            self._progress,
        )
        self._interrupted = found.interrupted
        return found

    def _time_model(
        self, watch: Watched, choice: Mapping[int, Mapping[str, Option]]
    ) -> dict[str, float]:
        """Median times of the model, not compiled, exact and with the policy, on a few inputs."""

        def exact(call: Call) -> Tensor:
            return call.run(EXACT)

        def chosen(call: Call) -> Tensor:
            option = choice[current_range(self._ranges or 1)][call.layer]
            return watch.compute(call, option.recipe)

        taken: dict[str, list[float]] = {EXACT: [], "policy": []}
        try:
            for item in self._inputs:
                if item.number == max(1, min(_TIMED_INPUTS, self._count // 4)) or self._interrupted:
                    break
                for name, attend in ((EXACT, exact), ("policy", chosen)):
                    watch.attend = attend
                    start = time.perf_counter()
                    item.call(watch.run)
                    taken[name].append(time.perf_counter() - start)
        except KeyboardInterrupt:
            self._interrupted = True
        return {name: statistics.median(times) for name, times in taken.items() if times}

    # --- say --------------------------------------------------------------------------------

    def _layer(
        self,
        watch: Watched,
        layer: str,
        choice: Mapping[int, Mapping[str, Option]],
        found: Found | None,
    ) -> LayerPolicy:
        recipes = tuple(choice[at][layer].recipe for at in sorted(choice))
        measured = tuple(self._measured.errors.get((layer, at), {}) for at in sorted(choice))
        return LayerPolicy(
            fingerprints=tuple(watch.fingerprints[layer]),
            recipes=recipes[:1] if len(set(recipes)) == 1 else recipes,
            reason=self._reason(layer, recipes, measured, found),
            measured=measured,
            seconds=self._times.of_layer(layer, self._count),
        )

    def _reason(
        self,
        layer: str,
        recipes: Sequence[str],
        measured: Sequence[Mapping[str, Errors]],
        found: Found | None,
    ) -> str:
        """Why the layer gets what it gets: what was quicker and fell out, and why."""
        seconds = self._times.of_layer(layer, self._count)
        reasons: dict[str, list[str]] = {}  # reason -> recipes
        for recipe in sorted(seconds, key=seconds.__getitem__):
            if set(recipes) == {recipe}:
                break
            beyond = [
                text
                for errors in measured
                if recipe in errors
                and (text := errors[recipe].beyond(self._budget.layers)) is not None
            ]
            if beyond:
                reasons.setdefault(beyond[0], []).append(recipe)
            elif recipe in recipes or recipe == EXACT:
                continue
            elif recipe not in self._offered[layer]:
                reasons.setdefault(f"gains less than {1 - WORTH:.0%}", []).append(recipe)
            elif found is not None:
                reasons.setdefault("too much of the output's error", []).append(recipe)
        for recipe, refusal in self._measured.refusals.get(layer, {}).items():
            reasons.setdefault(refusal, []).append(recipe)
        unseen = [str(at + 1) for at, errors in enumerate(measured) if not errors]
        if 0 < len(unseen) < len(measured):
            reasons.setdefault("exact, since no input was in it", []).append(
                f"timestep range {', '.join(unseen)} of {len(measured)}"
            )
        if not reasons:
            exact = set(recipes) == {EXACT}
            return "exact is the quickest" if exact else "the quickest candidate"
        return "; ".join(f"{', '.join(given)}: {text}" for text, given in reasons.items())

    def _calibration(
        self, found: Found | None, margin: float, model_seconds: Mapping[str, float]
    ) -> Calibration:
        bound, end_to_end = self._budget.output, None
        if bound is not None and found is not None:
            end_to_end = EndToEnd(
                bound.name, bound.limit, margin, found.worst, found.holds, found.rounds
            )
        return Calibration(
            budget=self._budget.layers,
            candidates=tuple(self._candidates or ()),
            inputs=self._count,
            interrupted=self._interrupted,
            device=device_name(self._times.device),
            versions={
                "sage-compiler": metadata.version("sage-compiler"),
                "torch": torch.__version__,
                "python": platform.python_version(),
            },
            times=str(self._times),
            subset=str(self._subset),
            parts={**self._measured.parts, **self._parts},
            end_to_end=end_to_end,
            model_seconds=model_seconds,
        )


def _parse_candidates(given: Sequence[str]) -> tuple[str, ...]:
    if isinstance(given, str) or not given or any(each not in RECIPES for each in given):
        known = ", ".join(RECIPES)
        raise InvalidOptionError(f"candidates={given!r}; it must be a list of: {known}")
    return tuple(dict.fromkeys(given))


def _parse_ranges(given: int | None) -> int | None:
    if given is not None and (type(given) is not int or not 1 <= given <= MOST_RANGES):
        raise InvalidOptionError(
            f"timestep_ranges={given!r}; it must be a number from 1 to {MOST_RANGES}, or None"
        )
    return given
