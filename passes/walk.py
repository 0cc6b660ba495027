"""What the proofs of one graph share: its effects, constants and sizes."""

from __future__ import annotations

import functools
from typing import Any, Final

import torch
from torch import SymFloat, SymInt, Tensor, fx
from torch.fx.experimental.symbolic_shapes import guard_float, guard_int
from torch.utils._sympy.symbol import SymT, symbol_is_type

from sage_compiler.passes.axes import Size, Sizes
from sage_compiler.passes.effects import Effects
from sage_compiler.passes.masks import MaskContext
from sage_compiler.passes.normalize import argument, operation, tensor_of
from sage_compiler.passes.values import Apply

# What changes how the operations after it compute: they must all stand in one such region.
_BORDERS: Final = frozenset(
    ["_enter_autocast", "_exit_autocast", "_set_grad_enabled", "set_grad_enabled", "inference_mode"]
)


class Walk:
    """One graph and what is known of it. The graph must not change meanwhile."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.effects = Effects(graph)
        self.masks = MaskContext(self.effects)

    def number(self, given: Any, reader: fx.Node) -> float | SymFloat | SymInt | None:
        """A scalar: a number, or one computed from sizes; None for a tensor that is no constant."""
        found = scalar(given)
        if found is None and isinstance(given, fx.Node):
            return self._constant(given, reader)
        return found

    def _constant(self, node: fx.Node, reader: fx.Node) -> float | None:
        """The value of a tensor of one element, or of one that is filled with one number."""
        tensor = tensor_of(node)
        if (
            operation(node) in ("full_like", "full")
            and tensor is not None
            and tensor.is_floating_point()
            and not self.effects.changes(node)
        ):
            fill = argument(node, 1, "fill_value")
            return float(fill) if isinstance(fill, (int, float)) else None
        return self.masks.constant_number(node, reader)

    @functools.cached_property
    def sizes(self) -> Sizes:
        """What computes which symbolic size: a node, or else a look at an input of the graph.

        Dynamo hands every symbol to its graph; torch.export computes those that the model asks for.
        """
        symbols: dict[Any, Any] = {}
        looks: dict[Any, Any] = {}
        for node in self.graph.nodes:
            value = node.meta.get("example_value", node.meta.get("val"))
            if isinstance(value, SymInt):
                symbols.setdefault(value.node.expr, node)
            elif node.op == "placeholder" and isinstance(value, Tensor):
                for dim, size in enumerate(value.shape):
                    if isinstance(size, SymInt):
                        look = Apply(torch.ops.aten.sym_size.int, (node, dim))
                        looks.setdefault(size.node.expr, look)
        return Sizes(looks | symbols)

    @functools.cached_property
    def _borders(self) -> list[int]:
        return [self.effects.position(n) for n in self.graph.nodes if operation(n) in _BORDERS]

    def crosses_border(self, start: fx.Node, end: fx.Node) -> bool:
        """Whether autocast or the grad mode changes between two nodes."""
        first, last = self.effects.position(start), self.effects.position(end)
        return any(first < at < last for at in self._borders)

    @functools.cached_property
    def _enters_autocast(self) -> bool:
        return any(operation(node) == "_enter_autocast" for node in self.graph.nodes)

    def may_autocast(self, device_type: str) -> bool:
        """Whether autocast may be on somewhere in the graph."""
        available = torch.amp.is_autocast_available(device_type)
        return self._enters_autocast or (available and torch.is_autocast_enabled(device_type))


def constant_size(size: Size) -> Size:
    """The size as a number, guarded, unless it is only known at run time.

    Head counts and head_dim choose the kernel: where a model was traced with symbols for them,
    they become constants of the compiled graph, which another model width compiles anew.
    """
    if isinstance(size, int) or not size.node.has_hint():
        return size
    return guard_int(size)


def scalar(given: Any) -> float | SymFloat | SymInt | None:
    """A number, or a node that computes one from sizes; None for anything else."""
    value = given
    if isinstance(given, fx.Node):
        value = given.meta.get("example_value", given.meta.get("val"))
    if isinstance(value, (int, float)):
        return float(value)
    return constant_number(value) if isinstance(value, (SymFloat, SymInt)) else None


def constant_number(value: SymFloat | SymInt) -> float | SymFloat | SymInt:
    """The value as a number, guarded, unless it depends on sizes.

    Under ``dynamic=True`` Dynamo passes a model's own floats, such as its scale, as inputs.
    """
    symbols = value.node.expr.free_symbols
    given = all(symbol_is_type(symbol, SymT.FLOAT) for symbol in symbols)
    if symbols and given and isinstance(value, SymFloat) and value.node.has_hint():
        return guard_float(value)
    return value if symbols else float(value.node.expr)
