"""All masks of one attention together: which bands the operator says, and what stays explicit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import Tensor, fx

from sage_compiler.passes.axes import Size, is_one
from sage_compiler.passes.bands import Band, Window, express, keeps_rows_alive
from sage_compiler.passes.constants import Constant
from sage_compiler.passes.folding import real_tensors
from sage_compiler.passes.forms import Leaf
from sage_compiler.passes.normalize import tensor_of
from sage_compiler.passes.terms import (
    Conjunct,
    Group,
    Piece,
    Reader,
    Term,
    TermKind,
    Tree,
    pieces_of,
)
from sage_compiler.passes.values import Apply, Value

_aten = torch.ops.aten
# A fill is low beside a bias when it is that many times larger.
_MARGIN: Final = 4
# Any score added to this leaves it unchanged.
_ABSORBING: Final = -1e30
# Beside a number of that magnitude, scores in float16 do not overflow.
_SMALL: Final = 1e3


@dataclass(frozen=True, eq=False, slots=True)
class Explicit:
    """Something that remains to be applied: a term, and the piece that it is or belongs to.

    ``constant`` is its values, where they are known; ``shape`` its shape after ``term.value``.
    """

    term: Term
    piece: Piece
    constant: Constant | None
    shape: tuple[Size, ...] = ()


class Joint:
    """The pieces of all masks of one site, and what becomes of each."""

    def __init__(
        self, terms: Sequence[Term], query: Size, key: Size, reader: Reader, split: bool
    ) -> None:
        self.terms, self.query, self.key, self.reader = terms, query, key, reader
        self.split = split
        self.trees = [reader.tree(term, query, key) for term in terms]
        owned = [
            (term, piece)
            for term, tree in zip(terms, self.trees, strict=True)
            for piece in pieces_of(tree)
        ]
        self.pieces = [piece for _, piece in owned]
        self.fills = _effective_fills(owned)
        self.window, self.used = self._express()

    def _express(self) -> tuple[Window, set[Conjunct]]:
        """The operator's band, and the conjuncts that it says."""
        if not all(piece.is_finite for piece in self.pieces):
            return Window(), set()
        finite = self._finite_fills_exclude()
        candidates = [
            conjunct
            for piece in self.pieces
            for conjunct in piece.conjuncts or ()
            if conjunct.band is not None
            and (finite or self.fills[piece] == -math.inf or not conjunct.band.hides)
        ]
        bands = [conjunct.band for conjunct in candidates if conjunct.band is not None]
        window, said = express(bands, self.query, self.key)
        return window, {candidates[at] for at in said}

    def _finite_fills_exclude(self) -> bool:
        """Whether each row provably has a live key, beside which finite fills weigh nothing."""
        bands: list[Band] = []
        for piece in self.pieces:
            if piece.conjuncts is None or any(each.band is None for each in piece.conjuncts):
                return False
            bands.extend(each.band for each in piece.conjuncts if each.band is not None)
        bound = sum(piece.bound for piece in self.pieces)
        low = all(-fill >= _MARGIN * bound for fill in self.fills.values())
        return low and keeps_rows_alive(bands, self.query, self.key)

    def is_said(self, piece: Piece) -> bool:
        """Whether nothing of a piece remains to be applied."""
        said = piece.conjuncts is not None and all(each in self.used for each in piece.conjuncts)
        return said and not piece.is_bias

    def explicit(self) -> list[Explicit]:
        """What remains to be applied, in order."""
        found: list[Explicit] = []
        for term, tree in zip(self.terms, self.trees, strict=True):
            left, reduced = self._left(tree, term)
            if left and not (reduced and self.split and term.value is None):
                left = [self._whole(term, tree)]
            found.extend(left)
        return found

    def _whole(self, term: Term, tree: Tree) -> Explicit:
        """A given term as it is, or the smaller tensor that it was made of."""
        first = next(pieces_of(tree))
        constant = first.constant
        if isinstance(tree, Group):
            constant = self.reader.constant(tree.leaf, self.query, self.key)
        if not self.split or term.value is not None:
            return Explicit(term, first, constant)
        if constant is not None and constant.repeated:
            return _explicit(_at(term, tree.leaf), tree.leaf, first, constant)
        if isinstance(tree, Piece) and not tree.is_bias:
            small = self._condition(term, tree)
            if small is not None:
                return small
        if _is_smaller(tree.leaf, term.node):
            return _explicit(_at(term, tree.leaf), tree.leaf, first, constant)
        return Explicit(term, first, constant)

    def _condition(self, term: Term, piece: Piece) -> Explicit | None:
        """The bool tensor that a mask was made of, where that is better to read."""
        conjuncts = piece.conjuncts or ()
        if len(conjuncts) != 1 or conjuncts[0].leaf is None:
            return None
        leaf = conjuncts[0].leaf
        smaller = _is_smaller(leaf, term.node)
        if term.kind is TermKind.ADDITIVE:
            alone = len(self.pieces) - sum(self.is_said(each) for each in self.pieces) == 1
            # To add such a number is to replace the score by it.
            if piece.fill > -math.inf and not (smaller and alone and piece.fill <= _ABSORBING):
                return None
            fill = piece.fill
        elif smaller:
            fill = term.fill
        else:
            return None
        if leaf.inverted and not smaller:
            return None
        return _explicit(_condition_of(leaf, fill), leaf, piece, conjuncts[0].constant)

    def _left(self, tree: Tree, term: Term) -> tuple[list[Explicit], bool]:
        """What remains of a term or a part of one, and whether that is less than all of it.

        A sum is only taken apart where one addend remains: added in another order, numbers round
        otherwise, which shows where all of them are low.
        """
        if isinstance(tree, Piece):
            if self.is_said(tree):
                return [], True
            return self._rest(tree, term)
        found = [self._left(member, term) for member in tree.members]
        added = [any(each.term.kind is TermKind.ADDITIVE for each in left) for left, _ in found]
        if any(reduced for _, reduced in found) and sum(added) <= 1:
            return [each for left, _ in found for each in left], True
        whole = Term(tree.leaf.node, TermKind.ADDITIVE, tree.leaf.reader)
        constant = self.reader.constant(tree.leaf, self.query, self.key)
        return [_explicit(whole, tree.leaf, next(pieces_of(tree)), constant)], False

    def _rest(self, piece: Piece, term: Term) -> tuple[list[Explicit], bool]:
        """What remains of one piece: conditions that are tensors of their own, or all of it."""
        conjuncts = piece.conjuncts or ()
        rest = [each for each in conjuncts if each not in self.used]
        leaves = [each.leaf for each in rest if each.leaf is not None]
        excludes = not piece.is_bias and self.fills[piece] == -math.inf
        if not (excludes and 0 < len(rest) == len(leaves) < len(conjuncts)):
            whole = Term(piece.leaf.node, term.kind, piece.leaf.reader, term.fill)
            return [_explicit(whole, piece.leaf, piece, piece.constant)], False
        found = [
            _explicit(_condition_of(leaf, -math.inf), leaf, piece, conjunct.constant)
            for conjunct, leaf in zip(rest, leaves, strict=True)
        ]
        return found, True

    def is_live(self) -> bool:
        """Whether every row provably has a key whose score is not -inf in the end."""
        left = [piece for piece in self.pieces if not self.is_said(piece)]
        if not _stays_finite(left):
            return False
        bands = [each.band for each in self.used if each.band is not None]
        planes: list[Tensor] = []
        for piece in left:
            values = piece.constant
            if _is_low(piece):
                if values is not None and values.is_mixed:
                    return False
                continue
            if piece.conjuncts is None and values is None:
                return False
            for each in piece.conjuncts or ():
                if each.band is not None:
                    bands.append(each.band)
                elif each.constant is not None and each.constant.visible is not None:
                    planes.append(each.constant.visible)
                elif values is None:
                    return False
            if values is not None and values.visible is not None:
                planes.append(values.visible)
        if not planes:
            return keeps_rows_alive(bands, self.query, self.key)
        return _has_live_rows(bands, planes, self.query, self.key)


def _effective_fills(owned: Sequence[tuple[Term, Piece]]) -> dict[Piece, float]:
    """What hidden positions hold in the end: a later replacement undoes an earlier -inf."""
    fills = {}
    replaced = -math.inf
    for term, piece in reversed(owned):
        fills[piece] = max(piece.fill, replaced)
        hides = piece.conjuncts is None or any(
            each.band is None or each.band.hides for each in piece.conjuncts
        )
        if term.kind is not TermKind.ADDITIVE and hides:
            replaced = max(replaced, piece.fill)
    return fills


def _is_low(piece: Piece) -> bool:
    """Whether a mask hides by a number that is low but finite."""
    return not piece.is_bias and piece.fill > -math.inf


def _stays_finite(pieces: Sequence[Piece]) -> bool:
    """Whether no sum of finite numbers overflows to -inf: scores count as small."""
    half = any(
        (_is_low(piece) or piece.bound > _SMALL) and _dtype(piece.leaf.node) == torch.float16
        for piece in pieces
    )
    lows = sum(_is_low(piece) for piece in pieces)
    return not half and lows <= 1 and sum(piece.bound for piece in pieces) <= -_ABSORBING


def _has_live_rows(bands: list[Band], planes: list[Tensor], query: Size, key: Size) -> bool:
    if not (isinstance(query, int) and isinstance(key, int)):
        return False
    with real_tensors():
        visible = torch.ones(query, key, dtype=torch.bool)
        for band in bands:
            if band.low is not None:
                visible.triu_(int(band.low))
            if band.high is not None:
                visible.tril_(int(band.high))
        for plane in planes:
            visible = visible & plane
        return bool(visible.any(-1).all())


def _at(term: Term, leaf: Leaf) -> Term:
    return replace(term, node=leaf.node, reader=leaf.reader)


def _condition_of(leaf: Leaf, fill: float) -> Term:
    """A bool leaf that is true where keys are visible, as a term."""
    kind = TermKind.HIDDEN if leaf.inverted else TermKind.VISIBLE
    return Term(leaf.node, kind, leaf.reader, fill)


def _is_smaller(leaf: Leaf, node: fx.Node) -> bool:
    """Whether a tensor was expanded from a leaf."""
    tensor, small = tensor_of(node), tensor_of(leaf.node)
    assert tensor is not None and small is not None
    dims = (*[None] * (tensor.dim() - len(leaf.dims)), *leaf.dims)
    sizes = [1 if dim is None else small.shape[dim] for dim in dims]
    return any(is_one(a) and not is_one(b) for a, b in zip(sizes, tensor.shape, strict=True))


def _explicit(term: Term, leaf: Leaf, piece: Piece, constant: Constant | None) -> Explicit:
    """A term that is a leaf: its value builds the leaf's view, of a constant a small part."""
    tensor = tensor_of(leaf.node)
    assert tensor is not None
    value: Value = leaf.node
    sizes = [1 if dim is None else tensor.shape[dim] for dim in leaf.dims]
    for at in constant.repeated if constant is not None else ():
        dim = leaf.dims[at]
        if dim is not None:
            value = Apply(_aten.narrow.default, (value, dim, 0, 1))
            sizes[at] = 1
    value = _arranged(value, leaf.dims, tensor)
    if value is leaf.node:
        return Explicit(term, piece, constant)
    shape = tuple(sizes[len(sizes) - len(_needed(leaf.dims)) :])
    return Explicit(replace(term, value=value), piece, constant, shape)


def _needed(dims: Sequence[int | None]) -> list[int | None]:
    """The dims without leading ones that only broadcast."""
    found = list(dims)
    while found and found[0] is None:
        found.pop(0)
    return found


def _arranged(value: Value, dims: Sequence[int | None], tensor: Tensor) -> Value:
    """A value with its dims where a view has them, aligned at the end."""
    needed = _needed(dims)
    own = list(range(tensor.dim()))[-len(needed) :] if needed else []
    aligned = len(needed) <= tensor.dim() and all(
        dim == at or (dim is None and is_one(tensor.shape[at]))
        for dim, at in zip(needed, own, strict=False)
    )
    if aligned and all(is_one(size) for size in tensor.shape[: tensor.dim() - len(needed)]):
        return value
    used = [dim for dim in needed if dim is not None]
    rest = [dim for dim in range(tensor.dim()) if dim not in used]  # all of size 1
    if [*rest, *used] != list(range(tensor.dim())):
        value = Apply(_aten.permute.default, (value, [*rest, *used]))
    if rest:
        value = Apply(_aten.squeeze.dims, (value, list(range(len(rest)))))
    for at, dim in enumerate(needed):
        if dim is None:
            value = Apply(_aten.unsqueeze.default, (value, at))
    return value


def _dtype(node: fx.Node) -> torch.dtype | None:
    tensor = tensor_of(node)
    return None if tensor is None else tensor.dtype
