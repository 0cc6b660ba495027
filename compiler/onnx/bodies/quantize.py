"""The quantizers of the recipes: docs/numerics.md, "Q and K" and "Softmax, P and V".

Codes are FLOAT and hold what a kernel's operand would hold. So their products are MatMuls of
floats: integers are exact in them below 2**24, E4M3 and FP16 up to the order of sums, and even in
TF32, whose 11 bits hold every code. MatMulInteger would be no better, and on AVX2 its products of
unsigned and signed bytes saturate. INT4 has no Cast on CUDA; rounding needs none.

An integer holds no NaN, so the scale of its group does: what is not finite counts as infinite, and
the scale of an infinite amax is NaN. (A maximum of ONNX need not propagate NaN.)
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, log, nan
from typing import Final

from onnx import TensorProto

from sage_compiler.kernels.quantize import (
    E4M3_MAX,
    FP16_MAX,
    FP16_TOP_EXPONENT,
    SMALLEST_SCALE,
)
from sage_compiler.onnx.bodies.graph import Value
from sage_compiler.onnx.bodies.layout import CHANNEL, TILE, TOKEN, Layout
from sage_compiler.onnx.bodies.visibility import Visibility
from sage_compiler.precision import Format, Granularity, Recipe, Statistics, Tile

# Of mma m16n8, as in kernels/quantize.py: rows and columns that share a thread.
_ROWS: Final = 8
_COLUMNS: Final = 2
_LANES: Final = 4

_INT8_LIMIT: Final = 127
_ABOVE_FP16: Final = 65536.0


def statistics_axes(statistics: Statistics) -> tuple[int, ...]:
    """The axes of keys that a mean of K, or a scale of V, is taken over."""
    return (TILE, TOKEN) if statistics is Statistics.HEAD else (TOKEN,)


def mean(x: Value, counted: Value, all_count: bool, *axes: int) -> Value:
    """The mean of x over its counted tokens; none: zero. ``all_count``: x is zero in others."""
    total = (x if all_count else x.where(counted, 0.0)).sum(*axes)
    return total / counted.to_float().sum(*axes).maximum(1.0)


def quantize_queries(
    q: Value, layout: Layout, recipe: Recipe, limit: int, name: str
) -> tuple[Value, Value]:
    """Codes (B, Hkv, 1, G, Lq, D), and scales (B, Hkv, 1, G, Lq, 1), of Q, zero where not live."""
    amax = _magnitude(q).max(CHANNEL)
    if recipe.granularity is Granularity.THREAD:
        amax = _query_threads(amax, layout, recipe.tile)
    scale = _scale(amax, limit)
    return (q / scale).clip(limit).round(name), scale


def quantize_keys(
    k: Value, seen: Visibility, layout: Layout, recipe: Recipe, limit: int, name: str
) -> tuple[Value, Value]:
    """Codes (B, Hkv, T, 1, n, D), and scales (B, Hkv, T, 1, n, 1), of K, zero if not reachable."""
    amax = _counted(_magnitude(k).max(CHANNEL), seen)
    if recipe.granularity is Granularity.THREAD:
        amax = _key_threads(amax, layout)
    scale = _scale(amax, limit)
    # Tokens that do not count are clipped to the range of their group.
    return (k / scale).clip(limit).round(name), scale


def _query_threads(amax: Value, layout: Layout, tile: Tile) -> Value:
    """For every token the maximum over its thread: of each ``q_warp`` tokens, equal index mod 8."""
    graph, length = amax.graph, layout.query_length
    warps = (length + (tile.q_warp - 1)) / tile.q_warp
    filled = amax.pad_end([0, 0, 0, 0, warps * tile.q_warp - length, 0])
    rows = tile.q_warp // _ROWS
    heads = layout.batch, layout.kv_heads, 1, layout.group
    most = filled.reshape(graph.shape(*heads, warps, rows, _ROWS)).max(5)
    everyone = most.expand(graph.shape(1, 1, 1, 1, 1, rows, 1))
    return everyone.reshape(filled.dims()).slice(TOKEN, 0, length)


def _key_threads(amax: Value, layout: Layout) -> Value:
    """For every token the maximum over its thread: of each tile, equal (index mod 8) / 2."""
    shape = amax.graph.shape
    atoms = layout.width // (_LANES * _COLUMNS)
    tiles = layout.batch, layout.kv_heads, layout.tiles
    most = amax.reshape(shape(*tiles, atoms, _LANES, _COLUMNS)).max(3, 5)
    everyone = most.expand(shape(1, 1, 1, atoms, 1, _COLUMNS))
    return everyone.reshape(amax.dims())


@dataclass(frozen=True, slots=True)
class QuantizedValue:
    """V = data * scale + offset.

    Attributes:
        data: codes (B, Hkv, T, 1, n, Dv).
        scale, offset: (B, Hkv, T|1, 1, 1, Dv); no offset is zero.
    """

    data: Value
    scale: Value
    offset: Value | None


def quantize_values(
    value: Value, v: Value, seen: Visibility, recipe: Recipe, name: str
) -> QuantizedValue:
    """Quantize V per channel and block of statistics.

    Args:
        value: the input, for its type.
        v: the same in tiles, FLOAT, zero where not reachable.
        name: of the codes.
    """
    axes = statistics_axes(recipe.statistics)
    amax = _counted(_magnitude(v), seen).max(*axes)
    if recipe.pv is Format.FP8:
        scale = _scale(amax, E4M3_MAX)
        return QuantizedValue(e4m3((v / scale).clip(E4M3_MAX), name), scale, None)
    if recipe.pv is Format.FP16:
        scale = _power_of_two_scale(amax)
        data = (v / scale).clip(FP16_MAX)
        # A float16 V is used as it is. The body does not know its type, but what it cannot hold.
        half = v.graph.value(_ABOVE_FP16).cast_like(value).to_float().is_inf()
        scale, data = v.graph.value(1.0).where(half, scale), v.where(half, data)
        return QuantizedValue(fp16(data, name), scale, None)
    # V in INT8, around the midpoint, whatever the bits of P.
    nothing = ~seen.counted.any(*axes)
    high = v.graph.value(0.0).where(nothing, v.where(seen.counted, -inf).max(*axes))
    low = v.graph.value(0.0).where(nothing, v.where(seen.counted, inf).min(*axes))
    # Halved first: the difference of two finite extremes may not be finite.
    scale = _finite_only(amax, (high / 2.0 - low / 2.0) / float(_INT8_LIMIT))
    middle = high / 2.0 + low / 2.0
    data = ((v - middle) / scale).clip(_INT8_LIMIT).round()
    return QuantizedValue(data.where(seen.reachable, 0.0, name), scale, middle)


def e4m3(x: Value, name: str) -> Value:
    """Rounded to E4M3, half to even, saturated at 448."""
    return x.cast(TensorProto.FLOAT8E4M3FN).cast(TensorProto.FLOAT, name)


def fp16(x: Value, name: str) -> Value:
    """Rounded to FP16, half to even."""
    return x.cast(TensorProto.FLOAT16).cast(TensorProto.FLOAT, name)


def _magnitude(x: Value) -> Value:
    """|x|, infinite for a NaN."""
    return x.graph.value(inf).where(x.is_nan(), x.abs())


def _counted(magnitude: Value, seen: Visibility) -> Value:
    """Zero for tokens that do not count; but those still report what is not finite."""
    if seen.all_count:  # and the others are zero
        return magnitude
    return magnitude.where(seen.counted | magnitude.is_inf(), 0.0)


def _scale(amax: Value, limit: float) -> Value:
    """amax / limit; positive for a group of zeros, NaN for a group that is not finite."""
    return _finite_only(amax, amax / float(limit))


def _finite_only(amax: Value, scale: Value) -> Value:
    graph = amax.graph
    return graph.value(nan).where(amax.is_inf(), scale.maximum(SMALLEST_SCALE))


def _power_of_two_scale(amax: Value) -> Value:
    """A power of two that brings amax into [2**14, 2**15): room above, precision below."""
    # Where the logarithm is off by one at a power of two, amax becomes 2**15: there is room for it.
    exponent = (amax.log() / log(2.0)).floor()
    # Below 2**-111 the inverse would leave float32.
    exponent = exponent.maximum(float(FP16_TOP_EXPONENT - 127))
    power = exponent - float(FP16_TOP_EXPONENT - 1)
    return _finite_only(amax, amax.graph.add("Pow", 2.0, power))
