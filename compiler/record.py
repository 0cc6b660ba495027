"""What reports are made of: the record of one attention, and of one captured graph."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Final

from torch import fx

from sage_compiler.errors import InvalidOptionError
from sage_compiler.passes.rewrite import LAYER_KEY
from sage_compiler.passes.site import Shape
from sage_compiler.passes.snapshot import Snapshot

REWRITE: Final = "rewrite"
KEEP: Final = "keep"
BEFORE: Final = "before"
AFTER: Final = "after"


@dataclass(frozen=True, slots=True)
class Site:
    """One attention of a compiled graph; fields are text or tuples of sizes, but for measurements.

    Attributes:
        layer: qualified module name and ordinal, ``encoder.layer.0.attention.self#0``.
        fingerprint: heads, key/value heads, head_dims and mask class, ``q12 kv4 d64 dv64 causal``;
            "" when unknown.
        form: how it was written, e.g. ``sdpa``.
        q_shape: (B, H, Lq, D), symbolic sizes by name; () when unknown.
        kv_shape: (B, Hkv, Lk, Dv).
        heads: ``12`` or, grouped, ``32 over 8``.
        mask: the mask in a few words; proof: why it is that.
        recipe: the operator's recipe, those of the ranges of timesteps by "/" where they differ;
            "" when kept.
        decision: "rewrite" or "keep"; reason: why.
        source: ``file:line: code`` that wrote it.
        rotary: whether a rotary embedding of query and key is in the operator too, in a few words,
            or why not; "" where there is none, or where the kernel does not rotate.
        cosine, rel_l1: errors of the recipe in calibration, the worst over its inputs; None where
            no policy says.
        seconds, exact_seconds: time of the layer's attention for one input, with the recipe and
            exact, as the policy predicts it; None where no policy says.
    """

    layer: str
    fingerprint: str
    form: str
    q_shape: Shape
    kv_shape: Shape
    heads: str
    mask: str
    proof: str
    recipe: str
    decision: str
    reason: str
    source: str
    cosine: float | None = None
    rel_l1: float | None = None
    seconds: float | None = None
    exact_seconds: float | None = None
    rotary: str = ""


class GraphPair:
    """One captured graph before and after rewriting.

    Attributes:
        sites: the attentions of this graph, in its order.
        nodes: for each of them, the names of the nodes of ``before`` that compute it, first to
            last. In ``after``, what was inserted for it has its layer as ``meta["sage_layer"]``.
    """

    def __init__(
        self,
        root: fx.GraphModule,
        before: Snapshot,
        after: Snapshot,
        sites: Sequence[Site],
        nodes: Sequence[tuple[str, ...]],
    ) -> None:
        self._root = root
        self._before = before
        self._after = after
        self.sites = tuple(sites)
        self.nodes = tuple(nodes)

    @property
    def before(self) -> fx.GraphModule:
        """The graph as it was captured."""
        return self.module(BEFORE)

    @property
    def after(self) -> fx.GraphModule:
        """The graph that was handed to Inductor."""
        return self.module(AFTER)

    def module(self, which: str) -> fx.GraphModule:
        """``before`` or ``after`` by name.

        Raises:
            InvalidOptionError: ``which`` is neither.
        """
        return fx.GraphModule(self._root, self.graph(which))

    def graph(self, which: str) -> fx.Graph:
        """The graph alone, "before" or "after", which takes less time than a module of it.

        Raises:
            InvalidOptionError: ``which`` is neither.
        """
        if which not in (BEFORE, AFTER):
            raise InvalidOptionError(f"which={which!r}; known: {BEFORE!r}, {AFTER!r}")
        return (self._before if which == BEFORE else self._after).build()

    def to_svg(self, path: str | os.PathLike[str], which: str = AFTER) -> None:
        """Draw the whole graph; what computed attention, or was inserted for it, stands out.

        Args:
            path: the SVG file to write.
            which: "before" or "after".

        Raises:
            InvalidOptionError: ``which`` is neither.
            OSError: the file cannot be written.
        """
        from sage_compiler.drawing import draw, write_svg

        graph = self.graph(which)
        if which == BEFORE:
            kinds = {name: "replaced" for names in self.nodes for name in names}
        else:
            kinds = {node.name: "inserted" for node in graph.nodes if LAYER_KEY in node.meta}
        write_svg(draw(list(graph.nodes), kinds, f"graph {which} rewriting"), path)


def shape_text(shape: Shape) -> str:
    """``(1, 12, s0, 64)``; "" for a shape that is not known."""
    return "(" + ", ".join(map(str, shape)) + ")" if shape else ""


def plain(value: Any) -> Any:
    """The same for JSON, which has neither tuples nor NaN and infinity: these are None there."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not isfinite(value) else value
