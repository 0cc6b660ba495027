"""One tensor for all masks and biases that remain explicit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import fx

from sage_compiler.passes.masks import Term, TermKind
from sage_compiler.passes.normalize import tensor_of
from sage_compiler.passes.values import Apply, Value

_aten = torch.ops.aten
# Added to a score of ordinary size, this or less replaces it: float32 keeps no digit of the score.
ABSORBING: Final = -5e8


def compose(terms: Sequence[Term], dtype: torch.dtype) -> Value:
    """The terms as one mask for the operator, applied in their order.

    Bool, True = visible, when every term only hides; else additive, in ``dtype`` or float32.
    """
    if all(term.kind is not TermKind.ADDITIVE and term.fill == -math.inf for term in terms):
        visible = _visible(terms[0])
        for term in terms[1:]:
            visible = Apply(_aten.logical_and.default, (visible, _visible(term)))
        return visible
    single = len(terms) == 1 and terms[0].kind is TermKind.ADDITIVE
    wanted = dtype if single and _dtype(terms[0].node) == dtype else torch.float32
    mask: Value | None = None
    for term in terms:
        if term.kind is TermKind.ADDITIVE:
            bias = _value(term)
            if _dtype(term.node) != wanted:
                bias = Apply(_aten._to_copy.default, (bias,), (("dtype", wanted),))
            mask = bias if mask is None else Apply(_aten.add.Tensor, (mask, bias))
            continue
        hidden = _hidden(term)
        if mask is None:
            mask = Apply(_aten.zeros_like.default, (hidden,), (("dtype", wanted),))
        mask = Apply(_aten.masked_fill.Scalar, (mask, hidden, term.fill))
    assert mask is not None
    return mask


@dataclass(frozen=True, slots=True)
class Explicit:
    """What remains explicit of the masks, for a query that is zero in some rows.

    Attributes:
        mask: for the operator.
        replaced: (..., Lq, 1) bool, the rows in which all scores are replaced by numbers; None
            where there are no such rows. The softmax of such a row does not depend on the query,
            which must be zero there: then the row is what it was, and so are its gradients.
        alive: whether no row is without a visible key.
    """

    mask: Value
    replaced: Value | None = None
    alive: bool = False


def explicit(terms: Sequence[Term], dtype: torch.dtype) -> Explicit:
    """The terms as one mask, those with finite fills included."""
    replacing = [term for term in terms if term.kind is not TermKind.ADDITIVE]
    fills = {term.fill for term in replacing}
    if fills <= {-math.inf}:
        return Explicit(compose(terms, dtype))
    hidden = _hidden(replacing[0])
    for term in replacing[1:]:
        hidden = Apply(_aten.logical_or.default, (hidden, _hidden(term)))
    rows = Apply(_aten.all.dim, (hidden, -1, True))
    if len(fills) == 1 and len(replacing) == len(terms):
        # Beside a visible key the others weigh nothing; without one all weigh the same.
        visible = Apply(_aten.logical_not.default, (hidden,))
        return Explicit(Apply(_aten.logical_or.default, (visible, rows)), rows, alive=True)
    mask = compose(terms, dtype)
    # A softmax does not see what is subtracted from a whole row, but float32 keeps more digits.
    most = Apply(_aten.amax.default, (mask, [-1], True))
    shifted = Apply(_aten.sub.Tensor, (mask, most))
    finite = Apply(_aten.logical_and.default, (rows, Apply(_aten.isfinite.default, (most,))))
    return Explicit(Apply(_aten.where.self, (finite, shifted, mask)), rows)


def _value(term: Term) -> Value:
    return term.node if term.value is None else term.value


def _visible(term: Term) -> Value:
    value = _value(term)
    if term.kind is TermKind.VISIBLE:
        return value
    return Apply(_aten.logical_not.default, (value,))


def _hidden(term: Term) -> Value:
    value = _value(term)
    if term.kind is TermKind.HIDDEN:
        return value
    return Apply(_aten.logical_not.default, (value,))


def _dtype(node: fx.Node) -> torch.dtype:
    tensor = tensor_of(node)
    assert tensor is not None
    return tensor.dtype
