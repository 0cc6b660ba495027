"""Exact attention in few operators: the body of ``exact`` and ``auto``.

The operators are those that a stock export has (MatMul, Mul, the mask, Softmax, MatMul), so that a
runtime optimizes them as ever; what a variant does not have costs nothing. Shapes: as in
``schema``. Scores are (B, H, Lq, Lk); without grouped heads Q K^T has them at once, with them it is
(B, Hkv, G * Lq, Lk), the same memory, and K and V are not repeated.
"""

from __future__ import annotations

from math import inf, nan

from onnx import AttributeProto

from sage_compiler.onnx.bodies.graph import Graph, Value
from sage_compiler.onnx.bodies.masks import Band, band
from sage_compiler.onnx.schema import Mask, Variant
from sage_compiler.semantics import DeadRows, MaskClass


def exact(graph: Graph, variant: Variant) -> tuple[Value, Value | None]:
    """The output, in Q's type, and the LSE where the variant has it."""
    query, key, value = (graph.input(name) for name in ("query", "key", "value"))
    q, k, v = query.to_float(), key.to_float(), value.to_float()
    heads = query.dim(0), query.dim(1)
    scale = graph.attribute("scale", AttributeProto.FLOAT)

    scores = _by_keys(q * scale, query, key, variant) @ k.transpose(0, 1, 3, 2)
    if variant.grouped:
        scores = scores.reshape(graph.shape(*heads, query.dim(2), key.dim(2)))
    if variant.softcap:
        softcap = graph.attribute("softcap", AttributeProto.FLOAT)
        scores = (scores / softcap).tanh() * softcap
    scores, live = _masked(graph, variant, scores, query, key)

    sink = None
    if variant.sinks:
        # The sink is one more key of every row, and its V is zero.
        sink = graph.input("sinks").to_float().unsqueeze(1, 2)  # (H, 1, 1)
        rows = graph.shape(query.dim(0), 1, query.dim(2), 1)
        scores = graph.add("Concat", scores, sink.expand(rows), axis=-1)
        v = v.pad_end([0, 0, 1, 0])
    weights = scores.softmax()
    output = _by_keys(weights, query, key, variant) @ v
    if variant.grouped:
        output = output.reshape(graph.shape(*heads, query.dim(2), value.dim(3)))

    dead = None
    if live is not None:
        dead = ~live if sink is None else ~live & sink.equals(-inf)
        output = dead_value(graph, variant, key.dim(2)).where(dead, output)
    lse = None
    if variant.lse:
        if sink is None:  # then a row without any key is dead too
            empty = key.dim(2).equals(0)
            dead = empty if dead is None else dead | empty
        lse = _lse(scores, weights, dead)
    return output.cast_like(query), lse


def _by_keys(rows: Value, query: Value, key: Value, variant: Variant) -> Value:
    """(B, H, Lq, n) as (B, Hkv, G * Lq, n): the rows that share keys and values, together."""
    if not variant.grouped:
        return rows
    kv_heads = key.dim(1)
    group = query.dim(1) / kv_heads.maximum(1)
    return rows.reshape(rows.graph.shape(query.dim(0), kv_heads, group * query.dim(2), rows.dim(3)))


def _masked(
    graph: Graph, variant: Variant, scores: Value, query: Value, key: Value
) -> tuple[Value, Value | None]:
    """The scores with -inf for what is not seen, and which rows see a key: BOOL (..., Lq, 1).

    That is found in the mask, which is smaller than the scores; None where every row sees one.
    """
    key_length = key.dim(2)
    limits = band(graph, variant.mask_class, query.dim(2), key_length)
    visible = None if limits is None else limits.shows(key_length.indices())
    if variant.mask is Mask.FLOAT:
        bias = graph.input("attn_mask").to_float()
        if visible is not None:
            bias = bias.where(visible, -inf)
        # Negated, so that a NaN is seen.
        return scores + bias, ~bias.max(-1).equals(-inf)
    if variant.mask is Mask.BOOL:
        mask = graph.input("attn_mask")
        visible = mask if visible is None else mask & visible
        return scores.where(visible, -inf), visible.any(-1)
    if visible is None or limits is None:
        return scores, None
    return scores.where(visible, -inf), _live(limits, variant, key_length)


def _live(limits: Band, variant: Variant, key_length: Value) -> Value | None:
    """Which rows the band alone shows a key: BOOL (Lq, 1)."""
    if variant.mask_class is MaskClass.CAUSAL:
        return None  # every row sees the first key
    live = limits.diagonal + limits.right >= 0
    if limits.left is not None:
        live = live & (limits.diagonal - limits.left < key_length)
    return live


def dead_value(graph: Graph, variant: Variant, key_length: Value) -> Value:
    """What a row yields that sees no key: FLOAT; zero if there are no keys."""
    if variant.dead_rows is DeadRows.ZERO:
        return graph.value(0.0)
    return graph.value(nan).where(key_length > 0, 0.0)


def _lse(scores: Value, weights: Value, dead: Value | None) -> Value:
    """The LSE (B, H, Lq), from the largest weight of each row, exp(its score - LSE)."""
    lse = scores.max(-1) - weights.max(-1).log()
    if dead is not None:  # its weights are NaN
        lse = scores.graph.value(-inf).where(dead, lse)
    return lse.squeeze(-1)
