"""The operator's arguments from the two products of an attention and what lies between them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import fx

from sage_compiler.passes.axes import Dim, Layout, arrange, axes_of, flat, is_one, product
from sage_compiler.passes.contraction import Contraction, Operand
from sage_compiler.passes.explicit import ABSORBING, Explicit, explicit
from sage_compiler.passes.masks import Analysis, Term, TermKind, analyze
from sage_compiler.passes.normalize import is_plain, operation, shape_of, tensor_of
from sage_compiler.passes.operands import Heads, Source, choose, group, repeated, sources
from sage_compiler.passes.scores import LOWEST_FILL, Bias, Scores
from sage_compiler.passes.site import Mask, Proof
from sage_compiler.passes.values import RESULT, Apply, Value, nodes_of
from sage_compiler.passes.walk import Walk, constant_size
from sage_compiler.passes.weights import Weights
from sage_compiler.semantics import DTYPES, DeadRows, MaskClass, Semantics

_aten = torch.ops.aten
_MAX_HEAD_DIM: Final = 256  # what any kernel takes
_LEAST_FACTOR: Final = 0.01  # what a finite mask (-1e4 or less) may be scaled by and still hide


class Unproved(Exception):
    """Why a softmax is not proved to be attention; caught where recognition started."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What was read off the graph.

    Attributes:
        start, output: the nodes of Q K^T and of the product with the values.
        scores, weights: what happens between.
        scores_product, values_product: the two products.
        key: the axes that the softmax runs over.
        value: the values, as they are multiplied.
    """

    start: fx.Node
    output: fx.Node
    scores: Scores
    weights: Weights
    scores_product: Contraction
    values_product: Contraction
    key: Dim
    value: Operand


@dataclass(frozen=True, slots=True)
class _Input:
    """One of query, key and value.

    Attributes:
        value: how to compute it; dtype: that of what is computed.
        taken_as: the dtype in which it takes part: autocast may narrow it.
        source: where it comes from.
    """

    value: Value
    dtype: torch.dtype
    taken_as: torch.dtype
    source: Source


def assemble(facts: Facts, interior: tuple[fx.Node, ...], walk: Walk) -> Proof:
    """The proof of one attention.

    Raises:
        Unproved: something about it is not what the operator computes.
    """
    query, key = _query_and_key(facts)
    found = (
        sources(query, facts.start, facts.output, walk),
        sources(key, facts.start, facts.output, walk),
        sources(facts.value, facts.output, facts.output, walk),
    )
    if not all(found):
        raise Unproved("query or key may change in place before the product with the values")
    heads = _heads(facts, query, key, found)
    dims = (
        (heads.batch, heads.heads, heads.query, heads.channel),
        (heads.batch, heads.kv_heads, heads.key, heads.channel),
        (heads.batch, heads.kv_heads, heads.key, heads.value),
    )
    made = [choose(each, wanted, walk.sizes) for each, wanted in zip(found, dims, strict=True)]
    if None in made:
        raise Unproved("the shape of query, key or value depends on sizes that vary")
    products = (facts.start, facts.start, facts.output)
    inputs = [
        _input(*part, at) for part, at in zip(made, products, strict=True) if part is not None
    ]
    _check_head_dim(heads)
    inputs[:2] = _with_tensor_factors(facts, heads, inputs[0], inputs[1], walk)
    compute = _compute_dtype(facts, inputs)
    analysis = _masks(facts, heads, walk)
    rest = explicit(analysis.terms, compute) if analysis.terms else None
    inputs[0] = _with_replaced_rows(inputs[0], rest)
    semantics = _semantics(facts, analysis, analysis.live or (rest is not None and rest.alive))
    if semantics.scale is not None and semantics.scale < 0:  # torch's causal kernels need it so
        semantics = replace(semantics, scale=-semantics.scale)
        inputs[0] = replace(inputs[0], value=Apply(_aten.neg.default, (inputs[0].value,)))
    mask = None if rest is None else rest.mask
    sinks = _sinks(facts, heads, walk)
    readers = [(each.source.node, each.source.reader) for each in inputs]
    readers += [(term.node, term.reader) for term in analysis.terms]
    readers += [(factor.node, factor.reader) for factor in facts.scores.tensor_factors]
    _check_reads([*(each.value for each in inputs), mask, sinks], readers, facts, interior, walk)
    device = tensor_of(facts.output)
    assert device is not None
    return Proof(
        output=facts.output,
        query=_cast(inputs[0], compute),
        key=_cast(inputs[1], compute),
        value=_cast(inputs[2], compute),
        mask=Mask(mask, analysis.text, analysis.proof),
        semantics=semantics,
        q_shape=shape_of(product(dim) for dim in dims[0]),
        kv_shape=shape_of(product(dim) for dim in dims[2]),
        sinks=sinks,
        result=_result(facts, heads, compute, walk),
        interior=interior,
        autocasts=False,
        without_autocast=walk.may_autocast(device.device.type),
    )


# --- roles ----------------------------------------------------------------------------------


def _query_and_key(facts: Facts) -> tuple[Operand, Operand]:
    """The factors of the first product: the one with the softmax's axes is the key."""
    left, right = facts.scores_product.left, facts.scores_product.right
    key = set(flat(facts.key))
    if key <= set(axes_of(left.layout)):
        left, right = right, left
    if not key <= set(axes_of(right.layout)) or key & set(axes_of(left.layout)):
        raise Unproved("the softmax does not run over the keys of the product before it")
    for operand in (left, right, facts.value):
        tensor = tensor_of(operand.node)
        if tensor is None or not is_plain(tensor) or not tensor.is_floating_point():
            raise Unproved("query, key or value is no plain floating point tensor")
    return left, right


def _heads(facts: Facts, query: Operand, key: Operand, found: tuple[list[Source], ...]) -> Heads:
    key_axes, query_axes = flat(facts.key), _query_axes(facts, query, key)
    inside = axes_of(facts.weights.layout)
    positions = {*key_axes, *query_axes}
    outer = [axis for axis in inside if axis not in positions]
    value_axes = axes_of(facts.value.layout)
    if not set(query_axes).isdisjoint(value_axes):
        raise Unproved("the values vary with the query position")
    shared = repeated(outer, found[1]) & repeated(outer, found[2])
    dims = [flat(dim) for dim in facts.weights.layout]
    batch, heads = group([dim for dim in dims if positions.isdisjoint(dim)], shared)
    channel = flat(facts.scores_product.summed)
    channels = tuple(axis for axis in value_axes if axis not in set(inside))
    # Batch and heads folded into one dim may stay a size that varies.
    for axis in (*(heads if batch else ()), *channel, *channels):
        axis.size = constant_size(axis.size)
    kept = frozenset(axis for axis in heads if axis in shared)
    return Heads(batch, heads, kept, query_axes, key_axes, channel, channels)


def _query_axes(facts: Facts, query: Operand, key: Operand) -> Dim:
    """The axes of the query position: those of one dim over which the keys do not vary.

    Where several dims qualify, as heads that share a key do, any choice is right; the last is the
    usual one, and a size that varies is a length.
    """
    of_key = set(axes_of(key.layout))
    own = {axis for axis in axes_of(query.layout) if axis not in of_key}
    own -= set(flat(facts.scores_product.summed))
    dims = [flat(dim) for dim in facts.weights.layout]
    dims = [dim for dim in dims if dim and own.issuperset(dim)]
    if not dims:
        return ()
    symbolic = [dim for dim in dims if not isinstance(product(dim), int)]
    return symbolic[-1] if symbolic else dims[-1]


def _check_head_dim(heads: Heads) -> None:
    channel, query, key = (product(dim) for dim in (heads.channel, heads.query, heads.key))
    for name, size in (("head_dim", channel), ("head_dim of value", product(heads.value))):
        if not isinstance(size, int) or size == 0:
            raise Unproved(f"{name} is {size}; a number is needed")
    for size in (product(heads.heads), product(heads.kv_heads)):
        if not isinstance(size, int) and heads.batch:
            raise Unproved(f"{size} heads; a number is needed")
    longest = max((size for size in (query, key) if isinstance(size, int)), default=0)
    if isinstance(channel, int) and channel > _MAX_HEAD_DIM and channel > longest > 0:
        raise Unproved(
            f"attention over channels: the product runs over {channel} entries, the softmax over "
            f"{key}, and no kernel takes a head_dim above {_MAX_HEAD_DIM}"
        )


# --- dtypes ---------------------------------------------------------------------------------


def _input(value: Value, source: Source, multiplied_by: fx.Node) -> _Input:
    tensor, result = tensor_of(source.node), tensor_of(multiplied_by)
    assert tensor is not None and result is not None
    narrowed = result.dtype.itemsize < tensor.dtype.itemsize
    return _Input(value, tensor.dtype, result.dtype if narrowed else tensor.dtype, source)


def _compute_dtype(facts: Facts, inputs: list[_Input]) -> torch.dtype:
    output = tensor_of(facts.output)
    assert output is not None
    compute = output.dtype
    for each in inputs:
        compute = torch.promote_types(compute, each.taken_as)
    if compute not in DTYPES:
        raise Unproved(f"{compute}: the operator takes float32, bfloat16 and float16")
    return compute


def _cast(given: _Input, wanted: torch.dtype) -> Value:
    if given.dtype == wanted:
        return given.value
    return Apply(_aten._to_copy.default, (given.value,), (("dtype", wanted),))


# --- factors --------------------------------------------------------------------------------


def _with_tensor_factors(
    facts: Facts, heads: Heads, query: _Input, key: _Input, walk: Walk
) -> list[_Input]:
    """Query and key with the tensors that multiply the scores folded into them."""
    for factor in facts.scores.tensor_factors:
        axes = {axis for axis in axes_of(factor.layout) if not is_one(axis.size)}
        into_key = not axes.isdisjoint(heads.key)
        if into_key and not axes.isdisjoint({*heads.query, *heads.shared}):
            raise Unproved("the scores are multiplied by a tensor that varies with query and key")
        operand, dims = (
            (key, (heads.batch, heads.kv_heads, heads.key, ()))
            if into_key
            else (query, (heads.batch, heads.heads, heads.query, ()))
        )
        value = arrange(factor.node, factor.layout, dims, walk.sizes)
        tensor = tensor_of(factor.node)
        if value is None or tensor is None:
            raise Unproved("the shape of a factor of the scores depends on sizes that vary")
        call = _aten.div.Tensor if factor.divides else _aten.mul.Tensor
        dtype = torch.promote_types(operand.taken_as, tensor.dtype)
        product_of = Apply(call, (_cast(operand, dtype), value))
        scaled = _Input(product_of, dtype, dtype, operand.source)
        query, key = (query, scaled) if into_key else (scaled, key)
    return [query, key]


def _semantics(facts: Facts, analysis: Analysis, alive: bool) -> Semantics:
    scores = facts.scores
    factor, softcap = scores.factor, None
    if scores.inner is not None:
        factor, softcap = scores.inner * factor, abs(factor) or None
    for symbolic in scores.symbolic:
        expression = symbolic.node.expr  # head_dim is a number by now
        if not expression.is_number:
            raise Unproved(f"the scale {expression} depends on sizes that vary")
        factor *= float(expression)
    if not math.isfinite(factor) or (softcap is not None and not math.isfinite(softcap)):
        raise Unproved(f"scale={factor} is not a finite number")
    if factor == 0:
        raise Unproved("the scores are scaled by 0")
    # A finite mask may become -inf when it is scaled with the scores.
    alive = alive and all(bias.factor <= 1 for bias in scores.biases)
    alive = alive or facts.weights.dead_rows_are_zero
    return Semantics(
        mask_class=analysis.mask_class,
        window_left=analysis.window_left,
        window_right=analysis.window_right,
        scale=factor,
        softcap=softcap,
        dead_rows=DeadRows.ZERO if alive else DeadRows.NAN,
    )


# --- masks ----------------------------------------------------------------------------------


def _masks(facts: Facts, heads: Heads, walk: Walk) -> Analysis:
    """The biases as terms in the operator's dims, and what they come to."""
    biases = facts.scores.biases
    if not biases:
        return Analysis(live=True)
    if facts.scores.sinks is not None:  # beside a sink, a row that sees nothing weighs nothing
        biases = [replace(bias, fill=-math.inf) for bias in biases]
    terms = [_term(bias, heads, walk) for bias in biases]
    query, key = product(heads.query), product(heads.key)
    output = tensor_of(facts.output)
    assert output is not None
    found = Analysis(
        terms=tuple(terms),
        text="explicit",
        proof="dims in another order, biases scaled with the scores, or masks of several kinds",
    )
    if all(_can_be_analyzed(bias, heads) for bias in biases):
        analyzed = analyze(terms, query, key, walk.masks)
        # Which rows hide all keys by finite numbers must be seen from the explicit masks alone.
        # And what was added has a gradient in such rows, what is replaced has none.
        replaces = any(bias.kind is not TermKind.ADDITIVE for bias in biases)
        seen = analyzed.mask_class is MaskClass.NONE and (replaces or not output.requires_grad)
        if seen or not _finite_fills(analyzed):
            found = analyzed
    fill = max(_finite_fills(found), default=-math.inf)
    mixed = fill > -math.inf and any(term.kind is TermKind.ADDITIVE for term in found.terms)
    if mixed and (fill > ABSORBING or output.requires_grad):
        raise Unproved(
            f"scores are replaced by {fill} beside an additive mask: a row that both hide would "
            "change, or its gradient"
        )
    return found


def _finite_fills(analysis: Analysis) -> list[float]:
    """The finite numbers that replace scores, in rows that may see no other."""
    fills = [term.fill for term in analysis.terms if term.kind is not TermKind.ADDITIVE]
    return [fill for fill in fills if fill > -math.inf]


def _with_replaced_rows(query: _Input, rest: Explicit | None) -> _Input:
    """The query, zero in rows all of whose scores are replaced by numbers."""
    if rest is None or rest.replaced is None:
        return query
    zeroed = Apply(_aten.masked_fill.Scalar, (query.value, rest.replaced, 0.0))
    return replace(query, value=zeroed)


def _can_be_analyzed(bias: Bias, heads: Heads) -> bool:
    """Whether a mask's last dims are query and key, and a factor leaves it a mask."""
    dims = [set(flat(dim)) for dim in bias.layout[-2:]]
    wanted = [set(heads.query), set(heads.key)][-len(dims) :] if dims else []
    ordered = all(not dim or dim == right for dim, right in zip(dims, wanted, strict=True))
    return ordered and bias.factor >= _LEAST_FACTOR


def _term(bias: Bias, heads: Heads, walk: Walk) -> Term:
    dims = (heads.batch, heads.heads, heads.query, heads.key)
    value: Value | None = bias.node
    if not _is_aligned(bias.layout, dims):
        value = arrange(bias.node, bias.layout, dims, walk.sizes)
        if value is None:
            raise Unproved("the shape of a mask depends on sizes that vary")
    if bias.fill > LOWEST_FILL * _LEAST_FACTOR:
        raise Unproved(f"masked scores are scaled to {bias.fill}, which is no mask")
    if bias.factor != 1.0:
        value = Apply(_aten.mul.Scalar, (value, bias.factor))
    same = value is bias.node
    return Term(bias.node, bias.kind, bias.reader, bias.fill, None if same else value)


def _is_aligned(layout: Layout, dims: tuple[Dim, ...]) -> bool:
    """Whether a tensor broadcasts to these dims as it is."""
    if len(layout) > len(dims):
        return False
    aligned = dims[len(dims) - len(layout) :]
    return all(
        not flat(dim) or flat(dim) == flat(wanted)
        for dim, wanted in zip(layout, aligned, strict=True)
    )


# --- sinks and the result -------------------------------------------------------------------


def _sinks(facts: Facts, heads: Heads, walk: Walk) -> Value | None:
    """The sinks as one logit for each query head."""
    if facts.weights.sinks is not None:
        raise Unproved("the weights of the sinks are not dropped before the values")
    given = facts.scores.sinks
    if given is None:
        return None
    count = walk.sizes.of(heads.heads)
    if given.node is None:
        output = tensor_of(facts.output)
        assert output is not None and count is not None
        options = (("dtype", torch.float32), ("device", output.device))
        return Apply(_aten.full.default, ([count], given.constant), options)
    found = sources(Operand(given.node, given.layout), given.reader, facts.output, walk)
    for source in found:
        axes = [axis for axis in axes_of(source.layout) if not is_one(axis.size)]
        if set(axes) <= set(heads.heads):
            value = choose([source], (heads.heads,), walk.sizes)
            if value is not None:
                return value[0]
    raise Unproved("the sinks are not one number for each head")


def _result(facts: Facts, heads: Heads, compute: torch.dtype, walk: Walk) -> Value:
    """What follows the operator so that its output becomes the product with the values."""
    layout = (heads.batch, heads.heads, heads.query, heads.value)
    value = arrange(RESULT, layout, facts.values_product.layout, walk.sizes)
    if value is None:
        raise Unproved("the shape of the output depends on sizes that vary")
    output = tensor_of(facts.output)
    assert output is not None
    if output.dtype != compute:
        value = Apply(_aten._to_copy.default, (value,), (("dtype", output.dtype),))
    return value


def _check_reads(
    values: list[Any],
    readers: list[tuple[fx.Node, fx.Node]],
    facts: Facts,
    interior: tuple[fx.Node, ...],
    walk: Walk,
) -> None:
    """What the operator reads later than the model did must not have changed in between."""
    for node, reader in readers:
        if walk.effects.changed(node, reader, facts.output):
            raise Unproved(f"{operation(node)} is changed in place before the values are read")
    last, inside = walk.effects.position(facts.output), {*interior}
    for node in nodes_of(values):
        if node in inside:
            raise Unproved("a mask or factor of the scores is computed from the scores")
        if walk.effects.position(node) >= last:
            raise Unproved("a size that the operator needs is computed only later")
