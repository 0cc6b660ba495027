"""Which recipe every layer gets, and why: a policy, made by ``sage.calibrate``, kept as JSON.

A policy goes by the names and fingerprints of layers (docs/layers.md). A model that it does not fit
is refused with the list of differences, never served by guessing.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from math import inf
from pathlib import Path
from typing import Any, Final

from sage_compiler.errors import PolicyError
from sage_compiler.metrics import LAYER_METRICS, Errors
from sage_compiler.policy_json import Reader, load_json, write_json
from sage_compiler.precision import EXACT, RECIPES
from sage_compiler.text import columns, count, duration

FORMAT: Final = "sage-compiler policy"
VERSION: Final = 1
CHOICES: Final = (EXACT, *RECIPES)  # what a layer can get
MOST_RANGES: Final = 1000  # of timesteps


@dataclass(frozen=True, slots=True)
class LayerPolicy:
    """The choice for one layer, and what it follows from.

    Attributes:
        fingerprints: those that the layer had in calibration; a mask class can depend on lengths.
        recipes: by range of timesteps, or one for all; "exact" keeps the model's own attention.
        reason: why, in one sentence.
        measured: by range of timesteps: recipe -> its errors against exact attention.
        seconds: recipe, or "exact" -> predicted time of the layer's attention for one input, the
            mean over the inputs.
    """

    fingerprints: tuple[str, ...]
    recipes: tuple[str, ...]
    reason: str = ""
    measured: tuple[Mapping[str, Errors], ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def recipe(self) -> str:
        """The recipes in one word: that of all timesteps, or those of the ranges by ``/``."""
        same = len(set(self.recipes)) == 1
        return self.recipes[0] if same else "/".join(self.recipes)

    @property
    def errors(self) -> Errors | None:
        """The errors of what was chosen, the worst over the ranges; None: nothing was measured."""
        found: Errors | None = None
        for at, measured in enumerate(self.measured):
            recipe = self.recipes[at if len(self.recipes) > 1 else 0]
            if recipe in measured:
                found = measured[recipe] if found is None else found.join(measured[recipe])
        return found

    @property
    def predicted_seconds(self) -> float | None:
        """The predicted time of what was chosen, ranges weighing the same; None if unknown."""
        if any(recipe not in self.seconds for recipe in self.recipes):
            return None
        return sum(self.seconds[recipe] for recipe in self.recipes) / len(self.recipes)


@dataclass(frozen=True, slots=True)
class EndToEnd:
    """What became of a bound on the model's output.

    Attributes:
        metric: "output_rel_l1", or the name of the user's function.
        limit: what was asked for.
        margin: the part of the limit that the calibration inputs had to stay within.
        worst: the greatest value over the calibration inputs, with the policy as it is; None when
            the run was interrupted before it was known.
        holds: whether ``worst`` is within limit * margin.
        rounds: how many policies were run to find this one.
    """

    metric: str
    limit: float
    margin: float
    worst: float | None
    holds: bool
    rounds: int

    def __str__(self) -> str:
        allowed = f"{self.limit * self.margin:.4g} ({self.limit:g} with margin {self.margin:g})"
        if self.worst is None:
            return f"{self.metric}: not verified; at most {allowed} was asked for"
        verdict = "holds" if self.holds else "does NOT hold"
        return f"{self.metric}: {verdict}: {self.worst:.4g} of at most {allowed}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """How a policy came about: what was measured, on what, with which versions.

    Attributes:
        budget: the limits of layers, by name; that of the model's output is in ``end_to_end``.
        candidates: the recipes that were tried, besides "exact".
        inputs: how many inputs were measured; ``interrupted``: whether more were to come.
        device: the machine that measured.
        versions: package -> version.
        times: where ``seconds`` of the layers come from.
        subset: which part of the tokens and heads was measured; "" for all.
        parts: part of the calibration -> seconds it took.
        end_to_end: the bound on the output; None when there was none.
        model_seconds: "exact", "policy" -> mean time of the whole model for one input; empty where
            kernels of the policy were emulated, or the model was not run with the policy.
    """

    budget: Mapping[str, float] = field(default_factory=dict)
    candidates: tuple[str, ...] = ()
    inputs: int = 0
    interrupted: bool = False
    device: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    times: str = ""
    subset: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)
    end_to_end: EndToEnd | None = None
    model_seconds: Mapping[str, float] = field(default_factory=dict)


class Policy:
    """A recipe for every layer of a model.

    Attributes:
        layers: layer -> its choice, in the order of the model.
        target: the device that it is made for: "cpu", or an architecture such as "sm_89".
        timestep_ranges: into how many equal parts the schedule of a diffusion model is divided; 1
            for all other models. ``sage.set_step`` says which one a call is in.
        calibration: how it came about.
    """

    def __init__(
        self,
        layers: Mapping[str, LayerPolicy],
        *,
        target: str,
        timestep_ranges: int = 1,
        calibration: Calibration | None = None,
    ) -> None:
        """Raises PolicyError: recipes that no layer can have, or not one for each range."""
        self.layers: dict[str, LayerPolicy] = dict(layers)
        self.target = target
        self.timestep_ranges = timestep_ranges
        self.calibration = calibration or Calibration()
        if not 1 <= timestep_ranges <= MOST_RANGES:
            raise PolicyError(f"{timestep_ranges} timestep ranges; possible: 1 to {MOST_RANGES}")
        for name in self.calibration.budget:
            if name not in LAYER_METRICS:
                known = ", ".join(LAYER_METRICS)
                raise PolicyError(f"the budget has {name!r}; known: {known}")
        for name, layer in self.layers.items():
            if not layer.fingerprints:
                raise PolicyError(
                    f"layer {name!r} has no fingerprint; sage.explain(...).sites have them"
                )
            unknown = [recipe for recipe in layer.recipes if recipe not in CHOICES]
            if unknown:
                known = ", ".join(CHOICES)
                raise PolicyError(f"layer {name!r} has recipe {unknown[0]!r}; known: {known}")
            if len(layer.recipes) not in {1, timestep_ranges}:
                raise PolicyError(
                    f"layer {name!r} has {len(layer.recipes)} recipes; it needs one, or one for "
                    f"each of the {timestep_ranges} timestep ranges"
                )
            if layer.measured and len(layer.measured) != timestep_ranges:
                raise PolicyError(
                    f"layer {name!r} has errors of {len(layer.measured)} timestep ranges; it needs "
                    f"those of {timestep_ranges}, or none"
                )

    # --- does it fit ------------------------------------------------------------------------

    def difference(self, layer: str, fingerprint: str) -> str | None:
        """Why a layer of a model is not the one of this name in the policy; None when it is."""
        choice = self.layers.get(layer)
        if choice is None:
            close = difflib.get_close_matches(layer, self.layers, n=1)
            hint = f"; close to it is {close[0]!r}" if close else ""
            return f"{layer} ({fingerprint}) is not in the policy{hint}"
        if fingerprint not in choice.fingerprints:
            return (
                f"{layer} is {fingerprint}; in the policy it is {' or '.join(choice.fingerprints)}"
            )
        return None

    def differences(self, layers: Iterable[tuple[str, str]]) -> list[str]:
        """All differences to the layers of a whole model, those that it lacks included.

        Args:
            layers: (layer, fingerprint) of every attention that can be rewritten.
        """
        given = list(layers)
        found = [text for each in given if (text := self.difference(*each)) is not None]
        missing = self.layers.keys() - {name for name, _ in given}
        return found + [
            f"{name} is in the policy, and not in the model"
            for name in self.layers
            if name in missing
        ]

    def require(self, differences: Sequence[str]) -> None:
        """Raises PolicyError with the differences, if there are any."""
        if differences:
            listed = "\n".join(f"  - {each}" for each in differences)
            raise PolicyError(
                f"the policy does not fit this model, {count(len(differences), 'difference')}:\n"
                f"{listed}\ncalibrate this model, or apply what fits with the option "
                "strict_policy=False"
            )

    # --- two policies -----------------------------------------------------------------------

    def diff(self, other: Policy) -> list[str]:
        """What ``other`` does otherwise, one line for each layer; empty when nothing."""
        lines = []
        if self.target != other.target:
            lines.append(f"target: {self.target} -> {other.target}")
        if self.timestep_ranges != other.timestep_ranges:
            lines.append(f"timestep_ranges: {self.timestep_ranges} -> {other.timestep_ranges}")
        for name in dict.fromkeys([*self.layers, *other.layers]):
            ours, theirs = self.layers.get(name), other.layers.get(name)
            if ours is None and theirs is not None:
                lines.append(f"+ {name}: {theirs.recipe}")
            elif theirs is None and ours is not None:
                lines.append(f"- {name}: {ours.recipe}")
            elif ours is not None and theirs is not None:
                if ours.recipe != theirs.recipe:
                    lines.append(
                        f"{name}: {ours.recipe} -> {theirs.recipe}{_reason(theirs.reason)}"
                    )
                if ours.fingerprints != theirs.fingerprints:
                    before, after = (", ".join(each.fingerprints) for each in (ours, theirs))
                    lines.append(f"{name}: fingerprint {before} -> {after}")
        return lines

    # --- predicted gain ---------------------------------------------------------------------

    @property
    def attention_seconds(self) -> tuple[float, float] | None:
        """Predicted time of all attention for one input: exact, by the policy; None: unknown."""
        exact = chosen = 0.0
        for layer in self.layers.values():
            predicted = layer.predicted_seconds
            if predicted is None or EXACT not in layer.seconds:
                return None
            exact += layer.seconds[EXACT]
            chosen += predicted
        return (exact, chosen) if self.layers else None

    # --- text and files ---------------------------------------------------------------------

    def __str__(self) -> str:
        rows = [
            (
                name,
                layer.recipe,
                _number(layer.errors, "cosine", "{:.6f}"),
                _number(layer.errors, "rel_l1", "{:.4f}"),
                "" if layer.predicted_seconds is None else duration(layer.predicted_seconds),
                "" if EXACT not in layer.seconds else duration(layer.seconds[EXACT]),
                layer.reason,
            )
            for name, layer in self.layers.items()
        ]
        head = f"policy for {self.target}: {count(len(self.layers), 'layer')}"
        if self.timestep_ranges > 1:
            head += f", {self.timestep_ranges} timestep ranges"
        heading = ("layer", "recipe", "cosine", "rel_l1", "time", "exact", "reason")
        return "\n".join([head, *columns([heading, *rows], "  "), *self._summary()])

    def _summary(self) -> list[str]:
        lines = []
        times = self.attention_seconds
        if times is not None and times[1]:
            lines.append(
                f"attention of one input: {duration(times[0])} exact, {duration(times[1])} by the "
                f"policy, {times[0] / times[1]:.2f} times as fast; {self.calibration.times}"
            )
        made = self.calibration
        if made.model_seconds:
            each = ", ".join(
                f"{duration(time)} {name}" for name, time in made.model_seconds.items()
            )
            lines.append(f"the whole model, one input: {each}")
        if made.end_to_end is not None:
            lines.append(str(made.end_to_end))
        if made.interrupted:
            lines.append(f"interrupted after {count(made.inputs, 'input')}")
        return lines

    def __repr__(self) -> str:
        return f"Policy({count(len(self.layers), 'layer')}, target={self.target!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # its layers can be changed

    def to_dict(self) -> dict[str, Any]:
        """The policy as plain data, ready for JSON: an infinite error is None there.

        What is not known is not there.
        """
        return {
            "format": FORMAT,
            "version": VERSION,
            "target": self.target,
            "timestep_ranges": self.timestep_ranges,
            "layers": {
                name: {
                    "fingerprints": list(layer.fingerprints),
                    "recipe": layer.recipes[0] if len(layer.recipes) == 1 else list(layer.recipes),
                    "reason": layer.reason,
                    "measured": [
                        {recipe: _plain(errors) for recipe, errors in part.items()}
                        for part in layer.measured
                    ],
                    "seconds": dict(layer.seconds),
                }
                for name, layer in self.layers.items()
            },
            "calibration": _plain(self.calibration),
        }

    @classmethod
    def from_dict(cls, data: object) -> Policy:
        """The inverse of ``to_dict``.

        Raises:
            PolicyError: what is wrong with ``data``, and where.
        """
        reader = Reader(data)
        found, version = reader.text("format"), reader.integer("version")
        if found != FORMAT or version != VERSION:
            raise PolicyError(
                f"this is {found!r} version {version}; this release reads {FORMAT!r} version "
                f"{VERSION}"
            )
        policy = cls(
            {name: _read_layer(each) for name, each in reader.items("layers")},
            target=reader.text("target"),
            timestep_ranges=reader.integer("timestep_ranges"),
            calibration=_read_calibration(reader.child("calibration")),
        )
        reader.done()
        return policy

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the policy as JSON, all or nothing.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(Path(path), self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Policy:
        """Read a policy; the file is data, whatever it holds.

        Raises:
            PolicyError: there is no such file, or what is wrong with it, and where.
        """
        try:
            return cls.from_dict(load_json(Path(path)))
        except PolicyError as error:
            raise PolicyError(f"{os.fspath(path)}: {error}") from None


def _reason(reason: str) -> str:
    return f" ({reason})" if reason else ""


def _number(errors: Errors | None, name: str, form: str) -> str:
    return "" if errors is None else form.format(getattr(errors, name))


def _plain(value: Any) -> Any:
    """Plain data of a dataclass of this file; infinities become None, and None is left out."""
    if isinstance(value, (Errors, EndToEnd, Calibration)):
        given = {item.name: getattr(value, item.name) for item in fields(value)}
        return {name: _plain(each) for name, each in given.items() if each is not None}
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return None if value in (inf, -inf) else value


def _read_layer(reader: Reader) -> LayerPolicy:
    layer = LayerPolicy(
        fingerprints=tuple(reader.texts("fingerprints")),
        recipes=tuple(reader.text_or_texts("recipe")),
        reason=reader.text("reason", ""),
        measured=tuple(
            {recipe: _read_errors(each) for recipe, each in part.all_items()}
            for part in reader.children("measured")
        ),
        seconds=reader.numbers("seconds"),
    )
    reader.done()
    return layer


def _read_errors(reader: Reader) -> Errors:
    names = [item.name for item in fields(Errors) if item.name != "calls"]
    errors = Errors(
        **{name: reader.number(name, none=None if "cosine" in name else inf) for name in names},
        calls=reader.integer("calls"),
    )
    reader.done()
    return errors


def _read_calibration(reader: Reader) -> Calibration:
    end_to_end = None
    if (given := reader.child("end_to_end", optional=True)) is not None:
        end_to_end = EndToEnd(
            metric=given.text("metric"),
            limit=given.number("limit"),
            margin=given.number("margin"),
            worst=given.number("worst", none=inf) if given.has("worst") else None,
            holds=given.flag("holds"),
            rounds=given.integer("rounds"),
        )
        given.done()
    made = Calibration(
        budget=reader.numbers("budget"),
        candidates=tuple(reader.texts("candidates")),
        inputs=reader.integer("inputs", 0),
        interrupted=reader.flag("interrupted"),
        device=reader.text("device", ""),
        versions=reader.named_texts("versions"),
        times=reader.text("times", ""),
        subset=reader.text("subset", ""),
        parts=reader.numbers("parts"),
        end_to_end=end_to_end,
        model_seconds=reader.numbers("model_seconds"),
    )
    reader.done()
    return made
