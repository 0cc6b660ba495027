"""Edits of a captured attention that change arguments of the calls it has."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx

from sage_compiler.passes.normalize import operation
from tests.passes.programs.subject import Edit, Subject


def _softmax_dim(dim: int) -> Edit:
    """Another dim, counted from the end."""

    def edit(subject: Subject) -> bool:
        node = subject.softmax
        if node is None or dim == subject.key_axis or subject.example(node).dim() < -dim:
            return False
        if _extra_column(subject):
            return False
        node.args = node.args[:1]
        node.kwargs = {**node.kwargs, "dim": dim}
        return True

    return edit


def _extra_column(subject: Subject) -> bool:
    """Whether the scores have a column that the weights have not."""
    assert subject.softmax is not None
    return subject.example(subject.softmax).shape != subject.example(subject.first).shape and any(
        operation(node) == "cat" for node in subject.path
    )


def _replaced(function: Callable[..., Any], **keywords: Any) -> Edit:
    """Another function in place of the softmax."""

    def edit(subject: Subject) -> bool:
        node = subject.softmax
        if node is None:
            return False
        dim = {} if function is torch.sigmoid else {"dim": subject.key_axis}
        node.op, node.target = "call_function", function
        node.args, node.kwargs = (subject.scores,), {**dim, **keywords}
        return True

    return edit


def _arguments(names: tuple[str, ...], change: Callable[[fx.Node], bool]) -> Edit:
    """Change an argument of every node of some operations before the second product."""

    def edit(subject: Subject) -> bool:
        nodes = [node for node in subject.gm.graph.nodes if operation(node) in names]
        return any([change(node) for node in nodes])

    return edit


def _changed_keyword(name: str, change: Callable[[Any], Any]) -> Callable[[fx.Node], bool]:
    def edit(node: fx.Node) -> bool:
        if name not in node.kwargs:
            return False
        node.kwargs = {**node.kwargs, name: change(node.kwargs[name])}
        return True

    return edit


def _shift_number(node: fx.Node) -> bool:
    """The last argument, a whole number, one more."""
    if node.args and type(node.args[-1]) is int and len(node.args) > 1:
        node.args = (*node.args[:-1], node.args[-1] + 1)
        return True
    return _changed_keyword("diagonal", lambda diagonal: diagonal + 1)(node)


def _fill(value: float) -> Edit:
    def change(node: fx.Node) -> bool:
        at = 2
        if operation(node) == "where" and isinstance(node.args[2], fx.Node):
            filled = node.args[2]
            if operation(filled) != "full":
                return False
            filled.args = (filled.args[0], value)
            return True
        node.args = (*node.args[:at], value, *node.args[at + 1 :])
        return True

    return _arguments(("masked_fill", "where"), change)


def _mask_inverted(subject: Subject) -> bool:
    masks = [
        (node, node.args[1 if operation(node) == "masked_fill" else 0])
        for node in subject.gm.graph.nodes
        if operation(node) in ("masked_fill", "where")
    ]
    for user, mask in masks:
        assert isinstance(mask, fx.Node)
        subject.splice(user, mask, torch.eq, False)
    return bool(masks)


def _slice_moved(node: fx.Node) -> bool:
    """The sinks' column is cut off at the wrong end."""
    index = node.args[1]
    if not isinstance(index, tuple) or slice(None, -1, None) not in index:
        return False
    moved = tuple(slice(1, None) if part == slice(None, -1, None) else part for part in index)
    node.args = (node.args[0], moved)
    return True


def _sinks_first(node: fx.Node) -> bool:
    (parts,) = node.args
    assert isinstance(parts, (list, tuple))
    node.args = (parts[::-1],)
    return True


def _term_removed(subject: Subject) -> bool:
    """Q K^T itself in place of the scores: no scale, no mask, no cast."""
    if subject.softmax is None or subject.scores is subject.first or _extra_column(subject):
        return False
    if subject.example(subject.first).shape != subject.example(subject.scores).shape:
        return False
    if any(operation(node) in ("iadd", "itruediv") for node in subject.path):
        return False
    subject.softmax.replace_input_with(subject.scores, subject.first)
    return True


def _where_swapped(node: fx.Node) -> bool:
    condition, one, other = node.args
    node.args = (condition, other, one)
    return True


def _cap_changed(node: fx.Node) -> bool:
    """The scores are divided by another cap than they are multiplied by."""
    if node.args[1] != 5.0:
        return False
    node.args = (node.args[0], 2.0)
    return True


def _made_strict(node: fx.Node) -> bool:
    node.target = operator.lt
    return True


ARGUMENTS: Final[dict[str, Edit]] = {
    "softmax over the last dim but one": _softmax_dim(-2),
    "softmax over the last dim": _softmax_dim(-1),
    "softmax over the last dim but two": _softmax_dim(-3),
    "softmax over the batch": _softmax_dim(-4),
    "sigmoid for softmax": _replaced(torch.sigmoid),
    "log_softmax for softmax": _replaced(F.log_softmax),
    "softmin for softmax": _replaced(F.softmin),
    "diagonal shifted": _arguments(("tril", "triu"), _shift_number),
    "window wider": _arguments(("lt",), _shift_number),
    "causal comparison strict": _arguments(("le",), _made_strict),
    "masks inverted": _mask_inverted,
    "masks filled with one": _fill(1.0),
    "masks filled with zero": _fill(0.0),
    "masks filled with infinity": _fill(math.inf),
    "sinks cut at the wrong end": _arguments(("getitem",), _slice_moved),
    "sinks put first": _arguments(("cat",), _sinks_first),
    "beta one": _arguments(
        ("baddbmm",), _changed_keyword("beta", lambda beta: 1 if beta == 0 else 0.5)
    ),
    "alpha other": _arguments(("baddbmm",), _changed_keyword("alpha", lambda _: 0.9)),
    "scores and mask swapped in where": _arguments(("where",), _where_swapped),
    "nan_to_num with another number": _arguments(
        ("nan_to_num",), _changed_keyword("nan", lambda _: 0.5)
    ),
    "softcap with another factor": _arguments(("truediv",), _cap_changed),
    "terms left out": _term_removed,
    "scale of scaled_dot_product_attention other": _arguments(
        ("scaled_dot_product_attention",), _changed_keyword("scale", lambda _: 0.9)
    ),
}
