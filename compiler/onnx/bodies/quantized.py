"""Attention in a recipe, step by step as ``kernels/reference.py``: the body of explicit recipes.

docs/numerics.md names the steps. Shapes as in ``layout``. Scores are in natural units: a runtime
has Exp, not exp2, and nothing needs the other unit.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log
from typing import Final

from onnx import AttributeProto, TensorProto, helper

from sage_compiler.kernels.quantize import E4M3_MAX, INTEGER_LIMIT, P_FACTOR
from sage_compiler.onnx.bodies.exact import dead_value
from sage_compiler.onnx.bodies.graph import Graph, Value
from sage_compiler.onnx.bodies.layout import TILE, TOKEN, Layout, layout, swapped
from sage_compiler.onnx.bodies.quantize import (
    QuantizedValue,
    e4m3,
    fp16,
    mean,
    quantize_keys,
    quantize_queries,
    quantize_values,
    statistics_axes,
)
from sage_compiler.onnx.bodies.visibility import Visibility, visibility
from sage_compiler.onnx.schema import Variant
from sage_compiler.precision import Format, Recipe, Statistics

QUERY_CODES: Final = "query_codes"
KEY_CODES: Final = "key_codes"
VALUE_CODES: Final = "value_codes"
WEIGHT_CODES: Final = "weight_codes"


def quantized(graph: Graph, variant: Variant, recipe: Recipe) -> tuple[Value, Value | None]:
    """The output, in Q's type, and the LSE where the variant has it."""
    sizes = layout(graph, variant, recipe.tile.kv_block)
    seen = visibility(graph, variant, sizes, recipe.statistics)
    query, value = graph.input("query"), graph.input("value")
    scores = _scores(graph, variant, recipe, sizes, seen)
    v = sizes.by_tile(value.to_float()).where(seen.reachable, 0.0)
    v_codes = quantize_values(value, v, seen, recipe, VALUE_CODES)

    softmax = _softmax(scores.rows, v_codes, recipe)
    dead = softmax.total.equals(0.0)
    output = softmax.output / softmax.total
    if recipe.statistics is Statistics.HEAD:
        # The rows of P now sum to 1, so V's scale returns as it is.
        if recipe.pv is Format.FP8:
            # The rounded P may sum to a little more than 1, which may not make an infinity.
            output = output.clip(E4M3_MAX)
        output = output * v_codes.scale
    output = graph.value(0.0).where(dead, output)

    lse = softmax.maximum + (softmax.total / P_FACTOR[recipe.pv]).log()
    if scores.row_term is not None:  # every score of a row is too low by it, and so is the LSE
        lse = lse + scores.row_term
    if variant.sinks:
        # The sink joins here: in the running maximum a large sink would cost P its range.
        sink = graph.input("sinks").to_float()
        sink = sink.reshape(graph.shape(1, sizes.kv_heads, 1, sizes.group, 1, 1))
        with_sink = _log_add_exp(lse, sink)
        output = output * (lse - with_sink).exp()  # the keys' share
        dead, lse = dead & sink.equals(-inf), with_sink
    output = dead_value(graph, variant, sizes.key_length).where(dead, output)
    output = sizes.output(output).cast_like(query)
    return output, sizes.output(lse).squeeze(3) if variant.lse else None


@dataclass(frozen=True, slots=True)
class _Scores:
    """The scores of all rows.

    Attributes:
        rows: (B, Hkv, T, G, Lq, n), -inf: not seen.
        row_term: (B, Hkv, 1, G, Lq, 1), what all scores of a row lack; None if nothing.
    """

    rows: Value
    row_term: Value | None


def _scores(
    graph: Graph, variant: Variant, recipe: Recipe, sizes: Layout, seen: Visibility
) -> _Scores:
    """Smooth and quantize Q and K, and make scores of their product."""
    limit = INTEGER_LIMIT[recipe.qk]
    scale = graph.attribute("scale", AttributeProto.FLOAT)
    # A key nobody sees, and a query that sees nothing, are zeros: NaN there has no effect.
    k = sizes.by_tile(graph.input("key").to_float()).where(seen.reachable, 0.0)
    q = sizes.by_head(graph.input("query").to_float())
    if seen.live is not None:
        q = q.where(seen.live, 0.0)

    key_mean = mean(k, seen.counted, seen.all_count, *statistics_axes(recipe.statistics))
    k = (k - key_mean).where(seen.reachable, 0.0)
    row_term = q @ swapped(key_mean) * scale
    block_mean = None
    if recipe.smooth_q:
        block_mean, q = _smooth_queries(q, seen.live, sizes, recipe.tile.q_block)

    q_codes, q_scale = quantize_queries(q, sizes, recipe, limit, QUERY_CODES)
    k_codes, k_scale = quantize_keys(k, seen, sizes, recipe, limit, KEY_CODES)
    rows = q_codes @ swapped(k_codes) * (q_scale * scale) * swapped(k_scale)
    if block_mean is not None:
        by_block = block_mean * scale @ swapped(k)
        rows = rows + by_block.gather(sizes.queries() / recipe.tile.q_block, TOKEN)
    # A term that all scores of a row share changes nothing but the LSE and the softcap.
    inside = recipe.statistics is Statistics.KV_BLOCK or variant.softcap
    if inside:
        rows = rows + row_term
    if variant.softcap:
        softcap = graph.attribute("softcap", AttributeProto.FLOAT)
        rows = (rows / softcap).tanh() * softcap
    if seen.bias is not None:
        rows = rows + seen.bias
    return _Scores(rows.where(seen.shown, -inf), None if inside else row_term)


def _smooth_queries(q: Value, live: Value | None, sizes: Layout, block: int) -> tuple[Value, Value]:
    """The means (B, Hkv, 1, G, blocks, D) of the query blocks, and Q without them."""
    graph, length = q.graph, sizes.query_length
    blocks = (length + (block - 1)) / block
    missing = blocks * block - length

    def in_blocks(x: Value) -> Value:
        filled = x.pad_end([0, 0, 0, 0, missing, 0])
        outer = [x.dim(axis) for axis in range(TOKEN)]
        return filled.reshape(graph.shape(*outer, blocks, block, x.dim(5)))

    everyone = live if live is not None else graph.value(1) > 0
    counted = everyone.expand(graph.shape(1, 1, 1, 1, length, 1))
    # Axis 5 holds the tokens of a block. Q is zero where it is not live.
    means = mean(in_blocks(q), in_blocks(counted), True, 5).squeeze(5)
    smooth = q - means.gather(sizes.queries() / block, TOKEN)
    return means, smooth if live is None else smooth.where(live, 0.0)


@dataclass(frozen=True, slots=True)
class _Softmax:
    """The softmax over all tiles, relative to the maximum of its row.

    Attributes:
        maximum: (B, Hkv, 1, G, Lq, 1), -inf for a row that sees no key.
        total: same shape, the denominator times the static factor of P; zero for such a row.
        output: (B, Hkv, 1, G, Lq, Dv), the numerator times that factor; with statistics of the
            head, of the quantized V.
    """

    maximum: Value
    total: Value
    output: Value


def _softmax(scores: Value, value: QuantizedValue, recipe: Recipe) -> _Softmax:
    """P of every tile, relative to a maximum of its own, and the weighted sum of the tiles."""
    by_block = recipe.statistics is Statistics.KV_BLOCK
    highest = scores.max(5)
    relative_to = highest if by_block else _running_maximum(highest)
    maximum = highest.max(TILE)
    weights, row_sum = _quantize_weights(scores - _origin(relative_to), recipe.pv)
    product = _product(weights, value.data, recipe.pv)

    # A tile without weight adds zero, however large its V is.
    share = (relative_to - _origin(maximum)).exp()
    row_sum, product = row_sum * share, product * share
    if by_block:
        product = product * value.scale
        if value.offset is not None:
            product = product + row_sum * value.offset
    return _Softmax(maximum, row_sum.sum(TILE), product.sum(TILE))


def _running_maximum(highest: Value) -> Value:
    """The maximum over a tile and all before it, of (B, Hkv, T, G, Lq, 1).

    A Scan over the tiles; in operators without state it would take all pairs of tiles.
    """
    types = [helper.make_tensor_type_proto(TensorProto.FLOAT, [None] * 5)] * 4
    so_far, here, new, kept = (
        helper.make_value_info(name, kind)
        for name, kind in zip(("so_far", "here", "new", "kept"), types, strict=True)
    )
    body = helper.make_graph(
        [
            helper.make_node("Max", ["so_far", "here"], ["new"]),
            helper.make_node("Identity", ["new"], ["kept"]),
        ],
        "running_maximum",
        [so_far, here],
        [new, kept],
    )
    tiles_first = highest.transpose(2, 0, 1, 3, 4, 5)
    first = tiles_first.gather(highest.graph.value(0), 0)
    return highest.graph.scan(body, first, tiles_first).transpose(1, 2, 0, 3, 4, 5)


def _origin(maximum: Value) -> Value:
    """What exponents are taken relative to; -inf - -inf must not arise."""
    return maximum.graph.value(0.0).where(maximum.equals(-inf), maximum)


def _quantize_weights(exponents: Value, pv: Format) -> tuple[Value, Value]:
    """P = exp(exponents) times the static factor, in its format, and its row sums.

    Those are of P before rounding for floating point, and after it for integers, whose rounding
    errors then cancel in the quotient.
    """
    if pv is Format.FP8:
        weights = (exponents + log(E4M3_MAX)).exp()
        return e4m3(weights, WEIGHT_CODES), weights.sum(5)
    if pv is Format.FP16:
        weights = exponents.exp()
        return fp16(weights, WEIGHT_CODES), weights.sum(5)
    weights = (exponents.exp() * P_FACTOR[pv]).round(WEIGHT_CODES)
    return weights, weights.sum(5)


def _product(weights: Value, value: Value, pv: Format) -> Value:
    """P @ V of every tile."""
    if pv is Format.INT16:
        # Two bytes, each an exact integer product: 255 * 127 * 256 keys is below 2**24.
        high = (weights / 256.0).floor()
        return high @ value * 256.0 + (weights - high * 256.0) @ value
    return weights @ value


def _log_add_exp(a: Value, b: Value) -> Value:
    """log(exp(a) + exp(b)); -inf for two -inf, NaN where one is +inf."""
    origin = _origin(a.maximum(b))
    return ((a - origin).exp() + (b - origin).exp()).log() + origin
