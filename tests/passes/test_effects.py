"""When values change in place: by themselves, through views, through statements nobody names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from sage_compiler.passes.effects import Effects
from tests.passes.checks import captured, normal


def _effects(function: Callable[..., Any], *inputs: Any) -> tuple[Effects, dict[str, fx.Node]]:
    gm = captured(function, *inputs)
    return Effects(gm.graph), {node.name: node for node in gm.graph.nodes}


def _node(nodes: dict[str, fx.Node], name: str) -> fx.Node:
    (found,) = [node for key, node in nodes.items() if key.rstrip("_0123456789") == name]
    return found


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.mul_(2.0),
        lambda x: x.view(-1)[:1].mul_(2.0),
        lambda x: x.__setitem__(0, 1.0),
        lambda x: torch.add(x, 1.0, out=x),
        lambda x: x.copy_(torch.ones(2, 3)),
    ],
)
def test_a_change_between_two_readers_is_seen(change: Callable[[Tensor], Any]) -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        made = x + 1
        before = made.sin()
        change(made)
        return before, made.cos()

    effects, nodes = _effects(function, normal(2, 3))
    made, sin, cos = _node(nodes, "made"), nodes["before"], _node(nodes, "cos")
    assert effects.changed(made, sin, cos)
    assert effects.latest(made, cos) is not None
    assert effects.latest(made, sin) is None
    assert not effects.changed(_node(nodes, "l_x"), sin, cos)


def test_what_is_written_to_is_the_first_argument_alone() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        made = x + 1
        made.add_(y)
        return made + y

    effects, nodes = _effects(function, normal(2, 3), normal(2, 3, seed=1))
    first, last = nodes["made"], _node(nodes, "output")
    assert effects.changed(nodes["made"], first, last)
    assert not effects.changed(nodes["l_y_"], first, last)


def test_a_graph_without_changes() -> None:
    effects, nodes = _effects(lambda x: (x + 1).sin().view(-1), normal(2, 3))
    for node in nodes.values():
        assert not effects.changes(node)


def test_inputs_that_share_memory() -> None:
    """Two views of one tensor come in as two inputs."""
    base = normal(4, 3)

    def function(x: Tensor, y: Tensor) -> Tensor:
        read = y.sin()
        x.mul_(2.0)
        return read + y

    effects, nodes = _effects(function, base[:2], base.t().t()[:2])
    assert effects.shares_memory(nodes["l_x_"], nodes["l_y_"])
    assert effects.changed(nodes["l_y_"], nodes["read"], _node(nodes, "output"))


def test_calls_that_are_not_known_may_write_to_everything_they_get() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.placeholder("y")
    with torch._subclasses.FakeTensorMode():
        for node in (x, y):
            node.meta["example_value"] = torch.empty(2)
    first = graph.call_function(torch.sin, (x,))
    unknown = graph.call_function(len, (x,))
    unknown.target = _unknown
    output = graph.output((first, unknown))
    effects = Effects(graph)
    assert effects.changed(x, first, output)
    assert not effects.changed(y, first, output)


def _unknown(x: Tensor) -> None:
    x.zero_()
