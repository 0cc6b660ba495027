"""What one attention in a graph computes, independent of how it was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import torch
from torch import fx

from sage_compiler.passes.values import RESULT, Apply, Value
from sage_compiler.semantics import Semantics

Shape: TypeAlias = tuple[int | str, ...]  # a symbolic size by its name
_aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Mask:
    """What is known of a site's mask.

    Attributes:
        value: the explicit mask that remains to be applied; None when the mask class says it all.
        text: the mask in a few words.
        proof: why it is what ``text`` says.
    """

    value: Value | None
    text: str
    proof: str

    @property
    def kind(self) -> str:
        """``bool`` or ``additive`` as the explicit mask is, "" when there is none."""
        if self.value is None:
            return ""
        return "bool" if _dtype(self.value) == torch.bool else "additive"


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What a recognizer proved: the value of ``output`` is ``result`` of sage::attention.

    Attributes:
        output: the node whose value the operator replaces.
        query, key, value: (B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), or the same without
            B. A key or value may have batch 1 where query has more, and the other way round.
        mask: the mask and its proof.
        semantics: mask class, scale, softcap, dead rows.
        q_shape, kv_shape: (B, H, Lq, D) and (B, Hkv, Lk, Dv).
        sinks: (H,) logits that only enter the denominator.
        result: what follows the operator; ``RESULT`` stands for its output.
        interior: nodes that the operator makes superfluous, first to last.
        autocasts: whether query, key and value are what autocast, where it is on, has yet to cast.
        without_autocast: query, key and value are cast as the model's were, and the operator
            itself must run outside autocast.
    """

    output: fx.Node
    query: Value
    key: Value
    value: Value
    mask: Mask
    semantics: Semantics
    q_shape: Shape
    kv_shape: Shape
    sinks: Value | None = None
    result: Value = RESULT
    interior: tuple[fx.Node, ...] = ()
    autocasts: bool = True
    without_autocast: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionSite(Proof):
    """One attention, proved, with its place in the model.

    Attributes:
        layer: qualified name of the module it belongs to, with an ordinal: ``fqn#0``.
        form: how it was written.
        source: file, line and code that wrote it; empty when the graph does not say.
    """

    layer: str
    form: str
    source: str

    @property
    def node(self) -> fx.Node:
        """The node that this finding is about."""
        return self.output

    @property
    def fingerprint(self) -> str:
        """What does not change while the layer is the same: ``q12 kv4 d64 dv64 causal``.

        Query heads, key/value heads, head_dim, value head_dim, and the mask class, followed by
        the kind of the mask where one remains explicit: ``none+bool``. "?" stands for a number
        of heads that varies, or that the batch is part of. No batch, no lengths.
        """
        folded = isinstance(self.query, fx.Node) and _example(self.query).dim() == 3
        q_heads, kv_heads = self.q_shape[1], self.kv_shape[1]
        heads = ["?" if folded or isinstance(n, str) else str(n) for n in (q_heads, kv_heads)]
        dims = f"d{self.q_shape[3]} dv{self.kv_shape[3]}"
        mask = "+".join(filter(None, (str(self.semantics.mask_class), self.mask.kind)))
        return f"q{heads[0]} kv{heads[1]} {dims} {mask}"


@dataclass(frozen=True, slots=True)
class Rejected:
    """An attention, or what may be one, that is not rewritten.

    Attributes:
        node: the node it is about.
        layer, form, source: as for AttentionSite.
        reason: why, in one sentence.
        q_shape, kv_shape: where known, else empty.
    """

    node: fx.Node
    layer: str
    form: str
    source: str
    reason: str
    q_shape: Shape = ()
    kv_shape: Shape = ()

    @property
    def fingerprint(self) -> str:
        """Unknown, because what it computes is: ""."""
        return ""


Finding: TypeAlias = AttentionSite | Rejected


def _example(node: fx.Node) -> Any:
    return node.meta.get("example_value", node.meta.get("val"))


def _dtype(value: Any) -> Any:
    """The dtype of an expression: the one its operation has or asks for, or that of its operand."""
    while not isinstance(value, fx.Node):
        if isinstance(value, Apply):
            if value.target in _PREDICATES:
                return torch.bool
            asked = dict(value.kwargs).get("dtype")
            if asked is not None:
                return asked
            value = value.args
        value = value[0]
    return _example(value).dtype


_PREDICATES: Final = frozenset(
    [_aten.eq.Scalar, _aten.ne.Scalar, _aten.logical_and.default, _aten.logical_not.default]
)
