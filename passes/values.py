"""Tensors that a rewritten graph computes from the nodes of the original one.

A proof says what the operator's inputs are as small expressions; only the rewrite inserts nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import fx


@dataclass(frozen=True, eq=False, slots=True)
class Apply:
    """A call that the rewritten graph will make.

    Attributes:
        target: an overload of torch.ops.
        args: its positional arguments: nodes, further calls, numbers, and lists of these.
        kwargs: its keyword arguments, without nodes.
    """

    target: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...] = ()


class Result:
    """Stands for the operator's output in the expression that follows it."""


RESULT = Result()
Value: TypeAlias = fx.Node | Apply | Result


def nodes_of(value: Any) -> Iterator[fx.Node]:
    """The nodes of the original graph that an expression reads."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, Apply):
        for part in value.args:
            yield from nodes_of(part)
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from nodes_of(part)


def emit(
    value: Any,
    replace: Callable[[Any], Any],
    call: Callable[..., fx.Node],
    done: dict[int, fx.Node] | None = None,
) -> Any:  # a node, or whatever constant the expression is
    """Insert the calls of an expression, innermost first, each once.

    Args:
        value: an expression, or an argument of one.
        replace: what stands for a node or for ``RESULT`` in the new graph.
        call: inserts one call with these arguments and returns its node.
        done: calls already inserted, by the identity of their ``Apply``.
    """
    done = {} if done is None else done
    if isinstance(value, (fx.Node, Result)):
        return replace(value)
    if isinstance(value, Apply):
        if id(value) not in done:
            args = [emit(part, replace, call, done) for part in value.args]
            done[id(value)] = call(value.target, *args, **dict(value.kwargs))
        return done[id(value)]
    if isinstance(value, (tuple, list)):
        return type(value)(emit(part, replace, call, done) for part in value)
    return value
