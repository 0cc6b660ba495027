"""The state of a graph at one moment, for reports and for taking an edit back.

Copying a graph costs more than all passes together; remembering what its nodes say costs little,
because arguments are immutable. A graph is built from that only when somebody asks.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import fx


class Snapshot:
    """What a graph is now, whatever becomes of it later."""

    def __init__(self, graph: fx.Graph) -> None:
        self._tracer_cls = graph._tracer_cls
        self._codegen = graph._codegen
        self._nodes: list[tuple[fx.Node, tuple[Any, ...]]] = [
            (
                node,
                (node.op, node.target, node.args, node.kwargs, node.name, node.type),
            )
            for node in graph.nodes
        ]
        self._meta = [copy.copy(node.meta) for node, _ in self._nodes]

    def __len__(self) -> int:
        """How many nodes the graph had."""
        return len(self._nodes)

    def build(self) -> fx.Graph:
        """A new graph equal to the one that was: names, metadata and code generator too."""
        graph = fx.Graph(tracer_cls=self._tracer_cls)
        twin: dict[fx.Node, fx.Node] = {}
        for (node, (op, target, args, kwargs, name, expression)), meta in zip(
            self._nodes, self._meta, strict=True
        ):
            twin[node] = graph.create_node(
                op,
                target,
                fx.map_arg(args, twin.__getitem__),
                fx.map_arg(kwargs, twin.__getitem__),
                name,
                expression,
            )
            twin[node].meta = copy.copy(meta)
            # Dynamo tells AOTAutograd through this attribute which input is a parameter.
            if hasattr(node, "_dynamo_source"):
                twin[node]._dynamo_source = node._dynamo_source
        graph.set_codegen(self._codegen)
        return graph
