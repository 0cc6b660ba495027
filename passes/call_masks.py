"""The masks of calls that take two: one over queries and keys, and one that hides padding keys.

Shapes: B batch, L query length, S key length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from sage_compiler.passes.assembly import Unproved
from sage_compiler.passes.axes import Size, is_one, same
from sage_compiler.passes.forms import Choice
from sage_compiler.passes.masks import Analysis, analyze
from sage_compiler.passes.normalize import shape_of, tensor_of
from sage_compiler.passes.terms import Term, TermKind
from sage_compiler.passes.values import Apply, Value
from sage_compiler.passes.walk import Walk

_aten = torch.ops.aten


def known(node: fx.Node) -> Tensor:
    """The fake tensor of a node that was checked to have one."""
    tensor = tensor_of(node)
    assert tensor is not None
    return tensor


def kind_of(mask: fx.Node) -> TermKind:
    """What the values of a mask of torch.nn mean: True hides a key, numbers are added."""
    dtype = known(mask).dtype
    if dtype == torch.bool:
        return TermKind.HIDDEN
    if not dtype.is_floating_point:
        raise Unproved(f"a mask of {dtype}; bool or floating point is needed")
    return TermKind.ADDITIVE


def padding_term(mask: fx.Node, call: fx.Node, walk: Walk) -> Term:
    """A key padding mask (B, S) or (S,): True or -inf where a key is hidden from all queries."""
    kind, made_of = kind_of(mask), _bool_behind(mask, call, walk)
    if made_of is not None:
        return made_of
    return Term(mask, kind, call, value=as_row(mask, mask))


def as_row(value: Value, mask: fx.Node) -> Value | None:
    """A mask of the shape (B, S) as (B, 1, 1, S); None where it broadcasts as it is."""
    sizes = known(mask).shape
    if len(sizes) == 1 or is_one(sizes[0]):
        return None if value is mask else value
    return Apply(_aten.unsqueeze.default, (Apply(_aten.unsqueeze.default, (value, 1)), 1))


def _bool_behind(mask: fx.Node, call: fx.Node, walk: Walk) -> Term | None:
    """The bool tensor which an additive mask was made of: torch.nn writes all masks as numbers."""
    form = walk.masks.reader.positions.form(mask, call)
    if not isinstance(form, Choice) or {form.inside, form.outside} != {0.0, -math.inf}:
        return None
    leaf = form.formula.literals[0].leaf
    if leaf is None or len(form.formula.literals) > 1:
        return None
    sizes = known(leaf.node).shape, known(mask).shape
    whole = leaf.dims == tuple(range(len(sizes[1]))) and all(map(same, *sizes))
    if not whole or walk.effects.changed(leaf.node, leaf.reader, call):
        return None
    hidden = (form.inside == -math.inf) != leaf.inverted
    kind = TermKind.HIDDEN if hidden else TermKind.VISIBLE
    return Term(leaf.node, kind, leaf.reader, value=as_row(leaf.node, leaf.node))


def combine(
    terms: Sequence[Term], padding: Term | None, lengths: tuple[Size, Size], walk: Walk
) -> Analysis:
    """What masks over query and key, and a key padding mask, come to together."""
    if padding is None or padding.value is None:
        return analyze([*terms, *([] if padding is None else [padding])], *lengths, walk.masks)
    if not all(_excludes(term, lengths, walk) for term in terms):
        return explicit((*terms, padding), "masks of finite numbers beside a key padding mask")
    found = analyze(terms, *lengths, walk.masks)
    rest = explicit((padding,), "key_padding_mask is the same for all queries of a sequence")
    text, proof = f"{rest.text} key padding", rest.proof
    if terms:
        text, proof = f"{found.text} and {text}", f"{found.proof}; {proof}"
    return replace(found, terms=(*found.terms, padding), text=text, proof=proof, live=False)


def _excludes(term: Term, lengths: tuple[Size, Size], walk: Walk) -> bool:
    """Whether hidden scores are -inf: a finite number counts where the padding hides the rest."""
    pieces = walk.masks.reader.pieces(term, *lengths)
    return all(piece.fill == -math.inf for piece in pieces)


def explicit(terms: tuple[Term, ...], why: str, *, live: bool = False) -> Analysis:
    """Masks that all stay as they are."""
    words = []
    for term in terms:
        tensor = known(term.node)
        kind = "bool" if tensor.dtype == torch.bool else "additive"
        words.append(f"explicit {kind} ({', '.join(map(str, shape_of(tensor.shape)))})")
    return Analysis(terms=terms, text=" and ".join(words), proof=why, live=live)


def pad_keys(term: Term, extra: int) -> Term:
    """The mask for ``extra`` more keys that nothing hides."""
    value = term.node if term.value is None else term.value
    visible = int(term.kind is TermKind.VISIBLE)
    padded = Apply(_aten.constant_pad_nd.default, (value, [0, extra], visible))
    return replace(term, value=padded)
