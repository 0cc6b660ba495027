"""Proofs about masks that hold for every length: what comparisons of positions come to.

Each node is read once, as a form (forms.py): ``arange`` and arithmetic on it are affine functions
of the index, comparisons of these are facts, and ``where``, ``masked_fill``, ``tril`` and logic
combine them. ``RULES`` is the visible list, one entry per operation. What no rule knows has no
form; a bool tensor without one enters a formula as itself.

A node is read as it is at its reader: after the last write to its memory. In-place operations are
read as the operations that they are, on the value before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import torch
from torch import fx

from sage_compiler.passes import elementwise, views
from sage_compiler.passes.calls import Call, name_of
from sage_compiler.passes.effects import Effects
from sage_compiler.passes.forms import Affine, Distance, Form, Sum, fits
from sage_compiler.passes.normalize import is_plain, may_mutate, mutates_first_only, tensor_of

RULES: Final[Mapping[str, elementwise.Rule]] = {**elementwise.RULES, **views.RULES}
# What these compute does not depend on the values of their arguments.
_CONSTANTS: Final = frozenset(
    ["full_like", "new_full", "new_ones", "new_zeros", "ones_like", "zeros_like"]
)
_INTEGERS: Final = (torch.int64, torch.int32)


class Positions:
    """The forms of one graph. The graph must not change meanwhile."""

    def __init__(self, effects: Effects) -> None:
        self._effects = effects
        self._forms: dict[tuple[fx.Node, fx.Node | None], Form | None] = {}

    def form(self, node: fx.Node, reader: fx.Node) -> Form | None:
        """What ``node`` is when ``reader`` reads it; None when that is not known."""
        stack = [(node, reader)]
        while stack:
            current, end = stack[-1]
            key = (current, self._effects.latest(current, end))
            if key in self._forms:
                stack.pop()
                continue
            maker = self._maker(current, end)
            waiting = [] if maker is None else self._waiting(maker)
            if waiting:
                stack.extend(waiting)
                continue
            self._forms[key] = None if maker is None else self._read(maker, current)
            stack.pop()
        return self._forms[node, self._effects.latest(node, reader)]

    def _maker(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The operation whose result a node is when it is read; None if no rule can know."""
        maker = self._effects.latest(node, reader) or node
        tensor = tensor_of(node)
        if tensor is None or not is_plain(tensor) or name_of(maker) not in RULES:
            return None
        if may_mutate(maker) and (not mutates_first_only(maker) or name_of(maker) in views.RULES):
            return None
        return maker if maker is node or _written(maker) is _written(node) else None

    def _waiting(self, maker: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """The arguments of an operation that have not been read yet."""
        if name_of(maker) in _CONSTANTS:
            return []
        return [
            (source, maker)
            for source in maker.all_input_nodes
            if tensor_of(source) is not None
            and (source, self._effects.latest(source, maker)) not in self._forms
        ]

    def _read(self, maker: fx.Node, node: fx.Node) -> Form | None:
        tensor = tensor_of(node)
        assert tensor is not None

        def form_of(source: object) -> Form | None:
            if not isinstance(source, fx.Node) or tensor_of(source) is None:
                return None
            return self._forms[source, self._effects.latest(source, maker)]

        found = RULES[name_of(maker)](Call(maker, tensor, form_of))
        if isinstance(found, (Affine, Distance)):
            affine = found.of if isinstance(found, Distance) else found
            wraps = tensor.dtype == torch.int32 and not isinstance(affine.offset, int)
            return found if fits(affine) and tensor.dtype in _INTEGERS and not wraps else None
        if tensor.requires_grad and not isinstance(found, Sum):
            return None  # its gradient would be lost
        return found


def _written(node: fx.Node) -> fx.Node:
    """The node whose value an in-place operation changes, through a chain of these."""
    while mutates_first_only(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
