"""When the values of one graph change in place, and which nodes share their memory.

A pass that reads a value later than the model did must know that it is still the same.
"""

from __future__ import annotations

import bisect
import functools
from typing import Final

from torch import Tensor, fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from sage_compiler.passes.normalize import is_plain, may_mutate, mutates_first_only

_ANY: Final = None  # what is written is not known: it may be anything


class Effects:
    """The writes of one graph, in its order. The graph must not change meanwhile."""

    def __init__(self, graph: fx.Graph) -> None:
        self._order = list(graph.nodes)
        self._position = {node: at for at, node in enumerate(self._order)}
        self._storages: dict[fx.Node, frozenset[int] | None] = {}
        self._merged: dict[frozenset[int], list[int]] = {}

    def position(self, node: fx.Node) -> int:
        """Where a node stands in the graph, from 0."""
        return self._position[node]

    def changed(self, node: fx.Node, start: fx.Node, end: fx.Node) -> bool:
        """Whether the value of ``node`` may be written from ``start`` on, before ``end``."""
        writes = self._writes_to(node)
        next_write = bisect.bisect_left(writes, self._position[start])
        return next_write < len(writes) and writes[next_write] < self._position[end]

    def latest(self, node: fx.Node, reader: fx.Node) -> fx.Node | None:
        """The last node before ``reader`` that may have written to the value of ``node``.

        None when the value is still what ``node`` made it.
        """
        writes = self._writes_to(node)
        count = bisect.bisect_left(writes, self._position[reader])
        last = writes[count - 1] if count else -1
        return self._order[last] if last > self._position[node] else None

    def written_before(self, node: fx.Node, reader: fx.Node) -> list[fx.Node]:
        """Every node before ``reader`` that may write to the value of ``node``, in order."""
        writes = self._writes_to(node)
        return [
            self._order[at] for at in writes[: bisect.bisect_left(writes, self._position[reader])]
        ]

    def changes(self, node: fx.Node) -> bool:
        """Whether anything in the graph may write to the value of ``node``."""
        return bool(self._writes_to(node))

    def shares_memory(self, node: fx.Node, other: fx.Node) -> bool:
        """Whether two values may lie in the same memory."""
        ours, theirs = self._storages_of(node), self._storages_of(other)
        return ours is _ANY or theirs is _ANY or not ours.isdisjoint(theirs)

    @functools.cached_property
    def _mutators(self) -> list[fx.Node]:
        return [node for node in self._order if may_mutate(node)]

    @functools.cached_property
    def _places(self) -> list[int]:
        return [self._position[node] for node in self._mutators]

    @functools.cached_property
    def _writes(self) -> tuple[dict[int, list[int]], list[int]]:
        """Positions of the writes to each storage, and of those that may write to any."""
        known: dict[int, list[int]] = {}
        unknown: list[int] = []
        for mutator in self._mutators:
            written = self._written_by(mutator)
            if written is _ANY:
                unknown.append(self._position[mutator])
                continue
            for storage in written:
                known.setdefault(storage, []).append(self._position[mutator])
        return known, unknown

    def _writes_to(self, node: fx.Node) -> list[int]:
        """Positions of all nodes that may write to the value of ``node``, in order."""
        if not self._mutators:
            return []
        storages = self._storages_of(node)
        if storages is _ANY:
            return self._places
        if storages not in self._merged:
            known, unknown = self._writes
            found = set(unknown).union(*(known.get(storage, ()) for storage in storages))
            self._merged[storages] = sorted(found)
        return self._merged[storages]

    def _written_by(self, mutator: fx.Node) -> frozenset[int] | None:
        if isinstance(mutator.target, OpOverload):
            given = _written_arguments(mutator, mutator.target)
        elif mutates_first_only(mutator):
            given = [part for part in mutator.args[:1] if isinstance(part, fx.Node)]
        else:
            given = mutator.all_input_nodes
        written: set[int] = set()
        for node in given:
            storages = self._storages_of(node)
            if storages is _ANY:
                return _ANY
            written |= storages
        return frozenset(written)

    def _storages_of(self, node: fx.Node) -> frozenset[int] | None:
        """The storages in which a node's tensors lie; Dynamo's fake ones alias as real ones do."""
        if node not in self._storages:
            self._storages[node] = _storages(node)
        return self._storages[node]


def _storages(node: fx.Node) -> frozenset[int] | None:
    if "example_value" not in node.meta:
        return _ANY
    leaves = pytree.tree_leaves(node.meta["example_value"])
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    if not all(is_plain(tensor) for tensor in tensors):
        return _ANY
    return frozenset(tensor.untyped_storage()._cdata for tensor in tensors)


def _written_arguments(node: fx.Node, target: OpOverload) -> list[fx.Node]:
    """The nodes that an overload's schema says it writes to."""
    found: list[fx.Node] = []
    for position, declared in enumerate(target._schema.arguments):
        if declared.alias_info is None or not declared.alias_info.is_write:
            continue
        by_position = node.args[position] if position < len(node.args) else None
        given = node.kwargs.get(declared.name, by_position)
        found.extend(leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, fx.Node))
    return found
