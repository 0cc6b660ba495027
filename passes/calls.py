"""One operation of a graph, its arguments read as numbers, affine functions and formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import SymInt, Tensor, fx

from sage_compiler.passes.bands import as_number
from sage_compiler.passes.folding import real_tensors, run
from sage_compiler.passes.forms import (
    TRUE,
    Affine,
    Choice,
    Form,
    Formula,
    Leaf,
    Literal,
    choose,
    fits,
    formula_of,
    is_uniform,
    move,
    move_formula,
    widen,
)
from sage_compiler.passes.normalize import argument, operation, tensor_of

Number: TypeAlias = int | float | SymInt

_SYNONYMS: Final = {
    "absolute": "abs",
    "bitwise_and": "and",
    "bitwise_not": "not",
    "bitwise_or": "or",
    "divide": "div",
    "greater": "gt",
    "greater_equal": "ge",
    "iadd": "add",
    "iand": "and",
    "imul": "mul",
    "inv": "not",
    "invert": "not",
    "ior": "or",
    "isub": "sub",
    "itruediv": "div",
    "less": "lt",
    "less_equal": "le",
    "logical_and": "and",
    "logical_not": "not",
    "logical_or": "or",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "radd": "add",
    "rand": "and",
    "rmul": "mul",
    "ror": "or",
    "subtract": "sub",
    "true_divide": "div",
    "truediv": "div",
}


def name_of(node: fx.Node) -> str:
    """The name of what a node computes, the same for all its spellings; "" if it is no call."""
    if node.op not in ("call_function", "call_method"):
        return ""
    name = operation(node)
    if name.startswith("__") and name.endswith("__"):
        name = name[2:-2]
    elif name.endswith("_"):
        name = name[:-1]
    return _SYNONYMS.get(name, name)


@dataclass(frozen=True, slots=True)
class Call:
    """One operation whose result is to be read as a form.

    Attributes:
        node: the operation, maybe one in place.
        result: the traced result.
        form_of: the form that an argument has when ``node`` reads it.
    """

    node: fx.Node
    result: Tensor
    form_of: Callable[[object], Form | None]

    @property
    def name(self) -> str:
        return name_of(self.node)

    @property
    def rank(self) -> int:
        return self.result.dim()

    def given(
        self, at: int, *names: str, default: Any = None
    ) -> Any:  # whatever the call holds there
        """One argument, however it was passed."""
        for name in names:
            if name in self.node.kwargs:
                return self.node.kwargs[name]
        return argument(self.node, at, "", default)

    def source(self) -> fx.Node | None:
        """The first argument, where it is a known tensor."""
        found = self.given(0, "input", "self")
        return found if tensor_of(found) is not None else None

    def number(self, given: object) -> Number | None:
        """A number of the call: known, or a symbol for a size."""
        if isinstance(given, fx.Node):
            given = given.meta.get("example_value", given.meta.get("val"))
            if not isinstance(given, (int, SymInt)):
                return None
        if isinstance(given, SymInt):
            known = as_number(given)
            return given if known is None else known
        return given if isinstance(given, (int, float)) else None

    def uniform(self, given: object) -> Choice | None:
        """A number, or a tensor that holds one everywhere, as the result's dtype holds it."""
        form = self.form_of(given)
        number = form.inside if isinstance(form, Choice) and is_uniform(form) else None
        if number is None:
            found = self.number(given)
            if found is None or isinstance(found, SymInt):
                return None
            number = found
        number = held_by(self.result.dtype, number)
        return None if number is None else Choice(TRUE, number, number)

    def raw(self, given: object) -> Choice | None:
        """A tensor as a choice in the result's dims, its numbers as they are.

        Every bool tensor is one; others may not be.
        """
        tensor = tensor_of(given)
        if tensor is None:
            return None
        if tensor.dtype == torch.bool:
            formula = self.formula(given)
            return None if formula is None else choose(formula, True, False)
        form = self.form_of(given)
        if not isinstance(form, Choice):
            return None
        moved = move(form, widen(tensor.dim(), self.rank))
        return moved if isinstance(moved, Choice) else None

    def choice(self, given: object) -> Choice | None:
        """A tensor or a number as a choice in the result's dims and dtype."""
        found = self.uniform(given) if tensor_of(given) is None else self.raw(given)
        if found is None:
            return None
        inside, outside = (held_by(self.result.dtype, n) for n in (found.inside, found.outside))
        return None if inside is None or outside is None else choose(found.formula, inside, outside)

    def affine(self, given: object) -> Affine | None:
        """A tensor of integers or an integer as an affine function in the result's dims."""
        number = self.number(given)
        if isinstance(number, (int, SymInt)):
            constant = Affine((0,) * self.rank, number)
            return constant if fits(constant) else None
        tensor, form = tensor_of(given), self.form_of(given)
        if tensor is None or tensor.is_floating_point() or tensor.dtype == torch.bool:
            return None
        if isinstance(form, Choice) and is_uniform(form):
            return Affine((0,) * self.rank, int(form.inside))
        if not isinstance(form, Affine):
            return None
        moved = move(form, widen(tensor.dim(), self.rank))
        assert isinstance(moved, Affine)
        return moved

    def formula(self, given: object) -> Formula | None:
        """Where a bool argument is true, in the result's dims; None if it is no bool tensor."""
        tensor = tensor_of(given)
        if not isinstance(given, fx.Node) or tensor is None or tensor.dtype != torch.bool:
            return None
        leaf = Leaf(given, self.node, tuple(range(tensor.dim())))
        found = formula_of(self.form_of(given))
        if found is None:
            found = Formula((Literal(None, leaf),), True)
        elif len(found.literals) == 1 and found.literals[0].leaf is None:
            found = Formula((Literal(found.literals[0].fact, leaf),), found.every)
        return move_formula(found, widen(tensor.dim(), self.rank))


def held_by(dtype: torch.dtype, number: float) -> float | None:
    """The number after a cast to ``dtype``; None where that would not be a number like it."""
    if isinstance(number, float) and not dtype.is_floating_point and not number.is_integer():
        return None
    wide = torch.float64 if isinstance(number, float) else torch.int64
    with real_tensors():
        return torch.tensor(number, dtype=wide).to(dtype).item()


def computed(call: Call) -> Choice | None:
    """An elementwise operation on choices of one formula: it is computed for either side.

    None where two arguments depend on different formulas, or one is not known.
    """
    choices: dict[fx.Node, Choice] = {}
    for source in call.node.all_input_nodes:
        if tensor_of(source) is not None:
            found = call.raw(source)
            if found is None:
                return None
            choices[source] = found
    formulas = [each.formula for each in choices.values() if not each.formula.is_true]
    if len(formulas) > 1:
        return None
    inside = _element(call, {node: each.inside for node, each in choices.items()})
    outside = _element(call, {node: each.outside for node, each in choices.items()})
    if inside is None or outside is None:
        return None
    return choose(formulas[0] if formulas else TRUE, inside, outside)


def _element(call: Call, numbers: dict[fx.Node, float]) -> float | None:
    """What the operation computes from these numbers, with tensors of the traced dtypes."""
    values: dict[fx.Node, Any] = {}
    with real_tensors():
        for node in call.node.all_input_nodes:
            tensor = tensor_of(node)
            if tensor is None:
                values[node] = call.number(node)
                if not isinstance(values[node], int):
                    return None
            else:
                # Its rank counts when dtypes are promoted.
                values[node] = torch.full((1,) * tensor.dim(), numbers[node], dtype=tensor.dtype)
        result = run(call.node, values)
    if not isinstance(result, Tensor) or result.dtype != call.result.dtype:
        return None
    return result.item()
