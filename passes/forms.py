"""What the elements of a tensor are as functions of their index, whatever its sizes are.

Three forms are known. An ``Affine`` tensor of integers is a linear function of the index; a
``Choice`` holds one number where a formula holds and another where it does not; a ``Sum`` is
several tensors added. The literals of a formula are comparisons of affine functions (facts), or
bool tensors of the graph about which nothing is known.

A dim of size 1 has one index, 0: its slope is 0 by convention, so that broadcasting changes
nothing. Slopes and numbers are small enough for int32 not to wrap (``fits``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, TypeAlias

from torch import fx

from sage_compiler.passes.axes import Size, is_one
from sage_compiler.passes.bands import known

# Dims have fewer than 2^25 positions, so int32 does not wrap at these.
_LARGEST_SLOPE: Final = 1 << 5
_LARGEST_OFFSET: Final = 1 << 30
MAX_LITERALS: Final = 32  # longer formulas are not followed, so that cost stays linear

Dims: TypeAlias = tuple[int | None, ...]  # for each dim of a view the dim of its source, if any


@dataclass(frozen=True, eq=False, slots=True)
class Affine:
    """offset + the sum over dims of slope * index."""

    slopes: tuple[int, ...]
    offset: Size


@dataclass(frozen=True, eq=False, slots=True)
class Distance:
    """The magnitude of an affine function."""

    of: Affine


@dataclass(frozen=True, eq=False, slots=True)
class Leaf:
    """A tensor of the graph as it is at ``reader``, seen through a view that moves dims."""

    node: fx.Node
    reader: fx.Node
    dims: Dims
    inverted: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Literal:
    """True where ``fact`` is >= 0, and where ``leaf`` is; one of them may be missing."""

    fact: Affine | None
    leaf: Leaf | None


@dataclass(frozen=True, eq=False, slots=True)
class Formula:
    """A conjunction (``every``) or a disjunction. Empty ones are true and false."""

    literals: tuple[Literal, ...]
    every: bool

    @property
    def is_true(self) -> bool:
        return self.every and not self.literals

    @property
    def is_false(self) -> bool:
        return not self.every and not self.literals


TRUE: Final = Formula((), True)
FALSE: Final = Formula((), False)


@dataclass(frozen=True, eq=False, slots=True)
class Choice:
    """``inside`` where the formula holds, ``outside`` elsewhere; numbers as the tensor has them."""

    formula: Formula
    inside: float
    outside: float


@dataclass(frozen=True, eq=False, slots=True)
class Part:
    """A summand: a tensor of floating point, and its form where it is a choice or a sum itself."""

    leaf: Leaf
    choice: Choice | None = None
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, eq=False, slots=True)
class Sum:
    """Two tensors that are added; or one, through a view."""

    parts: tuple[Part, ...]


Form: TypeAlias = Affine | Distance | Choice | Sum


# --- numbers and choices --------------------------------------------------------------------


def same_number(a: float, b: float) -> bool:
    """Whether two numbers are equal, NaN to NaN, and 0 not to -0."""
    if math.isnan(a) or math.isnan(b):
        return math.isnan(a) and math.isnan(b)
    return a == b and math.copysign(1, a) == math.copysign(1, b)


def choose(formula: Formula, inside: float, outside: float) -> Choice:
    """A choice in its simplest form: one number has the formula TRUE."""
    if formula.is_false:
        return Choice(TRUE, outside, outside)
    if formula.is_true or same_number(inside, outside):
        return Choice(TRUE, inside, inside)
    return Choice(formula, inside, outside)


def is_uniform(form: Form | None) -> bool:
    """Whether all elements are the same known number."""
    return isinstance(form, Choice) and form.formula.is_true


def formula_of(form: Form | None) -> Formula | None:
    """Where a bool tensor is true."""
    if not isinstance(form, Choice):
        return None
    if form.formula.is_true:
        return TRUE if form.inside else FALSE
    if bool(form.inside) == bool(form.outside):
        return TRUE if form.inside else FALSE
    return form.formula if form.inside else invert(form.formula)


# --- logic ----------------------------------------------------------------------------------


def invert(formula: Formula) -> Formula:
    """Where the formula does not hold (De Morgan)."""
    return Formula(tuple(_inverted(each) for each in formula.literals), not formula.every)


def _inverted(literal: Literal) -> Literal:
    leaf, fact = literal.leaf, literal.fact
    if leaf is not None:
        leaf = replace(leaf, inverted=not leaf.inverted)
    return Literal(None if fact is None else _negated(fact), leaf)


def _negated(fact: Affine) -> Affine:
    """At least 0 where the fact is below: not x >= 0 is -x - 1 >= 0."""
    return Affine(tuple(-slope for slope in fact.slopes), -fact.offset - 1)


def conjoin(a: Formula, b: Formula) -> Formula | None:
    """Where both hold; None when that is no formula, or too long a one."""
    if a.is_false or b.is_false:
        return FALSE
    if a.is_true:
        return b
    if b.is_true:
        return a
    literals = a.literals + b.literals
    if not (_is_conjunction(a) and _is_conjunction(b)) or len(literals) > MAX_LITERALS:
        return None
    return Formula(literals, True)


def disjoin(a: Formula, b: Formula) -> Formula | None:
    """Where one of them holds; None when that is no formula, or too long a one."""
    both = conjoin(invert(a), invert(b))
    return None if both is None else invert(both)


def _is_conjunction(formula: Formula) -> bool:
    return formula.every or len(formula.literals) == 1


def as_conjunction(formula: Formula) -> tuple[Literal, ...] | None:
    """The literals that all must hold; None for a true disjunction."""
    return formula.literals if _is_conjunction(formula) and not formula.is_false else None


# --- affine functions -----------------------------------------------------------------------


def fits(affine: Affine) -> bool:
    """Whether slopes and a known offset are small enough for no integer type to wrap."""
    offset = affine.offset
    small = not isinstance(offset, int) or abs(offset) <= _LARGEST_OFFSET
    return small and all(abs(slope) <= _LARGEST_SLOPE for slope in affine.slopes)


def combine(a: Affine, b: Affine, factor: int = 1) -> Affine:
    """a + factor * b, dims aligned at the end."""
    rank = max(len(a.slopes), len(b.slopes))
    padded = [(0,) * (rank - len(each.slopes)) + each.slopes for each in (a, b)]
    slopes = tuple(x + factor * y for x, y in zip(*padded, strict=True))
    return Affine(slopes, a.offset + factor * b.offset)


def least(affine: Affine, sizes: Sequence[Size]) -> Size:
    """The smallest value over all indexes, or a lower bound of it where a size may be 0."""
    total = affine.offset
    for slope, size in zip(affine.slopes, sizes, strict=True):
        if slope < 0:
            total = total + slope * (size - 1)
    return total


def compare(fact: Affine, sizes: Sequence[Size]) -> Formula:
    """Where an affine function is >= 0."""
    if known(least(fact, sizes) >= 0):
        return TRUE
    if known(least(_negated(fact), sizes) >= 0):
        return FALSE
    return Formula((Literal(fact, None),), True)


# --- views ----------------------------------------------------------------------------------


def relabel(source: Sequence[Size], result: Sequence[Size]) -> Dims | None:
    """The dims of a view that only inserts and removes dims of size 1, or expands such dims.

    Dims of other sizes must follow each other in both; an expanded dim has none.
    """
    rest = [at for at, size in enumerate(source) if not is_one(size)]
    if len(result) >= len(source):  # an expansion aligns dims at the end
        shift = len(result) - len(source)
        aligned = list(zip(source, result[shift:], strict=True))
        if all(is_one(a) or _same(a, b) for a, b in aligned):
            kept = [None if is_one(a) else at for at, (a, _) in enumerate(aligned)]
            return (*[None] * shift, *kept)
    dims: list[int | None] = []
    for size in result:
        if is_one(size):
            dims.append(None)
        elif rest and _same(source[rest[0]], size):
            dims.append(rest.pop(0))
        else:
            return None
    return None if rest else tuple(dims)


def _same(a: Size, b: Size) -> bool:
    return a is b or known(a == b)


def move(form: Form, dims: Dims) -> Form:
    """The form of a view that only moves dims."""
    match form:
        case Affine():
            return _move_affine(form, dims)
        case Distance():
            return Distance(_move_affine(form.of, dims))
        case Choice():
            return _move_choice(form, dims)
        case Sum():
            return Sum(tuple(_move_part(part, dims) for part in form.parts))


def atoms(parts: Sequence[Part]) -> int:
    """How many tensors that are no sums are added."""
    return sum(atoms(part.parts) if part.parts else 1 for part in parts)


def _move_part(part: Part, dims: Dims) -> Part:
    choice = None if part.choice is None else _move_choice(part.choice, dims)
    parts = tuple(_move_part(each, dims) for each in part.parts)
    return Part(_move_leaf(part.leaf, dims), choice, parts)


def _move_choice(choice: Choice, dims: Dims) -> Choice:
    return replace(choice, formula=move_formula(choice.formula, dims))


def move_formula(formula: Formula, dims: Dims) -> Formula:
    """A formula in the indexes of a view that only moves dims."""

    def moved(literal: Literal) -> Literal:
        fact = None if literal.fact is None else _move_affine(literal.fact, dims)
        return Literal(fact, None if literal.leaf is None else _move_leaf(literal.leaf, dims))

    return Formula(tuple(moved(literal) for literal in formula.literals), formula.every)


def _move_affine(affine: Affine, dims: Dims) -> Affine:
    return Affine(tuple(0 if dim is None else affine.slopes[dim] for dim in dims), affine.offset)


def _move_leaf(leaf: Leaf, dims: Dims) -> Leaf:
    return replace(leaf, dims=tuple(None if dim is None else leaf.dims[dim] for dim in dims))


def widen(rank: int, wanted: int) -> Dims:
    """The dims of a tensor of one rank where it broadcasts against one of a higher rank."""
    return (*[None] * (wanted - rank), *range(rank))


def substitute(form: Form, indexes: Sequence[Affine], rank: int) -> Form | None:
    """The form of ``source[index, ...]``: each index of the source as a function of the new ones.

    None where a tensor of the graph would have to be indexed too.
    """
    match form:
        case Affine():
            return _substituted(form, indexes, rank)
        case Distance():
            return Distance(_substituted(form.of, indexes, rank))
        case Choice():
            literals = []
            for literal in form.formula.literals:
                if literal.fact is None:
                    return None
                literals.append(Literal(_substituted(literal.fact, indexes, rank), None))
            return replace(form, formula=Formula(tuple(literals), form.formula.every))
        case Sum():
            return None


def _substituted(affine: Affine, indexes: Sequence[Affine], rank: int) -> Affine:
    total = Affine((0,) * rank, affine.offset)
    for slope, index in zip(affine.slopes, indexes, strict=True):
        total = combine(total, index, slope)
    return total
