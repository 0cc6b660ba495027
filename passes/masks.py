"""What the masks and biases of one attention hide, with a proof.

The masks of a site are taken apart (terms.py); what is proved to be a band of diagonals becomes
the operator's mask class, what adds nothing is dropped, and the rest stays explicit, which is
correct and still fused. Band and explicit terms together are a conjunction.

When hiding is exclusion. The operator's band excludes a key: its weight is zero. A score of -inf
has weight zero too, so masks that fill with -inf are exclusion, whatever else is added to the
score; NaN or +inf at a hidden position, in a bias that is an input, counts as not finite scores
do: SDPA's own causal kernels do not look there either. A constant that holds them keeps all terms
explicit. A finite fill, however low, is not exclusion: a row all of whose keys have it is a uniform
average over all keys, also those that a band would exclude. Beside a live key its weight is zero,
because exp underflows. So a mask with a finite fill becomes a band only when a live key is proved
for every row from all terms of the site together: each of them is a band, or a constant whose
magnitude is small beside the fill. A later term that replaces scores by a finite fill undoes
earlier -inf, so earlier terms are then treated as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import torch
from torch import fx

from sage_compiler.passes.axes import Size, is_one
from sage_compiler.passes.bands import Band, Window, describe_band, known
from sage_compiler.passes.effects import Effects
from sage_compiler.passes.joint import Explicit, Joint
from sage_compiler.passes.normalize import operation, tensor_of
from sage_compiler.passes.purity import is_pure
from sage_compiler.passes.terms import Reader, Term, TermKind
from sage_compiler.semantics import UNBOUNDED, MaskClass

__all__ = ["Analysis", "MaskContext", "Term", "TermKind", "analyze", "is_pure"]


@dataclass(frozen=True, slots=True)
class Analysis:
    """What the operator is told of all masks of a site.

    Attributes:
        mask_class, window_left, window_right: the proved band.
        terms: what remains to be applied explicitly, in order; maybe parts of what was given.
        text: the whole mask in a few words.
        proof: why it is what ``text`` says.
        live: every query row provably sees at least one key; then what a dead row yields does
            not matter.
    """

    mask_class: MaskClass = MaskClass.NONE
    window_left: int = UNBOUNDED
    window_right: int = UNBOUNDED
    terms: tuple[Term, ...] = ()
    text: str = "none"
    proof: str = "no mask is given"
    live: bool = False


class MaskContext:
    """What the analyses of one graph share. The graph must not change meanwhile."""

    def __init__(self, effects: Effects) -> None:
        self.effects = effects
        self.reader = Reader(effects)
        self._found: dict[tuple[object, ...], tuple[Analysis, tuple[int | None, ...]]] = {}
        self._causes: dict[fx.Node, str] = {}

    def constant_number(self, node: fx.Node, reader: fx.Node) -> float | None:
        """The number in a constant tensor of one element, as ``reader`` reads it; else None."""
        tensor = tensor_of(node)
        if tensor is None or not all(is_one(size) for size in tensor.shape):
            return None
        cone = self.reader.folder.cone(node, reader)
        value = None if cone is None else self.reader.folder.value(node, cone)
        return None if value is None else float(value.item())

    def joint(
        self, terms: Sequence[Term], query_length: Size, key_length: Size, split: bool
    ) -> Analysis:
        """The analysis of terms together; the layers of a model share theirs."""
        key = (
            *(self._key(term) for term in terms),
            str(query_length),
            str(key_length),
            split,
        )
        if key not in self._found:
            found = _conclude(Joint(terms, query_length, key_length, self.reader, split), self)
            given = {id(term): at for at, term in enumerate(terms)}
            self._found[key] = found, tuple(given.get(id(term)) for term in found.terms)
        found, places = self._found[key]
        own = zip(found.terms, places, strict=True)
        return replace(found, terms=tuple(t if at is None else terms[at] for t, at in own))

    def _key(self, term: Term) -> tuple[object, ...]:
        written = self.effects.latest(term.node, term.reader)
        return term.node, written, term.kind, term.fill, term.value is None

    def cause(self, node: fx.Node) -> str:
        """Why a mask is no constant."""
        if node not in self._causes:
            self._causes[node] = _root_cause(node)
        return self._causes[node]


def analyze(
    terms: Sequence[Term], query_length: Size, key_length: Size, context: MaskContext
) -> Analysis:
    """Prove what the masks of one site hide together, and say what remains explicit.

    A part of a term may be read later than the term was: ``reader`` of each resulting term is
    the node from which on it must not change.
    """
    if not terms:
        return Analysis(live=known(key_length >= 1))
    found = context.joint(terms, query_length, key_length, True)
    given = {id(term) for term in terms}
    last = max((term.reader for term in terms), key=context.effects.position)
    for term in found.terms:
        if id(term) not in given and context.effects.changed(term.node, term.reader, last):
            return context.joint(terms, query_length, key_length, False)
    return found


# --- words ----------------------------------------------------------------------------------


def _conclude(joint: Joint, context: MaskContext) -> Analysis:
    """What was decided about the masks of a site, and the words for it."""
    explicit = joint.explicit()
    window = joint.window
    parts = [] if window == Window() and explicit else [str(window)]
    parts.extend(_describe(each) for each in explicit)
    proved = _proofs(joint)
    kept = " and ".join(dict.fromkeys(_reason(each, joint, context) for each in explicit))
    if not explicit:
        proof = proved
    else:
        proof = f"{proved}; and explicit: {kept}" if joint.used and proved else kept
    return Analysis(
        window.mask_class,
        window.left,
        window.right,
        tuple(each.term for each in explicit),
        " and ".join(parts),
        proof,
        joint.is_live(),
    )


def _proofs(joint: Joint) -> str:
    """Where the band comes from: constants each by itself, comparisons of positions together."""
    found: dict[str, None] = {}
    low: list[Size] = []
    high: list[Size] = []
    size = joint.query, joint.key
    for piece in joint.pieces:
        for conjunct in piece.conjuncts or ():
            band = conjunct.band
            if band is None or conjunct not in joint.used:
                continue
            if piece.is_bias and not band.hides:
                continue
            if conjunct.origin:
                found[f"{conjunct.origin}: {describe_band(band, *size)}"] = None
                continue
            low.extend([] if band.low is None else [band.low])
            high.extend([] if band.high is None else [band.high])
    comparisons = "comparison of positions"
    for at in range(max(len(low), len(high))):
        band = Band(*(side[at] if at < len(side) else None for side in (low, high)))
        found[f"{comparisons}: {describe_band(band, *size)}"] = None
    if not found and all(joint.is_said(piece) for piece in joint.pieces):
        found[f"for all lengths: {describe_band(Band(), *size)}"] = None
    return " and ".join(found)


def _describe(explicit: Explicit) -> str:
    """An explicit mask in a few words: its dtype, its shape and its pattern."""
    term, constant = explicit.term, explicit.constant
    tensor = tensor_of(term.node)
    assert tensor is not None
    kind = "bool" if tensor.dtype == torch.bool else "additive"
    sizes = explicit.shape or tuple(tensor.shape)
    words = constant.words if constant is not None else ""
    if not words and sizes and not is_one(sizes[-1]) and all(map(is_one, sizes[-2:-1])):
        words = "key padding"
    shape = ", ".join(str(size) for size in sizes)
    return f"explicit {kind} ({shape}) {words}".rstrip()


def _reason(explicit: Explicit, joint: Joint, context: MaskContext) -> str:
    """Why something stays explicit."""
    constant, piece = explicit.constant, explicit.piece
    if constant is None:
        cause = context.cause(explicit.term.node)
        bands = [each for each in piece.conjuncts or () if each.band is not None]
        if bands and not any(each in joint.used for each in bands) and piece.fill > -math.inf:
            cause += f"; its fill {piece.fill} is finite and a row may see no key"
        return cause
    words = constant.words
    if constant.band is not None and not piece.is_bias:
        words = f"constant: {describe_band(constant.band, joint.query, joint.key)}"
        if constant.fill > -math.inf:
            return f"{words}, but its fill {constant.fill} is finite and a row may see no key"
        return f"{words}, which no window says"
    return "constant, but no band of diagonals" + (f": {words}" if words else "")


# What reads the shape of its first argument, and not its values.
_SHAPES: Final = frozenset({"size", "sym_size", "new_full", "new_ones", "new_zeros"})


def _root_cause(node: fx.Node) -> str:
    """Why a mask is no constant: the first tensor input that it depends on, or what else."""
    seen: set[fx.Node] = set()
    stack = [node]
    inputs = []
    sizes = False
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if current.op == "get_attr" or (
            current.op == "placeholder" and tensor_of(current) is not None
        ):
            inputs.append(current)
        sizes = sizes or tensor_of(current) is None
        if operation(current) not in _SHAPES:
            stack.extend(current.all_input_nodes)
    if inputs:
        return f"it depends on the input {min(inputs).target}"
    if sizes:
        return "it depends on sizes that vary"
    return "it is computed by operations that are not folded"
