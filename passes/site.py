"""What one attention in a graph computes, independent of how it was written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from torch import fx

from sage_compiler.semantics import Semantics

Shape: TypeAlias = tuple[int | str, ...]  # a symbolic size by its name


@dataclass(frozen=True, slots=True)
class Mask:
    """What is known of a site's mask.

    Attributes:
        node: the explicit mask that remains to be applied; None when the mask class says it all.
        text: the mask in a few words.
        proof: why it is what ``text`` says.
    """

    node: fx.Node | None
    text: str
    proof: str


@dataclass(frozen=True, slots=True)
class AttentionSite:
    """One attention, proved: the output of ``node`` equals sage::attention of these inputs.

    Attributes:
        node: the node whose value the operator replaces.
        layer: qualified name of the module it belongs to, with an ordinal: ``fqn#0``.
        form: how it was written.
        source: file, line and code that wrote it; empty when the graph does not say.
        query, key, value: (B, H, Lq, D), (B, Hkv, Lk, D), (B, Hkv, Lk, Dv), or the same without
            B. A key or value may have batch 1 where query has more, and the other way round.
        mask: the mask and its proof.
        semantics: mask class, scale, softcap, dead rows.
        q_shape, kv_shape: (B, H, Lq, D) and (B, Hkv, Lk, Dv).
    """

    node: fx.Node
    layer: str
    form: str
    source: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: Mask
    semantics: Semantics
    q_shape: Shape
    kv_shape: Shape


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


Finding: TypeAlias = AttentionSite | Rejected
