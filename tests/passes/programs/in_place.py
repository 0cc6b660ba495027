"""Edits of a captured attention that change something in place while it is computed."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import fx

from sage_compiler.passes.normalize import operation
from tests.passes.programs.subject import Call, Edit, Subject


def _after(at: str, part: str, *calls: Call) -> Edit:
    """Calls on a part, the last of them in place, right after a node."""

    def edit(subject: Subject) -> bool:
        if subject.softmax is None and {at, part} & {"softmax", "scores", "weights"}:
            return False
        place, node = getattr(subject, at), getattr(subject, part)
        for target, *args in calls:
            node = place = subject.insert(place, target, node, *args)
        return True

    return edit


def _source(node: fx.Node) -> fx.Node | None:
    """The input that a tensor is a view of, as far as single-input nodes lead."""
    while node.op != "placeholder":
        if operation(node) not in ("transpose", "view", "permute", "reshape", "expand", "getitem"):
            return None
        node = node.all_input_nodes[0]
    return node


def _input_after(at: str, part: str, target: Any, *args: Any) -> Edit:
    """The input behind a part changed in place, right after a node."""

    def edit(subject: Subject) -> bool:
        source = _source(getattr(subject, part))
        if source is None or (subject.softmax is None and at == "softmax"):
            return False
        subject.insert(getattr(subject, at), target, source, *args)
        return True

    return edit


def _input_written(part: str, write: Callable[[Subject, fx.Node], fx.Node]) -> Edit:
    """The input behind a part written right after Q K^T by a call that is no method of it."""

    def edit(subject: Subject) -> bool:
        source = _source(getattr(subject, part))
        if source is not None:
            write(subject, source)
        return source is not None

    return edit


def _as_output(subject: Subject, source: fx.Node) -> fx.Node:
    return subject.insert(subject.first, torch.neg, source, out=source)


def _in_list(subject: Subject, source: fx.Node) -> fx.Node:
    return subject.insert(subject.first, torch._foreach_mul_, [source], 2)


def _input_before(at: str, part: str, target: Any, *args: Any) -> Edit:
    """The input behind a part changed in place, just before a node."""

    def edit(subject: Subject) -> bool:
        source = _source(getattr(subject, part))
        if source is None:
            return False
        subject.insert(getattr(subject, at).prev, target, source, *args)
        return True

    return edit


def _terms_changed(when: str) -> Edit:
    """Every input that is a bias or mask, changed before or after its use."""

    def edit(subject: Subject) -> bool:
        if subject.softmax is None:
            return False
        operands = {_source(node) for node in (subject.left, subject.right, subject.values)}
        terms = [
            node
            for term in (subject.first, *subject.path)
            for node in term.all_input_nodes
            if node.op == "placeholder" and node not in operands
        ]
        for term in terms:
            place = subject.first.prev if when == "before" else subject.softmax
            subject.insert(place, "mul_", term, -0.5)
        return bool(terms)

    return edit


WHY_UNSEEN: Final = "what was changed is not read again; a rewrite that reads it late would show it"
IN_PLACE: Final[dict[str, Edit]] = {
    "left operand's input changed after Q K^T": _input_after("first", "left", "mul_", 2),
    "right operand's input changed after Q K^T": _input_after("first", "right", "zero_"),
    "left operand's input changed after the softmax": _input_after("softmax", "left", "neg_"),
    "right operand's input changed after the softmax": _input_after(
        "softmax", "right", operator.iadd, 1
    ),
    "left operand's input written as an output": _input_written("left", _as_output),
    "right operand's input written in a list": _input_written("right", _in_list),
    "left operand's input set in part": _input_after("first", "left", operator.setitem, 0, 1.0),
    "right operand's input set by an operator": _input_after(
        "softmax", "right", torch.ops.aten.mul_.Tensor, 2
    ),
    "values' input changed after Q K^T": _input_after("first", "values", "mul_", 2),
    "values' input changed before their use": _input_before("second", "values", "neg_"),
    "values' input changed after their use": _input_after("second", "values", "zero_"),
    "terms changed before their use": _terms_changed("before"),
    "terms changed after their use": _terms_changed("after"),
    "scores changed through a view": _after("scores", "scores", ("select", -1, 0), ("mul_", 3)),
    "scores changed through a transposed view": _after(
        "scores", "scores", ("transpose", -1, -2), ("select", -2, 1), ("zero_",)
    ),
    "product changed through a view": _after("first", "first", ("select", -1, 0), ("mul_", 3)),
    "weights changed through a view": _after("weights", "weights", ("select", -1, 0), ("add_", 1)),
    "values changed through a view": _after("first", "values", ("select", -1, 0), ("fill_", 1)),
}
UNSEEN: Final[dict[str, Edit]] = {
    "left operand changed after Q K^T": _after("first", "left", ("mul_", 2)),
    "right operand changed after the softmax": _after("softmax", "right", ("detach",), ("neg_",)),
    "scores changed after the softmax": _after("softmax", "scores", ("zero_",)),
}
