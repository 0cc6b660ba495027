"""Which tokens an attention sees, and which count in statistics: docs/numerics.md, "What counts in
statistics". ``kernels/visibility.py`` says the same; what a variant has no mask for is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from sage_compiler.kernels.visibility import NEGLIGIBLE_BIAS
from sage_compiler.onnx.bodies.graph import Graph, Value
from sage_compiler.onnx.bodies.layout import GROUP, KEY, TILE, TOKEN, Layout, swapped
from sage_compiler.onnx.bodies.masks import band
from sage_compiler.onnx.schema import Mask, Variant
from sage_compiler.precision import Statistics


@dataclass(frozen=True, slots=True)
class Visibility:
    """What the queries see: booleans in the axes of ``layout``, any of them 1 where it broadcasts.

    Attributes:
        bias: FLOAT, rows of scores, a float mask; None without one.
        shown: rows of scores, what lies in the band and is shown by a bool mask.
        reachable: tokens of keys that some query of the group sees.
        counted: those that count in statistics; the same value where all do.
        live: queries that see some key; None where all do.
    """

    bias: Value | None
    shown: Value
    reachable: Value
    counted: Value
    live: Value | None

    @property
    def all_count(self) -> bool:
        return self.counted is self.reachable


def visibility(
    graph: Graph, variant: Variant, layout: Layout, statistics: Statistics
) -> Visibility:
    """What is visible through the band and the mask."""
    keys = layout.keys()
    shown = keys < layout.key_length
    limits = band(graph, variant.mask_class, layout.query_length, layout.key_length)
    if limits is not None:
        shown = shown & limits.shows(keys)
    if variant.mask is Mask.BOOL:
        shown = shown & layout.mask(graph.input("attn_mask"))
    if variant.mask is Mask.FLOAT:
        bias = layout.mask(graph.input("attn_mask").to_float())
        return _through_bias(bias, shown, statistics)

    if limits is None and variant.mask is None:
        reachable = swapped(shown)
        return Visibility(None, shown, reachable, reachable, None)
    reachable = _some_query(shown)
    return Visibility(None, shown, reachable, reachable, shown.any(TILE, KEY))


def _through_bias(bias: Value, shown: Value, statistics: Statistics) -> Visibility:
    # Written as negations so that a NaN bias is seen, and counts.
    seen = shown & ~bias.equals(-inf)
    ordinary = shown & ~(bias <= NEGLIGIBLE_BIAS)
    # A row that sees a key of ordinary bias ignores its keys of negligible bias.
    counts = ordinary | (seen & ~ordinary.any(TILE, KEY))
    reachable, counted = _some_query(seen), _some_query(counts)
    if statistics is Statistics.KV_BLOCK:
        # In a tile where no key counts every reachable key does.
        counted = counted | (reachable & ~counted.any(TOKEN))
    return Visibility(bias, shown, reachable, counted, seen.any(TILE, KEY))


def _some_query(rows: Value) -> Value:
    """(B|1, Hkv|1, T, G|1, Lq|1, n) -> (B|1, Hkv|1, T, 1, n, 1)."""
    return swapped(rows.any(GROUP, TOKEN))
