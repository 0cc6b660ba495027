"""Find every attention of a graph, and say of each what it computes or why it is kept.

``RECOGNIZERS`` is the visible list: one entry per form, tried at every node in order. Adding a
form means adding a recognizer and its tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, Final

import torch
from torch import SymFloat, SymInt, Tensor, fx
from torch._ops import HigherOrderOperator
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sage_compiler.passes.chain import recognize_chain
from sage_compiler.passes.encoder_layer import recognize_encoder_layer, recognize_native_attention
from sage_compiler.passes.identity import LayerNames
from sage_compiler.passes.masks import Term, TermKind, analyze
from sage_compiler.passes.multi_head import recognize_multi_head_attention
from sage_compiler.passes.normalize import (
    argument,
    is_plain,
    may_mutate,
    operation,
    shape_of,
    source_of,
    tensor_of,
)
from sage_compiler.passes.site import AttentionSite, Finding, Mask, Proof, Rejected, Shape
from sage_compiler.passes.spelling import is_whole_slice
from sage_compiler.passes.values import RESULT, Apply, Value
from sage_compiler.passes.walk import Walk, constant_number, constant_size
from sage_compiler.semantics import DTYPES, MaskClass, Semantics


@dataclass(slots=True)
class Context:
    """What recognizers share while one graph is searched."""

    names: LayerNames = field(default_factory=LayerNames)
    walks: dict[fx.Graph, Walk] = field(default_factory=dict)
    pinned: bool = False  # inside a region where the user chose SDPA's backend
    transforms: int = 0  # how many of torch.func's transforms are open

    def walk(self, node: fx.Node) -> Walk:
        """What is known of the graph of ``node``."""
        if node.graph not in self.walks:
            self.walks[node.graph] = Walk(node.graph)
        return self.walks[node.graph]

    def reason(self) -> str | None:
        """Why nothing is rewritten here, whatever it computes."""
        if self.pinned:
            return "inside sdpa_kernel(...): the user chose how attention is computed"
        if self.transforms:
            return "inside a transform of torch.func (vmap, grad, ...): no rule for the operator"
        return None


@dataclass(frozen=True, slots=True)
class Recognizer:
    """One form of attention.

    Attributes:
        form: its name in reports.
        operations: bare names of the operations to look at.
        recognize: the proof, or the reason why the node is kept; None when the node is no
            attention at all.
    """

    form: str
    operations: frozenset[str]
    recognize: Callable[[fx.Node, Context], Proof | str | None]


def detect(gm: fx.GraphModule) -> list[Finding]:
    """Every attention in the graph, in order: proved sites, and the rest with reasons."""
    return _search(gm, Context())


def _search(gm: fx.GraphModule, context: Context, body_of: str = "") -> list[Finding]:
    """The attentions of a graph and of the bodies of its higher-order operators.

    ``body_of`` names the operator to which this graph is a body: attention there is kept.
    """
    findings: list[Finding] = []
    for node in gm.graph.nodes:
        if node.op not in ("call_function", "call_method"):
            continue
        name = operation(node)
        _track_regions(node, name, context)
        for recognizer in RECOGNIZERS:
            if name not in recognizer.operations:
                continue
            result = recognizer.recognize(node, context)
            if body_of and isinstance(result, Proof):
                result = f"inside the body of the higher-order operator {body_of}"
            if result is not None:
                findings.append(_finding(node, recognizer.form, result, context))
                break
        for body in _bodies(gm, node):
            findings.extend(_search(body, context, name))
    return findings


def _bodies(gm: fx.GraphModule, node: fx.Node) -> list[fx.GraphModule]:
    """The graphs that a higher-order operator is given."""
    if not isinstance(node.target, HigherOrderOperator):
        return []
    given = [
        getattr(gm, str(source.target), None)
        for source in node.all_input_nodes
        if source.op == "get_attr"
    ]
    return [body for body in given if isinstance(body, fx.GraphModule)]


def _finding(node: fx.Node, form: str, result: Proof | str, context: Context) -> Finding:
    layer, source = context.names.next(node), source_of(node)
    if isinstance(result, str):
        return Rejected(node, layer, form, source, result, *_known_shapes(node))
    proved = {each.name: getattr(result, each.name) for each in fields(result)}
    return AttentionSite(**proved, layer=layer, form=form, source=source)


def _known_shapes(node: fx.Node) -> tuple[Shape, Shape]:
    """Shapes of a kept call's query and value, for the report."""
    query, value = tensor_of(argument(node, 0, "query")), tensor_of(argument(node, 2, "value"))
    return (
        () if query is None or not is_plain(query) else shape_of(query.shape),
        () if value is None or not is_plain(value) else shape_of(value.shape),
    )


# --- scaled_dot_product_attention -----------------------------------------------------------


def recognize_sdpa(node: fx.Node, context: Context) -> Proof | str | None:
    """scaled_dot_product_attention in all spellings: F., torch.ops.aten, positional, keyword."""
    reason = context.reason()
    if reason is not None:
        return reason
    inputs = _inputs(node, argument(node, 7, "enable_gqa", False) is True)
    if isinstance(inputs, str):
        return inputs
    query, key, value, q_shape, kv_shape, outcome = inputs
    scalars = {
        "dropout_p": _number(argument(node, 4, "dropout_p", 0.0)),
        "is_causal": _number(argument(node, 5, "is_causal", False)),
        "scale": _number(argument(node, 6, "scale")),
        "enable_gqa": argument(node, 7, "enable_gqa", False),
    }
    for name, given in scalars.items():
        if isinstance(given, fx.Node):
            return f"{name} is computed at run time; a constant is needed"
    dropout, is_causal, scale, _ = scalars.values()
    if dropout != 0.0:
        return f"dropout_p={dropout}: scaled_dot_product_attention drops whenever it is positive"
    if scale is not None and not math.isfinite(scale):
        return f"scale={scale} is not finite"
    found = _mask_argument(node, bool(is_causal), context)
    if isinstance(found, str):
        return found
    mask, semantics = found
    if scale is not None:
        semantics = replace(semantics, scale=float(scale))
    return Proof(
        output=node,
        query=query,
        key=key,
        value=value,
        mask=mask,
        semantics=semantics,
        q_shape=q_shape,
        kv_shape=kv_shape,
        result=outcome,
    )


def _inputs(
    node: fx.Node, enable_gqa: bool
) -> tuple[Value, Value, Value, Shape, Shape, Value] | str:
    """Q, K, V, their 4-D shapes, and what follows the operator; or why they do not qualify.

    Repeats of K and V are undone; more than one batch dim is folded into one.
    """
    nodes = [argument(node, at, name) for at, name in enumerate(("query", "key", "value"))]
    tensors = [tensor_of(given) for given in nodes]
    output = tensor_of(node)
    if output is None or any(tensor is None for tensor in tensors):
        return "shapes and dtypes of query, key and value are not recorded in the graph"
    q, k, v = (tensor for tensor in tensors if tensor is not None)
    if not all(is_plain(tensor) for tensor in (q, k, v, output)):
        return "query, key or value is nested, sparse or of a tensor subclass"
    if output.dtype not in DTYPES:
        return f"{output.dtype}: the operator takes float32, bfloat16 and float16"
    if not (q.is_floating_point() and k.is_floating_point() and v.is_floating_point()):
        return f"query, key, value are {q.dtype}, {k.dtype}, {v.dtype}; floating point is needed"
    if q.dim() < 3 or k.dim() != q.dim() or v.dim() != q.dim():
        return f"{q.dim()}-D query, {k.dim()}-D key, {v.dim()}-D value; 3-D or more is needed"
    if q.device != k.device or q.device != v.device:
        return f"query on {q.device}, key on {k.device}, value on {v.device}"
    query, key, value = nodes
    outcome: Value = RESULT
    if q.dim() > 4:
        if any(isinstance(size, SymInt) for size in (*q.shape, *k.shape, *v.shape)):
            return f"{q.dim()}-D query, key and value with sizes that vary"
        if not q.shape[:-3] == k.shape[:-3] == v.shape[:-3]:
            return f"query has batch {tuple(q.shape[:-3])} and key {tuple(k.shape[:-3])}"
        query, key, value = (_folded(each) for each in nodes)
        outcome = Apply(torch.ops.aten.reshape.default, (RESULT, list(output.shape)))
    elif q.dim() == 4:
        key, value = _undo_repeats(node, key, value)
        k, v = _known(key), _known(value)
    q_sizes, k_sizes, v_sizes = _sizes(q), _sizes(k), _sizes(v)
    undone = key is not nodes[1] and q.dim() == 4
    reason = _disagreement(q_sizes, k_sizes, v_sizes, enable_gqa or undone)
    if reason is not None:
        return reason
    return query, key, value, shape_of(q_sizes), shape_of(v_sizes), outcome


def _folded(node: fx.Node) -> Value:
    """A tensor of more than four dims with its batch dims in one."""
    shape = _known(node).shape
    folded = [math.prod(shape[:-3]), *shape[-3:]]
    return Apply(torch.ops.aten.reshape.default, (node, folded))


def _number(given: Any) -> Any:
    """A scalar argument; one that is computed from constants by now, as a number."""
    value = given.meta.get("example_value") if isinstance(given, fx.Node) else given
    if isinstance(value, (SymFloat, SymInt)):
        number = constant_number(value)
        return number if isinstance(number, float) else given
    return given


def _sizes(tensor: Tensor) -> tuple[Any, ...]:
    """(B, heads, length, head_dim); a 3-D tensor's first dim serves as heads."""
    *batch, heads, length, head_dim = tensor.shape
    if not batch:
        return 1, heads, length, constant_size(head_dim)
    return math.prod(batch), constant_size(heads), length, constant_size(head_dim)


def _disagreement(
    q: tuple[Any, ...], k: tuple[Any, ...], v: tuple[Any, ...], grouped: bool
) -> str | None:
    """Why (B, heads, length, head_dim) of Q, K, V are not one attention, or None."""

    def same(a: Any, b: Any) -> bool:
        return a is b or statically_known_true(a == b)

    if not same(k[0], v[0]):
        return f"key has batch {k[0]} and value {v[0]}"
    if not (same(q[0], k[0]) or same(q[0], 1) or same(k[0], 1)):
        return f"query has batch {q[0]} and key {k[0]}; they are not provably equal"
    if not same(k[1], v[1]):
        return f"key has {k[1]} heads and value {v[1]}"
    if not same(q[1], k[1]):
        if not (isinstance(q[1], int) and isinstance(k[1], int)):
            return f"query has {q[1]} heads and key {k[1]}; they are not provably equal"
        if not (grouped or k[1] == 1) or k[1] == 0 or q[1] % k[1]:
            return f"query has {q[1]} heads and key {k[1]}"
    if not same(q[3], k[3]) or not isinstance(q[3], int) or not isinstance(v[3], int):
        return f"query has head_dim {q[3]}, key {k[3]}, value {v[3]}"
    if q[3] == 0:
        return "head_dim 0"
    return None


def _mask_argument(
    node: fx.Node, is_causal: bool, context: Context
) -> tuple[Mask, Semantics] | str:
    """The mask of a call, and its class; or why it is not understood."""
    mask = argument(node, 3, "attn_mask")
    if mask is None:
        if is_causal:
            proof = "is_causal=True: top-left by definition"
            return Mask(None, "causal", proof), Semantics(MaskClass.CAUSAL)
        return Mask(None, "none", "no mask is given"), Semantics()
    if is_causal:
        return "attn_mask together with is_causal: the backends of SDPA disagree on it"
    tensor = tensor_of(mask)
    if tensor is None:
        return "the mask's shape is not recorded in the graph"
    if not is_plain(tensor):
        return "the mask is nested, sparse or of a tensor subclass"
    if tensor.dim() > 4 or (tensor.dim() == 4 and _rank(node) != 4):
        return f"{tensor.dim()}-D mask for a {_rank(node)}-D query"
    kind = TermKind.VISIBLE if tensor.dtype == torch.bool else TermKind.ADDITIVE
    query, value = (_known(argument(node, at, name)) for at, name in ((0, "query"), (2, "value")))
    masks, whole = context.walk(node).masks, Term(mask, kind, reader=node)
    found = analyze([whole], query.shape[-2], value.shape[-2], masks)
    semantics = Semantics(found.mask_class, found.window_left, found.window_right)
    if not found.terms:
        return Mask(None, found.text, found.proof), semantics
    left = found.terms[0]
    simple = len(found.terms) == 1 and left.value is None and left.kind is kind
    if not simple or masks.effects.changed(left.node, left.reader, node):
        return Mask(mask, found.text, found.proof), Semantics()
    return Mask(left.node, found.text, found.proof), semantics


def _rank(node: fx.Node) -> int:
    return _known(argument(node, 0, "query")).dim()


def _known(node: fx.Node) -> Tensor:
    tensor = tensor_of(node)
    assert tensor is not None
    return tensor


# --- repeated key/value heads ---------------------------------------------------------------


def _undo_repeats(attention: fx.Node, key: fx.Node, value: fx.Node) -> tuple[fx.Node, fx.Node]:
    """K and V before their heads were repeated, when both were, equally and unmutated since."""
    before_key, before_value = _before_repeat(key), _before_repeat(value)
    if before_key is None or before_value is None:
        return key, value
    if _known(before_key).shape[1] != _known(before_value).shape[1]:
        return key, value
    for start in (before_key, before_value):
        node = start.next
        while node is not attention:
            if may_mutate(node):
                return key, value
            node = node.next
    return before_key, before_value


def _before_repeat(node: fx.Node) -> fx.Node | None:
    """x of (B, Hkv, L, D) where ``node`` is x with every head repeated n times in a row."""
    if operation(node) == "repeat_interleave":
        source, dim = argument(node, 0, "input"), argument(node, 2, "dim")
        if isinstance(argument(node, 1, "repeats"), int) and dim in (1, -3):
            return _whole(source, node)
        return None
    # reshape(expand(x[:, :, None], (B, Hkv, n, L, D)), (B, Hkv * n, L, D))
    if operation(node) not in ("reshape", "flatten", "view", "_unsafe_view"):
        return None
    expand = argument(node, 0, "input")
    if not isinstance(expand, fx.Node) or operation(expand) != "expand":
        return None
    new_axis = _unsliced(expand.args[0])
    if not isinstance(new_axis, fx.Node):
        return None
    source = _unsliced(argument(new_axis, 0, "input"))
    if operation(new_axis) == "getitem":
        full = slice(None)
        index = new_axis.args[1]
        inserted = isinstance(index, tuple) and index in (
            (full, full, None),
            (full, full, None, full, full),
        )
    else:
        inserted = operation(new_axis) == "unsqueeze" and argument(new_axis, 1, "dim") in (2, -3)
    before, wide = tensor_of(new_axis), tensor_of(expand)
    if not inserted or before is None or wide is None or wide.dim() != 5 or before.dim() != 5:
        return None
    # Only the new axis may have grown: the others would change the order of heads and tokens.
    if not all(statically_known_true(before.shape[at] == wide.shape[at]) for at in (0, 1, 3, 4)):
        return None
    return _whole(source, node)


def _unsliced(value: object) -> object:
    """What a value was before slices that take everything."""
    while isinstance(value, fx.Node) and is_whole_slice(value):
        value = argument(value, 0, "input")
    return value


def _whole(source: object, repeated: fx.Node) -> fx.Node | None:
    """``source`` when its shape times a number of heads is the repeated shape."""
    before, after = tensor_of(source), tensor_of(repeated)
    if before is None or after is None or before.dim() != 4 or after.dim() != 4:
        return None
    static = isinstance(before.shape[1], int) and isinstance(after.shape[1], int)
    if not static or before.shape[1] == 0 or after.shape[1] % before.shape[1]:
        return None
    kept = all(statically_known_true(before.shape[at] == after.shape[at]) for at in (0, 2, 3))
    assert isinstance(source, fx.Node)
    return source if kept else None


# --- attention that is kept -----------------------------------------------------------------


def _keep(reason: str) -> Callable[[fx.Node, Context], str]:
    def recognize(node: fx.Node, context: Context) -> str:
        return reason

    return recognize


def _proved_by(
    prove: Callable[[fx.Node, Walk], Proof | str],
) -> Callable[[fx.Node, Context], Proof | str]:
    def recognize(node: fx.Node, context: Context) -> Proof | str:
        return context.reason() or prove(node, context.walk(node))

    return recognize


def recognize_softmax(node: fx.Node, context: Context) -> Proof | str:
    """Attention written out around a softmax, or why that softmax is something else."""
    return context.reason() or recognize_chain(node, context.walk(node))


def recognize_operator(node: fx.Node, context: Context) -> str:
    """sage::attention that the model already calls."""
    return "already sage::attention, called by the model"


RECOGNIZERS: Final[tuple[Recognizer, ...]] = (
    Recognizer("sdpa", frozenset({"scaled_dot_product_attention"}), recognize_sdpa),
    Recognizer("softmax", frozenset({"softmax", "_softmax"}), recognize_softmax),
    Recognizer(
        "softmax of another kind",
        frozenset({"gumbel_softmax", "log_softmax", "_log_softmax", "softmin"}),
        _keep("not a plain softmax"),
    ),
    Recognizer("sage::attention", frozenset({"sage::attention"}), recognize_operator),
    Recognizer(
        "sdpa kernel",
        frozenset(
            [
                "_scaled_dot_product_attention_math",
                "_scaled_dot_product_cudnn_attention",
                "_scaled_dot_product_efficient_attention",
                "_scaled_dot_product_flash_attention",
                "_scaled_dot_product_flash_attention_for_cpu",
                "_scaled_dot_product_fused_attention_overrideable",
            ]
        ),
        _keep("scaled_dot_product_attention is already lowered to one of its kernels here"),
    ),
    Recognizer(
        "multi_head_attention_forward",
        frozenset({"multi_head_attention_forward"}),
        _proved_by(recognize_multi_head_attention),
    ),
    Recognizer(
        "multi-head attention, fast path",
        frozenset({"_native_multi_head_attention"}),
        _proved_by(recognize_native_attention),
    ),
    Recognizer(
        "transformer encoder layer, fast path",
        frozenset({"_transformer_encoder_layer_fwd"}),
        _proved_by(recognize_encoder_layer),
    ),
    Recognizer(
        "flex_attention",
        frozenset({"flex_attention"}),
        _keep("flex_attention is a higher-order operator with a kernel of its own"),
    ),
)

# --- regions --------------------------------------------------------------------------------

_TRANSFORMS: Final = {
    f"_{transform}_{step}_nesting": change
    for transform in ("vmap", "grad", "jvp", "func")
    for step, change in (("increment", 1), ("decrement", -1))
}
_ALL_BACKENDS: Final = frozenset({"FLASH_ATTENTION", "EFFICIENT_ATTENTION", "MATH"})


def _track_regions(node: fx.Node, name: str, context: Context) -> None:
    """Enter and leave the regions in which nothing is rewritten.

    ``with sdpa_kernel(...)`` appears as a call with the chosen backends, later one with all;
    vmap, grad and jvp as a call at either end.
    """
    if name in _TRANSFORMS:
        context.transforms += _TRANSFORMS[name]
    if name != "_sdpa_kernel" or not node.args:
        return
    chosen = node.args[0]
    listed = chosen if isinstance(chosen, (list, tuple)) else [chosen]
    names = {
        str(entry.args[0]) if isinstance(entry, fx.Node) and entry.args else str(entry)
        for entry in listed
    }
    context.pinned = not names >= _ALL_BACKENDS
