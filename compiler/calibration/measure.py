"""Run the inputs once, exactly, and try every candidate in every attention on the way."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from sage_compiler import steps
from sage_compiler.calibration.probe import Call
from sage_compiler.calibration.subset import Subset
from sage_compiler.calibration.times import Taken, Times
from sage_compiler.errors import InvalidAttentionError, InvalidOptionError
from sage_compiler.metrics import EXACT_ERRORS, Errors, compare
from sage_compiler.precision import EXACT


@dataclass(frozen=True, slots=True)
class _Tried:
    """What is kept of a call until its input is done."""

    layer: str
    range: int
    errors: Mapping[str, Errors]
    taken: Taken


class Measurement:
    """Errors of all candidates in all layers, as calls stream by; nothing else is kept of a call.

    An input counts when ``finish`` is called after it: one that was interrupted would weigh in
    some layers and not in others.

    Attributes:
        errors: (layer, range of timesteps) -> recipe -> errors.
        refusals: layer -> recipe -> why the target has no kernel for it there.
        parts: "exact" or a recipe -> seconds that computing it took in all; "comparing" too.
    """

    def __init__(
        self, candidates: Sequence[str], times: Times, subset: Subset, timestep_ranges: int
    ) -> None:
        self._candidates = tuple(candidates)
        self._times = times
        self._subset = subset
        self._timestep_ranges = timestep_ranges
        self._calls: list[_Tried] = []
        self.errors: dict[tuple[str, int], dict[str, Errors]] = defaultdict(dict)
        self.refusals: dict[str, dict[str, str]] = defaultdict(dict)
        self.parts: dict[str, float] = defaultdict(float)

    def attend(self, call: Call) -> Tensor:
        """The exact output of one call, after a try of every candidate.

        Raises:
            InvalidAttentionError: timesteps are to be told apart, and ``set_step`` was not called.
        """
        at = current_range(self._timestep_ranges)
        output, taken = self._times.run(call, EXACT)
        if output.numel() and not bool(output.isfinite().any()):
            raise InvalidAttentionError(
                f"{call.layer}: exact attention gave no finite number, so nothing can be compared "
                "with it; calibrate with inputs that the model can compute"
            )
        seconds = {EXACT: taken}
        part = self._subset.of(call)
        expected = output if part is call else self._run(part, EXACT)[0]
        errors: dict[str, Errors] = {}
        for recipe in self._candidates:
            refusal = self._times.refusal(recipe, call)
            if refusal is not None:
                self.refusals[call.layer][recipe] = refusal
                continue
            if self._times.served(call, recipe) == EXACT:
                errors[recipe] = EXACT_ERRORS
                continue
            actual, seconds[recipe] = self._run(part, recipe)
            start = time.perf_counter()
            errors[recipe] = compare(actual, expected)
            self.parts["comparing"] += time.perf_counter() - start
        self.parts[EXACT] += taken
        self._calls.append(_Tried(call.layer, at, errors, self._times.of_call(call, seconds)))
        return output

    def finish(self) -> frozenset[int]:
        """Count the calls of an input that is done; the ranges of timesteps that they were in."""
        ranges = frozenset(call.range for call in self._calls)
        for call in self._calls:
            known = self.errors[call.layer, call.range]
            for recipe, found in call.errors.items():
                known[recipe] = known[recipe].join(found) if recipe in known else found
            self._times.count(call.layer, call.taken)
        self._calls.clear()
        return ranges

    def _run(self, call: Call, recipe: str) -> tuple[Tensor, float]:
        output, taken = self._times.run(call, recipe)
        self.parts[recipe] += taken
        return output, taken

    @property
    def layers(self) -> list[str]:
        """All layers that were called, in order of first call."""
        return list(dict.fromkeys(layer for layer, _ in self.errors))

    def check(self) -> None:
        """Raises InvalidOptionError: the target has no kernel for any of it."""
        if not any(self.errors.values()):
            layer, refusals = next(iter(self.refusals.items()))
            first = next(iter(refusals.values()))
            raise InvalidOptionError(
                f"none of the candidates {', '.join(self._candidates)} has a kernel for any layer; "
                f"{layer}: {first}. Name a target, such as target='sm_89', to calibrate for a "
                "device that is not here"
            )


def current_range(timestep_ranges: int) -> int:
    """The range of timesteps that a call is in; 0 where they are not told apart.

    Raises:
        InvalidAttentionError: they are, and ``set_step`` was not called.
    """
    if timestep_ranges == 1:
        return 0
    at = steps.range_of(timestep_ranges)
    if at == steps.UNSET:
        raise InvalidAttentionError(
            f"timestep_ranges={timestep_ranges}, and no step is set; call sage.set_step(step, "
            "total) before each call of the model, or while the inputs are drawn"
        )
    return at
