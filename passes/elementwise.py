"""Rules for what is computed element by element: constants, positions, comparisons, choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, TypeAlias

import torch
from torch import SymInt, fx

from sage_compiler.passes.axes import is_one
from sage_compiler.passes.bands import known
from sage_compiler.passes.calls import Call, Number, computed, held_by
from sage_compiler.passes.forms import (
    TRUE,
    Affine,
    Choice,
    Distance,
    Form,
    Formula,
    Leaf,
    Part,
    Sum,
    atoms,
    choose,
    combine,
    compare,
    conjoin,
    disjoin,
    invert,
    move,
    same_number,
    widen,
)
from sage_compiler.passes.normalize import tensor_of

Rule: TypeAlias = Callable[[Call], Form | None]


# --- constants and positions ----------------------------------------------------------------


def _arange(call: Call) -> Form | None:
    given = [call.number(part) for part in call.node.args]
    names = ("end",) if len(given) == 1 else ("start", "end", "step")
    numbers = dict(zip(names, given, strict=False))
    numbers |= {
        name: call.number(call.node.kwargs[name])
        for name in ("start", "end", "step")
        if name in call.node.kwargs
    }
    start, step = numbers.get("start", 0), numbers.get("step", 1)
    if not isinstance(start, (int, SymInt)) or not isinstance(step, int):
        return None
    return Affine((0 if is_one(call.result.shape[0]) else step,), start)


def _filled(value: Number | None, call: Call) -> Form | None:
    if value is None or isinstance(value, SymInt):
        return None
    number = held_by(call.result.dtype, value)
    return None if number is None else Choice(TRUE, number, number)


def _full(at: int) -> Rule:
    return lambda call: _filled(call.number(call.given(at, "fill_value", "value")), call)


def _refill(call: Call) -> Form | None:
    """A tensor overwritten wholly."""
    return None if call.form_of(call.source()) is None else _full(1)(call)


def _scalar(call: Call) -> Form | None:
    """torch.tensor(number)."""
    return _filled(call.number(call.given(0, "data", "s")), call)


# --- arithmetic -----------------------------------------------------------------------------


def _add(sign: int) -> Rule:
    def rule(call: Call) -> Form | None:
        alpha = call.node.kwargs.get("alpha", 1)
        found = computed(call)
        if found is not None or not isinstance(alpha, int):
            return found
        first, second = call.given(0, "input", "self"), call.given(1, "other")
        a, b = call.affine(first), call.affine(second)
        if a is not None and b is not None:
            return combine(a, b, sign * alpha)
        return _sum(call, first, second) if sign * alpha == 1 else None

    return rule


def _rsub(call: Call) -> Form | None:
    found = computed(call)
    if found is not None or call.node.kwargs.get("alpha", 1) != 1:
        return found
    a, b = call.affine(call.given(0, "input", "self")), call.affine(call.given(1, "other"))
    return None if a is None or b is None else combine(b, a, -1)


MAX_PARTS: Final = 16  # longer sums are not followed, so that cost stays linear


def _sum(call: Call, first: object, second: object) -> Form | None:
    """Two tensors of floating point added."""
    a, b = _part(call, first), _part(call, second)
    if a is None or b is None or atoms((a, b)) > MAX_PARTS:
        return None
    return Sum((a, b))


def _part(call: Call, given: object) -> Part | None:
    tensor = tensor_of(given)
    if not isinstance(given, fx.Node) or tensor is None or not tensor.is_floating_point():
        return None
    form = call.form_of(given)
    choice = form if isinstance(form, Choice) else None
    leaf = Leaf(given, call.node, tuple(range(tensor.dim())))
    part = Part(leaf, choice, form.parts if isinstance(form, Sum) else ())
    moved = move(Sum((part,)), widen(tensor.dim(), call.rank))
    assert isinstance(moved, Sum)
    return moved.parts[0]


def _multiply(call: Call) -> Form | None:
    found = computed(call)
    if found is not None:
        return found
    first, second = call.given(0, "input", "self"), call.given(1, "other")
    a, b = call.affine(first), call.affine(second)
    if a is not None and b is not None:
        return _scaled(a, b) or _scaled(b, a)
    return _both(call.choice(first), call.choice(second))


def _scaled(affine: Affine, factor: Affine) -> Affine | None:
    """An affine function times an integer."""
    offset = factor.offset
    if any(factor.slopes) or not isinstance(offset, int):
        return None
    return Affine(tuple(slope * offset for slope in affine.slopes), affine.offset * offset)


def _both(a: Choice | None, b: Choice | None) -> Form | None:
    """The product of two masks of zeros and ones."""
    if a is None or b is None:
        return None
    formulas = [_where_one(each) for each in (a, b)]
    if formulas[0] is None or formulas[1] is None:
        return None
    formula = conjoin(formulas[0], formulas[1])
    return None if formula is None else choose(formula, 1, 0)


def _where_one(choice: Choice) -> Formula | None:
    if (choice.inside, choice.outside) == (1, 0):
        return choice.formula
    return invert(choice.formula) if (choice.inside, choice.outside) == (0, 1) else None


def _negate(call: Call) -> Form | None:
    affine = call.affine(call.source())
    if affine is None:
        return computed(call)
    return Affine(tuple(-slope for slope in affine.slopes), -affine.offset)


def _magnitude(call: Call) -> Form | None:
    affine = call.affine(call.source())
    return computed(call) if affine is None else Distance(affine)


# --- comparisons ----------------------------------------------------------------------------


def _at_most(a: Affine, b: Affine, call: Call) -> Formula:
    return compare(combine(b, a, -1), call.result.shape)


def _within(distance: Affine, limit: Affine, call: Call) -> Formula | None:
    """|distance| <= limit."""
    zero = Affine((0,) * call.rank, 0)
    below, above = (combine(limit, distance, sign) for sign in (1, -1))
    return conjoin(_at_most(zero, below, call), _at_most(zero, above, call))


def _less(call: Call, first: object, second: object, *, strictly: bool) -> Formula | None:
    """first <= second, or first < second, of integers."""
    a, b = call.affine(first), call.affine(second)
    step = Affine((0,) * call.rank, -1 if strictly else 0)
    if a is not None and b is not None:
        return _at_most(a, combine(b, step), call)
    if b is not None:
        distance = _distance(call, first)
        return None if distance is None else _within(distance, combine(b, step), call)
    if a is not None:
        distance = _distance(call, second)
        if distance is None:
            return None
        inside = _within(distance, combine(a, Affine(step.slopes, 0 if strictly else -1)), call)
        return None if inside is None else invert(inside)
    return None


def _distance(call: Call, given: object) -> Affine | None:
    form, tensor = call.form_of(given), tensor_of(given)
    if not isinstance(form, Distance) or tensor is None:
        return None
    moved = move(form, widen(tensor.dim(), call.rank))
    assert isinstance(moved, Distance)
    return moved.of


def _comparison(decide: Callable[[Call, object, object], Formula | None]) -> Rule:
    def rule(call: Call) -> Form | None:
        found = computed(call)
        if found is not None or call.result.dtype != torch.bool:
            return found
        first, second = call.given(0, "input", "self"), call.given(1, "other")
        formula = decide(call, first, second)
        return None if formula is None else choose(formula, True, False)

    return rule


def _equal(call: Call, first: object, second: object) -> Formula | None:
    a, b = call.affine(first), call.affine(second)
    if a is None or b is None:
        return None
    return conjoin(_at_most(a, b, call), _at_most(b, a, call))


def _unequal(call: Call, first: object, second: object) -> Formula | None:
    equal = _equal(call, first, second)
    return None if equal is None else invert(equal)


# --- logic and choices ----------------------------------------------------------------------


def _logic(join: Callable[[Formula, Formula], Formula | None]) -> Rule:
    def rule(call: Call) -> Form | None:
        a, b = call.formula(call.given(0, "input", "self")), call.formula(call.given(1, "other"))
        formula = None if a is None or b is None else join(a, b)
        return None if formula is None else choose(formula, True, False)

    return rule


def select(formula: Formula, chosen: Choice, other: Choice) -> Form | None:
    """``chosen`` where the formula holds, ``other`` elsewhere, if that is one choice again."""
    if formula.is_true or formula.is_false:
        return chosen if formula.is_true else other
    if other.formula.is_true:
        return _replaced(invert(formula), chosen, other.inside)
    return _replaced(formula, other, chosen.inside) if chosen.formula.is_true else None


def _replaced(where: Formula, choice: Choice, number: float) -> Form | None:
    """A choice whose elements are ``number`` where a formula holds."""
    if choice.formula.is_true:
        return choose(where, number, choice.inside)
    if same_number(number, choice.inside):
        formula = disjoin(choice.formula, where)
        return None if formula is None else choose(formula, number, choice.outside)
    if same_number(number, choice.outside):
        formula = conjoin(choice.formula, invert(where))
        return None if formula is None else choose(formula, choice.inside, number)
    return None


def _selected(call: Call, condition: object, chosen: object, other: object) -> Form | None:
    formula, a, b = call.formula(condition), call.choice(chosen), call.choice(other)
    return None if formula is None or a is None or b is None else select(formula, a, b)


def _where(call: Call) -> Form | None:
    first, second, third = (
        call.given(at, name) for at, name in enumerate(("condition", "input", "other"))
    )
    if call.node.op == "call_method":  # tensor.where(condition, other): tensor comes first
        first, second = call.given(1, "condition"), call.node.args[0]
        third = call.given(2, "other")
    return _selected(call, first, second, third)


def _masked_fill(call: Call) -> Form | None:
    return _selected(call, call.given(1, "mask"), call.given(2, "value"), call.source())


def _assign(call: Call) -> Form | None:
    """tensor[mask] = number."""
    target, index, value = call.node.args
    a, b = tensor_of(target), tensor_of(index)
    if a is None or b is None or b.dtype != torch.bool or b.dim() != a.dim():
        return None
    return _selected(call, index, value, target)


def _triangle(upper: bool) -> Rule:
    def rule(call: Call) -> Form | None:
        diagonal, source = call.number(call.given(1, "diagonal", default=0)), call.source()
        choice, zero = call.choice(source), held_by(call.result.dtype, 0)
        if not isinstance(diagonal, (int, SymInt)) or choice is None or zero is None:
            return None
        sizes = call.result.shape
        ends = [0 if is_one(size) else step for size, step in zip(sizes[-2:], (1, -1), strict=True)]
        slopes = (*[0] * (call.rank - 2), *ends)
        fact = Affine(slopes, diagonal)  # diagonal + query - key >= 0: the lower triangle
        if upper:
            fact = Affine(tuple(-slope for slope in slopes), -diagonal)
        return select(compare(fact, sizes), choice, Choice(TRUE, zero, zero))

    return rule


# --- along a dim ----------------------------------------------------------------------------


def _running_sum(call: Call) -> Form | None:
    """The sums of a constant integer: positions."""
    source, dim = call.uniform(call.source()), call.number(call.given(1, "dim"))
    if source is None or not isinstance(dim, int) or not call.rank:
        return None
    if source.inside == 0 or is_one(call.result.shape[dim]):
        return source
    if call.result.is_floating_point():
        return None
    number = int(source.inside)
    slopes = [0] * call.rank
    slopes[dim] = number
    return Affine(tuple(slopes), number)


def _difference(call: Call) -> Form | None:
    """Neighbours subtracted, the first one from what is prepended: constant for positions."""
    order, dim = call.given(1, "n", default=1), call.given(2, "dim", default=-1)
    source, before = call.affine(call.source()), call.affine(call.given(3, "prepend"))
    if order != 1 or source is None or before is None or not isinstance(dim, int):
        return None
    added = tensor_of(call.given(3, "prepend"))
    if call.given(4, "append") is not None or added is None or not is_one(added.shape[dim]):
        return None
    step = source.slopes[dim]
    if is_one(call.result.shape[dim]):
        return combine(source, before, -1)
    gap = combine(source, before, -1)
    rest = [slope for at, slope in enumerate(gap.slopes) if at != dim % call.rank]
    if any(rest) or not known(gap.offset == step):
        return None
    return Affine((0,) * call.rank, step)


RULES: Final[Mapping[str, Rule]] = {
    "arange": _arange,
    "zeros": lambda call: _filled(0, call),
    "new_zeros": lambda call: _filled(0, call),
    "zeros_like": lambda call: _filled(0, call),
    "ones": lambda call: _filled(1, call),
    "new_ones": lambda call: _filled(1, call),
    "ones_like": lambda call: _filled(1, call),
    "full": _full(1),
    "full_like": _full(1),
    "new_full": _full(2),
    "fill": _refill,
    "tensor": _scalar,
    "scalar_tensor": _scalar,
    "add": _add(1),
    "sub": _add(-1),
    "rsub": _rsub,
    "mul": _multiply,
    "div": computed,
    "clamp": computed,
    "isfinite": computed,
    "isinf": computed,
    "maximum": computed,
    "minimum": computed,
    "nan_to_num": computed,
    "xor": computed,
    "neg": _negate,
    "abs": _magnitude,
    "le": _comparison(lambda call, a, b: _less(call, a, b, strictly=False)),
    "lt": _comparison(lambda call, a, b: _less(call, a, b, strictly=True)),
    "ge": _comparison(lambda call, a, b: _less(call, b, a, strictly=False)),
    "gt": _comparison(lambda call, a, b: _less(call, b, a, strictly=True)),
    "eq": _comparison(_equal),
    "ne": _comparison(_unequal),
    "and": _logic(conjoin),
    "or": _logic(disjoin),
    "not": computed,
    "where": _where,
    "masked_fill": _masked_fill,
    "setitem": _assign,
    "tril": _triangle(upper=False),
    "triu": _triangle(upper=True),
    "cumsum": _running_sum,
    "diff": _difference,
}
