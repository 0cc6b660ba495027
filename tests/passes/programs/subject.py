"""A captured graph to be edited: which node plays which part, and edits that keep it sound."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import maybe_get_fake_mode
from torch.utils import _pytree as pytree

from sage_compiler.backend import transform
from sage_compiler.config import parse_options
from sage_compiler.passes.normalize import operation
from sage_compiler.precision import EXACT
from sage_compiler.report import Report
from tests.passes.programs.canonical import Canonical

_PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum")
_SDPA = "scaled_dot_product_attention"


class Subject:
    """One canonical attention as a graph.

    Attributes:
        softmax, scores: the softmax and its input; None in scaled_dot_product_attention.
        first, second: Q K^T, and the weights with V; the same node in
            scaled_dot_product_attention.
        left, right: the operands of the first product.
        values: the operand of the second product that is not the weights.
        key_axis, query_axis: of the scores, counted from the end.
    """

    def __init__(self, gm: fx.GraphModule, inputs: list[Tensor]) -> None:
        self.gm = gm
        self.inputs = inputs
        nodes = list(gm.graph.nodes)
        self.softmax = next((node for node in nodes if operation(node) == "softmax"), None)
        if self.softmax is None:
            self.first = self.second = next(node for node in nodes if operation(node) == _SDPA)
            self.left, self.right, self.values = self.first.args[:3]
            return
        self.scores: fx.Node = self.softmax.all_input_nodes[0]
        self.first = _search(self.scores, lambda node: node.all_input_nodes)
        self.second = _search(self.softmax, lambda node: list(node.users))
        self.left, self.right = self.first.all_input_nodes[-2:]
        (self.weights,) = (
            node for node in self.second.all_input_nodes if _descends(node, self.softmax)
        )
        (self.values,) = (node for node in self.second.all_input_nodes if node is not self.weights)
        rank = self.example(self.softmax).dim()
        dim = self.softmax.kwargs.get("dim", self.softmax.args[1:2])
        dim = dim[0] if isinstance(dim, tuple) else dim
        self.key_axis = int(dim) % rank - rank
        self.query_axis = -3 - self.key_axis

    def example(self, node: fx.Node) -> Tensor:
        """The fake tensor that a node produces."""
        value = node.meta["example_value"]
        assert isinstance(value, Tensor)
        return value

    @property
    def path(self) -> list[fx.Node]:
        """What makes the scores from the first product, in order."""
        nodes = list(self.gm.graph.nodes)
        assert self.softmax is not None
        return nodes[nodes.index(self.first) + 1 : nodes.index(self.softmax)]

    # --- edits ---

    def insert(self, after: fx.Node, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call: of a method where the target is a name, else of a function."""
        graph = self.gm.graph
        with graph.inserting_after(after):
            if isinstance(target, str):
                return graph.call_method(target, args, kwargs)
            return graph.call_function(target, args, kwargs)

    def splice(self, user: fx.Node, operand: fx.Node, target: Any, *args: Any, **kw: Any) -> None:
        """Let ``user`` read ``target(operand, ...)`` instead of ``operand``."""
        graph = self.gm.graph
        with graph.inserting_before(user):
            if isinstance(target, str):
                new = graph.call_method(target, (operand, *args), kw)
            else:
                new = graph.call_function(target, (operand, *args), kw)
        user.replace_input_with(operand, new)

    def also_return(self, node: fx.Node) -> None:
        """Make a node one more result."""
        (output,) = (found for found in self.gm.graph.nodes if found.op == "output")
        output.args = ((*output.args[0], node),)

    def finish(self) -> None:
        """Bring metadata and code up to date with the edits."""
        self.gm.graph.lint()
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        examples = [self.example(node) for node in placeholders]
        mode = next(mode for mode in map(maybe_get_fake_mode, examples) if mode is not None)
        with mode, torch.no_grad():
            _Propagation(self.gm).run(*examples)
        self.gm.recompile()

    # --- runs ---

    def run(self) -> list[Any]:
        """Results, and inputs afterwards."""
        inputs = [x.clone() for x in self.inputs]
        torch.manual_seed(3)
        with torch.no_grad():
            results = pytree.tree_leaves(self.gm(*inputs))
        return [*results, *inputs]

    def rewrite(self) -> Report:
        """Hand the graph to the passes, which edit it."""
        return transform(self.gm, parse_options({"precision": EXACT}))


class _Propagation(fx.Interpreter):
    """Records what each node produces."""

    def run_node(self, n: fx.Node) -> Any:
        n.meta["example_value"] = result = super().run_node(n)
        return result


def _search(start: fx.Node, step: Callable[[fx.Node], list[fx.Node]]) -> fx.Node:
    """The product nearest to a node."""
    queue = [start]
    for node in queue:
        if operation(node) in _PRODUCTS:
            return node
        queue += step(node)
    raise AssertionError(f"no product near {start}")


def _descends(node: fx.Node, ancestor: fx.Node) -> bool:
    return node is ancestor or any(_descends(of, ancestor) for of in node.all_input_nodes)


Edit = Callable[[Subject], bool]  # whether it applies to the subject
Call = tuple[Any, ...]  # a target, its further positional arguments, and a dict of keywords


class Capture:
    """Captures a canonical attention once, and copies it for each edit."""

    def __init__(self, form: Canonical) -> None:
        graphs: list[tuple[fx.GraphModule, list[Tensor]]] = []

        def backend(gm: fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
            graphs.append((gm, [x.clone() for x in inputs]))
            return gm.forward

        torch._dynamo.reset()
        torch.compile(form.function, backend=backend, dynamic=False)(*form.inputs())
        ((self._gm, self._inputs),) = graphs

    def subject(self) -> Subject:
        return Subject(copy.deepcopy(self._gm), self._inputs)
