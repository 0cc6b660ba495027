"""Attention written out: from a softmax back to Q K^T, and forward to the product with V."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import fx

from sage_compiler.passes import contraction as products
from sage_compiler.passes.assembly import Facts, Unproved, assemble
from sage_compiler.passes.axes import Dim, Layout, flat
from sage_compiler.passes.contraction import Contraction, contract
from sage_compiler.passes.masks import is_pure
from sage_compiler.passes.normalize import argument, may_mutate, operation, tensor_of
from sage_compiler.passes.scores import Scores, add_bias, narrows, score_rule
from sage_compiler.passes.site import Proof
from sage_compiler.passes.spelling import base_operation
from sage_compiler.passes.walk import Walk
from sage_compiler.passes.weights import Weights, weight_rule

_LONGEST: Final = 64  # operations between Q K^T and the softmax
_MOST_PATHS: Final = 8  # products that may be Q K^T, of one softmax

# What reads no numbers of a tensor, only its shape and type.
_METADATA: Final = frozenset(
    [
        "dim",
        "empty_like",
        "full_like",
        "new_empty",
        "new_full",
        "new_ones",
        "new_zeros",
        "numel",
        "ones_like",
        "size",
        "sym_size",
        "zeros_like",
    ]
)
# Of their second argument these read no numbers.
_LIKE_OTHER: Final = frozenset(["expand_as", "reshape_as", "to", "type_as", "view_as"])


@dataclass(frozen=True, slots=True)
class Step:
    """``node`` reads the scores as ``source``."""

    node: fx.Node
    source: fx.Node


def recognize_chain(softmax: fx.Node, walk: Walk) -> Proof | str:
    """Prove that a softmax is the middle of an attention, or say why it is not."""
    blocked: list[str] = []
    refused: list[str] = []
    try:
        for start, steps in _paths(softmax, walk, blocked):
            try:
                return _prove(softmax, start, steps, walk)
            except Unproved as reason:
                refused.append(str(reason))
    except Unproved as reason:
        refused.append(str(reason))
    return [*refused, *blocked, "no product of queries and keys leads to this softmax"][0]


# --- back to Q K^T --------------------------------------------------------------------------


def _paths(
    softmax: fx.Node, walk: Walk, blocked: list[str]
) -> Iterator[tuple[fx.Node, list[Step]]]:
    """Every product that may be Q K^T, with the steps from there to the softmax."""
    given = argument(softmax, 0, "input")
    if not isinstance(given, fx.Node):
        raise Unproved("a softmax of no tensor")
    stack: list[tuple[fx.Node, fx.Node, tuple[Step, ...]]] = [(given, softmax, ())]
    found, seen = 0, {softmax}
    while stack and found < _MOST_PATHS:
        source, reader, after = stack.pop()
        node = _current(source, reader, walk)
        if node in seen:
            continue  # another way to the same product, or to none
        if node is None:
            blocked.append(f"the scores are changed in place before {operation(reader)} reads them")
            continue
        seen.add(node)
        if base_operation(node) in products.OPERATIONS:
            found += 1
            yield node, list(reversed(after))
            continue
        rule = score_rule(node)
        if rule is None:
            blocked.append(
                f"no product of queries and keys leads to it: the scores come from {_words(node)}"
            )
            continue
        if len(after) == _LONGEST:
            continue
        candidates = [part for part in rule.sources(node) if _may_be_scores(part)]
        for part in reversed(candidates):
            stack.append((part, node, (*after, Step(node, part))))


def _may_be_scores(part: Any) -> bool:
    tensor = tensor_of(part)
    return tensor is not None and tensor.is_floating_point() and tensor.dim() >= 2


def _current(node: fx.Node, reader: fx.Node, walk: Walk) -> fx.Node | None:
    """The node that made the numbers which ``reader`` sees in ``node``."""
    writer = walk.effects.latest(node, reader)
    if writer is None:
        return node
    first = argument(writer, 0, "input")
    same = isinstance(first, fx.Node) and _same_tensor(first, node) and _same_tensor(writer, node)
    return writer if same and score_rule(writer) is not None else None


def _same_tensor(a: fx.Node, b: fx.Node) -> bool:
    """Whether two nodes that share memory are the same view of it."""
    first, second = tensor_of(a), tensor_of(b)
    if first is None or second is None:
        return False
    return a is b or (
        first.shape == second.shape
        and first.stride() == second.stride()
        and first.dtype == second.dtype
        and torch._C._is_alias_of(first, second)  # type: ignore[attr-defined]
        and first.storage_offset() == second.storage_offset()
    )


def _words(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the input {node.target}"
    return operation(node)


# --- the proof ------------------------------------------------------------------------------


def _prove(softmax: fx.Node, node: fx.Node, steps: list[Step], walk: Walk) -> Proof:
    scores_product = _contraction(node)
    scores = Scores(scores_product.layout, scores_product.factor)
    _follow_scores(scores, scores_product, node, steps, walk)
    key = _softmax_axes(softmax, scores)
    weights = Weights(scores.layout, scores.biases, scores.sinks)
    output, read, interior = _follow_weights(softmax, weights, walk)
    values_product = _contraction(output, read, weights.layout)
    _check_values_product(values_product, key)
    interior = [node, *(step.node for step in steps), *scores.helpers, *interior]
    _check_users(interior, output, walk)
    if walk.crosses_border(node, output):
        raise Unproved("autocast or the grad mode changes between Q K^T and the values")
    value = values_product.right
    if values_product.left.node is not read:
        value = values_product.left
    facts = Facts(node, output, scores, weights, scores_product, values_product, key, value)
    return assemble(facts, tuple(interior), walk)


def _contraction(node: fx.Node, known: fx.Node | None = None, layout: Layout = ()) -> Contraction:
    found = contract(node, known, layout)
    if isinstance(found, str):
        raise Unproved(found)
    return found


def _check_writes(node: fx.Node, source: fx.Node | None) -> None:
    """What is changed in place must be the scores or weights themselves."""
    first = None if node.kwargs.get("out") is not None else argument(node, 0, "input")
    if may_mutate(node) and (source is None or first is not source):
        raise Unproved(f"{_words(node)} writes its result into another tensor")


def _follow_scores(
    scores: Scores, start: Contraction, node: fx.Node, steps: list[Step], walk: Walk
) -> None:
    _check_writes(node, None)
    if start.bias is not None:
        given, made = tensor_of(start.bias), tensor_of(node)
        if given is None or made is None or given.dtype.itemsize > made.dtype.itemsize:
            raise Unproved("autocast narrows a bias of the product, which may become infinite")
        reason = add_bias(scores, start.bias, node, start.bias_factor, walk)
        if reason is not None:
            raise Unproved(reason)
    for step in steps:
        rule = score_rule(step.node)
        assert rule is not None
        _check_writes(step.node, step.source)
        reason = rule.apply(scores, step.node, step.source, walk)
        if reason is not None:
            raise Unproved(reason)


def _softmax_axes(softmax: fx.Node, scores: Scores) -> Dim:
    """The key axes: what the softmax runs over."""
    dim, rank = argument(softmax, 1, "dim"), len(scores.layout)
    if not isinstance(dim, int):
        raise Unproved(f"softmax over dim {dim}")
    key = flat(scores.layout[dim % rank])
    if not key:
        raise Unproved("a softmax over a dim of size 1")
    dtype = argument(softmax, 2, "dtype", argument(softmax, 3, "dtype"))
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        reason = narrows(scores, argument(softmax, 0, "input"), dtype)
        if reason is not None:
            raise Unproved(reason)
    if any(flat(each) != key for each in scores.maxima):
        raise Unproved("a maximum over other dims than the softmax is subtracted from the scores")
    if scores.sinks is not None and dim % rank != rank - 1:
        raise Unproved(f"softmax over dim {dim}, sinks in the last dim")
    return key


def _follow_weights(
    softmax: fx.Node, weights: Weights, walk: Walk
) -> tuple[fx.Node, fx.Node, list[fx.Node]]:
    """The product with the values, the node that it reads as weights, and the nodes before."""
    _check_writes(softmax, None)
    current, interior = {softmax}, [softmax]
    while True:
        users = sorted(
            {user for node in current for user in node.users if _reads(user, node)} - {*interior},
            key=walk.effects.position,
        )
        if not users or users[0].op == "output":
            raise Unproved("no product of the weights with values follows")
        user = users[0]
        if base_operation(user) in products.OPERATIONS:
            (read, *others) = [node for node in user.all_input_nodes if node in current]
            if others or len(users) > 1:
                raise Unproved(f"the weights are also used by {_words(users[-1])}")
            _check_writes(user, None)
            return user, read, interior
        rule = weight_rule(user)
        if rule is None:
            raise Unproved(f"the weights go into {_words(user)}, not into a product with values")
        _check_writes(user, _weights_argument(user, current))
        reason = rule.apply(weights, user, walk)
        if reason is not None:
            raise Unproved(reason)
        interior.append(user)
        in_place = may_mutate(user)
        if not in_place and len(users) > 1:
            raise Unproved(f"the weights are also used by {_words(users[-1])}")
        current = {*current, user} if in_place else {user}


def _weights_argument(user: fx.Node, current: set[fx.Node]) -> fx.Node:
    """The argument as which a node reads the weights: what it computes from, nothing else."""
    candidates = [argument(user, 0, "input")]
    if operation(user) == "where" and user.op == "call_function":
        candidates = [argument(user, 1, "input"), argument(user, 2, "other")]
    found = [part for part in candidates if isinstance(part, fx.Node) and part in current]
    if len(found) != 1 or sum(node in current for node in user.all_input_nodes) != 1:
        raise Unproved(f"the weights go into {_words(user)} in another place than its first")
    return found[0]


def _reads(user: fx.Node, node: fx.Node) -> bool:
    """Whether a user reads the numbers of a node, and something depends on what it makes."""
    if user.op == "output" or may_mutate(user):
        return True
    name = operation(user)
    if name in _METADATA or (name in _LIKE_OTHER and argument(user, 0, "input") is not node):
        return False
    return bool(user.users) or not is_pure(user)


def _check_values_product(found: Contraction, key: Dim) -> None:
    if set(flat(found.summed)) != set(flat(key)):
        raise Unproved("the weights are summed over other dims than the softmax")
    if found.factor != 1.0 or found.bias is not None:
        raise Unproved("the product with the values adds or scales")


def _check_users(interior: list[fx.Node], output: fx.Node, walk: Walk) -> None:
    """Nothing but the attention itself reads what lies between its two products."""
    inside = {*interior, output}
    for node in interior:
        for user in node.users:
            if user not in inside and _reads(user, node):
                raise Unproved(f"{operation(node)} inside is also used by {_words(user)}")
