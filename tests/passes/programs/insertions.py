"""Edits of a captured attention that put calls into it, or read more of it."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import fx

from sage_compiler.passes.normalize import operation
from tests.passes.programs.subject import Call, Edit, Subject

# --- functions put between two nodes ---------------------------------------------------------


def _spliced(
    user: str, operand: str, calls: Callable[[int, int], list[Call]], square: bool = False
) -> Edit:
    """``calls`` of the key and query axis, between two parts of the attention.

    ``square``: only where the last two dims have one size.
    """

    def edit(subject: Subject) -> bool:
        if subject.softmax is None and (user == "softmax" or operand == "weights"):
            return False
        axes = (-1, -2) if subject.softmax is None else (subject.key_axis, subject.query_axis)
        node, reader = getattr(subject, operand), getattr(subject, user)
        if square and len(set(subject.example(node).shape[-2:])) > 1:
            return False
        for target, *args in calls(*axes):
            keywords = args.pop() if args and isinstance(args[-1], dict) else {}
            subject.splice(reader, node, target, *args, **keywords)
            node = next(of for of in reader.all_input_nodes if of.next is reader)
        return True

    return edit


def _on_scores(*call: Any) -> Edit:
    return _spliced("softmax", "scores", lambda key, query: [call])


def _on_weights(*call: Any) -> Edit:
    return _spliced("second", "weights", lambda key, query: [call])


def _on_values(*call: Any) -> Edit:
    return _spliced("second", "values", lambda key, query: [call])


FUNCTIONS: Final[dict[str, Edit]] = {
    "scores scaled after the masks": _on_scores(operator.mul, 0.5),
    "scores divided after the masks": _on_scores(torch.div, 3.0),
    "scores negated": _on_scores(operator.neg),
    "scores squared": _on_scores(operator.pow, 2),
    "scores through tanh": _on_scores(torch.tanh),
    "scores through relu": _on_scores(F.relu),
    "scores through abs": _on_scores("abs"),
    "scores clamped": _on_scores("clamp", -0.5, 0.5),
    "scores cut to a triangle": _on_scores(torch.tril),
    "scores transposed": _spliced(
        "softmax", "scores", lambda *_: [("transpose", -1, -2)], square=True
    ),
    "scores rolled": _spliced("softmax", "scores", lambda key, _: [(torch.roll, 1, key)]),
    "scores flipped": _spliced("softmax", "scores", lambda key, _: [(torch.flip, [key])]),
    "scores summed up": _spliced("softmax", "scores", lambda key, _: [(torch.cumsum, key)]),
    "softmax twice": _spliced("second", "weights", lambda key, _: [("softmax", key)]),
    "softmax of the scores first": _spliced("softmax", "scores", lambda key, _: [("softmax", key)]),
    "softmax over the queries first": _spliced(
        "softmax", "scores", lambda _, query: [("softmax", query)]
    ),
    "weights cut to a triangle": _on_weights(torch.triu),
    "weights transposed": _on_weights("transpose", -1, -2),
    "weights scaled": _on_weights(operator.mul, 0.5),
    "weights shifted": _on_weights(operator.add, 0.1),
    "weights squared": _on_weights("pow", 2),
    "weights clamped": _on_weights(torch.clamp, {"max": 0.2}),
    "weights rolled": _spliced("second", "weights", lambda key, _: [("roll", 1, key)]),
    "weights flipped": _spliced("second", "weights", lambda key, _: [("flip", (key,))]),
    "weights dropped": _on_weights(F.dropout, {"p": 0.5, "training": True}),
    "weights dropped by a method of torch": _on_weights(torch.dropout, 0.3, True),
    "values cut to a triangle": _on_values(torch.tril),
    "values transposed": _on_values("transpose", -1, -2),
    "values scaled": _on_values(operator.mul, 2.0),
    "values rolled": _on_values("roll", 1, -2),
    "left operand transposed": _spliced("first", "left", lambda *_: [("transpose", -1, -2)]),
    "right operand transposed": _spliced("first", "right", lambda *_: [("transpose", -1, -2)]),
    "left operand scaled": _spliced("first", "left", lambda *_: [(operator.mul, 1.5)]),
    "right operand rolled": _spliced("first", "right", lambda *_: [("roll", 1, -1)]),
}


# --- further users --------------------------------------------------------------------------


def _returned(part: str) -> Edit:
    def edit(subject: Subject) -> bool:
        if subject.softmax is None:
            return False
        subject.also_return(getattr(subject, part))
        return True

    return edit


def _summed(part: str) -> Edit:
    """A sum of it is returned, and computed where it is used last."""

    def edit(subject: Subject) -> bool:
        if subject.softmax is None:
            return False
        node = getattr(subject, part)
        subject.also_return(subject.insert(subject.second, torch.sum, node))
        return True

    return edit


USERS: Final[dict[str, Edit]] = {
    "scores returned": _returned("scores"),
    "product returned": _returned("first"),
    "weights returned": _returned("weights"),
    "softmax returned": _returned("softmax"),
    "scores summed": _summed("scores"),
    "weights summed": _summed("weights"),
}


# --- edits with a second operand ------------------------------------------------------------


def _with_second(make: Callable[[Subject, fx.Node], fx.Node], target: Any) -> Edit:
    """Scores become ``target(scores, made)``."""

    def edit(subject: Subject) -> bool:
        if subject.softmax is None:
            return False
        made = make(subject, subject.scores)
        subject.splice(subject.softmax, subject.scores, target, made)
        return True

    return edit


def _ramp(axis: str) -> Callable[[Subject, fx.Node], fx.Node]:
    """0.1, 0.2, ... along an axis of the scores."""

    def make(subject: Subject, scores: fx.Node) -> fx.Node:
        at = getattr(subject, axis)
        ramp = subject.insert(scores, torch.arange, 1, subject.example(scores).shape[at] + 1)
        ramp = subject.insert(ramp, operator.mul, ramp, 0.1)
        return subject.insert(ramp, "view", ramp, *([-1] + [1] * (-at - 1)))

    return make


def _most(axis: str) -> Callable[[Subject, fx.Node], fx.Node]:
    def make(subject: Subject, scores: fx.Node) -> fx.Node:
        return subject.insert(scores, torch.amax, scores, getattr(subject, axis), True)

    return make


def _values_for_keys(subject: Subject) -> bool:
    """K and V change places."""
    if subject.softmax is None or operation(subject.first) == "einsum":
        return False
    nodes = list(subject.gm.graph.nodes)
    transposed = subject.key_axis == -1  # the right operand is K^T
    keys = subject.right if transposed else subject.left
    if nodes.index(subject.values) > nodes.index(subject.first):
        return False
    values = subject.values
    subject.first.replace_input_with(keys, values)
    subject.second.replace_input_with(values, keys)
    if transposed:
        subject.splice(subject.first, values, "transpose", -1, -2)
        subject.splice(subject.second, keys, "transpose", -1, -2)
    return True


SECOND: Final[dict[str, Edit]] = {
    "scores scaled by key": _with_second(_ramp("key_axis"), operator.mul),
    "scores scaled by query": _with_second(_ramp("query_axis"), operator.mul),
    "scores divided by key": _with_second(_ramp("key_axis"), torch.div),
    "a bias by key": _with_second(_ramp("key_axis"), operator.sub),
    "max over the queries subtracted": _with_second(_most("query_axis"), operator.sub),
    "noise added": _with_second(lambda s, scores: s.insert(scores, torch.rand_like, scores), "add"),
    "a bool added": _with_second(lambda s, scores: s.insert(scores, torch.gt, scores, -1), "add"),
    "keys and values swapped": _values_for_keys,
}


# --- roundings ------------------------------------------------------------------------------


def _softmax_dtype(dtype: torch.dtype) -> Edit:
    """The softmax in another dtype, and back."""

    def edit(subject: Subject) -> bool:
        if subject.softmax is None:
            return False
        subject.softmax.kwargs = {**subject.softmax.kwargs, "dtype": dtype}
        (user,) = subject.softmax.users
        subject.splice(user, subject.softmax, "float")
        return True

    return edit


ROUNDING: Final[dict[str, Edit]] = {
    "scores rounded to half": _spliced("softmax", "scores", lambda *_: [("half",), ("float",)]),
    "weights rounded to half": _spliced("second", "weights", lambda *_: [("half",), ("float",)]),
    "softmax in half": _softmax_dtype(torch.float16),
    "softmax in bfloat16": _softmax_dtype(torch.bfloat16),
}
