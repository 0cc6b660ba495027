"""What a calibrated model may lose: limits of layers, and a bound on the model's output."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf, isfinite
from typing import Any, Final

from sage_compiler.errors import InvalidOptionError
from sage_compiler.metrics import HIGHER_IS_BETTER, LAYER_METRICS, output_rel_l1, tensors

OUTPUT_REL_L1: Final = "output_rel_l1"
OUTPUT: Final = "output"

# From the output of the quantized model and that of the exact one, how far the first is off.
Metric = Callable[[Any, Any], float]


@dataclass(frozen=True, slots=True)
class OutputBound:
    """A bound on the whole model: ``metric(actual, expected) <= limit`` for every input."""

    name: str
    limit: float
    metric: Metric

    def measure(self, actual: Any, expected: Any) -> float:
        """How far an output is off; what is no number is infinitely far.

        Raises:
            InvalidOptionError: the user's metric gives something else than a number.
        """
        found = self.metric(actual, expected)
        try:
            value = float(found)
        except (TypeError, ValueError):
            raise InvalidOptionError(
                f"the metric {self.name!r} returned {type(found).__name__}; it must return a number"
            ) from None
        return inf if value != value else value


@dataclass(frozen=True, slots=True)
class Budget:
    """Limits of every layer by the name of a metric, and a bound on the output; both hold."""

    layers: Mapping[str, float]
    output: OutputBound | None = None


def parse_budget(value: object) -> Budget:
    """A budget as ``sage.calibrate`` takes it.

    Raises:
        InvalidOptionError: an unknown name, or a limit that it cannot have.
    """
    known = ", ".join((*LAYER_METRICS, OUTPUT_REL_L1, f"{OUTPUT}: (metric, limit)"))
    if not isinstance(value, Mapping) or not value:
        raise InvalidOptionError(
            f"budget={value!r}; it must be a dict with at least one of {known}, for example "
            '{"cosine": 0.998}'
        )
    layers: dict[str, float] = {}
    bounds: list[OutputBound] = []
    for name, limit in value.items():
        if name in LAYER_METRICS:
            layers[name] = _limit(name, limit)
        elif name == OUTPUT_REL_L1:
            bounds.append(OutputBound(name, _limit(name, limit), _output_rel_l1))
        elif name == OUTPUT:
            if not isinstance(limit, tuple) or len(limit) != 2 or not callable(limit[0]):
                raise InvalidOptionError(
                    f"budget has output={limit!r}; it must be (metric, limit), where metric takes "
                    "the output of the quantized and of the exact model and returns a number"
                )
            metric_name = getattr(limit[0], "__name__", type(limit[0]).__name__)
            bounds.append(OutputBound(metric_name, _limit(name, limit[1]), limit[0]))
        else:
            raise InvalidOptionError(f"budget has {name!r}; known: {known}")
    if len(bounds) > 1:
        raise InvalidOptionError(f"budget has {OUTPUT_REL_L1} and {OUTPUT}; give one of them")
    return Budget(layers, bounds[0] if bounds else None)


def _limit(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
        raise InvalidOptionError(f"budget has {name}={value!r}; it must be a finite number")
    if name in HIGHER_IS_BETTER and not -1 <= value <= 1:
        raise InvalidOptionError(
            f"budget has {name}={value!r}; a cosine is at most 1: 99.8 % is 0.998"
        )
    if name not in HIGHER_IS_BETTER and value < 0:
        raise InvalidOptionError(f"budget has {name}={value!r}; an error is at least 0")
    return float(value)


def _output_rel_l1(actual: Any, expected: Any) -> float:
    exact = list(tensors(expected))
    if not exact:
        raise InvalidOptionError(
            f"{OUTPUT_REL_L1} needs floating-point tensors in the output, and {type(expected)} "
            f"shows none; use {OUTPUT}: (metric, limit)"
        )
    try:
        return output_rel_l1(tensors(actual), exact)
    except ValueError:
        return inf  # not even of the same shapes
