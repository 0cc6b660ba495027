"""Heat maps: the errors of every recipe in every layer, one map for each range of timesteps."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from math import isnan
from typing import Final

from sage_compiler.policy import CHOICES, Policy
from sage_compiler.verdict import error_text

# Relative L1 at which the next color begins: the same in every report, so that they compare.
STEPS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2)


@dataclass(frozen=True, slots=True)
class Cell:
    """One recipe in one layer.

    Attributes:
        rel_l1, cosine: its errors, as text.
        step: the color: how many of ``STEPS`` the error reaches.
        chosen: whether the policy has this recipe here.
    """

    rel_l1: str
    cosine: str
    step: int
    chosen: bool


@dataclass(frozen=True, slots=True)
class Row:
    """One layer: the recipe it got, and a cell for each recipe, None where it was not measured."""

    layer: str
    recipe: str
    cells: list[Cell | None]


@dataclass(frozen=True, slots=True)
class HeatMap:
    """The errors of one range of timesteps, or of all."""

    title: str
    recipes: list[str]
    rows: list[Row]


def heat_maps(policy: Policy) -> list[HeatMap]:
    """The maps of a policy; none where nothing was measured."""
    return [each for at in range(policy.timestep_ranges) if (each := _heat_map(policy, at)).recipes]


def _heat_map(policy: Policy, at: int) -> HeatMap:
    """The map of one range."""
    layers = {name: layer for name, layer in policy.layers.items() if layer.measured}
    tried = {recipe for layer in layers.values() for recipe in layer.measured[at]}
    recipes = [recipe for recipe in CHOICES if recipe in tried]
    rows = []
    for name, layer in layers.items():
        chosen = layer.recipes[at if len(layer.recipes) > 1 else 0]
        cells: list[Cell | None] = []
        for recipe in recipes:
            errors = layer.measured[at].get(recipe)
            cells.append(
                None
                if errors is None
                else Cell(
                    rel_l1=error_text(errors.rel_l1, 4),
                    cosine=error_text(errors.cosine, 6),
                    step=_step(errors.rel_l1),
                    chosen=recipe == chosen,
                )
            )
        rows.append(Row(name, chosen, cells))
    title = f"policy for {policy.target}"
    if policy.timestep_ranges > 1:
        title += f", timestep range {at + 1} of {policy.timestep_ranges}"
    return HeatMap(title, recipes, rows)


def _step(rel_l1: float) -> int:
    return len(STEPS) if isnan(rel_l1) else bisect_right(STEPS, rel_l1)
