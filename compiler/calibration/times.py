"""Times of recipes in every layer: measured where their kernels are, else from instruction rates.

Measured are the calls of the calibration itself, each shape after one call that warms up. Calls of
one shape take the same time wherever they are: a layer's time is a sum over its calls of
the median of all calls of that shape, so that noise does not decide between layers. Medians of
enough calls are kept in the user's cache folder, for runs with too few of their own.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from math import inf
from pathlib import Path
from typing import Any, Final

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from sage_compiler import rates
from sage_compiler.calibration.probe import Call
from sage_compiler.errors import InvalidOptionError, PolicyError
from sage_compiler.kernels import registry
from sage_compiler.kernels.cuda.cache import default_folder
from sage_compiler.kernels.kernel import Kernel
from sage_compiler.machine import device_name, target_of
from sage_compiler.policy_json import load_json, write_json
from sage_compiler.precision import EXACT

log = logging.getLogger("sage_compiler")

ENOUGH: Final = 4  # calls of one shape, for a median to be kept
_LOCK_SECONDS: Final = 10.0


@dataclass(frozen=True, slots=True)
class Taken:
    """The time of one call with every recipe, in seconds; its shape where that was measured."""

    shape: str
    seconds: Mapping[str, float]


class Times:
    """Predicted time of one input in every layer, with every recipe, on the target.

    Attributes:
        target: "cpu", or an architecture such as "sm_89".
        here: whether the target is the device that the model runs on, so that times are measured.
        device: that device.
    """

    def __init__(self, target: str | None, device: torch.device) -> None:
        """Raises InvalidOptionError: an unknown target, or "cpu" for a model that is elsewhere."""
        here = target_of(device)
        self.target = here if target is None else rates.parse_target(target)
        self.here = self.target == here
        if not self.here and self.target == "cpu":
            raise InvalidOptionError(
                f"target='cpu' for a model on {device}: times on CPUs are measured, not predicted; "
                "move the model to the CPU"
            )
        self.device = device
        self._warm: set[tuple[str, str]] = set()  # shape, recipe: what has run
        self._gated: set[tuple[str, str]] = set()  # shape, recipe: what is exact there
        self._samples: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._calls: dict[str, Counter[str]] = defaultdict(Counter)  # layer -> shape -> calls
        # layer -> recipe -> seconds
        self._predicted: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))

    def refusal(self, recipe: str, call: Call) -> str | None:
        """Why the target has no kernel for this recipe and call; None when it has."""
        if self.here:
            found = registry.find(recipe, call.problem)
            return None if isinstance(found, Kernel) else found.reason
        if rates.seconds(self.target, recipe, _work(call)) is None:
            return f"no {recipe} kernel on {self.target}"
        return None

    def served(self, call: Call, recipe: str) -> str:
        """What a compiled policy computes a call with: its recipe, or "exact" below the gate.

        A kernel that is here has least sizes where it begins to gain, and the backend keeps to them
        with a policy too.
        """
        found = registry.find(recipe, call.problem) if self.here else None
        if not isinstance(found, Kernel):
            return recipe
        gate, key_length = found.gate(call.problem), call.key.shape[2]
        if isinstance(gate, str):
            return recipe
        if gate.admits(call.query.shape[2], key_length, call.query.numel() * key_length):
            return recipe
        self._gated.add((_shape(call), recipe))
        return EXACT

    def compute(self, call: Call, recipe: str) -> Tensor:
        """Attention as a compiled policy with this recipe computes it."""
        return call.run(self.served(call, recipe))

    def run(self, call: Call, recipe: str) -> tuple[Tensor, float]:
        """Attention in the precision of ``recipe``, and how long it took here, in seconds."""
        if self.here and (kind := (_shape(call), recipe)) not in self._warm:
            call.run(recipe)  # threads, caches, what is loaded late: not the kernel's time
            self._warm.add(kind)
        _wait_for(self.device)
        start = time.perf_counter()
        output = call.run(recipe)
        _wait_for(self.device)
        return output, time.perf_counter() - start

    def of_call(self, call: Call, measured: Mapping[str, float]) -> Taken:
        """The times of one call on the target.

        Args:
            measured: recipe, "exact" too -> what ``run`` took for the whole call; what the target
                has no kernel for is left out.
        """
        if self.here:
            return Taken(_shape(call), measured)
        work = _work(call)
        predicted = {recipe: rates.seconds(self.target, recipe, work) for recipe in measured}
        return Taken("", {name: each for name, each in predicted.items() if each is not None})

    def count(self, layer: str, taken: Taken) -> None:
        """Add one call of a layer to its time."""
        if self.here:
            self._calls[layer][taken.shape] += 1
        for recipe, seconds in taken.seconds.items():
            if self.here:
                self._samples[taken.shape, recipe].append(seconds)
            else:
                self._predicted[layer][recipe] += seconds

    def of_layer(self, layer: str, inputs: int) -> dict[str, float]:
        """Recipe, "exact" too -> seconds of the layer for one input, the mean over the inputs."""
        if not self.here:
            return {recipe: total / inputs for recipe, total in self._predicted[layer].items()}
        totals: dict[str, float] = {}
        calls = self._calls[layer]
        for recipe in dict.fromkeys(recipe for _, recipe in (*self._samples, *self._gated)):
            known = [self._median(shape, recipe) for shape in calls]
            if None not in known:
                times = zip(calls.values(), known, strict=True)
                totals[recipe] = sum(number * (each or 0.0) for number, each in times) / inputs
        return totals

    def _median(self, shape: str, recipe: str) -> float | None:
        samples = self._samples.get((shape, EXACT if (shape, recipe) in self._gated else recipe))
        return statistics.median(samples) if samples else None

    def recall(self, folder: Path | None = None) -> None:
        """Complete shapes with few calls from earlier runs on this machine, and keep what is new.

        Args:
            folder: where times are kept; None: the user's cache folder.
        """
        folder = folder or default_folder()
        if not self.here or folder is None:
            return
        path = folder / "times.json"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock"), timeout=_LOCK_SECONDS):
                kept = _read(path)
                self._exchange(kept.setdefault(measured_with(self.device), {}))
                write_json(path, kept)
        except (OSError, Timeout) as error:
            log.info("times are not kept: %s", error)  # those of this run serve

    def _exchange(self, kept: dict[str, float]) -> None:
        for (shape, recipe), samples in self._samples.items():
            name = f"{recipe} {shape}"
            if len(samples) >= ENOUGH:
                kept[name] = statistics.median(samples)
            elif name in kept:
                samples[:] = [kept[name]]

    def __str__(self) -> str:
        if self.here:
            return f"measured on {device_name(self.device)}"
        return f"predicted: {rates.explanation(self.target)}"


def measured_with(device: torch.device) -> str:
    """The machine, and the versions of what ran on it."""
    return f"{device_name(device)}, torch {torch.__version__}, {metadata.version('sage-compiler')}"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _shape(call: Call) -> str:
    """Everything that the time of a call depends on, as text."""
    s, mask = call.semantics, call.attn_mask
    parts: list[Any] = [
        str(call.query.dtype).removeprefix("torch."),
        *(tuple(each.shape) for each in (call.query, call.key, call.value)),
        str(s.mask_class),
        (s.window_left, s.window_right),
        "no mask" if mask is None else (str(mask.dtype).removeprefix("torch."), tuple(mask.shape)),
        "softcap" if s.softcap is not None else "",
        "sinks" if call.sinks is not None else "",
    ]
    return " ".join(str(part).replace(" ", "") for part in parts if part)


def _work(call: Call) -> rates.Work:
    return rates.Work.of(call.query, call.key, call.value, call.semantics, call.attn_mask)


def _read(path: Path) -> dict[str, dict[str, float]]:
    """Machine -> recipe and shape -> seconds; empty where there is no such file, or another."""
    try:
        found = load_json(path)
    except PolicyError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {
        machine: {name: value for name, value in known.items() if _is_time(name, value)}
        for machine, known in found.items()
        if isinstance(known, dict) and machine.isprintable()
    }


def _is_time(name: str, value: object) -> bool:
    # Lone surrogates, which JSON can hold and no file can, are not printable.
    return name.isprintable() and isinstance(value, float) and 0 < value < inf
