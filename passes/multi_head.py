"""nn.MultiheadAttention where it is one call in the graph: ``F.multi_head_attention_forward``.

The proof repeats, step by step, what the function of torch.nn.functional does around the
attention: projections, appended keys, masks merged into one, the output projection.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import SymFloat, SymInt, fx

from sage_compiler.passes.assembly import Unproved
from sage_compiler.passes.axes import Size
from sage_compiler.passes.call_masks import (
    combine,
    explicit,
    kind_of,
    known,
    pad_keys,
    padding_term,
)
from sage_compiler.passes.explicit import compose
from sage_compiler.passes.masks import Analysis
from sage_compiler.passes.normalize import argument, is_plain, operation, shape_of, tensor_of
from sage_compiler.passes.site import Mask, Proof
from sage_compiler.passes.terms import Term
from sage_compiler.passes.values import RESULT, Apply, Value, nodes_of
from sage_compiler.passes.walk import Walk, constant_size
from sage_compiler.semantics import DTYPES, DeadRows, MaskClass, Semantics

_aten = torch.ops.aten
LENGTH_FIRST: Final = (1, 2, 0, 3)  # (L, B, H, D) as (B, H, L, D)
BATCH_FIRST: Final = (0, 2, 1, 3)  # (B, L, H, D) as (B, H, L, D)
_DEFAULTS: Final = {
    name: parameter.default
    for name, parameter in inspect.signature(F.multi_head_attention_forward).parameters.items()
}


@dataclass(frozen=True, slots=True)
class Heads:
    """How many heads of which head_dim, and which dims of an input they are given in.

    Attributes:
        count, dim: H and D.
        order: the permutation that takes a split input to (B, H, L, D).
    """

    count: int
    dim: int
    order: tuple[int, int, int, int]


class Arguments:
    """The arguments of one call by name, whatever way they were passed.

    Every method raises Unproved for an argument that is not what it returns.
    """

    def __init__(self, call: fx.Node, defaults: dict[str, Any], walk: Walk) -> None:
        self._call, self._walk = call, walk
        self._given = {
            name: argument(call, position, name, default)
            for position, (name, default) in enumerate(defaults.items())
        }

    def tensor(self, name: str) -> fx.Node | None:
        """A plain tensor, or None."""
        given = self._given[name]
        if given is None:
            return None
        tensor = tensor_of(given)
        if tensor is None:
            raise Unproved(f"the shape and dtype of {name} are not recorded in the graph")
        if not is_plain(tensor):
            raise Unproved(f"{name} is nested, sparse or of a tensor subclass")
        assert isinstance(given, fx.Node)
        return given

    def floating(self, name: str) -> fx.Node:
        """A plain tensor of floating point."""
        node = self.tensor(name)
        if node is None:
            raise Unproved(f"{name} is None")
        dtype = known(node).dtype
        if not dtype.is_floating_point:
            raise Unproved(f"{name} is {dtype}; floating point is needed")
        return node

    def floating_or_none(self, name: str) -> fx.Node | None:
        """A plain tensor of floating point, or None."""
        return None if self._given[name] is None else self.floating(name)

    def number(self, name: str) -> float:
        """A number that the compiled graph may be specialized on."""
        found = self._walk.number(self._given[name], self._call)
        if isinstance(found, SymInt):
            found = constant_size(found)
        if found is None or isinstance(found, (SymFloat, SymInt)):
            raise Unproved(f"{name} is computed at run time; a constant is needed")
        return found

    def flag(self, name: str) -> bool:
        """True or False."""
        return self.number(name) != 0

    def is_given(self, name: str) -> bool:
        """Whether an argument is not None."""
        return self._given[name] is not None


# --- the call -------------------------------------------------------------------------------


def recognize_multi_head_attention(call: fx.Node, walk: Walk) -> Proof | str:
    """Prove what multi_head_attention_forward computes here, or say why it is kept."""
    try:
        return _prove(call, Arguments(call, _DEFAULTS, walk), walk)
    except Unproved as reason:
        return str(reason)


def _prove(call: fx.Node, given: Arguments, walk: Walk) -> Proof:
    output = only_output(call)
    dropout = given.number("dropout_p")
    if dropout != 0 and given.flag("training"):
        raise Unproved(f"dropout_p={dropout} in training")
    embed_dim, heads = int(given.number("embed_dim_to_check")), int(given.number("num_heads"))
    split = split_heads(embed_dim, heads, LENGTH_FIRST)
    query, key, value = _operands(given, split)
    value_tensor = known(given.floating("value"))
    extra = given.is_given("bias_k") + given.flag("add_zero_attn")
    lengths = known(given.floating("query")).shape[0], _key_length(given) + extra
    with_weights = given.flag("need_weights")
    analysis = _masks(call, given, split, lengths, extra, walk)
    alive = analysis.live
    if analysis.terms and walk.may_autocast(value_tensor.device.type):
        alive = False  # a mask cast to half precision may hide with -inf what had a finite number
    if not with_weights:
        alive = True  # scaled_dot_product_attention yields 0 there
    result = merge_heads(given.floating("out_proj_weight"), given.tensor("out_proj_bias"), split)
    batch: Size = 1
    if value_tensor.dim() == 3:
        batch = value_tensor.shape[1]
    else:
        result = Apply(_aten.squeeze.dim, (result, 1))
    q_shape = (batch, heads, lengths[0], split.dim)
    kv_shape = (batch, heads, lengths[1], split.dim)
    found = (query, key, value, result)
    return conclude(call, output, found, analysis, alive, (q_shape, kv_shape), walk)


def conclude(
    call: fx.Node,
    output: fx.Node,
    values: tuple[Value, Value, Value, Value],
    analysis: Analysis,
    alive: bool,
    shapes: tuple[Sequence[Size], Sequence[Size]],
    walk: Walk,
) -> Proof:
    """The proof of a call, once everything it reads is checked.

    Args:
        call, output: the call, and the node whose value the operator replaces.
        values: query, key, value, and what follows the operator.
        analysis: the masks.
        alive: a row without a visible key is zero, or there is none.
        shapes: of query and value.

    Raises:
        Unproved: what is computed, or read, is not the same at ``output``.
    """
    tensor = tensor_of(output)
    if tensor is None:
        raise Unproved("the shape and dtype of the output are not recorded in the graph")
    if tensor.dtype not in DTYPES:
        raise Unproved(f"{tensor.dtype}: the operator takes float32, bfloat16 and float16")
    mask = compose(analysis.terms, tensor.dtype) if analysis.terms else None
    readers = [(node, call) for node in nodes_of([*values, mask])]
    readers += [(term.node, term.reader) for term in analysis.terms]
    for node, reader in readers:
        if walk.effects.changed(node, reader, output):
            raise Unproved(f"{operation(node)} is changed in place before the output is taken")
    if walk.crosses_border(call, output):
        raise Unproved("autocast or the grad mode changes before the output is taken")
    query, key, value, result = values
    head_dim = shapes[0][3]
    assert isinstance(head_dim, int)
    return Proof(
        output=output,
        query=query,
        key=key,
        value=value,
        mask=Mask(mask, analysis.text, analysis.proof),
        semantics=Semantics(
            mask_class=analysis.mask_class,
            window_left=analysis.window_left,
            window_right=analysis.window_right,
            scale=math.sqrt(1.0 / head_dim),
            dead_rows=DeadRows.ZERO if alive else DeadRows.NAN,
        ),
        q_shape=shape_of(shapes[0]),
        kv_shape=shape_of(shapes[1]),
        result=result,
        interior=() if output is call else (call,),
    )


def only_output(call: fx.Node) -> fx.Node:
    """The first of a call's two results, which must be the only one that is used."""
    outputs = []
    for user in call.users:
        if operation(user) != "getitem" or user.args[1] not in (0, 1, -1, -2):
            raise Unproved(f"its result is also used whole, by {operation(user)}")
        if user.args[1] in (0, -2):
            outputs.append(user)
        elif user.users:
            raise Unproved("the attention weights are used")
    if len(outputs) != 1:
        raise Unproved(f"its output is taken {len(outputs)} times; once is needed")
    return outputs[0]


# --- projections ----------------------------------------------------------------------------


def split_heads(embed_dim: int, heads: int, order: tuple[int, int, int, int]) -> Heads:
    """The heads of an embedding."""
    if heads <= 0 or embed_dim <= 0 or embed_dim % heads:
        raise Unproved(f"{heads} heads of an embedding of {embed_dim}")
    return Heads(heads, embed_dim // heads, order)


def project(x: Value, weight: Value, bias: Value | None, count: int, heads: Heads) -> list[Value]:
    """``count`` projections whose weights lie one after the other in ``weight``.

    x (L, B, E) or (B, L, E), weight (count * H * D, E), bias (count * H * D,); each result is
    (B, H, L, D).
    """
    projected = Apply(_aten.linear.default, (x, weight, bias))
    parts = Apply(_aten.unflatten.int, (projected, -1, [count, heads.count, heads.dim]))
    found: list[Value] = []
    for at in range(count):
        part = Apply(_aten.select.int, (parts, 2, at))
        found.append(Apply(_aten.permute.default, (part, list(heads.order))))
    return found


def project_packed(
    inputs: tuple[Value, Value, Value], weight: Value, bias: Value | None, heads: Heads
) -> list[Value]:
    """Query, key and value from one weight (3 E, E); equal inputs share a product."""
    query, key, value = inputs
    groups = [(query, 1), (key, 1), (value, 1)]
    if key is value:
        groups = [(query, 3)] if query is key else [(query, 1), (key, 2)]
    embed_dim = heads.count * heads.dim
    found: list[Value] = []
    for x, count in groups:
        start = len(found) * embed_dim
        rows = (start, start + count * embed_dim)
        some = count < 3
        part = _rows(weight, *rows) if some else weight
        part_bias = _rows(bias, *rows) if some and bias is not None else bias
        found += project(x, part, part_bias, count, heads)
    return found


def _rows(tensor: Value, start: int, stop: int) -> Value:
    return Apply(_aten.slice.Tensor, (tensor, 0, start, stop))


def merge_heads(weight: fx.Node, bias: fx.Node | None, heads: Heads) -> Value:
    """The output projection of the operator's (B, H, L, D), in the layout of the inputs."""
    inverse = [heads.order.index(dim) for dim in range(4)]
    moved = Apply(_aten.permute.default, (RESULT, inverse))
    merged = Apply(_aten.flatten.using_ints, (moved, 2, 3))
    return Apply(_aten.linear.default, (merged, weight, bias))


def _operands(given: Arguments, heads: Heads) -> tuple[Value, Value, Value]:
    """Query, key and value as (B, H, L, D), with the keys that the call appends."""
    nodes = [given.floating(name) for name in ("query", "key", "value")]
    if known(nodes[0]).dim() not in (2, 3):
        raise Unproved(f"{known(nodes[0]).dim()}-D query; 2-D or 3-D is needed")
    batched: dict[fx.Node, Value] = {
        node: node if known(node).dim() == 3 else Apply(_aten.unsqueeze.default, (node, 1))
        for node in nodes
    }
    inputs = (batched[nodes[0]], batched[nodes[1]], batched[nodes[2]])
    bias = given.floating_or_none("in_proj_bias")
    if given.flag("use_separate_proj_weight"):
        query, key, value = _project_separately(given, inputs, bias, heads)
    else:
        weight = given.floating("in_proj_weight")
        query, key, value = project_packed(inputs, weight, bias, heads)
    key = _with_static(given.floating_or_none("static_k"), key, heads)
    value = _with_static(given.floating_or_none("static_v"), value, heads)
    if given.is_given("bias_k"):
        batch = _batch_size(nodes[0])
        key = _append(key, given.floating("bias_k"), batch, heads)
        value = _append(value, given.floating("bias_v"), batch, heads)
    if given.flag("add_zero_attn"):
        key, value = (Apply(_aten.constant_pad_nd.default, (x, [0, 0, 0, 1])) for x in (key, value))
    return query, key, value


def _project_separately(
    given: Arguments, inputs: tuple[Value, Value, Value], bias: fx.Node | None, heads: Heads
) -> list[Value]:
    """Query, key and value from three weights (E, E), (E, kdim), (E, vdim) and one bias (3 E,)."""
    embed_dim = heads.count * heads.dim
    found: list[Value] = []
    for at, name in enumerate(("q_proj_weight", "k_proj_weight", "v_proj_weight")):
        part = None if bias is None else _rows(bias, at * embed_dim, (at + 1) * embed_dim)
        found += project(inputs[at], given.floating(name), part, 1, heads)
    return found


def _with_static(static: fx.Node | None, computed: Value, heads: Heads) -> Value:
    """Given keys or values (B * H, S, D) in the place of the projected ones."""
    if static is None:
        return computed
    return Apply(_aten.unflatten.int, (static, 0, [-1, heads.count]))


def _append(x: Value, bias: fx.Node, batch: Any, heads: Heads) -> Value:
    """x (B, H, S, D) with the learned key or value ``bias`` (1, 1, E) after it in every batch."""
    split = Apply(_aten.unflatten.int, (bias, -1, [heads.count, heads.dim]))
    last = Apply(_aten.permute.default, (split, list(heads.order)))
    return Apply(
        _aten.cat.default, ([x, Apply(_aten.expand.default, (last, [batch, -1, -1, -1]))], 2)
    )


def _batch_size(query: fx.Node) -> Any:  # a number, or the call that computes it
    if known(query).dim() == 2:
        return 1
    size = known(query).shape[1]
    return size if isinstance(size, int) else Apply(_aten.sym_size.int, (query, 1))


def _key_length(given: Arguments) -> Size:
    """The number of keys before any is appended."""
    static = given.floating_or_none("static_k")
    return known(given.floating("key")).shape[0] if static is None else known(static).shape[1]


# --- masks ----------------------------------------------------------------------------------


def _masks(
    call: fx.Node,
    given: Arguments,
    heads: Heads,
    lengths: tuple[Size, Size],
    extra: int,
    walk: Walk,
) -> Analysis:
    """What the masks come to; the last ``extra`` keys, which were appended, are visible to all."""
    mask, padding = given.tensor("attn_mask"), given.tensor("key_padding_mask")
    if given.flag("is_causal") and padding is None and not given.flag("need_weights"):
        words = "is_causal=True: top-left by definition; attn_mask is not used then"
        return Analysis(MaskClass.CAUSAL, text="causal", proof=words)
    terms: list[Term] = []
    if mask is not None:
        by_head = known(mask).dim() == 3  # (B * H, L, S)
        split = Apply(_aten.unflatten.int, (mask, 0, [-1, heads.count])) if by_head else None
        terms.append(Term(mask, kind_of(mask), call, value=split))
    hides = None if padding is None else padding_term(padding, call, walk)
    if extra:
        terms += [] if hides is None else [hides]
        padded = tuple(pad_keys(term, extra) for term in terms)
        words = f"the masks of the call; it appends {extra} to the keys, which nothing hides"
        return explicit(padded, words, live=True) if terms else Analysis(live=True)
    return combine(terms, hides, lengths, walk)
