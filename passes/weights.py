"""What happens to attention weights between the softmax and the product with the values."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Final

from torch import fx

from sage_compiler.passes.axes import Layout, broadcast
from sage_compiler.passes.masks import TermKind
from sage_compiler.passes.normalize import argument, operation, tensor_of
from sage_compiler.passes.scores import (
    CASTS,
    PERMUTES,
    SAME,
    VIEWS,
    Bias,
    Sinks,
    follow_cast,
    follow_dropout,
    follow_view,
    names,
    unexpanded,
)
from sage_compiler.passes.spelling import base_operation, is_inserting
from sage_compiler.passes.walk import Walk


@dataclass(slots=True)
class Weights:
    """What is known of the weights at one node on the way to the values.

    Attributes:
        layout: the axes of its dims.
        biases: the masks of the scores; what is learned here of them counts for the scores too.
        sinks: the column beside the keys, until it is sliced off.
        dead_rows_are_zero: whether the NaN of a row without a visible key was replaced by 0.
    """

    layout: Layout
    biases: list[Bias] = field(default_factory=list)
    sinks: Sinks | None = None
    dead_rows_are_zero: bool = False


@dataclass(frozen=True, slots=True)
class WeightRule:
    """One fact about one kind of operation on weights; as ``ScoreRule``."""

    name: str
    operations: frozenset[str]
    apply: Callable[[Weights, fx.Node, Walk], str | None]


def _index(weights: Weights, node: fx.Node, walk: Walk) -> str | None:
    if weights.sinks is None:
        return (
            follow_view(weights, node) if is_inserting(node) else "a part of the weights is taken"
        )
    index = argument(node, 1, "index")
    parts = list(index) if isinstance(index, tuple) else [index]
    rank = len(weights.layout)
    if parts.count(Ellipsis) == 1:
        at = parts.index(Ellipsis)
        parts[at : at + 1] = [slice(None)] * (rank - len(parts) + 1)
    keys = slice(1, None) if weights.sinks.first else slice(None, -1)
    if parts != [*[slice(None)] * (rank - 1), keys]:
        return "the weights are sliced, but not just the sinks from them"
    weights.sinks = None
    return None


def _view(weights: Weights, node: fx.Node, walk: Walk) -> str | None:
    return follow_view(weights, node)


def _cast(weights: Weights, node: fx.Node, walk: Walk) -> str | None:
    return follow_cast(node)


def _dropout(weights: Weights, node: fx.Node, walk: Walk) -> str | None:
    return follow_dropout(node)


def _identity(weights: Weights, node: fx.Node, walk: Walk) -> str | None:
    return None


def _nan_to_num(weights: Weights, node: fx.Node, walk: Walk) -> str | None:
    replaced = argument(node, 1, "nan", None)
    if replaced is not None and not (isinstance(replaced, (int, float)) and replaced == 0):
        return f"NaN among the weights becomes {replaced}"
    weights.dead_rows_are_zero = True  # weights are never infinite
    return None


def _masked_fill(weights: Weights, node: fx.Node, walk: Walk) -> str | None:
    mask = argument(node, 1, "mask")
    return _zero(weights, mask, TermKind.HIDDEN, argument(node, 2, "value"), node, walk)


def _where(weights: Weights, node: fx.Node, walk: Walk) -> str | None:
    if node.op == "call_method":
        return "the weights are replaced by others under a condition"
    condition, chosen, other = (
        argument(node, at, name) for at, name in enumerate(("condition", "input", "other"))
    )
    if walk.number(chosen, node) is not None:
        return _zero(weights, condition, TermKind.HIDDEN, chosen, node, walk)
    return _zero(weights, condition, TermKind.VISIBLE, other, node, walk)


def _zero(
    weights: Weights, mask: Any, kind: TermKind, value: Any, node: fx.Node, walk: Walk
) -> str | None:
    """Weights of hidden keys become zero, which they are, but for rows without a visible key."""
    if walk.number(value, node) != 0:
        return "weights are replaced by numbers other than 0"
    mask = unexpanded(mask, node, walk)
    tensor = tensor_of(mask)
    if tensor is None or len(weights.biases) != 1:
        return "weights are set to 0 by a mask that is not the one of the scores"
    (bias,) = weights.biases
    condition = _condition(mask, kind)
    if bias.node is not mask and walk.effects.changes(condition[0]):
        return "weights are set to 0 by a mask that changes in place"
    if (
        _condition(bias.node, bias.kind) != condition
        or bias.layout != broadcast(tensor.shape, weights.layout)
        or walk.effects.changed(mask, bias.reader, node)
    ):
        return "weights are set to 0 by a mask that is not the one of the scores"
    weights.biases[0] = replace(bias, fill=-math.inf)  # what is hidden weighs exactly nothing
    weights.dead_rows_are_zero = True
    return None


def _condition(mask: Any, kind: TermKind) -> tuple[Any, bool]:
    """What a bool mask is the negation of, if it is one, and whether that is true where hidden."""
    hidden = kind is TermKind.HIDDEN
    while operation(mask) in ("invert", "__invert__", "logical_not", "bitwise_not"):
        mask, hidden = argument(mask, 0, "input"), not hidden
    return mask, hidden


WEIGHT_RULES: Final[tuple[WeightRule, ...]] = (
    WeightRule("the sinks' column is dropped", names("getitem"), _index),
    WeightRule("a view keeps the numbers", (VIEWS | PERMUTES) - names("getitem"), _view),
    WeightRule("a cast keeps the numbers", CASTS, _cast),
    WeightRule("a copy keeps the numbers", SAME, _identity),
    WeightRule("dropout may drop nothing", names("dropout"), _dropout),
    WeightRule("dead rows become zero", names("nan_to_num"), _nan_to_num),
    WeightRule("hidden weights become zero", names("masked_fill"), _masked_fill),
    WeightRule("a condition keeps visible weights", names("where"), _where),
)
_BY_OPERATION: Final = {name: rule for rule in WEIGHT_RULES for name in rule.operations}


def weight_rule(node: fx.Node) -> WeightRule | None:
    """The rule for an operation on weights."""
    return _BY_OPERATION.get(base_operation(node))
