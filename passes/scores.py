"""What happens to attention scores between Q K^T and the softmax: one rule per algebraic fact.

A rule follows one operation and updates what is known of the scores: they are
``factor * Q K^T``, or its softcap, plus biases and masks in order. ``SCORE_RULES`` is the visible
list; adding a form means adding a rule and its test.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

import torch
from torch import SymFloat, SymInt, fx

from sage_compiler.passes.axes import Dim, Layout, broadcast, is_one, reshape
from sage_compiler.passes.masks import TermKind
from sage_compiler.passes.normalize import argument, operation, tensor_of
from sage_compiler.passes.spelling import base_operation, cast_of, is_inserting, permutation_of
from sage_compiler.passes.walk import Walk

# A masked score at or below this has no weight beside any live key whose score is a thousand or
# more above it; only such fills count as masks.
LOWEST_FILL: Final = -1e4

# A number added to all scores changes no weight, unless it is so large that scores lose digits.
MOST_SHIFTED: Final = 100.0


@dataclass(frozen=True, slots=True)
class Bias:
    """A tensor that is added to the scores, or says where they are replaced by ``fill``.

    Attributes:
        node, layout: the tensor and its axes.
        reader: the node that reads it.
        kind: added, or true where visible or hidden.
        fill: the score of a hidden position.
        factor: multiplies an added tensor.
    """

    node: fx.Node
    layout: Layout
    reader: fx.Node
    kind: TermKind
    fill: float = -math.inf
    factor: float = 1.0


@dataclass(frozen=True, slots=True)
class TensorFactor:
    """A tensor that multiplies (or divides) Q K^T and does not vary with both positions."""

    node: fx.Node
    layout: Layout
    reader: fx.Node
    divides: bool


@dataclass(frozen=True, slots=True)
class Sinks:
    """Logits that stand beside the keys in the softmax, in one column."""

    node: fx.Node | None  # None: a constant
    layout: Layout
    reader: fx.Node
    first: bool  # before the keys, else after them
    constant: float = 0.0


@dataclass(slots=True)
class Scores:
    """What is known of the scores at one node on the way to the softmax.

    Attributes:
        layout: the axes of its dims.
        factor: multiplies Q K^T; after a tanh, multiplies that.
        symbolic: further factors, computed from sizes.
        inner: what multiplied Q K^T inside the tanh; None before one.
        biases: in the order in which they apply.
        tensor_factors: of Q K^T.
        sinks: a column of logits beside the keys.
        shifted: whether a number was added, which a softmax does not see.
        maxima: the axes of which the maximum was subtracted: only those of the softmax qualify.
        helpers: further nodes that read the scores: the maximum of each row.
    """

    layout: Layout
    factor: float = 1.0
    symbolic: list[SymFloat | SymInt] = field(default_factory=list)
    inner: float | None = None
    biases: list[Bias] = field(default_factory=list)
    tensor_factors: list[TensorFactor] = field(default_factory=list)
    sinks: Sinks | None = None
    shifted: bool = False
    maxima: list[Dim] = field(default_factory=list)
    helpers: list[fx.Node] = field(default_factory=list)

    @property
    def is_bare(self) -> bool:
        """Whether these are a factor of Q K^T, or its softcap, and nothing else."""
        return not (self.biases or self.shifted or self.maxima or self.sinks is not None)


@dataclass(frozen=True, slots=True)
class ScoreRule:
    """One fact about one kind of operation.

    Attributes:
        name: of the fact.
        operations: base names of the operations it is about.
        sources: which arguments may be the scores.
        apply: updates the scores by ``node``, which reads them as ``source``; or says why not.
    """

    name: str
    operations: frozenset[str]
    sources: Callable[[fx.Node], list[Any]]
    apply: Callable[[Scores, fx.Node, fx.Node, Walk], str | None]


def _first(node: fx.Node) -> list[Any]:
    return [argument(node, 0, "input")]


def _either(node: fx.Node) -> list[Any]:
    return [argument(node, 0, "input"), argument(node, 1, "other")]


def _other(node: fx.Node, source: fx.Node) -> Any:
    left, right = _either(node)
    return right if left is source else left


# --- scale ----------------------------------------------------------------------------------


def _multiply(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    other = _other(node, source)
    if other is source:
        return "the scores are multiplied by themselves"
    divides = base_operation(node) in ("div", "truediv")
    if divides and (
        argument(node, 0, "input") is not source or node.kwargs.get("rounding_mode") is not None
    ):
        return "the scores are not simply divided by a number"
    number = _number(scores, other, node, walk)
    if number is None:
        return _multiply_tensor(scores, node, other, divides)
    if isinstance(number, (SymInt, SymFloat)):
        if scores.biases or scores.sinks is not None or scores.inner is not None:
            return "scores and biases are scaled by a number that depends on sizes"
        scores.symbolic.append(1 / number if divides else number)
        return None
    if divides and number == 0:
        return "the scores are divided by 0"
    return _scale(scores, 1 / number if divides else number, node)


def _scale(scores: Scores, factor: float, node: fx.Node) -> str | None:
    if not math.isfinite(factor):
        return f"the scores are scaled by {factor}"
    if scores.sinks is not None and factor != 1:
        return "the scores are scaled after the sinks were attached"
    if factor <= 0 and scores.biases:
        return f"masked or biased scores are scaled by {factor}"
    scores.factor *= factor
    scores.biases = [
        replace(bias, factor=bias.factor * factor)
        if bias.kind is TermKind.ADDITIVE
        else replace(bias, fill=_in_range(bias.fill * factor, node))
        for bias in scores.biases
    ]
    return None


def _number(
    scores: Scores, given: Any, reader: fx.Node, walk: Walk
) -> float | SymFloat | SymInt | None:
    """A number, or a constant that holds one number and leaves the scores their shape."""
    tensor = tensor_of(given)
    if tensor is not None and isinstance(_layout_of(given, scores), str):
        return None
    return walk.number(given, reader)


def _in_range(fill: float, node: fx.Node) -> float:
    """A number as the dtype of a node holds it: below its range it is -inf."""
    tensor = tensor_of(node)
    assert tensor is not None
    return fill if fill >= torch.finfo(tensor.dtype).min else -math.inf


def _negate(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    return _scale(scores, -1.0, node)


def _multiply_tensor(scores: Scores, node: fx.Node, other: Any, divides: bool) -> str | None:
    if not scores.is_bare or scores.inner is not None:
        return "biased, shifted or masked scores are multiplied by a tensor"
    layout = _layout_of(other, scores)
    if isinstance(layout, str):
        return layout
    scores.tensor_factors.append(TensorFactor(other, layout, node, divides))
    return None


def unexpanded(node: Any, reader: fx.Node, walk: Walk) -> Any:
    """A tensor before it was expanded, which broadcasting does as well."""
    while isinstance(node, fx.Node) and operation(node) in ("expand", "expand_as"):
        source = argument(node, 0, "input")
        before, after = tensor_of(source), tensor_of(node)
        if before is None or after is None or walk.crosses_border(node, reader):
            break
        node = source
    return node


def _layout_of(node: Any, scores: Scores) -> Layout | str:
    """The axes of a tensor that broadcasts against the scores, or why it does not."""
    tensor = tensor_of(node)
    if tensor is None:
        return "the shape of a tensor that meets the scores is not recorded in the graph"
    if not (tensor.is_floating_point() or tensor.dtype == torch.bool):
        return f"a tensor of {tensor.dtype} meets the scores"
    if tensor.dim() > len(scores.layout):
        return "a tensor that meets the scores has more dims than they have"
    layout = broadcast(tensor.shape, scores.layout)
    return "a tensor that meets the scores is larger than they are" if layout is None else layout


# --- softcap --------------------------------------------------------------------------------


def _tanh(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    if not scores.is_bare:
        return "biased, shifted or masked scores go through tanh"
    if scores.inner is not None:
        return "the scores go through tanh twice"
    scores.inner, scores.factor = scores.factor, 1.0
    return None


# --- biases and masks -----------------------------------------------------------------------


def _add(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    other = _other(node, source)
    subtracts = base_operation(node) in ("sub", "rsub")
    alpha = node.kwargs.get("alpha", 1)
    if not isinstance(alpha, (int, float)) or (alpha != 1 and argument(node, 1, "other") is source):
        return "the scores are added with a factor"
    if subtracts and _subtrahend(node) is other and _is_maximum_of(other, source, scores):
        return None  # the softmax of a row does not change when a number is subtracted from it
    if scores.sinks is not None:
        return "the scores change after the sinks were attached"
    number = _number(scores, other, node, walk)
    if isinstance(number, float) and abs(number) > MOST_SHIFTED:
        return f"{number} is added to all scores, which then lose digits"
    if subtracts and _subtrahend(node) is source:
        reason = _scale(scores, -1.0, node)
        if reason is not None:
            return reason
        subtracts = False
    sign = float(-alpha if subtracts else alpha)
    if isinstance(number, float):
        scores.shifted = True  # the same number everywhere: a softmax does not see it
        return None
    return add_bias(scores, other, node, sign, walk)


def _subtrahend(node: fx.Node) -> Any:
    return argument(node, 0 if base_operation(node) == "rsub" else 1, "other")


def add_bias(scores: Scores, bias: Any, reader: fx.Node, factor: float, walk: Walk) -> str | None:
    """A tensor, times a number, is added to the scores."""
    bias = unexpanded(bias, reader, walk)
    layout = _layout_of(bias, scores)
    if isinstance(layout, str):
        return layout
    tensor = tensor_of(bias)
    assert tensor is not None
    if not tensor.is_floating_point() or tensor.dtype == torch.float64:
        return f"a bias of {tensor.dtype}"
    scores.biases.append(Bias(bias, layout, reader, TermKind.ADDITIVE, factor=factor))
    return None


def _is_maximum_of(other: Any, source: fx.Node, scores: Scores) -> bool:
    """Whether ``other`` is the maximum of each row of ``source``."""
    if not isinstance(other, fx.Node):
        return False
    helpers: set[Any] = {other}
    if operation(other) == "detach":
        other = argument(other, 0, "input")
    maximum: Any = other
    if operation(other) in ("getitem", "getattr"):
        if other.args[1] not in (0, "values"):
            return False
        maximum = other.args[0]
    name = operation(maximum)
    if name not in ("max", "amax") or (name == "max") != (maximum is not other):
        return False
    dim = argument(maximum, 1, "dim")
    dim = dim[0] if isinstance(dim, (tuple, list)) and len(dim) == 1 else dim
    kept = argument(maximum, 2, "keepdim", False) is True
    if argument(maximum, 0, "input") is not source or not isinstance(dim, int) or not kept:
        return False
    scores.maxima.append(scores.layout[dim % len(scores.layout)])
    scores.helpers.extend({*helpers, other, maximum})
    return True


def _masked_fill(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    return _fill(
        scores,
        node,
        argument(node, 1, "mask"),
        TermKind.HIDDEN,
        argument(node, 2, "value"),
        walk,
    )


def _where(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    condition, chosen, other = (
        argument(node, at, name) for at, name in enumerate(("condition", "input", "other"))
    )
    if node.op == "call_method":  # tensor.where(condition, other): tensor comes first
        condition, chosen = argument(node, 1, "condition"), node.args[0]
    if chosen is source:
        return _fill(scores, node, condition, TermKind.VISIBLE, other, walk)
    return _fill(scores, node, condition, TermKind.HIDDEN, chosen, walk)


def _where_sources(node: fx.Node) -> list[Any]:
    if node.op == "call_method":
        return [node.args[0], argument(node, 2, "other")]
    return [argument(node, 1, "input"), argument(node, 2, "other")]


def _fill(
    scores: Scores, reader: fx.Node, mask: Any, kind: TermKind, value: Any, walk: Walk
) -> str | None:
    fill = _number(scores, value, reader, walk)
    if not isinstance(fill, float):
        return "scores are replaced by numbers that are not known here"
    if not fill <= LOWEST_FILL:
        return f"scores are replaced by {fill}, which is no mask"
    if scores.sinks is not None:
        return "the scores are masked after the sinks were attached"
    mask = unexpanded(mask, reader, walk)
    tensor = tensor_of(mask)
    if tensor is None or tensor.dtype != torch.bool:
        return "scores are replaced where a tensor that is not bool says"
    layout = _layout_of(mask, scores)
    if isinstance(layout, str):
        return layout
    scores.biases.append(Bias(mask, layout, reader, kind, fill))
    return None


# --- sinks ----------------------------------------------------------------------------------


def _concatenate(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    parts = argument(node, 0, "tensors")
    dim = argument(node, 1, "dim", 0)
    if dim not in (-1, len(scores.layout) - 1) or len(parts) != 2 or parts[0] is parts[1]:
        return "the scores are concatenated with something that is no column of sinks"
    if scores.sinks is not None:
        return "the scores are concatenated twice"
    if scores.shifted or scores.maxima:
        return "numbers are added to the scores, but not to their sinks"
    first = parts[1] is source
    column = parts[0] if first else parts[1]
    tensor = tensor_of(column)
    if tensor is None or not is_one(tensor.shape[-1]) or not tensor.is_floating_point():
        return "the scores are concatenated with something that is no column of sinks"
    layout = broadcast(tensor.shape, (*scores.layout[:-1], ()))
    if layout is None:
        return "the scores are concatenated with something that is no column of sinks"
    scores.sinks = Sinks(column, layout, node, first)
    return None


def _concatenate_sources(node: fx.Node) -> list[Any]:
    parts = argument(node, 0, "tensors")
    return list(parts) if isinstance(parts, (tuple, list)) else []


def _pad(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    width, mode = argument(node, 1, "pad"), argument(node, 2, "mode", "constant")
    value = argument(node, 3, "value")
    columns = tuple(width) if isinstance(width, (tuple, list)) else ()
    if columns not in ((1, 0), (0, 1)) or mode != "constant" or scores.sinks is not None:
        return "the scores are padded by other than one column"
    if scores.shifted or scores.maxima:
        return "numbers are added to the scores, but not to their sinks"
    if not isinstance(value, (int, float, type(None))) or not abs(value or 0.0) <= MOST_SHIFTED:
        return "the scores are padded with numbers that are not known here"
    scores.sinks = Sinks(None, (), node, columns == (1, 0), float(value or 0.0))
    return None


# --- the same numbers -----------------------------------------------------------------------


def _view(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    if operation(node) == "getitem" and not is_inserting(node):
        return "a part of the scores is taken"
    return follow_view(scores, node)


def follow_view(state: Scores | Any, node: fx.Node) -> str | None:
    """A view or a reordering of dims of scores or weights."""
    if state.sinks is not None:
        return "scores or weights are reshaped while they hold the sinks"
    layout = layout_after(state.layout, node)
    if layout is None:
        return f"{operation(node)} tears the dims of the scores apart"
    state.layout = layout
    return None


def layout_after(layout: Layout, node: fx.Node) -> Layout | None:
    """The axes of a view or transpose of a tensor with ``layout``; None where they are torn."""
    if base_operation(node) in PERMUTES:
        permutation = permutation_of(node, len(layout))
        return None if permutation is None else tuple(layout[dim] for dim in permutation)
    tensor, source = tensor_of(node), tensor_of(argument(node, 0, "input"))
    if tensor is None or source is None or tensor.dtype != source.dtype:
        return None  # a view of the same bits as other numbers
    return reshape(layout, tensor.shape)


def _cast(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    dtype = cast_of(node)
    return follow_cast(node) or (None if dtype is None else narrows(scores, source, dtype))


def narrows(scores: Scores, source: fx.Node, dtype: torch.dtype) -> str | None:
    """Whether masked scores go to a dtype in which finite fills may become -inf."""
    tensor = tensor_of(source)
    assert tensor is not None
    finite = [bias for bias in scores.biases if bias.fill > -math.inf]
    finite += [bias for bias in scores.biases if bias.kind is TermKind.ADDITIVE]
    if finite and torch.finfo(dtype).max < torch.finfo(tensor.dtype).max:
        return f"masked scores are cast to {dtype}, where finite masks may become infinite"
    return None


def follow_cast(node: fx.Node) -> str | None:
    """Another floating point type: the operator computes in float32 whatever it was."""
    dtype = cast_of(node)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"scores are cast to {dtype}"
    return None


def _identity(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    return None


def _dropout(scores: Scores, node: fx.Node, source: fx.Node, walk: Walk) -> str | None:
    return follow_dropout(node)


def follow_dropout(node: fx.Node) -> str | None:
    """Dropout that drops nothing."""
    probability, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    training = argument(node, 2, "train", training)
    if training is False or (isinstance(probability, (int, float)) and probability == 0):
        return None
    return f"dropout_p={probability} in training"


def names(*operations: str) -> frozenset[str]:
    return frozenset(operations)


VIEWS: Final = names(
    "view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "getitem"
)
PERMUTES: Final = names(
    "transpose", "permute", "t", "getattr", "swapaxes", "swapdims", "movedim", "moveaxis", "mT", "T"
)
CASTS: Final = names("to", "float", "half", "bfloat16", "type", "type_as", "_to_copy")
SAME: Final = names("contiguous", "clone", "alias", "lift_fresh_copy")

SCORE_RULES: Final[tuple[ScoreRule, ...]] = (
    ScoreRule("a factor scales all", names("mul", "div", "truediv"), _either, _multiply),
    ScoreRule("a sign is a factor", names("neg"), _first, _negate),
    ScoreRule("softcap", names("tanh"), _first, _tanh),
    ScoreRule("a bias is added", names("add", "sub", "rsub"), _either, _add),
    ScoreRule("a mask replaces scores", names("masked_fill"), _first, _masked_fill),
    ScoreRule("a condition chooses scores", names("where"), _where_sources, _where),
    ScoreRule("sinks are a column", names("cat", "concat"), _concatenate_sources, _concatenate),
    ScoreRule("padding is a sink", names("pad", "constant_pad_nd"), _first, _pad),
    ScoreRule("a view keeps the numbers", VIEWS | PERMUTES, _first, _view),
    ScoreRule("a cast keeps the numbers", CASTS, _first, _cast),
    ScoreRule("a copy keeps the numbers", SAME, _first, _identity),
    ScoreRule("dropout may drop nothing", names("dropout"), _first, _dropout),
)
_BY_OPERATION: Final = {name: rule for rule in SCORE_RULES for name in rule.operations}


def score_rule(node: fx.Node) -> ScoreRule | None:
    """The rule for an operation on scores."""
    return _BY_OPERATION.get(base_operation(node))
