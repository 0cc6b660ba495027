"""The masks and biases of one attention, taken apart.

A bool mask is a conjunction, an additive one a sum of biases and of masks that add 0 where a key is
visible and ``fill`` where it is hidden. Each piece is a constant, a comparison of positions, or a
tensor of the graph of which nothing is known.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, TypeAlias

import torch
from torch import Tensor, fx

from sage_compiler.passes.axes import Size, is_one
from sage_compiler.passes.bands import Band, known, smallest
from sage_compiler.passes.constants import Constant, lowest_fill, read
from sage_compiler.passes.effects import Effects
from sage_compiler.passes.folding import ConstantFolder, is_held, signature
from sage_compiler.passes.forms import (
    FALSE,
    TRUE,
    Affine,
    Choice,
    Formula,
    Leaf,
    Literal,
    Part,
    Sum,
    as_conjunction,
    formula_of,
    invert,
    least,
)
from sage_compiler.passes.normalize import tensor_of
from sage_compiler.passes.positions import Positions
from sage_compiler.passes.values import Value

_CHEAP: Final = 1 << 22  # masks with more entries are proved without computing them, if possible


class TermKind(StrEnum):
    """What the values of a mask mean."""

    VISIBLE = "visible"  # bool: True where a key is visible
    HIDDEN = "hidden"  # bool: True where a key is hidden
    ADDITIVE = "additive"  # float: added to the scores


@dataclass(frozen=True, slots=True)
class Term:
    """One mask or bias of a site.

    Attributes:
        node: a tensor whose last two dims broadcast against (Lq, Lk), the others against anything.
        kind: what its values mean.
        reader: the node that reads it: the mask's value is the one that it has there.
        fill: for VISIBLE and HIDDEN, the score that a hidden position gets: -inf, or a finite
            number so low that its weight is zero beside any live key (finfo.min, -1e9).
        value: how to build it so that it broadcasts to (B, H, Lq, Lk); None: ``node`` as it is.
            Only terms without it are split into parts.
    """

    node: fx.Node
    kind: TermKind
    reader: fx.Node
    fill: float = -math.inf
    value: Value | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Conjunct:
    """One of the conditions that a visible position meets.

    Attributes:
        band: what it was proved to be; None: it stays explicit.
        leaf: the bool tensor that says it, where there is one.
        constant: its values, where they are known.
        origin: where a proof by its values comes from.
    """

    band: Band | None
    leaf: Leaf | None
    constant: Constant | None = None
    origin: str = ""


@dataclass(frozen=True, eq=False, slots=True)
class Piece:
    """One mask or one bias.

    Attributes:
        conjuncts: what visible positions meet; None when it is not known what it hides.
        fill: the score that hidden positions get, or get added.
        leaf: the tensor itself, whatever is proved of it.
        is_bias: it adds other numbers than 0 to visible scores.
        bound: the largest magnitude of these; inf: not known.
        is_finite: False when it holds NaN or +inf somewhere.
        constant: its values, where they are known.
    """

    conjuncts: tuple[Conjunct, ...] | None
    fill: float
    leaf: Leaf
    is_bias: bool = False
    bound: float = 0.0
    is_finite: bool = True
    constant: Constant | None = None


@dataclass(frozen=True, eq=False, slots=True)
class Group:
    """Masks and biases whose sum is a tensor of the graph."""

    members: tuple[Piece | Group, ...]
    leaf: Leaf


Tree: TypeAlias = Piece | Group


def pieces_of(tree: Tree) -> Iterator[Piece]:
    """The masks and biases of a sum, in order."""
    if isinstance(tree, Piece):
        yield tree
    else:
        for member in tree.members:
            yield from pieces_of(member)


class Reader:
    """What is known of the masks of one graph. The graph must not change meanwhile."""

    def __init__(self, effects: Effects) -> None:
        self.effects = effects
        self.folder = ConstantFolder(effects)
        self.positions = Positions(effects)
        self._looked_at: dict[tuple[object, ...], Constant | None] = {}
        self._folds = True

    def constant(self, leaf: Leaf, query_length: Size, key_length: Size) -> Constant | None:
        """A mask's values as (..., Lq, Lk), inverted where the leaf is; None if not constant."""
        if not (isinstance(query_length, int) and isinstance(key_length, int)):
            return None
        if not (self._folds and is_held(query_length * key_length)):
            return None
        cone = self.folder.cone(leaf.node, leaf.reader)
        if cone is None:
            return None
        text = signature(leaf.node, cone)
        key = (text, leaf.dims, leaf.inverted, query_length, key_length)
        if key not in self._looked_at:
            value = self.folder.value(leaf.node, cone)
            seen = None if value is None else _seen(value, leaf)
            self._looked_at[key] = None if seen is None else read(seen, query_length, key_length)
        return self._looked_at[key]

    def count(self, leaf: Leaf) -> int:
        """How many nodes a constant is computed by."""
        return len(self.folder.cone(leaf.node, leaf.reader) or ())

    def pieces(self, term: Term, query_length: Size, key_length: Size) -> tuple[Piece, ...]:
        """The masks and biases of one term, in order."""
        return tuple(pieces_of(self.tree(term, query_length, key_length)))

    def tree(self, term: Term, query_length: Size, key_length: Size) -> Tree:
        """The pieces of one term."""
        static = isinstance(query_length, int) and isinstance(key_length, int)
        if static and query_length * key_length > _CHEAP:
            blind = copy.copy(self)
            blind._folds = False
            found = _tree(term, blind, query_length, key_length)
            if all(_is_proved(piece) for piece in pieces_of(found)):
                return found
        return _tree(term, self, query_length, key_length)


def _is_proved(piece: Piece) -> bool:
    """Whether a piece is known to be bands and no more."""
    conjuncts = piece.conjuncts
    known_bands = conjuncts is not None and all(each.band is not None for each in conjuncts)
    return known_bands and not piece.is_bias


def _seen(value: Tensor, leaf: Leaf) -> Tensor | None:
    """A real tensor through the view of a leaf."""
    if leaf.inverted and value.dtype != torch.bool:
        return None
    moved = [dim for dim in leaf.dims if dim is not None]
    rest = [dim for dim in range(value.dim()) if dim not in moved]
    shape = [1 if dim is None else value.shape[dim] for dim in leaf.dims]
    value = value.permute(*rest, *moved)[(0,) * len(rest)] if moved or rest else value
    for at, dim in enumerate(leaf.dims):
        if dim is None:
            value = value.unsqueeze(at)
    assert list(value.shape) == shape
    return ~value if leaf.inverted else value


# --- from terms to pieces -------------------------------------------------------------------


def _tree(term: Term, reader: Reader, query: Size, key: Size) -> Tree:
    tensor = tensor_of(term.node)
    assert tensor is not None
    leaf = Leaf(term.node, term.reader, tuple(range(tensor.dim())))
    if not _fits(tensor, query, key):
        return _unknown(leaf, term)
    if term.kind is TermKind.ADDITIVE:
        form = reader.positions.form(term.node, term.reader) if tensor.is_floating_point() else None
        part = Part(leaf, form if isinstance(form, Choice) else None)
        if isinstance(form, Sum):
            part = Part(leaf, None, form.parts) if len(form.parts) > 1 else form.parts[0]
        return _additive(part, reader, query, key)
    hides = term.kind is TermKind.HIDDEN
    found = reader.constant(replace(leaf, inverted=hides), query, key)
    if found is not None and found.band is not None:
        return _constant_piece(found, term.fill, leaf, replace(leaf, inverted=hides), reader)
    formula = formula_of(reader.positions.form(term.node, term.reader))
    if formula is None:
        formula = Formula((Literal(None, leaf),), True)
    formula = invert(formula) if hides else formula
    return _formula_piece(formula, term.fill, leaf, found, reader, query, key)


def _fits(tensor: Tensor, query: Size, key: Size) -> bool:
    """Whether a mask's last dims are Lq and Lk, or broadcast to them."""
    lengths = (query, key)[2 - min(2, tensor.dim()) :]
    sizes = tensor.shape[-len(lengths) :] if lengths else ()
    return all(
        is_one(size) or size is length or known(size == length)
        for size, length in zip(sizes, lengths, strict=True)
    )


def _additive(part: Part, reader: Reader, query: Size, key: Size) -> Tree:
    """An additive mask, or a sum of such."""
    found = reader.constant(part.leaf, query, key)
    if found is not None and found.band is not None and (found.is_boolean or not part.parts):
        return _constant_piece(found, found.fill, part.leaf, None, reader)
    if part.parts:
        members = tuple(_additive(each, reader, query, key) for each in part.parts)
        return Group(members, part.leaf)
    if found is not None and part.choice is None:
        return _constant_piece(found, found.fill, part.leaf, None, reader)
    choice, tensor = part.choice, tensor_of(part.leaf.node)
    if choice is None or tensor is None:
        return Piece(None, -math.inf, part.leaf, is_bias=True, bound=math.inf)
    visible = _visible(choice, lowest_fill(tensor.dtype))
    if visible is not None:
        fill = min(choice.inside, choice.outside)
        return _formula_piece(visible, fill, part.leaf, found, reader, query, key)
    numbers = (choice.inside, choice.outside)
    is_finite = not any(math.isnan(number) or number == math.inf for number in numbers)
    bound = max(abs(number) for number in numbers) if is_finite else math.inf
    conjuncts = () if bound < math.inf else None
    return Piece(conjuncts, -math.inf, part.leaf, True, bound, is_finite, found)


def _unknown(leaf: Leaf, term: Term) -> Piece:
    """A mask of which only its kind is known."""
    if term.kind is TermKind.ADDITIVE:
        return Piece(None, -math.inf, leaf, is_bias=True, bound=math.inf)
    return Piece(None, term.fill, leaf)


def _visible(choice: Choice, lowest: float) -> Formula | None:
    """Where a mask adds 0, if it adds a very low number elsewhere."""
    inside, outside = choice.inside, choice.outside
    if choice.formula.is_true:
        return TRUE if inside == 0 else FALSE if inside <= lowest else None
    if inside == 0 and outside <= lowest:
        return choice.formula
    return invert(choice.formula) if outside == 0 and inside <= lowest else None


def _constant_piece(
    found: Constant, fill: float, leaf: Leaf, condition: Leaf | None, reader: Reader
) -> Piece:
    """A constant: a band, or a bias, whose band of -inf may be told from the rest.

    ``condition`` is true where keys are visible, if a bool tensor says that.
    """
    origin = f"folded from {reader.count(leaf)} constant nodes"
    conjuncts = None if found.band is None else (Conjunct(found.band, condition, found, origin),)
    return Piece(
        conjuncts,
        fill,
        leaf,
        is_bias=not found.is_boolean,
        bound=found.bound,
        is_finite=found.is_finite,
        constant=found,
    )


def _formula_piece(
    formula: Formula,
    fill: float,
    leaf: Leaf,
    constant: Constant | None,
    reader: Reader,
    query: Size,
    key: Size,
) -> Piece:
    """A mask that hides keys where a formula does not hold."""
    literals = as_conjunction(formula)
    if literals is None:
        conjuncts: tuple[Conjunct, ...] = (Conjunct(None, None),)
    else:
        conjuncts = tuple(_conjunct(each, reader, query, key) for each in literals)
    return Piece(conjuncts, fill, leaf, constant=constant)


def _conjunct(literal: Literal, reader: Reader, query: Size, key: Size) -> Conjunct:
    if literal.fact is not None:
        band = _band_of(literal.fact, query, key)
        if band is not None:
            return Conjunct(band, literal.leaf)
    if literal.leaf is None:
        return Conjunct(None, None)
    found = reader.constant(literal.leaf, query, key)
    if found is None:
        return Conjunct(None, literal.leaf)
    origin = f"folded from {reader.count(literal.leaf)} constant nodes"
    return Conjunct(found.band, literal.leaf, found, origin)


def _band_of(fact: Affine, query: Size, key: Size) -> Band | None:
    """The diagonals at which an affine function of the position is >= 0; None if no band."""
    *others, row, column = (0, 0, *fact.slopes)
    if any(others):
        return None
    if is_one(query) and row == 0:
        row = -column  # the one row is 0
    if is_one(key) and column == 0:
        column = -row
    if row == 0 and column == 0 and known(fact.offset >= 0):
        return Band()
    if (row, column) == (-1, 1):
        return smallest(Band(low=-fact.offset), query, key)
    if (row, column) == (1, -1):
        return smallest(Band(high=fact.offset), query, key)
    sizes = (query, key)
    return Band() if known(least(Affine((row, column), fact.offset), sizes) >= 0) else None
