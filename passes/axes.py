"""Which index of an attention each dim of a tensor runs over, whatever its shape is called.

An ``Axis`` is one index: batch, head, query position, key position, channel. A dim of a tensor runs
over one axis, over several that were merged (outermost first), or over none: size 1, broadcast. A
view splits and merges, a transpose reorders; what an attention computes is then read off from
which tensors share which axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import SymInt
from torch.fx.experimental.symbolic_shapes import statically_known_true

from sage_compiler.passes.values import Apply, Value

_aten = torch.ops.aten
Size: TypeAlias = int | SymInt


class Axis:
    """One index with its size; compared by identity. A view may split it later."""

    __slots__ = ("parts", "size")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parts: tuple[Axis, ...] = ()

    def split(self, sizes: Sequence[Size]) -> tuple[Axis, ...]:
        """Parts of these sizes, outermost first, which stand for this axis everywhere from now."""
        assert not self.parts
        self.parts = tuple(Axis(size) for size in sizes)
        return self.parts


Dim: TypeAlias = tuple[Axis, ...]
Layout: TypeAlias = tuple[Dim, ...]


def flat(axes: Iterable[Axis]) -> Dim:
    """The axes with split ones replaced by their parts."""
    found: list[Axis] = []
    for axis in axes:
        found.extend(flat(axis.parts) if axis.parts else (axis,))
    return tuple(found)


def axes_of(layout: Layout) -> Dim:
    """All axes of a tensor, outermost first."""
    return flat(axis for dim in layout for axis in dim)


def same(a: Size, b: Size) -> bool:
    """Whether two sizes are provably equal."""
    return a is b or statically_known_true(a == b)


def is_one(size: Size) -> bool:
    """Whether a size is the number 1; tracing makes a symbol of no size that is."""
    return isinstance(size, int) and size == 1


def product(axes: Iterable[Axis]) -> Size:
    """The size of a dim that runs over these axes."""
    return math.prod(axis.size for axis in flat(axes))


def broadcast(sizes: Sequence[Size], layout: Layout) -> Layout | None:
    """The layout of a tensor that broadcasts against one with ``layout``, dims aligned at the end.

    None where it is larger than that one.
    """
    extra = max(0, len(sizes) - len(layout))
    if not all(is_one(size) for size in sizes[:extra]):
        return None
    found: list[Dim] = [()] * extra
    aligned = layout[len(layout) - len(sizes) + extra :]
    for size, dim in zip(sizes[extra:], aligned, strict=True):
        if is_one(size) and not is_one(product(dim)):
            dim = ()
        elif not is_one(size) and is_one(product(dim)):
            return None
        found.append(dim)
    return tuple(found)


def reshape(layout: Layout, sizes: Sequence[Size]) -> Layout | None:
    """The layout after a view to these sizes, splitting axes where needed.

    None where a new dim would run over a part of one axis and of the next.
    """
    rest = list(axes_of(layout))
    wanted = list(sizes)
    if any(isinstance(size, int) and size == 0 for size in (*wanted, *(a.size for a in rest))):
        return None
    found: list[Dim] = []
    while wanted:
        size = wanted[0]
        if rest and same(rest[0].size, size):
            found.append((rest.pop(0),))
            wanted.pop(0)
        elif is_one(size):
            found.append(())
            wanted.pop(0)
        elif rest and is_one(rest[0].size):
            rest.pop(0)
        elif (count := _prefix([axis.size for axis in rest], size)) is not None:
            found.append(tuple(rest[:count]))
            del rest[:count]
            wanted.pop(0)
        elif rest and (count := _prefix(wanted, rest[0].size)) is not None:
            rest[:1] = rest[0].split([part for part in wanted[:count] if not is_one(part)])
        elif not (rest and _split_evenly(rest, size)):
            return None
    return tuple(found) if all(is_one(axis.size) for axis in rest) else None


def _prefix(sizes: Sequence[Size], size: Size) -> int | None:
    """How many of the first sizes multiply to ``size``."""
    total: Size = 1
    for count, each in enumerate(sizes, 1):
        total = total * each
        if same(total, size):
            return count
    return None


def _split_evenly(rest: list[Axis], size: Size) -> bool:
    """Split the axis in which a new dim of a known size ends, where the numbers allow that."""
    taken = 1
    for at, axis in enumerate(rest):
        if not (isinstance(size, int) and isinstance(axis.size, int)):
            return False
        if size % (taken * axis.size) == 0:
            taken *= axis.size
            continue
        inner = size // taken
        if size % taken or axis.size % inner or inner == 1:
            return False
        rest[at : at + 1] = axis.split([inner, axis.size // inner])
        return True
    return False


class Sizes:
    """Sizes for the calls of an expression: numbers, or what computes them in the graph."""

    def __init__(self, symbols: dict[Any, Any]) -> None:
        self._symbols = symbols

    def of(self, axes: Iterable[Axis]) -> Any | None:
        """The product of the sizes, as a number or a node; None where no node computes it."""
        size = product(axes)
        if isinstance(size, int):
            return size
        expression = size.node.expr
        return int(expression) if expression.is_number else self._symbols.get(expression)

    def shape(self, dims: Sequence[Dim]) -> list[Any] | None:
        """The sizes of dims, one of them -1 where it cannot be said; None where two cannot."""
        sizes = [self.of(dim) for dim in dims]
        if sizes.count(None) > 1:
            return None
        return [-1 if size is None else size for size in sizes]


def arrange(value: Value, layout: Layout, target: Sequence[Dim], sizes: Sizes) -> Value | None:
    """An expression for ``value`` with one dim for each group of ``target``, in that order.

    A group of which the tensor has no axis becomes a dim of size 1; one of which it has only some
    is expanded. None where the sizes that this takes cannot be said.
    """
    present = set(axes_of(layout))
    groups = [flat(group) for group in target]
    wanted = [axis for group in groups for axis in group if axis in present]
    if present - set(wanted):
        if not all(is_one(axis.size) for axis in present - set(wanted)):
            return None
        present &= set(wanted)
    value_or_none = _to_axes(value, layout, present, sizes)
    if value_or_none is None:
        return None
    value, order = value_or_none
    permutation = [order.index(axis) for axis in wanted]
    if permutation != sorted(permutation):
        value = Apply(_aten.permute.default, (value, permutation))
    return _group(value, wanted, groups, sizes)


def _to_axes(
    value: Value, layout: Layout, present: set[Axis], sizes: Sizes
) -> tuple[Value, list[Axis]] | None:
    """The value with exactly one dim for each axis, and these axes."""
    dims: list[Dim] = [tuple(axis for axis in flat(dim) if axis in present) for dim in layout]
    order = [axis for dim in dims for axis in dim]
    if all(len(dim) == 1 for dim in dims):
        return value, order
    if any(len(dim) > 1 for dim in dims):
        shape = sizes.shape([(axis,) for axis in order])
        return None if shape is None else (Apply(_aten.reshape.default, (value, shape)), order)
    empty = [at for at, dim in enumerate(dims) if not dim]
    return Apply(_aten.squeeze.dims, (value, empty)), order


def _group(
    value: Value, order: Sequence[Axis], groups: Sequence[Dim], sizes: Sizes
) -> Value | None:
    """The value, whose dims are ``order``, with the axes of each group in one dim."""
    have = set(order)
    partial = [group for group in groups if 0 < len(have & set(group)) < len(group)]
    if partial:
        full = [axis for group in groups for axis in group if axis in have or group in partial]
        for at, axis in enumerate(full):
            if axis not in have:
                value = Apply(_aten.unsqueeze.default, (value, at))
        wanted = [-1 if axis in have else sizes.of((axis,)) for axis in full]
        if None in wanted:
            return None
        value = Apply(_aten.expand.default, (value, wanted))
        have = set(full)
    if all(len(group) == 1 for group in groups if have & set(group)):
        for at, group in enumerate(groups):
            if not have & set(group):
                value = Apply(_aten.unsqueeze.default, (value, at))
        return value
    shape = sizes.shape([group if have & set(group) else () for group in groups])
    return None if shape is None else Apply(_aten.reshape.default, (value, shape))
