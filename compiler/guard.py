"""An eye on quantized layers while they serve: some calls are compared with exact attention.

What a guard is to do travels as text in the operator's arguments, and so through every cache of
compiled code; what it has seen is kept here, for this process.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from random import Random
from typing import Final

from torch import Tensor

from sage_compiler.errors import InvalidOptionError
from sage_compiler.metrics import LAYER_METRICS, Errors, compare

log = logging.getLogger("sage_compiler")

Result = tuple[Tensor, Tensor]  # the output (B, H, Lq, Dv) and the LSE, or an empty tensor


class Action(StrEnum):
    """What happens when the error of a layer leaves its limits."""

    WARN = "warn"  # a warning in the log, the first time
    DEMOTE = "demote"  # that, and exact attention from then on


@dataclass(frozen=True, slots=True)
class Guard:
    """What the option ``guard`` asks for.

    Attributes:
        fraction: of the calls of each layer, how many are compared; the first one always is.
        limits: as a budget of layers: name of a metric -> limit.
        action: what to do beyond them.
    """

    fraction: float
    limits: Mapping[str, float]
    action: Action

    def of_layer(self, layer: str, model: int, recipes: Sequence[str]) -> str:
        """The operator's argument: the same in every process that compiles the same models."""
        plain = {
            "layer": layer,
            "model": model,
            "recipes": list(recipes),
            "fraction": self.fraction,
            "limits": dict(self.limits),
            "action": str(self.action),
        }
        return json.dumps(plain, separators=(",", ":"))


@dataclass(slots=True)
class GuardedLayer:
    """What the guard of one layer has seen.

    Attributes:
        layer: its name.
        recipes: its recipe, or those of the ranges of timesteps.
        model: tells compiled functions with the same names apart, by number.
            Instances of one class that share compiled code count as one: ``sage.prepare`` gives
            each its own.
        calls: with the quantized recipe; ``compared``: how many of them.
        errors: the worst over those; None before the first.
        exceeded: how many were beyond the limits.
        demoted: whether the layer is exact by now.
    """

    layer: str
    recipes: tuple[str, ...]
    model: int
    guard: Guard = field(repr=False)
    calls: int = 0
    compared: int = 0
    errors: Errors | None = None
    exceeded: int = 0
    demoted: bool = False
    _due: int = field(default=0, repr=False)  # the number of the next call to be compared
    _random: Random = field(default_factory=lambda: Random(0), repr=False)

    def is_due(self) -> bool:
        """Count a call; whether it is to be compared.

        One call out of each 1 / fraction is, at random: a schedule of as many steps would else
        always be looked at in the same step.
        """
        call = self.calls
        self.calls += 1
        if call != self._due:
            return False
        self.compared += 1
        following = int((self.compared + self._random.random()) / self.guard.fraction)
        self._due = max(self.calls, following)
        return True


_layers: Final[dict[str, GuardedLayer]] = {}
_lock: Final = threading.Lock()  # of everything in them: one model may serve several threads


def guarded_layers() -> list[GuardedLayer]:
    """What the option ``guard`` has seen in this process, layer by layer, in order of first use."""
    return list(_layers.values())


def reset() -> None:
    """Forget what was seen; demoted layers are quantized again. torch._dynamo.reset() does it."""
    _layers.clear()


def run(text: str, quantized: Callable[[], Result], exact: Callable[[], Result]) -> Result:
    """One call of a guarded layer; a compared call that is beyond the limits returns exact results.

    Args:
        text: from ``Guard.of_layer``.
        quantized, exact: compute the call.

    Raises:
        InvalidOptionError: ``text`` is no guard's.
    """
    layer = _layers.get(text) or _layers.setdefault(text, _parse(text))
    if layer.demoted:
        return exact()
    result = quantized()
    with _lock:
        due, call = layer.is_due(), layer.calls
    if not due:
        return result
    reference = exact()
    found = compare(result[0], reference[0])
    beyond = found.beyond(layer.guard.limits)
    with _lock:
        layer.errors = found if layer.errors is None else layer.errors.join(found)
        if beyond is None:
            return result
        layer.exceeded += 1
        layer.demoted = layer.guard.action is Action.DEMOTE
        first = layer.exceeded == 1
    if first:
        becomes = (
            "exact from now on" if layer.demoted else "this call was exact, the next may not be"
        )
        log.warning("sage: guard of %s: %s in call %d; %s", layer.layer, beyond, call, becomes)
    return reference


def parse_guard(value: object, default_limits: Mapping[str, float]) -> Guard:
    """The option ``guard``: a dict of fraction (default 0.01), action ("warn") and limits.

    Args:
        value: as given; limits are named as in a budget of layers, ``{"cosine": 0.99}``.
        default_limits: the policy's budget of layers, for a guard that names no limit.

    Raises:
        InvalidOptionError: another form, or no limit at all.
    """
    if not isinstance(value, Mapping):
        raise InvalidOptionError(
            f"guard={value!r}; it must be a dict, such as "
            '{"fraction": 0.01, "cosine": 0.99, "action": "demote"}'
        )
    known = ("fraction", "action", *LAYER_METRICS)
    unknown = [key for key in value if key not in known]
    if unknown:
        raise InvalidOptionError(f"guard has {unknown[0]!r}; known: {', '.join(known)}")
    fraction = value.get("fraction", 0.01)
    if not _is_number(fraction) or not 0 < fraction <= 1:
        raise InvalidOptionError(f"guard has fraction={fraction!r}; it must be above 0, at most 1")
    try:
        action = Action(value.get("action", Action.WARN))
    except ValueError:
        raise InvalidOptionError(
            f"guard has action={value['action']!r}; known: {', '.join(Action)}"
        ) from None
    limits = {name: value[name] for name in LAYER_METRICS if name in value} or default_limits
    if not limits:
        raise InvalidOptionError(
            f"guard has no limit; give one of {', '.join(LAYER_METRICS)}, or a policy that was "
            "calibrated to a budget of layers"
        )
    for name, limit in limits.items():
        if not _is_number(limit):
            raise InvalidOptionError(f"guard has {name}={limit!r}; it must be a number")
    return Guard(float(fraction), {name: float(limit) for name, limit in limits.items()}, action)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value == value


def _parse(text: str) -> GuardedLayer:
    try:
        plain = json.loads(text)
        given = {"fraction": plain["fraction"], "action": plain["action"], **plain["limits"]}
        layer, model = str(plain["layer"]), int(plain["model"])
        recipes = tuple(map(str, plain["recipes"]))
    except (ValueError, KeyError, TypeError):
        raise InvalidOptionError(
            f"guard={text!r} is not of the form that the backend writes"
        ) from None
    return GuardedLayer(layer, recipes, model, parse_guard(given, {}), _random=Random(layer))
